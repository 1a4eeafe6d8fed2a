//! A qcow2 image of version 3 with clusters of 64 KiB, as QEMU's `docs/interop/qcow2.txt` has it: no
//! backing file, no snapshots, nothing compressed, every refcount exact.
//!
//! Where each chunk goes is known before the first is written, so that they can come in any order:
//! header, refcount table, refcount blocks, L1 table, L2 tables, and then the clusters of all chunks that
//! are not zero, in the order of the disk. Clusters that turn out to be zero stay free.

use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::fill::Target;
use super::resume::There;
use super::{RestoreError, resume};

const CLUSTER_BITS: u32 = 16;
const CLUSTER_LEN: u64 = 1 << CLUSTER_BITS;
/// Entries of 8 bytes in a cluster of a table.
const ENTRIES: u64 = CLUSTER_LEN / 8;
/// Refcounts are 2^4 bits wide.
const REFCOUNT_ORDER: u32 = 4;
const REFCOUNTS: u64 = CLUSTER_LEN / 2;
/// In L1 and L2: the refcount of what the entry points to is exactly one.
const COPIED: u64 = 1 << 63;
const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
const VERSION: u32 = 3;
/// Without the fields that came after the first version 3, and before the header extensions.
const HEADER_LEN: u32 = 104;
/// QEMU counts the disk in sectors.
const SECTOR_LEN: u64 = 512;

/// Writes a disk to a file that is new or holds a part of it already.
pub(super) fn write(target: &Target<'_>) -> Result<(), RestoreError> {
    let size = target.reader.size();
    let data = target.reader.extents(0, size)?.into_iter();
    let data = data.filter(|extent| extent.kind == repository::ExtentKind::Data);
    let layout = Layout::new(size, data.map(|extent| extent.offset..extent.offset + extent.len));
    let used = Used::new(layout.data_len());
    let wrote = |offset, len| used.add(&layout, offset, len);
    let there = take_up(target, &layout, wrote)?;
    target.fill(|chunk| !there.has(chunk), |offset| layout.place(offset), wrote)?;
    layout.metadata(&used, |cluster, content| {
        target.stop.check()?;
        let written = target.file.write_all_at(content, cluster * CLUSTER_LEN);
        written.map_err(|source| target.failed(source))
    })
}

/// What of the disk is in the file. All else in it becomes zero.
fn take_up(
    target: &Target<'_>,
    layout: &Layout,
    wrote: impl Fn(u64, u64) + Sync,
) -> Result<There, RestoreError> {
    let start = |chunk| target.reader.chunk_range(chunk).start;
    let mut chunks = 0..target.reader.content().len();
    // Where a cluster holds parts of several chunks, one of which is zero, nobody would clear that part.
    if !chunks.all(|chunk| start(chunk).is_multiple_of(CLUSTER_LEN)) {
        target.file.set_len(0).map_err(|source| target.failed(source))?;
    }
    let place = |chunk| (!target.reader.is_zero(chunk)).then(|| layout.place(start(chunk)));
    let there = resume::take_up(target, layout.end * CLUSTER_LEN, place, wrote)?;
    if there.is_new() {
        return Ok(there);
    }
    resume::clear(target, 0..layout.data * CLUSTER_LEN)?;
    if let Some(last) = layout.runs.last() {
        // The last chunk of a disk may end within a cluster.
        let end = layout.place((last.disk.end * CLUSTER_LEN).min(layout.size) - 1) + 1;
        resume::clear(target, end..layout.end * CLUSTER_LEN)?;
    }
    Ok(there)
}

/// Neighbouring clusters of the disk that are neighbours in the image too.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    /// On the disk, in clusters.
    disk: Range<u64>,
    /// First one in the image, counted from the first one with data.
    image: u64,
}

/// Where everything is in the image, in clusters. The header is the first.
#[derive(Debug)]
struct Layout {
    size: u64,
    refcount_table: Range<u64>,
    refcount_blocks: Range<u64>,
    l1: Range<u64>,
    l1_entries: u64,
    l2: Range<u64>,
    /// Which part of the disk each L2 table describes.
    l2_tables: Vec<u64>,
    data: u64,
    runs: Vec<Run>,
    end: u64,
}

impl Layout {
    /// For a disk of `size` bytes with data in these ranges of bytes, in ascending order.
    fn new(size: u64, data: impl Iterator<Item = Range<u64>>) -> Self {
        let runs = runs_of(data);
        let mut l2_tables: Vec<u64> = Vec::new();
        for run in &runs {
            let from = run.disk.start / ENTRIES;
            let from = l2_tables.last().map_or(from, |&last| from.max(last + 1));
            l2_tables.extend(from..run.disk.end.div_ceil(ENTRIES));
        }
        let l1_entries = size.div_ceil(CLUSTER_LEN * ENTRIES);
        let data_len = runs.last().map_or(0, |run| run.image + run.disk.end - run.disk.start);
        let counted = 1 + l1_entries.div_ceil(ENTRIES) + l2_tables.len() as u64 + data_len;
        // The refcounts count themselves: more of them until that is enough.
        let (mut blocks, mut table) = (1, 1);
        while blocks * REFCOUNTS < counted + blocks + table {
            blocks = (counted + blocks + table).div_ceil(REFCOUNTS);
            table = blocks.div_ceil(ENTRIES);
        }
        let mut end = 1;
        let mut place = |len| {
            end += len;
            end - len..end
        };
        let (refcount_table, refcount_blocks) = (place(table), place(blocks));
        let l1 = place(l1_entries.div_ceil(ENTRIES));
        let l2 = place(l2_tables.len() as u64);
        let data = place(data_len).start;
        Self {
            size,
            refcount_table,
            refcount_blocks,
            l1,
            l1_entries,
            l2,
            l2_tables,
            data,
            runs,
            end,
        }
    }

    fn data_len(&self) -> u64 {
        self.end - self.data
    }

    /// The place in the image of a byte of the disk that is in one of its ranges of data.
    fn place(&self, offset: u64) -> u64 {
        let cluster = offset / CLUSTER_LEN;
        let run = &self.runs[self.runs.partition_point(|run| run.disk.end <= cluster)];
        let image = self.data + run.image + (cluster - run.disk.start);
        image * CLUSTER_LEN + offset % CLUSTER_LEN
    }

    /// Hands out all clusters but those with data, each with its number in the image.
    fn metadata<E>(
        &self,
        used: &Used,
        mut write: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut runs = self.runs.as_slice();
        for (cluster, &table) in self.l2.clone().zip(&self.l2_tables) {
            write(cluster, &self.l2_table(table, &mut runs, used))?;
        }
        let l2_of: HashMap<_, _> = self.l2_tables.iter().copied().zip(self.l2.clone()).collect();
        let l1 = |entry| l2_of.get(&entry).map_or(0, |cluster| (cluster * CLUSTER_LEN) | COPIED);
        write_tables(&self.l1, self.l1_entries, l1, &mut write)?;
        for (block, cluster) in self.refcount_blocks.clone().enumerate() {
            let first = block as u64 * REFCOUNTS;
            let count = |n| u16::from(first + n < self.data || used.has(self, first + n));
            let content: Vec<u8> = (0..REFCOUNTS).flat_map(|n| count(n).to_be_bytes()).collect();
            write(cluster, &content)?;
        }
        let blocks = self.refcount_blocks.end - self.refcount_blocks.start;
        let block = |n| (self.refcount_blocks.start + n) * CLUSTER_LEN;
        write_tables(&self.refcount_table, blocks, block, &mut write)?;
        write(0, &self.header())
    }

    /// One L2 table. `runs` begins with the first run that reaches into it, and is moved on.
    fn l2_table(&self, table: u64, runs: &mut &[Run], used: &Used) -> Vec<u8> {
        let mut content = vec![0; CLUSTER_LEN as usize];
        let part = table * ENTRIES..(table + 1) * ENTRIES;
        while let [run, rest @ ..] = *runs {
            if run.disk.start >= part.end {
                break;
            }
            for cluster in run.disk.start.max(part.start)..run.disk.end.min(part.end) {
                let image = self.data + run.image + (cluster - run.disk.start);
                if used.has(self, image) {
                    let at = (cluster - part.start) as usize * 8;
                    let entry = (image * CLUSTER_LEN) | COPIED;
                    content[at..at + 8].copy_from_slice(&entry.to_be_bytes());
                }
            }
            if run.disk.end > part.end {
                break;
            }
            *runs = rest;
        }
        content
    }

    fn header(&self) -> Vec<u8> {
        let size = self.size.next_multiple_of(SECTOR_LEN);
        let [l1, refcounts] = [&self.l1, &self.refcount_table].map(|at| at.start * CLUSTER_LEN);
        let refcount_clusters = self.refcount_table.end - self.refcount_table.start;
        let mut header = Header(Vec::new());
        header.u32(MAGIC);
        header.u32(VERSION);
        header.u64(0); // offset of the backing file's name: none,
        header.u32(0); // and its length
        header.u32(CLUSTER_BITS);
        header.u64(size);
        header.u32(0); // encryption: none
        header.u32(self.l1_entries as u32);
        header.u64(l1);
        header.u64(refcounts);
        header.u32(refcount_clusters as u32);
        header.u32(0); // number of snapshots,
        header.u64(0); // and where they are
        header.u64(0); // incompatible features
        header.u64(0); // compatible features
        header.u64(0); // auto-clear features
        header.u32(REFCOUNT_ORDER);
        header.u32(HEADER_LEN);
        header.u64(0); // the end of the header extensions
        header.0
    }
}

/// The header: big-endian numbers.
struct Header(Vec<u8>);

impl Header {
    fn u32(&mut self, value: u32) {
        self.0.extend(value.to_be_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_be_bytes());
    }
}

/// Writes a table of 8-byte entries over its clusters.
fn write_tables<E>(
    place: &Range<u64>,
    entries: u64,
    entry: impl Fn(u64) -> u64,
    write: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    for (number, cluster) in place.clone().enumerate() {
        let first = number as u64 * ENTRIES;
        let entries = first..entries.min(first + ENTRIES);
        let content: Vec<u8> = entries.flat_map(|n| entry(n).to_be_bytes()).collect();
        write(cluster, &content)?;
    }
    Ok(())
}

/// The clusters that ranges of bytes touch, neighbours joined.
fn runs_of(data: impl Iterator<Item = Range<u64>>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for bytes in data.filter(|bytes| !bytes.is_empty()) {
        let (start, end) = (bytes.start / CLUSTER_LEN, bytes.end.div_ceil(CLUSTER_LEN));
        match runs.last_mut() {
            Some(last) if start <= last.disk.end => last.disk.end = end,
            Some(last) => {
                let image = last.image + (last.disk.end - last.disk.start);
                runs.push(Run { disk: start..end, image });
            }
            None => runs.push(Run { disk: start..end, image: 0 }),
        }
    }
    runs
}

/// Which clusters of data are not zero, one bit each.
struct Used(Vec<AtomicU64>);

impl Used {
    fn new(clusters: u64) -> Self {
        Self((0..clusters.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Notes that something was written to the image.
    fn add(&self, layout: &Layout, offset: u64, len: u64) {
        for cluster in offset / CLUSTER_LEN..(offset + len).div_ceil(CLUSTER_LEN) {
            let bit = cluster - layout.data;
            self.0[(bit / 64) as usize].fetch_or(1 << (bit % 64), Ordering::Relaxed);
        }
    }

    /// Whether a cluster of the image holds data.
    fn has(&self, layout: &Layout, cluster: u64) -> bool {
        let Some(bit) = cluster.checked_sub(layout.data) else { return false };
        let bits = self.0.get((bit / 64) as usize);
        bits.is_some_and(|bits| bits.load(Ordering::Relaxed) & 1 << (bit % 64) != 0)
    }
}

#[cfg(test)]
mod tests;
