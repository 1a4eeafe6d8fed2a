//! A pack in the making: blobs are compressed and sealed in the very place they are stored from.

use std::sync::Arc;

use zstd::{bulk::Compressor, zstd_safe};

use crate::{
    BlobId, BlobKind, RepositoryError,
    crypto::{MasterKey, NONCE_LEN, OVERHEAD},
    pack::{self, PackedBlob},
};

/// Blobs of one kind, sealed, one after another.
#[derive(Debug)]
pub(super) struct PackBuilder {
    kind: BlobKind,
    /// Zeroed once and used again for the next pack; the first `len` bytes count.
    buffer: Vec<u8>,
    len: usize,
    blobs: Vec<PackedBlob>,
}

/// A pack that only needs to be written.
#[derive(Debug)]
pub(super) struct FinishedPack {
    pub(super) buffer: Vec<u8>,
    pub(super) len: usize,
    pub(super) blobs: Vec<PackedBlob>,
}

impl PackBuilder {
    pub(super) fn new(kind: BlobKind, buffer: Vec<u8>) -> Self {
        Self { kind, buffer, len: 0, blobs: Vec::new() }
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blobs.is_empty()
    }

    /// Adds a blob; returns its sealed length.
    pub(super) fn add(
        &mut self,
        key: &MasterKey,
        compressor: &mut Compressor<'_>,
        id: BlobId,
        plain: &[u8],
    ) -> Result<u32, RepositoryError> {
        let len_max = self.kind.len_max();
        let too_long =
            || RepositoryError::BlobTooLong { len: plain.len() as u64, len_max: len_max.into() };
        let plain_len = u32::try_from(plain.len()).ok().filter(|&len| len <= len_max);
        let plain_len = plain_len.ok_or_else(too_long)?;

        let text = self.len + NONCE_LEN;
        let bound = zstd_safe::compress_bound(plain.len()).max(plain.len());
        self.reserve(text + bound + OVERHEAD);
        let compressed = compressor
            .compress_to_buffer(plain, &mut self.buffer[text..text + bound])
            .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
        let (text_len, uncompressed_len) =
            if compressed < plain.len() || self.kind == BlobKind::Tree {
                (compressed, Some(plain_len))
            } else {
                self.buffer[text..text + plain.len()].copy_from_slice(plain);
                (plain.len(), None)
            };
        let end = self.len + text_len + OVERHEAD;
        let offset = u32::try_from(self.len).map_err(|_| too_long())?;
        let len = u32::try_from(end - self.len).map_err(|_| too_long())?;
        key.seal_in_place(&mut self.buffer[self.len..end]);
        self.blobs.push(PackedBlob { id, kind: self.kind, offset, len, uncompressed_len });
        self.len = end;
        Ok(len)
    }

    /// Appends the sealed blobs of another pack; returns its buffer.
    pub(super) fn append(&mut self, other: Self) -> Vec<u8> {
        self.reserve(self.len + other.len);
        self.buffer[self.len..self.len + other.len].copy_from_slice(&other.buffer[..other.len]);
        let shift = u32::try_from(self.len).expect("both are shorter than a pack");
        let moved = other.blobs.iter();
        self.blobs.extend(moved.map(|blob| PackedBlob { offset: blob.offset + shift, ..*blob }));
        self.len += other.len;
        other.buffer
    }

    /// Adds the header.
    pub(super) fn finish(mut self, key: &MasterKey) -> FinishedPack {
        let mut header = Vec::with_capacity(self.blobs.len() * 41);
        pack::encode_header(&self.blobs, &mut header);
        let header = key.seal(&header);
        let header_len = u32::try_from(header.len()).expect("a pack has some thousand blobs");
        let end = self.len + header.len() + 4;
        self.reserve(end);
        self.buffer[self.len..end - 4].copy_from_slice(&header);
        self.buffer[end - 4..end].copy_from_slice(&header_len.to_le_bytes());
        FinishedPack { buffer: self.buffer, len: end, blobs: self.blobs }
    }

    fn reserve(&mut self, len: usize) {
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
    }
}
