//! Makes a damaged repository one that can be written to again: what is good of damaged packs is saved, what
//! is not is fetched from a replica or dropped from the index. Then the next backup, which reuses only what
//! the index knows, stores it anew, and snapshots that need it are whole again.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use crate::{
    BackendError, BlobId, BlobKind, CheckReport, Defect, FileId, FileKind, FileRef, Index, Lock,
    LockMode, Problem, Reader, Repository, RepositoryError, Tree,
    index::file::{BlobEntry, IndexFile, PackEntry},
    lock::STALE_AFTER,
    pack::PackedBlob,
    prune::{packer::Packer, rewrite::Remover},
    repository::ignore_missing,
    writer::INDEX_BLOBS_MAX,
};

/// How to repair.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RepairOptions {
    /// So long others have to let go of the repository.
    pub patience: Duration,
    /// So long a lock that nobody can read is watched before it is removed.
    pub lock_patience: Duration,
}

impl Default for RepairOptions {
    fn default() -> Self {
        Self { patience: Duration::from_secs(600), lock_patience: STALE_AFTER }
    }
}

/// How far it is.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum RepairProgress {
    /// Somebody else uses the repository.
    Waiting {
        /// Who.
        held: RepositoryError,
    },
    /// Damaged packs are being looked through.
    Packs {
        /// Packs done.
        done: u64,
        /// Packs to do.
        total: u64,
    },
    /// Folders are being looked through for what is missing.
    Trees {
        /// Folders read so far.
        done: u64,
    },
    /// Damaged packs are being taken away.
    Removing,
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RepairReport {
    /// Damaged packs that the index does not mention any more.
    pub packs: u64,
    /// Blobs of those that were good.
    pub blobs_saved: u64,
    /// Blobs that a replica had.
    pub blobs_fetched: u64,
    /// Blobs that nobody has: the next backup may.
    pub blobs_lost: u64,
    /// Index files that were damaged or lost, and whose content was looked for in the packs.
    pub index_files: u64,
    /// Packs that stay as they are: the store could not read them, which proves nothing.
    pub unreadable: Vec<FileId>,
}

/// Says how far it is, and fails where it is to stop.
type Step<'a> = &'a dyn Fn(RepairProgress) -> Result<(), RepositoryError>;

impl Repository {
    /// Mends what a check found in packs and index files, and fetches what is missing from a replica; removes
    /// locks that nobody can read. Damaged snapshots and keys stay as they are. Whatever interrupts it, nothing is lost that was not before.
    pub fn repair(
        &self,
        found: &CheckReport,
        replica: Option<&Repository>,
        options: &RepairOptions,
        progress: Step<'_>,
    ) -> Result<RepairReport, RepositoryError> {
        let replica = replica.map(Replica::open).transpose()?;
        let waiting =
            |held: &RepositoryError| progress(RepairProgress::Waiting { held: held.clone() });
        self.outwait_damaged_locks(options.lock_patience, &waiting)?;
        let lock = self.lock_within(LockMode::Exclusive, options.patience, &waiting)?;
        let mut report = RepairReport::default();
        self.mend_index(&lock, found, &mut report)?;
        let mut lost = HashSet::new();
        self.mend_packs(&lock, found, replica.as_ref(), progress, &mut report, &mut lost)?;
        if let Some(replica) = &replica {
            self.fetch_missing(replica, progress, &mut report, &mut lost)?;
        }
        report.blobs_lost = lost.len() as u64;
        lock.release()?;
        Ok(report)
    }

    /// What damaged or lost index files said is in the headers of the packs that no other mentions. A damaged
    /// one stays where such a pack cannot be read today: then it is not known what both had. One that the store
    /// cannot read today stays, too, where a header is damaged: it may tell what is in that pack.
    fn mend_index(
        &self,
        lock: &Lock,
        found: &CheckReport,
        report: &mut RepairReport,
    ) -> Result<(), RepositoryError> {
        let (index, damaged) = self.index_of_readable()?;
        let is_missing = |problem: &Problem| problem.file.is_none() && problem.blob.is_some();
        if damaged.is_empty() && !found.problems.iter().any(is_missing) {
            return Ok(());
        }
        let known: HashSet<FileId> = index.packs().iter().map(|pack| pack.id).collect();
        let (mut packs, mut blobs_len, mut written) = (Vec::new(), 0, 0);
        let mut all_told = true;
        for (id, len) in self.backend().list(FileKind::Pack)? {
            if known.contains(&id) {
                continue;
            }
            match self.read_pack_header(&id, len) {
                Ok(blobs) => {
                    blobs_len += blobs.len();
                    let blobs = blobs.into_iter().map(BlobEntry).collect();
                    packs.push(PackEntry { id, blobs });
                }
                Err(error) if error.is_damage() => {
                    tracing::error!(pack = %id, %error, "a pack cannot be told of");
                    all_told = false;
                }
                Err(RepositoryError::Backend { source }) if !source.is_away() => {
                    tracing::error!(pack = %id, error = %source, "a pack cannot be read");
                    report.unreadable.push(id);
                }
                Err(error) => return Err(error),
            }
            if blobs_len >= INDEX_BLOBS_MAX {
                self.write_json(FileKind::Index, &IndexFile { packs: &packs })?;
                (packs, blobs_len, written) = (Vec::new(), 0, written + 1);
            }
        }
        if !packs.is_empty() {
            self.write_json(FileKind::Index, &IndexFile { packs: &packs })?;
            written += 1;
        }
        if !report.unreadable.is_empty() {
            report.index_files = written;
            return Ok(());
        }
        report.index_files = written.max(damaged.len() as u64);
        for (file @ FileRef { id, .. }, error) in damaged {
            if !all_told && is_unread(&error) {
                tracing::error!(
                    "{file} cannot be read and stays, for a pack is damaged of which it may tell: make it \
                     readable and repair again, or remove it once it is given up"
                );
                continue;
            }
            lock.verify()?;
            ignore_missing(self.backend().remove(FileKind::Index, &id))?;
        }
        Ok(())
    }

    /// Saves what is good of damaged packs, then takes them out of the index and away. A pack that a store
    /// cannot read today, and may tomorrow, stays as it is.
    fn mend_packs(
        &self,
        lock: &Lock,
        found: &CheckReport,
        replica: Option<&Replica>,
        progress: Step<'_>,
        report: &mut RepairReport,
        lost: &mut HashSet<(BlobKind, BlobId)>,
    ) -> Result<(), RepositoryError> {
        let damaged: HashSet<FileId> = found.problems.iter().filter_map(pack_of).collect();
        let index = Arc::new(self.index_of_readable()?.0);
        let numbers = index.packs().iter().zip(0_u32..);
        let suspects: HashMap<u32, FileId> = numbers
            .filter(|(pack, _)| damaged.contains(&pack.id))
            .map(|(pack, number)| (number, pack.id))
            .collect();
        if suspects.is_empty() {
            return Ok(());
        }
        let lens: HashMap<FileId, u64> = self.backend().list(FileKind::Pack)?.into_iter().collect();
        let mut blobs = blobs_of(&index, &suspects);
        let reader = Reader::new(self, Arc::clone(&index), 0);
        let mut packer = Packer::new(self)?;
        let (mut going, mut present) = (HashSet::new(), HashSet::new());
        for (done, (number, id)) in suspects.iter().enumerate() {
            progress(RepairProgress::Packs { done: done as u64, total: suspects.len() as u64 })?;
            let blobs = blobs.remove(number).unwrap_or_default();
            let Some(found) = self.look_through(id, lens.get(id).copied(), &blobs, &mut packer)?
            else {
                report.unreadable.push(*id);
                continue;
            };
            going.insert(*number);
            present.extend(lens.contains_key(id).then_some(*id));
            for (blob, sealed) in blobs.iter().zip(found) {
                if let Some(sealed) = sealed {
                    packer.copy(blob, &sealed)?;
                    report.blobs_saved += 1;
                    continue;
                }
                // Another pack may have a good copy, which a read finds.
                match reader.read(blob.kind, &blob.id) {
                    Ok(plain) => {
                        packer.add(blob.kind, blob.id, &plain)?;
                        report.blobs_saved += 1;
                        continue;
                    }
                    Err(RepositoryError::Backend { source }) if source.is_away() => {
                        return Err(source.into());
                    }
                    Err(_) => {}
                }
                if let Some(plain) = replica.and_then(|r| r.read(blob.kind, &blob.id)) {
                    packer.add(blob.kind, blob.id, &plain)?;
                    report.blobs_fetched += 1;
                } else {
                    lost.insert((blob.kind, blob.id));
                }
            }
        }
        packer.finish()?;
        report.packs = going.len() as u64;
        let mut step = || progress(RepairProgress::Removing);
        Remover::new(self, lock, &index, &going, present, &mut step).run()?;
        Ok(())
    }

    /// The sealed blobs of a pack that are what they should be, `None` for each that is proven not to be: it
    /// was read, or the pack has not got so many bytes, or is not listed at all. `None` where nothing is
    /// proven, for the store did not give all of it.
    fn look_through(
        &self,
        pack: &FileId,
        len: Option<u64>,
        blobs: &[PackedBlob],
        packer: &mut Packer<'_>,
    ) -> Result<Option<Vec<Option<Vec<u8>>>>, RepositoryError> {
        let mut found = Vec::with_capacity(blobs.len());
        for blob in blobs {
            let end = u64::from(blob.offset) + u64::from(blob.len);
            if len.is_none_or(|len| len < end) {
                found.push(None);
                continue;
            }
            let mut sealed = vec![0; blob.len as usize];
            let mut read = || {
                let offset = blob.offset.into();
                self.backend().read_range(FileKind::Pack, pack, offset, &mut sealed)?;
                Ok::<_, BackendError>(packer.verify(blob, &sealed).is_ok())
            };
            // Once more: a transfer may have gone wrong.
            match read().and_then(|is_good| if is_good { Ok(true) } else { read() }) {
                Ok(is_good) => found.push(is_good.then_some(sealed)),
                Err(source) if source.is_away() => return Err(source.into()),
                Err(error) => {
                    tracing::error!(%pack, %error, "a pack cannot be read and stays as it is");
                    return Ok(None);
                }
            }
        }
        Ok(Some(found))
    }

    /// Walks all snapshots for what the index lacks, and fetches it.
    fn fetch_missing(
        &self,
        replica: &Replica,
        progress: Step<'_>,
        report: &mut RepairReport,
        lost: &mut HashSet<(BlobKind, BlobId)>,
    ) -> Result<(), RepositoryError> {
        let reader = Reader::new(self, Arc::new(self.index_of_readable()?.0), 0);
        let mut packer = Packer::new(self)?;
        let snapshots = self.snapshots()?.good;
        let mut todo: Vec<BlobId> = snapshots.into_iter().map(|(_, file)| file.tree).collect();
        let mut seen: HashSet<(BlobKind, BlobId)> = HashSet::new();
        let mut done = 0;
        let mut fetch = |kind, id: BlobId, lost: &mut HashSet<_>| {
            let Some(plain) = replica.read(kind, &id) else {
                lost.insert((kind, id));
                return Ok::<_, RepositoryError>(None);
            };
            packer.add(kind, id, &plain)?;
            lost.remove(&(kind, id));
            report.blobs_fetched += 1;
            Ok(Some(plain))
        };
        while let Some(id) = todo.pop() {
            if !seen.insert((BlobKind::Tree, id)) {
                continue;
            }
            done += 1;
            progress(RepairProgress::Trees { done })?;
            let tree = match reader.tree(&id) {
                Ok(tree) => tree,
                Err(_) => match fetch(BlobKind::Tree, id, lost)? {
                    Some(plain) => Tree::from_json(&id, &plain)?,
                    None => continue,
                },
            };
            for node in &tree.nodes {
                todo.extend(node.subtree);
                for id in node.content() {
                    let is_known = reader.index().contains(id);
                    if !is_known && seen.insert((BlobKind::Data, *id)) {
                        fetch(BlobKind::Data, *id, lost)?;
                    }
                }
            }
        }
        packer.finish()
    }
}

/// The store could not read it, so it may yet be whole.
fn is_unread(error: &RepositoryError) -> bool {
    let RepositoryError::Damaged { source: Defect::Unreadable { source }, .. } = error else {
        return false;
    };
    matches!(**source, BackendError::Io { .. })
}

/// The pack that a problem is about.
fn pack_of(problem: &Problem) -> Option<FileId> {
    problem.file.filter(|file| file.kind == FileKind::Pack).map(|file| file.id)
}

/// The blobs of these packs, by the pack's number, in the order they have there.
fn blobs_of(index: &Index, packs: &HashMap<u32, FileId>) -> HashMap<u32, Vec<PackedBlob>> {
    let mut found: HashMap<u32, Vec<PackedBlob>> = HashMap::new();
    index.for_each_blob(|_, copies| {
        for copy in copies.iter().filter(|copy| packs.contains_key(&copy.pack)) {
            found.entry(copy.pack).or_default().push(copy.blob);
        }
    });
    found.values_mut().for_each(|blobs| blobs.sort_unstable_by_key(|blob| blob.offset));
    found
}

/// Another repository with copies of the same snapshots.
struct Replica(Reader);

impl Replica {
    fn open(repository: &Repository) -> Result<Self, RepositoryError> {
        let (index, unreadable) = repository.index_salvaged()?;
        for (file, error) in unreadable {
            tracing::warn!(%file, %error, "an index file of the replica is passed over");
        }
        Ok(Self(Reader::new(repository, Arc::new(index), 0)))
    }

    /// A blob, verified, if it has it.
    fn read(&self, kind: BlobKind, id: &BlobId) -> Option<Vec<u8>> {
        self.0.read(kind, id).ok()
    }
}
