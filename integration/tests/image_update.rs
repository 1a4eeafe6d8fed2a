//! A template becomes another machine of its flavour by that machine's files, in libguestfs' appliance.

use std::fs;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use integration::faults::{Fault, SmallDisk, assert_golden_log, assert_says, signal, wait_until};
use integration::images::names;
use integration::{Host, Outcome, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::Value;
use vm_fixtures::debian::{Debian, Machine, appliance_environment};

/// Emulated, an appliance and a whole system take their time, beside other tests.
const WAIT: Duration = Duration::from_secs(1800);
/// Which effect of an update of an image is the first write to its disk: begin, overlay, files, take, write.
const WRITE_EFFECT: usize = 5;
/// Effects by which an interrupted update is finished: write, changes, give back.
const FINISHING_EFFECTS: usize = 3;
/// Effects of an update of a template before its appliance starts: begin, overlay, files.
const EARLY_EFFECTS: usize = 3;
/// Bytes that a change of one small file may cost: what two file systems write when they are mounted.
const SMALL: u64 = 24 << 20;

/// A host with a template of one machine.
struct Scene {
    debian: Debian,
    host: Host,
    environment: Vec<(&'static str, std::ffi::OsString)>,
    template: PathBuf,
}

impl Scene {
    /// `None`, said aloud, where libguestfs or QEMU is missing.
    fn new() -> Option<Self> {
        let debian = Debian::get()?;
        let environment = appliance_environment()?;
        let host = Host::without_repository();
        let store = host.folder().join("store");
        let disk = debian.disk(Machine::Bios);
        let mut get = host.command(["image", "get", "--format", "qcow2", "--name", "alder"]);
        get.arg("--file").arg(disk).arg("--into").arg(&store);
        let outcome = finish(spawn(get));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let template = store.join("alder");
        Some(Self { debian, host, environment, template })
    }

    fn update(&self, image: &Path, tree: &str, more: &[&str]) -> Command {
        let mut command = self.host.command(["image", "update", "--json", "--deadline", "600"]);
        command.arg(image).args(["--tree", tree]).args(more);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if self.environment.iter().any(|(name, _)| *name == "LIBGUESTFS_BACKEND_SETTINGS") {
            command.env("KVMSNAP_ACCEL", "tcg");
        }
        command
    }

    fn output(&self) -> PathBuf {
        self.host.folder().join("images").join("birch")
    }

    /// What is in the template's folder, and what is in its files.
    fn template_content(&self) -> Vec<(String, Vec<u8>)> {
        let read = |name: String| {
            let content = fs::read(self.template.join(&name)).expect("it is listed");
            (name, content)
        };
        names(&self.template).into_iter().map(read).collect()
    }
}

fn run(command: Command) -> Outcome {
    let mut running = spawn(command);
    wait_until(WAIT, "the update ends", || running.has_ended());
    finish(running)
}

#[track_caller]
fn line(outcome: &Outcome) -> Value {
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    serde_json::from_str(&outcome.stdout).expect("one JSON object")
}

/// The appliances that have something of a folder open.
fn appliances_on(folder: &Path) -> usize {
    let folder = folder.to_str().expect("a plain path");
    let entries = fs::read_dir("/proc").expect("Linux").flatten();
    let commands = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    commands
        .filter(|command| {
            let words = String::from_utf8_lossy(command);
            words.contains("qemu-system") && words.contains(folder)
        })
        .count()
}

/// An rsync daemon with one module, on a port of its own.
struct Daemon {
    child: Child,
    port: u16,
}

impl Daemon {
    fn of(tree: &Path, folder: &Path) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = folder.join("rsyncd.conf");
        let text = format!(
            "use chroot = no\nuid = root\ngid = root\n[birch]\npath = {}\nread only = yes\n",
            tree.display(),
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new("rsync");
        command.args(["--daemon", "--no-detach", "--address=127.0.0.1"]);
        command.arg(format!("--port={port}")).arg(format!("--config={}", config.display()));
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let daemon = Self { child, port };
        wait_until(Duration::from_secs(30), "the rsync daemon listens", || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stands in for Debian's `mkinitramfs`, which takes minutes where it is emulated: for a machine of any kind, and
/// only then, it has the one that knows the disks.
const MKINITRAMFS: &str = r#"#!/bin/sh
set -eu
[ "$1 $3" = "-d -o" ]
for file in "$2"/initramfs.conf "$2"/conf.d/*; do . "$file"; done
[ "$MODULES" = most ]
[ -d "/lib/modules/$5" ]
cp /root/initramfs "$4"
"#;

/// Has the tree's kernel start with an initramfs that knows no disk: a cpio archive (its `newc` format) with
/// nothing but an empty folder. Returns its path below the tree.
fn forget_disks(tree: &Path) -> String {
    let entry = |name: &str, mode: u32| {
        let fields = [1, mode, 0, 0, 1, 0, 0, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        let fields: String = fields.iter().map(|field| format!("{field:08X}")).collect();
        let mut entry = format!("070701{fields}{name}\0").into_bytes();
        entry.resize(entry.len().next_multiple_of(4), 0);
        entry
    };
    let mut archive = [entry("dev", 0o040_755), entry("TRAILER!!!", 0)].concat();
    archive.resize(archive.len().next_multiple_of(512), 0);
    let images = names(&tree.join("boot"));
    let image = images.iter().find(|name| name.starts_with("initrd.img-")).expect("an initramfs");
    let image = format!("boot/{image}");
    fs::copy(tree.join(&image), tree.join("root/initramfs")).unwrap();
    fs::write(tree.join(&image), archive).unwrap();
    fs::write(tree.join("usr/sbin/mkinitramfs"), MKINITRAMFS).unwrap();
    image
}

/// P1, P3, R29: the machine that a template becomes starts and is the tree's, though it ran on other hardware;
/// brought up to date once more it costs what changed; killed while its disks are written it has no name, and
/// the next run finishes.
#[test]
fn r29_a_template_becomes_another_machine_which_boots_and_follows_its_tree() {
    let Some(scene) = Scene::new() else { return };
    let before = scene.template_content();
    let tree = scene.host.folder().join("tree");
    scene.debian.copy_tree(Machine::BiosOther, &tree);
    let initramfs = forget_disks(&tree);
    let tree_name = tree.to_str().unwrap();
    let output = scene.output();

    let more = ["--output", output.to_str().unwrap(), "--boot-test", "--wait", "login"];
    let log = scene.host.folder().join("effects");
    let mut update = scene.update(&scene.template, tree_name, &more);
    update.env("KVMSNAP_EFFECTS", &log);
    let made = line(&run(update));
    assert_golden_log("image update of a template, with a trial", &log);
    fs::remove_file(&log).unwrap();

    assert_eq!(made["machine"], "birch");
    assert_eq!(made["boot"]["sign"], "login");
    assert!(made["update"]["changed"].as_u64().unwrap() > 10, "{made}");
    assert_eq!(scene.template_content(), before, "the template was written to");
    let console = fs::read_to_string(output.join("boot/console.log")).unwrap();
    assert!(console.contains("birch login:"), "another machine has started:\n{console}");

    // Every file is the tree's by what is in it, but those that the update has made so that it starts.
    let mut check = scene.host.command(["image", "check", "--json", "--tree", tree_name]);
    check.arg(&output);
    check.envs(scene.environment.iter().map(|(name, value)| (name, value)));
    check.env("KVMSNAP_ACCEL", "tcg");
    let checked = run(check);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    let mut lines = checked.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let told = lines.find(|line| line["path"] == initramfs).expect("it is told of");
    assert!(told["made_by_update"].is_string(), "{told}");

    // One small file changes. The update is killed when it is about to write to the image's disk.
    fs::write(tree.join("etc/motd"), "changed\n").unwrap();
    let changed = scene.update(&output, tree_name, &["--compare", "content"]);
    let killed = run(Fault::Crash.at(WRITE_EFFECT, changed));
    assert_eq!(killed.code, None, "{killed:?}");
    assert!(!output.exists(), "a half written image has its name");
    assert_eq!(names(output.parent().unwrap()), [".birch.update"]);
    let store = output.parent().unwrap().to_str().unwrap();
    let listed = scene.host.run(["image", "list", store]);
    assert!(listed.stderr.contains("birch: its update was interrupted"), "{listed:?}");

    // Killed again wherever it is finished, and refused a write: the next one finishes it all the same.
    for (n, fault) in
        (1..=FINISHING_EFFECTS).flat_map(|n| [(n, Fault::Crash), (n, Fault::FailOnce)])
    {
        let ended = run(fault.at(n, scene.update(&output, tree_name, &[])));
        assert!(ended.code.is_none_or(|code| code == 1), "{fault:?} at {n}: {ended:?}");
        assert!(!output.exists(), "{fault:?} at {n}: half written, it has its name");
    }

    // By way of a daemon this time, which has the very same files.
    let daemon = Daemon::of(&tree, scene.host.folder());
    let url = format!("rsync://127.0.0.1:{}/birch", daemon.port);
    let mut update = scene.update(&output, &url, &["--compare", "time"]);
    update.env("KVMSNAP_EFFECTS", &log);
    let again = line(&run(update));
    assert_golden_log("image update of an image, which finishes an earlier one first", &log);

    let count = |field: &str| again["update"][field].as_u64().unwrap();
    // What was interrupted was finished first: the file that had changed is there.
    assert_eq!((count("added"), count("changed")), (0, 0), "{again}");
    assert!(count("written_bytes") < SMALL, "{again}");
    assert!(again["update"]["boot"][0].as_str().unwrap().contains("made before"), "{again}");
    assert_eq!(names(output.parent().unwrap()), ["birch"]);
    scene.host.ok(["image", "check", output.to_str().unwrap()]);
}

/// R29, S15: a machine of another flavour is refused with what differs. `ssh` gets a path with odd letters as
/// one word.
#[test]
fn r29_a_tree_that_does_not_fit_is_refused_and_leaves_nothing() {
    let Some(scene) = Scene::new() else { return };
    let before = scene.template_content();
    let odd = scene.host.folder().join("it's; $(odd)");
    fs::create_dir_all(odd.join("etc")).unwrap();
    fs::copy(scene.debian.tree(Machine::Uefi).join("etc/fstab"), odd.join("etc/fstab")).unwrap();
    // What `ssh` would have a shell do on another host.
    let bin = scene.host.folder().join("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(bin.join("ssh"), "#!/bin/sh\nfor last; do :; done\nexec sh -c \"$last\"\n").unwrap();
    fs::set_permissions(bin.join("ssh"), fs::Permissions::from_mode(0o755)).unwrap();
    let output = scene.output();
    let source = format!("store:{}", odd.display());
    let mut command =
        scene.update(&scene.template, &source, &["--output", output.to_str().unwrap()]);
    command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()));

    let outcome = run(command);

    assert_says(&outcome, 1, "the tree does not fit the template");
    assert_says(&outcome, 1, "btrfs");
    assert_says(&outcome, 1, "/boot/efi");
    assert!(names(output.parent().unwrap()).is_empty(), "something was left");
    assert_eq!(scene.template_content(), before);
}

/// R25, R29: where the image's file system is too small, the update ends at once and says so; the appliance is
/// not left waiting for room.
#[test]
fn r29_a_full_disk_ends_it_and_leaves_nothing() {
    let Some(scene) = Scene::new() else { return };
    let small = SmallDisk::mount(&scene.host.folder().join("small"), 48 << 20);
    let output = small.folder().join("birch");
    let tree = scene.debian.tree(Machine::BiosOther);
    let more = ["--output", output.to_str().unwrap()];

    let outcome = run(scene.update(&scene.template, tree.to_str().unwrap(), &more));

    assert_says(&outcome, 1, "make room there");
    assert!(names(small.folder()).is_empty(), "something was left");
    wait_until(WAIT, "the appliance is gone", || appliances_on(small.folder()) == 0);
}

/// R29: a run that is killed while files are copied leaves no appliance, and nothing under the image's name;
/// the next one begins anew.
#[test]
fn r29_a_killed_update_leaves_no_appliance() {
    let Some(scene) = Scene::new() else { return };
    let before = scene.template_content();
    let output = scene.output();
    let tree = scene.debian.tree(Machine::BiosOther);
    let more = ["--output", output.to_str().unwrap()];
    let temporary = scene.host.new_folder();
    let update = || {
        let mut update = scene.update(&scene.template, tree.to_str().unwrap(), &more);
        update.env("TMPDIR", &temporary);
        update
    };
    for (n, fault) in (1..=EARLY_EFFECTS).flat_map(|n| [(n, Fault::Crash), (n, Fault::FailOnce)]) {
        let ended = run(fault.at(n, update()));
        assert!(ended.code.is_none_or(|code| code == 1), "{fault:?} at {n}: {ended:?}");
        assert!(!output.exists(), "{fault:?} at {n}");
    }
    let running = spawn(update());
    wait_until(WAIT, "the appliance runs", || appliances_on(output.parent().unwrap()) > 0);

    signal(running.pid(), Signal::SIGKILL);

    finish(running);
    wait_until(WAIT, "the appliance is gone", || appliances_on(output.parent().unwrap()) == 0);
    assert!(!output.exists());
    assert_eq!(scene.template_content(), before);

    // The next one that needs a folder for itself removes the killed one's.
    let private =
        || names(&temporary).into_iter().filter(|name| name.starts_with("kvmsnap-private-"));
    let left = private().next().expect("a killed process has left its folder");
    let template = scene.template.to_str().unwrap();
    let mut look = scene.host.command(["image", "info", "--look", template]);
    look.env("TMPDIR", &temporary).env("LIBGUESTFS_PATH", "/nonexistent");
    assert_ne!(finish(spawn(look)).code, Some(0));
    assert!(private().all(|name| name != left), "{left} is left");
}

/// R29: a tree that somebody writes to is none of one instant: no image is made of it.
#[test]
fn r29_a_tree_that_changes_meanwhile_is_refused() {
    let Some(scene) = Scene::new() else { return };
    let before = scene.template_content();
    let tree = scene.host.folder().join("tree");
    scene.debian.copy_tree(Machine::BiosOther, &tree);
    let output = scene.output();
    let more = ["--output", output.to_str().unwrap()];
    let mut running = spawn(scene.update(&scene.template, tree.to_str().unwrap(), &more));
    let mut written = 0;

    wait_until(WAIT, "the update ends", || {
        written += 1;
        fs::write(tree.join("etc/motd"), format!("{written}\n")).unwrap();
        running.has_ended()
    });

    let outcome = finish(running);
    assert_says(&outcome, 1, "the tree changed while it was copied");
    assert_says(&outcome, 1, "etc/motd");
    assert!(names(output.parent().unwrap()).is_empty(), "something was left");
    assert_eq!(scene.template_content(), before);
}

/// S06, S07: what a daemon says when it refuses is told, without what it would do to a terminal.
#[test]
fn s06_an_rsync_daemon_that_misbehaves_ends_the_update() {
    let Some(scene) = Scene::new() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let daemon = thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(b"@RSYNCD: 31.0\n@ERROR: \x1b[2Jgo away\n").unwrap();
    });
    let output = scene.output();
    let url = format!("rsync://127.0.0.1:{port}/birch");

    let outcome = run(scene.update(&scene.template, &url, &["--output", output.to_str().unwrap()]));

    daemon.join().unwrap();
    assert_says(&outcome, 1, "go away");
    assert!(!outcome.stderr.contains('\x1b'), "{outcome:?}");
    assert!(names(output.parent().unwrap()).is_empty(), "something was left");
}
