//! Frees what no snapshot needs.
//!
//! The long part runs under a shared lock, beside backups of others: it finds out what is in use, and copies
//! what is needed of wasteful packs into new ones. The short part is alone with the repository: it adds what
//! snapshots that came since need, then takes packs that nothing needs out of the index and away. Whatever
//! is interrupted leaves every snapshot whole; the next prune goes on. `docs/repository-format.md` has the
//! order of writing.

mod choose;
pub(crate) mod packer;
pub(crate) mod rewrite;
mod used;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use self::{
    choose::PackUse,
    packer::Packer,
    rewrite::Remover,
    used::{Seen, Used, Walk},
};
use crate::{
    FileId, FileKind, Index, Lock, LockMode, Reader, Repository, RepositoryError, pack::PackedBlob,
    repository::ignore_missing,
};

/// How to prune.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PruneOptions {
    /// So much waste may stay in packs that are needed, in percent of what stays.
    pub max_unused: f64,
    /// At most so many bytes of packs are written anew.
    pub max_repack: u64,
    /// Removes all data where there is no snapshot, as after the last one was forgotten.
    pub allow_empty: bool,
    /// Only say what would be done.
    pub dry_run: bool,
    /// So long others have to let go of the repository.
    pub patience: Duration,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self {
            max_unused: 5.0,
            max_repack: u64::MAX,
            allow_empty: false,
            dry_run: false,
            patience: Duration::from_secs(600),
        }
    }
}

/// How far it is.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum PruneProgress {
    /// Somebody else uses the repository.
    Waiting {
        /// Who.
        held: RepositoryError,
    },
    /// Snapshots and the index are being read.
    Metadata,
    /// Folders are being read.
    Trees {
        /// Folders read so far.
        done: u64,
    },
    /// What is needed of wasteful packs is being copied.
    Repacking {
        /// Packs done.
        done: u64,
        /// Packs to do.
        total: u64,
    },
    /// Packs that nothing needs are being taken away.
    Removing {
        /// Files removed or written so far.
        done: u64,
    },
}

/// What was done, or with [`PruneOptions::dry_run`] would be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PruneReport {
    /// Snapshots that are there.
    pub snapshots: u64,
    /// Packs that were there.
    pub packs: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Packs of which only a part was needed and copied.
    pub packs_repacked: u64,
    /// Bytes of the new packs with these parts.
    pub bytes_repacked: u64,
    /// Packs removed.
    pub packs_removed: u64,
    /// Of those such that no index file mentioned: of runs that did not finish.
    pub packs_unreferenced: u64,
    /// Bytes of the packs that were removed.
    pub bytes_removed: u64,
    /// Waste that stays, in bytes.
    pub bytes_unused: u64,
    /// Index files written.
    pub index_files_written: u64,
    /// Index files removed.
    pub index_files_removed: u64,
    /// Packs that were left as they are because they are damaged.
    pub damaged: Vec<FileId>,
    /// Waste was left because the store is full; the next prune has more room.
    pub is_full: bool,
}

/// Says how far it is, and fails where it is to stop.
type Step<'a> = &'a dyn Fn(PruneProgress) -> Result<(), RepositoryError>;

impl Repository {
    /// Frees what no snapshot needs. `progress` hears of each step and may fail, which ends it.
    ///
    /// Fails with [`RepositoryError::InUseUnknown`] where damage hides what is in use, with
    /// [`RepositoryError::NoSnapshots`] where nothing is in use, which is not believed, and with
    /// [`RepositoryError::Locked`] when others did not let go in time: what was copied by then stays, and
    /// the next prune goes on from there.
    pub fn prune(
        &self,
        options: &PruneOptions,
        progress: Step<'_>,
    ) -> Result<PruneReport, RepositoryError> {
        let mut report = PruneReport::default();
        let lock = match self.lock_or_make_room(LockMode::Shared, options, progress, &mut report) {
            // Looking needs no lock where none can be written.
            Err(RepositoryError::LockNotWritable { .. }) if options.dry_run => None,
            other => Some(other?),
        };
        let survey = Survey::new(self, options, progress, &mut report)?;
        let plan = survey.plan(options);
        if options.dry_run {
            survey.foresee(&plan, &mut report);
            return Ok(report);
        }
        let written = self.repack(&survey, &plan, progress, &mut report)?;
        let Survey { reader, used, seen, packs, .. } = survey;
        drop(reader);
        lock.map_or(Ok(()), Lock::release)?;
        let lock = self.lock_or_make_room(LockMode::Exclusive, options, progress, &mut report)?;
        self.take_away(&lock, used, seen, &packs, &written, progress, &mut report)?;
        lock.release()?;
        Ok(report)
    }

    /// Takes a lock. Where the store is too full for one, packs that no index file mentions make room. They
    /// are listed first, then nobody has a lock, then the index is read: so who wrote them has mentioned
    /// them by then, or never will.
    fn lock_or_make_room(
        &self,
        mode: LockMode,
        options: &PruneOptions,
        progress: Step<'_>,
        report: &mut PruneReport,
    ) -> Result<Lock, RepositoryError> {
        let waiting =
            |held: &RepositoryError| progress(PruneProgress::Waiting { held: held.clone() });
        let lock = || self.lock_within(mode, options.patience, &waiting);
        match lock() {
            Err(RepositoryError::LockNotWritable { source })
                if source.is_full() && !options.dry_run =>
            {
                let packs = self.backend().list(FileKind::Pack)?;
                self.look_for_conflicts(LockMode::Exclusive, None)?;
                // It fails where the index lacks anything that is in use.
                let survey = Survey::new(self, options, progress, report)?;
                let known = survey.reader.index().packs().iter();
                let mentioned: HashSet<FileId> = known.map(|pack| pack.id).collect();
                for (id, len) in packs.into_iter().filter(|(id, _)| !mentioned.contains(id)) {
                    self.backend().remove(FileKind::Pack, &id)?;
                    report.packs_removed += 1;
                    report.packs_unreferenced += 1;
                    report.bytes_removed += len;
                }
                lock()
            }
            other => other,
        }
    }

    /// Copies what is needed of wasteful packs; returns the packs it wrote. Where the store becomes full it
    /// does with half of them: each that fits makes room.
    fn repack(
        &self,
        survey: &Survey,
        mut plan: &[PackUse],
        progress: Step<'_>,
        report: &mut PruneReport,
    ) -> Result<Vec<FileId>, RepositoryError> {
        loop {
            let mut packer = Packer::new(self)?;
            match self.copy_packs(survey, plan, &mut packer, progress) {
                Ok(damaged) => {
                    report.packs_repacked = (plan.len() - damaged.len()) as u64;
                    report.bytes_repacked = packer.written_len;
                    report.damaged = damaged;
                    return Ok(packer.written);
                }
                Err(RepositoryError::Backend { source }) if source.is_full() => {
                    report.is_full = true;
                    for id in packer.unlisted() {
                        ignore_missing(self.backend().remove(FileKind::Pack, &id))?;
                    }
                    plan = &plan[..plan.len() / 2];
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Copies what is needed of these packs; returns those that are damaged.
    fn copy_packs(
        &self,
        survey: &Survey,
        packs: &[PackUse],
        packer: &mut Packer<'_>,
        progress: Step<'_>,
    ) -> Result<Vec<FileId>, RepositoryError> {
        let (mut needed, mut damaged) = (survey.needed_of(packs), Vec::new());
        for (done, pack) in packs.iter().enumerate() {
            progress(PruneProgress::Repacking { done: done as u64, total: packs.len() as u64 })?;
            let id = survey.reader.index().packs()[pack.number as usize].id;
            let blobs = needed.remove(&pack.number).unwrap_or_default();
            if !self.copy_blobs(&id, &blobs, packer)? {
                damaged.push(id);
            }
        }
        packer.finish()?;
        Ok(damaged)
    }

    /// Copies blobs of one pack; none of them where one is damaged.
    fn copy_blobs(
        &self,
        id: &FileId,
        blobs: &[PackedBlob],
        packer: &mut Packer<'_>,
    ) -> Result<bool, RepositoryError> {
        let mut sealed = Vec::with_capacity(blobs.len());
        for blob in blobs {
            let mut bytes = vec![0; blob.len as usize];
            let read =
                self.backend().read_range(FileKind::Pack, id, blob.offset.into(), &mut bytes);
            if let Err(error) = read {
                tracing::error!(pack = %id, %error, "a pack cannot be read and stays as it is");
                return Ok(false);
            }
            if let Err(error) = packer.verify(blob, &bytes) {
                tracing::error!(pack = %id, blob = %blob.id, %error, "a damaged pack stays as it is");
                return Ok(false);
            }
            sealed.push(bytes);
        }
        blobs.iter().zip(&sealed).try_for_each(|(blob, sealed)| packer.copy(blob, sealed))?;
        Ok(true)
    }

    /// Takes away what nothing needs. `packs` are those that were there when the survey began, `written`
    /// those that this run wrote.
    #[expect(clippy::too_many_arguments, reason = "what the long part leaves to the short one")]
    fn take_away(
        &self,
        lock: &Lock,
        used: Used,
        seen: Seen,
        packs: &HashMap<FileId, u64>,
        written: &[FileId],
        progress: Step<'_>,
        report: &mut PruneReport,
    ) -> Result<(), RepositoryError> {
        progress(PruneProgress::Metadata)?;
        let snapshots = self.all_snapshots()?;
        let index = Arc::new(self.whole_index().map_err(RepositoryError::cannot_tell)?);
        let reader = Reader::new(self, Arc::clone(&index), 0);
        let mut walk = Walk::new(&reader, seen);
        walk.snapshots(&snapshots, |done| progress(PruneProgress::Trees { done }))?;
        let used = used.and(walk.finish().0);
        let lens: HashMap<FileId, u64> = self.backend().list(FileKind::Pack)?.into_iter().collect();
        // Of a blob that a damaged pack has too the other copy is the one to keep.
        let mut sound = lens.clone();
        sound.retain(|id, _| !report.damaged.contains(id));
        let (census, _) = choose::census(&index, &used, &sound);
        // A pack that came since belongs to a backup whose snapshot may still come.
        let is_known = |id: &FileId| packs.contains_key(id) || !lens.contains_key(id);
        let id_of = |pack: &PackUse| index.packs()[pack.number as usize].id;
        let unneeded: Vec<&PackUse> =
            census.iter().filter(|pack| pack.used == 0 && is_known(&id_of(pack))).collect();
        let mentioned: HashSet<FileId> = index.packs().iter().map(|pack| pack.id).collect();
        let unmentioned: Vec<FileId> = packs
            .keys()
            .chain(written)
            .filter(|id| !mentioned.contains(*id) && lens.contains_key(*id))
            .copied()
            .collect();
        let going: HashSet<u32> = unneeded.iter().map(|pack| pack.number).collect();
        let present: HashSet<FileId> =
            unneeded.iter().map(|pack| id_of(pack)).filter(|id| lens.contains_key(id)).collect();
        report.damaged.retain(|id| !present.contains(id));
        report.packs_unreferenced += unmentioned.len() as u64;
        report.bytes_removed += present.iter().chain(&unmentioned).map(|id| lens[id]).sum::<u64>();
        let stay = census.iter().filter(|pack| pack.used > 0);
        report.bytes_unused = stay.map(|pack| pack.unused).sum();
        let mut steps = 0;
        let mut step = || {
            steps += 1;
            progress(PruneProgress::Removing { done: steps })
        };
        let mut remover = Remover::new(self, lock, &index, &going, present, &mut step);
        remover.unmentioned(unmentioned)?;
        let done = remover.run()?;
        report.packs_removed += done.packs;
        report.index_files_written = done.index_written;
        report.index_files_removed = done.index_removed;
        Ok(())
    }
}

/// What is there and what of it is in use.
struct Survey {
    reader: Reader,
    used: Used,
    seen: Seen,
    /// All packs that are there, with their lengths in bytes.
    packs: HashMap<FileId, u64>,
    census: Vec<PackUse>,
    chosen: Vec<Vec<u32>>,
}

impl Survey {
    /// Packs are listed before the index is read: so one that the index does not mention is of a run that
    /// has not written its index yet, or never will.
    fn new(
        repository: &Repository,
        options: &PruneOptions,
        progress: Step<'_>,
        report: &mut PruneReport,
    ) -> Result<Self, RepositoryError> {
        progress(PruneProgress::Metadata)?;
        let packs: HashMap<FileId, u64> =
            repository.backend().list(FileKind::Pack)?.into_iter().collect();
        let snapshots = repository.all_snapshots()?;
        let index = Arc::new(repository.whole_index().map_err(RepositoryError::cannot_tell)?);
        if snapshots.good.is_empty() && snapshots.damaged.is_empty() && !options.allow_empty {
            match index.pack_count() as u64 {
                0 => {}
                packs => return Err(RepositoryError::NoSnapshots { packs }),
            }
        }
        let reader = Reader::new(repository, Arc::clone(&index), 0);
        let mut walk = Walk::new(&reader, Seen::default());
        walk.snapshots(&snapshots, |done| progress(PruneProgress::Trees { done }))?;
        let (used, seen) = walk.finish();
        let (census, chosen) = choose::census(&index, &used, &packs);
        report.snapshots = snapshots.good.len() as u64;
        report.packs = packs.len() as u64;
        report.bytes = packs.values().sum();
        Ok(Self { reader, used, seen, packs, census, chosen })
    }

    fn plan(&self, options: &PruneOptions) -> Vec<PackUse> {
        choose::to_repack(&self.census, options.max_unused, options.max_repack)
    }

    /// The blobs of packs that are to be copied, by the pack's number, in the order they have there.
    fn needed_of(&self, packs: &[PackUse]) -> HashMap<u32, Vec<PackedBlob>> {
        let mut needed: HashMap<u32, Vec<PackedBlob>> =
            packs.iter().map(|pack| (pack.number, Vec::new())).collect();
        self.reader.index().for_each_blob(|_, copies| {
            let is_alone = copies.len() == 1;
            for copy in copies {
                let Some(blobs) = needed.get_mut(&copy.pack) else { continue };
                let is_chosen = match is_alone {
                    true => self.used.contains(&copy.blob.id),
                    false => self.chosen[copy.pack as usize].contains(&copy.blob.offset),
                };
                blobs.extend(is_chosen.then_some(copy.blob));
            }
        });
        needed.values_mut().for_each(|blobs| blobs.sort_unstable_by_key(|blob| blob.offset));
        needed
    }

    /// What carrying out the plan would do, as far as it can be told before.
    fn foresee(&self, plan: &[PackUse], report: &mut PruneReport) {
        let index: &Index = self.reader.index();
        let mentioned: HashSet<FileId> = index.packs().iter().map(|pack| pack.id).collect();
        let unneeded = self.census.iter().filter(|pack| pack.used == 0);
        let unneeded: Vec<&PackUse> = unneeded
            .filter(|pack| self.packs.contains_key(&index.packs()[pack.number as usize].id))
            .collect();
        let unmentioned = self.packs.iter().filter(|(id, _)| !mentioned.contains(*id));
        let unmentioned: Vec<u64> = unmentioned.map(|(_, &len)| len).collect();
        let of_plan = |field: fn(&PackUse) -> u64| plan.iter().map(field).sum::<u64>();
        let wasted = self.census.iter().filter(|pack| pack.used > 0);
        let wasted: u64 = wasted.map(|pack| pack.unused).sum();
        report.packs_repacked = plan.len() as u64;
        report.bytes_repacked = of_plan(|pack| pack.used);
        report.packs_unreferenced = unmentioned.len() as u64;
        report.packs_removed = (unneeded.len() + unmentioned.len() + plan.len()) as u64;
        report.bytes_removed = unneeded.iter().map(|pack| pack.len).sum::<u64>()
            + unmentioned.iter().sum::<u64>()
            + of_plan(|pack| pack.len);
        report.bytes_unused = wasted - of_plan(|pack| pack.unused);
    }
}
