//! Reading a point in time: one NBD export for each disk, whatever the capture method.

mod audit;
pub mod chunk_map;
pub mod pace;
mod priority;
pub mod processors;
mod question;
mod stream;

use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use nbd::wire::{STATE_DIRTY, STATE_ZERO};
use nbd::{Client, Errno, NbdError, Options};
use nix::unistd::{Whence, lseek};
use tokio::net::UnixStream;

use crate::hypervisor::{Care, DEPTH_CONTEXT, Export, HypervisorError};
use crate::names::DiskName;
use chunk_map::ChunkMap;
use pace::Effort;
use question::Question;

pub use audit::Audit;
pub use stream::{Limits, Piece, Stream};

const ALLOCATION: &str = "base:allocation";
/// The depth of the image on top.
const DEPTH_TOP: u64 = 1;
/// Length in bytes of what QEMU saves at once to a raw scratch (`BLOCK_COPY_CLUSTER_SIZE_DEFAULT`).
const CLUSTER_LEN: u32 = 64 << 10;
/// Who gets no thread to rest in waits no longer.
const REST_DEADLINE: Duration = Duration::from_millis(50);
/// The smallest part of a disk that is named when it cannot be read.
const BAD_BLOCK: u64 = 4096;
/// A bound on the ranges that one error names.
const BAD_RANGES_MAX: usize = 64;
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
    /// Whoever stores what was read takes nothing, and the guest stands still meanwhile.
    #[error("nothing could be stored for {} s while the guest stood still", .waited.as_secs())]
    StoreStalls {
        /// How long was waited.
        waited: Duration,
    },
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
    /// Whether the dirty map tells depths.
    is_depth: bool,
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
        let is_depth = export.dirty_context.as_deref() == Some(DEPTH_CONTEXT);
        let (disk, care) = (disk.clone(), export.care.clone());
        Ok(Self { disk, client, allocation, dirty, is_depth, care })
    }

    /// Asks what is data, and what changed since the parent, which had `parent_size` bytes, with this
    /// effort. Without a dirty map everything counts as changed.
    ///
    /// # Errors
    /// [`ReadError::Nbd`].
    pub async fn map(
        &self,
        chunk_size: u32,
        parent_size: Option<u64>,
        effort: Effort,
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
        self.ask(&mut map, tracked, effort).await?;
        match &self.care {
            Care::None => {}
            Care::Clusters { scratch } => self.mark_saved(&mut map, scratch)?,
            // The dirty map stands still and is marked already.
            Care::Twice => self.ask(&mut map, false, effort).await?,
        }
        Ok(map)
    }

    /// Marks what the export says is data, or dirty.
    async fn ask(
        &self,
        map: &mut ChunkMap,
        tracked: bool,
        effort: Effort,
    ) -> Result<(), ReadError> {
        let size = self.client.size();
        let (mut at, mut question) = (0, Question::new(size, effort.rests()));
        while at < size && self.allocation.or(self.dirty).is_some() {
            let begun = Instant::now();
            let status = self.client.block_status(at, (size - at).min(question.len())).await;
            let lists = status.map_err(|source| self.failed(source))?;
            let took = begun.elapsed();
            // The contexts may be answered differently far: go on where all of them are known.
            let told = lists.iter().map(|list| list.iter().map(|e| e.length).sum::<u64>()).min();
            let told = told.unwrap_or(0);
            let end = at + told;
            for (context, extents) in lists.iter().enumerate() {
                let mut offset = at;
                for extent in extents {
                    let len = extent.length.min(end.saturating_sub(offset));
                    if Some(context) == self.allocation && extent.flags & STATE_ZERO == 0 {
                        map.mark_data(offset, len);
                    }
                    if Some(context) == self.dirty && tracked && self.is_dirty(extent.flags) {
                        map.mark_dirty(offset, len);
                    }
                    offset += len;
                }
            }
            at = end;
            question.learn(told, took);
            rest(effort.rest(took)).await;
        }
        Ok(())
    }

    fn is_dirty(&self, flags: u64) -> bool {
        match self.is_depth {
            true => flags == DEPTH_TOP,
            false => flags & STATE_DIRTY != 0,
        }
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

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, ReadError> {
        let len = u32::try_from(len).expect("a request is at most a few MiB");
        self.client.read(offset, len).await.map_err(|source| self.failed(source))
    }

    /// Reads a range in parts, one after the other, each with its pause. Says how long the last of them took,
    /// too.
    async fn read_at_pace(
        &self,
        offset: u64,
        len: u64,
        effort: Effort,
    ) -> Result<(Bytes, Duration), ReadError> {
        let read_part = async |at, len| {
            let begun = Instant::now();
            let part = self.read(at, len).await?;
            let took = begun.elapsed();
            rest(effort.rest(took)).await;
            Ok((part, took))
        };
        if len <= effort.part_len {
            return read_part(offset, len).await;
        }
        let mut data = BytesMut::with_capacity(usize::try_from(len).unwrap_or(0));
        let mut last = Duration::ZERO;
        while (data.len() as u64) < len {
            let at = data.len() as u64;
            let (part, took) = read_part(offset + at, effort.part_len.min(len - at)).await?;
            data.extend_from_slice(&part);
            last = took;
        }
        Ok((data.freeze(), last))
    }

    /// Frees the scratch of a range and ends copy-before-write there.
    async fn release(&self, offset: u64, len: u64, effort: Effort) -> Result<(), ReadError> {
        if !self.client.info().can_trim() {
            return Ok(());
        }
        let begun = Instant::now();
        let trimmed = self.client.trim(offset, len).await;
        rest(effort.rest(begun.elapsed())).await;
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

/// Sleeps as long as said; in a thread, for the runtime's own clock has ticks of a millisecond, several times
/// what a read takes.
async fn rest(wanted: Duration) {
    if !wanted.is_zero() {
        let slept = tokio::task::spawn_blocking(move || thread::sleep(wanted));
        // Neither a thread that cannot be had nor the end of the program is an error here.
        let _ = tokio::time::timeout(REST_DEADLINE, slept).await;
    }
}

fn is_bad_block(error: &NbdError) -> bool {
    matches!(error, NbdError::Remote { errno: Errno::EIO, .. })
}
