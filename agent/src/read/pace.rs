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
    /// The pause after each part, in percent of the time that it took…
    rest_percent: u32,
    /// …and how long it may be.
    rest_max: Duration,
}

impl Effort {
    const fn small(rest_percent: u32, rest_max: Duration) -> Self {
        let len = 64 * KIB;
        Self { requests: 1, request_len: len, part_len: len, rest_percent, rest_max }
    }

    /// The pause after something that took QEMU so long.
    pub fn rest(&self, took: Duration) -> Duration {
        (took * self.rest_percent / 100).min(self.rest_max)
    }

    /// Whether the thread of QEMU that serves us is left to the guest at times.
    pub fn rests(&self) -> bool {
        self.rest_percent > 0
    }
}

const KIB: u64 = 1 << 10;
const MS: Duration = Duration::from_millis(1);
/// From what every guest can bear to flat out; more than that brings nothing from one QEMU thread.
///
/// A guest's operations wait for the thread of QEMU that serves us, too, and QEMU counts their time only from
/// the moment it picks them up. So its mean latency says nothing of that wait: beside 512 KiB under way all the
/// time it was no higher than without us, and the guest's own 99th percentile 2.8 times its idle value. What
/// bounds the wait is the share of that thread's time that we take: beside [`CAREFUL`] it was 1.4 times, with
/// requests of 256 KiB and such pauses 1.8 times (medians of three backups, two emulated processors for all).
const EFFORTS: [Effort; 5] = [
    Effort::small(300, Duration::from_millis(20)),
    Effort::small(100, MS),
    Effort { requests: 1, request_len: 256 * KIB, part_len: 256 * KIB, ..Effort::small(100, MS) },
    Effort { requests: 2, request_len: 256 * KIB, part_len: 256 * KIB, ..Effort::small(100, MS) },
    Effort { requests: 8, request_len: 1024 * KIB, part_len: u64::MAX, ..Effort::small(0, MS) },
];
/// Beside a guest that works.
const CAREFUL: usize = 1;
/// The most beside a guest that works: where its storage, not QEMU, is what takes the time.
const GENTLE_MAX: usize = FLAT_OUT - 1;
const FLAT_OUT: usize = EFFORTS.len() - 1;
/// A read that takes longer waits for the storage: QEMU's thread has a tenth of that to do for it.
const SLOW_READ: Duration = Duration::from_millis(2);
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
/// Beside a guest that works there is one small request at a time, and a pause as long after it, at most a
/// millisecond. Where the guest's own latency grows by more than half of what it was before the backup, the
/// pauses become several times longer: it always goes on. Larger requests, two at a time, are for where reads
/// wait for the storage, which the guest's latency tells of, or where another process than the guest's QEMU
/// serves them, and then without pauses. A guest that does nothing is read flat out.
#[derive(Debug, Clone)]
pub struct Pace {
    baseline: Option<Duration>,
    step: usize,
    last: GuestIo,
    idle: u32,
    /// Whether the guest's own QEMU serves what is read.
    by_guest: bool,
    /// How long a read has taken lately.
    read: Duration,
}

impl Pace {
    /// A pace from what the guest did between two counts before the backup, whose own QEMU serves what is read
    /// or not.
    pub fn new(before: GuestIo, at_start: GuestIo, by_guest: bool) -> Self {
        let baseline = mean_latency(before, at_start);
        let step = if baseline.is_some() { CAREFUL } else { FLAT_OUT };
        Self { baseline, step, last: at_start, idle: 0, by_guest, read: Duration::ZERO }
    }

    /// How hard the disk may be read now.
    pub fn effort(&self) -> Effort {
        let effort = EFFORTS[self.step];
        let rests = self.by_guest || self.step < CAREFUL;
        Effort { rest_percent: if rests { effort.rest_percent } else { 0 }, ..effort }
    }

    /// Takes note of how long a read took.
    pub fn note_read(&mut self, took: Duration) {
        self.read = (3 * self.read + took) / 4;
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
        if !self.is_gentle() {
            // How long reads take flat out says nothing of the storage.
            self.read = Duration::ZERO;
        }
        self.step = match self.baseline {
            Some(baseline) if latency > tolerated(baseline) => 0,
            Some(_) if self.step < CAREFUL => CAREFUL,
            Some(_) if !self.by_guest || self.read > SLOW_READ => (self.step + 1).min(GENTLE_MAX),
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

    /// The pace beside a guest whose operations take 1 ms, and what it has done so far.
    fn working(by_guest: bool) -> (Pace, GuestIo) {
        let mut io = GuestIo::default();
        let before = io;
        let pace = Pace::new(before, after(&mut io, 100, 1000), by_guest);
        (pace, io)
    }

    #[test]
    fn p2_a_guest_that_suffers_makes_the_reader_rest_most_of_the_time_but_not_stop() {
        let (mut pace, mut io) = working(true);
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
    fn p2_beside_a_guest_that_works_its_qemu_serves_us_half_of_the_time_at_most() {
        let (mut pace, mut io) = working(true);
        for _ in 0..20 {
            pace.note_read(Duration::from_micros(400));
            pace.observe(after(&mut io, 100, 900));
            assert_eq!(pace.effort().requests, 1);
            assert_eq!(pace.effort().rest(Duration::from_micros(400)).as_micros(), 400);
        }
    }

    #[test]
    fn reads_that_wait_for_the_storage_become_larger_while_the_guest_feels_nothing_of_it() {
        let (mut pace, mut io) = working(true);
        for _ in 0..20 {
            pace.note_read(Duration::from_millis(8));
            pace.observe(after(&mut io, 100, 1000));
        }
        assert_eq!(pace.effort(), EFFORTS[GENTLE_MAX]);
        assert_eq!(pace.effort().rest(Duration::from_millis(8)), MS, "QEMU was idle meanwhile");
        pace.observe(after(&mut io, 100, 2000));
        assert_eq!(pace.effort(), EFFORTS[0], "p2: it feels it");
    }

    #[test]
    fn what_another_process_serves_is_read_without_pauses_while_the_guest_feels_nothing_of_it() {
        let (mut pace, mut io) = working(false);
        for _ in 0..5 {
            assert!(!pace.effort().rests());
            pace.observe(after(&mut io, 100, 1000));
        }
        assert_eq!(pace.effort().requests, EFFORTS[GENTLE_MAX].requests);
        pace.observe(after(&mut io, 100, 2000));
        assert!(pace.effort().rests(), "p2: it feels it");
    }

    #[test]
    fn an_idle_guest_is_read_flat_out_until_it_wakes_up() {
        let mut io = GuestIo::default();
        let mut pace = Pace::new(io, io, true);
        assert!(!pace.is_gentle());
        pace.observe(after(&mut io, 50, 9000));
        assert_eq!(pace.effort(), EFFORTS[CAREFUL], "it steps aside");
        pace.observe(after(&mut io, 50, 500));
        assert_eq!(pace.effort(), EFFORTS[CAREFUL], "it learns the baseline");
        pace.observe(after(&mut io, 50, 9000));
        assert_eq!(pace.effort(), EFFORTS[0], "it suffers");
        for _ in 0..IDLE_OBSERVATIONS as usize + EFFORTS.len() - 2 {
            assert!(pace.is_gentle());
            pace.observe(after(&mut io, 0, 0));
        }
        assert!(!pace.is_gentle(), "it fell asleep again");
        pace.note_read(Duration::from_millis(90));
        pace.observe(after(&mut io, 50, 500));
        assert_eq!(pace.effort(), EFFORTS[CAREFUL], "it works again, though it feels nothing yet");
    }

    #[test]
    fn p2_a_guest_that_stands_still_is_read_flat_out_whatever_it_did_before() {
        let mut io = GuestIo::default();
        let now = after(&mut io, 100_000, 900);
        let mut pace = Pace::new(now, now, true);
        for _ in 0..4 {
            assert!(!pace.is_gentle(), "it waits for the end");
            pace.observe(now);
        }
    }

    #[test]
    fn p2_a_guest_that_does_little_is_not_taken_for_idle() {
        let mut io = GuestIo::default();
        let before = io;
        let mut pace = Pace::new(before, after(&mut io, 100, 1000), true);
        for _ in 0..40 {
            pace.observe(after(&mut io, 1, 5000));
            assert_eq!(pace.effort().requests, 1);
        }
    }

    #[test]
    fn counters_that_run_backwards_do_no_harm() {
        let high = GuestIo { operations: 900, time: Duration::from_secs(9) };
        let mut pace = Pace::new(high, GuestIo::default(), true);
        pace.observe(high);
        pace.observe(GuestIo::default());
        assert!(pace.effort().requests >= 1);
    }
}
