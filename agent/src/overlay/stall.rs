//! How long a guest's operations take while its overlays are written back: what can be known of that from
//! outside the guest. No I/O, no clock.
//!
//! QEMU counts operations and adds up their times. In between two looks the longest operation took no longer
//! than all of them together, and no less than their mean. Where QEMU sorts them by their time too, the
//! highest bin that grew tells more. An operation that waits in the guest's queue while QEMU changes its block
//! graph is counted by nobody: so the time of such commands is added to what it may have taken at most.

use std::fmt;
use std::time::Duration;

use crate::hypervisor::GuestIo;

/// One kind of operation, such as the writes to one disk, since its QEMU started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Series {
    /// How many have ended, and what they took together.
    pub counts: GuestIo,
    /// How many took how long, where that is counted.
    pub bins: Option<Bins>,
}

/// Operations by the time that they took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bins {
    /// Where one bin ends and the next begins, in nanoseconds, ascending.
    pub boundaries: Vec<u64>,
    /// Operations in each bin; one more than there are boundaries.
    pub counts: Vec<u64>,
}

/// The longest that any operation of the guest took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stall {
    /// One took so long, or longer.
    pub at_least: Duration,
    /// None took longer.
    pub at_most: Duration,
}

impl Stall {
    /// Both bounds in milliseconds, rounded away from each other.
    pub fn millis(self) -> [u64; 2] {
        let millis = |nanos: u128| u64::try_from(nanos / 1_000_000).unwrap_or(u64::MAX);
        [millis(self.at_least.as_nanos()), millis(self.at_most.as_nanos() + 999_999)]
    }

    /// The longer of two.
    pub fn join(self, other: Self) -> Self {
        Self {
            at_least: self.at_least.max(other.at_least),
            at_most: self.at_most.max(other.at_most),
        }
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.millis() {
            [0, most] => write!(f, "at most {most} ms"),
            [least, most] if least == most => write!(f, "{most} ms"),
            [least, most] => write!(f, "between {least} and {most} ms"),
        }
    }
}

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Watch {
    last: Option<Vec<Series>>,
    looks: u32,
    /// Whether it was ever not known what the guest did.
    lost: bool,
    operations: Stall,
    held_up: Duration,
    paused: Duration,
}

impl Watch {
    /// What goes on from here, without what was seen so far.
    pub fn next(self) -> Self {
        Self { looks: u32::from(self.last.is_some()), last: self.last, ..Self::default() }
    }

    /// Takes note of what the guest did up to now; `None` where that cannot be told.
    pub fn observe(&mut self, now: Option<Vec<Series>>) {
        self.looks += 1;
        let (Some(last), Some(now)) = (&self.last, &now) else {
            self.lost |= self.looks > 1;
            self.last = now;
            return;
        };
        // Devices came or went.
        self.lost |= last.len() != now.len();
        for (last, now) in last.iter().zip(now) {
            self.operations = self.operations.join(longest(last, now));
        }
        self.last = Some(now.clone());
    }

    /// Takes note of a command that changed the block graph: the guest's requests may have waited for it.
    pub fn held_up(&mut self, took: Duration) {
        self.held_up = self.held_up.max(took);
    }

    /// Takes note of how long the guest's processors stood still.
    pub fn paused(&mut self, took: Duration) {
        self.paused = self.paused.max(took);
    }

    /// The guest's longest stall; `None` where it could not be followed all the while.
    pub fn stall(&self) -> Option<Stall> {
        let Stall { at_least, at_most } = self.operations;
        let stall = Stall {
            at_least: at_least.max(self.paused),
            at_most: at_most + self.held_up.max(self.paused),
        };
        (!self.lost && self.looks > 1).then_some(stall)
    }
}

/// The longest operation between two looks.
fn longest(from: &Series, to: &Series) -> Stall {
    let operations = to.counts.operations.saturating_sub(from.counts.operations);
    let time = to.counts.time.saturating_sub(from.counts.time);
    // Those that failed took their time too, and are not counted.
    let mean = u32::try_from(operations).ok().and_then(|count| time.checked_div(count));
    let together = Stall { at_least: mean.unwrap_or_default(), at_most: time };
    match (&from.bins, &to.bins) {
        (Some(from), Some(to)) if from.boundaries == to.boundaries => {
            let grown = |(from, to): (&u64, &u64)| to > from;
            let Some(bin) = from.counts.iter().zip(&to.counts).rposition(grown) else {
                return Stall::default();
            };
            let boundary = |at: Option<usize>| to.boundaries.get(at?).copied();
            let (begin, end) = (boundary(bin.checked_sub(1)), boundary(Some(bin)));
            Stall {
                at_least: begin.map_or(Duration::ZERO, Duration::from_nanos),
                at_most: end.map_or(time, |end| time.min(Duration::from_nanos(end))),
            }
        }
        _ => together,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn series(operations: u64, time: Duration, bins: Option<[u64; 3]>) -> Series {
        let boundaries = vec![10_000_000, 20_000_000];
        let bins = bins.map(|counts| Bins { boundaries, counts: counts.into() });
        Series { counts: GuestIo { operations, time }, bins }
    }

    #[test]
    fn of_counted_operations_the_longest_lies_between_their_mean_and_their_sum() {
        let mut watch = Watch::default();
        watch.observe(Some(vec![series(5, 50 * MS, None), series(0, MS, None)]));
        assert_eq!(watch.stall(), None, "one look tells nothing");
        watch.observe(Some(vec![series(7, 90 * MS, None), series(0, MS, None)]));
        assert_eq!(watch.stall(), Some(Stall { at_least: 20 * MS, at_most: 40 * MS }));
        // An idle guest's does not become shorter.
        watch.observe(Some(vec![series(7, 90 * MS, None), series(0, MS, None)]));
        assert_eq!(watch.stall().unwrap().at_most, 40 * MS);
    }

    #[test]
    fn of_sorted_operations_the_highest_bin_that_grew_tells() {
        let mut watch = Watch::default();
        watch.observe(Some(vec![series(2, 90 * MS, Some([1, 0, 1]))]));
        watch.observe(Some(vec![series(9, 150 * MS, Some([5, 3, 1]))]));
        assert_eq!(watch.stall(), Some(Stall { at_least: 10 * MS, at_most: 20 * MS }));
        watch.observe(Some(vec![series(10, 950 * MS, Some([5, 3, 2]))]));
        assert_eq!(watch.stall(), Some(Stall { at_least: 20 * MS, at_most: 800 * MS }));
    }

    #[test]
    fn what_nobody_counts_is_added() {
        let mut watch = Watch::default();
        watch.observe(Some(vec![series(0, Duration::ZERO, None)]));
        watch.held_up(30 * MS);
        watch.observe(Some(vec![series(1, 5 * MS, None)]));
        assert_eq!(watch.stall(), Some(Stall { at_least: 5 * MS, at_most: 35 * MS }));
        watch.paused(400 * MS);
        assert_eq!(watch.stall(), Some(Stall { at_least: 400 * MS, at_most: 405 * MS }));
    }

    #[test]
    fn a_guest_that_was_not_followed_all_the_while_has_no_known_stall() {
        let mut never = Watch::default();
        (0..3).for_each(|_| never.observe(None));
        assert_eq!(never.stall(), None);
        let mut lost = Watch::default();
        lost.observe(Some(vec![series(0, MS, None)]));
        lost.observe(None);
        lost.observe(Some(vec![series(0, MS, None)]));
        assert_eq!(lost.stall(), None);
    }

    #[test]
    fn a_stall_is_told_as_well_as_it_is_known() {
        let told =
            |least: u32, most: u32| Stall { at_least: least * MS, at_most: most * MS }.to_string();
        assert_eq!(told(0, 7), "at most 7 ms");
        assert_eq!(told(3, 7), "between 3 and 7 ms");
        assert_eq!(told(7, 7), "7 ms");
    }
}
