//! A sparse raw image; what a killed restore has written of it is used again.

use std::io;
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
use super::fill::Target;

/// Writes a disk to a file that is new or holds a part of it already.
pub(super) fn write(target: &Target<'_>) -> Result<(), RestoreError> {
    let is_new = target.file.metadata().is_ok_and(|metadata| metadata.len() == 0);
    let has = match is_new {
        true => Ok(Vec::new()),
        false => chunks_there(target),
    };
    let has = match has {
        Ok(has) => has,
        Err(RestoreError::Interrupted) => return Err(RestoreError::Interrupted),
        Err(error) => {
            tracing::warn!(%error, "what is there cannot be used; starting anew");
            target.file.set_len(0).map_err(|source| target.failed(source))?;
            Vec::new()
        }
    };
    target.file.set_len(target.reader.size()).map_err(|source| target.failed(source))?;
    let is_there = |chunk: usize| has.get(chunk).is_some_and(|has| has.load(Ordering::Relaxed));
    target.fill(|chunk| !is_there(chunk), |offset| offset, |_, _| ())
}

/// Which chunks the file holds already, by their digests. All else in it becomes zero.
fn chunks_there(target: &Target<'_>) -> Result<Vec<AtomicBool>, RestoreError> {
    let has: Vec<_> = target.reader.content().iter().map(|_| AtomicBool::new(false)).collect();
    target.file.set_len(target.reader.size()).map_err(|source| target.failed(source))?;
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        let mut buffer = Vec::new();
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            let Some(has) = has.get(chunk) else { return };
            match is_there(target, chunk, &mut buffer) {
                Ok(there) => has.store(there, Ordering::Relaxed),
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
        None => Ok(has),
    }
}

/// Whether the file holds this chunk; what it holds in its place becomes zero.
fn is_there(target: &Target<'_>, chunk: usize, buffer: &mut Vec<u8>) -> Result<bool, RestoreError> {
    target.stop.check()?;
    let range = target.reader.chunk_range(chunk);
    let has_data = has_data_before(target, range.start, range.end);
    if !has_data.map_err(|source| target.failed(source))? {
        return Ok(false);
    }
    let len = range.end - range.start;
    if !target.reader.is_zero(chunk) {
        buffer.resize(len as usize, 0);
        let read = target.file.read_exact_at(buffer, range.start);
        read.map_err(|source| target.failed(source))?;
        if BlobId::of(buffer) == target.reader.content()[chunk] {
            target.progress.read(len);
            return Ok(true);
        }
    }
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    // A file has at most 2^63 bytes.
    let punched = fallocate(target.file, punch, range.start as i64, len as i64);
    punched.map_err(|errno| target.failed(errno.into()))?;
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
