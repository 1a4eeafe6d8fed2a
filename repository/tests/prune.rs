//! P3, P6, R10, R16: freeing what no snapshot needs, whatever interrupts it and whoever writes meanwhile.

mod common;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io::ErrorKind,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use common::{
    CHUNK, folder, init,
    memory::{BLOCK, Files, Memory},
    noise, open, restic_ok, restore, store,
};
use repository::{
    Backend, BlobId, BlobKind, CheckOptions, FileId, FileKind, LockMode, PruneOptions,
    PruneProgress, PruneReport, Reader, Repository, RepositoryError,
};

fn options() -> PruneOptions {
    let mut options = PruneOptions::default();
    (options.max_unused, options.patience) = (0.0, Duration::from_millis(100));
    options
}

fn prune(repository: &Repository) -> Result<PruneReport, RepositoryError> {
    repository.prune(&options(), &|_| Ok(()))
}

/// The content of a disk that shares its first chunks with all others of this seed.
fn content(common: u64, own: u64) -> Vec<u8> {
    [noise(common, 4 * CHUNK), noise(1000 + own, 3 * CHUNK)].concat()
}

type Kept = BTreeMap<FileId, Vec<u8>>;

/// A repository of six snapshots of which three were forgotten: packs that go as a whole, packs that must be
/// written anew, and packs that stay.
fn forgetful(repository: &Repository) -> Kept {
    let mut kept = Kept::new();
    for number in 0..6 {
        let disk = content(number % 2, number);
        let (id, _) = store(repository, &format!("vm{}", number % 2), &disk, CHUNK).unwrap();
        if number >= 3 {
            kept.insert(id, disk);
        } else {
            repository.remove_snapshot(&id).unwrap();
        }
    }
    // Nothing of this one is needed by any other.
    let (id, _) = store(repository, "gone", &noise(77, 5 * CHUNK), CHUNK).unwrap();
    repository.remove_snapshot(&id).unwrap();
    kept
}

fn assert_whole(repository: &Repository, kept: &Kept) {
    let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.snapshots as usize, kept.len());
    for (id, disk) in kept {
        assert!(restore(repository, id).unwrap() == *disk, "{id}");
    }
}

fn packs(repository: &Repository) -> Vec<FileId> {
    let listed = repository.backend().list(FileKind::Pack).unwrap();
    listed.into_iter().map(|(id, _)| id).collect()
}

fn judge(path: &Path) {
    if common::has_restic() {
        restic_ok(path, &["check", "--read-data"]);
    }
}

#[test]
fn what_no_snapshot_needs_goes_and_all_else_stays() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("r");
    let repository = init(folder(&path));
    let kept = forgetful(&repository);
    let mut dry = options();
    dry.dry_run = true;
    let before = packs(&repository);
    let foreseen = repository.prune(&dry, &|_| Ok(())).unwrap();
    assert_eq!(packs(&repository).len(), before.len());

    let report = prune(&repository).unwrap();

    assert!(
        report.packs_repacked > 0 && report.packs_removed > report.packs_repacked,
        "{report:?}"
    );
    assert_eq!(report.bytes_unused, 0, "{report:?}");
    assert_eq!(
        (foreseen.packs_removed, foreseen.bytes_removed, foreseen.packs_repacked),
        (report.packs_removed, report.bytes_removed, report.packs_repacked)
    );
    assert_whole(&repository, &kept);
    judge(&path);
    // There is nothing left to do.
    let again = prune(&repository).unwrap();
    assert_eq!((again.packs_removed, again.packs_repacked, again.index_files_written), (0, 0, 0));
    assert!(repository.backend().list(FileKind::Lock).unwrap().is_empty());
}

#[test]
fn little_waste_is_left_and_an_empty_repository_is_no_matter() {
    let repository = init(Memory::new());
    assert_eq!(prune(&repository).unwrap(), PruneReport::default());
    let kept = forgetful(&repository);
    let mut generous = options();
    generous.max_unused = 100.0;
    let report = repository.prune(&generous, &|_| Ok(())).unwrap();
    assert_eq!(report.packs_repacked, 0);
    assert!(report.packs_removed > 0 && report.bytes_unused > 0, "{report:?}");
    assert_whole(&repository, &kept);

    let mut bounded = options();
    bounded.max_repack = 1;
    assert_eq!(repository.prune(&bounded, &|_| Ok(())).unwrap().packs_repacked, 0);
    kept.keys().for_each(|id| repository.remove_snapshot(id).unwrap());
    let mut all = options();
    all.allow_empty = true;
    repository.prune(&all, &|_| Ok(())).unwrap();
    assert!(packs(&repository).is_empty());
    assert!(repository.backend().list(FileKind::Index).unwrap().is_empty());
}

/// A prune whose effect `n` fails, once or for good, and one that does the rest.
fn effect_fails(n: u64, error: ErrorKind, for_good: bool, goal: usize) {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let kept = forgetful(&repository);
    memory.fail(n, if for_good { u64::MAX } else { n }, error);
    let _ = prune(&repository);
    memory.fail(0, 0, error);
    // Whoever was killed lets go of nothing.
    memory.files.lock().unwrap().retain(|(kind, _), _| *kind != FileKind::Lock);
    let repository = open(memory.clone()).unwrap();
    assert_whole(&repository, &kept);
    prune(&repository).unwrap();
    assert_whole(&repository, &kept);
    assert_eq!(memory.names().len(), goal, "effect {n}");
}

/// Fails every effect of a prune in turn. Most of the time is spent waiting for locks to settle.
fn every_effect_fails(error: ErrorKind, for_good: bool) {
    let memory = Memory::new();
    let repository = init(memory.clone());
    forgetful(&repository);
    memory.fail(u64::MAX, 0, error);
    prune(&repository).unwrap();
    let (effects, goal) = (memory.effects.load(Ordering::SeqCst), memory.names().len());
    // Two locks, two packs, two index files, and what goes.
    assert!(effects > 12, "{effects}");
    let next = AtomicU64::new(1);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    match next.fetch_add(1, Ordering::SeqCst) {
                        n if n <= effects => effect_fails(n, error, for_good, goal),
                        _ => break,
                    }
                }
            });
        }
    });
}

#[test]
fn p3_a_prune_that_ends_at_any_step_leaves_every_snapshot_whole() {
    every_effect_fails(ErrorKind::Other, true);
}

#[test]
fn r25_a_prune_goes_on_where_one_that_failed_left_off() {
    every_effect_fails(ErrorKind::Other, false);
}

#[test]
fn r16_what_a_backup_takes_over_while_a_prune_copies_stays() {
    let repository = init(Memory::new());
    let mut kept = forgetful(&repository);
    let before = packs(&repository);
    let new = RefCell::new(None);
    let foreign = noise(5, 999);
    let told = Cell::new(false);
    // Somebody backs up the very disk that nobody needed any more, while its packs are about to go. Another
    // one is killed after its first pack.
    repository
        .prune(&options(), &|step| {
            if matches!(step, PruneProgress::Repacking { .. }) && !told.replace(true) {
                let disk = noise(77, 5 * CHUNK);
                let (id, stats) = store(&repository, "gone", &disk, CHUNK).unwrap();
                assert!(stats.fresh_bytes < disk.len() as u64, "it found nothing to take over");
                new.replace(Some((id, disk)));
                let id = FileId::of(&foreign);
                repository.backend().write(FileKind::Pack, &id, &foreign).unwrap();
            }
            Ok(())
        })
        .unwrap();
    assert!(told.get() && packs(&repository).len() < before.len() + 5);
    kept.extend(new.into_inner());
    assert!(packs(&repository).contains(&FileId::of(&foreign)), "it came after the survey");
    assert_whole(&repository, &kept);
    // The next one finds that nobody mentions it.
    assert_eq!(prune(&repository).unwrap().packs_unreferenced, 1);
    assert_whole(&repository, &kept);
}

#[test]
fn r16_a_prune_waits_for_backups_and_what_it_copied_stays_when_they_take_too_long() {
    let repository = init(Memory::new());
    let kept = forgetful(&repository);
    let backup = repository.lock(LockMode::Shared).unwrap();
    let before = packs(&repository).len();
    let waited = Cell::new(0);
    let outcome = repository.prune(&options(), &|step| {
        waited.set(waited.get() + i32::from(matches!(step, PruneProgress::Waiting { .. })));
        Ok(())
    });
    assert!(matches!(outcome, Err(RepositoryError::Locked { .. })), "{outcome:?}");
    assert!(waited.get() > 0 && packs(&repository).len() > before);
    assert_whole(&repository, &kept);
    backup.release().unwrap();
    let report = prune(&repository).unwrap();
    assert_eq!(report.packs_repacked, 0, "it was done already");
    assert_eq!(report.bytes_unused, 0);
    assert_whole(&repository, &kept);
}

#[test]
fn p4_nothing_is_removed_where_it_is_not_known_what_is_in_use() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let kept = forgetful(&repository);
    let whole = memory.files.lock().unwrap().clone();
    for (kind, how_many) in [(FileKind::Snapshot, 3), (FileKind::Index, 7), (FileKind::Pack, 1)] {
        let mut refused = 0;
        for id in whole.keys().filter(|(of, _)| *of == kind).map(|(_, id)| *id) {
            memory.files.lock().unwrap().get_mut(&(kind, id)).unwrap()[20] ^= 1;
            let before = memory.names();
            let outcome = prune(&open(memory.clone()).unwrap());
            if matches!(outcome, Err(RepositoryError::InUseUnknown { .. })) {
                assert_eq!(memory.names(), before, "{kind:?} {id}");
                refused += 1;
            }
            *memory.files.lock().unwrap() = whole.clone();
        }
        // Of packs those with the folders of snapshots.
        assert!(refused >= how_many, "{kind:?}: {refused}");
    }
    assert_whole(&repository, &kept);
}

#[test]
fn p4_a_damaged_pack_stays_as_it_is() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let kept = forgetful(&repository);
    let files = memory.files.lock().unwrap().clone();
    let packs = files.keys().filter(|(kind, _)| *kind == FileKind::Pack);
    let mut spared = 0;
    for (kind, id) in packs {
        memory.files.lock().unwrap().get_mut(&(*kind, *id)).unwrap()[20] ^= 1;
        if let Ok(report) = prune(&open(memory.clone()).unwrap()) {
            spared += report.damaged.len();
            let is_there = memory.names().contains(&(*kind, *id));
            assert!(report.damaged.iter().all(|damaged| damaged == id && is_there));
        }
        *memory.files.lock().unwrap() = files.clone();
    }
    assert!(spared > 0);
    assert_whole(&repository, &kept);
}

#[test]
fn r10_a_full_store_is_emptied() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let mut kept = forgetful(&repository);
    // Full to the last block, by packs of a backup that did not finish.
    let rest = noise(1, 3 * BLOCK as usize);
    memory.write(FileKind::Pack, &FileId::of(&rest), &rest).unwrap();
    memory.capacity.store(memory.len(), Ordering::SeqCst);
    let refused = repository.lock(LockMode::Shared);
    assert!(matches!(refused, Err(RepositoryError::LockNotWritable { .. })), "{refused:?}");

    let report = prune(&repository).unwrap();
    assert!(report.packs_unreferenced > 0, "{report:?}");
    assert_whole(&repository, &kept);

    // Full again, with nothing but snapshots; one of them is forgotten.
    memory.capacity.store(memory.len(), Ordering::SeqCst);
    let refused = prune(&repository);
    assert!(matches!(refused, Err(RepositoryError::LockNotWritable { .. })), "{refused:?}");
    let (forgotten, _) = kept.pop_first().unwrap();
    repository.remove_snapshot(&forgotten).unwrap();
    let before = memory.len();
    let report = prune(&repository).unwrap();
    assert!(report.packs_removed > 0, "{report:?}");
    assert!(memory.len() < before - 2 * CHUNK as u64, "{report:?}");
    assert_whole(&repository, &kept);
    // With the room that each gives the next one does more.
    let reports: Vec<_> = (0..4).map(|_| prune(&repository).unwrap()).collect();
    let last = reports.last().expect("four of them");
    // Which chunks share a pack is chance. What of one is needed may be too much for the room that there is: that
    // is told, and with more room it goes.
    assert!(last.bytes_unused == 0 || last.is_full, "{reports:?}");
    assert_whole(&repository, &kept);
    memory.capacity.store(memory.len() + 64 * CHUNK as u64, Ordering::SeqCst);
    assert_eq!(prune(&repository).unwrap().bytes_unused, 0);
    assert_whole(&repository, &kept);
}

#[test]
fn packs_that_two_backups_stored_at_once_are_needed_once() {
    let repository = init(Memory::new());
    let empty = Arc::new(repository.index().unwrap());
    let mut kept = Kept::new();
    for _ in 0..2 {
        // Neither knows of the other.
        let options = repository::WriterOptions::default();
        let writer = repository::Writer::new(&repository, Arc::clone(&empty), options).unwrap();
        let id = writer.save_blob(noise(1, CHUNK).into()).unwrap();
        let time = jiff::Timestamp::now();
        let node = repository::Node::file("vda.raw", CHUNK as u64, vec![id], time);
        let tree = writer.save_tree(&repository::Tree::new(vec![node])).unwrap();
        writer.finish().unwrap();
        let file = repository::SnapshotFile::new(tree, time);
        kept.insert(repository.save_snapshot(&file).unwrap(), Vec::new());
    }
    let report = prune(&repository).unwrap();
    assert_eq!(report.packs_removed + packs(&repository).len() as u64, report.packs);
    assert!(report.packs_removed > 0 && report.packs_repacked <= 1, "{report:?}");
    let checked = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(checked.is_clean(), "{checked:?}");
}

#[test]
fn p4_no_snapshot_at_all_is_not_taken_for_all_is_waste() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    forgetful(&repository);
    memory.files.lock().unwrap().retain(|(kind, _), _| *kind != FileKind::Snapshot);
    let before = memory.names();

    let refused = prune(&repository);

    assert!(matches!(refused, Err(RepositoryError::NoSnapshots { .. })), "{refused:?}");
    assert_eq!(memory.names(), before);
    let report = repository.check(&CheckOptions::default(), &|_| {}).unwrap();
    assert!(report.has_only_data(), "{report:?}");
}

#[test]
fn p4_a_store_that_finds_nothing_has_nothing_pruned() {
    for kind in [FileKind::Snapshot, FileKind::Index, FileKind::Lock] {
        let memory = Memory::new();
        let repository = init(memory.clone());
        let kept = forgetful(&repository);
        let before = memory.names();
        memory.no_list.lock().unwrap().insert(kind, None);
        assert!(prune(&repository).is_err(), "{kind:?} cannot be listed");
        memory.no_list.lock().unwrap().clear();
        if kind != FileKind::Lock {
            memory.no_read.lock().unwrap().insert(kind, None);
            let refused = prune(&repository);
            assert!(matches!(refused, Err(RepositoryError::InUseUnknown { .. })), "{refused:?}");
            memory.no_read.lock().unwrap().clear();
        }
        assert_eq!(memory.names(), before, "{kind:?}");
        assert_whole(&repository, &kept);
    }
}

#[test]
fn s09_a_copy_that_lacks_the_empty_folder_of_locks_is_used_as_any_other() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let kept = forgetful(&repository);
    memory.no_empty_folders.store(true, Ordering::SeqCst);
    repository.lock(LockMode::Shared).unwrap().release().unwrap();
    assert!(prune(&repository).unwrap().packs_removed > 0);
    assert_whole(&repository, &kept);
    // One that does not find the folder where there is a lock in it cannot list.
    memory.no_list.lock().unwrap().insert(FileKind::Lock, None);
    assert!(repository.lock(LockMode::Exclusive).is_err());
}

#[test]
fn what_was_just_removed_and_is_still_listed_is_no_damage() {
    for kind in [FileKind::Snapshot, FileKind::Index] {
        let memory = Memory::new();
        let repository = init(memory.clone());
        let kept = forgetful(&repository);
        // A file that is listed, and none of its kind is found until the next list, which lacks it.
        let removed = FileId::of(b"removed just now");
        memory.files.lock().unwrap().insert((kind, removed), Vec::new());
        memory.no_read.lock().unwrap().insert(kind, None);
        let (late, mut lists) = (Arc::downgrade(&memory), 0);
        let happens = move |of: FileKind, files: &mut Files| {
            lists += u32::from(of == kind);
            if lists == 2 {
                files.remove(&(kind, removed));
                late.upgrade().unwrap().no_read.lock().unwrap().clear();
            }
        };
        memory.meanwhile.lock().unwrap().0 = Some(Box::new(happens));

        assert!(prune(&repository).unwrap().packs_removed > 0, "{kind:?}");

        memory.meanwhile.lock().unwrap().0 = None;
        assert_whole(&repository, &kept);
    }
}

#[test]
fn p4_packs_stay_for_as_long_as_an_index_file_mentions_them() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let kept = forgetful(&repository);
    let before = packs(&repository);
    memory.no_removal.lock().unwrap().insert(FileKind::Index, None);
    prune(&repository).unwrap();
    assert!(before.iter().all(|id| packs(&repository).contains(id)));
    assert_whole(&repository, &kept);

    memory.no_removal.lock().unwrap().clear();
    prune(&repository).unwrap();
    assert!(!before.iter().all(|id| packs(&repository).contains(id)));
    assert_whole(&repository, &kept);
}

#[test]
fn r18_a_prune_whose_lock_is_taken_away_removes_nothing_more() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let kept = forgetful(&repository);
    let before = packs(&repository);
    let refused = repository.prune(&options(), &|step| {
        if matches!(step, PruneProgress::Removing { done: 0 | 1 }) {
            memory.files.lock().unwrap().retain(|(kind, _), _| *kind != FileKind::Lock);
        }
        Ok(())
    });
    assert!(matches!(refused, Err(RepositoryError::LockLost { .. })), "{refused:?}");
    assert!(before.iter().all(|id| packs(&repository).contains(id)));
    assert_whole(&repository, &kept);
}

#[test]
fn r10_a_backup_that_finishes_while_room_is_made_keeps_its_packs() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let mut kept = forgetful(&repository);
    let rest = noise(1, 3 * BLOCK as usize);
    memory.write(FileKind::Pack, &FileId::of(&rest), &rest).unwrap();
    // What another host stores, which has its lock already: packs, then, once these are listed, the rest.
    let before = memory.files.lock().unwrap().clone();
    let disk = noise(50, 3 * CHUNK);
    let lock = repository.lock(LockMode::Shared).unwrap();
    kept.insert(store(&repository, "late", &disk, CHUNK).unwrap().0, disk);
    let mut during = memory.files.lock().unwrap().clone();
    during.retain(|file, _| !before.contains_key(file));
    lock.release().unwrap();
    let (locks, stored): (Files, Files) =
        during.into_iter().partition(|((kind, _), _)| *kind == FileKind::Lock);
    let (late_packs, records): (Files, Files) =
        stored.into_iter().partition(|((kind, _), _)| *kind == FileKind::Pack);
    *memory.files.lock().unwrap() = before;
    memory.capacity.store(memory.len(), Ordering::SeqCst);
    let (mut late_packs, mut records) = (Some(late_packs), Some(records));
    memory.meanwhile.lock().unwrap().0 = Some(Box::new(move |kind, files| {
        match kind {
            FileKind::Pack => {
                if let Some(packs) = late_packs.take() {
                    files.extend(packs);
                    files.extend(locks.clone());
                }
            }
            // It has settled its lock: now it records and lets go.
            FileKind::Lock if late_packs.is_none() => {
                if let Some(records) = records.take() {
                    files.extend(records);
                    files.retain(|file, _| !locks.contains_key(file));
                }
            }
            _ => {}
        }
    }));

    // Whether the room suffices in the end is another matter.
    let _ = prune(&repository);

    memory.meanwhile.lock().unwrap().0 = None;
    memory.capacity.store(0, Ordering::SeqCst);
    assert!(!packs(&repository).contains(&FileId::of(&rest)), "room was made");
    assert_whole(&repository, &kept);
}

#[test]
fn p4_of_two_copies_the_good_one_stays() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let empty = Arc::new(repository.index().unwrap());
    let (shared, mut snapshots) = (noise(1, CHUNK), Vec::new());
    // Two backups, neither of which knows of the other, store one chunk; each has another one that nobody
    // needs, so that both packs are to be written anew.
    for number in [1, 2] {
        let options = repository::WriterOptions::default();
        let writer = repository::Writer::new(&repository, Arc::clone(&empty), options).unwrap();
        writer.save_blob(noise(100 + number, 2 * CHUNK).into()).unwrap();
        let id = writer.save_blob(shared.clone().into()).unwrap();
        let time = jiff::Timestamp::now();
        let node = repository::Node::file("vda.raw", CHUNK as u64, vec![id], time);
        let tree = writer.save_tree(&repository::Tree::new(vec![node])).unwrap();
        writer.finish().unwrap();
        snapshots
            .push(repository.save_snapshot(&repository::SnapshotFile::new(tree, time)).unwrap());
    }
    let chunk = BlobId::of(&shared);
    let whole = memory.files.lock().unwrap().clone();
    let index = repository.index().unwrap();
    let of_data = |id: &FileId| {
        let other = index.locate(BlobKind::Data, &chunk).unwrap();
        whole[&(FileKind::Pack, *id)].len() > 2 * CHUNK || *id == other.pack
    };
    let both: Vec<FileId> = packs(&repository).into_iter().filter(of_data).collect();
    assert_eq!(both.len(), 2);
    for damaged in both {
        *memory.files.lock().unwrap() = whole.clone();
        // Which of its blobs comes first is chance, so all of them.
        let len = whole[&(FileKind::Pack, damaged)].len();
        for at in (0..len).step_by(CHUNK / 4) {
            memory.files.lock().unwrap().get_mut(&(FileKind::Pack, damaged)).unwrap()[at] ^= 1;
        }
        let repository = open(memory.clone()).unwrap();

        prune(&repository).unwrap();

        let reader = Reader::new(&repository, Arc::new(repository.index().unwrap()), 0);
        assert!(reader.blob(&chunk).unwrap() == shared, "{damaged}");
    }
}
