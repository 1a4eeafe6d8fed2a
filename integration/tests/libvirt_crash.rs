//! R01 for domains of libvirt: kvmsnap is killed, or fails, at each of its effects on the world outside.

use std::collections::BTreeSet;
use std::time::Duration;

use integration::faults::{Fault, kinds, wait_until};
use integration::libvirt::{SIZE, Scene, WAIT, takes_sockets};
use integration::{finish, spawn};
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::{Disk, Guest, GuestBuilder};

const DISKS: [&str; 2] = ["vda", "vdb"];
const SUSPEND: &[&str] = &["--method", "suspend"];
/// Nothing runs in the domains under test that could shut down.
const STOP: &[&str] = &["--method", "stop", "--stop-timeout", "1", "--power-off"];
/// How long the watchdog of a killed run may take to let its guest go on.
const GOES_ON_TIMEOUT: Duration = Duration::from_secs(30);
/// Domains that are tested at once: a round waits more than it works.
const WORKERS: usize = 3;

/// A running domain with two disks that has one backup.
fn scene(libvirt: &Libvirt) -> Scene {
    let disks = DISKS.map(|id| Disk::new(id, SIZE));
    let plan = disks.into_iter().fold(Guest::without_os(), GuestBuilder::disk);
    let scene = Scene::of(plan.under_libvirt(), &DISKS, SIZE, libvirt);
    scene.domain.start();
    scene.backup();
    scene
}

/// The effects of an incremental backup.
fn effects(scene: &mut Scene, more: &[&str]) -> Vec<String> {
    scene.scribble();
    scene.host.effects(scene.command(more))
}

/// One fault, and what must be true afterwards.
fn survives(scene: &mut Scene, fault: Fault, more: &[&str], n: usize, effect: &str) {
    let case = format!("{fault:?} at {n}, {effect}");
    scene.scribble();

    let outcome = finish(spawn(fault.at(n, scene.command(more))));

    let timeout = match more {
        SUSPEND => GOES_ON_TIMEOUT,
        // Its guard waits three seconds for another run.
        STOP => WAIT,
        _ => Duration::ZERO,
    };
    wait_until(timeout, &case, || scene.domain.state() == "running");
    scene.host.assert_honest(&case, fault, &outcome, &scene.contents);
    scene.scribble();
    let next = scene.try_backup(if more == STOP { STOP } else { &[] });
    assert_eq!(next.code, Some(0), "{case}: {next:?}");
    let next = scene.assert_good(&next);
    assert!(kinds(&next).values().all(|kind| kind == "incremental"), "{case}: {next}");
    scene.assert_clean();
}

/// A fault at every `stride`-th effect of an incremental backup.
fn sweep(fault: fn(usize) -> Fault, more: &[&str], stride: usize) {
    let Some(libvirt) = Libvirt::start() else { return };
    let effects = effects(&mut scene(&libvirt), more);
    let (libvirt, effects) = (&libvirt, &effects);
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            scope.spawn(move || {
                let mut scene = scene(libvirt);
                for n in (1..=effects.len()).step_by(stride).skip(worker).step_by(WORKERS) {
                    survives(&mut scene, fault(n), more, n, &effects[n - 1]);
                }
                scene.host.assert_restic_is_content();
            });
        }
    });
}

#[test]
fn r01_killed_at_each_effect_on_a_domain_loses_only_the_run_in_progress() {
    sweep(|_| Fault::Crash, &[], 1);
}

#[test]
fn r01_effects_on_a_domain_that_fail_fail_the_run_and_harm_nobody() {
    sweep(Fault::failing, &[], 1);
}

#[test]
fn r01_p2_killed_at_each_effect_while_its_guest_stands_still_a_domain_goes_on() {
    sweep(|_| Fault::Crash, SUSPEND, 1);
}

#[test]
fn r01_p2_failures_while_its_guest_stands_still_let_a_domain_go_on() {
    sweep(Fault::failing, SUSPEND, 3);
}

#[test]
fn r01_killed_at_each_effect_while_it_is_shut_down_for_its_backup_a_domain_is_started_again() {
    sweep(|_| Fault::Crash, STOP, 1);
}

#[test]
fn r01_failures_while_it_is_shut_down_for_its_backup_leave_no_domain_off() {
    sweep(Fault::failing, STOP, 5);
}

/// A new effect does not come without its fault: the sweeps go through all of these.
#[test]
fn r01_the_effects_on_a_domain_are_known() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = scene(&libvirt);
    let effects: BTreeSet<String> = effects(&mut scene, &[]).into_iter().collect();
    let mut expected = BTreeSet::from([
        "guard: start",
        "journal: clear",
        "journal: write",
        "libvirt: end the backup job",
        "libvirt: remove the checkpoint",
        "libvirt: start a backup job",
        "repository: remove lock",
        "repository: settle packs",
        "repository: write index",
        "repository: write lock",
        "repository: write pack",
        "repository: write snapshot",
        "scratch: create",
    ]);
    if takes_sockets(&libvirt) {
        expected.insert("socket: create");
    }
    assert_eq!(effects.iter().map(String::as_str).collect::<BTreeSet<_>>(), expected);
}
