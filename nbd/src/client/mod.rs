//! The asynchronous client.
//!
//! Each connection has one task that reads replies and hands them to whoever waits. Requests are
//! written whole or queued whole before anybody waits for them, so a dropped future never leaves
//! half a message behind; its reply is read and thrown away.

mod connection;
mod handshake;
mod reader;
mod reply;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use nix::sys::{
    socket::{
        setsockopt,
        sockopt::{ReceiveTimeout, SendTimeout},
    },
    time::TimeVal,
};
use tokio::net::UnixStream;

use self::{
    connection::{Connection, Ticket},
    handshake::Negotiated,
    reply::{Answer, Reply},
};
use crate::{
    error::{Activity, NbdError, RequestInfo},
    wire::{self, BlockSizes, Command, Errno, Extent, ProtocolError, ReplyStyle},
};

/// Longest payload asked for at once, whatever the server offers: what proto.md ("Size
/// constraints") promises that nobody takes for an attack.
const PAYLOAD_MAX: u32 = 32 * 1024 * 1024;
/// Longest trim or block status request with compact headers: below 4 GiB, and aligned to any
/// minimum block size.
const COMPACT_LENGTH_MAX: u64 = 0xffff_0000;

/// How long a call may wait in the kernel where another holder of the socket made it blocking.
const BLOCKED_MAX: TimeVal = TimeVal::new(0, 100_000);

/// How to connect.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the export; empty for the server's default.
    pub export: String,
    /// Metadata contexts to ask for, such as `base:allocation`. Those that the server does not
    /// have are missing from [`Client::contexts`].
    pub contexts: Vec<String>,
    /// Connections to spread requests over, where the server allows several.
    pub connections: usize,
    /// Longest read sent as one request, in bytes; longer ones are split at its multiples, counted
    /// from where they begin.
    pub read_len_max: u32,
    /// Whether another descriptor of the socket keeps the connection open once this client is gone
    /// or has given up: then the server is told nothing. For [`Client::from_stream`].
    pub stays_open: bool,
    /// Longest time without any progress of a request (or of the handshake).
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            export: String::new(),
            contexts: Vec::new(),
            connections: 1,
            read_len_max: PAYLOAD_MAX,
            stays_open: false,
            timeout: Duration::from_secs(30),
        }
    }
}

/// What the server told about the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags (`wire::FLAG_…`; proto.md, "Transmission flags").
    pub flags: u16,
    /// Limits on requests; proto.md's defaults if the server told none.
    pub block_sizes: BlockSizes,
    /// How the server answers.
    pub style: ReplyStyle,
}

impl ExportInfo {
    /// Whether the export refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.flags & wire::FLAG_READ_ONLY != 0
    }

    /// Whether [`Client::trim`] can be used.
    pub fn can_trim(&self) -> bool {
        self.flags & wire::FLAG_SEND_TRIM != 0
    }

    /// Whether several connections see the same data.
    pub fn can_multi_conn(&self) -> bool {
        self.flags & wire::FLAG_CAN_MULTI_CONN != 0
    }
}

/// One export of one server. Clones share the connections, and every method may be called by many
/// tasks at once; any returned future may be dropped at any time.
///
/// Needs a tokio runtime with I/O and time. When the last clone is dropped, the server is told and
/// the sockets are closed without waiting; see [`disconnect`](Self::disconnect).
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    connections: Vec<Connection>,
    info: ExportInfo,
    contexts: Vec<String>,
    read_len_max: u32,
    /// Where the search for the least busy connection starts.
    next: AtomicUsize,
}

impl Client {
    /// Connects to the Unix socket `path` and opens the export.
    ///
    /// More than one connection is made only if the server sets `NBD_FLAG_CAN_MULTI_CONN`.
    pub async fn connect(path: &Path, options: Options) -> Result<Self, NbdError> {
        let first = open(path, &options).await?;
        let wanted = if first.1.info.can_multi_conn() { options.connections } else { 1 };
        let mut opened = vec![first];
        while opened.len() < wanted {
            let another = open(path, &options).await?;
            if !another.1.same_export(&opened[0].1) {
                let breach = ProtocolError::ExportsDiffer;
                return Err(NbdError::protocol(Activity::Handshake, breach));
            }
            opened.push(another);
        }
        Ok(Self::start(opened, &options))
    }

    /// Opens the export over a socket that is already connected; `options.connections` is not used.
    ///
    /// Who shares the socket may make it blocking, which it is for us too then: that costs time, and no
    /// deadline passes unnoticed.
    pub async fn from_stream(stream: UnixStream, options: Options) -> Result<Self, NbdError> {
        setsockopt(&stream, ReceiveTimeout, &BLOCKED_MAX)
            .and_then(|()| setsockopt(&stream, SendTimeout, &BLOCKED_MAX))
            .map_err(|errno| NbdError::socket(Activity::Handshake, errno.into()))?;
        let opened = within(options.timeout, Activity::Handshake, async {
            handshake::negotiate(stream, &options).await
        })
        .await?;
        Ok(Self::start(vec![opened], &options))
    }

    fn start(opened: Vec<(UnixStream, Negotiated)>, options: &Options) -> Self {
        let (info, contexts) = (opened[0].1.info, opened[0].1.context_names());
        let connections = opened
            .into_iter()
            .map(|(stream, negotiated)| Connection::start(stream, &negotiated, options))
            .collect();
        let next = AtomicUsize::new(0);
        let read_len_max = options.read_len_max;
        Self { inner: Arc::new(Inner { connections, info, contexts, read_len_max, next }) }
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.inner.info.size
    }

    /// What the server told about the export.
    pub fn info(&self) -> ExportInfo {
        self.inner.info
    }

    /// The metadata contexts the server granted, in the order of the lists that
    /// [`block_status`](Self::block_status) returns: the order in which they were asked for.
    pub fn contexts(&self) -> Vec<String> {
        self.inner.contexts.clone()
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// Longer requests than the server takes are split, and all parts are on their way at once;
    /// unaligned ones are widened to the server's minimum block size.
    pub async fn read(&self, offset: u64, len: u32) -> Result<Bytes, NbdError> {
        let request = RequestInfo { command: Command::Read, offset, length: u64::from(len) };
        self.check_range(request)?;
        if len == 0 {
            return Ok(Bytes::new());
        }
        let (start, end) = self.widen(request);
        let mut data = match self.read_range(start, end, self.read_flags()).await {
            // "Too long for one chunk" (proto.md, `NBD_CMD_FLAG_DF`): let the server cut it.
            Err(NbdError::Remote { errno: Errno::EOVERFLOW, .. }) if self.read_flags() != 0 => {
                self.read_range(start, end, 0).await?
            }
            result => result?,
        };
        if start != offset || end != offset + u64::from(len) {
            let from = to_usize(offset - start);
            data = data.slice(from..from + to_usize(u64::from(len)));
        }
        Ok(data)
    }

    /// Asks for one chunk where the server offers that: QEMU (tried: 7.2) reports a
    /// read error only in that case, and otherwise closes the connection. It also spares the
    /// server the search for holes in what is known to be data.
    fn read_flags(&self) -> u16 {
        let offered = self.inner.info.flags & wire::FLAG_SEND_DF != 0;
        if offered { wire::CMD_FLAG_DF } else { 0 }
    }

    /// Reads an aligned range, in as many requests as it takes.
    async fn read_range(&self, start: u64, end: u64, flags: u16) -> Result<Bytes, NbdError> {
        let part_max = self.part_max();
        let mut rest = BytesMut::with_capacity(to_usize(end - start));
        let mut parts: Vec<Ticket> = Vec::with_capacity(1);
        let mut at = start;
        while at < end {
            let length = part_max.min(end - at);
            let request = RequestInfo { command: Command::Read, offset: at, length };
            // All parts are slices of one allocation, so that joining them copies nothing.
            let tail = rest.split_off(to_usize(length));
            let buffer = std::mem::replace(&mut rest, tail);
            parts.push(self.pick().send(request, flags, Reply::read(request, buffer)).await?);
            at += length;
        }
        let mut data = BytesMut::new();
        for part in parts {
            let Answer::Data(part) = part.wait().await? else { continue };
            data.unsplit(part);
        }
        Ok(data.freeze())
    }

    /// Asks for the status of `len` bytes at `offset`: one list for each of
    /// [`contexts`](Self::contexts), each starting at `offset`.
    ///
    /// The lists reach as far as the server answered in one reply, at least one byte and at most
    /// `len`, each maybe differently far; callers ask again for the rest. Errors with
    /// [`NbdError::Unsupported`] if no context was granted.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Vec<Vec<Extent>>, NbdError> {
        let request = RequestInfo { command: Command::BlockStatus, offset, length: len };
        self.check_range(request)?;
        if self.inner.contexts.is_empty() {
            return Err(NbdError::Unsupported { command: Command::BlockStatus });
        }
        if len == 0 {
            return Ok(vec![Vec::new(); self.inner.contexts.len()]);
        }
        let (start, mut end) = self.widen(request);
        if self.inner.info.style.headers() == wire::Headers::Compact {
            end = end.min(start.saturating_add(COMPACT_LENGTH_MAX));
        }
        let sent = RequestInfo { command: request.command, offset: start, length: end - start };
        let connection = self.pick();
        let reply = Reply::block_status(connection.context_ids());
        let Answer::Status(mut lists) = connection.send(sent, 0, reply).await?.wait().await? else {
            return Ok(Vec::new());
        };
        lists.iter_mut().for_each(|list| clip(list, offset - start, len));
        Ok(lists)
    }

    /// Tells the server that `len` bytes at `offset` are no longer needed.
    ///
    /// A hint: with a minimum block size, partial blocks at both ends are left alone.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        let request = RequestInfo { command: Command::Trim, offset, length: len };
        self.check_range(request)?;
        if !self.inner.info.can_trim() {
            return Err(NbdError::Unsupported { command: Command::Trim });
        }
        let block = u64::from(self.inner.info.block_sizes.minimum);
        let (mut at, end) = (offset.next_multiple_of(block), offset + len);
        let end = if end == self.size() { end } else { end - end % block };
        while at < end {
            let length = COMPACT_LENGTH_MAX.min(end - at);
            let request = RequestInfo { command: Command::Trim, offset: at, length };
            self.pick().send(request, 0, Reply::plain()).await?.wait().await?;
            at += length;
        }
        Ok(())
    }

    /// Makes the server put what it has on stable storage; does nothing if it offers no flush.
    pub async fn flush(&self) -> Result<(), NbdError> {
        if self.inner.info.flags & wire::FLAG_SEND_FLUSH == 0 {
            return Ok(());
        }
        let request = RequestInfo { command: Command::Flush, offset: 0, length: 0 };
        self.pick().send(request, 0, Reply::plain()).await?.wait().await?;
        Ok(())
    }

    /// Waits for open requests, tells the server that we leave, and waits until it has closed.
    ///
    /// Requests made afterwards, by any clone, fail with [`NbdError::Closed`].
    pub async fn disconnect(&self) -> Result<(), NbdError> {
        let mut result = Ok(());
        for connection in &self.inner.connections {
            result = result.and(connection.disconnect().await);
        }
        result
    }

    fn check_range(&self, request: RequestInfo) -> Result<(), NbdError> {
        match request.offset.checked_add(request.length) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(NbdError::OutOfRange { request, size: self.size() }),
        }
    }

    /// The smallest aligned range around a request that lies within the export.
    fn widen(&self, request: RequestInfo) -> (u64, u64) {
        let block = u64::from(self.inner.info.block_sizes.minimum);
        let end = request.offset + request.length;
        let end = end.checked_next_multiple_of(block).unwrap_or(end).min(self.size());
        (request.offset - request.offset % block, end)
    }

    /// Most bytes of one read; a multiple of the minimum block size.
    fn part_max(&self) -> u64 {
        let BlockSizes { minimum, maximum, .. } = self.inner.info.block_sizes;
        let most = maximum.min(PAYLOAD_MAX).min(self.inner.read_len_max).max(minimum);
        u64::from(most - most % minimum)
    }

    /// The connection with the fewest open requests.
    fn pick(&self) -> &Connection {
        let connections = &self.inner.connections;
        if connections.len() == 1 {
            return &connections[0];
        }
        let start = self.inner.next.fetch_add(1, Ordering::Relaxed);
        (0..connections.len())
            .map(|i| &connections[start.wrapping_add(i) % connections.len()])
            .min_by_key(|connection| connection.open_requests())
            .expect("a client has at least one connection")
    }
}

async fn open(path: &Path, options: &Options) -> Result<(UnixStream, Negotiated), NbdError> {
    let stream = within(options.timeout, Activity::Connect, async {
        let socket = |source| NbdError::Io { during: Activity::Connect, source: Arc::new(source) };
        UnixStream::connect(path).await.map_err(socket)
    })
    .await?;
    within(options.timeout, Activity::Handshake, handshake::negotiate(stream, options)).await
}

/// Gives up after `limit`.
async fn within<T>(
    limit: Duration,
    what: Activity,
    work: impl Future<Output = Result<T, NbdError>>,
) -> Result<T, NbdError> {
    let late = |_| NbdError::Timeout { what, waited: limit };
    tokio::time::timeout(limit, work).await.map_err(late)?
}

/// Cuts `skip` bytes off the front, and leaves at most `len` bytes.
fn clip(list: &mut Vec<Extent>, mut skip: u64, mut len: u64) {
    for extent in list.iter_mut() {
        let skipped = skip.min(extent.length);
        skip -= skipped;
        extent.length = (extent.length - skipped).min(len);
        len -= extent.length;
    }
    list.retain(|extent| extent.length != 0);
}

/// A length that was bounded by `u32::MAX` and a block.
fn to_usize(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}
