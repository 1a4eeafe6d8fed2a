//! What this host offers to a machine that comes back, as libvirt and the host itself tell it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, User, getgrouplist};
use virt::connect::Connect;
use virt::storage_pool::StoragePool;
use virt_sys as flags;
use xmltree::{Element, XMLNode};

use super::plan::TPM_STATES;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::{sys, xml};

/// Where the kernel lists the host's network devices.
const LINKS: &str = "/sys/class/net";

/// What a host offers.
#[derive(Debug, Default)]
pub struct Host {
    /// Its domains.
    pub domains: Vec<DomainHere>,
    /// Its networks by name, and whether they are active.
    pub networks: BTreeMap<String, bool>,
    /// Its storage pools.
    pub pools: BTreeSet<String>,
    /// Its network devices.
    pub links: BTreeSet<String>,
    /// Of the paths that a description names, and their folders, those that exist.
    pub paths: BTreeSet<PathBuf>,
    /// What can run guests of the machine's architecture: `kvm`, `qemu`.
    pub kinds: BTreeSet<String>,
    /// The machine types for it.
    pub machines: Vec<MachineType>,
    /// Who QEMU runs as, where libvirt tells.
    pub qemu_user: Option<QemuUser>,
}

/// A domain that a host has.
#[derive(Debug)]
pub struct DomainHere {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    /// Its MAC addresses, in lower case.
    pub macs: Vec<String>,
    /// The files of its disks.
    pub images: Vec<PathBuf>,
}

/// A machine type.
#[derive(Debug, PartialEq, Eq)]
pub struct MachineType {
    /// Its name.
    pub name: String,
    /// What it stands for at present, where it is an alias.
    pub canonical: Option<String>,
}

/// Who QEMU runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QemuUser {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// Asks libvirt and the host about all that a machine's description names.
///
/// # Errors
/// libvirt's.
pub async fn look(libvirt: &Libvirt, domain: &Element) -> Result<Host, HypervisorError> {
    let list = |connection: &Connect| {
        let mut domains = Vec::new();
        for domain in connection.list_all_domains(0)? {
            let description = match domain.xml_desc(0) {
                // Somebody has just undefined it.
                Err(error) if sys::is_no_domain(&error) => continue,
                description => description?,
            };
            domains.push((domain.name()?, domain.uuid_string()?, description));
        }
        // By two lists: one that somebody undefines meanwhile could not be asked whether it is active.
        let mut networks = BTreeMap::new();
        for (which, is_active) in [(0, false), (flags::VIR_CONNECT_LIST_NETWORKS_ACTIVE, true)] {
            for network in connection.list_all_networks(which)? {
                networks.insert(network.name()?, is_active);
            }
        }
        let pools = connection.list_all_storage_pools(0)?;
        let pools = pools.iter().map(StoragePool::name).collect::<Result<BTreeSet<_>, _>>()?;
        Ok((domains, networks, pools, connection.capabilities()?))
    };
    let (domains, networks, pools, capabilities) = libvirt.ask("tell what it has", list).await?;
    let capabilities = xml::parse(&capabilities).map_err(HypervisorError::Xml)?;
    let mut host = Host { networks, pools, ..Host::default() };
    for (name, uuid, description) in domains {
        let description = xml::parse(&description).map_err(HypervisorError::Xml)?;
        let (macs, images) = (macs(&description), xml::read_named(&description).images);
        host.domains.push(DomainHere { name, uuid, macs, images });
    }
    read_capabilities(&mut host, &capabilities, domain);
    let links = fs::read_dir(LINKS).into_iter().flatten().flatten();
    host.links = links.map(|link| link.file_name().to_string_lossy().into_owned()).collect();
    let mut paths = named_paths(domain);
    paths.extend(xml::text(domain, "uuid").map(|uuid| Path::new(TPM_STATES).join(uuid)));
    host.paths = paths.into_iter().filter(|path| path.exists()).collect();
    Ok(host)
}

/// The MAC addresses of a domain, in lower case.
pub fn macs(domain: &Element) -> Vec<String> {
    let devices = domain.get_child("devices").into_iter().flat_map(xml::elements);
    let mac = |device: &Element| xml::attribute(device, "mac", "address").map(str::to_lowercase);
    devices.filter(|device| device.name == "interface").filter_map(mac).collect()
}

/// Whatever looks like a path in a description, and the folders of it.
fn named_paths(element: &Element) -> BTreeSet<PathBuf> {
    let mut paths = BTreeSet::new();
    let mut note = |text: &str| {
        let path = Path::new(text.trim());
        if path.is_absolute() {
            paths.extend(path.parent().map(Path::to_owned));
            paths.insert(path.to_owned());
        }
    };
    for value in element.attributes.values() {
        note(value);
    }
    element.children.iter().filter_map(XMLNode::as_text).for_each(note);
    xml::elements(element).for_each(|child| paths.extend(named_paths(child)));
    paths
}

/// Reads what libvirt can run (<https://libvirt.org/formatcaps.html>) as far as it concerns a domain.
fn read_capabilities(host: &mut Host, capabilities: &Element, domain: &Element) {
    let os = domain.get_child("os").and_then(|os| os.get_child("type"));
    let wanted = os.and_then(|os| os.attributes.get("arch"));
    for guest in xml::elements(capabilities).filter(|element| element.name == "guest") {
        let Some(arch) = guest.get_child("arch") else { continue };
        if arch.attributes.get("name") != wanted {
            continue;
        }
        for element in xml::elements(arch) {
            match element.name.as_str() {
                "machine" => host.machines.extend(machine(element)),
                "domain" => host.kinds.extend(element.attributes.get("type").cloned()),
                _ => {}
            }
        }
    }
    let secmodels = capabilities.get_child("host").into_iter().flat_map(xml::elements);
    let dac = |model: &&Element| xml::text(model, "model").as_deref() == Some("dac");
    host.qemu_user = secmodels.filter(dac).find_map(|model| {
        // `+64055:+108`
        let label = xml::text(model, "baselabel")?;
        let (uid, gid) = label.split_once(':')?;
        let number = |text: &str| text.trim_start_matches('+').parse().ok();
        Some(QemuUser { uid: number(uid)?, gid: number(gid)? })
    });
}

fn machine(element: &Element) -> Option<MachineType> {
    let name = element.get_text()?.trim().to_owned();
    Some(MachineType { name, canonical: element.attributes.get("canonical").cloned() })
}

impl QemuUser {
    /// Its name, or its number.
    pub fn name(self) -> String {
        let user = User::from_uid(Uid::from_raw(self.uid)).ok().flatten();
        user.map_or_else(|| self.uid.to_string(), |user| user.name)
    }

    /// The first folder on the way to a path that this user cannot search. Folders that do not exist
    /// are not looked at, and those with an access control list, which may allow anything, pass.
    pub fn barred_from(self, path: &Path) -> Option<PathBuf> {
        if self.uid == 0 {
            return None;
        }
        let groups = self.groups();
        let mut folders: Vec<&Path> = path.ancestors().collect();
        folders.reverse();
        let barred = |folder: &&Path| {
            let Ok(metadata) = fs::metadata(folder) else { return false };
            let search = match (metadata.uid() == self.uid, groups.contains(&metadata.gid())) {
                (true, _) => 0o100,
                (_, true) => 0o010,
                _ => 0o001,
            };
            metadata.mode() & search == 0 && !has_access_list(folder)
        };
        folders.into_iter().find(barred).map(Path::to_owned)
    }

    fn groups(self) -> Vec<u32> {
        let user = User::from_uid(Uid::from_raw(self.uid)).ok().flatten();
        let name = user.and_then(|user| std::ffi::CString::new(user.name).ok());
        let groups = name.and_then(|name| getgrouplist(&name, Gid::from_raw(self.gid)).ok());
        let groups = groups.into_iter().flatten().map(Gid::as_raw);
        std::iter::once(self.gid).chain(groups).collect()
    }
}

fn has_access_list(folder: &Path) -> bool {
    rustix::fs::getxattr(folder, "system.posix_acl_access", &mut [0_u8; 0]).is_ok_and(|len| len > 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const CAPABILITIES: &str = "<capabilities>\
        <host><secmodel><model>none</model></secmodel>\
        <secmodel><model>dac</model><baselabel type='kvm'>+64055:+108</baselabel></secmodel></host>\
        <guest><os_type>hvm</os_type><arch name='i686'><machine>isapc</machine></arch></guest>\
        <guest><os_type>hvm</os_type><arch name='x86_64'>\
        <machine maxCpus='288'>pc-q35-7.2</machine>\
        <machine canonical='pc-q35-7.2' maxCpus='288'>q35</machine>\
        <domain type='qemu'/><domain type='kvm'/></arch></guest></capabilities>";

    #[test]
    fn libvirts_capabilities_are_read_for_the_machines_architecture() {
        let domain = "<domain><os><type arch='x86_64' machine='q35'>hvm</type></os></domain>";
        let mut host = Host::default();

        read_capabilities(
            &mut host,
            &xml::parse(CAPABILITIES).unwrap(),
            &xml::parse(domain).unwrap(),
        );

        let names: Vec<_> = host.machines.iter().map(|machine| machine.name.as_str()).collect();
        assert_eq!(names, ["pc-q35-7.2", "q35"]);
        assert_eq!(host.machines[1].canonical.as_deref(), Some("pc-q35-7.2"));
        assert_eq!(host.kinds, ["kvm", "qemu"].map(str::to_owned).into());
        assert_eq!(host.qemu_user, Some(QemuUser { uid: 64055, gid: 108 }));
    }

    #[test]
    fn every_path_that_is_named_is_asked_about_with_its_folder() {
        let domain = "<domain><os><loader>/fw/code.fd</loader></os><devices>\
                      <disk><source file='/img/a.iso'/></disk></devices></domain>";
        let paths = named_paths(&xml::parse(domain).unwrap());
        let expected = ["/fw", "/fw/code.fd", "/img", "/img/a.iso"].map(PathBuf::from);
        assert_eq!(paths, expected.into());
    }

    #[test]
    fn the_first_folder_that_is_closed_to_qemu_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let (closed, inner) = (folder.path().join("a"), folder.path().join("a/b"));
        fs::create_dir_all(&inner).unwrap();
        mode(folder.path(), 0o711);
        mode(&closed, 0o700);
        mode(&inner, 0o700);
        // A user without a name and without a part in any group of ours.
        let user = QemuUser { uid: 4_000_000, gid: 4_000_000 };
        let new = inner.join("new");
        assert_eq!(user.barred_from(&new), Some(closed.clone()));
        mode(&closed, 0o711);
        assert_eq!(user.barred_from(&new), Some(inner.clone()));
        mode(&inner, 0o711);
        assert_eq!(user.barred_from(&new), None);
        assert_eq!(QemuUser { uid: 0, gid: 0 }.barred_from(&new), None);
        assert_eq!(user.name(), "4000000");
    }
}
