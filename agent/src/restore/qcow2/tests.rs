//! What the writer makes, judged by QEMU's own tools; and the arithmetic where no disk here is large enough.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use repository::{BlobId, DiskReader, Kdf, LocalFolder, Reader, Repository, Writer, WriterOptions};

use super::*;
use crate::progress::{Progress, When};
use crate::restore::{Stop, raw};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// A disk of these chunks: each so many bytes, with this byte at the beginning of some of its blocks.
fn disk_of(folder: &Path, chunks: &[(u64, u8)]) -> DiskReader {
    let backend = Arc::new(LocalFolder::create(folder.join("repository")).unwrap());
    let repository = Repository::init(backend, b"secret", Kdf::WEAK_FOR_TESTS).unwrap();
    let index = Arc::new(repository.index().unwrap());
    let writer = Writer::new(&repository, index, WriterOptions::default()).unwrap();
    let mut known: HashMap<(u64, u8), BlobId> = HashMap::new();
    let mut content = Vec::new();
    for &(len, byte) in chunks {
        let id = *known.entry((len, byte)).or_insert_with(|| {
            let mut chunk = vec![0; len as usize];
            // Whole clusters in between stay zero.
            for at in (usize::from(byte) * 512..chunk.len()).step_by(200 << 10) {
                chunk[at] = byte;
            }
            writer.save_blob(Bytes::from(chunk)).unwrap()
        });
        content.push(id);
    }
    writer.finish().unwrap();
    let index = Arc::new(repository.index().unwrap());
    let reader = Arc::new(Reader::new(&repository, index, 0));
    DiskReader::new(reader, content, chunks.iter().map(|(len, _)| len).sum()).unwrap()
}

/// Without QEMU's tools a test is skipped aloud, or fails where they are required.
fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    let required = std::env::var_os("KVMSNAP_REQUIRE_QEMU").is_some_and(|value| value == "1");
    assert!(found || !required, "qemu-img is not installed, and KVMSNAP_REQUIRE_QEMU=1");
    if !found {
        // Past the test harness, which swallows what `eprintln!` says.
        std::io::stderr().write_all(b"SKIPPED: qemu-img is not installed\n").unwrap();
    }
    found
}

fn qemu_img(arguments: &[&str], files: &[&Path]) -> serde_json::Value {
    let output = Command::new("qemu-img").args(arguments).args(files).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {}: {said}", output.status);
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

type Write = fn(&Target<'_>) -> Result<(), RestoreError>;

/// Disks up to this size are also restored over what may be left of them, which is held in memory.
const TAKEN_UP_MAX: u64 = 64 * MIB;

/// Parts of an image, between them what should not be there, and more than it has.
fn begun(whole: &[u8]) -> Vec<u8> {
    let spoilt = |at: usize, byte: u8| if at / (80 << 10) % 3 == 1 { 0xee } else { byte };
    let parts = whole.iter().enumerate().map(|(at, &byte)| spoilt(at, byte));
    parts.chain([0xee; 1000]).collect()
}

/// Restores a disk to a file, which may hold a part of it.
fn restore(reader: &DiskReader, path: &Path, write: Write) {
    let (progress, stop) = (&Progress::new(When::Never, true), &Stop::default());
    let options = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = &options.unwrap();
    write(&Target { file, path, reader, progress, stop }).unwrap();
}

#[test]
fn r24_reserved_room_that_stays_zero_is_given_back_whoever_reserved_it() {
    let folder = tempfile::tempdir().unwrap();
    let reader = disk_of(folder.path(), &[(MIB, 1); 8]);
    for (name, write) in [("disk.raw", raw::write as Write), ("disk.qcow2", write)] {
        let path = folder.path().join(name);
        let taken = || fs::metadata(&path).unwrap().blocks() * 512;
        restore(&reader, &path, write);
        let whole = fs::read(&path).unwrap();
        assert!(taken() < 2 * MIB, "{name} takes {}", taken());

        // As a killed restore leaves it.
        let file = File::options().write(true).open(&path).unwrap();
        let len = whole.len() as i64;
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, len).unwrap();
        file.write_all_at(&[0xee; 5000], 3 * MIB).unwrap();
        restore(&reader, &path, write);

        assert!(fs::read(&path).unwrap() == whole, "{name} is not as it was");
        assert!(taken() < 2 * MIB, "{name} takes {}", taken());
    }
}

/// Restores a disk in both formats, and once more over what may be left of it: QEMU finds no fault in the
/// qcow2 image, no leak, and the same bytes.
fn assert_whole(chunks: &[(u64, u8)]) -> Option<serde_json::Value> {
    has_qemu_img().then(|| {
        let folder = tempfile::tempdir().unwrap();
        let reader = disk_of(folder.path(), chunks);
        let [plain, image] = ["disk.raw", "disk.qcow2"].map(|name| folder.path().join(name));
        restore(&reader, &plain, raw::write);
        restore(&reader, &image, write);
        if reader.size() < TAKEN_UP_MAX {
            for (path, write) in [(&plain, raw::write as Write), (&image, write)] {
                let whole = fs::read(path).unwrap();
                fs::write(path, begun(&whole)).unwrap();
                restore(&reader, path, write);
                assert!(fs::read(path).unwrap() == whole, "{} is not as it was", path.display());
            }
        }
        assert_eq!(fs::metadata(&plain).unwrap().len(), reader.size());

        let check = qemu_img(&["check", "--output=json", "-f", "qcow2"], &[&image]);

        for fault in ["corruptions", "leaks", "check-errors"] {
            assert_eq!(check[fault].as_u64().unwrap_or(0), 0, "{check}");
        }
        let sectors = reader.size().next_multiple_of(SECTOR_LEN);
        let info = qemu_img(&["info", "--output=json", "-f", "qcow2"], &[&image]);
        assert_eq!(info["virtual-size"], sectors);
        // As a disk has it: to the end of its last sector.
        File::options().write(true).open(&plain).unwrap().set_len(sectors).unwrap();
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2"], &[&plain, &image]);
        check
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn p1_disks_of_any_chunks_are_images_without_fault(
        sectors in vec((1_u64..2000, 0_u8..4), 0..20),
    ) {
        let chunks: Vec<_> = sectors.iter().map(|&(sectors, byte)| (sectors * 512, byte)).collect();
        assert_whole(&chunks);
    }
}

#[test]
fn p1_disks_of_every_size_are_images_without_fault() {
    let table = CLUSTER_LEN * ENTRIES;
    let zeros = |len| std::iter::repeat_n((4 * MIB, 0), (len / (4 * MIB)) as usize);
    let sparse: Vec<_> =
        zeros(table - 4 * MIB).chain([(4 * MIB, 1), (4 * MIB, 2)]).chain(zeros(table)).collect();
    let cases: [&[(u64, u8)]; 9] = [
        &[],
        &[(512, 1)],
        &[(512, 0)],
        &[(1000, 1)],
        &[(CLUSTER_LEN, 1)],
        &[(128 << 10, 1), (128 << 10, 0), (96 << 10, 2)],
        // Two chunks that share a cluster, and one whose second half is zero.
        &[(96 << 10, 0), (96 << 10, 3), (128 << 10, 1)],
        &[(4 * MIB, 0), (MIB, 0)],
        // More than one L2 table, with a run across their border.
        &sparse,
    ];
    for chunks in cases {
        assert_whole(chunks);
    }
}

#[test]
fn p1_an_image_of_more_than_one_refcount_block_is_without_fault() {
    // One chunk over and over: room for 2.5 GiB of data, of which a little is written.
    let chunks: Vec<_> = std::iter::repeat_n((4 * MIB, 1), 640).collect();
    let Some(check) = assert_whole(&chunks) else { return };
    let end = check["image-end-offset"].as_u64().unwrap();
    assert!(end > REFCOUNTS * CLUSTER_LEN, "{check}");
}

/// Nothing overlaps, everything is described, and nothing is missing.
fn assert_consistent(size: u64, data: &[(u64, u64)]) {
    let layout = Layout::new(size, data.iter().map(|&(start, end)| start..end));
    let clusters = |range: &Range<u64>| range.end - range.start;
    let parts = [&layout.refcount_table, &layout.refcount_blocks, &layout.l1, &layout.l2];
    let mut at = 1;
    for part in parts {
        assert_eq!(part.start, at, "{layout:?}");
        at = part.end;
    }
    assert_eq!(layout.data, at);
    assert!(clusters(&layout.refcount_blocks) * REFCOUNTS >= layout.end);
    assert!((clusters(&layout.refcount_blocks) - 1) * REFCOUNTS < layout.end, "none is too many");
    assert_eq!(
        clusters(&layout.refcount_table),
        clusters(&layout.refcount_blocks).div_ceil(ENTRIES)
    );
    assert_eq!(clusters(&layout.l1), layout.l1_entries.div_ceil(ENTRIES));
    assert!(layout.l1_entries * ENTRIES * CLUSTER_LEN >= layout.size);
    assert_eq!(clusters(&layout.l2), layout.l2_tables.len() as u64);
    assert!(layout.l2_tables.is_sorted_by(|one, next| one < next));
    for &(start, end) in data {
        for offset in [start, end - 1] {
            let place = layout.place(offset);
            assert!((layout.data..layout.end).contains(&(place / CLUSTER_LEN)));
            assert!(layout.l2_tables.contains(&(offset / CLUSTER_LEN / ENTRIES)));
        }
        assert_eq!(layout.place(end - 1) - layout.place(start), end - 1 - start);
    }
}

#[test]
fn a_refcount_table_may_need_more_than_one_cluster() {
    let at_border = |blocks: u64| blocks * REFCOUNTS * CLUSTER_LEN;
    let full = ENTRIES * REFCOUNTS * CLUSTER_LEN;
    let cases = [
        (30 * TIB, vec![(0, 30 * TIB)]),
        (30 * TIB, vec![(0, 10 * TIB), (11 * TIB, 11 * TIB + 512), (12 * TIB, 30 * TIB)]),
        (64 * GIB, (0..1000).map(|n| (n * 64 * MIB, n * 64 * MIB + 128 * 1024)).collect()),
        (full, vec![(0, full)]),
    ];
    for (size, data) in cases {
        assert_consistent(size, &data);
    }
    // Around the size at which the refcounts need one block more for themselves.
    for clusters in 0..12 {
        let size = at_border(3) - clusters * CLUSTER_LEN;
        assert_consistent(size, &[(0, size)]);
    }
    let largest = Layout::new(30 * TIB, std::iter::once(0..30 * TIB));
    assert_eq!(largest.refcount_table.end - largest.refcount_table.start, 2);
}
