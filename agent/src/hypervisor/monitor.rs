//! Calls to one QEMU: thin, each named for the error it may cause and counted as an effect where it
//! changes anything.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qmp_client::{Command, Options, Qmp, QmpError};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::graph::{Graph, RawGraph};
use super::{GuestIo, HypervisorError};
use crate::effect;
use crate::journal::Process;

/// How long QEMU may take to greet and to answer; it answers within milliseconds unless it hangs.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a node may stay in use after its last user was told to go.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
const RELEASE_POLL: Duration = Duration::from_millis(20);

/// A connection to QEMU's monitor.
#[derive(Debug, Clone)]
pub struct Monitor {
    qmp: Qmp,
    socket: PathBuf,
}

/// A command with the words for what it does: "refused to …".
#[derive(Debug)]
pub struct Step {
    what: String,
    command: &'static str,
    arguments: Value,
    fd: Option<OwnedFd>,
}

impl Step {
    /// A step; `what` completes the sentence "QEMU refused to …".
    pub fn new(what: impl Into<String>, command: &'static str, arguments: Value) -> Self {
        Self { what: what.into(), command, arguments, fd: None }
    }

    /// Passes a file descriptor with the command.
    pub fn with_fd(mut self, fd: OwnedFd) -> Self {
        self.fd = Some(fd);
        self
    }
}

#[derive(Deserialize)]
struct Export {
    id: String,
}

#[derive(Deserialize)]
struct Status {
    running: bool,
    #[serde(default)]
    status: String,
}

#[derive(Deserialize)]
struct Migration {
    #[serde(default)]
    status: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FdSet {
    fdset_id: u64,
    fds: Vec<FdSetMember>,
}

#[derive(Deserialize)]
struct FdSetMember {
    fd: u64,
    opaque: Option<String>,
}

/// A member of `query-blockstats`.
#[derive(Debug, Deserialize)]
pub struct DeviceStats {
    /// What was counted.
    pub stats: Stats,
    /// The device; what no guest uses has none.
    pub qdev: Option<String>,
}

/// What QEMU counts of a device; times in nanoseconds.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Stats {
    rd_operations: u64,
    wr_operations: u64,
    flush_operations: u64,
    rd_total_time_ns: u64,
    wr_total_time_ns: u64,
    flush_total_time_ns: u64,
    rd_latency_histogram: Option<Histogram>,
    wr_latency_histogram: Option<Histogram>,
    flush_latency_histogram: Option<Histogram>,
}

/// Operations by the nanoseconds that they took; from QEMU 4.0, where somebody has asked for it.
#[derive(Debug, Clone, Deserialize)]
pub struct Histogram {
    /// Where one bin ends and the next begins.
    pub boundaries: Vec<u64>,
    /// Operations in each.
    pub bins: Vec<u64>,
}

impl Stats {
    /// Reads, writes and flushes: how many, what they took together, and each by its time.
    pub fn kinds(&self) -> [(GuestIo, Option<&Histogram>); 3] {
        let count = |operations, nanos| GuestIo { operations, time: Duration::from_nanos(nanos) };
        [
            (count(self.rd_operations, self.rd_total_time_ns), self.rd_latency_histogram.as_ref()),
            (count(self.wr_operations, self.wr_total_time_ns), self.wr_latency_histogram.as_ref()),
            (
                count(self.flush_operations, self.flush_total_time_ns),
                self.flush_latency_histogram.as_ref(),
            ),
        ]
    }
}

impl Monitor {
    /// Connects to a monitor socket. `timeout` is how long QEMU may take to greet and to answer.
    ///
    /// # Errors
    /// [`HypervisorError::Monitor`], whose source tells a wrong socket from a taken one.
    pub async fn connect(socket: &Path, timeout: Duration) -> Result<Self, HypervisorError> {
        let options = Options { timeout, ..Options::default() };
        let qmp = Qmp::connect(socket, options)
            .await
            .map_err(|source| HypervisorError::Monitor { socket: socket.to_owned(), source })?;
        Ok(Self { qmp, socket: socket.to_owned() })
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process that serves this monitor.
    pub fn process(&self) -> Option<Process> {
        self.qmp.peer_pid().and_then(Process::of)
    }

    /// QEMU's version, for messages only: what it can do is asked of its schema.
    pub fn version(&self) -> String {
        self.qmp.greeting().version.to_string()
    }

    /// The first number of QEMU's version, 0 where it does not say.
    pub fn major_version(&self) -> u32 {
        self.qmp.greeting().version.major
    }

    /// Asks; changes nothing.
    ///
    /// # Errors
    /// [`HypervisorError::Monitor`] and [`HypervisorError::Reply`].
    pub async fn query<T: DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<T, HypervisorError> {
        let value =
            self.qmp.execute(Command::new(command, arguments)).await.map_err(|source| {
                HypervisorError::Monitor { socket: self.socket.clone(), source }
            })?;
        serde_json::from_value(value)
            .map_err(|source| HypervisorError::Reply { command: command.to_owned(), source })
    }

    /// Changes something.
    ///
    /// # Errors
    /// [`HypervisorError::Refused`] with the step's own words.
    pub async fn run(&self, step: Step) -> Result<Value, HypervisorError> {
        let (what, command) = announced(step)?;
        self.qmp.execute(command).await.map_err(|source| self.failed(what, source))
    }

    /// Hands over all steps, none with a descriptor, in one write: QEMU carries them out to the last even if
    /// this process stands still right after; if it ends, QEMU may forget those it has not begun. A later step
    /// runs though an earlier one failed.
    ///
    /// # Errors
    /// The first step that failed; all of them have been answered then.
    pub async fn run_all(&self, steps: Vec<Step>) -> Result<(), HypervisorError> {
        let mut words = Vec::new();
        let mut commands = Vec::new();
        for step in steps {
            let (what, command) = announced(step)?;
            words.push(what);
            commands.push(command);
        }
        let replies = self.qmp.execute_all(commands).await;
        for (what, reply) in words.into_iter().zip(replies) {
            reply.map_err(|source| self.failed(what, source))?;
        }
        Ok(())
    }

    fn failed(&self, step: String, source: QmpError) -> HypervisorError {
        match source {
            QmpError::Refused { .. } => HypervisorError::Refused { step, source },
            source => HypervisorError::Monitor { socket: self.socket.clone(), source },
        }
    }

    /// Runs a step until QEMU no longer says that its subject is in use.
    ///
    /// # Errors
    /// The last refusal, once [`RELEASE_TIMEOUT`] is over.
    pub async fn run_until_free(
        &self,
        what: &str,
        command: &'static str,
        arguments: Value,
    ) -> Result<(), HypervisorError> {
        let start = Instant::now();
        loop {
            match self.run(Step::new(what, command, arguments.clone())).await {
                Err(HypervisorError::Refused { .. }) if start.elapsed() < RELEASE_TIMEOUT => {
                    tokio::time::sleep(RELEASE_POLL).await;
                }
                outcome => return outcome.map(drop),
            }
        }
    }

    /// The block graph as it is now.
    ///
    /// # Errors
    /// As [`Monitor::query`].
    pub async fn graph(&self) -> Result<Graph, HypervisorError> {
        // Without `flat` QEMU repeats each backing chain; QEMU before 5.0 does not know the argument.
        let named = match self.query("query-named-block-nodes", json!({"flat": true})).await {
            Err(HypervisorError::Monitor { source: QmpError::Refused { .. }, .. }) => {
                self.query("query-named-block-nodes", json!({})).await?
            }
            other => other?,
        };
        let raw = match self.query("x-debug-query-block-graph", json!({})).await {
            Err(HypervisorError::Monitor { source: QmpError::Refused { .. }, .. }) => {
                RawGraph::default()
            }
            other => other?,
        };
        Ok(Graph::new(named, &raw))
    }

    /// Whether the guest's processors run.
    ///
    /// # Errors
    /// As [`Monitor::query`].
    pub async fn guest_runs(&self) -> Result<bool, HypervisorError> {
        Ok(self.query::<Status>("query-status", json!({})).await?.running)
    }

    /// What the guest did on each of its devices.
    ///
    /// # Errors
    /// As [`Monitor::query`].
    pub async fn device_stats(&self) -> Result<Vec<DeviceStats>, HypervisorError> {
        let mut devices: Vec<DeviceStats> = self.query("query-blockstats", json!({})).await?;
        devices.retain(|device| device.qdev.is_some());
        Ok(devices)
    }

    /// Whether any device is served by a thread of its own.
    ///
    /// # Errors
    /// As [`Monitor::query`].
    pub async fn has_io_threads(&self) -> Result<bool, HypervisorError> {
        let threads: Vec<Value> = self.query("query-iothreads", json!({})).await?;
        Ok(!threads.is_empty())
    }

    /// Makes sure that the guest is neither on its way to another QEMU nor there already.
    ///
    /// # Errors
    /// [`HypervisorError::Migrating`], and as [`Monitor::query`].
    pub async fn check_stays(&self) -> Result<(), HypervisorError> {
        // `MigrationStatus` and `RunState` of QEMU's schema. One that came to an end says nothing of
        // the guest that runs here now.
        let migration: Migration = self.query("query-migrate", json!({})).await?;
        let over = ["", "none", "cancelling", "cancelled", "completed", "failed"];
        let status: Status = self.query("query-status", json!({})).await?;
        let away = ["finish-migrate", "postmigrate"];
        match over.contains(&migration.status.as_str()) && !away.contains(&status.status.as_str()) {
            true => Ok(()),
            false => Err(HypervisorError::Migrating),
        }
    }

    /// Lets a paused guest go on. One that stands still for any other reason is left alone.
    ///
    /// # Errors
    /// As [`Monitor::query`] and [`Monitor::run`].
    pub async fn let_go_on(&self) -> Result<(), HypervisorError> {
        let status: Status = self.query("query-status", json!({})).await?;
        if status.status == "paused" {
            self.run(Step::new("let the guest go on", "cont", json!({}))).await?;
        }
        Ok(())
    }

    /// The ids of all block exports.
    ///
    /// # Errors
    /// As [`Monitor::query`].
    pub async fn exports(&self) -> Result<Vec<String>, HypervisorError> {
        let exports: Vec<Export> = self.query("query-block-exports", json!({})).await?;
        Ok(exports.into_iter().map(|export| export.id).collect())
    }

    /// Passes an open file and returns the name under which a block node can open it.
    ///
    /// The set goes away with the node that uses it; see [`Monitor::forget_files`].
    ///
    /// # Errors
    /// As [`Monitor::run`] and [`Monitor::query`].
    pub async fn pass_file(&self, fd: OwnedFd, tag: &str) -> Result<PassedFile, HypervisorError> {
        let step = Step::new("take a file descriptor", "add-fd", json!({"opaque": tag}));
        let reply = self.run(step.with_fd(fd)).await?;
        serde_json::from_value::<AddedFd>(reply)
            .map(|added| PassedFile { set: added.fdset_id })
            .map_err(|source| HypervisorError::Reply { command: "add-fd".into(), source })
    }

    /// Removes what [`Monitor::pass_file`] passed under a tag; nodes that opened it keep their own
    /// duplicate. Idempotent.
    ///
    /// # Errors
    /// As [`Monitor::run`] and [`Monitor::query`].
    pub async fn forget_files(&self, tag: &str) -> Result<(), HypervisorError> {
        let sets: Vec<FdSet> = self.query("query-fdsets", json!({})).await?;
        for set in sets {
            let ours = |member: &&FdSetMember| member.opaque.as_deref() == Some(tag);
            for member in set.fds.iter().filter(ours) {
                let arguments = json!({"fdset-id": set.fdset_id, "fd": member.fd});
                self.run(Step::new("forget a file descriptor", "remove-fd", arguments)).await?;
            }
        }
        Ok(())
    }

    /// Waits until an export is gone.
    ///
    /// # Errors
    /// [`HypervisorError::StillInUse`] once [`RELEASE_TIMEOUT`] is over.
    pub async fn wait_export_gone(&self, id: &str) -> Result<(), HypervisorError> {
        let start = Instant::now();
        while self.exports().await?.iter().any(|export| export == id) {
            if start.elapsed() > RELEASE_TIMEOUT {
                let what = format!("the export `{id}`");
                return Err(HypervisorError::StillInUse { what, waited: RELEASE_TIMEOUT });
            }
            tokio::time::sleep(RELEASE_POLL).await;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct AddedFd {
    #[serde(rename = "fdset-id")]
    fdset_id: u64,
}

/// A file that QEMU holds for a block node to open.
#[derive(Debug, Clone, Copy)]
pub struct PassedFile {
    set: u64,
}

impl PassedFile {
    /// The file name for `blockdev-add`.
    pub fn filename(self) -> String {
        format!("/dev/fdset/{}", self.set)
    }
}

fn announced(step: Step) -> Result<(String, Command), HypervisorError> {
    let Step { what, command, arguments, fd } = step;
    effect::about_to(&format!("qmp: {command}"))
        .map_err(|source| HypervisorError::Host { step: what.clone(), source })?;
    let command = Command::new(command, arguments);
    Ok((
        what,
        match fd {
            Some(fd) => command.fd(fd),
            None => command,
        },
    ))
}
