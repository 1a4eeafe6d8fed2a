//! A guest that plays the host: it has what the machine that the tests run on may lack, such as a device
//! mapper, and runs QEMU and the program under test itself.
//!
//! They, LVM's tools and all their libraries are copied from the machine onto a disk, which becomes the
//! root of whatever is run. What runs there is emulated, and a guest of its QEMU twice: keep it small.

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::builder::GuestBuilder;
use crate::disk::{Disk, Format};
use crate::guest::Guest;
use crate::guest_agent::Output;
use crate::tools::{available, find, run, shared_libraries};

/// What every inner host has, and the package it is in.
const PROGRAMS: [(&str, &str); 6] = [
    ("busybox", "busybox-static"),
    ("lvm", "lvm2"),
    ("dmsetup", "dmsetup"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-storage-daemon", "qemu-system-common"),
    ("qemu-img", "qemu-utils"),
];
/// LVM's program is all of its tools, by the name that it is called by.
const LVM_TOOLS: [&str; 8] =
    ["pvcreate", "vgcreate", "lvcreate", "lvs", "lvremove", "lvchange", "vgs", "lvdisplay"];
/// A part of QEMU that it loads itself; where Debian's packages have it.
const QEMU_MODULE: &str = "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so";
/// Firmware of a machine that boots nothing; where Debian's packages have it.
const FIRMWARE: [&str; 2] = ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin"];
const MEMORY_MIB: u32 = 1024;
/// Room for the programs, in MiB; what is not used takes none.
const ROOT_MIB: u32 = 512;
/// Where the disk with the programs is mounted.
const ROOT: &str = "/mnt/host";
/// How long a program may run: it is emulated.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Without udev, LVM makes its device files itself.
const LVM_CONF: &str = "\
devices { obtain_device_list_from_udev = 0 use_devicesfile = 0 }
activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }
global { thin_check_executable = \"\" event_activation = 0 use_lvmpolld = 0 }
backup { backup = 0 archive = 0 }
";

/// A guest that plays the host.
#[derive(Debug)]
pub struct InnerHost {
    guest: Guest,
}

impl InnerHost {
    /// Boots one that has these programs too, in its `/bin`, and empty disks of these sizes in bytes:
    /// `/dev/vdb`, `/dev/vdc`, …
    ///
    /// `None`, said aloud, where something is missing.
    ///
    /// # Panics
    ///
    /// When it does not come up; when something is missing and `KVMSNAP_REQUIRE_QEMU=1`.
    #[track_caller]
    pub fn boot(programs: &[&Path], disks: &[u64]) -> Option<Self> {
        if !PROGRAMS.iter().all(|(program, package)| available(program, package)) {
            return None;
        }
        let folder = tempfile::Builder::new().prefix("kvmsnap-fixture-").tempdir();
        let folder = folder.expect("the folder for temporary files is writable");
        let image = folder.path().join("root.raw");
        make_root(&folder.path().join("root"), programs, &image);
        let plan = Guest::builder().memory_mib(MEMORY_MIB);
        let plan = plan.disk(Disk::existing("vda", &image, Format::Raw));
        let disk = |(index, size): (usize, &u64)| {
            let letter = char::from(b'b' + u8::try_from(index).expect("few disks"));
            Disk::new(&format!("vd{letter}"), *size).raw()
        };
        let plan = disks.iter().enumerate().map(disk).fold(plan, GuestBuilder::disk);
        let guest = plan.boot()?;
        guest.sh(&format!(
            "while read -r m; do insmod /lib/modules/$m; done < /lib/modules/device-mapper; \
             mkdir -p {ROOT} && mount -t ext4 /dev/vda {ROOT} && cd {ROOT} && \
             for f in dev proc sys tmp run; do mkdir -p $f && mount --bind /$f $f; done"
        ));
        // QEMU has its image open.
        drop(folder);
        Some(Self { guest })
    }

    /// Runs a program of the inner host to its end.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Output {
        self.guest.exec_within(&[&["chroot", ROOT], command].concat(), TIMEOUT)
    }

    /// Runs a shell script in the inner host, which must succeed, and returns its standard output.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = self.exec(&["sh", "-c", script]);
        assert!(output.success(), "`{script}` failed in the inner host: {output:?}");
        output.stdout
    }

    /// Starts a program of the inner host, for `poll`.
    #[track_caller]
    pub fn start(&self, command: &[&str]) -> i64 {
        self.guest.spawn(&[&["chroot", ROOT], command].concat())
    }
}

impl Deref for InnerHost {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

/// Makes the file system with all programs.
#[track_caller]
fn make_root(root: &Path, programs: &[&Path], image: &Path) {
    for folder in ["usr/bin", "etc/lvm", "usr/share/qemu"] {
        fs::create_dir_all(root.join(folder)).expect("the folder is ours");
    }
    // QEMU looks for its modules and firmware from where it lies itself.
    link("usr/bin", &root.join("bin"));
    let found = PROGRAMS.iter().map(|(name, _)| find(name).expect("it is available"));
    for program in found.chain(programs.iter().map(|path| path.to_path_buf())) {
        let name = program.file_name().expect("a program has a name").to_owned();
        copy(&program, &root.join("bin").join(&name));
        if name != "busybox" {
            for library in shared_libraries(&program) {
                copy(&library, &root.join(library.strip_prefix("/").expect("an absolute path")));
            }
        }
    }
    for tool in LVM_TOOLS {
        link("lvm", &root.join("bin").join(tool));
    }
    let applets = run("busybox", &["--list"]);
    for applet in applets.lines() {
        let link_path = root.join("bin").join(applet);
        if !link_path.exists() {
            link("busybox", &link_path);
        }
    }
    if Path::new(QEMU_MODULE).exists() {
        copy(Path::new(QEMU_MODULE), &root.join(QEMU_MODULE.trim_start_matches('/')));
    }
    for firmware in FIRMWARE.iter().map(PathBuf::from) {
        let name = firmware.file_name().expect("a file has a name");
        copy(&firmware, &root.join("usr/share/qemu").join(name));
    }
    fs::write(root.join("etc/lvm/lvm.conf"), LVM_CONF).expect("the folder is ours");
    let (root, image) = (root.to_str().expect("text"), image.to_str().expect("text"));
    run("mkfs.ext4", &["-q", "-F", "-d", root, image, &format!("{ROOT_MIB}M")]);
}

#[track_caller]
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().expect("a file lies in a folder")).expect("the folder is ours");
    fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
}

#[track_caller]
fn link(to: &str, path: &Path) {
    std::os::unix::fs::symlink(to, path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
