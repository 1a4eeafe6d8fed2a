//! Making a guest's data consistent for an instant, and always letting go.
//!
//! ```text
//! hooks at `before` ─► servers flush ─► hooks at `freeze` ─► flush again ─► locks ─► freeze ─► point in time ─► thaw ─► hooks at `thaw`
//! ```
//!
//! All but the first is held by a separate process ([`watchdog`]), so that neither a hang nor the death of
//! this one keeps the guest frozen or paused, a server locked, or a hook untold.

pub mod application;
pub mod database;
pub mod guest_agent;
pub mod hook;
mod still;
pub mod watchdog;

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::hypervisor::{Machine, Reach};
use crate::manifest::Consistency;
use application::{About, Applications, Report, State};
use guest_agent::AgentAddress;
use watchdog::{Freeze, HOLD_INTERVAL, HoldStill, LetGo, Thaw, Watchdog, WatchdogError};

/// How long a guest may stay frozen, from the freeze command to the thaw.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the guest's file systems are frozen for the point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Where an agent answers; else the backup is crash-consistent, with a warning.
    Auto,
    /// A backup without a freeze fails.
    Require,
    /// Never.
    No,
}

/// Why there is no consistent point in time although one was required, or no watchdog to guard it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuiesceError {
    /// The watchdog cannot be started or reached.
    #[error("cannot run the watchdog that lets the guest go on")]
    Watchdog(#[from] WatchdogError),
    /// A freeze was required.
    #[error("the guest could not be frozen: {reason}")]
    Required {
        /// What the agent, or its absence, said.
        reason: String,
    },
    /// A database or hook is required, and failed.
    #[error("{name}: {reason}")]
    Application {
        /// What it is called.
        name: String,
        /// What it said.
        reason: String,
    },
}

impl QuiesceError {
    fn application(name: &str, reason: &str) -> Self {
        Self::Application { name: name.to_owned(), reason: reason.to_owned() }
    }
}

/// What shall hold still for a point in time.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// Whether file systems do.
    pub mode: Mode,
    /// The guest agent, where one may be there.
    pub agent: Option<&'a AgentAddress>,
    /// Databases and hooks.
    pub applications: &'a Applications,
    /// What these are told.
    pub about: About,
}

/// A guest that holds still, or does not, until [`Quiesced::thaw`].
#[derive(Debug)]
#[must_use = "the guest stays frozen until it is thawed"]
pub struct Quiesced {
    watchdog: Option<Watchdog>,
    agent: Option<AgentAddress>,
    applications: Applications,
    about: About,
    /// How the applications took it.
    reports: Vec<Report>,
    frozen: bool,
    /// How consistent its disks are without a freeze.
    unfrozen: Consistency,
    mode: Mode,
    warnings: Vec<String>,
}

/// What became of it.
#[derive(Debug)]
pub struct Outcome {
    /// What the disks agree on.
    pub consistency: Consistency,
    /// How long the file systems were frozen.
    pub frozen: Option<Duration>,
    /// How the applications took it.
    pub applications: Vec<Report>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// Has applications hold still, and freezes the guest's file systems where it is wanted and an agent is
/// there, under a watchdog. `pauses` says whether the guest will be paused, which asks for one too.
///
/// # Errors
/// [`QuiesceError::Required`] and [`QuiesceError::Application`] when that is asked for and fails,
/// [`QuiesceError::Watchdog`]. Then nothing holds still any more, or is being let go.
pub async fn quiesce(
    wanted: Wanted<'_>,
    reach: &Reach,
    machine: &Machine,
    pauses: bool,
) -> Result<Quiesced, QuiesceError> {
    let Wanted { mode, agent, applications, about } = wanted;
    let (freezes, holds) = (agent.is_some() && mode != Mode::No, applications.are_held());
    let mut quiesced = Quiesced {
        watchdog: None,
        agent: agent.cloned(),
        applications: applications.clone(),
        about: about.clone(),
        reports: Vec::new(),
        frozen: false,
        unfrozen: machine.shut_off.unwrap_or(Consistency::Crash),
        mode,
        warnings: Vec::new(),
    };
    match machine.shut_off {
        Some(Consistency::Crash) => return quiesced.without("it was not shut down by its guest"),
        // What ran in it has written out all it held.
        Some(_) => return Ok(quiesced),
        None => {}
    }
    if !machine.runs {
        // A paused guest holds still already, but what it has not written is not on its disks.
        quiesced.leave_applications("the guest is paused");
        return quiesced.check_applications()?.without("the guest is paused");
    }
    let is_asked = freezes || applications.are_held_in_guest();
    if freezes || holds || pauses {
        quiesced.watchdog = Some(Watchdog::start(agent.filter(|_| is_asked), reach)?);
    }
    if freezes || holds {
        let watchdog = quiesced.watchdog.as_mut().expect("it was just started");
        let wanted = HoldStill { applications: applications.clone(), about, freezes };
        let held = match watchdog.hold_still(wanted).await {
            Ok(held) => held,
            Err(error) => {
                quiesced.let_go_ourselves().await;
                quiesced.leave_applications(&error.to_string());
                return quiesced.check_applications()?.without(&error.to_string());
            }
        };
        quiesced.reports = held.reports;
        quiesced = quiesced.check_applications()?;
        match held.freeze {
            Some(Freeze::Frozen { .. }) => quiesced.frozen = true,
            Some(Freeze::Failed { reason }) => return quiesced.without(&reason),
            None => {}
        }
    }
    match mode {
        Mode::Require if agent.is_none() => quiesced.without("there is no way to a guest agent"),
        _ => Ok(quiesced),
    }
}

impl Quiesced {
    fn without(mut self, reason: &str) -> Result<Self, QuiesceError> {
        if self.mode == Mode::Require {
            return Err(QuiesceError::Required { reason: reason.to_owned() });
        }
        if self.mode == Mode::Auto && self.agent.is_some() {
            self.warnings.push(format!("not frozen, the backup is crash-consistent: {reason}"));
        }
        Ok(self)
    }

    /// Nobody tells the applications anything.
    fn leave_applications(&mut self, reason: &str) {
        let failed = || State::Failed { why: reason.to_owned() };
        let databases = self.applications.databases.iter();
        let databases = databases.map(|database| (database.name(), database.required));
        let hooks = self.applications.at(hook::At::Freeze);
        let all = databases.chain(hooks.map(|hook| (hook.name(), hook.required)));
        self.reports =
            all.map(|(name, required)| Report { name, required, state: failed() }).collect();
    }

    /// Whether all that are required hold still.
    fn check_applications(self) -> Result<Self, QuiesceError> {
        for Report { name, required, state } in &self.reports {
            if let (true, State::Failed { why }) = (required, state) {
                return Err(QuiesceError::application(name, why));
            }
        }
        Ok(self)
    }

    /// Tells the watchdog that the guest is about to be paused, for an instant or until [`Self::hold`].
    ///
    /// # Errors
    /// [`QuiesceError::Watchdog`] when it is gone: then nothing may be paused.
    pub async fn will_pause(&mut self) -> Result<(), QuiesceError> {
        match &mut self.watchdog {
            Some(watchdog) => Ok(watchdog.will_pause(Duration::ZERO).await?),
            None => Ok(()),
        }
    }

    /// Keeps the guest as it is, while it is paused, for as long as this process is at work.
    ///
    /// # Errors
    /// [`QuiesceError::Watchdog`]: then the guest must go on at once.
    pub async fn hold(mut self) -> Result<Holding, QuiesceError> {
        self.still_holds().await?;
        let (done, mut asked) = oneshot::channel();
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = &mut asked => return Ok(self),
                    () = tokio::time::sleep(HOLD_INTERVAL) => self.still_holds().await?,
                }
            }
        });
        Ok(Holding { done, task })
    }

    async fn still_holds(&mut self) -> Result<(), WatchdogError> {
        match &mut self.watchdog {
            Some(watchdog) => watchdog.hold().await,
            None => Ok(()),
        }
    }

    /// Lets the guest and its applications go on and ends the watchdog.
    ///
    /// # Errors
    /// [`QuiesceError::Required`], [`QuiesceError::Application`] when what is required did not hold still up to the
    /// point in time.
    pub async fn thaw(mut self) -> Result<Outcome, QuiesceError> {
        let (mut frozen, mut lost) = (None, None);
        let holds = self.frozen || self.applications.are_held();
        if let Some(watchdog) = self.watchdog.as_mut().filter(|_| holds) {
            match watchdog.let_go().await {
                Ok(LetGo { reports, failures, thaw }) => {
                    (self.reports, frozen, lost) = match thaw {
                        Some(Thaw::Thawed { after, in_time: true }) => (reports, Some(after), None),
                        Some(Thaw::Thawed { .. }) => {
                            (reports, None, Some("it thawed before the point in time".to_owned()))
                        }
                        Some(Thaw::Failed { reason }) => (reports, None, Some(reason)),
                        None => (reports, None, None),
                    };
                    self.warnings.extend(failures);
                }
                Err(error) => {
                    self.let_go_ourselves().await;
                    self.leave_applications(&error.to_string());
                    lost = self.frozen.then(|| error.to_string());
                }
            }
        }
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.done().await;
        }
        if let Some(reason) = lost {
            self = self.without(&reason)?;
        }
        self = self.check_applications()?;
        for report in self.reports.iter().filter(|report| report.has_failed()) {
            self.warnings.push(format!("not application-consistent: {}", report.describe()));
        }
        let consistency = match frozen {
            Some(_) if self.are_clean() => Consistency::Application,
            Some(_) => Consistency::Filesystem,
            None => self.unfrozen,
        };
        let (applications, warnings) = (self.reports, self.warnings);
        Ok(Outcome { consistency, frozen, applications, warnings })
    }

    /// Whether there are applications, and none has anything to recover.
    fn are_clean(&self) -> bool {
        let is_clean = |report: &Report| report.state == State::Clean;
        !self.reports.is_empty() && self.reports.iter().all(is_clean)
    }

    /// The last resort when the watchdog itself is gone, and its locks with it.
    async fn let_go_ourselves(&self) {
        let agent = self.agent.as_ref();
        if let Some(agent) = agent.filter(|_| self.mode != Mode::No)
            && let Err(error) = guest_agent::thaw(agent, None, FREEZE_TIMEOUT).await
        {
            tracing::error!(%error, "the guest may be frozen: thaw it with `guest-fsfreeze-thaw`");
        }
        for failure in self.applications.thaw(&self.about, agent).await {
            tracing::error!("{failure}");
        }
    }
}

/// A guest that is kept as it is. When this is dropped the watchdog lets it go.
#[derive(Debug)]
#[must_use = "the guest is let go when this is dropped"]
pub struct Holding {
    done: oneshot::Sender<()>,
    task: JoinHandle<Result<Quiesced, QuiesceError>>,
}

impl Holding {
    /// Ready when the watchdog is gone: then the guest must go on at once.
    pub async fn ends(&mut self) -> QuiesceError {
        match (&mut self.task).await {
            Ok(Err(error)) => error,
            // Nobody has asked for its end, so it can only have failed.
            _ => WatchdogError::Ended.into(),
        }
    }

    /// Thaws the guest, which runs again by now, and ends the watchdog.
    ///
    /// # Errors
    /// [`QuiesceError`]; the watchdog is gone, or the guest did not stay frozen.
    pub async fn thaw(self) -> Result<Outcome, QuiesceError> {
        drop(self.done);
        let quiesced = self.task.await.map_err(|_| WatchdogError::Ended)?;
        quiesced?.thaw().await
    }
}
