//! The watchdog: a process of its own that freezes, and thaws on its own deadline whatever happens to
//! the run that asked for it.
//!
//! The two talk in lines over the watchdog's standard input and output. When its input ends, because
//! the run is done or dead, the watchdog thaws what it froze, lets a guest go on that the run had
//! paused, and ends. A run that keeps a guest paused while it reads says again and again that it is at
//! work; one that hangs is killed.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines, Stdin};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::task::JoinHandle;

use super::guest_agent::{Agent, AgentAddress, AgentError};
use super::{FREEZE_TIMEOUT, guest_agent};
use crate::hypervisor::libvirt::connection::DomainHandle;
use crate::hypervisor::monitor::{ANSWER_TIMEOUT, Monitor};
use crate::hypervisor::{HypervisorError, Reach};
use crate::syslog;

/// Name of the hidden subcommand that this process runs as.
pub const SUBCOMMAND: &str = "quiesce-watchdog";
/// How long the watchdog goes on trying to let a guest go whose agent or monitor does not answer.
const PATIENCE: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_millis(200);
/// What the run allows beyond the watchdog's own deadline, before it takes the watchdog for dead.
const GRACE: Duration = Duration::from_secs(5);
/// How long a run that keeps a guest paused may say nothing.
const HOLD_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it says something.
pub const HOLD_INTERVAL: Duration = Duration::from_secs(1);

/// Why the watchdog is of no help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchdogError {
    /// It cannot be started.
    #[error("cannot start the watchdog process")]
    Start(#[source] std::io::Error),
    /// It went away.
    #[error("the watchdog process ended")]
    Ended,
    /// It does not answer.
    #[error("the watchdog process did not answer within {} s", .waited.as_secs())]
    Silent {
        /// How long was waited.
        waited: Duration,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    Freeze,
    Thaw,
    WillPause,
    Hold,
    Done,
}

/// What came of a freeze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freeze {
    /// So many file systems are frozen.
    Frozen {
        /// Their number, as the agent says.
        filesystems: u64,
    },
    /// The guest is not frozen, or is being thawed.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What came of a thaw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thaw {
    /// The guest goes on.
    Thawed {
        /// How long it was frozen, from the end of the freeze to the end of the thaw.
        after: Duration,
        /// Whether it was still frozen when the thaw was asked for.
        in_time: bool,
    },
    /// The agent does not answer; the watchdog goes on trying.
    Failed {
        /// What it said last.
        reason: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Freeze(Freeze),
    Thaw(Thaw),
    Noted,
}

/// The run's end of the watchdog.
#[derive(Debug)]
pub struct Watchdog {
    // Its death is not waited for: a watchdog that still tries to thaw outlives the run.
    _process: Child,
    requests: ChildStdin,
    replies: Lines<BufReader<ChildStdout>>,
}

impl Watchdog {
    /// Starts the process. It has its own process group, so that Ctrl-C does not reach it.
    ///
    /// # Errors
    /// [`WatchdogError::Start`].
    pub fn start(agent: Option<&AgentAddress>, reach: &Reach) -> Result<Self, WatchdogError> {
        crate::effect::about_to("watchdog: start").map_err(WatchdogError::Start)?;
        // This very program, even when its file was replaced by an update.
        let mut command = tokio::process::Command::new("/proc/self/exe");
        let json = |value: Result<String, serde_json::Error>| value.expect("addresses are plain");
        command.arg(SUBCOMMAND).arg("--reach").arg(json(serde_json::to_string(reach)));
        if let Some(agent) = agent {
            command.arg("--agent").arg(json(serde_json::to_string(agent)));
        }
        // Its effects are its own: a run that is ended at its n-th must not end its watchdog there.
        for variable in ["KVMSNAP_CRASH_AT", "KVMSNAP_FAIL_AT", "KVMSNAP_EFFECTS"] {
            command.env_remove(variable);
        }
        // A watchdog that still thaws outlives the run: whoever waits for the end of the run's output,
        // such as cron, must not wait for it.
        command.process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().map_err(WatchdogError::Start)?;
        let requests = process.stdin.take().ok_or(WatchdogError::Ended)?;
        let replies = process.stdout.take().ok_or(WatchdogError::Ended)?;
        Ok(Self { _process: process, requests, replies: BufReader::new(replies).lines() })
    }

    /// Freezes the guest.
    ///
    /// # Errors
    /// [`WatchdogError`] when the watchdog itself fails; what the agent says is in the reply.
    pub async fn freeze(&mut self) -> Result<Freeze, WatchdogError> {
        match self.ask(Request::Freeze).await? {
            Reply::Freeze(freeze) => Ok(freeze),
            _ => Err(WatchdogError::Ended),
        }
    }

    /// Thaws the guest.
    ///
    /// # Errors
    /// [`WatchdogError`] when the watchdog itself fails; what the agent says is in the reply.
    pub async fn thaw(&mut self) -> Result<Thaw, WatchdogError> {
        match self.ask(Request::Thaw).await? {
            Reply::Thaw(thaw) => Ok(thaw),
            _ => Err(WatchdogError::Ended),
        }
    }

    /// Has the watchdog let the guest go on, should this process end from here on.
    ///
    /// # Errors
    /// [`WatchdogError`]: then nothing may be paused.
    pub async fn will_pause(&mut self) -> Result<(), WatchdogError> {
        self.ask(Request::WillPause).await.map(drop)
    }

    /// Says that the guest is paused, and that this process is at work on what that is for. Until the next
    /// word no deadline of a freeze counts, for the guest's clock stands still too.
    ///
    /// # Errors
    /// [`WatchdogError`].
    pub async fn hold(&mut self) -> Result<(), WatchdogError> {
        self.ask(Request::Hold).await.map(drop)
    }

    /// Tells the watchdog that nothing is left to guard but what it is thawing already.
    pub async fn done(mut self) {
        // A watchdog that is gone already has nothing to guard either.
        let _ = self.say(Request::Done).await;
    }

    async fn say(&mut self, request: Request) -> Result<(), WatchdogError> {
        let mut line = serde_json::to_vec(&request).expect("a plain enumeration");
        line.push(b'\n');
        self.requests.write_all(&line).await.map_err(|_| WatchdogError::Ended)
    }

    async fn ask(&mut self, request: Request) -> Result<Reply, WatchdogError> {
        self.say(request).await?;
        let waited = FREEZE_TIMEOUT + GRACE;
        match tokio::time::timeout(waited, self.replies.next_line()).await {
            Err(_) => Err(WatchdogError::Silent { waited }),
            Ok(Ok(Some(line))) => serde_json::from_str(&line).map_err(|_| WatchdogError::Ended),
            Ok(_) => Err(WatchdogError::Ended),
        }
    }
}

/// The watchdog process itself. Returns when nothing is left to guard.
pub async fn run(agent: Option<AgentAddress>, reach: Reach) {
    let mut guard = Guard {
        agent,
        frozen: None,
        frozen_at: None,
        deadline: None,
        let_go_early: false,
        thawing: None,
        may_be_paused: false,
        run: getppid(),
        hold_until: None,
        requests: BufReader::new(tokio::io::stdin()).lines(),
    };
    guard.serve().await;
    let may_be_paused = guard.may_be_paused;
    let resume = async {
        if may_be_paused && let Err(error) = let_go_on(&reach).await {
            syslog::tell(&format!("a guest may be paused, let it go on with `cont`: {error}"));
        }
    };
    let thaw = async {
        if guard.frozen.is_some() || guard.deadline.is_some() || guard.thawing.is_some() {
            guard.begin_thaw();
            if let Err(reason) = guard.thawed().await {
                let words = "a guest may be frozen, its agent does not thaw it";
                syslog::tell(&format!("{words}: {reason}"));
            }
        }
    };
    // At once: the run may let the guest go on while it keeps everybody else from its monitor.
    tokio::join!(resume, thaw);
}

struct Guard {
    agent: Option<AgentAddress>,
    /// The connection over which the guest was frozen, and how many file systems were.
    frozen: Option<(Agent, u64)>,
    frozen_at: Option<Instant>,
    /// When the guest must be thawed at the latest; set from the freeze command on.
    deadline: Option<tokio::time::Instant>,
    /// Whether the guest was thawed before the run asked for it.
    let_go_early: bool,
    thawing: Option<JoinHandle<Result<u64, AgentError>>>,
    may_be_paused: bool,
    /// The process that asks.
    run: Pid,
    /// When a run that keeps the guest paused is taken for one that hangs.
    hold_until: Option<tokio::time::Instant>,
    requests: Lines<BufReader<Stdin>>,
}

enum Woken {
    Request(Request),
    Ended,
    Deadline,
    Hangs,
}

impl Guard {
    async fn serve(&mut self) {
        loop {
            let reply = match self.next().await {
                Woken::Ended => return,
                Woken::Deadline => {
                    self.let_go_early = true;
                    self.begin_thaw();
                    continue;
                }
                Woken::Hangs => {
                    self.hold_until = None;
                    self.end_run();
                    continue;
                }
                Woken::Request(Request::Freeze) => Reply::Freeze(self.freeze().await),
                Woken::Request(Request::Thaw) => Reply::Thaw(self.thaw().await),
                Woken::Request(Request::WillPause) => {
                    self.may_be_paused = true;
                    Reply::Noted
                }
                Woken::Request(Request::Hold) => {
                    self.deadline = None;
                    self.hold_until = Some(tokio::time::Instant::now() + HOLD_TIMEOUT);
                    Reply::Noted
                }
                Woken::Request(Request::Done) => {
                    self.may_be_paused = false;
                    Reply::Noted
                }
            };
            let mut line = serde_json::to_vec(&reply).expect("replies have only string keys");
            line.push(b'\n');
            let mut out = tokio::io::stdout();
            if out.write_all(&line).await.is_err() || out.flush().await.is_err() {
                return;
            }
        }
    }

    async fn next(&mut self) -> Woken {
        let until = |deadline: Option<tokio::time::Instant>| async move {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let (expired, hangs) = (until(self.deadline), until(self.hold_until));
        tokio::select! {
            line = self.requests.next_line() => match line {
                Ok(Some(line)) => serde_json::from_str(&line).map_or(Woken::Ended, Woken::Request),
                _ => Woken::Ended,
            },
            () = expired => Woken::Deadline,
            () = hangs => Woken::Hangs,
        }
    }

    /// Kills a run that hangs: it keeps the guest paused, and QEMU's monitor from everybody else. What
    /// follows is what follows a run's death.
    fn end_run(&self) {
        // One that is no longer our parent is dead.
        if getppid() == self.run {
            syslog::tell("a backup hung while it kept a guest paused: it was killed");
            // It may have ended by itself.
            let _ = kill(self.run, Signal::SIGKILL);
        }
    }

    /// Freezes, unless the run ends or the deadline passes first; then what the guest may still do is
    /// undone by the thaw that follows.
    async fn freeze(&mut self) -> Freeze {
        let Some(address) = self.agent.clone() else {
            return Freeze::Failed { reason: "there is no way to a guest agent".into() };
        };
        let agent = match Agent::connect(&address).await {
            Ok(agent) => agent,
            Err(error) => return Freeze::Failed { reason: error.to_string() },
        };
        self.deadline = Some(tokio::time::Instant::now() + FREEZE_TIMEOUT);
        let outcome = tokio::select! {
            outcome = agent.freeze(FREEZE_TIMEOUT) => outcome,
            // The run says nothing before it has this answer: this is its end.
            _ = self.requests.next_line() => {
                return Freeze::Failed { reason: "the run ended".into() };
            }
        };
        match outcome {
            Ok(filesystems) => {
                self.frozen_at = Some(Instant::now());
                self.frozen = Some((agent, filesystems));
                Freeze::Frozen { filesystems }
            }
            Err(error) => {
                drop(agent);
                // The agent may have frozen all the same, or may still do it.
                self.begin_thaw();
                Freeze::Failed { reason: error.to_string() }
            }
        }
    }

    async fn thaw(&mut self) -> Thaw {
        self.hold_until = None;
        let in_time = !self.let_go_early;
        let frozen = self.frozen.as_ref().map_or(0, |(_, filesystems)| *filesystems);
        self.begin_thaw();
        match tokio::time::timeout(FREEZE_TIMEOUT, self.thawed()).await {
            Err(_) => Thaw::Failed { reason: "the agent does not answer to the thaw".into() },
            Ok(Err(reason)) => Thaw::Failed { reason },
            // A guest that says it had nothing to thaw had let go by itself.
            Ok(Ok(filesystems)) => Thaw::Thawed {
                after: self.frozen_at.map_or(Duration::ZERO, |at| at.elapsed()),
                in_time: in_time && (filesystems > 0 || frozen == 0),
            },
        }
    }

    /// Starts to thaw, in the background, unless that is under way.
    fn begin_thaw(&mut self) {
        self.deadline = None;
        if let (Some(address), None) = (self.agent.clone(), &self.thawing) {
            let connected = self.frozen.take().map(|(agent, _)| agent);
            let thaw = async move { guest_agent::thaw(&address, connected, PATIENCE).await };
            self.thawing = Some(tokio::spawn(thaw));
        }
    }

    /// Waits for the thaw that was begun. May be dropped and called again.
    async fn thawed(&mut self) -> Result<u64, String> {
        let Some(thawing) = &mut self.thawing else { return Ok(0) };
        let outcome = thawing.await;
        self.thawing = None;
        match outcome {
            Ok(outcome) => outcome.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Lets a guest go on that the run had paused; one that runs is left alone. Somebody may hold the
/// monitor: then again and again.
async fn let_go_on(reach: &Reach) -> Result<(), HypervisorError> {
    let start = Instant::now();
    loop {
        let attempt = async {
            match reach {
                Reach::Monitor(monitor) => {
                    Monitor::connect(monitor, ANSWER_TIMEOUT).await?.let_go_on().await
                }
                Reach::Domain(address) => DomainHandle::connect(address).await?.let_go_on().await,
            }
        };
        match attempt.await {
            Err(gone) if matches!(reach, Reach::Domain(_)) && gone.is_gone() => return Ok(()),
            Err(_) if start.elapsed() < PATIENCE => tokio::time::sleep(PAUSE).await,
            outcome => return outcome,
        }
    }
}
