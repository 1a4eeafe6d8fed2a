//! Snapshot files: finished backups.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{BlobId, FileId, FileKind, Repository, RepositoryError, host};

/// A snapshot as restic writes it. Fields that are not known are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFile {
    /// The point in time.
    pub time: Timestamp,
    /// The snapshot this one continues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<FileId>,
    /// The folder that was backed up.
    pub tree: BlobId,
    /// What was backed up.
    #[serde(default, deserialize_with = "null_is_default")]
    pub paths: Vec<String>,
    /// Where.
    #[serde(default)]
    pub hostname: String,
    /// By whom.
    #[serde(default)]
    pub username: String,
    /// By whom.
    #[serde(default)]
    pub uid: u32,
    /// By whom.
    #[serde(default)]
    pub gid: u32,
    /// What was left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub excludes: Vec<String>,
    /// Free labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub tags: Vec<String>,
    /// The snapshot this one was made from by a later change of tags or the like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<FileId>,
    /// What made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program_version: Option<String>,
}

impl SnapshotFile {
    /// A snapshot of `tree` taken at `time` by this user on this host.
    pub fn new(tree: BlobId, time: Timestamp) -> Self {
        Self {
            time,
            parent: None,
            tree,
            paths: Vec::new(),
            hostname: host::hostname(),
            username: host::username(),
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            excludes: Vec::new(),
            tags: Vec::new(),
            original: None,
            program_version: None,
        }
    }
}

/// Go writes `null` for an empty list.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// All snapshots of a repository.
#[derive(Debug, Clone, Default)]
pub struct Snapshots {
    /// Those that can be read, oldest first.
    pub good: Vec<(FileId, SnapshotFile)>,
    /// Those that cannot, with the reason.
    pub damaged: Vec<(FileId, RepositoryError)>,
}

impl Repository {
    /// Records a finished backup, the last step of one: packs and index must be durable already.
    pub fn save_snapshot(&self, snapshot: &SnapshotFile) -> Result<FileId, RepositoryError> {
        self.write_json(FileKind::Snapshot, snapshot)
    }

    /// Reads one snapshot.
    pub fn snapshot(&self, id: &FileId) -> Result<SnapshotFile, RepositoryError> {
        self.read_json(FileKind::Snapshot, id).map_err(|error| match error {
            RepositoryError::Backend { source } if source.is_not_found() => {
                RepositoryError::SnapshotNotFound { prefix: id.to_hex() }
            }
            error => error,
        })
    }

    /// Reads all snapshots. A damaged one does not hide the others.
    pub fn snapshots(&self) -> Result<Snapshots, RepositoryError> {
        let mut snapshots = Snapshots::default();
        for (id, _) in self.backend().list(FileKind::Snapshot)? {
            match self.snapshot(&id) {
                Ok(snapshot) => snapshots.good.push((id, snapshot)),
                // Forgotten since the listing.
                Err(RepositoryError::SnapshotNotFound { .. }) => {}
                Err(error) => snapshots.damaged.push((id, error)),
            }
        }
        snapshots.good.sort_by_key(|(id, snapshot)| (snapshot.time, *id));
        snapshots.damaged.sort_by_key(|&(id, _)| id);
        Ok(snapshots)
    }

    /// Finds the one snapshot whose id begins with `prefix`, hexadecimal digits of either case.
    pub fn find_snapshot(&self, prefix: &str) -> Result<(FileId, SnapshotFile), RepositoryError> {
        let wanted = prefix.to_ascii_lowercase();
        let listed = self.backend().list(FileKind::Snapshot)?.into_iter().map(|(id, _)| id);
        let mut candidates: Vec<_> = listed.filter(|id| id.to_hex().starts_with(&wanted)).collect();
        candidates.sort_unstable();
        match candidates.as_slice() {
            [id] if !wanted.is_empty() => Ok((*id, self.snapshot(id)?)),
            [] => Err(RepositoryError::SnapshotNotFound { prefix: prefix.to_owned() }),
            _ => Err(RepositoryError::SnapshotAmbiguous { prefix: prefix.to_owned(), candidates }),
        }
    }

    /// Removes a snapshot file. What only it refers to is freed by the next prune.
    pub fn remove_snapshot(&self, id: &FileId) -> Result<(), RepositoryError> {
        Ok(self.backend().remove(FileKind::Snapshot, id)?)
    }
}
