//! Locks on this host: one run at a time for one domain. They are `flock`s and die with their process.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, test_kill_process};

use crate::hypervisor::Reach;
use crate::names::DomainName;

/// How often, and how far apart, a lock is tried while its holder has no name in it.
const HOLDER_TRIES: u32 = 400;
const HOLDER_PAUSE: Duration = Duration::from_millis(5);
/// How long telling people may take, and how often it is looked whether somebody still does.
const ALERT_TIMEOUT: Duration = Duration::from_secs(600);
const ALERT_POLL: Duration = Duration::from_millis(100);
/// What a guard writes behind its process id.
const GUARD: &str = " guard";

/// Why a domain could not be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another run is at work on this domain.
    #[error("another kvmsnap (process {holder}) is working on {what}")]
    Held {
        /// The domain or monitor.
        what: String,
        /// What the holder wrote into the lock: its process id.
        holder: String,
        /// Whether it is a guard, which undoes what a run left and is soon done.
        is_guard: bool,
    },
    /// The lock's file cannot be used.
    #[error("cannot lock {}", .path.display())]
    Io {
        /// The lock's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A lock on one domain or monitor, held until dropped.
#[derive(Debug)]
pub struct DomainLock {
    file: File,
}

impl DomainLock {
    /// Locks the way to a machine: a monitor by the canonical path of its socket, a domain by its uuid.
    ///
    /// # Errors
    /// [`LockError::Held`] when another process has it; this waits for its name, for two seconds at most.
    pub fn on_reach(run_dir: &Path, reach: &Reach) -> Result<Self, LockError> {
        Self::take_reach(run_dir, reach, "")
    }

    /// The same for a guard; see [`LockError::Held`].
    ///
    /// # Errors
    /// As [`Self::on_reach`].
    pub fn to_undo(run_dir: &Path, reach: &Reach) -> Result<Self, LockError> {
        Self::take_reach(run_dir, reach, GUARD)
    }

    fn take_reach(run_dir: &Path, reach: &Reach, role: &str) -> Result<Self, LockError> {
        let key = match reach {
            Reach::Monitor(socket) => digest(socket.as_os_str().as_encoded_bytes()),
            Reach::Domain(domain) => digest(domain.uuid.as_bytes()),
        };
        Self::take(run_dir, &format!("reach-{key}"), reach.to_string(), role)
    }

    /// Locks a domain, whichever of its monitors is used.
    ///
    /// # Errors
    /// [`LockError::Held`] when another process has it; this waits no longer than for its name.
    pub fn on_domain(run_dir: &Path, name: &DomainName, uuid: &str) -> Result<Self, LockError> {
        let key = format!("domain-{}", digest(format!("{name}\n{uuid}").as_bytes()));
        Self::take(run_dir, &key, format!("domain `{name}`"), "")
    }

    fn take(run_dir: &Path, key: &str, what: String, role: &str) -> Result<Self, LockError> {
        let path = run_dir.join(format!("{key}.lock"));
        let io = |source| LockError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir).map_err(io)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        let mut tries = 0;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(LockError::Io { path, source }),
            }
            let holder = read_holder(&mut file).map_err(io)?;
            // It has just taken the lock, which may yet name one that was killed, or is about to let go of it.
            if !names_the_living(&holder) && tries < HOLDER_TRIES {
                tries += 1;
                std::thread::sleep(HOLDER_PAUSE);
                continue;
            }
            let (holder, is_guard) = match holder.strip_suffix(GUARD) {
                Some(guard) => (guard.to_owned(), true),
                None if holder.is_empty() => ("unknown".to_owned(), false),
                None => (holder, false),
            };
            return Err(LockError::Held { what, holder, is_guard });
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(io)?;
        write!(file, "{}{role}", std::process::id()).map_err(io)?;
        Ok(Self { file })
    }
}

/// The lock of the one run of jobs on this host, held until dropped.
#[derive(Debug)]
pub struct RunLock {
    _lock: DomainLock,
}

impl RunLock {
    /// Takes it.
    ///
    /// # Errors
    /// [`LockError::Held`] when a run is active.
    pub fn take(run_dir: &Path) -> Result<Self, LockError> {
        let lock = DomainLock::take(run_dir, "run", "the jobs of this host".to_owned(), "")?;
        Ok(Self { _lock: lock })
    }

    /// Asks the run that holds it to stop, as Ctrl-C does. `false` where that one has ended meanwhile.
    ///
    /// # Errors
    /// When this user may not, or the lock cannot be looked at.
    pub fn ask_to_stop(run_dir: &Path, holder: &str) -> Result<bool, LockError> {
        let path = run_dir.join("run.lock");
        let failed = |error: Errno| LockError::Io { path: path.clone(), source: error.into() };
        let pid = holder.parse().ok().and_then(Pid::from_raw);
        let Some(pid) = pid else { return Ok(false) };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => process,
            Err(Errno::SRCH) => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        // If it still holds the lock by now, it is this very process that we have got hold of.
        match Self::take(run_dir) {
            Err(LockError::Held { holder: now, .. }) if now == holder => {}
            Err(LockError::Held { .. }) | Ok(_) => return Ok(false),
            Err(error) => return Err(error),
        }
        match pidfd_send_signal(&process, Signal::INT) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }
}

/// The lock of whoever tells people what happened, held until dropped.
#[derive(Debug)]
pub struct AlertLock {
    _lock: DomainLock,
}

impl AlertLock {
    /// Takes it, and waits for it for as long as telling may take.
    ///
    /// # Errors
    /// [`LockError::Held`] when somebody else has it for longer.
    pub async fn take(run_dir: &Path) -> Result<Self, LockError> {
        let begin = Instant::now();
        loop {
            let what = "the telling of people".to_owned();
            match DomainLock::take(run_dir, "alerts", what, "") {
                Err(LockError::Held { .. }) if begin.elapsed() < ALERT_TIMEOUT => {
                    tokio::time::sleep(ALERT_POLL).await;
                }
                taken => return Ok(Self { _lock: taken? }),
            }
        }
    }
}

impl Drop for DomainLock {
    fn drop(&mut self) {
        // So that nobody takes us for the next holder; where it fails that one writes its own name.
        let _ = self.file.set_len(0);
    }
}

/// Who holds a lock, as far as it has said so yet.
fn read_holder(file: &mut File) -> io::Result<String> {
    let mut holder = String::new();
    file.rewind()?;
    file.read_to_string(&mut holder)?;
    Ok(holder)
}

/// Whether a lock names a process that there is.
fn names_the_living(holder: &str) -> bool {
    let pid = holder.strip_suffix(GUARD).unwrap_or(holder).parse().ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

/// A name for a file that says nothing and cannot be chosen to collide with another domain's.
fn digest(bytes: &[u8]) -> String {
    repository::BlobId::of(bytes).to_string().chars().take(32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r16_a_holder_that_is_letting_go_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let name: DomainName = "web".parse().unwrap();
        let first = DomainLock::on_domain(dir.path(), &name, "u").unwrap();
        // Its name is gone, its lock is not yet.
        first.file.set_len(0).unwrap();
        let (dir, name) = (&dir, &name);
        std::thread::scope(|scope| {
            let second = scope.spawn(move || DomainLock::on_domain(dir.path(), name, "u"));
            std::thread::sleep(40 * HOLDER_PAUSE);
            drop(first);
            assert!(second.join().unwrap().is_ok());
        });
    }

    #[test]
    fn r16_one_that_was_killed_is_not_taken_for_the_guard_that_has_just_come() {
        let dir = tempfile::tempdir().unwrap();
        let reach = Reach::Monitor(dir.path().join("qmp"));
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let guard = DomainLock::to_undo(dir.path(), &reach).unwrap();
        let name = |text: String| {
            let mut file = &guard.file;
            file.set_len(0).and_then(|()| file.rewind()).unwrap();
            write!(file, "{text}").unwrap();
        };
        // It has the lock, and has not written its name yet.
        name(dead.id().to_string());
        let (dir, reach) = (&dir, &reach);
        std::thread::scope(|scope| {
            let next = scope.spawn(move || DomainLock::on_reach(dir.path(), reach));
            std::thread::sleep(40 * HOLDER_PAUSE);
            name(format!("{}{GUARD}", std::process::id()));
            let refused = next.join().unwrap().unwrap_err();
            assert!(matches!(refused, LockError::Held { is_guard: true, .. }), "{refused:?}");
        });
    }

    #[test]
    fn r16_the_second_run_on_a_domain_is_told_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let name: DomainName = "web".parse().unwrap();
        let first = DomainLock::on_domain(dir.path(), &name, "u").unwrap();
        let LockError::Held { holder, .. } =
            DomainLock::on_domain(dir.path(), &name, "u").unwrap_err()
        else {
            panic!("not held")
        };
        assert_eq!(holder, std::process::id().to_string());
        DomainLock::on_domain(dir.path(), &name, "another uuid").unwrap();
        drop(first);
        DomainLock::on_domain(dir.path(), &name, "u").unwrap();
    }
}
