//! P7: stock restic reads what we write, and we read what it writes.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use common::{
    CHUNK, PASSWORD, back_up, disk, folder, has_restic, init, noise, open, restic, restic_command,
    restic_ok, restore, store, text,
};
use repository::{
    CheckOptions, DiskReader, FileKind, Kdf, LocalFolder, LockMode, Reader, Repository,
    RepositoryError,
};

#[test]
fn p7_restic_checks_lists_dumps_and_restores_what_we_wrote() {
    if !has_restic() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("repository");
    let repository =
        Repository::init(folder(&path), PASSWORD.as_bytes(), Kdf { log_n: 10, r: 8, p: 1 })
            .unwrap();
    let (first, second) = (disk(1), [disk(1), disk(2)].concat());
    let (first_id, _) = back_up(&repository, "web", &first, CHUNK).unwrap();
    let (second_id, stats) = back_up(&repository, "web", &second, CHUNK).unwrap();
    assert!(stats.fresh_blobs < stats.blobs, "{stats:?}");

    restic_ok(&path, &["check", "--read-data"]);
    let listed = String::from_utf8(restic_ok(&path, &["ls", "-l", &second_id.short()])).unwrap();
    assert!(listed.contains("/web/vda.raw") && listed.contains("/web/manifest.json"), "{listed}");
    assert!(listed.contains(&format!("{}", second.len())), "{listed}");
    assert_eq!(restic_ok(&path, &["dump", &first_id.short(), "/web/vda.raw"]), first);
    let target = scratch.path().join("restored");
    restic_ok(&path, &["restore", &second_id.short(), "--target", target.to_str().unwrap()]);
    assert_eq!(fs::read(target.join("web/vda.raw")).unwrap(), second);
    let mode = fs::metadata(target.join("web/vda.raw")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // What restic leaves after its upkeep is still ours to read.
    restic_ok(&path, &["forget", &first_id.short(), "--prune"]);
    restic_ok(&path, &["check", "--read-data"]);
    assert_eq!(restore(&repository, &second_id).unwrap(), second);
    assert!(matches!(
        repository.snapshot(&first_id),
        Err(RepositoryError::SnapshotNotFound { .. })
    ));
    let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn p7_we_read_and_continue_what_restic_wrote() {
    if !has_restic() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("repository");
    restic_ok(&path, &["init", "--repository-version", "2"]);
    // Long enough for several chunks of restic's own, uneven cutting.
    let source = scratch.path().join("source");
    fs::create_dir(&source).unwrap();
    let content = [noise(1, 5 << 20), vec![0; 3 << 20], text(2, 2 << 20)].concat();
    fs::write(source.join("vda.raw"), &content).unwrap();
    let odd = "odd \"name\"\n\u{e9}\\";
    fs::write(source.join(odd), b"").unwrap();
    restic_ok(&path, &["backup", source.to_str().unwrap(), "--tag", "foreign"]);

    let repository = open(Arc::new(LocalFolder::open(&path).unwrap())).unwrap();
    let snapshots = repository.snapshots().unwrap();
    let [(id, snapshot)] = snapshots.good.as_slice() else { panic!("{snapshots:?}") };
    assert_eq!(snapshot.tags, ["foreign"]);
    assert_eq!(repository.find_snapshot(&id.short()).unwrap().0, *id);
    let index = Arc::new(repository.index().unwrap());
    let reader = Arc::new(Reader::new(&repository, index, 4 << 20));
    let mut tree = reader.tree(&snapshot.tree).unwrap();
    while let [node] = tree.nodes.as_slice() {
        tree = reader.tree(&node.subtree.unwrap()).unwrap();
    }
    assert!(tree.node(odd).is_some(), "{tree:?}");
    let node = tree.node("vda.raw").unwrap();
    let reads = DiskReader::new(reader, node.content().to_vec(), node.size).unwrap();
    for (offset, len) in [(0, content.len()), (1_234_567, 4_000_001), (content.len() - 1, 1)] {
        let mut read = vec![0; len];
        reads.read_at(offset as u64, &mut read).unwrap();
        assert!(read == content[offset..offset + len]);
    }
    assert!(reads.read_at(content.len() as u64, &mut [0]).is_err());
    let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean() && report.packs_read > 0, "{report:?}");

    // Ours beside theirs, and theirs again on top.
    let (ours, _) = back_up(&repository, "web", &disk(3), CHUNK).unwrap();
    restic_ok(&path, &["backup", source.to_str().unwrap()]);
    restic_ok(&path, &["check", "--read-data"]);
    assert_eq!(restore(&repository, &ours).unwrap(), disk(3));
}

#[test]
fn p6_our_lock_stops_restic_and_that_of_restic_stops_us() {
    if !has_restic() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("repository");
    let repository = init(folder(&path));
    let (id, _) = back_up(&repository, "web", &disk(1), CHUNK).unwrap();

    let lock = repository.lock(LockMode::Shared).unwrap();
    let refused = restic(&path, &["prune"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("already locked"), "{said}");
    assert!(said.contains(&format!("PID {}", std::process::id())), "{said}");
    restic_ok(&path, &["snapshots"]);
    lock.release().unwrap();
    restic_ok(&path, &["prune"]);

    // A backup that waits for its input holds a shared lock.
    let waiting = Holder::start(restic_command(&path, &["backup", "--stdin"]), &repository);
    let refused = repository.lock(LockMode::Exclusive).unwrap_err();
    let RepositoryError::Locked { pid, exclusive: false, .. } = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(pid, waiting.0.id());
    repository.lock(LockMode::Shared).unwrap().release().unwrap();

    // R18: killed, it cannot release its lock; its process id proves that nobody holds it.
    drop(waiting);
    let locks = || repository.backend().list(FileKind::Lock).unwrap();
    assert_eq!(locks().len(), 1);
    repository.lock(LockMode::Exclusive).unwrap().release().unwrap();
    assert!(locks().is_empty());

    // A check holds an exclusive one, for long when it may read a KiB a second.
    let (noisy, _) = store(&repository, "noise", &noise(1, 200 << 10), 64 << 10).unwrap();
    let slow = ["check", "--read-data", "--limit-download", "1"];
    let checking = Holder::start(restic_command(&path, &slow), &repository);
    for mode in [LockMode::Shared, LockMode::Exclusive] {
        let refused = repository.lock(mode).unwrap_err();
        let RepositoryError::Locked { pid, exclusive: true, .. } = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(pid, checking.0.id());
    }

    drop(checking);
    repository.lock(LockMode::Shared).unwrap().release().unwrap();
    assert!(locks().is_empty());
    assert_eq!(restore(&repository, &id).unwrap(), disk(1));
    assert_eq!(restore(&repository, &noisy).unwrap(), noise(1, 200 << 10));
}

/// A restic that holds a lock, killed when dropped.
struct Holder(Child);

impl Holder {
    /// Returns when there is a lock of this process.
    fn start(mut command: Command, repository: &Repository) -> Self {
        // Looking must not take a lock, or restic would give up.
        let locks = || repository.backend().list(FileKind::Lock).unwrap();
        let before = locks();
        let command = command.stdin(Stdio::piped()).stdout(Stdio::null());
        let holder = Self(command.spawn().unwrap());
        let held = || locks().iter().any(|lock| !before.contains(lock));
        let deadline = Instant::now() + Duration::from_secs(30);
        while !held() {
            assert!(Instant::now() < deadline, "restic takes no lock");
            std::thread::sleep(Duration::from_millis(50));
        }
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
