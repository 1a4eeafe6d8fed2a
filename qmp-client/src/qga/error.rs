//! Why a guest agent was of no help.

use std::{io, path::PathBuf, time::Duration};

use crate::{Malformation, text::Printable};

/// Why a guest agent could not be reached, or a command brought no result.
///
/// Only `Timeout`, `TooLong`, `Malformed` and `Closed` leave open whether the agent has carried the
/// command out; after the others it has not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QgaError {
    /// Nobody listens there, or we may not connect.
    #[error("cannot connect to {}", .socket.display())]
    Connect {
        /// The path tried.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection waits to be taken: QEMU serves one client for each socket.
    #[error("another client holds the guest agent's socket {}", .socket.display())]
    Busy {
        /// The path tried.
        socket: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// A QEMU monitor answers there.
    #[error("{} is a QEMU monitor, not a guest agent", .socket.display())]
    NotQga {
        /// The path tried.
        socket: PathBuf,
    },
    /// The agent does not answer a synchronisation: none runs in the guest, or it hangs. The command
    /// was not sent.
    #[error("the guest agent at {} does not answer (waited {waited:?})", .socket.display())]
    NotAnswering {
        /// The socket.
        socket: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// The agent took the command but did not answer in time. It may still carry it out.
    #[error("no answer of the guest agent to `{command}` within {waited:?}")]
    Timeout {
        /// Name of the command.
        command: String,
        /// Its deadline.
        waited: Duration,
    },
    /// The agent said no.
    #[error("the guest agent refused `{command}`: {}", Printable(.description))]
    Refused {
        /// Name of the command.
        command: String,
        /// The agent's class, as it came: `GenericError`, `CommandNotFound`, …
        class: String,
        /// The agent's words, as they came: escape them before printing.
        description: String,
    },
    /// The answer exceeded the limit.
    #[error("the guest agent's answer to `{command}` is longer than {limit} bytes")]
    TooLong {
        /// Name of the command.
        command: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// The answer is no reply.
    #[error("malformed answer of the guest agent to `{command}`")]
    Malformed {
        /// Name of the command.
        command: String,
        /// What is wrong with it.
        source: Malformation,
    },
    /// QEMU closed the connection.
    #[error("the guest agent's socket was closed before `{command}` was answered")]
    Closed {
        /// Name of the command.
        command: String,
    },
}
