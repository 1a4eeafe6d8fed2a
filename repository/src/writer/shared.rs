//! What the threads of a writer share.

use std::{
    collections::{HashMap, HashSet},
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use zstd::bulk::Compressor;

use super::{
    Stored, WriterOptions, WriterStats,
    builder::{FinishedPack, PackBuilder},
    queue::{Queue, Refused},
};
use crate::{BlobId, BlobKind, Index, Lock, Repository, RepositoryError, crypto::MasterKey};

/// Packs that wait for the uploader.
const UPLOADS_MAX: usize = 1;
/// Parts of the set of stored blobs, each with its own lock and its own moment to grow.
const CLAIM_PARTS: usize = 64;
/// How long dropping a writer waits for threads that may hang in the store.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// What one worker stores into its pack, one blob after the other.
pub(super) enum Job {
    /// A blob whose id is known.
    Blob(BlobId, Bytes),
    /// Neighbouring chunks of a disk.
    Run(Run),
}

/// Neighbouring chunks of a disk: as neighbours in a pack they are read and written at once by a restore.
pub(super) struct Run {
    pub(super) disk: u32,
    /// Number of the first chunk.
    pub(super) chunk: u64,
    /// Length of each chunk in bytes; the last one may be shorter.
    pub(super) chunk_len: usize,
    pub(super) plain: Bytes,
}

impl Run {
    /// The chunks, each with its number.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, &[u8])> {
        (self.chunk..).zip(self.plain.chunks(self.chunk_len))
    }
}

impl Job {
    /// How many blobs it makes, and how many bytes they have.
    fn size(&self) -> (u64, usize) {
        match self {
            Self::Blob(_, plain) => (1, plain.len()),
            Self::Run(run) => (run.chunks().count() as u64, run.plain.len()),
        }
    }
}

/// Blobs that were stored, in parts with a lock each.
#[derive(Debug, Default)]
pub(crate) struct StoredBlobs(Vec<Mutex<HashSet<(BlobKind, BlobId)>>>);

impl StoredBlobs {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

pub(super) struct Shared {
    pub(super) repository: Repository,
    pub(super) options: WriterOptions,
    pub(super) jobs: Queue<Job>,
    pub(super) uploads: Queue<FinishedPack>,
    /// Buffers of packs that were written, for the next ones.
    pub(super) buffers: Mutex<Vec<Vec<u8>>>,
    /// The unfinished pack of a worker that ended, for the next one that ends.
    pub(super) leftover: Mutex<Option<PackBuilder>>,
    /// What the uploader writes under, once it has settled.
    pub(super) lock: Mutex<Option<Lock>>,
    index: Arc<Index>,
    claimed: Vec<Mutex<HashSet<(BlobKind, BlobId)>>>,
    zeros: Mutex<HashMap<u32, BlobId>>,
    failure: OnceLock<RepositoryError>,
    progress: Mutex<Progress>,
    progressed: Condvar,
}

#[derive(Default)]
struct Progress {
    /// Blobs handed in and not yet done.
    pending: u64,
    stored: Vec<Stored>,
    stats: WriterStats,
    workers: usize,
    threads: usize,
    /// Grows with everything that happens.
    steps: u64,
}

impl Shared {
    pub(super) fn new(
        repository: &Repository,
        index: Arc<Index>,
        options: WriterOptions,
        stored: StoredBlobs,
    ) -> Self {
        let mut claimed = stored.0;
        claimed.resize_with(CLAIM_PARTS, Mutex::default);
        Self {
            repository: repository.clone(),
            jobs: Queue::new(options.queue_len),
            uploads: Queue::new(UPLOADS_MAX),
            buffers: Mutex::default(),
            leftover: Mutex::default(),
            lock: Mutex::default(),
            options,
            index,
            claimed,
            zeros: Mutex::default(),
            failure: OnceLock::new(),
            progress: Mutex::default(),
            progressed: Condvar::new(),
        }
    }

    /// Runs `work` on a thread of its own; its failure, or panic, is that of the writer.
    pub(super) fn spawn(
        self: Arc<Self>,
        name: &str,
        work: impl FnOnce() -> Result<(), RepositoryError> + Send + 'static,
    ) -> Result<(), RepositoryError> {
        let is_worker = name != "upload";
        let count = move |shared: &Self, up: bool| {
            let mut progress = shared.progress();
            let step = |count: usize| if up { count + 1 } else { count - 1 };
            progress.threads = step(progress.threads);
            if is_worker {
                progress.workers = step(progress.workers);
            }
            progress.steps += 1;
        };
        count(&self, true);
        let shared = Arc::clone(&self);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            // On Linux a niceness is a thread's own. Where it is refused the work is done all the same.
            let niceness = shared.options.niceness;
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), niceness);
            match panic::catch_unwind(AssertUnwindSafe(work)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => drop(shared.fail(error)),
                Err(_) => drop(shared.fail(RepositoryError::WriterDied)),
            }
            count(&shared, false);
            shared.progressed.notify_all();
        });
        thread.map(drop).map_err(|source| {
            count(&self, false);
            self.fail(RepositoryError::Thread { source: Arc::new(source) })
        })
    }

    pub(super) fn key(&self) -> &MasterKey {
        self.repository.key()
    }

    pub(super) fn compressor(&self) -> Result<Compressor<'static>, RepositoryError> {
        Compressor::new(self.options.level)
            .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })
    }

    /// Fails with what made the writer fail.
    pub(super) fn check(&self) -> Result<(), RepositoryError> {
        self.failure.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Stops everything because of `error`; returns what made the writer fail first.
    pub(super) fn fail(&self, error: RepositoryError) -> RepositoryError {
        let first = self.failure.get_or_init(|| error).clone();
        self.jobs.abandon();
        self.uploads.abandon();
        // Whoever has looked at `failure` before waits by now, and hears this.
        drop(self.progress());
        self.progressed.notify_all();
        first
    }

    pub(super) fn submit(&self, job: Job) -> Result<(), RepositoryError> {
        self.check()?;
        let (count, weight) = job.size();
        self.progress().pending += count;
        self.jobs.push(job, weight, self.options.stall_timeout).map_err(|why| self.refused(&why))
    }

    /// Hands a pack to the uploader; waits while it is busy.
    pub(super) fn upload(&self, builder: PackBuilder) -> Result<(), RepositoryError> {
        if builder.is_empty() {
            return Ok(());
        }
        let pack = builder.finish(self.key());
        let pushed = self.uploads.push(pack, 1, self.options.stall_timeout);
        pushed.map_err(|why| self.refused(&why))
    }

    fn refused(&self, why: &Refused) -> RepositoryError {
        match why {
            Refused::Closed => self.fail(RepositoryError::WriterDied),
            Refused::Full => self.fail(self.stalled()),
        }
    }

    /// Whether this run has to store the blob: nobody has it, nobody else of this run will.
    pub(super) fn claim(&self, kind: BlobKind, id: &BlobId) -> bool {
        if self.index.is_reusable(kind, id) {
            return false;
        }
        self.claimed_part(id).insert((kind, *id))
    }

    /// Whether the repository has the blob, or this run stores it.
    pub(super) fn knows(&self, kind: BlobKind, id: &BlobId) -> bool {
        self.index.is_reusable(kind, id) || self.claimed_part(id).contains(&(kind, *id))
    }

    /// What this run has stored; to be asked once it has ended.
    pub(super) fn take_claimed(&self) -> StoredBlobs {
        let take = |part: &Mutex<HashSet<_>>| {
            Mutex::new(std::mem::take(&mut *part.lock().expect("no panic while locked")))
        };
        StoredBlobs(self.claimed.iter().map(take).collect())
    }

    fn claimed_part(&self, id: &BlobId) -> MutexGuard<'_, HashSet<(BlobKind, BlobId)>> {
        let part = &self.claimed[usize::from(id.0[31]) % CLAIM_PARTS];
        part.lock().expect("no panic while locked")
    }

    /// The id of a chunk of zeros that has been stored.
    pub(super) fn known_zero(&self, len: u32) -> Option<BlobId> {
        self.zeros.lock().expect("no panic while locked").get(&len).copied()
    }

    pub(super) fn remember_zero(&self, len: u32, id: BlobId) {
        self.zeros.lock().expect("no panic while locked").insert(len, id);
    }

    /// Counts a blob that was handed in.
    pub(super) fn count(&self, len: usize, fresh: bool, zero: bool) {
        self.progress().stats.count(len, fresh, zero);
    }

    /// Notes that a blob is done.
    pub(super) fn done(&self, len: usize, fresh: bool, zero: bool, stored: Option<Stored>) {
        let mut progress = self.progress();
        progress.stats.count(len, fresh, zero);
        progress.stored.extend(stored);
        progress.pending -= 1;
        progress.steps += 1;
        if progress.pending == 0 {
            self.progressed.notify_all();
        }
    }

    /// Notes a file that is durable.
    pub(super) fn written(&self, len: usize, is_pack: bool) {
        let mut progress = self.progress();
        progress.steps += 1;
        progress.stats.stored_bytes += len as u64;
        progress.stats.packs += u64::from(is_pack);
        progress.stats.index_files += u64::from(!is_pack);
    }

    pub(super) fn take_stored(&self) -> Vec<Stored> {
        std::mem::take(&mut self.progress().stored)
    }

    pub(super) fn stats(&self) -> WriterStats {
        self.progress().stats
    }

    pub(super) fn wait_until_processed(&self) -> Result<(), RepositoryError> {
        self.wait_until(|progress| progress.pending == 0)
    }

    pub(super) fn wait_for_workers(&self) -> Result<(), RepositoryError> {
        self.wait_until(|progress| progress.workers == 0)
    }

    pub(super) fn wait_for_threads(&self) -> Result<(), RepositoryError> {
        self.wait_until(|progress| progress.threads == 0)
    }

    pub(super) fn abort(&self) {
        self.fail(RepositoryError::WriterStopped);
    }

    /// Ends the threads; gives those that hang in the store up after a while. Returns whether
    /// all have ended.
    pub(super) fn stop(&self) -> bool {
        self.abort();
        let deadline = Instant::now() + STOP_PATIENCE;
        let mut progress = self.progress();
        while progress.threads > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("threads of a writer hang in the store");
                return false;
            }
            let waited = self.progressed.wait_timeout(progress, left);
            progress = waited.expect("no panic while locked").0;
        }
        true
    }

    /// Waits as long as anything happens at all.
    fn wait_until(&self, reached: impl Fn(&Progress) -> bool) -> Result<(), RepositoryError> {
        let mut progress = self.progress();
        let (mut steps, mut since) = (progress.steps, Instant::now());
        loop {
            self.check()?;
            if reached(&progress) {
                return Ok(());
            }
            if steps != progress.steps {
                (steps, since) = (progress.steps, Instant::now());
            }
            let left = self.options.stall_timeout.saturating_sub(since.elapsed());
            if left.is_zero() {
                drop(progress);
                return Err(self.fail(self.stalled()));
            }
            let waited = self.progressed.wait_timeout(progress, left);
            progress = waited.expect("no panic while locked").0;
        }
    }

    fn stalled(&self) -> RepositoryError {
        RepositoryError::Stalled { seconds: self.options.stall_timeout.as_secs() }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().expect("no panic while locked")
    }
}
