use jiff::civil::DateTime;
use proptest::prelude::*;

use super::*;

const ZONES: [&str; 7] = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "America/Santiago",
    "Africa/Cairo",
    "Asia/Kolkata",
];
/// Twelve schedules, each of another kind.
const SCHEDULES: [&str; 12] = [
    "03:00",
    "02:30",
    "00:00",
    "mon,wed 03:00",
    "fri-mon 2:15,14:15",
    "first monday 03:00",
    "last friday 22:00",
    "last day 23:30",
    "every 15 min",
    "hourly",
    "30 2 * * *",
    "daily 01:30; sunday 02:00",
];

fn zone(name: &str) -> TimeZone {
    TimeZone::get(name).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn schedule(text: &str) -> Schedule {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn at(text: &str, zone: &TimeZone) -> Timestamp {
    let civil: DateTime = text.parse().unwrap();
    civil.to_zoned(zone.clone()).unwrap().timestamp()
}

/// The next times of a schedule, as clocks on the wall show them.
fn next(text: &str, zone_name: &str, after: &str, count: usize) -> Vec<String> {
    let (zone, schedule) = (zone(zone_name), schedule(text));
    let mut time = at(after, &zone);
    let mut times = Vec::new();
    for _ in 0..count {
        time = schedule.next(time, &zone).expect("it comes again");
        times.push(time.to_zoned(zone.clone()).strftime("%a %Y-%m-%d %H:%M %z").to_string());
    }
    times
}

#[test]
fn spoken_schedules_mean_what_they_say() {
    for (text, expected) in [
        ("03:00", ["Sun 2026-11-22 03:00 +0000", "Mon 2026-11-23 03:00 +0000"]),
        ("daily 3:00", ["Sun 2026-11-22 03:00 +0000", "Mon 2026-11-23 03:00 +0000"]),
        ("every day 03:00", ["Sun 2026-11-22 03:00 +0000", "Mon 2026-11-23 03:00 +0000"]),
        ("03:00,15:30", ["Sat 2026-11-21 15:30 +0000", "Sun 2026-11-22 03:00 +0000"]),
        ("mon,wed 03:00", ["Mon 2026-11-23 03:00 +0000", "Wed 2026-11-25 03:00 +0000"]),
        ("Saturday 03:00", ["Sat 2026-11-28 03:00 +0000", "Sat 2026-12-05 03:00 +0000"]),
        ("fri-sun 03:00", ["Sun 2026-11-22 03:00 +0000", "Fri 2026-11-27 03:00 +0000"]),
        ("weekdays 03:00", ["Mon 2026-11-23 03:00 +0000", "Tue 2026-11-24 03:00 +0000"]),
        ("first monday 03:00", ["Mon 2026-12-07 03:00 +0000", "Mon 2027-01-04 03:00 +0000"]),
        ("last friday 22:00", ["Fri 2026-11-27 22:00 +0000", "Fri 2026-12-25 22:00 +0000"]),
        ("last day 23:30", ["Mon 2026-11-30 23:30 +0000", "Thu 2026-12-31 23:30 +0000"]),
        ("first day 0:05", ["Tue 2026-12-01 00:05 +0000", "Fri 2027-01-01 00:05 +0000"]),
        ("day 5,20 04:00", ["Sat 2026-12-05 04:00 +0000", "Sun 2026-12-20 04:00 +0000"]),
        ("every 15 min", ["Sat 2026-11-21 12:15 +0000", "Sat 2026-11-21 12:30 +0000"]),
        ("every 6h", ["Sat 2026-11-21 18:00 +0000", "Sun 2026-11-22 00:00 +0000"]),
        ("hourly", ["Sat 2026-11-21 13:00 +0000", "Sat 2026-11-21 14:00 +0000"]),
        ("15 4 * * 1-5", ["Mon 2026-11-23 04:15 +0000", "Tue 2026-11-24 04:15 +0000"]),
        ("@daily", ["Sun 2026-11-22 00:00 +0000", "Mon 2026-11-23 00:00 +0000"]),
        ("sun 05:00; 12:05", ["Sat 2026-11-21 12:05 +0000", "Sun 2026-11-22 05:00 +0000"]),
    ] {
        assert_eq!(next(text, "UTC", "2026-11-21T12:00", 2), expected, "{text}");
    }
}

#[test]
fn what_is_no_schedule_is_refused() {
    for text in [
        "",
        "soon",
        "25:00",
        "03:60",
        "3",
        "03:0",
        "moonday 03:00",
        "last 03:00",
        "sixth monday 03:00",
        "every 15",
        "every -5 min",
        "day 32 03:00",
        "day 0 03:00",
        "* * * *",
        "* * * * * *",
        "61 * * * *",
        "mon 03:00;",
        "first monday",
        "+3:00",
    ] {
        let refused = text.parse::<Schedule>();
        assert!(matches!(refused, Err(ScheduleError::Unknown { .. })), "{text}: {refused:?}");
    }
    let step = |text: &str| text.parse::<Schedule>().unwrap_err();
    assert!(matches!(step("every 30 s"), ScheduleError::Step { .. }));
    assert!(matches!(step("every 8 d"), ScheduleError::Step { .. }));
    assert!(matches!(step("0 0 30 2 *"), ScheduleError::Never { .. }));
    assert_eq!(step(&"03:00;".repeat(65)), ScheduleError::TooMany);
}

/// Berlin: 2026-03-29 02:00 to 03:00 is skipped, 2026-10-25 02:00 to 03:00 comes twice.
#[test]
fn a_time_that_is_skipped_comes_right_after_the_gap_and_one_that_comes_twice_comes_once() {
    let days = next("02:30", "Europe/Berlin", "2026-03-28T12:00", 2);
    assert_eq!(days, ["Sun 2026-03-29 03:00 +0200", "Mon 2026-03-30 02:30 +0200"]);
    let days = next("02:30", "Europe/Berlin", "2026-10-24T12:00", 2);
    assert_eq!(days, ["Sun 2026-10-25 02:30 +0200", "Mon 2026-10-26 02:30 +0100"]);
    let steps = next("every 30 min", "Europe/Berlin", "2026-10-25T01:45", 5);
    let expected = ["02:00 +0200", "02:30 +0200", "02:00 +0100", "02:30 +0100", "03:00 +0100"];
    assert_eq!(steps, expected.map(|time| format!("Sun 2026-10-25 {time}")));
}

/// Each day has its run, whatever its clock does, and none has two.
#[test]
fn a_daily_time_comes_once_on_each_day_of_every_zone() {
    for name in ZONES {
        let zone = zone(name);
        for text in ["00:00", "00:30", "01:30", "02:00", "02:30", "02:59", "03:00", "23:59"] {
            let schedule = schedule(text);
            let mut time = at("2026-01-01T00:00", &zone) - SignedDuration::from_secs(1);
            let mut day = jiff::civil::date(2026, 1, 1);
            for _ in 0..365 {
                time = schedule.next(time, &zone).expect("it comes again");
                assert_eq!(zone.to_datetime(time).date(), day, "{name} {text}");
                day = day.tomorrow().unwrap();
            }
        }
    }
}

/// Near a change of some zone's clock as often as not.
fn moments() -> impl Strategy<Value = i64> {
    let near = prop::sample::select(vec![
        "2026-03-29T01:00:00Z",
        "2026-10-25T01:00:00Z",
        "2026-03-08T07:00:00Z",
        "2026-11-01T06:00:00Z",
        "2026-04-04T15:00:00Z",
        "2026-10-03T15:30:00Z",
        "2026-09-06T04:00:00Z",
        "2026-04-05T03:00:00Z",
        "2026-04-23T22:00:00Z",
        "2026-10-29T21:00:00Z",
    ]);
    let near = (near, -8000i64..8000)
        .prop_map(|(change, off)| change.parse::<Timestamp>().unwrap().as_second() + off);
    prop_oneof![near, 1_700_000_000i64..1_900_000_000]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn next_and_last_agree(
        second in moments(),
        zone_name in prop::sample::select(ZONES.to_vec()),
        text in prop::sample::select(SCHEDULES.to_vec()),
    ) {
        let (zone, schedule) = (zone(zone_name), schedule(text));
        let now = Timestamp::from_second(second).unwrap();
        let next = schedule.next(now, &zone).unwrap();
        let last = schedule.last(now, &zone).unwrap();
        prop_assert!(last <= now && now < next);
        prop_assert_eq!(schedule.next(last, &zone).unwrap(), next, "nothing lies between");
        prop_assert_eq!(schedule.last(next, &zone).unwrap(), next);
        prop_assert_eq!(schedule.last(next - SignedDuration::from_secs(1), &zone).unwrap(), last);
    }

    #[test]
    fn a_job_is_due_once_for_each_time_however_often_it_is_asked(
        second in moments(),
        zone_name in prop::sample::select(ZONES.to_vec()),
        text in prop::sample::select(SCHEDULES.to_vec()),
        delay in 0u64..5000,
        pace in 120i64..4000,
    ) {
        let (zone, schedule) = (zone(zone_name), schedule(text));
        let plan = Plan {
            schedule: &schedule, zone: &zone, delay_max: Duration::from_secs(delay), seed: "host job",
            window: None,
        };
        let begin = Timestamp::from_second(second).unwrap();
        let mut last_start = Some(begin);
        let mut told = plan.next(begin).unwrap();
        prop_assert!(told > begin);
        for step in 1..60 {
            let now = begin + SignedDuration::from_secs(step * pace);
            match plan.verdict(now, last_start) {
                Verdict::Due(since) => {
                    prop_assert!(told <= since && since <= now, "{} {} {}", told, since, now);
                    last_start = Some(now);
                    told = plan.next(now).unwrap();
                }
                Verdict::Done => prop_assert!(now < told, "{} is told, not due at {}", told, now),
                Verdict::Missed(_) => prop_assert!(false, "there is no window"),
            }
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[ -~]{0,24}") {
        let _ = text.parse::<Schedule>();
    }
}

#[test]
fn a_missed_job_is_caught_up_once_and_not_after_its_window() {
    let (zone, schedule) = (TimeZone::UTC, schedule("03:00"));
    let plan = |hours: Option<u64>| Plan {
        schedule: &schedule,
        zone: &zone,
        delay_max: Duration::ZERO,
        seed: "",
        window: hours.map(|hours| Duration::from_secs(hours * 3600)),
    };
    let time = |text: &str| at(text, &zone);
    let (due, started) = (time("2026-11-21T03:00"), Some(time("2026-11-17T03:01")));
    let morning = time("2026-11-21T09:00");
    assert_eq!(plan(None).verdict(morning, started), Verdict::Due(due));
    assert_eq!(plan(None).verdict(morning, Some(time("2026-11-21T08:55"))), Verdict::Done);
    assert_eq!(plan(Some(2)).verdict(morning, started), Verdict::Missed(due));
    assert_eq!(plan(Some(2)).verdict(time("2026-11-21T04:59"), started), Verdict::Due(due));
    // Nothing is known of it.
    assert_eq!(plan(None).verdict(morning, None), Verdict::Due(due));
}

#[test]
fn r17_a_start_in_the_future_keeps_no_job_from_its_next_one() {
    let (zone, schedule) = (TimeZone::UTC, schedule("every 15 min"));
    let (seed, window) = ("", None);
    let plan = Plan { schedule: &schedule, zone: &zone, delay_max: Duration::ZERO, seed, window };
    let now = at("2026-11-21T12:05", &zone);
    let verdict = plan.verdict(now, Some(at("2031-01-01T00:00", &zone)));
    assert_eq!(verdict, Verdict::Due(at("2026-11-21T12:00", &zone)));
}

#[test]
fn a_random_delay_is_stable_and_differs_between_hosts() {
    let (zone, schedule) = (TimeZone::UTC, schedule("03:00"));
    let begin = |seed: &str| {
        let delay_max = Duration::from_secs(3600);
        let plan = Plan { schedule: &schedule, zone: &zone, delay_max, seed, window: None };
        plan.next(at("2026-11-21T12:00", &zone)).unwrap()
    };
    assert_eq!(begin("a nightly"), begin("a nightly"));
    let hosts: std::collections::BTreeSet<_> =
        (0..20).map(|host| begin(&format!("{host} nightly"))).collect();
    assert!(hosts.len() > 15, "{hosts:?}");
    let range = at("2026-11-22T03:00", &zone)..at("2026-11-22T04:00", &zone);
    assert!(hosts.iter().all(|begin| range.contains(begin)), "{hosts:?}");
}

#[test]
fn a_weekend_is_the_interval_of_a_job_that_rests_on_it_on_every_day() {
    let hour = |text: &str, at: &str| {
        let schedule: Schedule = text.parse().unwrap();
        schedule.interval(at.parse().unwrap(), &TimeZone::UTC).as_secs() / 3600
    };
    // From Friday 23:00 to Monday 00:00.
    for day in 16..=22 {
        let at = format!("2026-11-{day}T08:30:00Z");
        assert_eq!(hour("0 * * * mon-fri", &at), 49, "{at}");
        assert_eq!(hour("*/5 * * * mon-fri", &at), 48, "{at}");
        assert_eq!(hour("hourly", &at), 1, "{at}");
        assert_eq!(hour("sunday 03:00", &at), 168, "{at}");
        assert_eq!(hour("first monday 03:00", &at), 35 * 24, "{at}");
    }
}
