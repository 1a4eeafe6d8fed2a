//! Which snapshots stay and why, decided without I/O. The clock and the time zone are arguments.
//!
//! The rules are restic's: going back from the newest snapshot, each rule keeps the newest of each of its
//! hours, days, … until it has counted far enough; the oldest of all stays while a rule has not. Order
//! comes from the chain of snapshots, never from the clock, and each machine has a history of its own: a
//! domain that was defined anew has another uuid, which is another history.
//!
//! Beyond the rules some stay whatever they say, see [`Reason`], and [`plan`] finds plans that look like
//! a mistake: [`Group::unexpected`].

mod earlier;
mod gather;
mod policy;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod year;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::str::FromStr;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use repository::{FileId, SnapshotFile};
use serde::{Deserialize, Serialize};

use crate::catalog::{domain_of, uuid_of};

pub use self::earlier::Earlier;
pub use self::gather::{NotCopied, PROTECTED, gather};
pub use self::policy::{Policy, Rule, Within};

/// So many snapshots of a machine may go at once whatever the reason.
pub const FEW: usize = 5;
/// Clocks of hosts may differ by so much.
const SKEW_MAX: SignedDuration = SignedDuration::from_hours(1);

/// A machine's history: its name and its uuid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Machine {
    /// The domain.
    pub domain: String,
    /// Its uuid.
    pub uuid: String,
}

impl Machine {
    /// Whether a snapshot is one of this machine's, as far as its tags tell.
    pub fn may_have(&self, file: &SnapshotFile) -> bool {
        domain_of(file) == Some(&self.domain) && uuid_of(file).is_none_or(|uuid| uuid == self.uuid)
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.uuid)
    }
}

impl FromStr for Machine {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (domain, uuid) = text.rsplit_once('/').ok_or("use DOMAIN/UUID, as in `list --json`")?;
        Ok(Self { domain: domain.to_owned(), uuid: uuid.to_owned() })
    }
}

/// A snapshot that may have to go.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Its name.
    pub id: FileId,
    /// Whose it is.
    pub machine: Machine,
    /// Its point in time.
    pub time: Timestamp,
    /// Its tags.
    pub tags: Vec<String>,
    /// Whether it can be read and has all disks of its machine that were to be backed up.
    pub is_whole: bool,
    /// Whether it is known to lack disks of its machine, by its tags.
    pub is_partial: bool,
    /// Whether its record cannot be read.
    pub is_unreadable: bool,
    /// Whether the next incremental backup continues it.
    pub is_anchor: bool,
    /// Replicas that it has to be copied to yet.
    pub not_copied_to: Vec<String>,
    /// Replicas whose last copy it is.
    pub last_in: Vec<String>,
}

/// Why a snapshot stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It is the n-th newest.
    Last(u32),
    /// It is the newest of a period.
    Newest {
        /// Of what rule.
        rule: Rule,
        /// Which hour, day, …
        period: String,
    },
    /// It is hardly older than the newest.
    Within(Within),
    /// It has this tag.
    Tag(String),
    /// Somebody protects it.
    Protected,
    /// What it is cannot be read.
    Unreadable,
    /// The next incremental backup continues it.
    Anchor,
    /// It is the last good one.
    LastGood,
    /// A replica lacks it yet.
    NotCopied(String),
    /// It is the last one that a replica has too.
    Common(String),
}

impl Reason {
    /// The rule that counts it.
    pub fn rule(&self) -> Option<Rule> {
        match self {
            Self::Last(_) => Some(Rule::Last),
            Self::Newest { rule, .. } => Some(*rule),
            _ => None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last(number) => write!(f, "last {number}"),
            Self::Newest { rule, period } => write!(f, "{} {period}", rule.as_str()),
            Self::Within(within) => write!(f, "within {within}"),
            Self::Tag(tag) => write!(f, "tag {tag}"),
            Self::Protected => f.write_str("protected"),
            Self::Unreadable => f.write_str("cannot be read"),
            Self::Anchor => f.write_str("anchor of the next incremental backup"),
            Self::LastGood => f.write_str("the last good one"),
            Self::NotCopied(replica) => write!(f, "not yet in {replica}"),
            Self::Common(replica) => write!(f, "the last one that is in {replica} too"),
        }
    }
}

/// What becomes of a snapshot.
#[derive(Debug, Clone)]
pub struct Decision {
    /// The snapshot.
    pub id: FileId,
    /// Its point in time.
    pub time: Timestamp,
    /// Why it stays; it goes where there is no reason.
    pub reasons: Vec<Reason>,
}

impl Decision {
    /// Whether it stays.
    pub fn stays(&self) -> bool {
        !self.reasons.is_empty()
    }
}

/// What becomes of the snapshots of one machine.
#[derive(Debug, Clone)]
pub struct Group {
    /// Whose they are.
    pub machine: Machine,
    /// Oldest first.
    pub decisions: Vec<Decision>,
    /// How many go that, by the rules of last time and at the pace of backups, would not have gone, where
    /// that looks like a mistake: other rules, or a clock that jumped. It is more than [`FEW`] and more than
    /// half of those that there would be.
    pub unexpected: Option<usize>,
    /// The newest snapshot whose point in time is yet to come.
    pub in_future: Option<(FileId, Timestamp)>,
}

impl Group {
    /// Those that go.
    pub fn dropped(&self) -> impl Iterator<Item = &Decision> {
        self.decisions.iter().filter(|decision| !decision.stays())
    }
}

fn is_mass(dropped: usize, of: usize) -> bool {
    dropped > FEW && dropped * 2 > of
}

/// Decides what becomes of each snapshot. `snapshots` are in the order of their chains, oldest first;
/// `earlier` tells by which rules a machine's snapshots were dropped last time.
pub fn plan<'a>(
    snapshots: &[Candidate],
    policy: &Policy,
    earlier: impl Fn(&Machine) -> Option<&'a Policy>,
    now: Timestamp,
    tz: &TimeZone,
) -> Vec<Group> {
    let mut groups: BTreeMap<&Machine, Vec<&Candidate>> = BTreeMap::new();
    for candidate in snapshots {
        groups.entry(&candidate.machine).or_default().push(candidate);
    }
    let plan_one = |(machine, of_it): (&Machine, Vec<&Candidate>)| {
        plan_group(machine, &of_it, policy, earlier(machine), now, tz)
    };
    groups.into_iter().map(plan_one).collect()
}

fn plan_group(
    machine: &Machine,
    snapshots: &[&Candidate],
    policy: &Policy,
    earlier: Option<&Policy>,
    now: Timestamp,
    tz: &TimeZone,
) -> Group {
    let taken: Vec<Taken<'_>> =
        snapshots.iter().map(|candidate| Taken::new(candidate, tz)).collect();
    let all: Vec<usize> = (0..taken.len()).collect();
    let good = snapshots.iter().rposition(|candidate| candidate.is_whole);
    let good = good.or(snapshots.len().checked_sub(1));
    let by_rules = by_rules(&taken, &all, policy, now, tz);
    let decide = |(place, kept): (usize, Vec<Kept>)| {
        let Candidate { id, time, .. } = *snapshots[place];
        let mut reasons: Vec<Reason> =
            kept.into_iter().map(|kept| kept.reason(time, policy, tz)).collect();
        reasons.extend(whatever_the_rules(snapshots[place]));
        reasons.extend((good == Some(place)).then_some(Reason::LastGood));
        Decision { id, time, reasons }
    };
    let decisions: Vec<Decision> = by_rules.into_iter().enumerate().map(decide).collect();
    let is_future = |candidate: &&&Candidate| candidate.time > now + SKEW_MAX;
    let in_future = snapshots.iter().rev().find(is_future).map(|found| (found.id, found.time));
    let (mut gone, mut of) = (all, taken.len());
    gone.retain(|&place| !decisions[place].stays());
    if let (true, Some(earlier), None) = (is_mass(gone.len(), of), earlier, in_future) {
        let expected = rotated_out(&taken, earlier, now, tz);
        gone.retain(|place| !expected.contains(place));
        of -= expected.len();
    }
    let unexpected = is_mass(gone.len(), of).then_some(gone.len());
    Group { machine: machine.clone(), decisions, unexpected, in_future }
}

/// Why a snapshot stays even where no rule keeps it.
fn whatever_the_rules(candidate: &Candidate) -> impl Iterator<Item = Reason> {
    let is_protected = candidate.tags.iter().any(|tag| tag == PROTECTED);
    let protected = is_protected.then_some(Reason::Protected);
    let unreadable = candidate.is_unreadable.then_some(Reason::Unreadable);
    let anchor = candidate.is_anchor.then_some(Reason::Anchor);
    let not_copied = candidate.not_copied_to.iter().cloned().map(Reason::NotCopied);
    let common = candidate.last_in.iter().cloned().map(Reason::Common);
    protected.into_iter().chain(unreadable).chain(anchor).chain(not_copied).chain(common)
}

/// A snapshot, and the hour, day, … of its point in time.
struct Taken<'a> {
    candidate: &'a Candidate,
    buckets: [i64; Rule::ALL.len()],
}

impl<'a> Taken<'a> {
    fn new(candidate: &'a Candidate, tz: &TimeZone) -> Self {
        let zoned = candidate.time.to_zoned(tz.clone());
        Self { candidate, buckets: Rule::ALL.map(|rule| rule.bucket(&zoned)) }
    }
}

/// The rule that keeps a snapshot.
#[derive(Debug, Clone, Copy)]
enum Kept {
    Last(u32),
    Newest(Rule),
    Within(Within),
    /// By its number in the policy.
    Tag(usize),
}

impl Kept {
    fn reason(self, time: Timestamp, policy: &Policy, tz: &TimeZone) -> Reason {
        match self {
            Self::Last(number) => Reason::Last(number),
            Self::Newest(rule) => {
                Reason::Newest { rule, period: rule.period(&time.to_zoned(tz.clone())) }
            }
            Self::Within(within) => Reason::Within(within),
            Self::Tag(number) => Reason::Tag(policy.tags[number].clone()),
        }
    }
}

/// What the rules alone say of those of `taken` at `places`, oldest first: for each the rules that keep it.
fn by_rules(
    taken: &[Taken<'_>],
    places: &[usize],
    policy: &Policy,
    now: Timestamp,
    tz: &TimeZone,
) -> Vec<Vec<Kept>> {
    let mut kept: Vec<Vec<Kept>> = vec![Vec::new(); places.len()];
    for (number, rule) in Rule::ALL.into_iter().enumerate() {
        let (mut left, mut counted, mut seen) = (policy.count(rule), 0, HashSet::new());
        // Periods whose newest lacks disks: of these the newest that is whole stays too.
        let mut lacking = HashSet::new();
        for (at, &place) in places.iter().enumerate().rev() {
            let (bucket, is_partial) =
                (taken[place].buckets[number], taken[place].candidate.is_partial);
            if !is_partial && lacking.remove(&bucket) {
                kept[at].push(Kept::Newest(rule));
                continue;
            }
            match left {
                0 if lacking.is_empty() => break,
                0 => continue,
                _ => {}
            }
            // The oldest stays while there is room: so the history is as long as the rule allows.
            let is_newest = rule == Rule::Last || seen.insert(bucket);
            if is_newest || at == 0 {
                if is_newest && is_partial && rule != Rule::Last {
                    lacking.insert(bucket);
                }
                (left, counted) = (left - 1, counted + 1);
                kept[at].push(match rule {
                    Rule::Last => Kept::Last(counted),
                    rule => Kept::Newest(rule),
                });
            }
        }
    }
    let mut newest_first = places.iter().rev().map(|&place| taken[place].candidate.time);
    // As restic does: a snapshot whose time is yet to come makes no other one old.
    let newest = newest_first.clone().find(|&time| time <= now + SKEW_MAX).or(newest_first.next());
    let oldest =
        policy.within.zip(newest).map(|(within, newest)| (within, within.before(newest, tz)));
    for (kept, &place) in kept.iter_mut().zip(places) {
        let Candidate { time, tags, .. } = taken[place].candidate;
        kept.extend(
            oldest.filter(|(_, oldest)| time > oldest).map(|(within, _)| Kept::Within(within)),
        );
        let wanted = policy.tags.iter().enumerate().filter(|(_, tag)| tags.contains(tag));
        kept.extend(wanted.map(|(number, _)| Kept::Tag(number)));
    }
    kept
}

/// Those that would be gone had these rules been applied after each single backup, each time to a few
/// only. A backup that would have made many go at once is one whose clock had jumped, or that came after
/// a long pause: what it drives out is not expected until as many have been made since.
fn rotated_out(
    taken: &[Taken<'_>],
    policy: &Policy,
    now: Timestamp,
    tz: &TimeZone,
) -> HashSet<usize> {
    let (mut left, mut gone) = (Vec::new(), HashSet::new());
    for place in 0..taken.len() {
        left.push(place);
        let kept = by_rules(taken, &left, policy, now, tz);
        let goes = left.iter().zip(&kept).filter(|(_, kept)| kept.is_empty());
        let out: HashSet<usize> = goes.map(|(&place, _)| place).collect();
        if !is_mass(out.len(), left.len()) {
            left.retain(|place| !out.contains(place));
            gone.extend(out);
        }
    }
    gone
}
