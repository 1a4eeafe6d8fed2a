//! When a job is due, from words and the clock: a pure function of both.
//!
//! `croner` knows calendars and clock changes: a time that a change of the clock skips comes once right after
//! the gap, one that occurs twice comes once. A step (`every 15 min`) knows no clock at all.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;

use crate::units::parse_duration;

/// The shortest step: a timer rings no more often.
const STEP_MIN: Duration = Duration::from_secs(60);
/// The longest: beyond it a day is meant.
const STEP_MAX: Duration = Duration::from_secs(7 * 86_400);
/// Rules that one schedule may have, so that looking at it stays quick.
const RULES_MAX: usize = 64;
/// Occurrences that are looked at for the sake of a delay.
const LOOK_MAX: usize = 2000;
/// Occurrences that are looked at for the sake of an interval.
const LOOK_AROUND_MAX: usize = 4000;
/// How far is looked around for the longest interval: beyond a weekend.
const LOOK_AROUND: SignedDuration = SignedDuration::from_hours(8 * 24);
/// So many intervals are looked at, at least.
const GAPS_MIN: usize = 16;
/// What to write.
const USAGE: &str = "use a time like `03:00`, `mon,wed 03:00`, `first monday 03:00`, `last day 23:30`, \
                     `every 15 min`, or a cron line";
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// When something is due, in the words of the configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct Schedule {
    text: String,
    rules: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq)]
enum Rule {
    /// Times of the calendar.
    Calendar(Box<Cron>),
    /// Steps from 1970 on.
    Every(SignedDuration),
}

/// Why something is no schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// Neither words that are known nor a cron line.
    #[error("`{rule}` is no schedule: {USAGE}")]
    Unknown {
        /// The part that is not understood.
        rule: String,
    },
    /// A step that is too short or too long.
    #[error("`{rule}`: a step is from 1 min to 7 d")]
    Step {
        /// The part.
        rule: String,
    },
    /// A day that no calendar has.
    #[error("`{rule}` never comes")]
    Never {
        /// The part.
        rule: String,
    },
    /// More rules than anybody needs.
    #[error("a schedule has at most {RULES_MAX} times")]
    TooMany,
}

impl Schedule {
    /// The first time after `after`.
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        self.rules.iter().filter_map(|rule| rule.next(after, zone)).min()
    }

    /// The last time at or before `until`.
    pub fn last(&self, until: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        self.rules.iter().filter_map(|rule| rule.last(until, zone)).max()
    }

    /// About how long it takes from one time to the next: the longest of a week before and after `around`, so
    /// that a weekend counts also on the days before and after it.
    pub fn interval(&self, around: Timestamp, zone: &TimeZone) -> Duration {
        let (from, until) = (around - LOOK_AROUND, around + LOOK_AROUND);
        let first = self.last(from, zone).or_else(|| self.next(from, zone));
        let times =
            std::iter::successors(first, |time| self.next(*time, zone)).take(LOOK_AROUND_MAX);
        let (mut longest, mut last, mut count) = (None, None::<Timestamp>, 0);
        for time in times {
            longest = longest.max(last.map(|last| time.duration_since(last)));
            if time > until && count >= GAPS_MIN {
                break;
            }
            (last, count) = (Some(time), count + 1);
        }
        longest.and_then(|gap| Duration::try_from(gap).ok()).unwrap_or(STEP_MAX)
    }

    /// How long it takes from the last time at or before `at` to the next.
    pub fn gap(&self, at: Timestamp, zone: &TimeZone) -> Option<SignedDuration> {
        Some(self.next(at, zone)?.duration_since(self.last(at, zone)?))
    }
}

/// How a job follows its schedule.
#[derive(Debug, Clone)]
pub struct Plan<'a> {
    /// When.
    pub schedule: &'a Schedule,
    /// By whose clock.
    pub zone: &'a TimeZone,
    /// How much later it may begin, so that not all hosts begin at once.
    pub delay_max: Duration,
    /// What makes the delay this host's and this job's own.
    pub seed: &'a str,
    /// How long after its time it still begins.
    pub window: Option<Duration>,
}

/// Whether a job is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Since then.
    Due(Timestamp),
    /// Its last time is done.
    Done,
    /// It was due then, and its window has closed since.
    Missed(Timestamp),
}

impl Plan<'_> {
    /// Whether the job is due, by the time of its last start. However many times were missed, it is due once. A
    /// start that lies in the future says nothing: the clock was wrong then, or is now.
    pub fn verdict(&self, now: Timestamp, last_start: Option<Timestamp>) -> Verdict {
        let Some(due) = self.last(now) else { return Verdict::Done };
        let is_done = last_start.is_some_and(|start| (due..=now).contains(&start));
        let is_late = self.window.is_some_and(|window| later(due, window) < now);
        match (is_done, is_late) {
            (true, _) => Verdict::Done,
            (false, true) => Verdict::Missed(due),
            (false, false) => Verdict::Due(due),
        }
    }

    /// The last time at or before `until`, delay included.
    pub fn last(&self, until: Timestamp) -> Option<Timestamp> {
        let mut next = self.schedule.last(until, self.zone);
        let mut last = None;
        for _ in 0..LOOK_MAX {
            // A time with a long delay may begin after the one that follows it.
            let Some(time) = next.filter(|time| Some(later(*time, self.delay_max)) > last) else {
                break;
            };
            let begin = later(time, self.delay(time));
            last = last.max(Some(begin).filter(|begin| *begin <= until));
            next = self.schedule.last(time - SignedDuration::from_secs(1), self.zone);
        }
        last
    }

    /// The first time after `after`, delay included.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        let early = after.checked_sub(self.delay_max).unwrap_or(Timestamp::MIN);
        let mut time = self.schedule.next(early - SignedDuration::from_secs(1), self.zone)?;
        let mut first: Option<Timestamp> = None;
        for _ in 0..LOOK_MAX {
            if first.is_some_and(|first| time > first) {
                break;
            }
            let begin = later(time, self.delay(time));
            if begin > after {
                first = Some(first.map_or(begin, |first| first.min(begin)));
            }
            time = self.schedule.next(time, self.zone)?;
        }
        first
    }

    /// How much later a time is meant: the same all day, so that steps stay even.
    fn delay(&self, time: Timestamp) -> Duration {
        let seconds = self.delay_max.as_secs();
        if seconds == 0 {
            return Duration::ZERO;
        }
        let day = self.zone.to_datetime(time).date();
        let digest = repository::BlobId::of(format!("{}\n{day}", self.seed).as_bytes()).0;
        let drawn = digest[..8].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        Duration::from_secs(drawn % seconds)
    }
}

fn later(time: Timestamp, by: Duration) -> Timestamp {
    time.checked_add(by).unwrap_or(Timestamp::MAX)
}

impl Rule {
    fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        match self {
            Self::Calendar(cron) => {
                let after = whole(after).to_zoned(zone.clone());
                cron.find_next_occurrence(&after, false).ok().map(|time| time.timestamp())
            }
            Self::Every(step) => {
                let steps = after.as_second().div_euclid(step.as_secs());
                Timestamp::from_second((steps + 1) * step.as_secs()).ok()
            }
        }
    }

    fn last(&self, until: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        match self {
            Self::Calendar(cron) => {
                let until = whole(until).to_zoned(zone.clone());
                cron.find_previous_occurrence(&until, true).ok().map(|time| time.timestamp())
            }
            Self::Every(step) => {
                let steps = until.as_second().div_euclid(step.as_secs());
                Timestamp::from_second(steps * step.as_secs()).ok()
            }
        }
    }
}

/// The second that a time is in.
fn whole(time: Timestamp) -> Timestamp {
    let second = time.as_nanosecond().div_euclid(1_000_000_000);
    i64::try_from(second)
        .ok()
        .and_then(|second| Timestamp::from_second(second).ok())
        .unwrap_or(time)
}

impl FromStr for Schedule {
    type Err = ScheduleError;
    fn from_str(text: &str) -> Result<Self, ScheduleError> {
        let mut rules = Vec::new();
        for rule in text.split(';').map(str::trim) {
            rules.extend(parse_rule(rule)?);
            if rules.len() > RULES_MAX {
                return Err(ScheduleError::TooMany);
            }
        }
        Ok(Self { text: text.trim().to_owned(), rules })
    }
}

impl TryFrom<String> for Schedule {
    type Error = ScheduleError;
    fn try_from(text: String) -> Result<Self, ScheduleError> {
        text.parse()
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn parse_rule(rule: &str) -> Result<Vec<Rule>, ScheduleError> {
    let unknown = || ScheduleError::Unknown { rule: rule.to_owned() };
    let lower = rule.to_ascii_lowercase();
    if let Some(step) = lower.strip_prefix("every ").filter(|step| !step.starts_with("day ")) {
        let step = parse_duration(step).map_err(|_| unknown())?;
        if !(STEP_MIN..=STEP_MAX).contains(&step) {
            return Err(ScheduleError::Step { rule: rule.to_owned() });
        }
        let step = SignedDuration::from_secs(step.as_secs().cast_signed());
        return Ok(vec![Rule::Every(step)]);
    }
    let words: Vec<&str> = lower.split_whitespace().collect();
    let lines = match words.as_slice() {
        ["hourly"] => vec!["0 * * * *".to_owned()],
        // Five fields or a nickname.
        [_, _, _, _, _] | [_] if !lower.contains(':') => vec![lower.clone()],
        words => spoken(words).ok_or_else(unknown)?,
    };
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    let crons = lines.iter().map(|line| {
        let cron = parser.parse(line).map_err(|_| unknown())?;
        let from = jiff::civil::date(2024, 1, 1).at(0, 0, 0, 0);
        match cron.find_next_occurrence(&from, false) {
            Ok(_) => Ok(Rule::Calendar(Box::new(cron))),
            Err(_) => Err(ScheduleError::Never { rule: rule.to_owned() }),
        }
    });
    crons.collect()
}

/// The cron lines of spoken words: days, then times. One for each time, for the fields of a line know no pairs.
fn spoken(words: &[&str]) -> Option<Vec<String>> {
    let (times, days) = words.split_last()?;
    let (month_days, week_days) = match days {
        [] | ["daily"] | ["every", "day"] => ("*".to_owned(), "*".to_owned()),
        ["last", "day"] => ("l".to_owned(), "*".to_owned()),
        ["first", "day"] => ("1".to_owned(), "*".to_owned()),
        ["day", numbers] => {
            let is_day = |n: &str| n.parse().is_ok_and(|n: u8| (1..=31).contains(&n));
            numbers.split(',').all(is_day).then(|| ((*numbers).to_owned(), "*".to_owned()))?
        }
        [which, day] => {
            let which = match *which {
                "first" => "#1",
                "second" => "#2",
                "third" => "#3",
                "fourth" => "#4",
                "fifth" => "#5",
                "last" => "#l",
                _ => return None,
            };
            let each = day.split(',').map(|day| Some(format!("{}{which}", day_name(day)?)));
            ("*".to_owned(), each.collect::<Option<Vec<_>>>()?.join(","))
        }
        [days] => ("*".to_owned(), week_days(days)?),
        _ => return None,
    };
    let line = |time: &str| {
        let (hour, minute) = time.split_once(':')?;
        let number = |text: &str, max: u8| {
            let is_plain =
                (1..=2).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u8>().ok().filter(|number| is_plain && *number <= max)
        };
        let (hour, minute) = (number(hour, 23)?, number(minute, 59).filter(|_| minute.len() == 2)?);
        Some(format!("{minute} {hour} {month_days} * {week_days}"))
    };
    times.split(',').map(line).collect()
}

fn week_days(days: &str) -> Option<String> {
    let each = days.split(',').map(|days| match (days, days.split_once('-')) {
        ("weekdays" | "workdays", _) => Some("mon-fri".to_owned()),
        ("weekend" | "weekends", _) => Some("sat,sun".to_owned()),
        (_, Some((from, to))) => {
            let at = |day| DAYS.iter().position(|known| Some(*known) == day_name(day));
            let (from, to) = (at(from)?, at(to)?);
            let many = (to + 7 - from) % 7;
            let names = (0..=many).map(|n| DAYS[(from + n) % 7]);
            Some(names.collect::<Vec<_>>().join(","))
        }
        (day, None) => day_name(day).map(str::to_owned),
    });
    Some(each.collect::<Option<Vec<_>>>()?.join(","))
}

/// `mon` for `mon`, `monday` and `mondays`.
fn day_name(day: &str) -> Option<&'static str> {
    let long = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];
    let is_it = |(short, long): &(&str, &str)| {
        day == *short || day.strip_suffix('s').unwrap_or(day) == *long
    };
    DAYS.into_iter().zip(long).find(is_it).map(|(short, _)| short)
}

#[cfg(test)]
mod tests;
