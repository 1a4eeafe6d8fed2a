//! What a tree in a folder of this host says of its machine.
//!
//! Its owner may be hostile: no link in it leads out of it, and of each file only so much is read.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::{Table, tidy};
use crate::flavour::VolumeGroup;
use crate::fstab::Entry;
use crate::rsync::TreeError;

/// Bytes that are read of one file.
const FILE_LEN_MAX: u64 = 1 << 20;
/// Volume groups whose backups are read.
const GROUPS_MAX: usize = 64;
/// Bytes of a sector, in which LVM counts.
const SECTOR: u64 = 512;
/// Folders whose files belong to no backup.
const OF_A_RUNNING_SYSTEM: [&str; 4] = ["proc", "sys", "dev", "run"];

/// What is known of a tree's machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// Its file systems.
    pub table: Table,
    /// Its `grub.cfg`, or nothing.
    pub boot_config: String,
    /// What LVM has noted of its groups; empty where nothing of it is in the tree.
    pub volume_groups: Vec<VolumeGroup>,
    /// Bytes that the files at each place of the table need at least.
    pub needs: Vec<(String, u64)>,
}

/// Reads a tree: a few of its files, and how large all of them are.
///
/// # Errors
/// [`TreeError`].
pub fn read(folder: &Path) -> Result<Machine, TreeError> {
    let root = File::open(folder);
    let root = root.map_err(|source| TreeError::Folder { path: folder.to_owned(), source })?;
    let text = |path: &str| {
        let failed = |source| TreeError::File { path: folder.join(path), source };
        read_text(&root, path).map_err(failed)
    };
    let table = Table::new(&text("etc/fstab")?);
    let mut boot_config = text("boot/grub/grub.cfg")?;
    if boot_config.is_empty() {
        boot_config = text("boot/grub2/grub.cfg")?;
    }
    let groups = "etc/lvm/backup";
    let names = list(&root, groups)
        .map_err(|source| TreeError::File { path: folder.join(groups), source })?;
    let mut volume_groups = Vec::new();
    for name in names {
        volume_groups.extend(parse_group(&text(&format!("{groups}/{name}"))?));
    }
    volume_groups.sort_by(|a, b| a.name.cmp(&b.name));
    let mut places: Vec<_> = table
        .entries
        .iter()
        .filter(|entry| !Entry::is_swap(entry))
        .map(|entry| (tidy(&entry.path), 0))
        .collect();
    places.sort();
    places.dedup();
    measure(folder, &mut places)?;
    Ok(Machine { table, boot_config, volume_groups, needs: places })
}

/// Opens what is beneath a tree; a link is followed as on the tree's own machine. `None` where it is not
/// there.
fn open(root: &File, path: &str, flags: OFlag) -> io::Result<Option<File>> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    match openat2(root, path, how) {
        Ok(file) => Ok(Some(file.into())),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The start of a file; empty where there is none.
fn read_text(root: &File, path: &str) -> io::Result<String> {
    let Some(file) = open(root, path, OFlag::empty())? else { return Ok(String::new()) };
    let mut text = Vec::new();
    if file.metadata()?.is_file() {
        file.take(FILE_LEN_MAX).read_to_end(&mut text)?;
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The names in a folder, sorted; none where it is not there.
fn list(root: &File, path: &str) -> io::Result<Vec<String>> {
    let Some(folder) = open(root, path, OFlag::O_DIRECTORY)? else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for entry in Dir::from_fd(folder.into())?.iter().take(GROUPS_MAX + 2) {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Reads LVM's backup of a group's metadata, of which only the visible volumes count.
fn parse_group(text: &str) -> Option<VolumeGroup> {
    // The sections that a line is in, from outside in.
    let mut path: Vec<&str> = Vec::new();
    let (mut group, mut extent_len) = (None, 0_u64);
    // By name: visible, extents.
    let mut volumes: Vec<(&str, bool, u64)> = Vec::new();
    for line in text.lines() {
        let line = line.split_once('#').map_or(line, |(code, _)| code).trim();
        if let Some(name) = line.strip_suffix('{') {
            path.push(name.trim());
            match &path[..] {
                [name] => group = group.or(Some(*name)),
                [_, "logical_volumes", name] => volumes.push((name, false, 0)),
                _ => {}
            }
        } else if line == "}" {
            path.pop();
        } else if let Some((key, value)) = line.split_once('=') {
            let (key, value) = (key.trim(), value.trim());
            match (&path[..], key, volumes.last_mut()) {
                ([_], "extent_size", _) => extent_len = value.parse().unwrap_or(0),
                ([_, "logical_volumes", _], "status", Some(volume)) => {
                    volume.1 = value.contains("\"VISIBLE\"");
                }
                ([_, "logical_volumes", _, _], "extent_count", Some(volume)) => {
                    volume.2 = volume.2.saturating_add(value.parse().unwrap_or(0));
                }
                _ => {}
            }
        }
    }
    let bytes = |extents: u64| extents.saturating_mul(extent_len).saturating_mul(SECTOR);
    let visible = volumes.iter().filter(|(_, is_visible, _)| *is_visible);
    let mut volumes: Vec<_> =
        visible.map(|(name, _, extents)| ((*name).to_owned(), bytes(*extents))).collect();
    volumes.sort();
    Some(VolumeGroup { name: group?.to_owned(), volumes })
}

/// Adds up what files need at each place, each hard link once.
fn measure(folder: &Path, places: &mut [(String, u64)]) -> Result<(), TreeError> {
    let mut linked = HashSet::new();
    let mut next = vec![(folder.to_owned(), "/".to_owned(), root_of(places))];
    while let Some((folder, within, place)) = next.pop() {
        let Some(entries) = present(fs::read_dir(&folder), &folder)? else { continue };
        for entry in entries {
            let entry = entry.map_err(|source| TreeError::File { path: folder.clone(), source })?;
            let path = entry.path();
            let Some(found) = present(entry.metadata(), &path)? else { continue };
            let name = entry.file_name().to_string_lossy().into_owned();
            if found.is_dir() {
                let is_left_out = name == "lost+found"
                    || (within == "/" && OF_A_RUNNING_SYSTEM.contains(&&*name));
                if !is_left_out {
                    let within = tidy(&format!("{within}/{name}"));
                    let own = places.iter().position(|(place, _)| *place == within);
                    next.push((path, within, own.or(place)));
                }
            } else if let Some(place) = place
                && (found.nlink() == 1 || linked.insert((found.dev(), found.ino())))
            {
                places[place].1 = places[place].1.saturating_add(needs(&found));
            }
        }
    }
    Ok(())
}

fn root_of(places: &[(String, u64)]) -> Option<usize> {
    places.iter().position(|(place, _)| place == "/")
}

/// At least: holes need nothing, and how a file system packs its files is its own affair.
fn needs(file: &Metadata) -> u64 {
    if file.is_file() { file.len().min(file.blocks().saturating_mul(SECTOR)) } else { 0 }
}

/// `None` for what has gone meanwhile.
fn present<T>(found: io::Result<T>, path: &Path) -> Result<Option<T>, TreeError> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TreeError::File { path: PathBuf::from(path), source }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    const BACKUP: &str = "# Generated by LVM2\ncontents = \"Text\"\nvg0 {\n id = \"x\"\n\
        extent_size = 8192 # 4 Megabytes\n physical_volumes {\n pv0 {\n dev_size = 5\n }\n }\n\
        logical_volumes {\n root {\n status = [\"READ\", \"WRITE\", \"VISIBLE\"]\n\
        segment1 {\n extent_count = 100\n }\n segment2 {\n extent_count = 28\n }\n }\n\
        pool_tmeta {\n status = [\"READ\"]\n segment1 {\n extent_count = 9\n }\n }\n }\n}\n";

    #[test]
    fn lvms_note_of_a_group_gives_its_visible_volumes() {
        let volumes = vec![("root".to_owned(), 128 * (4 << 20))];
        let group = VolumeGroup { name: "vg0".into(), volumes };
        assert_eq!(parse_group(BACKUP), Some(group));
        assert_eq!(parse_group(""), None);
    }

    #[test]
    fn a_tree_tells_of_its_machine_and_what_each_file_system_needs() {
        let tree = tempfile::tempdir().unwrap();
        let at = |path: &str| tree.path().join(path);
        for folder in ["etc/lvm/backup", "boot/grub", "var/lib", "var/lost+found", "proc"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        fs::write(at("etc/fstab"), "UUID=a-b / ext4\nUUID=c-d /var/ xfs\nUUID=e none swap\n")
            .unwrap();
        fs::write(at("etc/lvm/backup/vg0"), BACKUP).unwrap();
        fs::write(at("var/lib/data"), vec![1; 100_000]).unwrap();
        fs::hard_link(at("var/lib/data"), at("var/lib/same")).unwrap();
        fs::write(at("var/lost+found/lost"), vec![1; 100_000]).unwrap();
        fs::write(at("proc/kcore"), vec![1; 100_000]).unwrap();
        symlink("/", at("var/all")).unwrap();
        File::create(at("etc/sparse")).unwrap().set_len(1 << 40).unwrap();

        let machine = read(tree.path()).unwrap();

        assert_eq!(machine.table.entries.len(), 3);
        assert_eq!(machine.volume_groups.len(), 1);
        let [(root, small), (var, data)] = &machine.needs[..] else { panic!("{machine:?}") };
        assert_eq!((&**root, &**var, *data), ("/", "/var", 100_000));
        assert!(*small < 10_000, "{small}");
    }

    #[test]
    fn s05_no_link_leads_out_of_a_tree() {
        let host = tempfile::tempdir().unwrap();
        fs::write(host.path().join("secret"), "UUID=5-5 / ext4\n").unwrap();
        let tree = host.path().join("tree");
        fs::create_dir_all(tree.join("etc/lvm")).unwrap();
        symlink(host.path(), tree.join("etc/lvm/backup")).unwrap();
        for target in ["../../secret".into(), host.path().join("secret")] {
            symlink(target, tree.join("etc/fstab")).unwrap();
            let machine = read(&tree).unwrap();
            assert_eq!(machine, Machine::default());
            fs::remove_file(tree.join("etc/fstab")).unwrap();
        }
        nix::unistd::mkfifo(&tree.join("etc/fstab"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(read(&tree).unwrap(), Machine::default());
    }

    proptest! {
        #[test]
        fn any_note_is_survived(text in "[a-z0-9 ={}\"#\n]*") {
            parse_group(&text);
        }
    }
}
