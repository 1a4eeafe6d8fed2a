//! The ways to a point in time that somebody must ask for, on domains of libvirt.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use integration::faults::{SmallDisk, assert_says, kinds, signal, wait_until};
use integration::libvirt::{Scene, WAIT, assert_incremental};
use integration::{Running, finish};
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::json;
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::{Disk, FileSystem, Guest, MIB};

const SUSPEND: [&str; 2] = ["--method", "suspend"];
const STOP: [&str; 2] = ["--method", "stop"];
/// For domains in which nothing runs that could shut down.
const SWITCH_OFF: [&str; 5] = ["--method", "stop", "--stop-timeout", "1", "--power-off"];

/// A backup that keeps the domain's guest standing still, while it reads.
#[track_caller]
fn suspended_slowly(scene: &mut Scene) -> Running {
    scene.write("vda", 0, &integration::faults::noise(2 << 20, 7));
    let running = scene.backup_slowly(&SUSPEND);
    assert_eq!(scene.domain.state(), "paused");
    running
}

#[test]
fn p1_a_domain_that_stands_still_is_read_as_it_stood_in_one_chain_with_other_methods() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    for more in [&SUSPEND[..], &[], &SUSPEND] {
        scene.scribble();

        let made = scene.backup_with(more);

        let method = if more.is_empty() { "bitmap" } else { "suspend" };
        assert_eq!(made["method"], method, "{made}");
        assert_eq!(kinds(&made)["vda"], "incremental", "{made}");
        assert_eq!(kinds(&made)["vdc"], "rescan", "{made}");
        assert_eq!(scene.domain.state(), "running");
        let stood = made["warnings"].to_string().contains("the guest stood still for");
        assert_eq!(stood, !more.is_empty(), "{made}");
        scene.assert_clean();
    }
}

/// Until its job has ended, what the guest overwrites goes to the scratch, where there is no room.
#[test]
fn r08_a_domain_that_stood_still_goes_on_where_its_scratch_has_no_room() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    let small = SmallDisk::mount(&scene.domain.folder().join("scratch"), 8 * MIB);
    fs::set_permissions(small.folder(), Permissions::from_mode(0o777)).expect("it is ours");
    fs::write(small.folder().join("filler"), vec![1; 7 << 20]).expect("it has room");
    scene.domain.start();
    scene.scribble();

    let folder = small.folder().to_str().expect("a plain path");
    let made = scene.backup_with(&[&SUSPEND[..], &["--scratch-dir", folder]].concat());

    assert_eq!(made["method"], "suspend", "{made}");
    assert_eq!(scene.domain.state(), "running");
    scene.scribble();
    scene.assert_clean();
    scene.domain.destroy();
}

#[test]
fn p2_an_administrators_own_pause_of_a_domain_is_kept() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.scribble();
    scene.domain.pause();

    let made = scene.backup_with(&SUSPEND);

    assert_eq!(scene.domain.state(), "paused");
    assert_eq!((&made["pause_ms"], &made["warnings"]), (&json!(null), &json!([])), "{made}");
    scene.assert_clean();
}

#[test]
fn r01_p2_the_domain_of_a_killed_run_goes_on() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    for end in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGSTOP] {
        let running = suspended_slowly(&mut scene);

        signal(running.pid(), end);

        wait_until(WAIT, "the guest goes on", || scene.domain.state() == "running");
        finish(running);
        wait_until(WAIT, "the run is undone", || scene.host.undo_records() == 0);
        scene.scribble();
        let next = scene.backup();
        assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
        scene.assert_clean();
    }
}

#[test]
fn p1_a_domain_that_somebody_lets_go_on_spoils_the_backup() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    let running = suspended_slowly(&mut scene);

    scene.domain.resume();

    assert_says(&finish(running), 1, "somebody let the guest go on");
    assert_eq!(scene.domain.state(), "running");
    assert_eq!(scene.host.list().len(), 1);
    scene.backup();
    scene.assert_clean();
}

#[test]
fn a_domain_that_runs_is_not_backed_up_offline() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::running(&libvirt);

    let refused = scene.try_backup(&["--method", "offline"]);

    assert_says(&refused, 1, "for domains that are shut off, and this one runs");
    assert!(refused.stderr.contains("hint: shut it down first"), "{refused:?}");
    assert_eq!(scene.host.list().len(), 1);
    scene.assert_clean();
}

#[test]
fn p1_a_domain_shuts_down_for_its_backup_and_is_started_again() {
    let Some(libvirt) = Libvirt::start() else { return };
    let disk = Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4);
    let domain = Guest::builder().disk(disk).under_libvirt().boot(&libvirt);
    let host = integration::Host::new();
    for turn in 0..2 {
        domain.write_file("/mnt/vda/file", format!("content {turn}").as_bytes());

        let made = host.ok(["backup", "--json", "--method", "stop", domain.name()]);

        let started = Instant::now();
        assert_eq!(domain.state(), "running");
        let made: serde_json::Value = serde_json::from_str(&made).expect("one JSON object");
        let expected = if turn == 0 { "full" } else { "incremental" };
        assert_eq!((&made["method"], &made["kind"]), (&json!("stop"), &json!(expected)), "{made}");
        assert_eq!(made["consistency"], "filesystem", "its guest has unmounted them: {made}");
        domain.wait_up(started);
        assert_eq!(domain.read_file("/mnt/vda/file"), format!("content {turn}").as_bytes());
        host.assert_nothing_left();
    }
}

#[test]
fn p1_the_chain_goes_on_through_backups_for_which_the_domain_is_shut_down() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    for more in [&SWITCH_OFF[..], &[], &SWITCH_OFF] {
        scene.scribble();

        let outcome = scene.try_backup(more);

        let made = scene.assert_good(&outcome);
        assert_incremental(&made, if more.is_empty() { "bitmap" } else { "stop" });
        assert_eq!(scene.domain.state(), "running");
        let away = outcome.stderr.contains("was away for its backup for");
        assert_eq!(away, !more.is_empty(), "{outcome:?}");
        scene.assert_clean();
    }
    let id = scene.domain.virsh("domid", &[]);
    let planned = scene.host.ok(["backup", "--dry-run", "--method", "stop", scene.domain.name()]);
    assert!(planned.contains("method stop: asked for with --method"), "{planned}");
    assert_eq!(scene.domain.virsh("domid", &[]), id, "nobody shut it down to tell that");
    scene.domain.destroy();
    let made = scene.backup_with(&STOP);
    assert_eq!(made["method"], "offline", "{made}");
    assert_eq!(scene.domain.state(), "shut off", "only a domain that ran is started");
}

/// A backup for which the domain was switched off, while it reads.
#[track_caller]
fn stopped_slowly(scene: &mut Scene) -> Running {
    scene.write("vda", 0, &integration::faults::noise(2 << 20, 7));
    scene.backup_at_rest_slowly(&SWITCH_OFF)
}

#[test]
fn r01_a_domain_that_was_shut_down_is_started_again_however_its_backup_ends() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    for end in [Signal::SIGKILL, Signal::SIGTERM] {
        let running = stopped_slowly(&mut scene);
        assert_eq!(scene.domain.state(), "shut off");

        signal(running.pid(), end);

        finish(running);
        wait_until(WAIT, "it is started again", || scene.domain.state() == "running");
        wait_until(WAIT, "the run is undone", || scene.host.undo_records() == 0);
        scene.scribble();
        let next = scene.backup();
        assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
        scene.assert_clean();
    }
}

#[test]
fn r01_the_next_run_or_doctor_starts_a_domain_again_whose_guard_was_killed_too() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    for mended_by_doctor in [true, false] {
        let running = stopped_slowly(&mut scene);
        for guard in scene.guards() {
            signal(guard, Signal::SIGKILL);
        }
        signal(running.pid(), Signal::SIGKILL);
        finish(running);
        let told = scene.host.run(["doctor"]);
        assert_eq!(told.code, Some(1), "{told:?}");
        let words = "before it started the domain again that it had shut down";
        assert!(told.stdout.contains(words), "{told:?}");
        assert_eq!(scene.domain.state(), "shut off");

        if mended_by_doctor {
            scene.host.ok(["doctor", "--repair"]);
        } else {
            assert_eq!(scene.backup()["method"], "bitmap");
        }

        assert_eq!(scene.domain.state(), "running");
        assert_eq!(scene.host.undo_records(), 0);
        assert_eq!(kinds(&scene.backup())["vda"], "incremental");
        scene.assert_clean();
    }
}

#[test]
fn p2_a_guest_that_does_not_shut_down_goes_on_and_one_that_does_so_late_is_started_again() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::running(&libvirt);
    let id = scene.domain.virsh("domid", &[]);

    let refused = scene.try_backup(&[&STOP[..], &["--stop-timeout", "1"]].concat());

    assert_says(&refused, 1, "did not shut down within 1 s");
    assert_eq!((scene.domain.state().as_str(), scene.domain.virsh("domid", &[])), ("running", id));
    assert_eq!(scene.host.list().len(), 1);
    assert_eq!(scene.backup()["method"], "bitmap", "it is backed up meanwhile");
    scene.domain.destroy();
    wait_until(WAIT, "it is started again", || scene.domain.state() == "running");
    wait_until(WAIT, "nothing is left", || scene.host.undo_records() == 0);
    scene.assert_clean();
}

#[test]
fn p2_a_domain_that_nobody_could_start_again_is_not_shut_down() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt);
    scene.domain.start();
    let xml = scene.domain.folder().join("domain.xml");
    scene.domain.virsh("undefine", &[]);

    let refused = scene.try_backup(&SWITCH_OFF);

    assert_says(&refused, 2, "is transient: once it is off nobody could start it again");
    assert_eq!(scene.domain.state(), "running");
    libvirt.virsh(&["define", &xml.to_string_lossy()]);
    scene.domain.pause();
    assert_says(&scene.try_backup(&SWITCH_OFF), 1, "does not run: it cannot shut down");
    assert_eq!(scene.domain.state(), "paused");
    scene.host.assert_nothing_left();
}
