//! Packs: there, as long as they should be, and every byte as it was written.

use std::{collections::HashMap, sync::Mutex, thread};

use rand::RngExt;
use zstd::bulk::Decompressor;

use super::{Affects, CheckProgress, CheckReport, Finding, unreadable};
use crate::{
    Defect, FileId, FileKind, FileRef, Index, Repository, RepositoryError, blob,
    crypto::MasterKey,
    pack::{self, PackedBlob},
};

/// Every pack of the index exists and has the length its blobs add up to.
pub(super) fn check_sizes(
    index: &Index,
    sizes: &HashMap<FileId, u64>,
    findings: &mut Vec<Finding>,
) {
    let wrong = |pack: &&crate::index::Pack| sizes.get(&pack.id) != Some(&pack.file_len());
    let wrong: Vec<_> = index.packs().iter().filter(wrong).collect();
    if wrong.is_empty() {
        return;
    }
    let by_pack = index.by_pack();
    for pack in wrong {
        let actual = sizes.get(&pack.id).copied();
        let lost = |blob: &&PackedBlob| {
            actual.is_none_or(|len| u64::from(blob.offset) + u64::from(blob.len) > len)
        };
        let blobs = by_pack.get(&pack.id).map(Vec::as_slice).unwrap_or_default();
        let copies = blobs.iter().filter(lost).map(|blob| (blob.kind, blob.id)).collect();
        let defect = match actual {
            Some(actual) => Defect::Length { expected: pack.file_len(), actual },
            None => Defect::Missing,
        };
        let file = FileRef { kind: FileKind::Pack, id: pack.id };
        findings.push(Finding::new(file, defect, Affects::Copies(copies)));
    }
}

fn present(index: &Index, sizes: &HashMap<FileId, u64>) -> Vec<(FileId, u64)> {
    let present = |pack: &crate::index::Pack| Some((pack.id, *sizes.get(&pack.id)?));
    index.packs().iter().filter_map(present).collect()
}

/// Of the packs that are there the part that their names put them in.
pub(super) fn part(
    index: &Index,
    sizes: &HashMap<FileId, u64>,
    part: u32,
    of: u32,
) -> Vec<(FileId, u64)> {
    let mut packs = present(index, sizes);
    packs.retain(|(id, _)| id.part(of) == part);
    packs
}

/// A random share of the packs that are there, at least one if there is any.
pub(super) fn choose(
    index: &Index,
    sizes: &HashMap<FileId, u64>,
    percent: f64,
) -> Vec<(FileId, u64)> {
    let mut packs = present(index, sizes);
    let share = (packs.len() as f64 * percent.clamp(0.0, 100.0) / 100.0).ceil() as usize;
    for chosen in 0..share.min(packs.len()) {
        let other = rand::rng().random_range(chosen..packs.len());
        packs.swap(chosen, other);
    }
    packs.truncate(share);
    packs
}

impl Repository {
    /// Reads packs whole, on all cores.
    pub(super) fn check_packs(
        &self,
        index: &Index,
        packs: &[(FileId, u64)],
        progress: &(dyn Fn(CheckProgress) + Sync),
        report: &mut CheckReport,
        findings: &mut Vec<Finding>,
    ) -> Result<(), RepositoryError> {
        let by_pack = index.by_pack();
        let total = packs.len() as u64;
        progress(CheckProgress::Packs { done: 0, total, bytes: 0 });
        let queue = Mutex::new(packs.iter());
        let results = Mutex::new((0, 0, Vec::new()));
        let read_all = || -> Result<(), RepositoryError> {
            let mut pack_reader = PackReader::new(self.key())?;
            loop {
                let next = queue.lock().expect("no panic while locked").next();
                let Some((id, len)) = next else { return Ok(()) };
                let blobs = by_pack.get(id).map(Vec::as_slice).unwrap_or_default();
                let found = self.check_pack(&mut pack_reader, id, *len, blobs);
                let mut results = results.lock().expect("no panic while locked");
                results.0 += 1;
                results.1 += len;
                results.2.extend(found);
                progress(CheckProgress::Packs { done: results.0, total, bytes: results.1 });
            }
        };
        let threads = pack::threads();
        thread::scope(|scope| -> Result<(), RepositoryError> {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(read_all)).collect();
            let mut outcome = read_all();
            for other in others {
                let ended = other.join().unwrap_or(Err(RepositoryError::WriterDied));
                outcome = outcome.and(ended);
            }
            outcome
        })?;
        let (done, bytes, found) = results.into_inner().expect("no panic while locked");
        (report.packs_read, report.bytes_read) = (done, bytes);
        findings.extend(found);
        Ok(())
    }

    fn check_pack(
        &self,
        reader: &mut PackReader<'_>,
        id: &FileId,
        len: u64,
        expected: &[PackedBlob],
    ) -> Vec<Finding> {
        let file = FileRef { kind: FileKind::Pack, id: *id };
        let all = || expected.iter().map(|blob| (blob.kind, blob.id)).collect();
        if len > FileKind::Pack.len_max() {
            let defect = Defect::TooLong { len_max: FileKind::Pack.len_max() };
            return vec![Finding::new(file, defect, Affects::Nobody)];
        }
        reader.content.resize(len as usize, 0);
        let read = self.backend().read_range(FileKind::Pack, id, 0, &mut reader.content);
        if let Err(source) = read {
            return vec![Finding::new(file, unreadable(source), Affects::Copies(all()))];
        }
        let named = FileId::of(&reader.content) == *id;
        let header = reader.check_header(expected);
        let mut findings: Vec<_> =
            expected.iter().filter_map(|blob| reader.check_blob(file, blob)).collect();
        // The header matters only when an index must be rebuilt; the blobs may be all right.
        if let Err(defect) = header {
            findings.push(Finding::new(file, defect, Affects::Nobody));
        }
        if !named && findings.is_empty() {
            findings.push(Finding::new(file, Defect::Name, Affects::Nobody));
        }
        findings
    }
}

/// Buffers and contexts for reading one pack after another.
struct PackReader<'a> {
    key: &'a MasterKey,
    content: Vec<u8>,
    plain: Vec<u8>,
    decompressor: Decompressor<'static>,
}

impl<'a> PackReader<'a> {
    fn new(key: &'a MasterKey) -> Result<Self, RepositoryError> {
        let decompressor = Decompressor::new()
            .map_err(|source| RepositoryError::Compress { source: std::sync::Arc::new(source) })?;
        Ok(Self { key, content: Vec::new(), plain: Vec::new(), decompressor })
    }

    fn check_header(&mut self, expected: &[PackedBlob]) -> Result<(), Defect> {
        let len = self.content.len();
        let truncated = Defect::Truncated { len: len as u64 };
        let (rest, header_len) = self.content.split_last_chunk::<4>().ok_or(truncated)?;
        let header_len = u32::from_le_bytes(*header_len) as usize;
        let start = rest.len().checked_sub(header_len).ok_or(Defect::Header)?;
        let mut header = rest[start..].to_vec();
        let blobs = pack::decode_header(self.key.open_in_place(&mut header)?)?;
        let blobs_len: usize = blobs.iter().map(|blob| blob.len as usize).sum();
        match blobs_len == start && blobs == expected {
            true => Ok(()),
            false => Err(Defect::IndexDiffers),
        }
    }

    fn check_blob(&mut self, file: FileRef, blob: &PackedBlob) -> Option<Finding> {
        let range = blob.offset as usize..blob.offset as usize + blob.len as usize;
        let checked = match self.content.get_mut(range) {
            Some(sealed) => {
                blob::open(self.key, &mut self.decompressor, blob, sealed, &mut self.plain)
            }
            None => Err(Defect::Truncated { len: self.content.len() as u64 }),
        };
        let affects = Affects::Copies(vec![(blob.kind, blob.id)]);
        let found = |defect| Finding { file: Some(file), blob: Some(blob.id), defect, affects };
        checked.err().map(found)
    }
}
