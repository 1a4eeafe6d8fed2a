//! `kvmsnap image get` on domains of libvirt and on their snapshots.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration::faults::{Contents, Fault, assert_says, noise, signal, wait_until};
use integration::images::{Tools, content, line, names};
use integration::libvirt::{SIZE, Scene, WAIT};
use integration::overlays::{HASTY, files_in};
use integration::restored::text;
use integration::{Outcome, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::json;
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::{Disk, Guest};

const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

fn store(scene: &Scene) -> PathBuf {
    scene.host.folder().join("store")
}

fn get_command(scene: &Scene, more: &[&str]) -> Command {
    let mut command = scene.host.command(["image", "get", "--json", "--into"]);
    command.arg(store(scene)).args(more);
    command
}

/// Keeps an image, which must succeed and hold what the domain's disks do; returns its folder.
#[track_caller]
fn get(scene: &Scene, more: &[&str]) -> PathBuf {
    let outcome = finish(spawn(get_command(scene, more)));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_kept(scene, &outcome, &scene.contents)
}

/// An image was kept that holds this; returns its folder.
#[track_caller]
fn assert_kept(scene: &Scene, outcome: &Outcome, contents: &Contents) -> PathBuf {
    let line = line(&outcome.stdout);
    assert_eq!(line["machine"], json!(scene.domain.name()));
    let kept = PathBuf::from(text(&line, "folder"));
    for disk in DISKS {
        let holds = content(&scene.host, &kept, disk) == contents.of(disk);
        assert!(holds, "{disk} is not as it was");
    }
    let checked = scene.host.run(["image".as_ref(), "check".as_ref(), kept.as_os_str()]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    let xml = fs::read_to_string(kept.join("domain.xml")).expect("a description");
    assert!(xml.contains(scene.domain.name()), "{xml}");
    kept
}

/// The domain runs on its own images, and nothing is left of any overlay or run.
#[track_caller]
fn assert_back(scene: &Scene) {
    let xml = scene.domain.virsh("dumpxml", &[]);
    let is_free = DISKS.iter().all(|disk| !xml.contains(&format!("-{disk}.qcow2'")));
    assert!(is_free && !xml.contains("<mirror"), "{xml}");
    let records = files_in(&scene.host.state().join("overlays"), ".json");
    assert_eq!((records, overlays(scene)), (Vec::new(), Vec::new()));
    scene.host.assert_nothing_left();
}

fn overlays(scene: &Scene) -> Vec<PathBuf> {
    let is_image = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "qcow2");
    files_in(scene.domain.folder(), "kvmsnap-").into_iter().filter(is_image).collect()
}

#[test]
fn a_domain_is_kept_while_it_runs_from_its_snapshot_and_when_it_is_off() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    let name = scene.domain.name().to_owned();
    scene.domain.start();
    let (tools, before) = (Tools::waiting(&scene.host), scene.contents.clone());

    let running = spawn(tools.used_by(get_command(&scene, &[&name])));
    wait_until(WAIT, "it copies", || tools.was_asked());
    scene.scribble();
    tools.go();
    let outcome = finish(running);

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(assert_kept(&scene, &outcome, &before), store(&scene).join(&name));
    assert_back(&scene);
    scene.scribble();
    // Somebody else may have its images hold still already, and ends that.
    scene.host.ok(["create", &name]);
    get(&scene, &[&name, "--name", "held"]);
    assert_eq!(overlays(&scene).len(), 3, "they are not ours to end");
    scene.host.ok(["purge", &name]);
    scene.scribble();
    let image = scene.domain.disk_path("vda");
    let file =
        ["--name", "file", "--format", "qcow2", "--file", image.to_str().expect("a plain path")];
    let in_use = finish(spawn(get_command(&scene, &file)));
    assert_says(&in_use, 1, "lock");
    assert!(in_use.stderr.contains("a guest uses it"), "{in_use:?}");
    let snapshot = scene.backup();
    get(&scene, &["--from", text(&snapshot, "id"), "--name", "stored"]);
    scene.domain.destroy();
    scene.scribble();
    get(&scene, &[&name, "--name", "off"]);
    assert_eq!(names(&store(&scene)), ["held", name.as_str(), "off", "stored"]);
    let one = ["--name", "one", "--disk", "vdb"];
    let outcome = finish(spawn(get_command(&scene, &[&[name.as_str()][..], &one].concat())));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(!store(&scene).join("one/vda.qcow2").exists());
    assert_eq!(content(&scene.host, &store(&scene).join("one"), "vdb"), scene.contents.of("vdb"));
}

#[test]
fn the_machine_is_kept_beside_its_disks_without_its_secrets() {
    const SECRET: &str = "canary7";
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os().disk(Disk::new("vda", SIZE)).under_libvirt().uefi();
    let console = format!("<graphics type='vnc' port='-1' passwd='{SECRET}'/>");
    let scene = Scene::of(plan.devices_xml(&console), &["vda"], SIZE, &libvirt);
    let name = scene.domain.name();
    scene.domain.start();
    // Firmware that finds nothing to boot writes that down, sooner or later.
    scene.domain.virsh("suspend", &[]);
    for (image, more, has_it) in
        [("plain", &[][..], false), ("told", &["--with-secrets"][..], true)]
    {
        let outcome =
            finish(spawn(get_command(&scene, &[&[name, "--name", image][..], more].concat())));

        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let kept = store(&scene).join(image);
        let xml = fs::read_to_string(kept.join("domain.xml")).expect("a description");
        assert_eq!(xml.contains(SECRET), has_it, "{xml}");
        let nvram = fs::read(scene.domain.folder().join("nvram.fd")).expect("firmware has memory");
        assert!(fs::read(kept.join("nvram.fd")).expect("it is kept") == nvram);
        assert_eq!(scene.domain.state(), "paused", "it stays as it was");
    }
    let kept = store(&scene).join("plain");
    fs::write(kept.join("nvram.fd"), "another").expect("it is ours");
    let checked = scene.host.run(["image".as_ref(), "check".as_ref(), kept.as_os_str()]);
    assert_says(&checked, 1, "1 problem was found");
    assert!(checked.stdout.contains("nvram.fd: its content is another one"), "{checked:?}");
}

#[test]
fn p2_r23_a_guest_is_brought_back_when_its_copy_is_killed_or_interrupted() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    let name = scene.domain.name().to_owned();
    scene.domain.start();
    for how in [Signal::SIGINT, Signal::SIGKILL] {
        let tools = Tools::hanging(&scene.host);
        let running = spawn(tools.used_by(get_command(&scene, &[&name])));
        wait_until(WAIT, "it copies", || tools.hangs().is_some());
        assert_eq!(overlays(&scene).len(), 3);
        scene.scribble();

        signal(running.pid(), how);

        let code = finish(running).code;
        assert_eq!(code, (how == Signal::SIGINT).then_some(130), "{how}");
        // Its guard does it for a run that was killed.
        wait_until(WAIT, "the guest is back", || overlays(&scene).is_empty());
        wait_until(WAIT, "its guard ends", || scene.guards().is_empty());
        assert_back(&scene);
        assert!(!names(&store(&scene)).contains(&name), "{how}");
    }
    get(&scene, &[&name]);
    assert_eq!(names(&store(&scene)), [name.as_str()]);
}

#[test]
fn p2_an_image_is_kept_also_where_the_guest_cannot_be_brought_back_yet() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    let name = scene.domain.name().to_owned();
    scene.domain.start();
    let (tools, before) = (Tools::waiting(&scene.host), scene.contents.clone());
    let running =
        spawn(tools.used_by(get_command(&scene, &[&[name.as_str()], &HASTY[..]].concat())));
    wait_until(WAIT, "it copies", || tools.was_asked());
    scene.write("vda", 0, &noise(2 << 20, 5));

    tools.go();

    let outcome = finish(running);
    assert_says(&outcome, 1, "the image is good, but the guest is not as it was");
    assert_kept(&scene, &outcome, &before);
    assert_eq!(scene.host.run(["doctor", "--repair"]).code, Some(0));
    assert_back(&scene);
    scene.backup();
}

#[test]
fn r01_p5_killed_or_failing_at_each_effect_a_copy_leaves_no_image_and_a_guest_that_goes_on() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::of(
        Guest::without_os().disk(Disk::new("vda", SIZE)).under_libvirt(),
        &["vda"],
        SIZE,
        &libvirt,
    );
    let name = scene.domain.name().to_owned();
    scene.domain.start();
    let effects = scene.host.effects(get_command(&scene, &[&name, "--name", "first"]));
    for (n, effect) in effects.iter().enumerate() {
        let fault = if n % 2 == 0 { Fault::Crash } else { Fault::FailOnce };
        let case = format!("{fault:?} at {effect}");

        let outcome = finish(spawn(fault.at(n + 1, get_command(&scene, &[&name]))));

        let kept = names(&store(&scene)).contains(&name);
        assert_eq!(kept, outcome.stdout.contains("sha256"), "{case}: {outcome:?}");
        assert_eq!(scene.domain.state(), "running", "{case}");
        scene.scribble();
        let repaired = scene.host.run(["doctor", "--repair"]);
        assert_eq!(repaired.code, Some(0), "{case}: {repaired:?}");
        assert_back(&scene);
        if kept {
            fs::remove_dir_all(store(&scene).join(&name)).expect("it is ours");
        }
    }
    let outcome = finish(spawn(get_command(&scene, &[&name])));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(content(&scene.host, &store(&scene).join(&name), "vda"), scene.contents.of("vda"));
    assert_eq!(names(&store(&scene)), ["first", name.as_str()]);
}

#[test]
fn p1_what_changes_while_it_is_read_is_not_kept() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt);
    let name = scene.domain.name().to_owned();
    let tools = Tools::hanging(&scene.host);
    let running = spawn(tools.used_by(get_command(&scene, &[&name])));
    wait_until(WAIT, "it copies", || tools.hangs().is_some());

    scene.domain.start();

    assert_says(&finish(running), 1, "was started meanwhile");
    assert_eq!(names(&store(&scene)), Vec::<String>::new());
    assert!(Path::new(&scene.domain.disk_path("vda")).exists());
    assert_says(&scene.host.run(["image", "get", "no-such-domain", "--into", "x"]), 2, "no domain");
}
