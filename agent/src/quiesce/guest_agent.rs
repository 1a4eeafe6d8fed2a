//! The guest agent's part in quiescing: freeze and thaw file systems.

use std::path::Path;
use std::time::{Duration, Instant};

use qmp_client::{Options, Qga, QgaError};
use serde_json::{Value, json};

use crate::effect;

/// How long an agent may take to show that it is there.
const PRESENCE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one attempt to thaw may take.
const THAW_TIMEOUT: Duration = Duration::from_secs(5);
const THAW_PAUSE: Duration = Duration::from_millis(200);

/// Connects to the agent.
///
/// # Errors
/// As [`Qga::connect`]; an agent that does not answer shows within two seconds.
pub async fn connect(socket: &Path) -> Result<Qga, QgaError> {
    Qga::connect(socket, Options { timeout: PRESENCE_TIMEOUT, ..Options::default() }).await
}

/// Freezes all mounted file systems and returns how many.
///
/// # Errors
/// As [`Qga::execute`]. A timeout says nothing about whether the guest froze, or will: thaw it.
pub async fn freeze(agent: &Qga, timeout: Duration) -> Result<u64, QgaError> {
    announce("agent: freeze")?;
    let reply = agent.execute("guest-fsfreeze-freeze", json!({}), timeout).await?;
    Ok(count(&reply))
}

/// Thaws until the agent says that it did, or `timeout` is over; first over the connection that is
/// there, if one is. Returns how many file systems.
///
/// # Errors
/// What the last attempt said.
pub async fn thaw(
    socket: &Path,
    mut connected: Option<Qga>,
    timeout: Duration,
) -> Result<u64, QgaError> {
    let start = Instant::now();
    loop {
        let attempt = async {
            let agent = match connected.take() {
                Some(agent) => agent,
                None => connect(socket).await?,
            };
            announce("agent: thaw")?;
            agent.execute("guest-fsfreeze-thaw", json!({}), THAW_TIMEOUT).await
        };
        match attempt.await {
            Ok(reply) => return Ok(count(&reply)),
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
