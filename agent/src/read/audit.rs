//! The audit of dirty bitmaps: of what they say is unchanged, a random share is read and compared.

use repository::BlobId;

use super::chunk_map::{ChunkMap, Fate};
use super::{ReadError, Source};

/// Unchanged chunks that each incremental backup reads and compares: one in so many…
const AUDIT_FRACTION: u64 = 1000;
/// …but at least so many…
const AUDIT_MIN: u64 = 16;
/// …and beyond these no more than this many bytes: the cost follows the changes, not the disk.
const AUDIT_LEN_MAX: u64 = 32 << 20;

impl Source {
    /// Reads a random share of the unchanged chunks and compares them with what the repository has.
    /// Returns the bytes read, and the first chunk that differs: then the bitmap lies.
    ///
    /// # Errors
    /// [`ReadError::Nbd`].
    pub async fn audit(
        &self,
        map: &ChunkMap,
        parent: &[BlobId],
    ) -> Result<(u64, Option<u64>), ReadError> {
        let Suspects { known_to_differ, unchanged, last } = suspects(map, parent);
        if known_to_differ.is_some() {
            return Ok((0, known_to_differ));
        }
        let count_max = AUDIT_LEN_MAX / map.offset(1);
        let count = (unchanged.len() as u64 / AUDIT_FRACTION).min(count_max).max(AUDIT_MIN);
        let mut chosen = sample(&unchanged, count);
        chosen.extend(last.filter(|last| !chosen.contains(last)));
        let mut bytes = 0;
        for chunk in chosen {
            let data = self.read(map.offset(chunk), map.len(&(chunk..chunk + 1))).await?;
            bytes += data.len() as u64;
            if parent.get(chunk as usize) != Some(&BlobId::of(&data)) {
                return Ok((bytes, Some(chunk)));
            }
        }
        Ok((bytes, None))
    }
}

/// What an audit may look at.
#[derive(Debug, PartialEq, Eq)]
struct Suspects {
    /// A chunk that differs for sure: a hole now, data in the parent, and never dirty in between.
    known_to_differ: Option<u64>,
    /// Unchanged chunks, but for the holes that were zero before: those need no reading.
    unchanged: Vec<u64>,
    /// The last of them that was not zero before. A disk that was cut and grown again between two
    /// backups is zero from the cut on, which QEMU does not count as dirty.
    last: Option<u64>,
}

fn suspects(map: &ChunkMap, parent: &[BlobId]) -> Suspects {
    let zero_id = |chunk: u64| BlobId::of(&vec![0; map.len(&(chunk..chunk + 1)) as usize]);
    // All chunks but the last have one length.
    let end = map.chunks().saturating_sub(1);
    let zeros = (map.chunks() > 0).then(|| (zero_id(0), zero_id(end)));
    let was_zero = |chunk: u64| {
        let zero = zeros.map(|(full, short)| if chunk == end { short } else { full });
        zero.is_some() && parent.get(chunk as usize).copied() == zero
    };
    let mut suspects = Suspects { known_to_differ: None, unchanged: Vec::new(), last: None };
    for chunk in map.runs(Fate::Inherit, 1).map(|run| run.start) {
        match (map.is_hole(chunk), was_zero(chunk)) {
            (true, true) => continue,
            (true, false) => suspects.known_to_differ = Some(chunk),
            (false, true) => {}
            (false, false) => suspects.last = Some(chunk),
        }
        suspects.unchanged.push(chunk);
    }
    suspects
}

/// `count` of `items`, drawn at random, without drawing one twice.
fn sample(items: &[u64], count: u64) -> Vec<u64> {
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(items.len());
    let mut rng = rand::rng();
    let mut chosen: Vec<u64> =
        rand::seq::index::sample(&mut rng, items.len(), count).iter().map(|i| items[i]).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r22_a_hole_that_was_data_differs_and_one_that_was_zero_needs_no_reading() {
        let (zero, short) = (BlobId::of(&[0; 100]), BlobId::of(&[0; 50]));
        let data = BlobId::of(&[1; 100]);
        let mut map = ChunkMap::new(450, 100);
        map.mark_data(0, 300);
        let found = |parent: [BlobId; 5]| {
            let Suspects { known_to_differ, unchanged, last } = suspects(&map, &parent);
            (known_to_differ, unchanged, last)
        };
        assert_eq!(found([data, data, zero, zero, short]), (None, vec![0, 1, 2], Some(1)));
        assert_eq!(found([data, data, data, data, short]).0, Some(3));
        assert_eq!(found([data, data, data, zero, data]).0, Some(4));
        let none = suspects(&ChunkMap::new(0, 100), &[]);
        assert_eq!(none, Suspects { known_to_differ: None, unchanged: Vec::new(), last: None });
    }
}
