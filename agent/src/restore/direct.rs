//! Writing an image past the page cache, into room that was reserved for it.
//!
//! The memory of the host is left to its guests, and nothing is copied on the way to the disk. Room first:
//! a direct write into a hole waits for all others to the file (ext4, XFS).

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};

use super::{RestoreError, Stop};
use crate::capture::room;

/// Place in the file, place in memory and length of a direct write are multiples of this: few disks have
/// longer blocks.
const BLOCK_LEN: usize = 4096;
/// Shorter zeros between data are written along, for each write is one of the disk: the length of a cluster of
/// QEMU's.
pub(super) const HOLE_LEN: usize = 64 << 10;

/// Shorter writes, of a disk that many backups have changed here and there, are left to the page cache, which
/// sorts and joins them.
const WRITE_LEN_MIN: u64 = 256 << 10;

/// The same file, written to directly.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// A direct write has failed: the page cache serves from then on.
    is_refused: AtomicBool,
    /// Room that turned out not to be needed.
    spare: Mutex<Vec<Range<u64>>>,
}

impl Direct {
    /// Reserves `room`, ranges of bytes of the file that read as zeros, for writes of `write_len` bytes in the mean.
    /// `None` where that would take what is kept for the images of guests, where the file system cannot do
    /// this or has no direct writes, and for writes so short that the page cache is faster.
    pub(super) fn open(file: &File, room: &[Range<u64>], write_len: u64) -> Option<Self> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut options = OpenOptions::new();
        let direct = options.write(true).custom_flags(nix::libc::O_DIRECT).open(path).ok()?;
        // What a killed restore has reserved must not count as taken.
        if file.metadata().ok()?.blocks() > 0 {
            give_back(file, room);
        }
        if write_len < WRITE_LEN_MIN {
            return None;
        }
        let (free, kept) = room::room(file)?;
        if room.iter().map(len).sum::<u64>().saturating_add(kept) > free {
            return None;
        }
        let reserve =
            |range: &Range<u64>| fallocate(file, FallocateFlags::empty(), range.start, len(range));
        if let Err(error) = room.iter().try_for_each(reserve) {
            tracing::debug!(%error, "no room can be reserved");
            give_back(file, room);
            return None;
        }
        Some(Self { file: direct, is_refused: AtomicBool::new(false), spare: Mutex::default() })
    }

    /// Writes `data` at `offset`; through the page cache of `file`, the same one, what is not aligned or is
    /// refused.
    pub(super) fn write_all_at(&self, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        let is_aligned = offset.is_multiple_of(BLOCK_LEN as u64)
            && data.as_ptr().addr().is_multiple_of(BLOCK_LEN);
        let blocks = match is_aligned && !self.is_refused.load(Ordering::Relaxed) {
            true => data.len() - data.len() % BLOCK_LEN,
            false => 0,
        };
        let (blocks, rest) = data.split_at(blocks);
        if let Err(error) = self.file.write_all_at(blocks, offset) {
            // Whether nothing can be written there, or only not like this, the next one tells.
            file.write_all_at(blocks, offset)?;
            tracing::debug!(%error, "a direct write was refused");
            self.is_refused.store(true, Ordering::Relaxed);
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
    pub(super) fn finish(self, stop: &Stop) -> Result<(), RestoreError> {
        let mut spare = self.spare.into_inner().unwrap_or_else(PoisonError::into_inner);
        spare.sort_unstable_by_key(|range| range.start);
        spare.dedup_by(|next, range| {
            let adjoins = range.end == next.start;
            range.end = if adjoins { next.end } else { range.end };
            adjoins
        });
        for range in spare.iter().filter(|range| len(range) >= HOLE_LEN as u64) {
            stop.check()?;
            give_back(&self.file, std::slice::from_ref(range));
        }
        Ok(())
    }
}

fn len(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// Makes holes of ranges of a file, which read as zeros either way.
fn give_back(file: &File, room: &[Range<u64>]) {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for range in room {
        let _ = fallocate(file, how, range.start, len(range));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const ROOM: u64 = 64 * BLOCK_LEN as u64;
    const ALL: [Range<u64>; 2] = [0..ROOM / 2, ROOM / 2..ROOM];

    /// An empty file that can be written to directly; without one a test is skipped aloud.
    fn file() -> Option<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(ROOM).unwrap();
        if Direct::open(&file, &[], WRITE_LEN_MIN).is_none() {
            // Past the test harness, which swallows what `eprintln!` says.
            io::stderr().write_all(b"SKIPPED: no direct writes here\n").unwrap();
            return None;
        }
        Some(file)
    }

    fn taken(file: &File) -> u64 {
        file.sync_all().unwrap();
        file.metadata().unwrap().blocks() * room::BLOCK
    }

    #[test]
    fn p1_what_is_not_aligned_is_written_all_the_same() {
        let Some(file) = file() else { return };
        let direct = Direct::open(&file, &ALL, WRITE_LEN_MIN).unwrap();
        let content: Vec<u8> = (0..8 * BLOCK_LEN).map(|at| (at % 251) as u8).collect();
        let mut expected = vec![0; ROOM as usize];
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

        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
        assert!(!direct.is_refused.into_inner());
    }

    #[test]
    fn r24_neighbouring_parts_that_are_not_needed_are_given_back_together() {
        let Some(file) = file() else { return };
        let direct = Direct::open(&file, &ALL, WRITE_LEN_MIN).unwrap();
        assert!(taken(&file) >= ROOM);
        let half = HOLE_LEN as u64 / 2;
        for part in [3 * half..4 * half, 0..half, 2 * half..3 * half] {
            direct.spare(part);
        }
        direct.finish(&Stop::default()).unwrap();
        assert_eq!(taken(&file), ROOM - 2 * half, "one is too short to matter");
    }

    #[test]
    fn r24_where_there_is_not_enough_room_none_is_taken() {
        let Some(file) = file() else { return };
        // What a killed restore has left, more than there is, and more than a file can have.
        fallocate(&file, FallocateFlags::empty(), 0, ROOM).unwrap();
        assert!(Direct::open(&file, &[0..ROOM, ROOM..1 << 60], WRITE_LEN_MIN).is_none());
        assert_eq!(taken(&file), 0);
        let beyond = i64::MAX as u64;
        assert!(Direct::open(&file, &[0..ROOM, beyond..beyond + 1], WRITE_LEN_MIN).is_none());
        assert_eq!(taken(&file), 0);
    }
}
