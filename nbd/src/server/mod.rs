//! A read-only server of one export on a Unix socket.

mod negotiate;
mod serve;

use std::{io, sync::Arc, time::Duration};

use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
};

use crate::wire::Extent;

/// What a [`Server`] serves. Its methods may block: they run on tokio's blocking threads, several
/// at once. Errors reach the client as `EIO`, or under their own name if NBD has one.
pub trait Source: Send + Sync + 'static {
    /// Size in bytes; must not change.
    fn size(&self) -> u64;

    /// Fills the whole buffer with the bytes at `offset`. Always within the size.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The status of bytes from `offset` on, as `base:allocation` flags
    /// ([`STATE_HOLE`](crate::wire::STATE_HOLE), [`STATE_ZERO`](crate::wire::STATE_ZERO)).
    ///
    /// At least one extent; they may end before `len` bytes, or reach further.
    fn extents(&self, offset: u64, len: u64) -> io::Result<Vec<Extent>>;
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Name of the export. The empty name (the default export) finds it as well.
    pub export: String,
    /// Shown by clients that list exports.
    pub description: String,
    /// Most connections at once; further ones are closed.
    pub connections: usize,
    /// Most calls into the [`Source`] at once, over all connections; also most requests in work
    /// on one connection.
    pub parallel: usize,
    /// Longest time for a handshake, and for a client to take any bytes of a reply.
    pub timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            description: String::new(),
            connections: 16,
            parallel: 8,
            timeout: Duration::from_secs(30),
        }
    }
}

/// A running server. Dropping it closes the listener and all connections; calls into the source
/// that are under way run to their end, their results are thrown away.
#[derive(Debug)]
#[must_use = "the server stops when this is dropped"]
pub struct Server {
    accepting: JoinHandle<()>,
}

impl Server {
    /// Serves `source` to everybody who can connect to `listener`. Needs a tokio runtime.
    pub fn start(listener: UnixListener, source: Arc<dyn Source>, options: ServerOptions) -> Self {
        let calls = Arc::new(Semaphore::new(options.parallel.max(1)));
        let shared = Arc::new(Shared { source, options, calls });
        Self { accepting: tokio::spawn(accept(listener, shared)) }
    }

    /// Stops, and returns once the listener and all connections are closed.
    pub async fn stop(mut self) {
        self.accepting.abort();
        // Ends with the cancellation that was just asked for.
        let _ = (&mut self.accepting).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// What all connections share.
struct Shared {
    source: Arc<dyn Source>,
    options: ServerOptions,
    /// One permit for each call into the source.
    calls: Arc<Semaphore>,
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    // Dropped with this task: all connections end.
    let mut connections = JoinSet::new();
    loop {
        let accepted = listener.accept().await;
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) if connections.len() < shared.options.connections => {
                connections.spawn(connection(stream, shared.clone()));
            }
            Ok(_) => tracing::debug!("too many NBD connections, one refused"),
            Err(error) => {
                tracing::warn!(%error, "cannot accept an NBD connection");
                // Out of file descriptors, usually: others may go away.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(mut stream: UnixStream, shared: Arc<Shared>) {
    let limit = shared.options.timeout;
    let agreed = tokio::time::timeout(limit, negotiate::negotiate(&mut stream, &shared)).await;
    let ended = match agreed {
        Ok(Ok(Some(agreed))) => serve::serve(stream, agreed, shared).await,
        Ok(Ok(None)) => Ok(()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an NBD connection ended early");
    }
}

/// A breach by the client: the connection is closed.
fn breach(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
