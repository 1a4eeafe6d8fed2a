//! What is on a machine's disks, as tools in the appliance tell it. Without I/O.
//!
//! All of it comes from bytes that the guest's owner wrote: names and sizes are taken as they are, used
//! only inside the appliance, and escaped where they are printed.

use serde::Deserialize;

use crate::flavour::{BootMode, DiskLayout, FileSystem, Flavour, Partition, VolumeGroup};

/// The type of an EFI system partition in a GPT (UEFI specification, 5.3.3).
const EFI_SYSTEM: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
/// The type of a partition for GRUB's core image in a GPT (GRUB's manual, "BIOS installation").
const BIOS_BOOT: &str = "21686148-6449-6e6f-744e-656564454649";
/// Bytes of a sector: `lsblk` counts the start of a partition in units of 512, whatever the disk's are.
const SECTOR: u64 = 512;

/// What `lsblk` and `lvs` say of a machine's disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The disks, their partitions and what is in them, as they are nested.
    pub disks: Vec<Device>,
    /// LVM's volumes.
    pub volumes: Vec<Volume>,
}

/// One block device and those that are made of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Device {
    /// Its path in the appliance.
    pub name: String,
    /// `disk`, `part`, `lvm`, …
    #[serde(rename = "type")]
    pub role: String,
    /// Bytes.
    pub size: u64,
    /// Where it is plugged in, as `HOST:CHANNEL:TARGET:LUN`.
    #[serde(default)]
    pub hctl: Option<String>,
    /// First sector on its disk.
    #[serde(default)]
    pub start: Option<u64>,
    /// `gpt` or `dos`.
    #[serde(default)]
    pub pttype: Option<String>,
    /// What a partition is for.
    #[serde(default)]
    pub parttype: Option<String>,
    /// A partition's own id.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// A partition's name, in a GPT.
    #[serde(default)]
    pub partlabel: Option<String>,
    /// `ext4`, `LVM2_member`, `swap`, …
    #[serde(default)]
    pub fstype: Option<String>,
    /// Of what it holds.
    #[serde(default)]
    pub uuid: Option<String>,
    /// Of what it holds.
    #[serde(default)]
    pub label: Option<String>,
    /// What is made of it.
    #[serde(default)]
    pub children: Vec<Device>,
}

/// One LVM volume.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Volume {
    /// Its group.
    pub vg_name: String,
    /// Its name.
    pub lv_name: String,
    /// Bytes.
    #[serde(deserialize_with = "number_in_text")]
    pub lv_size: u64,
    /// Its path below `/dev/mapper`, where `lsblk` lists it.
    pub lv_dm_path: String,
    /// The UUID of its group, with dashes.
    pub vg_uuid: String,
    /// Its own UUID, with dashes.
    pub lv_uuid: String,
}

#[derive(Deserialize)]
struct LsblkReport {
    blockdevices: Vec<Device>,
}

#[derive(Deserialize)]
struct LvsReport {
    report: Vec<LvsPart>,
}

#[derive(Deserialize)]
struct LvsPart {
    lv: Vec<Volume>,
}

fn number_in_text<'de, D: serde::Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(serde::de::Error::custom)
}

impl Layout {
    /// Reads the reports. Disks are sorted by where they are plugged in, for the kernel finds them in any
    /// order; the appliance's own, which comes after the machine's, is left out.
    ///
    /// # Errors
    /// Where they are none, or tell of too few disks.
    pub fn parse(lsblk: &str, lvs: &str, disks: usize) -> Result<Self, serde_json::Error> {
        let mut found: LsblkReport = serde_json::from_str(lsblk)?;
        found.blockdevices.retain(|device| device.role == "disk");
        if found.blockdevices.len() < disks {
            return Err(serde::de::Error::invalid_length(found.blockdevices.len(), &"more disks"));
        }
        found.blockdevices.sort_by_key(Device::target);
        found.blockdevices.truncate(disks);
        let volumes: LvsReport = serde_json::from_str(lvs)?;
        let volumes = volumes.report.into_iter().flat_map(|part| part.lv).collect();
        Ok(Self { disks: found.blockdevices, volumes })
    }

    /// Every device, those that are made of others after them, each once.
    pub fn devices(&self) -> Vec<&Device> {
        let mut found: Vec<&Device> = Vec::new();
        let mut next: Vec<&Device> = self.disks.iter().rev().collect();
        while let Some(device) = next.pop() {
            if found.iter().all(|known| known.name != device.name) {
                found.push(device);
            }
            next.extend(device.children.iter().rev());
        }
        found
    }

    /// The devices that hold a file system or swap.
    pub fn holders(&self) -> impl Iterator<Item = (&Device, &str)> {
        const CONTAINERS: [&str; 3] = ["LVM2_member", "linux_raid_member", "crypto_LUKS"];
        self.devices().into_iter().filter_map(|device| {
            let kind = device.fstype.as_deref()?;
            (!CONTAINERS.contains(&kind)).then_some((device, kind))
        })
    }

    /// Whether something is encrypted, as LUKS does.
    pub fn has_encrypted(&self) -> bool {
        self.devices().iter().any(|device| device.fstype.as_deref() == Some("crypto_LUKS"))
    }

    /// Whether a device is a volume of LVM.
    pub fn is_volume(&self, device: &str) -> bool {
        self.volumes.iter().any(|volume| volume.lv_dm_path == device)
    }

    /// The device that a line of `fstab` names in this machine.
    pub fn device_of(&self, spec: &str) -> Option<&Device> {
        let is = |of: Option<&String>, wanted: &str| {
            of.is_some_and(|value| value.eq_ignore_ascii_case(wanted))
        };
        let by = |key: &str, wanted: &str| {
            self.devices().into_iter().find(|device| match key {
                "UUID" | "uuid" => is(device.uuid.as_ref(), wanted),
                "LABEL" | "label" => device.label.as_deref() == Some(wanted),
                "PARTUUID" | "partuuid" => is(device.partuuid.as_ref(), wanted),
                "PARTLABEL" | "partlabel" => device.partlabel.as_deref() == Some(wanted),
                _ => false,
            })
        };
        if let Some((key, wanted)) = spec.split_once('=') {
            return by(key, wanted);
        }
        if let Some((key, wanted)) = spec.strip_prefix("/dev/disk/by-")?.split_once('/') {
            return by(key, wanted);
        }
        None
    }

    /// As [`Self::device_of`], also for names like `/dev/vda1`, `/dev/mapper/vg-root`, `/dev/vg/root`.
    pub fn device_named(&self, spec: &str) -> Option<&Device> {
        let by_path = |path: &str| self.devices().into_iter().find(|d| d.name == path);
        let mapped = || spec.starts_with("/dev/mapper/").then(|| by_path(spec)).flatten();
        self.device_of(spec).or_else(mapped).or_else(|| {
            let volume = self.volumes.iter().find(|volume| {
                let by_id = format!("{}{}", volume.vg_uuid, volume.lv_uuid).replace('-', "");
                spec.strip_prefix("/dev/").and_then(|rest| rest.split_once('/'))
                    == Some((&volume.vg_name, &volume.lv_name))
                    || spec.strip_prefix("/dev/disk/by-id/dm-uuid-LVM-") == Some(&by_id)
            });
            match volume {
                Some(volume) => by_path(&volume.lv_dm_path),
                // Disks have other letters here than under virtio or IDE, in the same order.
                None => {
                    let prefixes = ["/dev/sd", "/dev/vd", "/dev/hd", "/dev/xvd"];
                    let rest = prefixes.iter().find_map(|prefix| spec.strip_prefix(prefix))?;
                    let letter = rest.bytes().next().filter(u8::is_ascii_lowercase)?;
                    let disk = self.disks.get(usize::from(letter - b'a'))?;
                    by_path(&format!("{}{}", disk.name, &rest[1..]))
                }
            }
        })
    }

    /// The name of a device by the order of the disks: what the kernel calls them differs from start to
    /// start. More than 26 disks keep the kernel's names.
    pub fn stable_name(&self, device: &str) -> String {
        let disk = |(at, disk): (usize, &Device)| {
            let rest = device.strip_prefix(&disk.name)?;
            let letter = u8::try_from(at).ok().filter(|at| *at < 26)?;
            let is_number = rest.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then(|| format!("/dev/sd{}{rest}", char::from(b'a' + letter)))
        };
        self.disks.iter().enumerate().find_map(disk).unwrap_or_else(|| device.to_owned())
    }

    /// Whether the first disk has room for a boot loader that a BIOS starts: behind the table of MBR, or in a
    /// partition for it. A machine may have that and an EFI system partition.
    pub fn starts_by_bios(&self) -> bool {
        let Some(first) = self.disks.first() else { return false };
        let is_for_bios = |part: &Device| part.parttype.as_deref() == Some(BIOS_BOOT);
        first.pttype.as_deref() == Some("dos") || first.children.iter().any(is_for_bios)
    }

    /// Whether a device is an EFI system partition.
    pub fn is_efi_system(&self, name: &str) -> bool {
        let kinds = [EFI_SYSTEM, "0xef"];
        let is_it = |device: &&Device| device.name == name;
        let found = self.devices().into_iter().find(is_it);
        found
            .and_then(|device| device.parttype.as_deref())
            .is_some_and(|kind| kinds.contains(&kind))
    }

    /// The fingerprint, with `mounts` saying where the machine's own table puts each device.
    pub fn flavour(&self, mounts: &[(String, String)]) -> Flavour {
        let partitions = |disk: &Device| {
            let parts = disk.children.iter().filter(|child| child.role == "part");
            let partition = |part: &Device| Partition {
                number: number_of(&part.name),
                start: part.start.unwrap_or(0) * SECTOR,
                size: part.size,
                kind: part.parttype.clone().unwrap_or_default(),
            };
            parts.map(partition).collect()
        };
        let disks = self.disks.iter().map(|disk| DiskLayout {
            size: disk.size,
            table: disk.pttype.clone(),
            partitions: partitions(disk),
        });
        let mut groups: Vec<VolumeGroup> = Vec::new();
        for volume in &self.volumes {
            let one = (volume.lv_name.clone(), volume.lv_size);
            match groups.iter_mut().find(|group| group.name == volume.vg_name) {
                Some(group) => group.volumes.push(one),
                None => {
                    groups.push(VolumeGroup { name: volume.vg_name.clone(), volumes: vec![one] });
                }
            }
        }
        for group in &mut groups {
            group.volumes.sort();
        }
        groups.sort_by(|a, b| a.name.cmp(&b.name));
        let mut file_systems = Vec::new();
        for (device, kind) in self.holders() {
            let file_system = |mount| FileSystem {
                device: self.stable_name(&device.name),
                kind: kind.to_owned(),
                mount,
            };
            // btrfs may be mounted at several places, by its subvolumes.
            let places = mounts.iter().filter(|(name, _)| *name == device.name);
            let before = file_systems.len();
            file_systems.extend(places.map(|(_, at)| file_system(Some(at.clone()))));
            if file_systems.len() == before {
                file_systems.push(file_system(None));
            }
        }
        file_systems.sort_by(|a, b| a.device.cmp(&b.device));
        let boot = match self.starts_by_bios() {
            true => BootMode::Bios,
            false => BootMode::Uefi,
        };
        Flavour { boot, disks: disks.collect(), volume_groups: groups, file_systems }
    }
}

impl Device {
    /// The number of the target in `hctl`; disks without one come last.
    fn target(&self) -> u64 {
        let target = self.hctl.as_deref().and_then(|hctl| hctl.split(':').nth(2));
        target.and_then(|target| target.parse().ok()).unwrap_or(u64::MAX)
    }
}

/// The number at the end of a partition's name.
fn number_of(name: &str) -> u32 {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    name[name.len() - digits..].parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `lsblk` tells of a machine with a disk for its system and one for data, whose order the kernel
    /// has mixed up, with the appliance's own disk among them.
    const LSBLK: &str = r#"{"blockdevices": [
        {"name": "/dev/sda", "type": "disk", "size": 4294967296, "hctl": "2:0:2:0", "fstype": "ext2"},
        {"name": "/dev/sdb", "type": "disk", "size": 1073741824, "hctl": "2:0:1:0", "fstype": "xfs",
         "uuid": "0d", "label": "data"},
        {"name": "/dev/sdc", "type": "disk", "size": 2147483648, "hctl": "2:0:0:0", "pttype": "gpt",
         "children": [
            {"name": "/dev/sdc1", "type": "part", "size": 1048576, "start": 2048,
             "parttype": "21686148-6449-6e6f-744e-656564454649"},
            {"name": "/dev/sdc2", "type": "part", "size": 536870912, "start": 4096, "fstype": "vfat",
             "uuid": "0C0D-0E0F", "parttype": "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"},
            {"name": "/dev/sdc3", "type": "part", "size": 1073741824, "start": 1052672,
             "fstype": "LVM2_member", "children": [
                {"name": "/dev/mapper/vg--0-root", "type": "lvm", "size": 805306368, "fstype": "ext4",
                 "uuid": "0a"}]}]}]}"#;
    const LVS: &str = r#"{"report": [{"lv": [{"vg_name": "vg-0", "lv_name": "root", "lv_size": "805306368",
        "lv_dm_path": "/dev/mapper/vg--0-root", "vg_uuid": "aB-1", "lv_uuid": "cD-2"}]}]}"#;

    #[test]
    fn disks_are_known_by_where_they_are_plugged_in() {
        let layout = Layout::parse(LSBLK, LVS, 2).unwrap();

        let sizes: Vec<_> = layout.disks.iter().map(|disk| disk.size >> 30).collect();
        assert_eq!(sizes, [2, 1]);
        let named = |spec: &str| layout.device_named(spec).map(|device| device.name.as_str());
        for spec in ["/dev/mapper/vg--0-root", "/dev/vg-0/root", "UUID=0A", "/dev/disk/by-uuid/0a"]
        {
            assert_eq!(named(spec), Some("/dev/mapper/vg--0-root"), "{spec}");
        }
        assert_eq!(named("/dev/disk/by-id/dm-uuid-LVM-aB1cD2"), Some("/dev/mapper/vg--0-root"));
        assert_eq!(named("/dev/vda2"), Some("/dev/sdc2"));
        assert_eq!(named("LABEL=data"), Some("/dev/sdb"));
        assert_eq!((named("/dev/vdc"), named("UUID=0b"), named("")), (None, None, None));
        assert_eq!(layout.stable_name("/dev/sdc2"), "/dev/sda2");
        assert!(Layout::parse(LSBLK, LVS, 4).is_err(), "too few disks were enough");
    }

    #[test]
    fn a_machine_may_start_by_bios_and_by_uefi() {
        let layout = Layout::parse(LSBLK, LVS, 2).unwrap();

        assert!(layout.starts_by_bios() && layout.is_efi_system("/dev/sdc2"));
        let mounts = [("/dev/mapper/vg--0-root".to_owned(), "/".to_owned())];
        let flavour = layout.flavour(&mounts);
        assert_eq!(flavour.disks[0].partitions[1].start, 4096 * 512);
        assert_eq!(flavour.volume_groups[0].volumes, [("root".to_owned(), 805_306_368)]);
        let root = &flavour.file_systems[0];
        assert_eq!((&*root.device, root.mount.as_deref()), ("/dev/mapper/vg--0-root", Some("/")));
    }
}
