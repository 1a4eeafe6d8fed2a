//! How hard the guest's disks may be read: as hard as the guest does not feel. No I/O, no clock.

use std::time::Duration;

use crate::hypervisor::GuestIo;

/// How hard the disk is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Requests under way.
    pub requests: usize,
    /// Bytes of one; a chunk is the least.
    pub request_len: u64,
    /// Bytes of the parts that a request is read in, one after the other.
    pub part_len: u64,
    /// The pause after each part, in percent of the time that it took.
    pub rest_percent: u32,
}

const KIB: u64 = 1 << 10;
/// From what every guest can bear to flat out; more than that brings nothing from one QEMU thread.
///
/// A guest's operations wait for the thread of QEMU that serves us, too, and QEMU counts their time only from when
/// that comes to them. So its mean latency says nothing of that wait: beside 512 KiB under way all the time it was
/// no higher than without us, and the guest's own 99th percentile 2.8 times. What bounds the wait is the share of
/// that thread's time that we take. With the second of these the percentile was 1.4 times its idle value, with
/// requests of 256 KiB and pauses 1.8 times (medians of three backups each, two emulated processors for all).
const EFFORTS: [Effort; 3] = [
    Effort { requests: 1, request_len: 64 * KIB, part_len: 64 * KIB, rest_percent: 300 },
    Effort { requests: 1, request_len: 64 * KIB, part_len: 64 * KIB, rest_percent: 100 },
    Effort { requests: 8, request_len: 1024 * KIB, part_len: u64::MAX, rest_percent: 0 },
];
/// While the guest works.
const CAREFUL: usize = 1;
const FLAT_OUT: usize = EFFORTS.len() - 1;
/// The guest's mean latency may grow by half…
const TOLERATED_PERCENT: u32 = 150;
/// …and differences below this are noise.
const NOISE: Duration = Duration::from_micros(100);
/// The mean of fewer operations says nothing: they are counted together with the next ones.
const OPERATIONS_MIN: u64 = 4;
/// So many observations without a single operation make an idle guest.
const IDLE_OBSERVATIONS: u32 = 2;

/// The pace of reading.
///
/// Beside a guest that works there is one small request at a time, and a pause as long after it. Where the
/// guest's own latency grows by more than half of what it was before the backup, the pauses are three times as
/// long: it always goes on. A guest that does nothing is read flat out.
#[derive(Debug, Clone)]
pub struct Pace {
    baseline: Option<Duration>,
    step: usize,
    last: GuestIo,
    idle: u32,
}

impl Pace {
    /// A pace from what the guest did between two counts before the backup.
    pub fn new(before: GuestIo, at_start: GuestIo) -> Self {
        let baseline = mean_latency(before, at_start);
        let step = if baseline.is_some() { CAREFUL } else { FLAT_OUT };
        Self { baseline, step, last: at_start, idle: 0 }
    }

    /// How hard the disk may be read now.
    pub fn effort(&self) -> Effort {
        EFFORTS[self.step]
    }

    /// Whether the guest is at work, and needs the processors too.
    pub fn is_gentle(&self) -> bool {
        self.step < FLAT_OUT
    }

    /// Takes note of what the guest did up to now.
    pub fn observe(&mut self, now: GuestIo) {
        let latency = match mean_latency(self.last, now) {
            Some(latency) => latency,
            None if now.operations == self.last.operations => {
                self.idle += 1;
                if self.idle >= IDLE_OBSERVATIONS {
                    // It does nothing that could suffer.
                    self.step = (self.step + 1).min(FLAT_OUT);
                }
                return;
            }
            None => return,
        };
        self.last = now;
        self.idle = 0;
        self.step = match self.baseline {
            Some(baseline) if latency > tolerated(baseline) => 0,
            Some(_) => CAREFUL,
            // It woke up: what it sees now, with us flat out, is no baseline. Step aside first.
            None if self.step > CAREFUL => CAREFUL,
            None => {
                self.baseline = Some(latency);
                CAREFUL
            }
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
    fn p2_a_guest_that_suffers_makes_the_reader_rest_most_of_the_time_but_not_stop() {
        let mut io = GuestIo::default();
        let before = io;
        let mut pace = Pace::new(before, after(&mut io, 100, 1000));
        for _ in 0..5 {
            assert_eq!(pace.effort(), EFFORTS[CAREFUL], "one small request, and a pause");
            pace.observe(after(&mut io, 100, 1400));
        }
        for _ in 0..50 {
            pace.observe(after(&mut io, 100, 90_000));
            assert_eq!(pace.effort(), EFFORTS[0]);
            assert_eq!(pace.effort().requests, 1, "it goes on");
        }
        pace.observe(after(&mut io, 100, 1000));
        assert_eq!(pace.effort(), EFFORTS[CAREFUL], "it suffers no more");
    }

    #[test]
    fn p2_beside_a_guest_that_works_qemu_serves_us_half_of_the_time_at_most() {
        for effort in &EFFORTS[..FLAT_OUT] {
            assert_eq!((effort.requests, effort.part_len), (1, 64 * KIB));
            assert!(effort.rest_percent >= 100, "{effort:?}");
        }
    }

    #[test]
    fn an_idle_guest_is_read_flat_out_until_it_wakes_up() {
        let mut io = GuestIo::default();
        let mut pace = Pace::new(io, io);
        assert!(!pace.is_gentle());
        pace.observe(after(&mut io, 50, 9000));
        assert_eq!(pace.effort(), EFFORTS[CAREFUL], "it steps aside");
        pace.observe(after(&mut io, 50, 500));
        assert_eq!(pace.effort(), EFFORTS[CAREFUL], "it learns the baseline");
        pace.observe(after(&mut io, 50, 9000));
        assert_eq!(pace.effort(), EFFORTS[0], "it suffers");
        for _ in 0..IDLE_OBSERVATIONS {
            assert!(pace.is_gentle());
            pace.observe(after(&mut io, 0, 0));
        }
        pace.observe(after(&mut io, 0, 0));
        assert!(!pace.is_gentle(), "it fell asleep again");
        pace.observe(after(&mut io, 50, 500));
        assert!(pace.is_gentle(), "it works again, though it feels nothing yet");
    }

    #[test]
    fn p2_a_guest_that_stands_still_is_read_flat_out_whatever_it_did_before() {
        let mut io = GuestIo::default();
        let now = after(&mut io, 100_000, 900);
        let mut pace = Pace::new(now, now);
        for _ in 0..4 {
            assert!(!pace.is_gentle(), "it waits for the end");
            pace.observe(now);
        }
    }

    #[test]
    fn p2_a_guest_that_does_little_is_not_taken_for_idle() {
        let mut io = GuestIo::default();
        let before = io;
        let mut pace = Pace::new(before, after(&mut io, 100, 1000));
        for _ in 0..40 {
            pace.observe(after(&mut io, 1, 5000));
            assert_eq!(pace.effort().requests, 1);
        }
    }

    #[test]
    fn counters_that_run_backwards_do_no_harm() {
        let high = GuestIo { operations: 900, time: Duration::from_secs(9) };
        let mut pace = Pace::new(high, GuestIo::default());
        pace.observe(high);
        pace.observe(GuestIo::default());
        assert!(pace.effort().requests >= 1);
    }
}
