//! `[[domain."web".hook]]`: commands on the host and scripts in the guest that run around a point in time. Never
//! through a shell, each with a deadline.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Child;
use tokio::time::Instant;

use super::guest_agent::{Agent, AgentAddress, AgentError};
use crate::names::printable;
use crate::{bound, effect, units};

/// How long a hook may take unless told otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);
/// What holds a guest's users up is short.
const HOLDING_TIMEOUT_MAX: Duration = Duration::from_secs(120);
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);
/// How much of what a hook says last on its standard error is kept.
const WORDS_LEN_MAX: usize = 4 << 10;
/// How long the end of its standard error may take once it has ended: what it started may hold it open.
const WORDS_TIMEOUT: Duration = Duration::from_millis(200);
/// How often the guest's agent is asked whether a script has ended.
const GUEST_POLL: Duration = Duration::from_millis(100);
/// How long the agent may take for one answer.
const GUEST_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum At {
    /// Long before the point in time.
    Before,
    /// Right before it.
    Freeze,
    /// Right after it, whatever came of it.
    Thaw,
    /// At the end, with what came of the backup.
    After,
}

impl At {
    /// The setting's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::Freeze => "freeze",
            Self::Thaw => "thaw",
            Self::After => "after",
        }
    }
}

/// Where a hook runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Where {
    /// As a process of this host.
    #[default]
    Host,
    /// In the guest, by its agent.
    Guest,
}

/// A command that runs around a point in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Hook {
    /// When.
    pub at: At,
    /// Where.
    pub place: Where,
    /// Its program.
    pub program: String,
    /// The program's arguments.
    pub arguments: Vec<String>,
    /// How long it may take.
    pub timeout: Duration,
    /// Whether there is no backup without it.
    pub required: bool,
}

/// As it is written.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    at: At,
    #[serde(rename = "where", default)]
    place: Where,
    command: Vec<String>,
    #[serde(default = "usual_timeout", with = "units::duration")]
    timeout: Duration,
    #[serde(default)]
    required: bool,
}

fn usual_timeout() -> Duration {
    TIMEOUT
}

impl TryFrom<Written> for Hook {
    type Error = String;
    fn try_from(written: Written) -> Result<Self, String> {
        let Written { at, place, mut command, timeout, required } = written;
        if command.first().is_none_or(String::is_empty) {
            return Err("the hook's command is empty".to_owned());
        }
        if command.iter().any(|word| word.contains('\0')) {
            return Err("the hook's command holds a zero byte".to_owned());
        }
        if required && matches!(at, At::Thaw | At::After) {
            let at = at.as_str();
            return Err(format!(
                "a hook at `{at}` cannot be required: the backup is taken by then"
            ));
        }
        let timeout_max = match at {
            At::Freeze | At::Thaw => HOLDING_TIMEOUT_MAX,
            At::Before | At::After => TIMEOUT_MAX,
        };
        if timeout > timeout_max {
            let (at, max) = (at.as_str(), units::human_duration(timeout_max));
            return Err(format!("a hook at `{at}` may take {max} at most"));
        }
        let program = command.remove(0);
        Ok(Self { at, place, program, arguments: command, timeout, required })
    }
}

impl From<Hook> for Written {
    fn from(hook: Hook) -> Self {
        let Hook { at, place, program, arguments, timeout, required } = hook;
        let command = [vec![program], arguments].concat();
        Self { at, place, command, timeout, required }
    }
}

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// It cannot be started.
    #[error("it cannot be started")]
    Start(#[source] io::Error),
    /// It ended with a code other than 0. The words are the last that it said.
    #[error("{how}{}", if .words.is_empty() { String::new() } else { format!(": {}", .words) })]
    Failed {
        /// The code, or the signal.
        how: String,
        /// The last line of its standard error.
        words: String,
    },
    /// It took too long.
    #[error("it did not end within {}", units::human_duration(*.timeout))]
    Late {
        /// How long it may take.
        timeout: Duration,
    },
    /// The guest's agent did not run it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// There is no agent.
    #[error("there is no way to a guest agent")]
    NoAgent,
    /// What the agent says of it makes no sense.
    #[error("the guest agent's answer makes no sense")]
    Answer,
}

impl Hook {
    /// What it is called in messages.
    pub fn name(&self) -> String {
        let place = match self.place {
            Where::Host => "",
            Where::Guest => " in the guest",
        };
        format!("hook `{}`{place} at {}", printable(&self.program), self.at.as_str())
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// [`HookError`]. On the host nothing of it runs after that, in the guest something may.
    pub async fn run(
        &self,
        environment: &[(String, String)],
        agent: Option<&AgentAddress>,
    ) -> Result<(), HookError> {
        tracing::info!("{}", self.name());
        effect::about_to("hook").map_err(HookError::Start)?;
        match (self.place, agent) {
            (Where::Host, _) => self.on_host(environment).await,
            (Where::Guest, Some(agent)) => self.in_guest(environment, agent).await,
            (Where::Guest, None) => Err(HookError::NoAgent),
        }
    }

    async fn on_host(&self, environment: &[(String, String)]) -> Result<(), HookError> {
        let mut command = bound::command(&self.program);
        command.args(&self.arguments).envs(environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(HookError::Start)?;
        let words = child.stderr.take().expect("it was asked for");
        let words = tokio::spawn(last_words(words));
        let status = match tokio::time::timeout(self.timeout, child.wait()).await {
            Ok(status) => status.map_err(HookError::Start)?,
            Err(_) => {
                end(&mut child).await;
                return Err(HookError::Late { timeout: self.timeout });
            }
        };
        if status.success() {
            return Ok(());
        }
        let words = tokio::time::timeout(WORDS_TIMEOUT, words).await;
        let words = words.ok().and_then(Result::ok).unwrap_or_default();
        Err(HookError::Failed { how: how(status), words: last_line(&words) })
    }

    /// By `guest-exec` of QEMU's `qga/qapi-schema.json`.
    async fn in_guest(
        &self,
        environment: &[(String, String)],
        agent: &AgentAddress,
    ) -> Result<(), HookError> {
        let deadline = Instant::now() + self.timeout;
        let late = || HookError::Late { timeout: self.timeout };
        let environment: Vec<_> =
            environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let work = async {
            let agent = Agent::connect(agent).await?;
            let arguments = json!({
                "path": self.program, "arg": self.arguments, "env": environment,
                "capture-output": true,
            });
            let started = agent.command("guest-exec", arguments, GUEST_ANSWER_TIMEOUT).await?;
            let pid = started["pid"].as_i64().ok_or(HookError::Answer)?;
            loop {
                let ask = json!({"pid": pid});
                let status = agent.command("guest-exec-status", ask, GUEST_ANSWER_TIMEOUT).await?;
                if status["exited"] == json!(true) {
                    return guest_outcome(&status);
                }
                tokio::time::sleep(GUEST_POLL).await;
            }
        };
        tokio::time::timeout_at(deadline, work).await.map_err(|_| late())?
    }
}

/// All of a hook, also what it has started, but for what left its process group.
async fn end(child: &mut Child) {
    if let Some(group) = child.id().and_then(|id| i32::try_from(id).ok()) {
        // It may have ended just now.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    // A process that the kernel does not let go of is left to it.
    let _ = tokio::time::timeout(WORDS_TIMEOUT, child.wait()).await;
}

/// The end of what is said.
async fn last_words(mut from: impl AsyncRead + Unpin) -> Vec<u8> {
    let (mut words, mut part) = (Vec::new(), vec![0; WORDS_LEN_MAX]);
    while let Ok(len @ 1..) = from.read(&mut part).await {
        words.extend_from_slice(&part[..len]);
        let surplus = words.len().saturating_sub(WORDS_LEN_MAX);
        words.drain(..surplus);
    }
    words
}

fn last_line(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    printable(text.trim_end().lines().last().unwrap_or_default())
}

fn how(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("it ended with {code}"),
        None => status.to_string(),
    }
}

/// What the agent says of a script that has ended; the guest may say anything.
fn guest_outcome(status: &Value) -> Result<(), HookError> {
    let how = match (status["exitcode"].as_i64(), status["signal"].as_i64()) {
        (Some(0), _) => return Ok(()),
        (Some(code), _) => format!("it ended with {code}"),
        (None, Some(signal)) => format!("signal {signal} ended it"),
        (None, None) => return Err(HookError::Answer),
    };
    let words = BASE64.decode(status["err-data"].as_str().unwrap_or_default()).unwrap_or_default();
    let end = &words[words.len().saturating_sub(WORDS_LEN_MAX)..];
    Err(HookError::Failed { how, words: last_line(end) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(text: &str) -> Result<Hook, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_hook_is_read_and_handed_on_as_it_is_written() {
        let read = hook(
            "at = \"freeze\"\nwhere = \"guest\"\ncommand = [\"/bin/sync\", \"-f\"]\ntimeout = \"5s\"",
        )
        .unwrap();
        assert_eq!((read.at, read.place), (At::Freeze, Where::Guest));
        assert_eq!((read.program.as_str(), read.arguments.len()), ("/bin/sync", 1));
        let handed_on = serde_json::to_string(&read).unwrap();
        assert_eq!(serde_json::from_str::<Hook>(&handed_on).unwrap(), read);
        assert_eq!(hook("at = \"before\"\ncommand = [\"x\"]").unwrap().timeout, TIMEOUT);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, why) in [
            ("at = \"before\"\ncommand = []", "empty"),
            ("at = \"before\"\ncommand = [\"\"]", "empty"),
            ("at = \"thaw\"\ncommand = [\"x\"]\nrequired = true", "cannot be required"),
            ("at = \"freeze\"\ncommand = [\"x\"]\ntimeout = \"1h\"", "at most"),
            ("at = \"later\"\ncommand = [\"x\"]", "unknown variant"),
            ("at = \"before\"\ncommand = [\"x\"]\nshell = true", "unknown field"),
            ("at = \"before\"\ncommand = \"rm -rf /\"", "invalid type"),
        ] {
            let told = hook(text).expect_err(text);
            assert!(told.contains(why), "{text}: {told}");
        }
    }

    #[test]
    fn r15_whatever_a_guest_says_of_a_script_is_an_outcome() {
        assert!(guest_outcome(&json!({"exited": true, "exitcode": 0})).is_ok());
        let told = |status: Value| guest_outcome(&status).unwrap_err().to_string();
        let words = BASE64.encode("no\nwrong \x1b[31mtree\n");
        let status = json!({"exited": true, "exitcode": 3, "err-data": words});
        assert_eq!(told(status), "it ended with 3: wrong \\u{1b}[31mtree");
        assert_eq!(told(json!({"signal": 9, "err-data": "!"})), "signal 9 ended it");
        assert!(told(json!([1, 2])).contains("no sense"));
    }
}
