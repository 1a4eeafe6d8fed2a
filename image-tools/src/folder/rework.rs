//! An image whose disks are changed: away from its name meanwhile, so that no half changed one has it.
//!
//! ```text
//! web/ .web.update/                 what will be written is made ready beside the image
//! .web.update/{image,next.json}     it is written; a killed process leaves this, and the next one goes on
//! web/
//! ```

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::{
    Image, RECORD_LEN_MAX, TRIES, is_at, lock_now, open_folder, open_regular, rename_new,
    sync_folder, unlock,
};
use crate::error::ImageError;
use crate::record::ImageRecord;

/// What is behind the name of the folder beside an image.
pub(super) const WORK: &str = ".update";
/// The image, in the folder beside its place.
const IMAGE: &str = "image";
/// What its record will say, but for the checksums.
const NEXT: &str = "next.json";

/// The folder beside an image in which its change is prepared, locked.
#[derive(Debug)]
pub struct Rework {
    work: PathBuf,
    target: PathBuf,
    lock: File,
}

impl Rework {
    #[cfg(test)]
    pub(super) fn lock(&self) -> &File {
        &self.lock
    }

    /// Goes on with what another process has begun, or begins. [`Self::is_under_way`] tells which.
    ///
    /// # Errors
    /// [`ImageError::Busy`], [`ImageError::File`].
    pub fn begin(target: &Path) -> Result<Self, ImageError> {
        let work = folder_of(target)?;
        for _ in 0..TRIES {
            match DirBuilder::new().mode(0o700).create(&work) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(ImageError::file("make", work)(error));
                }
                _ => {}
            }
            let lock = match open_folder(&work) {
                Err(ImageError::File { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    continue;
                }
                opened => opened?,
            };
            lock_now(&lock, target)?;
            if is_at(&lock, &work) {
                return Ok(Self { work, target: target.to_owned(), lock });
            }
        }
        Err(ImageError::Busy { path: target.to_owned() })
    }

    /// Whether the change of an image was begun and not finished.
    pub fn is_interrupted(target: &Path) -> bool {
        folder_of(target).is_ok_and(|work| work.join(IMAGE).is_dir())
    }

    /// Whether the image is away from its name: what was made ready must be written.
    pub fn is_under_way(&self) -> bool {
        self.work.join(IMAGE).is_dir()
    }

    /// An empty folder for what is made ready.
    ///
    /// # Errors
    /// [`ImageError::File`].
    pub fn prepare(&self) -> Result<PathBuf, ImageError> {
        let folder = self.ready();
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(ImageError::file("remove", folder)(error));
            }
            _ => {}
        }
        fs::create_dir(&folder).map_err(ImageError::file("make", &folder))?;
        Ok(folder)
    }

    /// Where that is.
    pub fn ready(&self) -> PathBuf {
        self.work.join("ready")
    }

    /// Makes durable what was made ready, and takes the image away from its name.
    ///
    /// # Errors
    /// [`ImageError`]; the image is as it was.
    pub fn take(&self, next: &ImageRecord) -> Result<(), ImageError> {
        let ready = self.ready();
        for entry in fs::read_dir(&ready).map_err(ImageError::file("list", &ready))? {
            let path = entry.map_err(ImageError::file("list", &ready))?.path();
            let synced = open_regular(&path)?.sync_all();
            synced.map_err(ImageError::file("make durable", path))?;
        }
        sync_folder(&ready)?;
        let path = self.work.join(NEXT);
        let text = serde_json::to_vec_pretty(next).expect("a record is plain data");
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        });
        written.map_err(ImageError::file("write", path))?;
        sync_folder(&self.work)?;
        let renamed = rename_new(&self.target, &self.work.join(IMAGE));
        renamed.map_err(ImageError::file("take away", &self.target))?;
        sync_folder(&self.work)?;
        sync_folder(parent(&self.target))
    }

    /// The image that was taken away, with the record that it had.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn image(&self) -> Result<Image, ImageError> {
        Image::open(&self.work.join(IMAGE))
    }

    /// What its record will say, but for the checksums.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn next(&self) -> Result<ImageRecord, ImageError> {
        let path = self.work.join(NEXT);
        let mut text = Vec::new();
        let read = open_regular(&path)?.take(RECORD_LEN_MAX).read_to_end(&mut text);
        read.map_err(ImageError::file("read", &path))?;
        ImageRecord::parse(&text).map_err(|source| ImageError::Record { path, source })
    }

    /// Gives the image its name again.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn give_back(self, record: ImageRecord) -> Result<Image, ImageError> {
        let mut image = self.image()?;
        image.change(|now| *now = record)?;
        let renamed = rename_new(&self.work.join(IMAGE), &self.target);
        renamed.map_err(ImageError::file("give its name to", &self.target))?;
        sync_folder(&self.work)?;
        sync_folder(parent(&self.target))?;
        Image::open(&self.target)
    }
}

impl Drop for Rework {
    fn drop(&mut self) {
        if !self.is_under_way() && is_at(&self.lock, &self.work) {
            // Under the lock. What cannot be removed goes with the next try. Never all that is there: should
            // the image be in it after all, it stays.
            let _ = fs::remove_dir_all(self.ready());
            let _ = fs::remove_file(self.work.join(NEXT));
            let _ = fs::remove_dir(&self.work);
        }
        unlock(&self.lock);
    }
}

fn folder_of(target: &Path) -> Result<PathBuf, ImageError> {
    match target.file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok(target.with_file_name(format!(".{name}{WORK}"))),
        None => Err(ImageError::Name { path: target.to_owned() }),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
