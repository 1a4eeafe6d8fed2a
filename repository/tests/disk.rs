//! P1: a disk reads as the concatenation of its chunks, whatever their lengths.

mod common;

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex},
};

use common::{init, memory::Memory, noise};
use proptest::{collection::vec, prelude::*};
use repository::{
    BlobId, DiskReader, ExtentKind, FileKind, Reader, Repository, RepositoryError, Writer,
    WriterOptions,
};

/// Stores chunks, those that are there already too.
fn save(repository: &Repository, chunks: &[Vec<u8>]) -> Vec<BlobId> {
    let index = Arc::new(repository.index().unwrap());
    let writer = Writer::new(repository, index, WriterOptions::default()).unwrap();
    let save = |chunk: &Vec<u8>| writer.save_blob(chunk.clone().into()).unwrap();
    let content = chunks.iter().map(save).collect();
    writer.finish().unwrap();
    content
}

/// Stores chunks and opens them as a disk.
fn disk_of(chunks: &[Vec<u8>]) -> DiskReader {
    let repository = init(Memory::new());
    let content = save(&repository, chunks);
    let size = chunks.iter().map(|chunk| chunk.len() as u64).sum();
    let reader = Arc::new(Reader::new(&repository, Arc::new(repository.index().unwrap()), 1000));
    let wrong = DiskReader::new(reader.clone(), content.clone(), size + 1);
    assert!(matches!(wrong, Err(RepositoryError::SizeMismatch { .. })));
    let unknown = DiskReader::new(reader.clone(), vec![BlobId([1; 32])], 5);
    assert!(matches!(unknown, Err(RepositoryError::MissingBlob { .. })));
    DiskReader::new(reader, content, size).unwrap()
}

fn assert_reads_as(disk: &DiskReader, whole: &[u8], offset: usize, len: usize) {
    let mut read = vec![0xee; len];
    disk.read_at(offset as u64, &mut read).unwrap();
    assert!(read == whole[offset..offset + len], "{len} bytes at {offset}");
    let mut at = offset as u64;
    for extent in disk.extents(offset as u64, len as u64).unwrap() {
        assert!(extent.offset == at && extent.len > 0);
        at += extent.len;
        if extent.kind == ExtentKind::Zero {
            assert!(whole[extent.offset as usize..at as usize].iter().all(|&byte| byte == 0));
        }
    }
    assert_eq!(at, (offset + len) as u64);
}

/// Each chunk that is wanted and not zero comes once, with its bytes.
fn assert_sweeps_as(
    disk: &DiskReader,
    whole: &[u8],
    threads: usize,
    wanted: impl Fn(usize) -> bool,
) {
    let taken = Mutex::new(BTreeMap::new());
    let take = |chunks: Range<usize>, content: &[u8]| {
        let mut rest = content;
        for chunk in chunks {
            let range = disk.chunk_range(chunk);
            let (bytes, later) = rest.split_at((range.end - range.start) as usize);
            let before = taken.lock().unwrap().insert(chunk, bytes.to_vec());
            assert!(before.is_none(), "chunk {chunk} came twice");
            rest = later;
        }
        assert!(rest.is_empty());
        Ok::<_, RepositoryError>(())
    };
    disk.sweep(&wanted).unwrap().hand_out(threads, take).unwrap();
    let expected = (0..disk.content().len()).filter(|&chunk| wanted(chunk) && !disk.is_zero(chunk));
    let bytes = |chunk| {
        let range = disk.chunk_range(chunk);
        whole[range.start as usize..range.end as usize].to_vec()
    };
    let expected: BTreeMap<_, _> = expected.map(|chunk| (chunk, bytes(chunk))).collect();
    assert!(taken.into_inner().unwrap() == expected);
}

/// Lengths, and whether the chunk is zero.
fn chunks(
    lengths: impl Strategy<Value = Vec<(usize, bool)>>,
) -> impl Strategy<Value = Vec<Vec<u8>>> {
    lengths.prop_map(|lengths| {
        let chunk = |(n, (len, zero)): (usize, (usize, bool))| {
            if zero { vec![0; len] } else { noise(n as u64, len) }
        };
        lengths.into_iter().enumerate().map(chunk).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn p1_any_mixture_of_chunk_lengths_reads_as_it_was_stored(
        chunks in chunks(vec((1_usize..300, any::<bool>()), 0..12)),
        ranges in vec((0.0..=1.0, 0.0..=1.0), 8),
    ) {
        let (disk, whole) = (disk_of(&chunks), chunks.concat());
        assert_reads_as(&disk, &whole, 0, whole.len());
        assert_sweeps_as(&disk, &whole, 3, |_| true);
        assert_sweeps_as(&disk, &whole, 1, |chunk| chunk % 2 == 0);
        for (start, part) in ranges {
            let offset = (whole.len() as f64 * start) as usize;
            let len = ((whole.len() - offset) as f64 * part) as usize;
            assert_reads_as(&disk, &whole, offset, len);
        }
    }

    #[test]
    fn p1_even_chunks_with_any_last_one_read_as_they_were_stored(
        count in 1_usize..8, last in 1_usize..=600, zeros in vec(any::<bool>(), 9),
    ) {
        let lengths = std::iter::repeat_n(256, count).chain([last]).zip(zeros).collect();
        let lengths: Vec<(usize, bool)> = lengths;
        let chunk = |(n, &(len, zero)): (usize, &(usize, bool))| {
            if zero { vec![0; len] } else { noise(n as u64, len) }
        };
        let chunks: Vec<_> = lengths.iter().enumerate().map(chunk).collect();
        let (disk, whole) = (disk_of(&chunks), chunks.concat());
        assert_reads_as(&disk, &whole, 0, whole.len());
        assert_reads_as(&disk, &whole, 255, whole.len() - 255);
        for (number, (_, zero)) in lengths.iter().enumerate() {
            prop_assert_eq!(disk.is_zero(number), *zero);
        }
    }
}

#[test]
fn an_empty_disk_has_no_extents_and_nothing_can_be_read_past_an_end() {
    let disk = disk_of(&[]);
    assert_eq!(disk.size(), 0);
    disk.read_at(0, &mut []).unwrap();
    assert!(disk.extents(0, 0).unwrap().is_empty());
    assert!(matches!(disk.read_at(0, &mut [0]), Err(RepositoryError::OutOfRange { .. })));
    assert!(matches!(disk.extents(u64::MAX, 2), Err(RepositoryError::OutOfRange { .. })));
}

#[test]
fn a_sweep_hands_out_a_chunk_at_each_place_where_it_is() {
    let [one, other] = [1, 2].map(|seed| noise(seed, 3000));
    let chunks = [&one, &other, &one, &one, &other].map(Clone::clone);
    assert_sweeps_as(&disk_of(&chunks), &chunks.concat(), 2, |_| true);
}

#[test]
fn a_sweep_ends_with_the_first_failure_of_its_taker() {
    let chunks: Vec<_> = (0..100).map(|seed| noise(seed, 100_000)).collect();
    let taken = Mutex::new(0);
    let take = |_: Range<usize>, _: &[u8]| {
        *taken.lock().unwrap() += 1;
        Err(RepositoryError::OutOfRange { offset: 7, len: 0, size: 0 })
    };
    let ended = disk_of(&chunks).sweep(|_| true).unwrap().hand_out(2, take);
    assert!(matches!(ended, Err(RepositoryError::OutOfRange { offset: 7, .. })), "{ended:?}");
    assert!(taken.into_inner().unwrap() <= 2, "each thread found out at once");
}

#[test]
fn p4_a_sweep_never_hands_out_damage_and_goes_to_the_next_copy() {
    let chunks: Vec<_> = (0..20).map(|seed| noise(seed, 5000)).collect();
    let memory = Memory::new();
    let repository = init(memory.clone());
    let packs = || memory.names().into_iter().filter(|(kind, _)| *kind == FileKind::Pack);
    let content = save(&repository, &chunks);
    let first: Vec<_> = packs().collect();
    // As if a second host had stored the same before it knew the first one's index.
    let index: Vec<_> = {
        let mut files = memory.files.lock().unwrap();
        files.extract_if(.., |(kind, _), _| *kind == FileKind::Index).collect()
    };
    save(&repository, &chunks);
    memory.files.lock().unwrap().extend(index);
    let sweep = || {
        let index = Arc::new(repository.index().unwrap());
        let reader = Arc::new(Reader::new(&repository, index, 0));
        let disk = DiskReader::new(reader, content.clone(), 20 * 5000).unwrap();
        disk.sweep(|_| true)?.hand_out(2, |run, bytes| {
            assert!(bytes == chunks[run.clone()].concat(), "chunks {run:?}");
            Ok::<_, RepositoryError>(())
        })
    };
    let damage = |file: &_| {
        let mut files = memory.files.lock().unwrap();
        files.get_mut(file).unwrap().iter_mut().step_by(1000).for_each(|byte| *byte ^= 1);
    };
    first.iter().for_each(damage);
    sweep().unwrap();
    packs().filter(|file| !first.contains(file)).for_each(|file| damage(&file));
    assert!(matches!(sweep(), Err(RepositoryError::DamagedBlob { .. })), "no copy is good");
    // A pack that is not there at all.
    first.iter().for_each(|file| drop(memory.files.lock().unwrap().remove(file)));
    assert!(matches!(sweep(), Err(RepositoryError::DamagedBlob { .. })));
}
