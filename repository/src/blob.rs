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
    if BlobId::of(plain) != blob.id {
        return Err(Defect::Digest);
    }
    Ok(())
}
