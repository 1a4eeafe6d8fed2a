//! The command line: one file for each command.

mod alert;
mod backup;
mod config;
mod copy;
mod create;
mod doctor;
mod forget;
mod generate;
mod history;
mod image;
mod list;
mod overlays;
mod protect;
mod prune;
mod purge;
mod repository;
mod restore;
mod run;
mod show;
mod status;
mod verify;

use std::cell::Cell;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ::repository::{AnnouncedLock, Index, Lock, LockMode, Repository, RepositoryError};
use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::bound;
use crate::catalog::Catalog;
use crate::config::{Config, Repository as Configured, read_password};
use crate::error::CommandError;
use crate::guard;
use crate::hypervisor::Reach;
use crate::journal::Journal;
use crate::location::{self, Route, parse_server_timeout};
use crate::names::RunId;
use crate::progress::{Progress, When};
use crate::quiesce::guest_agent::AgentAddress;
use crate::quiesce::watchdog;
use crate::run::child::Asked;
use crate::store::blocking;
use crate::units::parse_bytes;

/// So long a command that was asked to stop has to let go of what it holds.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// A backup waits so long for a prune that is alone with the repository, which is a matter of moments.
const ADD_PATIENCE: Duration = Duration::from_secs(60);

/// Live backup of KVM guests into a deduplicated, encrypted repository
///
/// Takes a point in time of a running guest without disturbing it, and stores only what changed. The
/// repository has the format of restic: without kvmsnap, `restic restore` and `qemu-img` bring
/// everything back.
#[derive(Debug, Parser)]
#[command(name = "kvmsnap", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  export KVMSNAP_REPOSITORY=/srv/backup KVMSNAP_PASSWORD_FILE=/etc/kvmsnap/password
  kvmsnap repository init
  kvmsnap backup web
  kvmsnap list
  kvmsnap restore latest:web --to /srv/restored

Exit codes:
  0 done, 1 failed, 2 usage, 3 some domains failed, 10 no repository, 11 locked, 12 wrong password, 130 interrupted";

/// Options of every command.
#[derive(Debug, Args)]
pub struct GlobalArgs {
    /// The configuration; /etc/kvmsnap/kvmsnap.toml unless given
    #[arg(long, global = true, value_name = "FILE", env = "KVMSNAP_CONFIG")]
    config: Option<PathBuf>,
    /// The repository: a name from the configuration, a local folder, sftp:USER@HOST:PATH,
    /// s3://HOST/BUCKET/PREFIX or rest:https://HOST/PATH/
    #[arg(long, short, global = true, value_name = "REPOSITORY", env = "KVMSNAP_REPOSITORY")]
    repository: Option<String>,
    /// A file whose first line is the repository's password
    #[arg(long, short, global = true, value_name = "FILE", env = "KVMSNAP_PASSWORD_FILE")]
    password_file: Option<PathBuf>,
    /// Send at most so many bytes a second to the repository, like 20MiB
    #[arg(long, global = true, value_name = "BYTES", env = "KVMSNAP_LIMIT_UPLOAD", value_parser = parse_bytes)]
    limit_upload: Option<u64>,
    /// Receive at most so many bytes a second from it
    #[arg(long, global = true, value_name = "BYTES", env = "KVMSNAP_LIMIT_DOWNLOAD", value_parser = parse_bytes)]
    limit_download: Option<u64>,
    /// Give up a server of a repository that is silent for so long: 2s to 90s, 30s unless given
    #[arg(long, global = true, value_name = "TIME", env = "KVMSNAP_SERVER_TIMEOUT", value_parser = parse_server_timeout)]
    server_timeout: Option<Duration>,
    /// The libvirt whose domains are meant
    #[arg(
        long,
        global = true,
        value_name = "URI",
        env = "KVMSNAP_CONNECT",
        default_value = "qemu:///system"
    )]
    connect: String,
    /// Where undo records are kept; must survive a restart
    #[arg(
        long,
        global = true,
        value_name = "FOLDER",
        env = "KVMSNAP_STATE_DIR",
        default_value = "/var/lib/kvmsnap"
    )]
    state_dir: PathBuf,
    /// Where sockets and locks are kept
    #[arg(
        long,
        global = true,
        value_name = "FOLDER",
        env = "KVMSNAP_RUN_DIR",
        default_value = "/run/kvmsnap"
    )]
    run_dir: PathBuf,
    /// Print one JSON object per line
    #[arg(long, global = true, env = "KVMSNAP_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
    /// Say more; twice: also what is said to QEMU
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say nothing but errors
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// When to show progress
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        env = "KVMSNAP_PROGRESS",
        default_value = "auto"
    )]
    progress: When,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(subcommand)]
    Repository(repository::RepositoryCommand),
    Backup(Box<backup::BackupArgs>),
    Create(create::CreateArgs),
    Purge(purge::PurgeArgs),
    List(list::ListArgs),
    Show(show::ShowArgs),
    Restore(restore::RestoreArgs),
    Verify(verify::VerifyArgs),
    Copy(copy::CopyArgs),
    Forget(Box<forget::ForgetArgs>),
    Protect(protect::ProtectArgs),
    Prune(prune::PruneArgs),
    #[command(subcommand)]
    Image(image::ImageCommand),
    Status(status::StatusArgs),
    Doctor(doctor::DoctorArgs),
    Run(run::RunArgs),
    #[command(subcommand)]
    Config(config::ConfigCommand),
    History(history::HistoryArgs),
    Alert(alert::AlertArgs),
    Completions(generate::CompletionsArgs),
    Man(generate::ManArgs),
    /// The process that undoes a run that is killed
    #[command(name = guard::SUBCOMMAND, hide = true)]
    Guard {
        run: RunId,
    },
    /// A program that ends with the process that started it
    #[command(name = bound::SUBCOMMAND, hide = true)]
    Bound {
        #[arg(long)]
        parent: i32,
        #[arg(long)]
        gently: bool,
        #[arg(long)]
        nice: Option<i32>,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// The process that thaws a guest whatever happens to the run
    #[command(name = watchdog::SUBCOMMAND, hide = true)]
    QuiesceWatchdog {
        #[arg(long, value_parser = parse_json::<AgentAddress>)]
        agent: Option<AgentAddress>,
        #[arg(long, value_parser = parse_json::<Reach>)]
        reach: Reach,
    },
}

/// What every command needs.
#[derive(Debug)]
pub struct Context {
    global: GlobalArgs,
    progress: Progress,
    /// How often the user or the system has asked to stop.
    interrupts: watch::Receiver<Asked>,
    /// Read when it is first asked for.
    config: OnceLock<Config>,
}

impl Cli {
    /// How much is logged, in `tracing`'s words.
    pub fn log_filter(&self) -> &'static str {
        match (self.global.quiet, self.global.verbose) {
            (true, _) => "error",
            (_, 0) => "warn,progress=info",
            (_, 1) => "kvmsnap=info,warn,progress=info",
            // Requests to S3 are signed by their addresses, which its libraries would log.
            (_, _) => "debug,ureq=info,ureq_proto=info,rustls=info",
        }
    }

    /// Runs the command.
    ///
    /// # Errors
    /// Whatever the command says.
    pub async fn run(self) -> Result<(), CommandError> {
        let progress = Progress::new(self.global.progress, self.global.quiet || self.global.json);
        let interrupts = watch_interrupts();
        let config = OnceLock::new();
        let context = Context { global: self.global, progress, interrupts, config };
        let outcome = match self.command {
            Command::Repository(command) => {
                context.until_interrupted(repository::run(command, &context)).await
            }
            Command::Backup(args) => backup::run(*args, &context).await,
            Command::Create(args) => create::run(args, &context).await,
            Command::Purge(args) => purge::run(args, &context).await,
            Command::List(args) => context.until_interrupted(list::run(args, &context)).await,
            Command::Show(args) => context.until_interrupted(show::run(args, &context)).await,
            Command::Restore(args) => restore::run(args, &context).await,
            Command::Copy(args) => copy::run(args, &context).await,
            Command::Verify(args) => verify::run(args, &context).await,
            Command::Forget(args) => forget::run(*args, &context).await,
            Command::Protect(args) => protect::run(args, &context).await,
            Command::Prune(args) => prune::run(args, &context).await,
            Command::Image(command) => image::run(command, &context).await,
            Command::Status(args) => context.until_interrupted(status::run(args, &context)).await,
            Command::Doctor(args) => context.until_interrupted(doctor::run(args, &context)).await,
            Command::Alert(args) => context.until_interrupted(alert::run(args, &context)).await,
            Command::Run(args) => run::run(args, &context).await,
            Command::Config(command) => config::run(&command, &context).await,
            Command::History(args) => history::run(&args, &context),
            Command::Completions(args) => generate::completions(&args),
            Command::Man(args) => generate::man(&args),
            Command::Guard { run } => {
                guard::run(&run, &context.journal()?, &context.global.run_dir).await
            }
            Command::Bound { parent, gently, nice, command } => {
                let (program, arguments) = command.split_first().expect("clap requires one");
                let source = bound::become_program(parent, gently, nice, program, arguments);
                let program = program.to_string_lossy().into_owned();
                Err(CommandError::Program { program, source })
            }
            Command::QuiesceWatchdog { agent, reach } => {
                watchdog::run(agent, reach).await;
                Ok(())
            }
        };
        context.progress.finish();
        outcome
    }
}

/// A repository in use: open, locked with an `L` for as long as this lives, its index read.
#[derive(Debug)]
pub struct OpenRepository<L> {
    repository: Repository,
    lock: L,
    index: Arc<Index>,
}

/// A repository that is meant.
struct Wanted {
    location: String,
    route: Route,
    password: Vec<u8>,
}

impl Wanted {
    fn open(&self) -> Result<Repository, CommandError> {
        let backend = location::open(&self.location, &self.route)?;
        Ok(Repository::open(backend, &self.password)?)
    }
}

/// A repository that is being opened, once for all who ask for it.
enum Opening {
    UnderWay(JoinHandle<Result<Repository, CommandError>>),
    Open(Repository),
    /// Who asked was told why, and asks no more.
    Failed,
}

impl Opening {
    /// The open repository. The future may be dropped at any time.
    async fn repository(&mut self) -> Result<Repository, CommandError> {
        if let Self::UnderWay(opening) = self {
            match joined(opening.await) {
                Ok(repository) => *self = Self::Open(repository),
                Err(error) => {
                    *self = Self::Failed;
                    return Err(error);
                }
            }
        }
        match self {
            Self::Open(repository) => Ok(repository.clone()),
            Self::UnderWay(_) | Self::Failed => unreachable!("it was opened, or failed for good"),
        }
    }

    /// Whether it cannot be opened.
    fn has_failed(&self) -> bool {
        matches!(self, Self::Failed)
    }
}

impl<L> OpenRepository<L> {
    fn catalog(&self) -> Catalog {
        Catalog::new(&self.repository, Arc::clone(&self.index))
    }
}

impl Context {
    /// Ready when the user or the system asks to stop.
    async fn interrupted(&self) {
        let mut interrupts = self.interrupts.clone();
        if interrupts.wait_for(|asked| asked.times > 0).await.is_err() {
            // Without a handler the signals end the process as they always do.
            std::future::pending::<()>().await;
        }
    }

    /// Ready when that is asked for once more after this call.
    fn interrupted_anew(&self) -> impl Future<Output = ()> {
        let mut interrupts = self.interrupts.clone();
        let before = interrupts.borrow_and_update().times;
        async move {
            if interrupts.wait_for(|asked| asked.times > before).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// A command that may end at any point.
    async fn until_interrupted<T>(
        &self,
        work: impl Future<Output = Result<T, CommandError>>,
    ) -> Result<T, CommandError> {
        tokio::select! {
            outcome = work => outcome,
            () = self.interrupted() => Err(CommandError::Interrupted),
        }
    }

    /// The configuration.
    ///
    /// # Errors
    /// When it cannot be read, or makes no sense.
    fn config(&self) -> Result<&Config, CommandError> {
        if let Some(config) = self.config.get() {
            return Ok(config);
        }
        let config = Config::load(self.global.config.as_deref())?;
        Ok(self.config.get_or_init(|| config))
    }

    /// The repository that all commands are about.
    fn wanted(&self) -> Result<Wanted, CommandError> {
        let GlobalArgs { repository, password_file, .. } = &self.global;
        self.wanted_of(repository.as_deref(), password_file.as_deref(), || {
            Err(CommandError::NoPasswordGiven)
        })
    }

    /// Another repository, with the password of the first one unless it has its own.
    fn another(&self, named: &str, password_file: Option<&Path>) -> Result<Wanted, CommandError> {
        self.wanted_of(Some(named), password_file, || Ok(self.wanted()?.password))
    }

    /// Runs what blocks, and tells it when the user or the system asks to stop: then it has a while to let go
    /// of what it holds.
    async fn until_stopped<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Stop) -> Result<T, CommandError> + Send + 'static,
    ) -> Result<T, CommandError> {
        let stop = Stop::default();
        let heard = stop.clone();
        let mut working = tokio::spawn(blocking(move || work(&heard)));
        tokio::select! {
            outcome = &mut working => joined(outcome),
            () = self.interrupted() => {
                stop.0.store(true, Ordering::Relaxed);
                match tokio::time::timeout(STOP_PATIENCE, working).await.map(joined) {
                    Ok(Ok(done)) => Ok(done),
                    Ok(Err(CommandError::Repository(RepositoryError::Stopped))) | Err(_) => {
                        Err(CommandError::Interrupted)
                    }
                    Ok(Err(error)) => Err(error),
                }
            }
        }
    }

    /// A repository by its name or location, the usual one where none is given, with its password from
    /// this file or as it is configured.
    fn wanted_of(
        &self,
        named: Option<&str>,
        password_file: Option<&Path>,
        or_password: impl FnOnce() -> Result<Vec<u8>, CommandError>,
    ) -> Result<Wanted, CommandError> {
        // A location needs no configuration: so backups can be restored where that is broken.
        let configured = match named {
            Some(location) if location.contains(['/', ':']) => None,
            Some(name) => self.config()?.repository(name),
            None => self.config()?.usual_repository().map(|(_, usual)| usual),
        };
        let no_repository = || {
            let known = self.config.get().map(|config| &config.repository);
            let known = known.into_iter().flatten().map(|(name, _)| name.to_string()).collect();
            CommandError::NoRepositoryGiven { known }
        };
        let location = configured.map(|repository| repository.location.clone());
        let location = location.or(named.map(str::to_owned)).ok_or_else(no_repository)?;
        let password = match password_file {
            Some(path) => Some(read_password(path)?),
            None => configured.map(Configured::password).transpose()?.flatten(),
        };
        let password = password.map_or_else(or_password, Ok)?;
        let route = configured.map(|repository| repository.route.clone()).unwrap_or_default();
        let mut route = route.or_environment();
        route.limit_upload = self.global.limit_upload.or(route.limit_upload);
        route.limit_download = self.global.limit_download.or(route.limit_download);
        route.server_timeout = self.global.server_timeout.or(route.server_timeout);
        Ok(Wanted { location, route, password })
    }

    fn journal(&self) -> Result<Journal, CommandError> {
        Ok(Journal::open(&self.global.state_dir)?)
    }

    /// Opens the repository without a lock or index.
    async fn open(&self) -> Result<Repository, CommandError> {
        self.begin_to_open()?.repository().await
    }

    /// Begins to open it: its key is derived on a thread of its own.
    fn begin_to_open(&self) -> Result<Opening, CommandError> {
        let wanted = self.wanted()?;
        Ok(Opening::UnderWay(spawn_blocking(move || wanted.open())))
    }

    /// Makes an open repository one to add to: announces a lock, which settles while other things are
    /// done, and reads the index.
    async fn add_to(repository: Repository) -> Result<OpenRepository<AnnouncedLock>, CommandError> {
        blocking(move || {
            let told = Cell::new(false);
            let lock =
                repository.announce_lock_within(LockMode::Shared, ADD_PATIENCE, &|error| {
                    if !told.replace(true) {
                        tracing::warn!("waiting up to {} s: {error}", ADD_PATIENCE.as_secs());
                    }
                    Ok(())
                })?;
            let index = Arc::new(repository.index()?);
            Ok(OpenRepository { repository, lock, index })
        })
        .await
    }

    /// Opens and locks the repository to read from it, without a lock where none can be written.
    async fn open_to_read(&self) -> Result<OpenRepository<Option<Lock>>, CommandError> {
        let OpenRepository { repository, lock, index } = self.open_to_read_at_once().await?;
        let lock = blocking(move || lock.map(AnnouncedLock::settle).transpose()).await?;
        Ok(OpenRepository { repository, lock, index })
    }

    /// As [`Self::open_to_read`], with a lock that settles while other things are done.
    async fn open_to_read_at_once(
        &self,
    ) -> Result<OpenRepository<Option<AnnouncedLock>>, CommandError> {
        let repository = self.open().await?;
        blocking(move || {
            let lock = announce_lock_to_read(&repository)?;
            // A lost index file costs no restore: what it knew is taken from the packs.
            let (index, unreadable) = repository.index_salvaged()?;
            for (file, error) in unreadable {
                tracing::error!(%file, %error, "an index file is passed over");
            }
            Ok(OpenRepository { repository, lock, index: Arc::new(index) })
        })
        .await
    }

    fn print_json(
        &self,
        out: &mut impl Write,
        value: &impl serde::Serialize,
    ) -> Result<(), CommandError> {
        serde_json::to_writer(&mut *out, value).map_err(std::io::Error::from)?;
        Ok(writeln!(out)?)
    }
}

fn parse_json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, serde_json::Error> {
    serde_json::from_str(text)
}

/// Whether somebody has asked to stop.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Fails once somebody has.
    fn check(&self) -> Result<(), RepositoryError> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(RepositoryError::Stopped),
            false => Ok(()),
        }
    }
}

/// The outcome of a task, which panics as it did.
fn joined<T>(outcome: Result<T, tokio::task::JoinError>) -> T {
    outcome.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Takes the repository for itself, and waits while others use it.
fn lock_exclusively(
    repository: &Repository,
    patience: Duration,
    progress: &Progress,
    stop: &Stop,
) -> Result<Lock, RepositoryError> {
    let told = Cell::new(false);
    repository.lock_within(LockMode::Exclusive, patience, &|error| {
        if !told.replace(true) {
            tracing::info!(target: "progress", "waiting up to {} s: {error}", patience.as_secs());
            progress.phase("waiting for others to let go of the repository");
        }
        stop.check()
    })
}

fn announce_lock_to_read(
    repository: &Repository,
) -> Result<Option<AnnouncedLock>, RepositoryError> {
    match repository.announce_lock(LockMode::Shared) {
        Ok(lock) => Ok(Some(lock)),
        Err(error @ RepositoryError::Locked { .. }) => Err(error),
        Err(RepositoryError::Backend { source }) if source.is_away() => Err(source.into()),
        // Nothing about a lock is worth a restore.
        Err(error) => {
            tracing::warn!(%error, "reading without a lock: do not prune meanwhile");
            Ok(None)
        }
    }
}

/// Watches for Ctrl-C, SIGTERM and SIGHUP from the start of the program, so that none is missed between
/// two steps of a command.
fn watch_interrupts() -> watch::Receiver<Asked> {
    let (asked, interrupted) = watch::channel(Asked::default());
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let (asked, Ok(mut signal)) = (asked.clone(), signal(kind)) else { continue };
        tokio::spawn(async move {
            while signal.recv().await.is_some() {
                asked.send_modify(|asked| {
                    asked.times += 1;
                    asked.by_host |= kind == SignalKind::terminate();
                });
            }
        });
    }
    interrupted
}
