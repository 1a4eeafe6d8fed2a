//! Why an NBD operation did not succeed.

use std::{fmt, io, sync::Arc, time::Duration};

use crate::wire::{Command, Errno, ProtocolError, Refusal};

/// Why an operation of the client failed.
///
/// Cloneable, because one dead connection fails every request that was open on it.
/// [`Remote`](Self::Remote), [`OutOfRange`](Self::OutOfRange) and
/// [`Unsupported`](Self::Unsupported) leave the connection usable; after any other it is dead.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The server does not let us use this export.
    #[error("the server refused export `{export}`: {reason}{}", Detail(.message))]
    Refused {
        /// Name that was asked for.
        export: String,
        /// The kind of refusal.
        reason: Refusal,
        /// What the server said, made printable; empty if it said nothing.
        message: String,
    },
    /// The server went away: end of file or a reset.
    #[error("the server closed the connection during {during}")]
    Closed {
        /// What was open.
        during: Activity,
    },
    /// Nothing of the reply arrived for too long; the connection is given up.
    #[error("no progress for {:.3} s during {what}", .waited.as_secs_f64())]
    Timeout {
        /// What was open. All requests of the connection fail with the one that stalled.
        what: Activity,
        /// Time since the last sign of progress.
        waited: Duration,
    },
    /// The server answered a request with an error.
    #[error("{command} of {length} bytes at offset {offset} failed: {errno}{}", Detail(.message))]
    Remote {
        /// The command that failed.
        command: Command,
        /// First byte of the failed request (of the failed part, if a read was split).
        offset: u64,
        /// Bytes of the failed request.
        length: u64,
        /// The server's error.
        errno: Errno,
        /// Where exactly within the request, if the server told (`NBD_REPLY_TYPE_ERROR_OFFSET`).
        at: Option<u64>,
        /// What the server said, made printable; empty if it said nothing.
        message: String,
    },
    /// The server sent what the protocol does not allow.
    #[error("the server broke the NBD protocol during {during}")]
    Protocol {
        /// What was open.
        during: Activity,
        /// The exact breach.
        source: ProtocolError,
    },
    /// The socket failed.
    #[error("the NBD socket failed during {during}")]
    Io {
        /// What was open.
        during: Activity,
        /// The system's error.
        source: Arc<io::Error>,
    },
    /// The request does not lie within the export; nothing was sent.
    #[error("{request} is outside the export of {size} bytes")]
    OutOfRange {
        /// What was asked for.
        request: RequestInfo,
        /// Size of the export in bytes.
        size: u64,
    },
    /// The server does not offer the command on this export; nothing was sent.
    #[error("the server does not offer {command} on this export")]
    Unsupported {
        /// The command that is not offered.
        command: Command,
    },
}

impl NbdError {
    /// Whether the server has ended the connection, or is about to.
    pub fn is_closed(&self) -> bool {
        match self {
            Self::Closed { .. } | Self::Io { .. } => true,
            Self::Remote { errno, .. } => *errno == Errno::ESHUTDOWN,
            _ => false,
        }
    }

    pub(crate) fn protocol(during: Activity, source: ProtocolError) -> Self {
        Self::Protocol { during, source }
    }

    /// A socket error; an end of file or a reset means that the server went away.
    pub(crate) fn socket(during: Activity, source: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match source.kind() {
            BrokenPipe | ConnectionReset | UnexpectedEof => Self::Closed { during },
            _ => Self::Io { during, source: Arc::new(source) },
        }
    }

    /// The same error, now that it is known which request was being answered.
    pub(crate) fn during(mut self, activity: Activity) -> Self {
        match &mut self {
            Self::Closed { during }
            | Self::Io { during, .. }
            | Self::Timeout { what: during, .. }
                if *during == Activity::Transmission =>
            {
                *during = activity;
            }
            _ => {}
        }
        self
    }

    /// The same cause, as seen by another request of the connection.
    pub(crate) fn for_request(&self, request: RequestInfo) -> Self {
        match self {
            Self::Closed { .. } => Self::Closed { during: Activity::Request(request) },
            Self::Io { source, .. } => {
                Self::Io { during: Activity::Request(request), source: source.clone() }
            }
            other => other.clone(),
        }
    }
}

/// What a connection was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activity {
    /// Connecting to the socket.
    Connect,
    /// Negotiating, up to the reply to `NBD_OPT_GO`.
    Handshake,
    /// Waiting for the reply to a request.
    Request(RequestInfo),
    /// After the handshake, no particular request.
    Transmission,
}

impl fmt::Display for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("connect"),
            Self::Handshake => f.write_str("the handshake"),
            Self::Request(request) => request.fmt(f),
            Self::Transmission => f.write_str("the transmission phase"),
        }
    }
}

/// A request as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestInfo {
    /// The command.
    pub command: Command,
    /// First byte, from the start of the export.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl fmt::Display for RequestInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes at offset {}", self.command, self.length, self.offset)
    }
}

/// Appends a server's own words to an error, if there are any.
struct Detail<'a>(&'a str);

impl fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " ({})", self.0) }
    }
}
