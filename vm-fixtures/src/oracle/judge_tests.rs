//! The judge must see every defect that is planted, and none where there is none.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use tempfile::TempDir;

use super::{BLOCK, Verdict, judge};
use crate::oracle::{BlockId, Content, Event, FileTarget, Kind, Load, Log, Region, Target, encode};

const LEN: u64 = 256 * BLOCK;

/// Disks that a load wrote to, with a copy of them after each part.
struct Scene {
    folder: TempDir,
    disks: u64,
    load: Load,
    log: Vec<u8>,
}

impl Scene {
    fn new(disks: u64, load: Load) -> Self {
        let scene = Self { folder: tempfile::tempdir().unwrap(), disks, load, log: Vec::new() };
        for disk in 0..disks {
            File::create(scene.path(disk)).unwrap().set_len(LEN).unwrap();
        }
        scene
    }

    fn path(&self, disk: u64) -> PathBuf {
        self.folder.path().join(format!("disk-{disk}"))
    }

    fn regions(&self) -> Vec<Region> {
        (0..self.disks).map(|disk| Region { disk, from: 0, to: LEN }).collect()
    }

    /// Runs `count` more operations.
    fn run(&mut self, count: u64) {
        let targets: Vec<_> =
            (0..self.disks).map(|n| FileTarget::open(&self.path(n)).unwrap()).collect();
        let targets: Vec<&dyn Target> = targets.iter().map(|target| target as _).collect();
        let load = self.load.clone().after(&self.log()).count(count);
        load.run(&self.regions(), &targets, &mut self.log).unwrap();
    }

    fn log(&self) -> Log {
        Log::parse(std::str::from_utf8(&self.log).unwrap()).unwrap()
    }

    fn judge(&self) -> Verdict {
        let paths: Vec<_> = (0..self.disks).map(|disk| self.path(disk)).collect();
        let images: Vec<_> = (0..).zip(paths.iter().map(PathBuf::as_path)).collect();
        judge(&images, &self.log()).unwrap()
    }

    fn copy(&self, disk: u64) -> Vec<u8> {
        fs::read(self.path(disk)).unwrap()
    }

    fn put(&self, disk: u64, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.path(disk)).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    /// A block whose last operation is a write older than the newest ones, and how it looks.
    fn old_block(&self) -> (u64, Vec<u8>) {
        let log = self.log();
        let image = self.copy(0);
        let writes = log.events.iter().rev().skip(40).filter_map(|event| match event {
            Event::Issued(operation) if operation.kind == Kind::Write => Some(*operation),
            _ => None,
        });
        for operation in writes.filter(|operation| operation.disk == 0) {
            let at = usize::try_from(operation.offset).unwrap();
            let bytes = &image[at..at + super::BLOCK_LEN];
            let seq = match super::inspect(bytes) {
                Content::Block(id) => id.seq,
                _ => 0,
            };
            if seq == operation.seq {
                return (operation.offset, bytes.to_vec());
            }
        }
        panic!("an old block is left");
    }
}

fn offsets(defects: &[super::Defect]) -> Vec<(u64, u64)> {
    defects.iter().map(|defect| (defect.disk, defect.offset)).collect()
}

#[test]
fn an_image_shows_the_end_of_its_log() {
    for load in [Load::default(), Load::default().mixed(), Load::default().mixed().depth(8)] {
        let mut scene = Scene::new(2, load);
        scene.run(2000);
        let verdict = scene.judge();
        assert_eq!(verdict.instant(), 2000);
        verdict.assert_instant_between(2000, 2000);
    }
}

#[test]
fn an_image_shows_the_instant_of_its_copy_while_the_log_goes_on() {
    let mut scene = Scene::new(2, Load::default().mixed());
    scene.run(500);
    let copies = [scene.copy(0), scene.copy(1)];
    scene.run(500);
    assert_eq!(scene.judge().instant(), 1000);
    for (disk, copy) in (0..).zip(&copies) {
        scene.put(disk, 0, copy);
    }
    let verdict = scene.judge();
    verdict.assert_instant_between(500, 500);
    let wrong = std::panic::catch_unwind(|| verdict.assert_instant_between(510, 1000));
    assert!(wrong.is_err(), "it is another instant");
    let wrong = std::panic::catch_unwind(|| verdict.assert_instant_between(0, 490));
    assert!(wrong.is_err(), "it is another instant");
}

#[test]
fn two_disks_of_two_instants_show_none() {
    let mut scene = Scene::new(2, Load::default());
    scene.run(500);
    let earlier = scene.copy(1);
    scene.run(20);
    scene.put(1, 0, &earlier);
    let verdict = scene.judge();
    assert!(!verdict.is_consistent());
    assert!(verdict.stale.len() + verdict.future.len() + verdict.lost.len() > 0, "{verdict}");
}

#[test]
fn a_torn_block_is_seen() {
    let mut scene = Scene::new(1, Load::default());
    scene.run(1000);
    let (offset, mut bytes) = scene.old_block();
    bytes[1024..].fill(0);
    scene.put(0, offset, &bytes);
    let verdict = scene.judge();
    assert!(!verdict.is_consistent());
    assert_eq!(offsets(&verdict.torn), [(0, offset)]);
    assert!(verdict.acked > 950, "{verdict}");
}

#[test]
fn a_stale_block_is_seen() {
    let mut scene = Scene::new(1, Load::default());
    scene.run(1000);
    let before = scene.copy(0);
    scene.run(1000);
    let (offset, bytes) = scene.old_block();
    let at = usize::try_from(offset).unwrap();
    let old = &before[at..at + bytes.len()];
    assert_ne!(old, bytes);
    scene.put(0, offset, old);
    let verdict = scene.judge();
    assert!(!verdict.is_consistent());
    assert_eq!(offsets(&verdict.stale), [(0, offset)], "{verdict}");
}

#[test]
fn data_where_zeros_should_be_is_stale() {
    let mut scene = Scene::new(1, Load { blocks_max: 1, ..Load::default() });
    scene.run(1000);
    let (offset, bytes) = scene.old_block();
    let seq = scene.log().issued() + 1;
    let zero = format!("i {seq} 0 z {offset} {BLOCK}\nd {seq}\n");
    scene.log.write_all(zero.as_bytes()).unwrap();
    scene.put(0, offset, &vec![0; bytes.len()]);
    scene.run(100);
    // The load may have come by since; then there is another block to take.
    let end = scene.copy(0);
    let at = usize::try_from(offset).unwrap();
    if end[at..at + bytes.len()].iter().all(|byte| *byte == 0) {
        assert_eq!(scene.judge().instant(), seq + 100);
        scene.put(0, offset, &bytes);
        assert_eq!(offsets(&scene.judge().stale), [(0, offset)]);
    } else {
        panic!("choose another seed: the load wrote the block again");
    }
}

#[test]
fn a_misplaced_block_is_seen() {
    let mut scene = Scene::new(1, Load::default());
    scene.run(1000);
    let (offset, bytes) = scene.old_block();
    let elsewhere = if offset == 0 { 16 * BLOCK } else { 0 };
    scene.put(0, elsewhere, &bytes);
    assert_eq!(offsets(&scene.judge().misplaced), [(0, elsewhere)]);
}

#[test]
fn a_lost_block_is_seen() {
    let mut scene = Scene::new(1, Load::default());
    scene.run(1000);
    let (offset, bytes) = scene.old_block();
    scene.put(0, offset, &vec![0; bytes.len()]);
    let verdict = scene.judge();
    assert_eq!(offsets(&verdict.lost), [(0, offset)], "{verdict}");
}

#[test]
fn a_block_from_the_future_is_seen() {
    let mut scene = Scene::new(1, Load { blocks_max: 1, ..Load::default() });
    scene.run(1000);
    let copy = scene.copy(0);
    scene.run(300);
    let (offset, bytes) = scene.old_block();
    scene.put(0, 0, &copy);
    scene.put(0, offset, &bytes);
    let verdict = scene.judge();
    assert!(!verdict.is_consistent());
    assert_eq!(offsets(&verdict.future), [(0, offset)], "{verdict}");
}

#[test]
fn what_the_oracle_never_wrote_is_alien() {
    let mut scene = Scene::new(1, Load::default());
    scene.run(1000);
    scene.put(0, 8 * BLOCK, &[0xEE; super::BLOCK_LEN]);
    let other = BlockId { stream: 99, disk: 0, offset: 16 * BLOCK, seq: 5 };
    scene.put(0, 16 * BLOCK, &encode(other));
    assert_eq!(offsets(&scene.judge().alien), [(0, 8 * BLOCK), (0, 16 * BLOCK)]);
}

#[test]
fn what_was_in_flight_may_be_there_or_not() {
    let mut scene = Scene::new(1, Load::default());
    scene.run(1000);
    let (offset, bytes) = scene.old_block();
    let new = encode(BlockId { stream: 1, disk: 0, offset, seq: 1001 });
    scene.log.write_all(format!("i 1001 0 w {offset} {BLOCK}\n").as_bytes()).unwrap();
    assert_eq!(scene.judge().instant(), 1000);
    scene.put(0, offset, &new);
    assert_eq!(scene.judge().instant(), 1000);
    scene.put(0, offset, &bytes);
    scene.log.write_all(b"d 1001\n").unwrap();
    assert_eq!(scene.judge().instant(), 1000, "before it was done");
    let late = scene.judge();
    let wrong = std::panic::catch_unwind(|| late.assert_instant_between(1001, 1001));
    assert!(wrong.is_err());
}

#[test]
fn a_sparse_disk_costs_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    File::create(&path).unwrap().set_len(1 << 43).unwrap();
    let region = Region { disk: 0, from: 0, to: 1 << 43 };
    let target = FileTarget::open(&path).unwrap();
    let mut log = Vec::new();
    Load::default().count(100).run(&[region], &[&target], &mut log).unwrap();
    let log = Log::parse(std::str::from_utf8(&log).unwrap()).unwrap();
    assert_eq!(judge(&[(0, &path)], &log).unwrap().instant(), 100);
}
