//! `kvmsnap restore`, of hand-made backups from a store that fails.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use common::{Backup, CHUNK, Host, noise, time};
use repository::{BlobId, BlobKind, FileKind, FileRef};

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn r14_a_restore_whose_store_fails_goes_on_with_the_same_command() {
    let host = Host::new();
    let (vda, vdb) = (noise(1, 9 * CHUNK), noise(2, 9 * CHUNK));
    host.back_up(&Backup::of("web", time("2026-11-01T03:00:00Z"), vdb.clone()));
    let mut backup = Backup::of("web", time("2026-11-02T03:00:00Z"), vda.clone());
    backup.disks.push(("vdb", vdb.clone()));
    host.back_up(&backup);
    let index = host.repository.index().unwrap();
    let id = index.locate(BlobKind::Data, &BlobId::of(&vdb[..CHUNK])).unwrap().pack;
    let pack = host.folder.join(FileRef { kind: FileKind::Pack, id }.to_string());
    let (aside, to) = (host.folder.join("aside"), host.folder.join("restored"));
    // What is no file cannot be read, which is no damage of the backup.
    fs::rename(&pack, &aside).unwrap();
    fs::create_dir(&pack).unwrap();
    let restore = ["restore", "latest:web", "--format", "raw", "--to", to.to_str().unwrap()];

    let failed = host.kvmsnap(&restore);

    let text = String::from_utf8_lossy(&failed.stderr);
    assert!(!failed.status.success() && text.contains("the same command goes on"), "{text}");
    let left = names(&to);
    assert!(left.len() == 2 && left.iter().all(|name| name.ends_with(".partial")), "{left:?}");

    fs::remove_dir(&pack).unwrap();
    fs::rename(&aside, &pack).unwrap();
    host.ok(&restore);

    assert_eq!(fs::read(to.join("vda.raw")).unwrap(), vda);
    assert_eq!(fs::read(to.join("vdb.raw")).unwrap(), vdb);
    assert_eq!(names(&to), ["manifest.json", "vda.raw", "vdb.raw"].map(str::to_owned).into());
}
