//! rsync between a tree and the appliance: the receiver runs inside, the sender outside.
//!
//! The host starts the sender with arguments of its own and relays bytes. So a tree's owner can reach
//! nothing but the appliance, and a guest's owner nothing but the tree.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::appliance::ApplianceError;

/// A daemon or a remote shell is there within this time, or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// The port of an rsync daemon (IANA).
const DAEMON_PORT: u16 = 873;
/// Bytes of one line of what changed: a path has at most 4096, each escaped as five.
const LINE_LEN_MAX: u64 = 32 << 10;
/// Lines of what changed; a system has a few hundred thousand files.
const LINES_MAX: u64 = 50_000_000;
/// Bytes of a sender's complaints that are kept.
const SAID_LEN_MAX: usize = 4096;
/// Tells that all has been said.
const LAST_LINE: &str = "kvmsnap-end";

/// Where a file tree is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tree {
    /// A folder of this host.
    Folder(PathBuf),
    /// A folder of a host that `ssh` leads to.
    Remote {
        /// As `ssh` takes it.
        host: String,
        /// On that host.
        path: String,
    },
    /// A module of an rsync daemon.
    Daemon {
        /// Name or address.
        host: String,
        /// TCP port.
        port: u16,
        /// The module, and what is below it.
        path: String,
    },
}

/// Why a tree cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// It is not named as a tree is.
    #[error("`{0}` names no file tree")]
    Name(String),
    /// The folder is none.
    #[error("{} is no folder that can be read", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something in the folder cannot be read.
    #[error("cannot read {}", .path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program cannot be run.
    #[error("cannot run `{program}`")]
    Run {
        /// `rsync` or `ssh`.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// rsync does not tell how it would call its peer.
    #[error("`rsync` refuses its own options: {0}")]
    Options(String),
    /// The daemon cannot be reached.
    #[error("cannot reach the rsync daemon at {host}:{port}")]
    Connect {
        /// Name or address.
        host: String,
        /// TCP port.
        port: u16,
        /// Why.
        source: io::Error,
    },
}

impl Tree {
    /// Reads `DIR`, `HOST:PATH` or `rsync://HOST[:PORT]/MODULE[/PATH]`, as rsync does.
    ///
    /// # Errors
    /// [`TreeError::Name`].
    pub fn parse(text: &str) -> Result<Self, TreeError> {
        let bad = || TreeError::Name(text.to_owned());
        let is_odd = |host: &str| {
            // Brackets would be an IPv6 address, which a port cannot be told from.
            host.is_empty() || host.starts_with('-') || host.contains(['/', '['])
        };
        if let Some(rest) = text.strip_prefix("rsync://") {
            let (host, path) = rest.split_once('/').ok_or_else(bad)?;
            let (host, port) = match host.rsplit_once(':') {
                Some((host, port)) => (host, port.parse().map_err(|_| bad())?),
                None => (host, DAEMON_PORT),
            };
            // A user of a daemon has a password, which the appliance must not see.
            if is_odd(host) || host.contains('@') || path.is_empty() || path.starts_with('/') {
                return Err(bad());
            }
            return Ok(Self::Daemon { host: host.to_owned(), port, path: path.to_owned() });
        }
        match text.split_once(':') {
            Some((host, path)) if !host.contains('/') => {
                if is_odd(host) || path.is_empty() || path.starts_with(':') {
                    return Err(bad());
                }
                Ok(Self::Remote { host: host.to_owned(), path: path.to_owned() })
            }
            _ if text.is_empty() => Err(bad()),
            _ => Ok(Self::Folder(PathBuf::from(text))),
        }
    }

    /// Whether it can be read at all, as far as can be told without reading it.
    ///
    /// # Errors
    /// [`TreeError::Folder`].
    pub fn probe(&self) -> Result<(), TreeError> {
        let Self::Folder(path) = self else { return Ok(()) };
        let probed = std::fs::read_dir(path);
        probed.map(drop).map_err(|source| TreeError::Folder { path: path.clone(), source })
    }

    /// Starts a sender for a receiver with these options.
    ///
    /// # Errors
    /// [`TreeError`].
    pub async fn open(&self, options: &[String]) -> Result<Source, TreeError> {
        let name = "kvmsnap:/".to_owned();
        match self {
            Self::Folder(path) => {
                let mut command = Command::new("rsync");
                command.args(server_args(options).await?).arg(".").arg(path.join(""));
                Ok(Source { name, peer: Peer::Process(spawn("rsync", command)?) })
            }
            Self::Remote { host, path } => {
                let mut words = vec!["rsync".to_owned()];
                words.extend(server_args(options).await?);
                words.extend([".".to_owned(), format!("{}/", path.trim_end_matches('/'))]);
                let words: Vec<_> = words.iter().map(|word| quote_for_shell(word)).collect();
                let mut command = Command::new("ssh");
                command.args(["-o", "BatchMode=yes", "--", host, &words.join(" ")]);
                Ok(Source { name, peer: Peer::Process(spawn("ssh", command)?) })
            }
            Self::Daemon { host, port, path } => {
                let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect((&**host, *port)));
                let late = |_| Err(io::ErrorKind::TimedOut.into());
                let stream = connected.await.unwrap_or_else(late).map_err(|source| {
                    TreeError::Connect { host: host.clone(), port: *port, source }
                })?;
                let name = format!("kvmsnap::{}/", path.trim_end_matches('/'));
                Ok(Source { name, peer: Peer::Daemon(stream) })
            }
        }
    }
}

/// For `sh`: nothing in it means anything.
pub(crate) fn quote_for_shell(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn spawn(program: &'static str, mut command: Command) -> Result<Box<Child>, TreeError> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("LC_ALL", "C").kill_on_drop(true);
    let spawned = command.spawn().map_err(|source| TreeError::Run { program, source })?;
    Ok(Box::new(spawned))
}

/// With which arguments an rsync calls its peer. They depend on its version, and only it knows: the
/// receiver in the appliance is this host's own rsync.
async fn server_args(options: &[String]) -> Result<Vec<String>, TreeError> {
    let mut command = Command::new("rsync");
    let tell = r#"--rsh=sh -c 'shift; printf "%s\n" "$@" >&2' tell"#;
    command.args(options).arg(tell).args(["kvmsnap:/", "/nonexistent/"]).env("LC_ALL", "C");
    command.stdin(Stdio::null()).kill_on_drop(true);
    let run = |source| TreeError::Run { program: "rsync", source };
    let late = |_| Err(io::ErrorKind::TimedOut.into());
    let told =
        timeout(CONNECT_TIMEOUT, command.output()).await.unwrap_or_else(late).map_err(run)?;
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    let mut lines = told.lines();
    if lines.next() != Some("rsync") || !told.contains("\n--server\n--sender\n") {
        return Err(TreeError::Options(told));
    }
    Ok(lines.take_while(|line| *line != ".").map(str::to_owned).collect())
}

/// A running sender.
#[derive(Debug)]
pub struct Source {
    /// What the receiver is told to ask for.
    pub(crate) name: String,
    peer: Peer,
}

#[derive(Debug)]
enum Peer {
    Process(Box<Child>),
    Daemon(TcpStream),
}

impl Source {
    /// Carries bytes between the sender and `port` until `work` is done; then nothing is left to carry.
    /// `sent` gets the bytes of both ways so far.
    pub(crate) async fn relay_while<T>(
        self,
        port: UnixStream,
        idle: Duration,
        work: impl Future<Output = Result<T, ApplianceError>>,
        sent: impl FnMut(u64),
    ) -> Result<T, ApplianceError> {
        let slow =
            || ApplianceError::Slow { doing: "copy the tree's files".to_owned(), limit: idle };
        match self.peer {
            Peer::Process(mut child) => {
                let piped = "all three are pipes";
                let from = child.stdout.take().expect(piped);
                let to = child.stdin.take().expect(piped);
                let said = tokio::spawn(last_words(child.stderr.take().expect(piped)));
                let outcome = relay(from, to, port, idle, work, sent).await.ok_or_else(slow)?;
                // Why the receiver got nothing is often known to the sender only.
                match outcome {
                    Err(ApplianceError::Step { doing, code, said: mut words }) => {
                        drop(child);
                        words.push_str(&said.await.unwrap_or_default());
                        Err(ApplianceError::Step { doing, code, said: words })
                    }
                    outcome => outcome,
                }
            }
            Peer::Daemon(stream) => {
                let (from, to) = stream.into_split();
                relay(from, to, port, idle, work, sent).await.ok_or_else(slow)?
            }
        }
    }
}

/// The end of what a sender says, which may be the words of another host.
async fn last_words(mut from: impl AsyncRead + Unpin) -> String {
    let mut said = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        said.extend_from_slice(&buffer[..len]);
        said.drain(..said.len().saturating_sub(SAID_LEN_MAX));
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// `None` where nothing was exchanged for too long and the work is not done either.
async fn relay<T>(
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    mut port: UnixStream,
    idle: Duration,
    work: impl Future<Output = T>,
    sent: impl FnMut(u64),
) -> Option<T> {
    let (port_from, port_to) = port.split();
    let (sent, total) = (RefCell::new(sent), Cell::new(0));
    let count = |len: u64| {
        total.set(total.get() + len);
        sent.borrow_mut()(total.get());
    };
    // Each way goes on while the other waits. At the end of the sender the receiver's shell ends too;
    // whether all was sent is for rsync to say.
    let both = async {
        tokio::join!(carry(from, port_to, &count), carry(port_from, to, &count));
        std::future::pending::<()>().await;
    };
    let stalled = async {
        loop {
            let before = total.get();
            tokio::time::sleep(idle).await;
            if total.get() == before {
                return;
            }
        }
    };
    tokio::select! {
        done = work => Some(done),
        () = both => None,
        () = stalled => None,
    }
}

/// Carries bytes one way until one side is gone, then tells the other.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    count: impl Fn(u64),
) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..len]).await.is_err() {
            break;
        }
        count(len as u64);
    }
    // Who is gone needs no telling.
    let _ = to.shutdown().await;
}

/// How files are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// By what is in them.
    Content,
    /// By size and time.
    Time,
}

/// One run of rsync.
#[derive(Debug, Clone)]
pub struct Pass {
    /// How files are compared.
    pub compare: Compare,
    /// Whether times count down to the nanosecond, not the second.
    pub exact_times: bool,
    /// Change nothing, only tell.
    pub dry_run: bool,
    /// Patterns of what stays as the template has it, as rsync takes them, rooted at the machine's `/`.
    pub excludes: Vec<String>,
}

impl Pass {
    /// rsync's options.
    pub fn options(&self) -> Vec<String> {
        let mut options = base_options();
        // Before: what the template's machine had may be what the tree's needs the room for.
        options.push("--delete-before".to_owned());
        options.push("--out-format=%i|%l|%n%L".to_owned());
        if self.compare == Compare::Content {
            options.push("--checksum".to_owned());
        }
        if self.exact_times {
            options.push("--modify-window=-1".to_owned());
        }
        if self.dry_run {
            options.push("--dry-run".to_owned());
        }
        options.extend(self.excludes.iter().map(|pattern| format!("--filter=- {pattern}")));
        // An update keeps a tree's initramfs by such a name where it has made another.
        options.push("--filter=- /boot/*.kvmsnap-*".to_owned());
        // A running system makes these; a backup has either nothing of them or too much. The folders
        // themselves must stay.
        for folder in ["proc", "sys", "dev", "run"] {
            options.push(format!("--filter=- /{folder}/*"));
            options.push(format!("--filter=P /{folder}"));
        }
        options.push("--filter=- lost+found/".to_owned());
        options
    }
}

/// rsync's options to fetch nothing but the files that say how a machine is laid out.
pub fn table_options() -> Vec<String> {
    let mut options = base_options();
    let folders = ["etc/", "etc/selinux/", "boot/", "boot/grub/", "boot/grub2/"];
    let files = [
        "etc/fstab",
        "etc/hostname",
        "etc/selinux/config",
        "boot/grub/grub.cfg",
        "boot/grub2/grub.cfg",
    ];
    options.extend(folders.iter().chain(&files).map(|path| format!("--filter=+ /{path}")));
    options.push("--filter=- *".to_owned());
    options
}

/// Everything that a file has: owners by number, modes, times, links, devices, ACLs, attributes, holes.
fn base_options() -> Vec<String> {
    let mut options = vec!["-aHAXS".to_owned(), "--numeric-ids".to_owned()];
    // ACLs are copied as such. As attributes they would undo each other: XFS lists each under a second
    // name, which no other file system has.
    options.extend(["system.*", "trusted.SGI_ACL_*"].map(|name| format!("--filter=-x {name}")));
    options
}

/// What became of one file, as rsync's `%i` tells it (rsync(1), `--itemize-changes`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was not there.
    Added,
    /// Its content, target or device number differed.
    Content,
    /// Only its owner, mode, times or attributes did.
    Metadata,
    /// It is not in the tree.
    Deleted,
}

/// One file that differed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What became of it.
    pub change: Change,
    /// Whether it is a folder.
    pub is_folder: bool,
    /// Whether nothing but its time differs.
    pub is_time_only: bool,
    /// Bytes of a regular file.
    pub len: u64,
    /// Below the machine's `/`, odd bytes escaped as `\#ooo`.
    pub path: String,
}

impl Item {
    /// A file of which nothing is known but that its content differs.
    pub(crate) fn another_content(path: String) -> Self {
        Self { change: Change::Content, is_folder: false, is_time_only: false, len: 0, path }
    }

    /// Reads one line of the output format of [`Pass::options`]; `None` for any other.
    pub fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(3, '|');
        let (flags, len, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (len, path) = (len.trim().parse().ok()?, path.to_owned());
        if flags.starts_with("*deleting") {
            let is_folder = path.ends_with('/');
            let change = Change::Deleted;
            return Some(Self { change, is_folder, is_time_only: false, len: 0, path });
        }
        let mut letters = flags.bytes();
        let (action, kind, third) = (letters.next()?, letters.next()?, letters.next()?);
        let change = match (action, third) {
            (b'<' | b'>' | b'c' | b'h', b'+') => Change::Added,
            (b'<' | b'>' | b'c' | b'h', _) => Change::Content,
            (b'.', _) => Change::Metadata,
            _ => return None,
        };
        let len = if kind == b'f' { len } else { 0 };
        let mut attributes = flags.bytes().skip(2);
        let is_time_only =
            change == Change::Metadata && attributes.all(|letter| b".tT".contains(&letter));
        Some(Self { change, is_folder: kind == b'd', is_time_only, len, path })
    }
}

/// Reads what rsync changes, up to the last line.
pub(crate) async fn read_items(
    from: &mut UnixStream,
    limit: Duration,
    mut item: impl FnMut(Item),
) -> io::Result<()> {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    for _ in 0..LINES_MAX {
        line.clear();
        let mut one = (&mut lines).take(LINE_LEN_MAX);
        timeout(limit, one.read_until(b'\n', &mut line))
            .await
            .map_err(|_| io::ErrorKind::TimedOut)??;
        let text = String::from_utf8_lossy(&line);
        match text.strip_suffix('\n') {
            Some(LAST_LINE) => return Ok(()),
            Some(text) => {
                if let Some(found) = Item::parse(text) {
                    item(found);
                }
            }
            None => break,
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "what changed has no end"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_tree_is_named_as_rsync_names_it() {
        let parse = |text| Tree::parse(text).ok();
        assert_eq!(parse("/srv/web"), Some(Tree::Folder("/srv/web".into())));
        assert_eq!(parse("./a:b"), Some(Tree::Folder("./a:b".into())));
        let (host, path) = ("root@store".to_owned(), "/srv/web".to_owned());
        assert_eq!(parse("root@store:/srv/web"), Some(Tree::Remote { host, path }));
        let (host, path) = ("store".to_owned(), "web/files".to_owned());
        assert_eq!(
            parse("rsync://store:8873/web/files"),
            Some(Tree::Daemon { host, port: 8873, path })
        );
        for bad in [
            "",
            "-oProxyCommand=x:/",
            "rsync://store",
            "rsync:///x",
            "rsync://me@store/x",
            "store:",
            "store::m",
        ] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn what_rsync_did_is_read() {
        let changes: Vec<_> = [
            ">f+++++++++|12|etc/new",
            ">fcst......|4|etc/hostname",
            ".d..t......|4096|etc/",
            "*deleting  |0|home/alice/",
            "cLc.T......|9|bin -> usr/bin",
            "hf+++++++++|3|b => a",
            "building file list",
        ]
        .iter()
        .map(|line| Item::parse(line).map(|item| (item.change, item.is_folder, item.len)))
        .collect();
        let expected = [
            Some((Change::Added, false, 12)),
            Some((Change::Content, false, 4)),
            Some((Change::Metadata, true, 0)),
            Some((Change::Deleted, true, 0)),
            Some((Change::Content, false, 0)),
            Some((Change::Added, false, 3)),
            None,
        ];
        assert_eq!(changes, expected);
    }

    proptest! {
        #[test]
        fn any_line_is_survived(line in "[-+<>ch.*dfLDS|0-9a-z é]*") {
            Item::parse(&line);
        }
    }
}
