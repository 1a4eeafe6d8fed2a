//! The room beside the scratch: it takes nothing that the guest's own images need to grow.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::sys::statvfs::fstatvfs;
use tokio::sync::watch;

use crate::hypervisor::HypervisorError;
use crate::names::DiskName;

/// The part of a file system that the scratch never takes, for the guest's own images on it.
const KEPT_FRACTION: u64 = 20;
const KEPT_MIN: u64 = 64 << 20;
const KEPT_FRACTION_MAX: u64 = 4;
/// Bytes of a block, as the system counts what a file takes (`stat(2)`).
pub const BLOCK: u64 = 512;
/// How often the room is looked at: a guest fills some MiB in that time, ten times less than what is kept
/// for it. Each look is one call of the system.
const POLL: Duration = Duration::from_millis(2);
/// The highest priority of a thread that is none of real time: it must not wait for those that compress,
/// which share half of the processors with it while the guest works.
const PRIORITY: i32 = -20;

/// So little room is left that the guest's own images could not grow.
#[derive(Debug, Clone)]
pub struct Low {
    disk: DiskName,
    free: u64,
    kept: u64,
}

impl From<Low> for HypervisorError {
    fn from(Low { disk, free, kept }: Low) -> Self {
        Self::ScratchLow { disk, free, kept }
    }
}

/// The scratch of one disk, and the room around it.
#[derive(Debug)]
pub struct Scratch {
    /// The disk.
    pub disk: DiskName,
    /// Its file.
    pub file: Arc<File>,
}

impl Scratch {
    /// Says when so little room is left that the guest's own image could not grow.
    pub fn low(&self) -> Option<Low> {
        let (free, kept) = room(&self.file)?;
        (free < kept).then(|| Low { disk: self.disk.clone(), free, kept })
    }

    /// Bytes that it takes on its file system.
    fn taken(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * BLOCK)
    }

    /// Gives its room back at once, before the filter is gone; reads show nothing true from here on.
    fn give_up(&self) {
        // What cannot be cut goes with the filter.
        let _ = self.file.set_len(0);
    }
}

/// Bytes that are left on a file's file system, and how many of them are kept for the guest's own images;
/// `None` where it does not tell, and so has no bounds that we could keep.
pub fn room(file: &File) -> Option<(u64, u64)> {
    let stat = fstatvfs(file).ok()?;
    let (free, size) = (stat.blocks_available(), stat.blocks());
    let (free, size) = (free * stat.fragment_size(), size * stat.fragment_size());
    Some((free, (size / KEPT_FRACTION).max(KEPT_MIN).min(size / KEPT_FRACTION_MAX)))
}

/// The scratch of each disk, and a thread that watches the room beside them until this is dropped.
#[derive(Debug)]
pub struct Watched {
    scratch: Arc<[Scratch]>,
    low: watch::Receiver<Option<Low>>,
    peak: Arc<AtomicU64>,
    _ends_with_us: mpsc::Sender<()>,
}

impl Watched {
    /// Watches from now on. Where the room runs out, what the scratch takes is given back at once.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn begin(scratch: Vec<Scratch>) -> io::Result<Self> {
        let scratch: Arc<[Scratch]> = scratch.into();
        let watched = Arc::clone(&scratch);
        let peak = Arc::new(AtomicU64::new(0));
        let most = Arc::clone(&peak);
        let (tell, low) = watch::channel(None);
        let (ends_with_us, until) = mpsc::channel();
        thread::Builder::new().name("room".to_owned()).spawn(move || {
            // Who may not do so watches as others do.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), PRIORITY);
            while let Err(RecvTimeoutError::Timeout) = until.recv_timeout(POLL) {
                most.fetch_max(watched.iter().map(Scratch::taken).sum(), Ordering::Relaxed);
                let Some(low) = watched.iter().find_map(Scratch::low) else { continue };
                // First, so that nobody takes for true what is read from now on.
                tell.send_replace(Some(low));
                // Again and again: QEMU goes on writing to it until the filter is gone.
                watched.iter().for_each(Scratch::give_up);
            }
        })?;
        Ok(Self { scratch, low, peak, _ends_with_us: ends_with_us })
    }

    /// The scratch of the disk with this index.
    pub fn scratch(&self, index: usize) -> Option<&Scratch> {
        self.scratch.get(index)
    }

    /// The most bytes that the scratch of all disks took at one time, as far as was seen.
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Whether all that was read up to now is true.
    ///
    /// # Errors
    /// [`HypervisorError::ScratchLow`].
    pub fn check(&self) -> Result<(), HypervisorError> {
        self.low.borrow().clone().map_or(Ok(()), |low| Err(low.into()))
    }

    /// Ready when the room has run out: reads show nothing true from then on.
    pub async fn ends(&self) -> HypervisorError {
        let mut low = self.low.clone();
        let found = low.wait_for(Option::is_some).await;
        match found.ok().and_then(|found| found.clone()) {
            Some(low) => low.into(),
            // The thread ends only with us.
            None => std::future::pending().await,
        }
    }
}
