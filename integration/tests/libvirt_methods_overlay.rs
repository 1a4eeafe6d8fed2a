//! `backup --method overlay` on domains of libvirt.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use integration::faults::{assert_says, kinds, noise, signal, wait_until};
use integration::libvirt::{SIZE, Scene, WAIT};
use integration::restored::text;
use integration::{Running, finish, spawn, tool};
use nix::sys::signal::Signal;
use vm_fixtures::libvirt::Libvirt;

const OVERLAY: [&str; 2] = ["--method", "overlay"];

fn overlays(scene: &Scene) -> Vec<PathBuf> {
    let files = fs::read_dir(scene.domain.folder()).expect("the domain's folder").flatten();
    let is_one = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("kvmsnap-") && name.ends_with(".qcow2")
    };
    let mut found: Vec<_> = files.map(|entry| entry.path()).filter(is_one).collect();
    found.sort();
    found
}

/// Whether a description names overlays, which are called after their disks.
fn names_overlays(xml: &str) -> bool {
    ["vda", "vdb", "vdc"].iter().any(|disk| xml.contains(&format!("-{disk}.qcow2'")))
}

/// The domain runs on, and starts with, its own images; nothing is left of any overlay.
#[track_caller]
fn assert_back(scene: &Scene) {
    for inactive in [&[][..], &["--inactive"]] {
        let xml = scene.domain.virsh("dumpxml", inactive);
        assert!(!names_overlays(&xml) && !xml.contains("<mirror"), "{xml}");
    }
    assert_eq!(overlays(scene), Vec::<PathBuf>::new());
}

/// A backup that takes its time, reading, while the domain writes to overlays.
fn slow_backup(scene: &mut Scene) -> Running {
    scene.write("vda", 0, &noise(2 << 20, 7));
    let more = [&OVERLAY[..], &["--limit-read", "64KiB"]].concat();
    let mut running = spawn(scene.command(&more));
    wait_until(WAIT, "the domain writes to overlays", || {
        assert!(!running.has_ended(), "it ended too early");
        names_overlays(&scene.domain.virsh("dumpxml", &[]))
    });
    running
}

/// What is not known to lie beneath would be read as zeros.
#[test]
fn p1_a_chain_that_libvirt_does_not_tell_of_is_refused() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt);
    let (image, beneath) = (scene.domain.disk_path("vda"), scene.domain.folder().join("beneath"));
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2"]).arg(&beneath).arg(SIZE.to_string());
    tool(make);
    let mut rebase = Command::new("qemu-img");
    rebase.args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&beneath).arg(&image);
    tool(rebase);
    // To libvirt it is the last of its chain.
    let ends = "<backingStore/><target dev='vda'";
    let definition = scene.domain.xml().replace("<target dev='vda'", ends);
    let file = scene.domain.folder().join("ends.xml");
    fs::write(&file, definition).expect("the folder is writable");
    libvirt.virsh(&["define", file.to_str().expect("a plain path")]);
    scene.domain.start();

    let outcome = scene.try_backup(&OVERLAY);

    assert_says(&outcome, 1, "but QEMU tells of nothing there");
    assert_back(&scene);
    assert_eq!(scene.host.list().len(), 0);
    assert_eq!(scene.domain.state(), "running");
}

#[test]
fn p1_p3_frozen_images_of_a_domain_are_stored_and_its_checkpoints_go_on() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.scribble();

    let made = scene.backup_with(&OVERLAY);

    assert_eq!((&made["method"], &made["kind"]), (&"overlay".into(), &"rescan".into()), "{made}");
    assert_back(&scene);
    scene.assert_clean();
    scene.scribble();
    let after = scene.backup();
    let kinds = kinds(&after);
    assert_eq!((&*kinds["vda"], &*kinds["vdb"]), ("incremental", "incremental"), "{after}");
    scene.assert_clean();
}

#[test]
fn p3_a_killed_backup_of_a_domain_is_undone_by_its_guard_or_the_next() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    for by_guard in [false, true] {
        let running = slow_backup(&mut scene);
        scene.scribble();

        signal(running.pid(), Signal::SIGKILL);

        finish(running);
        scene.scribble();
        if by_guard {
            wait_until(WAIT, "the run is undone", || scene.host.undo_records() == 0);
            assert_back(&scene);
        }
        scene.scribble();
        let next = scene.backup_with(&OVERLAY);
        assert_eq!(next["kind"], "rescan", "{next}");
        assert_back(&scene);
        scene.assert_clean();
    }
}

#[test]
fn r02_a_domain_killed_in_a_backup_starts_with_its_own_images_that_hold_all() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    let running = slow_backup(&mut scene);
    scene.scribble();
    scene.flush();

    scene.domain.kill_qemu();

    let outcome = finish(running);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    wait_until(WAIT, "the overlays are written back", || overlays(&scene).is_empty());
    wait_until(WAIT, "the run is forgotten", || scene.host.undo_records() == 0);
    scene.domain.start();
    scene.scribble();
    let next = scene.backup();
    assert_eq!(kinds(&next)["vdc"], "rescan", "{next}");
    let xml = scene.domain.virsh("dumpxml", &[]);
    assert!(!names_overlays(&xml), "{xml}");
}

#[test]
fn p1_p3_overlays_track_what_changes_in_a_domain_through_kills_and_restarts() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.scribble();
    let first = scene.backup_with(&["--tracking", "overlay"]);
    assert_eq!((&first["method"], overlays(&scene).len()), (&"overlay".into(), 3), "{first}");
    for kills in [false, true, false] {
        scene.scribble();
        if kills {
            scene.flush();
            scene.domain.kill_qemu();
            // Its definition names the overlays.
            scene.domain.start();
        }

        let next = scene.backup();

        let kinds = kinds(&next);
        assert!(["vda", "vdb", "vdc"].iter().all(|disk| kinds[*disk] == "incremental"), "{next}");
        assert_eq!(overlays(&scene).len(), 3);
        assert_eq!(scene.host.undo_records(), 0);
    }
    let status = scene.host.ok(["status", "--json", scene.domain.name()]);
    assert!(status.contains("the overlay since the last backup"), "{status}");
    let last = scene.host.list().pop().expect("a snapshot");
    let refused = scene.host.run(["restore", text(&last, "id"), "--in-place"]);
    assert_says(&refused, 1, "which fit only the images that it has");

    scene.host.ok(["purge", scene.domain.name()]);

    assert_back(&scene);
    scene.scribble();
    assert_eq!(scene.backup()["kind"], "rescan");
    assert_back(&scene);
}

#[test]
fn p3_a_killed_tracked_backup_of_a_domain_loses_nothing() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.backup_with(&["--tracking", "overlay"]);
    let before = overlays(&scene);
    scene.write("vda", 0, &noise(2 << 20, 7));
    let mut running = spawn(scene.command(&["--limit-read", "64KiB"]));
    wait_until(WAIT, "the domain writes to fresh overlays", || {
        assert!(!running.has_ended(), "it ended too early");
        overlays(&scene).len() == 6 && !scene.domain.virsh("domblklist", &[]).is_empty()
    });
    signal(running.pid(), Signal::SIGKILL);
    finish(running);
    scene.scribble();

    wait_until(WAIT, "the run is undone", || scene.host.undo_records() == 0);

    assert_eq!(overlays(&scene), before, "the older ones go on counting");
    let next = scene.backup();
    let kinds = kinds(&next);
    assert!(["vda", "vdb", "vdc"].iter().all(|disk| kinds[*disk] == "incremental"), "{next}");
}
