//! The oracle on real machines: a load, a point in time, a verdict.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use vm_fixtures::oracle::{Load, Log, QemuIoTarget, Region, Target, judge, judge_image};
use vm_fixtures::{Disk, FileSystem, Format, Guest, MIB, XFS_SIZE_MIN};

fn raw_copy(image: &Path, to: PathBuf) -> PathBuf {
    let args = ["convert", "-f", "qcow2", "-O", "raw"].map(AsRef::as_ref);
    vm_fixtures::run("qemu-img", &[&args[..], &[image.as_os_str(), to.as_os_str()]].concat());
    to
}

/// Waits until the guest's loads have done more than so many operations.
fn wait_for(guest: &Guest, operations: u64) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while guest.oracle_log().acked() <= operations {
        assert!(Instant::now() < deadline, "the load does nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_load_in_a_guest_is_judged_over_two_disks_at_one_point_in_time() {
    let plan = Guest::builder()
        .disk(Disk::new("vda", 8 * MIB).mounted(FileSystem::Ext4))
        .disk(Disk::new("vdb", 4 * MIB))
        .disk(Disk::new("sda", 4 * MIB).scsi());
    let Some(guest) = plan.boot() else { return };
    let load = guest.start_load(&Load::default().mixed().depth(2), &["vdb", "sda"]);
    wait_for(&guest, 100);

    // One atomic point in time by QEMU itself: two overlays in one transaction.
    let acked = guest.oracle_log().acked();
    let overlay = |id: &str| {
        let node = Disk::format_node(id);
        let file = guest.folder().join(format!("{id}.overlay"));
        let data = json!({"node-name": node, "snapshot-file": file, "format": "qcow2",
            "snapshot-node-name": format!("{id}-overlay")});
        json!({"type": "blockdev-snapshot-sync", "data": data})
    };
    let actions = json!({"actions": [overlay("vdb"), overlay("sda")]});
    guest.qmp_command("transaction", &actions);
    let issued = guest.oracle_log().issued();
    wait_for(&guest, issued + 50);
    let log = load.stop();
    assert!(acked > 0 && log.acked() > issued, "{acked} {issued} {}", log.acked());
    guest.quit();

    let folder = guest.folder();
    let base = [
        raw_copy(&guest.disk_path("vdb"), folder.join("base-0")),
        raw_copy(&guest.disk_path("sda"), folder.join("base-1")),
    ];
    let verdict = judge(&[(0, &base[0]), (1, &base[1])], &log).unwrap();
    verdict.assert_instant_between(acked, issued);
    let last = raw_copy(&folder.join("vdb.overlay"), folder.join("last-0"));
    let end = judge(&[(0, &last)], &log).unwrap();
    end.assert_instant_between(log.acked(), log.issued());
    // One disk of the point in time beside one of the end: no instant explains both.
    let mixed = judge(&[(0, &last), (1, &base[1])], &log).unwrap();
    assert!(!mixed.is_consistent(), "{mixed}");
}

#[test]
fn a_load_from_outside_is_judged_on_a_machine_without_an_operating_system() {
    let plan = Guest::without_os().disk(Disk::new("vda", MIB)).disk(Disk::new("vdb", MIB).raw());
    let Some(machine) = plan.boot() else { return };
    let targets = ["vda", "vdb"].map(|id| QemuIoTarget::new(&machine, id));
    let targets: Vec<&dyn Target> = targets.iter().map(|target| target as _).collect();
    let regions = [0, 1].map(|disk| Region { disk, from: 0, to: MIB });
    let mut log = Vec::new();
    Load::default().mixed().count(500).run(&regions, &targets, &mut log).unwrap();
    let log = Log::parse(std::str::from_utf8(&log).unwrap()).unwrap();
    let images = machine.shut_down();
    let raw = raw_copy(&images[0], machine.folder().join("raw"));
    let verdict = judge(&[(0, &raw), (1, &images[1])], &log).unwrap();
    assert_eq!(verdict.instant(), 500);
    judge_image(&images[0], Format::Qcow2, &log).unwrap().assert_instant_between(500, 500);
}

#[test]
fn a_load_goes_on_after_its_guest_was_killed() {
    let Some(guest) = Guest::builder().disk(Disk::new("vda", MIB).raw()).boot() else { return };
    let load = guest.start_load(&Load::default(), &["vda"]);
    wait_for(&guest, 50);
    guest.kill();
    drop(load);
    let first = guest.oracle_log();
    assert!(first.acked() > 0);
    let check = |log: &Log| {
        let verdict = judge(&[(0, &guest.disk_path("vda"))], log).unwrap();
        verdict.assert_instant_between(log.acked(), log.issued());
    };
    check(&first);
    guest.restart();
    let load = guest.start_load(&Load::default().count(200), &["vda"]);
    let second = load.wait(Duration::from_secs(180));
    assert_eq!(second.issued(), first.issued() + 200);
    guest.shut_down();
    check(&second);
}

#[test]
fn files_survive_a_copy_made_while_their_file_systems_are_frozen() {
    let plan = Guest::builder()
        .disk(Disk::new("vda", 64 * MIB).raw().mounted(FileSystem::Ext4))
        .disk(Disk::new("vdb", XFS_SIZE_MIN).raw().mounted(FileSystem::Xfs));
    let Some(guest) = plan.boot() else { return };
    for mount in ["/mnt/vda/files", "/mnt/vdb/files"] {
        guest.write_files(mount, 1..20);
    }
    let frozen = guest.agent_command("guest-fsfreeze-freeze", &json!({}));
    assert_eq!(frozen, json!(2));
    let copy = |id: &str| {
        let copy = guest.folder().join(format!("{id}.copy"));
        let args = [guest.disk_path(id), copy.clone()].map(PathBuf::into_os_string);
        vm_fixtures::run("cp", &[&["--sparse=always".into()], &args[..]].concat());
        copy
    };
    let copies = [copy("vda"), copy("vdb")];
    guest.agent_command("guest-fsfreeze-thaw", &json!({}));
    guest.write_files("/mnt/vda/files", 20..25);

    let plan = Guest::builder()
        .disk(Disk::existing("vda", &copies[0], Format::Raw).mounted(FileSystem::Ext4))
        .disk(Disk::existing("vdb", &copies[1], Format::Raw).mounted(FileSystem::Xfs));
    let restored = plan.boot().expect("QEMU is there");
    for mount in ["/mnt/vda/files", "/mnt/vdb/files"] {
        restored.check_files(mount).assert_instant_between(1, 19, 19);
    }
    guest.check_files("/mnt/vda/files").assert_instant_between(1, 24, 24);
    restored.shut_down();
    vm_fixtures::run("e2fsck", &["-f".as_ref(), "-n".as_ref(), copies[0].as_os_str()]);
    vm_fixtures::run("xfs_repair", &["-n".as_ref(), copies[1].as_os_str()]);
}

#[test]
fn the_program_writes_and_judges_an_image_file() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(MIB).unwrap();
    let log = folder.path().join("log");
    let (disk, log) = (format!("0={}", image.display()), log.to_str().unwrap());
    let oracle = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_oracle")).args(args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text + &String::from_utf8(output.stderr).unwrap())
    };
    let write = ["write", "--disk", &disk, "--log", log, "--count", "100", "--mix"];
    assert_eq!(oracle(&write).0, Some(0));
    let judge = ["judge", "--disk", &disk, "--log", log];
    assert_eq!(oracle(&judge), (Some(0), "instant: 100 done, 100 issued\n".to_owned()));
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let (code, text) = oracle(&judge);
    assert_eq!(code, Some(1));
    assert!(text.contains("alien: 256"), "{text}");
    assert_eq!(oracle(&["write", "--disk", "0=/nowhere", "--log", log]).0, Some(2));
}
