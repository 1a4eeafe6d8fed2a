//! The header of a pack: which blobs it holds, in which order (restic's `doc/design.rst`, pack format).
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)
)]

use std::thread;

use serde::{Deserialize, Serialize};

use crate::{BlobId, Defect, crypto};

/// Longest plain data blob that is read or written, in bytes.
pub(crate) const DATA_LEN_MAX: u32 = 64 << 20;
/// Longest plain tree blob that is read or written, in bytes: a disk of 16 million chunks.
pub(crate) const TREE_LEN_MAX: u32 = 1 << 30;
/// Most bytes a sealed header may have: some hundred thousand blobs.
pub(crate) const HEADER_LEN_MAX: u64 = 16 << 20;

/// Threads that each hold a pack or two: more would need more memory than a disk of 1 TiB may cost (256 MiB),
/// and four already compress faster than most stores write.
const THREADS_MAX: usize = 4;

/// How many threads make or check packs: one a processor, up to a bound of memory.
pub(crate) fn threads() -> usize {
    thread::available_parallelism().map_or(2, Into::into).min(THREADS_MAX)
}

/// What a blob is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlobKind {
    /// Part of the content of a file.
    Data,
    /// A folder.
    Tree,
}

impl BlobKind {
    /// Longest plain blob of this kind, in bytes.
    pub(crate) const fn len_max(self) -> u32 {
        match self {
            Self::Data => DATA_LEN_MAX,
            Self::Tree => TREE_LEN_MAX,
        }
    }
}

/// One blob in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackedBlob {
    pub(crate) id: BlobId,
    pub(crate) kind: BlobKind,
    /// Of the sealed blob from the start of the pack, in bytes.
    pub(crate) offset: u32,
    /// Of the sealed blob, in bytes.
    pub(crate) len: u32,
    /// Of the plain blob in bytes; `None` if it is not compressed.
    pub(crate) uncompressed_len: Option<u32>,
}

impl PackedBlob {
    /// Length of the plain blob in bytes.
    pub(crate) fn plain_len(&self) -> u32 {
        self.uncompressed_len.unwrap_or(self.len.saturating_sub(OVERHEAD))
    }

    /// Whether the lengths are possible; everything that reads a blob relies on it.
    pub(crate) fn checked(self) -> Result<Self, Defect> {
        let end_fits = self.offset.checked_add(self.len).is_some();
        let out_of_range = |field| Err(Defect::OutOfRange { field });
        match self.len.checked_sub(OVERHEAD) {
            None => out_of_range("length"),
            Some(_) if !end_fits => out_of_range("offset"),
            // zstd makes incompressible content a little longer.
            Some(len) if len.div_euclid(2) > self.kind.len_max() => out_of_range("length"),
            Some(len) if self.uncompressed_len.unwrap_or(len) > self.kind.len_max() => {
                out_of_range("uncompressed_length")
            }
            Some(_) => Ok(self),
        }
    }

    /// Bytes that this blob adds to the plain header.
    pub(crate) fn entry_len(&self) -> u64 {
        if self.uncompressed_len.is_some() { 41 } else { 37 }
    }
}

#[cfg_attr(
    not(test),
    expect(clippy::as_conversions, reason = "constant, and not possible otherwise in one")
)]
pub(crate) const OVERHEAD: u32 = crypto::OVERHEAD as u32;

/// Appends the plain header.
pub(crate) fn encode_header(blobs: &[PackedBlob], header: &mut Vec<u8>) {
    for blob in blobs {
        let kind = match (blob.kind, blob.uncompressed_len) {
            (BlobKind::Data, None) => 0,
            (BlobKind::Tree, None) => 1,
            (BlobKind::Data, Some(_)) => 2,
            (BlobKind::Tree, Some(_)) => 3,
        };
        header.push(kind);
        header.extend(blob.len.to_le_bytes());
        header.extend(blob.uncompressed_len.into_iter().flat_map(u32::to_le_bytes));
        header.extend(blob.id.0);
    }
}

/// Reads a plain header; offsets follow from the lengths.
pub(crate) fn decode_header(mut header: &[u8]) -> Result<Vec<PackedBlob>, Defect> {
    let mut blobs = Vec::with_capacity(header.len().div_euclid(37));
    let mut offset = 0_u32;
    while let Some((&kind, rest)) = header.split_first() {
        header = rest;
        let len = u32::from_le_bytes(take(&mut header)?);
        let (kind, compressed) = match kind {
            0 => (BlobKind::Data, false),
            1 => (BlobKind::Tree, false),
            2 => (BlobKind::Data, true),
            3 => (BlobKind::Tree, true),
            _ => return Err(Defect::BlobType { kind }),
        };
        let uncompressed_len =
            if compressed { Some(u32::from_le_bytes(take(&mut header)?)) } else { None };
        let id = BlobId(take(&mut header)?);
        blobs.push(PackedBlob { id, kind, offset, len, uncompressed_len }.checked()?);
        offset = offset.checked_add(len).ok_or(Defect::OutOfRange { field: "length" })?;
    }
    Ok(blobs)
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Defect> {
    let (part, rest) = bytes.split_first_chunk().ok_or(Defect::Header)?;
    *bytes = rest;
    Ok(*part)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    fn blobs() -> impl Strategy<Value = Vec<PackedBlob>> {
        let blob = (any::<[u8; 32]>(), any::<bool>(), 32..1_u32 << 20, option::of(0..1_u32 << 20));
        vec(blob, 0..20).prop_map(|parts| {
            let mut offset = 0;
            let mut place = |(id, tree, len, uncompressed_len)| {
                let kind = if tree { BlobKind::Tree } else { BlobKind::Data };
                offset += len;
                PackedBlob { id: BlobId(id), kind, offset: offset - len, len, uncompressed_len }
            };
            parts.into_iter().map(&mut place).collect()
        })
    }

    proptest! {
        #[test]
        fn headers_survive_the_round_trip(blobs in blobs()) {
            let mut header = Vec::new();
            encode_header(&blobs, &mut header);
            prop_assert_eq!(header.len() as u64, blobs.iter().map(PackedBlob::entry_len).sum::<u64>());
            prop_assert_eq!(decode_header(&header).unwrap(), blobs);
        }

        #[test]
        fn s16_arbitrary_headers_never_panic(header in vec(any::<u8>(), 0..300)) {
            if let Ok(blobs) = decode_header(&header) {
                let mut again = Vec::new();
                encode_header(&blobs, &mut again);
                prop_assert_eq!(again, header);
            }
        }

        #[test]
        fn s16_cut_headers_are_refused(blobs in blobs(), cut in 1_usize..37) {
            let mut header = Vec::new();
            encode_header(&blobs, &mut header);
            prop_assume!(!blobs.is_empty());
            header.truncate(header.len() - cut);
            prop_assert!(decode_header(&header).is_err());
        }
    }
}
