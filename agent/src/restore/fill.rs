//! The chunks of a disk into an image, by several threads at once: verified, sparse, and on their way to
//! the disk long before the last one is written.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::{io, thread};

use repository::DiskReader;

use super::{RestoreError, Stop};
use crate::effect;
use crate::progress::Progress;

/// Zeros of this length and alignment stay holes.
const HOLE: usize = 4096;
/// Written data is sent to the disk whenever there is so much of it.
const FLUSH_LEN: u64 = 64 << 20;

/// What is written past the page cache at once, at least: for less the way to the disk takes longer than the copy.
const DIRECT_LEN_MIN: usize = 512 << 10;

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
    /// Threads that read, open and write; each holds a few MiB. More than there are processors, for a thread
    /// that writes past the page cache waits for the disk.
    pub(super) fn threads() -> usize {
        let processors: usize = thread::available_parallelism().map_or(2, Into::into);
        (2 * processors).min(THREADS_MAX)
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
        let direct = Direct::beside(self.file);
        let (enough, flushes) = mpsc::sync_channel(1);
        thread::scope(|scope| {
            let flusher = scope.spawn(move || {
                // An error here is one of a write, and is told again by nobody.
                flushes.iter().try_for_each(|()| self.file.sync_data())
            });
            let filled = self.reader.sweep(Self::threads(), wanted, |chunks, content| {
                self.stop.check()?;
                // One for each chunk, though neighbours are written together.
                for _ in chunks.clone() {
                    let announced = effect::about_to("restore: write");
                    announced.map_err(|source| self.failed(source))?;
                }
                let start = place(self.reader.chunk_range(chunks.start).start);
                let mut cached = 0;
                for (at, data) in data_parts(content) {
                    let offset = start + at as u64;
                    if !direct.write(data, offset).map_err(|source| self.failed(source))? {
                        let outcome = self.file.write_all_at(data, offset);
                        outcome.map_err(|source| self.failed(source))?;
                        cached += data.len() as u64;
                    }
                    wrote(offset, data.len() as u64);
                }
                self.progress.read(content.len() as u64);
                let before = written.fetch_add(cached, Ordering::Relaxed);
                if before / FLUSH_LEN != (before + cached) / FLUSH_LEN {
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

    /// The image cannot be written.
    pub(super) fn failed(&self, source: io::Error) -> RestoreError {
        RestoreError::Write { path: self.path.to_owned(), source }
    }
}

/// The same file, written to past the page cache: what is restored is not read again before long, and would
/// push out what the host's guests need. Copying it there takes longer than writing it, too.
struct Direct {
    file: Option<File>,
    /// Whether the file system has refused it.
    refused: AtomicBool,
}

impl Direct {
    fn beside(file: &File) -> Self {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(nix::libc::O_DIRECT);
        let file = options.open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        // Not every file system can, such as a tmpfs.
        Self { file: file.ok(), refused: AtomicBool::new(false) }
    }

    /// Writes what is long enough and lies in whole pages; tells whether it did. No other page may be the
    /// same: what was written through the cache must not be dirty around it.
    fn write(&self, data: &[u8], offset: u64) -> io::Result<bool> {
        let Some(file) = &self.file else { return Ok(false) };
        let is_aligned = data.as_ptr().addr().is_multiple_of(DiskReader::ALIGNMENT)
            && data.len().is_multiple_of(DiskReader::ALIGNMENT)
            && offset.is_multiple_of(DiskReader::ALIGNMENT as u64);
        if data.len() < DIRECT_LEN_MIN || !is_aligned || self.refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match file.write_all_at(data, offset) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {
                self.refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            written => written.map(|()| true),
        }
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
