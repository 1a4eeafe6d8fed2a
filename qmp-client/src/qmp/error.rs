//! Why a command, or the whole connection, failed.

use std::{io, path::PathBuf, time::Duration};

use crate::{Malformation, text::Printable};

/// Why a monitor could not be reached, or a command brought no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// Nobody listens there, or we may not connect.
    #[error("cannot connect to {}", .socket.display())]
    Connect {
        /// The path tried.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection waits to be taken. QEMU serves one client for each socket, so another client
    /// holds the monitor; rarely, QEMU itself is stopped or hangs.
    #[error("another client holds the monitor {} (no greeting within {waited:?})", .socket.display())]
    NoGreeting {
        /// The path tried.
        socket: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// Whoever took the connection does not speak QMP: it closed it, sent something else, or took the
    /// connection and stayed silent, like a guest agent or a serial console.
    #[error("{} is not a QMP monitor", .socket.display())]
    NotQmp {
        /// The path tried.
        socket: PathBuf,
    },
    /// No answer in time. If the command was sent, QEMU may still carry it out.
    #[error("no answer to `{command}` within {waited:?}")]
    Timeout {
        /// Name of the command.
        command: String,
        /// Its deadline.
        waited: Duration,
    },
    /// QEMU said no.
    #[error("QEMU refused `{command}`: {}", Printable(.description))]
    Refused {
        /// Name of the command.
        command: String,
        /// QEMU's class: `GenericError`, `CommandNotFound`, `DeviceNotFound`, …
        class: String,
        /// QEMU's words, as they came.
        description: String,
    },
    /// The connection ended before the answer. QEMU may or may not have carried the command out.
    #[error("the monitor was closed before `{command}` was answered")]
    Closed {
        /// Name of the command.
        command: String,
    },
    /// A message exceeded [`Options::reply_len_max`](crate::Options::reply_len_max); this ended the
    /// connection.
    #[error("a message of the monitor is longer than {limit} bytes")]
    ReplyTooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// The monitor sent something that is not QMP; this ended the connection.
    #[error("malformed message from the monitor")]
    Malformed {
        /// What is wrong with it.
        source: Malformation,
    },
    /// The result does not have the shape that the caller asked for.
    #[error("unexpected result of `{command}`")]
    Unexpected {
        /// Name of the command.
        command: String,
        /// The difference.
        source: serde_json::Error,
    },
}

impl QmpError {
    /// Whether the connection has ended, so that no further command can succeed on it.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::ReplyTooLong { .. } | Self::Malformed { .. })
    }

    /// Whether QEMU refused with this class, like `CommandNotFound`.
    pub fn is_refused_as(&self, wanted: &str) -> bool {
        matches!(self, Self::Refused { class, .. } if class == wanted)
    }
}

/// Why a connection ended.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Ending {
    /// By us: the last handle was dropped, or the runtime went away.
    #[error("closed by us")]
    Released,
    /// QEMU closed it, mostly because it exits.
    #[error("closed by QEMU")]
    HungUp,
    /// Reading or writing failed.
    #[error("input/output error: {kind}")]
    Io {
        /// What kind of error.
        kind: io::ErrorKind,
    },
    /// A message exceeded the limit.
    #[error("a message is longer than {limit} bytes")]
    ReplyTooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// Something that is not QMP.
    #[error("malformed message")]
    Malformed {
        /// What is wrong with it.
        source: Malformation,
    },
}

impl Ending {
    /// The error of a command that got no answer because of this.
    pub(super) fn fail(&self, command: String) -> QmpError {
        match self {
            Self::Released | Self::HungUp | Self::Io { .. } => QmpError::Closed { command },
            Self::ReplyTooLong { limit } => QmpError::ReplyTooLong { limit: *limit },
            Self::Malformed { source } => QmpError::Malformed { source: source.clone() },
        }
    }
}
