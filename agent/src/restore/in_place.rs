//! Disks of a domain that is shut off go back to what they were: the new images are restored beside the
//! old ones, then take their names. The old ones stay, under another name.
//!
//! While names change, both images of each disk are locked the way QEMU locks what nobody may write to:
//! a domain that is started in that moment is refused its disks, and starts with all of the new ones a
//! moment later. What is to be done is written down first, so that `doctor` can explain and finish it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use repository::FileId;
use serde::{Deserialize, Serialize};
use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;
use xmltree::Element;

use super::Format;
use super::plan::Place;
use crate::capture::image::{Image, LOCK_NO_WRITERS, Use};
use crate::durable;
use crate::effect;
use crate::hypervisor::libvirt::connection::DomainHandle;
use crate::hypervisor::libvirt::sys as calls;
use crate::hypervisor::libvirt::xml::{self, Backing};
use crate::hypervisor::{DomainAddress, HypervisorError};
use crate::manifest::Manifest;
use crate::names::DiskName;

/// Where the record of a change of names is kept, below the state folder.
const RECORDS: &str = "in-place";
/// What the names of our checkpoints begin with.
const CHECKPOINTS: &str = "kvmsnap-";
/// Digits of a snapshot's id in a folder's name.
const ID_DIGITS: usize = 16;

/// Why disks cannot be restored in place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InPlaceError {
    /// The domain that was backed up is not here.
    #[error("the domain `{domain}` ({uuid}) is not here")]
    NoDomain {
        /// Its name.
        domain: String,
        /// Its uuid.
        uuid: String,
    },
    /// The domain is not shut off.
    #[error("the domain `{domain}` is not shut off")]
    Runs {
        /// Its name.
        domain: String,
    },
    /// The domain would go on with a memory that does not fit the disks.
    #[error("the memory of the domain `{domain}` is saved, and would go on with other disks")]
    Saved {
        /// Its name.
        domain: String,
    },
    /// The domain has no such disk any more.
    #[error("the domain has no disk `{disk}` now")]
    NoDisk {
        /// The disk.
        disk: DiskName,
    },
    /// The image of a disk is none that can be exchanged.
    #[error("the image of `{disk}` is no qcow2 or raw file")]
    NoFile {
        /// The disk.
        disk: DiskName,
    },
    /// An image is in use.
    #[error("the image {} is in use", .image.display())]
    InUse {
        /// The image.
        image: PathBuf,
    },
    /// An earlier run stopped while names were exchanged.
    #[error("an earlier restore in place of this domain did not end")]
    Unfinished,
    /// Overlays would be left above images that are others by then.
    #[error("the domain `{domain}` has overlays, which fit only the images that it has")]
    Overlaid {
        /// Its name.
        domain: String,
    },
    /// A file cannot be made, read or renamed.
    #[error("cannot {step} {}", .path.display())]
    File {
        /// The step, to be read after "cannot".
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A record is no JSON of ours.
    #[error("the record {} cannot be read", .path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// libvirt refused.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
}

impl InPlaceError {
    /// What the user can do next.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NoDomain { .. } => "--to with --define brings the machine back as a new domain",
            Self::Runs { .. } => "`virsh shutdown` ends it, `virsh destroy` at once",
            Self::Saved { .. } => "`virsh managedsave-remove` throws that memory away",
            Self::NoDisk { .. } => "--disk chooses those that it has",
            Self::NoFile { .. } => "--to with --define restores it to a new file",
            Self::InUse { .. } => "nothing was exchanged; another domain or tool has it open",
            Self::Overlaid { .. } => "`kvmsnap purge` writes them back first",
            Self::Unfinished => "`kvmsnap doctor --repair` finishes it",
            _ => return None,
        })
    }
}

/// A disk whose image is to be exchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// The disk.
    pub disk: DiskName,
    /// Its image.
    pub image: PathBuf,
    /// The restored one, beside it.
    pub restored: PathBuf,
    /// What the old one is called afterwards.
    pub before: PathBuf,
}

/// What is to be exchanged. Durable before the first image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The domain's name.
    pub domain: String,
    /// The domain.
    pub address: DomainAddress,
    /// The snapshot.
    pub snapshot: String,
    /// The disks.
    pub disks: Vec<Exchange>,
}

/// A disk that is to be restored.
#[derive(Debug)]
pub struct Wanted {
    /// Its names.
    pub exchange: Exchange,
    /// The format of its image.
    pub format: Format,
    /// Where it is restored first.
    pub place: Place,
    /// Whether the domain's description names what lies beneath the image, which ends with it.
    has_backing: bool,
}

impl Wanted {
    /// Whether an earlier run has restored it whole already.
    pub fn is_restored(&self) -> bool {
        self.exchange.restored.exists()
    }
}

/// Looks at the domain and says what is to be restored where. Changes nothing. `suffix` is what the
/// names of old images end with.
///
/// # Errors
/// [`InPlaceError`] where this domain or a disk of it must not be touched.
pub async fn look(
    handle: &DomainHandle,
    snapshot: &FileId,
    manifest: &Manifest,
    disks: &[DiskName],
    suffix: &str,
) -> Result<Vec<Wanted>, InPlaceError> {
    let (domain, uuid) = (manifest.domain.to_string(), manifest.uuid.clone());
    let ask = |domain: &Domain| {
        let (saved, snapshots) = (domain.has_managed_save(0)?, domain.num_snapshots(0)?);
        let description = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
        Ok((domain.is_active()?, saved, snapshots, description))
    };
    let (is_active, is_saved, snapshots, description) =
        match handle.ask("describe the domain", ask).await {
            Err(HypervisorError::Libvirt { source, .. }) if source.is_no_domain() => {
                return Err(InPlaceError::NoDomain { domain, uuid });
            }
            answer => answer?,
        };
    if is_active {
        return Err(InPlaceError::Runs { domain });
    }
    if is_saved {
        return Err(InPlaceError::Saved { domain });
    }
    if snapshots > 0 {
        tracing::warn!("libvirt's own snapshots of `{domain}` stay with the old images");
    }
    let description = xml::read_domain(&xml::parse(&description).map_err(HypervisorError::Xml)?);
    let chosen = manifest.disks.iter().map(|disk| &disk.target);
    let mut wanted = Vec::new();
    for target in chosen.filter(|target| disks.is_empty() || disks.contains(target)) {
        let seen = description.disks.iter().find(|seen| seen.target == target.as_str());
        let seen = seen.ok_or_else(|| InPlaceError::NoDisk { disk: target.clone() })?;
        let no_file = || InPlaceError::NoFile { disk: target.clone() };
        let format = match seen.format.as_str() {
            "qcow2" if !seen.is_encrypted => Format::Qcow2,
            "raw" if !seen.is_encrypted => Format::Raw,
            _ => return Err(no_file()),
        };
        let image = match (&seen.file, &seen.volume) {
            (Some(file), _) => file.clone(),
            (None, Some((pool, volume))) => volume_path(handle, pool, volume).await?,
            (None, None) => return Err(no_file()),
        };
        // The name that is exchanged is that of the file itself. One that is lost may come back.
        let image = fs::canonicalize(&image).unwrap_or(image);
        if image.exists() && !image.is_file() {
            return Err(no_file());
        }
        check_unused(&image)?;
        let id: String = snapshot.to_string().chars().take(ID_DIGITS).collect();
        let folder = image.with_file_name(format!(".kvmsnap-{id}-{target}"));
        let place = Place::new(folder, "restored-".to_owned());
        let exchange = Exchange {
            disk: target.clone(),
            restored: place.disk(target, format),
            before: named_before(&image, suffix),
            image,
        };
        let has_backing = matches!(seen.backing, Backing::Image { .. });
        wanted.push(Wanted { exchange, format, place, has_backing });
    }
    Ok(wanted)
}

async fn volume_path(
    handle: &DomainHandle,
    pool: &str,
    volume: &str,
) -> Result<PathBuf, HypervisorError> {
    let (pool, volume) = (pool.to_owned(), volume.to_owned());
    let find = move |connection: &Connect| {
        let pool = connection.lookup_storage_pool_by_name(&pool)?;
        pool.lookup_storage_vol_by_name(&volume)?.path()
    };
    Ok(handle.libvirt().ask("find the volume of a disk", find).await?.into())
}

fn named_before(image: &Path, suffix: &str) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(format!(".before-{suffix}"));
    name.into()
}

/// Refuses an image that somebody writes to, or that lies beneath the disk of a running guest.
fn check_unused(path: &Path) -> Result<(), InPlaceError> {
    // The format does not matter for how it is used.
    let image = Image::local(path, "raw");
    match path.exists() && image.used()? != Use::None {
        true => Err(InPlaceError::InUse { image: path.to_owned() }),
        false => Ok(()),
    }
}

/// Exchanges the images: all are restored. The domain's checkpoints of ours are void afterwards, and
/// removed.
///
/// # Errors
/// [`InPlaceError`]; what was not exchanged is by [`finish`].
pub async fn exchange(
    handle: &DomainHandle,
    state_dir: &Path,
    snapshot: &FileId,
    domain: &str,
    wanted: &[Wanted],
) -> Result<(), InPlaceError> {
    let with_backing = wanted.iter().filter(|disk| disk.has_backing);
    let with_backing: Vec<DiskName> = with_backing.map(|d| d.exchange.disk.clone()).collect();
    if !with_backing.is_empty() {
        forget_backing(handle, &with_backing).await?;
    }
    let record = Record {
        domain: domain.to_owned(),
        address: handle.address(),
        snapshot: snapshot.to_string(),
        disks: wanted.iter().map(|disk| disk.exchange.clone()).collect(),
    };
    finish(handle, state_dir, &record).await
}

/// Exchanges the images of a record that are not exchanged yet. Idempotent.
///
/// # Errors
/// [`InPlaceError`].
pub async fn finish(
    handle: &DomainHandle,
    state_dir: &Path,
    record: &Record,
) -> Result<(), InPlaceError> {
    let left: Vec<_> = record.disks.iter().filter(|disk| disk.restored.exists()).collect();
    let mut locks = Vec::new();
    for disk in &left {
        locks.extend(lock(&disk.image)?);
        locks.extend(lock(&disk.restored)?);
    }
    // Asked under the locks: whoever starts it from here on does not get them.
    if handle.is_active().await? {
        return Err(InPlaceError::Runs { domain: record.domain.clone() });
    }
    for disk in &left {
        check_unused_but_by_us(&disk.image)?;
    }
    let path = write_record(state_dir, record)?;
    for disk in &left {
        exchange_one(disk)?;
    }
    remove_checkpoints(handle).await?;
    for disk in &record.disks {
        // The folder was ours, and is empty.
        if let Some(folder) = disk.restored.parent() {
            let _ = fs::remove_dir(folder);
        }
    }
    step("forget the record", &path, |path| fs::remove_file(path))
}

/// Takes the lock by which QEMU tells that nobody may write to an image. It goes with the file.
fn lock(path: &Path) -> Result<Option<File>, InPlaceError> {
    if !path.exists() {
        return Ok(None);
    }
    let file = File::open(path);
    let file =
        file.map_err(|source| InPlaceError::File { step: "open", path: path.to_owned(), source })?;
    let lock = libc::flock {
        l_type: libc::F_RDLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: LOCK_NO_WRITERS,
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
        // A file system without locks has none, for QEMU neither.
        Ok(_) | Err(nix::errno::Errno::ENOLCK | nix::errno::Errno::EOPNOTSUPP) => Ok(Some(file)),
        Err(errno) => {
            Err(InPlaceError::File { step: "lock", path: path.to_owned(), source: errno.into() })
        }
    }
}

/// The same under our own lock, which is not that of a writer.
fn check_unused_but_by_us(path: &Path) -> Result<(), InPlaceError> {
    let image = Image::local(path, "raw");
    match path.exists() && image.used()? == Use::Writes {
        true => Err(InPlaceError::InUse { image: path.to_owned() }),
        false => Ok(()),
    }
}

/// Gives the old image a second name, then its name to the new one: at no moment there is none.
fn exchange_one(disk: &Exchange) -> Result<(), InPlaceError> {
    if disk.image.exists() {
        let owner = |path: &Path| {
            let old = fs::metadata(&disk.image)?;
            chown(path, Some(old.uid()), Some(old.gid()))?;
            fs::set_permissions(path, fs::Permissions::from_mode(old.mode() & 0o7777))
        };
        step("give its owner to", &disk.restored, owner)?;
        step("keep the old image as", &disk.before, |before| {
            match fs::hard_link(&disk.image, before) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    // By an earlier run, of the same image: the name holds the time of that run.
                    let same = fs::metadata(before)?.ino() == fs::metadata(&disk.image)?.ino();
                    if same { Ok(()) } else { Err(error) }
                }
                // Some file systems know no second names: then there is a moment without an image.
                Err(error)
                    if error.kind() == io::ErrorKind::PermissionDenied
                        || error.kind() == io::ErrorKind::Unsupported =>
                {
                    fs::rename(&disk.image, before)
                }
                linked => linked,
            }
        })?;
    }
    step("exchange", &disk.image, |image| {
        fs::rename(&disk.restored, image)?;
        File::open(image.parent().unwrap_or(Path::new("/")))?.sync_all()
    })
}

fn step(
    step: &'static str,
    path: &Path,
    work: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), InPlaceError> {
    effect::about_to(&format!("in place: {step}"))
        .and_then(|()| work(path))
        .map_err(|source| InPlaceError::File { step, path: path.to_owned(), source })
}

fn write_record(state_dir: &Path, record: &Record) -> Result<PathBuf, InPlaceError> {
    let folder = state_dir.join(RECORDS);
    let path = folder.join(format!("{}.json", record.address.uuid));
    step("write the record", &path, |path| {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        durable::write_json(path, record)
    })?;
    Ok(path)
}

/// The records of runs that stopped while names were exchanged.
///
/// # Errors
/// [`InPlaceError::File`], [`InPlaceError::Record`].
pub fn unfinished(state_dir: &Path) -> Result<Vec<Record>, InPlaceError> {
    let mut records = Vec::new();
    let entries = match fs::read_dir(state_dir.join(RECORDS)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(records),
        Err(source) => {
            let path = state_dir.join(RECORDS);
            return Err(InPlaceError::File { step: "list", path, source });
        }
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let text = match fs::read(&path) {
                // Its restore has just ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(InPlaceError::File { step: "read", path, source }),
                Ok(text) => text,
            };
            let record = serde_json::from_slice(&text);
            records.push(record.map_err(|source| InPlaceError::Record { path, source })?);
        }
    }
    Ok(records)
}

/// Takes what lies beneath some disks out of the description of a domain, which their images tell too.
async fn forget_backing(handle: &DomainHandle, disks: &[DiskName]) -> Result<(), InPlaceError> {
    let secure = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
    let describe = move |domain: &Domain| domain.xml_desc(secure);
    let description = handle.ask("describe the domain", describe).await?;
    let mut description = xml::parse(&description).map_err(HypervisorError::Xml)?;
    without_backing(&mut description, disks);
    let description = xml::write(&description);
    let define =
        move |domain: &Domain| domain.connect()?.define_domain_xml_flags(&description, 0).map(drop);
    Ok(handle.change("describe the disks of the domain anew", define).await?)
}

fn without_backing(domain: &mut Element, disks: &[DiskName]) {
    let Some(devices) = domain.get_mut_child("devices") else { return };
    let devices = devices.children.iter_mut().filter_map(|node| node.as_mut_element());
    for disk in devices.filter(|device| device.name == "disk") {
        let target = xml::attribute(disk, "target", "dev");
        if disks.iter().any(|wanted| Some(wanted.as_str()) == target) {
            disk.take_child("backingStore");
        }
    }
}

/// What libvirt knows of our checkpoints is void: their dirty bitmaps are in the old images.
async fn remove_checkpoints(handle: &DomainHandle) -> Result<(), InPlaceError> {
    let list = |domain: &Domain| calls::checkpoints(domain, false);
    for (name, _) in handle.ask("list the checkpoints", list).await? {
        if name.starts_with(CHECKPOINTS) {
            let forget = move |domain: &Domain| calls::checkpoint_delete(domain, &name, true);
            handle.change("forget a checkpoint", forget).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(folder: &Path) -> Exchange {
        let image = folder.join("a.qcow2");
        let restored = folder.join(".kvmsnap-1-vda/restored-vda.qcow2");
        fs::create_dir(restored.parent().unwrap()).unwrap();
        fs::write(&image, "old").unwrap();
        fs::write(&restored, "new").unwrap();
        let before = named_before(&image, "1");
        Exchange { disk: "vda".parse().unwrap(), image, restored, before }
    }

    #[test]
    fn p5_the_old_image_keeps_another_name_and_the_mode_goes_over() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path());
        fs::set_permissions(&disk.image, fs::Permissions::from_mode(0o640)).unwrap();

        exchange_one(&disk).unwrap();

        assert_eq!(fs::read_to_string(&disk.image).unwrap(), "new");
        assert_eq!(fs::read_to_string(&disk.before).unwrap(), "old");
        assert_eq!(fs::metadata(&disk.image).unwrap().mode() & 0o777, 0o640);
        assert!(!disk.restored.exists());
    }

    #[test]
    fn r24_an_exchange_goes_on_where_it_was_killed() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path());
        fs::hard_link(&disk.image, &disk.before).unwrap();

        exchange_one(&disk).unwrap();

        assert_eq!(fs::read_to_string(&disk.image).unwrap(), "new");
        assert_eq!(fs::read_to_string(&disk.before).unwrap(), "old");
    }

    #[test]
    fn p5_somebody_elses_file_is_never_taken_for_the_old_image() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path());
        fs::write(&disk.before, "somebody's").unwrap();

        let refused = exchange_one(&disk).unwrap_err();

        assert!(refused.to_string().starts_with("cannot keep the old image as"), "{refused}");
        assert_eq!(fs::read_to_string(&disk.image).unwrap(), "old");
        assert_eq!(fs::read_to_string(&disk.before).unwrap(), "somebody's");
    }

    #[test]
    fn a_locked_image_is_used_and_the_lock_goes_with_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path());
        let held = lock(&disk.image).unwrap();
        let refused = check_unused(&disk.image).unwrap_err();
        assert!(matches!(refused, InPlaceError::InUse { .. }), "{refused}");
        drop(held);
        check_unused(&disk.image).unwrap();
    }

    #[test]
    fn what_was_begun_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(unfinished(folder.path()).unwrap(), []);
        let record = Record {
            domain: "web".to_owned(),
            address: DomainAddress { uri: "qemu:///system".to_owned(), uuid: "u".to_owned() },
            snapshot: "0a".to_owned(),
            disks: vec![disk(folder.path())],
        };
        write_record(folder.path(), &record).unwrap();
        assert_eq!(unfinished(folder.path()).unwrap(), [record]);
    }

    #[test]
    fn only_the_chosen_disks_forget_what_lies_beneath() {
        let mut domain = xml::parse(
            "<domain><devices>\
             <disk><target dev='vda'/><backingStore type='file'/></disk>\
             <disk><target dev='vdb'/><backingStore type='file'/></disk></devices></domain>",
        )
        .unwrap();
        without_backing(&mut domain, &["vda".parse().unwrap()]);
        assert_eq!(xml::write(&domain).matches("backingStore").count(), 1);
    }
}
