//! P7: stock restic reads what we write, and we read what it writes.

mod common;

use std::{fs, os::unix::fs::PermissionsExt};

use common::{CHUNK, PASSWORD, back_up, disk, folder, has_restic, restic_ok, restore};
use repository::{Kdf, Repository, RepositoryError};

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
    let report = repository.check(&repository::CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
}
