//! The uploader: makes packs durable one after another, then tells the index.

use std::time::Instant;

use super::shared::Shared;
use crate::{
    FileId, FileKind, RepositoryError,
    index::file::{BlobEntry, IndexFile, PackEntry},
};

/// An index file of so many blobs is full; restic has the same bound.
const INDEX_BLOBS_MAX: usize = 50_000;

/// Works until there are no more packs, then writes the rest of the index.
pub(super) fn run(shared: &Shared) -> Result<(), RepositoryError> {
    let mut unlisted: Vec<PackEntry> = Vec::new();
    let (mut blobs, mut since) = (0, Instant::now());
    while let Some(pack) = shared.uploads.pop() {
        let content = &pack.buffer[..pack.len];
        let id = FileId::of(content);
        shared.repository.backend().write(FileKind::Pack, &id, content)?;
        shared.written(pack.len, true);
        if unlisted.is_empty() {
            since = Instant::now();
        }
        blobs += pack.blobs.len();
        let entries = pack.blobs.into_iter().map(BlobEntry).collect();
        unlisted.push(PackEntry { id, blobs: entries });
        shared.buffers.lock().expect("no panic while locked").push(pack.buffer);
        if blobs >= INDEX_BLOBS_MAX || since.elapsed() >= shared.options.index_every {
            write_index(shared, &mut unlisted)?;
            blobs = 0;
        }
    }
    // A failure elsewhere: what is durable stays unmentioned, nobody will refer to it.
    shared.check()?;
    write_index(shared, &mut unlisted)
}

/// Lists packs that are durable; the list is empty afterwards.
fn write_index(shared: &Shared, packs: &mut Vec<PackEntry>) -> Result<(), RepositoryError> {
    if packs.is_empty() {
        return Ok(());
    }
    let (_, len) = shared.repository.write_json_sized(FileKind::Index, &IndexFile { packs })?;
    shared.written(len, false);
    packs.clear();
    Ok(())
}
