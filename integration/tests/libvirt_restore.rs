//! Domains of libvirt that come back: on a host that has lost them, beside themselves, and in place.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use integration::faults::{Contents, assert_says, noise, signal, wait_until};
use integration::libvirt::WAIT;
use integration::{Host, Outcome, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::Value;
use vm_fixtures::libvirt::{Domain, Libvirt};
use vm_fixtures::{Disk, FileSystem, Guest, MIB};

const SIZE: u64 = 4 * MIB;
/// Those of two tests that may run at a time: none is restored beside a machine with its address.
const MACS: [&str; 2] = ["52:54:00:12:34:56", "52:54:00:12:34:57"];
const TPM_STATES: &str = "/var/lib/libvirt/swtpm";

/// What libvirt is asked to forget at the end, whatever became of the test.
struct Forget<'a>(&'a Libvirt, &'static [&'static str], String);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        for command in self.1 {
            // It may never have been there.
            let _ = self.0.try_virsh(&[command, &self.2]);
        }
    }
}

/// A machine without an operating system, with a qcow2 disk and a raw one, and what these hold.
struct Scene {
    host: Host,
    domain: Domain,
    contents: Contents,
}

impl Scene {
    fn new(libvirt: &Libvirt, devices: &str) -> Self {
        let plan =
            Guest::without_os().disk(Disk::new("vda", SIZE)).disk(Disk::new("vdb", SIZE).raw());
        let domain = plan.under_libvirt().devices_xml(devices).boot(libvirt);
        let contents = Contents::new(&["vda", "vdb"], SIZE);
        let mut scene = Self { host: Host::new(), domain, contents };
        scene.scribble(1);
        scene
    }

    /// Writes to both disks: by the guest's QEMU where it runs, else by QEMU's own tool.
    fn scribble(&mut self, seed: u64) {
        for (disk, format) in [("vda", "qcow2"), ("vdb", "raw")] {
            let (bytes, offset) = (noise(256 << 10, seed), 64 << 10);
            let file = self.domain.folder().join("buffer");
            fs::write(&file, &bytes).unwrap();
            let write = format!("write -s {} {offset} {}", file.display(), bytes.len());
            if self.domain.state() == "running" {
                self.domain.qemu_io(disk, &write);
                self.domain.qemu_io(disk, "flush");
            } else {
                let mut tool_io = Command::new("qemu-io");
                tool_io.args(["-f", format, "-c", &write]).arg(self.domain.disk_path(disk));
                tool(tool_io);
            }
            self.contents.note(disk, offset, &bytes);
        }
    }

    fn backup(&self) -> Value {
        let line = self.host.ok(["backup", "--json", self.domain.name()]);
        serde_json::from_str(&line).unwrap()
    }

    fn latest(&self) -> String {
        format!("latest:{}", self.domain.name())
    }

    fn restore_command(&self, more: &[&str]) -> Command {
        self.host.command([&["restore", &self.latest()], more].concat())
    }

    fn restore(&self, more: &[&str]) -> Outcome {
        finish(spawn(self.restore_command(more)))
    }

    /// A folder that is not there, where QEMU may search.
    fn new_folder(&self, name: &str) -> PathBuf {
        self.domain.folder().join(name)
    }

    /// The images of a machine hold what the model does.
    #[track_caller]
    fn assert_images(&self, vda: &Path, vdb: &Path, vdb_format: &str) {
        let raw = tempfile::tempdir().unwrap();
        for (image, format, name) in [(vda, "qcow2", "vda"), (vdb, vdb_format, "vdb")] {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-f", format, "-O", "raw"]).arg(image);
            convert.arg(raw.path().join(format!("{name}.raw")));
            tool(convert);
        }
        self.contents.assert_restored(raw.path());
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[track_caller]
fn assert_done(outcome: &Outcome) {
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

/// A machine lost with its host: libvirt knows nothing of it, and none of its files is left.
#[test]
fn p5_a_machine_lost_with_its_host_is_back() {
    let Some(libvirt) = Libvirt::start() else { return };
    let folder = libvirt.folder();
    let network = format!("net-{}", folder.name());
    let description = folder.path().join("network.xml");
    let bridge = format!("kvmfix{}", std::process::id());
    let xml = format!("<network><name>{network}</name><bridge name='{bridge}'/></network>");
    fs::write(&description, xml).unwrap();
    let _network = Forget(&libvirt, &["net-destroy", "net-undefine"], network.clone());
    libvirt.virsh(&["net-define", text(&description)]);
    libvirt.virsh(&["net-start", &network]);
    let mac = MACS[0];
    let devices = format!(
        "<interface type='network'><mac address='{mac}'/><source network='{network}'/>\
         <model type='virtio'/></interface>\
         <disk type='file' device='cdrom'><target dev='sdx' bus='sata'/>\
         <source file='{}'/><readonly/></disk>",
        description.display()
    );
    let disks = Guest::builder()
        .disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4))
        .disk(Disk::new("vdb", 8 * MIB).raw());
    let domain = disks.under_libvirt().uefi().devices_xml(&devices).boot(&libvirt);
    domain.sh("dd if=/dev/urandom of=/mnt/vda/file bs=64k count=40");
    domain.sh("dd if=/dev/urandom of=/dev/vdb bs=1M count=8");
    domain.sh("sync");
    let sums = "cat /mnt/vda/file /dev/vdb | sha256sum; test -d /sys/firmware/efi";
    let was = domain.sh(sums);
    let host = Host::new();
    host.ok(["backup", domain.name()]);
    let variables = fs::read(domain.folder().join("nvram.fd")).unwrap();
    let uuid = domain.uuid();
    domain.destroy();
    domain.virsh("undefine", &["--nvram", "--checkpoints-metadata"]);
    libvirt.virsh(&["net-destroy", &network]);
    libvirt.virsh(&["net-undefine", &network]);
    for file in ["vda.qcow2", "vdb.raw", "kernel", "initramfs", "domain.xml"] {
        fs::remove_file(domain.folder().join(file)).unwrap();
    }
    fs::remove_file(&description).unwrap();
    let (latest, back) = (format!("latest:{}", domain.name()), domain.folder().join("back"));

    let start = Instant::now();
    let outcome = host.run([
        "restore",
        &latest,
        "--to",
        text(&back),
        "--define",
        "--start",
        "--keep-identity",
    ]);

    assert_done(&outcome);
    domain.wait_up(start);
    assert_eq!(domain.sh(sums), was);
    assert_eq!(domain.uuid(), uuid);
    assert!(domain.xml().contains(mac));
    assert_eq!(fs::read(back.join("nvram")).unwrap(), variables);
    assert_eq!(domain.disk_path("vdb"), back.join("vdb.qcow2"));
    for said in [
        "kernel: ",
        "initrd: ",
        "firmware: its variables are restored to ",
        "disk sdx: ejected; ",
        "is not here: defined and started as it was",
    ] {
        assert!(outcome.stderr.contains(said), "{said}: {outcome:?}");
    }
    let changed = format!("echo more >> /mnt/vda/file && sync; {sums}");
    domain.sh(&changed);
    let next = host.ok(["backup", "--json", domain.name()]);
    assert_eq!(serde_json::from_str::<Value>(&next).unwrap()["kind"], "rescan", "{next}");
}

#[test]
fn s14_a_machine_restored_beside_itself_has_another_identity() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mac = MACS[1];
    let interface = format!("<interface type='user'><mac address='{mac}'/></interface>");
    let scene = Scene::new(&libvirt, &interface);
    scene.backup();
    let (to, name) = (scene.new_folder("clone"), format!("{}-clone", scene.domain.name()));
    let to = text(&to);

    let taken = scene.restore(&["--to", to, "--define"]);
    let kept = scene.restore(&["--to", to, "--define", "--name", &name, "--keep-identity"]);
    let dry = scene.restore(&["--to", to, "--define", "--name", &name, "--dry-run"]);
    assert!(!Path::new(to).exists(), "nothing was done so far");
    let cloned = scene.restore(&["--to", to, "--define", "--name", &name, "--start"]);

    assert_says(&taken, 1, "a domain");
    assert!(taken.stderr.contains("hint: --name gives it another one"), "{taken:?}");
    assert_says(&kept, 1, "has the uuid");
    assert_done(&dry);
    assert!(dry.stdout.contains(&format!("interface {mac}: gets a new MAC address")), "{dry:?}");
    assert!(dry.stdout.contains("vda: would be restored to "), "{dry:?}");
    assert_done(&cloned);
    let clone = scene.domain.successor(&name);
    assert_eq!((clone.state().as_str(), scene.domain.state().as_str()), ("running", "running"));
    assert_ne!(clone.uuid(), scene.domain.uuid());
    assert!(!clone.xml().contains(mac) && clone.xml().contains("mac address"), "{}", clone.xml());
    clone.destroy();
    scene.assert_images(&clone.disk_path("vda"), &clone.disk_path("vdb"), "qcow2");

    // The first one gone, the uuid is free, and the second one still has another.
    scene.domain.destroy();
    scene.domain.virsh("undefine", &["--checkpoints-metadata"]);
    let to = scene.new_folder("first");
    let back = ["--to", text(&to), "--define", "--keep-identity", "--format", "raw"];
    assert_done(&scene.restore(&back));
    assert!(scene.domain.xml().contains(mac));
    scene.domain.start();
}

#[test]
fn p5_a_tpm_has_its_state_again() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os().disk(Disk::new("vda", SIZE)).under_libvirt().tpm();
    let domain = plan.boot(&libvirt);
    let state = |uuid: &str| {
        fs::read(Path::new(TPM_STATES).join(uuid).join("tpm2/tpm2-00.permall")).unwrap()
    };
    let (host, uuid, mut was) = (Host::new(), domain.uuid(), Vec::new());
    // The firmware writes to it while it starts: only a state that lasted is the one in the backup.
    wait_until(WAIT, "a backup while the TPM rests", || {
        was = state(&uuid);
        host.ok(["backup", domain.name()]);
        state(&uuid) == was
    });
    let (to, name) = (domain.folder().join("clone"), format!("{}-clone", domain.name()));
    let latest = format!("latest:{}", domain.name());

    host.ok(["restore", &latest, "--to", text(&to), "--define", "--name", &name]);

    let clone = domain.successor(&name);
    assert_eq!(state(&clone.uuid()), was);
    clone.start();
    clone.destroy();
}

#[test]
fn p5_a_pool_gets_the_images_under_names_of_their_own() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt, "");
    scene.backup();
    let (folder, pool) = (scene.new_folder("pool"), format!("pool-{}", scene.domain.name()));
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o711)).unwrap();
    fs::write(folder.join("vda.qcow2"), "another guest's").unwrap();
    let refused = scene.restore(&["--pool", &pool]);
    assert_says(&refused, 1, "has no storage pool");
    let _pool = Forget(&libvirt, &["pool-destroy", "pool-undefine"], pool.clone());
    libvirt.virsh(&["pool-define-as", &pool, "dir", "--target", text(&folder)]);
    assert_says(&scene.restore(&["--pool", &pool]), 1, "is not active");
    libvirt.virsh(&["pool-start", &pool]);
    let name = format!("{}-2", scene.domain.name());

    let outcome = scene.restore(&["--pool", &pool, "--define", "--name", &name, "--start"]);

    assert_done(&outcome);
    let volumes = libvirt.virsh(&["vol-list", &pool]);
    for volume in [format!("{name}-vda.qcow2"), format!("{name}-vdb.qcow2")] {
        assert!(volumes.contains(&volume), "{volumes}");
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 3, "images and nothing else");
    assert_eq!(fs::read_to_string(folder.join("vda.qcow2")).unwrap(), "another guest's");
    assert_says(&scene.restore(&["--pool", &pool, "--define", "--name", &name]), 1, "a domain");
}

#[test]
fn p5_what_libvirt_refuses_is_undone_and_the_disks_stay() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt, "");
    let network = format!("net-{}", scene.domain.name());
    let description = scene.domain.folder().join("network.xml");
    fs::write(&description, format!("<network><name>{network}</name></network>")).unwrap();
    let _network = Forget(&libvirt, &["net-destroy", "net-undefine"], network.clone());
    libvirt.virsh(&["net-define", text(&description)]);
    let interface = scene.domain.folder().join("interface.xml");
    let xml = format!("<interface type='network'><source network='{network}'/></interface>");
    fs::write(&interface, xml).unwrap();
    scene.domain.virsh("attach-device", &[text(&interface), "--config"]);
    scene.backup();
    libvirt.virsh(&["net-undefine", &network]);
    let (to, name) = (scene.new_folder("to"), format!("{}-2", scene.domain.name()));
    let mut command = scene.restore_command(&["--to", text(&to), "--define", "--name", &name]);
    let effects = {
        let (other, name) = (scene.new_folder("other"), format!("{}-3", scene.domain.name()));
        let more = ["--to", text(&other), "--define", "--name", &name];
        scene.host.effects(scene.restore_command(&more))
    };
    libvirt.virsh(&["net-destroy", &network]);
    libvirt.virsh(&["net-undefine", &network]);
    let define = effects.iter().position(|effect| effect == "libvirt: define the domain").unwrap();
    command.env("KVMSNAP_FAIL_AT", (define + 1).to_string());

    let outcome = finish(spawn(command));

    assert_says(&outcome, 1, "the machine is not defined; its disks are restored");
    assert!(!libvirt.virsh(&["net-list", "--all", "--name"]).contains(&network));
    assert!(!libvirt.virsh(&["list", "--all", "--name"]).contains(&name));
    scene.assert_images(&to.join("vda.qcow2"), &to.join("vdb.qcow2"), "qcow2");
    let planned = to.join("planned.xml");
    let hint = format!("hint: once that is mended: `virsh define {}`", planned.display());
    assert!(outcome.stderr.contains(&hint), "{outcome:?}");
    libvirt.virsh(&["define", text(&planned)]);
    scene.domain.successor(&name);
}

#[test]
fn p5_a_folder_that_qemu_cannot_reach_is_refused_and_named() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt, "");
    scene.backup();
    let (closed, name) = (scene.new_folder("closed"), format!("{}-2", scene.domain.name()));
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let to = closed.join("web");
    let define = ["--to", text(&to), "--define", "--name", &name, "--start"];

    let refused = scene.restore(&define);

    assert_says(&refused, 1, &format!("may not search {}", closed.display()));
    assert!(refused.stderr.contains(&format!("`chmod o+x {}`", closed.display())), "{refused:?}");
    assert!(!to.exists());
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o711)).unwrap();
    assert_done(&scene.restore(&define));
    scene.domain.successor(&name);
}

#[test]
fn p5_in_place_a_running_domain_is_refused_and_the_old_images_are_kept() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt, "");
    scene.backup();
    let backed_up = scene.contents.clone();
    scene.scribble(2);
    let (vda, vdb) = (scene.domain.disk_path("vda"), scene.domain.disk_path("vdb"));
    assert_says(&scene.restore(&["--in-place"]), 1, "is not shut off");
    scene.domain.virsh("managedsave", &[]);
    assert_says(&scene.restore(&["--in-place"]), 1, "the memory of the domain");
    scene.domain.virsh("managedsave-remove", &[]);
    let newer = std::mem::replace(&mut scene.contents, backed_up);
    let entries = || fs::read_dir(vda.parent().unwrap()).unwrap().count();
    let before = entries();
    let dry = scene.host.ok(["restore", &scene.latest(), "--in-place", "--dry-run"]);
    assert!(dry.contains("would be kept as"), "{dry}");
    assert_eq!(entries(), before);

    let outcome = scene.restore(&["--in-place", "--json"]);

    assert_done(&outcome);
    scene.assert_images(&vda, &vdb, "raw");
    let lines = outcome.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let kept: Vec<PathBuf> =
        lines.filter_map(|line| Some(line["before"].as_str()?.into())).collect();
    scene.contents = newer;
    scene.assert_images(&kept[0], &kept[1], "raw");
    assert_eq!(entries(), before + 2, "only the old images are added");
    assert!(scene.domain.virsh("checkpoint-list", &["--name"]).trim().is_empty());
    scene.domain.start();
    let next = scene.backup();
    assert_eq!(next["kind"], "rescan", "{next}");
    scene.domain.destroy();
}

#[test]
fn p5_in_place_a_disk_that_another_qemu_has_open_is_refused() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt, "");
    scene.backup();
    let vda = scene.domain.disk_path("vda");
    scene.domain.destroy();
    let mut daemon = Command::new("qemu-storage-daemon");
    let file = format!("driver=qcow2,node-name=a,file.driver=file,file.filename={}", vda.display());
    let pid = scene.domain.folder().join("daemon.pid");
    let socket = scene.domain.folder().join("daemon.sock");
    daemon.args(["--blockdev", &file, "--daemonize", "--pidfile", text(&pid)]);
    daemon.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
    daemon.args(["--export", "type=nbd,id=a,node-name=a,writable=on"]);
    tool(daemon);
    let pid: u32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();

    let refused = scene.restore(&["--in-place"]);

    signal(pid, Signal::SIGKILL);
    assert_says(&refused, 1, &format!("the image {} is in use", vda.display()));
    wait_until(WAIT, "the daemon is gone", || !Path::new(&format!("/proc/{pid}")).exists());
    assert_done(&scene.restore(&["--in-place"]));
}

#[test]
fn r24_in_place_killed_at_each_effect_is_explained_and_finished() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt, "");
    scene.backup();
    let backed_up = scene.contents.clone();
    let (vda, vdb) = (scene.domain.disk_path("vda"), scene.domain.disk_path("vdb"));
    scene.domain.destroy();
    let effects = scene.host.effects(scene.restore_command(&["--in-place"]));
    assert!(effects.iter().any(|effect| effect == "in place: exchange"), "{effects:?}");
    for (n, effect) in effects.iter().enumerate().map(|(n, effect)| (n + 1, effect)) {
        for variable in ["KVMSNAP_CRASH_AT", "KVMSNAP_FAIL_AT"] {
            let case = format!("{variable}={n}, {effect}");
            scene.scribble(u64::try_from(n).unwrap() + 7);
            scene.contents = backed_up.clone();
            let mut command = scene.restore_command(&["--in-place"]);
            command.env(variable, n.to_string());

            let outcome = finish(spawn(command));

            assert!(outcome.code.is_none_or(|code| code <= 1), "{case}: {outcome:?}");
            let doctor = scene.host.run(["doctor"]);
            match doctor.code {
                // Nothing, or everything, was exchanged.
                Some(0) => {}
                Some(1) => {
                    assert!(doctor.stdout.contains("(restore in place)"), "{case}: {doctor:?}");
                    assert_says(&scene.restore(&["--in-place"]), 1, "did not end");
                    assert_done(&scene.host.run(["doctor", "--repair"]));
                    scene.assert_images(&vda, &vdb, "raw");
                }
                _ => panic!("{case}: {doctor:?}"),
            }
            assert_done(&scene.restore(&["--in-place"]));
            scene.assert_images(&vda, &vdb, "raw");
            assert!(scene.host.ok(["doctor"]).contains("nothing is left"), "{case}");
        }
    }
    let left = fs::read_dir(vda.parent().unwrap()).unwrap().flatten();
    let left: Vec<_> = left
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(".kvmsnap-"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}
