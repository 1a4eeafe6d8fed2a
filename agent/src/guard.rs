//! The guard: a process of its own that undoes what a run made in a guest, should the run be killed.
//!
//! Without it the scratch of a killed run would grow until somebody runs kvmsnap again. And it keeps
//! the run's connections to QEMU open until QEMU has let go of them: Debian's QEMU 7.2 ends, and the
//! guest with it, when the reader of a disk with an I/O thread just goes away (see `capture`). Once
//! nobody reads from them any more it takes QEMU's last answers: QEMU waits until they are taken
//! before it ends an export, and its guest waits with it (tried).
//!
//! The run talks to it over a socket that is the guard's standard input: one byte each time, connections
//! beside it. When that ends without a word that all is done, the run is dead.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::AsyncReadExt;
use tokio::process::Child;
use tokio::runtime::Handle;

use crate::error::CommandError;
use crate::journal::Journal;
use crate::lock::DomainLock;
use crate::names::RunId;
use crate::recover::{self, RecoverError};
use crate::stop::StopError;
use crate::syslog;

/// Name of the hidden subcommand that this process runs as.
pub const SUBCOMMAND: &str = "guard";
/// How long a dead run waits for the next one, which undoes it too.
const GRACE: Duration = Duration::from_secs(3);
/// How long the guard goes on trying.
const PATIENCE: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_secs(1);

const HOLD: u8 = b'h';
const READS_NO_MORE: u8 = b'r';
const DONE: u8 = b'd';
/// Connections that one word may bring.
const CONNECTIONS_MAX: usize = 1;

/// The run's end of its guard.
#[derive(Debug)]
pub struct Guard {
    words: UnixStream,
    // Its death is not waited for: a guard at work outlives the run.
    _process: Child,
}

impl Guard {
    /// Starts the guard of a run whose undo record is in the journal. It has its own process group, so
    /// that Ctrl-C does not reach it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(journal: &Journal, run_dir: &Path, run: &RunId) -> io::Result<Self> {
        crate::effect::about_to("guard: start")?;
        let (words, theirs) = UnixStream::pair()?;
        // This very program, even when its file was replaced by an update.
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND).arg(run.as_str());
        command.arg("--state-dir").arg(journal.state_dir()).arg("--run-dir").arg(run_dir);
        for variable in ["KVMSNAP_CRASH_AT", "KVMSNAP_FAIL_AT", "KVMSNAP_EFFECTS"] {
            command.env_remove(variable);
        }
        command.process_group(0);
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { words, _process: command.spawn()? })
    }

    /// Has the guard keep a connection open too.
    ///
    /// # Errors
    /// When it is gone.
    pub fn hold(&self, connection: &UnixStream) -> io::Result<()> {
        let connection: [BorrowedFd<'_>; CONNECTIONS_MAX] = [connection.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(CONNECTIONS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&connection));
        sendmsg(&self.words, &[IoSlice::new(&[HOLD])], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Tells the guard that the run reads no more from the connections that it keeps.
    pub fn reads_no_more(&self) {
        self.say(READS_NO_MORE);
    }

    /// Tells the guard that there is nothing left to undo, or that the next run shall do it.
    pub fn dismiss(self) {
        self.say(DONE);
    }

    fn say(&self, word: u8) {
        // A guard that is gone already guards nothing.
        let mut nothing = SendAncillaryBuffer::default();
        let _ = sendmsg(&self.words, &[IoSlice::new(&[word])], &mut nothing, SendFlags::NOSIGNAL);
    }
}

/// The guard itself. Returns when its run is done, or dead and undone.
///
/// # Errors
/// When a dead run could not be undone; the next one tries again.
pub async fn run(run: &RunId, journal: &Journal, run_dir: &Path) -> Result<(), CommandError> {
    let ended = tokio::task::spawn_blocking(listen)
        .await
        .map_err(|error| CommandError::Output(io::Error::other(error)))?;
    if let Ended::Done = ended {
        return Ok(());
    }
    tokio::time::sleep(GRACE).await;
    let start = Instant::now();
    loop {
        match undo(run, journal, run_dir).await {
            Err(error) if start.elapsed() < PATIENCE || is_going_down(&error) => {
                tokio::time::sleep(PAUSE).await;
            }
            undone => {
                if let Err(error) = &undone {
                    let text = crate::error::describe(error);
                    let what =
                        "what a killed run left in a guest is not undone, see `kvmsnap doctor`";
                    syslog::tell(&format!("{what}: {}", text.trim_end().replace('\n', "; ")));
                }
                return undone;
            }
        }
    }
}

/// Whether a guest is still waited for that was asked to shut down; its record says how long.
fn is_going_down(error: &CommandError) -> bool {
    matches!(error, CommandError::Recover(RecoverError::Stop(StopError::GoingDown { .. })))
}

async fn undo(run: &RunId, journal: &Journal, run_dir: &Path) -> Result<(), CommandError> {
    let Some(recorded) = journal.of_run(run)? else { return Ok(()) };
    let _lock = DomainLock::to_undo(run_dir, &recorded.record().reach)?;
    // The next run may have undone it meanwhile.
    let Some(recorded) = journal.of_run(run)? else { return Ok(()) };
    recover::undo_wherever(journal, &recorded, run_dir).await?;
    Ok(())
}

enum Ended {
    Done,
    Dead,
}

/// Listens to the run until it is done or dead. The connections that it brings are kept for as long as
/// this process lives, or until QEMU has closed them.
fn listen() -> Ended {
    let (input, mut connections) = (io::stdin(), Vec::new());
    loop {
        let mut word = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(CONNECTIONS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let words = &mut [IoSliceMut::new(&mut word)];
        let ended = match recvmsg(&input, words, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => Some(Ended::Dead),
            Ok(message) if message.bytes == 0 => Some(Ended::Dead),
            Ok(_) => None,
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(brought) = message {
                connections.extend(brought);
            }
        }
        if ended.is_some() || word[0] == READS_NO_MORE {
            let runtime = Handle::current();
            for connection in connections.drain(..) {
                runtime.spawn(take_answers(connection));
            }
        }
        match ended {
            Some(ended) => return ended,
            None if word[0] == DONE => return Ended::Done,
            None => {}
        }
    }
}

/// Takes what QEMU still answers, until QEMU closes the connection.
async fn take_answers(connection: OwnedFd) -> io::Result<()> {
    let connection = UnixStream::from(connection);
    connection.set_nonblocking(true)?;
    let mut connection = tokio::net::UnixStream::from_std(connection)?;
    let mut answers = vec![0; 64 << 10];
    while connection.read(&mut answers).await? > 0 {}
    Ok(())
}
