//! A worker: zero check, hash, deduplication, compression, sealing, into a pack of its own.

use zstd::bulk::Compressor;

use super::{
    Stored, WriterOptions,
    builder::PackBuilder,
    shared::{Job, Shared},
};
use crate::{BlobId, BlobKind, RepositoryError};

/// Works until there are no more jobs, then hands on its unfinished pack. The first packs of the workers,
/// by their `number`, are of different lengths: all of them full at once would be a rush for the uploader.
pub(super) fn run(shared: &Shared, number: usize) -> Result<(), RepositoryError> {
    let WriterOptions { pack_len, threads, .. } = shared.options;
    let (builder, compressor) = (new_builder(shared), shared.compressor()?);
    let pack_len = (pack_len * (number + 1) / threads.max(1)).max(pack_len / 4);
    let mut worker = Worker { shared, builder, pack_len, compressor };
    while let Some(job) = shared.jobs.pop() {
        worker.process(&job)?;
    }
    shared.check()?;
    worker.hand_on()
}

struct Worker<'a> {
    shared: &'a Shared,
    builder: PackBuilder,
    /// From which length on it is full.
    pack_len: usize,
    compressor: Compressor<'static>,
}

impl Worker<'_> {
    fn process(&mut self, job: &Job) -> Result<(), RepositoryError> {
        match job {
            Job::Blob(id, plain) => self.store(plain, Some(*id), None),
            Job::Run(run) => run
                .chunks()
                .try_for_each(|(chunk, plain)| self.store(plain, None, Some((run.disk, chunk)))),
        }
    }

    /// Stores a blob, whose id may be known, and reports it as that of a disk's chunk.
    fn store(
        &mut self,
        plain: &[u8],
        id: Option<BlobId>,
        report: Option<(u32, u64)>,
    ) -> Result<(), RepositoryError> {
        let zero = is_zero(plain);
        let id = match id {
            Some(id) => id,
            None if zero => self.zero_id(plain),
            None => BlobId::of(plain),
        };
        let fresh = self.shared.claim(BlobKind::Data, &id);
        let mut stored_len = 0;
        if fresh {
            let key = self.shared.key();
            stored_len = self.builder.add(key, &mut self.compressor, id, plain)?;
            if self.builder.len() >= self.pack_len {
                self.pack_len = self.shared.options.pack_len;
                let next = new_builder(self.shared);
                self.shared.upload(std::mem::replace(&mut self.builder, next))?;
            }
        }
        let report = report.map(|(disk, chunk)| Stored { disk, chunk, id, fresh, stored_len });
        self.shared.done(plain.len(), fresh, zero, report);
        Ok(())
    }

    /// Zeros of each length are hashed once. Who remembers an id stores it, or the writer fails.
    fn zero_id(&self, zeros: &[u8]) -> BlobId {
        let Ok(len) = u32::try_from(zeros.len()) else { return BlobId::of(zeros) };
        self.shared.known_zero(len).unwrap_or_else(|| {
            let id = BlobId::of(zeros);
            self.shared.remember_zero(len, id);
            id
        })
    }

    /// Unfinished packs are joined as long as they fit into one: a small backup makes one pack.
    fn hand_on(mut self) -> Result<(), RepositoryError> {
        let mut leftover = self.shared.leftover.lock().expect("no panic while locked");
        match leftover.take() {
            None => {
                *leftover = Some(self.builder);
                return Ok(());
            }
            Some(other) if other.len() + self.builder.len() <= self.shared.options.pack_len => {
                self.builder.append(other);
                *leftover = Some(self.builder);
                return Ok(());
            }
            Some(other) => *leftover = Some(other),
        }
        drop(leftover);
        self.shared.upload(self.builder)
    }
}

fn new_builder(shared: &Shared) -> PackBuilder {
    let kept = shared.buffers.lock().expect("no panic while locked").pop();
    PackBuilder::new(BlobKind::Data, kept.unwrap_or_default())
}

/// Whether all bytes are zero; stops early, for most data differs in the first few.
fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(256);
    let any = |block: &[u8]| block.iter().fold(0, |any, byte| any | byte) != 0;
    !blocks.by_ref().any(any) && !any(blocks.remainder())
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        for len in [0, 1, 255, 256, 257, 1000] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
