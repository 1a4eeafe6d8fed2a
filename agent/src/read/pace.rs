//! How many requests may be under way: as many as the guest does not feel. No I/O, no clock.

use std::time::Duration;

use crate::hypervisor::GuestIo;

/// Most requests under way; more brings nothing from one QEMU thread.
const DEPTH_MAX: usize = 8;
/// Most of them while the guest works: its mean latency hides what its slowest operations wait.
const DEPTH_MAX_GENTLE: usize = 2;
/// The guest's mean latency may grow by half…
const TOLERATED_PERCENT: u32 = 150;
/// …and differences below this are noise.
const NOISE: Duration = Duration::from_micros(100);
/// The mean of fewer operations says nothing: they are counted together with the next ones.
const OPERATIONS_MIN: u64 = 4;
/// So many observations without a single operation make an idle guest.
const IDLE_OBSERVATIONS: u32 = 4;

/// The pace of reading.
///
/// It begins with one request, adds another while the guest's own latency stays under one and a half
/// of what it was before the backup, and falls back to one when it does not. A guest that does nothing
/// is read flat out.
#[derive(Debug, Clone)]
pub struct Pace {
    baseline: Option<Duration>,
    depth: usize,
    last: GuestIo,
    idle: u32,
}

impl Pace {
    /// A pace from what the guest did between two counts before the backup.
    pub fn new(before: GuestIo, at_start: GuestIo) -> Self {
        let baseline = mean_latency(before, at_start);
        let depth = if baseline.is_some() { 1 } else { DEPTH_MAX };
        Self { baseline, depth, last: at_start, idle: 0 }
    }

    /// A pace for a guest that does not run.
    pub fn flat_out() -> Self {
        Self::new(GuestIo::default(), GuestIo::default())
    }

    /// Requests that may be under way.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Whether the guest is at work, so that requests should be short.
    pub fn is_gentle(&self) -> bool {
        self.depth < DEPTH_MAX
    }

    /// Takes note of what the guest did up to now.
    pub fn observe(&mut self, now: GuestIo) {
        let latency = match mean_latency(self.last, now) {
            Some(latency) => latency,
            None if now.operations == self.last.operations => {
                self.idle += 1;
                if self.idle >= IDLE_OBSERVATIONS {
                    // It does nothing that could suffer.
                    self.depth = (self.depth * 2).min(DEPTH_MAX);
                }
                return;
            }
            None => return,
        };
        self.last = now;
        self.idle = 0;
        self.depth = match self.baseline {
            // It woke up: what it sees now, with us at full depth, is no baseline. Step aside first.
            None if self.depth > 1 => 1,
            None => {
                self.baseline = Some(latency);
                1
            }
            Some(baseline) if latency > tolerated(baseline) => 1,
            Some(_) => (self.depth + 1).min(DEPTH_MAX_GENTLE),
        };
    }
}

fn tolerated(baseline: Duration) -> Duration {
    (baseline * TOLERATED_PERCENT / 100).max(baseline + NOISE)
}

fn mean_latency(from: GuestIo, to: GuestIo) -> Option<Duration> {
    let operations = to.operations.saturating_sub(from.operations);
    let time = to.time.saturating_sub(from.time);
    let count = u32::try_from(operations).unwrap_or(u32::MAX);
    (operations >= OPERATIONS_MIN).then(|| time / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that made `operations` of `micros` each since the last count.
    fn after(last: &mut GuestIo, operations: u64, micros: u64) -> GuestIo {
        last.operations += operations;
        last.time += Duration::from_micros(operations * micros);
        *last
    }

    #[test]
    fn p2_a_guest_that_suffers_makes_the_reader_step_back_at_once() {
        let mut io = GuestIo::default();
        let before = io;
        let mut pace = Pace::new(before, after(&mut io, 100, 1000));
        assert_eq!(pace.depth(), 1);
        for _ in 0..5 {
            pace.observe(after(&mut io, 100, 1200));
        }
        assert_eq!(pace.depth(), DEPTH_MAX_GENTLE);
        pace.observe(after(&mut io, 100, 2000));
        assert_eq!(pace.depth(), 1);
    }

    #[test]
    fn an_idle_guest_is_read_flat_out_until_it_wakes_up() {
        let mut io = GuestIo::default();
        let mut pace = Pace::flat_out();
        assert_eq!(pace.depth(), DEPTH_MAX);
        pace.observe(after(&mut io, 50, 9000));
        assert_eq!(pace.depth(), 1, "it steps aside");
        pace.observe(after(&mut io, 50, 500));
        assert_eq!(pace.depth(), 1, "it learns the baseline");
        pace.observe(after(&mut io, 50, 9000));
        assert_eq!(pace.depth(), 1);
        for _ in 0..IDLE_OBSERVATIONS + 1 {
            pace.observe(after(&mut io, 0, 0));
        }
        assert_eq!(pace.depth(), 4, "it fell asleep again");
    }

    #[test]
    fn p2_a_guest_that_does_little_is_not_taken_for_idle() {
        let mut io = GuestIo::default();
        let before = io;
        let mut pace = Pace::new(before, after(&mut io, 100, 1000));
        for _ in 0..40 {
            pace.observe(after(&mut io, 1, 5000));
        }
        assert_eq!(pace.depth(), 1);
    }

    #[test]
    fn counters_that_run_backwards_do_no_harm() {
        let high = GuestIo { operations: 900, time: Duration::from_secs(9) };
        let mut pace = Pace::new(high, GuestIo::default());
        pace.observe(high);
        pace.observe(GuestIo::default());
        assert!(pace.depth() >= 1);
    }
}
