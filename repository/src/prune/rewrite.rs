//! Takes packs out of the index, then away. Under an exclusive lock only.
//!
//! Index files are exchanged in batches: what stays of them is written anew, they are removed, then the packs
//! that no index file mentions any more. After each step every snapshot can be restored; what an interruption
//! leaves behind are blobs that are known twice, and packs that are not known.

use std::collections::{HashMap, HashSet};

use crate::{
    FileId, FileKind, Index, Lock, Repository, RepositoryError,
    index::{
        IndexedFile,
        file::{IndexFile, PackEntry, read_packs},
    },
    repository::ignore_missing,
    writer::INDEX_BLOBS_MAX,
};

/// Index files with fewer blobs are put together, once there are so many of them.
const SMALL_BLOBS: usize = INDEX_BLOBS_MAX / 4;
const SMALL_FILES_MAX: usize = 16;

/// Takes packs away.
pub(crate) struct Remover<'a> {
    repository: &'a Repository,
    lock: &'a Lock,
    index: &'a Index,
    /// The packs that go, by number, and how many index files mention each.
    mentioned: HashMap<u32, usize>,
    /// Files of packs that go and are there.
    present: HashSet<FileId>,
    step: &'a mut dyn FnMut() -> Result<(), RepositoryError>,
    /// What was done.
    pub(crate) done: Removed,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Removed {
    pub(crate) packs: u64,
    pub(crate) index_written: u64,
    pub(crate) index_removed: u64,
}

impl<'a> Remover<'a> {
    /// To take the packs with these numbers out of `index`; those in `present` are files to remove.
    pub(crate) fn new(
        repository: &'a Repository,
        lock: &'a Lock,
        index: &'a Index,
        going: &HashSet<u32>,
        present: HashSet<FileId>,
        step: &'a mut dyn FnMut() -> Result<(), RepositoryError>,
    ) -> Self {
        let mut mentioned: HashMap<u32, usize> = going.iter().map(|&number| (number, 0)).collect();
        for number in index.files().iter().flat_map(|file| distinct(&file.packs)) {
            mentioned.entry(number).and_modify(|count| *count += 1);
        }
        let done = Removed::default();
        Self { repository, lock, index, mentioned, present, step, done }
    }

    /// Removes packs that no index file mentions.
    pub(crate) fn unmentioned(
        &mut self,
        packs: impl IntoIterator<Item = FileId>,
    ) -> Result<(), RepositoryError> {
        packs.into_iter().try_for_each(|id| {
            self.done.packs += 1;
            self.remove(FileKind::Pack, &id)
        })
    }

    /// Exchanges the index files that mention packs that go, then removes these.
    ///
    /// On a store that is full, one file after the other, those first that need the least room.
    pub(crate) fn run(mut self) -> Result<Removed, RepositoryError> {
        let goes = |number: &u32| self.mentioned.contains_key(number);
        let files = self.index.files();
        let (mut hit, mut small): (Vec<&IndexedFile>, Vec<&IndexedFile>) = Default::default();
        for file in files {
            if file.packs.is_empty() || file.packs.iter().any(goes) {
                hit.push(file);
            } else if file.blobs < SMALL_BLOBS {
                small.push(file);
            }
        }
        if small.len() + hit.len() >= SMALL_FILES_MAX {
            hit.append(&mut small);
        }
        let staying =
            |file: &IndexedFile| file.packs.iter().filter(|&number| !goes(number)).count();
        // Those of which nothing stays need no room, and give some.
        hit.sort_by_key(|file| (staying(file), file.blobs, file.id));
        let mut batches: Vec<Vec<&IndexedFile>> = Vec::new();
        let mut blobs = 0;
        for file in hit {
            let needs_room = staying(file) > 0;
            let fits = batches.last().is_some_and(|batch| {
                needs_room == (staying(batch[0]) > 0)
                    && (!needs_room || blobs + file.blobs <= INDEX_BLOBS_MAX)
            });
            match batches.last_mut().filter(|_| fits) {
                Some(batch) => batch.push(file),
                None => {
                    blobs = 0;
                    batches.push(vec![file]);
                }
            }
            blobs += file.blobs;
        }
        let mut full = Vec::new();
        for batch in batches {
            match self.exchange(&batch) {
                Err(RepositoryError::Backend { source }) if source.is_full() => full.extend(batch),
                other => other?,
            }
        }
        // What was removed meanwhile may have made room, and one file needs less than many.
        for file in full {
            self.exchange(&[file])?;
        }
        Ok(self.done)
    }

    fn exchange(&mut self, batch: &[&IndexedFile]) -> Result<(), RepositoryError> {
        let (mut known, mut left) = (HashSet::new(), Vec::new());
        for file in batch {
            self.keep(file, &mut known, &mut left)?;
        }
        // Whoever took the lock away may refer to anything from now on.
        self.lock.prove()?;
        if !left.is_empty() {
            (self.step)()?;
            self.repository.write_json(FileKind::Index, &IndexFile { packs: &left })?;
            self.done.index_written += 1;
        }
        for file in batch {
            self.remove(FileKind::Index, &file.id)?;
            self.done.index_removed += 1;
        }
        // A store that says of a file that it is not there may be wrong, and the file mentions packs yet.
        let listed = self.repository.backend().list(FileKind::Index)?;
        let listed: HashSet<FileId> = listed.into_iter().map(|(id, _)| id).collect();
        self.lock.prove()?;
        for file in batch {
            if listed.contains(&file.id) {
                tracing::warn!(index = %file.id, "an index file stays, and its packs");
                continue;
            }
            for number in distinct(&file.packs) {
                let Some(count) = self.mentioned.get_mut(&number) else { continue };
                *count -= 1;
                let id = self.index.packs()[number as usize].id;
                if *count == 0 && self.present.remove(&id) {
                    self.done.packs += 1;
                    self.remove(FileKind::Pack, &id)?;
                }
            }
        }
        Ok(())
    }

    /// What stays of an index file, as it is there.
    fn keep(
        &self,
        file: &IndexedFile,
        known: &mut HashSet<FileId>,
        left: &mut Vec<PackEntry>,
    ) -> Result<(), RepositoryError> {
        let goes: HashSet<FileId> = file
            .packs
            .iter()
            .filter(|number| self.mentioned.contains_key(number))
            .map(|&number| self.index.packs()[number as usize].id)
            .collect();
        let json = self.repository.read_unpacked(FileKind::Index, &file.id)?;
        read_packs(&json, |pack, _| {
            if !goes.contains(&pack.id) && known.insert(pack.id) {
                left.push(pack);
            }
        })
        .map_err(|source| {
            let file = crate::FileRef { kind: FileKind::Index, id: file.id };
            RepositoryError::Damaged { file, source: source.into() }
        })
    }

    fn remove(&mut self, kind: FileKind, id: &FileId) -> Result<(), RepositoryError> {
        self.lock.verify()?;
        (self.step)()?;
        Ok(ignore_missing(self.repository.backend().remove(kind, id))?)
    }
}

fn distinct(packs: &[u32]) -> HashSet<u32> {
    packs.iter().copied().collect()
}
