//! A sparse raw image, written by several threads at once.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use repository::{DiskReader, RepositoryError};

use super::{RestoreError, Stop};
use crate::progress::Progress;

/// Zeros of this length and alignment stay holes.
const HOLE: usize = 4096;

/// Why the image could not be written.
pub(super) enum RawError {
    Read(RepositoryError),
    Write(io::Error),
    Stopped,
}

impl RawError {
    pub(super) fn at(self, path: &Path) -> RestoreError {
        match self {
            Self::Read(error) => RestoreError::Repository(error),
            Self::Write(source) => RestoreError::Write { path: path.to_owned(), source },
            Self::Stopped => RestoreError::Interrupted,
        }
    }
}

/// Writes a disk to an empty file.
pub(super) fn write(
    file: &File,
    reader: &DiskReader,
    progress: &Progress,
    stop: &Stop,
) -> Result<(), RawError> {
    file.set_len(reader.size()).map_err(RawError::Write)?;
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<RawError>> = Mutex::new(None);
    let threads = std::thread::available_parallelism().map_or(2, Into::into);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buffer = Vec::new();
                loop {
                    let chunk = next.fetch_add(1, Ordering::Relaxed);
                    if chunk >= reader.content().len() {
                        return;
                    }
                    if reader.is_zero(chunk) {
                        continue;
                    }
                    let written = write_chunk(file, reader, chunk, &mut buffer, stop);
                    match written {
                        Ok(bytes) => progress.read(bytes),
                        Err(error) => {
                            // The other threads end with this one; the first failure is told.
                            next.store(reader.content().len(), Ordering::Relaxed);
                            failure.lock().expect("no panic while locked").get_or_insert(error);
                            return;
                        }
                    }
                }
            });
        }
    });
    match failure.into_inner().expect("no panic while locked") {
        Some(error) => Err(error),
        None => file.sync_all().map_err(RawError::Write),
    }
}

fn write_chunk(
    file: &File,
    reader: &DiskReader,
    chunk: usize,
    buffer: &mut Vec<u8>,
    stop: &Stop,
) -> Result<u64, RawError> {
    stop.check().map_err(|_| RawError::Stopped)?;
    let range = reader.chunk_range(chunk);
    buffer.resize((range.end - range.start) as usize, 0);
    reader.read_at(range.start, buffer).map_err(RawError::Read)?;
    let mut at = 0;
    while at < buffer.len() {
        let is_hole = |block: &[u8]| block.iter().all(|&byte| byte == 0);
        let blocks = buffer[at..].chunks(HOLE);
        let holes = blocks.clone().take_while(|block| is_hole(block)).map(<[u8]>::len);
        at += holes.sum::<usize>();
        let data = buffer[at..].chunks(HOLE).take_while(|block| !is_hole(block)).map(<[u8]>::len);
        let len: usize = data.sum();
        if len > 0 {
            let data = &buffer[at..at + len];
            file.write_all_at(data, range.start + at as u64).map_err(RawError::Write)?;
        }
        at += len;
    }
    Ok(range.end - range.start)
}
