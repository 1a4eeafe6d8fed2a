//! Writes new packs of blobs that are in others already, and the index files that mention them.

use std::sync::Arc;

use zstd::bulk::{Compressor, Decompressor};

use crate::{
    Begun, BlobId, BlobKind, Defect, FileId, FileKind, Repository, RepositoryError, blob,
    index::file::{BlobEntry, IndexFile, PackEntry},
    pack::PackedBlob,
    writer::{INDEX_BLOBS_MAX, builder::PackBuilder},
};

/// A pack ends when it has so many bytes.
const PACK_LEN: usize = 16 << 20;
/// So many bytes of packs are made durable at once.
const UNSETTLED_LEN_MAX: usize = 64 << 20;
/// How well what is stored anew is compressed.
const LEVEL: i32 = 1;

/// New packs in the making.
pub(crate) struct Packer<'a> {
    repository: &'a Repository,
    data: PackBuilder,
    trees: PackBuilder,
    begun: Vec<Begun>,
    begun_len: usize,
    unlisted: Vec<PackEntry>,
    unlisted_blobs: usize,
    decompressor: Decompressor<'static>,
    plain: Vec<u8>,
    scratch: Vec<u8>,
    /// All packs that were written, also those that no index file mentions yet.
    pub(crate) written: Vec<FileId>,
    /// Bytes of those.
    pub(crate) written_len: u64,
}

impl<'a> Packer<'a> {
    pub(crate) fn new(repository: &'a Repository) -> Result<Self, RepositoryError> {
        let decompressor = Decompressor::new()
            .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
        let builder = |kind| PackBuilder::new(kind, Vec::new());
        Ok(Self {
            repository,
            data: builder(BlobKind::Data),
            trees: builder(BlobKind::Tree),
            begun: Vec::new(),
            begun_len: 0,
            unlisted: Vec::new(),
            unlisted_blobs: 0,
            decompressor,
            plain: Vec::new(),
            scratch: Vec::new(),
            written: Vec::new(),
            written_len: 0,
        })
    }

    /// Whether a sealed blob is what it should be.
    pub(crate) fn verify(&mut self, blob: &PackedBlob, sealed: &[u8]) -> Result<(), Defect> {
        self.scratch.clear();
        self.scratch.extend_from_slice(sealed);
        let key = self.repository.key();
        blob::open(key, &mut self.decompressor, blob, &mut self.scratch, &mut self.plain)
    }

    /// Takes a blob over as it is sealed. It must have been verified.
    pub(crate) fn copy(&mut self, blob: &PackedBlob, sealed: &[u8]) -> Result<(), RepositoryError> {
        let builder = match blob.kind {
            BlobKind::Data => &mut self.data,
            BlobKind::Tree => &mut self.trees,
        };
        builder.add_sealed(blob, sealed)?;
        self.write_full(blob.kind)
    }

    /// Stores a plain blob.
    pub(crate) fn add(
        &mut self,
        kind: BlobKind,
        id: BlobId,
        plain: &[u8],
    ) -> Result<(), RepositoryError> {
        let key = self.repository.key();
        match kind {
            BlobKind::Data => {
                let mut compressor = Compressor::new(LEVEL)
                    .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
                self.data.add(key, &mut compressor, id, plain)?
            }
            BlobKind::Tree => {
                let len = plain.len() as u64;
                self.trees.add_streamed(key, LEVEL, id, len, |to| to.write_all(plain))?
            }
        };
        self.write_full(kind)
    }

    /// Makes all of it durable, and known to the index.
    pub(crate) fn finish(&mut self) -> Result<(), RepositoryError> {
        self.write(BlobKind::Data)?;
        self.write(BlobKind::Tree)?;
        self.write_index()
    }

    /// The packs that were written and no index file mentions.
    pub(crate) fn unlisted(&self) -> impl Iterator<Item = FileId> {
        self.unlisted.iter().map(|pack| pack.id)
    }

    fn write_full(&mut self, kind: BlobKind) -> Result<(), RepositoryError> {
        let builder = match kind {
            BlobKind::Data => &self.data,
            BlobKind::Tree => &self.trees,
        };
        match builder.len() >= PACK_LEN {
            true => self.write(kind),
            false => Ok(()),
        }
    }

    fn write(&mut self, kind: BlobKind) -> Result<(), RepositoryError> {
        let builder = match kind {
            BlobKind::Data => &mut self.data,
            BlobKind::Tree => &mut self.trees,
        };
        if builder.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(builder, PackBuilder::new(kind, Vec::new()));
        let pack = full.finish(self.repository.key());
        let content = &pack.buffer[..pack.len];
        let id = FileId::of(content);
        self.begun.push(self.repository.backend().begin(FileKind::Pack, &id, content)?);
        self.written.push(id);
        self.written_len += pack.len as u64;
        self.begun_len += pack.len;
        self.unlisted_blobs += pack.blobs.len();
        let blobs = pack.blobs.into_iter().map(BlobEntry).collect();
        self.unlisted.push(PackEntry { id, blobs });
        if self.unlisted_blobs >= INDEX_BLOBS_MAX {
            return self.write_index();
        }
        if self.begun_len >= UNSETTLED_LEN_MAX {
            self.settle()?;
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<(), RepositoryError> {
        self.begun_len = 0;
        Ok(self.repository.backend().settle(std::mem::take(&mut self.begun))?)
    }

    fn write_index(&mut self) -> Result<(), RepositoryError> {
        self.settle()?;
        if !self.unlisted.is_empty() {
            let packs = &self.unlisted;
            self.repository.write_json(FileKind::Index, &IndexFile { packs })?;
            self.unlisted.clear();
            self.unlisted_blobs = 0;
        }
        Ok(())
    }
}
