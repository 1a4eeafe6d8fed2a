//! Whole Debian 12 machines as test guests: three disk images, and of each machine the file tree that was
//! on its disk, as `rsync -aHAXS --numeric-ids` would bring it.
//!
//! Everything is made on the host but what only a kernel can write: LVM and XFS are made by the fixture's
//! own guest, so the host's kernel mounts none of it. Built once, kept beside the fixture's other guests.

mod appliance;
mod disk;
mod grub;
mod machine;
mod oddities;
mod tree;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;

use sha2::{Digest as _, Sha256};

pub use self::appliance::appliance_environment;
pub use self::machine::Machine;
use crate::recipe::{cache_folder, hex};
use crate::tools::{available, qemu_available, required, run, skip};

/// Programs that make the machines, and the Debian packages they are in.
const PROGRAMS: [(&str, &str); 6] = [
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mcopy", "mtools"),
    ("sfdisk", "fdisk"),
    ("mkswap", "util-linux"),
];
/// What decides how the machines come out.
const RECIPE: [&str; 6] = [
    include_str!("mod.rs"),
    include_str!("disk.rs"),
    include_str!("grub.rs"),
    include_str!("machine.rs"),
    include_str!("oddities.rs"),
    include_str!("tree.rs"),
];

/// The machines' disks and trees, in the cache: read them, copy them, never write to them.
#[derive(Debug)]
pub struct Debian {
    folder: PathBuf,
}

impl Debian {
    /// The machines, built first where they are missing. Several processes may ask at once.
    ///
    /// `None`, said aloud, where a program is missing or we are not root.
    ///
    /// # Panics
    ///
    /// When one cannot be built; when something is missing and `KVMSNAP_REQUIRE_QEMU=1`.
    #[track_caller]
    pub fn get() -> Option<Self> {
        if !qemu_available() || !PROGRAMS.iter().all(|(name, package)| available(name, package)) {
            return None;
        }
        if !nix::unistd::geteuid().is_root() {
            assert!(!required(), "only root can make whole machines");
            skip("only root can make whole machines");
            return None;
        }
        let mut key = Sha256::new();
        RECIPE.iter().for_each(|part| key.update(part));
        let cache = cache_folder();
        let folder = cache.join(format!("debian-{}", hex(&key.finalize()[..12])));
        cached(&cache, "debian", &folder, build);
        Some(Self { folder })
    }

    /// The image of a machine's only disk, qcow2.
    pub fn disk(&self, machine: Machine) -> PathBuf {
        self.folder.join(machine.hostname()).join("disk.qcow2")
    }

    /// All files of a machine's disk, as they are on it.
    pub fn tree(&self, machine: Machine) -> PathBuf {
        self.folder.join(machine.hostname()).join("tree")
    }

    /// Copies a machine's tree with all that belongs to its files.
    #[track_caller]
    pub fn copy_tree(&self, machine: Machine, to: &Path) {
        copy_all(&self.tree(machine), to);
    }
}

/// Makes a folder of the cache under its lock, unless it is there: `build` fills a scratch folder, which
/// then gets its name.
fn cached(cache: &Path, kind: &str, folder: &Path, build: impl FnOnce(&Path)) {
    if folder.is_dir() {
        return;
    }
    let lock = File::create(cache.join(format!("{kind}.lock"))).expect("the cache is writable");
    lock.lock().expect("the cache is on a file system with locks");
    if folder.is_dir() {
        return;
    }
    // One that was killed has left it; nobody else builds under the lock.
    let scratch = cache.join(format!("{kind}.building"));
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir(&scratch).expect("the cache is writable");
    build(&scratch);
    fs::rename(&scratch, folder).expect("nobody else builds under the lock");
}

fn build(scratch: &Path) {
    let base = scratch.join("base");
    tree::make_base(&base);
    thread::scope(|scope| {
        for machine in Machine::ALL {
            let (base, folder) = (&base, scratch.join(machine.hostname()));
            scope.spawn(move || {
                fs::create_dir(&folder).expect("the folder is new");
                let tree = folder.join("tree");
                copy_all(base, &tree);
                tree::make(machine, &tree);
                disk::make(machine, &tree, &folder);
            });
        }
    });
    fs::remove_dir_all(&base).expect("the folder is ours");
}

#[track_caller]
fn copy_all(from: &Path, to: &Path) {
    run("cp", &["-a".as_ref(), "--reflink=auto".as_ref(), from.as_os_str(), to.as_os_str()]);
}
