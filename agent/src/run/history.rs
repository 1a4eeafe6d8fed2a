//! What became of runs, kept for those who ask later.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::state::StateError;
use crate::durable;
use crate::metrics::BackupFigures;
use crate::names::RunId;

/// Name of the folder in the state folder.
const FOLDER: &str = "runs";
/// Runs that are kept at most: about a year and a half of one an hour.
const RUNS_MAX: usize = 13_000;

/// A run that did something.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub id: RunId,
    /// When it began.
    pub started: Timestamp,
    /// When it ended; a run that was killed has no end.
    pub ended: Option<Timestamp>,
    /// What it did, in the order in which that ended.
    pub steps: Vec<Step>,
}

/// Something that a run did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The job.
    pub job: String,
    /// What was to be done: `backup`, `forget`, `prune`, `verify`, `copy`.
    pub work: String,
    /// The domain, where it is about one.
    pub domain: Option<String>,
    /// Which of all machines with that name it is, where that came out.
    pub uuid: Option<String>,
    /// The repository, where one was used.
    pub repository: Option<String>,
    /// When it began.
    pub started: Timestamp,
    /// How long it took, tries included, in milliseconds.
    pub duration_ms: u64,
    /// How often it was tried.
    pub attempts: u32,
    /// What came of it.
    pub outcome: Outcome,
    /// In words.
    pub text: String,
    /// The snapshot that was made.
    pub snapshot: Option<String>,
    /// What the backup was like.
    pub figures: Option<BackupFigures>,
}

/// What came of a step, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Done.
    Done,
    /// Done, but a person should look.
    Warning,
    /// Ended because somebody asked.
    Aborted,
    /// Not done.
    Failed,
}

impl Outcome {
    /// Whether what was to be done is done.
    pub fn is_done(self) -> bool {
        matches!(self, Self::Done | Self::Warning)
    }

    /// The field's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Warning => "warning",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        }
    }
}

impl Step {
    /// A step that begins.
    pub fn begin(job: &str, work: &str, domain: Option<&str>, repository: Option<&str>) -> Self {
        Self {
            job: job.to_owned(),
            work: work.to_owned(),
            domain: domain.map(str::to_owned),
            uuid: None,
            repository: repository.map(str::to_owned),
            started: Timestamp::now(),
            duration_ms: 0,
            attempts: 1,
            outcome: Outcome::Failed,
            text: String::new(),
            snapshot: None,
            figures: None,
        }
    }

    /// The step with what came of it.
    pub fn end(self, outcome: Outcome, text: impl Into<String>) -> Self {
        Self { outcome, text: text.into(), ..self }
    }
}

impl Record {
    /// A run that begins.
    pub fn begin(now: Timestamp) -> Self {
        Self { id: RunId::random(), started: now, ended: None, steps: Vec::new() }
    }

    /// So many steps came out so.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.steps.iter().filter(|step| step.outcome == outcome).count()
    }

    /// The worst that came of it; a run without an end is one that was killed.
    pub fn outcome(&self) -> Outcome {
        match self.ended {
            Some(_) => self.steps.iter().map(|step| step.outcome).max().unwrap_or(Outcome::Done),
            None => Outcome::Failed,
        }
    }

    /// Keeps it, and drops those that are older than `keep`.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn save(&self, state_dir: &Path, keep: Duration) -> Result<(), StateError> {
        let folder = state_dir.join(FOLDER);
        let path = folder.join(format!("{}-{}.json", self.started.as_second(), self.id));
        let failed = |source| StateError { path: path.clone(), source };
        fs::create_dir_all(&folder).map_err(failed)?;
        durable::write_json(&path, self).map_err(failed)?;
        let oldest = self.started.as_second().saturating_sub_unsigned(keep.as_secs());
        let files = files(state_dir);
        let excess = files.len().saturating_sub(RUNS_MAX);
        for (index, (started, old)) in files.iter().enumerate() {
            if index < excess || *started < oldest {
                // The next run tries again.
                let _ = fs::remove_file(old);
            }
        }
        Ok(())
    }

    /// The newest `count`, oldest first. What makes no sense is passed over.
    pub fn load(state_dir: &Path, count: usize) -> Vec<Self> {
        let files = files(state_dir);
        let newest = files.into_iter().rev().take(count);
        let read = |(_, path): (i64, PathBuf)| {
            let text = fs::read(&path).ok()?;
            serde_json::from_slice(&text)
                .map_err(|error| tracing::warn!(%error, "{} is passed over", path.display()))
                .ok()
        };
        let mut records: Vec<Self> = newest.filter_map(read).collect();
        records.reverse();
        records
    }
}

/// The files by the second in which their runs began, oldest first.
fn files(state_dir: &Path) -> Vec<(i64, PathBuf)> {
    let entries = fs::read_dir(state_dir.join(FOLDER)).into_iter().flatten().flatten();
    let of_run = |path: PathBuf| {
        let name = path.file_name()?.to_str()?;
        let started = name.strip_suffix(".json")?.split_once('-')?.0.parse().ok()?;
        Some((started, path))
    };
    let mut files: Vec<_> = entries.filter_map(|entry| of_run(entry.path())).collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_kept_for_as_long_as_configured() {
        let dir = tempfile::tempdir().unwrap();
        let day = Duration::from_secs(86_400);
        for n in 0..6 {
            let now = Timestamp::from_second(1_700_000_000 + n * 86_400).unwrap();
            Record { ended: Some(now), ..Record::begin(now) }.save(dir.path(), 3 * day).unwrap();
        }
        fs::write(dir.path().join(FOLDER).join("1700000001-x.json"), "{").unwrap();
        fs::write(dir.path().join(FOLDER).join("note"), "mine").unwrap();
        let days = |count| -> Vec<_> {
            let records = Record::load(dir.path(), count);
            records.iter().map(|it| (it.started.as_second() - 1_700_000_000) / 86_400).collect()
        };
        assert_eq!(days(100), [2, 3, 4, 5]);
        assert_eq!(days(2), [4, 5]);
    }
}
