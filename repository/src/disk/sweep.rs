//! All chunks of a disk in one sweep over the packs: each is read once, from front to back, in pieces
//! that several threads open at once.
//!
//! Memory: for each thread one piece of a pack and one run of chunks, and 24 bytes for each wanted chunk.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex},
    thread,
};

use zstd::bulk::Decompressor;

use super::DiskReader;
use crate::{BlobId, BlobKind, FileId, FileKind, RepositoryError, blob, pack::PackedBlob};

/// A pack is read in pieces of at most so many bytes, or one blob: they stay in a core's cache.
const PIECE_LEN: usize = 1 << 20;
/// Neighbouring chunks are handed on in runs of at most so many bytes, or one chunk.
const RUN_LEN: usize = 1 << 20;
/// Runs begin with a page of memory.
const PAGE_LEN: usize = 4096;
/// Blobs that nobody wants are read along when they are not longer than this.
const GAP_LEN_MAX: usize = 64 << 10;

/// A chunk that is wanted, and where it is. Sorted by pack and offset, equal chunks are neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Wanted {
    /// Position of the pack in the order in which the disk first needs them.
    pack: u32,
    offset: u32,
    len: u32,
    chunk: usize,
}

/// Chunks of a disk that are about to be read, in the order of their packs.
#[derive(Debug)]
pub struct Sweep<'a> {
    disk: &'a DiskReader,
    packs: Vec<FileId>,
    wanted: Vec<Wanted>,
}

impl DiskReader {
    /// Finds all chunks that `wanted` accepts, but for those that are known to be zero. Reads nothing.
    ///
    /// [`RepositoryError::MissingBlob`] means that a chunk is in no pack.
    pub fn sweep(&self, wanted: impl Fn(usize) -> bool) -> Result<Sweep<'_>, RepositoryError> {
        let known = self.reader.index().packs();
        let (mut packs, mut positions) = (Vec::new(), HashMap::new());
        let mut chunks = Vec::new();
        for (chunk, id) in self.content.iter().enumerate() {
            if self.is_zero(chunk) || !wanted(chunk) {
                continue;
            }
            let (number, blob) = self.place(id)?;
            let pack = *positions.entry(number).or_insert_with(|| {
                packs.push(known[number].id);
                packs.len() as u32 - 1
            });
            chunks.push(Wanted { pack, offset: blob.offset, len: blob.len, chunk });
        }
        chunks.sort_unstable();
        Ok(Sweep { disk: self, packs, wanted: chunks })
    }

    fn place(&self, id: &BlobId) -> Result<(usize, PackedBlob), RepositoryError> {
        let place = self.reader.index().place(BlobKind::Data, id);
        place.ok_or(RepositoryError::MissingBlob { id: *id })
    }

    /// The length of a chunk, which is that of its blob.
    fn checked_len(&self, chunk: usize, blob: &PackedBlob) -> Result<usize, RepositoryError> {
        let range = self.chunk_range(chunk);
        let (expected, actual) = (range.end - range.start, u64::from(blob.plain_len()));
        match expected == actual {
            true => Ok(actual as usize),
            false => Err(RepositoryError::SizeMismatch { expected, actual }),
        }
    }
}

impl Sweep<'_> {
    /// Mean length in bytes of what is handed out at once, or a little more: the ends of pieces are not
    /// counted.
    pub fn run_len(&self) -> u64 {
        let len = |wanted: &Wanted| {
            let range = self.disk.chunk_range(wanted.chunk);
            range.end - range.start
        };
        let goes_on = |one: &Wanted, next: &Wanted| {
            (one.pack, one.chunk + 1) == (next.pack, next.chunk) && one.offset != next.offset
        };
        let runs = self.wanted.chunk_by(goes_on);
        let runs: u64 =
            runs.map(|run| run.iter().map(len).sum::<u64>().div_ceil(RUN_LEN as u64)).sum();
        self.wanted.iter().map(len).sum::<u64>() / runs.max(1)
    }

    /// Hands the chunks to `take`, verified: on `threads` threads at once, in no order to rely on. Chunks that
    /// are neighbours on the disk and in their pack come together. The bytes begin with a page of memory,
    /// 4096 bytes, as direct writes want it.
    ///
    /// After a failure nothing further is begun, and the first one is returned.
    /// [`RepositoryError::DamagedBlob`] and [`RepositoryError::MissingBlob`] mean that a chunk has no
    /// good copy.
    pub fn hand_out<E: From<RepositoryError> + Send>(
        &self,
        threads: usize,
        take: impl Fn(Range<usize>, &[u8]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let rest = Mutex::new(Ok(self.wanted.as_slice()));
        let next = || {
            let mut rest = rest.lock().expect("no panic while locked");
            let (piece, later) = split_piece(rest.as_ref().ok()?)?;
            *rest = Ok(later);
            Some(piece)
        };
        let fail = |error| {
            let mut rest = rest.lock().expect("no panic while locked");
            if rest.is_ok() {
                *rest = Err(error);
            }
        };
        let work = || {
            let mut opener = match Opener::new() {
                Ok(opener) => opener,
                Err(error) => return fail(error.into()),
            };
            while let Some(piece) = next() {
                if let Err(error) = self.open_piece(piece, &mut opener, &take) {
                    fail(error);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        rest.into_inner().expect("no panic while locked").map(|_| ())
    }

    /// Reads a piece of a pack and opens what is in it.
    fn open_piece<E: From<RepositoryError>>(
        &self,
        piece: &[Wanted],
        opener: &mut Opener,
        take: &impl Fn(Range<usize>, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (Some(first), Some(last)) = (piece.first(), piece.last()) else { return Ok(()) };
        let len = end(last) - first.offset as usize;
        let Opener { sealed, plain, decompressor } = opener;
        if sealed.len() < len {
            sealed.resize(len, 0);
        }
        let disk = self.disk;
        let repository = disk.reader.repository();
        let (pack, offset) = (&self.packs[first.pack as usize], first.offset.into());
        let sealed = &mut sealed[..len];
        let read = repository.backend().read_range(FileKind::Pack, pack, offset, sealed).is_ok();
        let mut run = Run::default();
        for same in piece.chunk_by(|one, other| one.offset == other.offset) {
            let chunk = same[0].chunk;
            let id = &disk.content[chunk];
            let (_, blob) = disk.place(id)?;
            let len = disk.checked_len(chunk, &blob)?;
            let goes_on = same.len() == 1 && run.end == chunk && run.len + len <= RUN_LEN;
            if !goes_on {
                run.hand_on(plain, take)?;
                run = Run { start: chunk, end: chunk, len: 0 };
            }
            let start = (blob.offset - first.offset) as usize;
            let sealed = &mut sealed[start..start + blob.len as usize];
            let into = &mut plain.first(run.len + len)[run.len..];
            let key = repository.key();
            if !(read && blob::open_into(key, decompressor, &blob, sealed, into).is_ok()) {
                // On its own, and where that fails from another pack.
                into.copy_from_slice(&disk.reader.read(BlobKind::Data, id)?);
            }
            (run.end, run.len) = (chunk + 1, run.len + len);
            for other in &same[1..] {
                disk.checked_len(other.chunk, &blob)?;
                take(other.chunk..other.chunk + 1, plain.first(len))?;
            }
        }
        run.hand_on(plain, take)
    }
}

/// Neighbouring chunks that lie one after the other in a buffer.
#[derive(Debug, Default)]
struct Run {
    start: usize,
    end: usize,
    len: usize,
}

impl Run {
    fn hand_on<E>(
        &self,
        plain: &mut Pages,
        take: &impl Fn(Range<usize>, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self.start == self.end {
            true => Ok(()),
            false => take(self.start..self.end, plain.first(self.len)),
        }
    }
}

/// Splits off what is read at once; `None` at the end.
fn split_piece(wanted: &[Wanted]) -> Option<(&[Wanted], &[Wanted])> {
    let first = wanted.first()?;
    let together = |pair: &&[Wanted]| {
        let (one, next) = (&pair[0], &pair[1]);
        one.pack == next.pack
            && end(next) - first.offset as usize <= PIECE_LEN
            && (next.offset as usize).saturating_sub(end(one)) <= GAP_LEN_MAX
            || (one.pack, one.offset) == (next.pack, next.offset)
    };
    let more = wanted.windows(2).take_while(together).count();
    Some(wanted.split_at(1 + more))
}

/// End of a sealed blob from the start of its pack, in bytes.
fn end(wanted: &Wanted) -> usize {
    wanted.offset as usize + wanted.len as usize
}

/// What one thread needs to open blobs.
struct Opener {
    sealed: Vec<u8>,
    plain: Pages,
    decompressor: Decompressor<'static>,
}

impl Opener {
    fn new() -> Result<Self, RepositoryError> {
        let decompressor = Decompressor::new()
            .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
        Ok(Self { sealed: Vec::new(), plain: Pages::default(), decompressor })
    }
}

/// Memory that begins with a page.
#[derive(Default)]
struct Pages(Vec<u8>);

impl Pages {
    /// The first `len` bytes. They are as they were left, unless none of so many were asked for before.
    fn first(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len + PAGE_LEN {
            // Not both at once.
            self.0 = Vec::new();
            self.0.resize(len.max(RUN_LEN) + PAGE_LEN, 0);
        }
        let address = self.0.as_ptr().addr();
        let start = address.next_multiple_of(PAGE_LEN) - address;
        &mut self.0[start..start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_ends_with_its_pack_at_a_wide_gap_and_when_it_is_long_enough() {
        let at = |pack, offset: usize, len: usize, chunk| Wanted {
            pack,
            offset: offset as u32,
            len: len as u32,
            chunk,
        };
        let wanted = [
            // Equal chunks, however long, and a narrow gap.
            at(0, 0, 100, 3),
            at(0, 0, 100, 7),
            at(0, 100 + GAP_LEN_MAX, 50, 4),
            // A gap that is too wide.
            at(0, 151 + 2 * GAP_LEN_MAX, 50, 5),
            // Another pack, and as much of it as is read at once.
            at(1, 0, PIECE_LEN / 2, 0),
            at(1, PIECE_LEN / 2, PIECE_LEN / 2, 1),
            at(1, PIECE_LEN, 1, 2),
            // Longer than a piece, twice.
            at(2, 9, PIECE_LEN + 1, 8),
            at(2, 9, PIECE_LEN + 1, 9),
        ];
        let mut rest = &wanted[..];
        let mut lengths = Vec::new();
        while let Some((piece, later)) = split_piece(rest) {
            lengths.push(piece.len());
            rest = later;
        }
        assert_eq!(lengths, [3, 1, 2, 1, 2]);
    }
}
