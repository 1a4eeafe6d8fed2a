//! A blocking QMP client for the fixture's own monitor, and the line reader it shares with the agent's.
//!
//! On purpose not our `qmp-client`: the judge must not share a fault with what it judges.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long QEMU may take to answer. Generous: several emulated machines share two cores.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Events kept for [`Monitor::events`]; older ones are forgotten.
const EVENTS_MAX: usize = 1000;
const LINE_LEN_MAX: usize = 256 << 20;

/// What QEMU said when it refused a command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct QmpFailure {
    /// QEMU's error class, `GenericError` for most.
    pub class: String,
    /// QEMU's description.
    pub desc: String,
}

/// One connection to a monitor.
#[derive(Debug)]
pub(crate) struct Monitor {
    lines: Lines,
    events: VecDeque<Value>,
    next_id: u64,
}

impl Monitor {
    /// Connects and negotiates. `None` when nobody listens or answers before the deadline.
    pub(crate) fn connect(socket: &Path, deadline: Instant) -> Option<Self> {
        let lines = Lines::connect(socket)?;
        let mut monitor = Self { lines, events: VecDeque::new(), next_id: 1 };
        let greeting = monitor.lines.next(deadline)?;
        assert!(greeting.get("QMP").is_some(), "no QMP greeting but {greeting}");
        monitor.execute("qmp_capabilities", &json!({})).ok()?;
        Some(monitor)
    }

    /// Runs one command.
    #[track_caller]
    pub(crate) fn execute(&mut self, command: &str, args: &Value) -> Result<Value, QmpFailure> {
        let id = self.next_id;
        self.next_id += 1;
        let request = json!({"execute": command, "arguments": args, "id": id});
        let disconnected = || QmpFailure {
            class: "Disconnected".to_owned(),
            desc: format!("QEMU is gone or silent; `{command}` had no answer"),
        };
        self.lines.send(&request).map_err(|_| disconnected())?;
        let deadline = Instant::now() + REPLY_TIMEOUT;
        loop {
            let mut reply = self.lines.next(deadline).ok_or_else(disconnected)?;
            if reply.get("event").is_some() {
                self.keep(reply);
            } else if reply.get("id") == Some(&json!(id)) {
                if let Some(error) = reply.get("error") {
                    let text = |key| error[key].as_str().unwrap_or_default().to_owned();
                    return Err(QmpFailure { class: text("class"), desc: text("desc") });
                }
                return Ok(reply["return"].take());
            }
        }
    }

    /// Takes the events that have come so far.
    pub(crate) fn events(&mut self) -> Vec<Value> {
        while let Some(event) = self.lines.next(Instant::now()) {
            self.keep(event);
        }
        self.events.drain(..).collect()
    }

    /// Waits for an event of this name; later events stay for [`Self::events`].
    pub(crate) fn wait_event(&mut self, name: &str, deadline: Instant) -> Option<Value> {
        loop {
            let found = self.events.iter().position(|event| event["event"] == name);
            if let Some(found) = found {
                return self.events.remove(found);
            }
            let event = self.lines.next(deadline)?;
            self.keep(event);
        }
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

/// A socket that carries one JSON value a line.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: UnixStream,
    unread: Vec<u8>,
}

impl Lines {
    pub(crate) fn connect(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT)).ok()?;
        Some(Self { stream, unread: Vec::new() })
    }

    pub(crate) fn send(&mut self, value: &Value) -> std::io::Result<()> {
        self.stream.write_all(format!("{value}\n").as_bytes())
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next value; `None` at the deadline or when the other side is gone. Lines that are no JSON
    /// are skipped: an agent that was interrupted may leave half a reply behind.
    pub(crate) fn next(&mut self, deadline: Instant) -> Option<Value> {
        let mut searched = 0;
        loop {
            while let Some(end) = self.unread[searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=searched + end).collect();
                searched = 0;
                // The agent marks a resynchronisation with the byte 0xFF.
                let start = line.iter().rposition(|byte| *byte == 0xFF).map_or(0, |at| at + 1);
                if let Ok(value) = serde_json::from_slice(&line[start..]) {
                    return Some(value);
                }
            }
            searched = self.unread.len();
            if searched > LINE_LEN_MAX || !self.fill(deadline) {
                return None;
            }
        }
    }

    fn fill(&mut self, deadline: Instant) -> bool {
        let mut part = vec![0; 64 << 10];
        loop {
            // Zero would mean to wait for ever.
            let left = deadline.saturating_duration_since(Instant::now());
            let left = left.max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left)).expect("it is not zero");
            match self.stream.read(&mut part) {
                Ok(0) => return false,
                Ok(len) => {
                    self.unread.extend_from_slice(&part[..len]);
                    return true;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }
}
