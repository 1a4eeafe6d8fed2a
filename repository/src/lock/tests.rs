use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::{Backend, Begun, BlobId, Kdf, LocalFolder, SnapshotFile, index::file::IndexFile};

#[test]
fn r18_a_renewed_lock_is_another_file_and_a_released_one_does_not_come_back() {
    let scratch = tempfile::tempdir().unwrap();
    let backend = Arc::new(LocalFolder::create(scratch.path()).unwrap());
    let repository = Repository::init(backend, b"x", Kdf::WEAK_FOR_TESTS).unwrap();
    let locks = || {
        let listed = repository.backend().list(FileKind::Lock).unwrap();
        listed.into_iter().map(|(id, _)| id).collect::<Vec<_>>()
    };
    let lock = repository.lock(LockMode::Exclusive).unwrap();
    let first = lock.id();
    lock.shared.refresh(Duration::ZERO).unwrap();
    assert_ne!(lock.id(), first);
    assert_eq!(locks(), [lock.id()]);
    assert!(repository.lock(LockMode::Shared).is_err());

    let shared = Arc::clone(&lock.shared);
    lock.release().unwrap();
    shared.refresh(Duration::ZERO).unwrap();
    assert!(locks().is_empty());
}

fn locked() -> (tempfile::TempDir, Repository, Lock) {
    let scratch = tempfile::tempdir().unwrap();
    let backend = Arc::new(LocalFolder::create(scratch.path()).unwrap());
    let repository = Repository::init(backend, b"x", Kdf::WEAK_FOR_TESTS).unwrap();
    let lock = repository.lock(LockMode::Shared).unwrap();
    lock.prove().unwrap();
    (scratch, repository, lock)
}

fn assert_lost(repository: &Repository, lock: &Lock) {
    let is_lost = |outcome| matches!(outcome, Err(RepositoryError::LockLost { .. }));
    let snapshot = SnapshotFile::new(BlobId([0; 32]), Timestamp::now());
    assert!(is_lost(repository.save_snapshot(&snapshot).map(drop)));
    let nothing = IndexFile { packs: &[] };
    assert!(is_lost(repository.write_json(FileKind::Index, &nothing).map(drop)));
    assert!(is_lost(lock.shared.refresh(Duration::ZERO)), "it would come back to life");
    assert!(is_lost(lock.verify()) && is_lost(lock.prove()));
    for kind in [FileKind::Snapshot, FileKind::Index] {
        assert!(repository.backend().list(kind).unwrap().is_empty());
    }
}

#[test]
fn r18_a_lock_that_was_not_renewed_for_long_is_lost_for_good() {
    let (_scratch, repository, lock) = locked();
    lock.shared.state().uptime = || host::uptime() + Duration::from_secs(26 * 60);
    assert_lost(&repository, &lock);
}

/// The thread that renews a lock wakes up, as it does when its host does.
fn wake_until(lock: &Lock, is_done: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < Duration::from_secs(30), "nobody woke up");
        lock.shared.stop.notify_all();
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn r18_a_host_that_slept_renews_its_lock_at_once_or_knows_that_it_is_lost() {
    let (_scratch, repository, lock) = locked();
    let first = lock.id();
    // For six minutes, by the one clock that tells.
    lock.shared.state().uptime = || host::uptime() + Duration::from_secs(6 * 60);
    wake_until(&lock, || lock.id() != first);
    lock.prove().unwrap();

    lock.shared.state().uptime = || host::uptime() + Duration::from_secs(40 * 60);
    wake_until(&lock, || lock.shared.state().lost);
    assert_lost(&repository, &lock);
}

#[test]
fn r18_a_lock_that_somebody_took_away_is_lost_before_anything_is_recorded() {
    let (_scratch, repository, lock) = locked();
    repository.backend().remove(FileKind::Lock, &lock.id()).unwrap();
    lock.verify().expect("who asks nobody does not know yet");
    assert_lost(&repository, &lock);
    // The next one is another lock, also while the thread of this one has not ended.
    let _thread = Arc::clone(&lock.shared);
    drop(lock);
    let _lock = repository.lock(LockMode::Exclusive).unwrap();
    let snapshot = SnapshotFile::new(BlobId([0; 32]), Timestamp::now());
    repository.save_snapshot(&snapshot).unwrap();
}

#[test]
fn r18_a_renewal_that_finds_its_lock_gone_says_so() {
    let (_scratch, repository, lock) = locked();
    repository.backend().remove(FileKind::Lock, &lock.id()).unwrap();
    let renewed = lock.shared.refresh(Duration::ZERO);
    assert!(matches!(renewed, Err(RepositoryError::LockLost { .. })), "{renewed:?}");
    assert_lost(&repository, &lock);
}

#[test]
fn r17_a_clock_that_was_set_ahead_costs_only_a_lock_that_somebody_took_away() {
    let (_scratch, repository, lock) = locked();
    let first = lock.id();
    lock.shared.state().file.time -= Duration::from_secs(26 * 60);
    lock.verify().unwrap();
    let locks = repository.backend().list(FileKind::Lock).unwrap();
    assert_eq!(locks.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [lock.id()]);
    assert_ne!(lock.id(), first, "it looks stale to others");
    lock.prove().unwrap();

    lock.shared.state().file.time -= Duration::from_secs(26 * 60);
    repository.backend().remove(FileKind::Lock, &lock.id()).unwrap();
    assert_lost(&repository, &lock);
    assert!(repository.backend().list(FileKind::Lock).unwrap().is_empty());
}

/// Does not find what it has: at every other reading, and where a removal was asked for twice.
#[derive(Debug)]
struct Forgetful(LocalFolder, AtomicBool);

impl Backend for Forgetful {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        self.0.list(kind)
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        if kind == FileKind::Lock && !self.1.fetch_not(Ordering::SeqCst) {
            return Err(BackendError::NotFound { file: id.to_hex() });
        }
        self.0.read(kind, id)
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        self.0.read_range(kind, id, offset, buffer)
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        self.0.write(kind, id, content)
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        self.0.begin(kind, id, content)
    }

    fn settle(&self, files: Vec<Begun>) -> Result<(), BackendError> {
        self.0.settle(files)
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        self.0.remove(kind, id)?;
        self.0.remove(kind, id)
    }

    fn location(&self) -> String {
        self.0.location()
    }
}

#[test]
fn r18_one_answer_of_not_found_is_no_lost_lock() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = LocalFolder::create(scratch.path()).unwrap();
    let backend = Arc::new(Forgetful(folder, AtomicBool::default()));
    let repository = Repository::init(backend, b"x", Kdf::WEAK_FOR_TESTS).unwrap();
    let lock = repository.lock(LockMode::Shared).unwrap();
    lock.prove().unwrap();
    lock.shared.refresh(Duration::ZERO).unwrap();
    lock.prove().unwrap();
    assert_eq!(repository.backend().list(FileKind::Lock).unwrap().len(), 1);
    lock.release().unwrap();
}

#[test]
fn r17_a_lock_grows_old_whatever_the_clock_says() {
    let (_scratch, _repository, lock) = locked();
    let state = lock.shared.state();
    let (now, uptime) = (state.file.time, state.renewed);
    let (minutes, back) = (Duration::from_secs(26 * 60), now - Duration::from_secs(3600));
    assert_eq!(state.age(now + minutes, uptime), minutes);
    assert_eq!(state.age(back, uptime + minutes), minutes);
    assert_eq!(state.age(back, uptime), Duration::ZERO);
}

#[test]
fn r18_a_lock_is_stale_only_with_proof() {
    let now = Timestamp::now();
    let ours = LockFile::ours(LockMode::Shared);
    let stale = |change: fn(&mut LockFile)| {
        let mut file = ours.clone();
        change(&mut file);
        file.is_stale(now)
    };
    assert!(!stale(|_| {}));
    assert!(stale(|file| file.time -= Duration::from_secs(31 * 60)));
    assert!(!stale(|file| file.time -= Duration::from_secs(29 * 60)));
    // A clock that was set back says nothing about the owner.
    assert!(!stale(|file| file.time += Duration::from_secs(3600)));
    // Far above `pid_max`.
    assert!(stale(|file| file.pid = 0x7fff_fff0));
    assert!(!stale(|file| {
        file.pid = 0x7fff_fff0;
        file.hostname.push('x');
    }));
    assert!(!stale(|file| {
        file.pid = 0x7fff_fff0;
        file.machine = Some("another".to_owned());
    }));
    // The process id was given to somebody else.
    assert!(stale(|file| file.start = Some(1)));
    // Another boot of the same machine; without a machine id it may be another one.
    assert!(
        stale(|file| {
            file.machine = host::machine();
            file.boot_id = Some("another".to_owned());
        }) || host::machine().is_none()
    );
    assert!(!stale(|file| {
        file.machine = None;
        file.boot_id = Some("another".to_owned());
        file.pid = 0x7fff_fff0;
    }));
    // Those of stock restic carry neither.
    assert!(stale(|file| {
        (file.machine, file.boot_id, file.start) = (None, None, None);
        file.pid = 0x7fff_fff0;
    }));
    assert!(!stale(|file| file.pid = 0));
}
