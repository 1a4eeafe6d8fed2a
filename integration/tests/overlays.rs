//! `create` and `purge` on a QEMU that nothing manages: images that hold still, and the way back.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use integration::faults::{Contents, SmallDisk, assert_goes_on, assert_says, signal, wait_until};
use integration::overlays::{
    DISKS, HASTY, SIZE, STOPPED, Scene, assert_tells_stall, convert, files_in, first_difference,
    plan,
};
use integration::restored::text;
use integration::{Host, assert_guest_is_free, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::oracle::{Load, judge};
use vm_fixtures::{Disk, Format, Guest, MIB};

const WAIT: Duration = Duration::from_secs(120);
/// Tools that copy files. To rsync one of the same size and second is the same, unless told otherwise.
const FOREIGN: [&[&str]; 2] = [&["cp"], &["rsync", "--ignore-times"]];

// ---- the story ----------------------------------------------------------------------------------

#[test]
fn images_hold_still_for_foreign_tools_while_the_guest_goes_on() {
    let Some(mut scene) = Scene::new() else { return };
    let before = scene.contents.clone();

    let created = scene.ok("create", &[]);

    assert_eq!(created.len(), 2);
    scene.contents.scribble(&scene.guest, 2);
    for (line, format) in created.iter().zip(["qcow2", "raw"]) {
        let (disk, frozen) = (text(line, "disk"), Path::new(text(line, "frozen")));
        assert_eq!(frozen, scene.guest.disk_path(disk));
        assert_eq!((text(line, "format"), text(line, "consistency")), (format, "crash"));
        assert_eq!(line["already"], json!(false));
        let copy = scene.host.folder().join("foreign");
        fs::copy(frozen, &copy).expect("a copy by the system");
        let copy = convert(&copy, format, scene.host.folder());
        assert_eq!(first_difference(&copy, before.of(disk)), None, "a plain copy of {disk}");
        let by_tool = convert(frozen, format, scene.host.folder());
        assert_eq!(first_difference(&by_tool, before.of(disk)), None, "a convert of {disk}");
        let overlay = fs::metadata(text(line, "overlay")).expect("an overlay");
        assert_eq!(overlay.permissions().mode() & 0o777, 0o600);
        assert!(overlay.blocks() * 512 >= SIZE, "room is reserved");
    }
    let again = scene.ok("create", &[]);
    assert_eq!(again[0]["already"], json!(true));
    assert_eq!(again[0]["time"], created[0]["time"]);

    let purged = scene.ok("purge", &[]);

    assert!(purged.iter().all(|line| line["bytes"].as_u64() > Some(0)), "{purged:?}");
    scene.assert_back();
    scene.contents.scribble(&scene.guest, 3);
    assert_eq!(scene.ok("purge", &[]), Vec::<Value>::new(), "nothing is left to purge");
    scene.assert_holds();
}

/// A loop device, which is to QEMU what a logical volume is; gone with this value.
struct BlockDevice(PathBuf);

impl BlockDevice {
    fn on(file: &Path) -> Self {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]).arg(file);
        let name = String::from_utf8(tool(losetup).stdout).expect("a path");
        Self(PathBuf::from(name.trim()))
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_holds_still_and_takes_back_what_the_guest_wrote() {
    let host = Host::without_repository();
    let image = host.folder().join("volume");
    fs::write(&image, vec![0x11; SIZE as usize]).expect("room for a small disk");
    let device = BlockDevice::on(&image);
    let node = json!({"driver": "raw", "node-name": "volume",
        "file": {"driver": "host_device", "filename": device.0}});
    let plan = Guest::without_os().args(["-blockdev".to_owned(), node.to_string()]);
    let plan = plan.args(["-device", "virtio-blk-pci,drive=volume,id=vda"]);
    let Some(guest) = plan.boot() else { return };
    let overlays = host.folder().join("overlays");
    fs::create_dir(&overlays).expect("a new folder");
    let scene = Scene::of(guest, host);
    let guest_does = |what: &str| {
        let line = format!("qemu-io -d /machine/peripheral/vda/virtio-backend \"{what}\"");
        scene.guest.qmp_command("human-monitor-command", &json!({"command-line": line}));
    };
    let first = || fs::read(&device.0).expect("root reads it")[..MIB as usize].to_vec();

    let created = scene.ok("create", &["--overlay-dir", overlays.to_str().expect("plain")]);

    guest_does("write -P 0x22 0 64k");
    assert_eq!(
        (text(&created[0], "frozen"), text(&created[0], "format")),
        (device.0.to_str().unwrap(), "raw")
    );
    assert_eq!(first(), vec![0x11; MIB as usize], "the device did not hold still");
    scene.ok("purge", &[]);
    guest_does("flush");
    assert_eq!(first()[..65536], vec![0x22; 65536], "what the guest wrote is not there");
    assert_eq!(first()[65536..], vec![0x11; MIB as usize - 65536]);
    assert!(files_in(&overlays, "").is_empty());
    scene.guest.quit();
}

#[test]
fn p1_ten_rounds_of_create_copy_and_purge_show_instants_of_a_working_guest() {
    let plan = Guest::builder().disk(Disk::new("vda", SIZE)).disk(Disk::new("vdb", SIZE).raw());
    let Some(guest) = plan.disk(Disk::new("vdc", SIZE)).boot() else { return };
    let qga = guest.qga();
    let scene = Scene::of(guest, Host::without_repository());
    let agent = ["--qga", qga.to_str().expect("a plain path"), "--quiesce", "require"];
    let load = scene.guest.start_load(&Load::default().mixed().depth(2), &DISKS);
    for round in 0..10 {
        let acked = scene.guest.oracle_log().acked();
        let created = scene.ok("create", &agent);
        let issued = scene.guest.oracle_log().issued();
        let mut copies = Vec::new();
        for (line, format) in created.iter().zip(["qcow2", "raw"]) {
            assert_eq!(text(line, "consistency"), "filesystem");
            let (frozen, disk) = (Path::new(text(line, "frozen")), text(line, "disk"));
            let copy = scene.host.folder().join(disk);
            let foreign = FOREIGN.get(round % 3);
            match foreign {
                Some(words) => {
                    let mut command = Command::new(words[0]);
                    command.args(&words[1..]).arg(frozen).arg(&copy);
                    tool(command);
                }
                None => {
                    let raw = convert(frozen, format, scene.host.folder());
                    fs::rename(raw, &copy).expect("ours");
                }
            }
            let format = if foreign.is_some() { format } else { "raw" };
            let raw = copy.with_extension("raw");
            fs::rename(convert(&copy, format, scene.host.folder()), &raw).expect("ours");
            copies.push(raw);
        }
        scene.ok("purge", &[]);
        scene.assert_back();
        let log = scene.guest.oracle_log();
        let verdict = judge(&[(0, &copies[0]), (1, &copies[1])], &log).expect("copies");
        verdict.assert_instant_between(acked, issued);
    }
    let log = load.stop();
    assert!(scene.guest.is_running());
    scene.ok("create", &agent);
    let has_job = || scene.guest.qmp_command("query-jobs", &json!({})) != json!([]);
    let qemu = ("vdc", scene.guest.pid());
    let records = scene.host.state().join("overlays");
    let purge = (scene.command("purge", &[]), &*records);
    assert_tells_stall(&scene.guest, qemu, purge, has_job);
    scene.assert_back();
    scene.guest.quit();
    let vda = convert(&scene.guest.disk_path("vda"), "qcow2", scene.host.folder());
    let verdict = judge(&[(0, &vda), (1, &scene.guest.disk_path("vdb"))], &log).expect("images");
    verdict.assert_instant_between(log.acked(), log.issued());
}

// ---- backups ------------------------------------------------------------------------------------

#[test]
fn p3_a_backup_after_create_and_purge_is_incremental_and_right() {
    let Some(guest) = Guest::without_os().disk(Disk::new("vda", SIZE)).boot() else { return };
    let (mut contents, scene) = (Contents::new(&["vda"], SIZE), Scene::of(guest, Host::new()));
    contents.scribble(&scene.guest, 1);
    scene.host.backup_and_compare(&scene.guest, &contents, &[]);
    scene.ok("create", &[]);
    contents.write(&scene.guest, "vda", 0, MIB as usize, 7);

    let meanwhile = scene.host.backup_and_compare(&scene.guest, &contents, &[]);
    contents.write(&scene.guest, "vda", 2 * MIB as usize, MIB as usize, 8);
    scene.ok("purge", &[]);
    contents.write(&scene.guest, "vda", 4 * MIB as usize, MIB as usize, 9);
    let after = scene.host.backup_and_compare(&scene.guest, &contents, &[]);

    assert_eq!(meanwhile["kind"], "rescan", "an overlay keeps no dirty bitmaps: {meanwhile}");
    assert_eq!(after["kind"], "incremental", "{after}");
    assert_eq!(after["disks"][0]["bytes_changed"], 3 * MIB, "since the first backup: {after}");
    scene.host.assert_all_clean(&scene.guest, &["vda"]);
}

// ---- a machine that ends in between -------------------------------------------------------------

#[test]
fn r23_a_guest_killed_on_its_overlay_is_brought_back_without_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    DISKS.iter().for_each(|disk| drop(scene.guest.qemu_io(disk, "flush")));
    scene.guest.kill();

    let purged = scene.ok("purge", &[]);

    assert_eq!(purged.len(), 2);
    assert_eq!(scene.overlays(), Vec::<PathBuf>::new());
    assert_eq!(scene.records(), Vec::<PathBuf>::new());
    scene.assert_holds();
}

#[test]
fn r23_a_guest_started_again_on_its_overlays_is_brought_back() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    scene.guest.quit();
    let successor = scene.start_on_overlays(&created);
    scene.contents.scribble(&successor, 3);
    scene.contents.write_noise(&successor, "vda", 0, 4 * MIB as usize, 3);

    let purged = scene.ok("purge", &STOPPED);

    assert_eq!(purged[0]["slowed"], json!(true), "{purged:?}");
    let blocks = successor.qmp_command("query-block", &json!({}));
    assert_eq!(blocks[0]["inserted"]["bps_wr"], json!(0), "it writes as it did");

    scene.contents.scribble(&successor, 4);
    successor.quit();
    scene.assert_holds();
}

#[test]
fn r23_a_guest_started_again_on_its_own_images_keeps_its_overlays_and_the_operator_is_told() {
    let Some(scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.guest.qemu_io("vda", "write -P 9 0 64k");
    scene.guest.kill();
    scene.guest.restart();

    let outcome = scene.try_run("purge", &[]);

    assert_says(&outcome, 1, "runs without its overlay");
    assert_eq!((scene.overlays().len(), scene.records().len()), (2, 1), "nothing was deleted");
    scene.guest.qemu_io("vda", "write -P 8 0 64k");
    scene.guest.quit();
    let outcome = scene.try_run("purge", &[]);
    assert_says(&outcome, 1, "was written to while it should hold still");
    assert_eq!((scene.overlays().len(), scene.records().len()), (2, 1), "nothing was deleted");
}

#[test]
fn r23_a_purge_that_gave_up_leaves_images_that_nobody_takes_for_still_or_for_unused() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    assert_says(&scene.try_run("purge", &HASTY), 1, "was not brought back in time");

    assert_says(&scene.try_run("create", &[]), 1, "do not hold still any more");

    // A guest that is started on its own images by mistake: what it writes there counts too.
    scene.guest.kill();
    scene.guest.restart();
    scene.guest.qemu_io("vda", "write -P 8 0 64k");
    scene.guest.quit();
    let outcome = scene.try_run("purge", &[]);
    assert_says(&outcome, 1, "cannot be told");
    assert_eq!((scene.overlays().len(), scene.records().len()), (2, 1), "nothing was deleted");
}

#[test]
fn r23_an_overlay_that_a_user_deleted_is_still_written_back_while_the_guest_runs() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    fs::remove_file(text(&created[0], "overlay")).expect("an overlay");

    scene.ok("purge", &[]);

    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r23_an_overlay_that_a_user_moved_is_asked_for_and_found_when_it_is_back() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    scene.guest.quit();
    let overlay = Path::new(text(&created[0], "overlay"));
    let moved = overlay.with_extension("moved");
    fs::rename(overlay, &moved).expect("an overlay");
    assert_says(&scene.try_run("purge", &[]), 1, "is gone");
    fs::write(overlay, "another file").expect("a file");
    assert_says(&scene.try_run("purge", &[]), 1, "is not the overlay that was made");
    fs::rename(&moved, overlay).expect("an overlay");

    scene.ok("purge", &[]);

    assert_eq!(scene.overlays(), Vec::<PathBuf>::new());
    scene.assert_holds();
}

// ---- room, time, others -------------------------------------------------------------------------

#[test]
fn r09_overlays_without_room_are_refused_before_anything_is_changed() {
    let Some(mut scene) = Scene::new() else { return };
    let small = SmallDisk::mount(&scene.host.folder().join("small"), 4 * MIB);
    let folder = small.folder().to_str().expect("a plain path");

    let outcome = scene.try_run("create", &["--overlay-dir", folder]);

    assert_says(&outcome, 1, "too little room");
    assert_eq!(files_in(small.folder(), ""), Vec::<PathBuf>::new());
    scene.assert_back();
    scene.contents.scribble(&scene.guest, 2);
    scene.assert_holds();
}

#[test]
fn r09_a_guest_whose_overlay_is_full_is_brought_back_and_loses_nothing() {
    let Some(mut scene) = Scene::new() else { return };
    let small = SmallDisk::mount(&scene.host.folder().join("small"), 4 * MIB);
    let folder = small.folder().to_str().expect("a plain path");
    scene.ok("create", &["--overlay-dir", folder, "--reserve", "64KiB"]);
    scene.contents.scribble(&scene.guest, 2);
    small.resize(3 * MIB);
    let full = scene.guest.qemu_io_unchecked("vda", "write -P 5 1M 7M");
    assert!(full.contains("No space left"), "{full}");

    scene.ok("purge", &[]);

    scene.assert_back();
    scene.contents.write(&scene.guest, "vda", MIB as usize, 7 * MIB as usize, 6);
    assert_eq!(files_in(small.folder(), ""), Vec::<PathBuf>::new());
    scene.assert_holds();
}

/// The overlay gives no room back before all of it is in the image beneath.
#[test]
fn r09_an_image_that_would_fill_its_file_system_is_written_back_once_there_is_room() {
    let host = Host::without_repository();
    let small = SmallDisk::mount(&host.folder().join("images"), 16 * MIB);
    let image = small.folder().join("vda.qcow2");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(SIZE.to_string());
    tool(make);
    let qmp = host.folder().join("qmp");
    let disk = Disk::existing("vda", &image, Format::Qcow2);
    let Some(guest) = plan(&qmp, [disk]).boot() else { return };
    let mut scene = Scene { host, guest, contents: Contents::new(&["vda"], SIZE), qmp };
    scene.ok("create", &["--reserve", "64KiB"]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 7 * MIB as usize, 3);

    let outcome = scene.try_run("purge", &["--limit-rate", "8MiB"]);

    assert_says(&outcome, 1, "would fill");
    assert!(outcome.stderr.contains("hint: nothing is lost"), "{outcome:?}");
    scene.contents.write(&scene.guest, "vda", 0, MIB as usize, 6);
    small.resize(64 * MIB);
    scene.ok("purge", &[]);
    assert_guest_is_free(&scene.guest, &["vda"]);
    assert_eq!(files_in(small.folder(), "kvmsnap-"), Vec::<PathBuf>::new());
    scene.guest.quit();
    let raw = convert(&image, "qcow2", scene.host.folder());
    assert_eq!(first_difference(&raw, scene.contents.of("vda")), None);
}

#[test]
fn r13_a_guest_that_cannot_be_brought_back_in_time_stays_and_the_next_purge_finishes() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    let limits = |scene: &Scene| {
        let blocks = scene.guest.qmp_command("query-block", &json!({}));
        blocks[0]["inserted"]["bps_wr"].clone()
    };

    let outcome = scene.try_run("purge", &HASTY);

    assert_says(&outcome, 1, "was not brought back in time");
    assert!(outcome.stderr.contains("hint: ") && outcome.stderr.contains("a second for now"));
    assert!(outcome.took < Duration::from_secs(60), "{:?}", outcome.took);
    assert_eq!(limits(&scene), json!(0), "the guest writes as it did");
    assert_eq!(scene.records().len(), 1);
    assert!(scene.guest.is_running());
    scene.contents.scribble(&scene.guest, 4);
    scene.ok("purge", &[]);
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r13_a_guest_is_stopped_for_the_last_of_it_no_longer_than_it_may() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);

    let purged = scene.ok("purge", &STOPPED);

    let pause = purged[0]["pause_ms"].as_u64().expect("it was stopped");
    assert!((1..10_000).contains(&pause), "{purged:?}");
    assert_eq!(scene.guest.status(), "running");
    scene.assert_back();
    scene.contents.scribble(&scene.guest, 4);
    scene.assert_holds();
}

#[test]
fn r13_p2_a_purge_killed_while_it_holds_the_guest_back_lets_it_go_on() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    let slow = ["--deadline", "0.8", "--max-pause", "600", "--limit-rate", "256KiB"];
    let running = spawn(scene.command("purge", &slow));
    wait_until(WAIT, "the guest stands still", || scene.guest.status() == "paused");

    signal(running.pid(), Signal::SIGKILL);

    finish(running);
    assert_goes_on(&scene.guest);
    scene.contents.scribble(&scene.guest, 4);
    scene.ok("purge", &[]);
    let blocks = scene.guest.qmp_command("query-block", &json!({}));
    assert_eq!(blocks[0]["inserted"]["bps_wr"], json!(0), "the guest writes as it did");
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r16_of_two_purges_at_once_one_is_told_of_the_other() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);

    let slow = ["--limit-rate", "2MiB"];
    let running: Vec<_> = (0..2).map(|_| spawn(scene.command("purge", &slow))).collect();
    let outcomes: Vec<_> = running.into_iter().map(finish).collect();

    let codes: Vec<_> = outcomes.iter().map(|outcome| outcome.code).collect();
    assert!(codes.contains(&Some(0)) && codes.contains(&Some(11)), "{outcomes:?}");
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r23_a_purge_that_another_job_keeps_from_beginning_leaves_all_as_it_was() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, MIB as usize, 3);
    let mirror = json!({
        "job-id": "foreign", "device": scene.guest.active_node("vda"), "sync": "full", "speed": 1,
        "target": scene.host.folder().join("copy"),
    });
    scene.guest.qmp_command("drive-mirror", &mirror);

    let outcome = scene.try_run("purge", &[]);

    assert_says(&outcome, 1, "refused to write back the overlay");
    let record = fs::read_to_string(&scene.records()[0]).expect("a record");
    assert_eq!(record.matches(r#""stage": "above""#).count(), 2, "{record}");
    assert_eq!(scene.ok("create", &[])[0]["already"], json!(true), "its images hold still");
    scene.guest.qmp_command("block-job-cancel", &json!({"device": "foreign", "force": true}));
    wait_until(WAIT, "the other job is gone", || {
        scene.guest.qmp_command("query-block-jobs", &json!({})) == json!([])
    });
    scene.ok("purge", &[]);
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn a_foreign_overlay_is_written_back_only_when_it_is_adopted() {
    let Some(mut scene) = Scene::new() else { return };
    let foreign = scene.guest.folder().join("foreign.qcow2");
    let args = json!({
        "node-name": "vda-format", "snapshot-node-name": "foreign", "snapshot-file": foreign,
        "format": "qcow2",
    });
    scene.guest.qmp_command("blockdev-snapshot-sync", &args);
    scene.contents.scribble(&scene.guest, 2);
    assert_eq!(scene.ok("purge", &[]), Vec::<Value>::new());
    assert!(foreign.exists());

    scene.ok("purge", &["--adopt", foreign.to_str().expect("a plain path")]);

    assert!(!foreign.exists());
    scene.assert_back();
    scene.assert_holds();
}

// ---- R01 ----------------------------------------------------------------------------------------

/// A new effect does not come without its fault: the sweeps go through all of these.
#[test]
fn r01_the_effects_of_create_and_purge_are_known() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.host.effects(scene.command("create", &[]));
    scene.contents.scribble(&scene.guest, 2);
    let purged = scene.host.effects(scene.command("purge", &[]));
    let per_disk = |effects: &[&'static str]| [effects, effects].concat();
    let expected = [
        vec!["overlays: record"],
        per_disk(&["overlay: create"]),
        vec!["overlays: record"],
        per_disk(&["qmp: blockdev-add"]),
        vec!["qmp: transaction", "overlays: record"],
    ]
    .concat();
    assert_eq!(created, expected);
    let sorts = per_disk(&["qmp: block-latency-histogram-set"]);
    let back = [
        "overlays: record",
        "qmp: block-commit",
        "overlays: record",
        "qmp: job-complete",
        "qmp: job-dismiss",
        "qmp: blockdev-del",
        "image: make durable",
        "overlays: record",
        "overlay: put aside",
        "overlay: delete",
    ];
    let expected = [sorts.clone(), per_disk(&back), sorts, vec!["overlays: clear"]].concat();
    assert_eq!(purged, expected);
}

/// One machine through a fault at every effect of a command.
fn sweep(command: &str, fault: &str) {
    let Some(mut scene) = Scene::new() else { return };
    let count = {
        let created = scene.host.effects(scene.command("create", &[])).len();
        scene.contents.scribble(&scene.guest, 2);
        let purged = scene.host.effects(scene.command("purge", &[])).len();
        if command == "create" { created } else { purged }
    };
    for n in 1..=count {
        let case = format!("{fault} at {n} of {command}");
        if command == "purge" {
            scene.ok("create", &[]);
        }
        scene.contents.scribble(&scene.guest, 3 * n);
        let mut faulty = scene.command(command, &[]);
        faulty.env(fault, n.to_string());

        let outcome = finish(spawn(faulty));

        let expected: &[Option<i32>] =
            if fault == "KVMSNAP_CRASH_AT" { &[None] } else { &[Some(0), Some(1)] };
        assert!(expected.contains(&outcome.code), "{case}: {outcome:?}");
        assert!(!outcome.stderr.contains("panicked"), "{case}: {outcome:?}");
        assert_eq!(scene.guest.status(), "running", "{case}");
        scene.contents.scribble(&scene.guest, 3 * n + 1);
        // Both go on from there, whatever was done.
        if command == "create" && n % 2 == 0 {
            scene.ok("create", &[]);
            scene.contents.scribble(&scene.guest, 3 * n + 2);
        }
        scene.ok("purge", &[]);
        scene.assert_back();
    }
    scene.assert_holds();
}

#[test]
fn r01_create_killed_at_each_effect_is_gone_on_with() {
    sweep("create", "KVMSNAP_CRASH_AT");
}

#[test]
fn r01_create_that_fails_at_each_effect_harms_nobody() {
    sweep("create", "KVMSNAP_FAIL_AT");
}

#[test]
fn r01_purge_killed_at_each_effect_is_gone_on_with() {
    sweep("purge", "KVMSNAP_CRASH_AT");
}

#[test]
fn r01_purge_that_fails_at_each_effect_harms_nobody() {
    sweep("purge", "KVMSNAP_FAIL_AT");
}
