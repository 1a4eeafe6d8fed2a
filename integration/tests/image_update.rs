//! A template becomes another machine of its flavour by that machine's files, in libguestfs' appliance.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use integration::faults::{
    Fault, SmallDisk, assert_golden_log, assert_says, noise, signal, wait_until,
};
use integration::image_folder::sha256;
use integration::images::names;
use integration::images::small_machine::{INITRAMFS, Small};
use integration::{Host, Outcome, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::Port;
use vm_fixtures::debian::{Debian, Machine, appliance_environment};

/// Emulated, an appliance and a whole system take their time, beside other tests.
const WAIT: Duration = Duration::from_secs(1800);
/// Which effect of an update of an image of two disks is the first write to them: begin, overlay, overlay,
/// files, take, write.
const WRITE_EFFECT: usize = 6;
/// Effects by which that is finished: write, write, changes, give back.
const FINISHING_EFFECTS: usize = 4;
/// Effects of an update of a template before its appliance starts: begin, overlay, overlay, files.
const EARLY_EFFECTS: usize = 4;
/// Bytes that a change of one small file may cost: what two file systems write when they are mounted.
const SMALL: u64 = 24 << 20;

/// A host with a template of one machine.
struct Scene {
    host: Host,
    environment: Vec<(&'static str, OsString)>,
    template: PathBuf,
}

impl Scene {
    fn new(host: Host, environment: Vec<(&'static str, OsString)>, disks: &[PathBuf]) -> Self {
        let store = host.folder().join("store");
        let format = if disks.len() == 1 { "qcow2" } else { "raw" };
        let mut get = host.command(["image", "get", "--format", format, "--name", "template"]);
        for disk in disks {
            get.arg("--file").arg(disk);
        }
        get.arg("--into").arg(&store);
        let outcome = finish(spawn(get));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let template = store.join("template");
        Self { host, environment, template }
    }

    /// A whole system; `None`, said aloud, where libguestfs or QEMU is missing.
    fn of_a_system() -> Option<(Self, Debian)> {
        let debian = Debian::get()?;
        let environment = appliance_environment()?;
        let disk = debian.disk(Machine::Bios);
        Some((Self::new(Host::without_repository(), environment, &[disk]), debian))
    }

    /// A machine that is never started.
    fn small() -> Option<Self> {
        let environment = appliance_environment()?;
        let host = Host::without_repository();
        let disks = Small::Hazel.make_disks(&host.new_folder());
        Some(Self::new(host, environment, &disks))
    }

    /// The files of the machine that the small one becomes.
    fn small_tree(&self) -> PathBuf {
        let tree = self.host.folder().join("tree");
        Small::Linden.make_tree(&tree);
        tree
    }

    fn command(&self, arguments: &[&str], image: &Path, tree: &str) -> Command {
        let mut command = self.host.command(arguments);
        command.arg(image).args(["--tree", tree]);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if self.environment.iter().any(|(name, _)| *name == "LIBGUESTFS_BACKEND_SETTINGS") {
            command.env("KVMSNAP_ACCEL", "tcg");
        }
        command
    }

    fn update(&self, image: &Path, tree: &str, more: &[&str]) -> Command {
        let arguments = ["image", "update", "--json", "--deadline", "600"];
        let mut command = self.command(&arguments, image, tree);
        command.args(more);
        command
    }

    /// A new image from the template.
    fn make(&self, tree: &str) -> Command {
        self.update(&self.template, tree, &["--output", self.output().to_str().unwrap()])
    }

    /// Compares an image with a tree, and checks its file systems: what each line of the answer says.
    fn check(&self, image: &Path, tree: &str) -> (Outcome, Vec<Value>) {
        let arguments = ["image", "check", "--json", "--file-systems"];
        let outcome = run(self.command(&arguments, image, tree));
        let lines = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap());
        let lines = lines.collect();
        (outcome, lines)
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

    /// No image was made, and the template is as it was.
    #[track_caller]
    fn assert_nothing_made(&self, before: &[(String, Vec<u8>)]) {
        let store = self.output().parent().unwrap().to_owned();
        assert!(names(&store).is_empty(), "something was left: {:?}", names(&store));
        assert!(self.template_content() == before, "the template was written to");
    }

    /// The command lines of all that a command of this host has started and that runs yet.
    fn processes(&self) -> Vec<String> {
        let folder = self.host.folder().to_str().expect("a plain path");
        let processes = fs::read_dir("/proc").expect("Linux").flatten();
        let command = |process: fs::DirEntry| {
            let read = |name: &str| {
                let text = fs::read(process.path().join(name)).unwrap_or_default();
                String::from_utf8_lossy(&text).replace('\0', " ")
            };
            let command = read("cmdline");
            let is_ours = command.contains(folder) || read("environ").contains(folder);
            (!command.is_empty() && is_ours).then_some(command)
        };
        processes.filter_map(command).collect()
    }

    /// A stand-in for `ssh` that has a shell of this host do what another host's would; `script` does it,
    /// with the command in `$last`.
    fn with_ssh(&self, mut command: Command, script: &str) -> Command {
        let bin = self.host.new_folder();
        let script = format!("#!/bin/sh\nfor last; do :; done\n{script}\n");
        fs::write(bin.join("ssh"), script).unwrap();
        fs::set_permissions(bin.join("ssh"), fs::Permissions::from_mode(0o755)).unwrap();
        command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()));
        command
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

/// An rsync daemon with one module, on a port of its own.
struct Daemon {
    child: Child,
    port: Port,
}

impl Daemon {
    fn of(tree: &Path, folder: &Path) -> Self {
        let port = Port::take();
        let config = folder.join("rsyncd.conf");
        let text = format!(
            "use chroot = no\nuid = root\ngid = root\n[birch]\npath = {}\nread only = yes\n",
            tree.display(),
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new("rsync");
        command.args(["--daemon", "--no-detach", "--address=127.0.0.1"]);
        command
            .arg(format!("--port={}", port.number()))
            .arg(format!("--config={}", config.display()));
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let daemon = Self { child, port };
        wait_until(Duration::from_secs(120), "the rsync daemon listens", || {
            TcpStream::connect(daemon.port.address()).is_ok()
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
/// every difference from a tree is told; brought up to date once more it costs what changed. The longest story:
/// by its name it is the first to begin.
#[test]
fn p1_r29_a_template_becomes_another_machine_which_boots_and_follows_its_tree() {
    let Some((scene, debian)) = Scene::of_a_system() else { return };
    let before = scene.template_content();
    let tree = scene.host.folder().join("tree");
    debian.copy_tree(Machine::BiosOther, &tree);
    let initramfs = forget_disks(&tree);
    let tree_name = tree.to_str().unwrap();
    let output = scene.output();

    let mut update = scene.make(tree_name);
    let log = scene.host.folder().join("effects");
    update.args(["--boot-test", "--wait", "agent"]).env("KVMSNAP_EFFECTS", &log);
    let outcome = run(update);
    let made = line(&outcome);
    assert_golden_log("image update of a template, with a trial", &log);

    assert_eq!(made["machine"], "birch");
    assert_eq!((&made["boot"]["sign"], &made["boot"]["host"]), (&json!("agent"), &json!("birch")));
    assert!(made["update"]["changed"].as_u64().unwrap() > 10, "{made}");
    assert!(scene.template_content() == before, "the template was written to");

    // Every file is the tree's, but those that the update has made so that it starts, and those that have
    // changed since: the image's disk is as it was before its trial.
    fs::write(tree.join("etc/motd"), "changed\n").unwrap();
    fs::write(tree.join("var/new"), "").unwrap();
    fs::remove_file(tree.join("etc/machine-id")).unwrap();
    fs::write(tree.join("boot/grub/grubenv"), "other\n").unwrap();
    fs::set_permissions(tree.join("etc/passwd"), fs::Permissions::from_mode(0o600)).unwrap();
    let disk = sha256(&output.join("vda.qcow2"));
    let (checked, lines) = scene.check(&output, tree_name);
    assert_says(&checked, 1, "problems were found");
    let is_sound = |line: &&Value| line["file_system"].is_string() && line["ok"] == true;
    assert_eq!(lines.iter().filter(is_sound).count(), 2, "root and /var: {checked:?}");
    let (excused, found): (Vec<_>, Vec<_>) = lines
        .iter()
        .filter(|line| line["difference"].is_string())
        .partition(|line| line["made_by_update"].is_string());
    let mut found: Vec<_> = found.iter().map(|line| [&line["path"], &line["difference"]]).collect();
    found.sort_by_key(|difference| difference[0].to_string());
    let expected = [
        ["etc/", "attributes"], // its time
        ["etc/machine-id", "extra"],
        ["etc/motd", "content"],
        ["etc/passwd", "attributes"],
        ["var/", "attributes"],
        ["var/new", "missing"],
    ];
    assert_eq!(json!(found), json!(expected), "{checked:?}");
    for path in [&*initramfs, "boot/grub/grubenv"] {
        assert!(excused.iter().any(|line| line["path"] == path), "{path}: {checked:?}");
    }
    assert_eq!(sha256(&output.join("vda.qcow2")), disk, "the image was written to");

    // By way of a daemon this time, which has the very same files.
    let daemon = Daemon::of(&tree, scene.host.folder());
    let url = format!("rsync://127.0.0.1:{}/birch", daemon.port.number());
    let outcome_again = run(scene.update(&output, &url, &["--compare", "time"]));
    let again = line(&outcome_again);

    let count = |field: &str| again["update"][field].as_u64().unwrap();
    assert_eq!((count("added"), count("changed"), count("deleted")), (1, 2, 1), "{again}");
    assert!(count("file_bytes") < 2000, "{again}");
    assert!(count("written_bytes") < SMALL, "{again}");
    assert!(again["update"]["boot"][0].as_str().unwrap().contains("made before"), "{again}");
    assert_eq!(names(output.parent().unwrap()), ["birch"]);
    scene.host.ok(["image", "check", output.to_str().unwrap()]);
}

/// P5, R29: a machine of two disks that a kernel of another kind starts: dracut makes its initramfs, SELinux is
/// to label its files, and what is not looked into is told. An update that is killed while it writes to the
/// disks leaves no image, and the next one finishes it.
#[test]
fn r29_a_machine_of_several_disks_is_made_and_a_killed_update_of_it_is_finished() {
    let Some(scene) = Scene::small() else { return };
    let before = scene.template_content();
    let (tree, output) = (scene.small_tree(), scene.output());
    let tree_name = tree.to_str().unwrap();

    let made = line(&run(scene.make(tree_name)));

    assert_eq!(made["machine"], "linden");
    assert_eq!(made["disks"].as_array().map(Vec::len), Some(2), "{made}");
    let update = &made["update"];
    let tells = |list: &str, words: &str| {
        assert!(update[list].to_string().contains(words), "{words}: {made}");
    };
    for uuid in Small::Linden.uuids() {
        tells("identities", uuid);
    }
    tells("boot", "made anew by dracut, the tree's had no virtio_pci virtio_blk");
    tells("boot", "SELinux labels all files");
    tells("skipped", "linden.efi");
    tells("skipped", "boot loader");
    assert!(scene.template_content() == before, "the template was written to");

    // One small file changes on each disk. The update is killed when it is about to write to the image's.
    fs::write(tree.join("etc/motd"), "changed\n").unwrap();
    fs::write(tree.join("home/anna/notes"), "changed\n").unwrap();
    let killed = run(Fault::Crash.at(WRITE_EFFECT, scene.update(&output, tree_name, &[])));
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

    let log = scene.host.folder().join("effects");
    let mut update = scene.update(&output, tree_name, &["--compare", "content"]);
    update.env("KVMSNAP_EFFECTS", &log);
    let again = line(&run(update));
    assert_golden_log("image update of an image, which finishes an earlier one first", &log);

    let count = |field: &str| again["update"][field].as_u64().unwrap();
    // What was interrupted was finished first: the files that had changed are there.
    assert_eq!((count("added"), count("changed")), (0, 0), "{again}");
    assert!(again["update"]["boot"].to_string().contains("made before"), "{again}");
    assert_eq!(names(output.parent().unwrap()), ["birch"]);
    let (checked, lines) = scene.check(&output, tree_name);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    let excused = lines.iter().filter(|line| line["made_by_update"].is_string());
    let excused: Vec<_> = excused.map(|line| line["path"].as_str().unwrap()).collect();
    assert!(excused.contains(&INITRAMFS) && excused.contains(&".autorelabel"), "{excused:?}");
}

/// R29, S15: a machine of another flavour is refused with what differs. `ssh` gets a path with odd letters as
/// one word.
#[test]
fn r29_a_tree_that_does_not_fit_is_refused_and_leaves_nothing() {
    let Some(scene) = Scene::small() else { return };
    let before = scene.template_content();
    let odd = scene.host.folder().join("it's; $(odd)");
    fs::create_dir_all(odd.join("etc")).unwrap();
    let table = "UUID=b0-0a / btrfs defaults 0 0\nUUID=0C0D-0E0F /boot/efi vfat umask=0077 0 1\n";
    fs::write(odd.join("etc/fstab"), table).unwrap();
    let command = scene.make(&format!("store:{}", odd.display()));

    let outcome = run(scene.with_ssh(command, "exec sh -c \"$last\""));

    assert_says(&outcome, 1, "the tree does not fit the template");
    assert_says(&outcome, 1, "/ is btrfs on the tree's machine, ext4 in the template");
    assert_says(&outcome, 1, "/boot/efi");
    assert_says(&outcome, 1, "image match --tree TREE STORE");
    scene.assert_nothing_made(&before);
}

/// R25, R29: where the image's file system is too small, the update ends at once and says so; the appliance is
/// not left waiting for room. The same where the machine's own file system is too small for its files.
#[test]
fn r29_a_full_disk_ends_it_and_leaves_nothing() {
    let Some(scene) = Scene::small() else { return };
    let before = scene.template_content();
    let tree = scene.small_tree();
    let tree_name = tree.to_str().unwrap();
    fs::write(tree.join("home/anna/large"), noise(50 << 20, 5)).unwrap();
    let small = SmallDisk::mount(&scene.host.folder().join("small"), 16 << 20);
    let output = small.folder().join("birch");
    let more = ["--output", output.to_str().unwrap()];

    let outcome = run(scene.update(&scene.template, tree_name, &more));

    assert_says(&outcome, 1, "make room there");
    assert!(names(small.folder()).is_empty(), "something was left");
    wait_until(WAIT, "the appliance is gone", || scene.processes().is_empty());

    let outcome = run(scene.make(tree_name));

    assert_says(&outcome, 1, "the tree's files do not fit into the template's file systems");
    assert_says(&outcome, 1, "take a template with larger file systems");
    scene.assert_nothing_made(&before);
}

/// R29: a run that is killed while files are copied leaves no process, and nothing under the image's name; the
/// next one begins anew and removes what it has left. That one meets a tree that somebody writes to, which is
/// none of one instant: no image is made of it.
#[test]
fn r29_an_update_that_is_killed_or_whose_tree_changes_makes_no_image() {
    let Some(scene) = Scene::small() else { return };
    let before = scene.template_content();
    let (tree, output) = (scene.small_tree(), scene.output());
    let tree_name = tree.to_str().unwrap();
    fs::write(tree.join("home/anna/large"), noise(4 << 20, 5)).unwrap();
    let temporary = scene.host.new_folder();
    let in_temporary = |mut command: Command| {
        command.env("TMPDIR", &temporary);
        command
    };
    for (n, fault) in (1..=EARLY_EFFECTS).flat_map(|n| [(n, Fault::Crash), (n, Fault::FailOnce)]) {
        let ended = run(fault.at(n, in_temporary(scene.make(tree_name))));
        assert!(ended.code.is_none_or(|code| code == 1), "{fault:?} at {n}: {ended:?}");
        assert!(!output.exists(), "{fault:?} at {n}");
    }
    // The tables are fetched first. Of the files only the first part comes.
    let stalls = scene.host.folder().join("stalls");
    let script = format!(
        "mkdir '{0}.before' 2> /dev/null && exec sh -c \"$last\"\n\
         sh -c \"$last\" | {{ stdbuf -o0 head -c 300000; : > '{0}'; exec cat > /dev/null; }}",
        stalls.display(),
    );
    let make = in_temporary(scene.make(&format!("store:{tree_name}")));
    let running = spawn(scene.with_ssh(make, &script));
    wait_until(WAIT, "files are copied", || stalls.exists());
    let processes = scene.processes().join(" ");
    let (_, socket) = processes.split_once("path=/tmp/libguestfs").expect("an appliance runs");
    let (socket, _) = socket.split_once('/').expect("a socket is in a folder");
    let socket = Path::new("/tmp").join(format!("libguestfs{socket}"));

    signal(running.pid(), Signal::SIGKILL);

    finish(running);
    wait_until(WAIT, "nothing runs", || scene.processes().is_empty());
    assert!(!output.exists());
    assert!(scene.template_content() == before, "the template was written to");
    let left: Vec<_> =
        names(&temporary).into_iter().filter(|name| name.starts_with("kvmsnap-private-")).collect();
    assert!(!left.is_empty() && socket.exists(), "a killed process leaves {left:?}, {socket:?}");

    let mut running = spawn(in_temporary(scene.make(tree_name)));
    let mut written = 0;
    wait_until(WAIT, "the update ends", || {
        written += 1;
        fs::write(tree.join("etc/motd"), format!("{written}\n")).unwrap();
        running.has_ended()
    });

    let outcome = finish(running);
    assert_says(&outcome, 1, "the tree changed while it was copied");
    assert_says(&outcome, 1, "etc/motd");
    assert_says(&outcome, 1, "wait until nobody writes to the tree");
    scene.assert_nothing_made(&before);
    assert!(left.iter().all(|name| !temporary.join(name).exists()), "{left:?} is left");
    assert!(!socket.exists(), "{socket:?} is left");
}

/// S06, S07: what a daemon says when it refuses is told, without what it would do to a terminal.
#[test]
fn s06_an_rsync_daemon_that_misbehaves_ends_the_update() {
    let Some(scene) = Scene::small() else { return };
    let before = scene.template_content();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let daemon = thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(WAIT)).unwrap();
        peer.write_all(b"@RSYNCD: 31.0\n").unwrap();
        let mut asked = BufReader::new(peer.try_clone().unwrap()).lines();
        while asked.next().unwrap().unwrap() != "birch" {}
        peer.write_all(b"@ERROR: \x1b[2Jgo away\n").unwrap();
        // Until the other side has heard it.
        asked.for_each(drop);
    });

    let outcome = run(scene.make(&format!("rsync://127.0.0.1:{port}/birch")));

    daemon.join().unwrap();
    assert_says(&outcome, 1, "go away");
    assert!(!outcome.stderr.contains('\x1b'), "{outcome:?}");
    scene.assert_nothing_made(&before);
}
