//! How full an overlay is that stays between two backups, and the file system that it grows in: nobody else
//! looks after it meanwhile.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Serialize;

use super::record::DiskRecord;
use crate::capture::room::{BLOCK, room};
use crate::names::DiskName;
use crate::progress::human_bytes;

/// What to do about one of which too little is left.
pub const LOW: &str =
    "make room there, or `kvmsnap backup`: a guest whose overlay is full stands still";

/// How full an overlay is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fill {
    /// The disk.
    pub disk: DiskName,
    /// Its overlay.
    pub overlay: PathBuf,
    /// Bytes that it holds.
    pub holds: u64,
    /// Bytes that it can still grow by.
    pub left: u64,
    /// Whether that is too little: less than it holds already, or than is kept free on its file system.
    pub is_low: bool,
}

impl Fill {
    /// That of a disk's overlay; `None` where it is not there, or its file system has no bounds.
    pub fn of(disk: &DiskRecord) -> Option<Self> {
        let file = File::open(&disk.overlay).ok()?;
        let metadata = file.metadata().ok()?;
        let (free, kept) = room(&file)?;
        // What was reserved lies beyond its end.
        let (holds, taken) = (metadata.len(), metadata.blocks() * BLOCK);
        let left = free + taken.saturating_sub(holds);
        let is_low = left < kept.max(holds);
        Some(Self { disk: disk.disk.clone(), overlay: disk.overlay.clone(), holds, left, is_low })
    }

    /// Whether less is left than twice of what was written in the last interval.
    pub fn is_tight_after(&self, held: u64) -> bool {
        self.left < 2 * held
    }
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (holds, left) = (human_bytes(self.holds), human_bytes(self.left));
        write!(f, "the overlay of `{}` holds {holds}, {left} are left for it", self.disk)
    }
}
