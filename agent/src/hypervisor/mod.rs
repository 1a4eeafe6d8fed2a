//! One trait, and the ways to reach QEMU behind it.
//!
//! The calls come in the order of a backup: `discover`, `prepare`, `cut`, `export`, `confirm`,
//! `release`, `advance` or `roll_back`. Every one that changes anything takes the journal's proof that
//! its undo record is durable.

pub mod graph;
pub mod libvirt;
pub mod lvm;
pub mod monitor;
pub mod qmp;

use std::fmt;
use std::fs::File;
use std::io;
use std::iter::Sum;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use qmp_client::QmpError;
use serde::{Deserialize, Serialize};

use crate::capture::lvm::Snapshot;
use crate::journal::{DiskRecord, Process, Recorded};
use crate::manifest::Consistency;
use crate::names::{DiskName, NameError, RunId};
use crate::overlay::stall::Stall;
use crate::overlay::{Layers, OverlayError};

/// Why QEMU could not be asked or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HypervisorError {
    /// The monitor cannot be reached or broke off.
    #[error("cannot talk to QEMU through {}", .socket.display())]
    Monitor {
        /// The monitor's socket.
        socket: PathBuf,
        /// Why.
        source: QmpError,
    },
    /// QEMU refused one step.
    #[error("QEMU refused to {step}")]
    Refused {
        /// The step, to be read after "refused to".
        step: String,
        /// QEMU's words.
        source: QmpError,
    },
    /// A reply lacks what every QEMU sends.
    #[error("QEMU's answer to {command} cannot be understood")]
    Reply {
        /// The command.
        command: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// QEMU has no way of its own to a point in time.
    #[error("this QEMU ({version}) offers neither a copy-before-write filter nor backup jobs")]
    NoMethod {
        /// QEMU's version.
        version: String,
    },
    /// The point in time is gone: reads would no longer show it.
    #[error("the point in time of disk `{disk}` is lost: {what}")]
    PointInTimeLost {
        /// The disk.
        disk: DiskName,
        /// What is no longer as it was made.
        what: String,
    },
    /// The guest needs the room that the scratch takes.
    #[error("{} MiB are left where the scratch of disk `{disk}` is, {} are kept for the guest", free >> 20, kept >> 20)]
    ScratchLow {
        /// The disk.
        disk: DiskName,
        /// Bytes left on its file system.
        free: u64,
        /// Bytes that are never used.
        kept: u64,
    },
    /// Two devices would be stored under one name.
    #[error("two devices are called `{disk}`")]
    TwoDisks {
        /// The name.
        disk: DiskName,
    },
    /// Its images are too many to be told of.
    #[error("disk `{disk}` has more than {max} images in its backing chain")]
    ChainTooLong {
        /// The disk.
        disk: DiskName,
        /// So many may it have.
        max: usize,
    },
    /// A device's id cannot be a file's name.
    #[error("a device has an id that cannot name a disk")]
    DiskName(#[source] NameError),
    /// Something on the host, not in QEMU, failed.
    #[error("cannot {step}")]
    Host {
        /// The step, to be read after "cannot".
        step: String,
        /// Why.
        source: io::Error,
    },
    /// libvirt cannot be reached.
    #[error("cannot connect to libvirt at {uri}")]
    Connect {
        /// Where it should be.
        uri: String,
        /// Why not.
        source: libvirt::sys::Refusal,
    },
    /// libvirt refused one step.
    #[error("libvirt refused to {step}")]
    Libvirt {
        /// The step, to be read after "refused to".
        step: String,
        /// libvirt's words.
        source: libvirt::sys::Refusal,
    },
    /// libvirt hangs.
    #[error("libvirt did not {step} within {} s", .waited.as_secs())]
    Silent {
        /// The step, to be read after "did not".
        step: String,
        /// How long was waited.
        waited: Duration,
    },
    /// libvirt's description of something is no XML.
    #[error("libvirt's answer cannot be understood")]
    Xml(#[source] xmltree::ParseError),
    /// The domain is shut off.
    #[error("domain `{domain}` is not running")]
    NotRunning {
        /// Its name.
        domain: String,
    },
    /// The domain was shut off when it was chosen.
    #[error("domain `{domain}` was started meanwhile")]
    Started {
        /// Its name.
        domain: String,
    },
    /// The domain is shut off because its guest runs on another host, with the same images.
    #[error("domain `{domain}` was migrated to another host")]
    Migrated {
        /// Its name.
        domain: String,
    },
    /// The guest is on its way to another QEMU, or there already: its images change behind our back.
    #[error("the guest is being migrated")]
    Migrating,
    /// The guest was to stand still until it was read.
    #[error("somebody let the guest go on while it was read")]
    GuestGoesOn,
    /// The image is not a logical volume.
    #[error("disk `{disk}` is no raw image on a logical volume of LVM")]
    NoVolume {
        /// The disk.
        disk: DiskName,
    },
    /// A snapshot of LVM takes no more, or is about to.
    #[error("the LVM snapshot {what} of disk `{disk}` is {percent} % full")]
    SnapshotFull {
        /// The disk.
        disk: DiskName,
        /// The snapshot.
        what: String,
        /// How full it or its pool is, in percent.
        percent: u8,
    },
    /// An image that should lie still is used.
    #[error("the image {image} is in use by another process")]
    ImageInUse {
        /// The image.
        image: String,
    },
    /// A tool of QEMU failed.
    #[error("`{tool}` could not {step}: {words}")]
    Tool {
        /// The tool.
        tool: &'static str,
        /// The step, to be read after "could not".
        step: String,
        /// What it said.
        words: String,
    },
    /// Overlays could not be made or taken away.
    #[error(transparent)]
    Overlay(Box<OverlayError>),
    /// Something that was to go away still stands.
    #[error("{what} is still in use after {} s", .waited.as_secs())]
    StillInUse {
        /// The node or export.
        what: String,
        /// How long was waited.
        waited: Duration,
    },
}

impl From<OverlayError> for HypervisorError {
    fn from(error: OverlayError) -> Self {
        match error {
            OverlayError::Hypervisor(error) => error,
            error => Self::Overlay(Box::new(error)),
        }
    }
}

impl HypervisorError {
    /// Whether QEMU has ended or closed the connection.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Monitor { source, .. } | Self::Refused { source, .. } => source.is_gone(),
            Self::NotRunning { .. } => true,
            Self::Libvirt { source, .. } => source.is_no_domain() || source.is_not_running(),
            _ => false,
        }
    }
}

/// How a machine is reached; undo records keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// The monitor's socket of a QEMU that nobody manages.
    Monitor(PathBuf),
    /// A domain of libvirt.
    Domain(DomainAddress),
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Monitor(socket) => write!(f, "the monitor {}", socket.display()),
            Self::Domain(DomainAddress { uri, uuid }) => write!(f, "the domain {uuid} at {uri}"),
        }
    }
}

/// A domain of libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainAddress {
    /// Where libvirt is.
    pub uri: String,
    /// The domain's uuid.
    pub uuid: String,
}

/// A dirty bitmap that must be there, by what an earlier backup says.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Its name.
    pub bitmap: String,
    /// When it began.
    pub time: Timestamp,
    /// The disks that it was begun on.
    pub disks: Vec<DiskName>,
}

/// A machine as it is now.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its uuid; all zero where it has none.
    pub uuid: String,
    /// Whether the guest's processors run.
    pub runs: bool,
    /// Where it is shut off: how consistent that left its disks.
    pub shut_off: Option<Consistency>,
    /// The disks that can be backed up.
    pub disks: Vec<Disk>,
    /// What is left out, and why.
    pub skipped: Vec<Skipped>,
}

/// A file that belongs to a machine, besides its disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineFile {
    /// Its name beside the disks in a snapshot.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Where it lies on the host, where it is a file there.
    pub source: Option<String>,
    /// Its content.
    pub content: Vec<u8>,
}

/// What a machine's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// libvirt's description of the machine as it will start next.
    Domain,
    /// libvirt's description of the machine as it ran.
    LiveDomain,
    /// libvirt's description of the checkpoint that began with the backup.
    Checkpoint,
    /// libvirt's description of a network that the machine uses.
    Network,
    /// libvirt's description of a storage pool that holds an image.
    Pool,
    /// The memory of the firmware.
    Nvram,
    /// A part of the state of an emulated TPM.
    Tpm,
    /// The kernel that is booted directly.
    Kernel,
    /// Its initrd.
    Initrd,
}

/// A device that is not backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The device, as QEMU calls it.
    pub device: String,
    /// Why.
    pub reason: String,
    /// Whether it is a disk with something on it, which whoever restores the machine may miss.
    pub is_disk: bool,
}

impl Skipped {
    /// A disk.
    pub fn disk(device: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { device: device.into(), reason: reason.into(), is_disk: true }
    }

    /// A device that holds nothing of the machine.
    pub fn no_disk(device: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { device: device.into(), reason: reason.into(), is_disk: false }
    }
}

/// Why a disk is left out that the user does not want.
pub const EXCLUDED: &str = "excluded with --exclude-disk";

/// The disks of a machine that a backup is to have.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Only these; all where empty.
    pub only: Vec<DiskName>,
    /// Not these.
    pub excluded: Vec<DiskName>,
}

impl Choice {
    /// A disk that is not chosen, as one that is left out: nobody may look at its image.
    pub fn leaves_out(&self, target: &str) -> Option<Skipped> {
        let names = |list: &[DiskName]| list.iter().any(|disk| disk.as_str() == target);
        let reason = match (names(&self.excluded), self.only.is_empty() || names(&self.only)) {
            (true, _) => EXCLUDED,
            (false, false) => "only other disks were asked for with --disk",
            (false, true) => return None,
        };
        Some(Skipped::disk(target, reason))
    }
}

/// A disk of a running machine.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Its name.
    pub target: DiskName,
    /// QOM path of the device that uses it.
    pub device: String,
    /// Node-name that the device uses.
    pub root: String,
    /// Node-name of the image's format, below any filter.
    pub format: String,
    /// QEMU's name of the format: `qcow2`, `raw`.
    pub driver: String,
    /// Size in bytes, as the guest sees it.
    pub size: u64,
    /// The image on the host, where it is a file.
    pub image: Option<PathBuf>,
    /// Whether changes can be tracked from one backup to the next.
    pub tracking: Tracking,
}

/// Whether a disk can keep dirty bitmaps.
#[derive(Debug, Clone)]
pub enum Tracking {
    /// It keeps these.
    Bitmaps(Vec<Bitmap>),
    /// An overlay tracks changes instead: the one that holds what changed, where there is one yet.
    Overlay(Option<String>),
    /// It keeps none, and why.
    Unsupported(String),
}

impl Tracking {
    /// The dirty bitmaps that there are.
    pub fn bitmaps(&self) -> &[Bitmap] {
        match self {
            Self::Bitmaps(bitmaps) => bitmaps,
            Self::Overlay(_) | Self::Unsupported(_) => &[],
        }
    }
}

/// A dirty bitmap on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Whether it counted every write since it was made.
    pub health: BitmapHealth,
}

/// What a bitmap's content is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapHealth {
    /// It counted every write.
    Good,
    /// QEMU ended without closing the image: it cannot be trusted.
    Inconsistent,
    /// It is inconsistent or not there at all, which libvirt does not tell apart.
    Broken,
    /// It was switched off for a while.
    NotRecording,
    /// It goes on in an image beneath: it counted only a part of the writes.
    Partial,
    /// The way to QEMU has lost it; a backup will find out whether QEMU still has it.
    Lost,
    /// It goes away with QEMU, so somebody else made it.
    Transient,
}

/// What the guest did on its disks since QEMU started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestIo {
    /// Finished reads, writes and flushes.
    pub operations: u64,
    /// The time they took, added up.
    pub time: Duration,
}

impl Sum for GuestIo {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            operations: sum.operations + one.operations,
            time: sum.time + one.time,
        })
    }
}

/// The instant that a backup shows.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    /// When it was.
    pub time: Timestamp,
    /// How long the guest's processors stood still for it, at most.
    pub pause: Option<Duration>,
}

/// The exports of a point in time: one NBD server, one export for each disk.
#[derive(Debug, Clone)]
pub struct Exports {
    /// In the order of the record's disks.
    pub disks: Vec<Export>,
    /// Whether their connections must outlive a run that is killed; see [`crate::guard`].
    pub outlive_us: bool,
    /// Whether the guest's own QEMU serves them, or another process.
    pub by_guest: bool,
}

/// The export of one disk.
#[derive(Debug, Clone)]
pub struct Export {
    /// Its name at the server.
    pub name: String,
    /// The metadata context of the dirty map, where there is one. Of [`DEPTH_CONTEXT`] the topmost image
    /// counts as dirty.
    pub dirty_context: Option<String>,
    /// What its reader must mind.
    pub care: Care,
    /// A connection to the server. It stays open when this end is closed; see `capture`.
    pub stream: Arc<UnixStream>,
}

/// The metadata context that tells which image of a chain holds a part of the disk: 1 for the one on top
/// (QEMU's docs/interop/nbd.txt, from QEMU 5.2).
pub const DEPTH_CONTEXT: &str = "qemu:allocation-depth";

/// What a reader must mind to see the point in time, and not the live disk, while the guest writes.
#[derive(Debug, Clone)]
pub enum Care {
    /// Nothing.
    None,
    /// QEMU 7.1 and 7.2: a request that begins in a part which the filter has saved, and goes beyond
    /// it, is answered from the live disk (tried; mended in QEMU 8.0 by "hbitmap: fix
    /// hbitmap_status() return value for first dirty bit case"). A read within one cluster is right,
    /// and where the scratch holds data there is data, whatever the block status says.
    Clusters {
        /// Where the filter saves old blocks.
        scratch: Arc<File>,
    },
    /// The block status is put together from scratch and live disk, one after the other, and the guest
    /// may write in between. That spoils each cluster once at most: the answer is asked for twice.
    Twice,
}

/// One way to reach QEMU.
#[allow(async_fn_in_trait, reason = "the flow is generic over it; futures stay on one task")]
pub trait Hypervisor {
    /// The name that the machine's owner gave it, if any. Changes nothing.
    async fn name(&self) -> Result<Option<String>, HypervisorError>;

    /// Looks at the machine, and of its disks at those that are chosen. Changes nothing.
    async fn discover(&self, choice: &Choice) -> Result<Machine, HypervisorError>;

    /// The files of the machine besides its disks: those that a running guest does not change.
    async fn definition(&self) -> Result<Vec<MachineFile>, HypervisorError>;

    /// The files of the machine that its guest may change, read in the instant of the call: while it is
    /// frozen. What cannot be read is told in words, within seconds whatever its storage does.
    async fn firmware(&self) -> (Vec<MachineFile>, Vec<String>);

    /// Finds dirty bitmaps again that the way to QEMU, not QEMU itself, has lost.
    async fn reclaim(&self, machine: &mut Machine, claims: &[Claim])
    -> Result<(), HypervisorError>;

    /// Takes for granted what [`Self::reclaim`] would find, to say beforehand how a backup is taken.
    fn presume(&self, _machine: &mut Machine, _claims: &[Claim]) {}

    /// How the machine is reached.
    fn reach(&self) -> Reach;

    /// Counts what the guest did on its disks so far. Changes nothing.
    async fn guest_io(&self) -> Result<GuestIo, HypervisorError>;

    /// The names of what a run will make on a disk, for its undo record.
    fn names(&self, run: &RunId, index: usize, disk: &Disk) -> DiskRecord;

    /// The snapshots of LVM that a run will make, for its undo record.
    fn snapshots(&self, _run: &RunId, _disks: &[&DiskName]) -> Vec<Snapshot> {
        Vec::new()
    }

    /// Where QEMU will listen for a run, where that has a name of its own.
    fn listens_at(&self, run: &RunId) -> Option<PathBuf>;

    /// The way to put overlays above the machine's disks, whatever its own way to a point in time is.
    async fn layers(&self) -> Result<impl Layers, HypervisorError>;

    /// Why a running machine has no way of its own to a point in time, in words; `None` where it has one.
    fn no_job(&self) -> Option<String> {
        None
    }

    /// Whether a run will put overlays above the disks.
    fn puts_overlays(&self) -> bool {
        false
    }

    /// The overlay that begins with this run, where overlays track what changes on a disk.
    fn begins_overlay(&self, _disk: &DiskName) -> Option<String> {
        None
    }

    /// The process that the machine runs in, where it can be told.
    fn process(&self) -> Option<Process> {
        None
    }

    /// Whether the machine, of which nothing is found any more, has left this host: it may run on
    /// another one.
    async fn has_left(&self) -> bool {
        false
    }

    /// Whether the guest's processors will stand still for a point in time over so many disks.
    fn pauses(&self, _disks: usize) -> bool {
        false
    }

    /// Whether the guest's processors stand still until the point in time was read; a run that pauses it
    /// then lets it go on with [`Self::let_go_on`].
    fn suspends(&self) -> bool {
        false
    }

    /// Ready when the point in time must be given up for the guest's sake.
    async fn danger(&self) -> HypervisorError;

    /// Makes all that the point in time needs, without touching the guest's path to its disks.
    async fn prepare(&self, recorded: &Recorded, disks: &[Disk]) -> Result<(), HypervisorError>;

    /// Takes the point in time, over all disks in one instant.
    async fn cut(&self, recorded: &Recorded) -> Result<Cut, HypervisorError>;

    /// Offers the point in time for reading.
    async fn export(&self, recorded: &Recorded) -> Result<Exports, HypervisorError>;

    /// Makes sure that what was read was the point in time to the end.
    async fn confirm(&self, recorded: &Recorded) -> Result<(), HypervisorError>;

    /// The most bytes that the scratch took while the point in time was read; `None` where there was none.
    fn scratch_peak(&self) -> Option<u64> {
        None
    }

    /// Gives the guest its disks back as they were, whatever of the record exists. Idempotent.
    async fn release(&self, recorded: &Recorded) -> Result<(), HypervisorError>;

    /// Ends what may take its time, once the backup is recorded or given up; nobody needs the point in
    /// time any more. What is left when `interrupt` is ready has a record of its own.
    /// Returns the guest's longest stall meanwhile, where overlays were written back.
    async fn finish(
        &self,
        _recorded: &Recorded,
        _interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Option<Stall>, HypervisorError> {
        Ok(None)
    }

    /// Pauses a guest that runs.
    async fn pause(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// Lets a guest go on that a run has paused; one that runs is left alone.
    async fn let_go_on(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// Removes these dirty bitmaps, each a node and a name, where they exist. Idempotent.
    async fn drop_bitmaps(&self, bitmaps: &[(String, String)]) -> Result<(), HypervisorError>;
}
