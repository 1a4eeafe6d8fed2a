//! Images that hold still: the guest writes to overlays meanwhile, and is brought back later.
//!
//! `create` puts an overlay above each disk in one instant; `purge` writes it back and goes on with the
//! disk's own image. Between the two a machine may end, start again or be defined anew: purge asks what
//! is true, and never deletes on a guess.

pub mod at_rest;
pub mod converge;
pub mod create;
pub mod files;
pub mod fill;
pub mod libvirt;
pub mod purge;
pub mod qmp;
pub mod record;
pub mod stall;
pub mod track;

use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde_json::Value;

use crate::hypervisor::HypervisorError;
use crate::journal::{JournalError, Process};
use crate::names::{DiskName, DomainName};
use crate::quiesce::QuiesceError;
use at_rest::LocalImage;
use record::{DiskRecord, Held};
use stall::Series;

/// Why images could not be made to hold still, or a guest not be brought back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// QEMU or a tool of it could not be asked or refused.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The guest could not be made consistent.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// Its overlays are not those of `create`.
    #[error("the changes of domain `{domain}` are tracked by overlays from one backup to the next")]
    Tracked {
        /// The domain.
        domain: DomainName,
    },
    /// The record could not be read or written.
    #[error(transparent)]
    Record(#[from] JournalError),
    /// Nobody writes to its images anyway.
    #[error("domain `{domain}` is not running: its images hold still as they are")]
    NotRunning {
        /// Its name.
        domain: String,
    },
    /// It has nothing to hold still.
    #[error("domain `{domain}` has no disk that can hold still")]
    NoDisk {
        /// The domain.
        domain: DomainName,
    },
    /// An overlay needs a file or block device beneath it.
    #[error("the image of disk `{disk}` is no file or block device of this host")]
    NoImage {
        /// The disk.
        disk: DiskName,
    },
    /// There is no folder beside it that outlives the host.
    #[error("disk `{disk}` is the block device {}: it has no folder beside it for an overlay", .device.display())]
    OnDevice {
        /// The disk.
        disk: DiskName,
        /// Its device.
        device: PathBuf,
    },
    /// The overlay would be lost where the image is not.
    #[error("the overlay of disk `{disk}` is kept in memory, in {}: what the guest writes to it is lost when the host restarts", .folder.display())]
    InMemory {
        /// The disk.
        disk: DiskName,
        /// Where overlays go.
        folder: PathBuf,
    },
    /// Nobody knows what lies beneath the last image.
    #[error("disk `{disk}`: {image} names {beneath} beneath it, but QEMU tells of nothing there")]
    ChainUnknown {
        /// The disk.
        disk: DiskName,
        /// The last image that is known.
        image: String,
        /// What it names.
        beneath: String,
    },
    /// There is too little room for what the guest may write.
    #[error("there is too little room for overlays in {}: {} MiB are left", .folder.display(), free >> 20)]
    NoRoom {
        /// The folder.
        folder: PathBuf,
        /// Bytes that are left there.
        free: u64,
    },
    /// An image takes all room for what is written back to it.
    #[error("writing back the overlay of disk `{disk}` would fill {}: {} MiB are left, its overlay stays", .folder.display(), free >> 20)]
    BaseGrows {
        /// The disk.
        disk: DiskName,
        /// Where its image is.
        folder: PathBuf,
        /// Bytes that are left there.
        free: u64,
    },
    /// A file cannot be made, looked at or deleted.
    #[error("cannot {step} {}", .path.display())]
    File {
        /// The step, to be read after "cannot".
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody put another image above.
    #[error("disk `{disk}` has another image above its overlay: {}", .above.display())]
    Covered {
        /// The disk.
        disk: DiskName,
        /// The image on top.
        above: PathBuf,
    },
    /// The guest does not run on the overlay.
    #[error("disk `{disk}` runs without its overlay {}, which holds what the guest wrote since {since}; nothing was deleted", .overlay.display())]
    Elsewhere {
        /// The disk.
        disk: DiskName,
        /// Its overlay.
        overlay: PathBuf,
        /// Since when.
        since: Timestamp,
    },
    /// The guest runs on the overlay, which has to be written back first.
    #[error("disk `{disk}` runs on its overlay {}, but {why}", .overlay.display())]
    Unpurged {
        /// The disk.
        disk: DiskName,
        /// Its overlay.
        overlay: PathBuf,
        /// Why it cannot go on so.
        why: &'static str,
    },
    /// The guest may have gone on with its image, and nobody saw it.
    #[error("a purge was killed just as disk `{disk}` went back to {}: whether it did cannot be told now, so {} was neither written back nor deleted", .base.display(), .overlay.display())]
    MayBeBack {
        /// The disk.
        disk: DiskName,
        /// Its image.
        base: PathBuf,
        /// Its overlay.
        overlay: PathBuf,
    },
    /// The overlay is not where it was put.
    #[error("the overlay {} is not above the image that disk `{disk}` had; nothing was changed", .overlay.display())]
    Moved {
        /// The disk.
        disk: DiskName,
        /// Its overlay.
        overlay: PathBuf,
    },
    /// A guest was partly brought back.
    #[error("the images of domain `{domain}` do not hold still any more")]
    NotStill {
        /// The domain.
        domain: DomainName,
    },
    /// The overlay is not where it was.
    #[error("the overlay {} of disk `{disk}` is gone, and with it what the guest wrote since {since}", .overlay.display())]
    Missing {
        /// The disk.
        disk: DiskName,
        /// Its overlay.
        overlay: PathBuf,
        /// Since when.
        since: Timestamp,
    },
    /// Another file has the overlay's name.
    #[error("{} is not the overlay that was made; nothing was changed", .overlay.display())]
    Replaced {
        /// The name.
        overlay: PathBuf,
    },
    /// Base and overlay do not fit each other any more.
    #[error("{} was written to while it should hold still: {} cannot be written into it; nothing was deleted", .base.display(), .overlay.display())]
    BaseChanged {
        /// The image of the disk.
        base: PathBuf,
        /// Its overlay.
        overlay: PathBuf,
    },
    /// Nobody can tell whether base and overlay still fit each other.
    #[error("whether anybody wrote to {} since the guest ran above it cannot be told: {} is not written into it while the machine is off, and nothing was deleted", .base.display(), .overlay.display())]
    BaseUnknown {
        /// The image of the disk.
        base: PathBuf,
        /// Its overlay.
        overlay: PathBuf,
    },
    /// The overlay holds more than what the guest sees.
    #[error("the overlay {} holds internal snapshots, which would be deleted with it: {}", .overlay.display(), .snapshots.join(", "))]
    HasSnapshots {
        /// The overlay.
        overlay: PathBuf,
        /// Their names.
        snapshots: Vec<String>,
    },
    /// An overlay that was written back was written to again.
    #[error("{} was written to after it was written back; it was not deleted", .overlay.display())]
    Revived {
        /// The overlay.
        overlay: PathBuf,
    },
    /// Something names an overlay that is of no use any more.
    #[error("{} is written back, but {by} still names it; it was not deleted", .overlay.display())]
    StillNamed {
        /// The overlay.
        overlay: PathBuf,
        /// Who names it, in words.
        by: String,
    },
    /// The guest writes faster than the overlay is written back.
    #[error("disk `{disk}` was not brought back in time: {} MiB are left, its overlay stays", left >> 20)]
    TooSlow {
        /// The disk.
        disk: DiskName,
        /// Bytes that are left.
        left: u64,
    },
    /// What the last backup has read is still written back.
    #[error(
        "the overlay that the last backup has read of disk `{disk}` is still being written back"
    )]
    Busy {
        /// The disk.
        disk: DiskName,
    },
    /// The job that writes the overlay back ended early.
    #[error("the overlay of disk `{disk}` could not be written back: {words}")]
    JobFailed {
        /// The disk.
        disk: DiskName,
        /// What QEMU says.
        words: String,
    },
    /// No disk of the machine is on top of the image.
    #[error("no disk of `{domain}` runs on {}", .overlay.display())]
    NotAdopted {
        /// The machine.
        domain: DomainName,
        /// The image.
        overlay: PathBuf,
    },
    /// The image beneath an adopted one is used by others.
    #[error("{} lies beneath disk `{disk}`, but {by} uses it too: writing {} into it would spoil that", .base.display(), .overlay.display())]
    Shared {
        /// The disk.
        disk: DiskName,
        /// The image beneath.
        base: PathBuf,
        /// The image that was to be adopted.
        overlay: PathBuf,
        /// Who uses it, in words.
        by: String,
    },
    /// The domain would go on with a memory that names the overlay.
    #[error("the memory of domain `{domain}` is saved, and goes on with the overlay")]
    Saved {
        /// Its name.
        domain: String,
    },
    /// The user or the system asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl OverlayError {
    /// What the user can do next.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NotRunning { .. } => "copy them; `kvmsnap backup` takes them too",
            Self::Tracked { .. } => "`kvmsnap purge` ends that; its next backup reads everything",
            Self::OnDevice { .. } | Self::InMemory { .. } => {
                "--overlay-dir names a folder on a disk, with room for what the guest writes"
            }
            Self::NoRoom { .. } => {
                "--overlay-dir names a roomier folder, --reserve asks for less room"
            }
            Self::BaseGrows { .. } => {
                "nothing is lost: make room there for what the guest has written, then `kvmsnap purge`"
            }
            Self::Covered { .. } => "`kvmsnap purge --adopt` writes that image back first",
            Self::Elsewhere { .. } => {
                "keep both: the overlay is worth nothing without the image. Start the guest on the overlay \
                 and purge; or, to give up what it wrote there, delete the overlay and its record"
            }
            Self::Unpurged { .. } => {
                "nothing is lost: `kvmsnap purge` while the guest runs writes it back"
            }
            Self::MayBeBack { .. } => {
                "where the guest is well on its image: delete the overlay, then purge. Where what it wrote last \
                 is missing: start it on the overlay, then purge"
            }
            Self::Moved { .. } => {
                "the disk was given another image or name since; `kvmsnap purge` goes on once it is put back"
            }
            Self::NotStill { .. } => {
                "a purge was begun, or the guest runs without its overlay: `kvmsnap purge`, then again"
            }
            Self::Missing { .. } => {
                "put it back where it was; if it is lost for good, its record can be deleted"
            }
            Self::Revived { .. } => {
                "somebody started a guest on it: decide whether it or the disk's own image counts"
            }
            Self::Replaced { .. } => {
                "put the overlay itself back where it was. Of one that was moved to another file system \
                 only a copy is left: start the guest on that and purge, then delete the copy and purge \
                 again"
            }
            Self::BaseUnknown { .. } => {
                "a block device never tells, nor an image of which a create or purge was killed. If no guest \
                 was started on it: start the guest on the overlay, as its definition has it, and purge while it \
                 runs"
            }
            Self::HasSnapshots { .. } => {
                "delete them, while the guest runs by `virsh snapshot-delete`, while it is off by `qemu-img \
                 snapshot -d`; or keep the overlay"
            }
            Self::BaseChanged { .. } => {
                "keep both files: what the guest wrote in between is only in the overlay. To go on with that: \
                 start the guest on it, see whether it is well, and `kvmsnap purge --adopt OVERLAY`"
            }
            Self::StillNamed { .. } => "`kvmsnap purge` deletes it once nothing names it",
            Self::TooSlow { .. } => {
                "nothing is lost: `kvmsnap purge` again when the guest writes less, or with a longer \
                 --deadline or --max-pause"
            }
            Self::Busy { .. } => "nothing is lost: again later, or with a longer --deadline",
            Self::JobFailed { .. } => "nothing is lost: `kvmsnap purge` again once that is mended",
            Self::NotAdopted { .. } => "`virsh domblklist` shows what its disks run on",
            Self::Shared { .. } => {
                "a disk is made independent of an image that others share by `virsh blockpull`"
            }
            Self::Saved { .. } => "start the domain, then purge",
            _ => return None,
        })
    }
}

/// A disk of a machine and its images, from the top down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The disk.
    pub disk: DiskName,
    /// Its images.
    pub images: Vec<LocalImage>,
}

/// How far an overlay is written back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes that were.
    pub done: u64,
    /// All bytes, which grow while the guest writes.
    pub total: u64,
    /// Whether the guest can go on with its own image.
    pub is_ready: bool,
}

/// A machine whose disks can get overlays and lose them. Every call that changes anything takes the
/// proof that this is recorded.
#[allow(async_fn_in_trait, reason = "the flow is generic over it; futures stay on one task")]
pub trait Layers {
    /// The process that the machine runs in, where it can be told.
    fn process(&self) -> Option<Process>;

    /// The images of the machine's disks; `None` where it does not run.
    async fn chains(&self) -> Result<Option<Vec<Chain>>, HypervisorError>;

    /// The user and group that QEMU runs as, for a disk's image, where they can be told.
    fn owner(&self, base: &LocalImage) -> Option<(u32, u32)>;

    /// Has QEMU open the overlays, beside the guest's disks.
    async fn open(&self, held: &Held) -> Result<(), HypervisorError>;

    /// Puts all overlays above their disks in one instant.
    async fn put(&self, held: &Held) -> Result<(), HypervisorError>;

    /// Has QEMU close the overlays that no disk is above any more. Idempotent.
    async fn close(&self, held: &Held) -> Result<(), HypervisorError>;

    /// Begins to write an overlay back, at so many bytes a second at most, or joins the job that does. One
    /// beneath another overlay is written back while that stays.
    async fn commit(
        &self,
        held: &Held,
        disk: &DiskRecord,
        rate: Option<u64>,
    ) -> Result<(), HypervisorError>;

    /// How far that is; `None` where the job is gone, or words where it failed.
    async fn written(
        &self,
        held: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<Option<Written>, String>, HypervisorError>;

    /// Whether the job is over that writes back an overlay beneath another one, or words where it failed.
    async fn has_sunk(
        &self,
        held: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<bool, String>, HypervisorError>;

    /// Has the guest go on with its own image; the job is ready.
    async fn pivot(
        &self,
        held: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<(), String>, HypervisorError>;

    /// Ends the job; the guest stays on the overlay. Idempotent.
    async fn cancel(&self, held: &Held, disk: &DiskRecord) -> Result<(), HypervisorError>;

    /// The limits of a disk's I/O.
    async fn limits(&self, disk: &DiskRecord) -> Result<Value, HypervisorError>;

    /// These limits with at most so many bytes written a second.
    fn lowered(limits: &Value, rate: u64) -> Value;

    /// Sets the limits of a disk's I/O.
    async fn limit(
        &self,
        held: &Held,
        disk: &DiskRecord,
        limits: &Value,
    ) -> Result<(), HypervisorError>;

    /// Has QEMU sort the guest's operations by the time that they take, where it can do so without harm.
    async fn watch_io(&self, held: &Held) -> Result<(), HypervisorError>;

    /// What the guest did so far, always in the same order.
    async fn io(&self) -> Result<Vec<Series>, HypervisorError>;

    /// Ends what [`Self::watch_io`] has begun. Idempotent.
    async fn forget_io(&self, held: &Held) -> Result<(), HypervisorError>;

    /// Whether the guest's processors run.
    async fn runs(&self) -> Result<bool, HypervisorError>;

    /// Stops the guest's processors.
    async fn pause(&self, held: &Held) -> Result<(), HypervisorError>;

    /// Lets a guest go on that stands still because an overlay had no room, and one that was paused where
    /// that was `ours`.
    async fn resume(&self, ours: bool) -> Result<(), HypervisorError>;

    /// Makes sure that a machine which does not run can be changed.
    async fn check_off(&self) -> Result<(), OverlayError>;

    /// Has a machine that does not run start with a disk's own image, where it would start with the overlay.
    async fn point_back(&self, disk: &DiskRecord) -> Result<(), HypervisorError>;

    /// Who has an image in a chain, running or defined, in words; also who may, where that cannot be told.
    async fn names(&self, image: &Path) -> Result<Option<String>, HypervisorError>;

    /// The same, a disk of this machine apart.
    async fn others(
        &self,
        image: &Path,
        disk: &DiskName,
    ) -> Result<Option<String>, HypervisorError>;
}
