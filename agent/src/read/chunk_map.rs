//! Which chunks of a disk are read, which are zero, which are inherited. No I/O.
//!
//! | dirty | allocation | meaning |
//! |---|---|---|
//! | yes | data | read it |
//! | yes | zero | it is zero now: record zeros, read nothing |
//! | no | any | unchanged since the parent: inherit |
//!
//! Without a dirty bitmap everything counts as dirty.

use std::ops::Range;

/// What is done with one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Read from the point in time.
    Read,
    /// Known to be zero.
    Zero,
    /// Taken over from the parent.
    Inherit,
}

const DATA: u8 = 1;
const DIRTY: u8 = 2;

/// The map of one disk: one byte a chunk.
#[derive(Debug, Clone)]
pub struct ChunkMap {
    size: u64,
    chunk_size: u64,
    flags: Vec<u8>,
    bytes_dirty: u64,
}

/// A run of consecutive chunks: their numbers.
pub type Chunks = Range<u64>;

impl ChunkMap {
    /// A map in which nothing is data and nothing dirty.
    ///
    /// # Panics
    /// When `chunk_size` is 0.
    pub fn new(size: u64, chunk_size: u32) -> Self {
        let chunk_size = u64::from(chunk_size);
        let chunks = usize::try_from(size.div_ceil(chunk_size)).expect("chunk counts fit memory");
        Self { size, chunk_size, flags: vec![0; chunks], bytes_dirty: 0 }
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.flags.len() as u64
    }

    /// First byte of a chunk.
    pub fn offset(&self, chunk: u64) -> u64 {
        chunk * self.chunk_size
    }

    /// Length in bytes of a run of chunks; the last chunk of a disk may be shorter.
    pub fn len(&self, chunks: &Chunks) -> u64 {
        self.offset(chunks.end).min(self.size).saturating_sub(self.offset(chunks.start))
    }

    /// Notes that a range holds data, or at least may.
    pub fn mark_data(&mut self, offset: u64, len: u64) {
        self.mark(offset, len, DATA);
    }

    /// Notes that a range changed since the parent.
    pub fn mark_dirty(&mut self, offset: u64, len: u64) {
        self.bytes_dirty += len.min(self.size.saturating_sub(offset));
        self.mark(offset, len, DIRTY);
    }

    fn mark(&mut self, offset: u64, len: u64, flag: u8) {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return;
        }
        let range = (offset / self.chunk_size) as usize..end.div_ceil(self.chunk_size) as usize;
        for flags in &mut self.flags[range] {
            *flags |= flag;
        }
    }

    /// Bytes that were noted as dirty.
    pub fn bytes_dirty(&self) -> u64 {
        self.bytes_dirty
    }

    /// What is done with a chunk.
    pub fn fate(&self, chunk: u64) -> Fate {
        match self.flags[chunk as usize] {
            flags if flags & DIRTY == 0 => Fate::Inherit,
            flags if flags & DATA == 0 => Fate::Zero,
            _ => Fate::Read,
        }
    }

    /// Whether nothing of a chunk holds data.
    pub fn is_hole(&self, chunk: u64) -> bool {
        self.flags[chunk as usize] & DATA == 0
    }

    /// Runs of chunks with one fate, none longer than `chunks_max`.
    pub fn runs(&self, fate: Fate, chunks_max: u64) -> impl Iterator<Item = Chunks> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..self.chunks()).find(|&chunk| self.fate(chunk) == fate)?;
            let limit = (start + chunks_max.max(1)).min(self.chunks());
            let end = (start..limit).find(|&chunk| self.fate(chunk) != fate).unwrap_or(limit);
            next = end;
            Some(start..end)
        })
    }

    /// Bytes of all chunks with one fate.
    pub fn bytes(&self, fate: Fate) -> u64 {
        self.runs(fate, u64::MAX / 2).map(|run| self.len(&run)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn p1_a_dirty_hole_is_zero_and_a_clean_one_inherited() {
        let mut map = ChunkMap::new(500, 100);
        map.mark_data(0, 150);
        map.mark_dirty(100, 150);
        let fates: Vec<_> = (0..5).map(|chunk| map.fate(chunk)).collect();
        use Fate::*;
        assert_eq!(fates, [Inherit, Read, Zero, Inherit, Inherit]);
        assert_eq!(map.bytes_dirty(), 150);
    }

    #[test]
    fn ranges_beyond_the_end_are_cut_and_the_last_chunk_is_short() {
        let mut map = ChunkMap::new(250, 100);
        map.mark_data(200, u64::MAX);
        map.mark_dirty(240, 1000);
        map.mark_dirty(u64::MAX, 5);
        assert_eq!(
            map.runs(Fate::Read, 9).map(|run| (run.start, run.end)).collect::<Vec<_>>(),
            [(2, 3)]
        );
        assert_eq!(map.len(&(2..3)), 50);
        assert_eq!(map.bytes_dirty(), 10);
    }

    proptest! {
        #[test]
        fn runs_cover_each_chunk_once(marks in prop::collection::vec((0u64..2000, 0u64..300, any::<bool>()), 0..20),
                                      max in 1u64..9) {
            let mut map = ChunkMap::new(1990, 64);
            for (offset, len, dirty) in marks {
                if dirty { map.mark_dirty(offset, len) } else { map.mark_data(offset, len) }
            }
            let mut seen = vec![None; map.chunks() as usize];
            for fate in [Fate::Read, Fate::Zero, Fate::Inherit] {
                for run in map.runs(fate, max) {
                    prop_assert!(run.end - run.start <= max);
                    for chunk in run {
                        prop_assert_eq!(seen[chunk as usize].replace(fate), None);
                        prop_assert_eq!(map.fate(chunk), fate);
                    }
                }
            }
            prop_assert!(seen.iter().all(Option::is_some));
            let total: u64 = [Fate::Read, Fate::Zero, Fate::Inherit].map(|f| map.bytes(f)).iter().sum();
            prop_assert_eq!(total, 1990);
        }
    }
}
