//! One connection: open requests, and the way out.

use std::{
    collections::HashMap,
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::sys::socket::{Shutdown, shutdown};
use tokio::{
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch},
    task::AbortHandle,
};

use super::{
    Options,
    handshake::Negotiated,
    reader::Reader,
    reply::{Answer, Reply},
    within,
};
use crate::{
    error::{Activity, NbdError, RequestInfo},
    wire::{Command, ReplyStyle, Request},
};

/// Most requests open on one connection; further ones wait for their turn.
const OPEN_MAX: u32 = 64;

/// A connection in the transmission phase; dropping it closes the socket.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    tasks: [AbortHandle; 2],
}

/// What callers, reader and writer share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) style: ReplyStyle,
    pub(super) timeout: Duration,
    context_ids: Vec<u32>,
    table: Mutex<Table>,
    /// Bounds the open requests, and with them the unsent bytes.
    permits: Arc<Semaphore>,
    /// `None` only while this is dropped.
    half: Option<OwnedWriteHalf>,
    /// Whether the connection outlives the client.
    stays_open: bool,
    /// Whole requests that the socket had no room for.
    unsent: Mutex<Vec<u8>>,
    more_unsent: Notify,
    /// Set once the reader has ended.
    ended: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Table {
    last_cookie: u64,
    open: HashMap<u64, Pending>,
    /// Why the connection is dead.
    fatal: Option<NbdError>,
}

/// A request that was sent. It stays until its reply is complete, even if nobody waits any more.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) request: RequestInfo,
    pub(super) reply: Reply,
    /// When it was sent, or bytes of its reply last arrived.
    pub(super) progress: Instant,
    answer: oneshot::Sender<Result<Answer, NbdError>>,
    _permit: OwnedSemaphorePermit,
}

impl Pending {
    /// The reply is complete: lets the caller go on. The inner error is the caller's alone; the
    /// outer one is a breach that ends the connection.
    pub(super) fn finish(self) -> Result<(), NbdError> {
        let (result, outcome) = match self.reply.finish(self.request) {
            Ok(result) => (result, Ok(())),
            Err(breach) => {
                let error = NbdError::protocol(Activity::Request(self.request), breach);
                (Err(error.clone()), Err(error))
            }
        };
        // Nobody listens if the caller's future was dropped.
        let _ = self.answer.send(result);
        outcome
    }

    fn fail(self, cause: &NbdError) {
        let _ = self.answer.send(Err(cause.for_request(self.request)));
    }

    /// Errors if this request has waited too long at `now`.
    pub(super) fn check(&self, now: Instant, timeout: Duration) -> Result<(), NbdError> {
        check_deadline(Activity::Request(self.request), self.progress, now, timeout)
    }
}

/// A request on its way.
pub(super) struct Ticket {
    request: RequestInfo,
    answer: oneshot::Receiver<Result<Answer, NbdError>>,
}

impl Ticket {
    /// Waits for the reply. The connection's reader keeps the deadline.
    pub(super) async fn wait(self) -> Result<Answer, NbdError> {
        let closed = NbdError::Closed { during: Activity::Request(self.request) };
        self.answer.await.unwrap_or(Err(closed))
    }
}

impl Connection {
    pub(super) fn start(stream: UnixStream, negotiated: &Negotiated, options: &Options) -> Self {
        let (read_half, half) = stream.into_split();
        let shared = Arc::new(Shared {
            style: negotiated.info.style,
            timeout: options.timeout,
            context_ids: negotiated.contexts.iter().map(|(id, _)| *id).collect(),
            table: Mutex::default(),
            permits: Arc::new(Semaphore::new(to_permits(OPEN_MAX))),
            half: Some(half),
            stays_open: options.stays_open,
            unsent: Mutex::default(),
            more_unsent: Notify::new(),
            ended: watch::Sender::new(false),
        });
        let reader = tokio::spawn(Reader::new(read_half, shared.clone()).run()).abort_handle();
        let writer = tokio::spawn(write_unsent(shared.clone())).abort_handle();
        Self { shared, tasks: [reader, writer] }
    }

    /// Ids of the metadata contexts on this connection.
    pub(super) fn context_ids(&self) -> &[u32] {
        &self.shared.context_ids
    }

    pub(super) fn open_requests(&self) -> usize {
        to_permits(OPEN_MAX).saturating_sub(self.shared.permits.available_permits())
    }

    /// Sends a request with `CMD_FLAG_…`; waits only while too many are open.
    pub(super) async fn send(
        &self,
        request: RequestInfo,
        flags: u16,
        reply: Reply,
    ) -> Result<Ticket, NbdError> {
        let shared = &self.shared;
        let Ok(permit) = shared.permits.clone().acquire_owned().await else {
            return Err(shared.table().why_dead(request));
        };
        let (sender, answer) = oneshot::channel();
        // From here to the end nothing awaits: a request is registered and sent, or neither.
        let cookie = shared.table().register(Pending {
            request,
            reply,
            progress: Instant::now(),
            answer: sender,
            _permit: permit,
        })?;
        shared.write(&wire_request(request, flags, cookie));
        Ok(Ticket { request, answer })
    }

    /// Lets open requests finish, says goodbye, and waits for the server to close.
    pub(super) async fn disconnect(&self) -> Result<(), NbdError> {
        let shared = &self.shared;
        // Each open request has its own deadline, so this wait ends.
        let Ok(_all) = shared.permits.acquire_many(OPEN_MAX).await else { return Ok(()) };
        shared.permits.close();
        let goodbye = RequestInfo { command: Command::Disconnect, offset: 0, length: 0 };
        shared.table().fatal.get_or_insert(NbdError::Closed { during: Activity::Transmission });
        shared.write(&wire_request(goodbye, 0, 0));
        let mut ended = shared.ended.subscribe();
        within(shared.timeout, Activity::Request(goodbye), async {
            // An error means that the sender is gone, which is an end as well.
            let _ = ended.wait_for(|ended| *ended).await;
            Ok(())
        })
        .await
    }
}

impl Drop for Connection {
    /// Tells the server if that needs no waiting, and closes the socket.
    fn drop(&mut self) {
        if !self.shared.stays_open && self.shared.table().fatal.is_none() {
            let goodbye = RequestInfo { command: Command::Disconnect, offset: 0, length: 0 };
            self.shared.write(&wire_request(goodbye, 0, 0));
        }
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Table {
    fn register(&mut self, pending: Pending) -> Result<u64, NbdError> {
        if self.fatal.is_some() {
            return Err(self.why_dead(pending.request));
        }
        self.last_cookie += 1;
        self.open.insert(self.last_cookie, pending);
        Ok(self.last_cookie)
    }

    fn why_dead(&self, request: RequestInfo) -> NbdError {
        match &self.fatal {
            Some(cause) => cause.for_request(request),
            None => NbdError::Closed { during: Activity::Request(request) },
        }
    }
}

impl Shared {
    /// Takes a request out, so that its reply can be filled without holding the lock.
    pub(super) fn take(&self, cookie: u64) -> Option<Pending> {
        self.table().open.remove(&cookie)
    }

    pub(super) fn put_back(&self, cookie: u64, pending: Pending) {
        self.table().open.insert(cookie, pending);
    }

    /// Errors if a request (other than one that was taken out) has waited too long.
    pub(super) fn check_deadlines(&self, now: Instant) -> Result<(), NbdError> {
        self.table().open.values().try_for_each(|pending| pending.check(now, self.timeout))
    }

    /// Fails all open requests, and every later one, with the same cause.
    pub(super) fn fail(&self, cause: NbdError) {
        let mut table = self.table();
        let cause = table.fatal.get_or_insert(cause).clone();
        let open = std::mem::take(&mut table.open);
        drop(table);
        self.permits.close();
        if !self.stays_open {
            // The server must not wait for us; also ends the reader. Fails only if it was closed.
            let _ = shutdown(self.half().as_ref().as_raw_fd(), Shutdown::Both);
        }
        for pending in open.into_values() {
            pending.fail(&cause);
        }
    }

    /// Marks the end of the reader.
    pub(super) fn end(&self) {
        self.ended.send_replace(true);
    }

    /// Sends a whole message now, or queues what the socket has no room for.
    fn write(&self, request: &Request) {
        let mut message = Vec::with_capacity(32);
        request.encode(self.style.headers(), &mut message);
        let mut unsent = self.unsent();
        // Behind queued bytes there is no overtaking.
        let written = if unsent.is_empty() { self.half().try_write(&message) } else { Ok(0) };
        let sent = match written {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                drop(unsent);
                return self.fail(NbdError::socket(Activity::Transmission, error));
            }
        };
        if sent < message.len() {
            unsent.extend(&message[sent..]);
            self.more_unsent.notify_one();
        }
    }

    fn half(&self) -> &OwnedWriteHalf {
        self.half.as_ref().expect("it is taken only when this is dropped")
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unsent(&self) -> MutexGuard<'_, Vec<u8>> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Dropped, this half would end the connection for every descriptor of the socket.
        if self.stays_open
            && let Some(half) = self.half.take()
        {
            half.forget();
        }
    }
}

/// Sends what did not fit into the socket at once. Ends when the socket fails.
async fn write_unsent(shared: Arc<Shared>) {
    loop {
        shared.more_unsent.notified().await;
        while !shared.unsent().is_empty() {
            let result = match shared.half().writable().await {
                Ok(()) => {
                    let mut unsent = shared.unsent();
                    shared.half().try_write(&unsent).map(|sent| drop(unsent.drain(..sent)))
                }
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    return shared.fail(NbdError::socket(Activity::Transmission, error));
                }
            }
        }
    }
}

fn wire_request(request: RequestInfo, flags: u16, cookie: u64) -> Request {
    let RequestInfo { command, offset, length } = request;
    Request { flags, command, cookie, offset, length }
}

/// Errors if `what` has made no progress for `timeout`.
pub(super) fn check_deadline(
    what: Activity,
    progress: Instant,
    now: Instant,
    timeout: Duration,
) -> Result<(), NbdError> {
    let waited = now.saturating_duration_since(progress);
    if waited < timeout { Ok(()) } else { Err(NbdError::Timeout { what, waited }) }
}

/// The count of permits as tokio wants it.
fn to_permits(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
