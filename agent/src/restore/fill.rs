//! The chunks of a disk into an image, by several threads at once: verified, sparse, and on their way to
//! the disk long before the last one is written.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::{io, thread};

use repository::{DiskReader, ExtentKind};
use rustix::fs::{Advice, fadvise};

use super::direct::Direct;
use super::{RestoreError, Stop};
use crate::effect;
use crate::progress::Progress;

/// Zeros of this length and alignment stay holes.
pub(super) const HOLE: usize = 4096;
/// Where each write is one of the disk, shorter ones of zeros are written along: a cluster of QEMU's.
const HOLE_DIRECT: usize = 64 << 10;
/// What was written to the page cache is sent to the disk whenever there is so much of it.
const FLUSH_LEN: u64 = 64 << 20;

/// Threads for each processor: one waits for a disk or a repository while another one computes.
const THREADS_EACH: usize = 2;
/// More threads would only take memory.
const THREADS_MAX: usize = 16;

/// A disk and the file it is written to.
pub(super) struct Target<'a> {
    /// The image.
    pub(super) file: &'a File,
    /// Its final name, for messages.
    pub(super) path: &'a Path,
    /// The disk.
    pub(super) reader: &'a DiskReader,
    /// Who is told how far it is.
    pub(super) progress: &'a Progress,
    /// Who may end it.
    pub(super) stop: &'a Stop,
}

impl Target<'_> {
    /// Threads that read, open and write; each holds a few MiB.
    pub(super) fn threads() -> usize {
        let processors = thread::available_parallelism().map_or(2, usize::from);
        (THREADS_EACH * processors).min(THREADS_MAX)
    }

    /// The parts of the disk that are not known to be zero.
    pub(super) fn data(&self) -> Result<impl Iterator<Item = Range<u64>>, RestoreError> {
        let extents = self.reader.extents(0, self.reader.size())?.into_iter();
        let data = extents.filter(|extent| extent.kind == ExtentKind::Data);
        Ok(data.map(|extent| extent.offset..extent.offset + extent.len))
    }

    /// Writes the chunks that are `wanted` and not zero, each to the offset in the image that `place`
    /// tells for its first byte; all of them are within `room`. The image must read as zeros there. Tells
    /// `wrote` of each offset and length in the image that is no hole any more.
    pub(super) fn fill(
        &self,
        room: &[Range<u64>],
        wanted: impl Fn(usize) -> bool,
        place: impl Fn(u64) -> u64 + Sync,
        wrote: impl Fn(u64, u64) + Sync,
    ) -> Result<(), RestoreError> {
        effect::about_to("restore: reserve room").map_err(|source| self.failed(source))?;
        let direct = Direct::open(self.file, room);
        let hole_len = if direct.is_some() { HOLE_DIRECT } else { HOLE };
        let written = AtomicU64::new(0);
        let (enough, flushes) = mpsc::sync_channel(1);
        thread::scope(|scope| {
            let flusher = scope.spawn(move || flushes.iter().try_for_each(|()| self.flush()));
            let filled = self.reader.sweep(Self::threads(), wanted, |chunks, content| {
                self.stop.check()?;
                // One for each chunk, though neighbours are written together.
                for _ in chunks.clone() {
                    let announced = effect::about_to("restore: write");
                    announced.map_err(|source| self.failed(source))?;
                }
                let start = place(self.reader.chunk_range(chunks.start).start);
                let (len, mut end) = (content.len() as u64, start);
                for (at, data) in data_parts(content, hole_len) {
                    let offset = start + at as u64;
                    let outcome = match &direct {
                        Some(direct) => direct.write_all_at(self.file, data, offset),
                        None => self.file.write_all_at(data, offset),
                    };
                    outcome.map_err(|source| self.failed(source))?;
                    wrote(offset, data.len() as u64);
                    direct.iter().for_each(|direct| direct.spare(end..offset));
                    end = offset + data.len() as u64;
                }
                self.progress.read(len);
                if let Some(direct) = &direct {
                    direct.spare(end..start + len);
                    return Ok(());
                }
                let before = written.fetch_add(len, Ordering::Relaxed);
                if before / FLUSH_LEN != (before + len) / FLUSH_LEN {
                    // Where one is waiting already, it will flush this too.
                    let _ = enough.try_send(());
                }
                Ok(())
            });
            drop(enough);
            let flushed = flusher.join().expect("it does not panic");
            filled.and(flushed.map_err(|source| self.failed(source)))
        })?;
        if let Some(direct) = direct {
            direct.finish();
        }
        Ok(())
    }

    /// Sends what was written to the disk, and gives the memory that it took back: the guests of this host
    /// need it more.
    fn flush(&self) -> io::Result<()> {
        // An error here is one of a write, and is told again by nobody.
        self.file.sync_data()?;
        // A hint.
        let _ = fadvise(self.file, 0, None, Advice::DontNeed);
        Ok(())
    }

    /// The image cannot be written.
    pub(super) fn failed(&self, source: io::Error) -> RestoreError {
        RestoreError::Write { path: self.path.to_owned(), source }
    }
}

/// The parts of a chunk that are not zero, and where in it they begin. Zeros between them belong to them
/// where there are fewer than `hole_len`.
pub(super) fn data_parts(content: &[u8], hole_len: usize) -> impl Iterator<Item = (usize, &[u8])> {
    let is_hole = |block: &&[u8]| block.iter().all(|&byte| byte == 0);
    let zeros = move |at| content[at..].chunks(HOLE).take_while(is_hole).map(<[u8]>::len).sum();
    let data = move |at: usize| {
        let blocks = content[at..].chunks(HOLE).take_while(|block| !is_hole(block));
        at + blocks.map(<[u8]>::len).sum::<usize>()
    };
    let mut at = zeros(0);
    std::iter::from_fn(move || {
        let (start, mut end) = (at, data(at));
        at = end + zeros(end);
        while at < content.len() && at - end < hole_len {
            end = data(at);
            at = end + zeros(end);
        }
        (end > start).then(|| (start, &content[start..end]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_are_left_out_whatever_the_length() {
        let mut content = vec![0; 5 * HOLE + 10];
        assert_eq!(data_parts(&content, HOLE).count(), 0);
        assert_eq!(data_parts(&[], HOLE).count(), 0);
        content[HOLE] = 1;
        content[3 * HOLE - 1] = 1;
        content[5 * HOLE + 9] = 1;
        let parts = |hole_len| -> Vec<_> {
            data_parts(&content, hole_len).map(|(at, data)| (at, data.len())).collect()
        };
        assert_eq!(parts(HOLE), [(HOLE, 2 * HOLE), (5 * HOLE, 10)]);
        assert_eq!(parts(2 * HOLE), [(HOLE, 2 * HOLE), (5 * HOLE, 10)]);
        assert_eq!(parts(2 * HOLE + 1), [(HOLE, 4 * HOLE + 10)]);
    }
}
