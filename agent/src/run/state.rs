//! What one run tells the next. Losing it costs at most one extra run.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::journal::write_durably;
use crate::metrics::BackupFigures;

/// Name of the file in the state folder.
const FILE: &str = "jobs.json";
/// Name of the file that pauses all jobs.
const PAUSE: &str = "paused.json";

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
    /// When it last ended with all done.
    pub last_success: Option<Timestamp>,
    /// How long it took last, in milliseconds.
    pub duration_ms: Option<u64>,
    /// How many things it failed at last.
    pub failures: u64,
    /// Its domains by name.
    pub domains: BTreeMap<String, DomainState>,
}

/// A domain of a job.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DomainState {
    /// Since when the job has it.
    pub since: Option<Timestamp>,
    /// When its backup was tried last.
    pub last_attempt: Option<Timestamp>,
    /// Whether that failed.
    pub failed: bool,
    /// The point in time of its last good backup.
    pub last_good: Option<Timestamp>,
    /// The snapshot that it made.
    pub snapshot: Option<String>,
    /// How many snapshots there are of it, where they were counted.
    pub snapshots: Option<u64>,
    /// What its last good backup was like.
    pub last: Option<BackupFigures>,
}

/// A repository.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RepositoryState {
    /// When freed space was last given back.
    pub last_prune: Option<Timestamp>,
    /// Whether snapshots were dropped since.
    pub has_waste: bool,
    /// When it was last verified.
    pub last_verify: Option<Timestamp>,
    /// Which part of its data is read next, from 0.
    pub part: u32,
    /// Bytes that its packs took when they were last counted.
    pub bytes: Option<u64>,
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
            Err(_) => Self::default(),
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
        .and_then(|()| write_durably(&path, value))
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
        state.repository("main").part = 7;
        state.save(&dir.path().join("deep")).unwrap();
        assert_eq!(State::load(&dir.path().join("deep")), state);
        fs::write(dir.path().join(FILE), "{\"jobs\": 3").unwrap();
        assert_eq!(State::load(dir.path()), State::default());
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
