//! The parallel writer: chunks in, durable packs and index out.
//!
//! ```text
//! submit ─► queue (bytes) ─► workers: zero? hash, known?, compress + seal into their own pack
//!                                └─► queue (packs) ─► uploader: name, write, fsync, index
//! ```
//! Memory: the queue of chunks, and for each worker and for the uploader twice a pack buffer of
//! `pack_len` plus one chunk; with two threads and 16 MiB packs about 32 + 4 × 17 MiB, with the four
//! that there are at most 32 + 6 × 17, and about 40 to 80 bytes for each blob that this run stored. A
//! tree takes its compressed length.

pub(crate) mod builder;
mod queue;
mod shared;
mod uploader;
mod worker;

use std::{
    fmt,
    io::{self, BufWriter},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

pub(crate) use self::shared::StoredBlobs;
pub(crate) use self::uploader::INDEX_BLOBS_MAX;
use self::{
    builder::PackBuilder,
    shared::{Job, Run, Shared},
};
use crate::{
    AnnouncedLock, BlobId, BlobKind, Index, Lock, Repository, RepositoryError, Tree, pack,
};

/// How a [`Writer`] works.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct WriterOptions {
    /// Threads that hash, compress and seal.
    pub threads: usize,
    /// A pack ends when it has so many bytes.
    pub pack_len: usize,
    /// Level of zstd.
    pub level: i32,
    /// Bytes of chunks that wait; [`Writer::submit`] blocks above.
    pub queue_len: usize,
    /// How much the threads give way to whatever else runs on this host (`nice(1)`).
    pub niceness: i32,
    /// How long to wait for a store that takes nothing before giving up.
    pub stall_timeout: Duration,
    /// An index file is written at the latest this long after a pack.
    pub index_every: Duration,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            threads: pack::threads(),
            pack_len: 16 << 20,
            level: 1,
            queue_len: 32 << 20,
            niceness: 19,
            stall_timeout: Duration::from_secs(120),
            index_every: Duration::from_secs(5 * 60),
        }
    }
}

/// What became of a submitted chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// As submitted.
    pub disk: u32,
    /// As submitted.
    pub chunk: u64,
    /// The blob that holds it.
    pub id: BlobId,
    /// The repository did not have it.
    pub fresh: bool,
    /// Bytes it takes in a pack; 0 if it is not fresh.
    pub stored_len: u32,
}

/// What a writer did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriterStats {
    /// Chunks and blobs that were handed in.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of them that were new.
    pub fresh_blobs: u64,
    /// Plain bytes of those.
    pub fresh_bytes: u64,
    /// Chunks that were all zero.
    pub zero_blobs: u64,
    /// Packs written.
    pub packs: u64,
    /// Index files written.
    pub index_files: u64,
    /// Bytes of all files written.
    pub stored_bytes: u64,
}

/// What a writer leaves.
#[derive(Debug)]
pub struct Finished {
    /// What it did.
    pub stats: WriterStats,
    /// The lock that it wrote under, if it was given one.
    pub lock: Option<Lock>,
    /// What it stored, for a writer that goes on: the index does not know it yet.
    pub(crate) stored: StoredBlobs,
}

impl WriterStats {
    fn count(&mut self, len: usize, fresh: bool, zero: bool) {
        self.blobs += 1;
        self.bytes += len as u64;
        self.zero_blobs += u64::from(zero);
        if fresh {
            self.fresh_blobs += 1;
            self.fresh_bytes += len as u64;
        }
    }
}

/// Stores chunks, blobs and trees. May be used from many threads.
///
/// After a failure every further call fails with the cause. Dropping a writer stops its threads, but
/// waits only half a second for a store that hangs; it leaves complete packs behind, which nothing
/// mentions unless `index_every` has passed. Only [`Writer::finish`] makes what was stored known.
pub struct Writer {
    shared: Arc<Shared>,
    trees: Mutex<Option<PackBuilder>>,
}

impl Writer {
    /// Starts the threads. The repository should be locked. Leftovers of killed writers are swept.
    pub fn new(
        repository: &Repository,
        index: Arc<Index>,
        options: WriterOptions,
    ) -> Result<Self, RepositoryError> {
        Self::start(repository, index, options, None, StoredBlobs::default())
    }

    /// As [`Writer::new`], after another one that has finished.
    pub(crate) fn after(
        stored: StoredBlobs,
        repository: &Repository,
        index: Arc<Index>,
        options: WriterOptions,
    ) -> Result<Self, RepositoryError> {
        Self::start(repository, index, options, None, stored)
    }

    /// As [`Writer::new`], under a lock that may settle while the first packs are made: no file is
    /// written before. [`Writer::finish`] gives it back.
    pub fn under(
        lock: AnnouncedLock,
        repository: &Repository,
        index: Arc<Index>,
        options: WriterOptions,
    ) -> Result<Self, RepositoryError> {
        Self::start(repository, index, options, Some(lock), StoredBlobs::default())
    }

    fn start(
        repository: &Repository,
        index: Arc<Index>,
        mut options: WriterOptions,
        lock: Option<AnnouncedLock>,
        stored: StoredBlobs,
    ) -> Result<Self, RepositoryError> {
        // A store that is told to be slow does not hang.
        if let Some(limit) = repository.backend().upload_limit() {
            let seconds = 2 * options.pack_len as u64 / limit.get();
            options.stall_timeout += Duration::from_secs(seconds);
        }
        if stored.is_empty()
            && let Err(error) = repository.backend().sweep()
        {
            tracing::warn!(%error, "cannot remove leftovers of killed writers");
        }
        let shared = Arc::new(Shared::new(repository, index, options, stored));
        // From here on dropping it stops the threads that have been started.
        let writer = Self { shared: Arc::clone(&shared), trees: Mutex::default() };
        for number in 0..shared.options.threads.max(1) {
            let shared = Arc::clone(&shared);
            shared
                .clone()
                .spawn(&format!("pack {number}"), move || worker::run(&shared, number))?;
        }
        shared.clone().spawn("upload", move || uploader::run(&shared, lock))?;
        Ok(writer)
    }

    /// Hands in neighbouring chunks of `chunk_len` bytes each, the last of which may be shorter; waits while
    /// the queue is full. They become neighbours in a pack. [`Writer::drain`] tells their ids.
    pub fn submit(
        &self,
        disk: u32,
        chunk: u64,
        chunk_len: usize,
        plain: Bytes,
    ) -> Result<(), RepositoryError> {
        self.shared.submit(Job::Run(Run { disk, chunk, chunk_len, plain }))
    }

    /// Waits until all chunks handed in have their ids, and returns those not returned before, in
    /// no particular order. They are durable only after [`Writer::finish`].
    pub fn drain(&self) -> Result<Vec<Stored>, RepositoryError> {
        self.shared.wait_until_processed()?;
        self.stored()
    }

    /// The chunks that got their ids since the last call; does not wait.
    pub fn stored(&self) -> Result<Vec<Stored>, RepositoryError> {
        self.shared.check()?;
        Ok(self.shared.take_stored())
    }

    /// The id of a chunk of `len` zeros, which is stored if the repository lacks it.
    pub fn zero_id(&self, len: u32) -> Result<BlobId, RepositoryError> {
        self.shared.check()?;
        if let Some(id) = self.shared.known_zero(len) {
            return Ok(id);
        }
        let zeros = Bytes::from(vec![0; len as usize]);
        let id = BlobId::of(&zeros);
        self.shared.submit(Job::Blob(id, zeros))?;
        self.shared.remember_zero(len, id);
        Ok(id)
    }

    /// Stores a blob of data, such as a small file.
    pub fn save_blob(&self, content: Bytes) -> Result<BlobId, RepositoryError> {
        let id = BlobId::of(&content);
        self.shared.submit(Job::Blob(id, content))?;
        Ok(id)
    }

    /// Whether a blob is there, or will be once this has finished.
    pub(crate) fn knows(&self, kind: BlobKind, id: &BlobId) -> bool {
        self.shared.knows(kind, id)
    }

    /// As [`Writer::save_blob`], of a blob whose id has been verified.
    pub(crate) fn save_verified(&self, id: BlobId, content: Bytes) -> Result<(), RepositoryError> {
        self.shared.submit(Job::Blob(id, content))
    }

    /// Stores a folder as another program has written it; its id has been verified.
    pub(crate) fn save_verified_tree(
        &self,
        id: BlobId,
        json: &[u8],
    ) -> Result<(), RepositoryError> {
        self.shared.check()?;
        let fresh = self.shared.claim(BlobKind::Tree, &id);
        self.shared.count(json.len(), fresh, false);
        if !fresh {
            return Ok(());
        }
        let stored = self.add_tree(id, json.len() as u64, |to| to.write_all(json));
        stored.map_err(|error| self.shared.fail(error))
    }

    /// Stores a folder.
    pub fn save_tree(&self, tree: &Tree) -> Result<BlobId, RepositoryError> {
        self.shared.check()?;
        let mut digest = Digest::default();
        tree.write_json(BufWriter::new(&mut digest)).expect("a digest takes all");
        let (id, len) = (BlobId(digest.sha256.finalize().into()), digest.len);
        let fresh = self.shared.claim(BlobKind::Tree, &id);
        self.shared.count(usize::try_from(len).unwrap_or(usize::MAX), fresh, false);
        if !fresh {
            return Ok(id);
        }
        let stored = self.add_tree(id, len, |to| tree.write_json(to));
        // The id counts as stored from now on, so without the blob nothing may be recorded.
        stored.map_err(|error| self.shared.fail(error))?;
        Ok(id)
    }

    /// Makes everything durable: packs first, then the index. Only after this may a snapshot refer
    /// to what was stored.
    pub fn finish(self) -> Result<Finished, RepositoryError> {
        self.shared.check()?;
        self.shared.jobs.close();
        self.shared.wait_for_workers()?;
        let leftover = self.shared.leftover.lock().expect("no panic while locked").take();
        if let Some(builder) = leftover {
            self.shared.upload(builder)?;
        }
        let trees = self.trees.lock().expect("no panic while locked").take();
        if let Some(builder) = trees {
            self.shared.upload(builder)?;
        }
        self.shared.uploads.close();
        self.shared.wait_for_threads()?;
        let lock = self.shared.lock.lock().expect("no panic while locked").take();
        Ok(Finished { stats: self.shared.stats(), lock, stored: self.shared.take_claimed() })
    }

    /// Makes every call that waits, and every later one, fail with
    /// [`RepositoryError::WriterStopped`]: for an interrupt, from another thread. Returns at once.
    pub fn abort(&self) {
        self.shared.abort();
    }

    fn add_tree(
        &self,
        id: BlobId,
        len: u64,
        write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
    ) -> Result<(), RepositoryError> {
        let mut trees = self.trees.lock().expect("no panic while locked");
        let new = || PackBuilder::new(BlobKind::Tree, Vec::new());
        let builder = trees.get_or_insert_with(new);
        builder.add_streamed(self.shared.key(), self.shared.options.level, id, len, write)?;
        if builder.len() >= self.shared.options.pack_len {
            self.shared.upload(std::mem::replace(builder, new()))?;
        }
        Ok(())
    }
}

/// Hashes and counts what is written to it.
#[derive(Default)]
struct Digest {
    sha256: Sha256,
    len: u64,
}

impl io::Write for Digest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sha256.update(bytes);
        self.len += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Here, and not where the last of the threads lets go of it: the process may have ended by then.
        if self.shared.stop() {
            drop(self.shared.lock.lock().expect("no panic while locked").take());
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("options", &self.shared.options).finish_non_exhaustive()
    }
}
