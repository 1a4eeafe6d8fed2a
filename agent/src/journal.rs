//! What must be undone, on stable storage before it is done.
//!
//! One file for each run, replaced atomically at each change of phase, gone when nothing is left to
//! undo. The record names everything the run will make; what of it exists is asked of QEMU when it is
//! undone ([`crate::recover`]), because a crash can fall between any two steps.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::capture::lvm::Snapshot;
use crate::durable;
use crate::effect;
use crate::hypervisor::{Disk, Reach};
use crate::names::{DiskName, DomainName, RunId};
use crate::quiesce::guest_agent::AgentAddress;
use crate::stop::Stopped;

/// Why the journal could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The folder or a file in it cannot be read or written.
    #[error("cannot use the journal {}", .path.display())]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A record that does not parse. It is left where it is: it may name things in a guest.
    #[error("the journal record {} is damaged", .path.display())]
    Damaged {
        /// The record.
        path: PathBuf,
        /// Why it does not parse.
        source: serde_json::Error,
    },
}

/// How far a run came; decides which of its dirty bitmaps is the one to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// No snapshot can exist: the new bitmap goes, the old one stays.
    Capturing,
    /// The snapshot is being written: only the repository knows. Both bitmaps stay; the next backup
    /// finds out which one its last snapshot began, and drops the other.
    Recording,
    /// The snapshot is durable: the old bitmap goes, the new one stays.
    Recorded,
}

/// What one run makes on one disk, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The disk.
    pub disk: DiskName,
    /// QOM path of the device that uses it.
    pub device: String,
    /// The node that the device used before, and shall use again.
    pub root: String,
    /// The node that carries the dirty bitmaps.
    pub format: String,
    /// The scratch node; for a domain of libvirt the scratch file; for a guest that stands still the
    /// dirty bitmap that tells of writes.
    pub scratch: String,
    /// The copy-before-write filter.
    pub filter: String,
    /// The node that shows the point in time; also the id of its export.
    pub snapshot: String,
    /// The backup job, where the filter is implicit in one.
    pub job: Option<String>,
    /// The bitmap that begins with this run.
    pub bitmap_new: Option<String>,
    /// The bitmap that this run reads by.
    pub bitmap_old: Option<String>,
    /// The disabled copy of the old bitmap that is exported.
    pub bitmap_export: Option<String>,
}

impl DiskRecord {
    /// That of a disk in whose QEMU a run makes nothing: it is exported by its name.
    pub fn untouched(disk: &Disk) -> Self {
        Self {
            disk: disk.target.clone(),
            device: disk.device.clone(),
            root: disk.root.clone(),
            format: disk.format.clone(),
            scratch: String::new(),
            filter: String::new(),
            snapshot: disk.target.to_string(),
            job: None,
            bitmap_new: None,
            bitmap_old: None,
            bitmap_export: None,
        }
    }
}

/// A process, told from a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since this host booted (`proc(5)`, field 22 of `stat`).
    pub started: u64,
}

impl Process {
    /// The process with this number, if there is one.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses and may hold anything; the start is the 20th after.
        let started = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, started })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// What one run makes, all of it named before the first thing is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The run.
    pub run: RunId,
    /// Its process.
    pub pid: u32,
    /// When it began.
    pub started: Timestamp,
    /// The domain.
    pub domain: DomainName,
    /// Its uuid.
    pub uuid: String,
    /// How it is reached.
    pub reach: Reach,
    /// QEMU itself.
    #[serde(default)]
    pub qemu: Option<Process>,
    /// The guest agent, when the run freezes the guest.
    pub agent: Option<AgentAddress>,
    /// The config id of the repository it writes to.
    pub repository_id: String,
    /// How far it came.
    pub phase: Phase,
    /// Whether the guest's processors ran when the run began.
    pub guest_runs: bool,
    /// Whether the run may have frozen or paused the guest and not yet let go.
    pub holds_guest: bool,
    /// Whether it pauses the guest at all.
    #[serde(default)]
    pub pauses: bool,
    /// Whether the guest stands still until it was read.
    #[serde(default)]
    pub suspends: bool,
    /// Where the run is to start the domain again, and nothing else.
    #[serde(default)]
    pub stopped: Option<Stopped>,
    /// The snapshots of LVM that it makes, of each disk one, or none.
    #[serde(default)]
    pub snapshots: Vec<Snapshot>,
    /// Whether it may have started QEMU's NBD server.
    pub nbd_server: bool,
    /// Whether it puts overlays above the disks, which a record of their own tells of.
    #[serde(default)]
    pub overlays: bool,
    /// Where QEMU listens, where that is outside the run's folder.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// What it makes on each disk.
    pub disks: Vec<DiskRecord>,
}

/// The folder of records.
#[derive(Debug, Clone)]
pub struct Journal {
    folder: PathBuf,
}

/// Proof that a record is on stable storage. Only [`Journal`] makes one, and what changes QEMU asks
/// for one: a change without its undo record does not compile.
#[derive(Debug)]
#[must_use = "what the record names stays until it is undone"]
pub struct Recorded {
    record: Record,
}

impl Recorded {
    /// What is recorded.
    pub fn record(&self) -> &Record {
        &self.record
    }
}

impl Journal {
    /// Opens, and makes where it is missing, the journal below a state folder.
    ///
    /// # Errors
    /// [`JournalError::Io`] when the folder cannot be made.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let folder = state_dir.join("journal");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|source| JournalError::Io { path: folder.clone(), source })?;
        Ok(Self { folder })
    }

    /// The state folder that it is in.
    pub fn state_dir(&self) -> &Path {
        self.folder.parent().unwrap_or(&self.folder)
    }

    /// Writes a new record; it is durable when this returns.
    ///
    /// # Errors
    /// [`JournalError::Io`] when it cannot be written; nothing may be changed then.
    pub fn begin(&self, record: Record) -> Result<Recorded, JournalError> {
        self.write(&record)?;
        Ok(Recorded { record })
    }

    /// Changes a record; the change is durable when this returns.
    ///
    /// # Errors
    /// [`JournalError::Io`]; the record on disk is then still the one before.
    pub fn update(
        &self,
        recorded: &mut Recorded,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), JournalError> {
        let mut record = recorded.record.clone();
        change(&mut record);
        self.write(&record)?;
        recorded.record = record;
        Ok(())
    }

    /// Removes a record of which nothing is left to undo.
    ///
    /// # Errors
    /// [`JournalError::Io`]; the next run then finds the record and nothing to undo.
    pub fn clear(&self, recorded: &Recorded) -> Result<(), JournalError> {
        let path = self.path(&recorded.record.run);
        let io = |source| JournalError::Io { path: path.clone(), source };
        effect::about_to("journal: clear").map_err(io)?;
        match fs::remove_file(&path) {
            // A guard has done the same.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(io)?,
        }
        self.sync_folder()
    }

    /// The record of a run as it is now; `None` once the run is over.
    ///
    /// # Errors
    /// [`JournalError::Io`], [`JournalError::Damaged`]: what it tells of is then still to be undone.
    pub fn of_run(&self, run: &RunId) -> Result<Option<Recorded>, JournalError> {
        Ok(read(&self.path(run))?.map(|record| Recorded { record }))
    }

    /// Whether a record is left.
    pub fn has(&self, recorded: &Recorded) -> bool {
        self.path(&recorded.record.run).exists()
    }

    /// All records that are left, oldest first, and those that cannot be read: they keep nobody from
    /// the others.
    ///
    /// # Errors
    /// [`JournalError::Io`] when the folder cannot be listed.
    pub fn pending(&self) -> Result<(Vec<Recorded>, Vec<JournalError>), JournalError> {
        let io = |source| JournalError::Io { path: self.folder.clone(), source };
        let (mut pending, mut damaged) = (Vec::new(), Vec::new());
        let entries = match fs::read_dir(&self.folder) {
            // Its guest may outlive a state folder.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((pending, damaged)),
            entries => entries.map_err(io)?,
        };
        for entry in entries {
            let path = entry.map_err(io)?.path();
            durable::sweep(&path);
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => pending.extend(record.map(|record| Recorded { record })),
                Err(error) => damaged.push(error),
            }
        }
        pending.sort_by_key(|recorded| recorded.record.started);
        Ok((pending, damaged))
    }

    fn path(&self, run: &RunId) -> PathBuf {
        self.folder.join(format!("{run}.json"))
    }

    fn write(&self, record: &Record) -> Result<(), JournalError> {
        let path = self.path(&record.run);
        let io = |source| JournalError::Io { path: path.clone(), source };
        effect::about_to("journal: write").map_err(io)?;
        durable::write_json(&path, record).map_err(io)
    }

    fn sync_folder(&self) -> Result<(), JournalError> {
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|source| JournalError::Io { path: self.folder.clone(), source })
    }
}

/// Reads a record; `None` where its run has cleared it since the folder was listed.
///
/// # Errors
/// [`JournalError::Io`], [`JournalError::Damaged`].
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, JournalError> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(|source| JournalError::Io { path: path.to_owned(), source })?,
    };
    let record = serde_json::from_slice(&text);
    record.map(Some).map_err(|source| JournalError::Damaged { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn record() -> Record {
        Record {
            run: RunId::random(),
            pid: 1,
            started: Timestamp::now(),
            domain: "web".parse().unwrap(),
            uuid: "u".into(),
            reach: Reach::Monitor("/run/qmp".into()),
            qemu: None,
            pauses: false,
            suspends: false,
            stopped: None,
            overlays: false,
            snapshots: Vec::new(),
            agent: None,
            repository_id: "r".into(),
            phase: Phase::Capturing,
            guest_runs: true,
            holds_guest: false,
            nbd_server: false,
            socket: None,
            disks: Vec::new(),
        }
    }

    #[test]
    fn a_record_survives_until_it_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let mut recorded = journal.begin(record()).unwrap();
        journal.update(&mut recorded, |record| record.phase = Phase::Recording).unwrap();

        let (pending, _) = Journal::open(dir.path()).unwrap().pending().unwrap();
        assert_eq!(pending.len(), 1);
        assert_eq!(pending[0].record(), recorded.record());
        assert_eq!(pending[0].record().phase, Phase::Recording);

        journal.clear(&recorded).unwrap();
        assert!(journal.pending().unwrap().0.is_empty());
    }

    #[test]
    fn a_damaged_record_is_named_and_kept_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let (recorded, other) =
            (journal.begin(record()).unwrap(), journal.begin(record()).unwrap());
        let path = journal.path(&recorded.record().run);
        fs::write(&path, b"{\"run\":").unwrap();
        let (pending, damaged) = journal.pending().unwrap();
        assert_eq!(pending[0].record(), other.record());
        assert!(matches!(&damaged[..], [JournalError::Damaged { path: p, .. }] if *p == path));
        assert!(path.exists());
        // Nor does it look like one of a run that is over.
        let of_run = |recorded: &Recorded| journal.of_run(&recorded.record().run);
        assert!(matches!(of_run(&recorded), Err(JournalError::Damaged { .. })));
        assert_eq!(of_run(&other).unwrap().unwrap().record(), other.record());
        journal.clear(&other).unwrap();
        assert!(of_run(&other).unwrap().is_none());
    }

    #[test]
    fn a_record_that_is_cleared_while_others_look_is_none_that_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        // It is listed, and cannot be found any more.
        symlink("cleared", journal.folder.join("run.json")).unwrap();
        let (pending, damaged) = journal.pending().unwrap();
        assert!(pending.is_empty() && damaged.is_empty(), "{damaged:?}");
        let recorded = journal.begin(record()).unwrap();
        journal.clear(&recorded).unwrap();
        journal.clear(&recorded).unwrap();
    }

    #[test]
    fn a_process_is_told_from_another_with_its_number() {
        let ours = Process::of(std::process::id().cast_signed()).unwrap();
        assert!(ours.is_alive());
        assert!(!Process { started: ours.started + 1, ..ours }.is_alive());
        assert_eq!(Process::of(-1), None);
    }
}
