//! Whether a tree fits a template, by what the template's record says of its disks. Without I/O.
//!
//! It is the same comparison that an update makes in its appliance: the record is turned back into what
//! an appliance would see.

use std::fmt::{self, Display, Formatter};

use super::tree::Machine;
use super::{BootLoaderWants, Misfit, Table, plan, tidy};
use crate::appliance::look::{Device, Layout, Volume};
use crate::flavour::{BootMode, DiskLayout, FileSystem, Flavour, Partition};
use crate::fstab::Entry;

/// Where the EFI system partition is mounted.
const EFI_PLACES: [&str; 2] = ["/boot/efi", "/efi"];
/// How the record calls the place of swap.
const SWAP: &str = "swap";

/// What came of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fit {
    /// Why it does not fit; nothing where it does.
    pub misfits: Vec<Misfit>,
    /// What differs without being in the way.
    pub remarks: Vec<Remark>,
}

/// What differs without being in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remark {
    /// A line of the tree's table that nothing is done for.
    Skipped {
        /// The line.
        entry: String,
        /// Why.
        why: &'static str,
    },
    /// The tree's table names a device in a way that a record has nothing of.
    Unknown {
        /// As the tree's table has it.
        spec: String,
        /// Where.
        path: String,
    },
    /// A volume of LVM has another size.
    VolumeSize {
        /// `GROUP/VOLUME`.
        volume: String,
        /// Bytes on the tree's machine.
        tree: u64,
        /// Bytes in the template.
        template: u64,
    },
    /// The template has no such volume of LVM.
    NoVolume {
        /// `GROUP/VOLUME`.
        volume: String,
    },
    /// The boot loader's configuration was made for another kind of partition table.
    PartitionTable {
        /// `gpt` or `dos`.
        wanted: &'static str,
        /// Of the template's first disk.
        found: String,
    },
}

impl Display for Remark {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Skipped { entry, why } => write!(f, "{entry}: {why}"),
            Self::Unknown { spec, path } => {
                write!(f, "only an update can tell whether the template has {spec} at {path}")
            }
            Self::VolumeSize { volume, tree, template } => write!(
                f,
                "the volume {volume} has {tree} bytes on the tree's machine, {template} in the template"
            ),
            Self::NoVolume { volume } => {
                write!(f, "the template has no volume {volume}, the tree's machine has")
            }
            Self::PartitionTable { wanted, found } => write!(
                f,
                "the tree's boot loader expects a partition table of the kind {wanted}, the template has {found}"
            ),
        }
    }
}

/// Compares a template with a tree.
pub fn compare(flavour: &Flavour, tree: &Machine) -> Fit {
    let layout = layout(flavour);
    let mut fit = Fit::default();
    let wants = BootLoaderWants::default();
    match plan(&table(flavour), &layout, &tree.table, &wants) {
        Ok(plan) => {
            let skipped = plan.skipped.into_iter();
            fit.remarks.extend(skipped.map(|(entry, why)| Remark::Skipped { entry, why }));
        }
        Err(misfits) => {
            for misfit in misfits {
                match misfit {
                    Misfit::Device { spec, path, .. } if is_unknown(&spec) => {
                        fit.remarks.push(Remark::Unknown { spec, path });
                    }
                    misfit => fit.misfits.push(misfit),
                }
            }
        }
    }
    fit.misfits.extend(boot_mode(flavour, tree));
    fit.misfits.extend(too_large(flavour, &layout, tree));
    fit.remarks.extend(volumes(flavour, tree));
    fit.remarks.extend(partition_table(flavour, &tree.boot_config));
    fit
}

/// Whether a record has nothing of such names.
fn is_unknown(spec: &str) -> bool {
    spec.starts_with("PARTLABEL=") || spec.starts_with("/dev/disk/by-")
}

/// By who mounts an EFI system partition: not all that start by UEFI do, and some have one beside a BIOS.
fn boot_mode(flavour: &Flavour, tree: &Machine) -> Option<Misfit> {
    let is_efi = |path: &str| EFI_PLACES.contains(&&*tidy(path));
    let is_tree_efi = tree.table.entries.iter().any(|entry| is_efi(&entry.path));
    let mut places = flavour.file_systems.iter().filter_map(|fs| fs.mount.as_deref());
    let wanted = if is_tree_efi { BootMode::Uefi } else { BootMode::Bios };
    let differs = is_tree_efi != places.any(is_efi) && wanted != flavour.boot;
    differs.then_some(Misfit::Boot { wanted, found: flavour.boot })
}

/// The places whose files are more than the template's file system is large. Several places may be on one.
fn too_large(flavour: &Flavour, layout: &Layout, tree: &Machine) -> Vec<Misfit> {
    let device_at = |place: &str| {
        let at = |fs: &&FileSystem| fs.mount.as_deref().is_some_and(|mount| tidy(mount) == place);
        flavour.file_systems.iter().find(at).map(|fs| fs.device.as_str())
    };
    let misfit = |device: &Device| {
        let here = |place: &&(String, u64)| device_at(&place.0) == Some(&device.name);
        let places: Vec<_> = tree.needs.iter().filter(here).collect();
        let files = places.iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
        let paths: Vec<_> = places.iter().map(|(place, _)| place.as_str()).collect();
        let (path, room) = (paths.join(" and "), device.size);
        (room > 0 && files > room).then_some(Misfit::TooLarge { path, files, room })
    };
    layout.devices().into_iter().filter_map(misfit).collect()
}

fn volumes(flavour: &Flavour, tree: &Machine) -> Vec<Remark> {
    let mut remarks = Vec::new();
    for group in &tree.volume_groups {
        for (name, size) in &group.volumes {
            let volume = format!("{}/{name}", group.name);
            let ours = flavour.volume_groups.iter().find(|ours| ours.name == group.name);
            let ours = ours.and_then(|ours| ours.volumes.iter().find(|(other, _)| other == name));
            match ours {
                None => remarks.push(Remark::NoVolume { volume }),
                Some((_, ours)) if ours != size => {
                    remarks.push(Remark::VolumeSize { volume, tree: *size, template: *ours });
                }
                Some(_) => {}
            }
        }
    }
    remarks
}

fn partition_table(flavour: &Flavour, boot_config: &str) -> Option<Remark> {
    let loads = |module: &str| boot_config.lines().any(|line| line.trim() == module);
    let wanted = match (loads("insmod part_gpt"), loads("insmod part_msdos")) {
        (true, false) => "gpt",
        (false, true) => "dos",
        _ => return None,
    };
    let found = flavour.disks.first()?.table.clone()?;
    (found != wanted).then_some(Remark::PartitionTable { wanted, found })
}

/// The template's own table, as far as the record has it.
fn table(flavour: &Flavour) -> Table {
    let entry = |fs: &FileSystem| {
        let mount = fs.mount.clone()?;
        let is_swap = mount == SWAP;
        Some(Entry {
            spec: fs.device.clone(),
            path: if is_swap { "none".to_owned() } else { mount },
            kind: if is_swap { SWAP.to_owned() } else { fs.kind.clone() },
            options: String::new(),
        })
    };
    Table { entries: flavour.file_systems.iter().filter_map(entry).collect() }
}

/// What an appliance would see; it calls the disks `sda` and so on, in their order.
fn layout(flavour: &Flavour) -> Layout {
    let device = |name: String, role: &str, size: u64| {
        let held = flavour.file_systems.iter().find(|fs| fs.device == name);
        Device {
            fstype: held.map(|fs| fs.kind.clone()),
            name,
            role: role.to_owned(),
            size,
            hctl: None,
            start: None,
            pttype: None,
            parttype: None,
            partuuid: None,
            partlabel: None,
            uuid: None,
            label: None,
            children: Vec::new(),
        }
    };
    let disk = |(letter, disk): (u8, &DiskLayout)| {
        let name = format!("/dev/sd{}", char::from(letter));
        let part = |number| format!("{name}{number}");
        let parts = disk.partitions.iter();
        // In a table of MBR a partition's UUID is the disk's id and its number.
        let is_mbr = disk.table.as_deref() == Some("dos");
        let partition = |p: &Partition| Device {
            partuuid: is_mbr.then(|| format!("00000000-{:02x}", p.number)),
            ..device(part(p.number), "part", p.size)
        };
        let children = parts.map(partition).collect();
        Device { children, ..device(name.clone(), "disk", disk.size) }
    };
    let mut disks: Vec<_> = (b'a'..=b'z').zip(&flavour.disks).map(disk).collect();
    let mut volumes = Vec::new();
    for group in &flavour.volume_groups {
        for (name, size) in &group.volumes {
            let escape = |part: &str| part.replace('-', "--");
            let path = format!("/dev/mapper/{}-{}", escape(&group.name), escape(name));
            // On which disks a volume is makes no difference here.
            if let Some(disk) = disks.first_mut() {
                disk.children.push(device(path.clone(), "lvm", *size));
            }
            volumes.push(Volume {
                vg_name: group.name.clone(),
                lv_name: name.clone(),
                lv_size: *size,
                lv_dm_path: path,
                vg_uuid: String::new(),
                lv_uuid: String::new(),
            });
        }
    }
    Layout { disks, volumes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flavour::VolumeGroup;

    fn file_system(device: &str, kind: &str, mount: &str) -> FileSystem {
        FileSystem { device: device.into(), kind: kind.into(), mount: Some(mount.into()) }
    }

    /// BIOS, a partition for `/boot`, LVM for root, `/var` and swap.
    fn flavour() -> Flavour {
        let partition = |number, size| Partition { number, start: 0, size, kind: "83".into() };
        let partitions = vec![partition(1, 500), partition(2, 5000)];
        let volumes = [("root", 1000), ("swap", 10), ("var-log", 2000)];
        let volumes = volumes.map(|(name, size)| (name.to_owned(), size)).to_vec();
        Flavour {
            boot: BootMode::Bios,
            disks: vec![DiskLayout { size: 6000, table: Some("dos".into()), partitions }],
            volume_groups: vec![VolumeGroup { name: "vg0".into(), volumes }],
            file_systems: vec![
                file_system("/dev/mapper/vg0-root", "ext4", "/"),
                file_system("/dev/mapper/vg0-swap", "swap", "swap"),
                file_system("/dev/mapper/vg0-var--log", "xfs", "/var/log"),
                file_system("/dev/sda1", "ext4", "/boot"),
            ],
        }
    }

    const TABLE: &str = "UUID=a-b / ext4\n/dev/vda1 /boot ext3\n/dev/vg0/var-log /var/log/ xfs\n\
        UUID=s none swap sw\n";

    fn machine(table: &str, needs: &[(&str, u64)]) -> Machine {
        let needs = needs.iter().map(|(place, bytes)| ((*place).to_owned(), *bytes)).collect();
        Machine { table: Table::new(table), needs, ..Machine::default() }
    }

    #[test]
    fn another_machine_of_the_flavour_fits() {
        let needs = [("/", 1000), ("/boot", 500), ("/var/log", 2000)];
        assert_eq!(compare(&flavour(), &machine(TABLE, &needs)), Fit::default());
    }

    #[test]
    fn everything_that_is_in_the_way_is_told_at_once() {
        let table = TABLE.replace("/var/log/ xfs", "/var/log btrfs");
        let table = table.replace("/dev/vda1", "/dev/vdb1") + "UUID=0-1 /boot/efi vfat\n";
        let machine = machine(&table, &[("/", 1001), ("/boot", 1)]);

        let misfits = compare(&flavour(), &machine).misfits;

        let told = misfits.iter().map(Misfit::to_string).collect::<Vec<_>>().join("\n");
        for words in [
            "/var/log is btrfs on the tree's machine, xfs in the template",
            "/dev/vdb1 at /boot, the template /dev/sda1",
            "mounts UUID=0-1 at /boot/efi, the template has no file system",
            "starts by UEFI, the template by BIOS",
            "the files at / have 1001 bytes or more, the template's file system has 1000",
        ] {
            assert!(told.contains(words), "{words}:\n{told}");
        }
        assert_eq!(misfits.len(), 5, "{told}");
    }

    #[test]
    fn what_is_not_in_the_way_is_told_beside() {
        let volumes = vec![("root".to_owned(), 999), ("srv".to_owned(), 1)];
        let machine = Machine {
            volume_groups: vec![VolumeGroup { name: "vg0".into(), volumes }],
            boot_config: "  insmod part_gpt\n".into(),
            ..machine(&format!("{TABLE}UUID=f-f /mnt ext4 noauto\n"), &[])
        };

        let Fit { misfits, remarks } = compare(&flavour(), &machine);

        assert_eq!(misfits, []);
        let told: Vec<_> = remarks.iter().map(Remark::to_string).collect();
        assert_eq!(
            told,
            [
                "UUID=f-f at /mnt: the template has no file system for it, and the machine starts without",
                "the volume vg0/root has 999 bytes on the tree's machine, 1000 in the template",
                "the template has no volume vg0/srv, the tree's machine has",
                "the tree's boot loader expects a partition table of the kind gpt, the template has dos",
            ]
        );
    }

    #[test]
    fn names_of_partitions_are_judged_as_far_as_the_record_knows_them() {
        let of = |spec: &str| {
            let table = TABLE.replace("/dev/vda1", spec);
            compare(&flavour(), &machine(&table, &[]))
        };
        assert_eq!(of("PARTUUID=12345678-01"), Fit::default());
        assert_eq!(of("PARTUUID=12345678-02").misfits.len(), 1);
        let Fit { misfits, remarks } = of("PARTLABEL=boot");
        assert_eq!(misfits, []);
        let told = "only an update can tell whether the template has PARTLABEL=boot at /boot";
        assert_eq!(remarks[0].to_string(), told);
    }

    #[test]
    fn subvolumes_share_the_room_of_their_file_system() {
        let mut flavour = flavour();
        flavour.volume_groups.clear();
        flavour.file_systems =
            ["/", "/home"].map(|at| file_system("/dev/sda1", "btrfs", at)).into();
        let table = "UUID=a-b / btrfs subvol=@\nUUID=a-b /home btrfs subvol=@home\n";
        assert_eq!(compare(&flavour, &machine(table, &[("/", 250), ("/home", 250)])).misfits, []);
        let (path, files, room) = ("/ and /home".to_owned(), 501, 500);
        let misfits = compare(&flavour, &machine(table, &[("/", 250), ("/home", 251)])).misfits;
        assert_eq!(misfits, [Misfit::TooLarge { path, files, room }]);
    }
}
