//! Shutting a domain down for its backup, and starting it again whatever becomes of that.
//!
//! An undo record of its own says that the domain ran. It is durable before the guest is asked to shut
//! down, and goes once the domain runs again. A guest that was asked cannot be told to forget it: so the
//! record, and the guard with it, outlives a run that gave up waiting.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use virt::domain::{Domain, DomainState};

use crate::guard::Guard;
use crate::hypervisor::libvirt::connection::DomainHandle;
use crate::hypervisor::libvirt::was_migrated;
use crate::hypervisor::{HypervisorError, Reach};
use crate::journal::{Journal, JournalError, Phase, Record, Recorded};
use crate::names::{DomainName, RunId};

/// How often libvirt is asked whether the domain is off.
const STATE_POLL: Duration = Duration::from_millis(100);
/// How long a guest that was asked to shut down, and did not in time, is watched: should it do so after
/// all, it is started again.
const WATCH: SignedDuration = SignedDuration::from_secs(600);
/// How long starting it is tried: a `qemu-img` of a run that was killed may still have an image locked.
const START_TIMEOUT: Duration = Duration::from_secs(10);
const START_POLL: Duration = Duration::from_millis(200);

/// Why a domain could not be shut down, or started again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// It would be gone.
    #[error("domain `{domain}` is transient: once it is off nobody could start it again")]
    Transient {
        /// The domain.
        domain: DomainName,
    },
    /// Its guest does nothing, so it cannot shut down either.
    #[error("the guest of domain `{domain}` does not run: it cannot shut down")]
    Stands {
        /// The domain.
        domain: DomainName,
    },
    /// The guest takes its time, or does not listen.
    #[error("domain `{domain}` did not shut down within {} s", .waited.as_secs())]
    StillRuns {
        /// The domain.
        domain: DomainName,
        /// How long was waited.
        waited: Duration,
    },
    /// The guest was asked to shut down by a run that has ended.
    #[error("domain `{domain}` was asked to shut down, and has not done so yet")]
    GoingDown {
        /// The domain.
        domain: DomainName,
    },
    /// There is no process that would start it again if this run is killed.
    #[error("cannot run the guard that starts the domain again if this process is killed")]
    Guard(#[source] std::io::Error),
    /// libvirt refuses.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The undo record could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What an undo record says of a domain that was shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// libvirt's number for it while it ran.
    pub id: Option<u32>,
    /// Until when it is watched, should it go on running.
    pub until: Timestamp,
    /// Whether it was seen off since it was asked to shut down.
    #[serde(default)]
    pub was_off: bool,
}

/// A domain that is shut down for its backup.
#[derive(Debug)]
pub struct Stop {
    handle: DomainHandle,
    domain: DomainName,
    patience: Duration,
    power_off: bool,
    journal: Journal,
    run_dir: PathBuf,
    down: Mutex<Option<Down>>,
}

#[derive(Debug)]
struct Down {
    recorded: Recorded,
    guard: Guard,
    since: Instant,
    started: bool,
}

impl Stop {
    /// A domain that is given `patience` to shut down, and with `power_off` is switched off then.
    pub fn new(
        handle: DomainHandle,
        domain: DomainName,
        (patience, power_off): (Duration, bool),
        journal: Journal,
        run_dir: &Path,
    ) -> Self {
        let (run_dir, down) = (run_dir.to_owned(), Mutex::new(None));
        Self { handle, domain, patience, power_off, journal, run_dir, down }
    }

    /// Shuts the domain down, if it runs. When this is dropped or fails, the guard goes on: it starts the
    /// domain again should that shut down after all.
    ///
    /// # Errors
    /// [`StopError`].
    pub async fn shut_down(&self) -> Result<(), StopError> {
        let look = |domain: &Domain| Ok((domain.state()?.0, domain.id(), domain.is_persistent()?));
        let (state, id, persists) = self.handle.ask("tell its state", look).await?;
        match state.unwrap_or(DomainState::NoState) {
            DomainState::Shutoff => return Ok(()),
            _ if !persists => return Err(StopError::Transient { domain: self.domain.clone() }),
            DomainState::Running => {}
            _ => return Err(StopError::Stands { domain: self.domain.clone() }),
        }
        let mut recorded = self.journal.begin(self.undo_record(id))?;
        let run = &recorded.record().run;
        let guard = match Guard::start(&self.journal, &self.run_dir, run) {
            Ok(guard) => guard,
            Err(error) => {
                self.journal.clear(&recorded)?;
                return Err(StopError::Guard(error));
            }
        };
        // What this one says stands for what earlier ones said of the same machine.
        for earlier in of(&self.journal, &recorded.record().reach)? {
            if earlier.record().run != *run {
                self.journal.clear(&earlier)?;
            }
        }
        let since = Instant::now();
        match self.handle.change("shut the domain down", Domain::shutdown).await {
            // An agent that hangs may have heard it.
            Ok(()) | Err(HypervisorError::Silent { .. }) => {}
            // It heard a first attempt whose answer was lost.
            Err(_) if self.is_off().await? => {}
            Err(error) => {
                self.journal.clear(&recorded)?;
                guard.dismiss();
                return Err(error.into());
            }
        }
        if !self.is_off_within(self.patience).await? {
            let (domain, waited) = (self.domain.clone(), self.patience);
            if !self.power_off {
                return Err(StopError::StillRuns { domain, waited });
            }
            tracing::warn!("domain `{domain}` did not shut down in time: it is switched off");
            match self.handle.change("switch the domain off", Domain::destroy).await {
                Err(_) if self.is_off().await? => {}
                switched => switched?,
            }
        }
        self.journal.update(&mut recorded, |record| {
            record.stopped = record.stopped.map(|stopped| Stopped { was_off: true, ..stopped });
        })?;
        let down = Down { recorded, guard, since, started: false };
        *self.down.lock().unwrap_or_else(PoisonError::into_inner) = Some(down);
        Ok(())
    }

    fn undo_record(&self, id: Option<u32>) -> Record {
        let now = Timestamp::now();
        let patience = SignedDuration::try_from(self.patience).unwrap_or(WATCH);
        let until = now.saturating_add(patience + WATCH).unwrap_or(now);
        let address = self.handle.address();
        Record {
            run: RunId::random(),
            pid: std::process::id(),
            started: now,
            domain: self.domain.clone(),
            uuid: address.uuid.clone(),
            reach: Reach::Domain(address),
            qemu: None,
            agent: None,
            repository_id: String::new(),
            phase: Phase::Capturing,
            guest_runs: true,
            holds_guest: false,
            pauses: false,
            suspends: false,
            overlays: false,
            stopped: Some(Stopped { id, until, was_off: false }),
            snapshots: Vec::new(),
            nbd_server: false,
            socket: None,
            disks: Vec::new(),
        }
    }

    async fn is_off(&self) -> Result<bool, HypervisorError> {
        Ok(!self.handle.is_active().await?)
    }

    async fn is_off_within(&self, patience: Duration) -> Result<bool, HypervisorError> {
        let start = Instant::now();
        loop {
            match self.is_off().await? {
                false if start.elapsed() < patience => tokio::time::sleep(STATE_POLL).await,
                is_off => return Ok(is_off),
            }
        }
    }

    /// Whether the domain was shut down by this run.
    pub fn is_down(&self) -> bool {
        self.down.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Starts the domain again, if this run has shut it down and it does not run yet.
    ///
    /// # Errors
    /// libvirt's.
    pub async fn start_again(&self) -> Result<(), HypervisorError> {
        if !self.is_down() {
            return Ok(());
        }
        start(&self.handle, &self.domain).await?;
        if let Some(down) = &mut *self.down.lock().unwrap_or_else(PoisonError::into_inner)
            && !down.started
        {
            down.started = true;
            let seconds = down.since.elapsed().as_secs_f64();
            tracing::warn!("domain `{}` was away for its backup for {seconds:.1} s", self.domain);
        }
        Ok(())
    }

    /// Starts the domain again, as [`Self::start_again`], and clears the undo record.
    ///
    /// # Errors
    /// [`StopError`]; the guard goes on trying.
    pub async fn finish(&self) -> Result<(), StopError> {
        match self.start_again().await {
            Err(HypervisorError::Migrated { domain }) => runs_elsewhere(&domain),
            started => started?,
        }
        let down = self.down.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(down) = down {
            self.journal.clear(&down.recorded)?;
            down.guard.dismiss();
        }
        Ok(())
    }
}

/// Starts a domain that does not run.
///
/// # Errors
/// [`HypervisorError::Migrated`] where its guest runs on another host: a second one would spoil its disks.
async fn start(handle: &DomainHandle, domain: &DomainName) -> Result<(), HypervisorError> {
    let begin = Instant::now();
    while !handle.is_active().await? {
        let (_, reason) = handle.ask("tell its state", Domain::state).await?;
        if was_migrated(reason) {
            return Err(HypervisorError::Migrated { domain: domain.to_string() });
        }
        match handle.change("start the domain again", Domain::create).await {
            Err(HypervisorError::Libvirt { source, .. }) if begin.elapsed() < START_TIMEOUT => {
                tracing::debug!(%source, "it does not start yet");
                tokio::time::sleep(START_POLL).await;
            }
            started => return started,
        }
    }
    Ok(())
}

fn runs_elsewhere(domain: &str) {
    tracing::warn!("domain `{domain}` was migrated to another host: it is not started here");
}

/// The records of a machine that was shut down.
fn of(journal: &Journal, reach: &Reach) -> Result<Vec<Recorded>, JournalError> {
    let (mut pending, _) = journal.pending()?;
    pending.retain(|recorded| {
        recorded.record().stopped.is_some() && recorded.record().reach == *reach
    });
    Ok(pending)
}

/// Starts a machine again that earlier runs have shut down. One that is still on its way is left to their
/// guard.
///
/// # Errors
/// [`StopError`].
pub async fn undo_earlier(journal: &Journal, reach: &Reach) -> Result<(), StopError> {
    for recorded in of(journal, reach)? {
        match undo(journal, &recorded).await {
            Err(error @ StopError::GoingDown { .. }) => tracing::warn!("{error}"),
            undone => undone?,
        }
    }
    Ok(())
}

/// Starts the machine of a record again, where it is off.
///
/// # Errors
/// [`StopError`]; calling it again goes on from there.
pub async fn undo(journal: &Journal, recorded: &Recorded) -> Result<(), StopError> {
    let record = recorded.record();
    if let (Reach::Domain(address), Some(stopped)) = (&record.reach, &record.stopped) {
        let handle = DomainHandle::connect(address).await?;
        match handle.ask("tell whether it runs", |domain| Ok(domain.id())).await {
            // Nobody wants it any more.
            Err(HypervisorError::Libvirt { source, .. }) if source.is_no_domain() => {}
            Err(error) => return Err(error.into()),
            // Whoever shut it down, we did not: it was asked long ago.
            Ok(None) if !stopped.was_off && Timestamp::now() >= stopped.until => {
                tracing::warn!(domain = %record.domain, "it is off, and stays so: an earlier run asked \
                               it to shut down, and did not see it do so");
            }
            Ok(None) => {
                tracing::warn!(domain = %record.domain, "starting what an earlier run shut down");
                match start(&handle, &record.domain).await {
                    Err(HypervisorError::Migrated { domain }) => runs_elsewhere(&domain),
                    started => started?,
                }
            }
            Ok(id) if id == stopped.id && Timestamp::now() < stopped.until => {
                return Err(StopError::GoingDown { domain: record.domain.clone() });
            }
            // It has been started since, or goes on.
            Ok(_) => {}
        }
    }
    Ok(journal.clear(recorded)?)
}
