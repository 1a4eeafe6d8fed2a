//! Snapshots are copied into another repository: whole, once, and read back.

mod common;

use std::{
    io::ErrorKind,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use common::{
    CHUNK, back_up, disk, folder, has_restic, init, memory::Memory, noise, open, restic_command,
    restic_ok, restore, store,
};
use repository::{
    CheckOptions, Copied, Copier, FileId, FileKind, LocalFolder, LockMode, ReadBack, Repository,
    RepositoryError, SnapshotFile,
};

/// Copies all that the target lacks; what was copied, and the damage that was met.
fn copy(
    source: &Repository,
    target: &Repository,
) -> Result<(Vec<Copied>, Vec<FileId>, ReadBack), RepositoryError> {
    let lock = target.lock(LockMode::Shared)?;
    let (ours, theirs) = (source.snapshots()?, target.snapshots()?);
    let index = Arc::new(source.index_salvaged()?.0);
    let mut copier = Copier::new((source, index, &ours), (target, lock, &theirs), 100.0)?;
    let there: Vec<FileId> = theirs.good.iter().map(|(id, file)| file.first_id(id)).collect();
    let (mut copies, mut damaged) = (Vec::new(), Vec::new());
    for (id, file) in ours.good.iter().filter(|(id, file)| !there.contains(&file.first_id(id))) {
        match copier.copy(id, file, &|| Ok(()), &|_| {}) {
            Ok(copied) => copies.push(copied),
            Err(error) if error.is_damage() => damaged.push(*id),
            Err(error) => return Err(error),
        }
    }
    let read_back = copier.read_back(&copies, &|| Ok(()))?;
    Ok((copies, damaged, read_back))
}

/// Three backups of one machine, each the parent of the next.
fn three_backups(repository: &Repository) -> Vec<(FileId, Vec<u8>)> {
    let mut made: Vec<(FileId, Vec<u8>)> = Vec::new();
    for seed in 0..3 {
        let content = [disk(1), noise(100 + seed, 5 * CHUNK)].concat();
        let (id, _) = store(repository, "web", &content, CHUNK).unwrap();
        let mut file = repository.snapshot(&id).unwrap();
        repository.remove_snapshot(&id).unwrap();
        file.parent = made.last().map(|(parent, _)| *parent);
        made.push((repository.save_snapshot(&file).unwrap(), content));
    }
    made
}

fn by_first_id(repository: &Repository, id: FileId) -> (FileId, SnapshotFile) {
    let found = repository.snapshots().unwrap().good;
    found.into_iter().find(|(own, file)| file.first_id(own) == id).unwrap()
}

fn assert_clean(repository: &Repository) {
    let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_replica_has_all_snapshots_with_their_chain_and_a_second_copy_sends_nothing() {
    let (source, target) = (init(Memory::new()), init(Memory::new()));
    let made = three_backups(&source);
    let (copies, damaged, read_back) = copy(&source, &target).unwrap();
    assert_eq!((copies.len(), damaged.len(), read_back.snapshots), (3, 0, 3));
    assert!(copies[1].sent_blobs < copies[0].sent_blobs, "only what is new: {copies:?}");
    let mut parent = None;
    for (id, content) in &made {
        let (copy, file) = by_first_id(&target, *id);
        assert!(restore(&target, &copy).unwrap() == *content);
        let original = source.snapshot(id).unwrap();
        assert_eq!((file.parent, &file.tags, file.time), (parent, &original.tags, original.time));
        assert_eq!((file.original, file.tree), (Some(*id), original.tree));
        parent = Some(copy);
    }
    assert_clean(&target);

    let packs = target.backend().list(FileKind::Pack).unwrap().len();
    let (copies, ..) = copy(&source, &target).unwrap();
    assert!(copies.is_empty());
    // A chain goes on where it was copied to.
    let (fourth, _) = store(&source, "web", &disk(1), CHUNK).unwrap();
    let mut file = source.snapshot(&fourth).unwrap();
    file.parent = Some(made[2].0);
    source.remove_snapshot(&fourth).unwrap();
    let fourth = source.save_snapshot(&file).unwrap();
    let (copies, ..) = copy(&source, &target).unwrap();
    assert_eq!(copies.len(), 1);
    assert_eq!(by_first_id(&target, fourth).1.parent, parent);
    assert!(target.backend().list(FileKind::Pack).unwrap().len() <= packs + 2);
    assert!(target.backend().list(FileKind::Lock).unwrap().is_empty());
}

#[test]
fn a_copy_of_a_copy_is_known_as_the_first() {
    let (source, target) = (init(Memory::new()), init(Memory::new()));
    let made = three_backups(&source);
    copy(&source, &target).unwrap();
    let third = init(Memory::new());
    copy(&target, &third).unwrap();
    let (again, ..) = copy(&source, &third).unwrap();
    assert!(again.is_empty(), "{again:?}");
    let (copy_of_copy, file) = by_first_id(&third, made[2].0);
    assert_eq!(file.original, Some(made[2].0));
    assert!(restore(&third, &copy_of_copy).unwrap() == made[2].1);
}

#[test]
fn one_repository_is_not_copied_into_itself() {
    let memory = Memory::new();
    let source = init(memory.clone());
    three_backups(&source);
    let refused = copy(&source, &open(memory).unwrap());
    assert!(matches!(refused, Err(RepositoryError::SameRepository { .. })), "{refused:?}");
}

#[test]
fn p4_a_damaged_snapshot_is_named_and_the_others_are_copied() {
    let memory = Memory::new();
    let source = init(memory.clone());
    let made = three_backups(&source);
    // What only the second one has.
    let before: Vec<_> = source.backend().list(FileKind::Pack).unwrap();
    let (alone, _) = store(&source, "db", &noise(7, 9 * CHUNK), CHUNK).unwrap();
    let packs = source.backend().list(FileKind::Pack).unwrap();
    let of_it = packs.iter().filter(|pack| !before.contains(pack)).max_by_key(|(_, len)| *len);
    memory.files.lock().unwrap().get_mut(&(FileKind::Pack, of_it.unwrap().0)).unwrap()[100] ^= 1;
    let target = init(Memory::new());
    let (copies, damaged, _) = copy(&source, &target).unwrap();
    assert_eq!((copies.len(), damaged), (3, vec![alone]));
    for (id, content) in &made {
        assert!(restore(&target, &by_first_id(&target, *id).0).unwrap() == *content);
    }
    assert_clean(&target);
}

#[test]
fn r28_a_copy_that_is_cut_shows_whole_snapshots_and_goes_on_with_what_is_there() {
    let source = init(Memory::new());
    let made = three_backups(&source);
    let whole = {
        let memory = Memory::new();
        let target = init(memory.clone());
        copy(&source, &target).unwrap();
        target.backend().list(FileKind::Pack).unwrap().len()
    };
    for n in 1.. {
        let memory = Memory::new();
        let target = init(memory.clone());
        memory.fail(n, u64::MAX, ErrorKind::ConnectionReset);
        let outcome = copy(&source, &target);
        let is_done = memory.effects.load(Ordering::SeqCst) < n;
        memory.fail(0, 0, ErrorKind::Other);
        let target = open(memory.clone()).unwrap();
        assert_clean(&target);
        for (id, file) in target.snapshots().unwrap().good {
            let content = &made.iter().find(|(made, _)| *made == file.first_id(&id)).unwrap().1;
            assert!(restore(&target, &id).unwrap() == *content, "effect {n}");
        }
        if is_done {
            outcome.unwrap();
            break;
        }
        // The lock of one that was killed would go with its process.
        for (id, _) in target.backend().list(FileKind::Lock).unwrap() {
            target.backend().remove(FileKind::Lock, &id).unwrap();
        }
        let listed = target.index().unwrap().pack_count();
        copy(&source, &target).unwrap();
        assert_eq!(target.snapshots().unwrap().good.len(), 3, "effect {n}");
        assert_clean(&target);
        let indexed = target.index().unwrap().pack_count();
        assert!(indexed - listed <= whole, "effect {n}: {listed} packs were there, {indexed} are");
        assert!(n < 40, "the sweep has no end");
    }
}

#[test]
fn a_copy_that_is_asked_to_stop_stops() {
    let (source, target) = (init(Memory::new()), init(Memory::new()));
    let made = three_backups(&source);
    let lock = target.lock(LockMode::Shared).unwrap();
    let (ours, theirs) = (source.snapshots().unwrap(), target.snapshots().unwrap());
    let index = Arc::new(source.index().unwrap());
    let mut copier = Copier::new((&source, index, &ours), (&target, lock, &theirs), 0.0).unwrap();
    let stop = || Err(RepositoryError::Stopped);
    let (id, file) = &ours.good[0];
    assert_eq!(*id, made[0].0);
    let stopped = copier.copy(id, file, &stop, &|_| {});
    assert!(matches!(stopped, Err(RepositoryError::Stopped)), "{stopped:?}");
    assert!(target.snapshots().unwrap().good.is_empty());
}

fn restic_copy(from: &Path, to: &Path) {
    let mut command = restic_command(to, &["copy", "--from-repo"]);
    command.arg(from).env("RESTIC_FROM_PASSWORD", common::PASSWORD);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn p7_restic_checks_a_replica_and_each_knows_what_the_other_copied() {
    if !has_restic() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| scratch.path().join(name));
    let (source, target) = (init(folder(&a)), init(folder(&b)));
    let made = three_backups(&source);
    copy(&source, &target).unwrap();
    for path in [&a, &b] {
        restic_ok(path, &["check", "--read-data"]);
    }
    let (id, _) = by_first_id(&target, made[1].0);
    assert!(restic_ok(&b, &["dump", &id.short(), "/web/vda.raw"]) == made[1].1);
    restic_copy(&a, &b);
    assert_eq!(target.snapshots().unwrap().good.len(), 3, "restic copied nothing again");

    // Trees of restic's own are copied byte for byte, and what restic copied is not copied again.
    restic_ok(&a, &["backup", scratch.path().join("a/config").to_str().unwrap()]);
    restic_ok(&c, &["init", "--repository-version", "2"]);
    restic_copy(&a, &c);
    let source = open(Arc::new(LocalFolder::open(&a).unwrap())).unwrap();
    let replica = open(Arc::new(LocalFolder::open(&c).unwrap())).unwrap();
    assert!(copy(&source, &replica).unwrap().0.is_empty());
    assert_eq!(copy(&source, &target).unwrap().0.len(), 1);
    restic_ok(&b, &["check", "--read-data"]);
    back_up(&target, "own", &disk(9), CHUNK).unwrap();
    restic_ok(&b, &["check"]);
}
