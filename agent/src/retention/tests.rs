//! The rules, judged by hand-made histories and by a second, naive statement of them.

use jiff::civil::date;
use proptest::{collection::vec, prelude::*};

use super::*;

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

fn machine() -> Machine {
    Machine { domain: "web".into(), uuid: "1".into() }
}

fn at(hours: i64) -> Timestamp {
    let start = date(2026, 1, 1).to_zoned(TimeZone::UTC).unwrap().timestamp();
    start + SignedDuration::from_hours(hours)
}

fn candidate(number: usize, time: Timestamp) -> Candidate {
    Candidate {
        id: FileId::of(&number.to_le_bytes()),
        machine: machine(),
        time,
        tags: Vec::new(),
        is_whole: true,
        is_partial: false,
        is_unreadable: false,
        is_anchor: false,
        not_copied_to: Vec::new(),
        last_in: Vec::new(),
    }
}

/// A backup at each of these hours.
fn history(hours: impl IntoIterator<Item = i64>) -> Vec<Candidate> {
    hours.into_iter().enumerate().map(|(number, hour)| candidate(number, at(hour))).collect()
}

/// What becomes of one machine's snapshots just after the newest of them.
fn decide(snapshots: &[Candidate], policy: &Policy, earlier: Option<&Policy>) -> Group {
    let now = snapshots.last().expect("there is one").time;
    let mut groups = plan(snapshots, policy, |_| earlier, now, &TimeZone::UTC);
    assert_eq!(groups.len(), 1);
    groups.remove(0)
}

fn kept(group: &Group) -> Vec<usize> {
    let stays = group.decisions.iter().enumerate().filter(|(_, decision)| decision.stays());
    stays.map(|(place, _)| place).collect()
}

fn reasons(group: &Group, place: usize) -> Vec<String> {
    group.decisions[place].reasons.iter().map(Reason::to_string).collect()
}

#[test]
fn a_machine_is_told_from_its_namesakes_by_its_uuid() {
    let machine: Machine = "web/1".parse().unwrap();
    assert_eq!((&machine, machine.to_string().as_str()), (&self::machine(), "web/1"));
    assert!("web".parse::<Machine>().is_err());
    let snapshot = |domain: &str, tag: &str| {
        let mut file = SnapshotFile::new(repository::BlobId([1; 32]), at(0));
        file.paths = vec![format!("/{domain}")];
        file.tags = vec![tag.to_owned()];
        file
    };
    assert!(machine.may_have(&snapshot("web", "uuid=1")));
    assert!(!machine.may_have(&snapshot("web", "uuid=2")), "another host's");
    assert!(!machine.may_have(&snapshot("db", "uuid=1")));
}

#[test]
fn each_rule_keeps_the_newest_of_each_of_its_periods_and_says_so() {
    // Twice a day from 2026-01-01 00:00 on.
    let snapshots = history((0..60).map(|n| 12 * n));
    let policy = Policy { last: 1, daily: 3, weekly: 2, monthly: 9, ..Policy::default() };

    let group = decide(&snapshots, &policy, None);

    assert_eq!(kept(&group), [0, 49, 55, 57, 59]);
    assert_eq!(
        reasons(&group, 59),
        ["last 1", "daily 2026-01-30", "weekly 2026-W05", "monthly 2026-01", "the last good one"]
    );
    assert_eq!(reasons(&group, 57), ["daily 2026-01-29"]);
    assert_eq!(reasons(&group, 49), ["weekly 2026-W04"]);
    // The oldest stays as long as a rule has room: a year has twelve months.
    assert_eq!(reasons(&group, 0), ["monthly 2026-01"]);
}

#[test]
fn within_counts_from_the_newest_and_tags_keep_what_carries_them() {
    let mut snapshots = history((0..10).map(|n| 24 * n));
    snapshots[1].tags = vec!["before-upgrade".into()];
    let within = Some("2d".parse().unwrap());
    let policy = Policy { within, tags: vec!["before-upgrade".into()], ..Policy::default() };
    let group = decide(&snapshots, &policy, None);
    assert_eq!(kept(&group), [1, 8, 9]);
    assert_eq!(reasons(&group, 8), ["within 2d"]);
    assert_eq!(reasons(&group, 1), ["tag before-upgrade"]);
}

#[test]
fn what_a_machine_or_a_replica_needs_stays_whatever_the_rules_say() {
    let mut snapshots = history((0..8).map(|n| 24 * n));
    snapshots[0].tags = vec![PROTECTED.into()];
    snapshots[2].is_anchor = true;
    snapshots[3].last_in = vec!["offsite".into()];
    snapshots[4..].iter_mut().for_each(|newer| newer.not_copied_to = vec!["offsite".into()]);
    snapshots[6].is_whole = false;
    snapshots[7].is_whole = false;
    let group = decide(&snapshots, &Policy { last: 1, ..Policy::default() }, None);
    assert_eq!(kept(&group), [0, 2, 3, 4, 5, 6, 7]);
    assert_eq!(reasons(&group, 0), ["protected"]);
    assert_eq!(reasons(&group, 2), ["anchor of the next incremental backup"]);
    assert_eq!(reasons(&group, 3), ["the last one that is in offsite too"]);
    // The two after it lack a disk.
    assert_eq!(reasons(&group, 5), ["not yet in offsite", "the last good one"]);
}

#[test]
fn r26_a_domain_that_was_defined_anew_has_a_history_of_its_own() {
    let mut snapshots = history((0..6).map(|n| 24 * n));
    snapshots[3..].iter_mut().for_each(|newer| newer.machine.uuid = "2".into());
    let policy = Policy { last: 1, ..Policy::default() };
    let groups = plan(&snapshots, &policy, |_| None, at(500), &TimeZone::UTC);
    assert_eq!(groups.iter().map(kept).collect::<Vec<_>>(), [[2], [2]]);
}

/// Ten days of hourly backups, the rules applied each week.
fn steady() -> (Vec<Candidate>, Policy) {
    let policy =
        Policy { hourly: 24, daily: 7, within: Some("2d".parse().unwrap()), ..Policy::default() };
    (history(0..240), policy)
}

#[test]
fn r17_what_rotates_out_at_the_pace_of_backups_is_no_mass_however_rarely_the_rules_are_applied() {
    let (snapshots, policy) = steady();
    let group = decide(&snapshots, &policy, Some(&policy));
    assert!(group.dropped().count() > 180);
    assert_eq!(group.unexpected, None);
}

#[test]
fn r17_a_clock_that_jumps_ahead_drops_nothing_until_it_has_proved_right() {
    let policy = Policy { within: Some("2d".parse().unwrap()), ..Policy::default() };
    let mut hours: Vec<i64> = (0..48).collect();
    hours.push(24 * 365);
    let group = decide(&history(hours.clone()), &policy, Some(&policy));
    assert_eq!(group.dropped().count(), 48);
    assert_eq!(group.unexpected, Some(48));

    // Two days later as many backups were made by the new clock.
    hours.extend((1..=48).map(|n| 24 * 365 + n));
    let group = decide(&history(hours), &policy, Some(&policy));
    assert_eq!(group.unexpected, None);
}

#[test]
fn r17_snapshots_of_the_future_make_many_drops_suspicious() {
    let (mut snapshots, policy) = steady();
    snapshots.push(candidate(240, at(240 + 24 * 365)));
    let groups = plan(&snapshots, &policy, |_| Some(&policy), at(241), &TimeZone::UTC);
    assert_eq!(groups[0].in_future.map(|(id, _)| id), Some(snapshots[240].id));
    assert!(groups[0].unexpected.is_some());
    // It makes nothing else old.
    assert!(kept(&groups[0]).contains(&200));
}

#[test]
fn s12_other_rules_than_last_time_do_not_drop_many_at_once() {
    let (snapshots, policy) = steady();
    let greedy = Policy { last: 1, ..Policy::default() };
    assert!(decide(&snapshots, &greedy, Some(&policy)).unexpected.is_some());
    assert!(decide(&snapshots, &greedy, None).unexpected.is_some());
    // A few may go at any time.
    assert_eq!(decide(&snapshots[..6], &greedy, None).unexpected, None);
}

#[test]
fn a_policy_survives_json_and_unknown_rules_are_refused() {
    let text = r#"{"last":3,"daily":14,"within":"1y2m10d","tags":["x"]}"#;
    let policy: Policy = serde_json::from_str(text).unwrap();
    let again = serde_json::to_string(&policy).unwrap();
    assert_eq!(serde_json::from_str::<Policy>(&again).unwrap(), policy);
    let args = ["--keep-last=3", "--keep-daily=14", "--keep-within=1y2m10d", "--keep-tag=x"];
    assert_eq!(policy.to_args(), args);
    assert!(serde_json::from_str::<Policy>(r#"{"fortnightly":1}"#).is_err());
    for bad in ["", "7", "d", "7x", "-1d", "0d", "99999d", "7dd"] {
        assert!(bad.parse::<Within>().is_err(), "{bad}");
    }
    assert_eq!("2w1d".parse::<Within>().unwrap().to_string(), "15d");
    assert!(Policy::default().is_empty() && !policy.is_empty());
}

/// The rules once more, as one would say them: of each of the newest N periods the newest snapshot.
fn naive(snapshots: &[Candidate], policy: &Policy) -> Vec<usize> {
    let mut kept = HashSet::new();
    for rule in Rule::ALL {
        let period = |place: usize| match rule {
            Rule::Last => place.to_string(),
            rule => rule.period(&snapshots[place].time.to_zoned(TimeZone::UTC)),
        };
        let mut periods: Vec<String> = Vec::new();
        for place in (0..snapshots.len()).rev() {
            if !periods.contains(&period(place)) {
                periods.push(period(place));
            }
        }
        let wanted = policy.count(rule) as usize;
        for counted in periods.iter().take(wanted) {
            kept.extend((0..snapshots.len()).rev().find(|&place| period(place) == *counted));
        }
        if periods.len() < wanted {
            kept.insert(0);
        }
    }
    kept.insert(snapshots.len() - 1);
    let mut kept: Vec<usize> = kept.into_iter().collect();
    kept.sort_unstable();
    kept
}

fn policies() -> impl Strategy<Value = Policy> {
    (0..4_u32, 0..30_u32, 0..10_u32, 0..5_u32, 0..4_u32, 0..3_u32).prop_map(
        |(last, hourly, daily, weekly, monthly, yearly)| Policy {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
            ..Policy::default()
        },
    )
}

proptest! {
    #[test]
    fn the_rules_keep_what_a_naive_reading_of_them_keeps(
        gaps in vec(0..4 * DAY, 1..80), policy in policies()
    ) {
        let mut time = at(0);
        let mut snapshots = Vec::new();
        for (number, gap) in gaps.into_iter().enumerate() {
            time += SignedDuration::from_secs(gap + 1);
            snapshots.push(candidate(number, time));
        }
        prop_assert_eq!(kept(&decide(&snapshots, &policy, None)), naive(&snapshots, &policy));
    }

    #[test]
    fn applying_the_rules_often_keeps_what_applying_them_once_keeps(
        gaps in vec(1..40_i64, 1..60), policy in policies(), every in 1..9_usize
    ) {
        let mut hour = 0;
        let all = history(gaps.into_iter().map(|gap| { hour += gap; hour }));
        let mut left: Vec<Candidate> = Vec::new();
        for (number, snapshot) in all.iter().enumerate() {
            left.push(snapshot.clone());
            if number % every == 0 || number + 1 == all.len() {
                let group = decide(&left, &policy, Some(&policy));
                let mut stays = group.decisions.iter().map(Decision::stays);
                left.retain(|_| stays.next().expect("one for each"));
            }
        }
        let ids = |list: &[Candidate]| list.iter().map(|c| c.id).collect::<Vec<_>>();
        let group = decide(&all, &policy, None);
        let at_once: Vec<_> = kept(&group).into_iter().map(|place| all[place].clone()).collect();
        prop_assert_eq!(ids(&left), ids(&at_once));
    }

    #[test]
    fn r17_whatever_the_clock_says_a_good_snapshot_and_all_that_is_needed_stay(
        hours in vec(0..20_000_i64, 1..40), marks in vec(0..8_u8, 40), policy in policies(),
        now in 0..20_000_i64
    ) {
        let mut snapshots = history(hours);
        for (snapshot, mark) in snapshots.iter_mut().zip(marks) {
            snapshot.is_whole = mark & 1 == 0;
            snapshot.is_anchor = mark == 7;
        }
        let groups = plan(&snapshots, &policy, |_| Some(&policy), at(now), &TimeZone::UTC);
        let stays = |place: usize| groups[0].decisions[place].stays();
        let last_good = snapshots.iter().rposition(|s| s.is_whole).unwrap_or(snapshots.len() - 1);
        prop_assert!(stays(last_good));
        for (place, snapshot) in snapshots.iter().enumerate() {
            prop_assert!(!snapshot.is_anchor || stays(place));
        }
    }
}

#[test]
fn p4_of_a_period_whose_newest_lacks_disks_the_newest_whole_one_stays_too() {
    let mut snapshots = history([0, 6, 12, 18, 24, 30, 36]);
    for place in [2, 3, 6] {
        (snapshots[place].is_partial, snapshots[place].is_whole) = (true, false);
    }
    let group = decide(&snapshots, &Policy { daily: 2, ..Policy::default() }, None);
    assert_eq!(kept(&group), [1, 3, 5, 6]);
    assert_eq!(reasons(&group, 1), ["daily 2026-01-01"]);
    assert_eq!(reasons(&group, 3), ["daily 2026-01-01"]);
}

#[test]
fn p4_what_cannot_be_read_stays() {
    let mut snapshots = history([0, 24, 48]);
    snapshots[0].is_unreadable = true;
    let group = decide(&snapshots, &Policy { last: 1, ..Policy::default() }, None);
    assert_eq!((kept(&group), reasons(&group, 0)), (vec![0, 2], vec!["cannot be read".into()]));
}
