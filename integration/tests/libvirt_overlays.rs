//! `create` and `purge` on domains of libvirt: images that hold still, and the way back.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use integration::faults::assert_says;
use integration::libvirt::Scene;
use integration::restored::text;
use integration::{Outcome, finish, spawn, tool};
use serde_json::{Value, json};
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::oracle::{Load, judge};
use vm_fixtures::{Disk, Guest, MIB};

const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

fn command(scene: &Scene, command: &str, more: &[&str]) -> Command {
    let mut built = scene.host.command([command, "--json", scene.domain.name()]);
    built.args(more);
    built
}

fn try_run(scene: &Scene, name: &str, more: &[&str]) -> Outcome {
    finish(spawn(command(scene, name, more)))
}

/// Runs it, which must succeed, and returns its JSON lines.
#[track_caller]
fn ok(scene: &Scene, name: &str, more: &[&str]) -> Vec<Value> {
    let outcome = try_run(scene, name, more);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let parse = |line| serde_json::from_str(line).expect("a JSON object");
    outcome.stdout.lines().map(parse).collect()
}

fn files_in(folder: &Path, part: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let has = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().contains(part));
    entries.map(|entry| entry.path()).filter(has).collect()
}

fn overlays(scene: &Scene) -> Vec<PathBuf> {
    files_in(scene.domain.folder(), "kvmsnap-")
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "qcow2"))
        .collect()
}

fn records(scene: &Scene) -> Vec<PathBuf> {
    files_in(&scene.host.state().join("overlays"), ".json")
}

/// The domain runs on, or starts with, its own images, and nothing is left of any overlay.
#[track_caller]
fn assert_back(scene: &Scene) {
    for inactive in [&[][..], &["--inactive"]] {
        let xml = scene.domain.virsh("dumpxml", inactive);
        let is_free = DISKS.iter().all(|disk| !xml.contains(&format!("-{disk}.qcow2'")));
        assert!(is_free && !xml.contains("<mirror"), "{xml}");
    }
    let none = Vec::<PathBuf>::new();
    assert_eq!((overlays(scene), records(scene)), (none.clone(), none));
}

/// The images hold what the guest wrote, says QEMU's own tool; the domain is shut off.
#[track_caller]
fn assert_images_hold(scene: &Scene) {
    for disk in DISKS {
        let image = scene.domain.disk_path(disk);
        let format = if disk == "vdc" { "raw" } else { "qcow2" };
        assert!(differs(&image, format, scene, disk).is_none(), "{disk}");
    }
}

fn differs(image: &Path, format: &str, scene: &Scene, disk: &str) -> Option<usize> {
    let raw = scene.host.folder().join("copy.raw");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", format, "-O", "raw"]).arg(image).arg(&raw);
    tool(convert);
    let found = fs::read(raw).expect("a copy");
    found.iter().zip(scene.contents.of(disk)).position(|(a, b)| a != b)
}

#[test]
fn p3_images_of_a_domain_hold_still_and_backups_stay_incremental() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    let before = scene.contents.clone();

    let created = ok(&scene, "create", &[]);

    assert_eq!(created.len(), 3);
    scene.scribble();
    let live = std::mem::replace(&mut scene.contents, before);
    for line in &created {
        let (disk, frozen) = (text(line, "disk"), Path::new(text(line, "frozen")));
        assert_eq!(differs(frozen, text(line, "format"), &scene, disk), None, "{disk}");
        let overlay = fs::metadata(text(line, "overlay")).expect("an overlay");
        assert_eq!(overlay.permissions().mode() & 0o777, 0o600);
    }
    scene.contents = live;
    assert_eq!(ok(&scene, "create", &[])[0]["already"], json!(true));
    let meanwhile = scene.backup();
    assert_eq!(meanwhile["kind"], "rescan", "{meanwhile}");
    scene.scribble();

    let purged = ok(&scene, "purge", &[]);

    assert_eq!(purged.len(), 3);
    assert_back(&scene);
    scene.scribble();
    let after = scene.backup();
    let kinds = integration::faults::kinds(&after);
    assert_eq!((&*kinds["vda"], &*kinds["vdb"]), ("incremental", "incremental"), "{after}");
    assert_eq!(ok(&scene, "purge", &[]), Vec::<Value>::new());
    scene.assert_clean();
    scene.domain.destroy();
    assert_images_hold(&scene);
}

#[test]
fn p1_copies_of_a_working_domain_are_instants() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::builder().disk(Disk::new("vda", 8 * MIB)).disk(Disk::new("vdb", 8 * MIB));
    let plan = plan.disk(Disk::new("vdc", 8 * MIB));
    let domain = plan.under_libvirt().boot(&libvirt);
    let host = integration::Host::without_repository();
    let run = |arguments: &[&str]| -> Vec<Value> {
        let text = host.ok([arguments, &["--json", domain.name()]].concat());
        text.lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect()
    };
    let load = domain.start_load(&Load::default().mixed().depth(2), &["vda", "vdb"]);
    for _ in 0..2 {
        let acked = domain.oracle_log().acked();
        let created = run(&["create", "--quiesce", "require"]);
        let issued = domain.oracle_log().issued();
        let copy = |line: &Value| {
            let raw = host.folder().join(text(line, "disk"));
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-f", "qcow2", "-O", "raw", text(line, "frozen")]).arg(&raw);
            tool(convert);
            raw
        };
        let copies: Vec<PathBuf> = created[..2].iter().map(copy).collect();
        run(&["purge"]);
        let log = domain.oracle_log();
        let verdict = judge(&[(0, &copies[0]), (1, &copies[1])], &log).expect("copies");
        verdict.assert_instant_between(acked, issued);
    }
    load.stop();
    let load = domain.start_paced("vdc", 400);
    run(&["create"]);
    let purged = run(&["purge"]);
    let felt = load.longest();
    for line in &purged {
        let bound = |name: &str| line[name].as_u64().expect("it is known");
        let (least, most) = (bound("longest_stall_at_least_ms"), bound("longest_stall_ms"));
        let is_felt = u128::from(least) <= felt.as_millis();
        assert!(is_felt && least <= most && most > 0, "{line}, felt: {felt:?}");
    }
    assert_eq!(domain.state(), "running");
}

#[test]
fn r23_a_domain_that_ended_on_its_overlays_is_brought_back() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    let own: Vec<PathBuf> = DISKS.map(|disk| scene.domain.disk_path(disk)).into();
    // Killed, shut down, and started again in between.
    ok(&scene, "create", &[]);
    scene.scribble();
    scene.flush();
    scene.domain.kill_qemu();
    scene.domain.wait_state("shut off");
    assert_eq!(ok(&scene, "purge", &[]).len(), 3);
    assert_back(&scene);
    assert_images_hold(&scene);
    scene.domain.start();
    let after = scene.backup();
    assert_eq!(integration::faults::kinds(&after)["vda"], "incremental", "{after}");
    ok(&scene, "create", &[]);
    scene.scribble();
    scene.domain.destroy();
    scene.domain.start();
    scene.scribble();

    ok(&scene, "purge", &[]);

    assert_back(&scene);
    scene.domain.destroy();
    let now: Vec<PathBuf> = DISKS.map(|disk| scene.domain.disk_path(disk)).into();
    assert_eq!(now, own);
    assert_images_hold(&scene);
}

#[test]
fn r23_a_domain_defined_anew_on_its_own_images_is_brought_back_or_the_operator_is_told() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    let definition = scene.domain.folder().join("own.xml");
    fs::write(&definition, scene.domain.xml()).expect("the folder is writable");
    let define = |scene: &Scene| {
        scene.domain.libvirt().virsh(&["define", definition.to_str().expect("a plain path")]);
    };
    scene.domain.start();
    ok(&scene, "create", &[]);
    scene.scribble();
    scene.domain.destroy();
    define(&scene);
    ok(&scene, "purge", &[]);
    assert_back(&scene);
    assert_images_hold(&scene);
    scene.domain.start();
    ok(&scene, "create", &[]);
    scene.domain.qemu_io("vda", "write -P 9 0 64k");
    scene.domain.destroy();
    define(&scene);
    scene.domain.start();

    let outcome = try_run(&scene, "purge", &[]);

    assert_says(&outcome, 1, "runs without its overlay");
    assert_eq!((overlays(&scene).len(), records(&scene).len()), (3, 1), "nothing was deleted");
}

#[test]
fn r13_a_domain_that_cannot_be_brought_back_in_time_stays_and_the_next_purge_finishes() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    ok(&scene, "create", &[]);
    scene.write("vda", 0, &integration::faults::noise(4 << 20, 3));
    let limit = |scene: &Scene| {
        let limits = scene.domain.virsh("blkdeviotune", &["vda"]);
        limits.lines().find(|line| line.starts_with("write_bytes_sec")).map(str::to_owned)
    };
    let before = limit(&scene);

    let hasty = ["--deadline", "0.5", "--max-pause", "0", "--limit-rate", "64KiB"];
    let outcome = try_run(&scene, "purge", &hasty);

    assert_says(&outcome, 1, "was not brought back in time");
    assert!(outcome.stderr.contains("a second for now"), "{outcome:?}");
    assert!(outcome.took < Duration::from_secs(30), "{:?}", outcome.took);
    assert_eq!(limit(&scene), before, "the guest writes as it did");
    assert_eq!(scene.domain.state(), "running");
    scene.scribble();
    ok(&scene, "purge", &[]);
    assert_back(&scene);
    scene.domain.destroy();
    assert_images_hold(&scene);
}

#[test]
fn r13_a_domain_is_stopped_for_the_last_of_it_no_longer_than_it_may() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    ok(&scene, "create", &[]);
    scene.write("vda", 0, &integration::faults::noise(4 << 20, 3));

    // QEMU writes back 1 MiB at a time, then rests; each change of its limits and each stop ends a rest early.
    let slow = ["--deadline", "0.2", "--max-pause", "60", "--limit-rate", "1MiB"];
    let purged = ok(&scene, "purge", &slow);

    let pause = purged[0]["pause_ms"].as_u64().expect("it was stopped");
    assert!((1..60_000).contains(&pause), "{purged:?}");
    assert_eq!(scene.domain.state(), "running");
    assert_back(&scene);
    scene.domain.destroy();
    assert_images_hold(&scene);
}

#[test]
fn a_domain_that_is_off_needs_no_overlays() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt);
    assert_says(&try_run(&scene, "create", &[]), 1, "hold still as they are");
    assert_eq!(ok(&scene, "purge", &[]), Vec::<Value>::new());
}

// ---- what is refused ----------------------------------------------------------------------------

#[test]
fn a_job_of_somebody_else_is_not_taken_for_a_purge() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt);
    scene.domain.start();
    ok(&scene, "create", &[]);
    let copy = scene.domain.folder().join("copy.qcow2");
    let to = copy.to_str().expect("a plain path");
    scene.domain.virsh("blockcopy", &["vda", to, "--transient-job"]);

    let outcome = try_run(&scene, "purge", &[]);

    assert_says(&outcome, 1, "a job of somebody else writes it to");
    assert_eq!(overlays(&scene).len(), 3);
    scene.domain.virsh("blockjob", &["vda", "--abort"]);
    ok(&scene, "purge", &[]);
    assert_back(&scene);
    scene.domain.destroy();
    assert_images_hold(&scene);
}

#[test]
fn r23_overlays_that_only_a_definition_names_are_not_taken_for_unused() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt);
    scene.domain.start();
    // The last effect records that the images hold still.
    let last = scene.host.effects(command(&scene, "create", &[])).len();
    ok(&scene, "purge", &[]);
    let mut killed = command(&scene, "create", &[]);
    killed.env("KVMSNAP_CRASH_AT", last.to_string());
    assert_eq!(finish(spawn(killed)).code, None);
    assert_eq!(overlays(&scene).len(), 3);
    scene.domain.destroy();
    let definition = scene.domain.virsh("dumpxml", &["--inactive"]);
    assert!(definition.contains("/kvmsnap-"), "{definition}");

    ok(&scene, "purge", &[]);

    assert_back(&scene);
    assert_images_hold(&scene);
}

#[test]
fn r23_a_domain_defined_anew_with_another_uuid_takes_over_its_overlays() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    let (definition, uuid) = (scene.domain.xml(), scene.domain.uuid());
    scene.domain.start();
    ok(&scene, "create", &[]);
    scene.scribble();
    scene.domain.destroy();
    scene.domain.virsh("undefine", &[]);
    let anew = scene.domain.folder().join("anew.xml");
    let other: String = uuid[..24].chars().chain(uuid[24..].chars().rev()).collect();
    let definition = definition.replace(&uuid, &other);
    fs::write(&anew, definition).expect("the folder is writable");
    libvirt.virsh(&["define", anew.to_str().expect("a plain path")]);

    let outcome = try_run(&scene, "purge", &[]);

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("takes over its overlays"), "{outcome:?}");
    assert_back(&scene);
    assert_images_hold(&scene);
}

/// A new effect does not come without its fault: the sweep goes through all of these.
#[test]
fn r01_the_effects_of_create_and_purge_on_a_domain_are_known() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt);
    scene.domain.start();
    let created = scene.host.effects(command(&scene, "create", &[]));
    let purged = scene.host.effects(command(&scene, "purge", &[]));
    let thrice = |effects: &[&'static str]| [effects, effects, effects].concat();
    let expected = [
        vec!["overlays: record"],
        thrice(&["overlay: create"]),
        vec!["overlays: record", "libvirt: put overlays above the disks"],
        vec!["overlays: record"],
    ]
    .concat();
    assert_eq!(created, expected);
    let back = [
        "overlays: record",
        "libvirt: write back the overlay of",
        "overlays: record",
        "libvirt: go on with the image of",
        "image: make durable",
        "overlays: record",
        "overlay: put aside",
        "overlay: delete",
    ];
    let expected = [thrice(&back), vec!["overlays: clear"]].concat();
    assert_eq!(purged, expected);
}

#[test]
fn r01_create_and_purge_killed_at_each_effect_are_gone_on_with() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.domain.start();
    let counts = ["create", "purge"].map(|name| {
        let effects = scene.host.effects(command(&scene, name, &[]));
        (name, effects.len())
    });
    for (name, count) in counts {
        for n in 1..=count {
            let case = format!("{name} killed at {n}");
            if name == "purge" {
                ok(&scene, "create", &[]);
            }
            scene.scribble();
            let mut killed = command(&scene, name, &[]);
            killed.env("KVMSNAP_CRASH_AT", n.to_string());

            let outcome = finish(spawn(killed));

            assert_eq!(outcome.code, None, "{case}: {outcome:?}");
            assert_eq!(scene.domain.state(), "running", "{case}");
            scene.scribble();
            ok(&scene, "purge", &[]);
            assert_back(&scene);
        }
    }
    scene.domain.destroy();
    assert_images_hold(&scene);
}
