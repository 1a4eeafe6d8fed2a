//! From a tree to a disk: file systems, partition table, boot sectors.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use super::grub;
use super::machine::{Machine, Uuids};
use super::tree::{modified, set_modified};
use crate::disk::{Disk, Format, MIB};
use crate::guest::Guest;
use crate::tools::run;

const DISK_SIZE: u64 = 2048 * MIB;
/// Where the first partition begins; GRUB has the sectors before.
const FIRST: u64 = MIB;
/// Of the machines with LVM.
const ROOT_SIZE: u64 = 1024 * MIB;
const VAR_MIB: u64 = 320;
const SWAP_MIB: u64 = 64;
/// Of the machine with UEFI.
const EFI_SIZE: u64 = 64 * MIB;
const SWAP_SIZE: u64 = SWAP_MIB * MIB;
/// How long the guest may take to fill the volumes.
const FILL_TIMEOUT: Duration = Duration::from_secs(300);
/// Without udev, LVM makes its device files itself.
const LVM_CONF: &str = "\
devices { obtain_device_list_from_udev = 0 use_devicesfile = 0 }
activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }
global { event_activation = 0 use_lvmpolld = 0 }
backup { backup = 0 archive = 0 }
";

/// Makes `disk.qcow2` in a machine's folder.
#[track_caller]
pub(super) fn make(machine: Machine, tree: &Path, folder: &Path) {
    let disk = new_image(folder, "disk.raw", DISK_SIZE);
    match machine.uefi() {
        false => fill_bios(machine, tree, folder, &disk),
        true => fill_uefi(machine, tree, folder, &disk),
    }
    let image = folder.join("disk.qcow2");
    let [from, to] = [&disk, &image].map(|path| text(path));
    run("qemu-img", &["convert", "-q", "-f", "raw", "-O", "qcow2", from, to]);
    fs::remove_file(&disk).expect("the file is ours");
}

/// The root file system is made here; LVM and XFS by a guest, whose kernel can.
fn fill_bios(machine: Machine, tree: &Path, folder: &Path, disk: &Path) {
    let Uuids { root: root_uuid, second, swap } = machine.uuids();
    partition(disk, &format!("label: dos\nstart={}, type=8e, bootable\n", FIRST / 512));
    let root = new_image(folder, "root.ext4", ROOT_SIZE);
    let var = new_image(folder, "var.ext4", VAR_MIB * MIB);
    make_ext4(&tree.join("var"), &var, second);
    apart(tree, "var", folder, || make_ext4(tree, &root, root_uuid));

    let plan = Guest::builder()
        .disk(Disk::existing("vda", disk, Format::Raw))
        .disk(Disk::existing("vdb", &root, Format::Raw))
        .disk(Disk::existing("vdc", &var, Format::Raw));
    let guest = plan.boot().expect("QEMU was looked for");
    guest.write_file("/tmp/lvm.conf", LVM_CONF.as_bytes());
    let script = format!(
        "set -e
        while read -r module; do insmod /lib/modules/$module; done < /lib/modules/device-mapper
        root=/mnt/root; mkdir -p $root; mount -t ext4 -o ro /dev/vdb $root
        for f in dev proc sys; do mount --bind /$f $root/$f; done
        mount -t tmpfs tmpfs $root/run; mkdir $root/run/lvm; cp /tmp/lvm.conf $root/run/lvm
        # By their paths: busybox's chroot runs its own programs of these names.
        in_root() {{ LVM_SYSTEM_DIR=/run/lvm PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot $root \"$@\"; }}
        in_root vgcreate -q vg0 /dev/vda1
        in_root lvcreate -q -y -Wn -n root -L {ROOT_SIZE}b vg0
        in_root lvcreate -q -y -Wn -n var -L {VAR_MIB}m vg0
        in_root lvcreate -q -y -Wn -n swap -L {SWAP_MIB}m vg0
        in_root /sbin/mkswap -q -U {swap} /dev/vg0/swap
        in_root /sbin/mkfs.xfs -q -K -m uuid={second} /dev/vg0/var
        mount -t xfs /dev/vg0/var $root/mnt; mount -t ext4 -o ro /dev/vdc $root/srv
        tar=\"tar --xattrs --xattrs-include=* --acls --numeric-owner\"
        in_root /bin/bash -c \"set -f -o pipefail
            $tar -C /srv --exclude=./lost+found -cSf - . | $tar -C /mnt -xpSf -\"
        umount $root/mnt $root/srv
        in_root /bin/dd if=/dev/vdb of=/dev/vg0/root bs=1M conv=sparse,fsync status=none
        in_root vgchange -q -an vg0
        sync"
    );
    let output = guest.exec_within(&["sh", "-c", &script], FILL_TIMEOUT);
    assert!(output.success(), "{}: {output:?}\n{}", machine.hostname(), guest.console());
    guest.shut_down();
    grub::write_boot_sectors(tree, disk);
    for image in [root, var] {
        fs::remove_file(image).expect("the file is ours");
    }
}

fn fill_uefi(machine: Machine, tree: &Path, folder: &Path, disk: &Path) {
    let Uuids { root: root_uuid, second, swap } = machine.uuids();
    let sectors = |bytes: u64| bytes / 512;
    let (efi_at, swap_at, root_at) = (FIRST, FIRST + EFI_SIZE, FIRST + EFI_SIZE + SWAP_SIZE);
    // The last MiB is the second table's.
    let root_size = DISK_SIZE - MIB - root_at;
    let table: String =
        [(efi_at, EFI_SIZE, "uefi"), (swap_at, SWAP_SIZE, "swap"), (root_at, root_size, "linux")]
            .map(|(at, size, kind)| {
                format!("start={}, size={}, type={kind}\n", sectors(at), sectors(size))
            })
            .concat();
    partition(disk, &format!("label: gpt\n{table}"));

    let efi = new_image(folder, "efi.vfat", EFI_SIZE);
    let number = second.replace('-', "");
    run(
        "mformat",
        &["-i", text(&efi), "-v", "EFI", "-N", &number, "-T", &sectors(EFI_SIZE).to_string(), "::"],
    );
    run(
        "env",
        &["TZ=UTC", "mcopy", "-s", "-m", "-i", text(&efi), text(&tree.join("boot/efi/EFI")), "::"],
    );
    let swap_image = new_image(folder, "swap", SWAP_SIZE);
    run("mkswap", &["-q", "-U", swap, text(&swap_image)]);
    let root = new_image(folder, "root.btrfs", root_size);
    apart(tree, "boot/efi", folder, || {
        run("mkfs.btrfs", &["-q", "-U", root_uuid, "--rootdir", text(tree), text(&root)]);
    });

    for (part, at) in [(&efi, efi_at), (&swap_image, swap_at), (&root, root_at)] {
        let (from, to) = (format!("if={}", text(part)), format!("of={}", text(disk)));
        let seek = format!("seek={}", at / MIB);
        run("dd", &[&from, &to, "bs=1M", &seek, "conv=notrunc,sparse", "status=none"]);
        fs::remove_file(part).expect("the file is ours");
    }
}

fn partition(disk: &Path, table: &str) {
    let script = format!("printf '{table}' | sfdisk -q --no-reread --no-tell-kernel \"$0\"");
    run("sh", &["-c", &script, text(disk)]);
}

/// Features that GRUB 2.06 does not read are left out, whatever the host's e2fsprogs would choose.
fn make_ext4(tree: &Path, image: &Path, uuid: &str) {
    let features = "^metadata_csum_seed,^orphan_file";
    let args =
        ["-q", "-F", "-t", "ext4", "-O", features, "-U", uuid, "-d", text(tree), text(image)];
    run("mke2fs", &args);
    // It takes all times from the tree but that of the top.
    let time = format!("set_inode_field <2> mtime @{}", modified(tree));
    run("debugfs", &["-w", "-R", &time, text(image)]);
}

/// Does something while a folder of the tree is empty, as below a mount point.
fn apart(tree: &Path, name: &str, folder: &Path, act: impl FnOnce()) {
    let (inside, outside) = (tree.join(name), folder.join("apart"));
    let parent = inside.parent().expect("it is below the tree");
    let time = modified(parent);
    fs::rename(&inside, &outside).expect("the tree is ours");
    fs::create_dir(&inside).expect("its name is free");
    set_modified(parent, time);
    act();
    fs::remove_dir(&inside).expect("it is empty");
    fs::rename(&outside, &inside).expect("its name is free");
    set_modified(parent, time);
}

#[track_caller]
fn new_image(folder: &Path, name: &str, size: u64) -> std::path::PathBuf {
    let path = folder.join(name);
    let file = File::create_new(&path).expect("the folder is new");
    file.set_len(size).expect("the folder takes sparse files");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the cache's path is text")
}
