//! libvirt's XML: what it says of a domain read into our terms, and what we ask for. No I/O.
//!
//! Sources: libvirt's "Domain XML format", "Checkpoint XML format" and "Backup XML format".

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use xmltree::{Element, ParseError, XMLNode};

use crate::capture::place::{NbdExport, NbdServer};
use crate::hypervisor::{Bitmap, BitmapHealth, Skipped};
use crate::journal::DiskRecord;

/// The part of a domain's description that is used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Domain {
    /// Its number while it runs.
    pub id: Option<u32>,
    /// Its name.
    pub name: String,
    /// The targets of all its disk devices, also of those that are left out.
    pub targets: Vec<String>,
    /// Its disks, in order.
    pub disks: Vec<DomainDisk>,
    /// What is no disk to back up, and why.
    pub skipped: Vec<Skipped>,
    /// Whether it has a channel for the guest agent.
    pub has_agent: bool,
    /// Whether it has an emulated TPM.
    pub has_tpm: bool,
    /// Whether SELinux confines its QEMU.
    pub has_selinux: bool,
    /// The program that it runs in.
    pub emulator: Option<String>,
    /// The memory of its firmware, where that is a file.
    pub nvram: Option<PathBuf>,
    /// The kernel that it boots directly.
    pub kernel: Option<PathBuf>,
    /// The initrd that it boots directly.
    pub initrd: Option<PathBuf>,
}

/// What a domain names that is described elsewhere.
#[derive(Debug, Default)]
pub struct Named {
    /// Networks, by name.
    pub networks: Vec<String>,
    /// Storage pools, by name.
    pub pools: Vec<String>,
    /// Images on the host, which may lie in a pool.
    pub images: Vec<PathBuf>,
}

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainDisk {
    /// Its target, such as `vda`.
    pub target: String,
    /// The format of its image: `qcow2`, `raw`.
    pub format: String,
    /// The image, where it is a file of the host.
    pub file: Option<PathBuf>,
    /// The image, where it is a block device of the host.
    pub device: Option<PathBuf>,
    /// Where the image lies on the network, where it does.
    pub remote: Option<Remote>,
    /// The pool and the volume of it, where the image is named that way.
    pub volume: Option<(String, String)>,
    /// Whether QEMU needs a key to read the image.
    pub is_encrypted: bool,
    /// What lies beneath the image.
    pub backing: Backing,
    /// The image that a job writes to, so that the disk can go on with it.
    pub mirror: Option<PathBuf>,
    /// Whether that job is ready.
    pub is_ready: bool,
}

/// An image on the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// By what it is reached: `nbd`, `rbd`, `iscsi`.
    pub protocol: String,
    /// The export that it is, where nothing but its name is needed to open it.
    pub nbd: Option<NbdExport>,
}

/// What lies beneath an image, by the domain's description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// It does not say, so the image itself does.
    Unsaid,
    /// Nothing.
    Nothing,
    /// Another image.
    Image {
        /// Its format.
        format: String,
        /// The file or block device of the host that it is.
        path: Option<PathBuf>,
        /// What lies beneath it.
        backing: Box<Backing>,
    },
}

/// Where NBD servers listen that are not told otherwise (NBD's doc/proto.md).
const NBD_PORT: &str = "10809";

/// Reads a document.
///
/// # Errors
/// Where it is not well-formed.
pub fn parse(xml: &str) -> Result<Element, ParseError> {
    Element::parse(xml.as_bytes())
}

/// Reads a domain's description.
pub fn read_domain(domain: &Element) -> Domain {
    let labels = elements(domain).filter(|element| element.name == "seclabel");
    let mut labels = labels.filter_map(|label| label.attributes.get("model"));
    let mut read = Domain {
        id: domain.attributes.get("id").and_then(|id| id.parse().ok()),
        name: text(domain, "name").unwrap_or_default(),
        targets: Vec::new(),
        disks: Vec::new(),
        skipped: Vec::new(),
        has_agent: false,
        has_tpm: false,
        has_selinux: labels.any(|label| label == "selinux"),
        emulator: domain.get_child("devices").and_then(|devices| text(devices, "emulator")),
        nvram: None,
        kernel: None,
        initrd: None,
    };
    if let Some(os) = domain.get_child("os") {
        read.nvram = text(os, "nvram").map(PathBuf::from);
        // From libvirt 8.5 on it may be told as a source, which need not be a file.
        let source = os.get_child("nvram").and_then(|nvram| attribute(nvram, "source", "file"));
        read.nvram = source.map(PathBuf::from).or(read.nvram);
        read.kernel = text(os, "kernel").map(PathBuf::from);
        read.initrd = text(os, "initrd").map(PathBuf::from);
    }
    let Some(devices) = domain.get_child("devices") else { return read };
    for device in elements(devices) {
        match device.name.as_str() {
            "disk" => {
                read.targets.extend(attribute(device, "target", "dev").map(str::to_owned));
                match read_disk(device) {
                    Ok(disk) => read.disks.push(disk),
                    Err(skipped) => read.skipped.push(skipped),
                }
            }
            "channel" => {
                let name = attribute(device, "target", "name");
                read.has_agent |= name == Some("org.qemu.guest_agent.0");
            }
            "tpm" => read.has_tpm |= attribute(device, "backend", "type") == Some("emulator"),
            _ => {}
        }
    }
    read
}

fn read_disk(disk: &Element) -> Result<DomainDisk, Skipped> {
    let target = attribute(disk, "target", "dev").unwrap_or("?").to_owned();
    let no_disk = |reason: &str| Skipped::no_disk(&target, reason);
    match disk.attributes.get("device").map_or("disk", String::as_str) {
        "disk" | "lun" => {}
        "cdrom" => return Err(no_disk("it is a CD-ROM")),
        "floppy" => return Err(no_disk("it is a floppy disk")),
        other => return Err(no_disk(&format!("it is a {other}"))),
    }
    if disk.get_child("source").is_none() {
        return Err(no_disk("it has no medium"));
    }
    let skip = |reason: &str| Skipped::disk(&target, reason);
    if disk.get_child("readonly").is_some() {
        return Err(skip("it is read-only"));
    }
    if disk.get_child("transient").is_some() {
        return Err(skip("it is transient: it loses its changes when the domain stops"));
    }
    let source = |name| attribute(disk, "source", name).map(PathBuf::from);
    let format = attribute(disk, "driver", "type").unwrap_or("raw").to_owned();
    let part = |name| attribute(disk, "source", name).map(str::to_owned);
    let is_encrypted = disk.get_child("encryption").is_some()
        || disk.get_child("source").is_some_and(|source| source.get_child("encryption").is_some());
    Ok(DomainDisk {
        format,
        file: source("file"),
        device: source("dev"),
        remote: disk.get_child("source").and_then(read_remote),
        volume: part("pool").zip(part("volume")),
        is_encrypted,
        backing: read_backing(disk),
        mirror: disk.get_child("mirror").and_then(read_mirror),
        is_ready: attribute(disk, "mirror", "ready") == Some("yes"),
        target,
    })
}

fn read_mirror(mirror: &Element) -> Option<PathBuf> {
    let source = &mirror.get_child("source")?.attributes;
    source.get("file").or_else(|| source.get("dev")).map(PathBuf::from)
}

fn read_remote(source: &Element) -> Option<Remote> {
    let get = |name| source.attributes.get(name).map(String::as_str);
    let protocol = get("protocol")?.to_owned();
    let is_plain = protocol == "nbd" && get("tls") != Some("yes");
    let of_host = |name| attribute(source, "host", name);
    let server = match of_host("transport").unwrap_or("tcp") {
        "unix" => of_host("socket").map(|socket| NbdServer::Unix(socket.into())),
        "tcp" => of_host("name").map(|host| {
            NbdServer::Tcp(host.to_owned(), of_host("port").unwrap_or(NBD_PORT).to_owned())
        }),
        _ => None,
    };
    let name = get("name").unwrap_or_default().to_owned();
    let nbd = server.filter(|_| is_plain).map(|server| NbdExport { server, name });
    Some(Remote { protocol, nbd })
}

fn read_backing(above: &Element) -> Backing {
    let Some(image) = above.get_child("backingStore") else { return Backing::Unsaid };
    let Some(format) = attribute(image, "format", "type") else { return Backing::Nothing };
    let path = attribute(image, "source", "file").or_else(|| attribute(image, "source", "dev"));
    Backing::Image {
        format: format.to_owned(),
        path: path.map(PathBuf::from),
        backing: Box::new(read_backing(image)),
    }
}

/// Reads what a domain names elsewhere.
pub fn read_named(domain: &Element) -> Named {
    let mut named = Named::default();
    let Some(devices) = domain.get_child("devices") else { return named };
    for device in elements(devices) {
        let source = |name| attribute(device, "source", name).map(str::to_owned);
        match device.name.as_str() {
            "interface" => named.networks.extend(source("network")),
            "disk" => {
                named.pools.extend(source("pool"));
                named.images.extend(source("file").map(PathBuf::from));
            }
            _ => {}
        }
    }
    named.networks.sort();
    named.networks.dedup();
    named
}

/// The dirty bitmaps of a checkpoint: each the target of its disk, and the bitmap. libvirt was asked
/// for sizes, which it gives only for those that are there and usable.
pub fn read_checkpoint(name: &str, checkpoint: &Element) -> Vec<(String, Bitmap)> {
    let Some(disks) = checkpoint.get_child("disks") else { return Vec::new() };
    let bitmap = |disk: &Element| {
        let get = |name: &str| disk.attributes.get(name).map(String::as_str);
        (get("checkpoint") == Some("bitmap")).then_some(())?;
        let health = match get("size") {
            Some(_) => BitmapHealth::Good,
            None => BitmapHealth::Broken,
        };
        let name = get("bitmap").unwrap_or(name).to_owned();
        Some((get("name")?.to_owned(), Bitmap { name, health }))
    };
    elements(disks).filter_map(bitmap).collect()
}

/// The socket that a backup job's server listens at, whoever made it.
pub fn read_backup_socket(backup: &Element) -> Option<PathBuf> {
    let server = |name| attribute(backup, "server", name);
    server("socket").or_else(|| server("fdgroup")).map(PathBuf::from)
}

/// A pull-mode backup of these disks at a socket; all others are left alone. QEMU makes the socket, or
/// it `is_passed`, as a descriptor that libvirt knows by the socket's path.
pub fn write_backup(
    socket: &Path,
    is_passed: bool,
    disks: &[DiskRecord],
    others: &[String],
) -> String {
    let (transport, by) = if is_passed { ("fd", "fdgroup") } else { ("unix", "socket") };
    let socket = socket.to_string_lossy();
    let server = element("server", &[("transport", transport), (by, &socket)]);
    let mut list = element("disks", &[]);
    for disk in disks {
        let mut entry = element("disk", &[("backup", "yes"), ("type", "file")]);
        set(&mut entry, "name", disk.disk.as_str());
        set(&mut entry, "exportname", &disk.snapshot);
        match (&disk.bitmap_old, &disk.bitmap_export) {
            (Some(old), Some(export)) => {
                set(&mut entry, "backupmode", "incremental");
                set(&mut entry, "incremental", old);
                set(&mut entry, "exportbitmap", export);
            }
            _ => set(&mut entry, "backupmode", "full"),
        }
        add(&mut entry, element("driver", &[("type", "qcow2")]));
        add(&mut entry, element("scratch", &[("file", &disk.scratch)]));
        add(&mut list, entry);
    }
    for target in others {
        add(&mut list, element("disk", &[("name", target), ("backup", "no")]));
    }
    let mut backup = element("domainbackup", &[("mode", "pull")]);
    add(&mut backup, server);
    add(&mut backup, list);
    write(&backup)
}

/// A snapshot that puts overlays, which are there already, above disks and leaves the others alone.
pub fn write_overlays(overlays: &[(&str, &Path)], others: &[String]) -> String {
    let mut list = element("disks", &[]);
    for (target, overlay) in overlays {
        let attributes = [("name", *target), ("snapshot", "external"), ("type", "file")];
        let mut disk = element("disk", &attributes);
        add(&mut disk, element("driver", &[("type", "qcow2")]));
        add(&mut disk, element("source", &[("file", &overlay.to_string_lossy())]));
        add(&mut list, disk);
    }
    for target in others {
        add(&mut list, element("disk", &[("name", target), ("snapshot", "no")]));
    }
    let mut snapshot = element("domainsnapshot", &[]);
    add(&mut snapshot, list);
    write(&snapshot)
}

/// Whether a description names an image anywhere.
pub fn names_image(element: &Element, is_it: &impl Fn(&Path) -> bool) -> bool {
    let names = |name: &str| element.attributes.get(name).is_some_and(|v| is_it(Path::new(v)));
    names("file") || names("dev") || elements(element).any(|child| names_image(child, is_it))
}

/// The image on top of a device of a domain: also of one that is read-only, a CD-ROM or a floppy disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Top {
    /// Its format.
    pub format: String,
    /// The image, where it is a file or block device of the host.
    pub path: Option<PathBuf>,
    /// The pool and the volume of it, where the image is named that way.
    pub volume: Option<(String, String)>,
}

/// The images on top of all devices of a domain.
pub fn tops(domain: &Element) -> Vec<Top> {
    let devices = domain.get_child("devices").into_iter().flat_map(elements);
    let top = |disk: &Element| {
        let source = |name| attribute(disk, "source", name).map(str::to_owned);
        Top {
            format: attribute(disk, "driver", "type").unwrap_or("raw").to_owned(),
            path: source("file").or_else(|| source("dev")).map(PathBuf::from),
            volume: source("pool").zip(source("volume")),
        }
    };
    devices.filter(|device| device.name == "disk").map(top).collect()
}

/// Whether libvirt can run backup jobs, by what it says of a program ("Domain capabilities XML format");
/// one that says nothing of them is too old.
pub fn offers_backup_jobs(capabilities: &Element) -> bool {
    let features = capabilities.get_child("features");
    features.and_then(|features| attribute(features, "backup", "supported")) == Some("yes")
}

/// Leaves a disk out of a description.
pub fn remove_disk(domain: &mut Element, target: &str) {
    let is_it = |device: &XMLNode| {
        let disk = device.as_element().filter(|device| device.name == "disk");
        disk.is_some_and(|disk| attribute(disk, "target", "dev") == Some(target))
    };
    if let Some(devices) = domain.get_mut_child("devices") {
        devices.children.retain(|device| !is_it(device));
    }
}

/// Has a disk that names an overlay name another image instead. Returns whether it did.
pub fn point_disk(domain: &mut Element, overlay: &Path, base: &Path, format: &str) -> bool {
    let Some(devices) = domain.get_mut_child("devices") else { return false };
    let devices = devices.children.iter_mut().filter_map(XMLNode::as_mut_element);
    let mut pointed = false;
    for disk in devices.filter(|device| device.name == "disk") {
        let file = attribute(disk, "source", "file").map(Path::new);
        if file != Some(overlay) {
            continue;
        }
        // What lies beneath its own image that tells by itself.
        disk.children.retain(|c| c.as_element().is_none_or(|c| c.name != "backingStore"));
        let is_device = base.starts_with("/dev");
        set(disk, "type", if is_device { "block" } else { "file" });
        if let Some(source) = disk.get_mut_child("source") {
            source.attributes.remove("file");
            source.attributes.remove("index");
            set(source, if is_device { "dev" } else { "file" }, &base.to_string_lossy());
        }
        if let Some(driver) = disk.get_mut_child("driver") {
            set(driver, "type", format);
        }
        pointed = true;
    }
    pointed
}

/// A checkpoint that begins a dirty bitmap on the disks of `tracked`, and none on `others`. The time is
/// for one that is told of again; libvirt sets it otherwise.
pub fn write_checkpoint(
    name: &str,
    time: Option<Timestamp>,
    tracked: &[&str],
    others: &[&str],
) -> String {
    let mut checkpoint = element("domaincheckpoint", &[]);
    add(&mut checkpoint, with_text("name", name));
    if let Some(time) = time {
        add(&mut checkpoint, with_text("creationTime", &time.as_second().to_string()));
    }
    let mut list = element("disks", &[]);
    for target in tracked {
        let mut disk = element("disk", &[("name", target), ("checkpoint", "bitmap")]);
        set(&mut disk, "bitmap", name);
        add(&mut list, disk);
    }
    for target in others {
        add(&mut list, element("disk", &[("name", target), ("checkpoint", "no")]));
    }
    add(&mut checkpoint, list);
    write(&checkpoint)
}

/// The elements right below another one.
pub fn elements(parent: &Element) -> impl Iterator<Item = &Element> {
    parent.children.iter().filter_map(XMLNode::as_element)
}

/// An attribute of the first child of this name.
pub fn attribute<'a>(parent: &'a Element, child: &str, name: &str) -> Option<&'a str> {
    parent.get_child(child)?.attributes.get(name).map(String::as_str)
}

/// The text of the first child of this name, where it has any.
pub fn text(parent: &Element, child: &str) -> Option<String> {
    let text = parent.get_child(child)?.get_text()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// A new element.
pub fn element(name: &str, attributes: &[(&str, &str)]) -> Element {
    let mut element = Element::new(name);
    for (name, value) in attributes {
        set(&mut element, name, value);
    }
    element
}

/// A new element around a text.
pub fn with_text(name: &str, text: &str) -> Element {
    let mut element = Element::new(name);
    element.children.push(XMLNode::Text(text.to_owned()));
    element
}

/// Sets an attribute.
pub fn set(element: &mut Element, name: &str, value: &str) {
    element.attributes.insert(name.to_owned(), value.to_owned());
}

/// Adds a child at the end.
pub fn add(parent: &mut Element, child: Element) {
    parent.children.push(XMLNode::Element(child));
}

/// The document of an element.
pub fn write(element: &Element) -> String {
    let mut text = Vec::new();
    element.write(&mut text).expect("memory takes everything");
    String::from_utf8(text).expect("XML is written as UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(inner: &str) -> DomainDisk {
        let xml = format!(
            "<disk device='disk'><driver type='qcow2'/><source file='/top'/>{inner}\
             <target dev='vda'/></disk>"
        );
        read_disk(&parse(&xml).unwrap()).unwrap()
    }

    #[test]
    fn backup_jobs_are_believed_in_only_where_libvirt_says_so() {
        let of = |features: &str| {
            let text = format!("<domainCapabilities>{features}</domainCapabilities>");
            offers_backup_jobs(&parse(&text).unwrap())
        };
        assert!(of("<features><gic supported='no'/><backup supported='yes'/></features>"));
        assert!(!of("<features><backup supported='no'/></features>"));
        assert!(!of("<features/>") && !of(""));
    }

    #[test]
    fn what_lies_beneath_an_image_is_taken_from_the_description_only_where_it_says_so() {
        assert_eq!(disk("").backing, Backing::Unsaid);
        assert_eq!(disk("<backingStore/>").backing, Backing::Nothing);
        let named = |inner: &str| {
            let xml = format!(
                "<backingStore type='file'><format type='raw'/><source file='/base'/>{inner}\
                 </backingStore>"
            );
            disk(&xml).backing
        };
        let expected = |backing| Backing::Image {
            format: "raw".into(),
            path: Some("/base".into()),
            backing: Box::new(backing),
        };
        assert_eq!(named(""), expected(Backing::Unsaid));
        assert_eq!(named("<backingStore/>"), expected(Backing::Nothing));
    }

    #[test]
    fn an_image_on_the_network_is_known_where_its_name_is_all_that_is_needed() {
        let remote = |source: &str| read_remote(&parse(source).unwrap());
        let nbd = |source: &str| remote(source).unwrap().nbd;
        let export = |server| Some(NbdExport { server, name: "e".into() });
        let host = "<source protocol='nbd' name='e'><host name='h'/></source>";
        assert_eq!(nbd(host), export(NbdServer::Tcp("h".into(), "10809".into())));
        let unix = "<source protocol='nbd' name='e'><host transport='unix' socket='/s'/></source>";
        assert_eq!(nbd(unix), export(NbdServer::Unix("/s".into())));
        assert_eq!(
            nbd("<source protocol='nbd' name='e' tls='yes'><host name='h'/></source>"),
            None
        );
        assert_eq!(nbd("<source protocol='rbd' name='p/i'><host name='h'/></source>"), None);
        assert_eq!(remote("<source file='/f'/>"), None);
    }

    #[test]
    fn a_domain_goes_back_to_its_own_image_and_its_other_disks_stay() {
        let xml = "<domain><devices><disk type='file'><driver name='qemu' type='qcow2'/>\
             <source file='/o' index='3'/><backingStore type='file'><source file='/b'/></backingStore>\
             <target dev='vda'/></disk><disk type='file'><driver type='qcow2'/><source file='/c'/>\
             <target dev='vdb'/></disk></devices></domain>";
        let mut domain = parse(xml).unwrap();
        let names =
            |domain: &Element, image: &str| names_image(domain, &|path| path == Path::new(image));
        assert!(names(&domain, "/o") && names(&domain, "/b"));
        let without = |target| {
            let mut domain = domain.clone();
            remove_disk(&mut domain, target);
            domain
        };
        assert!(!names(&without("vda"), "/o") && names(&without("vdb"), "/o"));
        assert!(point_disk(&mut domain, Path::new("/o"), Path::new("/b"), "raw"));
        assert!(!point_disk(&mut domain, Path::new("/o"), Path::new("/b"), "raw"));
        assert!(!names(&domain, "/o"));
        let disks = read_domain(&domain).disks;
        let seen = |disk: &DomainDisk| (disk.file.clone().unwrap(), disk.format.clone());
        assert_eq!(seen(&disks[0]), ("/b".into(), "raw".into()));
        assert_eq!(seen(&disks[1]), ("/c".into(), "qcow2".into()));
        assert_eq!(disks[0].backing, Backing::Unsaid);
    }

    #[test]
    fn a_disk_that_needs_a_key_is_known_by_either_place_of_it() {
        let key = "<encryption format='luks'><secret type='passphrase' uuid='u'/></encryption>";
        assert!(disk(key).is_encrypted);
        assert!(!disk("").is_encrypted);
    }
}
