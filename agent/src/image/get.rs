//! The flow of `image get`, wherever the disks come from:
//!
//! ```text
//! begin ─► each disk: copy, compare ─► (they need not hold still any more) ─► checksums ─► record, name
//! ```

use std::path::Path;

use image_tools::copy::Bounds;
use image_tools::flavour::Flavour;
use image_tools::folder::{Image, NewImage};
use image_tools::record::{ImageRecord, Origin, OtherFile, RECORD_VERSION};
use image_tools::{ImageError, copy, sums};
use jiff::Timestamp;
use serde_json::Value;

use crate::effect;
use crate::hypervisor::{MachineFile, Role};
use crate::progress::Progress;
use crate::store::blocking;

/// The firmware's memory in a folder of images.
const NVRAM: &str = "nvram.fd";

/// A disk that holds still.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its name.
    pub target: String,
    /// Bytes that a guest sees.
    pub size: u64,
    /// It as a read-only node of QEMU's block layer.
    pub graph: Value,
    /// What its copy may take.
    pub bounds: Bounds,
}

/// An image that is being made; removed when dropped.
#[derive(Debug)]
pub struct Get<'a> {
    new: NewImage,
    copied: Vec<String>,
    progress: &'a Progress,
}

/// What an image says of itself beside its disks.
#[derive(Debug)]
pub struct About {
    /// What the machine is called.
    pub machine: String,
    /// When the images showed the machine as it was.
    pub time: Timestamp,
    /// Where they come from.
    pub origin: Origin,
    /// What is on the disks, where somebody has looked.
    pub flavour: Option<Flavour>,
    /// Other files of the machine, by name.
    pub files: Vec<(String, Vec<u8>)>,
}

impl<'a> Get<'a> {
    /// Begins an image in a store that is made where it is missing.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn begin(store: &Path, name: &str, progress: &'a Progress) -> Result<Self, ImageError> {
        let target = store.join(name);
        announce("image: begin", "make", &target)?;
        Ok(Self { new: NewImage::begin(&target)?, copied: Vec::new(), progress })
    }

    /// A folder for what is needed meanwhile.
    pub fn folder(&self) -> &Path {
        self.new.folder()
    }

    /// Copies a disk, and makes sure that the copy shows what the disk does.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn copy(&mut self, source: &Source) -> Result<(), ImageError> {
        let Source { target, size, graph, bounds } = source;
        let to = self.new.folder().join(format!("{target}.qcow2"));
        let progress = self.progress;
        let mut percent = |done: f64| progress.reach((*size as f64 * done / 100.0) as u64);
        announce("image: copy", "write", &to)?;
        progress.bytes(&format!("copying {target}"), *size);
        copy::copy(graph, *bounds, &to, &mut percent).await?;
        announce("image: compare", "read", &to)?;
        progress.bytes(&format!("comparing {target}"), *size);
        copy::compare(graph, *bounds, &to, &mut percent).await?;
        self.copied.push(target.clone());
        Ok(())
    }

    /// Makes the checksums, adds the machine's files, and gives the image its name.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn finish(
        self,
        machine: String,
        time: Timestamp,
        origin: Origin,
        files: &[MachineFile],
    ) -> Result<Image, ImageError> {
        let name = |file: &MachineFile| match file.role {
            Role::Nvram => NVRAM.to_owned(),
            _ => file.name.clone(),
        };
        let files = files.iter().map(|file| (name(file), file.content.clone())).collect();
        self.publish(About { machine, time, origin, flavour: None, files }).await
    }

    /// The same with all that is known of it.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn publish(self, about: About) -> Result<Image, ImageError> {
        let mut disks = Vec::new();
        for target in self.copied {
            let image = self.new.folder().join(format!("{target}.qcow2"));
            announce("image: checksums", "read", &image)?;
            let len = std::fs::metadata(&image).map_or(0, |metadata| metadata.len());
            self.progress.bytes(&format!("checksums of {target}"), len);
            let progress = self.progress.clone();
            let seal = move || copy::seal(&image, &target, |bytes| progress.read(bytes));
            disks.push(blocking(seal).await?);
        }
        let mut others = Vec::new();
        for (file, content) in about.files {
            self.new.add_file(&file, &content)?;
            others.push(OtherFile { file, sha256: sums::sha256(&content) });
        }
        let record = ImageRecord {
            version: RECORD_VERSION,
            machine: about.machine,
            time: about.time,
            origin: about.origin,
            disks,
            files: others,
            flavour: about.flavour,
            boot: None,
        };
        announce("image: publish", "finish", self.new.folder())?;
        self.new.publish(record)
    }
}

/// Counts what is about to be done to a file or folder.
///
/// # Errors
/// Where a test wants it to fail.
pub fn announce(effect: &str, step: &'static str, path: &Path) -> Result<(), ImageError> {
    effect::about_to(effect).map_err(ImageError::file(step, path))
}
