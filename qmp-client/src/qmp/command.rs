//! One command, before it is sent.

use std::{fmt, os::fd::OwnedFd, time::Duration};

use serde_json::{Map, Value};

/// A command with its arguments and how to send it.
#[must_use = "a command does nothing until it is executed"]
pub struct Command {
    pub(super) name: String,
    pub(super) arguments: Value,
    pub(super) deadline: Option<Duration>,
    pub(super) fd: Option<OwnedFd>,
    pub(super) out_of_band: bool,
}

impl Command {
    /// The command `name`. `arguments` is an object, or `Value::Null` for a command without any.
    pub fn new(name: impl Into<String>, arguments: Value) -> Self {
        Self { name: name.into(), arguments, deadline: None, fd: None, out_of_band: false }
    }

    /// Waits this long for the reply instead of [`Options::timeout`](crate::Options::timeout),
    /// counted from `execute` on.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Passes `fd` by `SCM_RIGHTS` together with the bytes of this command: for `add-fd` and `getfd`.
    /// Our copy is closed once it is sent.
    ///
    /// QEMU keeps the descriptor that came last until a command takes it (`chardev/char-socket.c`;
    /// tried with 7.2: of six sent at once five are lost). So none is sent before the command with
    /// the one before is answered.
    pub fn fd(mut self, fd: OwnedFd) -> Self {
        self.fd = Some(fd);
        self
    }

    /// Asks QEMU to run it at once, past the commands that wait (`exec-oob`; few commands allow it).
    /// If this QEMU does not offer "oob", the command is sent like any other.
    pub fn out_of_band(mut self) -> Self {
        self.out_of_band = true;
        self
    }

    /// The line for the socket.
    pub(super) fn encode(&self, id: u64, oob: bool) -> Vec<u8> {
        let verb = if self.out_of_band && oob { "exec-oob" } else { "execute" };
        let mut object = Map::new();
        object.insert(verb.to_owned(), self.name.clone().into());
        if !self.arguments.is_null() {
            object.insert("arguments".to_owned(), self.arguments.clone());
        }
        object.insert("id".to_owned(), id.into());
        let mut line = Value::Object(object).to_string().into_bytes();
        line.extend_from_slice(b"\r\n");
        line
    }
}

/// Without the arguments: they may hold secrets.
impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Command").field("name", &self.name).finish_non_exhaustive()
    }
}
