//! P1: a disk reads as the concatenation of its chunks, whatever their lengths.

mod common;

use std::sync::Arc;

use common::{init, memory::Memory, noise};
use proptest::{collection::vec, prelude::*};
use repository::{BlobId, DiskReader, ExtentKind, Reader, RepositoryError, Writer, WriterOptions};

/// Stores chunks and opens them as a disk.
fn disk_of(chunks: &[Vec<u8>]) -> DiskReader {
    let repository = init(Memory::new());
    let index = Arc::new(repository.index().unwrap());
    let writer = Writer::new(&repository, index, WriterOptions::default()).unwrap();
    let save = |chunk: &Vec<u8>| writer.save_blob(chunk.clone().into()).unwrap();
    let content: Vec<BlobId> = chunks.iter().map(save).collect();
    writer.finish().unwrap();
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
