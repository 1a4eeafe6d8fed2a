//! The server's side of the transmission phase: one task reads requests, one writes replies, and
//! the source is called on blocking threads in between.

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Buf;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};

use super::{
    Shared, Source, breach,
    negotiate::{Agreed, BASE_ALLOCATION_ID},
};
use crate::wire::{
    self, CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT, CHUNK_DATA, CHUNK_ERROR, CHUNK_HOLE,
    CHUNK_NONE, ChunkHeader, Command, Errno, Extent, Headers, REPLY_FLAG_DONE, RemoteError,
    ReplyHeader, ReplyStyle, Request, STATE_ZERO,
};

/// Longest read, and longest payload that is skipped before a write is refused.
const PAYLOAD_MAX: u64 = 32 * 1024 * 1024;
/// Shorter runs of zeros are sent as data: a chunk of their own would cost more.
const HOLE_LEN_MIN: u64 = 4096;
/// Most extents in one reply.
const EXTENTS_MAX: usize = 1 << 17;
/// Longer buffers are not kept for the next read.
const KEPT_LEN_MAX: usize = 4 * 1024 * 1024;

/// Serves one client until it leaves.
pub(super) async fn serve(
    stream: UnixStream,
    agreed: Agreed,
    shared: Arc<Shared>,
) -> io::Result<()> {
    let parallel = shared.options.parallel.max(1);
    let (read_half, write_half) = stream.into_split();
    let pool = Arc::new(Pool { buffers: Mutex::default(), most: parallel });
    let (replies, queue) = mpsc::channel(parallel);
    let turns = Arc::new(Semaphore::new(parallel));
    let mut tasks = JoinSet::new();
    tasks.spawn(write_replies(write_half, queue, shared.clone(), pool.clone()));
    let session = Session { agreed, shared, pool };
    let gone = replies.clone();
    let result = tokio::select! {
        result = read_requests(read_half, &session, &turns, replies, &mut tasks) => result,
        () = gone.closed() => Err(io::ErrorKind::BrokenPipe.into()), // the writer gave up
    };
    drop(gone);
    // What is in work is answered: the client may have closed only its side.
    while tasks.join_next().await.is_some() {}
    result
}

async fn read_requests(
    half: OwnedReadHalf,
    session: &Session,
    turns: &Arc<Semaphore>,
    replies: mpsc::Sender<Reply>,
    tasks: &mut JoinSet<()>,
) -> io::Result<()> {
    let headers = session.agreed.style.headers();
    let mut reader = BufReader::with_capacity(4096, half);
    loop {
        if reader.fill_buf().await?.is_empty() {
            return Ok(()); // left without a goodbye, between two requests
        }
        let mut bytes = [0; wire::HEADER_LEN_MAX];
        let bytes = &mut bytes[..headers.request_len()];
        reader.read_exact(bytes).await?;
        let request = Request::decode(headers, bytes).map_err(breach)?;
        let payload = request.payload_len(headers);
        if payload > PAYLOAD_MAX {
            return Err(breach(format!("payload of {payload} bytes")));
        }
        tokio::io::copy(&mut (&mut reader).take(payload), &mut tokio::io::sink()).await?;
        if request.command == Command::Disconnect {
            return Ok(());
        }
        // Held until the reply is written: bounds memory for a client that does not read.
        let Ok(turn) = turns.clone().acquire_owned().await else { return Ok(()) };
        while tasks.try_join_next().is_some() {}
        let (session, replies) = (session.clone(), replies.clone());
        tasks.spawn(async move {
            let reply = session.answer(request, turn).await;
            // The writer has ended if the client is gone.
            let _ = replies.send(reply).await;
        });
    }
}

/// One client, as the handlers of its requests see it.
#[derive(Clone)]
struct Session {
    agreed: Agreed,
    shared: Arc<Shared>,
    pool: Arc<Pool>,
}

/// A whole reply.
struct Reply {
    parts: Vec<Part>,
    /// What the data of the parts are slices of.
    buffer: Vec<u8>,
    _turn: OwnedSemaphorePermit,
}

struct Part {
    header: Vec<u8>,
    data: Range<usize>,
}

impl Part {
    fn header(header: Vec<u8>) -> Self {
        Self { header, data: 0..0 }
    }
}

impl Session {
    async fn answer(self, request: Request, turn: OwnedSemaphorePermit) -> Reply {
        let failed = (Errno::EIO, "the source of the export failed");
        let result = match self.check(&request) {
            Err(errno) => Err((errno, String::new())),
            Ok(Work::Nothing) => Ok((vec![self.done(&request)], Vec::new())),
            Ok(work) => {
                let calls = self.shared.calls.clone().acquire_owned().await;
                let session = self.clone();
                // A panic of the source fails this request, not the server.
                tokio::task::spawn_blocking(move || {
                    let _call = calls;
                    session.work(work, &request)
                })
                .await
                .unwrap_or_else(|_| Err((failed.0, failed.1.to_owned())))
            }
        };
        let (parts, buffer) = result.unwrap_or_else(|(errno, message)| {
            (vec![self.error(&request, errno, &message)], Vec::new())
        });
        Reply { parts, buffer, _turn: turn }
    }

    /// What a request needs, or the error it earns (proto.md, "Request types", "Error values").
    fn check(&self, request: &Request) -> Result<Work, Errno> {
        let (allowed, work) = match request.command {
            Command::Read => (wire::CMD_FLAG_DF, Work::Read),
            Command::BlockStatus => (wire::CMD_FLAG_REQ_ONE, Work::BlockStatus),
            Command::Flush => return Ok(Work::Nothing),
            Command::Write | Command::Trim | Command::WriteZeroes => return Err(Errno::EPERM),
            _ => return Err(Errno::EINVAL),
        };
        let end = request.offset.checked_add(request.length);
        let inside = end.is_some_and(|end| end <= self.shared.source.size());
        if request.flags & !allowed != 0 || !inside || request.length == 0 {
            return Err(Errno::EINVAL);
        }
        match work {
            Work::Read if request.length > PAYLOAD_MAX => Err(Errno::EOVERFLOW),
            Work::BlockStatus if !self.agreed.block_status => Err(Errno::EINVAL),
            work => Ok(work),
        }
    }

    /// Calls the source; blocks.
    fn work(&self, work: Work, request: &Request) -> Result<(Vec<Part>, Vec<u8>), (Errno, String)> {
        let failed = |error: io::Error| (errno_of(&error), error.to_string());
        match work {
            Work::Nothing => Ok((vec![self.done(request)], Vec::new())),
            Work::Read => self.read(request).map_err(failed),
            Work::BlockStatus => {
                let part = self.block_status(request).map_err(failed)?;
                Ok((vec![part], Vec::new()))
            }
        }
    }

    fn read(&self, request: &Request) -> io::Result<(Vec<Part>, Vec<u8>)> {
        let source = &*self.shared.source;
        let Request { offset, length, cookie, .. } = *request;
        let whole = request.flags & wire::CMD_FLAG_DF != 0;
        let runs = match self.agreed.style {
            ReplyStyle::Simple => vec![Run { zero: false, range: 0..length }],
            _ if whole => vec![Run { zero: false, range: 0..length }],
            _ => runs(&extents(source, offset, length)?, length),
        };
        let mut buffer = self.pool.take(if runs.iter().all(|run| run.zero) { 0 } else { length });
        let mut parts = Vec::with_capacity(runs.len());
        let last = runs.len() - 1;
        for (i, Run { zero, range }) in runs.into_iter().enumerate() {
            let (at, len) = (offset + range.start, range.end - range.start);
            let data = if zero { 0..0 } else { index(range.start)..index(range.end) };
            let mut header = Vec::with_capacity(wire::HEADER_LEN_MAX + 12);
            match (self.agreed.style, zero) {
                (ReplyStyle::Simple, _) => ReplyHeader::encode_simple(cookie, None, &mut header),
                (_, true) => {
                    self.chunk(request, i == last, CHUNK_HOLE, 12).encode(&mut header);
                    let len = u32::try_from(len).map_err(io::Error::other)?;
                    header.extend(wire::encode_hole(at, len));
                }
                (_, false) => {
                    let prefixed = wire::DATA_PREFIX_LEN + len;
                    self.chunk(request, i == last, CHUNK_DATA, prefixed).encode(&mut header);
                    header.extend(at.to_be_bytes());
                }
            }
            if !zero {
                source.read(at, &mut buffer[data.clone()])?;
            }
            parts.push(Part { header, data });
        }
        Ok((parts, buffer))
    }

    fn block_status(&self, request: &Request) -> io::Result<Part> {
        let mut list = extents(&*self.shared.source, request.offset, request.length)?;
        let most = if request.flags & wire::CMD_FLAG_REQ_ONE != 0 { 1 } else { EXTENTS_MAX };
        list.truncate(most);
        let headers = self.agreed.style.headers();
        let payload = wire::encode_block_status(headers, BASE_ALLOCATION_ID, &list);
        let kind = match headers {
            Headers::Compact => CHUNK_BLOCK_STATUS,
            Headers::Extended => CHUNK_BLOCK_STATUS_EXT,
        };
        Ok(self.last_chunk(request, kind, &payload))
    }

    /// Success without data.
    fn done(&self, request: &Request) -> Part {
        match self.agreed.style {
            ReplyStyle::Simple => simple(request, None),
            _ => self.last_chunk(request, CHUNK_NONE, &[]),
        }
    }

    fn error(&self, request: &Request, errno: Errno, message: &str) -> Part {
        match self.agreed.style {
            ReplyStyle::Simple => simple(request, Some(errno)),
            _ => self.last_chunk(request, CHUNK_ERROR, &RemoteError::encode(errno, message)),
        }
    }

    fn last_chunk(&self, request: &Request, kind: u16, payload: &[u8]) -> Part {
        let mut out = Vec::with_capacity(wire::HEADER_LEN_MAX + payload.len());
        let length = u64::try_from(payload.len()).unwrap_or(u64::MAX);
        self.chunk(request, true, kind, length).encode(&mut out);
        out.extend(payload);
        Part::header(out)
    }

    fn chunk(&self, request: &Request, last: bool, kind: u16, length: u64) -> ChunkHeader {
        let flags = if last { REPLY_FLAG_DONE } else { 0 };
        let extended = self.agreed.style == ReplyStyle::Extended;
        let offset = extended.then_some(request.offset);
        ChunkHeader { flags, kind, cookie: request.cookie, offset, length }
    }
}

/// What has to be done for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Nothing,
    Read,
    BlockStatus,
}

/// A part of a read, relative to its start.
struct Run {
    zero: bool,
    range: Range<u64>,
}

/// Splits `length` bytes into data and zeros; what the extents do not reach is data.
fn runs(extents: &[Extent], length: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    let rest = Extent { length, flags: 0 };
    for extent in extents.iter().chain([&rest]) {
        let end = at + extent.length.min(length - at);
        let zero = extent.flags & STATE_ZERO != 0 && extent.length >= HOLE_LEN_MIN;
        match runs.last_mut() {
            _ if at == end => {}
            Some(run) if run.zero == zero => run.range.end = end,
            _ => runs.push(Run { zero, range: at..end }),
        }
        at = end;
    }
    runs
}

/// Asks the source, and cuts its answer to `length`; an answer that leads nowhere is an error.
fn extents(source: &dyn Source, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
    let (mut list, mut left) = (source.extents(offset, length)?, length);
    for extent in &mut list {
        extent.length = extent.length.min(left);
        left -= extent.length;
    }
    list.retain(|extent| extent.length != 0);
    if list.is_empty() {
        return Err(io::Error::other("no extents"));
    }
    Ok(list)
}

fn simple(request: &Request, error: Option<Errno>) -> Part {
    let mut out = Vec::with_capacity(16);
    ReplyHeader::encode_simple(request.cookie, error, &mut out);
    Part::header(out)
}

/// The NBD name of an error of the source.
fn errno_of(error: &io::Error) -> Errno {
    use io::ErrorKind::{InvalidInput, OutOfMemory, PermissionDenied, StorageFull};
    match error.kind() {
        PermissionDenied => Errno::EPERM,
        OutOfMemory => Errno::ENOMEM,
        InvalidInput => Errno::EINVAL,
        StorageFull => Errno::ENOSPC,
        _ => Errno::EIO,
    }
}

/// Writes replies in the order in which they become ready, until nobody can send any more.
async fn write_replies(
    mut half: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Reply>,
    shared: Arc<Shared>,
    pool: Arc<Pool>,
) {
    while let Some(reply) = queue.recv().await {
        for Part { header, data } in &reply.parts {
            // Header and data leave in one system call, uncopied.
            let mut bytes = Buf::chain(header.as_slice(), &reply.buffer[data.clone()]);
            while bytes.has_remaining() {
                let write = half.write_buf(&mut bytes);
                match tokio::time::timeout(shared.options.timeout, write).await {
                    Ok(Ok(written)) if written > 0 => {}
                    stuck_or_gone => {
                        tracing::debug!(?stuck_or_gone, "an NBD client takes no reply");
                        return; // which ends the connection
                    }
                }
            }
        }
        pool.give(reply.buffer);
    }
}

/// Buffers for the next reads, so that they need not be zeroed and mapped again.
struct Pool {
    buffers: Mutex<Vec<Vec<u8>>>,
    most: usize,
}

impl Pool {
    /// A buffer of `length` bytes with arbitrary earlier content of the same export.
    fn take(&self, length: u64) -> Vec<u8> {
        let kept = self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match kept {
            Some(mut buffer) if buffer.capacity() >= index(length) => {
                buffer.resize(index(length), 0);
                buffer
            }
            _ => vec![0; index(length)],
        }
    }

    fn give(&self, buffer: Vec<u8>) {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.capacity() > 0 && buffer.capacity() <= KEPT_LEN_MAX && buffers.len() < self.most {
            buffers.push(buffer);
        }
    }
}

/// A length that was bounded by [`PAYLOAD_MAX`].
fn index(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}
