//! The task that reads replies and hands them to whoever waits.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, BytesMut};
use tokio::{
    io::AsyncReadExt,
    net::unix::OwnedReadHalf,
    time::{Interval, MissedTickBehavior},
};

use super::{
    connection::{Pending, Shared, check_deadline},
    reply::Place,
    to_usize,
};
use crate::{
    error::{Activity, NbdError},
    wire::{
        ChunkHeader, Command, Content, DATA_PREFIX_LEN, ProtocolError, RemoteError, ReplyHeader,
        ReplyStyle, decode_hole,
    },
};

/// Bytes read ahead of a header. Small, because payload among them is copied; large enough for
/// many small replies at once.
const STAGE_LEN: usize = 4096;

/// Reads one connection until it ends.
pub(super) struct Reader {
    half: OwnedReadHalf,
    watch: Watch,
    /// Bytes that were read but not used yet.
    stage: BytesMut,
}

/// Keeps the deadlines while the reader waits.
struct Watch {
    shared: Arc<Shared>,
    tick: Interval,
    checked: Instant,
}

impl Reader {
    pub(super) fn new(half: OwnedReadHalf, shared: Arc<Shared>) -> Self {
        let period = (shared.timeout / 16).clamp(Duration::from_millis(5), Duration::from_secs(1));
        let mut tick = tokio::time::interval(period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watch = Watch { shared, tick, checked: Instant::now() };
        Self { half, watch, stage: BytesMut::with_capacity(STAGE_LEN) }
    }

    /// Runs until the connection is dead, then fails whatever is open.
    pub(super) async fn run(mut self) {
        let cause = loop {
            if let Err(cause) = self.one_message().await {
                break cause;
            }
        };
        tracing::debug!(%cause, "the NBD connection ended");
        self.watch.shared.fail(cause);
        self.watch.shared.end();
    }

    async fn one_message(&mut self) -> Result<(), NbdError> {
        let header = self.header().await?;
        let cookie = match header {
            ReplyHeader::Simple { cookie, .. } => cookie,
            ReplyHeader::Chunk(chunk) => chunk.cookie,
        };
        let Some(mut pending) = self.watch.shared.take(cookie) else {
            return Err(broken(Activity::Transmission, ProtocolError::UnknownCookie { cookie }));
        };
        pending.progress = Instant::now();
        let last = match header {
            ReplyHeader::Simple { error, .. } => {
                let simple = error.map(|errno| pending.reply.simple_error(errno));
                match simple {
                    Some(()) => Ok(true),
                    None => self.simple_success(&mut pending).await.map(|()| true),
                }
            }
            ReplyHeader::Chunk(chunk) => self.chunk(chunk, &mut pending).await,
        };
        match last {
            Ok(true) => pending.finish(),
            Ok(false) => {
                self.watch.shared.put_back(cookie, pending);
                Ok(())
            }
            Err(error) => {
                self.watch.shared.put_back(cookie, pending); // to fail with all others
                Err(error)
            }
        }
    }

    async fn header(&mut self) -> Result<ReplyHeader, NbdError> {
        let during = Activity::Transmission;
        self.fill_stage(4, None).await?;
        let magic = [self.stage[0], self.stage[1], self.stage[2], self.stage[3]];
        let len = ReplyHeader::len(self.watch.shared.style, magic);
        let len = len.map_err(|breach| broken(during, breach))?;
        self.fill_stage(len, None).await?;
        let header = ReplyHeader::decode(&self.stage[..len]);
        self.stage.advance(len);
        header.map_err(|breach| broken(during, breach))
    }

    /// A simple reply without an error: to a read, and only without structured replies, all data
    /// follow; to block status there is no such reply.
    async fn simple_success(&mut self, pending: &mut Pending) -> Result<(), NbdError> {
        let request = pending.request;
        let during = Activity::Request(request);
        match (request.command, self.watch.shared.style) {
            (Command::Read, ReplyStyle::Simple) => {
                self.data(request.offset, request.length, pending).await
            }
            (Command::Read | Command::BlockStatus, _) => {
                Err(broken(during, ProtocolError::WrongReplyStyle))
            }
            _ => Ok(()),
        }
    }

    /// One chunk with its payload. Returns whether it was the last.
    async fn chunk(&mut self, chunk: ChunkHeader, pending: &mut Pending) -> Result<bool, NbdError> {
        let request = pending.request;
        let during = Activity::Request(request);
        let breach = |breach| broken(during, breach);
        if let Some(found) = chunk.offset
            && found != request.offset
        {
            return Err(breach(ProtocolError::OtherOffset { sent: request.offset, found }));
        }
        match chunk.content(request.command).map_err(breach)? {
            Content::None => {}
            Content::Data { length } => {
                let prefix = to_usize(DATA_PREFIX_LEN);
                self.fill_stage(prefix, Some(pending)).await?;
                let offset = self.stage.get_u64();
                self.data(offset, length, pending).await?;
            }
            Content::Hole => {
                let (offset, length) =
                    decode_hole(&self.payload(chunk, pending).await?).map_err(breach)?;
                pending.reply.hole(offset, length).map_err(breach)?;
            }
            Content::BlockStatus => {
                let payload = self.payload(chunk, pending).await?;
                let headers = self.watch.shared.style.headers();
                pending.reply.status(headers, &payload).map_err(breach)?;
            }
            Content::Error => {
                let payload = self.payload(chunk, pending).await?;
                let error = RemoteError::decode(chunk.kind, &payload).map_err(breach)?;
                pending.reply.error(error).map_err(breach)?;
            }
        }
        Ok(chunk.is_last())
    }

    /// Data of a read, from the socket straight to where they belong.
    async fn data(
        &mut self,
        offset: u64,
        length: u64,
        pending: &mut Pending,
    ) -> Result<(), NbdError> {
        let during = Activity::Request(pending.request);
        let Pending { reply, progress, .. } = pending;
        match reply.place(offset, length).map_err(|breach| broken(during, breach))? {
            Place::Append(buffer, length) => self.receive(buffer.limit(length), progress).await,
            Place::Within(slice) => self.receive(slice, progress).await,
        }
        .map_err(|error| error.during(during))
    }

    /// A small payload, whose length has been checked. Memory grows only as bytes arrive.
    async fn payload(
        &mut self,
        chunk: ChunkHeader,
        pending: &mut Pending,
    ) -> Result<BytesMut, NbdError> {
        let during = Activity::Request(pending.request);
        let mut payload = BytesMut::new();
        let mut left = to_usize(chunk.length);
        while left > 0 {
            let step = left.min(64 * 1024);
            payload.reserve(step);
            let target = (&mut payload).limit(step);
            let result = self.receive(target, &mut pending.progress).await;
            result.map_err(|error| error.during(during))?;
            left -= step;
        }
        Ok(payload)
    }

    /// Fills `target` from the stage, then from the socket.
    async fn receive(
        &mut self,
        mut target: impl BufMut,
        progress: &mut Instant,
    ) -> Result<(), NbdError> {
        let staged = self.stage.len().min(target.remaining_mut());
        target.put_slice(&self.stage[..staged]);
        self.stage.advance(staged);
        while target.has_remaining_mut() {
            self.watch.read(&mut self.half, &mut target, Some(progress)).await?;
        }
        Ok(())
    }

    /// Makes at least `len` bytes available in the stage.
    async fn fill_stage(
        &mut self,
        len: usize,
        pending: Option<&mut Pending>,
    ) -> Result<(), NbdError> {
        let during = pending
            .as_ref()
            .map_or(Activity::Transmission, |pending| Activity::Request(pending.request));
        let mut progress = pending.map(|pending| &mut pending.progress);
        while self.stage.len() < len {
            self.stage.reserve(STAGE_LEN - self.stage.len());
            let read = self.watch.read(&mut self.half, &mut self.stage, progress.as_deref_mut());
            read.await.map_err(|error| error.during(during))?;
        }
        Ok(())
    }
}

impl Watch {
    /// Reads something into `target`, and keeps the deadlines meanwhile. `progress` is that of the
    /// request whose reply is being read.
    async fn read(
        &mut self,
        half: &mut OwnedReadHalf,
        target: &mut impl BufMut,
        mut progress: Option<&mut Instant>,
    ) -> Result<(), NbdError> {
        loop {
            let read = tokio::select! {
                biased;
                read = half.read_buf(target) => Some(read),
                _ = self.tick.tick() => None,
            };
            let now = Instant::now();
            match read {
                Some(Ok(0)) => return Err(NbdError::Closed { during: Activity::Transmission }),
                Some(Ok(_)) => {
                    if let Some(progress) = progress.as_deref_mut() {
                        *progress = now;
                    }
                }
                Some(Err(error)) => return Err(NbdError::socket(Activity::Transmission, error)),
                None => {}
            }
            // Also while bytes keep coming: they may all be for other requests.
            if read.is_none() || now.duration_since(self.checked) >= self.tick.period() {
                self.checked = now;
                self.shared.check_deadlines(now)?;
                if let Some(progress) = progress.as_deref() {
                    // It is not in the table; the caller knows its name.
                    let what = Activity::Transmission;
                    check_deadline(what, *progress, now, self.shared.timeout)?;
                }
            }
            if read.is_some() {
                return Ok(());
            }
        }
    }
}

fn broken(during: Activity, source: ProtocolError) -> NbdError {
    NbdError::protocol(during, source)
}
