//! One sealed blob to its plain content.

use zstd::{bulk::Decompressor, zstd_safe};

use crate::{BlobId, Defect, crypto::MasterKey, pack::PackedBlob};

/// Authenticates, decrypts in place, decompresses into `plain` and compares with the id, in this
/// order. Never yields more bytes than the index promised.
pub(crate) fn open(
    key: &MasterKey,
    decompressor: &mut Decompressor<'_>,
    blob: &PackedBlob,
    sealed: &mut [u8],
    plain: &mut Vec<u8>,
) -> Result<(), Defect> {
    let opened = unseal(key, blob, sealed)?;
    plain.clear();
    match blob.uncompressed_len {
        None => plain.extend_from_slice(opened),
        Some(len) => {
            plain.reserve_exact(len as usize);
            let written = decompressor.decompress_to_buffer(opened, plain);
            check_len(blob, written.map_err(|_| Defect::Compression)?)?;
        }
    }
    check_digest(blob, plain)
}

/// The same into a place of exactly the length that the index promised.
pub(crate) fn open_into(
    key: &MasterKey,
    decompressor: &mut Decompressor<'_>,
    blob: &PackedBlob,
    sealed: &mut [u8],
    plain: &mut [u8],
) -> Result<(), Defect> {
    check_len(blob, plain.len())?;
    let opened = unseal(key, blob, sealed)?;
    match blob.uncompressed_len {
        None => plain.copy_from_slice(opened),
        Some(_) => {
            let written = decompressor.decompress_to_buffer(opened, plain);
            check_len(blob, written.map_err(|_| Defect::Compression)?)?;
        }
    }
    check_digest(blob, plain)
}

/// Authenticates and decrypts in place.
fn unseal<'a>(
    key: &MasterKey,
    blob: &PackedBlob,
    sealed: &'a mut [u8],
) -> Result<&'a [u8], Defect> {
    let opened = key.open_in_place(sealed)?;
    if blob.uncompressed_len.is_some() {
        // Before room is made for what the frame cannot hold.
        match zstd_safe::get_frame_content_size(opened) {
            Ok(Some(actual)) => check_len(blob, usize::try_from(actual).unwrap_or(usize::MAX))?,
            Ok(None) => {}
            Err(_) => return Err(Defect::Compression),
        }
    }
    Ok(opened)
}

fn check_len(blob: &PackedBlob, actual: usize) -> Result<(), Defect> {
    let (expected, actual) = (u64::from(blob.plain_len()), actual as u64);
    if actual == expected { Ok(()) } else { Err(Defect::Length { expected, actual }) }
}

fn check_digest(blob: &PackedBlob, plain: &[u8]) -> Result<(), Defect> {
    if BlobId::of(plain) == blob.id { Ok(()) } else { Err(Defect::Digest) }
}
