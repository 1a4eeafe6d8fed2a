//! Whether a file tree's machine fits on a template's disks, and what must be set there. Without I/O.
//!
//! Two machines of one flavour mount the same kinds of file systems at the same places, under other
//! UUIDs. So the places join them: what the tree's table wants at `/var` belongs on the device that the
//! template's table mounts there.

pub mod template;
pub mod tree;

use crate::appliance::look::{Device, Layout};
use crate::flavour::BootMode;
use crate::fstab::Entry;

/// A machine's table of file systems, as far as it names disks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// The entries that name disks.
    pub entries: Vec<Entry>,
}

/// What is done to a template's disks before files are copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What is mounted, outer places first.
    pub mounts: Vec<Mount>,
    /// What devices are called from here on.
    pub identities: Vec<Identity>,
    /// Lines of the tree's table that nothing is done for, and why.
    pub skipped: Vec<(String, &'static str)>,
}

/// A file system at its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// In the appliance.
    pub device: String,
    /// `ext4`, …
    pub kind: String,
    /// In the machine.
    pub path: String,
    /// Those of the machine's own options that decide what is seen there.
    pub options: String,
    /// Whether it keeps no owners, modes and exact times: vfat.
    pub is_plain: bool,
}

/// What a file system, swap or partition is called. `None` leaves it as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// In the appliance.
    pub device: String,
    /// Of what the device holds.
    pub kind: String,
    /// Of the file system.
    pub uuid: Option<String>,
    /// Of the file system.
    pub label: Option<String>,
    /// Of the partition.
    pub partuuid: Option<String>,
}

/// Why a tree does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// The tree has no usable table.
    #[error("the tree's etc/fstab names no root file system")]
    NoRoot,
    /// The template has no usable table.
    #[error("the template's etc/fstab names no root file system")]
    NoTemplateRoot,
    /// The tree's machine has one more.
    #[error("the tree's machine mounts {spec} at {path}, the template has no file system for it")]
    NotInTemplate {
        /// As the tree's table has it.
        spec: String,
        /// Where.
        path: String,
    },
    /// The template has one more, whose files would stay.
    #[error("the template mounts {spec} at {path}, the tree's machine does not")]
    NotInTree {
        /// As the template's table has it.
        spec: String,
        /// Where.
        path: String,
    },
    /// The kinds differ.
    #[error("{path} is {wanted} on the tree's machine, {found} in the template")]
    Kind {
        /// Where.
        path: String,
        /// In the tree's table.
        wanted: String,
        /// On the template.
        found: String,
    },
    /// The template's own table names what it does not have.
    #[error("the template's table mounts {spec} at {path}, but its disks have none such")]
    Unresolved {
        /// As the table has it.
        spec: String,
        /// Where.
        path: String,
    },
    /// The template's own table names what may be within an encrypted device.
    #[error(
        "the template's table mounts {spec} at {path}, which is within an encrypted device: none is opened"
    )]
    Encrypted {
        /// As the table has it.
        spec: String,
        /// Where.
        path: String,
    },
    /// The tree's table asks for another device by its path.
    #[error("the tree's machine has {spec} at {path}, the template {found}")]
    Device {
        /// As the tree's table has it.
        spec: String,
        /// Where.
        path: String,
        /// The template's device.
        found: String,
    },
    /// They start differently.
    #[error("the tree's machine starts by {wanted}, the template by {found}")]
    Boot {
        /// By the tree's table.
        wanted: BootMode,
        /// The template's.
        found: BootMode,
    },
    /// A file system of the template is too small.
    #[error(
        "the files at {path} have {files} bytes or more, the template's file system has {room}"
    )]
    TooLarge {
        /// Where, in the machine.
        path: String,
        /// Bytes that they need at least.
        files: u64,
        /// Bytes of the template's device.
        room: u64,
    },
}

impl Table {
    /// The entries of a table that name disks.
    pub fn new(text: &str) -> Self {
        let mut entries = crate::fstab::parse(text);
        entries
            .retain(|entry| entry.is_on_disk() && (entry.is_swap() || entry.path.starts_with('/')));
        Self { entries }
    }

    fn has_root(&self) -> bool {
        self.entries.iter().any(|entry| entry.path == "/")
    }

    /// Where each entry belongs: its path, or `swap 1` for the first swap.
    fn places(&self) -> Vec<(String, &Entry)> {
        let mut swaps = 0;
        let place = |entry| {
            let entry: &Entry = entry;
            if entry.is_swap() {
                swaps += 1;
                return (format!("swap {swaps}"), entry);
            }
            (tidy(&entry.path), entry)
        };
        self.entries.iter().map(place).collect()
    }

    /// Which device the machine of `layout` mounts where, swap at `swap`.
    pub fn mounts(&self, layout: &Layout) -> Vec<(String, String)> {
        let at = |entry: &Entry| {
            let device = layout.device_named(&entry.spec)?;
            let path = if entry.is_swap() { "swap".to_owned() } else { tidy(&entry.path) };
            Some((device.name.clone(), path))
        };
        self.entries.iter().filter_map(at).collect()
    }
}

/// A path without a slash at its end or twice.
fn tidy(path: &str) -> String {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    format!("/{}", parts.join("/"))
}

/// What the boot loader of the tree's machine looks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootLoaderWants {
    /// The UUID of the file system that has its files.
    pub boot_uuid: Option<String>,
    /// The UUID of the root file system.
    pub root_uuid: Option<String>,
}

impl BootLoaderWants {
    /// Reads a `grub.cfg`: what `search --fs-uuid` and `root=UUID=` name.
    pub fn parse(config: &str) -> Self {
        let mut wants = Self::default();
        // Before the first entry, GRUB looks for its font, which may lie elsewhere.
        let mut is_in_entry = false;
        for line in config.lines().map(str::trim) {
            is_in_entry |= line.starts_with("menuentry ") || line.starts_with("blscfg");
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            let searches = words.first().is_some_and(|word| word.starts_with("search"));
            if is_in_entry && searches && line.contains("fs") && line.contains("uuid") {
                let uuid = words.iter().rev().find(|word| is_uuid(word));
                wants.boot_uuid = wants.boot_uuid.or_else(|| uuid.map(|&word| word.to_owned()));
            }
            let root = words.iter().find_map(|word| word.strip_prefix("root=UUID="));
            wants.root_uuid = wants.root_uuid.or_else(|| root.map(str::to_owned));
        }
        wants
    }
}

fn is_uuid(word: &str) -> bool {
    word.len() >= 9 && word.contains('-') && word.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}

/// Joins the tree's table with the template's.
///
/// # Errors
/// Everything that does not fit, so that all can be told at once.
pub fn plan(
    template: &Table,
    layout: &Layout,
    tree: &Table,
    wants: &BootLoaderWants,
) -> Result<Plan, Vec<Misfit>> {
    if !tree.has_root() {
        return Err(vec![Misfit::NoRoot]);
    }
    if !template.has_root() {
        return Err(vec![Misfit::NoTemplateRoot]);
    }
    let (mut plan, mut misfits) = (Plan::default(), Vec::new());
    let (ours, theirs) = (template.places(), tree.places());
    for (place, entry) in &theirs {
        match join(entry, place, &ours, layout) {
            Ok(device) => plan.add(entry, place, device),
            Err(
                Misfit::NotInTemplate { .. } | Misfit::Unresolved { .. } | Misfit::Encrypted { .. },
            ) if entry.may_be_absent() => {
                let why = "the template has no file system for it, and the machine starts without";
                plan.skipped.push((format!("{} at {}", entry.spec, entry.path), why));
            }
            Err(misfit) => misfits.push(misfit),
        }
    }
    for (place, entry) in &ours {
        // An earlier update has left out what the template has no file system for.
        let is_absent = entry.may_be_absent() && layout.device_named(&entry.spec).is_none();
        if !is_absent && !entry.is_swap() && theirs.iter().all(|(other, _)| other != place) {
            let (spec, path) = (entry.spec.clone(), entry.path.clone());
            misfits.push(Misfit::NotInTree { spec, path });
        }
    }
    if !misfits.is_empty() {
        return Err(misfits);
    }
    plan.mounts.sort_by_key(|mount| (mount.path != "/", mount.path.matches('/').count()));
    plan.satisfy(wants);
    plan.drop_what_holds(layout);
    Ok(plan)
}

/// The template's device for one entry of the tree's table.
fn join<'a>(
    entry: &Entry,
    place: &str,
    ours: &[(String, &Entry)],
    layout: &'a Layout,
) -> Result<&'a Device, Misfit> {
    let (spec, path) = (entry.spec.clone(), entry.path.clone());
    let Some((_, own)) = ours.iter().find(|(other, _)| other == place) else {
        return Err(Misfit::NotInTemplate { spec, path });
    };
    let Some(device) = layout.device_named(&own.spec) else {
        let spec = own.spec.clone();
        return Err(match layout.has_encrypted() {
            true => Misfit::Encrypted { spec, path },
            false => Misfit::Unresolved { spec, path },
        });
    };
    let found = device.fstype.clone().unwrap_or_default();
    if entry.kind != "auto" && !same_kind(&entry.kind, &found) {
        return Err(Misfit::Kind { path, wanted: entry.kind.clone(), found });
    }
    let named = layout.device_named(&entry.spec);
    if !can_be_set(&entry.spec, device) && named.is_none_or(|named| named.name != device.name) {
        return Err(Misfit::Device { spec, path, found: device.name.clone() });
    }
    Ok(device)
}

/// What a line of a table is about, and its name there: `("uuid", "0a-1b")`.
fn key_of(spec: &str) -> Option<(String, &str)> {
    let by_disk = || spec.strip_prefix("/dev/disk/by-").and_then(|rest| rest.split_once('/'));
    let (key, value) = spec.split_once('=').or_else(by_disk)?;
    Some((key.to_ascii_lowercase(), value))
}

/// Whether the device can be given the name that a line calls it by.
fn can_be_set(spec: &str, device: &Device) -> bool {
    match key_of(spec) {
        Some((key, _)) if key == "uuid" || key == "label" => true,
        // In a table of MBR it is the disk's id and the partition's number, which stays.
        Some((key, value)) if key == "partuuid" => {
            let number = |id: &str| id.split_once('-').map(|(_, number)| number.to_owned());
            let is_short = value.len() == "12345678-01".len();
            !is_short || device.partuuid.as_deref().and_then(number) == number(value)
        }
        _ => false,
    }
}

fn same_kind(wanted: &str, found: &str) -> bool {
    const EXT: [&str; 3] = ["ext2", "ext3", "ext4"];
    wanted == found || (EXT.contains(&wanted) && EXT.contains(&found))
}

impl Plan {
    fn add(&mut self, entry: &Entry, place: &str, device: &Device) {
        let kind = device.fstype.clone().unwrap_or_default();
        if !entry.is_swap() {
            self.mounts.push(Mount {
                device: device.name.clone(),
                kind: kind.clone(),
                path: place.to_owned(),
                options: entry.deciding_options(),
                is_plain: kind == "vfat",
            });
        }
        let identity = self.identity(&device.name, &kind);
        let Some((key, value)) = key_of(&entry.spec) else { return };
        let wanted = match key.as_str() {
            "uuid" => &mut identity.uuid,
            "label" => &mut identity.label,
            "partuuid" => &mut identity.partuuid,
            _ => return,
        };
        *wanted = Some(value.to_owned());
    }

    fn identity(&mut self, device: &str, kind: &str) -> &mut Identity {
        let at = self.identities.iter().position(|known| known.device == device);
        let at = at.unwrap_or_else(|| {
            let (device, kind) = (device.to_owned(), kind.to_owned());
            let (uuid, label, partuuid) = (None, None, None);
            self.identities.push(Identity { device, kind, uuid, label, partuuid });
            self.identities.len() - 1
        });
        &mut self.identities[at]
    }

    /// What the boot loader looks for, where the table leaves it open.
    fn satisfy(&mut self, wants: &BootLoaderWants) {
        let at = |plan: &Self, path: &str| plan.mounts.iter().find(|m| m.path == path).cloned();
        let root = at(self, "/");
        let boot = at(self, "/boot").or_else(|| root.clone());
        for (mount, uuid) in [(boot, &wants.boot_uuid), (root, &wants.root_uuid)] {
            if let (Some(mount), Some(uuid)) = (mount, uuid) {
                let identity = self.identity(&mount.device, &mount.kind);
                identity.uuid.get_or_insert_with(|| uuid.clone());
            }
        }
    }

    /// Leaves out what already is as it should be.
    fn drop_what_holds(&mut self, layout: &Layout) {
        for identity in &mut self.identities {
            let devices = layout.devices();
            let Some(device) = devices.iter().find(|d| d.name == identity.device) else { continue };
            let differs = |wanted: &String, found: Option<&String>| {
                found.is_none_or(|found| !found.eq_ignore_ascii_case(wanted))
            };
            identity.uuid = identity.uuid.take().filter(|u| differs(u, device.uuid.as_ref()));
            identity.label =
                identity.label.take().filter(|label| device.label.as_ref() != Some(label));
            identity.partuuid =
                identity.partuuid.take().filter(|id| differs(id, device.partuuid.as_ref()));
        }
        self.identities.retain(|identity| {
            identity.uuid.is_some() || identity.label.is_some() || identity.partuuid.is_some()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LSBLK: &str = r#"{"blockdevices": [{"name": "/dev/sda", "type": "disk", "size": 9, "children": [
        {"name": "/dev/sda1", "type": "part", "size": 1, "fstype": "ext4", "uuid": "a1", "partuuid": "0000000a-01"},
        {"name": "/dev/sda2", "type": "part", "size": 1, "fstype": "xfs", "uuid": "a2", "partuuid": "0000000a-02"},
        {"name": "/dev/sda3", "type": "part", "size": 1, "fstype": "swap", "uuid": "a3"}]}]}"#;
    const LVS: &str = r#"{"report": [{"lv": []}]}"#;
    const TEMPLATE: &str = "UUID=a1 / ext4\nUUID=a2 /var/ xfs\nUUID=a3 none swap\n";

    fn plan_for(tree: &str, wants: &BootLoaderWants) -> Result<Plan, Vec<Misfit>> {
        let layout = Layout::parse(LSBLK, LVS, 1).unwrap();
        plan(&Table::new(TEMPLATE), &layout, &Table::new(tree), wants)
    }

    fn misfits(tree: &str) -> String {
        let misfits = plan_for(tree, &BootLoaderWants::default()).unwrap_err();
        misfits.iter().map(Misfit::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn devices_get_the_names_that_the_trees_machine_knows_them_by() {
        let tree =
            "UUID=b2 /var xfs\nLABEL=root / ext4\nUUID=A3 none swap\nUUID=b9 /mnt ext4 nofail\n";
        let wants = BootLoaderWants { boot_uuid: Some("b1".into()), root_uuid: None };

        let plan = plan_for(tree, &wants).unwrap();

        let mounts: Vec<_> = plan.mounts.iter().map(|m| (&*m.path, &*m.device)).collect();
        assert_eq!(mounts, [("/", "/dev/sda1"), ("/var", "/dev/sda2")]);
        let named: Vec<_> = plan
            .identities
            .iter()
            .map(|one| (&*one.device, one.uuid.as_deref(), one.label.as_deref()))
            .collect();
        // The boot loader decides what the table leaves open; what holds already is left alone.
        let expected = [("/dev/sda2", Some("b2"), None), ("/dev/sda1", Some("b1"), Some("root"))];
        assert_eq!(named, expected);
        assert_eq!(plan.skipped.len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_told_all_at_once() {
        let told = misfits("UUID=b1 / btrfs\nUUID=b4 /srv ext4\nUUID=a3 none swap\n");
        for words in ["/ is btrfs", "mounts UUID=b4 at /srv", "mounts UUID=a2 at /var/"] {
            assert!(told.contains(words), "{words}:\n{told}");
        }
        assert!(misfits("UUID=b2 /var xfs\n").contains("no root"));
    }

    #[test]
    fn a_name_that_cannot_be_given_must_be_the_templates_own() {
        let with_root = |root: &str| format!("{root} / ext4\nUUID=a2 /var xfs\n");
        let none = BootLoaderWants::default();
        for fits in ["/dev/vda1", "PARTUUID=0000000b-01", "/dev/disk/by-uuid/b1"] {
            assert!(plan_for(&with_root(fits), &none).is_ok(), "{fits}");
        }
        for odd in ["/dev/vda2", "PARTUUID=0000000b-02", "/dev/disk/by-id/x", "PARTLABEL=root"] {
            assert!(plan_for(&with_root(odd), &none).is_err(), "{odd}");
        }
    }

    #[test]
    fn what_an_encrypted_device_holds_is_told_as_such() {
        let lsblk = LSBLK.replace(r#""fstype": "xfs""#, r#""fstype": "crypto_LUKS""#);
        let layout = Layout::parse(&lsblk, LVS, 1).unwrap();
        let template = "UUID=a1 / ext4\n/dev/mapper/srv /srv xfs\n";
        let of = |tree: &str| {
            let (template, tree) = (Table::new(template), Table::new(tree));
            plan(&template, &layout, &tree, &BootLoaderWants::default())
        };

        let misfits = of("UUID=b1 / ext4\n/dev/mapper/srv /srv xfs\n").unwrap_err();

        assert!(matches!(&misfits[..], [Misfit::Encrypted { path, .. }] if path == "/srv"));
        let plan = of("UUID=b1 / ext4\n/dev/mapper/srv /srv xfs nofail\n").unwrap();
        assert_eq!((plan.mounts.len(), plan.skipped.len()), (1, 1));
    }

    /// One volume group lies on two disks, `/srv` on a third; the EFI system partition has a short id.
    #[test]
    fn a_machine_with_several_disks_is_joined_by_its_places() {
        let root = r#"{"name": "/dev/mapper/vg-root", "type": "lvm", "size": 9, "fstype": "ext4", "uuid": "a1"}"#;
        let lsblk = format!(
            r#"{{"blockdevices": [
            {{"name": "/dev/sda", "type": "disk", "size": 9, "hctl": "2:0:0:0", "children": [
                {{"name": "/dev/sda1", "type": "part", "size": 1, "fstype": "vfat", "uuid": "AAAA-0001"}},
                {{"name": "/dev/sda2", "type": "part", "size": 8, "fstype": "LVM2_member", "children": [{root}]}}]}},
            {{"name": "/dev/sdb", "type": "disk", "size": 9, "hctl": "2:0:1:0", "fstype": "LVM2_member", "children": [{root}]}},
            {{"name": "/dev/sdc", "type": "disk", "size": 9, "hctl": "2:0:2:0", "fstype": "xfs", "uuid": "a3"}}]}}"#
        );
        let lvs = r#"{"report": [{"lv": [{"vg_name": "vg", "lv_name": "root", "lv_size": "9",
            "lv_dm_path": "/dev/mapper/vg-root", "vg_uuid": "x", "lv_uuid": "y"}]}]}"#;
        let layout = Layout::parse(&lsblk, lvs, 3).unwrap();
        let template = "/dev/vg/root / ext4\nUUID=AAAA-0001 /boot/efi vfat\n/dev/vdc /srv xfs\n";
        let tree = "UUID=b1 / ext4\nUUID=BBBB-0002 /boot/efi vfat\nUUID=b3 /srv xfs\n";

        let (template, tree) = (Table::new(template), Table::new(tree));
        let plan = plan(&template, &layout, &tree, &BootLoaderWants::default()).unwrap();

        let mounts: Vec<_> = plan.mounts.iter().map(|m| (&*m.path, &*m.device)).collect();
        let places =
            [("/", "/dev/mapper/vg-root"), ("/srv", "/dev/sdc"), ("/boot/efi", "/dev/sda1")];
        assert_eq!(mounts, places);
        let named: Vec<_> =
            plan.identities.iter().map(|one| (&*one.device, one.uuid.as_deref())).collect();
        let uuids = [
            ("/dev/mapper/vg-root", Some("b1")),
            ("/dev/sda1", Some("BBBB-0002")),
            ("/dev/sdc", Some("b3")),
        ];
        assert_eq!(named, uuids);
        assert!(layout.is_volume(mounts[0].1) && !layout.is_volume(mounts[1].1));
    }

    #[test]
    fn the_boot_loader_is_read_from_its_first_entry_on() {
        let config = "search --no-floppy --fs-uuid --set=root f0000000-0f\nmenuentry 'Debian' {\n\
            \tsearch --no-floppy --fs-uuid --set=root --hint='x' b0000000-0b\n\
            \tlinux /vmlinuz root=UUID=c0-0c ro\n}\n";

        let wants = BootLoaderWants::parse(config);

        assert_eq!(wants.boot_uuid.as_deref(), Some("b0000000-0b"));
        assert_eq!(wants.root_uuid.as_deref(), Some("c0-0c"));
    }
}
