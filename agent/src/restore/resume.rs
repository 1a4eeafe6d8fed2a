//! What a killed restore has written of an image is used again, as far as its digests prove it.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use repository::BlobId;

use super::RestoreError;
use super::direct::HOLE_LEN;
use super::fill::{BLOCK, Target, data_parts, zero_parts};

/// What is written where no hole can be made.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The chunks that an image holds already; `None` where there was no image.
pub(super) struct There(Option<Vec<AtomicBool>>);

impl There {
    /// Whether there was no image.
    pub(super) fn is_new(&self) -> bool {
        self.0.is_none()
    }

    /// Whether it holds this chunk.
    pub(super) fn has(&self, chunk: usize) -> bool {
        let has = self.0.as_ref().and_then(|has| has.get(chunk));
        has.is_some_and(|has| has.load(Ordering::Relaxed))
    }
}

/// Finds the chunks that are in the file, each at the byte that `place` tells; all else at these places
/// becomes zero, and chunks without one are not looked for. The file gets a length of `len` bytes. Tells
/// `wrote` of what is there, as [`Target::fill`] does of what it writes.
pub(super) fn take_up(
    target: &Target<'_>,
    len: u64,
    place: impl Fn(usize) -> Option<u64> + Sync,
    wrote: impl Fn(u64, u64) + Sync,
) -> Result<There, RestoreError> {
    let is_new = target.file.metadata().is_ok_and(|metadata| metadata.len() == 0);
    let set_len = |len| target.file.set_len(len).map_err(|source| target.failed(source));
    set_len(len)?;
    if is_new {
        return Ok(There(None));
    }
    match look(target, place, wrote) {
        Err(RestoreError::Interrupted) => Err(RestoreError::Interrupted),
        Err(error) => {
            tracing::warn!(%error, "what is there cannot be used; starting anew");
            set_len(0)?;
            set_len(len)?;
            Ok(There(None))
        }
        there => there,
    }
}

/// Makes a part of the image zero.
pub(super) fn clear(target: &Target<'_>, part: Range<u64>) -> Result<(), RestoreError> {
    if part.is_empty() {
        return Ok(());
    }
    let end = part.end;
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    // A file has at most 2^63 bytes.
    let punched = fallocate(target.file, how, part.start as i64, (part.end - part.start) as i64);
    let cleared = match punched {
        // Not every file system can.
        Err(Errno::EOPNOTSUPP) => part.step_by(ZEROS.len()).try_for_each(|at| {
            let len = (end - at).min(ZEROS.len() as u64) as usize;
            target.file.write_all_at(&ZEROS[..len], at)
        }),
        punched => punched.map_err(io::Error::from),
    };
    cleared.map_err(|source| target.failed(source))
}

fn look(
    target: &Target<'_>,
    place: impl Fn(usize) -> Option<u64> + Sync,
    wrote: impl Fn(u64, u64) + Sync,
) -> Result<There, RestoreError> {
    let has: Vec<_> = target.reader.content().iter().map(|_| AtomicBool::new(false)).collect();
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        let mut buffer = Vec::new();
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            let Some(has) = has.get(chunk) else { return };
            let Some(start) = place(chunk) else { continue };
            match is_there(target, chunk, start, &mut buffer) {
                Ok(false) => {}
                Ok(true) => {
                    has.store(true, Ordering::Relaxed);
                    for (at, data) in data_parts(&buffer, BLOCK) {
                        wrote(start + at as u64, data.len() as u64);
                    }
                }
                Err(error) => {
                    next.store(usize::MAX / 2, Ordering::Relaxed);
                    failure.lock().expect("no panic while locked").get_or_insert(error);
                    return;
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..Target::threads() {
            scope.spawn(work);
        }
    });
    match failure.into_inner().expect("no panic while locked") {
        Some(error) => Err(error),
        None => Ok(There(Some(has))),
    }
}

/// Whether the file holds this chunk at `start`, and then in the buffer too; what it holds in its place
/// becomes zero.
fn is_there(
    target: &Target<'_>,
    chunk: usize,
    start: u64,
    buffer: &mut Vec<u8>,
) -> Result<bool, RestoreError> {
    target.stop.check()?;
    let range = target.reader.chunk_range(chunk);
    let len = range.end - range.start;
    let has_data = has_data_before(target, start, start + len);
    if !has_data.map_err(|source| target.failed(source))? {
        return Ok(false);
    }
    if !target.reader.is_zero(chunk) {
        buffer.resize(len as usize, 0);
        let read = target.file.read_exact_at(buffer, start);
        read.map_err(|source| target.failed(source))?;
        if BlobId::of(buffer) == target.reader.content()[chunk] {
            // Room that was reserved for it, and is not needed.
            for part in zero_parts(buffer, HOLE_LEN) {
                clear(target, start + part.start..start + part.end)?;
            }
            target.progress.read(len);
            return Ok(true);
        }
    }
    clear(target, start..start + len)?;
    Ok(false)
}

fn has_data_before(target: &Target<'_>, start: u64, end: u64) -> io::Result<bool> {
    // The position in the file, which this moves, is used by nobody.
    match lseek(target.file.as_fd(), start as i64, Whence::SeekData) {
        Ok(data) => Ok((data as u64) < end),
        Err(Errno::ENXIO) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
