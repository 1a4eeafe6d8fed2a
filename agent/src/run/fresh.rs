//! Whether a domain has good backups that are young enough, and enough of them.

use std::time::Duration;

use jiff::Timestamp;

use super::state::DomainState;
use crate::units::human_duration;

/// A day: no backup is too old before.
const AGE_MIN: Duration = Duration::from_secs(86_400);

/// What is asked of a domain's backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// How old the last good one may be.
    pub age_max: Duration,
    /// How many there must be.
    pub count_min: u64,
}

impl Wanted {
    /// What is configured; else twice the job's interval, at least a day.
    pub fn new(age_max: Option<Duration>, count_min: Option<u32>, interval: Duration) -> Self {
        let age_max = age_max.unwrap_or_else(|| (interval * 2).max(AGE_MIN));
        Self { age_max, count_min: u64::from(count_min.unwrap_or(0)) }
    }

    /// Why the backups of a domain are not good enough; `None` where they are. A domain that is new has as
    /// long for its first one as for any other.
    pub fn lacks(&self, known: &DomainState, now: Timestamp) -> Option<String> {
        let limit = human_duration(self.age_max);
        let is_too_old = |time: Timestamp| {
            Duration::try_from(now.duration_since(time)).is_ok_and(|age| age > self.age_max)
        };
        // One that lies in the future is as old as it is known to do so.
        let last_good = match known.last_good {
            Some(last) if last > now => known.in_future_since.or(Some(last)),
            last => last,
        };
        match (last_good, known.since) {
            (Some(last), _) if is_too_old(last) => {
                let age = Duration::try_from(now.duration_since(last)).unwrap_or_default();
                let age = human_duration(Duration::from_secs(age.as_secs() / 60 * 60));
                return Some(format!("its last good backup is {age} old, which may be {limit}"));
            }
            (None, Some(since)) if is_too_old(since) => {
                return Some(format!("it has no good backup, and has been known for over {limit}"));
            }
            _ => {}
        }
        let count = known.snapshots.filter(|count| *count < self.count_min)?;
        // One that is new cannot have more yet.
        let is_new = known.since.is_none_or(|since| !is_too_old(since));
        (!is_new).then(|| format!("it has {count} snapshots, and must have {}", self.count_min))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(hour: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + hour * 3600).unwrap()
    }

    fn known(since: i64, last: Option<i64>, snapshots: u64) -> DomainState {
        DomainState {
            since: Some(at(since)),
            last_good: last.map(at),
            snapshots: Some(snapshots),
            ..DomainState::default()
        }
    }

    #[test]
    fn a_backup_is_too_old_after_twice_the_interval_and_not_before_a_day() {
        let hourly = Wanted::new(None, None, HOUR);
        assert_eq!(hourly.lacks(&known(0, Some(0), 1), at(24)), None);
        let told = hourly.lacks(&known(0, Some(0), 1), at(25)).unwrap();
        assert_eq!(told, "its last good backup is 25 h old, which may be 24 h");
        assert_eq!(Wanted::new(None, None, 24 * HOUR).lacks(&known(0, Some(0), 1), at(48)), None);
        let configured = Wanted::new(Some(2 * HOUR), None, 24 * HOUR);
        assert!(configured.lacks(&known(0, Some(0), 1), at(3)).is_some());
    }

    #[test]
    fn a_new_domain_has_as_long_for_its_first_backups() {
        let wanted = Wanted::new(None, Some(3), HOUR);
        assert_eq!(wanted.lacks(&known(0, None, 0), at(24)), None);
        assert!(wanted.lacks(&known(0, None, 0), at(25)).unwrap().contains("no good backup"));
        assert_eq!(wanted.lacks(&known(0, Some(20), 2), at(20)), None);
        let told = wanted.lacks(&known(0, Some(40), 2), at(41)).unwrap();
        assert_eq!(told, "it has 2 snapshots, and must have 3");
        assert_eq!(wanted.lacks(&known(0, Some(40), 3), at(41)), None);
    }

    #[test]
    fn r17_a_backup_from_the_future_is_not_too_old_for_as_long_as_any_other() {
        let (wanted, mut web) = (Wanted::new(None, None, HOUR), known(9, Some(900), 1));
        web.meet(None, at(10));
        assert_eq!(wanted.lacks(&web, at(34)), None);
        web.meet(None, at(35));
        assert!(wanted.lacks(&web, at(35)).is_some());
        // A clock that was wrong for a moment at the start of the host says nothing.
        let mut web = known(9, Some(20), 1);
        web.meet(None, at(-1000));
        web.meet(None, at(21));
        assert_eq!(wanted.lacks(&web, at(22)), None);
    }
}
