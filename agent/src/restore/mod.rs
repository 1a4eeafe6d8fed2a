//! From a snapshot back to disk images: under a temporary name, checked, durable, and only then under
//! the final one. Nothing that exists is ever written over.

pub mod define;
mod devices;
mod direct;
pub mod files;
mod fill;
pub mod host;
pub mod in_place;
pub mod partial;
pub mod plan;
mod qcow2;
mod raw;
mod resume;

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use repository::{DiskReader, Index, Reader, Repository, RepositoryError};

use self::fill::Target;
use self::partial::Partial;
use self::plan::Place;
use crate::catalog::{Backup, Catalog, CatalogError, disk_file, take_content};
use crate::effect;
use crate::manifest::DiskManifest;
use crate::names::DiskName;
use crate::progress::Progress;

/// The record of the backup, beside the restored disks.
const MANIFEST: &str = "manifest.json";
/// Memory for chunks that are read more than once.
const CACHE_LEN: usize = 32 << 20;

/// What a restored disk looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// QEMU's format.
    Qcow2,
    /// The bytes themselves, sparse.
    Raw,
}

impl Format {
    /// The file's extension, and QEMU's name of the format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// Why a restore stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The repository failed, or a chunk is damaged.
    #[error("cannot read the backup")]
    Repository(#[from] RepositoryError),
    /// The snapshot's parts cannot be found.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A file is there already.
    #[error("{} exists already", .path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The target cannot be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The disks do not fit.
    #[error("{} has {free} bytes left, up to {needed} are needed", .folder.display())]
    NoRoom {
        /// The folder.
        folder: PathBuf,
        /// Bytes left in it.
        free: u64,
        /// Bytes of the disks' data.
        needed: u64,
    },
    /// A whole disk cannot be given its final name.
    #[error("the restored {} cannot be renamed to {}", .from.display(), .to.display())]
    Rename {
        /// The whole disk; it stays.
        from: PathBuf,
        /// Its final name.
        to: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The snapshot has no such disk.
    #[error("the snapshot has no disk `{disk}`")]
    UnknownDisk {
        /// What was asked for.
        disk: DiskName,
    },
    /// Somebody else restores the same disk of the same snapshot to the same place.
    #[error("another restore is writing {}", .path.display())]
    Busy {
        /// The file that it will be.
        path: PathBuf,
    },
    /// The user or the system asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl RestoreError {
    /// What the user can do next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Exists { .. } => Some(
                "nothing is ever written over: choose another folder, or name with --disk those that are not there",
            ),
            Self::NoRoom { .. } => Some("choose another folder, or one disk at a time with --disk"),
            Self::UnknownDisk { .. } => Some("`kvmsnap show` names its disks"),
            Self::Busy { .. } => Some("wait until it is done, or choose another folder"),
            _ => None,
        }
    }

    /// Whether the same restore may do better later: the store failed, not the backup.
    fn may_pass(&self) -> bool {
        match self {
            Self::Repository(error) | Self::Catalog(CatalogError::Repository(error)) => {
                !error.is_damage()
            }
            _ => false,
        }
    }
}

/// Set once the restore is to end.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks the restore to end.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Fails once it is to end.
    ///
    /// # Errors
    /// [`RestoreError::Interrupted`].
    pub fn check(&self) -> Result<(), RestoreError> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(RestoreError::Interrupted),
            false => Ok(()),
        }
    }
}

/// What to restore, and where to.
#[derive(Debug)]
pub struct Restore<'a> {
    /// The repository.
    pub repository: &'a Repository,
    /// Its index.
    pub index: Arc<Index>,
    /// Its backups.
    pub catalog: &'a Catalog,
    /// The backup.
    pub backup: &'a Backup,
    /// Where the files go; the folder is made where it is missing.
    pub place: &'a Place,
    /// The access rights of a folder that is made.
    pub folder_mode: u32,
    /// What the disks look like.
    pub format: Format,
    /// Only these disks; all where empty.
    pub disks: &'a [DiskName],
    /// Who is told how far it is.
    pub progress: &'a Progress,
    /// Who may end it.
    pub stop: Stop,
}

/// A file that was restored.
#[derive(Debug)]
pub struct Restored {
    /// The disk.
    pub disk: DiskName,
    /// The image.
    pub path: PathBuf,
    /// Its size in bytes, as a guest sees it.
    pub size: u64,
}

impl Restore<'_> {
    /// The disks and the files they would become.
    ///
    /// # Errors
    /// [`RestoreError::UnknownDisk`], and [`RestoreError::Exists`] for the first file that is there.
    pub fn plan(&self) -> Result<Vec<(&DiskManifest, PathBuf)>, RestoreError> {
        let known = &self.backup.manifest.disks;
        if let Some(disk) = self.disks.iter().find(|d| !known.iter().any(|k| &k.target == *d)) {
            return Err(RestoreError::UnknownDisk { disk: disk.clone() });
        }
        let wanted =
            |disk: &&DiskManifest| self.disks.is_empty() || self.disks.contains(&disk.target);
        let mut plan = Vec::new();
        for disk in known.iter().filter(wanted) {
            let path = self.place.disk(&disk.target, self.format);
            match fs::symlink_metadata(&path) {
                Ok(_) => return Err(RestoreError::Exists { path }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(RestoreError::Write { path, source }),
            }
            plan.push((disk, path));
        }
        self.check_machine_files()?;
        // Another disk of the same backup may have been restored here before.
        let path = self.place.file(MANIFEST);
        match fs::read(&path) {
            Ok(existing) if existing != self.manifest() => Err(RestoreError::Exists { path }),
            _ => Ok(plan),
        }
    }

    /// Restores. Files of disks that are done stay when a later one fails; where the store failed, all stay
    /// under their temporary names, so that the same command goes on.
    ///
    /// # Errors
    /// [`RestoreError`]; no half a disk has its final name.
    pub fn run(&self) -> Result<Vec<Restored>, RestoreError> {
        let plan = self.plan()?;
        let write = |path: &Path, source| RestoreError::Write { path: path.to_owned(), source };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(self.folder_mode)
            .create(&self.place.folder)
            .map_err(|source| write(&self.place.folder, source))?;
        let extension = self.format.as_str();
        partial::sweep(&self.place.folder, &self.backup.id, &[extension, "json"]);
        let reader = Arc::new(Reader::new(self.repository, Arc::clone(&self.index), CACHE_LEN));
        let mut folder = self.catalog.folder(self.backup)?;
        let mut disks = Vec::new();
        for (disk, path) in plan {
            let content = take_content(&mut folder, &disk.target);
            let (content, _) = content.ok_or_else(|| CatalogError::Incomplete {
                snapshot: self.backup.id,
                path: disk_file(&disk.target),
            })?;
            let reader = DiskReader::new(Arc::clone(&reader), content, disk.size)?;
            disks.push((disk, path, reader));
        }
        let needed = |(_, path, reader): &(_, PathBuf, _)| {
            data_len(reader).saturating_sub(partial::left_of(path, &self.backup.id))
        };
        self.check_room(disks.iter().map(needed).sum())?;
        self.progress.bytes("restoring", disks.iter().map(|(_, _, d)| data_len(d)).sum());
        // Final names come last, all at once: until then the same command goes on where a killed one
        // ended.
        let mut whole = Vec::new();
        let mut outcome = Ok(());
        for (disk, path, reader) in disks {
            match self.restore_disk(&path, &reader) {
                Ok(partial) => whole.push((disk, path, partial)),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        if let Err(error) = outcome.as_ref()
            && error.may_pass()
        {
            whole.into_iter().for_each(|(_, _, partial)| partial.leave());
            tracing::warn!("what was restored is kept: the same command goes on from there");
            return outcome.map(|()| Vec::new());
        }
        outcome = outcome.and_then(|()| self.write_machine_files(&folder));
        outcome = outcome.and_then(|()| self.write_manifest());
        let mut restored = Vec::new();
        for (disk, path, partial) in whole {
            outcome = outcome.and(partial.publish(&path));
            restored.push(Restored { disk: disk.target.clone(), path, size: disk.size });
        }
        outcome.map(|()| restored)
    }

    fn check_room(&self, needed: u64) -> Result<(), RestoreError> {
        // A file system that does not tell shows when it is full.
        let Ok(stat) = nix::sys::statvfs::statvfs(&self.place.folder) else { return Ok(()) };
        let free = stat.blocks_available() * stat.fragment_size();
        match free < needed {
            true => Err(RestoreError::NoRoom { folder: self.place.folder.clone(), free, needed }),
            false => Ok(()),
        }
    }

    /// The record of the backup as it is written beside the disks.
    fn manifest(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(&self.backup.manifest).expect("only string keys")
    }

    /// A whole disk that has not got its final name yet.
    fn restore_disk(&self, path: &Path, reader: &DiskReader) -> Result<Partial, RestoreError> {
        let partial = self.begin("restore: create", path)?;
        let (progress, stop) = (self.progress, &self.stop);
        let target = Target { file: partial.file(), path, reader, progress, stop };
        let written = match self.format {
            Format::Raw => raw::write(&target),
            Format::Qcow2 => qcow2::write(&target),
        };
        if let Err(error) = written {
            if error.may_pass() {
                partial.leave();
            }
            return Err(error);
        }
        self.stop.check()?;
        partial.file().sync_all().map_err(|source| target.failed(source))?;
        Ok(partial)
    }

    /// The file that will be `path`.
    fn begin(&self, effect: &str, path: &Path) -> Result<Partial, RestoreError> {
        let write = |source| RestoreError::Write { path: path.to_owned(), source };
        effect::about_to(effect).map_err(write)?;
        Partial::take_up(path, &self.backup.id)
    }

    fn write_manifest(&self) -> Result<(), RestoreError> {
        let path = self.place.file(MANIFEST);
        if path.exists() || !self.place.prefix.is_empty() {
            return Ok(());
        }
        let write = |source| RestoreError::Write { path: path.clone(), source };
        let partial = self.begin("restore: manifest", &path)?;
        let mut file = partial.file();
        file.set_len(0).and_then(|()| file.write_all(&self.manifest())).map_err(write)?;
        partial.publish(&path)
    }
}

/// Bytes of a disk that are not zero, as far as is known without reading it.
fn data_len(reader: &DiskReader) -> u64 {
    let chunks = (0..reader.content().len()).filter(|&chunk| !reader.is_zero(chunk));
    chunks.map(|chunk| reader.chunk_range(chunk)).map(|range| range.end - range.start).sum()
}
