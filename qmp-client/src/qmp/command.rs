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
    /// tried with 7.2: of six sent at once five are lost). Until then, before 10.2, it makes it blocking
    /// again at each byte that it reads, in another thread than the one that takes it: for who shares it, even
    /// after the answer (tried with 7.2). So not a byte is sent after this command, not even the end of a
    /// line, before it is answered.
    pub fn fd(mut self, fd: OwnedFd) -> Self {
        self.fd = Some(fd);
        self
    }

    /// Asks QEMU to run it at once, past the commands that wait (`exec-oob`; few commands allow it); only one
    /// that passes a descriptor is not passed. If this QEMU does not offer "oob", the command is sent like any
    /// other.
    pub fn out_of_band(mut self) -> Self {
        self.out_of_band = true;
        self
    }

    /// The bytes for the socket. QEMU needs no end of a line to know where a command ends.
    pub(super) fn encode(&self, id: u64, oob: bool) -> Vec<u8> {
        let verb = if self.out_of_band && oob { "exec-oob" } else { "execute" };
        let mut object = Map::new();
        object.insert(verb.to_owned(), self.name.clone().into());
        if !self.arguments.is_null() {
            object.insert("arguments".to_owned(), self.arguments.clone());
        }
        object.insert("id".to_owned(), id.into());
        let mut bytes = Value::Object(object).to_string().into_bytes();
        if self.fd.is_none() {
            bytes.extend_from_slice(b"\r\n");
        }
        bytes
    }
}

/// Without the arguments: they may hold secrets.
impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Command").field("name", &self.name).finish_non_exhaustive()
    }
}
