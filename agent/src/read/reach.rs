//! How much of a disk is asked about at once. QEMU looks for the answer in its main thread, and its guest
//! waits meanwhile: over 50 ms for a fragmented disk of 4 GiB on a busy host (tried).

use std::time::Duration;

/// How long an answer may take; shorter than what a guest feels, longer than the way there and back.
const WANTED: Duration = Duration::from_millis(1);
const FIRST: u64 = 128 << 20;
const MIN: u64 = 16 << 20;
/// Beside a guest that works: after a part of the disk that is told at once another may follow that takes
/// long.
const GENTLE_MAX: u64 = 256 << 20;
/// At each change QEMU's filter searches its bitmaps of all that is still asked about, and answers nobody
/// meanwhile: QEMU 10 was deaf for over half a minute on 8 TiB that nothing had been written to.
const MAX: u64 = 64 << 30;
/// A disk is asked about in hardly more parts, however large it is and however slow its host.
const PARTS_MAX: u64 = 4096;
/// Of one answer to the next it becomes this much shorter at most, and twice as long.
const SHORTER_MAX: f64 = 1.0 / 8.0;

/// How many bytes are asked about at once.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    len: u64,
    min: u64,
    max: u64,
}

impl Reach {
    /// For a disk of `size` bytes, of a guest that works or one that does not.
    pub fn new(size: u64, works: bool) -> Self {
        let min = MIN.max(size / PARTS_MAX).min(MAX);
        let max = if works { GENTLE_MAX.max(min) } else { MAX };
        Self { len: FIRST.max(min), min, max }
    }

    /// Bytes to ask about next.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Takes note of how long an answer took.
    pub fn learn(&mut self, took: Duration) {
        let share = WANTED.as_secs_f64() / took.as_secs_f64().max(1e-6);
        let len = (self.len as f64 * share.clamp(SHORTER_MAX, 2.0)) as u64;
        self.len = len.clamp(self.min, self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIB: u64 = 1 << 40;

    /// The longest time that QEMU takes for an answer but the first, and how many it gives: `micros` for each MiB.
    fn asked(size: u64, micros: u64) -> (Duration, u64) {
        let (mut reach, mut at, mut longest, mut answers) =
            (Reach::new(size, false), 0, Duration::ZERO, 0);
        while at < size {
            let len = reach.len().min(size - at);
            let took = Duration::from_micros((len >> 20) * micros);
            longest = if answers == 0 { longest } else { longest.max(took) };
            reach.learn(took);
            (at, answers) = (at + len, answers + 1);
        }
        (longest, answers)
    }

    #[test]
    fn p2_a_disk_that_is_slow_to_tell_is_asked_in_short_parts() {
        let (longest, _) = asked(64 << 30, 40);
        assert!(longest <= 2 * WANTED, "{longest:?}");
    }

    #[test]
    fn p2_beside_a_guest_that_works_no_part_is_long_however_quickly_the_last_was_told() {
        let mut reach = Reach::new(TIB, true);
        for _ in 0..100 {
            reach.learn(Duration::ZERO);
        }
        assert_eq!(reach.len(), GENTLE_MAX);
    }

    #[test]
    fn a_disk_that_tells_at_once_is_asked_in_few_parts_and_never_in_more_than_a_bound() {
        let (_, answers) = asked(64 * TIB, 0);
        assert!(answers <= 64 * TIB / MAX + 10, "{answers}");
        let (_, answers) = asked(64 * TIB, 10_000);
        assert!(answers <= PARTS_MAX + 1, "{answers}");
    }
}
