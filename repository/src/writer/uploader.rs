//! The uploader: writes packs one after another, makes them durable, then tells the index.

use std::time::Instant;

use super::{builder::FinishedPack, shared::Shared};
use crate::{
    AnnouncedLock, Begun, FileKind, RepositoryError,
    index::file::{BlobEntry, IndexFile, PackEntry},
};

/// An index file of so many blobs is full; restic has the same bound.
pub(crate) const INDEX_BLOBS_MAX: usize = 50_000;
/// So many bytes of packs are made durable at once. Each time, a file system may hold up everybody who
/// writes to it, a guest's image among them; and what is not durable yet takes up its memory.
const UNSETTLED_LEN_MAX: usize = 64 << 20;

/// Works until there are no more packs, then writes the rest of the index.
pub(super) fn run(shared: &Shared, lock: Option<AnnouncedLock>) -> Result<(), RepositoryError> {
    if let Some(lock) = lock {
        *shared.lock.lock().expect("no panic while locked") = Some(lock.settle()?);
    }
    let mut uploader =
        Uploader { shared, begun: Vec::new(), begun_len: 0, unlisted: Vec::new(), blobs: 0 };
    let mut since = Instant::now();
    while let Some(pack) = shared.uploads.pop() {
        if uploader.unlisted.is_empty() {
            since = Instant::now();
        }
        uploader.write(pack)?;
        if uploader.begun_len >= UNSETTLED_LEN_MAX {
            uploader.settle()?;
        }
        if uploader.blobs >= INDEX_BLOBS_MAX || since.elapsed() >= shared.options.index_every {
            uploader.write_index()?;
        }
    }
    // A failure elsewhere: what is durable stays unmentioned, nobody will refer to it.
    shared.check()?;
    uploader.write_index()
}

struct Uploader<'a> {
    shared: &'a Shared,
    /// Packs that are not durable yet.
    begun: Vec<Begun>,
    begun_len: usize,
    /// Packs that no index file mentions.
    unlisted: Vec<PackEntry>,
    blobs: usize,
}

impl Uploader<'_> {
    fn write(&mut self, pack: FinishedPack) -> Result<(), RepositoryError> {
        let (id, content) = (pack.id, &pack.buffer[..pack.len]);
        self.begun.push(self.shared.repository.backend().begin(FileKind::Pack, &id, content)?);
        self.begun_len += pack.len;
        self.shared.written(pack.len, true);
        self.blobs += pack.blobs.len();
        let entries = pack.blobs.into_iter().map(BlobEntry).collect();
        self.unlisted.push(PackEntry { id, blobs: entries });
        self.shared.buffers.lock().expect("no panic while locked").push(pack.buffer);
        Ok(())
    }

    fn settle(&mut self) -> Result<(), RepositoryError> {
        self.begun_len = 0;
        Ok(self.shared.repository.backend().settle(std::mem::take(&mut self.begun))?)
    }

    /// Lists the packs written so far, once they are durable.
    fn write_index(&mut self) -> Result<(), RepositoryError> {
        self.settle()?;
        if self.unlisted.is_empty() {
            return Ok(());
        }
        let file = IndexFile { packs: &self.unlisted };
        let (_, len) = self.shared.repository.write_json_sized(FileKind::Index, &file)?;
        self.shared.written(len, false);
        self.unlisted.clear();
        self.blobs = 0;
        Ok(())
    }
}
