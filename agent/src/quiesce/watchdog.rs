//! The watchdog: a process of its own that locks databases, tells hooks, and freezes, and lets go on its own
//! deadline whatever happens to the run that asked for it.
//!
//! The two talk in lines over the watchdog's standard input and output. When its input ends, because
//! the run is done or dead, the watchdog thaws what it froze, lets go of what it locked, tells the hooks, lets a
//! guest go on that the run had paused, and ends. A run that keeps a guest paused while it reads says again and again that it is at
//! work; one that hangs is killed.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines, Stdin};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::task::JoinHandle;

use super::application::{About, Applications, Report, State};
use super::guest_agent::{Agent, AgentAddress, AgentError};
use super::still::Still;
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
/// How long a run may take, beyond the pause that it announced, for its own calls: one of libvirt's may take a
/// minute.
const PAUSE_GRACE: Duration = Duration::from_secs(90);
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

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    HoldStill(Box<HoldStill>),
    LetGo,
    WillPause { at_most: Duration },
    Hold,
    Done,
}

/// What shall hold still.
#[derive(Debug, Serialize, Deserialize)]
pub struct HoldStill {
    /// Databases and hooks.
    pub applications: Applications,
    /// What these are told.
    pub about: About,
    /// Whether file systems are frozen after them.
    pub freezes: bool,
}

/// What holds still.
#[derive(Debug, Serialize, Deserialize)]
pub struct HeldStill {
    /// Databases and hooks.
    pub reports: Vec<Report>,
    /// File systems; `None` where they were not to be frozen, or an application failed that is required.
    pub freeze: Option<Freeze>,
}

/// How all went on.
#[derive(Debug, Serialize, Deserialize)]
pub struct LetGo {
    /// How applications held still up to then.
    pub reports: Vec<Report>,
    /// Hooks that could not be told.
    pub failures: Vec<String>,
    /// File systems; `None` where they were not frozen.
    pub thaw: Option<Thaw>,
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
    HeldStill(HeldStill),
    LetGo(LetGo),
    Noted,
}

/// The run's end of the watchdog.
#[derive(Debug)]
pub struct Watchdog {
    // Its death is not waited for: a watchdog that still tries to thaw outlives the run.
    _process: Child,
    requests: ChildStdin,
    replies: Lines<BufReader<ChildStdout>>,
    /// How long hooks may take to hear that it is over.
    let_go_time_max: Duration,
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
        let replies = BufReader::new(replies).lines();
        Ok(Self { _process: process, requests, replies, let_go_time_max: Duration::ZERO })
    }

    /// Has applications hold still, and freezes the guest after them.
    ///
    /// # Errors
    /// [`WatchdogError`] when the watchdog itself fails; what servers, hooks and the agent say is in the reply.
    pub async fn hold_still(&mut self, wanted: HoldStill) -> Result<HeldStill, WatchdogError> {
        self.let_go_time_max = wanted.applications.let_go_time_max();
        let time_max = wanted.applications.hold_time_max() + FREEZE_TIMEOUT + self.let_go_time_max;
        match self.ask(Request::HoldStill(Box::new(wanted)), time_max).await? {
            Reply::HeldStill(held) => Ok(held),
            _ => Err(WatchdogError::Ended),
        }
    }

    /// Thaws the guest, and lets applications go on.
    ///
    /// # Errors
    /// As [`Self::hold_still`].
    pub async fn let_go(&mut self) -> Result<LetGo, WatchdogError> {
        let time_max = FREEZE_TIMEOUT + self.let_go_time_max;
        match self.ask(Request::LetGo, time_max).await? {
            Reply::LetGo(went) => Ok(went),
            _ => Err(WatchdogError::Ended),
        }
    }

    /// Has the watchdog let the guest go on, should this process end from here on, or say nothing more until
    /// long after the pause should be over.
    ///
    /// # Errors
    /// [`WatchdogError`]: then nothing may be paused.
    pub async fn will_pause(&mut self, at_most: Duration) -> Result<(), WatchdogError> {
        self.ask(Request::WillPause { at_most }, FREEZE_TIMEOUT).await.map(drop)
    }

    /// Says that the guest is paused, and that this process is at work on what that is for. Until the next
    /// word no deadline of a freeze counts, for the guest's clock stands still too.
    ///
    /// # Errors
    /// [`WatchdogError`].
    pub async fn hold(&mut self) -> Result<(), WatchdogError> {
        self.ask(Request::Hold, FREEZE_TIMEOUT).await.map(drop)
    }

    /// Tells the watchdog that nothing is left to guard but what it is thawing already.
    pub async fn done(mut self) {
        // A watchdog that is gone already has nothing to guard either.
        let _ = self.say(&Request::Done).await;
    }

    async fn say(&mut self, request: &Request) -> Result<(), WatchdogError> {
        let mut line = serde_json::to_vec(request).expect("requests have only string keys");
        line.push(b'\n');
        self.requests.write_all(&line).await.map_err(|_| WatchdogError::Ended)
    }

    async fn ask(&mut self, request: Request, limit: Duration) -> Result<Reply, WatchdogError> {
        let waited = limit + GRACE;
        let answer = async {
            self.say(&request).await?;
            match self.replies.next_line().await {
                Ok(Some(line)) => serde_json::from_str(&line).map_err(|_| WatchdogError::Ended),
                _ => Err(WatchdogError::Ended),
            }
        };
        let answer = tokio::time::timeout(waited, answer).await;
        answer.unwrap_or(Err(WatchdogError::Silent { waited }))
    }
}

/// The watchdog process itself. Returns when nothing is left to guard.
pub async fn run(agent: Option<AgentAddress>, reach: Reach) {
    let mut guard = Guard {
        agent,
        still: None,
        frozen: None,
        frozen_at: None,
        was_frozen: false,
        deadline: None,
        let_go_early: false,
        thawing: None,
        thawed: None,
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
    let let_go = async {
        guard.let_go_of_all().await;
        if let Some(still) = &guard.still {
            for failure in still.outcome().1 {
                syslog::tell(&format!("after a point in time: {failure}"));
            }
        }
        if let Err(reason) = guard.wait_until_thawed().await {
            let words = "a guest may be frozen, its agent does not thaw it";
            syslog::tell(&format!("{words}: {reason}"));
        }
    };
    // At once: the run may let the guest go on while it keeps everybody else from its monitor.
    tokio::join!(resume, let_go);
}

struct Guard {
    agent: Option<AgentAddress>,
    /// The databases and hooks that were told to hold still.
    still: Option<Still>,
    /// The connection over which the guest was frozen, and how many file systems were.
    frozen: Option<(Agent, u64)>,
    frozen_at: Option<Instant>,
    /// Whether the agent was told to freeze.
    was_frozen: bool,
    /// When all must be let go at the latest.
    deadline: Option<tokio::time::Instant>,
    /// Whether that was before the run asked for it.
    let_go_early: bool,
    thawing: Option<JoinHandle<(Result<u64, AgentError>, Instant)>>,
    /// What came of the thaw, and when.
    thawed: Option<(Result<u64, String>, Instant)>,
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
                    self.let_go_of_all().await;
                    continue;
                }
                Woken::Hangs => {
                    self.hold_until = None;
                    self.end_run();
                    continue;
                }
                Woken::Request(Request::HoldStill(wanted)) => {
                    Reply::HeldStill(self.hold_still(*wanted).await)
                }
                Woken::Request(Request::LetGo) => Reply::LetGo(self.let_go().await),
                Woken::Request(Request::WillPause { at_most }) => {
                    self.may_be_paused = true;
                    let limit = at_most.saturating_add(PAUSE_GRACE);
                    self.hold_until = tokio::time::Instant::now().checked_add(limit);
                    Reply::Noted
                }
                Woken::Request(Request::Hold) => {
                    // The point in time is there; a server in a guest that is paused answers to nothing.
                    if let Some(still) = &mut self.still {
                        still.abandon();
                    }
                    self.deadline = None;
                    self.hold_until = Some(tokio::time::Instant::now() + HOLD_TIMEOUT);
                    Reply::Noted
                }
                Woken::Request(Request::Done) => {
                    self.may_be_paused = false;
                    self.hold_until = None;
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

    /// Unless the run ends first; then what was begun is undone by what follows its end.
    async fn hold_still(&mut self, wanted: HoldStill) -> HeldStill {
        let HoldStill { applications, about, freezes } = wanted;
        let still = self.still.insert(Still::new(applications, about, self.agent.clone()));
        let all_hold = tokio::select! {
            all_hold = still.hold() => all_hold,
            // The run says nothing before it has this answer: this is its end.
            _ = self.requests.next_line() => false,
        };
        if !all_hold {
            self.let_go_of_all().await;
            return HeldStill { reports: self.outcome().0, freeze: None };
        }
        self.deadline = Some(tokio::time::Instant::now() + FREEZE_TIMEOUT);
        let freeze = match freezes {
            true => Some(self.freeze().await),
            false => None,
        };
        if let Some(still) = &mut self.still {
            still.confirm().await;
        }
        HeldStill { reports: self.outcome().0, freeze }
    }

    fn outcome(&self) -> (Vec<Report>, Vec<String>) {
        self.still.as_ref().map(Still::outcome).unwrap_or_default()
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
        self.was_frozen = true;
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

    async fn let_go(&mut self) -> LetGo {
        self.hold_until = None;
        let in_time = !self.let_go_early;
        let frozen = self.frozen_at.map(|at| (at, self.frozen.as_ref().map_or(0, |(_, n)| *n)));
        self.let_go_of_all().await;
        let thaw = frozen.map(|(frozen_at, frozen)| match &self.thawed {
            None => Thaw::Failed { reason: "the agent does not answer to the thaw".into() },
            Some((Err(reason), _)) => Thaw::Failed { reason: reason.clone() },
            // A guest that says it had nothing to thaw had let go by itself.
            Some((Ok(filesystems), at)) => Thaw::Thawed {
                after: at.duration_since(frozen_at),
                in_time: in_time && (*filesystems > 0 || frozen == 0),
            },
        });
        let (mut reports, failures) = self.outcome();
        if !in_time {
            let why = || "it was let go before the point in time".to_owned();
            let held = reports.iter_mut().filter(|report| !report.has_failed());
            held.for_each(|report| report.state = State::Failed { why: why() });
        }
        LetGo { reports, failures, thaw }
    }

    /// Thaws what may be frozen, lets servers go at the same time, and tells the hooks after that. An agent that
    /// takes longer is not waited for; the thaw goes on.
    async fn let_go_of_all(&mut self) {
        self.begin_thaw();
        if let Some(still) = &mut self.still {
            still.release().await;
        }
        // What came of it is kept.
        let _ = tokio::time::timeout(FREEZE_TIMEOUT, self.wait_until_thawed()).await;
        if let Some(still) = &mut self.still {
            still.tell().await;
        }
    }

    /// Starts to thaw a guest that may be frozen, in the background, once.
    fn begin_thaw(&mut self) {
        self.deadline = None;
        if !self.was_frozen || self.thawing.is_some() || self.thawed.is_some() {
            return;
        }
        if let Some(address) = self.agent.clone() {
            let connected = self.frozen.take().map(|(agent, _)| agent);
            self.thawing = Some(tokio::spawn(async move {
                (guest_agent::thaw(&address, connected, PATIENCE).await, Instant::now())
            }));
        }
    }

    /// Waits for the thaw that was begun. May be dropped and called again.
    async fn wait_until_thawed(&mut self) -> Result<u64, String> {
        if let Some(thawing) = &mut self.thawing {
            let thawed = match thawing.await {
                Ok((outcome, at)) => (outcome.map_err(|error| error.to_string()), at),
                Err(error) => (Err(error.to_string()), Instant::now()),
            };
            self.thawing = None;
            self.thawed = Some(thawed);
        }
        self.thawed.as_ref().map_or(Ok(0), |(outcome, _)| outcome.clone())
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
