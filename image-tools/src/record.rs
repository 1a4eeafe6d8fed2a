//! What a folder with a machine's images says of itself.
//!
//! A template and an image made from one have the same shape: a folder with `image.json`, each disk as
//! `TARGET.qcow2`, and what else the machine needs to start (`domain.xml`, `nvram.fd`).

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::flavour::Flavour;

/// The name of the record in its folder.
pub const RECORD_NAME: &str = "image.json";
/// The version of the record that this code writes. It reads no other.
pub const RECORD_VERSION: u32 = 1;

/// One machine's images in a folder. Written last: a folder without it is no image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// What the machine is called.
    pub machine: String,
    /// When the images showed the machine as it was.
    pub time: Timestamp,
    /// Where they come from.
    pub origin: Origin,
    /// The disks; the first is the one that the machine starts from.
    pub disks: Vec<DiskFile>,
    /// Other files of the machine, by their names in the folder, each with its SHA-256.
    pub files: Vec<OtherFile>,
    /// What is on the disks, where an appliance has looked.
    pub flavour: Option<Flavour>,
    /// How the last trial start ended, where there was one.
    #[serde(default)]
    pub boot: Option<BootTrial>,
}

/// Where images come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A libvirt domain, by its uuid.
    Domain(String),
    /// A snapshot in a repository, by its id.
    Snapshot(String),
    /// An image file that somebody else made.
    File(PathBuf),
    /// Another folder like this one, and the file tree that it was made equal to.
    Update {
        /// The folder of the template.
        template: PathBuf,
        /// The tree, as it was named.
        tree: String,
    },
}

/// One disk's image in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFile {
    /// The disk's name, like `vda`.
    pub target: String,
    /// The image's name in the folder; always qcow2, without a backing file.
    pub file: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Bytes of the file, from its first to its last.
    pub file_len: u64,
    /// Checksums of the file, where they were made.
    pub sums: FileSums,
}

/// The checksums of one file: one for all of it, and small ones that tell where it is damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSums {
    /// SHA-256 of the whole file, in hexadecimal.
    pub sha256: String,
    /// Bytes that each of `crc32` covers; the last one covers what is left.
    pub extent_len: u64,
    /// CRC-32 (IEEE) of each extent.
    pub crc32: Vec<u32>,
}

/// A file that is no disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherFile {
    /// Its name in the folder.
    pub file: String,
    /// SHA-256 of it, in hexadecimal.
    pub sha256: String,
}

/// A start of an image in a throw-away QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootTrial {
    /// When.
    pub time: Timestamp,
    /// What showed that the machine is up, or `None` where nothing did within the deadline.
    pub sign: Option<BootSign>,
    /// Milliseconds until then.
    pub elapsed_ms: u64,
}

/// What shows that a machine is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootSign {
    /// Its guest agent answered.
    Agent,
    /// Its serial console asked for a login.
    Login,
}

impl ImageRecord {
    /// The path of a disk's image.
    pub fn disk_path(&self, folder: &Path, disk: &DiskFile) -> PathBuf {
        folder.join(&disk.file)
    }
}
