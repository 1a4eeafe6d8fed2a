//! Copying snapshots into another repository, with another key: what is there already is not read.
//!
//! For each snapshot: its folders are read and verified, of what they name the target's index is asked,
//! what it lacks is read and verified by several threads, stored, made durable and listed; then the
//! snapshot file is written. So a copy that is killed leaves whole snapshots only, and the next one goes
//! on with what is listed.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use bytes::Bytes;
use rand::RngExt as _;

use crate::{
    BlobId, BlobKind, FileId, Index, Lock, NodeKind, Reader, Repository, RepositoryError,
    SnapshotFile, Snapshots, Tree, Writer, WriterOptions, writer::StoredBlobs,
};

/// Blobs that are read at the same time.
const READERS: usize = 4;
/// However small the share that is read back, it has so many blobs of each copy.
const READ_BACK_MIN: usize = 16;

/// How far the copy of a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyProgress {
    /// Folders are being read.
    Trees,
    /// What the target lacks is being copied.
    Blobs {
        /// Blobs copied so far.
        done: u64,
        /// Blobs to copy.
        total: u64,
    },
}

/// What became of a snapshot.
#[derive(Debug, Clone)]
pub struct Copied {
    /// Its name in the target.
    pub id: FileId,
    /// Its blobs, each counted once.
    pub blobs: u64,
    /// Those that the target lacked.
    pub sent_blobs: u64,
    /// Bytes that were added to the target.
    pub sent_bytes: u64,
    /// Where it begins in the target.
    tree: BlobId,
    /// Some of what was sent, to be read back.
    sample: Vec<BlobId>,
}

/// What was read back after a copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadBack {
    /// Snapshots whose folders were read.
    pub snapshots: u64,
    /// Blobs of data that were read.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Copies snapshots from one repository into another.
#[derive(Debug)]
pub struct Copier {
    source: Reader,
    target: Repository,
    index: Arc<Index>,
    /// The target's.
    lock: Lock,
    stored: StoredBlobs,
    /// What snapshots are called everywhere, and here.
    names: HashMap<FileId, FileId>,
    /// Folders that are there with all that is in them.
    whole: HashSet<BlobId>,
    /// How much of what was sent is read back, 0–100 percent.
    read_back: f64,
}

/// What of a snapshot the target lacks.
#[derive(Default)]
struct Lacking {
    trees: Vec<BlobId>,
    data: Vec<BlobId>,
    seen: HashSet<BlobId>,
    blobs: u64,
}

impl Copier {
    /// From a source into a target that is locked by `lock`, each with its snapshots. Of what is sent
    /// [`Copier::read_back`] reads this share, 0–100 percent.
    ///
    /// # Errors
    /// [`RepositoryError::SameRepository`], and what reading the target's index may cause.
    pub fn new(
        (source, source_index, source_snapshots): (&Repository, Arc<Index>, &Snapshots),
        (target, lock, target_snapshots): (&Repository, Lock, &Snapshots),
        read_back: f64,
    ) -> Result<Self, RepositoryError> {
        if source.id() == target.id() {
            return Err(RepositoryError::SameRepository { location: target.location() });
        }
        let there = target_snapshots.good.iter();
        let mut names: HashMap<_, _> = there.map(|(id, file)| (file.first_id(id), *id)).collect();
        for (id, file) in &source_snapshots.good {
            if let Some(copy) = names.get(&file.first_id(id)).copied() {
                names.insert(*id, copy);
            }
        }
        Ok(Self {
            source: Reader::new(source, source_index, 0),
            target: target.clone(),
            index: Arc::new(target.index()?),
            lock,
            stored: StoredBlobs::default(),
            names,
            whole: HashSet::new(),
            read_back,
        })
    }

    /// Copies one snapshot; those that it continues come first. After an error that
    /// [`RepositoryError::is_damage`] calls damage of the source others can be copied.
    ///
    /// # Errors
    /// What either repository says; what `stop` says, which is asked now and then.
    pub fn copy(
        &mut self,
        id: &FileId,
        snapshot: &SnapshotFile,
        stop: &(dyn Fn() -> Result<(), RepositoryError> + Sync),
        progress: &(dyn Fn(CopyProgress) + Sync),
    ) -> Result<Copied, RepositoryError> {
        let stored = std::mem::take(&mut self.stored);
        let options = WriterOptions { niceness: 10, ..WriterOptions::default() };
        let writer = Writer::after(stored, &self.target, Arc::clone(&self.index), options)?;
        progress(CopyProgress::Trees);
        let sent = self.send(&writer, snapshot, stop, progress);
        let sent = match sent {
            Err(error) if !error.is_damage() => return Err(error),
            sent => sent,
        };
        // Also after damage: what was sent is of use to others.
        let finished = writer.finish()?;
        self.stored = finished.stored;
        let lacking = sent?;
        self.lock.verify()?;
        stop()?;
        let mut file = snapshot.clone();
        file.original = Some(snapshot.first_id(id));
        file.parent = snapshot.parent.and_then(|parent| self.names.get(&parent).copied());
        let copy = self.target.save_snapshot(&file)?;
        self.names.insert(snapshot.first_id(id), copy);
        // A snapshot whose tags were changed since is named by its children as it was called then.
        self.names.insert(*id, copy);
        self.whole.extend(lacking.seen);
        Ok(Copied {
            id: copy,
            blobs: lacking.blobs,
            sent_blobs: finished.stats.fresh_blobs,
            sent_bytes: finished.stats.stored_bytes,
            tree: snapshot.tree,
            sample: lacking.data,
        })
    }

    /// Hands the writer all that the target lacks.
    fn send(
        &self,
        writer: &Writer,
        snapshot: &SnapshotFile,
        stop: &(dyn Fn() -> Result<(), RepositoryError> + Sync),
        progress: &(dyn Fn(CopyProgress) + Sync),
    ) -> Result<Lacking, RepositoryError> {
        let mut lacking = Lacking::default();
        let mut todo = vec![snapshot.tree];
        lacking.seen.insert(snapshot.tree);
        while let Some(id) = todo.pop() {
            stop()?;
            if self.whole.contains(&id) {
                continue;
            }
            let subtrees = self.look_through(writer, id, &mut lacking)?;
            todo.extend(subtrees.into_iter().filter(|subtree| lacking.seen.insert(*subtree)));
        }
        self.send_data(writer, &mut lacking.data, stop, progress)?;
        // Only now: no folder is listed before all that is in it is at least on its way.
        for id in &lacking.trees {
            // Read once more: those of big disks are not kept in memory.
            writer.save_verified_tree(*id, &self.source.read(BlobKind::Tree, id)?)?;
        }
        lacking.data = self.sample(std::mem::take(&mut lacking.data));
        Ok(lacking)
    }

    /// Notes what of a folder the target lacks; returns the folders in it.
    fn look_through(
        &self,
        writer: &Writer,
        id: BlobId,
        lacking: &mut Lacking,
    ) -> Result<Vec<BlobId>, RepositoryError> {
        let json = self.source.read(BlobKind::Tree, &id)?;
        let tree = Tree::from_json(&id, &json)?;
        lacking.blobs += 1;
        let content = tree.nodes.iter().filter(|node| node.kind == NodeKind::File);
        let mut ids: Vec<&BlobId> = content.flat_map(crate::Node::content).collect();
        ids.sort_unstable();
        ids.dedup();
        lacking.blobs += ids.len() as u64;
        let lacks = |id: &&BlobId| !writer.knows(BlobKind::Data, id);
        lacking.data.extend(ids.into_iter().filter(lacks).copied());
        if !writer.knows(BlobKind::Tree, &id) {
            lacking.trees.push(id);
        }
        Ok(tree.nodes.iter().filter_map(|node| node.subtree).collect())
    }

    /// In the order in which the source has them, so that it reads on rather than to and fro.
    fn send_data(
        &self,
        writer: &Writer,
        ids: &mut Vec<BlobId>,
        stop: &(dyn Fn() -> Result<(), RepositoryError> + Sync),
        progress: &(dyn Fn(CopyProgress) + Sync),
    ) -> Result<(), RepositoryError> {
        let place = |id: &BlobId| {
            let place = self.source.index().place(BlobKind::Data, id);
            (place.map(|(pack, blob)| (pack, blob.offset)), *id)
        };
        ids.sort_by_cached_key(place);
        ids.dedup();
        let (next, total) = (AtomicUsize::new(0), ids.len() as u64);
        let failure = Mutex::new(None);
        let ids = ids.as_slice();
        let read_on = || {
            while let Some(id) = ids.get(next.fetch_add(1, Ordering::Relaxed)) {
                let sent = stop()
                    .and_then(|()| self.source.read(BlobKind::Data, id))
                    .and_then(|content| writer.save_verified(*id, Bytes::from(content)));
                if let Err(error) = sent {
                    next.store(ids.len(), Ordering::Relaxed);
                    failure.lock().expect("no panic while locked").get_or_insert(error);
                }
                let done = (next.load(Ordering::Relaxed) as u64).min(total);
                progress(CopyProgress::Blobs { done, total });
            }
        };
        thread::scope(|scope| {
            for _ in 1..READERS.min(ids.len()) {
                scope.spawn(read_on);
            }
            read_on();
        });
        failure.into_inner().expect("no panic while locked").map_or(Ok(()), Err)
    }

    /// Some of what was sent, in a random order.
    fn sample(&self, mut ids: Vec<BlobId>) -> Vec<BlobId> {
        let share = ids.len() as f64 * self.read_back / 100.0;
        let count = (share.ceil() as usize).max(READ_BACK_MIN).min(ids.len());
        let mut random = rand::rng();
        for place in 0..count {
            let other = random.random_range(place..ids.len());
            ids.swap(place, other);
        }
        ids.truncate(count);
        ids.shrink_to_fit();
        ids
    }

    /// Reads back what was copied, as the target has it now: all folders, and a share of the data that was
    /// sent. Lets go of the lock.
    ///
    /// # Errors
    /// The first damage, or what the target says.
    pub fn read_back(
        self,
        copies: &[Copied],
        stop: &dyn Fn() -> Result<(), RepositoryError>,
    ) -> Result<ReadBack, RepositoryError> {
        let mut done = ReadBack::default();
        if !copies.is_empty() {
            let reader = Reader::new(&self.target, Arc::new(self.target.index()?), 0);
            let mut seen = HashSet::new();
            for copy in copies {
                check_trees(&reader, copy.tree, &mut seen, stop)?;
                done.snapshots += 1;
                for id in &copy.sample {
                    stop()?;
                    done.bytes += reader.blob(id)?.len() as u64;
                    done.blobs += 1;
                }
            }
        }
        self.lock.release()?;
        Ok(done)
    }
}

/// All folders load, and the index has all that they name.
fn check_trees(
    reader: &Reader,
    root: BlobId,
    seen: &mut HashSet<BlobId>,
    stop: &dyn Fn() -> Result<(), RepositoryError>,
) -> Result<(), RepositoryError> {
    let mut todo = vec![root];
    while let Some(id) = todo.pop() {
        stop()?;
        if !seen.insert(id) {
            continue;
        }
        let tree = reader.tree(&id)?;
        for node in &tree.nodes {
            let missing = node.content().iter().find(|id| !reader.index().contains(id));
            if let Some(id) = missing {
                return Err(RepositoryError::MissingBlob { id: *id });
            }
            todo.extend(node.subtree);
        }
    }
    Ok(())
}
