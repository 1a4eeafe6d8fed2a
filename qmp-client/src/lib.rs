//! QEMU's monitor (QMP) and guest agent (QGA) protocols over a Unix socket.
//!
//! A transport: it knows how commands, replies, events and file descriptors travel, and nothing about
//! what they mean. [`Qmp`] speaks with QEMU or `qemu-storage-daemon`, [`Qga`] with the agent in a guest.
//! Requests and replies are JSON values; their types live with whoever uses them.
//!
//! Neither peer is trusted to be well-behaved: lengths, nesting and waits are bounded, and bytes from
//! outside yield errors, never panics. What a peer says goes to errors as it is; the errors' texts
//! print it with control characters escaped.

mod frame;
mod message;
mod qga;
mod qmp;
mod socket;
mod text;

use std::time::Duration;

pub use frame::Malformation;
pub use qga::{Qga, QgaError};
pub use qmp::{Command, Ending, Event, Greeting, Qmp, QmpError, Version};

/// How long to wait, and how much to read, on one connection.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Deadline of connecting (with greeting and handshake), and of a command that sets none itself.
    pub timeout: Duration,
    /// Longest message accepted from the peer, in bytes. A guest agent never gets more than 1 MiB.
    pub reply_len_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10), reply_len_max: 64 << 20 }
    }
}
