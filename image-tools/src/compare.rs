//! Whether a machine's file systems are whole, and its files those of a tree.
//!
//! The disks are overlays to be thrown away: journals are replayed in them.

use std::path::PathBuf;

use crate::appliance::{Appliance, ApplianceError, Options};
use crate::fit::{self, BootLoaderWants, Mount};
use crate::initramfs;
use crate::rsync::{Change, Compare, Item, Pass, Tree};
use crate::update::{self, KINDS, UpdateError, as_drives, look};

/// What an update has the machine's own `grub-install` write.
const BOOT_LOADER: [&str; 10] = [
    "boot/grub/fonts/",
    "boot/grub/grubenv",
    "boot/grub/i386-pc/",
    "boot/grub/locale/",
    "boot/grub/x86_64-efi/",
    "boot/grub2/fonts/",
    "boot/grub2/grubenv",
    "boot/grub2/i386-pc/",
    "boot/grub2/locale/",
    "boot/grub2/x86_64-efi/",
];
/// The same in an EFI system partition, where capitals do not count.
const EFI_BOOT: &str = "EFI/BOOT/";
/// The folders above what an update writes: their times differ.
const ABOVE: [&str; 4] = ["./", "boot/", "boot/grub/", "boot/grub2/"];

/// What is wanted.
#[derive(Debug)]
pub struct Request {
    /// Overlays on a machine's disks, in their order. They are written to.
    pub drives: Vec<PathBuf>,
    /// Whether to check its file systems.
    pub file_systems: bool,
    /// What to compare its files with.
    pub tree: Option<Tree>,
    /// What is not compared, as with [`update::Request`].
    pub excludes: Vec<String>,
    /// How the appliance runs.
    pub appliance: Options,
}

/// What is found.
#[derive(Debug)]
pub enum Event<'a> {
    /// What is done from here on, in words.
    Stage(&'static str),
    /// A file system was checked.
    FileSystem {
        /// In the appliance, by the order of the disks.
        device: String,
        /// `ext4`, …
        kind: &'a str,
        /// What its checker says is wrong.
        problem: Option<String>,
    },
    /// A file differs.
    Difference {
        /// What an update would do.
        item: &'a Item,
        /// Why it must differ, where an update has made it so.
        made_by_update: Option<&'static str>,
    },
}

/// Checks and compares; what is found goes to `on`.
///
/// # Errors
/// [`UpdateError`], where it cannot be told.
pub async fn compare(request: &Request, mut on: impl FnMut(Event<'_>)) -> Result<(), UpdateError> {
    if let Some(tree) = &request.tree {
        tree.probe()?;
    }
    on(Event::Stage("starting the appliance"));
    let mut appliance = Appliance::start(&as_drives(&request.drives), &request.appliance).await?;
    if request.file_systems {
        on(Event::Stage("checking file systems"));
        check_file_systems(&mut appliance, &mut on).await?;
    }
    if let Some(tree) = &request.tree {
        on(Event::Stage("comparing files"));
        let mounts = mount(&mut appliance).await?;
        // What the tree has is compared with what the tree has; that another is in its place is told.
        for path in initramfs::put_aside(&mut appliance).await? {
            let made_by_update = Some("an initramfs was made anew, the tree's is beside it");
            on(Event::Difference { item: &Item::another_content(path), made_by_update });
        }
        let excludes = request.excludes.clone();
        let compare = Compare::Content;
        let pass = Pass { compare, exact_times: false, dry_run: true, excludes };
        update::run(&mut appliance, tree, &pass, |event| {
            let update::Event::Item(item) = event else { return };
            let on_fat = path_on_fat(item, &mounts);
            if on_fat.is_none() || item.change != Change::Metadata {
                let made_by_update = made_by_update(item, on_fat);
                on(Event::Difference { item, made_by_update });
            }
        })
        .await?;
    }
    Ok(appliance.end().await?)
}

async fn check_file_systems(
    appliance: &mut Appliance,
    on: &mut impl FnMut(Event<'_>),
) -> Result<(), UpdateError> {
    let layout = appliance.layout().await?;
    for (device, kind) in layout.holders().filter(|(_, kind)| KINDS.contains(kind)) {
        let doing = format!("check the {kind} file system on {}", device.name);
        let problem = match appliance.step(&doing, &["verify", &device.name, kind]).await {
            Ok(_) => None,
            Err(ApplianceError::Step { said, .. }) => Some(said.trim().to_owned()),
            Err(error) => return Err(error.into()),
        };
        let device = layout.stable_name(&device.name);
        on(Event::FileSystem { device, kind, problem });
    }
    Ok(())
}

/// Mounts the file systems as the machine's own table says.
async fn mount(appliance: &mut Appliance) -> Result<Vec<Mount>, UpdateError> {
    let system = look(appliance).await?;
    let (table, wants) = (&system.table, BootLoaderWants::default());
    let plan = fit::plan(table, &system.layout, table, &wants).map_err(UpdateError::Misfit)?;
    for mount in &plan.mounts {
        appliance.mount(mount).await?;
    }
    Ok(plan.mounts)
}

/// The path below the vfat that a file is on, which has no owners, modes and exact times.
fn path_on_fat<'a>(item: &'a Item, mounts: &[Mount]) -> Option<&'a str> {
    let below = |mount: &Mount| {
        let rest = item.path.strip_prefix(mount.path.trim_start_matches('/'))?;
        rest.strip_prefix('/').filter(|_| mount.is_plain)
    };
    mounts.iter().find_map(below)
}

/// Why an update makes a difference of its own.
fn made_by_update(item: &Item, on_fat: Option<&str>) -> Option<&'static str> {
    let is_efi_boot = |path: &str| {
        path.get(..EFI_BOOT.len()).is_some_and(|start| start.eq_ignore_ascii_case(EFI_BOOT))
    };
    let is_boot_loader = BOOT_LOADER.iter().any(|folder| item.path.starts_with(folder));
    match &*item.path {
        _ if is_boot_loader || on_fat.is_some_and(is_efi_boot) => {
            Some("the boot loader was installed anew")
        }
        path if item.is_time_only && ABOVE.contains(&path) => Some("files were made in it"),
        ".autorelabel" if item.change == Change::Deleted => Some("it has SELinux label all files"),
        "tmp/" if item.change == Change::Deleted => Some("no system starts without it"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Why an update makes this difference, on a machine with its EFI system partition at `/boot/efi`.
    fn excuse(line: &str) -> Option<&'static str> {
        let item = Item::parse(line).expect("a line of rsync");
        let mount = |path: &str, is_plain| Mount {
            device: "/dev/sda1".into(),
            kind: "any".into(),
            path: path.into(),
            options: String::new(),
            is_plain,
        };
        let mounts = [mount("/", false), mount("/boot/efi", true)];
        made_by_update(&item, path_on_fat(&item, &mounts))
    }

    #[test]
    fn only_what_an_update_makes_is_excused() {
        for line in [
            ">fcst......|4|boot/grub/i386-pc/core.img",
            "*deleting  |0|boot/grub/fonts/unicode.pf2",
            ">fc........|4|boot/efi/efi/boot/BOOTX64.EFI",
            ".d..t......|4096|boot/grub/",
            ".d..t......|4096|./",
            "*deleting  |0|.autorelabel",
            "*deleting  |0|tmp/",
        ] {
            assert!(excuse(line).is_some(), "{line}");
        }
        for line in [
            ">fcst......|4|boot/grub/grub.cfg",
            ".d..tpog...|4096|boot/grub/",
            ".d..t......|4096|etc/",
            ">f+++++++++|4|.autorelabel",
            "*deleting  |0|tmp/file",
            ">fc........|4|boot/efi/EFI/debian/shimx64.efi",
            ">fc........|4|boot/efivars/EFI/BOOT/BOOTX64.EFI",
        ] {
            assert_eq!(excuse(line), None, "{line}");
        }
    }
}
