//! GRUB as `grub-install` and `update-grub` leave it, made without the disk that they would look at.

use std::fs;
use std::path::Path;

use super::machine::Machine;
use super::tree::chroot;
use crate::tools::run;

/// Without mitigations and address randomisation an emulated kernel boots a third faster.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet loglevel=4 mitigations=off nokaslr tsc=reliable \
                              random.trust_cpu=on net.ifnames=0";

/// Puts GRUB into a tree.
#[track_caller]
pub(super) fn install(machine: Machine, tree: &Path) {
    let write = |path: &str, content: &str| {
        fs::write(tree.join(path), content).expect("the tree is ours");
    };
    write(
        "etc/default/grub",
        &format!(
            "GRUB_DEFAULT=0\nGRUB_TIMEOUT=0\nGRUB_DISTRIBUTOR=Debian\n\
             GRUB_CMDLINE_LINUX_DEFAULT=\"\"\nGRUB_CMDLINE_LINUX=\"{KERNEL_OPTIONS}\"\n"
        ),
    );
    let platform = if machine.uefi() { "x86_64-efi" } else { "i386-pc" };
    let modules = tree.join("boot/grub").join(platform);
    fs::create_dir_all(&modules).expect("the tree is ours");
    let from = tree.join("usr/lib/grub").join(platform);
    for entry in fs::read_dir(&from).expect("GRUB is installed").flatten() {
        let name = entry.file_name();
        let wanted = ["mod", "lst"]
            .map(Some)
            .contains(&Path::new(&name).extension().and_then(|e| e.to_str()));
        if wanted {
            fs::copy(entry.path(), modules.join(&name)).expect("the tree is ours");
        }
    }
    chroot(tree, &["grub-editenv", "/boot/grub/grubenv", "create"]);
    write("boot/grub/grub.cfg", &config(machine, &kernel_version(tree)));
    match machine.uefi() {
        false => install_bios(tree),
        true => install_efi(machine, tree),
    }
}

fn install_bios(tree: &Path) {
    let from = tree.join("usr/lib/grub/i386-pc/boot.img");
    fs::copy(from, tree.join("boot/grub/i386-pc/boot.img")).expect("the tree is ours");
    let command = "grub-mkimage -O i386-pc -o /boot/grub/i386-pc/core.img -p (lvm/vg0-root)/boot/grub \
                   biosdisk part_msdos lvm ext2";
    chroot(tree, &command.split_whitespace().collect::<Vec<_>>());
}

/// As `debian`, and by the path that a firmware without variables looks at.
fn install_efi(machine: Machine, tree: &Path) {
    let root = machine.uuids().root;
    let load = format!("search.fs_uuid {root} root\nset prefix=($root)/boot/grub\n");
    fs::write(tree.join("boot/grub/x86_64-efi/load.cfg"), load).expect("the tree is ours");
    let folders = ["boot/efi/EFI/debian", "boot/efi/EFI/BOOT"].map(|folder| tree.join(folder));
    for folder in &folders {
        fs::create_dir_all(folder).expect("the tree is ours");
    }
    let command = "grub-mkimage -O x86_64-efi -o /boot/efi/EFI/debian/grubx64.efi \
                   -c /boot/grub/x86_64-efi/load.cfg -p /boot/grub part_gpt fat btrfs search_fs_uuid";
    chroot(tree, &command.split_whitespace().collect::<Vec<_>>());
    fs::copy(folders[0].join("grubx64.efi"), folders[1].join("BOOTX64.EFI")).expect("ours");
    // As it is seen when mounted with umask=0077.
    run("chmod", &["-R".as_ref(), "u=rwx,go=".as_ref(), tree.join("boot/efi").as_os_str()]);
}

/// Writes the BIOS loader to the start of a disk: `boot.img` looks for the rest in the sector after its
/// own, and that for more in those that follow, unless told otherwise.
#[track_caller]
pub(super) fn write_boot_sectors(tree: &Path, disk: &Path) {
    const CODE_LEN: &str = "440"; // then the disk's number and its partitions
    let folder = tree.join("boot/grub/i386-pc");
    let core = fs::metadata(folder.join("core.img")).expect("it was made");
    assert!(core.len() <= (2048 - 1) * 512, "it fits before the first partition");
    let write = |file: &str, options: [&str; 2]| {
        let input = format!("if={}", folder.join(file).display());
        let output = format!("of={}", disk.display());
        run("dd", &[&input, &output, "conv=notrunc", "status=none", options[0], options[1]]);
    };
    write("boot.img", [&format!("bs={CODE_LEN}"), "count=1"]);
    write("core.img", ["bs=512", "seek=1"]);
}

/// The version of the one kernel.
#[track_caller]
fn kernel_version(tree: &Path) -> String {
    let names = fs::read_dir(tree.join("boot")).expect("the tree is ours").flatten();
    let mut names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let version = names.find_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned));
    version.expect("a kernel is installed")
}

/// The essence of what `update-grub` writes.
fn config(machine: Machine, version: &str) -> String {
    let uuid = machine.uuids().root;
    let (modules, root, device) = match machine.uefi() {
        false => ("lvm ext2", "lvm/vg0-root".to_owned(), "/dev/mapper/vg0-root".to_owned()),
        true => ("part_gpt btrfs", "hd0,gpt3".to_owned(), format!("UUID={uuid}")),
    };
    let load: String = modules.split(' ').map(|module| format!("insmod {module}\n")).collect();
    format!(
        "set default=\"0\"\nset timeout=0\n{load}set root='{root}'\n\
         search --no-floppy --fs-uuid --set=root {uuid}\n\
         menuentry 'Debian GNU/Linux' --class debian --class gnu-linux {{\n\
         \techo 'Loading Linux {version} ...'\n\
         \tlinux /boot/vmlinuz-{version} root={device} ro {KERNEL_OPTIONS}\n\
         \tinitrd /boot/initrd.img-{version}\n}}\n"
    )
}
