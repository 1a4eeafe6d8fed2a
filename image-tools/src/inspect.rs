//! A look at an image from outside before any tool opens it: what it may make a reader do.
//!
//! Its format is what somebody says, never a guess. Of a raw image nothing is read but its length; of a qcow2
//! one the header, by [`qcow2`]. All other formats are refused: what they may name was not looked into.

pub mod qcow2;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::copy::Bounds;
use crate::error::ImageError;
use qcow2::{Backing, Header};

/// The longest chain of images. Each is opened at once.
const CHAIN_LEN_MAX: usize = 16;
/// An image holds no more than so many times its length: zlib and zstd make no less of what does not vary.
const COMPRESSION_MAX: u64 = 4096;
/// Its copy is no longer than so many times its length: larger clusters compress a little better than ours.
const LONGER_MAX: u64 = 4;
/// What the tables of a copy need that do not depend on its data.
const TABLES_LEN: u64 = 4 << 20;

/// Why an image is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InspectError {
    /// The bytes end before the header does.
    #[error("its header is cut off")]
    Truncated,
    /// Another format, or none.
    #[error("it is no qcow2 image")]
    NotQcow2,
    /// A version that is not known.
    #[error("its version {version} is not known")]
    Version {
        /// The version.
        version: u32,
    },
    /// Clusters of a size that is not allowed.
    #[error("its clusters of 2^{bits} bytes are not allowed")]
    ClusterBits {
        /// Their size, as a power of 2.
        bits: u32,
    },
    /// A field that is larger than any honest one.
    #[error("its {field} is {value}, at most {max} is allowed")]
    TooLarge {
        /// The field.
        field: &'static str,
        /// What it says.
        value: u64,
        /// What is allowed.
        max: u64,
    },
    /// A table that is not in the file.
    #[error("its {table} of {len} bytes at {offset} is not in the file")]
    Outside {
        /// The table.
        table: &'static str,
        /// Where it should be.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The header's own length is wrong.
    #[error("its header cannot have {len} bytes")]
    HeaderLen {
        /// Its length by itself.
        len: u64,
    },
    /// The L1 table does not cover the disk.
    #[error("its L1 table of {entries} entries does not cover {size} bytes")]
    L1TooSmall {
        /// The disk's size in bytes.
        size: u64,
        /// The table's entries.
        entries: u64,
    },
    /// There is no refcount table.
    #[error("it has no refcount table")]
    NoRefcounts,
    /// It asks for what is not known.
    #[error("it has features that are not known: {bits:#x}")]
    UnknownFeatures {
        /// The incompatible feature bits.
        bits: u64,
    },
    /// QEMU has found it damaged.
    #[error("it is marked as corrupt")]
    Corrupt,
    /// Its data is in a file that it names.
    #[error("it keeps its data in another file, which it names itself")]
    ExternalData,
    /// A compression that is not known, or not declared.
    #[error("its compression {kind} is not known or not declared")]
    Compression {
        /// The kind by its header.
        kind: u8,
    },
    /// More header extensions than any writer makes.
    #[error("it has more than {max} header extensions")]
    TooManyExtensions {
        /// What is allowed.
        max: usize,
    },
    /// A name that is none.
    #[error("the name of its {what} cannot be used")]
    Name {
        /// What is named.
        what: &'static str,
    },
    /// Its content is encrypted.
    #[error("it is encrypted")]
    Encrypted,
    /// It needs another image beneath it.
    #[error("it names an image beneath it, {name:?}, which is not allowed")]
    Backing {
        /// The name that it gives.
        name: String,
    },
    /// The images beneath are too many, or lead back to themselves.
    #[error("more than {max} images lie beneath each other")]
    ChainTooLong {
        /// What is allowed.
        max: usize,
    },
    /// It is empty.
    #[error("it is empty")]
    Empty,
}

impl InspectError {
    /// What the user can do next.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Corrupt => {
                "QEMU has found its tables damaged: `qemu-img check` tells how much, a backup may be whole"
            }
            Self::ExternalData | Self::Backing { .. } => {
                "where you trust it: `qemu-img convert` makes one image of all, where it was made"
            }
            Self::Encrypted => "decrypt it first: nobody could look at or start it without its key",
            Self::NotQcow2 => "where it is a raw image: --format raw",
            _ => return None,
        })
    }
}

/// An image's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl Format {
    /// QEMU's name of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What an image from outside may ask for.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Folders in which images beneath it may lie; none unless given.
    pub backing_folders: Vec<PathBuf>,
    /// Whether its content may be encrypted.
    pub encryption: bool,
}

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Where it lies, absolute.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Whether it is a block device.
    pub is_device: bool,
}

/// An image that may be opened, by [`Self::graph`] and in no other way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// The images, from the top down.
    pub layers: Vec<Layer>,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes of all the files.
    pub stored: u64,
    /// The header of the top, where that is qcow2.
    pub header: Option<Header>,
}

impl Inspected {
    /// What a copy of it may take. Tables can show one piece of data as often as they like; an honest image's
    /// copy is hardly larger than the image.
    pub fn bounds(&self) -> Bounds {
        let data = self.stored.saturating_mul(COMPRESSION_MAX).min(self.size);
        let file_len = self.stored.saturating_mul(LONGER_MAX).saturating_add(TABLES_LEN);
        Bounds { data, file_len: file_len.min(Bounds::of_disk(self.size).file_len) }
    }

    /// The images as a read-only node of QEMU's block layer, in which nothing is left for QEMU to find out.
    pub fn graph(&self) -> Value {
        let node = |backing, layer: &Layer| {
            let driver = if layer.is_device { "host_device" } else { "file" };
            // A path that is no UTF-8 was refused.
            let file = json!({"driver": driver, "filename": layer.path.to_string_lossy()});
            let mut node =
                json!({"driver": layer.format.as_str(), "file": file, "read-only": true});
            if layer.format == Format::Qcow2 {
                node["backing"] = backing;
            }
            node
        };
        self.layers.iter().rev().fold(Value::Null, node)
    }
}

/// Looks at an image.
///
/// # Errors
/// [`ImageError::Refused`] with what is wrong with it, [`ImageError::File`], [`ImageError::NoFile`].
pub fn inspect(path: &Path, format: Format, policy: &Policy) -> Result<Inspected, ImageError> {
    let mut path = path.canonicalize().map_err(ImageError::file("find", path))?;
    let (mut layers, mut top) = (Vec::new(), None);
    let (mut format, mut stored) = (format, 0_u64);
    loop {
        let refused = |source| ImageError::Refused { path: path.clone(), source };
        if path.to_str().is_none() {
            return Err(ImageError::NotUtf8 { path });
        }
        let (file, len, is_device) = open(&path)?;
        if layers.len() == CHAIN_LEN_MAX {
            return Err(refused(InspectError::ChainTooLong { max: CHAIN_LEN_MAX }));
        }
        stored = stored.saturating_add(len);
        layers.push(Layer { path: path.clone(), format, is_device });
        let header = match format {
            Format::Raw if len == 0 => return Err(refused(InspectError::Empty)),
            Format::Raw => None,
            Format::Qcow2 => {
                let mut head = Vec::new();
                let read = file.take(qcow2::HEAD_LEN_MAX).read_to_end(&mut head);
                read.map_err(ImageError::file("read", &path))?;
                Some(qcow2::parse(&head, len).map_err(refused)?)
            }
        };
        if header.as_ref().is_some_and(|header| header.is_encrypted) && !policy.encryption {
            return Err(refused(InspectError::Encrypted));
        }
        let next = header.as_ref().and_then(|header| header.backing.as_ref());
        let next = next.map(|named| beneath(&path, named, policy).map_err(refused)).transpose()?;
        let size = header.as_ref().map_or(len, |header| header.size);
        let (size, header) = top.get_or_insert((size, header)).clone();
        match next {
            Some(next) => (path, format) = next,
            None => return Ok(Inspected { layers, size, stored, header }),
        }
    }
}

/// The image beneath, where a policy allows it.
fn beneath(
    above: &Path,
    named: &Backing,
    policy: &Policy,
) -> Result<(PathBuf, Format), InspectError> {
    let refused = || InspectError::Backing { name: named.name.clone() };
    // `json:`, `nbd:` and the like: QEMU takes for a protocol what is before a colon (path_has_protocol).
    if named.name.split('/').next().is_some_and(|first| first.contains(':')) {
        return Err(refused());
    }
    let format = match named.format.as_deref() {
        Some("raw") => Format::Raw,
        Some("qcow2") => Format::Qcow2,
        _ => return Err(refused()),
    };
    let path = above.parent().unwrap_or(Path::new("/")).join(&named.name);
    // Where links lead counts, not what they are called.
    let path = path.canonicalize().map_err(|_| refused())?;
    let is_in =
        |folder: &PathBuf| folder.canonicalize().is_ok_and(|folder| path.starts_with(folder));
    match policy.backing_folders.iter().any(is_in) {
        true => Ok((path, format)),
        false => Err(refused()),
    }
}

/// Opens a regular file or block device without waiting for anybody; tells its length, and whether it is a
/// device.
fn open(path: &Path) -> Result<(File, u64, bool), ImageError> {
    let mut options = File::options();
    let opened = options.read(true).custom_flags(nix::libc::O_NONBLOCK).open(path);
    let mut file = opened.map_err(ImageError::file("read", path))?;
    let metadata = file.metadata().map_err(ImageError::file("look at", path))?;
    if metadata.is_file() {
        return Ok((file, metadata.size(), false));
    }
    if !metadata.file_type().is_block_device() {
        return Err(ImageError::NoFile { path: path.to_owned() });
    }
    let len = file.seek(SeekFrom::End(0)).and_then(|len| file.rewind().map(|()| len));
    let len = len.map_err(ImageError::file("look at", path))?;
    Ok((file, len, true))
}

#[cfg(test)]
mod tests;
