//! How much of a disk is asked about at once. QEMU looks for the answer in its main thread, and its guest
//! waits meanwhile: over 50 ms for a fragmented disk of 4 GiB on a busy host (tried).

use std::time::Duration;

/// How long an answer may take; shorter than what a guest feels, longer than the way there and back.
const WANTED: Duration = Duration::from_millis(1);
const FIRST: u64 = 128 << 20;
const MIN: u64 = 16 << 20;
/// Beside a guest that works: a part of the disk that is told at once may be followed by one that takes long.
const GENTLE_MAX: u64 = 256 << 20;
/// At each change QEMU's filter searches its bitmaps of all that is still asked about, and answers nobody
/// meanwhile: QEMU 10 was deaf for over half a minute on 8 TiB that nothing had been written to.
const MAX: u64 = 64 << 30;
/// A disk is asked about in hardly more parts, however slow its host.
const PARTS_MAX: u64 = 32768;
/// From one answer to the next the length shrinks to this share at most, or doubles.
const SHRINK_MAX: f64 = 1.0 / 8.0;

/// How many bytes are asked about at once.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    len: u64,
    min: u64,
    max: u64,
}

impl Question {
    /// For a disk of `size` bytes, of a guest that works or one that does not.
    pub fn new(size: u64, works: bool) -> Self {
        let min = MIN.max(size / PARTS_MAX);
        let max = if works { GENTLE_MAX.max(min) } else { MAX.max(min) };
        Self { len: FIRST.clamp(min, max), min, max }
    }

    /// Bytes to ask about next.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Takes note of an answer about `told` bytes and how long it took.
    pub fn learn(&mut self, told: u64, took: Duration) {
        let share = WANTED.as_secs_f64() / took.as_secs_f64().max(1e-6);
        let len = (told as f64 * share.clamp(SHRINK_MAX, 2.0)) as u64;
        self.len = len.clamp(self.min, self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// Asks QEMU about a whole disk, which takes `micros` for each MiB: how long the longest answer took, but for
    /// the first, and how many there were.
    fn asked(size: u64, works: bool, micros: u64) -> (Duration, u64) {
        let (mut question, mut at) = (Question::new(size, works), 0);
        let (mut longest, mut answers) = (Duration::ZERO, 0);
        while at < size {
            let len = question.len().min(size - at);
            let took = Duration::from_micros((len >> 20) * micros);
            longest = if answers == 0 { longest } else { longest.max(took) };
            question.learn(len, took);
            (at, answers) = (at + len, answers + 1);
        }
        (longest, answers)
    }

    #[test]
    fn p2_a_disk_that_is_slow_to_tell_is_asked_in_short_parts() {
        let (longest, _) = asked(64 * GIB, false, 40);
        assert!(longest <= 2 * WANTED, "{longest:?}");
    }

    #[test]
    fn p2_beside_a_guest_that_works_no_part_is_long_however_quickly_the_last_was_told() {
        for size in [4 * GIB, 1024 * GIB, 8192 * GIB] {
            let mut question = Question::new(size, true);
            for _ in 0..100 {
                question.learn(question.len(), Duration::ZERO);
            }
            assert_eq!(question.len(), GENTLE_MAX);
        }
    }

    #[test]
    fn a_disk_that_tells_at_once_is_asked_in_few_parts_and_never_in_more_than_a_bound() {
        let size = 32768 * GIB;
        let (_, answers) = asked(size, false, 0);
        assert!(answers <= size / MAX + 10, "{answers}");
        let (_, answers) = asked(size, true, 10_000);
        assert!(answers <= PARTS_MAX + 1, "{answers}");
    }
}
