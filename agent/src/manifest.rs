//! The record of one backup, kept as `manifest.json` beside the disks. Fields are only ever added.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::hypervisor::{EXCLUDED, MachineFile, Role, Skipped};
use crate::names::{DiskName, DomainName, RunId};
use crate::quiesce::application::Report;

/// How a backup, or a disk within it, came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Only what the dirty bitmap shows was read.
    Incremental,
    /// All was read, and what differs was stored.
    Rescan,
    /// All was read; nothing earlier was there.
    Full,
}

impl Kind {
    /// The field's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Incremental => "incremental",
            Self::Rescan => "rescan",
            Self::Full => "full",
        }
    }
}

/// What the disks of a backup agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Applications were asked to settle.
    Application,
    /// File systems were frozen.
    Filesystem,
    /// As after a power cut.
    Crash,
}

impl Consistency {
    /// The field's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Application => "application",
            Self::Filesystem => "filesystem",
            Self::Crash => "crash",
        }
    }
}

/// How the point in time was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Copy-before-write below the guest, and a dirty bitmap from one backup to the next.
    Bitmap,
    /// Copy-before-write below the guest, all disks read whole.
    Pull,
    /// The images, which held still while the guest wrote to overlays.
    Overlay,
    /// The images as they lay there: the guest did not run.
    Offline,
    /// The guest stood still while it was read.
    Suspend,
    /// The domain was shut down for it, and started again.
    Stop,
    /// Snapshots of LVM.
    Lvm,
}

impl Method {
    /// The field's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bitmap => "bitmap",
            Self::Pull => "pull",
            Self::Overlay => "overlay",
            Self::Offline => "offline",
            Self::Suspend => "suspend",
            Self::Stop => "stop",
            Self::Lvm => "lvm",
        }
    }
}

/// The record of one backup.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this record: 1.
    pub version: u32,
    /// The kvmsnap that wrote it.
    pub program: String,
    /// The run.
    pub run: RunId,
    /// The domain.
    pub domain: DomainName,
    /// Its uuid; all zero where QEMU was given none.
    pub uuid: String,
    /// The host that took it.
    pub host: String,
    /// The point in time.
    pub time: Timestamp,
    /// The least incremental kind among the disks.
    pub kind: Kind,
    /// How the point in time was taken.
    pub method: Method,
    /// What was made consistent before it.
    pub consistency: Consistency,
    /// The snapshot that unchanged chunks were inherited from.
    pub parent: Option<String>,
    /// How long the guest's file systems were frozen, in milliseconds.
    pub freeze_ms: Option<u64>,
    /// How long the guest's processors stood still, in milliseconds.
    pub pause_ms: Option<u64>,
    /// From the first command to the last chunk, in milliseconds.
    pub duration_ms: u64,
    /// The most bytes that the scratch took, where there was one and that was seen.
    #[serde(default)]
    pub bytes_scratch_peak: Option<u64>,
    /// The databases and hooks that were told of the point in time, and how they took it.
    #[serde(default)]
    pub applications: Vec<Report>,
    /// What the operator should know; the backup is good all the same.
    pub warnings: Vec<String>,
    /// The disks, by name.
    pub disks: Vec<DiskManifest>,
    /// What of the machine is not in the backup, and why.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
    /// The machine's files besides its disks.
    #[serde(default)]
    pub files: Vec<FileManifest>,
}

/// The record of a file beside the disks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileManifest {
    /// Its name in the snapshot.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Where it lay on the host, where it was a file there.
    pub source: Option<String>,
    /// Length in bytes.
    pub size: u64,
}

/// The record of one disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskManifest {
    /// The disk; its content is `<target>.raw`.
    pub target: DiskName,
    /// Size in bytes.
    pub size: u64,
    /// Length of a chunk in bytes; the last one may be shorter.
    pub chunk_size: u32,
    /// Format of the image on the host.
    pub format: String,
    /// The image on the host, where it is a file.
    pub image: Option<String>,
    /// How it was read.
    pub kind: Kind,
    /// Why it was read that way.
    pub reason: String,
    /// How its point in time was taken; older records say so only of all disks together.
    #[serde(default)]
    pub method: Option<Method>,
    /// The dirty bitmap that began at this point in time.
    pub bitmap: Option<String>,
    /// The overlay that began at this point in time, where overlays track what changes.
    #[serde(default)]
    pub overlay: Option<String>,
    /// Bytes that the dirty bitmap showed as changed; the size where there was none.
    pub bytes_changed: u64,
    /// Bytes read from the guest's image.
    pub bytes_read: u64,
    /// Bytes known to be zero without reading.
    pub bytes_zero: u64,
    /// Unchanged bytes that were read and compared, to audit the bitmap.
    pub bytes_audited: u64,
    /// Bytes added to the repository, compressed.
    pub bytes_stored: u64,
}

impl FileManifest {
    /// The record of a file.
    pub fn of(file: &MachineFile) -> Self {
        Self {
            name: file.name.clone(),
            role: file.role,
            source: file.source.clone(),
            size: file.content.len() as u64,
        }
    }
}

impl Manifest {
    /// The disks of the machine that are not in the backup.
    pub fn missing_disks(&self) -> Vec<&str> {
        let missing = self.skipped.iter().filter(|skipped| skipped.is_disk);
        missing.map(|skipped| skipped.device.as_str()).collect()
    }

    /// Whether it has all disks that it was to have.
    pub fn is_whole(&self) -> bool {
        let mut missing = self.skipped.iter().filter(|skipped| skipped.is_disk);
        missing.all(|skipped| skipped.reason == EXCLUDED)
    }

    /// The version that this program writes and the newest it reads.
    pub const VERSION: u32 = 1;
}
