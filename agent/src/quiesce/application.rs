//! What a guest runs besides file systems: databases and hooks that are told of the point in time.

use std::error::Error;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::QuiesceError;
use super::database::Database;
use super::guest_agent::{Agent, AgentAddress};
use super::hook::{At, Hook, Where};
use crate::manifest::Consistency;
use crate::names::{DomainName, RunId, printable};
use crate::overlay::record::Record;

/// How long a guest may take to discard what its file systems no longer use.
const TRIM_TIMEOUT: Duration = Duration::from_secs(600);

/// What is told of the point in time, as it is configured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applications {
    /// Commands and scripts, in this order.
    pub hooks: Vec<Hook>,
    /// Servers.
    pub databases: Vec<Database>,
    /// Whether the guest discards what its file systems no longer use before.
    pub trim: bool,
}

/// Which backup a hook is told of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct About {
    /// The domain.
    pub domain: DomainName,
    /// Its uuid.
    pub uuid: String,
    /// The run.
    pub run: RunId,
}

/// What came of one application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What it is called.
    pub name: String,
    /// Whether there is no backup without it.
    pub required: bool,
    /// What came of it.
    #[serde(flatten)]
    pub state: State,
}

/// How an application takes the point in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "state")]
pub enum State {
    /// It held still: what is on the disks needs no recovery.
    Clean,
    /// It wrote out what it held, and has little to recover when it starts.
    Flushed {
        /// What is left to recover, and why.
        why: String,
    },
    /// It did not.
    Failed {
        /// Why.
        why: String,
    },
}

/// What came of a backup, for those who are told at its end.
#[derive(Debug)]
pub struct Ending {
    /// The snapshot's id, where there is one.
    pub snapshot: Option<String>,
    /// How consistent it is.
    pub consistency: Option<&'static str>,
    /// Why there is none.
    pub error: Option<String>,
}

impl State {
    /// It failed for a reason.
    pub fn failed(error: &dyn Error) -> Self {
        Self::Failed { why: in_full(error) }
    }
}

impl Report {
    /// Whether it did not hold still.
    pub fn has_failed(&self) -> bool {
        matches!(self.state, State::Failed { .. })
    }

    /// How it is shown.
    pub fn describe(&self) -> String {
        match &self.state {
            State::Clean => format!("{}: clean", self.name),
            State::Flushed { why } => format!("{}: flushed, {why}", self.name),
            State::Failed { why } => format!("{}: failed, {why}", self.name),
        }
    }
}

/// An error and its causes in one line. Servers and guests choose some of the words.
fn in_full(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // Some libraries repeat their source in their own words.
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    printable(&text)
}

impl About {
    /// Images that hold still.
    pub fn of(record: &Record) -> Self {
        let Record { domain, uuid, id, .. } = record.clone();
        Self { domain, uuid, run: id }
    }

    /// What every hook finds in its environment.
    pub fn environment(&self, at: At) -> Vec<(String, String)> {
        let Self { domain, uuid, run } = self;
        [
            ("KVMSNAP_DOMAIN", domain.as_str()),
            ("KVMSNAP_UUID", uuid),
            ("KVMSNAP_RUN", run.as_str()),
            ("KVMSNAP_AT", at.as_str()),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }
}

impl Ending {
    /// There is one.
    pub fn of(snapshot: &str, consistency: Option<Consistency>) -> Self {
        let consistency = consistency.map(Consistency::as_str);
        Self { snapshot: Some(snapshot.to_owned()), consistency, error: None }
    }

    /// There is no snapshot.
    pub fn failed(error: &dyn Error) -> Self {
        Self { snapshot: None, consistency: None, error: Some(in_full(error)) }
    }

    fn environment(&self) -> Vec<(String, String)> {
        let result = if self.snapshot.is_some() { "success" } else { "failure" };
        let mut environment = vec![("KVMSNAP_RESULT".to_owned(), result.to_owned())];
        let more = [
            ("KVMSNAP_SNAPSHOT", self.snapshot.clone()),
            ("KVMSNAP_CONSISTENCY", self.consistency.map(str::to_owned)),
            ("KVMSNAP_ERROR", self.error.clone()),
        ];
        let known = more.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        environment.extend(known);
        environment
    }
}

impl Applications {
    /// The hooks that run at a moment.
    pub fn at(&self, at: At) -> impl Iterator<Item = &Hook> {
        self.hooks.iter().filter(move |hook| hook.at == at)
    }

    /// Whether somebody is told in the moment of the point in time.
    pub fn are_held(&self) -> bool {
        let mut hooks = self.hooks.iter();
        !self.databases.is_empty() || hooks.any(|hook| matches!(hook.at, At::Freeze | At::Thaw))
    }

    /// Whether one of them needs the guest's agent then.
    pub fn are_held_in_guest(&self) -> bool {
        let in_guest = |hook: &Hook| hook.place == Where::Guest;
        self.at(At::Freeze).chain(self.at(At::Thaw)).any(in_guest)
    }

    /// How long it may take until all hold still.
    pub fn hold_time_max(&self) -> Duration {
        let hooks: Duration = self.at(At::Freeze).map(|hook| hook.timeout).sum();
        hooks + self.databases.iter().map(Database::time_max).sum::<Duration>()
    }

    /// How long it may take until all were told that they may go on.
    pub fn let_go_time_max(&self) -> Duration {
        self.at(At::Thaw).map(|hook| hook.timeout).sum()
    }

    /// What is done long before the point in time. Returns warnings.
    ///
    /// # Errors
    /// [`QuiesceError::Application`] where one fails that is required.
    pub async fn prepare(
        &self,
        about: &About,
        agent: Option<&AgentAddress>,
        guest_runs: bool,
    ) -> Result<Vec<String>, QuiesceError> {
        let mut warnings = Vec::new();
        let environment = about.environment(At::Before);
        // In a guest that is off nothing can be run, nor needs to be.
        let can_run = |hook: &&Hook| guest_runs || hook.place == Where::Host;
        for hook in self.at(At::Before).filter(can_run) {
            match hook.run(&environment, agent).await {
                Err(error) if hook.required => {
                    return Err(QuiesceError::application(&hook.name(), &in_full(&error)));
                }
                Err(error) => warnings.push(format!("{}: {}", hook.name(), in_full(&error))),
                Ok(()) => {}
            }
        }
        if self.trim && guest_runs {
            match trim(agent).await {
                Ok(()) => {}
                Err(why) => warnings.push(format!("the guest was not trimmed: {why}")),
            }
        }
        Ok(warnings)
    }

    /// Runs the hooks at [`At::Thaw`], each of them. Returns what failed.
    pub async fn thaw(&self, about: &About, agent: Option<&AgentAddress>) -> Vec<String> {
        let mut failures = Vec::new();
        let environment = about.environment(At::Thaw);
        for hook in self.at(At::Thaw) {
            if let Err(error) = hook.run(&environment, agent).await {
                failures.push(format!("{}: {}", hook.name(), in_full(&error)));
            }
        }
        failures
    }

    /// Runs the hooks at [`At::After`], each of them.
    pub async fn conclude(
        &self,
        about: &About,
        agent: Option<&AgentAddress>,
        guest_runs: bool,
        ending: &Ending,
    ) {
        let mut environment = about.environment(At::After);
        environment.extend(ending.environment());
        let can_run = |hook: &&Hook| guest_runs || hook.place == Where::Host;
        for hook in self.at(At::After).filter(can_run) {
            if let Err(error) = hook.run(&environment, agent).await {
                tracing::warn!("{}: {}", hook.name(), in_full(&error));
            }
        }
    }
}

/// `guest-fstrim` of QEMU's `qga/qapi-schema.json`. That some file system cannot be trimmed is usual.
async fn trim(agent: Option<&AgentAddress>) -> Result<(), String> {
    let agent = agent.ok_or("there is no way to a guest agent")?;
    let work = async {
        let agent = Agent::connect(agent).await?;
        agent.command("guest-fstrim", json!({}), TRIM_TIMEOUT).await
    };
    work.await.map(drop).map_err(|error| in_full(&error))
}
