//! From a path to a monitor that takes commands.

use std::{io, path::Path};

use serde_json::json;
use tokio::{
    net::UnixStream,
    time::{Instant, timeout_at},
};

use super::{Command, Greeting, QmpError};
use crate::{
    Options,
    frame::{FrameError, Framer},
    message::{self, Message, Reply},
    socket,
};

const NEGOTIATE: &str = "qmp_capabilities";
/// Highest id used here.
pub(super) const LAST_ID: u64 = 2;

/// A monitor in command mode.
pub(super) struct Peer {
    pub(super) stream: UnixStream,
    pub(super) framer: Framer,
    pub(super) greeting: Greeting,
    pub(super) oob: bool,
}

pub(super) async fn open(socket: &Path, options: Options) -> Result<Peer, QmpError> {
    let begun = Instant::now();
    let until = socket::deadline(options.timeout);
    let busy = || QmpError::NoGreeting { socket: socket.to_owned(), waited: begun.elapsed() };
    let not_qmp = || QmpError::NotQmp { socket: socket.to_owned() };

    let stream = match socket::connect(socket, until).await {
        Ok(Some(stream)) => stream,
        Ok(None) => return Err(busy()),
        Err(source) => return Err(QmpError::Connect { socket: socket.to_owned(), source }),
    };
    let mut framer = Framer::new(options.reply_len_max);
    let greeting = match timeout_at(until, read(&stream, &mut framer)).await {
        Ok(Ok(Message::Greeting(greeting))) => greeting,
        Ok(_) => return Err(not_qmp()),
        Err(_) if socket::waits_for_accept(&stream) == Some(false) => return Err(not_qmp()),
        Err(_) => return Err(busy()),
    };

    let mut oob = greeting.capabilities.iter().any(|offered| offered == "oob");
    let mut id = LAST_ID - 1;
    loop {
        let arguments = if oob { json!({ "enable": ["oob"] }) } else { json!({}) };
        let command = Command::new(NEGOTIATE, arguments).encode(id, oob);
        let answer = timeout_at(until, ask(&stream, &mut framer, &command, id)).await;
        let answer = answer.map_err(|_| QmpError::Timeout {
            command: NEGOTIATE.to_owned(),
            waited: options.timeout,
        })?;
        match answer {
            Err(Broken::Io) => return Err(QmpError::Closed { command: NEGOTIATE.to_owned() }),
            Err(Broken::Frame) => return Err(not_qmp()),
            Ok(Reply { outcome: Ok(_), .. }) => return Ok(Peer { stream, framer, greeting, oob }),
            // Offered, yet refused: live without it.
            Ok(_) if oob => (oob, id) = (false, LAST_ID),
            Ok(Reply { outcome: Err(refusal), .. }) => {
                return Err(QmpError::Refused {
                    command: NEGOTIATE.to_owned(),
                    class: refusal.class,
                    description: refusal.description,
                });
            }
        }
    }
}

/// Why there is no next message.
enum Broken {
    Io,
    Frame,
}

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

impl From<FrameError> for Broken {
    fn from(_: FrameError) -> Self {
        Self::Frame
    }
}

async fn ask(
    stream: &UnixStream,
    framer: &mut Framer,
    command: &[u8],
    id: u64,
) -> Result<Reply, Broken> {
    let mut rest = command;
    while !rest.is_empty() {
        stream.writable().await?;
        match stream.try_write(rest) {
            Ok(len) => rest = rest.get(len..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
    }
    loop {
        match read(stream, framer).await? {
            Message::Reply(reply) if reply.id == Some(id) => return Ok(reply),
            _ => {} // nobody listens to events yet
        }
    }
}

/// The next message of the stream.
async fn read(stream: &UnixStream, framer: &mut Framer) -> Result<Message, Broken> {
    let mut chunk = vec![0; 64 << 10];
    loop {
        if let Some(frame) = framer.next()? {
            return message::parse(frame).map_err(|_| Broken::Frame);
        }
        stream.readable().await?;
        match stream.try_read(&mut chunk) {
            Ok(0) => return Err(Broken::Io),
            Ok(len) => framer.push(&chunk[..len]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
    }
}
