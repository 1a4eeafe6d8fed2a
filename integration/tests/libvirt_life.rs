//! R05 and what else others do to a domain of libvirt: they migrate it, end its job, back it up too.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use integration::faults::{assert_says, kinds, noise, wait_until};
use integration::libvirt::{HELD_UP, SIZE, Scene, WAIT, assert_incremental};
use integration::{Host, Outcome, finish, spawn, tool};
use serde_json::Value;
use vm_fixtures::libvirt::{Libvirt, OtherHost};
use vm_fixtures::{Disk, Guest};

/// How long a run may take to see that its job has ended; what it had still to read takes twice as long.
const SEEN_TIMEOUT: Duration = Duration::from_secs(15);
/// What the tests change at once, more than a slow backup reads in a minute.
const NOISE_LEN: usize = 2 << 20;

/// A running domain that keeps dirty bitmaps on all of its disks, with one backup.
#[track_caller]
fn migratable(libvirt: &Libvirt) -> Scene {
    let scene = tracked(libvirt);
    assert_eq!(scene.backup()["kind"], "full");
    scene
}

/// The same without a backup.
#[track_caller]
fn tracked(libvirt: &Libvirt) -> Scene {
    let disks = ["vda", "vdb"];
    let plan = disks.iter().fold(Guest::without_os(), |plan, id| plan.disk(Disk::new(id, SIZE)));
    let scene = Scene::of(plan.under_libvirt(), &disks, SIZE, libvirt);
    scene.domain.start();
    scene
}

/// The same domain on the other host, backed up by a kvmsnap there, to the same repository.
#[track_caller]
fn backup_there(scene: &Scene, there: &OtherHost, host: &Host) -> Outcome {
    let command = host.command(["backup", "--json", scene.domain.name()]);
    finish(spawn(there.there(&command)))
}

#[track_caller]
fn scribble_there(scene: &mut Scene, there: &OtherHost, byte: u8) {
    for disk in ["vda", "vdb"] {
        there.write(&scene.domain, disk, 0, 64 << 10, byte);
        scene.contents.note(disk, 0, &[byte; 64 << 10]);
    }
}

#[track_caller]
fn assert_all_incremental(snapshot: &Value) {
    assert!(kinds(snapshot).values().all(|kind| kind == "incremental"), "{snapshot}");
}

#[test]
fn r05_a_job_that_somebody_ends_fails_its_run_at_once() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.write("vda", 0, &noise(NOISE_LEN, 1));
    let mut running = scene.backup_slowly(&[]);

    scene.domain.virsh("domjobabort", &[]);

    let ended = Instant::now();
    wait_until(WAIT, "the run ends", || running.has_ended());
    let took = ended.elapsed();
    let outcome = finish(running);
    assert_says(&outcome, 1, "its backup job has ended");
    assert!(took < SEEN_TIMEOUT, "{took:?}: {outcome:?}");
    assert_eq!(scene.host.list().len(), 1);
    assert_eq!(scene.domain.state(), "running");
    assert_eq!(scene.checkpoints().len(), 1);
    assert_all_incremental_but_raw(&scene.backup());
    scene.assert_clean();
}

fn assert_all_incremental_but_raw(snapshot: &Value) {
    let kinds = kinds(snapshot);
    assert_eq!([&kinds["vda"], &kinds["vdb"]], ["incremental"; 2], "{snapshot}");
}

#[test]
fn r05_a_migration_waits_for_the_backup_job_and_wins_once_that_is_ended() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = migratable(&libvirt);
    let there = libvirt.other_host();
    scene.write("vda", 0, &noise(NOISE_LEN, 1));
    let running = scene.backup_slowly(&[]);
    let migration = spawn(there.migration_to(&scene.domain, &["--undefinesource"]));
    let start = Instant::now();
    scene.scribble();
    assert!(start.elapsed() < HELD_UP, "the guest waited {:?}", start.elapsed());

    scene.domain.virsh("domjobabort", &[]);

    let migrated = finish(migration);
    assert_eq!(migrated.code, Some(0), "{migrated:?}");
    assert_says(&finish(running), 1, "its backup job has ended");
    wait_until(WAIT, "the run is undone", || scene.host.undo_records() == 0);
    scene.host.assert_nothing_left();
    assert_eq!(scene.host.list().len(), 1);
    scribble_there(&mut scene, &there, 0x77);
    let host = scene.host.neighbour();
    let next = scene.assert_good(&backup_there(&scene, &there, &host));
    assert_all_incremental(&next);
    host.assert_nothing_left();
}

#[test]
fn r05_a_domain_that_was_migrated_stays_incremental_there_and_back_again() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = migratable(&libvirt);
    let there = libvirt.other_host();
    scene.scribble();

    let migrated = finish(spawn(there.migration_to(&scene.domain, &[])));

    assert_eq!(migrated.code, Some(0), "{migrated:?}");
    // It is still defined here, and its images are here too, but its guest is not.
    let here = scene.try_backup(&[]);
    assert_says(&here, 1, "was migrated to another host");
    scribble_there(&mut scene, &there, 0x66);
    let host = scene.host.neighbour();
    let first = scene.assert_good(&backup_there(&scene, &there, &host));
    assert_all_incremental(&first);
    scribble_there(&mut scene, &there, 0x67);
    assert_all_incremental(&scene.assert_good(&backup_there(&scene, &there, &host)));
    scribble_there(&mut scene, &there, 0x68);
    let back = finish(spawn(there.migration_from(&scene.domain, &["--undefinesource"])));
    assert_eq!(back.code, Some(0), "{back:?}");
    assert_incremental(&scene.backup(), "bitmap");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
    scene.host.assert_restic_is_content();
}

// ---- another tool -------------------------------------------------------------------------------

/// A backup of the domain by virtnbdbackup.
#[track_caller]
fn virtnbdbackup(scene: &Scene, level: &str) -> Outcome {
    let mut command = Command::new("virtnbdbackup");
    command.args(["-n", "-d", scene.domain.name(), "-l", level, "-S"]).arg(scene.domain.folder());
    command.arg("-o").arg(scene.host.folder().join("virtnbdbackup"));
    finish(spawn(command))
}

/// What virtnbdbackup restores is what the disks held.
#[track_caller]
fn assert_virtnbdrestore_yields(scene: &Scene, target: &Path) {
    let mut restore = Command::new("virtnbdrestore");
    restore.args(["-n", "-a", "restore", "-i"]).arg(scene.host.folder().join("virtnbdbackup"));
    restore.arg("-L").arg(scene.host.folder().join("restore.log")).arg("-o").arg(target);
    tool(restore);
    for disk in scene.contents.names() {
        let (image, raw) = (target.join(format!("{disk}.qcow2")), target.join("raw"));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "qcow2", "-O", "raw"]).args([&image, &raw]);
        tool(convert);
        let same = fs::read(&raw).is_ok_and(|restored| restored == scene.contents.of(disk));
        assert!(same, "virtnbdbackup's backup of {disk}");
    }
}

#[test]
fn virtnbdbackup_and_kvmsnap_leave_each_others_checkpoints_alone() {
    let Some(libvirt) = Libvirt::start() else { return };
    if !vm_fixtures::available("virtnbdbackup", "virtnbdbackup") {
        return;
    }
    let mut scene = tracked(&libvirt);
    let theirs = virtnbdbackup(&scene, "full");
    assert_eq!(theirs.code, Some(0), "{theirs:?}");
    assert_eq!(scene.checkpoints(), ["virtnbdbackup.0"]);
    scene.scribble();

    assert_eq!(scene.backup()["kind"], "full");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");

    let known = scene.checkpoints();
    let (ours, others): (Vec<_>, Vec<_>) = known.iter().partition(|c| c.starts_with("kvmsnap-"));
    assert_eq!((ours.len(), others), (1, vec![&"virtnbdbackup.0".to_owned()]));
    // It wants the domain for itself; libvirt can forget our checkpoint, its bitmaps stay.
    let refused = virtnbdbackup(&scene, "inc");
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(refused.stderr.contains("Foreign checkpoint found"), "{refused:?}");
    scene.domain.virsh("checkpoint-delete", &[ours[0], "--metadata"]);
    let theirs = virtnbdbackup(&scene, "inc");
    assert_eq!(theirs.code, Some(0), "{theirs:?}");
    assert_virtnbdrestore_yields(&scene, &scene.host.folder().join("theirs"));
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    assert_eq!(scene.checkpoints().len(), 3, "{:?}", scene.checkpoints());
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean_but_bitmaps();
}
