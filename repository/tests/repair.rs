//! P4, R19, R20: damage is mended as far as anything good is left, and the next backup does the rest.

mod common;

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    time::Duration,
};

use common::{CHUNK, folder, init, memory::Memory, noise, open, restic_ok, restore, store};
use repository::{
    BlobId, BlobKind, CheckOptions, CheckReport, Defect, FileId, FileKind, FileRef, LockMode,
    Problem, RepairOptions, RepairProgress, RepairReport, Repository, RepositoryError,
};

fn check(repository: &Repository) -> CheckReport {
    repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap()
}

fn repair(repository: &Repository, replica: Option<&Repository>) -> RepairReport {
    let found = check(repository);
    repository.repair(&found, replica, &RepairOptions::default(), &|_| Ok(())).unwrap()
}

/// Disks of three chunks, the first of which all have.
fn disk(number: u64) -> Vec<u8> {
    [noise(1, CHUNK), noise(10 + number, 2 * CHUNK)].concat()
}

fn back_up_three(repository: &Repository) -> BTreeMap<FileId, Vec<u8>> {
    let one = |number| (store(repository, "vm", &disk(number), CHUNK).unwrap().0, disk(number));
    (0..3).map(one).collect()
}

/// The packs that hold chunks of the disks.
fn packs_of_disks(repository: &Repository) -> BTreeSet<FileId> {
    let index = repository.index().unwrap();
    let disks = (0..3).flat_map(|number| {
        let disk = disk(number);
        disk.chunks(CHUNK).map(BlobId::of).collect::<Vec<_>>()
    });
    disks.map(|chunk| index.locate(BlobKind::Data, &chunk).unwrap().pack).collect()
}

#[test]
fn p4_the_next_backup_heals_what_was_damaged_and_older_snapshots_with_it() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let snapshots = back_up_three(&repository);
    let whole = memory.files.lock().unwrap().clone();
    for pack in packs_of_disks(&repository) {
        *memory.files.lock().unwrap() = whole.clone();
        memory.files.lock().unwrap().get_mut(&(FileKind::Pack, pack)).unwrap()[20] ^= 1;
        let repository = open(memory.clone()).unwrap();
        let found = check(&repository);
        let affected: Vec<FileId> =
            found.problems.iter().flat_map(|p| p.affected.iter().map(|s| s.id)).collect();
        assert!(!affected.is_empty());

        let report = repair(&repository, None);

        assert_eq!((report.packs, report.blobs_lost), (1, 1), "{report:?}");
        for (id, content) in &snapshots {
            match affected.contains(id) {
                true => assert!(restore(&repository, id).is_err()),
                false => assert_eq!(restore(&repository, id).unwrap(), *content),
            }
        }
        // The guests still have what was lost.
        for number in 0..3 {
            store(&repository, "vm", &disk(number), CHUNK).unwrap();
        }
        assert!(check(&repository).is_clean());
        for (id, content) in &snapshots {
            assert_eq!(restore(&repository, id).unwrap(), *content);
        }
    }
}

#[test]
fn p4_a_replica_heals_all_of_it() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let snapshots = back_up_three(&repository);
    let copy = Memory::new();
    *copy.files.lock().unwrap() = memory.files.lock().unwrap().clone();
    let replica = open(copy).unwrap();
    let whole = memory.files.lock().unwrap().clone();
    let files = whole.keys().filter(|(kind, _)| matches!(kind, FileKind::Pack | FileKind::Index));
    for (at, file) in files.enumerate() {
        *memory.files.lock().unwrap() = whole.clone();
        match at % 3 {
            0 => drop(memory.files.lock().unwrap().remove(file)),
            1 => memory.files.lock().unwrap().get_mut(file).unwrap().truncate(50),
            _ => memory.files.lock().unwrap().get_mut(file).unwrap()[40] ^= 1,
        }
        let repository = open(memory.clone()).unwrap();
        let report = repair(&repository, Some(&replica));
        assert_eq!(report.blobs_lost, 0, "{report:?}");
        let after = check(&repository);
        assert!(after.is_clean(), "{file:?}: {after:?}");
        for (id, content) in &snapshots {
            assert_eq!(restore(&repository, id).unwrap(), *content);
        }
    }
}

#[test]
fn r20_damaged_index_files_are_made_anew_from_the_packs() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("r");
    let repository = init(folder(&path));
    let snapshots = back_up_three(&repository);
    for (id, _) in repository.backend().list(FileKind::Index).unwrap() {
        std::fs::write(path.join(format!("index/{id}")), b"rubbish").unwrap();
    }
    assert!(repository.index().is_err());

    let report = repair(&repository, None);

    assert_eq!((report.index_files, report.blobs_lost), (3, 0), "{report:?}");
    assert!(check(&repository).is_clean());
    for (id, content) in &snapshots {
        assert_eq!(restore(&repository, id).unwrap(), *content);
    }
    if common::has_restic() {
        restic_ok(&path, &["check", "--read-data"]);
    }
}

#[test]
fn r20_index_files_that_cannot_be_read_are_made_anew_where_the_packs_tell_all() {
    for is_header_damaged in [false, true] {
        let memory = Memory::new();
        let repository = init(memory.clone());
        let snapshots = back_up_three(&repository);
        let before = memory.names();
        let pack = packs_of_disks(&repository).into_iter().next().unwrap();
        let flip_header = || {
            let mut files = memory.files.lock().unwrap();
            let pack = files.get_mut(&(FileKind::Pack, pack)).unwrap();
            let at = pack.len() - 10;
            pack[at] ^= 1;
        };
        if is_header_damaged {
            flip_header();
        }
        // As a disk that is dying says it.
        memory.no_read.lock().unwrap().insert(FileKind::Index, Some(ErrorKind::Other));
        let refused = repository.index();
        assert!(refused.is_err_and(|error| error.is_damage()), "nobody writes by half an index");
        let (_, passed_over) = repository.index_salvaged().expect("restores go on");
        assert!(passed_over.len() >= 3);

        let options = RepairOptions::default();
        let report = repository.repair(&check(&repository), None, &options, &|_| Ok(())).unwrap();

        memory.no_read.lock().unwrap().clear();
        let index_files = before.iter().filter(|(kind, _)| *kind == FileKind::Index);
        let stay = index_files.filter(|file| memory.names().contains(file)).count();
        assert_eq!(stay, if is_header_damaged { 3 } else { 0 }, "{report:?}");
        if is_header_damaged {
            flip_header();
        }
        assert!(check(&repository).is_clean());
        for (id, content) in &snapshots {
            assert_eq!(restore(&repository, id).unwrap(), *content);
        }
    }
}

#[test]
fn a_repair_of_what_is_whole_changes_nothing() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    back_up_three(&repository);
    let before = memory.names();
    assert_eq!(repair(&repository, None), RepairReport::default());
    assert_eq!(repair(&repository, Some(&repository)), RepairReport::default());
    assert_eq!(memory.names(), before);
}

#[test]
fn p4_what_a_store_cannot_give_today_is_no_loss() {
    let refusals = [None, Some(ErrorKind::PermissionDenied), Some(ErrorKind::TimedOut)];
    for refusal in refusals {
        let memory = Memory::new();
        let repository = init(memory.clone());
        let snapshots = back_up_three(&repository);
        let before = memory.names();
        memory.no_read.lock().unwrap().insert(FileKind::Pack, refusal);
        // With the packs of folders away nothing else can be told.
        let found = CheckReport {
            problems: packs_of_disks(&repository).into_iter().map(unreadable).collect(),
            ..CheckReport::default()
        };
        let packs = found.problems.len();

        let mended = repository.repair(&found, None, &RepairOptions::default(), &|_| Ok(()));

        match refusal {
            Some(ErrorKind::TimedOut) => assert!(mended.is_err(), "{mended:?}"),
            _ => {
                let mended = mended.unwrap();
                let (packs_mended, lost) = (mended.packs, mended.blobs_lost);
                assert_eq!((packs_mended, lost, mended.unreadable.len()), (0, 0, packs));
            }
        }
        memory.no_read.lock().unwrap().clear();
        assert_eq!(memory.names(), before);
        assert!(check(&repository).is_clean());
        for (id, content) in &snapshots {
            assert_eq!(restore(&repository, id).unwrap(), *content);
        }
    }
}

#[test]
fn r20_one_pack_that_cannot_be_read_today_does_not_end_a_repair() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let snapshots = back_up_three(&repository);
    let chunk = BlobId::of(&disk(0)[..CHUNK]);
    let pack = repository.index().unwrap().locate(BlobKind::Data, &chunk).unwrap().pack;
    // An index file that does not mention it.
    let whole = memory.files.lock().unwrap().clone();
    let mut files = whole.keys().filter(|(kind, _)| *kind == FileKind::Index).map(|(_, id)| *id);
    let index = files.find(|id| {
        memory.files.lock().unwrap().remove(&(FileKind::Index, *id));
        let left = open(memory.clone()).unwrap().index().unwrap();
        *memory.files.lock().unwrap() = whole.clone();
        left.locate(BlobKind::Data, &chunk).is_some()
    });
    let index = index.unwrap();
    memory.files.lock().unwrap().get_mut(&(FileKind::Pack, pack)).unwrap()[20] ^= 1;
    memory.files.lock().unwrap().get_mut(&(FileKind::Index, index)).unwrap()[20] ^= 1;
    let found = check(&repository);
    let refused = Some(ErrorKind::PermissionDenied);
    memory.no_read.lock().unwrap().insert(FileKind::Pack, refused);
    let until_the_index_is_done = |step| {
        if let RepairProgress::Packs { .. } = step {
            memory.no_read.lock().unwrap().clear();
        }
        Ok(())
    };

    let options = RepairOptions::default();
    let mended = repository.repair(&found, None, &options, &until_the_index_is_done).unwrap();

    assert_eq!((mended.packs, mended.index_files), (1, 0), "{mended:?}");
    assert!(!mended.unreadable.is_empty());
    assert!(memory.names().contains(&(FileKind::Index, index)), "it tells more than the packs do");
    assert!(repair(&repository, None).unreadable.is_empty());
    store(&repository, "vm", &disk(0), CHUNK).unwrap();
    assert!(check(&repository).is_clean());
    for (id, content) in &snapshots {
        assert_eq!(restore(&repository, id).unwrap(), *content);
    }
}

fn unreadable(id: FileId) -> Problem {
    let file = Some(FileRef { kind: FileKind::Pack, id });
    Problem { file, blob: None, defect: Defect::Missing, affected: Vec::new() }
}

#[test]
fn r20_lost_index_files_are_made_anew_from_the_packs() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let snapshots = back_up_three(&repository);
    let (lost, _) = repository.backend().list(FileKind::Index).unwrap()[1];
    repository.backend().remove(FileKind::Index, &lost).unwrap();
    assert!(!check(&repository).is_clean());

    let report = repair(&repository, None);

    assert_eq!((report.index_files, report.blobs_lost), (1, 0), "{report:?}");
    assert!(check(&repository).is_clean());
    for (id, content) in &snapshots {
        assert_eq!(restore(&repository, id).unwrap(), *content);
    }
}

#[test]
fn r18_a_lock_that_nobody_can_read_is_removed_once_nobody_renewed_it() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    back_up_three(&repository);
    let empty = FileId::of(b"what it was before the power went");
    repository.backend().write(FileKind::Lock, &empty, b"").unwrap();
    let refused = repository.lock(LockMode::Shared);
    assert!(matches!(refused, Err(RepositoryError::Damaged { .. })), "{refused:?}");
    let found = check(&repository);
    assert_eq!(found.problems.len(), 1, "{found:?}");

    let mut options = RepairOptions::default();
    options.lock_patience = Duration::from_millis(100);
    let watched = Cell::new(false);
    let step = |step| {
        if let RepairProgress::Waiting { .. } = step {
            watched.set(true);
            assert!(memory.names().contains(&(FileKind::Lock, empty)), "it is watched first");
        }
        Ok(())
    };
    repository.repair(&found, None, &options, &step).unwrap();

    assert!(watched.get());
    assert!(check(&repository).is_clean());
    repository.lock(LockMode::Exclusive).unwrap().release().unwrap();
}
