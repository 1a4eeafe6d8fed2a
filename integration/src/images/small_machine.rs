//! A machine of two disks that is just large enough to be worked on in an appliance: it never starts, so it
//! stands in wherever no test asks for that. `/` is on a partition of the first disk, `/home` is the second.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::tool;

/// Where the first partition begins, in bytes.
const FIRST: u64 = 1 << 20;
/// Bytes of its file system, and of the second disk.
const SIZE: u64 = 40 << 20;
/// Its kernel, which only has a folder.
pub const KERNEL: &str = "6.1.0-9-amd64";
/// Its initramfs, below its tree.
pub const INITRAMFS: &str = "boot/initramfs-6.1.0-9-amd64.img";

/// Stands in for `lsinitrd`: an initramfs of this machine is the list of what is in it.
const LSINITRD: &str = "#!/bin/sh\ncat \"$1\"\n";
/// Stands in for dracut: called as it must be for a machine of any kind, it makes one that knows the disks.
const DRACUT: &str = r#"#!/bin/sh
set -eu
wanted="--force --no-hostonly --tmpdir /run/kvmsnap --kver 6.1.0-9-amd64 /run/kvmsnap/made"
[ "$*" = "$wanted" ] || { echo "dracut: called with $*" >&2; exit 1; }
sed 's/:.*//' "/lib/modules/6.1.0-9-amd64/modules.dep" > /run/kvmsnap/made
"#;
const MODULES: &str =
    "kernel/drivers/virtio/virtio_pci.ko.xz:\nkernel/drivers/block/virtio_blk.ko.xz:\n";

/// One of two machines of this flavour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Small {
    /// The one that the template is of.
    Hazel,
    /// The one that it becomes.
    Linden,
}

impl Small {
    fn name(self) -> &'static str {
        match self {
            Self::Hazel => "hazel",
            Self::Linden => "linden",
        }
    }

    /// The UUIDs of `/` and `/home`.
    pub fn uuids(self) -> [&'static str; 2] {
        match self {
            Self::Hazel => {
                ["0d000000-0000-4000-8000-00000000000a", "0d000000-0000-4000-8000-00000000000b"]
            }
            Self::Linden => {
                ["0e000000-0000-4000-8000-00000000000a", "0e000000-0000-4000-8000-00000000000b"]
            }
        }
    }

    /// Makes its files in a new folder.
    ///
    /// # Panics
    /// Where busybox is missing.
    pub fn make_tree(self, tree: &Path) {
        let folders = [
            "bin",
            "usr/bin",
            "usr/sbin",
            "etc/selinux",
            "home/anna",
            "boot/efi/EFI/Linux",
            "lib/modules/6.1.0-9-amd64",
            "proc",
            "sys",
            "dev",
            "run",
            "tmp",
        ];
        for folder in folders {
            fs::create_dir_all(tree.join(folder)).expect("a folder of ours");
        }
        let write = |path: &str, text: &str| {
            fs::write(tree.join(path), text).expect("a folder of ours");
        };
        let mut find = Command::new("sh");
        find.args(["-c", "command -v busybox"]);
        let busybox = String::from_utf8(tool(find).stdout).expect("a path");
        fs::copy(busybox.trim(), tree.join("bin/busybox")).expect("package busybox-static");
        for applet in ["bin/sh", "bin/cat", "bin/sed", "usr/bin/env"] {
            symlink("/bin/busybox", tree.join(applet)).expect("a folder of ours");
        }
        for (path, script) in [("usr/bin/lsinitrd", LSINITRD), ("usr/sbin/dracut", DRACUT)] {
            write(path, script);
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(tree.join(path), mode).expect("ours");
        }
        let [root, home] = self.uuids();
        write("etc/fstab", &format!("UUID={root} / ext4 defaults 0 1\nUUID={home} /home ext4\n"));
        write("etc/hostname", &format!("{}\n", self.name()));
        write("etc/selinux/config", "SELINUX=enforcing\n");
        write("home/anna/notes", &format!("of {}\n", self.name()));
        write("lib/modules/6.1.0-9-amd64/modules.dep", MODULES);
        write(INITRAMFS, "kernel/drivers/ata/ahci.ko.xz\n");
        write("boot/efi/EFI/Linux/linden.efi", "a kernel with its initramfs");
        let part_of_second = Duration::from_millis(if self == Self::Hazel { 100 } else { 900 });
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + part_of_second;
        File::open(tree.join("lib")).and_then(|lib| lib.set_modified(time)).expect("ours");
    }

    /// Makes its disks of its files, raw, in a folder: `one` and `two`.
    ///
    /// # Panics
    /// Where a tool fails.
    pub fn make_disks(self, folder: &Path) -> [PathBuf; 2] {
        let (tree, home) = (folder.join("hazel"), folder.join("hazel-home"));
        self.make_tree(&tree);
        fs::rename(tree.join("home"), &home).expect("a folder of ours");
        fs::create_dir(tree.join("home")).expect("a folder of ours");
        let disks = ["one", "two"].map(|name| folder.join(name));
        let sizes = [FIRST + SIZE, SIZE];
        for (disk, size) in disks.iter().zip(sizes) {
            File::create_new(disk).and_then(|file| file.set_len(size)).expect("a folder of ours");
        }
        let mut partition = Command::new("sh");
        let script = "printf 'label: dos\nstart=2048, type=83\n' | sfdisk -q --no-reread --no-tell-kernel \"$0\"";
        partition.args(["-c", script]).arg(&disks[0]);
        tool(partition);
        let offsets = [FIRST, 0];
        for (n, tree) in [&tree, &home].into_iter().enumerate() {
            let mut make = Command::new("mke2fs");
            make.args(["-q", "-F", "-t", "ext4", "-U", self.uuids()[n], "-d"]).arg(tree);
            // As older systems made it: in inodes of 128 bytes times have no parts of a second.
            make.args(["-I", ["256", "128"][n], "-E"]).arg(format!("offset={}", offsets[n]));
            make.arg(&disks[n]).arg(format!("{}k", SIZE >> 10));
            tool(make);
        }
        disks
    }
}
