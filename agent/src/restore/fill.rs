//! The chunks of a disk into an image, by several threads at once: verified, sparse, and on their way to
//! the disk long before the last one is written.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::{io, thread};

use repository::DiskReader;
use rustix::fs::{Advice, fadvise};

use super::direct::{self, Direct};
use super::{RestoreError, Stop};
use crate::effect;
use crate::progress::Progress;

/// Zeros are looked for in blocks of this length.
pub(super) const BLOCK: usize = 4096;
/// What was written to the page cache is sent to the disk whenever there is so much of it.
const FLUSH_LEN: u64 = 64 << 20;

/// Threads for each processor: some wait for a disk or a repository while another one computes.
const THREADS_EACH: usize = 4;
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
    /// Threads that read, open and write; each holds a run of chunks, twice: 1 MiB, or one longer chunk.
    pub(super) fn threads() -> usize {
        let processors = thread::available_parallelism().map_or(2, usize::from);
        (THREADS_EACH * processors).min(THREADS_MAX)
    }

    /// Where in the image the chunks are that are `wanted` and not zero, neighbours as one.
    fn room(&self, wanted: impl Fn(usize) -> bool, place: impl Fn(u64) -> u64) -> Vec<Range<u64>> {
        let mut room: Vec<Range<u64>> = Vec::new();
        let chunks = 0..self.reader.content().len();
        for chunk in chunks.filter(|&chunk| wanted(chunk) && !self.reader.is_zero(chunk)) {
            let on_disk = self.reader.chunk_range(chunk);
            let start = place(on_disk.start);
            let end = start + (on_disk.end - on_disk.start);
            match room.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => room.push(start..end),
            }
        }
        room
    }

    /// Writes the chunks that are `wanted` and not zero, each to the offset in the image that `place`
    /// tells for its first byte. The image must read as zeros there. Tells `wrote` of each offset and
    /// length in the image that is no hole any more.
    pub(super) fn fill(
        &self,
        wanted: impl Fn(usize) -> bool,
        place: impl Fn(u64) -> u64 + Sync,
        wrote: impl Fn(u64, u64) + Sync,
    ) -> Result<(), RestoreError> {
        effect::about_to("restore: reserve room").map_err(|source| self.failed(source))?;
        let room = self.room(&wanted, &place);
        let sweep = self.reader.sweep(wanted)?;
        let direct = Direct::open(self.file, &room, sweep.run_len());
        let hole_len = if direct.is_some() { direct::HOLE_LEN } else { BLOCK };
        let written = AtomicU64::new(0);
        let (enough, flushes) = mpsc::sync_channel(1);
        thread::scope(|scope| {
            let flusher = scope.spawn(move || flushes.iter().try_for_each(|()| self.flush()));
            let filled = sweep.hand_out(Self::threads(), |chunks, content| {
                self.stop.check()?;
                // One for each chunk, though neighbours are written together.
                for _ in chunks.clone() {
                    let announced = effect::about_to("restore: write");
                    announced.map_err(|source| self.failed(source))?;
                }
                let start = place(self.reader.chunk_range(chunks.start).start);
                for (at, data) in data_parts(content, hole_len) {
                    let offset = start + at as u64;
                    let outcome = match &direct {
                        Some(direct) => direct.write_all_at(self.file, data, offset),
                        None => self.file.write_all_at(data, offset),
                    };
                    outcome.map_err(|source| self.failed(source))?;
                    wrote(offset, data.len() as u64);
                }
                if let Some(direct) = &direct {
                    let spare = zero_parts(content, hole_len);
                    spare.for_each(|part| direct.spare(start + part.start..start + part.end));
                }
                let len = content.len() as u64;
                self.progress.read(len);
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
        direct.map_or(Ok(()), |direct| direct.finish(self.stop))
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
    let zeros = move |at| content[at..].chunks(BLOCK).take_while(is_hole).map(<[u8]>::len).sum();
    let data = move |at: usize| {
        let blocks = content[at..].chunks(BLOCK).take_while(|block| !is_hole(block));
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

/// The parts of a chunk between, before and after those with data.
pub(super) fn zero_parts(content: &[u8], hole_len: usize) -> impl Iterator<Item = Range<u64>> {
    let end = std::iter::once((content.len(), &content[..0]));
    let mut last = 0;
    data_parts(content, hole_len).chain(end).filter_map(move |(at, data)| {
        let part = last..at as u64;
        last = (at + data.len()) as u64;
        (!part.is_empty()).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_are_left_out_whatever_the_length() {
        let mut content = vec![0; 5 * BLOCK + 10];
        assert_eq!(data_parts(&content, BLOCK).count(), 0);
        assert_eq!(data_parts(&[], BLOCK).count(), 0);
        content[BLOCK] = 1;
        content[3 * BLOCK - 1] = 1;
        content[5 * BLOCK + 9] = 1;
        let parts = |hole_len| -> Vec<_> {
            data_parts(&content, hole_len).map(|(at, data)| (at, data.len())).collect()
        };
        assert_eq!(parts(BLOCK), [(BLOCK, 2 * BLOCK), (5 * BLOCK, 10)]);
        assert_eq!(parts(2 * BLOCK), [(BLOCK, 2 * BLOCK), (5 * BLOCK, 10)]);
        assert_eq!(parts(2 * BLOCK + 1), [(BLOCK, 4 * BLOCK + 10)]);
        let block = BLOCK as u64;
        let zeros = |hole_len| zero_parts(&content, hole_len).collect::<Vec<_>>();
        assert_eq!(zeros(BLOCK), [0..block, 3 * block..5 * block]);
        assert!(zeros(2 * BLOCK + 1).into_iter().eq(std::iter::once(0..block)));
        assert_eq!(zero_parts(&content[..5 * BLOCK], BLOCK).last(), Some(3 * block..5 * block));
    }
}
