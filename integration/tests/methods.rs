//! The ways to a point in time that somebody must ask for, on a QEMU that nobody manages.

use std::time::Duration;

use integration::faults::{
    Contents, assert_goes_on, assert_says, kinds, signal, wait_for_export, wait_until, watchdog_of,
};
use integration::libvirt::processes;
use integration::restored::disk;
use integration::{Host, Running, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::json;
use vm_fixtures::{Disk, FileSystem, Guest, MIB};

const SIZE: u64 = 4 * MIB;
const DISKS: [&str; 2] = ["vda", "vdb"];
const SUSPEND: [&str; 2] = ["--method", "suspend"];
/// A run that hangs is killed after ten seconds, and on a busy machine later.
const HANG_TIMEOUT: Duration = Duration::from_secs(60);
/// The guard waits three seconds for another run, and a busy machine longer.
const GUARD_TIMEOUT: Duration = Duration::from_secs(120);

/// A machine with a qcow2 disk and a raw one.
struct Scene {
    host: Host,
    guest: Guest,
    contents: Contents,
}

impl Scene {
    fn new() -> Option<Self> {
        let plan = Guest::without_os().disk(Disk::new("vda", SIZE));
        let guest = plan.disk(Disk::new("vdb", SIZE).raw()).boot()?;
        let mut scene = Self { host: Host::new(), guest, contents: Contents::new(&DISKS, SIZE) };
        scene.contents.scribble(&scene.guest, 100);
        Some(scene)
    }

    /// Starts a slow backup that suspends, and waits until it reads.
    fn backup_slowly(&mut self) -> Running {
        self.contents.write_noise(&self.guest, "vda", 0, MIB as usize, 7);
        let slow = [&SUSPEND[..], &["--limit-read", "64KiB"]].concat();
        let mut running = spawn(self.host.backup_command(&self.guest, &slow));
        wait_for_export(&self.guest, &mut running);
        running
    }

    /// Nothing is left but the dirty bitmap of the disk that keeps one.
    #[track_caller]
    fn assert_clean(&self) {
        self.host.assert_nothing_left();
        integration::assert_guest_is_free(&self.guest, &DISKS);
        for (disk, count) in [("vda", 1), ("vdb", 0)] {
            let bitmaps = self.guest.bitmaps(&Disk::format_node(disk));
            assert_eq!(bitmaps.len(), count, "{disk}: {bitmaps:?}");
        }
    }
}

#[test]
fn p1_a_guest_that_stands_still_is_read_as_it_stood_in_one_chain_with_other_methods() {
    let Some(mut scene) = Scene::new() else { return };

    let first = scene.host.backup_and_compare(&scene.guest, &scene.contents, &SUSPEND);

    assert_eq!((&first["kind"], &first["method"]), (&json!("full"), &json!("suspend")));
    assert!(first["pause_ms"].as_u64().is_some_and(|ms| ms > 0), "{first}");
    assert!(first["warnings"][0].as_str().unwrap_or("").contains("stood still for"), "{first}");
    assert_eq!(scene.guest.status(), "running");
    for (turn, more) in [(1, &SUSPEND[..]), (2, &[]), (3, &SUSPEND)] {
        scene.contents.scribble(&scene.guest, turn);
        let next = scene.host.backup_and_compare(&scene.guest, &scene.contents, more);
        assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
        assert!(disk(&next, "vda")["bytes_read"].as_u64().unwrap() < SIZE / 2, "{next}");
        assert_eq!(kinds(&next)["vdb"], "rescan", "{next}");
        assert_eq!(scene.guest.status(), "running");
        scene.assert_clean();
    }
    scene.host.assert_restic_is_content();
}

#[test]
fn p1_a_guest_is_frozen_for_the_instant_in_which_it_is_paused() {
    let disk = Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4);
    let Some(guest) = Guest::builder().disk(disk).boot() else { return };
    let host = Host::new();

    let made = host.backup(&guest, &[&SUSPEND[..], &["--quiesce", "require"]].concat());

    assert_eq!(made["consistency"], "filesystem", "{made}");
    // It is thawed by now, and writes.
    guest.sh("echo more > /mnt/vda/file && sync");
    host.assert_nothing_left();
}

#[test]
fn p2_an_administrators_own_pause_is_kept() {
    let Some(mut scene) = Scene::new() else { return };
    scene.guest.pause();

    let made = scene.host.backup_and_compare(&scene.guest, &scene.contents, &SUSPEND);

    assert_eq!(scene.guest.status(), "paused");
    assert_eq!((&made["pause_ms"], &made["warnings"]), (&json!(null), &json!([])), "{made}");
    let running = scene.backup_slowly();
    signal(running.pid(), Signal::SIGKILL);
    finish(running);
    wait_until(GUARD_TIMEOUT, "the guard undoes the run", || scene.host.undo_records() == 0);
    assert_eq!(scene.guest.status(), "paused");
    integration::assert_guest_is_free(&scene.guest, &DISKS);
}

#[test]
fn r01_p2_the_guest_of_a_killed_run_goes_on_within_a_second() {
    let Some(mut scene) = Scene::new() else { return };
    for end in [Signal::SIGKILL, Signal::SIGINT] {
        let running = scene.backup_slowly();
        assert_eq!(scene.guest.status(), "paused");

        signal(running.pid(), end);

        assert_goes_on(&scene.guest);
        finish(running);
        wait_until(GUARD_TIMEOUT, "the run is undone", || scene.host.undo_records() == 0);
        scene.contents.scribble(&scene.guest, 1);
        scene.host.backup_and_compare(&scene.guest, &scene.contents, &SUSPEND);
        scene.assert_clean();
    }
}

#[test]
fn r01_p2_the_guest_of_a_run_that_was_killed_with_its_watchdog_is_let_go_by_the_guard() {
    let Some(mut scene) = Scene::new() else { return };
    let running = scene.backup_slowly();
    let socket = scene.guest.qmp();
    let watchdogs = processes(&["quiesce-watchdog", socket.to_str().expect("a plain path")]);
    assert_eq!(watchdogs.len(), 1);

    signal(watchdogs[0], Signal::SIGKILL);
    signal(running.pid(), Signal::SIGKILL);

    finish(running);
    wait_until(GUARD_TIMEOUT, "the guest goes on", || scene.guest.is_running());
    wait_until(GUARD_TIMEOUT, "the run is undone", || scene.host.undo_records() == 0);
    scene.host.backup_and_compare(&scene.guest, &scene.contents, &SUSPEND);
    scene.assert_clean();
}

#[test]
fn p2_a_run_that_hangs_while_its_guest_stands_still_is_killed_for_it() {
    let Some(mut scene) = Scene::new() else { return };
    let running = scene.backup_slowly();

    signal(running.pid(), Signal::SIGSTOP);

    wait_until(HANG_TIMEOUT, "the guest goes on", || scene.guest.is_running());
    assert_eq!(finish(running).code, None);
    wait_until(GUARD_TIMEOUT, "the guard undoes the run", || scene.host.undo_records() == 0);
    scene.host.backup_and_compare(&scene.guest, &scene.contents, &SUSPEND);
    scene.assert_clean();
}

#[test]
fn p2_a_guest_whose_watchdog_dies_while_it_stands_still_goes_on_and_is_thawed() {
    let disk = Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4);
    let Some(guest) = Guest::builder().disk(disk).boot() else { return };
    let host = Host::new();
    guest.sh("dd if=/dev/urandom of=/mnt/vda/noise bs=64k count=64 && sync");
    let slow = [&SUSPEND[..], &["--limit-read", "64KiB"]].concat();
    let mut running = spawn(host.backup_command(&guest, &slow));
    wait_for_export(&guest, &mut running);

    signal(watchdog_of(running.pid()), Signal::SIGKILL);

    assert_says(&finish(running), 1, "the watchdog process ended");
    assert_goes_on(&guest);
    guest.sh("echo more > /mnt/vda/file && sync");
    host.assert_nothing_left();
}

#[test]
fn p1_a_guest_that_somebody_lets_go_on_spoils_the_backup_and_stays_as_it_is() {
    let Some(mut scene) = Scene::new() else { return };
    let running = scene.backup_slowly();

    scene.guest.resume();

    let outcome = finish(running);
    assert_says(&outcome, 1, "somebody let the guest go on");
    assert!(outcome.stderr.contains("hint: nothing was recorded"), "{outcome:?}");
    assert_eq!(scene.guest.status(), "running");
    assert!(scene.host.list().is_empty());
    // Too short to be seen, but not for what is written meanwhile.
    let running = scene.backup_slowly();
    scene.contents.write(&scene.guest, "vdb", 0, 512, 0x33);
    assert_says(&finish(running), 1, "was written to while it was read");
    assert_goes_on(&scene.guest);
    scene.host.backup_and_compare(&scene.guest, &scene.contents, &[]);
    scene.assert_clean();
}

#[test]
fn p1_a_disk_that_is_pulled_keeps_its_dirty_bitmap_for_the_next_backup() {
    let Some(mut scene) = Scene::new() else { return };
    let first = scene.host.backup_and_compare(&scene.guest, &scene.contents, &[]);
    let methods = |snapshot| ["vda", "vdb"].map(|name| disk(snapshot, name)["method"].clone());
    assert_eq!(methods(&first), ["bitmap", "pull"]);
    scene.contents.scribble(&scene.guest, 1);

    let pulled =
        scene.host.backup_and_compare(&scene.guest, &scene.contents, &["--method", "pull"]);

    assert_eq!(
        (&pulled["method"], methods(&pulled)),
        (&json!("pull"), ["pull", "pull"].map(Into::into))
    );
    assert_eq!(kinds(&pulled).values().collect::<Vec<_>>(), ["rescan", "rescan"], "{pulled}");
    assert_eq!(disk(&pulled, "vda")["bitmap"], json!(null));
    scene.assert_clean();
    scene.contents.scribble(&scene.guest, 2);
    let next = scene.host.backup_and_compare(&scene.guest, &scene.contents, &[]);
    assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
    scene.assert_clean();
}

#[test]
fn a_qemu_that_nobody_manages_can_be_neither_offline_nor_started_again() {
    let Some(scene) = Scene::new() else { return };
    for method in ["offline", "stop"] {
        let refused = scene.host.try_backup(&scene.guest, &["--method", method]);

        assert_says(&refused, 2, &format!("--method {method} is for domains of libvirt"));
    }
}

#[test]
fn a_disk_that_is_no_logical_volume_has_no_snapshot_of_lvm() {
    if !vm_fixtures::available("lvs", "lvm2") {
        return;
    }
    let Some(scene) = Scene::new() else { return };

    let refused = scene.host.try_backup(&scene.guest, &["--method", "lvm"]);

    assert_says(&refused, 1, "disk `vda` is no raw image on a logical volume of lvm");
    scene.host.assert_nothing_left();
}
