//! Writing an image past the page cache, into room that was reserved for it.
//!
//! The memory of the host is left to its guests, and nothing is copied on the way to the disk. Room first:
//! a direct write into a hole waits for all others to the file (ext4, XFS).

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

/// Place in the file, place in memory and length of a direct write are multiples of this: no disk has longer
/// blocks.
const BLOCK_LEN: usize = 4096;

/// The same file, written to directly.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// Room that turned out not to be needed.
    spare: Mutex<Vec<Range<u64>>>,
}

impl Direct {
    /// Reserves `room`, ranges of bytes of the file. `None` where there is not enough of it, or the file system
    /// cannot do this, or has no direct writes: the page cache serves for all.
    pub(super) fn open(file: &File, room: &[Range<u64>]) -> Option<Self> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut options = OpenOptions::new();
        let direct = options.write(true).custom_flags(nix::libc::O_DIRECT).open(path).ok()?;
        let free = fstatvfs(file).map(|told| told.f_bavail.saturating_mul(told.f_frsize)).ok()?;
        // What a killed restore has left takes up some of it already; that much room is asked for in vain.
        let len = |range: &Range<u64>| range.end - range.start;
        if room.iter().map(len).sum::<u64>() > free {
            return None;
        }
        let reserve =
            |range: &Range<u64>| fallocate(file, FallocateFlags::empty(), range.start, len(range));
        let reserved = room.iter().filter(|range| !range.is_empty()).try_for_each(reserve);
        reserved.ok()?;
        Some(Self { file: direct, spare: Mutex::default() })
    }

    /// Writes `data` at `offset`; what is not aligned goes through the page cache of `file`, the same one.
    pub(super) fn write_all_at(&self, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        let is_aligned = offset.is_multiple_of(BLOCK_LEN as u64)
            && data.as_ptr().addr().is_multiple_of(BLOCK_LEN);
        let blocks = if is_aligned { data.len() - data.len() % BLOCK_LEN } else { 0 };
        let (blocks, rest) = data.split_at(blocks);
        match self.file.write_all_at(blocks, offset) {
            // A disk with longer blocks after all.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                file.write_all_at(blocks, offset)?;
            }
            written => written?,
        }
        file.write_all_at(rest, offset + blocks.len() as u64)
    }

    /// A part of the reserved room stays zero.
    pub(super) fn spare(&self, range: Range<u64>) {
        if !range.is_empty() {
            self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(range);
        }
    }

    /// Gives back the room that was not needed. Only now: it waits for all that is being written.
    pub(super) fn finish(self) {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for range in self.spare.into_inner().unwrap_or_else(PoisonError::into_inner) {
            // It reads as zeros either way.
            let _ = fallocate(&self.file, how, range.start, range.end - range.start);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn p2_what_is_not_aligned_is_written_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        let len = 64 * BLOCK_LEN as u64;
        file.set_len(len).unwrap();
        let Some(direct) = Direct::open(&file, &[0..len]) else {
            eprintln!("SKIPPED: no direct writes in {}", folder.path().display());
            return;
        };
        let content: Vec<u8> = (0..8 * BLOCK_LEN).map(|at| (at % 251) as u8).collect();
        let mut expected = vec![0; len as usize];
        let aligned = content.as_ptr().addr().next_multiple_of(BLOCK_LEN) - content.as_ptr().addr();
        for (start, len, offset) in [
            (aligned, 4 * BLOCK_LEN, 0),
            (aligned, BLOCK_LEN + 100, 8 * BLOCK_LEN),
            (aligned + 1, 2 * BLOCK_LEN, 16 * BLOCK_LEN),
            (aligned, 2 * BLOCK_LEN, 24 * BLOCK_LEN + 512),
            (aligned, 0, 30 * BLOCK_LEN),
        ] {
            let data = &content[start..start + len];
            direct.write_all_at(&file, data, offset as u64).unwrap();
            expected[offset..offset + len].copy_from_slice(data);
        }
        let rest = 32 * BLOCK_LEN as u64..len;
        let before = file.metadata().unwrap().blocks();
        direct.spare(rest.clone());
        direct.finish();

        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found, expected);
        let freed = before - file.metadata().unwrap().blocks();
        assert!(freed * 512 >= rest.end - rest.start, "{freed} sectors were given back");
    }

    #[test]
    fn r24_where_there_is_not_enough_room_none_is_taken() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 60).unwrap_or_else(|_| file.set_len(1 << 40).unwrap());

        assert!(Direct::open(&file, &[0..4096, 8192..1 << 59]).is_none());

        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }
}
