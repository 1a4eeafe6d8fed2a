//! A file of a snapshot as a disk: random access, and which parts are zero.

mod sweep;

use std::{collections::HashMap, ops::Range, sync::Arc};

pub use self::sweep::Sweep;
use crate::{BlobId, Reader, RepositoryError};

/// Chunks of at most so many different lengths are recognised as zero without reading them.
const ZERO_LENGTHS_MAX: usize = 64;

/// Reads a disk at any place. Chunks may have any mixture of lengths.
#[derive(Debug)]
pub struct DiskReader {
    reader: Arc<Reader>,
    content: Vec<BlobId>,
    size: u64,
    places: Places,
    /// The id of a chunk of zeros of each length.
    zeros: HashMap<u32, BlobId>,
}

/// Where chunks begin.
#[derive(Debug)]
enum Places {
    /// All have this length, but for the last, which may be shorter.
    Even { chunk_len: u64 },
    /// The end of each.
    Mixed { ends: Vec<u64> },
}

/// A part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskExtent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, never 0.
    pub len: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// What is in a part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Must be read.
    Data,
    /// Reads as zeros.
    Zero,
}

impl DiskReader {
    /// A disk of `size` bytes made of these blobs.
    ///
    /// [`RepositoryError::MissingBlob`] if one is not in the index,
    /// [`RepositoryError::SizeMismatch`] if they do not add up to `size`.
    pub fn new(
        reader: Arc<Reader>,
        content: Vec<BlobId>,
        size: u64,
    ) -> Result<Self, RepositoryError> {
        let mut lengths = Lengths::default();
        let mut last: Option<(BlobId, u32)> = None;
        for id in &content {
            let len = match last {
                Some((same, len)) if same == *id => len,
                _ => reader.index().data_len(id).ok_or(RepositoryError::MissingBlob { id: *id })?,
            };
            last = Some((*id, len));
            lengths.push(len);
        }
        if lengths.end != size {
            let (expected, actual) = (size, lengths.end);
            return Err(RepositoryError::SizeMismatch { expected, actual });
        }
        let zeros = lengths.distinct.iter();
        let zeros = zeros.map(|&len| (len, BlobId::of(&vec![0; len as usize]))).collect();
        let places = match lengths.ends {
            Some(ends) => Places::Mixed { ends },
            None => Places::Even { chunk_len: lengths.first.unwrap_or(1).into() },
        };
        Ok(Self { reader, content, size, places, zeros })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The ids of the chunks.
    pub fn content(&self) -> &[BlobId] {
        &self.content
    }

    /// Which bytes chunk number `chunk` holds; empty past the end.
    pub fn chunk_range(&self, chunk: usize) -> Range<u64> {
        match &self.places {
            Places::Even { chunk_len } => {
                let start = (chunk as u64).saturating_mul(*chunk_len).min(self.size);
                start..start.saturating_add(*chunk_len).min(self.size)
            }
            Places::Mixed { ends } => {
                let end = |chunk: usize| ends.get(chunk).copied().unwrap_or(self.size);
                chunk.checked_sub(1).map_or(0, end)..end(chunk)
            }
        }
    }

    /// The chunk that holds byte `offset` of the disk.
    pub fn chunk_at(&self, offset: u64) -> usize {
        match &self.places {
            Places::Even { chunk_len } => usize::try_from(offset / chunk_len).unwrap_or(usize::MAX),
            Places::Mixed { ends } => ends.partition_point(|&end| end <= offset),
        }
    }

    /// Whether chunk number `chunk` is one of zeros, known without reading it.
    pub fn is_zero(&self, chunk: usize) -> bool {
        let range = self.chunk_range(chunk);
        let zero = u32::try_from(range.end - range.start).ok().and_then(|len| self.zeros.get(&len));
        zero.is_some_and(|zero| self.content.get(chunk) == Some(zero))
    }

    /// Fills `buffer` from byte `offset`; every chunk that is touched is read whole and verified.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RepositoryError> {
        let len = buffer.len() as u64;
        self.check_range(offset, len)?;
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let chunk = self.chunk_at(at);
            let range = self.chunk_range(chunk);
            let part = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(part);
            if self.is_zero(chunk) {
                now.fill(0);
            } else {
                let content = self.reader.blob(&self.content[chunk])?;
                let start = (at - range.start) as usize;
                let found = content.get(start..start + part);
                let actual = content.len() as u64;
                let expected = range.end - range.start;
                now.copy_from_slice(
                    found.ok_or(RepositoryError::SizeMismatch { expected, actual })?,
                );
            }
            at += part as u64;
            rest = later;
        }
        Ok(())
    }

    /// Data and zero parts of a range, in order, neighbours of one kind joined. Reads nothing.
    pub fn extents(&self, offset: u64, len: u64) -> Result<Vec<DiskExtent>, RepositoryError> {
        self.check_range(offset, len)?;
        let mut extents: Vec<DiskExtent> = Vec::new();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let chunk = self.chunk_at(at);
            let part = self.chunk_range(chunk).end.min(end) - at;
            let kind = if self.is_zero(chunk) { ExtentKind::Zero } else { ExtentKind::Data };
            match extents.last_mut() {
                Some(extent) if extent.kind == kind => extent.len += part,
                _ => extents.push(DiskExtent { offset: at, len: part, kind }),
            }
            at += part;
        }
        Ok(extents)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), RepositoryError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(RepositoryError::OutOfRange { offset, len, size: self.size }),
        }
    }
}

/// Adds up the lengths of chunks and notices when they are not even.
#[derive(Default)]
struct Lengths {
    first: Option<u32>,
    end: u64,
    count: u64,
    ends: Option<Vec<u64>>,
    distinct: Vec<u32>,
}

impl Lengths {
    fn push(&mut self, len: u32) {
        let first = *self.first.get_or_insert(len);
        // Even so far, as long as all before this one had the first one's length.
        let even = self.end == self.count * u64::from(first) && len <= first && first > 0;
        if !even && self.ends.is_none() {
            // Those before were even, but for the last if it was shorter.
            let before = (1..=self.count).map(|n| (n * u64::from(first)).min(self.end));
            self.ends = Some(before.collect());
        }
        self.end += u64::from(len);
        self.count += 1;
        if let Some(ends) = &mut self.ends {
            ends.push(self.end);
        }
        if len > 0 && self.distinct.len() < ZERO_LENGTHS_MAX && !self.distinct.contains(&len) {
            self.distinct.push(len);
        }
    }
}
