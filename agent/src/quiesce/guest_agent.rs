//! The guest agent's part in quiescing: freeze and thaw file systems.

use std::ffi::c_int;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qmp_client::{Options, Qga, QgaError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virt::domain::Domain;

use super::FREEZE_TIMEOUT;
use crate::effect;
use crate::hypervisor::libvirt::connection::DomainHandle;
use crate::hypervisor::libvirt::sys;
use crate::hypervisor::{DomainAddress, HypervisorError};

/// How long an agent may take to show that it is there.
const PRESENCE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one attempt to thaw may take.
const THAW_TIMEOUT: Duration = Duration::from_secs(5);
/// What libvirt may take beyond the time that the agent has for a command.
const LIBVIRT_GRACE: Duration = Duration::from_secs(2);
/// Longest answer that is looked at, as by our own client of the agent's socket.
const ANSWER_LEN_MAX: usize = 1 << 20;
const THAW_PAUSE: Duration = Duration::from_millis(200);

/// How a guest agent is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentAddress {
    /// Through its socket.
    Socket(PathBuf),
    /// Through libvirt, which holds the socket.
    Domain(DomainAddress),
}

/// Why an agent did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The agent cannot be reached, or refuses.
    #[error(transparent)]
    Agent(#[from] QgaError),
    /// libvirt cannot be reached, or the agent refuses. libvirt's words are the ones that tell.
    #[error("{}", innermost(.0))]
    Libvirt(#[from] HypervisorError),
    /// Its answer is longer than any that makes sense.
    #[error("the guest agent's answer is longer than {limit} bytes")]
    TooLong {
        /// What is taken.
        limit: usize,
    },
    /// Its answer is no JSON.
    #[error("the guest agent's answer makes no sense")]
    Malformed,
    /// No answer came.
    #[error("the guest agent did not answer within {} s", .waited.as_secs())]
    Silent {
        /// How long was waited.
        waited: Duration,
    },
}

fn innermost(error: &HypervisorError) -> &dyn fmt::Display {
    match error {
        HypervisorError::Libvirt { source, .. } => source,
        error => error,
    }
}

/// A guest agent that was reached.
#[derive(Debug)]
pub enum Agent {
    /// Through its socket.
    Socket(Qga),
    /// Through libvirt.
    Domain(DomainHandle),
}

impl Agent {
    /// Connects. An agent with a socket that does not answer shows within two seconds; libvirt tells
    /// with the first command.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn connect(address: &AgentAddress) -> Result<Self, AgentError> {
        match address {
            AgentAddress::Socket(socket) => Ok(Self::Socket(connect(socket).await?)),
            AgentAddress::Domain(domain) => Ok(Self::Domain(DomainHandle::connect(domain).await?)),
        }
    }

    /// Freezes all mounted file systems and returns how many.
    ///
    /// # Errors
    /// [`AgentError`]. One that is late says nothing about whether the guest froze, or will: thaw it.
    pub async fn freeze(&self, timeout: Duration) -> Result<u64, AgentError> {
        match self {
            Self::Socket(agent) => {
                announce("agent: freeze")?;
                let reply = agent.execute("guest-fsfreeze-freeze", json!({}), timeout).await?;
                Ok(count(&reply))
            }
            Self::Domain(domain) => {
                // Otherwise libvirt waits for an agent that hangs, and lets nobody else reach it.
                let seconds = timeout.as_secs().try_into().ok();
                let limit = move |domain: &_| sys::agent_timeout(domain, seconds);
                domain.ask("limit its wait for the guest agent", limit).await?;
                within(timeout, domain.change("freeze the guest", sys::fs_freeze)).await
            }
        }
    }

    /// Passes any other command on, and returns what it returns: the guest may say anything.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn command(
        &self,
        name: &'static str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, AgentError> {
        match self {
            Self::Socket(agent) => Ok(agent.execute(name, arguments, timeout).await?),
            Self::Domain(domain) => {
                let text = json!({"execute": name, "arguments": arguments}).to_string();
                let seconds = timeout.as_secs().max(1).try_into().unwrap_or(c_int::MAX);
                let pass = move |domain: &Domain| domain.qemu_agent_command(&text, seconds, 0);
                let answer = domain.ask("pass a command to the guest agent", pass);
                // libvirt counts from when it has sent it.
                let waited = timeout + LIBVIRT_GRACE;
                let answer = match tokio::time::timeout(waited, answer).await {
                    Ok(answer) => answer?,
                    Err(_) => return Err(AgentError::Silent { waited }),
                };
                if answer.len() > ANSWER_LEN_MAX {
                    return Err(AgentError::TooLong { limit: ANSWER_LEN_MAX });
                }
                let answer: Value =
                    serde_json::from_str(&answer).map_err(|_| AgentError::Malformed)?;
                Ok(answer["return"].clone())
            }
        }
    }

    async fn thaw(&self) -> Result<u64, AgentError> {
        match self {
            Self::Socket(agent) => {
                announce("agent: thaw")?;
                let reply = agent.execute("guest-fsfreeze-thaw", json!({}), THAW_TIMEOUT).await?;
                Ok(count(&reply))
            }
            Self::Domain(domain) => {
                // It may wait for a freeze that hangs; that one has a limit.
                let timeout = FREEZE_TIMEOUT + THAW_TIMEOUT;
                let thawed = within(timeout, domain.change("thaw the guest", sys::fs_thaw)).await?;
                let unlimited = |domain: &_| sys::agent_timeout(domain, None);
                if let Err(error) = domain.ask("wait for the guest agent", unlimited).await {
                    tracing::warn!(%error, "libvirt goes on limiting its wait for the guest agent");
                }
                Ok(thawed)
            }
        }
    }
}

async fn within(
    waited: Duration,
    call: impl Future<Output = Result<u64, HypervisorError>>,
) -> Result<u64, AgentError> {
    match tokio::time::timeout(waited, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(AgentError::Silent { waited }),
    }
}

async fn connect(socket: &Path) -> Result<Qga, QgaError> {
    Qga::connect(socket, Options { timeout: PRESENCE_TIMEOUT, ..Options::default() }).await
}

/// Thaws until the agent says that it did, or `timeout` is over; first over the connection that is
/// there, if one is. Returns how many file systems.
///
/// # Errors
/// What the last attempt said.
pub async fn thaw(
    address: &AgentAddress,
    mut connected: Option<Agent>,
    timeout: Duration,
) -> Result<u64, AgentError> {
    let start = Instant::now();
    loop {
        let attempt = async {
            let agent = match connected.take() {
                Some(agent) => agent,
                None => Agent::connect(address).await?,
            };
            agent.thaw().await
        };
        match attempt.await {
            Ok(filesystems) => return Ok(filesystems),
            // Nothing of it is left to thaw.
            Err(AgentError::Libvirt(gone)) if gone.is_gone() => return Ok(0),
            Err(error) if start.elapsed() > timeout => return Err(error),
            Err(error) => tracing::debug!(%error, "thaw again"),
        }
        tokio::time::sleep(THAW_PAUSE).await;
    }
}

/// Replies are the guest's: whatever is no number counts as none.
fn count(reply: &Value) -> u64 {
    reply.as_u64().unwrap_or(0)
}

fn announce(effect: &str) -> Result<(), QgaError> {
    effect::about_to(effect).map_err(|_| QgaError::Closed { command: effect.to_owned() })
}
