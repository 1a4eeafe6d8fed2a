//! The last snapshot of each machine that this host has made in a repository. Where it is gone, somebody took it
//! away, or put an older state of the repository back: `forget` never drops it. Losing what is kept here costs one
//! such alarm, no backup.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use repository::{FileId, Repository, RepositoryError};
use serde::{Deserialize, Serialize};

use crate::catalog::{History, short};
use crate::durable;
use crate::names::DomainName;

/// Name of the folder in the state folder.
const FOLDER: &str = "last-known";

/// The last snapshot of a machine in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Last {
    domain: String,
    uuid: String,
    snapshot: FileId,
    time: Timestamp,
}

/// Where that is kept.
#[derive(Debug)]
pub struct LastKnown {
    path: PathBuf,
    domain: String,
    uuid: String,
}

impl LastKnown {
    /// That of a machine.
    pub fn of(state_dir: &Path, repository_id: &str, domain: &DomainName, uuid: &str) -> Self {
        // Names are never paths.
        let name = FileId::of(format!("{domain}\n{uuid}").as_bytes()).to_hex();
        let path = state_dir.join(FOLDER).join(repository_id).join(format!("{name}.json"));
        Self { path, domain: domain.to_string(), uuid: uuid.to_owned() }
    }

    /// Says in words that it is gone; `None` where it is there, or none is known.
    pub fn is_gone(&self, repository: &Repository, history: &History) -> Option<String> {
        let last: Last = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        if history.has(&last.snapshot) {
            return None;
        }
        // One that is damaged is there.
        let found = repository.snapshot(&last.snapshot);
        matches!(found, Err(RepositoryError::SnapshotNotFound { .. })).then(|| {
            let (snapshot, time) = (short(&last.snapshot), last.time);
            format!(
                "snapshot {snapshot} of {time}, the last that this host made of it, is gone from the repository: \
                 somebody removed it, or an older state of the repository was put back"
            )
        })
    }

    /// Keeps the one that was just made.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn remember(&self, snapshot: FileId, time: Timestamp) -> io::Result<()> {
        let (domain, uuid) = (self.domain.clone(), self.uuid.clone());
        fs::create_dir_all(self.path.parent().expect("it lies in a folder"))?;
        durable::write_json(&self.path, &Last { domain, uuid, snapshot, time })
    }
}
