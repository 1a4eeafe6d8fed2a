//! Faults while domains of libvirt run: QEMU, kvmsnap or the guest end, disks change between
//! backups, checkpoints are lost, the scratch fills.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::{Duration, Instant};

use integration::faults::{SmallDisk, assert_says, kinds, noise, signal, wait_until};
use integration::libvirt::{
    CHUNK_LEN, HELD_UP, SIZE, Scene, WAIT, assert_incremental, takes_sockets,
};
use integration::restored::{disk, text};
use integration::{Host, Outcome, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::Value;
use vm_fixtures::libvirt::{Domain, Libvirt};
use vm_fixtures::{Disk, FileSystem, Guest, MIB};

/// What the tests change at once, more than a slow backup reads in a minute.
const NOISE_LEN: usize = 2 << 20;

#[track_caller]
fn stored(snapshot: &Value) -> u64 {
    let disks = snapshot["disks"].as_array().expect("a list of disks").iter();
    disks.map(|disk| disk["bytes_stored"].as_u64().expect("a count of bytes")).sum()
}

/// The backup failed in words, nothing was recorded, and the next one reads by the same bitmaps.
#[track_caller]
fn assert_failed(scene: &Scene, outcome: &Outcome, words: &str, snapshots: usize) {
    assert_says(outcome, 1, words);
    assert_eq!(scene.host.list().len(), snapshots, "{outcome:?}");
}

// ---- R02: QEMU dies -----------------------------------------------------------------------------

#[test]
fn r02_qemu_killed_in_mid_job_costs_one_rescan_that_stores_only_what_changed() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.write("vda", 0, &noise(NOISE_LEN, 1));
    scene.flush();
    let running = scene.backup_slowly(&[]);

    scene.domain.kill_qemu();

    assert_failed(&scene, &finish(running), "died during the backup", 1);
    scene.domain.start();
    let rescan = scene.backup();
    for target in ["vda", "vdb"] {
        let disk = disk(&rescan, target);
        assert_eq!(disk["kind"], "rescan", "{rescan}");
        assert!(text(disk, "reason").contains("QEMU ended without closing"), "{rescan}");
    }
    let changed = NOISE_LEN as u64;
    assert!(stored(&rescan) < changed + 4 * CHUNK_LEN, "{rescan}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
    scene.host.assert_restic_is_content();
}

#[test]
fn r02_what_the_guest_wrote_before_its_qemu_was_killed_is_in_the_next_backup() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.write("vda", 0, &noise(NOISE_LEN, 1));
    let running = scene.backup_slowly(&[]);
    scene.scribble();
    scene.write("vdb", 1 << 20, &noise(64 << 10, 2));
    scene.flush();

    scene.domain.kill_qemu();

    assert_failed(&scene, &finish(running), "died during the backup", 1);
    scene.domain.start();
    scene.scribble();
    let rescan = scene.backup();
    assert!(kinds(&rescan).values().all(|kind| kind == "rescan"), "{rescan}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}

// ---- R04: the guest resets or goes off ----------------------------------------------------------

#[test]
fn r04_a_reset_in_mid_job_changes_nothing_for_the_backup() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.write("vda", 0, &noise(512 << 10, 1));
    let running = scene.backup_slowly(&[]);

    scene.domain.reset();

    let snapshot = scene.assert_good(&finish(running));
    assert_eq!(kinds(&snapshot)["vda"], "incremental", "{snapshot}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}

#[test]
fn r04_a_domain_that_goes_off_in_mid_job_fails_its_backup_and_no_more() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    // As by its administrator, and as by its guest.
    let endings: [&dyn Fn(&Domain); 2] = [&Domain::destroy, &|domain| {
        // It may end before its answer.
        let _ = domain.try_virsh("qemu-monitor-command", &[r#"{"execute":"quit"}"#]);
        domain.wait_state("shut off");
    }];
    for (turn, ending) in endings.into_iter().enumerate() {
        let snapshots = scene.host.list().len();
        scene.write("vda", 0, &noise(NOISE_LEN, turn as u64));
        let running = scene.backup_slowly(&[]);

        ending(&scene.domain);

        // A QEMU that ends in order ends its jobs first, and may be seen in between.
        let outcome = finish(running);
        let in_between = outcome.stderr.contains("its backup job has ended");
        let words = if in_between { "is lost" } else { "died during the backup" };
        assert_failed(&scene, &outcome, words, snapshots);
        let next = scene.backup();
        assert_eq!(next["method"], "offline", "{next}");
        assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
        scene.assert_clean();
        scene.domain.start();
        scene.scribble();
        assert_incremental(&scene.backup(), "bitmap");
        scene.assert_clean();
    }
}

// ---- R06, R07: disks change between backups -----------------------------------------------------

#[test]
fn r06_a_disk_that_grew_stays_incremental_and_its_tail_counts_as_changed() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.domain.resize("vda", SIZE + 2 * MIB);
    scene.contents.resize("vda", SIZE + 2 * MIB);
    scene.scribble();
    scene.write("vda", SIZE as usize + 4096, &noise(64 << 10, 3));

    let grown = scene.backup();

    assert_incremental(&grown, "bitmap");
    let disk = disk(&grown, "vda");
    assert_eq!(disk["size"], SIZE + 2 * MIB, "{grown}");
    assert!(disk["bytes_changed"].as_u64().is_some_and(|bytes| bytes >= 2 * MIB), "{grown}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}

#[test]
fn r07_a_disk_that_was_added_is_the_only_one_that_is_full() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.domain.attach_disk(&Disk::new("vdd", SIZE));
    scene.contents.add("vdd", SIZE);
    scene.scribble();

    let with_it = scene.backup();

    let kinds = kinds(&with_it);
    assert_eq!(kinds["vdd"], "full", "{with_it}");
    assert_eq!([&kinds["vda"], &kinds["vdb"]], ["incremental"; 2], "{with_it}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}

#[test]
fn r07_another_image_behind_the_same_target_is_read_whole_and_no_other_disk() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.domain.destroy();
    let (old, new) = (scene.domain.disk_path("vdb"), scene.domain.folder().join("other.qcow2"));
    vm_fixtures::run("qemu-img", &["create", "-q", "-f", "qcow2", text_of(&new), "4M"]);
    let xml = scene.domain.xml().replace(text_of(&old), text_of(&new));
    define(&scene, &xml);
    scene.contents.note("vdb", 0, &[0; SIZE as usize]);
    scene.domain.start();
    scene.scribble();

    let other = scene.backup();

    assert_eq!(kinds(&other)["vda"], "incremental", "{other}");
    assert_eq!(kinds(&other)["vdb"], "rescan", "{other}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}

fn text_of(path: &std::path::Path) -> &str {
    path.to_str().expect("a plain path")
}

#[track_caller]
fn define(scene: &Scene, xml: &str) {
    let file = scene.domain.folder().join("changed.xml");
    fs::write(&file, xml).expect("the domain's folder is writable");
    scene.domain.libvirt().virsh(&["define", text_of(&file)]);
}

// ---- R08: no room for the scratch ---------------------------------------------------------------

/// Size of a disk of which more is overwritten than a scratch of [`SCRATCH_SIZE`] takes.
const LARGE: u64 = 384 * MIB;
const SCRATCH_SIZE: u64 = 400 * MIB;

/// A small file system that QEMU's user can reach.
#[track_caller]
fn small_disk(scene: &Scene, size: u64) -> SmallDisk {
    let small = SmallDisk::mount(&scene.domain.folder().join("scratch"), size);
    let passable = fs::Permissions::from_mode(0o711);
    fs::set_permissions(small.folder(), passable).expect("a folder of ours");
    small
}

#[test]
fn r08_scratch_full_never_hurts_the_guest() {
    const STEP: usize = 8 << 20;
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os().disk(Disk::new("vda", LARGE));
    let mut scene = Scene::of(plan.under_libvirt(), &["vda"], LARGE, &libvirt);
    // Before the start: QEMU does not see what is mounted later.
    let small = small_disk(&scene, SCRATCH_SIZE);
    scene.domain.start();
    scene.write("vda", 0, &vec![1; LARGE as usize]);
    scene.backup();
    scene.write("vda", 0, &noise(NOISE_LEN, 1));
    let running = scene.backup_slowly(&["--scratch-dir", text_of(small.folder())]);

    // Far more than the scratch holds, from the end, where nothing has been read yet.
    for place in (0..LARGE as usize).step_by(STEP).rev() {
        let start = Instant::now();
        scene.write("vda", place, &[2; STEP]);
        assert!(start.elapsed() < HELD_UP, "a write took {:?}", start.elapsed());
        assert_eq!(scene.domain.state(), "running");
    }

    let outcome = finish(running);
    assert_failed(&scene, &outcome, "are left where the scratch of disk `vda` is", 1);
    assert!(outcome.stderr.contains("hint: nothing was recorded and the guest goes on"));
    let next = scene.backup();
    assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
    assert_eq!(scene.domain.state(), "running");
    scene.assert_clean();
}

#[test]
fn r08_without_room_for_the_scratch_nothing_is_begun() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.scribble();
    let small = small_disk(&scene, 2 * MIB);
    let before = scene.checkpoints();

    let outcome = scene.try_backup(&["--scratch-dir", text_of(small.folder())]);

    assert_failed(&scene, &outcome, "scratch", 1);
    assert!(outcome.stderr.contains("--scratch-dir names"), "{outcome:?}");
    assert_eq!(scene.checkpoints(), before);
    scene.assert_clean();
    let missing = scene.try_backup(&["--scratch-dir", "/nonexistent/scratch"]);
    assert_failed(&scene, &missing, "/nonexistent/scratch", 1);
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}

// ---- R15: the guest's agent ---------------------------------------------------------------------

const AGENT_CHANNEL: &str =
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
/// The watchdog's deadline, and what a busy machine may add to it.
const FREEZE_MAX: Duration = Duration::from_secs(30);

#[test]
fn r15_a_channel_without_an_agent_is_a_warning() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os().disk(Disk::new("vda", SIZE));
    let plan = plan.under_libvirt().devices_xml(AGENT_CHANNEL);
    let scene = Scene::of(plan, &["vda"], SIZE, &libvirt);
    scene.domain.start();

    let snapshot = scene.backup();

    assert_eq!(snapshot["consistency"], "crash", "{snapshot}");
    let warning = snapshot["warnings"][0].as_str().unwrap_or_default();
    assert!(warning.starts_with("not frozen, the backup is crash-consistent: "), "{snapshot}");
    let required = scene.try_backup(&["--quiesce", "require"]);
    assert_failed(&scene, &required, "could not be frozen", 1);
    scene.assert_clean();
}

#[test]
fn r15_a_guest_is_thawed_though_its_agent_hangs_or_its_backup_dies() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::builder()
        .disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4))
        .disk(Disk::new("vdb", SIZE));
    let domain = plan.under_libvirt().boot(&libvirt);
    let host = Host::new();
    let backup = |more: &[&str]| {
        let mut command = host.command(["backup", "--json", domain.name()]);
        command.args(more);
        command
    };
    let good = |what: &str| -> Value {
        let outcome = finish(spawn(backup(&[])));
        assert_eq!(outcome.code, Some(0), "{what}: {outcome:?}");
        serde_json::from_str(&outcome.stdout).expect("one JSON object")
    };
    // Returns only when its file system takes writes.
    let writes = |what: &str| {
        let start = Instant::now();
        domain.sh("echo held > /mnt/vda/held && sync");
        assert!(start.elapsed() < FREEZE_MAX, "{what}: frozen for {:?}", start.elapsed());
    };
    assert_eq!(good("at first")["consistency"], "filesystem");
    let agents = domain.sh("grep -la org.qemu.guest_agent.0 /proc/[0-9]*/cmdline | cut -d/ -f3");
    let agents = agents.split_whitespace().collect::<Vec<_>>().join(" ");
    let to_agents = |name: &str| {
        domain.sh(&format!("for p in {agents}; do kill -{name} $p; done; true"));
    };

    to_agents("STOP");
    let outcome = finish(spawn(backup(&[])));
    writes("the agent hangs");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let snapshot: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
    assert_eq!(snapshot["consistency"], "crash", "{snapshot}");
    assert_eq!(snapshot["kind"], "incremental", "{snapshot}");
    assert_eq!(snapshot["warnings"].as_array().map_or(0, Vec::len), 1, "{snapshot}");
    assert!(outcome.took < 3 * FREEZE_MAX, "{outcome:?}");
    to_agents("CONT");
    domain.wait_agent();
    writes("the agent goes on");
    assert_eq!(good("the agent goes on")["consistency"], "filesystem");

    let effects = host.effects(backup(&[]));
    let frozen = effects.iter().position(|effect| effect == "libvirt: start a backup job");
    let frozen = frozen.expect("a backup begins a job") + 1;
    let mut killed = backup(&[]);
    killed.env("KVMSNAP_CRASH_AT", frozen.to_string());
    assert_eq!(finish(spawn(killed)).code, None);
    writes("kvmsnap was killed while the guest was frozen");
    let next = good("kvmsnap was killed");
    assert_eq!(
        (&next["kind"], &next["consistency"]),
        (&"incremental".into(), &"filesystem".into())
    );

    host.assert_nothing_left();
}

// ---- R16: two runs at once ----------------------------------------------------------------------

#[test]
fn r16_the_second_of_two_runs_says_who_holds_the_domain() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.write("vda", 0, &noise(512 << 10, 1));
    let first = scene.backup_slowly(&[]);
    // However long libvirt takes to answer the second one.
    signal(first.pid(), Signal::SIGSTOP);

    let second = scene.try_backup(&[]);

    signal(first.pid(), Signal::SIGCONT);
    assert_says(&second, 11, &format!("(process {})", first.pid()));
    let snapshot = scene.assert_good(&finish(first));
    assert_eq!(kinds(&snapshot)["vda"], "incremental", "{snapshot}");
    assert_eq!(scene.host.list().len(), 2);
    scene.assert_clean();
}

// ---- R22, R02: dirty bitmaps and checkpoints that are not as they were left ---------------------

#[test]
fn r22_an_older_copy_of_an_image_is_read_whole_and_no_other_disk() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.domain.destroy();
    let (image, copy) = (scene.domain.disk_path("vda"), scene.domain.folder().join("copy"));
    fs::copy(&image, &copy).expect("room for a small image");
    let older = scene.contents.clone();
    scene.domain.start();
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.domain.destroy();

    fs::copy(&copy, &image).expect("room for a small image");

    scene.contents.note("vda", 0, older.of("vda"));
    scene.domain.start();
    let reread = scene.backup();
    assert_eq!(kinds(&reread)["vda"], "rescan", "{reread}");
    assert_eq!(kinds(&reread)["vdb"], "incremental", "{reread}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean_but_bitmaps();
    // libvirt knows nothing of the older dirty bitmap; the image does.
    scene.domain.destroy();
    scene.scribble();
    assert_incremental(&scene.backup(), "offline");
    scene.assert_clean();
}

/// A dirty bitmap in the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InImage {
    Good,
    /// QEMU was killed, and had been started with it.
    Inconsistent,
    /// QEMU was killed, and it had begun since its start.
    Absent,
}

/// Each row of a table: the dirty bitmap in the images, and whether libvirt has its checkpoint.
#[test]
fn r22_r02_whatever_became_of_bitmap_and_checkpoint_is_mended_while_the_guest_runs() {
    let Some(libvirt) = Libvirt::start() else { return };
    thread::scope(|scope| {
        for (in_image, in_libvirt) in [
            (InImage::Good, false),
            (InImage::Absent, true),
            (InImage::Absent, false),
            (InImage::Inconsistent, true),
            (InImage::Inconsistent, false),
        ] {
            let libvirt = &libvirt;
            scope.spawn(move || is_mended(libvirt, in_image, in_libvirt));
        }
    });
}

fn is_mended(libvirt: &Libvirt, in_image: InImage, in_libvirt: bool) {
    let case = format!("{in_image:?}, checkpoint: {in_libvirt}");
    let mut scene = Scene::running(libvirt);
    if in_image == InImage::Inconsistent {
        scene.domain.destroy();
        scene.domain.start();
    }
    scene.scribble();
    if in_image != InImage::Good {
        scene.flush();
        scene.domain.kill_qemu();
        scene.domain.start();
    }
    if !in_libvirt {
        let name = scene.checkpoints().remove(0);
        scene.domain.virsh("checkpoint-delete", &[&name, "--metadata"]);
    }
    let qemu = scene.domain.pid();

    let mended = scene.backup();

    match in_image {
        InImage::Good => assert_incremental(&mended, "bitmap"),
        _ => assert!(kinds(&mended).values().all(|kind| kind == "rescan"), "{case}: {mended}"),
    }
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    assert_eq!(scene.domain.pid(), qemu, "{case}: the guest was never stopped");
    scene.assert_clean();
}

// ---- R26, R30: other domains --------------------------------------------------------------------

#[test]
fn r26_a_domain_with_a_new_uuid_begins_a_new_history() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    let old = scene.domain.uuid();
    scene.domain.destroy();
    let new = "5f6b2c1e-93d4-4b5a-8c8e-0e1f2a3b4c5d";
    let xml = scene.domain.xml().replace(&old, new);
    scene.domain.virsh("undefine", &["--checkpoints-metadata"]);
    define(&scene, &xml);
    scene.domain.start();
    scene.scribble();

    let first = scene.backup();

    assert_eq!((&first["uuid"], &first["parent"]), (&new.into(), &Value::Null), "{first}");
    assert!(kinds(&first).values().all(|kind| kind == "full"), "{first}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    let listed = scene.host.list();
    let uuids: Vec<&str> = listed.iter().map(|snapshot| text(snapshot, "uuid")).collect();
    assert_eq!(uuids, [&old, new, new]);
    scene.assert_clean_but_bitmaps();
    // libvirt knows nothing of the old history's dirty bitmap; the image does.
    scene.domain.destroy();
    scene.scribble();
    assert_incremental(&scene.backup(), "offline");
    scene.assert_clean();
}

#[test]
fn r30_a_paused_domain_is_backed_up_and_stays_paused() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    scene.domain.pause();
    scene.scribble();

    let snapshot = scene.backup();

    assert_incremental(&snapshot, "bitmap");
    assert_eq!(snapshot["consistency"], "crash");
    assert_eq!(scene.domain.state(), "paused");
    scene.assert_clean();
}

#[test]
fn r30_a_domain_without_disks_fails_alone_and_in_words() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::running(&libvirt);
    let bare = Guest::without_os().under_libvirt().boot(&libvirt);

    let alone = scene.host.run(["backup", bare.name()]);

    assert_says(&alone, 1, "has no disk to back up");
    let both = scene.host.run(["backup", "--json", bare.name(), scene.domain.name()]);
    assert_says(&both, 3, "1 of 2 domains failed");
    assert!(both.stderr.contains(&format!("domain `{}`", bare.name())), "{both:?}");
    assert_eq!(scene.host.list().len(), 2, "the other one was backed up");
    scene.assert_clean();
}

#[test]
fn r30_a_disk_of_no_bytes_keeps_no_other_from_being_backed_up() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os().disk(Disk::new("vda", SIZE)).disk(Disk::new("vdb", 0));
    let mut scene = Scene::of(plan.under_libvirt(), &["vda"], SIZE, &libvirt);
    scene.domain.start();
    let first = scene.backup();
    scene.scribble();

    let second = scene.backup();

    for snapshot in [&first, &second] {
        assert_eq!(disk(snapshot, "vdb")["size"], 0, "{snapshot}");
    }
    assert_eq!(kinds(&second)["vda"], "incremental", "{second}");
    scene.assert_clean();
}

// ---- R01, P2: kvmsnap dies ----------------------------------------------------------------------

#[test]
fn p2_r01_a_guest_with_io_threads_outlives_its_killed_reader() {
    let Some(libvirt) = Libvirt::start() else { return };
    let threaded = |id| Disk::new(id, SIZE).iothread();
    let plan = Guest::without_os().disk(threaded("vda")).disk(threaded("vdb"));
    let mut scene = Scene::of(plan.under_libvirt(), &["vda", "vdb"], SIZE, &libvirt);
    scene.domain.start();
    scene.backup();
    let qemu = scene.domain.pid();
    for turn in 0..2 {
        scene.write("vda", 0, &noise(NOISE_LEN, turn));
        let running = scene.backup_slowly(&[]);

        signal(running.pid(), Signal::SIGKILL);

        finish(running);
        scene.scribble();
        // The first time its guard undoes it, the second time the next run.
        if turn == 0 {
            wait_until(WAIT, "the guard undoes the run", || scene.host.undo_records() == 0);
            assert_eq!(scene.checkpoints().len(), 1);
        }
        let next = scene.backup();
        assert!(kinds(&next).values().all(|kind| kind == "incremental"), "{next}");
        assert_eq!(scene.host.list().len(), 2 + turn as usize);
    }
    assert_eq!((scene.domain.pid(), scene.domain.state().as_str()), (qemu, "running"));
    scene.assert_clean();
}

/// QEMU has answers for a reader that does not take them, more than a socket holds.
#[test]
fn p2_answers_that_nobody_takes_do_not_hold_the_guest_up() {
    // At that speed many times as long as it takes to see that it is read.
    const LEN: usize = 64 << 20;
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os().disk(Disk::new("vda", LEN as u64));
    let mut scene = Scene::of(plan.under_libvirt(), &["vda"], LEN as u64, &libvirt);
    scene.domain.start();
    scene.write("vda", 0, &noise(LEN, 1));
    for ending in [Signal::SIGKILL, Signal::SIGTERM] {
        let running = scene.backup_at("16MiB", &["--full"]);
        let pid = running.pid();
        signal(pid, Signal::SIGSTOP);
        // Both ends of the connection to the export are held by others, so they fill.
        scene.wait_until_qemu_rests();

        signal(pid, ending);

        signal(pid, Signal::SIGCONT);
        finish(running);
        wait_until(WAIT, "the run is undone", || {
            let start = Instant::now();
            scene.scribble();
            assert!(start.elapsed() < HELD_UP, "the guest waited {:?}", start.elapsed());
            scene.host.undo_records() == 0
        });
        assert!(scene.checkpoints().is_empty());
    }
    scene.backup();
    scene.assert_clean();
}

/// QEMU's user may make nothing there; where libvirt takes a socket from us it need not.
#[test]
fn p2_a_folder_of_roots_for_the_socket_is_refused_only_where_qemu_makes_it() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::running(&libvirt);
    let folder = tempfile::tempdir().expect("a folder that only root may use");

    let outcome =
        scene.try_backup(&["--socket-dir", folder.path().to_str().expect("a plain path")]);

    match takes_sockets(&libvirt) {
        true => drop(scene.assert_good(&outcome)),
        false => assert_says(&outcome, 1, "Permission denied"),
    }
    let left: Vec<_> = fs::read_dir(folder.path()).expect("it is there").collect();
    assert!(left.is_empty(), "{left:?}");
    scene.backup();
    scene.assert_clean();
}
