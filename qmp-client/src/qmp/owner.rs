//! The task that owns a monitor's socket: the only one that reads and writes it.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd},
    pin::pin,
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, Shutdown, UnixAddr, sendmsg, shutdown};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot, watch},
    time::timeout,
};
use tracing::{debug, warn};

use super::{Ending, Event};
use crate::{
    frame::{FrameError, Framer},
    message::{self, Message, Reply},
};

/// Commands that QEMU queues before it stops reading (`QMP_REQ_QUEUE_LEN_MAX`).
pub(super) const PENDING_MAX: usize = 8;

/// One command, ready for the socket.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
    /// Out of band: not counted as waiting in QEMU's queue.
    pub(super) urgent: bool,
    pub(super) reply: oneshot::Sender<Reply>,
}

/// Commands that go out in one write: one with a file descriptor goes alone.
pub(super) type Batch = Vec<Entry>;

/// What one caller hands over: batches that follow each other, with nothing in-band in between.
pub(super) type Handover = VecDeque<Batch>;

/// Cuts a list into as few batches as possible.
pub(super) fn split(entries: Vec<Entry>) -> Handover {
    let mut batches = Handover::new();
    for entry in entries {
        let fits = |batch: &&mut Batch| batch.iter().chain([&entry]).all(|one| one.fd.is_none());
        match batches.back_mut().filter(fits) {
            Some(batch) => batch.push(entry),
            None => batches.push_back(vec![entry]),
        }
    }
    batches
}

/// A command whose reply has not come yet, even if nobody waits for it any more.
struct Pending {
    reply: oneshot::Sender<Reply>,
    urgent: bool,
    with_fd: bool,
}

/// Bytes on their way out.
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fd: Option<OwnedFd>,
}

pub(super) struct Owner {
    stream: UnixStream,
    framer: Framer,
    in_band: mpsc::Receiver<Handover>,
    urgent: mpsc::Receiver<Handover>,
    events: broadcast::Sender<Event>,
    /// Batches that QEMU has no room for, or that wait for a descriptor to be taken. While one waits, nothing
    /// else in-band is taken.
    held: Handover,
    pending: HashMap<u64, Pending>,
    outgoing: VecDeque<Outgoing>,
    chunk: Vec<u8>,
}

impl Owner {
    pub(super) fn new(
        stream: UnixStream,
        framer: Framer,
        in_band: mpsc::Receiver<Handover>,
        urgent: mpsc::Receiver<Handover>,
        events: broadcast::Sender<Event>,
    ) -> Self {
        let (held, pending, outgoing) = (Handover::new(), HashMap::new(), VecDeque::new());
        let chunk = vec![0; 64 << 10];
        Self { stream, framer, in_band, urgent, events, held, pending, outgoing, chunk }
    }

    /// Serves until the connection ends. After the last handle is gone, commands that were handed
    /// over get `linger` to be written and answered: QEMU forgets those it has not begun.
    pub(super) async fn run(mut self, ended: watch::Sender<Option<Ending>>, linger: Duration) {
        let ending = match self.dispatch(ended.closed()).await {
            Err(ending) => ending,
            Ok(()) => match timeout(linger, self.finish()).await {
                Ok(Err(ending)) => ending,
                Ok(Ok(())) | Err(_) => Ending::Released,
            },
        };
        debug!(%ending, "monitor closed");
        // First the reason, then the replies that will not come (dropped with `self`).
        ended.send_replace(Some(ending));
    }

    /// Until the last handle is gone (`Ok`), which `released` tells, or the connection ends.
    async fn dispatch(&mut self, released: impl Future<Output = ()>) -> Result<(), Ending> {
        let mut released = pin!(released);
        loop {
            self.admit();
            let urgent_pending = self.pending.values().filter(|p| p.urgent).count();
            let passes = self.passes_fd();
            tokio::select! {
                () = &mut released => return Ok(()),
                Some(batches) = self.in_band.recv(), if self.held.is_empty() => self.held = batches,
                Some(batches) = self.urgent.recv(), if urgent_pending < PENDING_MAX && !passes => {
                    batches.into_iter().for_each(|batch| self.enqueue(batch));
                }
                ready = self.stream.readable() => self.read(ready)?,
                ready = self.stream.writable(), if !self.outgoing.is_empty() => self.write(ready)?,
            }
        }
    }

    /// Writes what was handed over and waits for its answers.
    async fn finish(&mut self) -> Result<(), Ending> {
        loop {
            while !self.passes_fd()
                && let Ok(batches) = self.urgent.try_recv()
            {
                batches.into_iter().for_each(|batch| self.enqueue(batch));
            }
            self.admit();
            while self.held.is_empty()
                && let Ok(batches) = self.in_band.try_recv()
            {
                self.held = batches;
                self.admit();
            }
            if self.pending.is_empty() {
                return Ok(());
            }
            tokio::select! {
                ready = self.stream.readable() => self.read(ready)?,
                ready = self.stream.writable(), if !self.outgoing.is_empty() => self.write(ready)?,
            }
        }
    }

    /// Lets held batches go, each once QEMU has room for all of it.
    fn admit(&mut self) {
        while self.held.front().is_some_and(|batch| self.has_room(batch)) {
            let batch = self.held.pop_front();
            batch.into_iter().for_each(|batch| self.enqueue(batch));
        }
    }

    fn has_room(&self, batch: &Batch) -> bool {
        let queued = self.pending.values().filter(|p| !p.urgent).count();
        // A list longer than the limit goes out alone: QEMU reads its rest as it gets along.
        !self.passes_fd() && (queued == 0 || queued + batch.len() <= PENDING_MAX)
    }

    /// Whether a file descriptor is on its way, and not a byte may follow ([`super::Command::fd`]).
    fn passes_fd(&self) -> bool {
        self.pending.values().any(|pending| pending.with_fd)
    }

    fn enqueue(&mut self, batch: Batch) {
        let mut outgoing = Outgoing { bytes: Vec::new(), sent: 0, fd: None };
        for entry in batch {
            outgoing.bytes.extend_from_slice(&entry.bytes);
            let with_fd = entry.fd.is_some();
            outgoing.fd = entry.fd.or(outgoing.fd);
            let pending = Pending { reply: entry.reply, urgent: entry.urgent, with_fd };
            self.pending.insert(entry.id, pending);
        }
        self.outgoing.push_back(outgoing);
    }

    fn read(&mut self, ready: io::Result<()>) -> Result<(), Ending> {
        match ready.and_then(|()| self.stream.try_read(&mut self.chunk)) {
            Ok(0) => return Err(Ending::HungUp),
            Ok(len) => self.framer.push(self.chunk.get(..len).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(Ending::HungUp),
            Err(e) => return Err(Ending::Io { kind: e.kind() }),
        }
        loop {
            let message = match self.framer.next() {
                Ok(None) => return Ok(()),
                Ok(Some(frame)) => message::parse(frame)
                    .map_err(|source| Ending::Malformed { source: source.into() })?,
                Err(FrameError::TooLong { limit }) => return Err(Ending::ReplyTooLong { limit }),
                Err(FrameError::Malformed(source)) => return Err(Ending::Malformed { source }),
            };
            self.deliver(message);
        }
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Reply(reply) => match reply.id.and_then(|id| self.pending.remove(&id)) {
                // The future may be gone: nobody minds then.
                Some(pending) => drop(pending.reply.send(reply)),
                None => {
                    warn!(id = reply.id, ok = reply.outcome.is_ok(), "reply to no command of ours");
                }
            },
            Message::Event(event) => {
                debug!(name = event.name, "event");
                drop(self.events.send(event)); // fails if nobody listens
            }
            Message::Greeting(_) | Message::Unknown => debug!("message of unknown kind"),
        }
    }

    fn write(&mut self, ready: io::Result<()>) -> Result<(), Ending> {
        let Some(first) = self.outgoing.front_mut() else { return Ok(()) };
        let stream = &self.stream;
        let sent = ready.and_then(|()| stream.try_io(Interest::WRITABLE, || send(stream, first)));
        match sent {
            Ok(len) => {
                first.fd = None; // went with the first byte; QEMU has its own copy now
                first.sent += len;
                if first.sent >= first.bytes.len() {
                    self.outgoing.pop_front();
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            // QEMU takes no more, but what it wrote before still counts: reading finds the end.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.outgoing.clear();
                Ok(())
            }
            Err(e) => Err(Ending::Io { kind: e.kind() }),
        }
    }
}

impl Drop for Owner {
    /// Ends the connection for its duplicates too, so that QEMU can serve the next client.
    fn drop(&mut self) {
        // Fails only where the connection has ended already.
        let _ = shutdown(self.stream.as_raw_fd(), Shutdown::Both);
    }
}

/// Sends what is left of `outgoing` in one call, the file descriptor with it.
fn send(stream: &UnixStream, outgoing: &Outgoing) -> io::Result<usize> {
    let rest = outgoing.bytes.get(outgoing.sent..).unwrap_or_default();
    let fds = outgoing.fd.as_ref().map(|fd| [fd.as_raw_fd()]);
    let rights = fds.as_ref().map(|fds| ControlMessage::ScmRights(fds));
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(rest)],
        rights.as_slice(),
        flags,
        None,
    )?;
    Ok(sent)
}
