//! Finds damage, and says which snapshots cannot be restored because of it.

mod affected;
mod packs;
mod trees;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use jiff::Timestamp;

use self::affected::Needs;
use crate::{
    BackendError, BlobId, BlobKind, Defect, FileId, FileKind, FileRef, Index, Reader, Repository,
    RepositoryError,
};

/// What to check.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct CheckOptions {
    /// Read this share of all packs, 0–100 percent, chosen at random; `None` reads none.
    pub read_data: Option<f64>,
    /// Read this part of so many of all packs, from 0: one part after the other reads everything, however
    /// the repository changes meanwhile.
    pub read_part: Option<(u32, u32)>,
}

impl CheckOptions {
    /// Structure only, or also this share of all packs in percent.
    pub fn new(read_data: Option<f64>) -> Self {
        Self { read_data, read_part: None }
    }

    /// Structure and one part of so many of all packs, from 0.
    pub fn part(part: u32, of: u32) -> Self {
        Self { read_data: None, read_part: Some((part, of)) }
    }
}

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CheckProgress {
    /// Keys, index and snapshots are being looked at.
    Metadata,
    /// Folders are being read.
    Trees {
        /// Folders read so far.
        done: u64,
    },
    /// Packs are being read.
    Packs {
        /// Packs read so far.
        done: u64,
        /// Packs to read.
        total: u64,
        /// Bytes read so far.
        bytes: u64,
    },
}

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// Everything that is wrong.
    pub problems: Vec<Problem>,
    /// Snapshots that can be read.
    pub snapshots: u64,
    /// Packs in the index.
    pub packs: u64,
    /// Packs that were read whole.
    pub packs_read: u64,
    /// Bytes of those.
    pub bytes_read: u64,
    /// Packs that nothing mentions: left by a run that was killed, freed by the next prune.
    pub unreferenced_packs: Vec<FileId>,
}

impl CheckReport {
    /// Nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// There is data, but not one snapshot: a first backup did not finish, or all of them are lost.
    pub fn has_only_data(&self) -> bool {
        self.is_clean() && self.snapshots == 0 && self.packs > 0
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone)]
pub struct Problem {
    /// The file it is in; `None` for a blob that no index file knows.
    pub file: Option<FileRef>,
    /// The blob, if it is about one.
    pub blob: Option<BlobId>,
    /// What is wrong.
    pub defect: Defect,
    /// The snapshots that cannot be restored whole because of it, oldest first.
    pub affected: Vec<SnapshotRef>,
}

/// A snapshot that is affected by a problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRef {
    /// Its name.
    pub id: FileId,
    /// Its point in time; `None` if its own file is damaged.
    pub time: Option<Timestamp>,
    /// What was backed up.
    pub paths: Vec<String>,
}

/// A problem before it is known whom it affects.
struct Finding {
    file: Option<FileRef>,
    blob: Option<BlobId>,
    defect: Defect,
    affects: Affects,
}

enum Affects {
    Nobody,
    Everybody,
    Snapshot(FileId),
    /// All that need one of these blobs.
    Needing(Vec<(BlobKind, BlobId)>),
    /// All that need one of these blobs, unless another pack has a good copy of it.
    Copies(Vec<(BlobKind, BlobId)>),
}

impl Finding {
    fn new(file: FileRef, defect: Defect, affects: Affects) -> Self {
        Self { file: Some(file), blob: None, defect, affects }
    }
}

impl Repository {
    /// Checks the repository. Damage is reported, not returned as an error; an error means that the
    /// store failed in a way that says nothing about its content.
    pub fn check(
        &self,
        options: &CheckOptions,
        progress: &(dyn Fn(CheckProgress) + Sync),
    ) -> Result<CheckReport, RepositoryError> {
        progress(CheckProgress::Metadata);
        let mut findings = Vec::new();
        self.check_config_keys_locks(&mut findings)?;
        // Snapshots first: what they refer to was durable in the index before they were.
        let snapshots = self.snapshots()?;
        let (index, damaged_index) = self.index_of_readable()?;
        let index = Arc::new(index);
        let reader = Reader::new(self, Arc::clone(&index), 0);
        for (id, error) in &snapshots.damaged {
            let file = FileRef { kind: FileKind::Snapshot, id: *id };
            let affects = Affects::Snapshot(*id);
            findings.push(Finding::new(file, defect_of(error.clone())?, affects));
        }

        let sizes: HashMap<FileId, u64> =
            self.backend().list(FileKind::Pack)?.into_iter().collect();
        let mut report = CheckReport {
            snapshots: snapshots.good.len() as u64,
            packs: index.pack_count() as u64,
            ..CheckReport::default()
        };
        let indexed: HashSet<FileId> = index.packs().iter().map(|pack| pack.id).collect();
        report.unreferenced_packs =
            sizes.keys().filter(|id| !indexed.contains(*id)).copied().collect();
        report.unreferenced_packs.sort_unstable();

        let roots: Vec<BlobId> = snapshots.good.iter().map(|(_, file)| file.tree).collect();
        let trees = self.check_trees(&reader, &roots, progress)?;
        self.attribute_to_index(damaged_index, &trees.missing, &report, &mut findings)?;
        findings.extend(trees.findings);
        packs::check_sizes(&index, &sizes, &mut findings);
        if let Some(percent) = options.read_data {
            let chosen = packs::choose(&index, &sizes, percent);
            self.check_packs(&index, &chosen, progress, &mut report, &mut findings)?;
        }
        if let Some((part, of)) = options.read_part {
            let chosen = packs::part(&index, &sizes, part, of);
            self.check_packs(&index, &chosen, progress, &mut report, &mut findings)?;
        }

        let needs = Needs::new(&reader, &findings);
        report.problems = needs.attribute(findings, &snapshots);
        Ok(report)
    }

    fn check_config_keys_locks(&self, findings: &mut Vec<Finding>) -> Result<(), RepositoryError> {
        let config = FileRef { kind: FileKind::Config, id: FileId::CONFIG };
        if let Err(error) = self.verify_config() {
            findings.push(Finding::new(config, defect_of(error)?, Affects::Everybody));
        }
        let keys = self.damaged_files(FileKind::Key)?;
        let affects = |good| if good { Affects::Nobody } else { Affects::Everybody };
        let any_good = keys.good > 0;
        if keys.good + keys.damaged.len() == 0 {
            let file = FileRef { kind: FileKind::Key, id: self.key_id() };
            findings.push(Finding::new(file, Defect::Missing, Affects::Everybody));
        }
        for (file, defect) in keys.damaged {
            findings.push(Finding::new(file, defect, affects(any_good)));
        }
        for (file, error) in self.unreadable_locks()? {
            findings.push(Finding::new(file, defect_of(error)?, Affects::Nobody));
        }
        Ok(())
    }

    /// Files of a kind whose names are not the digests of their content.
    fn damaged_files(&self, kind: FileKind) -> Result<Hashed, RepositoryError> {
        let mut hashed = Hashed::default();
        for (id, _) in self.backend().list(kind)? {
            let file = FileRef { kind, id };
            match self.backend().read(kind, &id) {
                Ok(content) if FileId::of(&content) == id => hashed.good += 1,
                Ok(content) => {
                    // A damaged key file that opened all the same still does.
                    hashed.good += usize::from(FileId::of(&content) == self.key_digest());
                    hashed.damaged.push((file, Defect::Name));
                }
                Err(source) if source.is_not_found() => {}
                Err(source) => hashed.damaged.push((file, unreadable(source))),
            }
        }
        Ok(hashed)
    }

    /// Damaged index files are to blame for the missing blobs that a pack without index has.
    fn attribute_to_index(
        &self,
        damaged: Vec<(FileRef, RepositoryError)>,
        missing: &HashSet<(BlobKind, BlobId)>,
        report: &CheckReport,
        findings: &mut Vec<Finding>,
    ) -> Result<(), RepositoryError> {
        if damaged.is_empty() {
            return Ok(());
        }
        let mut blamed = Vec::new();
        if !missing.is_empty() {
            let sizes: BTreeMap<_, _> = self.backend().list(FileKind::Pack)?.into_iter().collect();
            for id in &report.unreferenced_packs {
                // Its own damage shows as missing blobs that nobody can be blamed for.
                let header = self.read_pack_header(id, sizes.get(id).copied().unwrap_or(0));
                let blobs = header.unwrap_or_default().into_iter();
                blamed.extend(
                    blobs.map(|blob| (blob.kind, blob.id)).filter(|blob| missing.contains(blob)),
                );
            }
        }
        for (file, error) in damaged {
            let affects = Affects::Needing(blamed.clone());
            findings.push(Finding::new(file, defect_of(error)?, affects));
        }
        Ok(())
    }
}

#[derive(Default)]
struct Hashed {
    good: usize,
    damaged: Vec<(FileRef, Defect)>,
}

/// The defect that an error is about; other errors stay errors.
fn defect_of(error: RepositoryError) -> Result<Defect, RepositoryError> {
    match error {
        RepositoryError::Damaged { source, .. }
        | RepositoryError::DamagedBlob { source, .. }
        | RepositoryError::InvalidTree { source, .. } => Ok(source),
        RepositoryError::MissingBlob { .. } => Ok(Defect::Missing),
        RepositoryError::Backend { source } => Ok(unreadable(source)),
        error => Err(error),
    }
}

fn unreadable(source: BackendError) -> Defect {
    match source {
        BackendError::NotFound { .. } => Defect::Missing,
        BackendError::Truncated { end, .. } => Defect::Truncated { len: end },
        source => Defect::Unreadable { source: Box::new(source) },
    }
}

/// The pack a blob should be in, or the index where none is known.
fn file_of(index: &Index, kind: BlobKind, id: &BlobId) -> Option<FileRef> {
    let location = index.locate(kind, id)?;
    Some(FileRef { kind: FileKind::Pack, id: location.pack })
}
