//! P3, P6: a store that fails, several writers at once, writers that are dropped.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use common::{CHUNK, back_up, disk, folder, init, memory::Memory, noise, open, restore, store};
use repository::{
    Backend, BlobId, CheckOptions, FileId, FileKind, Kdf, LocalFolder, LockMode, Repository,
    RepositoryError, Writer, WriterOptions,
};

fn assert_clean(repository: &Repository) {
    let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// Fails effect `n`, once or for good, for every n of a backup.
fn every_write_fails(error: ErrorKind, for_good: bool) {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let (first, _) = store(&repository, "vm", &disk(1), CHUNK).unwrap();
    let mut n = 0;
    loop {
        n += 1;
        let before = repository.snapshots().unwrap().good.len();
        memory.fail(n, if for_good { u64::MAX } else { n }, error);
        let content = noise(100 + n, 3 * CHUNK);
        let outcome = store(&repository, "vm", &content, CHUNK);
        memory.fail(0, 0, error);
        let repository = open(memory.clone()).unwrap();
        assert_clean(&repository);
        assert_eq!(restore(&repository, &first).unwrap(), disk(1));
        let snapshots = repository.snapshots().unwrap();
        match outcome {
            Ok((id, _)) => {
                assert_eq!(restore(&repository, &id).unwrap(), content);
                break;
            }
            Err(RepositoryError::Backend { source }) => {
                assert_eq!(source.is_full(), error == ErrorKind::StorageFull);
                assert_eq!((snapshots.good.len(), snapshots.damaged.len()), (before, 0));
            }
            Err(error) => panic!("effect {n}: {error:?}"),
        }
    }
    // Data pack, tree pack, index, snapshot.
    assert!(n > 4, "{n}");
}

#[test]
fn r10_a_full_repository_keeps_what_it_has_whichever_write_fails() {
    every_write_fails(ErrorKind::StorageFull, true);
}

#[test]
fn r25_a_write_that_fails_once_leaves_a_clean_repository() {
    every_write_fails(ErrorKind::Other, false);
}

#[test]
fn r10_creating_a_repository_fails_cleanly_at_every_step() {
    for n in 1..=3 {
        let memory = Memory::new();
        memory.fail(n, n, ErrorKind::StorageFull);
        let made = Repository::init(memory.clone(), b"x", Kdf::WEAK_FOR_TESTS);
        memory.fail(0, 0, ErrorKind::Other);
        assert_eq!(made.is_ok(), n == 3, "two effects: key, config");
        if made.is_err() {
            let opened = Repository::open(memory.clone(), b"x");
            assert!(matches!(opened, Err(RepositoryError::NotARepository { .. })), "{opened:?}");
            Repository::init(memory.clone(), b"x", Kdf::WEAK_FOR_TESTS).unwrap();
        }
        assert!(Repository::open(memory.clone(), b"x").is_ok());
        let keys = memory.names().into_iter().filter(|(kind, _)| *kind == FileKind::Key).count();
        assert_eq!(keys, 1);
        let again = Repository::init(memory.clone(), b"x", Kdf::WEAK_FOR_TESTS);
        assert!(matches!(again, Err(RepositoryError::AlreadyExists { .. })));
    }
}

#[test]
fn r14_a_repository_whose_last_answer_was_lost_is_made_all_the_same() {
    let memory = Memory::new();
    *memory.lost_answer.lock().unwrap() = Some(FileKind::Config);
    Repository::init(memory.clone(), b"x", Kdf::WEAK_FOR_TESTS).unwrap();
    Repository::open(memory.clone(), b"x").unwrap();

    // Where nothing can be told any more the key stays, for the config may be there.
    let memory = Memory::new();
    *memory.lost_answer.lock().unwrap() = Some(FileKind::Config);
    memory.no_read.lock().unwrap().insert(FileKind::Config, Some(ErrorKind::TimedOut));
    Repository::init(memory.clone(), b"x", Kdf::WEAK_FOR_TESTS).unwrap_err();
    memory.no_read.lock().unwrap().clear();
    Repository::open(memory, b"x").unwrap();
}

#[test]
fn r10_readers_are_told_when_a_lock_cannot_be_written() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    for error in [ErrorKind::StorageFull, ErrorKind::ReadOnlyFilesystem] {
        memory.fail(1, u64::MAX, error);
        let refused = repository.lock(LockMode::Shared);
        assert!(matches!(refused, Err(RepositoryError::LockNotWritable { .. })), "{refused:?}");
    }
    memory.fail(1, u64::MAX, ErrorKind::ConnectionReset);
    assert!(matches!(repository.lock(LockMode::Shared), Err(RepositoryError::Backend { .. })));
}

#[test]
fn r16_two_writers_at_once_both_succeed() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("r");
    let repository = init(folder(&path));
    let common = noise(1, 20 * CHUNK);
    let snapshots = std::thread::scope(|scope| {
        let backups = [2, 3, 4].map(|seed| {
            let (path, common) = (&path, &common);
            scope.spawn(move || {
                let repository = open(Arc::new(LocalFolder::open(path).unwrap())).unwrap();
                let disk = [common.clone(), noise(seed, 20 * CHUNK)].concat();
                (back_up(&repository, &format!("vm{seed}"), &disk, CHUNK).unwrap().0, disk)
            })
        });
        backups.map(|backup| backup.join().unwrap())
    });
    for (id, disk) in &snapshots {
        assert_eq!(restore(&repository, id).unwrap(), *disk);
    }
    assert_clean(&repository);
    assert!(repository.backend().list(FileKind::Lock).unwrap().is_empty());
    if common::has_restic() {
        common::restic_ok(&path, &["check", "--read-data"]);
    }
}

#[test]
fn r16_two_creators_at_once_make_one_repository() {
    let scratch = tempfile::tempdir().unwrap();
    let backend = folder(&scratch.path().join("r"));
    let made = std::thread::scope(|scope| {
        let creators = [b"a", b"b", b"c", b"d"].map(|password| {
            let backend = Arc::clone(&backend);
            scope
                .spawn(move || (password, Repository::init(backend, password, Kdf::WEAK_FOR_TESTS)))
        });
        creators.map(|creator| creator.join().unwrap())
    });
    let mut winners = made.iter().filter(|(_, made)| made.is_ok());
    let (password, winner) = winners.next().expect("one of them made it");
    assert!(winners.next().is_none(), "{made:?}");
    for (_, loser) in made.iter().filter(|(_, made)| made.is_err()) {
        assert!(matches!(loser, Err(RepositoryError::AlreadyExists { .. })), "{loser:?}");
    }
    let opened = Repository::open(backend, *password).unwrap();
    assert_eq!(opened.id(), winner.as_ref().unwrap().id());
}

#[test]
fn r16_an_exclusive_lock_and_a_shared_one_exclude_each_other() {
    let repository = init(Memory::new());
    let shared = repository.lock(LockMode::Shared).unwrap();
    let other = repository.lock(LockMode::Shared).unwrap();
    let refused = repository.lock(LockMode::Exclusive).unwrap_err();
    let RepositoryError::Locked { pid, exclusive, .. } = refused else { panic!("{refused:?}") };
    assert_eq!((pid, exclusive), (std::process::id(), false));
    shared.verify().unwrap();
    shared.release().unwrap();
    drop(other);
    let exclusive = repository.lock(LockMode::Exclusive).unwrap();
    let refused = repository.lock(LockMode::Shared);
    assert!(matches!(refused, Err(RepositoryError::Locked { exclusive: true, .. })));
    exclusive.release().unwrap();
    assert!(repository.backend().list(FileKind::Lock).unwrap().is_empty());
}

#[test]
fn r16_a_writer_whose_lock_does_not_settle_writes_nothing() {
    let repository = init(Memory::new());
    let backend = Arc::clone(repository.backend());
    // The file of somebody who looked at the same moment and did not see ours.
    let rival = repository.lock(LockMode::Exclusive).unwrap();
    let (id, file) = (rival.id(), backend.read(FileKind::Lock, &rival.id()).unwrap());
    rival.release().unwrap();
    let lock = repository.announce_lock(LockMode::Shared).unwrap();
    backend.write(FileKind::Lock, &id, &file).unwrap();

    let index = Arc::new(repository.index().unwrap());
    let writer = Writer::under(lock, &repository, index, WriterOptions::default()).unwrap();
    // It may be told at once or at the end.
    let _ = writer.submit(0, 0, CHUNK, noise(1, CHUNK).into());
    let refused = writer.finish().map(|finished| finished.stats);

    assert!(matches!(refused, Err(RepositoryError::Locked { exclusive: true, .. })), "{refused:?}");
    for kind in [FileKind::Pack, FileKind::Index] {
        assert!(backend.list(kind).unwrap().is_empty(), "{kind:?}");
    }
    assert_eq!(backend.list(FileKind::Lock).unwrap().len(), 1, "the rival's");
}

#[test]
fn duplicates_and_zeros_are_stored_once() {
    let repository = init(Memory::new());
    let index = Arc::new(repository.index().unwrap());
    let writer = Writer::new(&repository, index, WriterOptions::default()).unwrap();
    let zero = writer.zero_id(CHUNK as u32).unwrap();
    assert_eq!(zero, BlobId::of(&vec![0; CHUNK]));
    for chunk in 0..100 {
        let data = match chunk % 3 {
            0 => vec![0; CHUNK],
            1 => noise(1, CHUNK),
            _ => noise(chunk, CHUNK),
        };
        writer.submit(7, chunk, data.len(), Bytes::from(data)).unwrap();
    }
    let mut stored = writer.drain().unwrap();
    assert!(writer.drain().unwrap().is_empty());
    stored.sort_by_key(|stored| stored.chunk);
    assert!(stored.iter().all(|stored| stored.disk == 7));
    assert!(stored.iter().map(|stored| stored.chunk).eq(0..100));
    assert!(stored.iter().all(|stored| stored.fresh == (stored.stored_len > 0)));
    assert!(stored.iter().step_by(3).all(|stored| stored.id == zero && !stored.fresh));
    let of_noise: Vec<_> = stored.iter().skip(1).step_by(3).collect();
    assert_eq!(of_noise.iter().filter(|stored| stored.fresh).count(), 1);
    let stats = writer.finish().unwrap().stats;
    assert_eq!((stats.blobs, stats.fresh_blobs, stats.zero_blobs), (101, 1 + 1 + 33, 35));
    assert_eq!((stats.packs, stats.index_files), (1, 1));

    // The next run knows them all.
    let index = Arc::new(repository.index().unwrap());
    assert!(stored.iter().all(|stored| index.contains(&stored.id)));
    let writer = Writer::new(&repository, index, WriterOptions::default()).unwrap();
    assert_eq!(writer.zero_id(CHUNK as u32).unwrap(), zero);
    writer.submit(0, 0, CHUNK, noise(1, CHUNK).into()).unwrap();
    assert!(!writer.drain().unwrap()[0].fresh);
    assert_eq!(writer.finish().unwrap().stats.stored_bytes, 0);
}

#[test]
fn r01_a_dropped_writer_leaves_only_packs_that_nothing_mentions() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let index = Arc::new(repository.index().unwrap());
    let mut options = WriterOptions::default();
    options.pack_len = 4 * CHUNK;
    let writer = Writer::new(&repository, index, options).unwrap();
    for chunk in 0..64 {
        writer.submit(0, chunk, CHUNK, noise(chunk, CHUNK).into()).unwrap();
    }
    writer.drain().unwrap();
    drop(writer);
    let kinds: BTreeSet<_> = memory.names().into_iter().map(|(kind, _)| kind).collect();
    assert!(!kinds.contains(&FileKind::Index) && kinds.contains(&FileKind::Pack), "{kinds:?}");
    let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean() && !report.unreferenced_packs.is_empty());
}

#[test]
fn r14_a_store_that_hangs_is_given_up_at_the_deadline() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let mut options = WriterOptions::default();
    (options.pack_len, options.queue_len) = (4 * CHUNK, 8 * CHUNK);
    options.stall_timeout = Duration::from_millis(300);
    let index = Arc::new(repository.index().unwrap());
    let writer = Writer::new(&repository, index, options).unwrap();
    memory.hang.store(true, Ordering::SeqCst);
    let start = Instant::now();
    let submit = |chunk| writer.submit(0, chunk, CHUNK, noise(chunk, CHUNK).into());
    let refused = (0..1000).map(submit).find_map(Result::err);
    assert!(matches!(refused, Some(RepositoryError::Stalled { .. })), "{refused:?}");
    assert!(matches!(writer.drain(), Err(RepositoryError::Stalled { .. })));
    drop(writer);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    memory.hang.store(false, Ordering::SeqCst);
    assert_clean(&repository);
}

#[test]
fn r14_an_interrupt_ends_calls_that_wait_for_a_store_that_hangs() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let mut options = WriterOptions::default();
    (options.pack_len, options.queue_len) = (4 * CHUNK, 8 * CHUNK);
    let index = Arc::new(repository.index().unwrap());
    let writer = Writer::new(&repository, index, options).unwrap();
    memory.hang.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let submit = |chunk| writer.submit(0, chunk, CHUNK, noise(chunk, CHUNK).into());
        let waiting = scope.spawn(move || (0..1000).map(submit).find_map(Result::err));
        std::thread::sleep(Duration::from_millis(100));
        let start = Instant::now();
        writer.abort();
        let refused = waiting.join().unwrap();
        assert!(matches!(refused, Some(RepositoryError::WriterStopped)), "{refused:?}");
        assert!(start.elapsed() < Duration::from_secs(60));
    });
    memory.hang.store(false, Ordering::SeqCst);
    assert!(matches!(writer.finish(), Err(RepositoryError::WriterStopped)));
    assert_clean(&repository);
}

#[test]
fn r25_leftovers_of_killed_writers_are_swept_when_old_and_ownerless() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("r");
    let repository = init(folder(&path));
    let shard = path.join("data/ab");
    fs::create_dir(&shard).unwrap();
    let id = FileId([0xab; 32]);
    let leave = |pid: u32, old: bool| {
        let file = shard.join(format!("{id}-tmp-{pid}-0123456789abcdef"));
        let made = fs::File::create(&file).unwrap();
        if old {
            made.set_modified(SystemTime::now() - Duration::from_secs(2 * 24 * 3600)).unwrap();
        }
        file
    };
    let dead = 0x7fff_fff0;
    let (abandoned, young) = (leave(dead, true), leave(dead - 1, false));
    let alive = leave(std::process::id(), true);
    let foreign = shard.join("notes.txt");
    fs::write(&foreign, "mine").unwrap();
    assert!(repository.backend().list(FileKind::Pack).unwrap().is_empty());

    store(&repository, "vm", &disk(1), CHUNK).unwrap();

    assert!(!abandoned.exists());
    assert!(young.exists() && alive.exists() && foreign.exists());
    assert_clean(&repository);
    let temporary = |name: &str| name.contains("-tmp-");
    let left = walk(&path).into_iter().filter(|name| temporary(name)).count();
    assert_eq!(left, 2, "our own writes leave none");
}

fn walk(path: &std::path::Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            names.extend(walk(&entry.path()));
        } else {
            names.push(entry.file_name().into_string().unwrap());
        }
    }
    names
}

#[test]
fn r25_files_and_folders_are_for_their_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a/b/r");
    let backend = folder(&path);
    let repository = init(backend);
    store(&repository, "vm", &disk(1), CHUNK).unwrap();
    let mut todo = vec![scratch.path().join("a")];
    let mut seen = 0;
    while let Some(path) = todo.pop() {
        let metadata = fs::metadata(&path).unwrap();
        let mode = metadata.permissions().mode() & 0o777;
        assert_eq!(mode, if metadata.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
        if metadata.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        seen += 1;
    }
    assert!(seen > 12);
}

#[test]
fn a_folder_without_config_is_no_repository_and_remains_are_not_overwritten() {
    let memory = Memory::new();
    assert!(matches!(open(memory.clone()), Err(RepositoryError::NotARepository { .. })));
    let repository = init(memory.clone());
    store(&repository, "vm", &disk(1), CHUNK).unwrap();
    memory.remove(FileKind::Config, &FileId::CONFIG).unwrap();
    let made = Repository::init(memory, b"x", Kdf::WEAK_FOR_TESTS);
    assert!(matches!(made, Err(RepositoryError::ConfigMissing { .. })), "{made:?}");
}
