//! An image that was made from a template is brought up to date again: only what changed is written.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use image_tools::folder::Image;
use image_tools::folder::rework::Rework;
use image_tools::record::{ImageRecord, Origin};
use image_tools::{ImageError, copy};
use jiff::Timestamp;

use super::get::announce;
use super::update::{
    CHANGES, Layer, UpdateImageError, Updated, Wanted, allocated, bring_up_to_date, check_sound,
    lay_over, machine, origin,
};
use crate::progress::Progress;
use crate::store::blocking;

/// Brings the image at `folder` up to date. Until its disks are written to, it stays as it was; from then
/// on it has its name only when it is whole, and whoever comes next goes on with what was interrupted.
///
/// # Errors
/// [`UpdateImageError`].
pub async fn again(
    folder: &Path,
    wanted: &Wanted,
    progress: &Progress,
) -> Result<Updated, UpdateImageError> {
    // Links and `..` would lead to another folder beside it.
    let folder = folder.canonicalize().map_err(ImageError::file("find", folder))?;
    announce("update: begin", "work beside", &folder)?;
    let rework = Rework::begin(&folder)?;
    let image = Image::open(&folder)?;
    if !matches!(image.record().origin, Origin::Update { .. }) {
        return Err(UpdateImageError::Template { folder });
    }
    check_sound(&image, progress).await?;
    let ready = rework.prepare()?;
    let layers = lay_over(&image, &ready).await?;
    let log = ready.join(CHANGES);
    let (report, flavour) = bring_up_to_date(&layers, &image, wanted, &log, progress).await?;
    let written = allocated(&layers)?;
    let next = ImageRecord {
        machine: machine(wanted, &report, &image.record().machine),
        time: Timestamp::now(),
        origin: origin(&image, wanted),
        flavour: Some(flavour),
        boot: None,
        ..image.record().clone()
    };
    announce("update: take", "take away", &folder)?;
    rework.take(&next)?;
    let image = write_back(&folder, rework, progress).await?;
    Ok(Updated { image, report, written })
}

/// Finishes the update of the image at `folder` that was interrupted, where there is one.
///
/// # Errors
/// [`UpdateImageError`]; it can be tried again.
pub async fn finish(folder: &Path, progress: &Progress) -> Result<(), UpdateImageError> {
    if !Rework::is_interrupted(folder) {
        return Ok(());
    }
    let rework = Rework::begin(folder)?;
    if rework.is_under_way() {
        let name = folder.display();
        tracing::warn!("{name}: an earlier update was interrupted, and is finished first");
        write_back(folder, rework, progress).await?;
    }
    Ok(())
}

/// Writes what was made ready into the image, and gives it its name. May be done again.
async fn write_back(
    folder: &Path,
    rework: Rework,
    progress: &Progress,
) -> Result<Image, UpdateImageError> {
    let unfinished = |source| UpdateImageError::Unfinished { folder: folder.to_owned(), source };
    write_all(rework, progress).await.map_err(unfinished)
}

async fn write_all(rework: Rework, progress: &Progress) -> Result<Image, ImageError> {
    let (image, mut next, ready) = (rework.image()?, rework.next()?, rework.ready());
    for disk in &mut next.disks {
        let layer = Layer {
            base: image.record().disk_path(image.folder(), disk),
            overlay: ready.join(&disk.file),
        };
        announce("update: write", "write", &layer.base)?;
        progress.bytes(&format!("writing {}", disk.target), disk.size);
        let size = disk.size;
        let mut percent = |done: f64| progress.reach((size as f64 * done / 100.0) as u64);
        copy::write_back(&layer.overlay, &layer.base, size, &mut percent).await?;
        progress.bytes(&format!("checksums of {}", disk.target), disk.file_len);
        let (base, target, progress) = (layer.base, disk.target.clone(), progress.clone());
        let seal = move || copy::seal(&base, &target, |bytes| progress.read(bytes));
        *disk = blocking(seal).await?;
    }
    // By a new name: what is there may be a link.
    let (from, to) = (ready.join(CHANGES), image.folder().join(CHANGES));
    let new = image.folder().join(".changes.partial");
    announce("update: changes", "write", &to)?;
    let put = || -> io::Result<()> {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        io::copy(&mut File::open(&from)?, &mut File::create_new(&new)?)?;
        fs::rename(&new, &to)
    };
    put().map_err(ImageError::file("write", to.clone()))?;
    announce("update: give back", "give its name to", image.folder())?;
    rework.give_back(next)
}
