//! A trial: an image is started in a machine of its own, without a network, and must show that it is up.
//!
//! Nothing that the trial does reaches the image: QEMU opens it read-only beneath an overlay that has no
//! name, and gets a copy of the firmware's variables.

mod console;
mod machine;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use image_tools::error::ImageError;
use image_tools::inspect::{Format, Policy, inspect};
use image_tools::private::PrivateFolder;
use image_tools::record::{BootSign, BootTrial, ImageRecord};
use jiff::Timestamp;
use nix::libc::O_NOFOLLOW;
use qmp_client::{Command, Options, Qga, Qmp, QmpError};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, ChildStdout};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use self::console::Console;
use self::machine::{Machine, Shape, TrialDisk, choose_firmware, is_uefi};
use crate::bound;
use crate::capture::image::words;
use crate::hypervisor::libvirt::xml;

const QEMU: &str = "qemu-system-x86_64";
/// Where the console's log and the picture of the screen go, in the folder of the image.
const RESULTS: &str = "boot";
/// The machine's description and its firmware's variables, in the folder of an image.
const DESCRIPTION: &str = "domain.xml";
const VARIABLES: &str = "nvram.fd";
/// More is no description, and no memory of any firmware.
const DESCRIPTION_LEN_MAX: u64 = 4 << 20;
const VARIABLES_LEN_MAX: u64 = 64 << 20;
/// How long QEMU may take until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const START_POLL: Duration = Duration::from_millis(20);
/// How long a guest agent that is there may take to answer, and how often it is asked.
const AGENT_TIMEOUT: Duration = Duration::from_secs(3);
const AGENT_PAUSE: Duration = Duration::from_millis(300);
const PICTURE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a killed QEMU may take to be gone.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a machine may start again before it is up: after SELinux has labelled its files, and after shim has
/// noted the boot loader in the firmware's variables.
const RESTARTS_MAX: u32 = 2;
/// What comes sooner after one belongs to it: SeaBIOS resets the machine itself, once or twice, on the way.
const RESTARTS_APART: Duration = Duration::from_secs(3);
/// How long it may take to tell its host's name, and how much of that is taken.
const NAME_TIMEOUT: Duration = Duration::from_secs(10);
const NAME_CHARS_MAX: usize = 64;
/// The most that is taken of its words.
const WORDS_LEN_MAX: u64 = 16 << 10;

/// What a machine on trial is run by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// The processor, with the kernel's KVM.
    Kvm,
    /// QEMU, which emulates one: slower, and works everywhere.
    Tcg,
}

/// What must show that a machine is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Wait {
    /// Its guest agent answers.
    Agent,
    /// Its serial console asks for a login.
    Login,
    /// Either.
    Any,
}

/// An image to be tried, and how.
#[derive(Debug)]
pub struct Trial<'a> {
    /// The folder with the image.
    pub folder: &'a Path,
    /// What is in it.
    pub record: &'a ImageRecord,
    /// How long the machine may take until it is up.
    pub deadline: Duration,
    /// Its memory in bytes.
    pub memory: u64,
    /// What shows that it is up.
    pub wait: Wait,
    /// What it is run by.
    pub accel: Accel,
}

/// How a trial ended.
#[derive(Debug)]
pub struct Outcome {
    /// For the record of the image.
    pub trial: BootTrial,
    /// What the serial console said.
    console: PathBuf,
    /// The last that the serial console said, fit for a terminal.
    last_lines: Vec<String>,
    /// Whether the machine ended by itself.
    ended: bool,
}

impl Outcome {
    /// Refuses an image that did not come up.
    ///
    /// # Errors
    /// [`BootError::NotUp`], [`BootError::Ended`].
    pub fn check(self, trial: &Trial<'_>) -> Result<BootTrial, BootError> {
        let folder = trial.folder.to_owned();
        match self.trial.sign {
            Some(_) => Ok(self.trial),
            None if self.ended => {
                Err(BootError::Ended { folder, log: self.console, last: self.last_lines })
            }
            None => {
                let (waited, log) = (trial.deadline, self.console);
                Err(BootError::NotUp { folder, waited, log, last: self.last_lines })
            }
        }
    }
}

/// Why an image was not tried, or did not pass.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The description beside the image is no XML.
    #[error("{} cannot be read", .path.display())]
    Description {
        /// The description.
        path: PathBuf,
        /// Why.
        source: xmltree::ParseError,
    },
    /// A file beside the image is longer than any honest one.
    #[error("{} has {len} bytes, at most {max} are allowed", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// What is allowed.
        max: u64,
    },
    /// The host has no UEFI firmware for the machine.
    #[error("the machine starts by UEFI, and no firmware for that is here")]
    NoFirmware,
    /// The host failed.
    #[error("cannot {step} {}", .path.display())]
    Host {
        /// The step, to be read after "cannot".
        step: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// QEMU does not start, or does not open the image.
    #[error("QEMU does not run the image: {words}")]
    Qemu {
        /// What it said.
        words: String,
    },
    /// QEMU runs and does not answer.
    #[error("QEMU does not answer")]
    Silent(#[source] QmpError),
    /// Nothing showed within the deadline that the machine is up.
    #[error("{} did not come up within {} s", .folder.display(), .waited.as_secs())]
    NotUp {
        /// The image.
        folder: PathBuf,
        /// How long was waited.
        waited: Duration,
        /// What its serial console said.
        log: PathBuf,
        /// The last of it.
        last: Vec<String>,
    },
    /// The machine switched itself off, or started again, before it was up.
    #[error("{} ended before it was up", .folder.display())]
    Ended {
        /// The image.
        folder: PathBuf,
        /// What its serial console said.
        log: PathBuf,
        /// The last of it.
        last: Vec<String>,
    },
}

impl BootError {
    /// What the user can do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotUp { log, last, .. } | Self::Ended { log, last, .. } => {
                let log = log.display();
                Some(match last.is_empty() {
                    true => format!(
                        "its serial console said nothing: see screen.png beside {log}, and whether the \
                         kernel's options have console=ttyS0"
                    ),
                    false => format!("{log} ends with:\n  {}", last.join("\n  ")),
                })
            }
            Self::NoFirmware => Some("it is in the package ovmf or edk2-ovmf".to_owned()),
            Self::Qemu { .. } => Some(
                "QEMU is in the package qemu-system-x86; --memory gives the machine less"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

fn host(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BootError {
    let path = path.to_owned();
    move |source| BootError::Host { step, path, source }
}

impl Trial<'_> {
    /// Starts the image and waits until it is up, or the deadline has passed. The image stays as it was;
    /// beside it is what the machine showed. QEMU is gone when this returns, and when its future is
    /// dropped.
    ///
    /// # Errors
    /// [`BootError`] when it could not be tried.
    pub async fn run(&self) -> Result<Outcome, BootError> {
        let results = self.results()?;
        let private =
            PrivateFolder::new().map_err(host("make a folder in", &std::env::temp_dir()))?;
        let log = results.join("console.log");
        let screen = results.join("screen.png");
        let file = new_file(&log)?;
        let _ = fs::remove_file(&screen);

        let time = Timestamp::now();
        let started = Instant::now();
        let mut running = self.start(&private, &results, file)?;
        let (sign, host_name, elapsed) = match running.connect(&private).await? {
            None => {
                let words = running.last_words().await;
                return Err(BootError::Qemu { words });
            }
            Some(qmp) => {
                let sign = running.wait(self.wait, started + self.deadline, &private, &qmp).await;
                let (sign, name) = sign.map_err(host("write", &log))?;
                let elapsed = started.elapsed();
                running.picture(&qmp, &screen).await;
                (sign, name, elapsed)
            }
        };
        let by_itself = running.ended;
        running.end().await.map_err(host("end", Path::new(QEMU)))?;
        let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        Ok(Outcome {
            trial: BootTrial { time, sign, host: host_name, elapsed_ms },
            console: log,
            last_lines: running.console.last_lines(),
            ended: by_itself,
        })
    }

    /// The folder for what the machine shows.
    fn results(&self) -> Result<PathBuf, BootError> {
        let results = self.folder.join(RESULTS);
        match fs::DirBuilder::new().mode(0o700).create(&results) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(host("make", &results)(error));
            }
            _ => {}
        }
        let metadata = fs::symlink_metadata(&results).map_err(host("look at", &results))?;
        match metadata.is_dir() {
            true => Ok(results),
            false => Err(host("write to", &results)(io::ErrorKind::NotADirectory.into())),
        }
    }

    fn start(
        &self,
        private: &PrivateFolder,
        results: &Path,
        log: File,
    ) -> Result<Running, BootError> {
        let shape = self.shape()?;
        let firmware = self.firmware(&shape, private)?;
        let mut disks = Vec::new();
        for disk in &self.record.disks {
            let path = self.record.disk_path(self.folder, disk);
            let graph = inspect(&path, Format::Qcow2, &Policy::default())?.graph();
            disks.push(TrialDisk { target: &disk.target, graph });
        }
        let machine = Machine {
            shape: &shape,
            firmware: firmware.as_ref().map(|(code, copy)| (code.as_path(), copy.as_path())),
            disks,
            memory: self.memory,
            accel: self.accel,
            qmp: &private.path().join("qmp"),
            agent: &private.path().join("agent"),
        };
        crate::effect::about_to("trial: start").map_err(host("start", Path::new(QEMU)))?;
        let mut command = bound::command(QEMU);
        command.args(machine.arguments());
        // There QEMU's overlays have their room.
        let results = results.canonicalize().map_err(host("find", results))?;
        command.env("TMPDIR", results);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().map_err(host("start", Path::new(QEMU)))?;
        let output = process.stdout.take().expect("it was asked for");
        Ok(Running { process, output, console: Console::new(log), ended: false })
    }

    fn shape(&self) -> Result<Shape, BootError> {
        let path = self.folder.join(DESCRIPTION);
        match self.file(DESCRIPTION, DESCRIPTION_LEN_MAX)? {
            None => Ok(Shape::unknown()),
            Some(text) => {
                let domain = xml::parse(&String::from_utf8_lossy(&text));
                let domain = domain.map_err(|source| BootError::Description { path, source })?;
                Ok(Shape::read(&domain))
            }
        }
    }

    /// The firmware's code, and a copy of the machine's variables or empty ones.
    fn firmware(
        &self,
        shape: &Shape,
        private: &PrivateFolder,
    ) -> Result<Option<(PathBuf, PathBuf)>, BootError> {
        let variables = self.file(VARIABLES, VARIABLES_LEN_MAX)?;
        let mode = self.record.flavour.as_ref().map(|flavour| flavour.boot);
        if !is_uefi(mode, shape, variables.is_some()) {
            return Ok(None);
        }
        let len_of = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.len());
        let wanted = variables.as_ref().map(|variables| variables.len() as u64);
        let copy = private.path().join("variables");
        let fits = wanted.and_then(|len| choose_firmware(Some(len), len_of));
        let code = match (fits, variables) {
            (Some((code, _)), Some(variables)) => {
                fs::write(&copy, variables).map_err(host("write", &copy))?;
                code
            }
            (_, variables) => {
                if variables.is_some() {
                    tracing::warn!("no firmware here fits {VARIABLES}: its variables begin anew");
                }
                let (code, empty) = choose_firmware(None, len_of).ok_or(BootError::NoFirmware)?;
                fs::copy(&empty, &copy).map_err(host("copy", &empty))?;
                code
            }
        };
        Ok(Some((code, copy)))
    }

    /// A file beside the disks, where the record names it.
    fn file(&self, name: &str, max: u64) -> Result<Option<Vec<u8>>, BootError> {
        if !self.record.files.iter().any(|file| file.file == name) {
            return Ok(None);
        }
        let path = self.folder.join(name);
        let metadata = fs::symlink_metadata(&path).map_err(host("look at", &path))?;
        if !metadata.is_file() {
            return Err(ImageError::NoFile { path }.into());
        }
        if metadata.len() > max {
            return Err(BootError::TooLong { path, len: metadata.len(), max });
        }
        Ok(Some(fs::read(&path).map_err(host("read", &path))?))
    }
}

/// An empty file in place of whatever had its name.
fn new_file(path: &Path) -> Result<File, BootError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(O_NOFOLLOW);
    options.open(path).map_err(host("write", path))
}

/// A machine that runs.
struct Running {
    process: Child,
    output: ChildStdout,
    console: Console,
    /// Whether it has ended by itself.
    ended: bool,
}

impl Running {
    /// Connects to QEMU's monitor; `None` where QEMU has ended.
    async fn connect(&mut self, private: &PrivateFolder) -> Result<Option<Qmp>, BootError> {
        let socket = private.path().join("qmp");
        let until = Instant::now() + START_TIMEOUT;
        loop {
            let failed = match Qmp::connect(&socket, Options::default()).await {
                Ok(qmp) => return Ok(Some(qmp)),
                Err(error) => error,
            };
            let process = self.process.try_wait().map_err(host("wait for", Path::new(QEMU)))?;
            if process.is_some() {
                return Ok(None);
            }
            if Instant::now() > until {
                return Err(BootError::Silent(failed));
            }
            sleep(START_POLL).await;
        }
    }

    /// Waits until the machine shows that it is up, ends, or the deadline has passed; also what its agent calls
    /// it.
    async fn wait(
        &mut self,
        wait: Wait,
        deadline: Instant,
        private: &PrivateFolder,
        qmp: &Qmp,
    ) -> io::Result<(Option<BootSign>, Option<String>)> {
        let socket = private.path().join("agent");
        let agent = async {
            match wait {
                Wait::Login => std::future::pending().await,
                Wait::Agent | Wait::Any => agent_answers(&socket).await,
            }
        };
        let console = async {
            while let Some(asks) = listen(&mut self.output, &mut self.console).await? {
                if asks && wait != Wait::Agent {
                    return Ok((Some(BootSign::Login), None));
                }
            }
            self.ended = true;
            Ok((None, None))
        };
        let sign = async {
            tokio::select! {
                name = agent => Ok((Some(BootSign::Agent), name)),
                sign = console => sign,
                never = bound_restarts(qmp) => never,
            }
        };
        timeout_at(deadline, sign).await.unwrap_or(Ok((None, None)))
    }

    /// Takes a picture of the screen.
    async fn picture(&mut self, qmp: &Qmp, to: &Path) {
        if self.ended {
            return;
        }
        let arguments = json!({"filename": to.to_string_lossy(), "format": "png"});
        let command = Command::new("screendump", arguments).deadline(PICTURE_TIMEOUT);
        // Meanwhile its console must not wait for us.
        let drain = async {
            while let Ok(Some(_)) = listen(&mut self.output, &mut self.console).await {}
            std::future::pending::<Result<Value, QmpError>>().await
        };
        let taken = tokio::select! {
            taken = qmp.execute(command) => taken,
            never = drain => never,
        };
        if let Err(error) = taken {
            tracing::warn!(%error, "there is no picture of the screen");
        }
    }

    /// Ends QEMU and waits until it is gone.
    async fn end(&mut self) -> io::Result<()> {
        timeout(END_TIMEOUT, self.process.kill()).await?
    }

    async fn last_words(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(stderr) = self.process.stderr.take() {
            // What cannot be read was not said.
            let _ = stderr.take(WORDS_LEN_MAX).read_to_end(&mut text).await;
        }
        words(QEMU, &text)
    }
}

/// Hears what the console says next, and whether it asks for a login; `None` once QEMU has ended.
async fn listen(
    output: &mut (impl AsyncRead + Unpin),
    console: &mut Console,
) -> io::Result<Option<bool>> {
    let mut part = vec![0; 16 << 10];
    match output.read(&mut part).await? {
        0 => Ok(None),
        len => console.take(&part[..len]).map(Some),
    }
}

/// Has a machine that starts again and again end. Never ready.
async fn bound_restarts<T>(qmp: &Qmp) -> T {
    let (mut events, mut restarts, mut last) = (qmp.events(), 0, None::<Instant>);
    while restarts < RESTARTS_MAX {
        match events.recv().await {
            Ok(event) => {
                let is_apart = last.is_none_or(|last| last.elapsed() > RESTARTS_APART);
                if is_apart && event.name == "RESET" && event.data["guest"] == true {
                    (restarts, last) = (restarts + 1, Some(Instant::now()));
                }
            }
            // They are few, and come no more once QEMU has ended.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return std::future::pending().await,
        }
    }
    let command = Command::new("set-action", json!({"reboot": "shutdown"}));
    if let Err(error) = qmp.execute(command).await {
        tracing::warn!(%error, "a machine that starts again and again goes on until the deadline");
    }
    std::future::pending().await
}

/// Ready once the guest's agent answers; what it calls the machine, where it tells.
async fn agent_answers(socket: &Path) -> Option<String> {
    let options = Options { timeout: AGENT_TIMEOUT, ..Options::default() };
    loop {
        // Its answer carries a random id of ours, so it is no other's.
        match Qga::connect(socket, options).await {
            Ok(agent) => {
                let name = agent.execute("guest-get-host-name", Value::Null, NAME_TIMEOUT).await;
                let name = name.ok()?;
                let name = name.get("host-name")?.as_str()?;
                return Some(name.chars().take(NAME_CHARS_MAX).collect());
            }
            Err(error) => tracing::debug!(%error, "no guest agent yet"),
        }
        sleep(AGENT_PAUSE).await;
    }
}
