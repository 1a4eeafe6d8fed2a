//! Overlay files: made private, with room ahead, and deleted only when nothing needs them.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};

use super::at_rest::LocalImage;
use super::record::{DiskRecord, FileMark};
use super::{OverlayError, at_rest};
use crate::capture::image::{Use, keeps_locks};
use crate::capture::place::{beside, is_device};
use crate::capture::room::room;
use crate::effect;
use crate::names::{DiskName, RunId};

/// Room in bytes for what the guest writes to one disk, unless the user says otherwise.
pub const RESERVE: u64 = 1 << 30;

/// `RAMFS_MAGIC` of Linux (`linux/magic.h`); `devtmpfs` is a `tmpfs`, or this.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Where the overlay of a disk goes: the configured folder, else beside the image.
///
/// # Errors
/// [`OverlayError::NoImage`], [`OverlayError::OnDevice`] where there is no such place.
pub fn place(
    folder: Option<&Path>,
    base: &Path,
    id: &RunId,
    disk: &DiskName,
) -> Result<PathBuf, OverlayError> {
    let folder = match folder.or_else(|| beside(base)) {
        Some(folder) => folder,
        None if is_device(base) => {
            return Err(OverlayError::OnDevice { disk: disk.clone(), device: base.to_owned() });
        }
        None => return Err(OverlayError::NoImage { disk: disk.clone() }),
    };
    Ok(folder.join(format!("kvmsnap-{id}-{disk}.qcow2")))
}

/// Makes sure that a restart of the host leaves an overlay, where it leaves the image. One that does not
/// stay for long is only warned of, unless it would be among the devices.
///
/// # Errors
/// [`OverlayError::InMemory`].
pub fn check_lasts(
    overlay: &Path,
    base: &Path,
    disk: &DiskName,
    stays: bool,
) -> Result<(), OverlayError> {
    let folder = overlay.parent().unwrap_or(overlay);
    // What cannot be looked at cannot be made there either.
    let kind = statfs(folder).map(|stat| stat.filesystem_type());
    let is_memory = kind.is_ok_and(|kind| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind));
    let system = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    let goes_with_base = !is_device(base) && system(base) == system(folder);
    if !is_memory || goes_with_base {
        return Ok(());
    }
    let in_memory = OverlayError::InMemory { disk: disk.clone(), folder: folder.to_owned() };
    if stays || system(folder) == system(Path::new("/dev")) {
        return Err(in_memory);
    }
    tracing::warn!("{in_memory}");
    Ok(())
}

/// Makes an overlay, with its room, for QEMU's user. Returns the file as it was made.
///
/// # Errors
/// [`OverlayError`]; the file may be there.
pub async fn make(
    disk: &DiskRecord,
    owner: Option<(u32, u32)>,
    reserve: u64,
) -> Result<Option<FileMark>, OverlayError> {
    let path = &disk.overlay;
    let failed = |step| move |source| OverlayError::File { step, path: path.clone(), source };
    effect::about_to("overlay: create").map_err(failed("make"))?;
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(failed("make"))?;
    match at_rest::make(path, &disk.base, disk.size).await {
        // A tool says in words what only a file system means by a number.
        Err(_) if room(&file).is_some_and(|(free, _)| free == 0) => {
            return Err(no_room(path, &file));
        }
        made => made?,
    }
    reserve_room(path, &file, reserve.min(disk.size))?;
    if let Some((user, group)) = owner {
        chown(path, Some(user), Some(group)).map_err(failed("give to QEMU's user"))?;
    }
    file.sync_all().and_then(|()| sync_folder(path)).map_err(failed("make durable"))?;
    FileMark::of(path).map_err(failed("look at"))
}

/// Takes room beyond the end of a file, which grows into it; what is not used goes with the file.
fn reserve_room(path: &Path, file: &File, len: u64) -> Result<(), OverlayError> {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let failed =
        |source| OverlayError::File { step: "reserve room for", path: path.to_owned(), source };
    let end = file.metadata().map_err(failed)?.len();
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, signed(end), signed(len.max(1))) {
        // A file system that cannot do so is asked how much there is.
        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
        Err(Errno::ENOSPC | Errno::EDQUOT) => return Err(no_room(path, file)),
        Err(errno) => return Err(failed(errno.into())),
    }
    match room(file) {
        Some((free, kept)) if free < kept => Err(no_room(path, file)),
        _ => Ok(()),
    }
}

fn no_room(path: &Path, file: &File) -> OverlayError {
    let folder = path.parent().unwrap_or(path).to_owned();
    OverlayError::NoRoom { folder, free: room(file).map_or(0, |(free, _)| free) }
}

/// The room around an image that grows while an overlay is written into it.
#[derive(Debug)]
pub struct Growth {
    image: File,
    folder: PathBuf,
    /// Blocks that it had before.
    blocks: u64,
}

impl Growth {
    /// From now on; `None` for a block device, and where nobody can look.
    pub fn of(image: &Path) -> Option<Self> {
        let folder = image.parent().unwrap_or(image).to_owned();
        let image = File::open(image).ok()?;
        let metadata = image.metadata().ok().filter(Metadata::is_file)?;
        Some(Self { image, folder, blocks: metadata.blocks() })
    }

    /// Makes sure that the image leaves room: the overlay beside it gives none back before its end. One
    /// that does not grow may be written to on a full file system too.
    ///
    /// # Errors
    /// [`OverlayError::BaseGrows`].
    pub fn check(&self, disk: &DiskName) -> Result<(), OverlayError> {
        let grows = self.image.metadata().is_ok_and(|now| now.blocks() > self.blocks);
        match room(&self.image) {
            Some((free, kept)) if grows && free < kept => {
                let (disk, folder) = (disk.clone(), self.folder.clone());
                Err(OverlayError::BaseGrows { disk, folder, free })
            }
            _ => Ok(()),
        }
    }
}

/// A file as it is now; `None` where there is none, and for a block device.
///
/// # Errors
/// [`OverlayError::File`].
pub fn mark(path: &Path) -> Result<Option<FileMark>, OverlayError> {
    match FileMark::of(path) {
        Ok(now) => Ok(now),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(OverlayError::File { step: "look at", path: path.to_owned(), source }),
    }
}

/// Whether two paths lead to one file: QEMU may have been told of it by a link or from another folder.
pub fn is_same(one: &Path, other: &Path) -> bool {
    let found = |path: &Path| fs::canonicalize(path).ok();
    one == other || found(one).is_some_and(|found_one| found(other) == Some(found_one))
}

/// Whether the file with the overlay's name is the one that was made; `None` where there is none.
///
/// # Errors
/// [`OverlayError::File`].
pub fn is_ours(disk: &DiskRecord) -> Result<Option<bool>, OverlayError> {
    // Without a mark it was being made.
    let is_it = |now| disk.made.is_none_or(|made| made.is_same_file(&now));
    Ok(mark(&disk.overlay)?.map(is_it))
}

/// Whether the guest never wrote to an overlay: it is as it was made. QEMU gets it only once its mark is
/// recorded.
///
/// # Errors
/// [`OverlayError::File`].
pub fn is_untouched(disk: &DiskRecord) -> Result<bool, OverlayError> {
    Ok(disk.made.is_none() || mark(&disk.overlay)? == disk.made)
}

/// Deletes an overlay that nothing names. One that a process has open, or another file of its name, stays.
/// Idempotent.
///
/// # Errors
/// [`OverlayError::StillNamed`], [`OverlayError::Replaced`], [`OverlayError::File`].
pub fn delete(disk: &DiskRecord) -> Result<(), OverlayError> {
    put_back(disk)?;
    let path = &disk.overlay;
    match is_ours(disk)? {
        None => return Ok(()),
        Some(false) => return Err(OverlayError::Replaced { overlay: path.clone() }),
        Some(true) => {}
    }
    // Whoever would open it from here on does not find it, so that nobody can between look and deed.
    let aside = aside(path);
    let failed = |step| move |source| OverlayError::File { step, path: path.clone(), source };
    effect::about_to("overlay: put aside").map_err(failed("put aside"))?;
    fs::rename(path, &aside).map_err(failed("put aside"))?;
    let user = user(&aside, disk).and_then(|user| match user {
        None => Ok(()),
        Some(by) => Err(OverlayError::StillNamed { overlay: path.clone(), by }),
    });
    if let Err(used) = user {
        put_back(disk)?;
        return Err(used);
    }
    effect::about_to("overlay: delete").map_err(failed("delete"))?;
    fs::remove_file(&aside).and_then(|()| sync_folder(path)).map_err(failed("delete"))
}

/// Gives an overlay its name again that a killed purge had put aside. Idempotent.
///
/// # Errors
/// [`OverlayError::File`].
pub fn put_back(disk: &DiskRecord) -> Result<(), OverlayError> {
    let path = &disk.overlay;
    let aside = aside(path);
    if mark(&aside)?.is_none() || mark(path)?.is_some() {
        return Ok(());
    }
    let failed = |source| OverlayError::File { step: "put back", path: path.clone(), source };
    fs::rename(&aside, path).and_then(|()| sync_folder(path)).map_err(failed)
}

/// The name that an overlay has just before it is deleted.
fn aside(overlay: &Path) -> PathBuf {
    let name = overlay.file_name().unwrap_or_default().to_string_lossy();
    overlay.with_file_name(format!(".kvmsnap-purged-{name}"))
}

/// Which process uses an overlay, in words, where one does or may.
fn user(aside: &Path, disk: &DiskRecord) -> Result<Option<String>, OverlayError> {
    let failed = |source| OverlayError::File { step: "look at", path: aside.to_owned(), source };
    let overlay = LocalImage { path: aside.to_owned(), ..disk.overlay_image() };
    Ok(if overlay.image().used()? != Use::None {
        Some("a process that has it open".to_owned())
    } else if let Some(pid) = opened_by(aside).map_err(failed)?.first() {
        Some(format!("the process {pid}, which has it open,"))
    } else if !keeps_locks(aside).map_err(failed)? {
        Some("perhaps a process of another host, for its file system keeps no locks,".to_owned())
    } else {
        None
    })
}

/// The processes of this host that have a file open, whether or not they lock it.
///
/// # Errors
/// The system's.
pub fn opened_by(path: &Path) -> io::Result<Vec<i32>> {
    let path = fs::canonicalize(path)?;
    let same = |meta: &Metadata| (meta.dev(), meta.ino());
    let wanted = same(&fs::metadata(&path)?);
    let mut found = Vec::new();
    for process in fs::read_dir("/proc")? {
        let process = process?;
        let Ok(pid) = process.file_name().to_string_lossy().parse() else { continue };
        // One may end meanwhile.
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        let has = |file: &Path| {
            // Files of other names may lie where nobody answers.
            fs::read_link(file).is_ok_and(|to| to.file_name() == path.file_name())
                && fs::metadata(file).is_ok_and(|meta| same(&meta) == wanted)
        };
        if files.flatten().any(|file| has(&file.path())) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Has what was written to an image be there after a power cut.
///
/// # Errors
/// [`OverlayError::File`].
pub fn make_durable(path: &Path) -> Result<(), OverlayError> {
    let failed =
        |source| OverlayError::File { step: "make durable", path: path.to_owned(), source };
    effect::about_to("image: make durable").map_err(failed)?;
    File::open(path).and_then(|file| file.sync_all()).map_err(failed)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().expect("an overlay lies in a folder"))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(overlay: &Path) -> DiskRecord {
        let base = LocalImage { path: "/base".into(), format: "raw".into() };
        DiskRecord::new("vda".parse().unwrap(), base, 1 << 20, overlay.to_owned())
    }

    #[test]
    fn r23_a_file_that_took_the_overlays_name_is_never_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overlay");
        fs::write(&path, "overlay").unwrap();
        let mut disk = disk(&path);
        disk.made = FileMark::of(&path).unwrap();
        let other = folder.path().join("other");
        fs::write(&other, "other").unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(matches!(delete(&disk), Err(OverlayError::Replaced { .. })));
        assert!(path.exists());
        disk.made = FileMark::of(&path).unwrap();
        delete(&disk).unwrap();
        assert!(!path.exists());
        delete(&disk).unwrap();
    }

    #[test]
    fn r23_a_file_that_a_process_has_open_is_never_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = disk(&folder.path().join("overlay"));
        fs::write(&disk.overlay, "overlay").unwrap();
        disk.made = FileMark::of(&disk.overlay).unwrap();
        // It locks nothing.
        let open = File::open(&disk.overlay).unwrap();
        let refused = delete(&disk).unwrap_err();
        assert!(matches!(refused, OverlayError::StillNamed { .. }), "{refused}");
        assert_eq!(mark(&disk.overlay).unwrap(), disk.made);
        drop(open);
        delete(&disk).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn r01_an_overlay_that_a_killed_purge_put_aside_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = disk(&folder.path().join("overlay"));
        fs::write(aside(&disk.overlay), "overlay").unwrap();
        disk.made = FileMark::of(&aside(&disk.overlay)).unwrap();
        put_back(&disk).unwrap();
        assert_eq!(is_ours(&disk).unwrap(), Some(true));
        // Never over another file of its name.
        fs::write(aside(&disk.overlay), "other").unwrap();
        put_back(&disk).unwrap();
        assert_eq!(is_ours(&disk).unwrap(), Some(true));
    }

    #[test]
    fn an_overlay_that_was_written_to_is_told_from_one_that_was_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = disk(&folder.path().join("overlay"));
        assert!(is_untouched(&disk).unwrap(), "it was never made");
        fs::write(&disk.overlay, "empty").unwrap();
        disk.made = FileMark::of(&disk.overlay).unwrap();
        assert!(is_untouched(&disk).unwrap());
        fs::write(&disk.overlay, "written").unwrap();
        assert!(!is_untouched(&disk).unwrap());
        fs::remove_file(&disk.overlay).unwrap();
        assert!(!is_untouched(&disk).unwrap(), "what was in it is not known");
    }

    /// A block device of this host.
    fn device() -> Option<PathBuf> {
        let mut found = fs::read_dir("/dev").unwrap().map(|entry| entry.unwrap().path());
        found.find(|path| is_device(path))
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    fn r23_an_overlay_is_never_made_among_the_devices() {
        let (id, disk) = (RunId::random(), "vda".parse().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let Some(device) = device() else {
            eprintln!("skipped: no block device in /dev");
            return;
        };
        let refused = place(None, &device, &id, &disk).unwrap_err();
        assert!(matches!(refused, OverlayError::OnDevice { .. }), "{refused}");
        assert!(refused.hint().unwrap().contains("--overlay-dir"));
        let overlay = place(Some(folder.path()), &device, &id, &disk).unwrap();
        assert_eq!(overlay.parent(), Some(folder.path()));
        let named = place(Some(Path::new("/dev")), &device, &id, &disk).unwrap();
        let refused = check_lasts(&named, &device, &disk, false).unwrap_err();
        assert!(matches!(refused, OverlayError::InMemory { .. }), "{refused}");
    }

    #[test]
    fn r23_an_overlay_that_stays_is_not_kept_in_memory() {
        let disk = "vda".parse().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        fs::write(&base, "image").unwrap();
        let in_memory = Path::new("/dev/shm/overlay");
        let refused = check_lasts(in_memory, &base, &disk, true).unwrap_err();
        assert!(matches!(refused, OverlayError::InMemory { .. }), "{refused}");
        check_lasts(in_memory, &base, &disk, false).unwrap();
        // Beside the image it lasts as long as that.
        check_lasts(&folder.path().join("overlay"), &base, &disk, true).unwrap();
        let both = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        check_lasts(in_memory, both.path(), &disk, true).unwrap();
    }
}
