//! A pack in the making: blobs are compressed and sealed in the very place they are stored from.

use std::{
    io::{self, BufWriter, Write},
    sync::Arc,
};

use sha2::{Digest as _, Sha256};
use zstd::{bulk::Compressor, zstd_safe};

use crate::{
    BlobId, BlobKind, FileId, RepositoryError,
    crypto::{MasterKey, NONCE_LEN, OVERHEAD},
    pack::{self, PackedBlob},
};

/// Blobs of one kind, sealed, one after another.
#[derive(Debug)]
pub(crate) struct PackBuilder {
    kind: BlobKind,
    /// Zeroed once and used again for the next pack; the first `len` bytes count.
    buffer: Vec<u8>,
    len: usize,
    /// Of what counts: each blob is hashed while it is in a core's cache, and the last one leaves little to do.
    digest: Sha256,
    blobs: Vec<PackedBlob>,
}

/// A pack that only needs to be written.
#[derive(Debug)]
pub(crate) struct FinishedPack {
    pub(crate) id: FileId,
    pub(crate) buffer: Vec<u8>,
    pub(crate) len: usize,
    pub(crate) blobs: Vec<PackedBlob>,
}

impl PackBuilder {
    pub(crate) fn new(kind: BlobKind, buffer: Vec<u8>) -> Self {
        Self { kind, buffer, len: 0, digest: Sha256::new(), blobs: Vec::new() }
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.blobs.is_empty()
    }

    /// Adds a data blob; returns its sealed length.
    pub(crate) fn add(
        &mut self,
        key: &MasterKey,
        compressor: &mut Compressor<'_>,
        id: BlobId,
        plain: &[u8],
    ) -> Result<u32, RepositoryError> {
        let plain_len = self.checked_len(plain.len() as u64)?;
        let text = self.len + NONCE_LEN;
        let bound = zstd_safe::compress_bound(plain.len()).max(plain.len());
        self.reserve(text + bound + OVERHEAD);
        let compressed = compressor
            .compress_to_buffer(plain, &mut self.buffer[text..text + bound])
            .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
        let (text_len, uncompressed_len) = if compressed < plain.len() {
            (compressed, Some(plain_len))
        } else {
            self.buffer[text..text + plain.len()].copy_from_slice(plain);
            (plain.len(), None)
        };
        self.seal_up_to(key, self.len + text_len + OVERHEAD, id, uncompressed_len)
    }

    /// Adds a tree blob of `plain_len` bytes, which `write` writes: that of a big disk is never in
    /// memory as a whole. Always compressed.
    pub(crate) fn add_streamed(
        &mut self,
        key: &MasterKey,
        level: i32,
        id: BlobId,
        plain_len: u64,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<u32, RepositoryError> {
        let uncompressed_len = Some(self.checked_len(plain_len)?);
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.truncate(self.len);
        buffer.extend([0; NONCE_LEN]);
        let compress = || {
            let mut encoder = zstd::Encoder::new(buffer, level)?;
            encoder.set_pledged_src_size(Some(plain_len))?;
            let mut buffered = BufWriter::with_capacity(128 << 10, encoder);
            write(&mut buffered)?;
            buffered.into_inner().map_err(io::IntoInnerError::into_error)?.finish()
        };
        self.buffer =
            compress().map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
        self.buffer.extend([0; OVERHEAD - NONCE_LEN]);
        self.seal_up_to(key, self.buffer.len(), id, uncompressed_len)
    }

    /// Adds a blob as it is sealed already, in another pack under the same key.
    pub(crate) fn add_sealed(
        &mut self,
        blob: &PackedBlob,
        sealed: &[u8],
    ) -> Result<(), RepositoryError> {
        let end = self.len + sealed.len();
        let (len_max, len) = (u32::MAX.into(), end as u64);
        let offset =
            u32::try_from(self.len).map_err(|_| RepositoryError::BlobTooLong { len, len_max })?;
        self.reserve(end);
        self.buffer[self.len..end].copy_from_slice(sealed);
        self.blobs.push(PackedBlob { offset, ..*blob });
        self.count_up_to(end);
        Ok(())
    }

    /// Seals what has been put behind the last blob; returns its sealed length.
    fn seal_up_to(
        &mut self,
        key: &MasterKey,
        end: usize,
        id: BlobId,
        uncompressed_len: Option<u32>,
    ) -> Result<u32, RepositoryError> {
        let len_max = u32::MAX.into();
        let too_long = |_| RepositoryError::BlobTooLong { len: end as u64, len_max };
        let offset = u32::try_from(self.len).map_err(too_long)?;
        let len = u32::try_from(end - self.len).map_err(too_long)?;
        key.seal_in_place(&mut self.buffer[self.len..end]);
        self.blobs.push(PackedBlob { id, kind: self.kind, offset, len, uncompressed_len });
        self.count_up_to(end);
        Ok(len)
    }

    /// What is before `end` counts from now on.
    fn count_up_to(&mut self, end: usize) {
        self.digest.update(&self.buffer[self.len..end]);
        self.len = end;
    }

    fn checked_len(&self, len: u64) -> Result<u32, RepositoryError> {
        let len_max = self.kind.len_max();
        let fits = u32::try_from(len).ok().filter(|&len| len <= len_max);
        fits.ok_or(RepositoryError::BlobTooLong { len, len_max: len_max.into() })
    }

    /// Appends the sealed blobs of another pack; returns its buffer.
    pub(crate) fn append(&mut self, other: Self) -> Vec<u8> {
        self.reserve(self.len + other.len);
        self.buffer[self.len..self.len + other.len].copy_from_slice(&other.buffer[..other.len]);
        let shift = u32::try_from(self.len).expect("both are shorter than a pack");
        let moved = other.blobs.iter();
        self.blobs.extend(moved.map(|blob| PackedBlob { offset: blob.offset + shift, ..*blob }));
        self.count_up_to(self.len + other.len);
        other.buffer
    }

    /// Adds the header, and names the whole.
    pub(crate) fn finish(mut self, key: &MasterKey) -> FinishedPack {
        let mut header = Vec::with_capacity(self.blobs.len() * 41);
        pack::encode_header(&self.blobs, &mut header);
        let header = key.seal(&header);
        let header_len = u32::try_from(header.len()).expect("a pack has some thousand blobs");
        let end = self.len + header.len() + 4;
        self.reserve(end);
        self.buffer[self.len..end - 4].copy_from_slice(&header);
        self.buffer[end - 4..end].copy_from_slice(&header_len.to_le_bytes());
        self.count_up_to(end);
        let id = FileId(self.digest.finalize().into());
        FinishedPack { id, buffer: self.buffer, len: end, blobs: self.blobs }
    }

    fn reserve(&mut self, len: usize) {
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
    }
}
