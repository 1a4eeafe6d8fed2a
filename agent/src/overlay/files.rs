//! Overlay files: made private, with room ahead, and deleted only when nothing needs them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::record::{DiskRecord, FileMark};
use super::{OverlayError, at_rest};
use crate::capture::image::Use;
use crate::capture::room;
use crate::effect;
use crate::names::{DiskName, RunId};

/// Room in bytes for what the guest writes to one disk, unless the user says otherwise.
pub const RESERVE: u64 = 1 << 30;

/// Where the overlay of a disk goes: the configured folder, else beside the image.
///
/// # Errors
/// [`OverlayError::NoImage`] where there is no such place.
pub fn place(
    folder: Option<&Path>,
    base: &Path,
    id: &RunId,
    disk: &DiskName,
) -> Result<PathBuf, OverlayError> {
    let beside = || base.parent().filter(|_| base.is_absolute());
    let folder = folder.or_else(beside).ok_or_else(|| OverlayError::NoImage { disk: disk.clone() });
    Ok(folder?.join(format!("kvmsnap-{id}-{disk}.qcow2")))
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
    let path = &disk.overlay;
    match is_ours(disk)? {
        None => return Ok(()),
        Some(false) => return Err(OverlayError::Replaced { overlay: path.clone() }),
        Some(true) => {}
    }
    if disk.overlay_image().image().used()? != Use::None {
        let by = "a process that has it open".to_owned();
        return Err(OverlayError::StillNamed { overlay: path.clone(), by });
    }
    let failed = |source| OverlayError::File { step: "delete", path: path.clone(), source };
    effect::about_to("overlay: delete").map_err(failed)?;
    fs::remove_file(path).and_then(|()| sync_folder(path)).map_err(failed)
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
    use crate::overlay::at_rest::LocalImage;
    use crate::overlay::record::Stage;

    fn disk(overlay: &Path) -> DiskRecord {
        DiskRecord {
            disk: "vda".parse().unwrap(),
            base: LocalImage { path: "/base".into(), format: "raw".into() },
            size: 1 << 20,
            overlay: overlay.to_owned(),
            overlay_format: "qcow2".to_owned(),
            made: None,
            still: None,
            stage: Stage::Above,
            limits: None,
        }
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
}
