//! What a folder with a machine's images says of itself.
//!
//! A template and an image made from one have the same shape: a folder with `image.json`, each disk as
//! `TARGET.qcow2`, and what else the machine needs to start (`domain.xml`, `nvram.fd`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::flavour::Flavour;

/// The name of the record in its folder.
pub const RECORD_NAME: &str = "image.json";
/// The version of the record that this code writes. It reads no other.
pub const RECORD_VERSION: u32 = 1;

/// The longest name of a file or folder of images, in bytes; leaves room for what is put around it while it
/// is made, within a file system's 255.
const NAME_LEN_MAX: usize = 200;
/// Hexadecimal digits of a SHA-256.
const SHA256_DIGITS: usize = 64;

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// It is no record.
    #[error("it is no record of images")]
    Json(#[from] serde_json::Error),
    /// Another program wrote it.
    #[error("its version is {version}, this program reads {RECORD_VERSION}")]
    Version {
        /// The version that it gives.
        version: u32,
    },
    /// It is longer than any record.
    #[error("it has {len} bytes, at most {max} are read")]
    TooLong {
        /// Its length in bytes.
        len: u64,
        /// What is allowed.
        max: u64,
    },
    /// It tells of no disk.
    #[error("it names no disk")]
    NoDisk,
    /// A name in it leads out of the folder, or is none.
    #[error("it names a file {name:?}, which is no plain name")]
    Name {
        /// The name.
        name: String,
    },
    /// Two entries have one name.
    #[error("it names {name:?} twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// Checksums that cannot be those of the file.
    #[error("its checksums of {file:?} do not fit {len} bytes")]
    Sums {
        /// The file.
        file: String,
        /// Its length by the record.
        len: u64,
    },
}

/// Whether a name is a single part of a path that says what it shows: no folder, no option, nothing hidden,
/// no control character or change of writing direction.
pub fn is_plain_name(name: &str) -> bool {
    let is_bad = |c: char| {
        let turns = matches!(c, '\u{200e}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        matches!(c, '/' | '\\') || turns || c.is_control()
    };
    let is_long = name.is_empty() || name.len() > NAME_LEN_MAX;
    !(is_long || name.starts_with(['.', '-']) || name.contains(is_bad))
}

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
    /// What the machine calls itself, where its guest agent told.
    #[serde(default)]
    pub host: Option<String>,
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
    /// Reads a record, and believes nothing in it that a reader could stumble over.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn parse(text: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        // First: a later version may have other fields.
        let Version { version } = serde_json::from_slice(text)?;
        if version != RECORD_VERSION {
            return Err(RecordError::Version { version });
        }
        let record: Self = serde_json::from_slice(text)?;
        record.check()?;
        Ok(record)
    }

    pub(crate) fn check(&self) -> Result<(), RecordError> {
        if self.disks.is_empty() {
            return Err(RecordError::NoDisk);
        }
        let (mut targets, mut files) = (BTreeSet::new(), BTreeSet::from([RECORD_NAME]));
        let targets = self.disks.iter().all(|disk| targets.insert(disk.target.as_str()));
        for name in self.file_names() {
            if !is_plain_name(name) {
                return Err(RecordError::Name { name: name.to_owned() });
            }
            if !files.insert(name) || !targets {
                return Err(RecordError::Twice { name: name.to_owned() });
            }
        }
        for disk in &self.disks {
            let FileSums { sha256, extent_len, crc32 } = &disk.sums;
            let extents = disk.file_len.checked_div(*extent_len);
            let extents = extents.map(|_| disk.file_len.div_ceil(*extent_len));
            let is_digest = |digest: &str| {
                digest.len() == SHA256_DIGITS && digest.bytes().all(|b| b.is_ascii_hexdigit())
            };
            if !is_digest(sha256) || extents != u64::try_from(crc32.len()).ok() {
                let (file, len) = (disk.file.clone(), disk.file_len);
                return Err(RecordError::Sums { file, len });
            }
        }
        Ok(())
    }

    /// The names of all files in the folder but the record itself.
    pub fn file_names(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().map(|disk| disk.file.as_str());
        disks.chain(self.files.iter().map(|file| file.file.as_str()))
    }

    /// The path of a disk's image.
    pub fn disk_path(&self, folder: &Path, disk: &DiskFile) -> PathBuf {
        folder.join(&disk.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ImageRecord {
        let sums = FileSums { sha256: "0".repeat(64), extent_len: 4, crc32: vec![1, 2, 3] };
        ImageRecord {
            version: RECORD_VERSION,
            machine: "web".into(),
            time: Timestamp::UNIX_EPOCH,
            origin: Origin::File("/a".into()),
            disks: vec![DiskFile {
                target: "vda".into(),
                file: "vda.qcow2".into(),
                size: 1 << 20,
                file_len: 9,
                sums,
            }],
            files: vec![OtherFile { file: "domain.xml".into(), sha256: "0".repeat(64) }],
            flavour: None,
            boot: None,
        }
    }

    fn read(record: &ImageRecord) -> Result<ImageRecord, RecordError> {
        ImageRecord::parse(&serde_json::to_vec(record).unwrap())
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        assert_eq!(read(&record()).unwrap(), record());
        let later = ImageRecord { version: 2, ..record() };
        assert!(matches!(read(&later), Err(RecordError::Version { version: 2 })));
    }

    #[test]
    fn s15_a_record_names_plain_files_of_its_own_folder() {
        let long = "x".repeat(201);
        for name in ["", ".", "..", "../vda", "/etc/passwd", "a/b", "-rf", ".hidden", "a\n", &long]
        {
            let mut bad = record();
            bad.files[0].file = name.to_owned();
            assert!(matches!(read(&bad), Err(RecordError::Name { .. })), "{name:?}");
        }
        for name in ["vda.qcow2", RECORD_NAME] {
            let mut bad = record();
            bad.files[0].file = name.to_owned();
            assert!(matches!(read(&bad), Err(RecordError::Twice { .. })), "{name:?}");
        }
    }

    #[test]
    fn s03_checksums_fit_the_file_that_they_are_of() {
        for (extent_len, count) in [(0, 3), (4, 2), (4, 4), (1, 8)] {
            let mut bad = record();
            bad.disks[0].sums.extent_len = extent_len;
            bad.disks[0].sums.crc32.resize(count, 0);
            assert!(matches!(read(&bad), Err(RecordError::Sums { .. })), "{extent_len} {count}");
        }
    }
}
