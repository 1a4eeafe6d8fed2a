//! The rules by which snapshots stay, as the configuration and the command line give them.

use std::fmt;
use std::str::FromStr;

use jiff::civil::ISOWeekDate;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Zoned};
use serde::{Deserialize, Serialize};

/// How many snapshots stay of what kind. A snapshot stays that any of the rules keeps; without any rule
/// nothing is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Policy {
    /// So many of the newest.
    pub last: u32,
    /// The newest of each of so many hours that have one.
    pub hourly: u32,
    /// The newest of each of so many days.
    pub daily: u32,
    /// The newest of each of so many weeks, which begin on Monday.
    pub weekly: u32,
    /// The newest of each of so many months.
    pub monthly: u32,
    /// The newest of each of so many years.
    pub yearly: u32,
    /// All that are at most so much older than the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within: Option<Within>,
    /// All that carry one of these tags.
    pub tags: Vec<String>,
}

/// A rule that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Snapshots.
    Last,
    /// Hours.
    Hourly,
    /// Days.
    Daily,
    /// Weeks.
    Weekly,
    /// Months.
    Monthly,
    /// Years.
    Yearly,
}

impl Rule {
    /// All, the finest first.
    pub const ALL: [Self; 6] =
        [Self::Last, Self::Hourly, Self::Daily, Self::Weekly, Self::Monthly, Self::Yearly];

    /// The field's and the option's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
        }
    }

    /// The hour, day, … that a time lies in, as people write it; of [`Rule::Last`] nothing.
    pub fn period(self, time: &Zoned) -> String {
        match self {
            Self::Last => String::new(),
            Self::Hourly => time.strftime("%Y-%m-%d %H:00").to_string(),
            Self::Daily => time.strftime("%Y-%m-%d").to_string(),
            Self::Weekly => {
                let week = ISOWeekDate::from(time.date());
                format!("{}-W{:02}", week.year(), week.week())
            }
            Self::Monthly => time.strftime("%Y-%m").to_string(),
            Self::Yearly => time.strftime("%Y").to_string(),
        }
    }

    /// A number that two times share exactly if they lie in the same hour, day, …
    pub(super) fn bucket(self, time: &Zoned) -> i64 {
        let part = |number: i8| i64::from(number);
        let year = i64::from(time.year());
        let day = || (year * 100 + part(time.month())) * 100 + part(time.day());
        match self {
            Self::Last => 0,
            Self::Hourly => day() * 100 + part(time.hour()),
            Self::Daily => day(),
            Self::Weekly => {
                let week = ISOWeekDate::from(time.date());
                i64::from(week.year()) * 100 + part(week.week())
            }
            Self::Monthly => year * 100 + part(time.month()),
            Self::Yearly => year,
        }
    }
}

impl Policy {
    /// Whether no rule is given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// So many a rule keeps.
    pub fn count(&self, rule: Rule) -> u32 {
        match rule {
            Rule::Last => self.last,
            Rule::Hourly => self.hourly,
            Rule::Daily => self.daily,
            Rule::Weekly => self.weekly,
            Rule::Monthly => self.monthly,
            Rule::Yearly => self.yearly,
        }
    }

    /// The options of `kvmsnap forget` that say the same.
    pub fn to_args(&self) -> Vec<String> {
        let counted = Rule::ALL.into_iter().filter(|&rule| self.count(rule) > 0);
        let counted = counted.map(|rule| format!("--keep-{}={}", rule.as_str(), self.count(rule)));
        let within = self.within.iter().map(|within| format!("--keep-within={within}"));
        let tags = self.tags.iter().map(|tag| format!("--keep-tag={tag}"));
        counted.chain(within).chain(tags).collect()
    }
}

/// A length of time as a calendar counts it: `7d`, `1y6m2w3d12h`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Within {
    years: u16,
    months: u16,
    days: u16,
    hours: u16,
}

/// Why a text is no length of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no length of time: use years, months, weeks, days and hours like 1y6m2w3d12h")]
pub struct WithinError {
    /// What was given.
    text: String,
}

impl Within {
    /// The moment so long before `time`.
    pub(super) fn before(self, time: Timestamp, tz: &TimeZone) -> Timestamp {
        let span = || {
            let span = Span::new().try_years(self.years)?.try_months(self.months)?;
            let span = span.try_days(self.days)?.try_hours(self.hours)?;
            time.to_zoned(tz.clone()).checked_sub(span)
        };
        // Longer than there has been time: all lies within.
        span().map_or(Timestamp::MIN, |before| before.timestamp())
    }
}

impl FromStr for Within {
    type Err = WithinError;
    fn from_str(text: &str) -> Result<Self, WithinError> {
        let refused = || WithinError { text: text.to_owned() };
        let (mut within, mut rest) = (Self::default(), text.trim());
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(refused)?;
            let number: u16 = rest[..digits].parse().map_err(|_| refused())?;
            let mut characters = rest[digits..].chars();
            let (field, factor) = match characters.next() {
                Some('y') => (&mut within.years, 1),
                Some('m') => (&mut within.months, 1),
                Some('w') => (&mut within.days, 7),
                Some('d') => (&mut within.days, 1),
                Some('h') => (&mut within.hours, 1),
                _ => return Err(refused()),
            };
            let more = number.checked_mul(factor).and_then(|more| field.checked_add(more));
            *field = more.ok_or_else(refused)?;
            rest = characters.as_str();
        }
        match within == Self::default() {
            true => Err(refused()),
            false => Ok(within),
        }
    }
}

impl TryFrom<String> for Within {
    type Error = WithinError;
    fn try_from(text: String) -> Result<Self, WithinError> {
        text.parse()
    }
}

impl From<Within> for String {
    fn from(within: Within) -> String {
        within.to_string()
    }
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [(self.years, 'y'), (self.months, 'm'), (self.days, 'd'), (self.hours, 'h')];
        parts
            .iter()
            .filter(|part| part.0 > 0)
            .try_for_each(|(number, unit)| write!(f, "{number}{unit}"))
    }
}
