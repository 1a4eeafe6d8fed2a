//! Client of the guest agent. The protocol is QEMU's `qga/qapi-schema.json`, `guest-sync-delimited`.

mod error;
mod line;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::{Map, Value, json};
use tokio::{
    net::UnixStream,
    sync::Mutex,
    time::{Instant, timeout_at},
};
use tracing::debug;

use crate::{
    Malformation, Options,
    message::{self, Message, Reply},
    socket,
};
use line::{Collector, Line, SENTINEL};

pub use error::QgaError;

/// No answer of an honest agent is longer, and a guest must not be able to take our memory.
const REPLY_LEN_MAX: usize = 1 << 20;
const SYNC: &str = "guest-sync-delimited";

/// A guest agent. Clones share the connection; one command runs at a time, others wait.
///
/// The agent's protocol has no ids that every version honours, so each command is preceded by a
/// synchronisation with a random id; all that came before its answer, late, doubled or partial, is
/// discarded. So a future may be dropped at any time, and a command may be given after a timeout.
/// Answers are untrusted: check what you use, escape what you print.
#[derive(Debug, Clone)]
pub struct Qga {
    socket: Arc<PathBuf>,
    connection: Arc<Mutex<Connection>>,
}

impl Qga {
    /// Connects to `socket` and finds out whether an agent answers, within `options.timeout`.
    ///
    /// # Errors
    /// `Connect`; `Busy` if another client holds the socket; `NotQga` for a monitor; `NotAnswering`
    /// if no agent runs in the guest; `Closed`.
    pub async fn connect(socket: &Path, options: Options) -> Result<Self, QgaError> {
        let begun = Instant::now();
        let until = socket::deadline(options.timeout);
        let busy = || QgaError::Busy { socket: socket.to_owned(), waited: begun.elapsed() };
        let stream = match socket::connect(socket, until).await {
            Ok(Some(stream)) => stream,
            Ok(None) => return Err(busy()),
            Err(source) => return Err(QgaError::Connect { socket: socket.to_owned(), source }),
        };
        let connection = Connection::new(stream, options.reply_len_max.min(REPLY_LEN_MAX));
        let qga = Self {
            socket: Arc::new(socket.to_owned()),
            connection: Arc::new(Mutex::new(connection)),
        };
        let mut connection = qga.connection.lock().await;
        match timeout_at(until, connection.synchronise()).await {
            Ok(Ok(())) => debug!(socket = %socket.display(), "guest agent"),
            Ok(Err(lost)) => return Err(qga.lost(lost, SYNC)),
            Err(_) if socket::waits_for_accept(&connection.stream) == Some(true) => {
                return Err(busy());
            }
            Err(_) => return Err(qga.not_answering(options.timeout)),
        }
        drop(connection);
        Ok(qga)
    }

    /// Runs `command` and returns what it returns. `arguments` is an object, or `Value::Null` for
    /// none. `deadline` covers everything: waiting for another command, synchronising, the answer.
    ///
    /// A command that answers nothing when it succeeds (`guest-shutdown`) ends in `Timeout` or `Closed`.
    ///
    /// # Errors
    /// See [`QgaError`]; every later command starts afresh, except after `Closed`.
    pub async fn execute(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QgaError> {
        let until = socket::deadline(deadline);
        let ready = timeout_at(until, async {
            let mut connection = self.connection.lock().await;
            connection.synchronise().await.map(|()| connection)
        });
        let mut connection = match ready.await {
            Ok(Ok(connection)) => connection,
            Ok(Err(lost)) => return Err(self.lost(lost, command)),
            Err(_) => return Err(self.not_answering(deadline)),
        };
        debug!(command, "to the guest agent");
        let limit = connection.limit;
        let command = command.to_owned();
        match timeout_at(until, connection.ask(&command, arguments)).await {
            Err(_) => Err(QgaError::Timeout { command, waited: deadline }),
            Ok(Err(Failure::Lost(lost))) => Err(self.lost(lost, &command)),
            Ok(Err(Failure::TooLong)) => Err(QgaError::TooLong { command, limit }),
            Ok(Err(Failure::Malformed(source))) => Err(QgaError::Malformed { command, source }),
            Ok(Ok(Reply { outcome: Ok(value), .. })) => Ok(value),
            Ok(Ok(Reply { outcome: Err(refusal), .. })) => Err(QgaError::Refused {
                command,
                class: refusal.class,
                description: refusal.description,
            }),
        }
    }

    fn lost(&self, lost: Lost, command: &str) -> QgaError {
        match lost {
            Lost::Closed => QgaError::Closed { command: command.to_owned() },
            Lost::Monitor => QgaError::NotQga { socket: self.socket.to_path_buf() },
        }
    }

    fn not_answering(&self, waited: Duration) -> QgaError {
        QgaError::NotAnswering { socket: self.socket.to_path_buf(), waited }
    }
}

/// Why no further line can come from an agent.
#[derive(Debug, Clone, Copy)]
enum Lost {
    Closed,
    Monitor,
}

impl From<io::Error> for Lost {
    fn from(_: io::Error) -> Self {
        Self::Closed
    }
}

/// Why a command has no reply, apart from the clock.
#[derive(Debug)]
enum Failure {
    Lost(Lost),
    TooLong,
    Malformed(Malformation),
}

impl<E: Into<Lost>> From<E> for Failure {
    fn from(lost: E) -> Self {
        Self::Lost(lost.into())
    }
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    collector: Collector,
    limit: usize,
    chunk: Vec<u8>,
    /// The part of `chunk` that was read but not looked at.
    unread: std::ops::Range<usize>,
}

impl Connection {
    fn new(stream: UnixStream, limit: usize) -> Self {
        let collector = Collector::new(limit);
        Self { stream, collector, limit, chunk: vec![0; 16 << 10], unread: 0..0 }
    }

    /// Returns once the agent has answered our random id; discards everything before that.
    async fn synchronise(&mut self) -> Result<(), Lost> {
        let id = rand::random::<u64>() >> 11; // 53 bits: exact in every agent's JSON
        // The sentinel makes the agent drop half a command that was written before.
        let mut request = vec![SENTINEL];
        request.extend(encode(SYNC, json!({ "id": id })));
        self.write(&request).await?;
        loop {
            let Line::Whole { marked, bytes } = self.line().await? else { continue };
            match message::parse(&bytes) {
                Ok(Message::Reply(Reply { outcome: Ok(value), .. }))
                    if marked && value.as_u64() == Some(id) =>
                {
                    return Ok(());
                }
                Ok(Message::Greeting(_)) => return Err(Lost::Monitor),
                _ => {}
            }
        }
    }

    async fn ask(&mut self, command: &str, arguments: Value) -> Result<Reply, Failure> {
        self.write(&encode(command, arguments)).await?;
        loop {
            match self.line().await? {
                Line::TooLong => return Err(Failure::TooLong),
                Line::Whole { marked: true, .. } => {} // a late answer to a synchronisation
                Line::Whole { marked: false, bytes } => match message::parse(&bytes) {
                    Ok(Message::Reply(reply)) => return Ok(reply),
                    Ok(_) => return Err(Failure::Malformed(Malformation::NotAReply)),
                    Err(source) => return Err(Failure::Malformed(source.into())),
                },
            }
        }
    }

    /// The next line, however long it takes. May be dropped between any two bytes.
    async fn line(&mut self) -> Result<Line, Lost> {
        loop {
            for at in self.unread.by_ref() {
                let line = self.chunk.get(at).and_then(|&byte| self.collector.take(byte));
                if let Some(line) = line {
                    return Ok(line);
                }
            }
            self.stream.readable().await?;
            match self.stream.try_read(&mut self.chunk) {
                Ok(0) => return Err(Lost::Closed),
                Ok(len) => self.unread = 0..len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_write(rest) {
                Ok(len) => rest = rest.get(len..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn encode(command: &str, arguments: Value) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("execute".to_owned(), command.into());
    if !arguments.is_null() {
        object.insert("arguments".to_owned(), arguments);
    }
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}
