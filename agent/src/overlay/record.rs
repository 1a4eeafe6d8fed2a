//! What is known of a machine whose images hold still, on stable storage before anything is done.
//!
//! Not a run's undo record: it lives from `create` until `purge`, and nothing else undoes it. One file
//! for each machine.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::at_rest::LocalImage;
use crate::durable;
use crate::effect;
use crate::hypervisor::Reach;
use crate::journal::{self, JournalError, Process};
use crate::manifest::Consistency;
use crate::names::{DiskName, DomainName, RunId};

/// The folder of the records, below the state folder.
const FOLDER: &str = "overlays";

/// A machine that writes to overlays, or is about to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Names the files and nodes that belong to it.
    pub id: RunId,
    /// The domain.
    pub domain: DomainName,
    /// Its uuid.
    pub uuid: String,
    /// How it is reached.
    pub reach: Reach,
    /// QEMU when the overlays were made; `None` where that could not be told.
    pub qemu: Option<Process>,
    /// When it was begun.
    pub begun: Timestamp,
    /// Who wants the images to hold still.
    #[serde(default)]
    pub purpose: Purpose,
    /// The instant that the frozen images show; `None` until they do.
    pub held: Option<HeldSince>,
    /// Its disks.
    pub disks: Vec<DiskRecord>,
}

/// Who wants images to hold still, and so who may end it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// A user, until `purge`.
    #[default]
    User,
    /// A backup, until it is done: whoever finds it later ends it.
    Backup,
    /// Backups, from one to the next: what the overlays hold is what changed since. Until `purge`.
    Tracking,
}

/// The instant that frozen images show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldSince {
    /// When it was.
    pub time: Timestamp,
    /// What the images agree on.
    pub consistency: Consistency,
}

/// One disk and its overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The disk.
    pub disk: DiskName,
    /// Its own image, which holds still.
    pub base: LocalImage,
    /// Size in bytes, as the guest sees it.
    pub size: u64,
    /// The overlay that takes the guest's writes.
    pub overlay: PathBuf,
    /// Its format, in QEMU's words.
    pub overlay_format: String,
    /// The overlay as it was made, before QEMU had it; `None` until then.
    pub made: Option<FileMark>,
    /// The base as it was when nobody wrote to it last; `None` where that cannot be told.
    pub still: Option<FileMark>,
    /// How far it was brought back.
    pub stage: Stage,
    /// The limits of the guest's I/O that a purge has lowered, to be set again.
    pub limits: Option<Limits>,
    /// The QEMU that was told to write it into the base while it lies beneath another overlay.
    #[serde(default)]
    pub sunk_by: Option<Process>,
    /// Whether somebody may have written beneath it: it does not hold all that changed since it was put.
    #[serde(default)]
    pub doubtful: bool,
}

impl DiskRecord {
    /// An overlay that is to be made above an image.
    pub fn new(disk: DiskName, base: LocalImage, size: u64, overlay: PathBuf) -> Self {
        Self {
            disk,
            base,
            size,
            overlay,
            overlay_format: "qcow2".to_owned(),
            made: None,
            still: None,
            stage: Stage::Above,
            limits: None,
            sunk_by: None,
            doubtful: false,
        }
    }

    /// The overlay as an image.
    pub fn overlay_image(&self) -> LocalImage {
        LocalImage { path: self.overlay.clone(), format: self.overlay_format.clone() }
    }
}

/// The limits of a guest's I/O, as they were before a purge lowered them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The process that has the lowered ones; another one has its own again.
    pub process: Option<Process>,
    /// Those before.
    pub before: serde_json::Value,
}

/// How far a disk was brought back onto its own image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The guest writes to the overlay, and nobody to the base.
    Above,
    /// The overlay is being written into the base: the overlay holds all, the base a part.
    Committing,
    /// That QEMU was told to go on with the base: it may have written there since.
    Pivoting(Option<Process>),
    /// The base holds all; the overlay, as it was then, is of no use any more.
    Back(Option<FileMark>),
}

/// A regular file as it was at one moment, told without its file system's number, which changes when
/// the host boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMark {
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

impl FileMark {
    /// The file at a path as it is now; `None` for a block device, which does not tell.
    ///
    /// # Errors
    /// The system's.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        let meta = fs::metadata(path)?;
        let mark = Self {
            inode: meta.ino(),
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        };
        Ok((!meta.file_type().is_block_device()).then_some(mark))
    }

    /// Whether both are of one file, whatever it holds.
    pub fn is_same_file(&self, other: &Self) -> bool {
        self.inode == other.inode
    }
}

/// The folder of records.
#[derive(Debug, Clone)]
pub struct Records {
    folder: PathBuf,
}

/// Proof that a record is on stable storage; only [`Records`] makes one.
#[derive(Debug)]
#[must_use = "the overlays stay until they are purged"]
pub struct Held {
    record: Record,
}

impl Held {
    /// What is recorded.
    pub fn record(&self) -> &Record {
        &self.record
    }
}

impl Records {
    /// Opens, and makes where it is missing, the folder of records below a state folder.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let folder = state_dir.join(FOLDER);
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&folder);
        made.map_err(|source| JournalError::Io { path: folder.clone(), source })?;
        Ok(Self { folder })
    }

    /// Writes a new record; it is durable when this returns.
    ///
    /// # Errors
    /// [`JournalError::Io`]; nothing may be changed then.
    pub fn begin(&self, record: Record) -> Result<Held, JournalError> {
        self.write(&record)?;
        Ok(Held { record })
    }

    /// Changes a record; the change is durable when this returns.
    ///
    /// # Errors
    /// [`JournalError::Io`]; the record on disk is then still the one before.
    pub fn update(
        &self,
        held: &mut Held,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), JournalError> {
        let mut record = held.record.clone();
        change(&mut record);
        self.write(&record)?;
        held.record = record;
        Ok(())
    }

    /// Removes a record of which nothing is left.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub fn clear(&self, held: &Held) -> Result<(), JournalError> {
        let path = self.path(&held.record);
        let io = |source| JournalError::Io { path: path.clone(), source };
        effect::about_to("overlays: clear").map_err(io)?;
        fs::remove_file(&path).map_err(io)?;
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(io)
    }

    /// All records, oldest first, and those that cannot be read.
    ///
    /// # Errors
    /// [`JournalError::Io`] when the folder cannot be listed.
    pub fn all(&self) -> Result<(Vec<Held>, Vec<JournalError>), JournalError> {
        let io = |source| JournalError::Io { path: self.folder.clone(), source };
        let (mut all, mut damaged) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            durable::sweep(&path);
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match journal::read(&path) {
                Ok(record) => all.extend(record.map(|record| Held { record })),
                Err(error) => damaged.push(error),
            }
        }
        all.sort_by_key(|held| held.record.begun);
        Ok((all, damaged))
    }

    /// The records of a machine, oldest first: overlays may lie above each other. What cannot be read may be
    /// of it, and is an error.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn all_of(&self, reach: &Reach) -> Result<Vec<Held>, JournalError> {
        let (mut all, damaged) = self.all()?;
        all.retain(|held| &held.record.reach == reach);
        damaged.into_iter().next().map_or(Ok(all), Err)
    }

    /// The oldest of them.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn of(&self, reach: &Reach) -> Result<Option<Held>, JournalError> {
        Ok(self.all_of(reach)?.into_iter().next())
    }

    /// Where a record lies.
    pub fn path(&self, record: &Record) -> PathBuf {
        self.folder.join(format!("{}.json", record.id))
    }

    fn write(&self, record: &Record) -> Result<(), JournalError> {
        let path = self.path(record);
        let io = |source| JournalError::Io { path: path.clone(), source };
        effect::about_to("overlays: record").map_err(io)?;
        durable::write_json(&path, record).map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_told_from_another_and_from_itself_when_it_was_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["one", "other"].map(|name| folder.path().join(name));
        paths.iter().for_each(|path| fs::write(path, "a").unwrap());
        let [one, other] = paths.each_ref().map(|path| FileMark::of(path).unwrap().unwrap());
        assert!(!one.is_same_file(&other));
        fs::write(&paths[0], "ab").unwrap();
        let written = FileMark::of(&paths[0]).unwrap().unwrap();
        assert!(one.is_same_file(&written) && one != written);
    }

    #[test]
    fn a_record_that_cannot_be_read_hides_no_machine() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path()).unwrap();
        let reach = Reach::Monitor("/run/qmp".into());
        // Another machine's, that is cleared at this moment.
        symlink("cleared", folder.path().join(FOLDER).join("b.json")).unwrap();
        assert!(records.of(&reach).unwrap().is_none());
        fs::write(folder.path().join(FOLDER).join("a.json"), "{").unwrap();
        assert!(matches!(records.of(&reach), Err(JournalError::Damaged { .. })));
    }
}
