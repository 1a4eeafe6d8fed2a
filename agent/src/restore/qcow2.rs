//! A qcow2 image, written by `qemu-img` from an NBD export of the snapshot: the format is QEMU's.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nbd::{Extent, Server, ServerOptions, Source};
use repository::{DiskReader, ExtentKind};
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

use super::{RestoreError, Stop};
use crate::progress::Progress;

const STOP_POLL: Duration = Duration::from_millis(100);

/// A disk of a snapshot as an NBD server sees it.
struct Snapshot {
    reader: DiskReader,
    progress: Progress,
}

impl Source for Snapshot {
    fn size(&self) -> u64 {
        self.reader.size()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.reader.read_at(offset, buffer).map_err(|error| {
            tracing::error!(%error, offset, "a part of the backup cannot be read");
            io::Error::other(error)
        })?;
        self.progress.read(buffer.len() as u64);
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
        let extents = self.reader.extents(offset, len).map_err(io::Error::other)?;
        let flags = |kind| match kind {
            ExtentKind::Data => 0,
            ExtentKind::Zero => nbd::wire::STATE_HOLE | nbd::wire::STATE_ZERO,
        };
        Ok(extents.iter().map(|e| Extent { length: e.len, flags: flags(e.kind) }).collect())
    }
}

/// Writes a disk to `partial`; `path` is its final name, for messages.
pub(super) fn write(
    partial: &Path,
    path: &Path,
    reader: DiskReader,
    progress: &Progress,
    stop: &Stop,
) -> Result<(), RestoreError> {
    let failed = |message: String| RestoreError::QemuImg { path: path.to_owned(), message };
    let host = |source| RestoreError::Write { path: path.to_owned(), source };
    let folder = tempfile::tempdir().map_err(host)?;
    let socket = folder.path().join("nbd.sock");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(host)?;
    let outcome = runtime.block_on(async {
        let listener = UnixListener::bind(&socket).map_err(host)?;
        let snapshot = Snapshot { reader, progress: progress.clone() };
        let options = ServerOptions::default();
        let _server = Server::start(listener, Arc::new(snapshot), options);
        let source = format!("driver=nbd,server.type=unix,server.path={}", socket.display());
        let mut child = tokio::process::Command::new("qemu-img")
            .args(["convert", "-W", "-m", "8", "-O", "qcow2", "--image-opts", &source])
            .arg(partial)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let mut stderr = child.stderr.take().expect("it is piped");
        let said = tokio::spawn(async move {
            let mut text = String::new();
            // What cannot be read of it is not worth another error.
            let _ = stderr.read_to_string(&mut text).await;
            text
        });
        let status = loop {
            tokio::select! {
                status = child.wait() => break status.map_err(host)?,
                () = tokio::time::sleep(STOP_POLL) => stop.check()?,
            }
        };
        match status.success() {
            true => Ok(()),
            false => Err(failed(said.await.unwrap_or_default().trim().to_owned())),
        }
    });
    runtime.shutdown_background();
    outcome
}
