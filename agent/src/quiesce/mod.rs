//! Making a guest's data consistent for an instant, and always letting go.
//!
//! The freeze is held by a separate process ([`watchdog`]), so that neither a hang nor the death of
//! this one keeps the guest frozen or paused.

pub mod guest_agent;
pub mod watchdog;

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::hypervisor::{Machine, Reach};
use crate::manifest::Consistency;
use guest_agent::AgentAddress;
use watchdog::{Freeze, HOLD_INTERVAL, Thaw, Watchdog, WatchdogError};

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
}

/// A guest that holds still, or does not, until [`Quiesced::thaw`].
#[derive(Debug)]
#[must_use = "the guest stays frozen until it is thawed"]
pub struct Quiesced {
    watchdog: Option<Watchdog>,
    agent: Option<AgentAddress>,
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
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// Freezes the guest's file systems where `mode` and `agent` allow, under a watchdog. `pauses` says
/// whether the guest will be paused, which asks for one too.
///
/// # Errors
/// [`QuiesceError::Required`] when `mode` asks for it, [`QuiesceError::Watchdog`].
pub async fn quiesce(
    mode: Mode,
    agent: Option<&AgentAddress>,
    reach: &Reach,
    machine: &Machine,
    pauses: bool,
) -> Result<Quiesced, QuiesceError> {
    let agent = agent.filter(|_| mode != Mode::No);
    let mut quiesced = Quiesced {
        watchdog: None,
        agent: agent.cloned(),
        frozen: false,
        unfrozen: machine.shut_off.unwrap_or(Consistency::Crash),
        mode,
        warnings: Vec::new(),
    };
    match machine.shut_off {
        Some(Consistency::Crash) => return quiesced.without("it was not shut down by its guest"),
        Some(_) => return Ok(quiesced),
        None => {}
    }
    if !machine.runs {
        // A paused guest holds still already, but what it has not written is not on its disks.
        return quiesced.without("the guest is paused");
    }
    if agent.is_some() || pauses {
        quiesced.watchdog = Some(Watchdog::start(agent, reach)?);
    }
    if agent.is_none() {
        return match mode {
            Mode::Require => quiesced.without("there is no way to a guest agent"),
            _ => Ok(quiesced),
        };
    }
    let watchdog = quiesced.watchdog.as_mut().expect("it was just started");
    match watchdog.freeze().await {
        Ok(Freeze::Frozen { .. }) => quiesced.frozen = true,
        Ok(Freeze::Failed { reason }) => return quiesced.without(&reason),
        Err(error) => {
            quiesced.thaw_ourselves().await;
            return quiesced.without(&error.to_string());
        }
    }
    Ok(quiesced)
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

    /// Tells the watchdog that the guest is about to be paused.
    ///
    /// # Errors
    /// [`QuiesceError::Watchdog`] when it is gone: then nothing may be paused.
    pub async fn will_pause(&mut self) -> Result<(), QuiesceError> {
        match &mut self.watchdog {
            Some(watchdog) => Ok(watchdog.will_pause().await?),
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

    /// Lets the guest go on and ends the watchdog.
    ///
    /// # Errors
    /// [`QuiesceError::Required`] when the guest did not stay frozen up to the point in time.
    pub async fn thaw(mut self) -> Result<Outcome, QuiesceError> {
        let mut frozen = None;
        let mut lost = None;
        if self.frozen {
            let watchdog = self.watchdog.as_mut().expect("only a watchdog freezes");
            match watchdog.thaw().await {
                Ok(Thaw::Thawed { after, in_time: true }) => frozen = Some(after),
                Ok(Thaw::Thawed { .. }) => lost = Some("it thawed before the point in time".into()),
                Ok(Thaw::Failed { reason }) => lost = Some(reason),
                Err(error) => {
                    self.thaw_ourselves().await;
                    lost = Some(error.to_string());
                }
            }
        }
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.done().await;
        }
        if let Some(reason) = lost {
            self = self.without(&reason)?;
        }
        let consistency = match frozen {
            Some(_) => Consistency::Filesystem,
            None => self.unfrozen,
        };
        Ok(Outcome { consistency, frozen, warnings: self.warnings })
    }

    /// The last resort when the watchdog itself is gone.
    async fn thaw_ourselves(&self) {
        if let Some(agent) = &self.agent
            && let Err(error) = guest_agent::thaw(agent, None, FREEZE_TIMEOUT).await
        {
            tracing::error!(%error, "the guest may be frozen: thaw it with `guest-fsfreeze-thaw`");
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
