//! The fingerprint of a machine's disks: which machines can be put on which template.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

/// How a machine starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootMode {
    /// BIOS: code in the first sector of the first disk.
    Bios,
    /// UEFI: a program in the EFI system partition.
    Uefi,
}

impl Display for BootMode {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bios => "BIOS",
            Self::Uefi => "UEFI",
        })
    }
}

/// The layout of a machine's disks. Equal flavours take each other's files; names and UUIDs that differ
/// from machine to machine are no part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flavour {
    /// How the machine starts.
    pub boot: BootMode,
    /// The disks, in their order.
    pub disks: Vec<DiskLayout>,
    /// LVM volume groups, by name.
    pub volume_groups: Vec<VolumeGroup>,
    /// File systems and swap, by the device that holds them: once for each place where it is mounted.
    pub file_systems: Vec<FileSystem>,
}

/// One disk's size and partition table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLayout {
    /// Bytes.
    pub size: u64,
    /// `gpt`, `msdos`, or `None` where it has no partition table.
    pub table: Option<String>,
    /// Its partitions, in the order of the table.
    pub partitions: Vec<Partition>,
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// Its number in the table, from 1.
    pub number: u32,
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What it is for: a GPT type GUID, or the MBR id in hexadecimal.
    pub kind: String,
}

/// One LVM volume group and its volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeGroup {
    /// Its name.
    pub name: String,
    /// Its volumes by name, with their bytes.
    pub volumes: Vec<(String, u64)>,
}

/// One file system, or swap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// The device inside the machine's appliance, like `/dev/sda1` or `/dev/vg/root`.
    pub device: String,
    /// `ext4`, `xfs`, `btrfs`, `vfat`, `swap`, or another name that `blkid` gives.
    pub kind: String,
    /// Where the machine's own table mounts it, `swap` for swap.
    #[serde(default)]
    pub mount: Option<String>,
}
