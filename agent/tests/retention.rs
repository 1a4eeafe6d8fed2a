//! `kvmsnap forget`, `kvmsnap protect` and `kvmsnap copy`, on repositories of hand-made backups.

mod common;

use common::{Backup, Host, noise, time};
use jiff::SignedDuration;
use repository::{BlobId, BlobKind, FileId, FileKind, FileRef, LockMode};

/// A backup a day at three, the last one on 20 November 2026.
fn daily(host: &Host, domain: &str, days: i64) -> Vec<FileId> {
    let last = time("2026-11-20T03:00:00Z");
    let mut made = Vec::new();
    for day in 0..days {
        let time = last - SignedDuration::from_hours(24 * (days - 1 - day));
        let mut backup = Backup::of(domain, time, noise(day as u64, 10_000));
        backup.parent = made.last().copied();
        made.push(host.back_up(&backup));
    }
    made
}

#[test]
fn forget_keeps_what_the_rules_say_and_dry_run_says_why() {
    let host = Host::new();
    let made = daily(&host, "web", 10);
    let rules = ["forget", "--keep-daily=3", "--keep-weekly=2", "--keep-monthly=2"];

    let told = host.ok(&[&rules[..], &["--dry-run", "--allow-many"]].concat());

    assert!(told.contains("web (1-1-1): 5 stay, 5 would go"), "{told}");
    assert!(told.contains("daily 2026-11-20, weekly 2026-W47, monthly 2026-11"), "{told}");
    assert_eq!(host.snapshots(), made);

    // More than half would go, and nobody has ever asked for these rules.
    let refused = host.kvmsnap(&["forget", "--keep-last=1"]);
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(text.contains("9 of 10 snapshots of `web` would go at once"), "{text}");
    assert!(text.contains("--allow-many"), "{text}");
    assert_eq!(host.snapshots(), made);

    let lines = host.lines(&rules);
    let kept: Vec<bool> = lines[..10].iter().map(|line| line["keep"].as_bool().unwrap()).collect();
    let (stays, goes) = (true, false);
    let expected = [stays, goes, goes, goes, stays, goes, goes, stays, stays, stays];
    assert_eq!(kept, expected);
    assert_eq!(lines[10]["dropped"], 5);
    let left: Vec<FileId> =
        made.iter().zip(kept).filter(|(_, kept)| *kept).map(|(id, _)| *id).collect();
    assert_eq!(host.snapshots(), left);
    host.judge();
}

#[test]
fn forget_leaves_other_domains_protected_snapshots_and_the_last_whole_one() {
    let host = Host::new();
    let web = daily(&host, "web", 4);
    let db = daily(&host, "db", 4);
    let mut broken = Backup::of("web", time("2026-11-21T03:00:00Z"), noise(9, 5000));
    (broken.parent, broken.lacks) = (Some(web[3]), vec!["vdb"]);
    let broken = host.back_up(&broken);
    let protected = host.lines(&["protect", &web[0].to_hex()]);
    let protected: FileId = protected[0]["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(host.repository.snapshot(&protected).unwrap().original, Some(web[0]));

    host.ok(&["forget", "w*", "--keep-last=1"]);

    let mut expected = [&[protected, web[3], broken], &db[..]].concat();
    expected.sort();
    let mut left = host.snapshots();
    left.sort();
    assert_eq!(left, expected);

    // By name too, what is needed stays.
    let refused = host.kvmsnap(&["forget", "--snapshot", &protected.to_hex()]);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && text.contains("stays: protected"), "{text}");
    host.ok(&["protect", "--undo", &protected.to_hex()]);
    host.ok(&["forget", "--snapshot", "web@2026-11-17T04:00:00Z"]);
    assert_eq!(host.snapshots().len(), 6);
    host.judge();
}

#[test]
fn forget_keeps_what_a_replica_lacks_and_the_last_that_it_has() {
    let (host, replica) = (Host::new(), Host::new());
    let made = daily(&host, "web", 6);
    // The replica got the first three, and dropped the oldest since.
    for id in &made[1..3] {
        let mut copy = host.repository.snapshot(id).unwrap();
        copy.original = Some(*id);
        replica.repository.save_snapshot(&copy).unwrap();
    }
    let location = replica.folder.to_str().unwrap();

    host.ok(&["forget", "--keep-last=1", "--not-copied-to", location]);

    assert_eq!(host.snapshots(), made[2..]);
}

#[test]
fn forget_without_rules_is_a_mistake_and_with_a_lock_of_others_it_waits() {
    let host = Host::new();
    let made = daily(&host, "web", 3);
    assert_eq!(host.kvmsnap(&["forget"]).status.code(), Some(2));
    let lock = host.repository.lock(LockMode::Shared).unwrap();
    let refused = host.kvmsnap(&["forget", "--keep-last=1", "--wait=1"]);
    assert_eq!(refused.status.code(), Some(11));
    assert_eq!(host.snapshots(), made);
    let waiting = host.command(&["forget", "--keep-last=1"]).spawn().unwrap();
    lock.release().unwrap();
    assert!(waiting.wait_with_output().unwrap().status.success());
    assert_eq!(host.snapshots(), made[2..]);
}

#[test]
fn r28_a_snapshot_that_could_not_be_copied_is_tried_again() {
    let (host, replica) = (Host::new(), Host::new());
    let made = daily(&host, "web", 2);
    let chunk = BlobId::of(&noise(0, 10_000)[..common::CHUNK]);
    let index = host.repository.index().unwrap();
    let id = index.locate(BlobKind::Data, &chunk).unwrap().pack;
    let pack = host.folder.join(FileRef { kind: FileKind::Pack, id }.to_string());
    let whole = std::fs::read(&pack).unwrap();
    std::fs::write(&pack, vec![0; whole.len()]).unwrap();
    let copy = || host.kvmsnap(&["copy", "--to", replica.folder.to_str().unwrap()]);
    assert_eq!(copy().status.code(), Some(3), "the second one is copied");
    assert_eq!(replica.snapshots().len(), 1);

    let again = copy();
    std::fs::write(&pack, whole).unwrap();
    let mended = copy();

    let text = String::from_utf8_lossy(&again.stderr);
    assert_eq!(again.status.code(), Some(1), "all is not well: {text}");
    assert!(mended.status.success(), "{mended:?}");
    let copies = replica.repository.snapshots().unwrap().good;
    let mut copied: Vec<FileId> = copies.iter().map(|(id, file)| file.first_id(id)).collect();
    copied.sort_by_key(|id| made.iter().position(|made| made == id));
    assert_eq!(copied, made);
    let out = String::from_utf8(copy().stdout).unwrap();
    assert!(out.starts_with("0 snapshots copied"), "{out}");
}
