//! `backup --method overlay` on a QEMU that nothing manages: the guest writes to overlays while its images
//! are read, then it goes back to them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use integration::faults::{Fault, SmallDisk, assert_says, kinds, signal, wait_until};
use integration::overlays::{HASTY, SIZE, Scene, convert, lines, plan};
use integration::restored::text;
use integration::{Host, Running, assert_guest_is_free, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::oracle::{Load, judge};
use vm_fixtures::{Disk, Format, Guest, MIB};

const OVERLAY: [&str; 2] = ["--method", "overlay"];
/// Machines that are tested at once: a round waits more than it works.
const WORKERS: usize = 4;
const WAIT: Duration = Duration::from_secs(120);

/// A machine with a qcow2 disk and a raw one, and a repository.
fn scene() -> Option<Scene> {
    let scene = Scene::new()?;
    scene.host.ok(["repository", "init"]);
    Some(scene)
}

/// Backs up, which must succeed, and compares what was stored with what the guest wrote.
#[track_caller]
fn back_up(scene: &Scene, more: &[&str]) -> Value {
    let snapshot = scene.ok("backup", more).remove(0);
    scene.host.assert_holds(&snapshot, &scene.contents);
    snapshot
}

/// A backup that takes its time, reading: much more than any test has it.
fn slow_backup(scene: &Scene, more: &[&str]) -> Running {
    let slow = [&OVERLAY[..], &["--limit-read", "32KiB"], more].concat();
    let mut running = spawn(scene.command("backup", &slow));
    wait_until(WAIT, "the guest writes to overlays", || {
        assert!(!running.has_ended(), "it ended too early");
        scene.guest.active_node("vdb").contains("kvmsnap")
    });
    running
}

// ---- the story ----------------------------------------------------------------------------------

#[test]
fn p1_p7_frozen_images_are_stored_whole_and_the_guest_goes_back_to_them() {
    let Some(mut scene) = scene() else { return };

    let first = back_up(&scene, &OVERLAY);
    scene.assert_back();
    scene.contents.scribble(&scene.guest, 2);
    let second = back_up(&scene, &OVERLAY);
    scene.assert_back();

    let ready = scene.guest.wait_event("BLOCK_JOB_READY", WAIT);
    assert_eq!(ready["data"]["speed"], 200 * MIB, "unless told otherwise: {ready}");
    assert!(first["longest_stall_ms"].is_u64(), "{first}");
    assert_eq!((text(&first, "method"), text(&first, "kind")), ("overlay", "full"));
    assert_eq!((text(&second, "method"), text(&second, "kind")), ("overlay", "rescan"));
    for disk in second["disks"].as_array().expect("disks") {
        let (read, stored) = (disk["bytes_read"].as_u64(), disk["bytes_stored"].as_u64());
        assert!(stored < Some(MIB / 16) && read > stored, "only what differs is stored: {disk}");
    }
    let folder = scene.host.restore_by_restic(&second);
    scene.contents.assert_restored(&folder);
    scene.host.assert_restic_is_content();
    scene.host.assert_nothing_left();
    scene.contents.scribble(&scene.guest, 3);
    scene.assert_holds();
}

#[test]
fn p1_a_guest_that_writes_all_the_time_is_stored_as_it_was_at_one_instant() {
    let plan = Guest::builder().disk(Disk::new("vda", SIZE)).disk(Disk::new("vdb", SIZE).raw());
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    let load = guest.start_load(&Load::default().mixed().depth(2), &["vda", "vdb"]);
    for _ in 0..3 {
        let acked = guest.oracle_log().acked();
        let snapshot = host.backup(&guest, &[&OVERLAY[..], &["--quiesce", "require"]].concat());
        let issued = guest.oracle_log().issued();
        assert_eq!(text(&snapshot, "consistency"), "filesystem");
        let folder = host.restore(text(&snapshot, "id"));
        let disks = ["vda.raw", "vdb.raw"].map(|disk| folder.join(disk));
        let verdict = judge(&[(0, &disks[0]), (1, &disks[1])], &guest.oracle_log()).expect("disks");
        verdict.assert_instant_between(acked, issued);
    }
    let log = load.stop();
    guest.shut_down();
    let vda = convert(&guest.disk_path("vda"), "qcow2", host.folder());
    let verdict = judge(&[(0, &vda), (1, &guest.disk_path("vdb"))], &log).expect("images");
    verdict.assert_instant_between(log.acked(), log.issued());
    host.assert_nothing_left();
}

#[test]
fn p3_dirty_bitmaps_count_through_a_backup_by_overlays() {
    let Some(mut scene) = scene() else { return };
    back_up(&scene, &[]);
    scene.contents.write(&scene.guest, "vda", 0, MIB as usize, 7);

    back_up(&scene, &OVERLAY);
    scene.contents.write(&scene.guest, "vda", 4 * MIB as usize, MIB as usize, 8);
    let after = back_up(&scene, &["--method", "bitmap"]);

    assert_eq!(kinds(&after)["vda"], "incremental", "{after}");
    assert_eq!(after["disks"][0]["bytes_changed"], 2 * MIB, "since the first backup: {after}");
    scene.assert_back();
}

/// A raw image of fives, beneath so many others; the last one is the top.
fn chain(folder: &Path, count: usize) -> PathBuf {
    let mut image = folder.join(format!("{count}.raw"));
    fs::write(&image, vec![5; MIB as usize]).expect("an image");
    for index in 1..count {
        let above = folder.join(format!("{count}-{index}"));
        let format = if index == 1 { "raw" } else { "qcow2" };
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]).arg(&image).arg(&above);
        tool(create);
        image = above;
    }
    image
}

#[test]
fn p1_what_lies_beneath_many_images_is_stored_or_the_backup_refused() {
    let host = Host::new();
    let qmp = host.folder().join("qmp");
    let boot = |count: usize| {
        let top = chain(host.folder(), count);
        plan(&qmp, [Disk::existing("vda", &top, Format::Qcow2)]).boot()
    };
    let Some(guest) = boot(64) else { return };
    let snapshot = host.backup(&guest, &OVERLAY);
    let restored = fs::read(host.restore(text(&snapshot, "id")).join("vda.raw")).expect("a disk");
    assert!(restored == vec![5; MIB as usize], "the lowest image was stored");
    host.assert_nothing_left();
    guest.quit();

    let guest = boot(65).expect("QEMU is there");
    let refused = host.try_backup(&guest, &OVERLAY);

    assert_says(&refused, 1, "disk `vda` has more than 64 images");
    assert_guest_is_free(&guest, &["vda"]);
    host.assert_nothing_left();
}

#[test]
fn r23_overlays_in_memory_are_warned_of_and_never_stay() {
    let Some(scene) = scene() else { return };
    let memory = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let folder = memory.path().to_str().expect("a plain path");

    let created = scene.try_run("create", &["--overlay-dir", folder]);
    scene.ok("purge", &[]);
    let tracked = scene.try_run("backup", &["--tracking", "overlay", "--overlay-dir", folder]);

    assert_eq!(created.code, Some(0), "{created:?}");
    assert!(created.stderr.contains("lost when the host restarts"), "{created:?}");
    assert_says(&tracked, 1, "lost when the host restarts");
    scene.assert_back();
}

#[test]
fn an_overlay_backup_leaves_the_overlays_of_a_user_alone() {
    let Some(scene) = scene() else { return };
    scene.ok("create", &[]);

    let outcome = scene.try_run("backup", &OVERLAY);

    assert_says(&outcome, 1, "hold still already");
    assert_eq!((scene.records().len(), scene.overlays().len()), (1, 2));
    let dry = scene.ok("backup", &["--dry-run"]);
    assert_eq!(text(&dry[0], "method"), "pull");
    scene.ok("purge", &[]);
    scene.assert_back();
}

// ---- runs that end early ------------------------------------------------------------------------

#[test]
fn p3_what_a_killed_backup_leaves_the_next_one_ends() {
    let Some(mut scene) = scene() else { return };
    let running = slow_backup(&scene, &[]);
    signal(running.pid(), Signal::SIGKILL);
    finish(running);
    scene.contents.scribble(&scene.guest, 2);

    let next = back_up(&scene, &OVERLAY);

    assert_eq!(text(&next, "kind"), "full", "the killed one was never recorded");
    scene.assert_back();
    scene.contents.scribble(&scene.guest, 3);
    scene.assert_holds();
}

#[test]
fn p3_without_a_next_run_the_guard_brings_the_guest_back() {
    let Some(mut scene) = scene() else { return };
    let running = slow_backup(&scene, &[]);
    signal(running.pid(), Signal::SIGKILL);
    finish(running);
    scene.contents.scribble(&scene.guest, 2);

    wait_until(WAIT, "the guest is back", || scene.records().is_empty());

    wait_until(WAIT, "the run is forgotten", || scene.host.undo_records() == 0);
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r02_a_guest_killed_in_a_backup_finds_all_in_its_own_image() {
    let Some(mut scene) = scene() else { return };
    let running = slow_backup(&scene, &[]);
    scene.contents.scribble(&scene.guest, 2);
    ["vda", "vdb"].iter().for_each(|disk| drop(scene.guest.qemu_io(disk, "flush")));

    scene.guest.kill();

    let outcome = finish(running);
    assert_says(&outcome, 1, "died during the backup");
    wait_until(WAIT, "the overlays are written back", || scene.overlays().is_empty());
    wait_until(WAIT, "the run is forgotten", || scene.host.undo_records() == 0);
    assert_eq!(scene.records().len(), 0);
    scene.assert_holds();
}

#[test]
fn p2_an_interrupted_backup_brings_the_guest_back() {
    let Some(mut scene) = scene() else { return };
    let running = slow_backup(&scene, &[]);
    scene.contents.scribble(&scene.guest, 2);

    signal(running.pid(), Signal::SIGINT);

    assert_eq!(finish(running).code, Some(130));
    scene.assert_back();
    assert_eq!(scene.host.list().len(), 0);
    scene.assert_holds();
}

#[test]
fn p2_a_second_interrupt_leaves_the_guest_on_its_overlays_and_waits_no_longer() {
    let Some(mut scene) = scene() else { return };
    let slow = ["--limit-read", "32KiB", "--limit-rate", "256KiB"];
    let running = spawn(scene.command("backup", &[&OVERLAY[..], &slow].concat()));
    wait_until(WAIT, "the guest writes to overlays", || {
        scene.guest.active_node("vdb").contains("kvmsnap")
    });
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    signal(running.pid(), Signal::SIGINT);
    let jobs = || scene.guest.qmp_command("query-block-jobs", &json!({}));
    wait_until(WAIT, "the guest is on its way back", || jobs() != json!([]));

    signal(running.pid(), Signal::SIGINT);

    let begun = Instant::now();
    let outcome = finish(running);
    // At this rate the way back would take more than sixteen.
    assert!(begun.elapsed() < Duration::from_secs(12), "{outcome:?}");
    assert_eq!(outcome.code, Some(130), "{outcome:?}");
    assert!(outcome.stderr.contains("kvmsnap purge"), "{outcome:?}");
    assert_eq!((scene.records().len(), scene.host.undo_records()), (1, 0));
    scene.ok("purge", &[]);
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r13_a_backup_whose_guest_cannot_be_brought_back_in_time_is_kept_and_says_so() {
    let Some(mut scene) = scene() else { return };
    let slow = [&OVERLAY[..], &HASTY, &["--limit-read", "512KiB"]].concat();
    let before = scene.contents.clone();
    let mut running = spawn(scene.command("backup", &slow));
    wait_until(WAIT, "the guest writes to overlays", || {
        assert!(!running.has_ended(), "it ended too early");
        scene.guest.active_node("vdb").contains("kvmsnap")
    });
    signal(running.pid(), Signal::SIGSTOP);
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    signal(running.pid(), Signal::SIGCONT);

    let outcome = finish(running);

    assert_says(&outcome, 1, "the backup is good, but");
    assert!(outcome.stderr.contains("kvmsnap purge"), "{outcome:?}");
    let snapshot = &lines(&outcome)[0];
    scene.host.assert_holds(snapshot, &before);
    assert_eq!((scene.records().len(), scene.host.undo_records()), (1, 0));
    let doctor = scene.host.run(["doctor"]);
    assert!(doctor.stdout.contains("could not bring the guest back"), "{doctor:?}");
    assert_eq!(doctor.code, Some(1));
    scene.contents.scribble(&scene.guest, 4);
    scene.host.ok(["doctor", "--repair"]);
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r10_a_backup_by_overlays_ends_while_it_reads_when_their_room_does() {
    let Some(mut scene) = scene() else { return };
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    let small = SmallDisk::mount(&scene.host.folder().join("small"), 64 * MIB);
    let folder = small.folder().to_str().expect("a plain path");
    let running = slow_backup(&scene, &["--overlay-dir", folder, "--reserve", "1MiB"]);

    fs::write(small.folder().join("other"), vec![1; 56 * MIB as usize]).expect("room for it");

    let begun = Instant::now();
    let outcome = finish(running);
    // To read it all takes two minutes.
    assert!(begun.elapsed() < Duration::from_secs(30), "{outcome:?}");
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains(folder) && outcome.stderr.contains("roomier"), "{outcome:?}");
    scene.assert_back();
    assert_eq!(scene.host.list().len(), 0);
}

// ---- R01 ----------------------------------------------------------------------------------------

#[test]
fn r01_the_effects_of_a_backup_by_overlays_are_known() {
    let Some(scene) = scene() else { return };
    let effects = scene.host.effects(scene.command("backup", &OVERLAY));
    let own = |effect: &&String| !effect.starts_with("repository: ");
    let recorded = effects.iter().position(|effect| effect == "repository: write snapshot");
    let (taken, back) = effects.split_at(recorded.expect("it is recorded"));
    let taken: Vec<&str> = taken.iter().filter(own).map(String::as_str).collect();
    let per_disk = |effects: &[&'static str]| [effects, effects].concat();
    let expected = [
        vec!["journal: write", "guard: start", "overlays: record"],
        per_disk(&["overlay: create"]),
        vec!["overlays: record"],
        per_disk(&["qmp: blockdev-add"]),
        vec!["journal: write", "qmp: transaction", "journal: write"],
        vec!["overlays: record", "socket: create", "storage daemon: start", "journal: write"],
    ];
    assert_eq!(taken, expected.concat());
    // What a purge does, and nothing of it before the backup is recorded.
    let done = |wanted: &str| back.iter().filter(|effect| *effect == wanted).count();
    assert_eq!((done("qmp: block-commit"), done("overlay: delete")), (2, 2), "{back:?}");
    assert_eq!(back.last().map(String::as_str), Some("journal: clear"));
}

/// The faults of one worker out of [`WORKERS`], on a machine of its own.
fn sweep(worker: usize) {
    let Some(mut scene) = scene() else { return };
    let count = scene.host.effects(scene.command("backup", &OVERLAY)).len();
    for n in (1..=count).filter(|n| n % WORKERS == worker) {
        // One that fails is undone by itself, which other tests show: here and there will do.
        let faults = [Fault::Crash, Fault::FailOnce].into_iter().take(1 + usize::from(n % 4 == 0));
        for fault in faults {
            let case = format!("{fault:?} at {n}");
            scene.contents.scribble(&scene.guest, 3 * n);
            let faulty = fault.at(n, scene.command("backup", &OVERLAY));

            let outcome = finish(spawn(faulty));

            scene.host.assert_honest(&case, fault, &outcome, &scene.contents);
            assert_eq!(scene.guest.status(), "running", "{case}");
            scene.contents.scribble(&scene.guest, 3 * n + 1);
            back_up(&scene, &OVERLAY);
            scene.assert_back();
            scene.host.assert_nothing_left();
        }
    }
    scene.assert_holds();
}

#[test]
fn r01_a_backup_killed_or_failing_at_each_effect_is_mended_by_the_next() {
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..WORKERS).map(|worker| scope.spawn(move || sweep(worker))).collect();
        workers.into_iter().for_each(|worker| worker.join().expect("a sweep without a failure"));
    });
}
