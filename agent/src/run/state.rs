//! What one run tells the next. Losing it costs at most one extra run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::history::Step;
use crate::durable;
use crate::metrics::BackupFigures;
use crate::retention::Machine;

/// Name of the file in the state folder.
const FILE: &str = "jobs.json";
/// Name of the file that pauses all jobs.
const PAUSE: &str = "paused.json";
/// So many machines are known that had a domain's name before.
const FORMER_MAX: usize = 64;

/// Why the state cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep the state of jobs in {}", .path.display())]
pub struct StateError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// All jobs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// By name.
    pub jobs: BTreeMap<String, JobState>,
    /// What is known of repositories, by name.
    pub repositories: BTreeMap<String, RepositoryState>,
    /// Up to when people know by a digest what happened.
    pub last_digest: Option<Timestamp>,
}

/// A job.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobState {
    /// When it began last.
    pub last_start: Option<Timestamp>,
    /// How often it was begun since it last came to its end: one that was killed, or cut off by the host's,
    /// did not.
    pub begun: u32,
    /// When it last ended with all done.
    pub last_success: Option<Timestamp>,
    /// How long it took last, in milliseconds.
    pub duration_ms: Option<u64>,
    /// How many things it failed at last.
    pub failures: u64,
    /// Its domains by name.
    pub domains: BTreeMap<String, DomainState>,
    /// How far it is with verifying its repositories, by name.
    pub verified: BTreeMap<String, Verified>,
}

/// A domain of a job.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DomainState {
    /// Which of all machines with that name it is, where that is known.
    pub uuid: Option<String>,
    /// Those that had the name before, the oldest first: their snapshots are the job's too.
    pub former: Vec<String>,
    /// Since when the job has it.
    pub since: Option<Timestamp>,
    /// When its backup was tried last.
    pub last_attempt: Option<Timestamp>,
    /// Whether that failed.
    pub failed: bool,
    /// The point in time of its last good backup, in whichever repository that is.
    pub last_good: Option<Timestamp>,
    /// Since when that lies in the future: a clock was wrong.
    pub in_future_since: Option<Timestamp>,
    /// How many snapshots there are of it, in the repository that has most.
    pub snapshots: Option<u64>,
    /// What each repository has of it, by the repository's name.
    pub places: BTreeMap<String, Place>,
    /// What its last good backup was like.
    pub last: Option<BackupFigures>,
}

/// What a repository has of a domain.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Place {
    /// The point in time of the last good backup.
    pub last_good: Option<Timestamp>,
    /// The snapshot that it made.
    pub snapshot: Option<String>,
    /// How many snapshots there are, where they were counted.
    pub snapshots: Option<u64>,
}

/// How far a job is with verifying a repository.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Verified {
    /// When that was last tried.
    pub last: Option<Timestamp>,
    /// Which part of its data is read next, from 0.
    pub part: u32,
    /// The parts that were found to be damaged, by number and of how many, from 1: each is read again until it
    /// is sound.
    pub damaged: BTreeSet<(u32, u32)>,
    /// The repository's id, where a file tells of the damage too: without that file all was proved to be sound.
    pub marked: Option<String>,
}

/// A repository.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RepositoryState {
    /// When freed space was last given back.
    pub last_prune: Option<Timestamp>,
    /// Whether snapshots were dropped since.
    pub has_waste: bool,
    /// Whether there ever was a snapshot in it when freed space was given back.
    pub had_snapshots: bool,
    /// Bytes that its packs took when they were last counted.
    pub bytes: Option<u64>,
}

impl JobState {
    /// It begins.
    pub fn begin(&mut self, now: Timestamp) {
        self.last_start = Some(now);
        self.begun = self.begun.saturating_add(1);
    }

    /// Whether its last run has not come to its end; then it was cut off, or is active.
    pub fn has_no_end(&self) -> bool {
        self.begun > 0
    }

    /// The start that its schedule goes by. One that was cut off is begun once more, not again and again.
    pub fn start_that_counts(&self) -> Option<Timestamp> {
        self.last_start.filter(|_| self.begun != 1)
    }
}

impl DomainState {
    /// It is here.
    pub fn meet(&mut self, uuid: Option<&str>, now: Timestamp) {
        self.since.get_or_insert(now);
        self.in_future_since = match self.last_good {
            Some(last) if last > now => Some(self.in_future_since.map_or(now, |it| it.min(now))),
            _ => None,
        };
        let Some(uuid) = uuid.filter(|uuid| self.uuid.as_deref() != Some(uuid)) else { return };
        // Another machine has taken the name: none of what is known is about it.
        if let Some(former) = self.uuid.replace(uuid.to_owned()) {
            self.former.push(former);
            self.former.retain(|it| it != uuid);
            let excess = self.former.len().saturating_sub(FORMER_MAX);
            *self = Self {
                uuid: self.uuid.take(),
                former: self.former.split_off(excess),
                since: Some(now),
                ..Self::default()
            };
        }
    }

    /// These had its name before, as their snapshots tell: the state knows only what it has seen.
    pub fn follow(&mut self, former: impl IntoIterator<Item = String>) {
        for uuid in former {
            let is_known = self.former.contains(&uuid) || self.uuid.as_deref() == Some(&uuid);
            if !is_known && self.former.len() < FORMER_MAX {
                self.former.insert(0, uuid);
            }
        }
    }

    /// What came of its backup into a repository.
    pub fn note(&mut self, step: &Step, start: Timestamp) {
        self.failed = step.snapshot.is_none();
        let (Some(figures), Some(repository)) = (step.figures, &step.repository) else { return };
        self.last = Some(figures);
        let place = self.places.entry(repository.clone()).or_default();
        place.last_good = Some(start);
        place.snapshot.clone_from(&step.snapshot);
        place.snapshots = place.snapshots.map(|count| count + 1);
        self.sum_up(start);
    }

    /// What a repository has of it now: snapshots and their times.
    pub fn count<'a>(
        &mut self,
        now: Timestamp,
        repository: &str,
        snapshots: impl Iterator<Item = (&'a str, Timestamp)> + Clone,
    ) {
        let place = self.places.entry(repository.to_owned()).or_default();
        place.snapshots = Some(snapshots.clone().count() as u64);
        if !snapshots.clone().any(|(id, _)| Some(id) == place.snapshot.as_deref()) {
            let newest = snapshots.max_by_key(|(_, time)| *time);
            place.last_good = newest.map(|(_, time)| time);
            place.snapshot = newest.map(|(id, _)| id.to_owned());
        }
        self.sum_up(now);
    }

    /// Forgets repositories that the job does not use any more.
    pub fn keep_places(&mut self, repositories: &[String], now: Timestamp) {
        let count = self.places.len();
        self.places.retain(|name, _| repositories.contains(name));
        if self.places.len() < count {
            self.sum_up(now);
        }
    }

    fn sum_up(&mut self, now: Timestamp) {
        let times = self.places.values().filter_map(|place| place.last_good);
        // One from the future says less than any other.
        self.last_good = times.max_by_key(|time| (*time <= now, *time));
        self.snapshots = self.places.values().filter_map(|place| place.snapshots).max();
    }

    /// The machines whose snapshots are the job's, as commands take them.
    pub fn machines(&self, name: &str) -> Vec<String> {
        let uuids = self.former.iter().chain(&self.uuid);
        let machine = |uuid: &String| Machine { domain: name.to_owned(), uuid: uuid.clone() };
        uuids.map(|uuid| machine(uuid).to_string()).collect()
    }
}

impl Verified {
    /// A part of the data was read, `part` of `parts` from 1, and is sound or not.
    pub fn read(&mut self, part: (u32, u32), is_sound: bool) {
        match (is_sound, part) {
            // All of it was read.
            (true, (_, 1)) => self.damaged.clear(),
            (true, _) => drop(self.damaged.remove(&part)),
            (false, _) => drop(self.damaged.insert(part)),
        }
    }
}

impl State {
    /// Reads it. What is not there, or makes no sense, is nothing.
    pub fn load(state_dir: &Path) -> Self {
        let path = state_dir.join(FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                let path = path.display();
                tracing::warn!(%error, "{path} is passed over: jobs may run once more than due");
                Self::default()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::default(),
            Err(error) => {
                let path = path.display();
                tracing::warn!(%error, "{path} cannot be read: jobs may run once more than due");
                Self::default()
            }
        }
    }

    /// Keeps it.
    ///
    /// # Errors
    /// [`StateError`]; then the old one is still there.
    pub fn save(&self, state_dir: &Path) -> Result<(), StateError> {
        write(state_dir, FILE, self)
    }

    /// A job's, made where there is none.
    pub fn job(&mut self, name: &str) -> &mut JobState {
        self.jobs.entry(name.to_owned()).or_default()
    }

    /// Whether a repository is known to have had a snapshot: then it is an alarm that it has none.
    pub fn had_snapshots(&self, repository: &str) -> bool {
        let domains = self.jobs.values().flat_map(|job| job.domains.values());
        let mut places = domains.filter_map(|domain| domain.places.get(repository));
        self.repositories.get(repository).is_some_and(|known| known.had_snapshots)
            || places.any(|place| place.snapshot.is_some())
    }

    /// A repository's, made where there is none.
    pub fn repository(&mut self, name: &str) -> &mut RepositoryState {
        self.repositories.entry(name.to_owned()).or_default()
    }
}

/// That nothing shall run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Since when.
    pub since: Timestamp,
    /// Until when; until it is ended by hand where not given.
    pub until: Option<Timestamp>,
}

impl Pause {
    /// The one in force, if any.
    pub fn load(state_dir: &Path, now: Timestamp) -> Option<Self> {
        let text = fs::read(state_dir.join(PAUSE)).ok()?;
        // One that cannot be read was meant all the same.
        let paused = serde_json::from_slice(&text).unwrap_or(Self { since: now, until: None });
        Some(paused).filter(|paused| paused.until.is_none_or(|until| now < until))
    }

    /// Puts it in force.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn begin(self, state_dir: &Path) -> Result<(), StateError> {
        write(state_dir, PAUSE, &self)
    }

    /// Ends any; says whether there was one.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn end(state_dir: &Path) -> Result<bool, StateError> {
        let path = state_dir.join(PAUSE);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(StateError { path, source }),
        }
    }
}

fn write(state_dir: &Path, name: &str, value: &impl Serialize) -> Result<(), StateError> {
    let path = state_dir.join(name);
    fs::create_dir_all(state_dir)
        .and_then(|()| durable::write_json(&path, value))
        .map_err(|source| StateError { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_state_comes_back_and_a_damaged_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::default();
        state.job("nightly").last_start = Some(at(5));
        state.repository("main").has_waste = true;
        let verified = state.job("nightly").verified.entry("main".to_owned()).or_default();
        verified.read((3, 30), false);
        state.save(&dir.path().join("deep")).unwrap();
        assert_eq!(State::load(&dir.path().join("deep")), state);
        fs::write(dir.path().join(FILE), "{\"jobs\": 3").unwrap();
        assert_eq!(State::load(dir.path()), State::default());
    }

    #[test]
    fn a_state_of_an_older_or_newer_version_is_read() {
        let text = r#"{"version": 9, "jobs": {"nightly": {"of_later": [1], "last_start": "2026-11-21T03:00:00Z", "domains":
            {"web": {"last_good": "2026-11-21T03:00:00Z", "snapshot": "a1", "snapshots": 3}}}},
            "repositories": {"main": {"last_verify": "2026-11-21T03:00:00Z", "part": 7, "bytes": 5}}}"#;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), text).unwrap();
        let mut state = State::load(dir.path());
        assert!(!state.job("nightly").has_no_end());
        let web = &state.job("nightly").domains["web"];
        assert!(web.last_good.is_some() && web.snapshots == Some(3));
        assert_eq!(state.repository("main").bytes, Some(5));
    }

    #[test]
    fn a_job_that_was_cut_off_is_begun_once_more_and_not_again_and_again() {
        let mut job = JobState::default();
        job.begin(at(1));
        assert!(job.has_no_end() && job.start_that_counts().is_none());
        job.begin(at(2));
        assert!(job.has_no_end() && job.start_that_counts() == Some(at(2)));
        job.begun = 0;
        assert!(!job.has_no_end() && job.start_that_counts() == Some(at(2)));
    }

    #[test]
    fn p4_a_part_stays_damaged_until_it_was_read_and_is_sound() {
        let mut verified = Verified::default();
        verified.read((3, 30), false);
        verified.read((4, 30), true);
        assert_eq!(verified.damaged, [(3, 30)].into());
        verified.read((3, 30), true);
        assert!(verified.damaged.is_empty());
        verified.read((3, 30), false);
        verified.read((1, 1), true);
        assert!(verified.damaged.is_empty(), "all of it is sound");
    }

    #[test]
    fn r26_of_another_machine_with_the_same_name_nothing_is_known() {
        let mut web = DomainState::default();
        web.meet(Some("u1"), at(1));
        web.count(at(9), "main", [("a", at(2)), ("b", at(3))].into_iter());
        web.meet(Some("u1"), at(4));
        assert_eq!((web.last_good, web.since, web.snapshots), (Some(at(3)), Some(at(1)), Some(2)));
        web.meet(Some("u2"), at(5));
        assert_eq!((web.last_good, web.since, web.snapshots), (None, Some(at(5)), None));
        // But the job goes on with the snapshots of the former one.
        assert_eq!(web.machines("web"), ["web/u1", "web/u2"]);
        web.meet(Some("u1"), at(6));
        assert_eq!(web.machines("web"), ["web/u2", "web/u1"]);
        assert_eq!(DomainState::default().machines("web"), [""; 0], "nobody knows whose they are");
    }

    #[test]
    fn each_repository_has_backups_of_its_own_and_the_newest_counts() {
        let mut web = DomainState::default();
        web.count(at(9), "main", [("a", at(2)), ("b", at(3))].into_iter());
        let step = Step {
            snapshot: Some("c".to_owned()),
            figures: Some(BackupFigures::default()),
            ..Step::begin("nightly", "backup", Some("web"), Some("offsite"))
        };
        web.note(&step, at(9));
        // The first repository is back, where its backup fails.
        web.count(at(9), "main", [("a", at(2)), ("b", at(3))].into_iter());
        assert_eq!((web.last_good, web.snapshots), (Some(at(9)), Some(2)));
        web.count(at(9), "offsite", [("x", at(1))].into_iter());
        assert_eq!((web.last_good, web.snapshots), (Some(at(3)), Some(2)), "that one is gone");
        web.keep_places(&["offsite".to_owned()], at(9));
        assert_eq!((web.last_good, web.snapshots), (Some(at(1)), Some(1)));
        web.count(at(9), "main", [("f", at(99))].into_iter());
        assert_eq!(web.last_good, Some(at(1)), "what is of the future says less");
    }

    #[test]
    fn a_pause_ends_by_the_clock_or_by_hand() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Pause::load(dir.path(), at(0)), None);
        Pause { since: at(0), until: Some(at(10)) }.begin(dir.path()).unwrap();
        assert!(Pause::load(dir.path(), at(9)).is_some());
        assert_eq!(Pause::load(dir.path(), at(10)), None);
        assert!(Pause::end(dir.path()).unwrap() && !Pause::end(dir.path()).unwrap());
        Pause { since: at(0), until: None }.begin(dir.path()).unwrap();
        assert!(Pause::load(dir.path(), at(1 << 30)).is_some());
    }
}
