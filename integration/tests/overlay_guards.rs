//! What `create` and `purge` refuse, so that nothing that counts is overwritten or deleted.

use std::path::{Path, PathBuf};
use std::time::Duration;

use integration::faults::{assert_says, signal, wait_until};
use integration::overlays::{HASTY, STOPPED, Scene};
use integration::restored::text;
use integration::{finish, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::MIB;

const WAIT: Duration = Duration::from_secs(120);
/// The effect of a purge that tells QEMU to go on with the image of the first of two disks
/// (`r01_the_effects_of_create_and_purge_are_known`).
const GOES_ON: usize = 6;

/// Has a purge killed while an overlay is half written back.
fn kill_purge_midway(scene: &mut Scene) {
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    let running = spawn(scene.command("purge", &["--limit-rate", "256KiB"]));
    let has_written = || {
        let jobs = scene.guest.qmp_command("query-jobs", &json!({}));
        jobs[0]["current-progress"].as_u64() > Some(0)
    };
    wait_until(WAIT, "the overlay is being written back", has_written);
    signal(running.pid(), Signal::SIGKILL);
    finish(running);
}

fn assert_nothing_was_deleted(scene: &Scene) {
    assert_eq!((scene.overlays().len(), scene.records().len()), (2, 1), "nothing was deleted");
}

#[test]
fn r01_r23_what_was_written_to_an_image_after_a_purge_of_it_was_killed_is_not_overwritten() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    kill_purge_midway(&mut scene);
    scene.guest.kill();
    scene.guest.restart();
    scene.guest.qemu_io("vda", "write -P 8 0 64k");
    scene.guest.quit();

    let outcome = scene.try_run("purge", &[]);

    assert_says(&outcome, 1, "cannot be told");
    assert_nothing_was_deleted(&scene);
    scene.guest.restart();
    scene.guest.qemu_io("vda", "read -P 8 0 64k");
}

#[test]
fn r01_r23_a_guest_whose_purge_was_killed_is_brought_back_while_it_runs_on_its_overlays() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.ok("create", &[]);
    kill_purge_midway(&mut scene);
    scene.guest.kill();
    assert_says(&scene.try_run("purge", &[]), 1, "start the guest on the overlay");
    let successor = scene.start_on_overlays(&created);

    scene.ok("purge", &[]);

    scene.contents.scribble(&successor, 4);
    successor.quit();
    assert_eq!(scene.overlays(), Vec::<PathBuf>::new());
    scene.assert_holds();
}

#[test]
fn r01_what_a_killed_create_left_is_removed_by_as_many_attempts_as_it_takes() {
    let Some(mut scene) = Scene::new() else { return };
    let killed_at = |n: u32| {
        let mut create = scene.command("create", &[]);
        create.env("KVMSNAP_CRASH_AT", n.to_string());
        assert_eq!(finish(spawn(create)).code, None);
    };
    // Both overlays are open, none is put above its disk; then one of them is deleted, and the other not.
    killed_at(6);
    assert_eq!(scene.overlays().len(), 2);
    (3..7).for_each(killed_at);

    scene.ok("create", &[]);

    scene.contents.scribble(&scene.guest, 2);
    scene.ok("purge", &[]);
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r01_r23_whether_a_guest_went_back_as_its_purge_was_killed_is_not_guessed() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    let mut purge = scene.command("purge", &[]);
    // QEMU has gone on with the image of the first disk, and its job is not cleared away yet.
    purge.env("KVMSNAP_CRASH_AT", (GOES_ON + 1).to_string());
    assert_eq!(finish(spawn(purge)).code, None);
    scene.guest.kill();
    scene.guest.restart();
    // Also where the overlay holds something.
    scene.guest.qemu_io("vda", "write -P 9 0 8M");

    let running = scene.try_run("purge", &[]);
    scene.guest.quit();
    let off = scene.try_run("purge", &[]);

    for outcome in [running, off] {
        assert_says(&outcome, 1, "whether it did cannot be told now");
    }
    assert_nothing_was_deleted(&scene);
    // It is well there, says the administrator.
    std::fs::remove_file(text(&created[0], "overlay")).expect("an overlay");
    scene.ok("purge", &[]);
    scene.contents.note("vda", 0, &[9; 8 << 20]);
    scene.assert_holds();
}

#[test]
fn r23_disks_of_a_guest_that_ran_on_its_own_images_are_never_of_two_times() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    scene.guest.quit();
    scene.guest.restart();
    scene.guest.qemu_io("vdb", "write -P 8 0 64k");
    scene.guest.quit();
    let before = std::fs::read(scene.guest.disk_path("vda")).expect("an image");

    let outcome = scene.try_run("purge", &[]);

    assert_says(&outcome, 1, "vdb.raw was written to while it should hold still");
    assert_nothing_was_deleted(&scene);
    assert_eq!(before, std::fs::read(scene.guest.disk_path("vda")).expect("an image"));
    // What the overlays hold counts, says the administrator, who sees the guest run on them.
    let successor = scene.start_on_overlays(&created);
    let adopted = adopt(&scene, Path::new(text(&created[1], "overlay")), &[]);
    assert_eq!(adopted.code, Some(0), "{adopted:?}");
    successor.quit();
    assert_eq!(scene.overlays(), Vec::<PathBuf>::new());
}

#[test]
fn r01_a_guest_that_did_not_go_on_with_its_image_is_brought_back_after_its_end() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    let mut purge = scene.command("purge", &[]);
    purge.env("KVMSNAP_FAIL_AT", GOES_ON.to_string());
    assert_says(&finish(spawn(purge)), 1, "job-complete");
    scene.contents.scribble(&scene.guest, 3);
    scene.guest.quit();

    scene.ok("purge", &[]);

    assert_eq!(scene.overlays(), Vec::<PathBuf>::new());
    scene.assert_holds();
}

#[test]
fn internal_snapshots_in_an_overlay_are_not_deleted_with_it() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    let snapshot = json!({"device": scene.guest.active_node("vda"), "name": "before-update"});
    scene.guest.qmp_command("blockdev-snapshot-internal-sync", &snapshot);

    let outcome = scene.try_run("purge", &[]);

    assert_says(&outcome, 1, "internal snapshots, which would be deleted with it: before-update");
    assert_nothing_was_deleted(&scene);
    scene.guest.quit();
    assert_says(&scene.try_run("purge", &[]), 1, "internal snapshots");
    let mut delete = std::process::Command::new("qemu-img");
    delete.args(["snapshot", "-d", "before-update"]).arg(text(&created[0], "overlay"));
    integration::tool(delete);
    scene.ok("purge", &[]);
    scene.assert_holds();
}

#[test]
fn r13_a_guest_that_an_administrator_paused_stays_paused() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    scene.guest.pause();

    let purged = scene.ok("purge", &STOPPED);

    assert_eq!(purged[0]["pause_ms"], Value::Null, "it was not purge that stopped it: {purged:?}");
    assert_eq!(scene.guest.status(), "paused");
    scene.assert_back();
    scene.assert_holds();
}

// ---- overlays of others -------------------------------------------------------------------------

/// Puts an overlay above a disk's image as somebody else would.
fn put_foreign(scene: &Scene) -> PathBuf {
    let foreign = scene.guest.folder().join("foreign.qcow2");
    let args = json!({
        "node-name": scene.guest.active_node("vda"), "snapshot-node-name": "foreign",
        "snapshot-file": foreign, "format": "qcow2",
    });
    scene.guest.qmp_command("blockdev-snapshot-sync", &args);
    foreign
}

fn adopt(scene: &Scene, overlay: &Path, more: &[&str]) -> integration::Outcome {
    let overlay = overlay.to_str().expect("a plain path");
    scene.try_run("purge", &[&["--adopt", overlay], more].concat())
}

#[test]
fn an_image_that_others_are_built_on_takes_in_no_overlay() {
    let Some(mut scene) = Scene::new() else { return };
    let foreign = put_foreign(&scene);
    scene.contents.scribble(&scene.guest, 2);
    let template = std::fs::File::open(scene.guest.disk_path("vda")).expect("its image");

    let outcome = adopt(&scene, &foreign, &[]);

    assert_says(&outcome, 1, "uses it too: writing");
    assert!(foreign.exists() && scene.records().is_empty());
    drop(template);
    let outcome = adopt(&scene, &foreign, &[]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("and then deleted"), "{outcome:?}");
    assert!(!foreign.exists());
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn an_adoption_that_was_interrupted_is_gone_on_with_by_any_purge() {
    let Some(mut scene) = Scene::new() else { return };
    scene.ok("create", &[]);
    let foreign = put_foreign(&scene);
    scene.contents.write_noise(&scene.guest, "vda", 0, 4 * MIB as usize, 3);
    for _ in 0..2 {
        assert_says(&adopt(&scene, &foreign, &HASTY), 1, "was not brought back in time");
        assert_eq!(scene.records().len(), 2, "one of create, one of the adoption");
    }

    scene.ok("purge", &[]);

    assert!(!foreign.exists());
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r23_an_overlay_that_a_process_has_open_is_not_deleted() {
    let Some(mut scene) = Scene::new() else { return };
    let created = scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    let reader = std::fs::File::open(text(&created[0], "overlay")).expect("an overlay");

    let outcome = scene.try_run("purge", &[]);

    assert_says(&outcome, 1, "which has it open, still names it");
    assert_eq!((scene.overlays().len(), scene.records().len()), (1, 1));
    drop(reader);
    scene.ok("purge", &[]);
    scene.assert_back();
    scene.assert_holds();
}

#[test]
fn r23_an_overlay_that_another_disk_has_is_not_written_back() {
    let Some(mut scene) = Scene::new() else { return };
    let mut created = scene.ok("create", &[]);
    scene.contents.scribble(&scene.guest, 2);
    scene.guest.quit();
    let [first, second] = &mut created[..] else { panic!("two disks") };
    std::mem::swap(&mut first["disk"], &mut second["disk"]);
    let successor = scene.start_on_overlays(&created);

    let outcome = scene.try_run("purge", &[]);

    assert_says(&outcome, 1, "is not above the image that disk");
    assert_nothing_was_deleted(&scene);
    successor.quit();
    scene.ok("purge", &[]);
    scene.assert_holds();
}
