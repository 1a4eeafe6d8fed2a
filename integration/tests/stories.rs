//! Whole stories: guests that work while they are backed up, judged by what the guest itself wrote and
//! by stock tools.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration::faults::{Contents, kinds, signal, wait_for_export};
use integration::restored::{assert_same_disk, disk, text};
use integration::{Host, assert_guest_is_free, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::oracle::{Load, Log, judge};
use vm_fixtures::{Disk, FileSystem, Format, Guest, MIB, XFS_SIZE_MIN};

/// The disks that the oracle writes, in its numbering.
const ORACLE_DISKS: [&str; 2] = ["vdc", "sda"];
/// The folders in which numbered files appear, by disk.
const FILES: [(&str, &str); 2] = [("vda", "/mnt/vda/files"), ("vdb", "/mnt/vdb/files")];
const KIB: u64 = 1 << 10;

/// A backup, and between which instants of the guest's own history it must lie.
struct Taken {
    snapshot: Value,
    /// What the oracle had done before the backup, and issued when it was over.
    oracle: (u64, u64),
    /// Numbered files before and after, on each disk of [`FILES`].
    files: Vec<(u32, u32)>,
}

/// Backs up while everything in the guest goes on.
#[track_caller]
fn take(host: &Host, guest: &Guest, more: &[&str]) -> Taken {
    let count = |(_, folder): &(&str, &str)| -> u32 {
        let count = guest.sh(&format!("ls {folder} 2>/dev/null | grep -c ^0 || true"));
        count.trim().parse().expect("a number")
    };
    let files_before: Vec<u32> = FILES.iter().map(count).collect();
    let acked = guest.oracle_log().acked();
    let snapshot = host.backup(guest, more);
    let issued = guest.oracle_log().issued();
    let files = files_before.into_iter().zip(FILES.iter().map(count)).collect();
    assert!(guest.is_running(), "a guest that ran goes on");
    Taken { snapshot, oracle: (acked, issued), files }
}

/// The backups restore, each to one instant of the oracle's history, one after the other. Returns the
/// folders with the raw images.
#[track_caller]
fn assert_instants(host: &Host, log: &Log, backups: &[Taken]) -> Vec<PathBuf> {
    let mut last = 0;
    let mut folders = Vec::new();
    for Taken { snapshot, oracle: (acked, issued), .. } in backups {
        let folder = host.restore_as(text(snapshot, "id"), "raw");
        let images = ORACLE_DISKS.map(|disk| folder.join(format!("{disk}.raw")));
        let verdict = judge(&[(0, &images[0]), (1, &images[1])], log).expect("images");
        verdict.assert_instant_between(*acked, *issued);
        let instant = verdict.instant();
        assert!(instant >= last, "instants go forward: {last}, {instant}");
        last = instant;
        folders.push(folder);
    }
    folders
}

#[test]
fn p1_full_then_incremental_backups_of_a_working_guest_are_instants_over_all_its_disks() {
    let plan = Guest::builder()
        .name("web")
        .disk(Disk::new("vda", 128 * MIB).mounted(FileSystem::Ext4))
        .disk(Disk::new("vdb", XFS_SIZE_MIN).mounted(FileSystem::Xfs))
        .disk(Disk::new("vdc", 16 * MIB).iothread())
        .disk(Disk::new("sda", 8 * MIB).scsi());
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    let boot_id = guest.sh("cat /proc/sys/kernel/random/boot_id");
    let writers = FILES.map(|(_, folder)| {
        guest.spawn(&["oracle", "files", "write", folder, "1", "9999", "--slow-ms", "50"])
    });
    let load = guest.start_load(&Load::default().mixed().depth(2), &ORACLE_DISKS);

    let backups: Vec<Taken> =
        (0..4).map(|_| take(&host, &guest, &["--quiesce", "require"])).collect();

    let log = load.stop();
    writers.iter().for_each(|pid| drop(guest.exec(&["kill", &pid.to_string()])));
    assert_eq!(guest.sh("cat /proc/sys/kernel/random/boot_id"), boot_id, "no reboot");
    assert_guest_is_free(&guest, &["vda", "vdb", "vdc", "sda"]);
    host.assert_nothing_left();
    guest.quit();
    for (turn, Taken { snapshot, oracle: (acked, issued), .. }) in backups.iter().enumerate() {
        assert_eq!(snapshot["kind"], if turn == 0 { "full" } else { "incremental" });
        assert_eq!(snapshot["consistency"], "filesystem");
        assert!(snapshot["freeze_ms"].as_u64().is_some_and(|ms| ms < 10_000), "{snapshot}");
        let parent = turn.checked_sub(1).map_or(&Value::Null, |turn| &backups[turn].snapshot["id"]);
        assert_eq!(&snapshot["parent"], parent);
        assert!(issued > acked, "the guest wrote during the backup");
    }
    let raw = assert_instants(&host, &log, &backups);
    for folder in &raw {
        vm_fixtures::run("e2fsck", &["-f".into(), "-n".into(), folder.join("vda.raw")]);
    }
    let qcow2: Vec<PathBuf> =
        backups.iter().map(|taken| host.restore_as(text(&taken.snapshot, "id"), "qcow2")).collect();
    for (raw, qcow2) in raw.iter().zip(&qcow2) {
        for disk in ["vda", "vdb", "vdc", "sda"] {
            assert_same_disk(&image(raw, disk, "raw"), &image(qcow2, disk, "qcow2"));
        }
    }
    host.assert_restic_yields(&backups[0].snapshot, &raw[0]);
    host.assert_restic_yields(&backups[3].snapshot, &raw[3]);
    host.assert_restic_is_content();

    // Two XFS of one UUID are not mounted side by side, two ext4 are.
    let (first, last) = (&qcow2[0], &qcow2[3]);
    let existing = |id: &str, folder: &Path, disk: &str| {
        Disk::existing(id, &image(folder, disk, "qcow2"), Format::Qcow2)
    };
    let plan = Guest::builder()
        .disk(existing("first", first, "vda").mounted(FileSystem::Ext4))
        .disk(existing("vda", last, "vda").mounted(FileSystem::Ext4))
        .disk(existing("vdb", last, "vdb").mounted(FileSystem::Xfs));
    let restored = plan.boot().expect("QEMU is there");
    let assert_files = |folder: &str, (before, after): (u32, u32)| {
        assert!(after > 0, "there are files");
        restored.check_files(folder).assert_instant_between(1, before, after);
    };
    assert_files("/mnt/first/files", backups[0].files[0]);
    assert_files("/mnt/vda/files", backups[3].files[0]);
    assert_files("/mnt/vdb/files", backups[3].files[1]);
    // A frozen XFS has a log to replay, so it is clean once it was mounted.
    let xfs = restored.shut_down().remove(2);
    let raw = xfs.with_extension("replayed");
    let convert = ["convert", "-f", "qcow2", "-O", "raw"].map(AsRef::as_ref);
    vm_fixtures::run("qemu-img", &[&convert[..], &[xfs.as_os_str(), raw.as_os_str()]].concat());
    vm_fixtures::run("xfs_repair", &["-n".as_ref(), raw.as_os_str()]);
}

fn image(folder: &Path, disk: &str, format: &str) -> PathBuf {
    folder.join(format!("{disk}.{format}"))
}

#[test]
fn p1_the_filter_of_a_backup_job_shows_one_instant_too() {
    let plan = Guest::builder()
        .disk(Disk::new("vdc", 16 * MIB))
        .disk(Disk::new("sda", 8 * MIB).scsi().throttle("x-iops-total=100000"));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    let load = guest.start_load(&Load::default().mixed().depth(2), &ORACLE_DISKS);

    let mut backups = vec![take(&host, &guest, &["--implicit-filter"])];
    backups.push(take(&host, &guest, &["--implicit-filter"]));
    // QEMU was replaced by a newer one: the chain goes on.
    backups.push(take(&host, &guest, &[]));
    backups.push(take(&host, &guest, &["--implicit-filter"]));

    let log = load.stop();
    assert_guest_is_free(&guest, &["vdc"]);
    host.assert_nothing_left();
    guest.quit();
    let kinds: Vec<_> = backups.iter().map(|taken| text(&taken.snapshot, "kind")).collect();
    assert_eq!(kinds, ["full", "incremental", "incremental", "incremental"]);
    assert_instants(&host, &log, &backups);
    host.assert_restic_is_content();
}

#[test]
fn p1_what_is_written_while_a_backup_reads_is_not_in_it() {
    let plan = Guest::without_os().disk(Disk::new("vda", 16 * MIB));
    let Some(guest) = plan.boot() else { return };
    for more in [&[][..], &["--implicit-filter"]] {
        let host = Host::new();
        let mut contents = Contents::new(&["vda"], 16 * MIB);
        contents.write(&guest, "vda", 0, 16 << 20, 1);
        contents.zero(&guest, "vda", 8 << 20, 1 << 20);
        let at_the_instant = contents.clone();
        // So slow that it is met before its end.
        let slowly = [&["--limit-read", "16MiB"], more].concat();
        let mut backup = spawn(host.backup_command(&guest, &slowly));
        wait_for_export(&guest, &mut backup);
        signal(backup.pid(), Signal::SIGSTOP);

        // Single clusters between others that stay as they were: data, zeros and discards, and data
        // where there was none.
        for n in 0..40 {
            let offset = (1 << 20) + n * (7 << 15) + 8192;
            match n % 3 {
                0 => contents.write(&guest, "vda", offset, 4096, 2),
                // The filter of a job passes no discards on.
                1 if more.is_empty() => {
                    contents.discard(&guest, "vda", offset & !0xffff, 64 << 10);
                }
                _ => contents.zero(&guest, "vda", offset & !0xffff, 64 << 10),
            }
        }
        contents.write(&guest, "vda", (8 << 20) + 100_000, 4096, 3);
        signal(backup.pid(), Signal::SIGCONT);

        let outcome = finish(backup);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let snapshot: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
        let scratch_peak = snapshot["bytes_scratch_peak"].as_u64();
        // What a job reserves says nothing of what it needed.
        assert_eq!(scratch_peak.is_some_and(|bytes| bytes > 0), more.is_empty(), "{snapshot}");
        host.assert_holds(&snapshot, &at_the_instant);
        let incremental = host.backup_and_compare(&guest, &contents, more);
        assert_eq!(incremental["kind"], "incremental");
        host.assert_nothing_left();
        assert_guest_is_free(&guest, &["vda"]);
    }
}

#[test]
fn p2_a_guest_with_io_threads_survives_the_death_of_its_reader() {
    let plan = Guest::without_os()
        .disk(Disk::new("vda", 16 * MIB).iothread())
        .disk(Disk::new("vdb", 4 * MIB).iothread());
    let Some(guest) = plan.boot() else { return };
    for more in [&[][..], &["--implicit-filter"]] {
        let host = Host::new();
        let mut contents = Contents::new(&["vda"], 16 * MIB);
        contents.write(&guest, "vda", 0, 16 << 20, 1);
        host.backup_and_compare(&guest, &contents, more);
        for turn in 0..3 {
            contents.write(&guest, "vda", turn << 20, 8 << 20, 2 + turn as u8);
            // So slow that it is met before its end.
            let slowly = [&["--limit-read", "1MiB"], more].concat();
            let mut backup = spawn(host.backup_command(&guest, &slowly));
            wait_for_export(&guest, &mut backup);
            signal(backup.pid(), Signal::SIGKILL);
            finish(backup);
            contents.write(&guest, "vda", 0, 4096, 9);
            assert!(guest.is_running(), "the guest goes on");
        }
        let next = host.backup_and_compare(&guest, &contents, more);
        assert_eq!(next["kind"], "incremental");
        host.assert_nothing_left();
        assert_guest_is_free(&guest, &["vda", "vdb"]);
    }
}

/// Bytes that QEMU has read by system calls, whatever QEMU or kvmsnap say about it.
fn read_by(guest: &Guest) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", guest.pid())).expect("QEMU lives");
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("a counter");
    line.parse().expect("a number")
}

#[test]
fn p1_an_incremental_backup_reads_dirty_extents_only_and_zeros_become_zeros() {
    const CHUNK: u64 = 64 * KIB;
    /// Requests, replies of the monitor and tables of the image, all told.
    const BESIDE: u64 = MIB;
    let plan = Guest::without_os().disk(Disk::new("vda", 256 * MIB));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    let mut contents = Contents::new(&["vda"], 256 * MIB);
    let mib = |n: u64| usize::try_from(n * MIB).expect("it is small");
    contents.write(&guest, "vda", 0, mib(128), 1);
    let full = host.backup_and_compare(&guest, &contents, &[]);
    let of_full = disk(&full, "vda");
    assert_eq!(of_full["bytes_read"], 128 * MIB);
    assert_eq!(
        (&of_full["bytes_zero"], &of_full["bytes_changed"]),
        (&json!(128 * MIB), &json!(256 * MIB))
    );

    contents.write(&guest, "vda", mib(1), 64 << 10, 7);
    contents.write(&guest, "vda", mib(20) + 4096, 4096, 7);
    contents.discard(&guest, "vda", mib(30), 128 << 10);
    contents.zero(&guest, "vda", mib(40), 128 << 10);
    contents.zero(&guest, "vda", mib(44), 64 << 10);
    contents.write(&guest, "vda", mib(50), 128 << 10, 0);
    contents.write(&guest, "vda", mib(60), 4096, 0);
    contents.zero(&guest, "vda", mib(80), mib(1));
    let before = read_by(&guest);
    let incremental = host.backup(&guest, &[]);
    let read = read_by(&guest) - before;

    let told = disk(&incremental, "vda");
    let bytes = |field: &str| told[field].as_u64().expect("a count of bytes");
    assert_eq!(told["kind"], "incremental");
    // In clusters of 64 KiB, as the dirty bitmap counts.
    assert_eq!(bytes("bytes_changed"), (64 + 64 + 128 + 128 + 64 + 128 + 64 + 1024) * KIB);
    assert_eq!(bytes("bytes_read"), 5 * CHUNK, "five chunks hold data, some of it zeros");
    assert_eq!(bytes("bytes_zero"), 21 * CHUNK);
    let audited = bytes("bytes_audited") / CHUNK;
    assert!((1..=32).contains(&audited), "a small random share of the rest: {audited}");
    let all = bytes("bytes_read") + bytes("bytes_audited");
    assert!(read <= all + BESIDE, "QEMU read {read} bytes for {all}");
    assert!(read >= bytes("bytes_read"), "QEMU read {read} bytes: the counter counts");

    let (old, new) = (host.chunk_ids(&full, "vda"), host.chunk_ids(&incremental, "vda"));
    let changed: Vec<usize> = (0..old.len()).filter(|&n| old[n] != new[n]).collect();
    let expected: Vec<usize> =
        [16, 320, 480, 481, 640, 641, 704, 800, 801, 960].into_iter().chain(1280..1296).collect();
    assert_eq!(changed, expected, "all others are the parent's");
    let never_written = &old[4095];
    let zero = [480, 481, 640, 641, 704, 800, 801, 1280, 1295];
    assert!(zero.iter().all(|&chunk| &new[chunk] == never_written));
    host.assert_holds(&incremental, &contents);
    host.assert_restic_yields(&incremental, &host.restore(text(&incremental, "id")));

    let idle = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(disk(&idle, "vda")["bytes_changed"], 0);
    assert_eq!(disk(&idle, "vda")["bytes_read"], 0);
    assert_eq!(host.chunk_ids(&idle, "vda"), new);
    host.assert_all_clean(&guest, &["vda"]);
    host.assert_restic_is_content();
}

#[test]
fn p1_disks_of_every_make_are_backed_up_and_restored() {
    // No multiple of a chunk nor of a cluster.
    const SIZE: u64 = 6 * MIB + 5 * 512;
    let threaded = Disk::new("vde", SIZE).iothread();
    let plan = Guest::without_os()
        .disk(Disk::new("vda", SIZE))
        .disk(Disk::new("vdb", SIZE).raw())
        // So called by its place, for it has no name of its own.
        .disk(Disk::new("disk2", SIZE).without_device_id())
        .disk(Disk::new("sda", SIZE).scsi())
        .disk(Disk::new("vdd", SIZE).throttle("x-iops-total=100000"))
        .disk(threaded)
        .disk(Disk::new("vdf", SIZE).create_options("compat=0.10"))
        .disk(Disk::new("vdg", SIZE).create_options("cluster_size=4k"))
        .disk(Disk::new("sdb", SIZE).raw().scsi());
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    let names = ["vda", "vdb", "disk2", "sda", "vdd", "vdf", "vdg", "sdb"];
    let mut contents = Contents::new(&names, SIZE);
    // QEMU 7.2 dies of `qemu-io "write -z"` on a disk with an I/O thread.
    let mut threaded = Contents::new(&["vde"], SIZE);
    contents.scribble(&guest, 1);
    contents.scribble(&guest, 2);
    threaded.write(&guest, "vde", 5 << 20, 1 << 20, 1);
    let full = host.backup_and_compare(&guest, &contents, &[]);
    host.assert_holds(&full, &threaded);
    let turns = [&[][..], &["--implicit-filter"], &["--full"], &[]];
    for (turn, more) in turns.into_iter().enumerate() {
        contents.scribble(&guest, 3 + turn);
        threaded.write(&guest, "vde", turn << 20, 4096, 2);

        let snapshot = host.backup_and_compare(&guest, &contents, more);

        host.assert_holds(&snapshot, &threaded);
        for (name, kind) in kinds(&snapshot) {
            let whole = more.contains(&"--full") || ["vdb", "vdf", "sdb"].contains(&name.as_str());
            assert_eq!(kind, if whole { "rescan" } else { "incremental" }, "{name} with {more:?}");
        }
        host.assert_nothing_left();
    }
    let last = text(host.list().last().expect("snapshots"), "id").to_owned();
    let (raw, qcow2) = (host.restore_as(&last, "raw"), host.restore_as(&last, "qcow2"));
    for name in kinds(&full).keys() {
        assert_same_disk(&image(&raw, name, "raw"), &image(&qcow2, name, "qcow2"));
    }
    host.assert_restic_is_content();
    host.ok(["verify", "--read-data"]);
}

#[test]
fn r30_a_paused_guest_stays_paused_and_a_running_one_runs() {
    let plan = Guest::without_os().disk(Disk::new("vda", MIB)).disk(Disk::new("vdb", MIB));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    let mut contents = Contents::new(&["vda", "vdb"], MIB);
    contents.scribble(&guest, 1);
    guest.pause();
    guest.events();
    for more in [&[][..], &["--implicit-filter"]] {
        let paused = host.backup_and_compare(&guest, &contents, more);
        assert_eq!((guest.status().as_str(), &paused["pause_ms"]), ("paused", &Value::Null));
    }
    let resumed = |event: &Value| event["event"] == "RESUME";
    assert!(!guest.events().iter().any(resumed), "it never ran meanwhile");

    guest.resume();
    contents.scribble(&guest, 2);
    let running = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(guest.status(), "running");
    assert!(running["pause_ms"].as_u64().is_some_and(|ms| ms < 3000), "{running}");
    assert_eq!(running["kind"], "incremental");
    host.assert_all_clean(&guest, &["vda", "vdb"]);
}

#[test]
fn r17_the_order_of_backups_comes_from_their_chain_whatever_the_clock_says() {
    if !vm_fixtures::available("faketime", "faketime") {
        return;
    }
    let Some(guest) = Guest::without_os().disk(Disk::new("vda", 4 * MIB)).boot() else { return };
    let (host, mut contents) = (Host::new(), Contents::new(&["vda"], 4 * MIB));
    let mut taken = Vec::new();
    // The second and third clock are behind the first by a year, the fourth is ahead by one.
    for (turn, days) in [0, -365, -364, 365, 0].into_iter().enumerate() {
        contents.scribble(&guest, turn);
        let command = host.backup_command(&guest, &[]);
        let mut there = Command::new("faketime");
        there.args(["-m", "-f", &format!("{days:+}d")]).arg(command.get_program());
        there.args(command.get_args()).env("DONT_FAKE_MONOTONIC", "1");
        there.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));

        let outcome = finish(spawn(there));

        assert_eq!(outcome.code, Some(0), "{days}: {outcome:?}");
        let snapshot: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
        let expected = if turn == 0 { "full" } else { "incremental" };
        assert_eq!(snapshot["kind"], expected, "{days}: {snapshot}");
        assert_eq!(snapshot["parent"], taken.last().cloned().unwrap_or_default(), "{days}");
        host.assert_holds(&snapshot, &contents);
        taken.push(snapshot["id"].clone());
        let listed: Vec<Value> = host.list().into_iter().map(|mut s| s["id"].take()).collect();
        assert_eq!(listed, taken, "{days}");
        let latest = host.restore(&format!("latest:{}", guest.name()));
        contents.assert_restored(&latest);
        host.assert_all_clean(&guest, &["vda"]);
    }
    let time = |at: usize| host.list()[at]["time"].as_str().map(str::to_owned);
    assert!(time(1) < time(0) && time(3) > time(4), "the clocks were not set");
    host.assert_restic_is_content();
}
