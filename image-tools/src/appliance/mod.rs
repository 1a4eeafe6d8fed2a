//! The appliance: a throw-away guest of libguestfs in which guest file systems are mounted and written.
//!
//! The host's kernel never sees them. What comes out of the appliance is as trustworthy as the disks in
//! it: it is read with limits, never used as a path or command on the host, and escaped on print.

pub mod look;
mod session;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::UnixStream;

use self::look::Layout;
use self::session::Session;
use crate::private::PrivateFolder;
use crate::rsync::{Item, Source};

const GUEST: &str = include_str!("guest.sh");
const PORT: &str = include_str!("port.sh");
/// An emulated appliance may need minutes to start on a loaded host.
const START_TIMEOUT: Duration = Duration::from_secs(600);
/// What is done until it can be used.
const START: &str = "start";
/// A step that reads or writes little.
const STEP_TIMEOUT: Duration = Duration::from_secs(300);
/// A step that goes through a whole file system or installs a boot loader.
const LONG_STEP_TIMEOUT: Duration = Duration::from_secs(4 * 3600);
/// How long files may be compared without a byte being sent: one may be as large as a disk.
const IDLE_TIMEOUT: Duration = Duration::from_secs(6 * 3600);
/// How long copying may take in all; it is watched by what is sent.
const COPY_TIMEOUT: Duration = Duration::from_secs(14 * 24 * 3600);

/// Why the appliance did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplianceError {
    /// libguestfs is not installed, or cannot be run.
    #[error("cannot run `guestfish`, a program of libguestfs")]
    Run(#[source] io::Error),
    /// It ended.
    #[error("the appliance ended while it was to {doing}{}", said_so(.said))]
    Ended {
        /// In words.
        doing: String,
        /// The end of what it said.
        said: String,
    },
    /// It does not answer.
    #[error("the appliance has not finished to {doing} within {} seconds", .limit.as_secs())]
    Slow {
        /// In words.
        doing: String,
        /// How long it had.
        limit: Duration,
    },
    /// A step failed.
    #[error("the appliance cannot {doing} (exit code {code}){}", said_so(.said))]
    Step {
        /// In words.
        doing: String,
        /// What the step ended with.
        code: i32,
        /// The end of what it said.
        said: String,
    },
    /// It says what nobody can have said.
    #[error("the appliance's answer makes no sense")]
    Nonsense(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Its files cannot be made.
    #[error("cannot prepare the appliance")]
    Prepare(#[source] io::Error),
    /// A name cannot be passed on.
    #[error("a name of {0} bytes is too long for the appliance")]
    TooLong(usize),
}

impl ApplianceError {
    /// What the operator can do next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Run(_) => Some(
                "it is in the packages libguestfs-tools, libguestfs-xfs and libguestfs-rsync of Debian",
            ),
            Self::Ended { .. } => {
                Some("`libguestfs-test-tool` tells what is wrong with libguestfs")
            }
            Self::Slow { doing, .. } if doing == START => {
                Some("where KVM does not work, KVMSNAP_ACCEL=tcg has the processor emulated")
            }
            _ => None,
        }
    }
}

/// What it said, for a terminal: a guest's owner may have a part in it.
fn said_so(said: &str) -> String {
    let said = said.trim();
    let is_odd = |c: char| c.is_control() && c != '\n';
    if said.is_empty() { String::new() } else { format!(": {}", said.replace(is_odd, "?")) }
}

/// One disk of the appliance.
#[derive(Debug, Clone)]
pub struct Drive {
    /// A qcow2 file that may be written: an overlay, thrown away or kept.
    pub path: PathBuf,
}

/// How it is run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Emulate the processor also where KVM could be used.
    pub emulate: bool,
}

/// A running appliance with a machine's disks. It dies with this value, and with this process.
#[derive(Debug)]
pub struct Appliance {
    session: Session,
    /// Where rsync's conversation goes through; one connection each.
    tree: PathBuf,
    /// What rsync changes, line by line.
    log: UnixStream,
    disks: usize,
    _folder: PrivateFolder,
}

impl Appliance {
    /// Starts an appliance with these disks, in their order.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn start(drives: &[Drive], options: &Options) -> Result<Self, ApplianceError> {
        let folder = PrivateFolder::new().map_err(ApplianceError::Prepare)?;
        let at = |name: &str| folder.path().join(name);
        let (tree, log) = (at("tree.sock"), at("log.sock"));
        for (name, text) in [("guest.sh", GUEST), ("port.sh", PORT)] {
            std::fs::write(at(name), text).map_err(ApplianceError::Prepare)?;
        }
        let mut session = Session::start(options.emulate, folder.path())?;
        let doing = START;
        for drive in drives {
            let path = drive.path.display().to_string();
            // What is written is made durable by whoever makes an image of it.
            let words = ["add-drive", &path, "format:qcow2", "cachemode:unsafe"];
            session.say(doing, &words).await?;
        }
        for (id, path) in [("tree", &tree), ("log", &log)] {
            let path = path.display().to_string().replace(',', ",,");
            let socket = format!("socket,id=kvmsnap-{id},path={path},server=on,wait=off");
            session.say(doing, &["config", "-chardev", &socket]).await?;
            let port = format!("virtserialport,chardev=kvmsnap-{id},name=kvmsnap.{id}");
            session.say(doing, &["config", "-device", &port]).await?;
        }
        session.say(doing, &["run"]).await?;
        let scripts = [("guest.sh", "/tmp/kvmsnap-step"), ("port.sh", "/tmp/kvmsnap-port")];
        for (name, to) in scripts {
            let from = at(name).display().to_string();
            session.say(doing, &["debug-upload", &from, to, "0755"]).await?;
        }
        if let Some(sockets) = session.sockets().await {
            folder.take_along(&sockets).map_err(ApplianceError::Prepare)?;
        }
        session.settle(doing, START_TIMEOUT).await?;
        let log = UnixStream::connect(log).await.map_err(ApplianceError::Prepare)?;
        Ok(Self { session, tree, log, disks: drives.len(), _folder: folder })
    }

    /// What is on the disks.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn layout(&mut self) -> Result<Layout, ApplianceError> {
        let doing = "look at the disks";
        let disks = self.session.step(doing, &["layout"], STEP_TIMEOUT).await?;
        let volumes = self.session.step(doing, &["volumes"], STEP_TIMEOUT).await?;
        let layout = Layout::parse(&disks, &volumes, self.disks);
        layout.map_err(|error| ApplianceError::Nonsense(Box::new(error)))
    }

    /// Makes a file system whole that was in use when its image was taken.
    ///
    /// # Errors
    /// [`ApplianceError`]; [`ApplianceError::Step`] where it is damaged.
    pub async fn check(&mut self, device: &str, kind: &str) -> Result<(), ApplianceError> {
        let doing = format!("check the {kind} file system on {device}");
        let words = ["check", device, kind];
        self.session.step(&doing, &words, LONG_STEP_TIMEOUT).await.map(drop)
    }

    /// The table of file systems on a device, where it has one.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn table(
        &mut self,
        device: &str,
        kind: &str,
    ) -> Result<Option<String>, ApplianceError> {
        let doing = format!("look at the files on {device}");
        let found = self.session.step(&doing, &["table", device, kind], STEP_TIMEOUT).await?;
        Ok(Some(found).filter(|text| !text.is_empty()))
    }

    /// Gives a file system or partition another UUID, label or partition UUID (`what`).
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn identify(
        &mut self,
        device: &str,
        kind: &str,
        what: &str,
        value: &str,
    ) -> Result<(), ApplianceError> {
        let doing = format!("set the {what} of {device} to {value}");
        let words = ["identify", device, kind, what, value];
        self.session.step(&doing, &words, LONG_STEP_TIMEOUT).await.map(drop)
    }

    /// Mounts a file system at its place in the machine. Whether it keeps parts of a second.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn mount(&mut self, mount: &crate::fit::Mount) -> Result<bool, ApplianceError> {
        let doing = format!("mount {} at {}", mount.device, mount.path);
        let words = ["mount", &mount.device, &mount.kind, &mount.options, &mount.path];
        let told = self.session.step(&doing, &words, STEP_TIMEOUT).await?;
        Ok(told.trim() != "whole seconds")
    }

    /// Fetches the few files of a tree that say how its machine is laid out, for [`Self::tree_file`].
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn fetch_tree_files(
        &mut self,
        source: Source,
        options: &[String],
    ) -> Result<(), ApplianceError> {
        let name = source.name.clone();
        let mut words = vec!["tree-files", &name];
        words.extend(options.iter().map(String::as_str));
        let port = self.connect().await?;
        let step = self.session.step("read the tree's tables", &words, LONG_STEP_TIMEOUT);
        source.relay_while(port, IDLE_TIMEOUT, step, |_| {}).await.map(drop)
    }

    /// Connects with the port before a step of the appliance opens it: it would find nobody there.
    async fn connect(&self) -> Result<UnixStream, ApplianceError> {
        UnixStream::connect(&self.tree).await.map_err(ApplianceError::Prepare)
    }

    /// One of the files that were fetched; empty where the tree has none such.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn tree_file(&mut self, path: &str) -> Result<String, ApplianceError> {
        self.session.step("read the tree's tables", &["tree-file", path], STEP_TIMEOUT).await
    }

    /// Makes the mounted files equal to those of a tree. Calls `item` for each difference, and `sent`
    /// with the bytes that rsync has exchanged so far.
    ///
    /// # Errors
    /// [`ApplianceError`]; [`ApplianceError::Step`] with rsync's exit code.
    pub async fn pull(
        &mut self,
        source: Source,
        options: &[String],
        item: impl FnMut(Item),
        sent: impl FnMut(u64),
    ) -> Result<(), ApplianceError> {
        let name = source.name.clone();
        let mut words = vec!["pull", &name];
        words.extend(options.iter().map(String::as_str));
        let port = self.connect().await?;
        let Self { session, log, .. } = self;
        let step = session.step("copy the tree's files", &words, COPY_TIMEOUT);
        let items = crate::rsync::read_items(log, COPY_TIMEOUT, item);
        let items =
            async { items.await.map_err(|error| ApplianceError::Nonsense(Box::new(error))) };
        let copied = async { tokio::try_join!(step, items).map(drop) };
        source.relay_while(port, IDLE_TIMEOUT, copied, sent).await
    }

    /// Runs a step that takes few words: `places`, `relabel`, `boot-loader`, `finish`.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn step(&mut self, doing: &str, words: &[&str]) -> Result<String, ApplianceError> {
        self.session.step(doing, words, LONG_STEP_TIMEOUT).await
    }

    /// Ends it, once all it wrote is in its disks' files.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub async fn end(mut self) -> Result<(), ApplianceError> {
        self.step("unmount the file systems", &["finish"]).await?;
        self.session.end().await
    }
}
