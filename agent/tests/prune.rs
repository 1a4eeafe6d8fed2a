//! `kvmsnap prune`, killed and beside backups, judged by stock restic.

mod common;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;

use common::{Backup, CHUNK, Host, noise, time};
use jiff::SignedDuration;
use repository::{FileId, LockMode};

/// On memory, where there is any: what is made here is small and much of it.
fn place() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}

/// Six backups, of which every other one is forgotten: their packs are partly needed.
fn forgetful(host: &Host) {
    let first = time("2026-11-01T03:00:00Z");
    for number in 0..6_u64 {
        let content = [noise(number / 2, 3 * CHUNK), noise(100 + number, 2 * CHUNK)].concat();
        let time = first + SignedDuration::from_hours(24 * number as i64);
        let id = host.back_up(&Backup::of("web", time, content));
        if number % 2 == 0 {
            host.repository.remove_snapshot(&id).unwrap();
        }
    }
}

/// All files below a folder, by path.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path)),
            path => drop(found.insert(path.display().to_string(), fs::read(&path).unwrap())),
        }
    }
    found
}

fn put_back(folder: &Path, whole: &BTreeMap<String, Vec<u8>>) {
    for path in files(folder).keys().filter(|path| !whole.contains_key(*path)) {
        fs::remove_file(path).unwrap();
    }
    whole.iter().for_each(|(path, content)| fs::write(path, content).unwrap());
}

#[test]
fn p3_a_prune_that_is_killed_before_any_of_its_effects_leaves_a_clean_repository() {
    let host = Host::in_folder(place());
    forgetful(&host);
    let whole = files(&host.folder);
    let snapshots = host.snapshots();
    let prune = ["prune", "--max-unused=0%"];
    let log = host.folder.join("../effects");
    host.command(&prune).env("KVMSNAP_EFFECTS", &log).output().unwrap();
    let effects = fs::read_to_string(&log).unwrap();
    assert!(effects.contains("remove pack") && effects.contains("write index"), "{effects}");
    let clean = files(&host.folder).len();

    for n in 1..=effects.lines().count() {
        put_back(&host.folder, &whole);
        let killed = host.command(&prune).env("KVMSNAP_CRASH_AT", n.to_string()).output().unwrap();
        assert!(!killed.status.success(), "effect {n}");

        assert_eq!(host.snapshots(), snapshots, "effect {n}");
        host.ok(&["verify", "--read-data"]);
        host.judge();
        if n % 4 == 0 {
            host.ok(&prune);
            assert_eq!(files(&host.folder).len(), clean, "effect {n}");
        }
    }
}

#[test]
fn p6_prunes_and_forgets_of_several_hosts_beside_backups_lose_nothing() {
    let host = Host::in_folder(place());
    let first = time("2026-01-01T00:00:00Z");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(8);
    let backed_up = std::thread::scope(|scope| {
        let hosts = ["web", "db"].map(|domain| {
            let host = &host;
            scope.spawn(move || {
                let (mut made, mut number) = (Vec::new(), 0_u64);
                // On a busy machine for longer, up to two minutes.
                let is_enough = |made: usize| {
                    let now = std::time::Instant::now();
                    now >= deadline + std::time::Duration::from_secs(if made > 3 { 0 } else { 120 })
                };
                while !is_enough(made.len()) {
                    let lock = host.repository.announce_lock_within(
                        LockMode::Shared,
                        std::time::Duration::from_secs(60),
                        &|_| Ok(()),
                    );
                    let Ok(lock) = lock.and_then(repository::AnnouncedLock::settle) else {
                        continue;
                    };
                    let content = [noise(number % 3, 4 * CHUNK), noise(number, CHUNK)].concat();
                    let time = first + SignedDuration::from_hours(number as i64);
                    made.push((host.back_up(&Backup::of(domain, time, content.clone())), content));
                    lock.release().unwrap();
                    number += 1;
                }
                made
            })
        });
        scope.spawn(|| {
            let mut round = 0;
            while std::time::Instant::now() < deadline {
                round += 1;
                let forget = ["forget", "--keep-last=2", "--allow-many", "--wait=60", "-q"];
                let prune = ["prune", "--max-unused=0%", "--wait=60", "-q"];
                let command = if round % 2 == 0 { &forget[..] } else { &prune };
                let mut running = host.command(command).stdout(Stdio::null()).spawn().unwrap();
                // Every third one is killed at some moment.
                if round % 3 == 0 {
                    std::thread::sleep(std::time::Duration::from_millis(
                        rand::random::<u8>().into(),
                    ));
                    running.kill().unwrap();
                }
                running.wait().unwrap();
            }
        });
        hosts.map(|host| host.join().unwrap())
    });
    assert!(backed_up.iter().all(|made| made.len() > 3), "too few backups to tell");
    let left: Vec<FileId> = host.snapshots();
    for made in &backed_up {
        let (last, _) = made.last().unwrap();
        assert!(left.contains(last), "the last one is gone");
    }
    host.ok(&["forget", "--keep-last=2", "--allow-many", "--prune"]);
    host.ok(&["verify", "--read-data"]);
    host.judge();
    assert_eq!(host.snapshots().len(), 4);
}

#[test]
fn prune_says_what_it_would_do_and_does_it() {
    let host = Host::in_folder(place());
    forgetful(&host);
    let told = host.lines(&["prune", "--max-unused=0%", "--dry-run"]);
    let done = host.lines(&["prune", "--max-unused=0%"]);
    for field in ["packs", "packs_removed", "packs_repacked", "bytes_removed"] {
        assert_eq!(told[0][field], done[0][field], "{field}");
        assert!(done[0][field].as_u64().unwrap() > 0, "{field}");
    }
    assert_eq!(done[0]["bytes_unused"], 0);
    let lock = host.repository.lock(LockMode::Shared).unwrap();
    let refused = host.kvmsnap(&["prune", "--wait=1"]);
    assert_eq!(refused.status.code(), Some(11));
    lock.release().unwrap();
    host.judge();
}

#[test]
fn p4_verify_repairs_from_a_replica_and_names_whom_damage_affects_before_and_after() {
    let (host, replica) = (Host::in_folder(place()), Host::in_folder(place()));
    forgetful(&host);
    let snapshots = host.snapshots();
    // The replica is a copy of the folder: the same blobs, by the same ids.
    fs::remove_dir_all(&replica.folder).unwrap();
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([&host.folder, &replica.folder])
        .status()
        .unwrap();
    assert!(copied.success());
    let mut packs: Vec<_> = files(&host.folder.join("data")).into_iter().collect();
    packs.sort_by_key(|(_, content)| Reverse(content.len()));
    // Which blob is the first of a pack is chance, and some are of snapshots that are forgotten.
    let verify = packs.iter().find_map(|(pack, content)| {
        let mut damaged = content.clone();
        damaged[50] ^= 1;
        fs::write(pack, &damaged).unwrap();
        let verify = host.kvmsnap(&["verify", "--read-data"]);
        let is_needed = String::from_utf8_lossy(&verify.stdout).contains("affects");
        if !is_needed {
            fs::write(pack, content).unwrap();
        }
        is_needed.then_some(verify)
    });
    let verify = verify.expect("a pack begins with what a snapshot needs");
    assert_eq!(verify.status.code(), Some(1));

    let mended = host.kvmsnap(&["verify", "--read-data", "--repair"]);

    let told = String::from_utf8_lossy(&mended.stdout).into_owned();
    assert!(told.contains("1 lost") && told.matches("affects").count() >= 2, "{told}");
    assert_eq!(mended.status.code(), Some(1), "what was lost is still missing");
    let location = replica.folder.to_str().unwrap();
    let told = host.ok(&["verify", "--repair", "--from", location]);
    assert!(told.contains("1 fetched, 0 lost"), "{told}");
    assert_eq!(host.snapshots(), snapshots);
    host.ok(&["verify", "--read-data"]);
    host.judge();
}

#[test]
fn p4_data_without_a_snapshot_is_told_and_kept_and_no_lock_hides_backups() {
    let host = Host::in_folder(place());
    forgetful(&host);
    fs::write(host.folder.join(format!("locks/{}", FileId::of(b"a lock"))), b"").unwrap();
    assert_eq!(host.lines(&["list"]).len(), 3);
    let refused = host.kvmsnap(&["prune", "--wait=0"]);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(text.contains("is damaged") && text.contains("verify --repair"), "{text}");
    fs::remove_dir_all(host.folder.join("locks")).unwrap();
    let packs = files(&host.folder.join("data"));

    host.snapshots().iter().for_each(|id| host.repository.remove_snapshot(id).unwrap());

    let told = String::from_utf8(host.kvmsnap(&["verify"]).stderr).unwrap();
    assert!(told.contains("not one snapshot"), "{told}");
    let refused = host.kvmsnap(&["prune"]);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(text.contains("not one snapshot") && text.contains("--allow-empty"), "{text}");
    assert_eq!(files(&host.folder.join("data")), packs);
    host.ok(&["prune", "--allow-empty"]);
    assert!(files(&host.folder.join("data")).is_empty());
    host.ok(&["verify"]);
}
