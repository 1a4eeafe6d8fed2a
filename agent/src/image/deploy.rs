//! An image becomes a machine of this host: its disks are copied to where they belong, checked, and only
//! then get their names; what the restore of a backup plans and defines, this does by the same code.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use image_tools::error::ImageError;
use image_tools::folder::Image;
use image_tools::record::{DiskFile, Origin, OtherFile};
use image_tools::sums;
use repository::FileId;
use xmltree::Element;

use crate::effect;
use crate::hypervisor::Role;
use crate::hypervisor::libvirt::xml;
use crate::manifest::FileManifest;
use crate::names::{DiskName, DomainName, NameError};
use crate::progress::Progress;
use crate::restore::define::DefineError;
use crate::restore::partial::Partial;
use crate::restore::plan::{Copy, Place, Plan};
use crate::restore::{RestoreError, Stop};

/// The machine's description and its firmware's variables, in the folder of an image.
const DESCRIPTION: &str = "domain.xml";
const VARIABLES: &str = "nvram.fd";
/// More is no such file; kernels and initrds are the longest.
const FILE_LEN_MAX: u64 = 512 << 20;
const PART_LEN: usize = 1 << 20;
/// Where no image belongs, whatever a description from outside says.
const CLOSED: [&str; 12] = [
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys",
    "/usr",
];

/// Why an image was not deployed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeployError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image is one of a machine that libvirt did not know.
    #[error("{} has no {DESCRIPTION}", .folder.display())]
    NoDescription {
        /// The image.
        folder: PathBuf,
    },
    /// A file is not what the record says.
    #[error("{} is damaged: it is not what its record says", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The description does not say where a disk is to be, or names a place where no image belongs.
    #[error("the description of the machine names no place for the disk `{disk}`")]
    NoPlace {
        /// The disk.
        disk: DiskName,
    },
    /// A name cannot be used.
    #[error("the machine or a disk of it cannot be called so")]
    Name(#[from] NameError),
    /// Two disks would be one file.
    #[error("two disks of the machine are the file {}", .path.display())]
    Twice {
        /// The file.
        path: PathBuf,
    },
    /// The machine cannot be defined.
    #[error(transparent)]
    Define(#[from] DefineError),
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] RestoreError),
}

impl DeployError {
    /// What the user can do next.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NoDescription { .. } => {
                "--xml takes the description of such a machine (`virsh dumpxml`)"
            }
            Self::Damaged { .. } => "`kvmsnap image check` tells where; make the image again",
            Self::NoPlace { .. } => "--to names a folder for all disks, --pool a storage pool",
            Self::Define(DefineError::NameTaken { .. }) => "--name gives it another one",
            Self::Define(DefineError::CannotRun { .. } | DefineError::NoMachine { .. }) => {
                "--xml takes an adapted copy of the description"
            }
            Self::Write(RestoreError::Exists { .. }) => {
                "nothing is ever written over: --to names another folder; what an interrupted one left there, and no domain has, may be removed"
            }
            Self::Define(error) => return error.hint(),
            Self::Write(error) => error.hint()?,
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// An image, read as far as is needed to plan.
#[derive(Debug)]
pub struct Deploy {
    /// The machine's description.
    pub domain: Element,
    /// The names of its disks.
    pub disks: Vec<DiskName>,
    /// Its files besides the disks.
    pub files: Vec<FileManifest>,
    /// The descriptions of networks that it uses, by name.
    pub networks: BTreeMap<String, String>,
    /// The files that the disks of this host's domains are.
    pub used: Vec<PathBuf>,
    /// What it was made into, where it was made from a template.
    machine: Option<String>,
    folder: PathBuf,
    images: Vec<DiskFile>,
    contents: BTreeMap<String, Vec<u8>>,
}

impl Deploy {
    /// Reads an image, but for its disks. `description` is used in place of its own.
    ///
    /// # Errors
    /// [`DeployError`].
    pub fn read(image: &Image, description: Option<&Path>) -> Result<Self, DeployError> {
        let record = image.record();
        let (mut files, mut contents) = (Vec::new(), BTreeMap::new());
        let mut networks = BTreeMap::new();
        for file in &record.files {
            let Some((role, source)) = role_of(&file.file) else { continue };
            let content = read_checked(image, file)?;
            if role == Role::Network {
                let text = String::from_utf8_lossy(&content).into_owned();
                let named = xml::parse(&text).ok().and_then(|network| xml::text(&network, "name"));
                networks.extend(named.map(|name| (name, text)));
            }
            let (name, size) = (file.file.clone(), content.len() as u64);
            files.push(FileManifest { name, role, source, size });
            contents.insert(file.file.clone(), content);
        }
        let folder = image.folder().to_owned();
        if let Some(path) = description {
            let text = fs::read(path).map_err(ImageError::file("read", path))?;
            contents.insert(DESCRIPTION.to_owned(), text);
        }
        let Some(description) = contents.get(DESCRIPTION) else {
            return Err(DeployError::NoDescription { folder });
        };
        let domain = Element::parse(description.as_slice()).map_err(DefineError::Description)?;
        let disks = record.disks.iter().map(|disk| disk.target.parse());
        let disks = disks.collect::<Result<_, NameError>>()?;
        let images = record.disks.clone();
        let is_made = matches!(record.origin, Origin::Update { .. });
        let machine = is_made.then(|| record.machine.clone());
        let used = Vec::new();
        Ok(Self { domain, disks, files, networks, used, machine, folder, images, contents })
    }

    /// What the machine is called, unless told otherwise. A machine that was made from a template still has
    /// the description of that.
    ///
    /// # Errors
    /// [`DeployError::Name`].
    pub fn name(&self) -> Result<DomainName, DeployError> {
        let described = xml::text(&self.domain, "name").unwrap_or_default();
        Ok(self.machine.as_ref().unwrap_or(&described).parse()?)
    }

    /// The places that the description names for the disks; the folders must be there. Others use these
    /// too, so that all other files begin with the machine's name.
    ///
    /// # Errors
    /// [`DeployError::NoPlace`].
    pub fn places(&self, name: &DomainName) -> Result<Place, DeployError> {
        let devices = self.domain.get_child("devices").into_iter().flat_map(xml::elements);
        let described: Vec<&Element> = devices.filter(|device| device.name == "disk").collect();
        let mut images = BTreeMap::new();
        for disk in &self.disks {
            let is_it =
                |device: &&&Element| xml::attribute(device, "target", "dev") == Some(disk.as_str());
            let device = described.iter().find(is_it);
            let path = device.and_then(|device| xml::attribute(device, "source", "file"));
            let path = path.map(PathBuf::from).filter(|path| takes_images(path));
            images.insert(disk.clone(), path.ok_or(DeployError::NoPlace { disk: disk.clone() })?);
        }
        let first = self.disks.first().and_then(|disk| images.get(disk)?.parent());
        let folder = first.unwrap_or(Path::new("/")).to_owned();
        Ok(Place { folder, prefix: format!("{name}-"), images })
    }

    /// The file that each disk becomes. What an interrupted run has left under its name will do.
    ///
    /// # Errors
    /// [`RestoreError::Exists`] for the first that is there, [`DeployError::Twice`].
    pub fn targets(&self, place: &Place) -> Result<Vec<PathBuf>, DeployError> {
        let mut targets: Vec<PathBuf> = Vec::new();
        for (disk, image) in self.disks.iter().zip(&self.images) {
            let path = place.disk(disk, crate::restore::Format::Qcow2);
            match fs::symlink_metadata(&path) {
                Ok(_) if self.has_left(&path, image) => {}
                Ok(_) => return Err(RestoreError::Exists { path }.into()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(RestoreError::Write { path, source }.into()),
            }
            if targets.contains(&path) {
                return Err(DeployError::Twice { path });
            }
            targets.push(path);
        }
        Ok(targets)
    }

    /// Whether an interrupted run has given a disk its name, and no domain here has it.
    fn has_left(&self, path: &Path, image: &DiskFile) -> bool {
        let id = image.sums.sha256.parse();
        !self.used.iter().any(|used| used == path)
            && id.is_ok_and(|id: FileId| Partial::has_named(path, &id))
    }

    /// Whether a file beside the disks is what an interrupted run has left with them.
    pub fn is_left(&self, copy: &Copy, place: &Place) -> bool {
        let mut disks = self.disks.iter().zip(&self.images);
        let path = |disk| place.disk(disk, crate::restore::Format::Qcow2);
        disks.any(|(disk, image)| self.has_left(&path(disk), image))
            && fs::read(&copy.to).ok().as_ref() == self.contents.get(&copy.file)
    }

    /// Copies the disks. None gets its name before all are whole, checked and durable. Each is also known by its
    /// temporary name until what comes with it is dropped: so the next run can tell those of one that was
    /// killed before a domain had them.
    ///
    /// # Errors
    /// [`DeployError`].
    pub fn copy(
        &self,
        place: &Place,
        folder_mode: u32,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<Vec<(PathBuf, Partial)>, DeployError> {
        let targets = self.targets(place)?;
        if !place.folder.exists() {
            let write = |source| RestoreError::Write { path: place.folder.clone(), source };
            effect::about_to("deploy: folder").map_err(write)?;
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(folder_mode).create(&place.folder).map_err(write)?;
        }
        let mut whole = Vec::new();
        for (disk, to) in self.images.iter().zip(&targets) {
            whole.push(self.copy_one(disk, to, progress, stop)?);
        }
        for (partial, to) in whole.iter_mut().zip(&targets) {
            partial.name(to)?;
        }
        Ok(targets.into_iter().zip(whole).collect())
    }

    fn copy_one(
        &self,
        disk: &DiskFile,
        to: &Path,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<Partial, DeployError> {
        let from = self.folder.join(&disk.file);
        let write = |source| RestoreError::Write { path: to.to_owned(), source };
        effect::about_to("deploy: disk").map_err(write)?;
        // What a killed try has left is its own: it goes by the checksum of what it is a copy of.
        let id: FileId = disk.sums.sha256.parse().map_err(|_| damaged(&from))?;
        let partial = Partial::take_up(to, &id)?;
        // What has its name is whole already, and nothing is ever written over.
        let is_named = partial.is_named(to);
        if !is_named {
            progress.bytes(&format!("copying {}", disk.target), disk.file_len);
            let read = ImageError::file("read", &from);
            let mut source = File::open(&from).map_err(read)?;
            let mut target = partial.file();
            target.set_len(0).map_err(write)?;
            let mut part = vec![0; PART_LEN];
            loop {
                stop.check()?;
                let len = source.read(&mut part).map_err(ImageError::file("read", &from))?;
                if len == 0 {
                    break;
                }
                target.write_all(&part[..len]).map_err(write)?;
                progress.read(len as u64);
            }
            target.sync_all().map_err(write)?;
        }
        progress.bytes(&format!("checking {}", disk.target), disk.file_len);
        let copy = File::open(partial.path()).map_err(write)?;
        let wrong = sums::check(copy, &disk.sums, disk.file_len, |len| progress.read(len));
        match wrong.map_err(write)?.is_empty() {
            true => Ok(partial),
            false if is_named => Err(RestoreError::Exists { path: to.to_owned() }.into()),
            false => Err(damaged(&from)),
        }
    }

    /// What the plan's files hold.
    pub fn contents(&self, plan: &Plan) -> Vec<(PathBuf, Vec<u8>)> {
        let content = |copy: &Copy| Some((copy.to.clone(), self.contents.get(&copy.file)?.clone()));
        plan.copies.iter().filter_map(content).collect()
    }
}

/// What a file beside the disks is, by its name, and of a part of a TPM's state where it lay.
fn role_of(name: &str) -> Option<(Role, Option<String>)> {
    let role = match name {
        DESCRIPTION => Role::Domain,
        VARIABLES => Role::Nvram,
        "kernel" => Role::Kernel,
        "initrd" => Role::Initrd,
        name if name.starts_with("network-") => Role::Network,
        name => {
            let (folder, file) = name.strip_prefix("tpm-")?.split_once('-')?;
            return Some((Role::Tpm, Some(format!("/{folder}/{file}"))));
        }
    };
    Some((role, None))
}

fn damaged(path: &Path) -> DeployError {
    DeployError::Damaged { path: path.to_owned() }
}

/// Whether a path that a description names may become an image: it comes with the image, from wherever.
fn takes_images(path: &Path) -> bool {
    let plain = path.components().skip(1);
    let is_plain = path.is_absolute()
        && plain.clone().all(|part| matches!(part, std::path::Component::Normal(_)));
    // Where links lead counts.
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    let is_closed = |folder: &Path| {
        folder == Path::new("/") || CLOSED.iter().any(|closed| folder.starts_with(closed))
    };
    is_plain && folder.is_some_and(|folder| !is_closed(&folder))
}

/// A file of the image that is no disk.
fn read_checked(image: &Image, file: &OtherFile) -> Result<Vec<u8>, DeployError> {
    let path = image.folder().join(&file.file);
    let mut bytes = Vec::new();
    let read = image.open_file(&file.file)?.take(FILE_LEN_MAX + 1).read_to_end(&mut bytes);
    read.map_err(ImageError::file("read", &path))?;
    match bytes.len() as u64 <= FILE_LEN_MAX && sums::sha256(&bytes) == file.sha256 {
        true => Ok(bytes),
        false => Err(damaged(&path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_tpm_are_told_by_their_names() {
        let tpm = Some((Role::Tpm, Some("/tpm2/tpm2-00.permall".to_owned())));
        assert_eq!(role_of("tpm-tpm2-tpm2-00.permall"), tpm);
        assert_eq!(role_of("network-default.xml"), Some((Role::Network, None)));
        assert_eq!(role_of("nvram.fd"), Some((Role::Nvram, None)));
        for other in ["pool-default.xml", "domain-live.xml", "tpm-", "notes"] {
            assert_eq!(role_of(other), None, "{other}");
        }
    }

    #[test]
    fn s15_a_description_from_outside_puts_nothing_among_the_hosts_own_files() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        assert!(takes_images(&folder.path().join("web.qcow2")));
        std::os::unix::fs::symlink("/etc", folder.path().join("link")).unwrap();
        for bad in ["link/web", "missing/web.qcow2", "a/../web.qcow2"] {
            assert!(!takes_images(&folder.path().join(bad)), "{bad}");
        }
        for bad in ["/etc/cron.d/web", "/web.qcow2", "web.qcow2", "/usr/lib/web", "/proc/1/mem", ""]
        {
            assert!(!takes_images(Path::new(bad)), "{bad}");
        }
    }
}
