//! The stream of chunks from the guest's disks to the store, at the guest's pace.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::chunk_map::{ChunkMap, Chunks, Fate};
use super::pace::{Effort, Pace};
use super::priority::Priority;
use super::{BAD_RANGES_MAX, ReadError, Source, is_bad_block, processors};
use crate::hypervisor::Hypervisor;
use crate::progress::Progress;

/// How often the latency of a guest at work is looked at: each look takes milliseconds of QEMU's main
/// thread, which it waits for. Five a second made its 99th percentile a third longer (tried).
const OBSERVE_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked whether an idle guest, which is read flat out, has woken up.
const OBSERVE_IDLE_EVERY: Duration = Duration::from_millis(50);

/// How long a guest that stands still waits for a store that takes nothing.
const STALL_MAX: Duration = Duration::from_secs(30);

/// What the user allows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Bytes read in a second, over all disks.
    pub bytes_per_second: Option<u64>,
}

impl Limits {
    /// Sleeps until `bytes` since `start` are within the allowed rate.
    pub(super) async fn keep(self, start: Instant, bytes: u64) {
        let wait = self.wait(start, bytes);
        // Even to sleep for no time takes until the next tick of the runtime's clock, a millisecond.
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// How long to sleep for that.
    fn wait(self, start: Instant, bytes: u64) -> Duration {
        let Some(rate) = self.bytes_per_second else { return Duration::ZERO };
        let due = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        due.saturating_sub(start.elapsed())
    }
}

/// A run of chunks that was read.
#[derive(Debug)]
pub struct Piece {
    /// Index of the disk.
    pub disk: u32,
    /// Number of the first chunk.
    pub chunk: u64,
    /// The content of one or more chunks.
    pub data: Bytes,
}

/// The stream of one disk.
#[derive(Debug)]
pub struct Stream<'a, H> {
    /// The disk at the point in time.
    pub source: &'a Source,
    /// Its index.
    pub disk: u32,
    /// What of it is read.
    pub map: &'a ChunkMap,
    /// What the user allows.
    pub limits: Limits,
    /// Who knows the guest's latency.
    pub hypervisor: &'a H,
    /// Where pieces go.
    pub sink: &'a mpsc::Sender<Piece>,
    /// Who is told how far it is.
    pub progress: &'a Progress,
}

impl<H: Hypervisor> Stream<'_, H> {
    /// Reads all chunks that are to be read and hands them on, releasing what was read. Returns the
    /// bytes read. The future may be dropped at any time.
    ///
    /// # Errors
    /// [`ReadError::BadBlocks`] after the whole disk was tried; any other at once.
    pub async fn run(&self, pace: &mut Pace) -> Result<u64, ReadError> {
        release_unread(self.source, self.map, pace.effort()).await?;
        let (pace, bytes) = (RefCell::new(pace), Cell::new(0));
        tokio::select! {
            done = self.pump(&pace, &bytes) => done.map(|()| bytes.get()),
            error = self.watch(&pace, &bytes) => Err(error),
        }
    }

    /// Looks at the guest's latency again and again, as long as anything is read.
    async fn watch(&self, pace: &RefCell<&mut Pace>, bytes: &Cell<u64>) -> ReadError {
        let mut before = 0;
        let mut priority = Priority::new();
        loop {
            let is_gentle = pace.borrow().is_gentle();
            processors::give_way(is_gentle);
            priority.set(is_gentle);
            tokio::time::sleep(if is_gentle { OBSERVE_EVERY } else { OBSERVE_IDLE_EVERY }).await;
            if bytes.get() == before {
                continue;
            }
            before = bytes.get();
            match self.hypervisor.guest_io().await {
                Ok(now) => pace.borrow_mut().observe(now),
                Err(error) => return error.into(),
            }
        }
    }

    /// Reads at the pace of the moment.
    async fn pump(&self, pace: &RefCell<&mut Pace>, bytes: &Cell<u64>) -> Result<(), ReadError> {
        let (source, map) = (self.source, self.map);
        let mut bad = Vec::new();
        let mut asked = 0;
        let start = Instant::now();
        let mut under_way = JoinSet::new();
        let mut next = 0;
        // Taken, and waiting until the limit allows it.
        let mut held = None;
        loop {
            let effort = pace.borrow().effort();
            let may_ask = |under_way: &JoinSet<_>| under_way.len() < effort.requests;
            while may_ask(&under_way) {
                let more = || next_request(map, &mut next, effort.request_len);
                let Some(chunks) = held.take().or_else(more) else { break };
                if !self.limits.wait(start, asked).is_zero() {
                    held = Some(chunks);
                    break;
                }
                let (source, offset, len) =
                    (source.clone(), map.offset(chunks.start), map.len(&chunks));
                asked += len;
                under_way.spawn(async move {
                    let read = async {
                        let (data, took) = source.read_at_pace(offset, len, effort).await?;
                        source.release(offset, len, effort).await?;
                        Ok((data, took))
                    };
                    (read.await, chunks)
                });
            }
            // An error of what is under way must not wait for the limit.
            let done = tokio::select! {
                Some(done) = under_way.join_next() => done,
                () = tokio::time::sleep(self.limits.wait(start, asked)),
                    if held.is_some() && may_ask(&under_way) => continue,
                else => break,
            };
            let (outcome, chunks) = done.expect("requests neither panic nor are aborted");
            match outcome {
                Ok((data, took)) => {
                    pace.borrow_mut().note_read(took);
                    bytes.set(bytes.get() + data.len() as u64);
                    self.progress.read(data.len() as u64);
                    let piece = Piece { disk: self.disk, chunk: chunks.start, data };
                    // What is bad makes the whole disk bad; the rest is read only to name all of it.
                    if bad.is_empty() {
                        self.hand_on(piece).await?;
                    }
                }
                Err(ReadError::Nbd { source: error, .. }) if is_bad_block(&error) => {
                    let blocks =
                        source.bad_blocks(map.offset(chunks.start), map.len(&chunks)).await?;
                    if blocks.is_empty() {
                        // It could be read the second time, in parts: that is no proof of its content.
                        let disk = source.disk.clone();
                        return Err(ReadError::Nbd { disk, source: error });
                    }
                    bad.extend(blocks);
                }
                Err(error) => return Err(error),
            }
            if bad.len() > BAD_RANGES_MAX {
                break;
            }
        }
        if bad.is_empty() {
            return Ok(());
        }
        let more = bad.len() > BAD_RANGES_MAX;
        let mut ranges = joined(bad);
        ranges.truncate(BAD_RANGES_MAX);
        Err(ReadError::BadBlocks { disk: source.disk.clone(), ranges, more })
    }

    /// Hands a piece on; a guest that stands still does not wait for a store that hangs.
    async fn hand_on(&self, piece: Piece) -> Result<(), ReadError> {
        let sent = self.sink.send(piece);
        let sent = match self.hypervisor.suspends() {
            true => tokio::time::timeout(STALL_MAX, sent)
                .await
                .map_err(|_| ReadError::StoreStalls { waited: STALL_MAX })?,
            false => sent.await,
        };
        sent.map_err(|_| ReadError::StoreStopped)
    }
}

/// Ranges, each an offset and a length, in their order on the disk, neighbours as one: requests are
/// answered in any order.
fn joined(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, range| {
        let adjoins = range.0 + range.1 == next.0;
        range.1 += if adjoins { next.1 } else { 0 };
        adjoins
    });
    ranges
}

/// Ends copy-before-write where nothing will be read.
async fn release_unread(source: &Source, map: &ChunkMap, effort: Effort) -> Result<(), ReadError> {
    for fate in [Fate::Zero, Fate::Inherit] {
        for run in map.runs(fate, u64::MAX / 2) {
            source.release(map.offset(run.start), map.len(&run), effort).await?;
        }
    }
    Ok(())
}

/// The next run of chunks to read from chunk `next` on, of `len` bytes or one chunk.
fn next_request(map: &ChunkMap, next: &mut u64, len: u64) -> Option<Chunks> {
    let chunks_max = (len / map.offset(1)).max(1);
    let start = (*next..map.chunks()).find(|&chunk| map.fate(chunk) == Fate::Read);
    let Some(start) = start else {
        *next = map.chunks();
        return None;
    };
    let limit = (start + chunks_max).min(map.chunks());
    let end = (start..limit).find(|&chunk| map.fate(chunk) != Fate::Read).unwrap_or(limit);
    *next = end;
    Some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r11_bad_ranges_are_sorted_and_neighbours_joined() {
        assert_eq!(joined(vec![(30, 5), (0, 10), (10, 10), (20, 1)]), [(0, 21), (30, 5)]);
        assert!(joined(Vec::new()).is_empty());
    }
}
