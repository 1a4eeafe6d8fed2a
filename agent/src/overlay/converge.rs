//! How long a guest may write faster than its overlay is written back. Plain decisions, without I/O.

use std::time::Duration;

use super::Written;

/// What a user allows.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// How long the guest is left alone.
    pub deadline: Duration,
    /// How long its processors may stand still at the end; zero for never.
    pub pause_max: Duration,
    /// Bytes a second at most that are written back.
    pub rate: Option<u64>,
}

/// What is done to the guest while its overlay is written back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Nothing.
    None,
    /// It writes more slowly.
    Slow,
    /// It stands still, for it is believed that what is left takes no longer than it may.
    Pause,
    /// It was tried long enough: the overlay stays.
    GiveUp,
}

/// A guest that is slowed down may write so many bytes a second at least.
const RATE_MIN: u64 = 1 << 20;
/// Of the rate at which the overlay is written back, the share that a slowed guest may write.
const SHARE: u64 = 4;

impl Budget {
    /// What to do after so long, with so much written at that rate in bytes a second.
    pub fn measure(&self, elapsed: Duration, written: Written, rate: u64) -> Measure {
        // Slowed down it may take half as long again.
        if elapsed < self.deadline {
            return Measure::None;
        }
        if elapsed < self.deadline + self.deadline / 2 {
            return Measure::Slow;
        }
        let left = written.total.saturating_sub(written.done);
        let needed = Duration::from_secs_f64(left as f64 / rate.max(1) as f64);
        match !self.pause_max.is_zero() && needed <= self.pause_max {
            true => Measure::Pause,
            false => Measure::GiveUp,
        }
    }
}

/// Bytes a second that a guest may write whose overlay is written back at `rate`.
pub fn slow_rate(rate: u64) -> u64 {
    (rate / SHARE).max(RATE_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r13_a_guest_is_left_alone_then_slowed_then_stopped_briefly_then_left_on_its_overlay() {
        let second = Duration::from_secs(1);
        let budget = Budget { deadline: 10 * second, pause_max: second, rate: None };
        let written = |left: u64| Written { done: 100, total: 100 + left, is_ready: false };
        assert_eq!(budget.measure(9 * second, written(1 << 40), 10), Measure::None);
        assert_eq!(budget.measure(10 * second, written(5), 10), Measure::Slow);
        assert_eq!(budget.measure(15 * second, written(5), 10), Measure::Pause);
        assert_eq!(budget.measure(15 * second, written(11), 10), Measure::GiveUp);
        assert_eq!(budget.measure(15 * second, written(11), 0), Measure::GiveUp);
        let never = Budget { pause_max: Duration::ZERO, ..budget };
        assert_eq!(never.measure(15 * second, written(0), 10), Measure::GiveUp);
    }

    #[test]
    fn p2_a_slowed_guest_still_writes() {
        assert_eq!(slow_rate(0), RATE_MIN);
        assert_eq!(slow_rate(400 << 20), 100 << 20);
    }
}
