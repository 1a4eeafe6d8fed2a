//! Which packs stay, which are written anew without what nobody needs, and which go. Without I/O.

use std::collections::HashMap;

use crate::{FileId, Index, prune::used::Used};

/// What is needed of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PackUse {
    /// Its number in the index.
    pub(super) number: u32,
    /// Bytes of the file.
    pub(super) len: u64,
    /// Bytes of the sealed blobs that are needed, and not better taken from another pack.
    pub(super) used: u64,
    /// Bytes of its other blobs.
    pub(super) unused: u64,
    /// Whether the file is there, as long as it should be, and not known to be damaged.
    pub(super) is_whole: bool,
}

/// Says of each pack what is needed of it. Of several copies of a blob one is needed: that in the pack with the
/// smallest share of waste, so that a pack that was written anew always wins over the one it came from.
pub(super) fn census(
    index: &Index,
    used: &Used,
    lens: &HashMap<FileId, u64>,
) -> (Vec<PackUse>, Vec<Vec<u32>>) {
    let packs = index.packs();
    let (mut alone, mut waste) = (vec![0_u64; packs.len()], vec![0_u64; packs.len()]);
    index.for_each_blob(|_, copies| match copies {
        [copy] if used.contains(&copy.blob.id) => alone[copy.pack as usize] += len_of(copy),
        copies if !used.contains(&copies[0].blob.id) => {
            copies.iter().for_each(|copy| waste[copy.pack as usize] += len_of(copy));
        }
        _ => {}
    });
    let rank = |number: u32| {
        let at = number as usize;
        let share = |bytes: u64| bytes * 10_000 / packs[at].file_len().max(1);
        let is_there = lens.get(&packs[at].id) == Some(&packs[at].file_len());
        (!is_there, packs[at].marked, share(waste[at]), u64::MAX - share(alone[at]), number)
    };
    // For each pack with blobs that others have too, the offsets of those that are needed here.
    let (mut used_len, mut chosen) = (alone.clone(), vec![Vec::new(); packs.len()]);
    index.for_each_blob(|_, copies| {
        if copies.len() > 1 && used.contains(&copies[0].blob.id) {
            let best = copies.iter().min_by_key(|copy| rank(copy.pack)).expect("there are several");
            used_len[best.pack as usize] += len_of(best);
            chosen[best.pack as usize].push(best.blob.offset);
        }
    });
    let one = |(number, used): (usize, u64)| {
        let pack = &packs[number];
        let (len, unused) = (pack.file_len(), pack.blobs_len - used);
        PackUse {
            number: number as u32,
            len,
            used,
            unused,
            is_whole: lens.get(&pack.id) == Some(&len),
        }
    };
    (used_len.into_iter().enumerate().map(one).collect(), chosen)
}

fn len_of(copy: &crate::index::Copied) -> u64 {
    copy.blob.len.into()
}

/// The packs to write anew, those with the most waste first: as many as it takes until the waste that stays is
/// at most `max_unused` percent of all, and at most `max_len` bytes of packs.
pub(super) fn to_repack(packs: &[PackUse], max_unused: f64, max_len: u64) -> Vec<PackUse> {
    let stay = packs.iter().filter(|pack| pack.used > 0);
    let used: u64 = stay.clone().map(|pack| pack.used).sum();
    let mut unused: u64 = stay.clone().map(|pack| pack.unused).sum();
    let mut candidates: Vec<PackUse> =
        stay.filter(|pack| pack.is_whole && pack.unused > 0).copied().collect();
    candidates.sort_by(|a, b| {
        let share = |pack: &PackUse| pack.unused as f64 / pack.len as f64;
        share(b).total_cmp(&share(a)).then(a.number.cmp(&b.number))
    });
    let bearable = match max_unused < 100.0 {
        true => used as f64 * max_unused / (100.0 - max_unused),
        false => f64::INFINITY,
    };
    let mut repacked = 0;
    let mut taken = Vec::new();
    for pack in candidates {
        if unused as f64 <= bearable || repacked + pack.len > max_len {
            break;
        }
        (unused, repacked) = (unused - pack.unused, repacked + pack.len);
        taken.push(pack);
    }
    taken
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn pack(number: u32, len: u64, used: u64) -> PackUse {
        PackUse { number, len, used, unused: len - used, is_whole: true }
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_most_wasteful_packs_are_written_anew_until_little_waste_is_left() {
        let packs = [
            pack(0, 10 * MIB, 10 * MIB),
            pack(1, 10 * MIB, MIB),
            pack(2, 10 * MIB, 8 * MIB),
            pack(3, 10 * MIB, 0),
            PackUse { is_whole: false, ..pack(4, 10 * MIB, 2 * MIB) },
        ];
        let numbers = |max_unused, max_len| -> Vec<u32> {
            to_repack(&packs, max_unused, max_len).iter().map(|pack| pack.number).collect()
        };
        assert_eq!(numbers(0.0, u64::MAX), [1, 2]);
        assert_eq!(numbers(35.0, u64::MAX), [1]);
        assert_eq!(numbers(100.0, u64::MAX), [0; 0]);
        assert_eq!(numbers(0.0, 15 * MIB), [1]);
    }

    proptest! {
        #[test]
        fn waste_stays_below_its_bound_unless_there_is_nothing_left_to_write_anew(
            parts in vec((0..=16_u64, 1..=16_u64), 0..30), max_unused in 0.0..=100.0_f64
        ) {
            let packs: Vec<PackUse> = parts.iter().enumerate()
                .map(|(n, &(used, len))| pack(n as u32, len * MIB, used.min(len) * MIB))
                .collect();
            let taken = to_repack(&packs, max_unused, u64::MAX);
            let is_taken = |pack: &&PackUse| taken.iter().any(|t| t.number == pack.number);
            let left: Vec<_> =
                packs.iter().filter(|p| p.used > 0 && !is_taken(p)).collect();
            let used: u64 = packs.iter().map(|p| p.used).sum();
            let waste: u64 = left.iter().map(|p| p.unused).sum();
            let all = (used + waste).max(1) as f64;
            prop_assert!(waste as f64 / all * 100.0 <= max_unused + 1e-6);
        }
    }
}
