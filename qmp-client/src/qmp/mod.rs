//! Client of QEMU's monitor. The protocol is QEMU's `docs/interop/qmp-spec`.

mod command;
mod error;
mod handshake;
mod owner;

use std::{
    fmt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{
    sync::{broadcast, mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};
use tracing::debug;

use crate::{Options, message::Reply, socket};
use owner::{Entry, Handover, Owner};

pub use command::Command;
pub use error::{Ending, QmpError};

/// Calls that wait in the process because QEMU's queue is full, or a descriptor is being passed.
const CALLS_WAITING_MAX: usize = 64;
/// Events kept for a receiver that lags.
const EVENTS_KEPT: usize = 1024;

/// What QEMU says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// QEMU's version; zeros where it does not say.
    pub version: Version,
    /// What it offers, like "oob".
    pub capabilities: Vec<String>,
}

/// Version of QEMU. For the eye and for logs: what QEMU can do is asked with `query-qmp-schema`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
    /// What the distribution adds, often empty.
    pub package: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something that happened in QEMU, known to us or not.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Like `BLOCK_JOB_COMPLETED`.
    pub name: String,
    /// Its data, `Value::Null` if it has none.
    pub data: Value,
    /// When, by QEMU's clock; `None` if QEMU could not tell.
    pub timestamp: Option<SystemTime>,
}

/// A monitor. Clones share the connection, which ends when the last one is dropped.
///
/// One task owns the socket and needs the tokio runtime that `connect` was called in. Commands go to
/// QEMU in the order in which they were handed over. A future may be dropped at any time: what it
/// handed over is still written, whole, and only the reply is discarded.
///
/// At most eight commands are with QEMU at once, but for a longer list of [`Qmp::execute_all`]: beyond
/// that it stops reading, and would not see an out-of-band command either (`docs/interop/qmp-spec`,
/// "Out-of-band execution"). Others wait here, and all do while one that passes a descriptor is not answered.
#[derive(Debug, Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    greeting: Greeting,
    oob: bool,
    timeout: Duration,
    last_id: AtomicU64,
    in_band: mpsc::Sender<Handover>,
    urgent: mpsc::Sender<Handover>,
    events: broadcast::WeakSender<Event>,
    ending: watch::Receiver<Option<Ending>>,
    peer_pid: Option<i32>,
}

/// The way a reply comes back to the future that waits for it.
struct Ticket {
    command: String,
    until: Instant,
    waited: Duration,
    reply: oneshot::Receiver<Reply>,
}

impl Qmp {
    /// Connects to the monitor at `socket`, reads its greeting and negotiates capabilities, all
    /// within `options.timeout`.
    ///
    /// # Errors
    /// `Connect`; `NoGreeting` if another client holds the monitor; `NotQmp` if something else
    /// answers; `Timeout` or `Refused` if the negotiation fails.
    pub async fn connect(socket: &Path, options: Options) -> Result<Self, QmpError> {
        let peer = handshake::open(socket, options).await?;
        debug!(socket = %socket.display(), version = %peer.greeting.version, oob = peer.oob, "monitor");
        let peer_pid = peer.stream.peer_cred().ok().and_then(|peer| peer.pid());
        let (in_band, in_band_queue) = mpsc::channel(CALLS_WAITING_MAX);
        let (urgent, urgent_queue) = mpsc::channel(owner::PENDING_MAX);
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let (ending_sender, ending) = watch::channel(None);
        let shared = Shared {
            greeting: peer.greeting,
            oob: peer.oob,
            timeout: options.timeout,
            last_id: AtomicU64::new(handshake::LAST_ID),
            in_band,
            urgent,
            events: events.downgrade(),
            ending,
            peer_pid,
        };
        let owner = Owner::new(peer.stream, peer.framer, in_band_queue, urgent_queue, events);
        tokio::spawn(owner.run(ending_sender, options.timeout));
        Ok(Self { shared: Arc::new(shared) })
    }

    /// What QEMU said first.
    pub fn greeting(&self) -> &Greeting {
        &self.shared.greeting
    }

    /// Runs one command and returns what it returns.
    ///
    /// # Errors
    /// `Refused`, `Timeout`, or, when the connection ended, one for which `is_gone()` holds.
    pub async fn execute(&self, command: Command) -> Result<Value, QmpError> {
        let urgent = command.out_of_band && self.shared.oob;
        let (entry, ticket) = self.prepare(command);
        let queue = if urgent { &self.shared.urgent } else { &self.shared.in_band };
        hand_over(queue, owner::split(vec![entry]), ticket.until).await;
        self.claim(ticket).await
    }

    /// Runs `command` and reads its result as `T`, which ignores members it does not know unless it
    /// says otherwise.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`], and `Unexpected`.
    pub async fn run<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let value = self.execute(Command::new(command, arguments)).await?;
        serde_json::from_value(value)
            .map_err(|source| QmpError::Unexpected { command: command.to_owned(), source })
    }

    /// Runs commands in order; one result for each, in the same order. A failed one does not keep
    /// QEMU from running those after it.
    ///
    /// All go out in one write, so QEMU has the last as soon as it has the first; only a command with a
    /// file descriptor is written alone, and answered before the next. Nothing is handed over unless all of
    /// it is.
    ///
    /// That alone does not make a list survive this process: QEMU forgets what it has not begun when
    /// its client goes away (`CHR_EVENT_CLOSED` in `monitor/qmp.c`; tried with 7.2: of `stop`, a slow
    /// command and `cont`, `cont` is lost): another process must send it then.
    pub async fn execute_all(&self, commands: Vec<Command>) -> Vec<Result<Value, QmpError>> {
        let (entries, tickets): (Vec<_>, Vec<_>) =
            commands.into_iter().map(|command| self.prepare(command)).unzip();
        let batches = owner::split(entries);
        let first = tickets.iter().map(|ticket| ticket.until).min();
        if let Some(first) = first {
            hand_over(&self.shared.in_band, batches, first).await;
        }
        let mut results = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            results.push(self.claim(ticket).await);
        }
        results
    }

    /// The process that listens on the monitor's socket, where the system tells: QEMU, unless it was
    /// handed the socket by another.
    pub fn peer_pid(&self) -> Option<i32> {
        self.shared.peer_pid
    }

    /// Events from now on. A receiver that lags more than 1024 events behind is told so; the
    /// connection's end closes it. Subscribe before the command whose events matter.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        match self.shared.events.upgrade() {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1, // its sender is gone: closed, like the connection
        }
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> Ending {
        let mut ending = self.shared.ending.clone();
        match ending.wait_for(Option::is_some).await {
            Ok(ending) => ending.clone().unwrap_or(Ending::Released),
            Err(_) => Ending::Released, // the runtime dropped the owner
        }
    }

    fn prepare(&self, command: Command) -> (Entry, Ticket) {
        let id = self.shared.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let waited = command.deadline.unwrap_or(self.shared.timeout);
        let until = socket::deadline(waited);
        let (sender, reply) = oneshot::channel();
        let entry = Entry {
            id,
            bytes: command.encode(id, self.shared.oob),
            fd: command.fd,
            urgent: command.out_of_band && self.shared.oob,
            reply: sender,
        };
        debug!(id, command = command.name, "to QEMU");
        (entry, Ticket { command: command.name, until, waited, reply })
    }

    async fn claim(&self, ticket: Ticket) -> Result<Value, QmpError> {
        let Ticket { command, until, waited, reply } = ticket;
        let Ok(answer) = timeout_at(until, reply).await else {
            return Err(QmpError::Timeout { command, waited });
        };
        match answer {
            Ok(Reply { outcome: Ok(value), .. }) => Ok(value),
            Ok(Reply { outcome: Err(refusal), .. }) => Err(QmpError::Refused {
                command,
                class: refusal.class,
                description: refusal.description,
            }),
            // Not handed over in time, or the connection ended: its owner first says why, then lets
            // go of what waits.
            Err(_) => Err(match &*self.shared.ending.borrow() {
                Some(ending) => ending.fail(command),
                None if self.shared.in_band.is_closed() => QmpError::Closed { command },
                None => QmpError::Timeout { command, waited },
            }),
        }
    }
}

/// Gives `batches` to the owner, or drops them whole if there is no room until then.
async fn hand_over(queue: &mpsc::Sender<Handover>, batches: Handover, until: Instant) {
    if let Ok(Ok(slot)) = timeout_at(until, queue.reserve()).await {
        slot.send(batches);
    }
}
