//! The ways to a point in time that somebody must ask for, on domains of libvirt.

use integration::faults::{assert_says, kinds, signal, wait_until};
use integration::libvirt::{Scene, WAIT};
use integration::{Running, finish};
use nix::sys::signal::Signal;
use serde_json::json;
use vm_fixtures::libvirt::Libvirt;

const SUSPEND: [&str; 2] = ["--method", "suspend"];

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
