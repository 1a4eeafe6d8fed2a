//! Domains of libvirt that are shut off: backed up as they lie there, in one chain with the backups of
//! the running domain.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use integration::faults::{Fault, assert_says, kinds, noise, signal, wait_until};
use integration::libvirt::{HELD_UP, SIZE, Scene, WAIT, assert_incremental, daemons};
use integration::restored::disk;
use integration::{Host, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::{Disk, FileSystem, Guest, MIB};

/// Domains that are tested at once.
const WORKERS: usize = 3;
/// Those that keep dirty bitmaps.
const TRACKED: [&str; 2] = ["vda", "vdb"];

#[test]
fn p1_p3_the_chain_goes_on_whether_the_domain_runs_or_not() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.domain.start();
    assert_eq!(scene.backup()["kind"], "full");
    for turn in 0..2 {
        scene.scribble();
        scene.domain.destroy();
        assert_incremental(&scene.backup(), "offline");
        scene.scribble();
        assert_incremental(&scene.backup(), "offline");
        assert!(scene.domain.virsh("checkpoint-list", &["--name"]).trim().is_empty(), "{turn}");

        scene.domain.start();

        scene.scribble();
        assert_incremental(&scene.backup(), "bitmap");
        scene.assert_clean();
    }
    scene.host.assert_restic_is_content();
}

#[test]
fn p1_a_domain_that_never_ran_is_backed_up_with_all_others() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    let pattern = format!("{}*", scene.domain.name());
    // Its exit code is about domains of other tests too, which come and go.
    let all = scene.host.run(["backup", "--dry-run", "--all"]);
    let line = format!("{}/vda: 4.00 MiB, full", scene.domain.name());
    assert!(all.stdout.contains(&line), "{all:?}");
    let first = scene.host.ok(["backup", "--json", &pattern]);
    let first: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(
        (&first["kind"], &first["method"], &first["consistency"]),
        (&"full".into(), &"offline".into(), &"crash".into())
    );
    scene.scribble();

    let second = scene.backup_with(&["--method", "offline"]);

    assert_incremental(&second, "offline");
    let unchanged = scene.backup();
    for target in TRACKED {
        assert_eq!(disk(&unchanged, target)["bytes_read"], 0, "{unchanged}");
    }
    scene.host.assert_holds(&second, &scene.contents);
    assert_eq!(scene.domain.state(), "shut off");
    scene.assert_clean();
}

/// An overlay that libvirt makes takes on the names of the dirty bitmaps beneath it, not their content.
#[test]
fn p1_a_disk_that_got_an_overlay_is_read_whole_once_with_what_lies_beneath() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.backup();
    scene.scribble();
    let base = scene.domain.disk_path("vda");
    scene.domain.start();
    let disks = ["--disk-only", "--no-metadata", "--diskspec", "vdc,snapshot=no"];
    scene.domain.virsh("snapshot-create-as", &disks);
    scene.domain.destroy();
    assert_ne!(scene.domain.disk_path("vda"), base, "there is an overlay");
    assert_eq!(scene.bitmaps_at_rest("vda").len(), 1);
    scene.scribble();

    let whole = scene.backup();

    let reason = whole["disks"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("put above another one"), "{whole}");
    assert_eq!(kinds(&whole)["vda"], "rescan", "{whole}");
    scene.scribble();
    assert_incremental(&scene.backup(), "offline");
    scene.domain.start();
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}

/// Adds a disk of another kind to a domain that is shut off.
#[track_caller]
fn attach(scene: &Scene, target: &str, kind: &str, format: &str, source: &str) {
    let xml = format!(
        "<disk type='{kind}' device='disk'><driver name='qemu' type='{format}'/>{source}\
         <target dev='{target}' bus='virtio'/><alias name='ua-{target}'/></disk>"
    );
    let file = scene.domain.folder().join(format!("{target}.xml"));
    fs::write(&file, xml).expect("the domain's folder is writable");
    scene.domain.virsh("attach-device", &[&file.to_string_lossy(), "--config"]);
}

fn one_disk(libvirt: &Libvirt, disk: Disk) -> Scene {
    Scene::of(Guest::without_os().disk(disk).under_libvirt(), &["vda"], SIZE, libvirt)
}

#[test]
fn p1_a_disk_on_the_network_is_read_whole_whether_the_domain_runs_or_not() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = one_disk(&libvirt, Disk::new("vda", SIZE));
    let folder = scene.domain.folder().to_owned();
    let (image, socket) = (folder.join("network.raw"), folder.join("nbd.sock"));
    File::create(&image).and_then(|file| file.set_len(SIZE)).expect("the folder is writable");
    let mut server = Command::new("qemu-nbd");
    server.args(["-t", "-e", "8", "-f", "raw", "-x", "disk", "-k"]).arg(&socket).arg(&image);
    let _server = spawn(server);
    let listens = || UnixStream::connect(&socket).is_ok();
    wait_until(WAIT, "the NBD server listens", listens);
    let everybody = fs::Permissions::from_mode(0o666);
    fs::set_permissions(&socket, everybody).expect("the socket is ours");
    let host = format!("<host transport='unix' socket='{}'/>", socket.display());
    let source = format!("<source protocol='nbd' name='disk'>{host}</source>");
    attach(&scene, "vdb", "network", "raw", &source);
    scene.contents.add("vdb", SIZE);
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    for (turn, method) in ["offline", "bitmap", "bitmap", "offline"].into_iter().enumerate() {
        match turn {
            1 => scene.domain.start(),
            3 => scene.domain.destroy(),
            _ => {}
        }
        let (offset, bytes) = ((turn * 300) << 10, noise(200 << 10, turn as u64));
        scene.write("vda", offset, &bytes);
        let file = folder.join("buffer");
        let write = format!("write -s {} {offset} {}", file.display(), bytes.len());
        if method == "bitmap" {
            scene.domain.qemu_io("vdb", &write);
        } else {
            let mut io = Command::new("qemu-io");
            io.args(["-f", "raw", "-c", &write, &uri]);
            tool(io);
        }
        scene.contents.note("vdb", offset, &bytes);

        let made = scene.backup();

        assert_eq!(made["method"], method, "{made}");
        let expected = if turn == 0 { ["full", "full"] } else { ["incremental", "rescan"] };
        assert_eq!(kinds(&made).values().collect::<Vec<_>>(), expected, "{made}");
        assert_eq!(made["skipped"], json!([]), "{made}");
        scene.assert_clean_but_bitmaps();
    }
    scene.host.assert_restic_is_content();
}

#[test]
fn p1_an_image_with_its_data_in_another_file_is_read_with_it() {
    let Some(libvirt) = Libvirt::start() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let options = format!("data_file={}", data.display());
    let mut scene = one_disk(&libvirt, Disk::new("vda", SIZE).create_options(&options));
    assert_eq!(kinds(&scene.backup())["vda"], "full");
    scene.scribble();

    assert_incremental(&scene.backup(), "offline");

    scene.assert_clean();
    scene.write("vda", 0, &noise(2 << 20, 7));
    let running = scene.backup_at_rest_slowly(&[]);
    // The data file alone.
    File::options().write(true).open(&data).and_then(|f| f.write_at(&[1], 9)).expect("our file");
    assert_says(&finish(running), 1, "was changed while it was read");
}

#[test]
fn a_disk_that_only_a_running_domain_can_read_is_left_out_with_what_to_do() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = one_disk(&libvirt, Disk::new("vda", SIZE));
    let secret = "<secret type='passphrase' uuid='0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f'/>";
    let luks = format!("<encryption format='luks'>{secret}</encryption>");
    attach(&scene, "vdb", "file", "qcow2", &format!("<source file='/nowhere'>{luks}</source>"));
    let ceph = "<source protocol='rbd' name='pool/image'><host name='mon' port='6789'/></source>";
    attach(&scene, "vdc", "network", "raw", ceph);

    let made = scene.backup();

    let skipped = made["skipped"].as_array().expect("a list");
    let status = scene.host.ok(["status", scene.domain.name()]);
    assert!(status.contains("vdb: left out (its image is encrypted"), "{status}");
    assert_eq!(skipped.len(), 2, "{made}");
    for (skipped, (disk, why)) in skipped.iter().zip([("vdb", "encrypted"), ("vdc", "rbd")]) {
        assert_eq!((&skipped["device"], &skipped["is_disk"]), (&json!(disk), &json!(true)));
        let reason = skipped["reason"].as_str().expect("words");
        assert!(reason.contains(why) && reason.ends_with("back it up while it runs"), "{reason}");
    }
}

#[test]
fn a_guest_that_shut_itself_down_has_left_its_file_systems_whole() {
    let Some(libvirt) = Libvirt::start() else { return };
    let disk = Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4);
    let domain = Guest::builder().disk(disk).under_libvirt().boot(&libvirt);
    domain.write_file("/mnt/vda/file", b"content");
    domain.powerdown();
    let host = Host::new();
    let backup = |mode: &str| host.run(["backup", "--json", "--quiesce", mode, domain.name()]);

    let clean = backup("require");

    assert!(clean.stdout.contains("\"consistency\":\"filesystem\""), "{clean:?}");
    domain.start();
    domain.destroy();
    let cut_off = backup("auto");
    assert!(cut_off.stdout.contains("\"consistency\":\"crash\""), "{cut_off:?}");
    assert_says(&backup("require"), 1, "it was not shut down by its guest");
}

#[test]
fn r03_a_bitmap_that_a_killed_qemu_left_in_use_costs_one_rescan() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.backup();
    scene.domain.start();
    scene.scribble();
    scene.flush();
    scene.domain.kill_qemu();

    let rescan = scene.backup();

    assert!(kinds(&rescan).values().all(|kind| kind == "rescan"), "{rescan}");
    let reason = rescan["disks"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("inconsistent"), "{rescan}");
    scene.scribble();
    assert_incremental(&scene.backup(), "offline");
    scene.assert_clean();
}

#[test]
fn p2_a_domain_that_is_started_during_the_backup_comes_first() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.backup();
    scene.write("vda", 0, &noise(2 << 20, 7));
    let running = scene.backup_at_rest_slowly(&[]);
    let start = Instant::now();

    scene.domain.start();

    assert!(start.elapsed() < HELD_UP, "{:?}", start.elapsed());
    scene.scribble();
    let outcome = finish(running);
    assert_says(&outcome, 1, "was started meanwhile");
    assert!(outcome.stderr.contains("hint: nothing was recorded; back up again"), "{outcome:?}");
    assert_eq!(scene.host.list().len(), 1);
    scene.assert_clean();
    let next = scene.backup();
    assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
    scene.assert_clean();
}

#[test]
fn p1_a_domain_that_ran_unseen_during_the_backup_spoils_it() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.backup();
    scene.write("vda", 0, &noise(2 << 20, 7));
    let running = scene.backup_at_rest_slowly(&[]);
    signal(running.pid(), Signal::SIGSTOP);
    scene.domain.start();
    scene.scribble();
    scene.domain.destroy();

    signal(running.pid(), Signal::SIGCONT);

    let outcome = finish(running);
    assert_says(&outcome, 1, "was changed while it was read");
    assert_eq!(scene.host.list().len(), 1);
    scene.assert_clean();
    let next = scene.backup();
    assert_eq!((&kinds(&next)["vda"][..], &next["method"]), ("incremental", &"offline".into()));
}

#[test]
fn r01_the_storage_daemon_dies_with_its_run_and_the_domain_may_be_started_at_once() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.backup();
    scene.write("vda", 0, &noise(2 << 20, 7));
    let running = scene.backup_at_rest_slowly(&[]);

    signal(running.pid(), Signal::SIGKILL);

    finish(running);
    wait_until(WAIT, "the daemon is gone", || daemons(&scene.domain).is_empty());
    // Before anybody has undone the run: its new bitmap is in the images, and now in QEMU.
    scene.domain.start();
    scene.scribble();
    let next = scene.backup();
    assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
    scene.assert_clean();
}

#[test]
fn r01_a_killed_run_is_undone_by_its_guard_where_no_other_run_comes() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.backup();
    scene.write("vda", 0, &noise(2 << 20, 7));
    let running = scene.backup_at_rest_slowly(&[]);
    assert_eq!(scene.bitmaps_at_rest("vda").len(), 2);

    signal(running.pid(), Signal::SIGKILL);

    finish(running);
    wait_until(WAIT, "the guard undoes the run", || scene.host.undo_records() == 0);
    for disk in TRACKED {
        assert_eq!(scene.bitmaps_at_rest(disk).len(), 1, "{disk}");
    }
    assert_eq!(kinds(&scene.backup())["vda"], "incremental");
    scene.assert_clean();
}

#[test]
fn r01_killed_or_failing_at_each_effect_loses_only_the_run_in_progress() {
    let Some(libvirt) = Libvirt::start() else { return };
    // A round waits more than it works.
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let libvirt = &libvirt;
            scope.spawn(move || sweep(libvirt, worker));
        }
    });
}

/// Each effect of a backup at rest is killed, and fails, by one of some workers.
fn sweep(libvirt: &Libvirt, worker: usize) {
    let mut scene = Scene::new(libvirt);
    scene.backup();
    scene.scribble();
    let effects = scene.host.effects(scene.command(&[]));
    assert!(effects.iter().any(|effect| effect == "qemu-img: --remove"), "{effects:?}");
    let numbered = effects.iter().enumerate().map(|(n, effect)| (n + 1, effect));
    for (n, effect) in numbered.skip(worker).step_by(WORKERS) {
        for fault in [Fault::Crash, Fault::failing(n)] {
            let case = format!("{fault:?} at {n}, {effect}");
            scene.scribble();

            let outcome = finish(spawn(fault.at(n, scene.command(&[]))));

            scene.host.assert_honest(&case, fault, &outcome, &scene.contents);
            scene.scribble();
            let next = scene.backup();
            let kinds = kinds(&next);
            assert!(TRACKED.iter().all(|disk| kinds[*disk] == "incremental"), "{case}: {next}");
            scene.assert_clean();
        }
    }
    scene.domain.start();
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.host.assert_restic_is_content();
}

#[test]
fn an_image_that_somebody_writes_to_is_not_backed_up() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.backup();
    for (disk, format) in [("vda", "qcow2"), ("vdc", "raw")] {
        let image = scene.domain.disk_path(disk);
        let mut writer = Command::new("qemu-io");
        writer.args(["-f", format, "-c", "write -P 1 0 64k", "-c", "flush"]);
        writer.args(["-c", "sleep 120000"]).arg(&image);
        let modified = || fs::metadata(&image).unwrap().modified().unwrap();
        let before = modified();
        let writer = spawn(writer);
        // Its header is written to first.
        wait_until(WAIT, "the writer has written", || modified() != before && holds(&image, 1));

        let outcome = scene.try_backup(&[]);

        assert_says(&outcome, 1, "is in use by another process");
        assert!(outcome.stderr.contains(image.to_str().unwrap()), "{outcome:?}");
        // Killed, it leaves the dirty bitmaps in use.
        drop(writer);
    }
    assert_eq!(scene.host.list().len(), 1);
    scene.host.assert_nothing_left();
    scene.contents.note("vda", 0, &[1; 64 << 10]);
    scene.contents.note("vdc", 0, &[1; 64 << 10]);
    scene.backup();
    scene.assert_clean();
}

/// Whether 64 KiB of this byte lie somewhere in a file.
fn holds(file: &Path, byte: u8) -> bool {
    fs::read(file).unwrap().chunks(64 << 10).any(|chunk| chunk.iter().all(|b| *b == byte))
}

#[test]
fn a_template_of_guests_that_run_is_read_and_left_as_it_is() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut template = Scene::new(&libvirt);
    template.backup();
    template.scribble();
    let clone = Guest::without_os().disk(Disk::new("vda", SIZE)).under_libvirt().define(&libvirt);
    let (image, base) = (clone.disk_path("vda"), template.domain.disk_path("vda"));
    let mut create = Command::new("qemu-img");
    create.args(["create", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&base).arg(&image);
    tool(create);
    clone.start();

    let meanwhile = template.backup();

    assert_eq!(kinds(&meanwhile)["vda"], "rescan", "{meanwhile}");
    let reason = meanwhile["disks"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("beneath the disk of a guest that runs"), "{meanwhile}");
    assert_eq!(kinds(&meanwhile)["vdb"], "incremental", "{meanwhile}");
    clone.qemu_io("vda", "write -P 0x22 0 64k");
    clone.destroy();
    let after = template.backup();
    assert_eq!(kinds(&after)["vda"], "incremental", "{after}");
    template.assert_clean();
}
