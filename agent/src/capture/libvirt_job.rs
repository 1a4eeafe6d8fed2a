//! A point in time by libvirt's pull-mode backup job: the point in time and the new checkpoint are one
//! transaction over all disks.
//!
//! The scratch of such a job breaks guest writes when it is full. So room is reserved ahead of its use,
//! and the job ends when that fails. What the job exports shows the live disk once the job is dead, so
//! `confirm` asks for the very same job, by the random name of its socket.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;
use virt::domain::{
    Domain, DomainPausedReason, DomainPausedReasonEnum, DomainState, DomainStateReason,
    DomainStateReasonEnum,
};
use virt::error::Error;

use super::job::{reserve, scratch_len};
use super::room::Scratch;
use crate::effect;
use crate::hypervisor::libvirt::connection::DomainHandle;
use crate::hypervisor::libvirt::{sys, xml};
use crate::hypervisor::{Care, Cut, Disk, Export, Exports, HypervisorError};
use crate::journal::{DiskRecord, Record, Recorded};
use crate::names::DiskName;

/// Room that the scratch of a disk has ahead of what it holds: what a guest can write in the time
/// that it takes to end the job, many times over.
const AHEAD: u64 = 256 << 20;
/// How long libvirt may take to end a job. One thread of libvirtd 9.0 handles what all its QEMUs tell.
/// That a guest agent comes or goes waits there 30 s, and in vain, for a lock that a backup job of the
/// same domain does not let go (it allows no `MODIFY_MIGRATION_SAFE`): two such waits when a guest
/// reboots during its backup, and no job of any domain ends meanwhile.
const ABORT_TIMEOUT: Duration = Duration::from_secs(100);
/// How long to wait before it is asked for the first time whether it has; twice as long each time.
const ABORT_POLL: Duration = Duration::from_millis(2);
const ABORT_POLL_MAX: Duration = Duration::from_millis(200);
/// A scratch that holds no more is left to QEMU to write.
const WRITTEN_AT_ONCE: u64 = 4 << 20;
/// A disk that takes longer to write the scratch is not waited for.
const WRITE_OUT_MAX: Duration = Duration::from_secs(1);

/// Makes sure that there is room for the scratch of each disk, before anything is begun.
///
/// # Errors
/// [`HypervisorError::Host`], [`HypervisorError::ScratchLow`].
pub fn check_room(record: &Record, disks: &[Disk]) -> Result<(), HypervisorError> {
    let mut held = Vec::new();
    for (names, disk) in record.disks.iter().zip(disks) {
        let folder = Path::new(&names.scratch).parent().unwrap_or(Path::new("/"));
        let file = super::scratch_file(folder, disk, 0)?;
        reserve(&file, disk, folder, AHEAD.min(scratch_len(disk.size)))?;
        let scratch = Scratch { disk: disk.target.clone(), file: Arc::new(file) };
        if let Some(low) = scratch.low() {
            return Err(low.into());
        }
        held.push(scratch);
    }
    Ok(())
}

/// Starts the job: the point in time of all disks, and the new checkpoint with it. Where libvirt
/// `takes_sockets`, QEMU gets the one that it is to listen at, and need not be able to make it.
///
/// # Errors
/// libvirt's refusal; `release` takes away what was made.
pub async fn cut(
    domain: &DomainHandle,
    recorded: &Recorded,
    others: &[String],
    takes_sockets: bool,
) -> Result<Cut, HypervisorError> {
    if takes_sockets {
        let begun = match listen(recorded.record()) {
            Ok(socket) => begin(domain, recorded, others, Some(socket)).await,
            Err(error) => Err(error),
        };
        let is_about_it = match &begun {
            Err(HypervisorError::Libvirt { source, .. }) => source.is_of_the_request(),
            Err(HypervisorError::Host { .. }) => true,
            _ => false,
        };
        if !is_about_it {
            return begun;
        }
        // Nothing has begun.
        tracing::debug!(?begun, "no socket can be passed: QEMU makes one");
        remove(recorded.record().socket.as_deref())?;
    }
    begin(domain, recorded, others, None).await
}

/// Listens at the socket of a run in QEMU's stead.
fn listen(record: &Record) -> Result<OwnedFd, HypervisorError> {
    let socket = socket(record);
    let bound = effect::about_to("socket: create").and_then(|()| UnixListener::bind(socket));
    let step = || format!("make the socket {}", socket.display());
    bound.map(OwnedFd::from).map_err(|source| HypervisorError::Host { step: step(), source })
}

/// Starts the job, with a socket that is passed or one that QEMU makes.
async fn begin(
    domain: &DomainHandle,
    recorded: &Recorded,
    others: &[String],
    passed: Option<OwnedFd>,
) -> Result<Cut, HypervisorError> {
    let record = recorded.record();
    let backup = xml::write_backup(socket(record), passed.is_some(), &record.disks, others);
    let checkpoint = checkpoint_name(record).map(|name| {
        let (mut tracked, mut left) = (Vec::new(), Vec::new());
        for disk in &record.disks {
            let list = if disk.bitmap_new.is_some() { &mut tracked } else { &mut left };
            list.push(disk.disk.as_str());
        }
        left.extend(others.iter().map(String::as_str));
        xml::write_checkpoint(name, None, &tracked, &left)
    });
    tracing::debug!(backup, checkpoint, "starting a backup job");
    let time = Timestamp::now();
    let (ours, passed) = (record.socket.clone(), passed.map(Arc::new));
    let begin = move |domain: &Domain| {
        let begin = || {
            if let (Some(passed), Some(socket)) = (&passed, &ours) {
                sys::fd_associate(domain, &socket.to_string_lossy(), passed.as_fd())?;
            }
            sys::backup_begin(domain, &backup, checkpoint.as_deref())
        };
        match begin() {
            // Begun by a first attempt whose answer was lost.
            Err(_) if job_socket(domain)?.is_some_and(|socket| Some(socket) == ours) => Ok(()),
            begun => begun,
        }
    };
    domain.change("start a backup job", begin).await?;
    Ok(Cut { time, pause: None })
}

/// Connects to the exports of the job.
///
/// # Errors
/// [`HypervisorError::Host`] when the server cannot be reached.
pub fn export(recorded: &Recorded) -> Result<Exports, HypervisorError> {
    let record = recorded.record();
    let socket = socket(record);
    let export = |disk: &DiskRecord| {
        let step = || format!("connect to {}", socket.display());
        let stream = UnixStream::connect(socket)
            .map_err(|source| HypervisorError::Host { step: step(), source })?;
        let context = |bitmap: &String| format!("qemu:dirty-bitmap:{bitmap}");
        Ok(Export {
            name: disk.snapshot.clone(),
            dirty_context: disk.bitmap_export.as_ref().map(context),
            care: Care::Twice,
            stream: Arc::new(stream),
        })
    };
    let disks = record.disks.iter().map(export).collect::<Result<_, HypervisorError>>()?;
    Ok(Exports { disks, outlive_us: true, by_guest: true })
}

/// Asks whether the very same job still runs.
///
/// # Errors
/// [`HypervisorError::PointInTimeLost`].
pub async fn confirm(domain: &DomainHandle, recorded: &Recorded) -> Result<(), HypervisorError> {
    if is_ours(domain, recorded.record()).await? {
        return Ok(());
    }
    Err(ended(recorded.record().disks[0].disk.clone()))
}

fn ended(disk: DiskName) -> HypervisorError {
    HypervisorError::PointInTimeLost { disk, what: "its backup job has ended".into() }
}

/// Has the scratch written to its disk. QEMU does that too, in its main thread, when the job ends and it
/// closes the scratch, and its guest waits: up to 82 ms (tried).
pub async fn write_out(scratch: Vec<Arc<File>>) {
    let write_out = move || scratch.iter().for_each(|file| drop(file.sync_data()));
    // What came of it does not matter: the scratch is given up anyway.
    let _ = tokio::time::timeout(WRITE_OUT_MAX, tokio::task::spawn_blocking(write_out)).await;
}

/// Ends the job, where it runs, and removes its files. A guest that stopped because the scratch took
/// the room of its image goes on.
///
/// # Errors
/// The first step that failed. Calling it again goes on from there.
pub async fn release(domain: &DomainHandle, recorded: &Recorded) -> Result<(), HypervisorError> {
    let record = recorded.record();
    let start = Instant::now();
    let (mut asked, mut poll) = (false, ABORT_POLL);
    while is_ours(domain, record).await? {
        if is_ending(domain).await? {
            return Err(HypervisorError::NotRunning { domain: record.domain.to_string() });
        }
        if start.elapsed() > ABORT_TIMEOUT {
            return Err(HypervisorError::StillInUse {
                what: "the backup job".to_owned(),
                waited: ABORT_TIMEOUT,
            });
        }
        if asked {
            tokio::time::sleep(poll).await;
            poll = ABORT_POLL_MAX.min(poll * 2);
            continue;
        }
        asked = true;
        match domain.change("end the backup job", sys::abort_job).await {
            // It may have ended between the question and the command.
            Ok(()) | Err(HypervisorError::Libvirt { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    remove_files(record)?;
    if record.guest_runs {
        resume_after_io_error(domain).await?;
    }
    Ok(())
}

/// Removes scratch and socket of a run whose job has ended; libvirt removes the scratch, unless it ends
/// before.
///
/// # Errors
/// [`HypervisorError::Host`].
pub fn remove_files(record: &Record) -> Result<(), HypervisorError> {
    let scratch = record.disks.iter().map(|disk| Path::new(&disk.scratch));
    remove(scratch.chain(record.socket.as_deref()))
}

fn remove<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<(), HypervisorError> {
    for path in paths {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                let step = format!("remove {}", path.display());
                return Err(HypervisorError::Host { step, source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether the guest has powered itself off. libvirt 9.0 may take minutes to see that QEMU has ended
/// meanwhile, where a guest agent had been connected, and takes the job for one that runs (tried).
async fn is_ending(domain: &DomainHandle) -> Result<bool, HypervisorError> {
    let (state, _) = domain.ask("tell its state", Domain::state).await?;
    Ok(state.unwrap_or(DomainState::NoState) == DomainState::Shutdown)
}

/// Whether the job that runs is the one of this record.
async fn is_ours(domain: &DomainHandle, record: &Record) -> Result<bool, HypervisorError> {
    let running = match domain.ask("describe its backup job", job_socket).await {
        // Without a domain there is no job.
        Err(HypervisorError::Libvirt { source, .. }) if source.is_no_domain() => None,
        running => running?,
    };
    Ok(running.is_some() && running == record.socket)
}

fn job_socket(domain: &Domain) -> Result<Option<PathBuf>, Error> {
    let job = sys::backup_xml(domain)?;
    let job = job.and_then(|text| xml::parse(&text).ok());
    Ok(job.and_then(|job| xml::read_backup_socket(&job)))
}

async fn resume_after_io_error(domain: &DomainHandle) -> Result<(), HypervisorError> {
    let stopped = domain.ask("tell its state", Domain::state).await;
    let (_, reason) = match stopped {
        Err(HypervisorError::Libvirt { source, .. }) if source.is_no_domain() => return Ok(()),
        stopped => stopped?,
    };
    let io_error = DomainPausedReasonEnum::from(DomainPausedReason::IOError);
    if reason == DomainStateReasonEnum::from(DomainStateReason::Paused(io_error)) {
        tracing::warn!("the guest had stopped for an I/O error: it goes on");
        domain.change("let the guest go on", Domain::resume).await?;
    }
    Ok(())
}

/// The checkpoint of a run, which is also the name of its dirty bitmaps.
pub fn checkpoint_name(record: &Record) -> Option<&str> {
    record.disks.iter().find_map(|disk| disk.bitmap_new.as_deref())
}

fn socket(record: &Record) -> &Path {
    record.socket.as_deref().expect("the record of a domain names its socket")
}

/// The scratch of one disk, with room ahead of what it holds.
#[derive(Debug)]
pub struct GuardedScratch {
    scratch: Scratch,
    /// The most it can come to hold.
    len_max: u64,
    reserved: u64,
}

impl GuardedScratch {
    /// Opens the scratch of a disk of `size` bytes, which libvirt has made.
    ///
    /// # Errors
    /// [`HypervisorError::Host`].
    pub fn open(names: &DiskRecord, size: u64) -> Result<Self, HypervisorError> {
        let host = |source| HypervisorError::Host {
            step: format!("watch the scratch {}", names.scratch),
            source,
        };
        let file = File::options().read(true).write(true).open(&names.scratch).map_err(host)?;
        let scratch = Scratch { disk: names.disk.clone(), file: Arc::new(file) };
        Ok(Self { scratch, len_max: scratch_len(size), reserved: 0 })
    }

    /// Reserves room where less than half of what should be ahead is left.
    ///
    /// # Errors
    /// [`HypervisorError::ScratchLow`] when the guest is about to need the room: end the job. As
    /// [`Self::is_there`].
    pub fn guard(&mut self) -> Result<(), HypervisorError> {
        if let Some(low) = self.scratch.low() {
            return Err(low.into());
        }
        self.is_there()?;
        let Ok(meta) = self.scratch.file.metadata() else { return Ok(()) };
        let used = meta.size();
        if self.reserved >= self.len_max || used + AHEAD / 2 < self.reserved {
            return Ok(());
        }
        let wanted = (used + AHEAD).min(self.len_max);
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let len = i64::try_from(wanted).unwrap_or(i64::MAX);
        match fallocate(&*self.scratch.file, keep, 0, len) {
            // A file system without reservations has only the room that it says it has.
            Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => {
                self.reserved = wanted;
                Ok(())
            }
            Err(_) => Err(self.low(AHEAD)),
        }
    }

    /// Bytes that it holds.
    pub fn holds(&self) -> u64 {
        self.scratch.file.metadata().map_or(0, |metadata| metadata.size())
    }

    /// Its file.
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.scratch.file)
    }

    /// Its file, where it holds much that may not be written to its disk yet.
    pub fn unwritten(&self) -> Option<Arc<File>> {
        (self.holds() > WRITTEN_AT_ONCE).then(|| self.file())
    }

    /// Makes sure that the scratch is there.
    ///
    /// # Errors
    /// [`HypervisorError::PointInTimeLost`] when libvirt has removed it, as it does once the job has ended,
    /// whoever ended it.
    pub fn is_there(&self) -> Result<(), HypervisorError> {
        match self.scratch.file.metadata() {
            Ok(meta) if meta.nlink() == 0 => Err(ended(self.scratch.disk.clone())),
            _ => Ok(()),
        }
    }

    fn low(&self, kept: u64) -> HypervisorError {
        let free =
            fstatvfs(&self.scratch.file).map_or(0, |s| s.blocks_available() * s.fragment_size());
        HypervisorError::ScratchLow { disk: self.scratch.disk.clone(), free, kept }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_scratch_that_holds_much_is_written_out_before_qemu_does() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let scratch = Scratch { disk: "vda".parse().unwrap(), file: Arc::clone(&file) };
        let scratch = GuardedScratch { scratch, len_max: 1 << 30, reserved: 0 };
        file.set_len(WRITTEN_AT_ONCE).unwrap();
        assert!(scratch.unwritten().is_none(), "QEMU writes little at once");
        file.set_len(WRITTEN_AT_ONCE + 1).unwrap();
        let unwritten = scratch.unwritten().expect("it holds much");
        assert!(Arc::ptr_eq(&unwritten, &file));
    }
}
