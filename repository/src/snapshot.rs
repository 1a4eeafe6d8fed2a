//! Snapshot files: finished backups.

use std::{collections::HashMap, thread};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    BlobId, FileId, FileKind, Repository, RepositoryError, host, lock::SETTLE,
    repository::ignore_missing,
};

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

    /// What the snapshot of this id is called in all repositories: a copy, and one whose tags were
    /// changed, tell of the one that they were made from.
    pub fn first_id(&self, id: &FileId) -> FileId {
        self.original.unwrap_or(*id)
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
    /// Those that can be read, oldest first, each after the one that it continues.
    pub good: Vec<(FileId, SnapshotFile)>,
    /// Those that cannot, with the reason.
    pub damaged: Vec<(FileId, RepositoryError)>,
}

impl Repository {
    /// Records a finished backup, the last step of one: packs and index must be durable already.
    ///
    /// Fails with [`RepositoryError::LockLost`] where what it refers to may have been removed.
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
        let mut snapshots = self.listed_snapshots()?;
        snapshots.damaged.retain(|damaged| !is_forgotten(damaged));
        Ok(snapshots)
    }

    /// As [`Self::snapshots`], where nobody may have forgotten one meanwhile: one that is listed and not
    /// there cannot be read. A listing may be late, so that is believed the second time.
    pub(crate) fn all_snapshots(&self) -> Result<Snapshots, RepositoryError> {
        let snapshots = self.listed_snapshots()?;
        if !snapshots.damaged.iter().any(is_forgotten) {
            return Ok(snapshots);
        }
        thread::sleep(SETTLE);
        self.listed_snapshots()
    }

    fn listed_snapshots(&self) -> Result<Snapshots, RepositoryError> {
        let mut snapshots = Snapshots::default();
        for (id, _) in self.backend().list(FileKind::Snapshot)? {
            match self.snapshot(&id) {
                Ok(snapshot) => snapshots.good.push((id, snapshot)),
                Err(error) => snapshots.damaged.push((id, error)),
            }
        }
        snapshots.good = in_order(snapshots.good);
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

    /// Gives a snapshot other tags, which makes it another file; returns its name. As with restic the new
    /// one tells in `original` which one it was at first.
    pub fn retag_snapshot(
        &self,
        id: &FileId,
        change: impl FnOnce(&mut Vec<String>),
    ) -> Result<FileId, RepositoryError> {
        let mut snapshot = self.snapshot(id)?;
        let before = snapshot.tags.clone();
        change(&mut snapshot.tags);
        if snapshot.tags == before {
            return Ok(*id);
        }
        snapshot.original.get_or_insert(*id);
        let changed = self.save_snapshot(&snapshot)?;
        ignore_missing(self.backend().remove(FileKind::Snapshot, id))?;
        Ok(changed)
    }

    /// Removes a snapshot file. What only it refers to is freed by the next prune.
    pub fn remove_snapshot(&self, id: &FileId) -> Result<(), RepositoryError> {
        Ok(self.backend().remove(FileKind::Snapshot, id)?)
    }
}

/// Whether it was forgotten since the listing.
fn is_forgotten((_, error): &(FileId, RepositoryError)) -> bool {
    matches!(error, RepositoryError::SnapshotNotFound { .. })
}

/// Oldest first. The clock may have jumped, so the time of a snapshot counts as no earlier than that of
/// the one that it continues.
fn in_order(mut snapshots: Vec<(FileId, SnapshotFile)>) -> Vec<(FileId, SnapshotFile)> {
    snapshots.sort_by_key(|(id, snapshot)| (snapshot.time, *id));
    let mut places = HashMap::new();
    for (place, (id, snapshot)) in snapshots.iter().enumerate() {
        places.extend([Some(*id), snapshot.original].into_iter().flatten().map(|id| (id, place)));
    }
    let parents: Vec<Option<usize>> =
        snapshots.iter().map(|(_, file)| places.get(&file.parent?).copied()).collect();
    // The time that counts, and how many snapshots lie before in the chain.
    let mut keys: Vec<Option<(Timestamp, usize)>> = vec![None; snapshots.len()];
    for place in 0..snapshots.len() {
        let (mut chain, mut next) = (Vec::new(), Some(place));
        // Ids are digests of the content, so no chain is a ring; one that is ends here all the same.
        while let Some(at) = next.filter(|&at| keys[at].is_none() && chain.len() < parents.len()) {
            chain.push(at);
            next = parents[at];
        }
        let mut before = next.and_then(|at| keys[at]);
        for at in chain.into_iter().rev() {
            let time = snapshots[at].1.time;
            let key = before.map_or((time, 0), |(least, count)| (time.max(least), count + 1));
            keys[at] = Some(key);
            before = Some(key);
        }
    }
    let mut keyed: Vec<_> = keys.into_iter().zip(snapshots).collect();
    keyed.sort_by_key(|&(key, _)| key);
    keyed.into_iter().map(|(_, snapshot)| snapshot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A snapshot by a number, the day it was taken, and the number of the one it continues.
    fn snapshot(number: u8, day: i64, parent: Option<u8>) -> (FileId, SnapshotFile) {
        let time = Timestamp::from_second(day * 86_400).unwrap();
        let mut file = SnapshotFile::new(BlobId::of(b"a tree"), time);
        file.parent = parent.map(id);
        (id(number), file)
    }

    fn id(number: u8) -> FileId {
        FileId::of(&[number])
    }

    fn order(snapshots: Vec<(FileId, SnapshotFile)>) -> Vec<FileId> {
        in_order(snapshots).into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn r17_no_snapshot_comes_before_the_one_it_continues_whatever_the_clock_said() {
        let back = vec![snapshot(3, 12, Some(2)), snapshot(2, 10, Some(1)), snapshot(1, 400, None)];
        assert_eq!(order(back), [1, 2, 3].map(id));
        let ahead = vec![
            snapshot(1, 10, None),
            snapshot(4, 13, Some(3)),
            snapshot(2, 400, Some(1)),
            snapshot(3, 12, Some(2)),
        ];
        assert_eq!(order(ahead), [1, 2, 3, 4].map(id));
        // Another machine's, in between.
        let two = vec![snapshot(1, 10, None), snapshot(2, 30, Some(1)), snapshot(7, 20, None)];
        assert_eq!(order(two), [1, 7, 2].map(id));
    }

    #[test]
    fn r17_a_chain_holds_though_tags_were_changed_or_its_start_was_forgotten() {
        let mut changed = snapshot(9, 400, None);
        changed.1.original = Some(id(1));
        assert_eq!(order(vec![snapshot(2, 10, Some(1)), changed]), [9, 2].map(id));
        let forgotten = vec![snapshot(3, 12, Some(2)), snapshot(2, 10, Some(1))];
        assert_eq!(order(forgotten), [2, 3].map(id));
    }

    #[test]
    fn a_forged_ring_of_snapshots_ends() {
        let ring = vec![snapshot(1, 10, Some(2)), snapshot(2, 11, Some(1))];
        assert_eq!(order(ring).len(), 2);
    }
}
