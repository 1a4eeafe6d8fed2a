//! What the header of a qcow2 image says, without I/O (QEMU's docs/interop/qcow2.txt).
//!
//! Stricter than QEMU: what it would follow, load or loop over for the sake of a header is bounded or
//! refused here, before it opens the image.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)]

use super::InspectError;

/// So many bytes from the start of a file hold the header, its extensions and the name of the backing file:
/// these lie in the first cluster, of at most 2 MiB.
pub const HEAD_LEN_MAX: u64 = 2 << 20;
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Version 2 ends here, version 3 goes on.
const HEADER_LEN_V2: u64 = 72;
const HEADER_LEN_V3: u64 = 104;
/// Clusters have 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Subclusters need clusters of 16 KiB.
const CLUSTER_BITS_SUBCLUSTERS: u32 = 14;
/// The largest disk.
pub const SIZE_MAX: u64 = 64 << 40;
/// QEMU's own bounds (block/qcow2.h: `QCOW_MAX_L1_SIZE`, `QCOW_MAX_REFTABLE_SIZE`).
const L1_LEN_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_LEN_MAX: u64 = 8 << 20;
const REFCOUNT_ORDER_MAX: u32 = 6;
/// QEMU takes 65536, and reads them all before it does anything.
const SNAPSHOTS_MAX: u32 = 1000;
/// The least that a snapshot's entry takes.
const SNAPSHOT_LEN_MIN: u64 = 40;
/// QEMU takes 65535 of 64 MiB in all, and has each in memory.
const BITMAPS_MAX: u32 = 1000;
const BITMAP_DIRECTORY_LEN_MAX: u64 = 1 << 20;
const EXTENSIONS_MAX: usize = 32;
/// QEMU's bound of a backing file's name.
const NAME_LEN_MAX: u32 = 1023;
/// QEMU names a format by no more (`BlockDriverState.backing_format`).
const FORMAT_LEN_MAX: usize = 15;

// Incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const SUBCLUSTERS: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | SUBCLUSTERS;

// Header extensions.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION: u32 = 0x0537_be77;
const EXTERNAL_DATA_NAME: u32 = 0x4441_5441;

/// A header that nothing is wrong with. Who opens the image still decides on what it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster_len: u64,
    /// Whether refcounts may be wrong because whoever wrote last did not close it. What a guest sees is not
    /// affected: that is in the tables, which are written in order.
    pub is_dirty: bool,
    /// Whether its content is encrypted.
    pub is_encrypted: bool,
    /// The image beneath it.
    pub backing: Option<Backing>,
    /// How many internal snapshots it has.
    pub snapshots: u32,
    /// How many dirty bitmaps it has.
    pub bitmaps: u32,
}

/// What a header says of the image beneath.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its name, in any of the forms that QEMU understands.
    pub name: String,
    /// Its format, where that is told.
    pub format: Option<String>,
}

/// What was found in the extensions of a header.
#[derive(Debug, Default)]
struct Extensions {
    backing_format: Option<String>,
    bitmaps: u32,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The only code that slices bytes which the image's supplier has written.
    fn take(&mut self, len: usize) -> Result<&'a [u8], InspectError> {
        let end = self.at.checked_add(len).ok_or(InspectError::Truncated)?;
        let part = self.bytes.get(self.at..end).ok_or(InspectError::Truncated)?;
        self.at = end;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], InspectError> {
        self.take(N)?.try_into().map_err(|_| InspectError::Truncated)
    }

    fn u32(&mut self) -> Result<u32, InspectError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, InspectError> {
        self.array().map(u64::from_be_bytes)
    }
}

/// A number of the header that is out of its bounds.
fn bounded(field: &'static str, value: u64, max: u64) -> Result<u64, InspectError> {
    match value > max {
        true => Err(InspectError::TooLarge { field, value, max }),
        false => Ok(value),
    }
}

/// Where tables may be: in whole clusters behind the first, and inside the file.
struct Place {
    cluster_len: u64,
    file_len: u64,
}

impl Place {
    fn check(&self, table: &'static str, offset: u64, len: u64) -> Result<(), InspectError> {
        let outside = InspectError::Outside { table, offset, len };
        let is_aligned = offset.checked_rem(self.cluster_len) == Some(0);
        match offset.checked_add(len) {
            Some(end) if is_aligned && offset != 0 && end <= self.file_len => Ok(()),
            _ => Err(outside),
        }
    }
}

/// Reads a header from the first bytes of a file, [`HEAD_LEN_MAX`] or all there are. `file_len` is the whole
/// file's length.
///
/// # Errors
/// [`InspectError`] for all that a careful writer does not write, and for images that are damaged.
pub fn parse(bytes: &[u8], file_len: u64) -> Result<Header, InspectError> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.array()? != MAGIC {
        return Err(InspectError::NotQcow2);
    }
    let version = cursor.u32()?;
    if !matches!(version, 2 | 3) {
        return Err(InspectError::Version { version });
    }
    let (name_offset, name_len) = (cursor.u64()?, cursor.u32()?);
    let cluster_bits = cursor.u32()?;
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(InspectError::ClusterBits { bits: cluster_bits });
    }
    let cluster_len = 1_u64.checked_shl(cluster_bits).unwrap_or(u64::MAX);
    let place = Place { cluster_len, file_len };
    let size = bounded("size", cursor.u64()?, SIZE_MAX)?;
    let encryption = bounded("encryption method", cursor.u32()?.into(), 2)?;
    let l1_entries = u64::from(cursor.u32()?);
    let l1_offset = cursor.u64()?;
    let (refcount_offset, refcount_clusters) = (cursor.u64()?, u64::from(cursor.u32()?));
    let (snapshots, snapshots_offset) = (cursor.u32()?, cursor.u64()?);
    let v3 = match version {
        2 => Version3::default(),
        _ => Version3::read(&mut cursor, cluster_len)?,
    };
    if v3.incompatible & SUBCLUSTERS != 0 && cluster_bits < CLUSTER_BITS_SUBCLUSTERS {
        return Err(InspectError::ClusterBits { bits: cluster_bits });
    }

    let l1_len = bounded("L1 table", l1_entries.saturating_mul(8), L1_LEN_MAX)?;
    let covered = u128::from(l1_entries)
        .saturating_mul(covered_by_l1_entry(cluster_len, v3.incompatible & SUBCLUSTERS != 0));
    if covered < u128::from(size) {
        return Err(InspectError::L1TooSmall { size, entries: l1_entries });
    }
    if l1_len > 0 {
        place.check("L1 table", l1_offset, l1_len)?;
    }
    let refcount_len = refcount_clusters.saturating_mul(cluster_len);
    bounded("refcount table", refcount_len, REFCOUNT_TABLE_LEN_MAX.max(cluster_len))?;
    if refcount_clusters == 0 {
        return Err(InspectError::NoRefcounts);
    }
    place.check("refcount table", refcount_offset, refcount_len)?;
    bounded("number of snapshots", snapshots.into(), SNAPSHOTS_MAX.into())?;
    if snapshots > 0 {
        let len = u64::from(snapshots).saturating_mul(SNAPSHOT_LEN_MIN);
        place.check("snapshot table", snapshots_offset, len)?;
    }

    let extensions = extensions(bytes, &v3, name_offset, &place)?;
    let backing = match (name_offset, name_len) {
        (0, _) | (_, 0) => None,
        _ => Some(Backing {
            name: backing_name(bytes, name_offset, name_len, &v3, cluster_len)?,
            format: extensions.backing_format,
        }),
    };
    Ok(Header {
        version,
        size,
        cluster_len,
        is_dirty: v3.incompatible & DIRTY != 0,
        is_encrypted: encryption != 0,
        backing,
        snapshots,
        bitmaps: extensions.bitmaps,
    })
}

/// Bytes of the disk that one entry of the L1 table stands for: a cluster of L2 entries of 8 bytes, or 16
/// with subclusters.
fn covered_by_l1_entry(cluster_len: u64, subclusters: bool) -> u128 {
    let entries = cluster_len.checked_div(if subclusters { 16 } else { 8 }).unwrap_or(0);
    u128::from(entries).saturating_mul(cluster_len.into())
}

/// What only version 3 has.
#[derive(Debug)]
struct Version3 {
    incompatible: u64,
    header_len: u64,
}

impl Default for Version3 {
    fn default() -> Self {
        Self { incompatible: 0, header_len: HEADER_LEN_V2 }
    }
}

impl Version3 {
    fn read(cursor: &mut Cursor<'_>, cluster_len: u64) -> Result<Self, InspectError> {
        let incompatible = cursor.u64()?;
        if incompatible & CORRUPT != 0 {
            return Err(InspectError::Corrupt);
        }
        if incompatible & EXTERNAL_DATA != 0 {
            return Err(InspectError::ExternalData);
        }
        if incompatible & !KNOWN != 0 {
            return Err(InspectError::UnknownFeatures { bits: incompatible & !KNOWN });
        }
        // Compatible and auto-clear features are none that a reader must know.
        cursor.take(16)?;
        let refcount_order = cursor.u32()?;
        bounded("refcount order", refcount_order.into(), REFCOUNT_ORDER_MAX.into())?;
        let header_len = u64::from(cursor.u32()?);
        let is_len = header_len.checked_rem(8) == Some(0);
        if header_len < HEADER_LEN_V3 || header_len > cluster_len || !is_len {
            return Err(InspectError::HeaderLen { len: header_len });
        }
        // zlib or zstd; only what is not zlib needs the feature.
        let compression = match header_len > HEADER_LEN_V3 {
            true => cursor.array::<1>()?,
            false => [0],
        };
        match (compression, incompatible & COMPRESSION != 0) {
            ([0], false) | ([1], true) => Ok(Self { incompatible, header_len }),
            ([kind], _) => Err(InspectError::Compression { kind }),
        }
    }
}

/// Walks through the extensions, which end where they say, or where the backing file's name begins, or the
/// first cluster ends.
fn extensions(
    bytes: &[u8],
    v3: &Version3,
    name_offset: u64,
    place: &Place,
) -> Result<Extensions, InspectError> {
    let end = if name_offset == 0 { place.cluster_len } else { name_offset };
    let at = usize::try_from(v3.header_len).map_err(|_| InspectError::Truncated)?;
    let end = usize::try_from(end).unwrap_or(usize::MAX).min(bytes.len());
    // An image that ends with its header has no extensions.
    let mut cursor = Cursor { bytes: bytes.get(..end).unwrap_or_default(), at };
    let mut found = Extensions::default();
    for _ in 0..EXTENSIONS_MAX {
        if cursor.at >= end {
            return Ok(found);
        }
        let (kind, len) = (cursor.u32()?, cursor.u32()?);
        if kind == END {
            return Ok(found);
        }
        let len = usize::try_from(len).map_err(|_| InspectError::Truncated)?;
        let content = cursor.take(len)?;
        let padding = len.checked_next_multiple_of(8).and_then(|padded| padded.checked_sub(len));
        cursor.take(padding.ok_or(InspectError::Truncated)?)?;
        match kind {
            EXTERNAL_DATA_NAME => return Err(InspectError::ExternalData),
            BACKING_FORMAT if len > FORMAT_LEN_MAX => {
                return Err(InspectError::Name { what: "backing format" });
            }
            BACKING_FORMAT => {
                found.backing_format = Some(text("backing format", content)?);
            }
            BITMAPS => {
                let mut bitmaps = Cursor { bytes: content, at: 0 };
                let (count, _reserved) = (bitmaps.u32()?, bitmaps.u32()?);
                let (len, offset) = (bitmaps.u64()?, bitmaps.u64()?);
                bounded("number of dirty bitmaps", count.into(), BITMAPS_MAX.into())?;
                bounded("directory of dirty bitmaps", len, BITMAP_DIRECTORY_LEN_MAX)?;
                place.check("directory of dirty bitmaps", offset, len)?;
                found.bitmaps = count;
            }
            // What it says of the key's place matters to whoever has the key.
            ENCRYPTION | FEATURE_NAMES => {}
            // QEMU keeps those that it does not know, and minds none.
            _ => {}
        }
    }
    Err(InspectError::TooManyExtensions { max: EXTENSIONS_MAX })
}

fn backing_name(
    bytes: &[u8],
    offset: u64,
    len: u32,
    v3: &Version3,
    cluster_len: u64,
) -> Result<String, InspectError> {
    let what = "backing file";
    let end = offset.checked_add(len.into()).ok_or(InspectError::Name { what })?;
    if len > NAME_LEN_MAX || offset < v3.header_len || end > cluster_len {
        return Err(InspectError::Name { what });
    }
    let at = usize::try_from(offset).map_err(|_| InspectError::Truncated)?;
    let len = usize::try_from(len).map_err(|_| InspectError::Truncated)?;
    text(what, Cursor { bytes, at }.take(len)?)
}

/// A name that can be shown and compared.
fn text(what: &'static str, bytes: &[u8]) -> Result<String, InspectError> {
    let text = std::str::from_utf8(bytes).map_err(|_| InspectError::Name { what })?;
    match text.contains(char::is_control) {
        true => Err(InspectError::Name { what }),
        false => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests;
