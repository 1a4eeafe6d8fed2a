//! Reading a point in time: one NBD export for each disk, whatever the capture method.

pub mod chunk_map;
pub mod pace;
mod processors;
mod stream;

use std::fs::File;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nbd::wire::{STATE_DIRTY, STATE_ZERO};
use nbd::{Client, Errno, NbdError, Options};
use nix::unistd::{Whence, lseek};
use repository::BlobId;
use tokio::net::UnixStream;

use crate::hypervisor::{Care, Export, HypervisorError};
use crate::names::DiskName;
use chunk_map::{ChunkMap, Fate};

pub use stream::{Limits, Piece, Stream};

const ALLOCATION: &str = "base:allocation";
/// Length in bytes of what QEMU saves at once to a raw scratch (`BLOCK_COPY_CLUSTER_SIZE_DEFAULT`).
const CLUSTER_LEN: u32 = 64 << 10;
/// The smallest part of a disk that is named when it cannot be read.
const BAD_BLOCK: u64 = 4096;
/// A bound on the ranges that one error names.
const BAD_RANGES_MAX: usize = 64;
/// Unchanged chunks that each incremental backup reads and compares: one in so many…
const AUDIT_FRACTION: u64 = 1000;
/// …but at least so many…
const AUDIT_MIN: u64 = 16;
/// …and beyond these no more than this many bytes: the cost follows the changes, not the disk.
const AUDIT_LEN_MAX: u64 = 32 << 20;

/// Why a point in time could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The export failed as a whole.
    #[error("cannot read disk `{disk}`")]
    Nbd {
        /// The disk.
        disk: DiskName,
        /// Why.
        source: NbdError,
    },
    /// The disk has bad blocks.
    #[error("disk `{disk}` cannot be read at {}{}", list(.ranges), if *.more { ", …" } else { "" })]
    BadBlocks {
        /// The disk.
        disk: DiskName,
        /// Offset and length in bytes, in blocks of 4 KiB.
        ranges: Vec<(u64, u64)>,
        /// Whether there are more than are named.
        more: bool,
    },
    /// The export does not tell which parts are data.
    #[error("the export of disk `{disk}` lacks the metadata context `{context}`")]
    NoContext {
        /// The disk.
        disk: DiskName,
        /// What is missing.
        context: String,
    },
    /// The export has another size than the disk.
    #[error("the export of disk `{disk}` has {export} bytes, the disk {size}")]
    Size {
        /// The disk.
        disk: DiskName,
        /// Bytes of the export.
        export: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// The connection to the export cannot be used.
    #[error("cannot use the connection to the export of disk `{disk}`")]
    Stream {
        /// The disk.
        disk: DiskName,
        /// Why.
        source: io::Error,
    },
    /// The scratch cannot be asked which parts it holds.
    #[error("cannot look at the scratch of disk `{disk}`")]
    Scratch {
        /// The disk.
        disk: DiskName,
        /// Why.
        source: io::Error,
    },
    /// QEMU could not be asked for the guest's latency.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// Whoever stores what was read has stopped.
    #[error("storing has stopped")]
    StoreStopped,
}

fn list(ranges: &[(u64, u64)]) -> String {
    let range = |(offset, len): &(u64, u64)| format!("bytes {offset}..{}", offset + len);
    ranges.iter().map(range).collect::<Vec<_>>().join(", ")
}

/// A disk at the point in time.
#[derive(Debug, Clone)]
pub struct Source {
    disk: DiskName,
    client: Client,
    allocation: Option<usize>,
    dirty: Option<usize>,
    care: Care,
}

impl Source {
    /// Connects to the export of a disk of `size` bytes.
    ///
    /// # Errors
    /// [`ReadError::Nbd`], [`ReadError::NoContext`], [`ReadError::Size`].
    pub async fn connect(
        export: &Export,
        disk: &DiskName,
        size: u64,
        timeout: Duration,
    ) -> Result<Self, ReadError> {
        let wanted = [Some(ALLOCATION.to_owned()), export.dirty_context.clone()];
        let options = Options {
            export: export.name.clone(),
            contexts: wanted.into_iter().flatten().collect(),
            connections: 1,
            read_len_max: match &export.care {
                Care::Clusters { .. } => CLUSTER_LEN,
                _ => Options::default().read_len_max,
            },
            stays_open: true,
            timeout,
        };
        let failed = |source| ReadError::Stream { disk: disk.clone(), source };
        let stream = export.stream.try_clone().map_err(failed)?;
        stream.set_nonblocking(true).map_err(failed)?;
        let stream = UnixStream::from_std(stream).map_err(failed)?;
        let client = Client::from_stream(stream, options)
            .await
            .map_err(|source| ReadError::Nbd { disk: disk.clone(), source })?;
        if client.size() != size {
            return Err(ReadError::Size { disk: disk.clone(), export: client.size(), size });
        }
        let contexts = client.contexts();
        let position = |name: &str| contexts.iter().position(|context| context == name);
        let allocation = position(ALLOCATION);
        let dirty = match &export.dirty_context {
            None => None,
            Some(context) => match position(context) {
                None => {
                    let (disk, context) = (disk.clone(), context.clone());
                    return Err(ReadError::NoContext { disk, context });
                }
                found => found,
            },
        };
        Ok(Self { disk: disk.clone(), client, allocation, dirty, care: export.care.clone() })
    }

    /// Asks what is data, and what changed since the parent, which had `parent_size` bytes. Without a
    /// dirty map everything counts as changed.
    ///
    /// # Errors
    /// [`ReadError::Nbd`].
    pub async fn map(
        &self,
        chunk_size: u32,
        parent_size: Option<u64>,
    ) -> Result<ChunkMap, ReadError> {
        let size = self.client.size();
        let mut map = ChunkMap::new(size, chunk_size);
        match parent_size.filter(|_| self.dirty.is_some()) {
            // QEMU does not count the grown part of a disk as dirty.
            Some(before) => map.mark_dirty(before.min(size), size - before.min(size)),
            None => map.mark_dirty(0, size),
        }
        let tracked = parent_size.is_some();
        if self.allocation.is_none() {
            map.mark_data(0, size);
        }
        self.ask(&mut map, tracked).await?;
        match &self.care {
            Care::None => {}
            Care::Clusters { scratch } => self.mark_saved(&mut map, scratch)?,
            // The dirty map stands still and is marked already.
            Care::Twice => self.ask(&mut map, false).await?,
        }
        Ok(map)
    }

    /// Marks what the export says is data, or dirty.
    async fn ask(&self, map: &mut ChunkMap, tracked: bool) -> Result<(), ReadError> {
        let size = self.client.size();
        let mut at = 0;
        while at < size && self.allocation.or(self.dirty).is_some() {
            let status = self.client.block_status(at, size - at).await;
            let lists = status.map_err(|source| self.failed(source))?;
            // The contexts may be answered differently far: go on where all of them are known.
            let reach = lists.iter().map(|list| list.iter().map(|e| e.length).sum::<u64>()).min();
            let end = at + reach.unwrap_or(0);
            for (context, extents) in lists.iter().enumerate() {
                let mut offset = at;
                for extent in extents {
                    let len = extent.length.min(end.saturating_sub(offset));
                    if Some(context) == self.allocation && extent.flags & STATE_ZERO == 0 {
                        map.mark_data(offset, len);
                    }
                    if Some(context) == self.dirty && tracked && extent.flags & STATE_DIRTY != 0 {
                        map.mark_dirty(offset, len);
                    }
                    offset += len;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Marks as data what the scratch holds.
    fn mark_saved(&self, map: &mut ChunkMap, scratch: &File) -> Result<(), ReadError> {
        let failed = |source| ReadError::Scratch { disk: self.disk.clone(), source };
        let size = self.client.size();
        let seek = |at: u64, whence| match lseek(scratch, at as i64, whence) {
            Ok(at) => Ok(Some(at as u64)),
            Err(nix::errno::Errno::ENXIO) => Ok(None),
            Err(errno) => Err(failed(errno.into())),
        };
        let mut at = 0;
        while at < size
            && let Some(start) = seek(at, Whence::SeekData)?
        {
            at = seek(start, Whence::SeekHole)?.unwrap_or(size);
            map.mark_data(start, at - start);
        }
        Ok(())
    }

    /// Reads a random share of the unchanged chunks and compares them with what the repository has.
    /// Returns the bytes read, and the first chunk that differs: then the bitmap lies.
    ///
    /// # Errors
    /// [`ReadError::Nbd`].
    pub async fn audit(
        &self,
        map: &ChunkMap,
        parent: &[BlobId],
    ) -> Result<(u64, Option<u64>), ReadError> {
        let Suspects { known_to_differ, unchanged, last } = suspects(map, parent);
        if known_to_differ.is_some() {
            return Ok((0, known_to_differ));
        }
        let count_max = AUDIT_LEN_MAX / map.offset(1);
        let count = (unchanged.len() as u64 / AUDIT_FRACTION).min(count_max).max(AUDIT_MIN);
        let mut chosen = sample(&unchanged, count);
        chosen.extend(last.filter(|last| !chosen.contains(last)));
        let mut bytes = 0;
        for chunk in chosen {
            let data = self.read(map.offset(chunk), map.len(&(chunk..chunk + 1))).await?;
            bytes += data.len() as u64;
            if parent.get(chunk as usize) != Some(&BlobId::of(&data)) {
                return Ok((bytes, Some(chunk)));
            }
        }
        Ok((bytes, None))
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, ReadError> {
        let len = u32::try_from(len).expect("a request is at most a few MiB");
        self.client.read(offset, len).await.map_err(|source| self.failed(source))
    }

    /// Reads a range in parts, one after the other.
    async fn read_in_parts(
        &self,
        offset: u64,
        len: u64,
        part_len: u64,
    ) -> Result<Bytes, ReadError> {
        if len <= part_len {
            return self.read(offset, len).await;
        }
        let mut data = BytesMut::with_capacity(usize::try_from(len).unwrap_or(0));
        while (data.len() as u64) < len {
            let at = data.len() as u64;
            data.extend_from_slice(&self.read(offset + at, part_len.min(len - at)).await?);
        }
        Ok(data.freeze())
    }

    /// Frees the scratch of a range and ends copy-before-write there.
    async fn release(&self, offset: u64, len: u64) -> Result<(), ReadError> {
        if !self.client.info().can_trim() {
            return Ok(());
        }
        let trimmed = self.client.trim(offset, len).await;
        trimmed.map_err(|source| self.failed(source))
    }

    /// Finds out which blocks of a range cannot be read.
    async fn bad_blocks(&self, start: u64, len: u64) -> Result<Vec<(u64, u64)>, ReadError> {
        let mut bad: Vec<(u64, u64)> = Vec::new();
        let end = start + len;
        let mut at = start;
        while at < end {
            let len = BAD_BLOCK.min(end - at);
            match self.client.read(at, len as u32).await {
                Ok(_) => {}
                Err(error) if is_bad_block(&error) => match bad.last_mut() {
                    Some((offset, length)) if *offset + *length == at => *length += len,
                    _ => bad.push((at, len)),
                },
                Err(source) => return Err(self.failed(source)),
            }
            at += len;
        }
        Ok(bad)
    }

    fn failed(&self, source: NbdError) -> ReadError {
        ReadError::Nbd { disk: self.disk.clone(), source }
    }
}

fn is_bad_block(error: &NbdError) -> bool {
    matches!(error, NbdError::Remote { errno: Errno::EIO, .. })
}

/// What an audit may look at.
#[derive(Debug, PartialEq, Eq)]
struct Suspects {
    /// A chunk that differs for sure: a hole now, data in the parent, and never dirty in between.
    known_to_differ: Option<u64>,
    /// Unchanged chunks, but for the holes that were zero before: those need no reading.
    unchanged: Vec<u64>,
    /// The last of them that was not zero before. A disk that was cut and grown again between two
    /// backups is zero from the cut on, which QEMU does not count as dirty.
    last: Option<u64>,
}

fn suspects(map: &ChunkMap, parent: &[BlobId]) -> Suspects {
    let zero_id = |chunk: u64| BlobId::of(&vec![0; map.len(&(chunk..chunk + 1)) as usize]);
    // All chunks but the last have one length.
    let end = map.chunks().saturating_sub(1);
    let zeros = (map.chunks() > 0).then(|| (zero_id(0), zero_id(end)));
    let was_zero = |chunk: u64| {
        let zero = zeros.map(|(full, short)| if chunk == end { short } else { full });
        zero.is_some() && parent.get(chunk as usize).copied() == zero
    };
    let mut suspects = Suspects { known_to_differ: None, unchanged: Vec::new(), last: None };
    for chunk in map.runs(Fate::Inherit, 1).map(|run| run.start) {
        match (map.is_hole(chunk), was_zero(chunk)) {
            (true, true) => continue,
            (true, false) => suspects.known_to_differ = Some(chunk),
            (false, true) => {}
            (false, false) => suspects.last = Some(chunk),
        }
        suspects.unchanged.push(chunk);
    }
    suspects
}

/// `count` of `items`, drawn at random, without drawing one twice.
fn sample(items: &[u64], count: u64) -> Vec<u64> {
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(items.len());
    let mut rng = rand::rng();
    let mut chosen: Vec<u64> =
        rand::seq::index::sample(&mut rng, items.len(), count).iter().map(|i| items[i]).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r22_a_hole_that_was_data_differs_and_one_that_was_zero_needs_no_reading() {
        let (zero, short) = (BlobId::of(&[0; 100]), BlobId::of(&[0; 50]));
        let data = BlobId::of(&[1; 100]);
        let mut map = ChunkMap::new(450, 100);
        map.mark_data(0, 300);
        let found = |parent: [BlobId; 5]| {
            let Suspects { known_to_differ, unchanged, last } = suspects(&map, &parent);
            (known_to_differ, unchanged, last)
        };
        assert_eq!(found([data, data, zero, zero, short]), (None, vec![0, 1, 2], Some(1)));
        assert_eq!(found([data, data, data, data, short]).0, Some(3));
        assert_eq!(found([data, data, data, zero, data]).0, Some(4));
        let none = suspects(&ChunkMap::new(0, 100), &[]);
        assert_eq!(none, Suspects { known_to_differ: None, unchanged: Vec::new(), last: None });
    }
}
