//! What one block of the oracle looks like.
//!
//! All numbers are little-endian. Every sector of 512 bytes starts with the magic, so that a block of
//! which only a part was written is recognised whichever part is there.
//!
//! | bytes | holds |
//! |---|---|
//! | 0–7 | the magic |
//! | 8–15 | the stream: which load wrote it |
//! | 16–23 | the disk's number in the load |
//! | 24–31 | its own offset on the disk, in bytes |
//! | 32–39 | the sequence number of the operation |
//! | 40–47 | checksum over all other bytes |
//! | 48– | in each sector noise, then text, so that it deduplicates never and compresses by half |

/// Bytes of a block, and the alignment of everything the oracle does.
pub const BLOCK_LEN: usize = 4096;

const SECTOR_LEN: usize = 512;
const NOISE_LEN: usize = 256;
const MAGIC: [u8; 8] = *b"ORACLE\x01\n";
const CHECKSUM_AT: usize = 40;
const HEADER_LEN: usize = 48;

/// Where and when a block belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId {
    /// The load that wrote it.
    pub stream: u64,
    /// The disk's number in the load.
    pub disk: u64,
    /// Offset on the disk in bytes.
    pub offset: u64,
    /// The operation's sequence number, from 1.
    pub seq: u64,
}

/// What a block of an image turns out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// Only zeros.
    Zero,
    /// A whole block of the oracle, in its place or not.
    Block(BlockId),
    /// Parts of one or more blocks of the oracle.
    Torn,
    /// Nothing the oracle ever wrote.
    Alien,
}

/// The bytes of a block.
pub fn encode(id: BlockId) -> [u8; BLOCK_LEN] {
    let mut bytes = [b'.'; BLOCK_LEN];
    let mut state = id.stream ^ id.seq.rotate_left(32) ^ id.offset.rotate_left(16) ^ id.disk;
    for sector in bytes.chunks_exact_mut(SECTOR_LEN) {
        sector[..8].copy_from_slice(&MAGIC);
        for word in sector[HEADER_LEN..HEADER_LEN + NOISE_LEN].chunks_exact_mut(8) {
            word.copy_from_slice(&noise(&mut state).to_le_bytes());
        }
    }
    for (index, value) in [id.stream, id.disk, id.offset, id.seq].into_iter().enumerate() {
        bytes[8 + index * 8..16 + index * 8].copy_from_slice(&value.to_le_bytes());
    }
    let checksum = checksum(&bytes);
    bytes[CHECKSUM_AT..HEADER_LEN].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Says what a block is.
///
/// # Panics
///
/// When `bytes` are not [`BLOCK_LEN`] long.
pub fn inspect(bytes: &[u8]) -> Content {
    assert_eq!(bytes.len(), BLOCK_LEN, "blocks have one length");
    if bytes.iter().all(|byte| *byte == 0) {
        return Content::Zero;
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    if bytes[..8] == MAGIC && word(CHECKSUM_AT) == checksum(bytes) {
        let id = BlockId { stream: word(8), disk: word(16), offset: word(24), seq: word(32) };
        return Content::Block(id);
    }
    match bytes.chunks_exact(SECTOR_LEN).any(|sector| sector[..8] == MAGIC) {
        true => Content::Torn,
        false => Content::Alien,
    }
}

/// FNV-1a over words, with the checksum's own place left out.
fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for (index, word) in bytes.chunks_exact(8).enumerate() {
        if index != CHECKSUM_AT / 8 {
            sum ^= u64::from_le_bytes(word.try_into().expect("eight bytes"));
            sum = sum.wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
        }
    }
    sum
}

/// SplitMix64 (Steele, Lea, Flood 2014): good enough that no two blocks are alike.
pub(super) fn noise(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut value = *state;
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_LEN, BlockId, Content, encode, inspect};

    const ID: BlockId = BlockId { stream: 7, disk: 1, offset: 8192, seq: 42 };

    #[test]
    fn a_block_says_where_and_when_it_belongs() {
        assert_eq!(inspect(&encode(ID)), Content::Block(ID));
        assert_eq!(inspect(&[0; BLOCK_LEN]), Content::Zero);
        assert_eq!(inspect(&[1; BLOCK_LEN]), Content::Alien);
    }

    #[test]
    fn every_flipped_byte_is_seen() {
        let good = encode(ID);
        for at in 0..BLOCK_LEN {
            let mut bad = good;
            bad[at] ^= 0x10;
            assert_eq!(inspect(&bad), Content::Torn, "byte {at}");
        }
    }

    #[test]
    fn a_block_of_two_writes_is_torn_wherever_it_tears() {
        let (old, new) = (encode(BlockId { seq: 41, ..ID }), encode(ID));
        for sectors in 1..8 {
            let mut torn = old;
            torn[..sectors * 512].copy_from_slice(&new[..sectors * 512]);
            assert_eq!(inspect(&torn), Content::Torn, "{sectors} sectors");
            torn[..sectors * 512].fill(0);
            assert_eq!(inspect(&torn), Content::Torn, "{sectors} sectors of zeros");
        }
    }
}
