//! The machines' files: one base of Debian's packages, then what makes each its own.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::{TimeSpec, TimeValLike as _};

use super::machine::Machine;
use super::{grub, oddities};
use crate::tools::run;

const SUITE: &str = "bookworm";
const PACKAGES: &str = "systemd-sysv,udev,linux-image-cloud-amd64,initramfs-tools,busybox,lvm2,e2fsprogs,\
    xfsprogs,btrfs-progs,dosfstools,grub2-common,grub-pc-bin,grub-efi-amd64-bin,qemu-guest-agent,\
    attr,acl,libcap2-bin,bc,ed,hello";
/// Fewer files are built, copied and compared sooner.
const LEFT_OUT: [&str; 13] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/i18n/*",
    "/usr/share/zoneinfo/*",
    "/usr/share/lintian/*",
    "/usr/share/bug/*",
    "/usr/lib/x86_64-linux-gnu/gconv/*",
    "/usr/lib/udev/hwdb.d/*",
    "/lib/udev/hwdb.d/*",
    "/lib/modules/*/kernel/net/*",
    "/lib/modules/*/kernel/drivers/net/*",
];
/// A short list keeps the initramfs small: it is unpacked by an emulated processor.
const INITRAMFS_MODULES: &str = "virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\nvirtio_console\next4\nxfs\n\
    btrfs\ndm_mod\n";
/// What would run in the minutes after a start and change the disk, and what makes a start longer.
const MASKED: [&str; 23] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "xfs_scrub_all.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "e2scrub_reap.service",
    "kmod-static-nodes.service",
    "lvm2-monitor.service",
    "modprobe@configfs.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "getty-static.service",
];

/// Makes the base of all machines.
#[track_caller]
pub(super) fn make_base(base: &Path) {
    let initramfs = "mkdir -p \"$1/etc/initramfs-tools/conf.d\" && \
        printf 'MODULES=list\\nRESUME=none\\nCOMPRESS=gzip\\n' \
        > \"$1/etc/initramfs-tools/conf.d/fixture\" && \
        printf \"$FIXTURE_MODULES\" > \"$1/etc/initramfs-tools/modules\"";
    let initramfs = initramfs.replace("$FIXTURE_MODULES", INITRAMFS_MODULES);
    let mut args = vec![
        "--mode=root".to_owned(),
        "--variant=minbase".to_owned(),
        format!("--include={PACKAGES}"),
        "--aptopt=APT::Install-Recommends false".to_owned(),
        "--aptopt=Acquire::Languages none".to_owned(),
        "--dpkgopt=force-unsafe-io".to_owned(),
        "--dpkgopt=force-confold".to_owned(),
        format!("--setup-hook={initramfs}"),
    ];
    args.extend(LEFT_OUT.map(|pattern| format!("--dpkgopt=path-exclude={pattern}")));
    args.extend([SUITE.to_owned(), base.to_str().expect("the cache's path is text").to_owned()]);
    run("mmdebstrap", &args);
    fs::create_dir_all(base.join("boot/efi")).expect("the tree is ours");
}

/// Makes a copy of the base this machine's.
#[track_caller]
pub(super) fn make(machine: Machine, tree: &Path) {
    chroot(tree, &[&["dpkg", "--purge"], machine.without()].concat());
    for (user, id) in machine.users() {
        chroot(tree, &["useradd", "--create-home", "--uid", &id.to_string(), user]);
    }
    let write = |path: &str, content: &str| {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().expect("below the tree")).expect("the tree is ours");
        fs::write(path, content).expect("the tree is ours");
    };
    let hostname = machine.hostname();
    write("etc/hostname", &format!("{hostname}\n"));
    write("etc/hosts", &format!("127.0.0.1 localhost\n127.0.1.1 {hostname}\n"));
    write("etc/machine-id", &format!("{}\n", machine.machine_id()));
    write("etc/fstab", &machine.fstab());
    for kind in ["ed25519", "rsa"] {
        let key = format!("etc/ssh/ssh_host_{kind}_key");
        write(&key, &format!("private {kind} key of {hostname}\n"));
        fs::set_permissions(tree.join(&key), fs::Permissions::from_mode(0o600)).expect("ours");
        write(&format!("{key}.pub"), &format!("{kind} key of {hostname}\n"));
    }
    for unit in MASKED {
        symlink("/dev/null", tree.join("etc/systemd/system").join(unit)).expect("it is new");
    }
    grub::install(machine, tree);
    if machine == Machine::BiosOther {
        oddities::add(tree);
    }
    whole_seconds(tree);
}

/// Runs a program of the tree.
#[track_caller]
pub(super) fn chroot(tree: &Path, command: &[&str]) {
    let tree = tree.to_str().expect("the cache's path is text");
    run("env", &[&["-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "chroot", tree], command].concat());
}

/// Cuts all times to what every file system here can hold: `mke2fs -d` keeps seconds, vfat even ones.
fn whole_seconds(path: &Path) {
    if fs::symlink_metadata(path).expect("the tree is ours").is_dir() {
        for entry in fs::read_dir(path).expect("the tree is ours") {
            whole_seconds(&entry.expect("the tree is ours").path());
        }
    }
    set_modified(path, modified(path) & !1);
}

/// When a file was last written, in seconds.
pub(super) fn modified(path: &Path) -> i64 {
    fs::symlink_metadata(path).expect("the tree is ours").mtime()
}

pub(super) fn set_modified(path: &Path, seconds: i64) {
    let time = TimeSpec::seconds(seconds);
    let set = utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink);
    set.expect("the tree is ours");
}
