//! `backup --tracking overlay` on a QEMU that nothing manages: what an overlay holds is what changed since
//! the backup at which it began. For raw disks, qcow2 of version 2, and guests that crash.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use integration::faults::{Contents, Fault, SmallDisk, assert_says, kinds, signal, wait_until};
use integration::overlays::{HASTY, SIZE, Scene, files_in, lines, plan};
use integration::restored::{disk, text};
use integration::{Host, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::{Disk, Format, Guest, MIB};

const DISKS: [&str; 2] = ["vda", "vdb"];
const TRACKING: [&str; 2] = ["--tracking", "overlay"];
/// A backup that writes back what it has read so slowly that it does not wait for the end.
const SLOW_SINK: [&str; 4] = ["--limit-rate", "128KiB", "--deadline", "0.1"];
/// That of the machine, whenever it is started.
const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
const WAIT: Duration = Duration::from_secs(120);
/// What a backup reads at most of a disk of which scribbles have changed two pieces of 192 KiB, in chunks of
/// 64 KiB.
const READ_MAX: u64 = 2 * 192 * 1024;

/// A machine with a qcow2 disk of version 2 and a raw one, and a repository.
fn scene() -> Option<Scene> {
    let host = Host::new();
    let qmp = host.folder().join("qmp");
    let disks =
        [Disk::new("vda", SIZE).create_options("compat=0.10"), Disk::new("vdb", SIZE).raw()];
    let guest = plan(&qmp, disks).uuid(UUID).boot()?;
    let mut scene = Scene { qmp, ..Scene::of(guest, host) };
    scene.contents.scribble(&scene.guest, 1);
    scene.contents.write_noise(&scene.guest, "vda", 0, 2 * MIB as usize, 1);
    scene.contents.write_noise(&scene.guest, "vdb", 0, 2 * MIB as usize, 2);
    Some(scene)
}

#[track_caller]
fn assert_kinds(snapshot: &Value, kind: &str) {
    for disk in DISKS {
        assert_eq!(kinds(snapshot)[disk], kind, "{disk}: {snapshot}");
    }
}

/// A backup that reads only what a scribble has changed, and restores to what the guest wrote.
#[track_caller]
fn assert_reads_little(scene: &Scene, snapshot: &Value) {
    assert_kinds(snapshot, "incremental");
    scene.host.assert_holds(snapshot, &scene.contents);
    for name in DISKS {
        let read = disk(snapshot, name)["bytes_read"].as_u64();
        assert!(read <= Some(READ_MAX), "{name} was read too much of: {snapshot}");
    }
}

fn back_up(scene: &Scene, more: &[&str]) -> Value {
    let snapshot = scene.ok("backup", &[&TRACKING[..], more].concat()).remove(0);
    scene.host.assert_holds(&snapshot, &scene.contents);
    snapshot
}

/// One overlay on each disk, right above its image, and one record of both.
#[track_caller]
fn assert_tracked(scene: &Scene, snapshot: &Value) {
    let mut expected: Vec<PathBuf> =
        DISKS.iter().map(|name| text(disk(snapshot, name), "overlay").into()).collect();
    let mut found = files_in(scene.guest.folder(), "kvmsnap-");
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(scene.records().len(), 1, "one record");
    assert_eq!(scene.host.undo_records(), 0, "no undo record");
}

/// QEMU again, on the overlays that a backup named.
#[track_caller]
fn start_on_overlays(scene: &Scene, snapshot: &Value) -> Guest {
    let disks = DISKS.iter().map(|name| {
        let overlay = Path::new(text(disk(snapshot, name), "overlay"));
        Disk::existing(name, overlay, Format::Qcow2)
    });
    plan(&scene.qmp, disks).uuid(UUID).boot().expect("QEMU is there")
}

/// QEMU again, on the images beneath the overlays.
fn start_on_images(scene: &Scene) -> Guest {
    let own = [("vda", Format::Qcow2), ("vdb", Format::Raw)]
        .map(|(name, format)| Disk::existing(name, &scene.guest.disk_path(name), format));
    plan(&scene.qmp, own).uuid(UUID).boot().expect("QEMU is there")
}

/// Has QEMU write back as fast as it can what it writes back slowly.
fn hurry(scene: &Scene) {
    let jobs = scene.guest.qmp_command("query-block-jobs", &json!({}));
    for job in jobs.as_array().expect("a list") {
        let unlimited = json!({"device": job["device"], "speed": 0});
        // It may have come to its end just now.
        let _ = scene.guest.try_qmp_command("block-job-set-speed", &unlimited);
    }
}

/// Has QEMU bring to its images what the guest wrote.
fn flush(guest: &Guest) {
    DISKS.iter().for_each(|disk| drop(guest.qemu_io(disk, "flush")));
}

// ---- the story ----------------------------------------------------------------------------------

#[test]
fn p1_p3_raw_and_old_qcow2_disks_are_incremental_also_after_qemu_was_killed() {
    let Some(mut scene) = scene() else { return };
    let first = back_up(&scene, &[]);
    assert_kinds(&first, "full");
    assert_tracked(&scene, &first);
    for turn in 2..4 {
        scene.contents.scribble(&scene.guest, turn);
        // The overlays are there: nobody has to ask for them again.
        let snapshot = scene.ok("backup", &[]).remove(0);
        assert_reads_little(&scene, &snapshot);
        assert_tracked(&scene, &snapshot);
    }
    scene.contents.scribble(&scene.guest, 5);
    flush(&scene.guest);
    let last = scene.host.list().pop().expect("a snapshot");

    scene.guest.kill();

    let successor = start_on_overlays(&scene, &last);
    let after = scene.ok("backup", &[]).remove(0);
    assert_reads_little(&scene, &after);
    assert_tracked(&scene, &after);
    scene.contents.scribble(&successor, 6);
    let next = scene.ok("backup", &[]).remove(0);
    assert_reads_little(&scene, &next);
    let folder = scene.host.restore_by_restic(&next);
    scene.contents.assert_restored(&folder);
    let shown = scene.host.ok(["show", text(&next, "id")]);
    assert!(shown.contains("tracks what changed since"), "{shown}");
    assert_eq!(scene.host.run(["doctor"]).code, Some(0), "nothing of it is wrong");

    scene.ok("purge", &[]);

    assert_eq!(files_in(scene.guest.folder(), "kvmsnap-"), Vec::<PathBuf>::new());
    assert_eq!(scene.records(), Vec::<PathBuf>::new());
    successor.quit();
    scene.assert_holds();
}

#[test]
fn p1_zeros_and_discards_are_changes_too() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    scene.contents.zero(&scene.guest, "vda", 0, MIB as usize);
    scene.contents.discard(&scene.guest, "vdb", 0, MIB as usize);
    scene.contents.write(&scene.guest, "vdb", 4 * MIB as usize, 512, 9);

    let snapshot = back_up(&scene, &[]);

    assert_reads_little(&scene, &snapshot);
    assert!(disk(&snapshot, "vdb")["bytes_changed"].as_u64() >= Some(MIB), "{snapshot}");
}

#[test]
fn r22_a_backup_without_the_overlay_in_between_does_not_lead_astray() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    scene.contents.scribble(&scene.guest, 2);
    let other = scene.ok("backup", &["--method", "pull"]).remove(0);
    scene.host.assert_holds(&other, &scene.contents);
    assert_kinds(&other, "rescan");
    scene.contents.scribble(&scene.guest, 3);

    let next = back_up(&scene, &[]);

    assert_kinds(&next, "incremental");
    assert_says(&scene.try_run("create", &[]), 1, "tracked by overlays");
}

// ---- faults -------------------------------------------------------------------------------------

/// A backup that is good, and says this.
#[track_caller]
fn back_up_that_says(scene: &Scene, words: &str) -> Value {
    let outcome = scene.try_run("backup", &[]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains(words), "{words}: {outcome:?}");
    let snapshot = lines(&outcome).remove(0);
    scene.host.assert_holds(&snapshot, &scene.contents);
    snapshot
}

/// The overlays are in place, of the same inode, and hold nothing or not all of what changed.
#[test]
fn p1_an_overlay_above_an_image_that_was_written_to_is_not_believed() {
    let Some(mut scene) = scene() else { return };
    let first = back_up(&scene, &[]);
    scene.contents.scribble(&scene.guest, 2);
    scene.guest.quit();
    for name in DISKS {
        let mut commit = Command::new("qemu-img");
        commit.args(["commit", "-q", text(disk(&first, name), "overlay")]);
        tool(commit);
    }
    let successor = start_on_overlays(&scene, &first);
    scene.contents.scribble(&successor, 3);

    let second = back_up_that_says(&scene, "was written to beneath the overlay");

    assert_kinds(&second, "rescan");
    assert_tracked(&scene, &second);
    scene.contents.scribble(&successor, 4);
    let third = scene.ok("backup", &[]).remove(0);
    assert_reads_little(&scene, &third);
    successor.quit();
    let astray = start_on_images(&scene);
    let beyond = 6 * MIB as usize;
    DISKS.iter().for_each(|disk| scene.contents.write(&astray, disk, beyond, 512, 9));
    astray.quit();
    let successor = start_on_overlays(&scene, &third);

    let fourth = back_up_that_says(&scene, "was written to beneath the overlay");

    assert_kinds(&fourth, "rescan");
    assert_kinds(&scene.ok("backup", &[]).remove(0), "incremental");
    scene.ok("purge", &[]);
    assert_eq!(scene.records(), Vec::<PathBuf>::new());
    successor.quit();
    scene.assert_holds();
}

/// QEMU is killed while it writes an overlay back: its image has no mark then.
#[test]
fn p1_an_image_that_was_written_to_between_two_parts_of_its_overlay_is_not_believed() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 2 * MIB as usize, 3);
    let second = back_up(&scene, &SLOW_SINK);
    assert_eq!(scene.records().len(), 2, "the older overlay is being written back");
    flush(&scene.guest);
    scene.guest.kill();
    let astray = start_on_images(&scene);
    let beyond = 6 * MIB as usize;
    DISKS.iter().for_each(|disk| scene.contents.write(&astray, disk, beyond, 512, 9));
    astray.quit();
    let successor = start_on_overlays(&scene, &second);

    // What is known by now stays known, though this run writes the older overlay back and then ends.
    let mut running = spawn(scene.command("backup", &["--limit-read", "64KiB"]));
    wait_until(WAIT, "it reads", || {
        assert!(!running.has_ended(), "it ended too early");
        scene.host.undo_records() == 1 && successor.active_node("vdb").contains("kvmsnap")
    });
    signal(running.pid(), Signal::SIGINT);
    let interrupted = finish(running);

    assert_eq!(interrupted.code, Some(130), "{interrupted:?}");
    let third = back_up_that_says(&scene, "was written to beneath the overlay");
    assert_eq!(kinds(&third)["vda"], "rescan", "{third}");
    scene.contents.scribble(&successor, 4);
    let fourth = scene.ok("backup", &[]).remove(0);
    assert_reads_little(&scene, &fourth);
    scene.ok("purge", &[]);
    assert_eq!(scene.records(), Vec::<PathBuf>::new());
    successor.quit();
    scene.assert_holds();
}

/// QEMU puts nothing above a disk on which a job runs.
#[test]
fn r13_a_backup_that_comes_too_early_says_so_and_the_next_is_incremental() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 2 * MIB as usize, 3);
    scene.ok("backup", &SLOW_SINK);
    scene.contents.scribble(&scene.guest, 4);

    let early = scene.try_run("backup", &SLOW_SINK);

    assert_says(&early, 1, "is still being written back");
    assert_eq!((scene.records().len(), scene.host.undo_records()), (2, 0));
    hurry(&scene);
    wait_until(WAIT, "it is written back", || {
        let jobs = scene.guest.qmp_command("query-jobs", &json!({}));
        jobs.as_array().expect("a list").iter().all(|job| job["status"] == "concluded")
    });

    let next = scene.ok("backup", &[]).remove(0);

    assert_reads_little(&scene, &next);
    assert_tracked(&scene, &next);
}

/// To tell an overlay of another image beneath it rewrites its header, also where another one lies above.
#[test]
fn r09_p3_an_overlay_that_found_no_room_beneath_goes_there_later_and_all_are_believed() {
    let host = Host::new();
    let small = SmallDisk::mount(&host.folder().join("images"), 32 * MIB);
    let overlays = host.folder().join("overlays");
    fs::create_dir(&overlays).expect("a new folder");
    let image = small.folder().join("vda.raw");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "raw"]).arg(&image).arg(SIZE.to_string());
    tool(make);
    let qmp = host.folder().join("qmp");
    let disk = Disk::existing("vda", &image, Format::Raw);
    let Some(guest) = plan(&qmp, [disk]).uuid(UUID).boot() else { return };
    let mut scene = Scene { host, guest, contents: Contents::new(&["vda"], SIZE), qmp };
    let elsewhere = ["--overlay-dir", overlays.to_str().expect("a plain path")];
    let slowly = [&elsewhere[..], &["--limit-rate", "16MiB"]].concat();
    back_up(&scene, &elsewhere);
    scene.contents.write_noise(&scene.guest, "vda", 0, 6 * MIB as usize, 3);
    small.resize(4 * MIB);
    for turn in 4..6 {
        assert_says(&scene.try_run("backup", &slowly), 1, "the backup is good, but");
        scene.contents.write(&scene.guest, "vda", 7 * MIB as usize, 512, turn);
    }
    assert_eq!(files_in(&overlays, "kvmsnap-").len(), 2, "one found no room, one is on top");
    let slow = [&elsewhere[..], &["--limit-read", "64KiB"]].concat();
    let mut running = spawn(scene.command("backup", &slow));
    let frozen = || files_in(&overlays, "kvmsnap-").len() == 3;
    wait_until(WAIT, "a third one is on top", || {
        assert!(!running.has_ended(), "it ended too early");
        frozen() && scene.host.undo_records() == 1
    });
    small.resize(32 * MIB);
    let roomy = finish(running);
    assert_eq!(roomy.code, Some(0), "{roomy:?}");
    scene.contents.write(&scene.guest, "vda", 7 * MIB as usize, 512, 6);

    let next = scene.ok("backup", &elsewhere).remove(0);

    assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
    assert!(
        integration::restored::disk(&next, "vda")["bytes_read"].as_u64() <= Some(READ_MAX),
        "{next}"
    );
    scene.host.assert_holds(&next, &scene.contents);
    scene.ok("purge", &[]);
    assert_eq!(files_in(&overlays, "kvmsnap-"), Vec::<PathBuf>::new());
}

#[test]
fn r09_the_room_between_two_backups_is_told_of_before_it_ends() {
    let host = Host::new();
    let small = SmallDisk::mount(&host.folder().join("images"), 18 * MIB);
    let image = small.folder().join("vda.raw");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "raw"]).arg(&image).arg(SIZE.to_string());
    tool(make);
    let qmp = host.folder().join("qmp");
    let disk = Disk::existing("vda", &image, Format::Raw);
    let Some(guest) = plan(&qmp, [disk]).uuid(UUID).boot() else { return };
    let mut scene = Scene { host, guest, contents: Contents::new(&["vda"], SIZE), qmp };
    let little = ["--reserve", "64KiB"];
    back_up(&scene, &little);
    scene.contents.write_noise(&scene.guest, "vda", 0, 6 * MIB as usize, 3);

    let tight = scene.try_run("backup", &little);

    assert_eq!(tight.code, Some(0), "{tight:?}");
    assert!(tight.stderr.contains("were written since the last backup"), "{tight:?}");
    let doctor = scene.host.run(["doctor"]);
    assert!(doctor.code == Some(0) && doctor.stdout.contains("are left for it"), "{doctor:?}");
    scene.contents.write_noise(&scene.guest, "vda", 0, 6 * MIB as usize, 4);
    let doctor = scene.host.run(["doctor"]);
    assert!(doctor.code == Some(1) && doctor.stdout.contains("make room there"), "{doctor:?}");
    let status = scene.host.run(["status", "--json"]);
    let lines = lines(&status);
    let machine = lines.iter().find(|line| line["uuid"] == UUID).expect("its line");
    let fill = &machine["overlays"][0];
    assert!(fill["is_low"] == true && fill["holds"].as_u64() >= Some(6 * MIB), "{machine}");
    small.resize(64 * MIB);
    let doctor = scene.host.run(["doctor"]);
    assert_eq!(doctor.code, Some(0), "{doctor:?}");
    scene.ok("purge", &[]);
    assert_eq!(files_in(small.folder(), "kvmsnap-"), Vec::<PathBuf>::new());
}

#[test]
fn r23_nobody_is_told_to_delete_an_overlay_on_which_the_guest_runs() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 2 * MIB as usize, 3);
    assert_says(&scene.try_run("purge", &HASTY), 1, "was not brought back in time");

    let doctor = scene.host.run(["doctor"]);
    let outcome = scene.try_run("backup", &[]);

    assert!(doctor.stdout.contains("a create or purge of it did not end"), "{doctor:?}");
    assert!(outcome.stderr.contains("a purge of it did not end"), "{outcome:?}");
    assert!(!outcome.stderr.contains("delete"), "{outcome:?}");
    scene.ok("purge", &[]);
    scene.assert_back();
    back_up(&scene, &[]);
    let above = json!({
        "node-name": scene.guest.active_node("vda"), "snapshot-node-name": "mine",
        "snapshot-file": scene.guest.folder().join("mine.qcow2"),
    });
    scene.guest.qmp_command("blockdev-snapshot-sync", &above);

    let outcome = scene.try_run("backup", &[]);

    assert!(outcome.stderr.contains("another image above its overlay"), "{outcome:?}");
    assert!(!outcome.stderr.contains("delete"), "{outcome:?}");
}

/// QEMU runs one job on a disk.
#[test]
fn p3_a_purge_waits_for_what_the_last_backup_still_has_written_back() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 2 * MIB as usize, 3);
    back_up(&scene, &SLOW_SINK);
    assert_eq!(scene.records().len(), 2, "the older overlay is being written back");
    let doctor = scene.host.run(["doctor"]);
    assert!(doctor.stdout.contains("which the next backup does"), "{doctor:?}");

    let purge = spawn(scene.command("purge", &[]));
    hurry(&scene);
    let purged = finish(purge);
    assert_eq!(purged.code, Some(0), "{purged:?}");

    scene.assert_back();
    scene.assert_holds();
}

/// The backup is good, the overlay stays, and the other disk's goes.
#[test]
fn internal_snapshots_in_an_overlay_that_tracks_are_not_deleted_with_it() {
    let Some(mut scene) = scene() else { return };
    let first = back_up(&scene, &[]);
    let snapshot = json!({"device": scene.guest.active_node("vda"), "name": "mine"});
    scene.guest.qmp_command("blockdev-snapshot-internal-sync", &snapshot);
    scene.contents.scribble(&scene.guest, 2);

    let outcome = scene.try_run("backup", &[]);

    assert_says(&outcome, 1, "internal snapshots");
    let last = scene.host.list().pop().expect("a snapshot");
    scene.host.assert_holds(&last, &scene.contents);
    let stays = |name| Path::new(text(disk(&first, name), "overlay")).exists();
    assert!(stays("vda"), "it holds a snapshot");
}

#[test]
fn p3_a_killed_backup_loses_nothing_and_the_next_is_incremental() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    for (turn, kill_qemu) in [(2, false), (4, true)] {
        scene.contents.scribble(&scene.guest, turn);
        let mut running = spawn(scene.command("backup", &["--limit-read", "64KiB"]));
        wait_until(WAIT, "it reads", || {
            assert!(!running.has_ended(), "it ended too early");
            files_in(scene.guest.folder(), "kvmsnap-").len() == 4
                && scene.guest.qmp_command("query-jobs", &json!({})) == json!([])
                && scene.records().len() == 2
        });
        signal(running.pid(), Signal::SIGKILL);
        finish(running);
        scene.contents.scribble(&scene.guest, turn + 1);
        if kill_qemu {
            flush(&scene.guest);
            scene.guest.kill();
            wait_until(WAIT, "the fresh overlays are written back", || scene.records().len() == 1);
            let last = scene.host.list().pop().expect("a snapshot");
            let successor = start_on_overlays(&scene, &last);
            let next = scene.ok("backup", &[]).remove(0);
            assert_kinds(&next, "incremental");
            scene.host.assert_holds(&next, &scene.contents);
            assert_tracked(&scene, &next);
            successor.quit();
            return;
        }
        let next = scene.ok("backup", &[]).remove(0);
        assert_kinds(&next, "incremental");
        scene.host.assert_holds(&next, &scene.contents);
        assert_tracked(&scene, &next);
    }
}

#[test]
fn r23_a_guest_restarted_on_its_own_images_keeps_its_overlay_and_the_operator_is_told() {
    let Some(mut scene) = scene() else { return };
    let first = back_up(&scene, &[]);
    scene.contents.scribble(&scene.guest, 2);
    scene.guest.kill();
    let successor = start_on_images(&scene);
    successor.qemu_io("vda", "write -P 9 0 64k");

    let outcome = scene.try_run("backup", &TRACKING);

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("runs without its overlay"), "{outcome:?}");
    let next: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
    assert_kinds(&next, "rescan");
    assert_tracked(&scene, &first);
    successor.quit();
}

#[test]
fn r01_a_tracked_backup_killed_or_failing_at_each_effect_loses_nothing() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    let count = scene.host.effects(scene.command("backup", &[])).len();
    for n in 1..=count {
        let fault = if n % 3 == 0 { Fault::FailOnce } else { Fault::Crash };
        let case = format!("{fault:?} at {n} of {count}");
        scene.contents.scribble(&scene.guest, 3 * n);
        let faulty = fault.at(n, scene.command("backup", &[]));

        let outcome = finish(spawn(faulty));

        scene.host.assert_honest(&case, fault, &outcome, &scene.contents);
        assert_eq!(scene.guest.status(), "running", "{case}");
        scene.contents.scribble(&scene.guest, 3 * n + 1);
        let next = scene.try_run("backup", &[]);
        assert!(next.stdout.contains("\"kind\":\"incremental\""), "{case}: {outcome:?} {next:?}");
        let next = lines(&next).remove(0);
        scene.host.assert_holds(&next, &scene.contents);
        assert_tracked(&scene, &next);
    }
    scene.ok("purge", &[]);
    scene.assert_back();
    scene.assert_holds();
}
