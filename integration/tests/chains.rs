//! Which backup a disk continues, when backups differ in disks and repositories.

use std::fs;

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
    fs::remove_file(host.repository().join("snapshots").join(id)).expect("it is there");

    let next = host.backup_and_compare(&guest, &contents, &[]);
    let told = warnings(&next);
    assert!(told.contains(&id[..8]) && told.contains("gone from the repository"), "{told}");
    let after = host.backup(&guest, &[]);
    assert_eq!(warnings(&after), "[]", "once is enough");
}

#[test]
fn p4_a_backup_whose_parent_lacks_chunks_reads_the_disk_and_stores_them_again() {
    let Some((guest, mut contents)) = two_disks() else { return };
    let host = Host::new();
    contents.write_noise(&guest, "vda", 0, 8 * MEBIBYTE, 1);
    host.backup(&guest, &[]);
    // Its record is in a pack of its own, and stays.
    contents.write(&guest, "vda", 0, 4096, 2);
    assert!(are_incremental(&host.backup(&guest, &[])));
    let packs = fs::read_dir(host.repository().join("data")).expect("packs");
    let packs = packs.flat_map(|folder| fs::read_dir(folder.expect("a folder").path()));
    let packs = packs.flatten().map(|pack| pack.expect("a pack").path());
    let largest = packs.max_by_key(|pack| pack.metadata().map_or(0, |meta| meta.len()));
    fs::remove_file(largest.expect("there is one")).expect("it is there");
    host.restic(&["rebuild-index"]);

    let planned = host.try_backup(&guest, &["--dry-run"]).stdout;
    assert!(planned.contains("rescan") && planned.contains("lacks"), "{planned}");
    let next = host.backup_and_compare(&guest, &contents, &[]);

    assert_eq!(kinds(&next)["vda"], "rescan", "{next}");
    let reason = next["disks"][0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("damaged") && reason.contains("lacks"), "{reason}");
    contents.write(&guest, "vda", 0, 4096, 3);
    assert!(are_incremental(&host.backup_and_compare(&guest, &contents, &[])));
    host.assert_all_clean(&guest, &DISKS);
}
