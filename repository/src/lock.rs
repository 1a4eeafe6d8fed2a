//! Lock files, as stock restic takes and honours them.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    BackendError, FileId, FileKind, Repository, RepositoryError, backend::is_alive, host,
    repository::ignore_missing,
};

/// How often a lock is renewed; restic does the same.
const REFRESH_EVERY: Duration = Duration::from_secs(5 * 60);
/// A lock of this age is nobody's; restic does the same.
const STALE_AFTER: Duration = Duration::from_secs(30 * 60);
/// An owner that could not renew for this long stops, before others take its lock away.
const LOST_AFTER: Duration = Duration::from_secs(25 * 60);
/// Between writing a lock and looking for others once more, where a listing may lack what was just written;
/// restic does the same everywhere.
const SETTLE: Duration = Duration::from_millis(200);
/// Who waits for a lock looks again after this and half as much more, at random: two who wait for each
/// other do not meet again and again.
const RETRY_EVERY: Duration = Duration::from_millis(400);

/// Whether others may use the repository at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// To read, and to add: others may do the same.
    Shared,
    /// To remove: nobody else.
    Exclusive,
}

/// The content of a lock file. The last three fields are ours; restic ignores them.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct LockFile {
    time: Timestamp,
    #[serde(default)]
    exclusive: bool,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    pid: u32,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    boot_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    start: Option<u64>,
}

/// A held lock: renewed by a thread, removed by [`Lock::release`] or when dropped.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct Lock {
    shared: Arc<Shared>,
}

/// A lock that others see already; removed when dropped.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct AnnouncedLock {
    lock: Lock,
    mode: LockMode,
    at: Instant,
}

impl AnnouncedLock {
    /// Looks for conflicts once more; 200 ms after the announcement, unless the store's listings show at once
    /// what was written. Then of two that take a lock the later one sees the other's, whoever waits.
    ///
    /// Fails with [`RepositoryError::Locked`] when somebody else was at it at the same moment.
    pub fn settle(self) -> Result<Lock, RepositoryError> {
        let repository = &self.lock.shared.repository;
        if !repository.backend().lists_at_once() {
            thread::sleep(SETTLE.saturating_sub(self.at.elapsed()));
        }
        repository.look_for_conflicts(self.mode, Some(&self.lock.id()))?;
        Ok(self.lock)
    }
}

#[derive(Debug)]
struct Shared {
    repository: Repository,
    state: Mutex<State>,
    stop: Condvar,
}

#[derive(Debug)]
struct State {
    id: FileId,
    file: LockFile,
    stopping: bool,
}

impl Repository {
    /// Takes a lock, or says who holds one that conflicts. May take 200 ms: see [`AnnouncedLock::settle`].
    ///
    /// [`RepositoryError::LockNotWritable`] means that the store is full or read-only: a reader may
    /// go on without a lock. Stale locks are removed on the way.
    pub fn lock(&self, mode: LockMode) -> Result<Lock, RepositoryError> {
        self.announce_lock(mode)?.settle()
    }

    /// Writes a lock file. What is read from now on stays, but nothing may be written before the lock
    /// has settled: somebody may have taken one at the same moment.
    ///
    /// Errors as [`Repository::lock`].
    pub fn announce_lock(&self, mode: LockMode) -> Result<AnnouncedLock, RepositoryError> {
        let file = LockFile::ours(mode);
        self.look_for_conflicts(mode, None)?;
        let id = self.write_json(FileKind::Lock, &file).map_err(not_writable)?;
        let at = Instant::now();
        let state = Mutex::new(State { id, file, stopping: false });
        let shared = Arc::new(Shared { repository: self.clone(), state, stop: Condvar::new() });
        let lock = Lock { shared: Arc::clone(&shared) };
        let thread = thread::Builder::new().name("lock".to_owned());
        match thread.spawn(move || shared.refresh_until_stopped()) {
            Ok(_detached) => Ok(AnnouncedLock { lock, mode, at }),
            Err(source) => Err(RepositoryError::Thread { source: Arc::new(source) }),
        }
    }

    /// As [`Repository::lock`], but waits up to `patience` for others to let go. Each time before it does,
    /// `waiting` hears who has the lock, and fails where nobody wants to wait any more.
    pub fn lock_within(
        &self,
        mode: LockMode,
        patience: Duration,
        waiting: &dyn Fn(&RepositoryError) -> Result<(), RepositoryError>,
    ) -> Result<Lock, RepositoryError> {
        retry(patience, waiting, || self.lock(mode))
    }

    /// As [`Repository::announce_lock`], but waits as [`Repository::lock_within`] does.
    pub fn announce_lock_within(
        &self,
        mode: LockMode,
        patience: Duration,
        waiting: &dyn Fn(&RepositoryError) -> Result<(), RepositoryError>,
    ) -> Result<AnnouncedLock, RepositoryError> {
        retry(patience, waiting, || self.announce_lock(mode))
    }

    /// Fails on the first lock of somebody else that conflicts with `mode`.
    pub(crate) fn look_for_conflicts(
        &self,
        mode: LockMode,
        ours: Option<&FileId>,
    ) -> Result<(), RepositoryError> {
        for (id, _) in self.backend().list(FileKind::Lock)? {
            if ours == Some(&id) {
                continue;
            }
            let file: LockFile = match self.read_json(FileKind::Lock, &id) {
                // Released since the listing.
                Err(RepositoryError::Backend { source }) if source.is_not_found() => continue,
                other => other?,
            };
            if file.is_stale(Timestamp::now()) {
                tracing::warn!(
                    lock = %id, hostname = %file.hostname, pid = file.pid, since = %file.time,
                    "removing a stale lock",
                );
                match ignore_missing(self.backend().remove(FileKind::Lock, &id)) {
                    // It binds nobody, so a store that cannot be written is no reason to stop here.
                    Err(source) if source.is_read_only() => {}
                    other => other?,
                }
            } else if mode == LockMode::Exclusive || file.exclusive {
                let LockFile { hostname, username, pid, time: since, exclusive, .. } = file;
                return Err(RepositoryError::Locked {
                    hostname,
                    username,
                    pid,
                    since,
                    exclusive,
                    id,
                });
            }
        }
        Ok(())
    }
}

impl Lock {
    /// Fails when the lock could not be renewed for so long that others may have taken it away.
    /// To be asked before anything is recorded.
    pub fn verify(&self) -> Result<(), RepositoryError> {
        let since = self.shared.state().file.time;
        if age(since, Timestamp::now()) > LOST_AFTER {
            return Err(RepositoryError::LockLost { since });
        }
        Ok(())
    }

    /// The name of the lock file at this moment.
    pub fn id(&self) -> FileId {
        self.shared.state().id
    }

    /// Removes the lock file.
    pub fn release(mut self) -> Result<(), RepositoryError> {
        self.stop()
    }

    fn stop(&mut self) -> Result<(), RepositoryError> {
        let mut state = self.shared.state();
        if state.stopping {
            return Ok(());
        }
        state.stopping = true;
        let id = state.id;
        drop(state);
        // The thread is not waited for: its store may hang. It removes what it writes after this.
        self.shared.stop.notify_all();
        let removed = self.shared.repository.backend().remove(FileKind::Lock, &id);
        Ok(ignore_missing(removed)?)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "a lock file stays until it is stale");
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while locked")
    }

    fn refresh_until_stopped(&self) {
        let mut state = self.state();
        while !state.stopping {
            let waited = self.stop.wait_timeout(state, REFRESH_EVERY);
            state = waited.expect("no panic while locked").0;
            if state.stopping || age(state.file.time, Timestamp::now()) < REFRESH_EVERY {
                continue;
            }
            drop(state);
            if let Err(error) = self.refresh() {
                tracing::warn!(%error, "cannot renew the lock");
            }
            state = self.state();
        }
    }

    /// Writes a new lock file, then removes the old one: there is one at any time. Not under the
    /// mutex: a store that hangs must not hang `verify`.
    fn refresh(&self) -> Result<(), RepositoryError> {
        let (old, file) = {
            let state = self.state();
            (state.id, LockFile { time: Timestamp::now(), ..state.file.clone() })
        };
        let new = self.repository.write_json(FileKind::Lock, &file)?;
        let superfluous = {
            let mut state = self.state();
            // Whoever released the lock meanwhile has removed the old file.
            if state.stopping {
                new
            } else {
                (state.id, state.file) = (new, file);
                old
            }
        };
        let removed = self.repository.backend().remove(FileKind::Lock, &superfluous);
        Ok(ignore_missing(removed)?)
    }
}

impl LockFile {
    fn ours(mode: LockMode) -> Self {
        Self {
            time: Timestamp::now(),
            exclusive: mode == LockMode::Exclusive,
            hostname: host::hostname(),
            username: host::username(),
            pid: std::process::id(),
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            boot_id: host::boot_id(),
            machine: host::machine(),
            start: host::process_start(std::process::id()),
        }
    }

    /// Whether the lock binds nobody any more: too old, or its owner is provably dead.
    fn is_stale(&self, now: Timestamp) -> bool {
        if age(self.time, now) > STALE_AFTER {
            return true;
        }
        if self.hostname != host::hostname() {
            return false;
        }
        // Another machine of the same name: its processes are not ours to judge.
        if self.machine.is_some() && self.machine != host::machine() {
            return false;
        }
        if self.boot_id.is_some() && self.boot_id != host::boot_id() {
            return self.machine.is_some();
        }
        let Ok(pid) = i32::try_from(self.pid) else { return false };
        if pid == 0 {
            return false;
        }
        let successor = match (self.start, host::process_start(self.pid)) {
            (Some(then), Some(now)) => self.boot_id.is_some() && then != now,
            _ => false,
        };
        successor || !is_alive(pid)
    }
}

/// Tries for so long as somebody else has the lock.
fn retry<T>(
    patience: Duration,
    waiting: &dyn Fn(&RepositoryError) -> Result<(), RepositoryError>,
    attempt: impl Fn() -> Result<T, RepositoryError>,
) -> Result<T, RepositoryError> {
    let deadline = Instant::now() + patience;
    loop {
        match attempt() {
            Err(error @ RepositoryError::Locked { .. }) if Instant::now() < deadline => {
                waiting(&error)?;
                let jitter = rand::random::<u32>() % 200;
                thread::sleep(RETRY_EVERY + Duration::from_millis(jitter.into()));
            }
            other => return other,
        }
    }
}

/// How long ago `since` is; nothing for times in the future.
fn age(since: Timestamp, now: Timestamp) -> Duration {
    now.duration_since(since).try_into().unwrap_or_default()
}

fn not_writable(error: RepositoryError) -> RepositoryError {
    match error {
        RepositoryError::Backend { source }
            if BackendError::is_full(&source) || source.is_read_only() =>
        {
            RepositoryError::LockNotWritable { source }
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kdf, LocalFolder};

    #[test]
    fn r18_a_renewed_lock_is_another_file_and_a_released_one_does_not_come_back() {
        let scratch = tempfile::tempdir().unwrap();
        let backend = Arc::new(LocalFolder::create(scratch.path()).unwrap());
        let repository = Repository::init(backend, b"x", Kdf::WEAK_FOR_TESTS).unwrap();
        let locks = || {
            let listed = repository.backend().list(FileKind::Lock).unwrap();
            listed.into_iter().map(|(id, _)| id).collect::<Vec<_>>()
        };
        let lock = repository.lock(LockMode::Exclusive).unwrap();
        let first = lock.id();
        lock.shared.refresh().unwrap();
        assert_ne!(lock.id(), first);
        assert_eq!(locks(), [lock.id()]);
        assert!(repository.lock(LockMode::Shared).is_err());

        let shared = Arc::clone(&lock.shared);
        lock.release().unwrap();
        shared.refresh().unwrap();
        assert!(locks().is_empty());
    }

    #[test]
    fn a_lock_that_was_not_renewed_for_long_is_lost() {
        let scratch = tempfile::tempdir().unwrap();
        let backend = Arc::new(LocalFolder::create(scratch.path()).unwrap());
        let repository = Repository::init(backend, b"x", Kdf::WEAK_FOR_TESTS).unwrap();
        let lock = repository.lock(LockMode::Shared).unwrap();
        lock.verify().unwrap();
        lock.shared.state().file.time -= Duration::from_secs(26 * 60);
        assert!(matches!(lock.verify(), Err(RepositoryError::LockLost { .. })));
    }

    #[test]
    fn r18_a_lock_is_stale_only_with_proof() {
        let now = Timestamp::now();
        let ours = LockFile::ours(LockMode::Shared);
        let stale = |change: fn(&mut LockFile)| {
            let mut file = ours.clone();
            change(&mut file);
            file.is_stale(now)
        };
        assert!(!stale(|_| {}));
        assert!(stale(|file| file.time -= Duration::from_secs(31 * 60)));
        assert!(!stale(|file| file.time -= Duration::from_secs(29 * 60)));
        // A clock that was set back says nothing about the owner.
        assert!(!stale(|file| file.time += Duration::from_secs(3600)));
        // Far above `pid_max`.
        assert!(stale(|file| file.pid = 0x7fff_fff0));
        assert!(!stale(|file| {
            file.pid = 0x7fff_fff0;
            file.hostname.push('x');
        }));
        assert!(!stale(|file| {
            file.pid = 0x7fff_fff0;
            file.machine = Some("another".to_owned());
        }));
        // The process id was given to somebody else.
        assert!(stale(|file| file.start = Some(1)));
        // Another boot of the same machine; without a machine id it may be another one.
        assert!(
            stale(|file| {
                file.machine = host::machine();
                file.boot_id = Some("another".to_owned());
            }) || host::machine().is_none()
        );
        assert!(!stale(|file| {
            file.machine = None;
            file.boot_id = Some("another".to_owned());
            file.pid = 0x7fff_fff0;
        }));
        // Those of stock restic carry neither.
        assert!(stale(|file| {
            (file.machine, file.boot_id, file.start) = (None, None, None);
            file.pid = 0x7fff_fff0;
        }));
        assert!(!stale(|file| file.pid = 0));
    }
}
