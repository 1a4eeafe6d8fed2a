//! A point in time of a domain that is shut off: its images as they lie there.
//!
//! A storage daemon of QEMU exports them, read-only and without keeping anybody from using them: should
//! the domain be started, its guest comes first. `confirm` then finds out that it was.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::process::Child;

use super::image::{self, Chain, Mark, Use};
use super::{SOCKET, remove_socket, socket_folder};
use crate::bound;
use crate::hypervisor::{Care, DEPTH_CONTEXT, Export, Exports, HypervisorError};
use crate::journal::{DiskRecord, Recorded};
use crate::names::DiskName;

const TOOL: &str = "qemu-storage-daemon";
/// How long the daemon may take until it answers: it opens each image of each chain.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a killed daemon may take to be gone.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// The most that is taken of its words.
const WORDS_LEN_MAX: u64 = 16 << 10;

/// The daemon that exports the images. It dies with this process.
#[derive(Debug)]
pub struct Server {
    process: Child,
    marks: Vec<Mark>,
}

/// Makes sure that nobody writes to the images.
///
/// # Errors
/// [`HypervisorError::ImageInUse`].
pub fn check_unused(chains: &[Chain]) -> Result<(), HypervisorError> {
    for image in chains.iter().flat_map(|chain| &chain.images) {
        if image.used()? == Use::Writes {
            return Err(HypervisorError::ImageInUse { image: image.place.to_string() });
        }
    }
    Ok(())
}

/// Begins the new dirty bitmaps. Not one instant over all disks, and it need not be: nobody writes.
///
/// # Errors
/// The first that failed; those before it are removed with the run's other traces.
pub async fn add_bitmaps(recorded: &Recorded, chains: &[Chain]) -> Result<(), HypervisorError> {
    for (disk, chain) in recorded.record().disks.iter().zip(chains) {
        if let Some(bitmap) = &disk.bitmap_new {
            chain.images[0].add_bitmap(bitmap).await?;
        }
    }
    Ok(())
}

/// How the images look, to find out later whether anybody has written to them.
///
/// # Errors
/// [`HypervisorError::Host`].
pub fn marks(chains: &[Chain]) -> Result<Vec<Mark>, HypervisorError> {
    let of_chain = |chain: &Chain| {
        let images = chain.images.iter().enumerate();
        images.map(|(depth, image)| image.mark(depth == 0)).collect::<Vec<_>>()
    };
    chains.iter().flat_map(of_chain).collect()
}

/// Makes sure that nobody has written to the images of these disks since their marks were made.
///
/// # Errors
/// [`HypervisorError::PointInTimeLost`].
pub fn confirm<'a>(
    disks: impl Iterator<Item = (&'a DiskName, &'a Chain)>,
    marks: &[Mark],
) -> Result<(), HypervisorError> {
    let mut before = marks.iter();
    for (disk, chain) in disks {
        for (depth, image) in chain.images.iter().enumerate() {
            if before.next() != Some(&image.mark(depth == 0)?) {
                let what = format!("{} was changed while it was read", image.place);
                return Err(HypervisorError::PointInTimeLost { disk: disk.clone(), what });
            }
        }
    }
    Ok(())
}

/// Starts the daemon and connects to its exports. `marks` were made before.
///
/// Our connections wait in the socket before the daemon has it, so the socket's name is gone again
/// before anybody could look for it. `by_depth` has the topmost image of each chain be what changed.
///
/// # Errors
/// [`HypervisorError::Host`], [`HypervisorError::Tool`] with what the daemon says.
pub async fn serve(
    recorded: &Recorded,
    chains: &[Chain],
    marks: Vec<Mark>,
    by_depth: bool,
    run_dir: &Path,
) -> Result<(Server, Exports), HypervisorError> {
    let record = recorded.record();
    let step = "export images that lie still";
    let host = |source: io::Error| HypervisorError::Host { step: step.to_owned(), source };
    crate::effect::about_to("socket: create").map_err(host)?;
    let folder = socket_folder(run_dir, &record.run);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(host)?;
    let listener = UnixListener::bind(folder.join(SOCKET)).map_err(host)?;
    let connect = |_| UnixStream::connect(folder.join(SOCKET));
    let streams: Vec<_> = chains.iter().map(connect).collect::<Result<_, _>>().map_err(host)?;
    remove_socket(run_dir, &record.run)?;

    crate::effect::about_to("storage daemon: start").map_err(host)?;
    let mut command = bound::command(TOOL);
    let id = |index: usize| format!("disk{index}");
    for (index, chain) in chains.iter().enumerate() {
        let mut node = image::node(&chain.images);
        node["node-name"] = id(index).into();
        command.arg("--blockdev").arg(node.to_string());
    }
    // Only now: newer daemons (11.1, tried) answer while they open an image, and would know no export.
    command.args(["--nbd-server", "addr.type=fd,addr.str=0"]);
    for (index, disk) in record.disks.iter().enumerate() {
        command.arg("--export").arg(export(&id(index), disk, by_depth).to_string());
    }
    command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::piped());
    let process = command.spawn().map_err(host)?;
    let mut server = Server { process, marks };
    let answers = async {
        for stream in &streams {
            if !answers(stream).await.map_err(host)? {
                let words = server.last_words().await;
                return Err(HypervisorError::Tool { tool: TOOL, step: step.to_owned(), words });
            }
        }
        Ok(())
    };
    let silent = |_| HypervisorError::StillInUse { what: TOOL.to_owned(), waited: START_TIMEOUT };
    tokio::time::timeout(START_TIMEOUT, answers).await.map_err(silent)??;

    let export = |(disk, stream): (&DiskRecord, UnixStream)| Export {
        name: disk.snapshot.clone(),
        dirty_context: match by_depth {
            true => Some(DEPTH_CONTEXT.to_owned()),
            false => disk.bitmap_old.as_ref().map(|old| format!("qemu:dirty-bitmap:{old}")),
        },
        care: Care::None,
        stream: Arc::new(stream),
    };
    let disks = record.disks.iter().zip(streams).map(export).collect();
    Ok((server, Exports { disks, outlive_us: false, by_guest: false }))
}

fn export(id: &str, disk: &DiskRecord, by_depth: bool) -> Value {
    let bitmaps: Vec<&String> = disk.bitmap_old.iter().collect();
    let mut export = json!({
        "type": "nbd", "id": id, "node-name": id, "name": disk.snapshot, "writable": false,
        "bitmaps": bitmaps,
    });
    // Older daemons do not know the word.
    if by_depth {
        export["allocation-depth"] = true.into();
    }
    export
}

/// Waits until a server speaks, and returns whether it did: the other end may also just have closed.
async fn answers(stream: &UnixStream) -> io::Result<bool> {
    let watched = stream.try_clone()?;
    watched.set_nonblocking(true)?;
    let watched = tokio::net::UnixStream::from_std(watched)?;
    watched.readable().await?;
    let peeked = recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
    Ok(peeked.is_ok_and(|len| len > 0))
}

impl Server {
    /// Makes sure that nobody has written to the images since the daemon was started, as far as the
    /// images tell: the caller knows whether the domain runs now.
    ///
    /// # Errors
    /// [`HypervisorError::PointInTimeLost`].
    pub fn confirm(&self, recorded: &Recorded, chains: &[Chain]) -> Result<(), HypervisorError> {
        let disks = recorded.record().disks.iter().map(|disk| &disk.disk);
        confirm(disks.zip(chains), &self.marks)
    }

    /// Ends the daemon.
    ///
    /// # Errors
    /// [`HypervisorError::Host`], [`HypervisorError::StillInUse`].
    pub async fn end(&mut self) -> Result<(), HypervisorError> {
        let step = || format!("end {TOOL}");
        let killed = tokio::time::timeout(END_TIMEOUT, self.process.kill()).await;
        killed
            .map_err(|_| HypervisorError::StillInUse {
                what: TOOL.to_owned(),
                waited: END_TIMEOUT,
            })?
            .map_err(|source| HypervisorError::Host { step: step(), source })
    }

    async fn last_words(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(stderr) = self.process.stderr.take() {
            // What cannot be read was not said.
            let _ = stderr.take(WORDS_LEN_MAX).read_to_end(&mut text).await;
        }
        image::words(TOOL, &text)
    }
}
