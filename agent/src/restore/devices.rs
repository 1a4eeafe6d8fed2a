//! The devices of a machine that comes back: each as it was, pointed at what is here. No I/O.

use std::path::Path;

use xmltree::{Element, XMLNode};

use super::plan::Planner;
use crate::hypervisor::libvirt::xml;
use crate::names::DiskName;

/// Plans all devices.
pub(super) fn plan(planner: &mut Planner<'_>) {
    let Some(mut devices) = planner.plan.domain.take_child("devices") else { return };
    devices.children.retain_mut(|node| match node {
        XMLNode::Element(device) => plan_one(planner, device),
        _ => true,
    });
    xml::add(&mut planner.plan.domain, devices);
}

/// Plans one device and says whether it stays.
fn plan_one(planner: &mut Planner<'_>, device: &mut Element) -> bool {
    match device.name.as_str() {
        "emulator" => return emulator(planner, device),
        "disk" => return disk(planner, device),
        "interface" => interface(planner, device),
        "graphics" => graphics(planner, device),
        "serial" | "parallel" | "console" | "channel" => character(planner, device),
        "filesystem" => {
            let folder = xml::attribute(device, "source", "dir");
            missing(planner, "filesystem", folder.map(str::to_owned));
        }
        "tpm" => {
            let backend = device.get_child("backend");
            let path = backend.and_then(|backend| xml::attribute(backend, "device", "path"));
            missing(planner, "tpm", path.map(str::to_owned));
        }
        "hostdev" => {
            let about = "passed-through device";
            planner
                .differs(about, "it is named as on the other host: check that it is the right one");
        }
        _ => {}
    }
    true
}

fn missing(planner: &mut Planner<'_>, about: &str, path: Option<String>) {
    if let Some(path) = path.filter(|path| !planner.is_here(path)) {
        planner.obstacle(about, format!("{path} is not here"));
    }
}

/// libvirt chooses an emulator where none is named.
fn emulator(planner: &mut Planner<'_>, device: &Element) -> bool {
    let path = device.get_text().unwrap_or_default().trim().to_owned();
    let is_here = planner.is_here(&path);
    if !is_here {
        planner.differs("emulator", format!("chosen by libvirt; {path} is not here"));
    }
    is_here
}

fn disk(planner: &mut Planner<'_>, disk: &mut Element) -> bool {
    let target = xml::attribute(disk, "target", "dev").unwrap_or("?").to_owned();
    let about = format!("disk {target}");
    let was = source(disk);
    let restored = target.parse::<DiskName>().ok();
    let restored = restored.filter(|target| planner.wanted.disks.contains(target));
    if let Some(name) = restored {
        let image = planner.wanted.place.disk(&name, planner.wanted.format);
        let was_encrypted = encrypted(disk);
        point_at(disk, &image, planner.wanted.format.as_str());
        let was = was.map_or(String::new(), |was| format!("; it was {was}"));
        planner.step(&about, format!("{}{was}", image.display()));
        if was_encrypted {
            planner.differs(&about, "its image was encrypted, the restored one is not");
        }
        return true;
    }
    let kind = disk.attributes.get("device").map_or("disk", String::as_str).to_owned();
    let is_here = is_medium_here(planner, disk);
    match kind.as_str() {
        "cdrom" | "floppy" => {
            if let (false, Some(was)) = (is_here, was) {
                eject(disk);
                planner.differs(&about, format!("ejected; {was} is not here"));
            }
            true
        }
        _ if disk.get_child("readonly").is_some() && is_here => true,
        _ => {
            planner.differs(&about, "left out: it is not in the backup, or not asked for");
            false
        }
    }
}

/// What a disk's image was, in words.
fn source(disk: &Element) -> Option<String> {
    let get = |name| xml::attribute(disk, "source", name);
    let volume = get("pool").zip(get("volume")).map(|(pool, volume)| format!("{pool}/{volume}"));
    let named = get("file").or_else(|| get("dev")).or_else(|| get("dir")).or_else(|| get("name"));
    volume.or_else(|| named.map(str::to_owned))
}

fn encrypted(disk: &Element) -> bool {
    let source = disk.get_child("source");
    disk.get_child("encryption").is_some()
        || source.is_some_and(|source| source.get_child("encryption").is_some())
}

/// Whether a medium that is not restored is on this host. What lies in the network is not looked for.
fn is_medium_here(planner: &Planner<'_>, disk: &Element) -> bool {
    let get = |name| xml::attribute(disk, "source", name);
    match (get("pool"), get("file").or_else(|| get("dev")).or_else(|| get("dir"))) {
        (Some(pool), _) => planner.host.pools.contains(pool),
        (None, Some(path)) => planner.is_here(path),
        (None, None) => disk.attributes.get("type").is_some_and(|kind| kind == "network"),
    }
}

/// Puts a file in the place of whatever a disk's image was.
fn point_at(disk: &mut Element, image: &Path, format: &str) {
    xml::set(disk, "type", "file");
    if disk.attributes.get("device").is_some_and(|device| device == "lun") {
        // Only a device of the host can be passed through as one.
        xml::set(disk, "device", "disk");
    }
    for passed_through in ["rawio", "sgio", "snapshot"] {
        disk.attributes.remove(passed_through);
    }
    let of_the_image = ["source", "backingStore", "encryption", "auth", "mirror"];
    disk.children.retain(|node| match node.as_element() {
        Some(child) => !of_the_image.contains(&child.name.as_str()),
        None => true,
    });
    match disk.get_mut_child("driver") {
        Some(driver) => xml::set(driver, "type", format),
        None => xml::add(disk, xml::element("driver", &[("name", "qemu"), ("type", format)])),
    }
    xml::add(disk, xml::element("source", &[("file", &image.to_string_lossy())]));
}

fn eject(disk: &mut Element) {
    xml::set(disk, "type", "file");
    disk.children.retain(|node| match node.as_element() {
        Some(child) => !["source", "backingStore", "auth"].contains(&child.name.as_str()),
        None => true,
    });
}

fn interface(planner: &mut Planner<'_>, interface: &mut Element) {
    let mut about = "interface".to_owned();
    if let Some(mac) = xml::attribute(interface, "mac", "address").map(str::to_owned) {
        about = format!("interface {mac}");
        if !planner.wanted.keep_identity {
            interface.children.retain(|node| node.as_element().is_none_or(|e| e.name != "mac"));
            planner.differs(&about, "gets a new MAC address");
        }
    }
    let get = |name| xml::attribute(interface, "source", name);
    if let Some(network) = get("network") {
        let about = format!("network {network}");
        match planner.host.networks.get(network) {
            Some(true) => {}
            Some(false) => {
                planner.obstacle(&about, format!("not active: `virsh net-start {network}`"));
            }
            None if planner.wanted.networks.contains_key(network) => {
                planner.step(&about, "is not here: defined and started as it was");
                if !planner.plan.networks.iter().any(|known| known == network) {
                    planner.plan.networks.push(network.to_owned());
                }
            }
            None => planner.obstacle(&about, "is neither here nor in the backup"),
        }
    }
    let link = get("bridge").or_else(|| get("dev"));
    if let Some(link) = link.filter(|link| !planner.host.links.contains(*link)) {
        planner.obstacle(&about, format!("the network device {link} is not here"));
    }
}

/// libvirt tells passwords only when asked for them, and then they are there.
fn graphics(planner: &mut Planner<'_>, graphics: &Element) {
    let kind = graphics.attributes.get("type").map_or("", String::as_str);
    if ["vnc", "spice"].contains(&kind) && !graphics.attributes.contains_key("passwd") {
        let about = format!("{kind} console");
        planner.differs(&about, "has no password: without --with-secrets a backup has none");
    }
}

fn character(planner: &mut Planner<'_>, device: &Element) {
    let Some(path) = xml::attribute(device, "source", "path").map(Path::new) else { return };
    let is_made =
        device.attributes.get("type").is_some_and(|kind| kind == "file" || kind == "unix");
    let needed = if is_made { path.parent().unwrap_or(path) } else { path };
    if needed.is_absolute() && !planner.host.paths.contains(needed) {
        let about = device.name.clone();
        planner.obstacle(&about, format!("{} is not here", needed.display()));
    }
}
