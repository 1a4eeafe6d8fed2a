//! One suite for every store: a local folder, SFTP, S3 and REST, each a real server on loopback.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener},
    num::NonZeroU64,
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use common::{CHUNK, PASSWORD, back_up, disk, has_restic, noise, open, restore};
use repository::{
    Access, Address, Backend, BackendError, CheckOptions, FileId, FileKind, Kdf, LocalFolder,
    LockMode, Pace, Repository, RepositoryError,
};
use vm_fixtures::servers::{REST_PASSWORD, Rest, S3_SECRET, Server};

/// Where a repository can be.
struct Place {
    location: String,
    restic_location: String,
    restic_arguments: Vec<String>,
    restic_environment: Vec<(&'static str, String)>,
    access: Arc<Access>,
}

impl Place {
    fn folder(path: &Path) -> Self {
        let location = path.display().to_string();
        Self {
            restic_location: location.clone(),
            location,
            restic_arguments: Vec::new(),
            restic_environment: Vec::new(),
            access: Arc::default(),
        }
    }

    fn on(server: &Server) -> Self {
        Self {
            location: server.location().to_owned(),
            restic_location: server.restic_location().to_owned(),
            restic_arguments: server.restic_arguments().to_vec(),
            restic_environment: server.environment().to_vec(),
            access: Arc::new(access(server, Pace::default())),
        }
    }

    fn address(&self) -> Address {
        self.location.parse().unwrap()
    }

    fn open(&self) -> Arc<dyn Backend> {
        self.address().open(&self.access).unwrap().into()
    }

    fn create(&self) -> Arc<dyn Backend> {
        self.address().create(&self.access).unwrap().into()
    }

    fn restic_ok(&self, arguments: &[&str]) -> Vec<u8> {
        let mut command = Command::new("restic");
        command.args(["--no-cache", "--repo", &self.restic_location]).args(&self.restic_arguments);
        command.args(arguments).env("RESTIC_PASSWORD", PASSWORD).env_remove("RESTIC_REPOSITORY");
        command.envs(self.restic_environment.iter().map(|(name, value)| (name, value)));
        let output = command.output().expect("restic starts");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "restic {arguments:?}: {errors}");
        output.stdout
    }
}

fn access(server: &Server, pace: Pace) -> Access {
    let variable = |name| {
        let mut found = server.environment().iter().filter(|(known, _)| *known == name);
        found.next().map_or("", |(_, value)| value.as_str())
    };
    let mut access = Access::default();
    access.pace = Arc::new(pace);
    access.ssh = variable("KVMSNAP_SSH").split_whitespace().map(str::to_owned).collect();
    let key = variable("AWS_ACCESS_KEY_ID");
    let access = access.with_login(None, variable("KVMSNAP_REST_PASSWORD"));
    access.with_s3_key(key, variable("AWS_SECRET_ACCESS_KEY"), None)
}

/// What every store must do.
fn keeps_files(place: &Place) {
    let store = place.create();
    drop(place.create());
    for kind in FileKind::ALL {
        assert_eq!(store.list(kind).unwrap(), [], "{kind:?} of a new store");
    }
    let missing = FileId::of(b"missing");
    assert!(store.read(FileKind::Snapshot, &missing).unwrap_err().is_not_found());
    assert!(store.read(FileKind::Config, &FileId::CONFIG).unwrap_err().is_not_found());
    let read = store.read_range(FileKind::Pack, &missing, 0, &mut [0; 4]);
    assert!(read.unwrap_err().is_not_found());
    assert!(store.remove(FileKind::Lock, &missing).unwrap_err().is_not_found());

    // Longer than any part that is sent or received at once, and the shortest.
    let contents = [noise(1, 5 << 20), noise(2, 32 << 10), vec![7], noise(3, 100_001)];
    let kinds = [FileKind::Pack, FileKind::Index, FileKind::Snapshot, FileKind::Key];
    for (kind, content) in kinds.into_iter().zip(&contents) {
        let id = FileId::of(content);
        store.write(kind, &id, content).unwrap();
        store.write(kind, &id, content).expect("the same once more");
        assert_eq!(store.list(kind).unwrap(), [(id, content.len() as u64)], "{kind:?}");
        assert!(store.read(kind, &id).unwrap() == *content, "{kind:?}");
        let len = content.len();
        for (offset, part) in [(0, len), (len / 3, len / 2), (len - 1, 1), (len, 0)] {
            let mut read = vec![0; part];
            store.read_range(kind, &id, offset as u64, &mut read).unwrap();
            assert!(read == content[offset..offset + part], "{kind:?} {offset}+{part}");
        }
        for (offset, part) in [(len - 1, 2), (len, 1), (len + 10, 5)] {
            let read = store.read_range(kind, &id, offset as u64, &mut vec![0; part]);
            assert!(matches!(read, Err(BackendError::Truncated { .. })), "{kind:?} {read:?}");
        }
    }
    // Another process sees the same.
    let other = place.open();
    let pack = FileId::of(&contents[0]);
    assert!(other.read(FileKind::Pack, &pack).unwrap() == contents[0]);
    other.remove(FileKind::Pack, &pack).unwrap();
    assert_eq!(store.list(FileKind::Pack).unwrap(), []);
    assert!(store.read(FileKind::Pack, &pack).unwrap_err().is_not_found());

    store.write(FileKind::Config, &FileId::CONFIG, b"first").unwrap();
    let second = store.write(FileKind::Config, &FileId::CONFIG, b"second");
    assert!(matches!(second, Err(BackendError::Exists { .. })), "{second:?}");
    assert_eq!(store.read(FileKind::Config, &FileId::CONFIG).unwrap(), b"first");
    assert_eq!(store.list(FileKind::Config).unwrap(), [(FileId::CONFIG, 5)]);

    at_once(&store);
    assert_eq!(store.sweep().unwrap(), 0, "nothing was left behind");
    assert_eq!(store.location(), place.address().to_string());
}

/// Many threads use one store, and a list has more than one page.
fn at_once(store: &Arc<dyn Backend>) {
    let ids: BTreeSet<FileId> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8_u64)
            .map(|thread| {
                scope.spawn(move || {
                    let contents = (0..140).map(|n| noise(1000 + 140 * thread + n, 100));
                    let ids: Vec<_> = contents
                        .map(|content| {
                            let id = FileId::of(&content);
                            let begun = store.begin(FileKind::Pack, &id, &content).unwrap();
                            (id, begun)
                        })
                        .collect();
                    let (ids, begun): (Vec<_>, Vec<_>) = ids.into_iter().unzip();
                    store.settle(begun).unwrap();
                    assert_eq!(store.read(FileKind::Pack, &ids[0]).unwrap().len(), 100);
                    ids
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let listed = store.list(FileKind::Pack).unwrap();
    assert!(listed.iter().all(|(_, len)| *len == 100));
    assert_eq!(listed.into_iter().map(|(id, _)| id).collect::<BTreeSet<_>>(), ids);
}

/// A repository lives there: backups, locks, checks; stock restic reads and mends the same one.
fn keeps_backups(place: &Place) {
    let store = place.create();
    let repository = Repository::init(store, PASSWORD.as_bytes(), Kdf::WEAK_FOR_TESTS).unwrap();
    let again = Repository::init(place.open(), b"other", Kdf::WEAK_FOR_TESTS);
    assert!(matches!(again, Err(RepositoryError::AlreadyExists { .. })), "{again:?}");
    let (first, second) = (disk(1), [disk(1), noise(9, 300_000)].concat());
    let (first_id, _) = back_up(&repository, "web", &first, CHUNK).unwrap();
    let (second_id, stats) = back_up(&repository, "web", &second, CHUNK).unwrap();
    assert!(stats.fresh_blobs < stats.blobs, "{stats:?}");

    let elsewhere = open(place.open()).unwrap();
    assert_eq!(restore(&elsewhere, &first_id).unwrap(), first);
    assert!(restore(&elsewhere, &second_id).unwrap() == second);
    let report = elsewhere.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean() && report.snapshots == 2, "{report:?}");

    let lock = repository.lock(LockMode::Shared).unwrap();
    let refused = elsewhere.lock(LockMode::Exclusive);
    assert!(matches!(refused, Err(RepositoryError::Locked { .. })), "{refused:?}");
    lock.release().unwrap();
    elsewhere.lock(LockMode::Exclusive).unwrap().release().unwrap();
    if !has_restic() {
        return;
    }
    place.restic_ok(&["check", "--read-data"]);
    assert!(place.restic_ok(&["dump", &second_id.short(), "/web/vda.raw"]) == second);
    place.restic_ok(&["forget", &first_id.short(), "--prune"]);
    assert!(restore(&elsewhere, &second_id).unwrap() == second);
    let report = elsewhere.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean() && report.snapshots == 1, "{report:?}");
}

/// Two places of one kind, empty.
fn local(name: &str) -> (tempfile::TempDir, Place) {
    let scratch = tempfile::tempdir().unwrap();
    let place = Place::folder(&scratch.path().join(name));
    (scratch, place)
}

#[test]
fn a_local_folder_keeps_files() {
    keeps_files(&local("r").1);
}

#[test]
fn p7_a_local_folder_keeps_backups() {
    keeps_backups(&local("r").1);
}

#[test]
fn sftp_keeps_files() {
    let Some(server) = Server::sftp() else { return };
    keeps_files(&Place::on(&server));
}

#[test]
fn p7_sftp_keeps_backups() {
    let Some(server) = Server::sftp() else { return };
    keeps_backups(&Place::on(&server));
}

#[test]
fn s3_keeps_files() {
    let Some(server) = Server::s3() else { return };
    keeps_files(&Place::on(&server));
}

#[test]
fn p7_s3_keeps_backups() {
    let Some(server) = Server::s3() else { return };
    keeps_backups(&Place::on(&server));
}

#[test]
fn rest_keeps_files() {
    let Some(server) = Server::rest(Rest::Free) else { return };
    keeps_files(&Place::on(&server));
}

#[test]
fn p7_rest_keeps_backups() {
    let Some(server) = Server::rest(Rest::Free) else { return };
    keeps_backups(&Place::on(&server));
}

#[test]
fn s12_a_server_that_only_appends_takes_backups_and_refuses_removal() {
    let Some(server) = Server::rest(Rest::AppendOnly) else { return };
    let place = Place::on(&server);
    let repository =
        Repository::init(place.create(), PASSWORD.as_bytes(), Kdf::WEAK_FOR_TESTS).unwrap();
    let (id, _) = back_up(&repository, "web", &disk(1), CHUNK).unwrap();
    back_up(&repository, "web", &disk(2), CHUNK).unwrap();

    let refused = repository.remove_snapshot(&id).unwrap_err();
    let RepositoryError::Backend { source } = &refused else { panic!("{refused:?}") };
    assert!(source.is_read_only(), "{refused:?}");
    let packs = repository.backend().list(FileKind::Pack).unwrap();
    let refused = repository.backend().remove(FileKind::Pack, &packs[0].0).unwrap_err();
    assert!(refused.is_read_only(), "{refused:?}");
    // What was stored after all, although the first answer was lost.
    let content = repository.backend().read(FileKind::Pack, &packs[0].0).unwrap();
    repository.backend().write(FileKind::Pack, &packs[0].0, &content).unwrap();

    assert_eq!(restore(&repository, &id).unwrap(), disk(1));
    assert!(repository.backend().list(FileKind::Lock).unwrap().is_empty());
}

#[test]
fn s09_a_refusal_names_the_location_and_no_secret() {
    let Some(server) = Server::rest(Rest::Free) else { return };
    let mut place = Place::on(&server);
    let access = Access::default().with_login(None, "canary");
    place.access = Arc::new(access);
    let refused = place.open().list(FileKind::Snapshot).unwrap_err();
    assert!(refused.is_read_only(), "{refused:?}");
    let BackendError::Io { source, .. } = &refused else { panic!("{refused:?}") };
    let shown = format!("{refused} {source} {refused:?} {:?} {:?}", place.open(), place.access);
    assert!(shown.contains("keeper@127.0.0.1") && shown.contains("401"), "{shown}");
    assert!(!shown.contains("canary") && !shown.contains(REST_PASSWORD), "{shown}");

    let Some(server) = Server::s3() else { return };
    let place = Place::on(&server);
    let refused = place.open().list(FileKind::Snapshot).unwrap_err();
    let shown = format!("{refused} {refused:?} {:?} {:?}", place.open(), place.access);
    assert!(!shown.contains(S3_SECRET) && !shown.contains("Signature"), "{shown}");
    let keyless = place.address().open(&Arc::default());
    assert!(matches!(keyless, Err(BackendError::NoCredentials { .. })), "{keyless:?}");
}

#[test]
fn s09_a_machine_whose_key_changed_is_not_talked_to() {
    let Some(server) = Server::sftp() else { return };
    let known = server.folder().join("known_hosts");
    let text = fs::read_to_string(&known).unwrap();
    fs::write(&known, text.replace("AAAAC3NzaC1lZDI1NTE5AAAA", "AAAAC3NzaC1lZDI1NTE5AAAB"))
        .unwrap();
    let refused = Place::on(&server).open().list(FileKind::Snapshot).unwrap_err();
    assert!(refused.is_read_only(), "not tried again: {refused:?}");
}

#[test]
fn r14_a_server_that_comes_back_is_waited_for_and_one_that_is_gone_is_told() {
    let Some(mut server) = Server::rest(Rest::Free) else { return };
    let place = Place::on(&server);
    let store = place.create();
    server.restart();
    store.write(FileKind::Snapshot, &FileId::of(b"a"), b"a").unwrap();
    server.kill();
    let start = Instant::now();
    let gone = store.list(FileKind::Snapshot).unwrap_err();
    assert!(gone.is_away(), "{gone:?}");
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

/// Some servers say "not found" of a folder that they cannot list.
#[test]
fn p4_a_list_that_is_not_found_is_no_list_of_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("rest:http://{}/", listener.local_addr().unwrap());
    let kinds = [FileKind::Snapshot, FileKind::Index, FileKind::Pack, FileKind::Lock];
    let server = thread::spawn(move || {
        for _ in kinds {
            let (mut asked, _) = listener.accept().unwrap();
            let _ = asked.read(&mut [0; 4096]).unwrap();
            let answer =
                b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            asked.write_all(answer).unwrap();
        }
    });
    let store = url.parse::<Address>().unwrap().open(&Arc::default()).unwrap();
    for kind in kinds {
        let refused = store.list(kind);
        assert!(refused.as_ref().is_err_and(BackendError::is_not_found), "{kind:?} {refused:?}");
    }
    server.join().unwrap();

    let scratch = tempfile::tempdir().unwrap();
    let folder = LocalFolder::create(scratch.path()).unwrap();
    for kind in [FileKind::Snapshot, FileKind::Index, FileKind::Pack] {
        fs::remove_dir(scratch.path().join(kind.folder())).unwrap();
        assert!(folder.list(kind).unwrap_err().is_not_found(), "{kind:?}");
    }
}

/// It does not wait for the rest of what it has no room for.
#[test]
fn r10_a_server_that_is_full_is_heard_also_when_it_hangs_up_early() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("rest:http://{}/", listener.local_addr().unwrap());
    let cases = [("507 Insufficient Storage", 100), ("507 X", 8 << 20), ("413 X", 8 << 20)];
    let server = thread::spawn(move || {
        for (status, len) in cases {
            let (mut asked, _) = listener.accept().unwrap();
            let mut part = vec![0; 64 << 10];
            let mut left = len.min(1 << 20);
            while left > 0 {
                left -= left.min(asked.read(&mut part).unwrap());
            }
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\nfull\n");
            asked.write_all(answer.as_bytes()).unwrap();
            // As Go does: the answer shall arrive before the rest is refused.
            asked.shutdown(Shutdown::Write).unwrap();
            thread::sleep(Duration::from_millis(300));
        }
    });
    let store = url.parse::<Address>().unwrap().open(&Arc::default()).unwrap();
    for (status, len) in cases {
        let content = noise(1, len);
        let refused = store.write(FileKind::Pack, &FileId::of(&content), &content);
        assert!(refused.as_ref().is_err_and(BackendError::is_full), "{status} {refused:?}");
    }
    server.join().unwrap();
}

#[test]
fn a_limit_holds_for_what_is_sent_and_what_comes_back() {
    let servers = [Server::rest(Rest::Free), Server::sftp()];
    let mut places: Vec<Place> = servers.iter().flatten().map(Place::on).collect();
    let (_scratch, mut folder) = local("r");
    let limited = || {
        let rate = NonZeroU64::new(400 << 10);
        Pace::new(rate, rate)
    };
    let mut access_to_folder = Access::default();
    access_to_folder.pace = Arc::new(limited());
    folder.access = Arc::new(access_to_folder);
    for (server, place) in servers.iter().flatten().zip(&mut places) {
        place.access = Arc::new(access(server, limited()));
    }
    for place in places.iter().chain([&folder]) {
        let store = place.create();
        let content = noise(1, 1 << 20);
        let id = FileId::of(&content);
        // A second's worth may go at once, so at least 1.5 s of 2.5.
        let least = Duration::from_millis(1500);
        let start = Instant::now();
        store.write(FileKind::Pack, &id, &content).unwrap();
        assert!(start.elapsed() >= least, "{}: {:?}", place.location, start.elapsed());
        let start = Instant::now();
        store.read_range(FileKind::Pack, &id, 0, &mut vec![0; 1 << 20]).unwrap();
        assert!(start.elapsed() >= least, "{}: {:?}", place.location, start.elapsed());
    }
}
