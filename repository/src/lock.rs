//! Lock files, as stock restic takes and honours them.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, Weak},
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    BackendError, FileId, FileKind, FileRef, Repository, RepositoryError, backend::is_alive, host,
    repository::ignore_missing,
};

/// How often a lock is renewed; restic does the same.
const REFRESH_EVERY: Duration = Duration::from_secs(5 * 60);
/// A lock of this age is nobody's; restic does the same.
pub(crate) const STALE_AFTER: Duration = Duration::from_secs(30 * 60);
/// How often the thread looks whether that is due. It sleeps by a clock that stands still while the host
/// does, so in one go it would come too late after that.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// An owner that could not renew for this long stops, before others take its lock away.
const LOST_AFTER: Duration = Duration::from_secs(25 * 60);
/// Between writing a lock and looking for others once more, where a listing may lack what was just written;
/// restic does the same everywhere.
pub(crate) const SETTLE: Duration = Duration::from_millis(200);
/// How often damaged locks are looked at that are watched.
const WATCH_EVERY: Duration = Duration::from_secs(1);
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

/// What a lock and the thread that renews it share.
#[derive(Debug)]
pub(crate) struct Shared {
    repository: Repository,
    state: Mutex<State>,
    /// Held while the lock is renewed: two at once would each find the other's old file gone.
    renewing: Mutex<()>,
    stop: Condvar,
}

#[derive(Debug)]
struct State {
    id: FileId,
    file: LockFile,
    /// How long the host was up when it was renewed.
    renewed: Duration,
    /// How long it is up: [`host::uptime`], which goes on while the host sleeps.
    uptime: fn() -> Duration,
    /// Others may have taken it away: it never holds again, whatever is renewed.
    lost: bool,
    stopping: bool,
}

impl State {
    /// How long ago it was renewed, by the clock or, as that may be set back, by the time the host is up.
    fn age(&self, now: Timestamp, uptime: Duration) -> Duration {
        age(self.file.time, now).max(uptime.saturating_sub(self.renewed))
    }

    /// The clock does not count here: where it was set, the lock may still be there.
    fn verify(&mut self) -> Result<(), RepositoryError> {
        let uptime = (self.uptime)();
        self.lost |= uptime.saturating_sub(self.renewed) > LOST_AFTER;
        match self.lost {
            true => Err(RepositoryError::LockLost { since: self.file.time }),
            false => Ok(()),
        }
    }
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
        let uptime: fn() -> Duration = host::uptime;
        let (file, renewed) = (LockFile::ours(mode), uptime());
        match self.look_for_conflicts(mode, None) {
            // Copies of a repository may lack the folder while it is empty. Once there is a lock in it, a store
            // that does not find it cannot list.
            Err(RepositoryError::Backend { source }) if source.is_not_found() => {}
            looked => looked?,
        }
        let id = self.write_json(FileKind::Lock, &file).map_err(not_writable)?;
        let at = Instant::now();
        let state = State { id, file, renewed, uptime, lost: false, stopping: false };
        let state = Mutex::new(state);
        let (repository, renewing, stop) = (self.clone(), Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { repository, state, renewing, stop });
        let mut locks = self.locks().lock().expect("no panic while locked");
        locks.retain(|lock| lock.strong_count() > 0);
        locks.push(Arc::downgrade(&shared));
        drop(locks);
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

    /// Fails where a lock that this program holds here was lost: see [`Lock::prove`].
    pub(crate) fn prove_locks(&self) -> Result<(), RepositoryError> {
        let locks = self.locks().lock().expect("no panic while locked").clone();
        // The thread of one that was released, as of one that was lost and given up, may not have ended yet.
        let held = locks.iter().filter_map(Weak::upgrade).filter(|lock| !lock.state().stopping);
        { held }.try_for_each(|lock| lock.prove())
    }

    /// The locks that nobody can tell anything of.
    pub(crate) fn unreadable_locks(
        &self,
    ) -> Result<Vec<(FileRef, RepositoryError)>, RepositoryError> {
        let mut unreadable = Vec::new();
        let listed = match self.backend().list(FileKind::Lock) {
            Err(source) if source.is_not_found() => Vec::new(),
            listed => listed?,
        };
        for (id, _) in listed {
            match self.read_json::<LockFile>(FileKind::Lock, &id) {
                Err(RepositoryError::Backend { source }) if source.is_not_found() => {}
                Err(error) => unreadable.push((FileRef { kind: FileKind::Lock, id }, error)),
                Ok(_) => {}
            }
        }
        Ok(unreadable)
    }

    /// Removes damaged locks that are still there after `patience`. Whoever has a lock renews it under
    /// another name before it is stale, so by then they are nobody's.
    pub(crate) fn outwait_damaged_locks(
        &self,
        patience: Duration,
        waiting: &dyn Fn(&RepositoryError) -> Result<(), RepositoryError>,
    ) -> Result<(), RepositoryError> {
        let damaged = || -> Result<HashMap<FileId, RepositoryError>, RepositoryError> {
            let unreadable = self.unreadable_locks()?.into_iter();
            let damaged = unreadable.filter(|(_, error)| error.is_damage());
            Ok(damaged.map(|(file, error)| (file.id, error)).collect())
        };
        let mut watched = damaged()?;
        let since = Instant::now();
        while let Some(error) = watched.values().next() {
            if since.elapsed() >= patience {
                for id in watched.keys() {
                    tracing::warn!(lock = %id, "removing a lock that nobody can read");
                    ignore_missing(self.backend().remove(FileKind::Lock, id))?;
                }
                return Ok(());
            }
            waiting(error)?;
            thread::sleep(WATCH_EVERY.min(patience.saturating_sub(since.elapsed())));
            let still = damaged()?;
            watched.retain(|id, _| still.contains_key(id));
        }
        Ok(())
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
    /// Fails when the lock was taken away, or could not be renewed for so long that others may have done so.
    /// Asks nobody, unless the clock was set ahead: to be asked before each step that goes by what the lock
    /// protects.
    pub fn verify(&self) -> Result<(), RepositoryError> {
        self.shared.verify()
    }

    /// As [`Lock::verify`], and looks whether the lock file is there: whoever's clock is wrong may have taken
    /// it for stale, and `restic unlock --remove-all` asks nobody. Index files and snapshots are written only
    /// after this.
    pub fn prove(&self) -> Result<(), RepositoryError> {
        self.shared.prove()
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
            let waited = self.stop.wait_timeout(state, LOOK_EVERY);
            state = waited.expect("no panic while locked").0;
            if state.lost {
                return;
            }
            if state.stopping {
                continue;
            }
            drop(state);
            if let Err(error) = self.refresh(REFRESH_EVERY) {
                tracing::warn!(%error, "cannot renew the lock");
            }
            state = self.state();
        }
    }

    fn verify(&self) -> Result<(), RepositoryError> {
        {
            let mut state = self.state();
            state.verify()?;
            if state.stopping || age(state.file.time, Timestamp::now()) <= LOST_AFTER {
                return Ok(());
            }
        }
        // The clock was set ahead, or this is a machine that stood still. Whoever took the lock for stale has
        // removed its file.
        self.refresh(LOST_AFTER)
    }

    fn prove(&self) -> Result<(), RepositoryError> {
        loop {
            self.verify()?;
            let id = {
                let state = self.state();
                if state.stopping {
                    return Ok(());
                }
                state.id
            };
            if !self.is_gone(&id)? {
                return Ok(());
            }
            let mut state = self.state();
            // Otherwise it was renewed, or released, meanwhile.
            if state.id == id && !state.stopping {
                state.lost = true;
            }
        }
    }

    /// Whether a lock file is not there. Some stores do not find at once what was written, so one "not found"
    /// is no proof.
    fn is_gone(&self, id: &FileId) -> Result<bool, RepositoryError> {
        let backend = self.repository.backend();
        for wait in [SETTLE, Duration::ZERO] {
            match backend.read(FileKind::Lock, id) {
                Err(source) if source.is_not_found() => thread::sleep(wait),
                other => return Ok(other.map(|_| false)?),
            }
        }
        match backend.list(FileKind::Lock) {
            Err(source) if source.is_not_found() => Ok(true),
            listed => Ok(listed?.iter().all(|(listed, _)| listed != id)),
        }
    }

    /// Renews a lock that is at least so old: writes a new lock file, then removes the old one, so there is
    /// one at any time. The old one must still be there once the new one is: who takes it for stale after
    /// that sees the new one before the own lock settles, and who did before has removed it. Not under the
    /// mutex of the state: a store that hangs must not hang `verify`.
    fn refresh(&self, least_age: Duration) -> Result<(), RepositoryError> {
        let _renewing = self.renewing.lock().expect("no panic while locked");
        let (old, file, renewed) = {
            let mut state = self.state();
            let (now, uptime) = (Timestamp::now(), (state.uptime)());
            state.verify()?;
            if state.age(now, uptime) < least_age {
                return Ok(());
            }
            (state.id, LockFile { time: now, ..state.file.clone() }, uptime)
        };
        let new = self.repository.write_json(FileKind::Lock, &file)?;
        let is_gone = self.is_gone(&old);
        let outcome = {
            let mut state = self.state();
            // Whoever released the lock meanwhile has removed the old file.
            state.lost |= matches!(is_gone, Ok(true)) && !state.stopping;
            // The store may have taken too long.
            let outcome = state.verify().and(is_gone.map(drop));
            if outcome.is_ok() && !state.stopping {
                (state.id, state.file, state.renewed) = (new, file, renewed);
            }
            outcome.map(|()| state.id)
        };
        let going = if matches!(outcome, Ok(id) if id == new) { old } else { new };
        // That it is gone now proves nothing: networks ask for a removal twice.
        let removed = ignore_missing(self.repository.backend().remove(FileKind::Lock, &going));
        outcome?;
        Ok(removed?)
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
            // One that is damaged may be one that somebody is writing.
            Err(
                error @ (RepositoryError::Locked { .. }
                | RepositoryError::Damaged {
                    file: FileRef { kind: FileKind::Lock, .. },
                    ..
                }),
            ) if Instant::now() < deadline => {
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
mod tests;
