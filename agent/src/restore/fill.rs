//! The chunks of a disk into an image, by several threads at once: verified, sparse, and on their way to
//! the disk long before the last one is written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::{io, thread};

use repository::DiskReader;
use rustix::fs::{Advice, fadvise};

use super::{RestoreError, Stop};
use crate::effect;
use crate::progress::Progress;

/// Zeros of this length and alignment stay holes.
const HOLE: usize = 4096;
/// Written data is sent to the disk whenever there is so much of it.
const FLUSH_LEN: u64 = 64 << 20;

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
        thread::available_parallelism().map_or(2, Into::into).min(THREADS_MAX)
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
                for (at, data) in data_parts(content) {
                    let offset = start + at as u64;
                    let outcome = self.file.write_all_at(data, offset);
                    outcome.map_err(|source| self.failed(source))?;
                    wrote(offset, data.len() as u64);
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
        })
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

/// The parts of a chunk that are not zero, and where in it they begin.
pub(super) fn data_parts(content: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let is_hole = |block: &&[u8]| block.iter().all(|&byte| byte == 0);
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = &content[at..];
        at += rest.chunks(HOLE).take_while(is_hole).map(<[u8]>::len).sum::<usize>();
        let (start, rest) = (at, &content[at..]);
        at += rest.chunks(HOLE).take_while(|block| !is_hole(block)).map(<[u8]>::len).sum::<usize>();
        (at > start).then(|| (start, &content[start..at]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_are_left_out_whatever_the_length() {
        let mut content = vec![0; 5 * HOLE + 10];
        assert_eq!(data_parts(&content).count(), 0);
        assert_eq!(data_parts(&[]).count(), 0);
        content[HOLE] = 1;
        content[3 * HOLE - 1] = 1;
        content[5 * HOLE + 9] = 1;
        let parts: Vec<_> = data_parts(&content).map(|(at, data)| (at, data.len())).collect();
        assert_eq!(parts, [(HOLE, 2 * HOLE), (5 * HOLE, 10)]);
    }
}
