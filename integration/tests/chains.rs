//! Which backup a disk continues, when backups differ in disks and repositories.

use integration::Host;
use integration::faults::{Contents, kinds};
use serde_json::Value;
use vm_fixtures::{Disk, Guest, MIB};

const DISKS: [&str; 2] = ["vda", "vdb"];
const MEBIBYTE: usize = 1 << 20;

fn two_disks() -> Option<(Guest, Contents)> {
    let builder = DISKS
        .iter()
        .fold(Guest::without_os(), |builder, disk| builder.disk(Disk::new(disk, 16 * MIB)));
    Some((builder.boot()?, Contents::new(&DISKS, 16 * MIB)))
}

fn are_incremental(snapshot: &Value) -> bool {
    kinds(snapshot).values().all(|kind| kind == "incremental")
}

#[test]
fn p3_a_backup_of_one_disk_keeps_the_other_incremental() {
    let Some((guest, mut contents)) = two_disks() else { return };
    let host = Host::new();
    host.backup(&guest, &[]);
    contents.write(&guest, "vda", 0, MEBIBYTE, 1);
    contents.write(&guest, "vdb", 0, MEBIBYTE, 2);
    let one = host.backup(&guest, &["--disk", "vda"]);
    contents.write(&guest, "vdb", 2 * MEBIBYTE, MEBIBYTE, 3);

    let both = host.backup_and_compare(&guest, &contents, &[]);

    assert!(are_incremental(&one) && are_incremental(&both));
    assert_eq!(both["disks"][1]["bytes_changed"], 2 * MIB, "since the first backup");
    host.assert_all_clean(&guest, &DISKS);
}

#[test]
fn p3_two_repositories_in_turn_are_both_incremental() {
    let Some((guest, mut contents)) = two_disks() else { return };
    let (odd, even) = (Host::new(), Host::new());
    odd.backup(&guest, &[]);
    even.backup(&guest, &[]);
    contents.write(&guest, "vda", 0, MEBIBYTE, 1);
    let third = odd.backup_and_compare(&guest, &contents, &[]);
    contents.write(&guest, "vda", 4 * MEBIBYTE, MEBIBYTE, 2);
    let fourth = even.backup_and_compare(&guest, &contents, &[]);

    assert!(are_incremental(&third) && are_incremental(&fourth));
    assert_eq!(third["disks"][0]["bytes_changed"], MIB);
    assert_eq!(fourth["disks"][0]["bytes_changed"], 2 * MIB, "since the second, not the third");
}

/// S11: who can write to the repository's storage takes the newest snapshot away, or puts an older state back.
#[test]
fn s11_a_last_snapshot_that_is_gone_is_told_once() {
    let Some((guest, mut contents)) = two_disks() else { return };
    let host = Host::new();
    let warnings = |snapshot: &Value| snapshot["warnings"].to_string();
    host.backup(&guest, &[]);
    contents.write(&guest, "vda", 0, MEBIBYTE, 1);
    let taken = host.backup(&guest, &[]);
    assert_eq!(warnings(&taken), "[]");
    let id = taken["id"].as_str().expect("an id");
    std::fs::remove_file(host.repository().join("snapshots").join(id)).expect("it is there");

    let next = host.backup_and_compare(&guest, &contents, &[]);
    let told = warnings(&next);
    assert!(told.contains(&id[..8]) && told.contains("gone from the repository"), "{told}");
    let after = host.backup(&guest, &[]);
    assert_eq!(warnings(&after), "[]", "once is enough");
}
