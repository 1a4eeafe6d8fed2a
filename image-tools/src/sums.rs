//! Checksums of a file: a SHA-256 of all of it, and a CRC-32 of each extent, which tell where it is damaged.

use std::io::{self, Read};
use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::record::FileSums;

/// Bytes that one CRC-32 covers, in files that are not large.
const EXTENT_LEN_MIN: u64 = 4 << 20;
/// So many of them a file has at most.
const EXTENTS_MAX: u64 = 1 << 16;
/// Bytes that are read at once.
const PART_LEN: usize = 1 << 20;

/// Reads a file of `len` bytes to its end and makes its checksums. `progress` gets the bytes that were read
/// each time.
///
/// # Errors
/// The system's; [`io::ErrorKind::UnexpectedEof`] where the file has not `len` bytes.
pub fn make(file: impl Read, len: u64, progress: impl FnMut(u64)) -> io::Result<FileSums> {
    let extent_len = len.div_ceil(EXTENTS_MAX).next_power_of_two().max(EXTENT_LEN_MIN);
    let (sums, read) = read(file, extent_len, len, progress)?;
    match read == len {
        true => Ok(sums),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Reads a file and returns the ranges of its bytes that are not what they were, neighbours joined; none
/// where it is whole. What is missing at its end is one of them, and so is what is too much.
///
/// # Errors
/// The system's.
pub fn check(
    file: impl Read,
    sums: &FileSums,
    len: u64,
    progress: impl FnMut(u64),
) -> io::Result<Vec<Range<u64>>> {
    let extent_len = sums.extent_len.max(1);
    let (found, read) = read(file, extent_len, len.saturating_add(1), progress)?;
    let mut damaged: Vec<Range<u64>> = Vec::new();
    for number in 0..sums.crc32.len().max(found.crc32.len()) {
        if sums.crc32.get(number) == found.crc32.get(number) {
            continue;
        }
        let start = extent_len.saturating_mul(number as u64);
        let end = start.saturating_add(extent_len).min(len.max(read));
        match damaged.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => damaged.push(start..end),
        }
    }
    if damaged.is_empty() && (found.sha256 != sums.sha256.to_ascii_lowercase() || read != len) {
        // Only the whole of it tells.
        damaged.push(0..len.max(read));
    }
    Ok(damaged)
}

/// The checksums of up to `max` bytes, and how many there were.
fn read(
    file: impl Read,
    extent_len: u64,
    max: u64,
    mut progress: impl FnMut(u64),
) -> io::Result<(FileSums, u64)> {
    let mut file = file.take(max);
    let (mut whole, mut crc32, mut total) = (Sha256::new(), Vec::new(), 0);
    let (mut extent, mut left) = (crc32fast::Hasher::new(), extent_len);
    let mut part = vec![0; PART_LEN];
    loop {
        let room = usize::try_from(left).map_or(PART_LEN, |left| left.min(PART_LEN));
        let len = match file.read(&mut part[..room]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            len => len?,
        };
        if len == 0 {
            break;
        }
        whole.update(&part[..len]);
        extent.update(&part[..len]);
        total += len as u64;
        left -= len as u64;
        if left == 0 {
            crc32.push(std::mem::take(&mut extent).finalize());
            left = extent_len;
        }
        progress(len as u64);
    }
    if left < extent_len {
        crc32.push(extent.finalize());
    }
    Ok((FileSums { sha256: const_hex::encode(whole.finalize()), extent_len, crc32 }, total))
}

/// The SHA-256 of bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    const_hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: usize = 9 << 20;

    fn content() -> Vec<u8> {
        (0..LEN).map(|n| (n / 251 % 256) as u8).collect()
    }

    fn damage(content: &[u8], sums: &FileSums) -> Vec<Range<u64>> {
        check(content, sums, LEN as u64, |_| {}).unwrap()
    }

    fn one(range: Range<u64>) -> Vec<Range<u64>> {
        std::iter::once(range).collect()
    }

    #[test]
    fn p4_a_damaged_byte_is_found_and_told_by_its_place() {
        let content = content();
        let mut read = 0;
        let sums = make(&content[..], LEN as u64, |bytes| read += bytes).unwrap();
        assert_eq!((read, sums.crc32.len()), (LEN as u64, 3));
        assert_eq!(sums.sha256, sha256(&content));
        assert!(damage(&content, &sums).is_empty());

        let flip = |places: &[usize]| {
            let mut bad = content.clone();
            places.iter().for_each(|&at| bad[at] ^= 1);
            damage(&bad, &sums)
        };

        let mib = 1 << 20;
        assert_eq!(flip(&[5 << 20]), one(4 * mib..8 * mib));
        assert_eq!(flip(&[0, LEN - 1]), [0..4 * mib, 8 * mib..9 * mib]);
        assert_eq!(flip(&[0, 5 << 20]), one(0..8 * mib));
        let mut longer = content.clone();
        longer.extend([0; 3]);
        assert_eq!(damage(&longer, &sums), one(8 * mib..9 * mib + 1));
        assert_eq!(damage(&content[..LEN - 1], &sums), one(8 * mib..9 * mib));
        assert_eq!(damage(&[], &sums), one(0..9 * mib));
        let other = FileSums { sha256: sha256(b"other"), ..sums };
        assert_eq!(damage(&content, &other), one(0..9 * mib));
    }

    proptest! {
        #[test]
        fn p4_whatever_is_changed_or_cut_off_is_found(
            content in prop::collection::vec(any::<u8>(), 1..200),
            at in any::<prop::sample::Index>(),
            bit in 0..8_u8,
            cut in any::<bool>(),
            extent_len in 1_u64..64,
        ) {
            let (sums, len) = read(&content[..], extent_len, u64::MAX, |_| {}).unwrap();
            let before = check(&content[..], &sums, len, |_| {}).unwrap();
            prop_assert!(before.is_empty());
            let (mut bad, at) = (content.clone(), at.index(content.len()));
            if cut { bad.truncate(at) } else { bad[at] ^= 1_u8 << bit }
            let damaged = check(&bad[..], &sums, len, |_| {}).unwrap();
            let is_told = damaged.iter().any(|range| range.contains(&(at as u64)));
            prop_assert!(is_told, "{damaged:?}");
        }
    }
}
