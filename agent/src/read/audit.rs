//! The audit of dirty bitmaps: of what they say is unchanged, a random share is read and compared.

use std::time::Instant;

use repository::BlobId;
use tokio::task::JoinSet;

use super::chunk_map::{ChunkMap, Fate};
use super::pace::Effort;
use super::stream::Limits;
use super::{ReadError, Source};
use crate::share::Share;

/// Of the unchanged chunks each incremental backup reads and compares one in so many…
const AUDIT_FRACTION: u64 = 1000;
/// …but at least so many…
const AUDIT_MIN: u64 = 16;
/// …and beyond these no more than this many bytes: the cost follows the changes, not the disk.
const AUDIT_LEN_MAX: u64 = 32 << 20;

/// Chunks that are read at once: the next one while one is compared.
const UNDER_WAY_MAX: usize = 2;

/// How much of what is unchanged is audited.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Audit {
    /// One chunk in 1000, at least 16, and above these at most 32 MiB.
    Usual,
    /// This share of the chunks, at least 16, however many bytes that are; nothing for no share.
    Share(Share),
}

impl Audit {
    /// Whether nothing is audited.
    pub fn is_off(self) -> bool {
        matches!(self, Self::Share(share) if share.is_nothing())
    }

    /// How many of `unchanged` chunks of `chunk_size` bytes are audited.
    fn count(self, unchanged: u64, chunk_size: u64) -> u64 {
        let count = match self {
            Self::Usual => (unchanged / AUDIT_FRACTION).min(AUDIT_LEN_MAX / chunk_size),
            Self::Share(share) if share.is_nothing() => return 0,
            Self::Share(share) => share.of(unchanged),
        };
        count.max(AUDIT_MIN).min(unchanged)
    }
}

impl Source {
    /// Reads a random share of the unchanged chunks and compares them with what the repository has.
    /// Returns the bytes read, and the first chunk that differs: then the bitmap lies. What shows without
    /// reading is always looked at.
    ///
    /// # Errors
    /// [`ReadError::Nbd`].
    pub async fn audit(
        &self,
        map: &ChunkMap,
        parent: &[BlobId],
        audit: Audit,
        limits: Limits,
        effort: Effort,
    ) -> Result<(u64, Option<u64>), ReadError> {
        let Suspects { known_to_differ, unchanged, last } = suspects(map, parent);
        if known_to_differ.is_some() || audit.is_off() {
            return Ok((0, known_to_differ));
        }
        let mut chosen = sample(&unchanged, audit.count(unchanged.len() as u64, map.offset(1)));
        chosen.extend(last.filter(|last| chosen.binary_search(last).is_err()));
        let start = Instant::now();
        let (mut asked, mut bytes) = (0, 0);
        let mut chosen = chosen.into_iter();
        let mut under_way = JoinSet::new();
        loop {
            while under_way.len() < UNDER_WAY_MAX.min(effort.requests)
                && let Some(chunk) = chosen.next()
            {
                limits.keep(start, asked).await;
                let (offset, len) = (map.offset(chunk), map.len(&(chunk..chunk + 1)));
                asked += len;
                let source = self.clone();
                under_way
                    .spawn(async move { (chunk, source.read_at_pace(offset, len, effort).await) });
            }
            let Some(done) = under_way.join_next().await else { return Ok((bytes, None)) };
            let (chunk, data) = done.expect("reads neither panic nor are aborted");
            let (data, _) = data?;
            bytes += data.len() as u64;
            if parent.get(chunk as usize) != Some(&BlobId::of(&data)) {
                return Ok((bytes, Some(chunk)));
            }
        }
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
            (true, false) => {
                suspects.known_to_differ.get_or_insert(chunk);
            }
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

    #[test]
    fn r22_a_share_that_is_asked_for_is_read_however_large_the_disk() {
        let share = |text: &str| Audit::Share(text.parse().unwrap());
        let (few, many, chunk) = (10, 64_000_000, 128 << 10);
        assert_eq!(Audit::Usual.count(few, chunk), few);
        assert_eq!(Audit::Usual.count(100_000, chunk), 100);
        assert_eq!(Audit::Usual.count(many, chunk), 256, "32 MiB");
        assert_eq!(Audit::Usual.count(many, 4 << 20), 16);
        assert_eq!(share("100%").count(many, chunk), many);
        assert_eq!(share("5%").count(many, chunk), many / 20);
        assert_eq!(share("0.001%").count(100_000, chunk), 16);
        assert_eq!(share("0%").count(many, chunk), 0);
    }
}
