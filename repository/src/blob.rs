//! Sealed blobs to their plain content.

use std::sync::Arc;

use zstd::{bulk::Decompressor, zstd_safe};

use crate::{BlobId, Defect, RepositoryError, crypto::MasterKey, pack::PackedBlob};

/// So many blobs are opened or made, and hashed, at once…
pub(crate) const BATCH: usize = BlobId::AT_ONCE;
/// …as long as they have no more bytes than this together: they should stay in a core's cache.
pub(crate) const BATCH_LEN_MAX: usize = 4 << 20;

/// Authenticates, decrypts in place, decompresses into `plain` and compares with the id, in this
/// order. Never yields more bytes than the index promised.
pub(crate) fn open(
    key: &MasterKey,
    decompressor: &mut Decompressor<'_>,
    blob: &PackedBlob,
    sealed: &mut [u8],
    plain: &mut Vec<u8>,
) -> Result<(), Defect> {
    open_unnamed(key, decompressor, blob, sealed, plain)?;
    if BlobId::of(plain) != blob.id {
        return Err(Defect::Digest);
    }
    Ok(())
}

/// Opens the blobs of packs, many at a time. For one thread.
pub(crate) struct Opener<'a> {
    key: &'a MasterKey,
    decompressor: Decompressor<'static>,
    plain: [Vec<u8>; BATCH],
}

impl<'a> Opener<'a> {
    pub(crate) fn new(key: &'a MasterKey) -> Result<Self, RepositoryError> {
        let decompressor = Decompressor::new()
            .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
        Ok(Self { key, decompressor, plain: Default::default() })
    }

    /// Opens each of `blobs` as [`open`] does, and hands on its position and content. `sealed` is the
    /// part of their pack that begins at byte `start`.
    pub(crate) fn open_each<E>(
        &mut self,
        blobs: &[PackedBlob],
        start: u32,
        sealed: &mut [u8],
        mut take: impl FnMut(usize, Result<&[u8], Defect>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0;
        while done < blobs.len() {
            let batch = &blobs[done..done + batch_len(&blobs[done..])];
            let (key, decompressor) = (self.key, &mut self.decompressor);
            let open = |(blob, plain): (&PackedBlob, &mut Vec<u8>)| {
                let sealed = part(sealed, start, blob)?;
                open_unnamed(key, decompressor, blob, sealed, plain)
            };
            let opened: Vec<_> = batch.iter().zip(&mut self.plain).map(open).collect();
            let plain: Vec<_> = self.plain[..batch.len()].iter().map(Vec::as_slice).collect();
            let ids = BlobId::of_each(&plain);
            for (n, opened) in opened.into_iter().enumerate() {
                let named = if ids[n] == batch[n].id { Ok(plain[n]) } else { Err(Defect::Digest) };
                take(done + n, opened.and(named))?;
            }
            done += batch.len();
        }
        Ok(())
    }
}

/// How many of `blobs`, which are not empty, are opened at once.
fn batch_len(blobs: &[PackedBlob]) -> usize {
    let mut len = 0;
    let fits = |blob: &&PackedBlob| {
        len += blob.plain_len() as usize;
        len <= BATCH_LEN_MAX
    };
    blobs.iter().take(BATCH).take_while(fits).count().max(1)
}

/// The sealed bytes of a blob.
fn part<'a>(sealed: &'a mut [u8], start: u32, blob: &PackedBlob) -> Result<&'a mut [u8], Defect> {
    let truncated = Defect::Truncated { len: sealed.len() as u64 };
    let range =
        blob.offset.checked_sub(start).map(|at| at as usize..at as usize + blob.len as usize);
    range.and_then(|range| sealed.get_mut(range)).ok_or(truncated)
}

/// All of [`open`] but for the comparison with the id.
fn open_unnamed(
    key: &MasterKey,
    decompressor: &mut Decompressor<'_>,
    blob: &PackedBlob,
    sealed: &mut [u8],
    plain: &mut Vec<u8>,
) -> Result<(), Defect> {
    let opened = key.open_in_place(sealed)?;
    plain.clear();
    match blob.uncompressed_len {
        None => plain.extend_from_slice(opened),
        Some(len) => {
            let expected = u64::from(len);
            // Before room is made for what the frame cannot hold.
            match zstd_safe::get_frame_content_size(opened) {
                Ok(Some(actual)) if actual != expected => {
                    return Err(Defect::Length { expected, actual });
                }
                Ok(_) => {}
                Err(_) => return Err(Defect::Compression),
            }
            plain.reserve_exact(len as usize);
            let written = decompressor.decompress_to_buffer(opened, plain);
            let actual = written.map_err(|_| Defect::Compression)? as u64;
            if actual != expected {
                return Err(Defect::Length { expected, actual });
            }
        }
    }
    Ok(())
}
