//! The disks of a guest: what they are made of and how QEMU is told.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::tools::run;

/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;

/// The smallest disk that takes an XFS: xfsprogs refuses less than 300 MiB since 5.19.
pub const XFS_SIZE_MIN: u64 = 304 * MIB;

/// How an image file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// QEMU's own, version 3, with persistent dirty bitmaps.
    Qcow2,
    /// The bytes of the disk.
    Raw,
}

impl Format {
    /// QEMU's name for it.
    pub fn driver(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// A file system that the fixture makes on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileSystem {
    /// ext4 over the whole disk.
    Ext4,
    /// XFS over the whole disk, at least [`XFS_SIZE_MIN`].
    Xfs,
}

impl FileSystem {
    /// The name that `mount -t` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    fn make_on(self, image: &Path) {
        let image = image.to_str().expect("the fixture's paths are text");
        match self {
            Self::Ext4 => run("mkfs.ext4", &["-q", "-F", image]),
            Self::Xfs => run("mkfs.xfs", &["-q", "-f", image]),
        };
    }
}

#[derive(Debug, Clone)]
enum Source {
    New { size: u64 },
    Existing { image: PathBuf },
}

/// One disk: qcow2 on virtio-blk with a device id, unless told otherwise.
///
/// The nodes are `<id>-storage` (the file), `<id>-blkdebug` where asked for, `<id>-format`, and
/// `<id>-throttle` where asked for; the device has the id `<id>`.
#[derive(Debug, Clone)]
#[must_use]
pub struct Disk {
    pub(crate) id: String,
    pub(crate) format: Format,
    source: Source,
    pub(crate) scsi: bool,
    pub(crate) device_id: bool,
    pub(crate) file_system: Option<FileSystem>,
    pub(crate) mounted: bool,
    pub(crate) iothread: bool,
    throttle: Option<String>,
    blkdebug: Option<Value>,
    create_options: Option<String>,
    device_properties: Vec<String>,
}

impl Disk {
    /// A new, empty disk of `size` bytes. `id` names the device, its nodes and its file.
    pub fn new(id: &str, size: u64) -> Self {
        Self::from(id, Format::Qcow2, Source::New { size })
    }

    /// A disk on an image that exists and stays where it is.
    pub fn existing(id: &str, image: &Path, format: Format) -> Self {
        Self::from(id, format, Source::Existing { image: image.to_path_buf() })
    }

    fn from(id: &str, format: Format, source: Source) -> Self {
        Self {
            id: id.to_owned(),
            format,
            source,
            scsi: false,
            device_id: true,
            file_system: None,
            mounted: false,
            iothread: false,
            throttle: None,
            blkdebug: None,
            create_options: None,
            device_properties: Vec::new(),
        }
    }

    /// A raw image instead of qcow2.
    pub fn raw(mut self) -> Self {
        self.format = Format::Raw;
        self
    }

    /// Options for `qemu-img create -o`, such as `cluster_size=4k` or `compat=0.10`.
    pub fn create_options(mut self, options: &str) -> Self {
        self.create_options = Some(options.to_owned());
        self
    }

    /// On virtio-scsi instead of virtio-blk.
    pub fn scsi(mut self) -> Self {
        self.scsi = true;
        self
    }

    /// With a file system, made on the host before the guest starts.
    pub fn file_system(mut self, file_system: FileSystem) -> Self {
        self.file_system = Some(file_system);
        self
    }

    /// With a file system, mounted in the guest at `/mnt/<id>`. On an existing image nothing is made.
    pub fn mounted(self, file_system: FileSystem) -> Self {
        Self { mounted: true, ..self.file_system(file_system) }
    }

    /// Without an id on its device, as in a command line that was written by hand.
    pub fn without_device_id(mut self) -> Self {
        self.device_id = false;
        self
    }

    /// Served by an I/O thread of its own (virtio-blk only).
    pub fn iothread(mut self) -> Self {
        self.iothread = true;
        self
    }

    /// Below a throttle node; `limits` are properties of QEMU's `throttle-group`, such as
    /// `x-bps-total=1048576`.
    pub fn throttle(mut self, limits: &str) -> Self {
        self.throttle = Some(limits.to_owned());
        self
    }

    /// With a `blkdebug` node between format and file; `options` are merged into it, such as
    /// `{"inject-error": [{"event": "read_aio", "errno": 5}]}`.
    pub fn blkdebug(mut self, options: Value) -> Self {
        self.blkdebug = Some(options);
        self
    }

    /// One more property of the device, such as `werror=stop`.
    pub fn device_property(mut self, property: &str) -> Self {
        self.device_properties.push(property.to_owned());
        self
    }

    /// The node that holds the format, where bitmaps live.
    pub fn format_node(id: &str) -> String {
        format!("{id}-format")
    }

    /// Whether it asks for nothing but its image and its bus.
    pub(crate) fn is_plain(&self) -> bool {
        let properties = &self.device_properties;
        self.throttle.is_none() && self.blkdebug.is_none() && properties.is_empty()
    }

    /// Where its image is, or will be in `folder`.
    pub(crate) fn path(&self, folder: &Path) -> PathBuf {
        match &self.source {
            Source::New { .. } => folder.join(format!("{}.{}", self.id, self.format.driver())),
            Source::Existing { image } => image.clone(),
        }
    }

    /// Makes the image with its file system, unless it exists.
    pub(crate) fn create(&self, folder: &Path) {
        let Source::New { size } = self.source else { return };
        let path = self.path(folder);
        let image = path.to_str().expect("the fixture's paths are text");
        let driver = self.format.driver();
        let options = self.create_options.as_deref();
        let options = options.map_or(Vec::new(), |options| vec!["-o", options]);
        let size_text = size.to_string();
        let Some(file_system) = self.file_system else {
            let last = [image, size_text.as_str()];
            run("qemu-img", &[&["create", "-q", "-f", driver][..], &options, &last].concat());
            return;
        };
        let raw = folder.join(format!("{}.new", self.id));
        let file = File::create_new(&raw).expect("the fixture's folder is writable");
        file.set_len(size).expect("the fixture's folder takes sparse files");
        file_system.make_on(&raw);
        let last = [raw.to_str().expect("the fixture's paths are text"), image];
        let convert = ["convert", "-q", "-f", "raw", "-O", driver];
        run("qemu-img", &[&convert[..], &options, &last].concat());
        fs::remove_file(&raw).expect("the file is ours");
    }

    /// QEMU's arguments for its nodes and its device.
    pub(crate) fn args(&self, folder: &Path) -> Vec<OsString> {
        let id = &self.id;
        let path = self.path(folder);
        let path = path.to_str().expect("images have plain names");
        let storage = format!("{id}-storage");
        let mut nodes = vec![json!({
            "driver": "file", "node-name": storage, "filename": path, "discard": "unmap",
        })];
        let mut top = storage;
        if let Some(options) = &self.blkdebug {
            let name = format!("{id}-blkdebug");
            let mut node = json!({
                "driver": "blkdebug", "node-name": name, "image": top, "discard": "unmap",
            });
            for (key, value) in options.as_object().expect("options are an object") {
                node[key] = value.clone();
            }
            nodes.push(node);
            top = name;
        }
        let name = Self::format_node(id);
        nodes.push(json!({
            "driver": self.format.driver(), "node-name": name, "file": top, "discard": "unmap",
        }));
        top = name;
        let mut args = Vec::new();
        if let Some(limits) = &self.throttle {
            let (group, name) = (format!("{id}-limits"), format!("{id}-throttle"));
            args.push("-object".to_owned());
            args.push(format!("throttle-group,id={group},{limits}"));
            nodes.push(json!({
                "driver": "throttle", "node-name": name, "throttle-group": group, "file": top,
                "discard": "unmap",
            }));
            top = name;
        }
        for node in nodes {
            args.extend(["-blockdev".to_owned(), node.to_string()]);
        }
        if self.iothread {
            args.extend(["-object".to_owned(), format!("iothread,id={id}-iothread")]);
        }
        args.extend(["-device".to_owned(), self.device(&top)]);
        args.into_iter().map(OsString::from).collect()
    }

    fn device(&self, top: &str) -> String {
        let id = &self.id;
        let driver = if self.scsi { "scsi-hd,bus=scsi.0" } else { "virtio-blk-pci" };
        let mut device = format!("{driver},drive={top}");
        if self.device_id {
            device.push_str(&format!(",id={id}"));
        }
        if self.iothread {
            device.push_str(&format!(",iothread={id}-iothread"));
        }
        for property in &self.device_properties {
            device.push(',');
            device.push_str(property);
        }
        device
    }
}
