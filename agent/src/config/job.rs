//! `[job.nightly]`: what `kvmsnap run` does when.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use jiff::tz::TimeZone;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, IntoDeserializer, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::value::{Length, Pattern, Window};
use crate::retention::Policy;
use crate::schedule::Schedule;

/// The most domains that one job backs up at once.
const PARALLEL_MAX: u8 = 64;
/// The most tries after the first.
const RETRIES_MAX: u8 = 20;

/// A job.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Job {
    /// When.
    pub schedule: Schedule,
    /// By which clock; the host's unless given.
    #[serde(default)]
    pub timezone: Zone,
    /// Which domains.
    #[serde(default = "all")]
    pub domains: Vec<Pattern>,
    /// Which of them not.
    #[serde(default)]
    pub exclude: Vec<Pattern>,
    /// Which of them first.
    #[serde(default)]
    pub order: Vec<Pattern>,
    /// How many at once.
    pub parallel: Option<Count<1, PARALLEL_MAX>>,
    /// How much later it may begin.
    pub random_delay: Option<Length>,
    /// How long after its time it may begin.
    pub window: Option<Window>,
    /// How often a domain whose backup failed is tried again.
    pub retries: Option<Count<0, RETRIES_MAX>>,
    /// How long to wait before that; twice as long each time.
    pub retry_pause: Option<Length>,
    /// How long the backup of one domain may take.
    pub timeout: Option<Length>,
    /// Where backups go, the first that can be reached.
    #[serde(default)]
    pub repository: Option<Spanned<OneOrMany>>,
    /// Which snapshots stay; all unless given.
    #[serde(default, deserialize_with = "some_rule")]
    pub keep: Option<Policy>,
    /// Where its snapshots are copied to.
    #[serde(default)]
    pub copy: Vec<Copy>,
    /// Whether and when freed space is given back.
    pub prune: Option<UnlessFalse<Schedule>>,
    /// Whether and how its repositories are verified.
    pub verify: Option<UnlessFalse<VerifyPlan>>,
}

fn all() -> Vec<Pattern> {
    vec![Pattern::all()]
}

impl Job {
    /// Whether the job is about a domain.
    pub fn is_about(&self, domain: &str) -> bool {
        let matches = |patterns: &[Pattern]| patterns.iter().any(|it| it.matches(domain));
        matches(&self.domains) && !matches(&self.exclude)
    }

    /// Domains that come first are less.
    pub fn rank(&self, domain: &str) -> impl Ord + use<> {
        let turn = self.order.iter().position(|pattern| pattern.matches(domain));
        (turn.unwrap_or(usize::MAX), domain.to_owned())
    }

    /// How many domains at once; one, unless told otherwise.
    pub fn parallel(&self) -> usize {
        self.parallel.map_or(1, |count| usize::from(count.get()))
    }

    /// How often a domain is tried again.
    pub fn retries(&self) -> u32 {
        self.retries.map_or(2, |count| u32::from(count.get()))
    }

    /// When freed space is given back: never, at times of its own, or a while after it was freed.
    pub fn prune(&self) -> Prune<'_> {
        match &self.prune {
            None => Prune::Weekly,
            Some(written) => written.get().map_or(Prune::Never, Prune::At),
        }
    }

    /// How its repositories are verified, unless not at all.
    pub fn verify(&self) -> Option<VerifyPlan> {
        match &self.verify {
            Some(written) => written.get().cloned(),
            None => Some(VerifyPlan::default()),
        }
    }

    /// The repositories by name, in the order in which they are tried; none where the usual one is meant.
    pub fn repositories(&self) -> Vec<&str> {
        let named = self.repository.as_ref().map(|named| named.get_ref().0.iter());
        named.into_iter().flatten().map(String::as_str).collect()
    }
}

/// A name, or several.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "Written")]
pub struct OneOrMany(Vec<String>);

#[derive(Deserialize)]
#[serde(untagged, expecting = "use a name or a list of names")]
enum Written {
    One(String),
    Many(Vec<String>),
}

impl From<Written> for OneOrMany {
    fn from(written: Written) -> Self {
        match written {
            Written::One(name) => Self(vec![name]),
            Written::Many(names) => Self(names),
        }
    }
}

/// A time zone: the host's, or one of the IANA database.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Zone(TimeZone);

impl Zone {
    /// As the calendar takes it.
    pub fn get(&self) -> &TimeZone {
        &self.0
    }
}

impl Default for Zone {
    fn default() -> Self {
        Self(TimeZone::system())
    }
}

impl TryFrom<String> for Zone {
    type Error = String;
    fn try_from(name: String) -> Result<Self, String> {
        TimeZone::get(&name).map(Self).map_err(|_| format!("this host knows no time zone `{name}`"))
    }
}

/// A number from `MIN` to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "i64")]
pub struct Count<const MIN: u8, const MAX: u8>(u8);

impl<const MIN: u8, const MAX: u8> Count<MIN, MAX> {
    /// So many.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl<const MIN: u8, const MAX: u8> TryFrom<i64> for Count<MIN, MAX> {
    type Error = String;
    fn try_from(count: i64) -> Result<Self, String> {
        let in_range = u8::try_from(count).ok().filter(|count| (MIN..=MAX).contains(count));
        in_range.map(Self).ok_or_else(|| format!("use a number from {MIN} to {MAX}"))
    }
}

/// Something, unless it is `false`.
#[derive(Debug, Clone, PartialEq)]
pub struct UnlessFalse<T>(Option<T>);

impl<T> UnlessFalse<T> {
    /// It.
    pub fn get(&self) -> Option<&T> {
        self.0.as_ref()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UnlessFalse<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = UnlessFalse<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("what is to be done, or false")
            }
            fn visit_bool<E: de::Error>(self, whether: bool) -> Result<Self::Value, E> {
                match whether {
                    false => Ok(UnlessFalse(None)),
                    true => Err(E::invalid_value(Unexpected::Bool(true), &self)),
                }
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                T::deserialize(text.into_deserializer()).map(|it| UnlessFalse(Some(it)))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let map = MapAccessDeserializer::new(map);
                T::deserialize(map).map(|it| UnlessFalse(Some(it)))
            }
        }
        deserializer.deserialize_any(Either(PhantomData))
    }
}

/// A replica of a job's repository.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Copy {
    /// The repository that receives copies.
    pub to: Spanned<String>,
    /// Which snapshots stay there; all unless given.
    #[serde(default, deserialize_with = "some_rule")]
    pub keep: Option<Policy>,
}

/// Rules that keep nothing would mean that all snapshots stay, or that none does.
fn some_rule<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Policy>, D::Error> {
    let policy = Policy::deserialize(from)?;
    match policy.is_empty() {
        true => {
            Err(de::Error::custom("none of these rules keeps anything; without `keep` all stays"))
        }
        false => Ok(Some(policy)),
    }
}

/// When freed space is given back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Prune<'a> {
    /// Never: somebody else does so.
    Never,
    /// At these times.
    At(&'a Schedule),
    /// A week after the last time, after snapshots were dropped.
    Weekly,
}

/// How a repository is verified.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct VerifyPlan {
    /// When; after the backups once a day unless given.
    pub schedule: Option<Schedule>,
    /// In which time all data is read; none is read unless given.
    pub read_all_in: Option<Length>,
}

/// `[run]`: how `kvmsnap run` treats the host.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Run {
    /// How nice its processes are to others: 0 to 19.
    pub nice: Count<0, 19>,
    /// Whether they read and write only when nobody else does.
    pub idle_io: bool,
    /// How long results are kept.
    pub keep_results: Length,
}

impl Default for Run {
    fn default() -> Self {
        let keep_results = Length::new(Duration::from_secs(400 * 86_400));
        Self { nice: Count(10), idle_io: true, keep_results }
    }
}
