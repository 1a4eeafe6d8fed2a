//! How a command ends: the error, what to do about it, and the exit code.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use image_tools::ImageError;
use image_tools::rsync::TreeError;
use image_tools::tool::ToolError;
use qmp_client::QmpError;
use repository::{FileKind, RepositoryError};

use crate::backup::BackupError;
use crate::capture::image::is_lock;
use crate::catalog::CatalogError;
use crate::config::{ConfigError, PasswordError};
use crate::hypervisor::{HypervisorError, Reach};
use crate::image::boot::BootError;
use crate::image::deploy::DeployError;
use crate::image::update::UpdateImageError;
use crate::journal::JournalError;
use crate::location::{LocationError, store_hint};
use crate::lock::LockError;
use crate::method::MethodError;
use crate::names::{NameError, printable};
use crate::notify::NotifyError;
use crate::overlay::OverlayError;
use crate::plan::PlanError;
use crate::quiesce::QuiesceError;
use crate::read::ReadError;
use crate::recover::RecoverError;
use crate::restore::RestoreError;
use crate::restore::define::DefineError;
use crate::restore::in_place::InPlaceError;
use crate::run::state::StateError;
use crate::stop::StopError;

/// Done.
pub const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const SOME_FAILED: u8 = 3;
const NO_REPOSITORY: u8 = 10;
const LOCKED: u8 = 11;
const WRONG_PASSWORD: u8 = 12;
/// Ended by the user or the system.
pub const INTERRUPTED: u8 = 130;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// A backup stopped.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// No backup can be planned.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The method that was asked for is not possible.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// A domain cannot be shut down, or not be started again.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// Images cannot hold still, or a guest cannot be brought back.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// A restore stopped.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A machine cannot be defined.
    #[error(transparent)]
    Define(#[from] DefineError),
    /// Disks cannot be restored in place.
    #[error(transparent)]
    InPlace(#[from] InPlaceError),
    /// Images at rest cannot be read, made or kept.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No image can be made from a template.
    #[error(transparent)]
    UpdateImage(#[from] UpdateImageError),
    /// What a tree is called makes no sense, or it cannot be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The image is good, but something is left in the guest.
    #[error("the image is good, but the guest is not as it was")]
    ImageLeftover(#[source] OverlayError),
    /// More files were given than there are names for disks.
    #[error("at most {max} files make one image")]
    TooManyFiles {
        /// So many.
        max: usize,
    },
    /// One domain is needed.
    #[error("`{wanted}` means several domains")]
    ManyDomains {
        /// What was asked for.
        wanted: String,
        /// What it means.
        known: Vec<String>,
    },
    /// An image cannot become a machine of this host.
    #[error(transparent)]
    Deploy(#[from] DeployError),
    /// An image cannot be tried, or does not come up.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Somebody who is to be told of failures cannot be told.
    #[error("cannot tell {channel}")]
    CannotTell {
        /// Who, or by which way.
        channel: String,
        /// Why.
        source: NotifyError,
    },
    /// Some of those who are to be told of failures cannot be told.
    #[error("{count} of those who are to be told cannot be told")]
    NotTold {
        /// How many; each was named.
        count: usize,
    },
    /// Files that the configuration names cannot be used.
    #[error("{count} {} of the configuration cannot be used", if *.count == 1 { "secret" } else { "secrets" })]
    UnusableSecrets {
        /// How many; each was named.
        count: usize,
    },
    /// Of several images some cannot be used.
    #[error("{count} {} cannot be used", if *.count == 1 { "image" } else { "images" })]
    UnusableImages {
        /// How many; each was printed.
        count: usize,
    },
    /// None of a store's templates fits a tree.
    #[error("no template in {} fits the tree", .store.display())]
    NoTemplateFits {
        /// The store.
        store: PathBuf,
        /// Templates that nobody has looked at.
        unlooked: usize,
    },
    /// A tree that is not on this host is not compared without an appliance.
    #[error("`{tree}` is no folder of this host")]
    RemoteTree {
        /// As it was named.
        tree: String,
    },
    /// The repository cannot be used.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The repository's location cannot be used.
    #[error(transparent)]
    Location(#[from] LocationError),
    /// Backups cannot be found or read.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// QEMU cannot be used.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// An earlier run cannot be undone.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Another run is at work.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A name cannot be used.
    #[error("the domain cannot be called so")]
    Name(#[from] NameError),
    /// QEMU was started without a name.
    #[error("the guest at {reach} has no name")]
    NoName {
        /// How it is reached.
        reach: Reach,
    },
    /// No domain is called so.
    #[error("libvirt has no domain `{wanted}`")]
    NoDomain {
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Of several domains some could not be backed up.
    #[error("{failed} of {count} domains failed")]
    SomeFailed {
        /// How many; the error of each was printed.
        failed: usize,
        /// How many there are.
        count: usize,
    },
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No job is configured.
    #[error("no job is configured")]
    NoJobs,
    /// No job is called so.
    #[error("no job is called `{wanted}`")]
    NoJob {
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: Vec<String>,
    },
    /// What jobs have done cannot be kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// Of all that a run did some failed.
    #[error("{failed} of {count} steps failed")]
    StepsFailed {
        /// How many; each was printed.
        failed: usize,
        /// How many there were.
        count: usize,
    },
    /// A run that was asked to stop goes on.
    #[error("process {holder} was asked to stop, and still cleans up")]
    StillActive {
        /// Its process id.
        holder: String,
    },
    /// Of several snapshots some are damaged and were not copied.
    #[error("{failed} of {count} snapshots were not copied")]
    NotCopied {
        /// How many; each was named.
        failed: usize,
        /// How many were to be copied.
        count: usize,
    },
    /// What was copied cannot be read back.
    #[error("what was copied to {location} is damaged")]
    BadReplica {
        /// Where to.
        location: String,
        /// What is wrong with it.
        source: Box<RepositoryError>,
    },
    /// No repository was named.
    #[error("no repository was given")]
    NoRepositoryGiven {
        /// Those that are configured.
        known: Vec<String>,
    },
    /// No password was given.
    #[error("no password file was given")]
    NoPasswordGiven,
    /// The password cannot be had.
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// The process may not open the files it needs.
    #[error("only {limit} open files are allowed, at least {needed} are needed")]
    TooFewFiles {
        /// What is allowed.
        limit: u64,
        /// What is needed.
        needed: u64,
    },
    /// The process may not use the memory it needs (`RLIMIT_AS`, `RLIMIT_DATA`).
    #[error(
        "only {limit} bytes of memory or address space are allowed, at least {needed} are needed"
    )]
    TooLittleMemory {
        /// What is allowed.
        limit: u64,
        /// What is needed.
        needed: u64,
    },
    /// The repository or its backups are damaged.
    #[error("{problems} {} found", if *.problems == 1 { "problem was" } else { "problems were" })]
    Damaged {
        /// How many; each was printed.
        problems: usize,
    },
    /// Nothing says which snapshots stay.
    #[error("no rule says which snapshots stay")]
    NoRule,
    /// Most of a machine's snapshots would go at once, by other rules than last time or a clock that jumped.
    #[error(
        "{dropped} of {of} snapshots of `{domain}` would go at once: nothing of it was dropped{}",
        of_the_future(.in_future)
    )]
    TooManyDropped {
        /// The domain.
        domain: String,
        /// How many would go.
        dropped: usize,
        /// How many there are.
        of: usize,
        /// The newest snapshot whose time is yet to come, and that time.
        in_future: Option<(String, String)>,
    },
    /// A snapshot that was to go is needed.
    #[error("snapshot {snapshot} stays: {reasons}")]
    StillNeeded {
        /// The snapshot.
        snapshot: String,
        /// Why.
        reasons: String,
    },
    /// The backup is good, but something is left in the guest.
    #[error("the backup is good, but the guest is not as it was")]
    Leftover(#[source] BackupError),
    /// Something is left that has not been mended.
    #[error("{count} earlier {} left something behind", if *.count == 1 { "run" } else { "runs" })]
    Leftovers {
        /// How many; each was printed.
        count: usize,
    },
    /// Output cannot be written.
    #[error("cannot write the output")]
    Output(#[from] io::Error),
    /// A program cannot be started.
    #[error("cannot run `{program}`")]
    Program {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The user or the system asked to stop.
    #[error("interrupted")]
    Interrupted,
}

fn of_the_future(snapshot: &Option<(String, String)>) -> String {
    let told = snapshot.as_ref();
    told.map_or_else(String::new, |(id, time)| format!("; snapshot {id} is of the future, {time}"))
}

impl CommandError {
    /// Whether whoever reads our output has gone, as `head` does.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Name(_)
            | Self::Image(ImageError::Name { .. })
            | Self::Tree(TreeError::Name(_))
            | Self::RemoteTree { .. }
            | Self::TooManyFiles { .. }
            | Self::ManyDomains { .. }
            | Self::NoName { .. }
            | Self::NoDomain { .. }
            | Self::Config(_)
            | Self::NoJobs
            | Self::NoJob { .. }
            | Self::NoRule
            | Self::NoRepositoryGiven { .. }
            | Self::NoPasswordGiven
            | Self::Method(MethodError::Unmanaged { .. })
            | Self::Stop(StopError::Transient { .. })
            | Self::Plan(PlanError::UnknownDisk { .. } | PlanError::LeftOut { .. }) => USAGE,
            Self::Interrupted
            | Self::Backup(BackupError::Interrupted)
            | Self::Overlay(OverlayError::Interrupted)
            | Self::Deploy(DeployError::Write(RestoreError::Interrupted))
            | Self::Restore(RestoreError::Interrupted) => INTERRUPTED,
            Self::NotCopied { failed, count } if failed == count => FAILED,
            Self::SomeFailed { .. } | Self::StepsFailed { .. } | Self::NotCopied { .. } => {
                SOME_FAILED
            }
            Self::Lock(LockError::Held { .. }) => LOCKED,
            Self::Repository(RepositoryError::SameRepository { .. }) => USAGE,
            Self::Location(LocationError::Address(_)) => USAGE,
            Self::Location(error) if error.is_missing() => NO_REPOSITORY,
            error => error.repository().map_or(FAILED, repository_code),
        }
    }

    /// What the user can do next.
    pub fn hint(&self) -> Option<String> {
        if let Some(repository) = self.repository() {
            return repository_hint(repository);
        }
        let hint = match self {
            Self::Backup(error) => return backup_hint(error),
            Self::Hypervisor(error)
            | Self::Recover(RecoverError::Hypervisor { source: error, .. }) => {
                return hypervisor_hint(error);
            }
            Self::Overlay(OverlayError::Hypervisor(error))
            | Self::Define(DefineError::Hypervisor(error))
            | Self::InPlace(InPlaceError::Hypervisor(error)) => return hypervisor_hint(error),
            Self::Stop(StopError::Hypervisor(error))
            | Self::Recover(RecoverError::Stop(StopError::Hypervisor(error))) => {
                return hypervisor_hint(error);
            }
            Self::Stop(error) | Self::Recover(RecoverError::Stop(error)) => stop_hint(error)?,
            Self::Overlay(error) => error.hint()?,
            Self::Define(error) => return error.hint(),
            Self::InPlace(error) => error.hint()?,
            Self::Deploy(DeployError::Define(DefineError::Hypervisor(error))) => {
                return hypervisor_hint(error);
            }
            Self::Image(error)
            | Self::Boot(BootError::Image(error))
            | Self::UpdateImage(UpdateImageError::Image(error))
            | Self::Deploy(DeployError::Image(error)) => image_hint(error)?,
            Self::UpdateImage(error) => error.hint()?,
            Self::Deploy(error) => return error.hint(),
            Self::Boot(error) => return error.hint(),
            Self::Plan(PlanError::UnknownDisk { known, .. } | PlanError::LeftOut { known, .. }) => {
                return Some(format!("it has {}", known.join(", ")));
            }
            Self::NoTemplateFits { unlooked: 1.., .. } => {
                "`kvmsnap image info TEMPLATE --look` notes what is on a template's disks"
            }
            Self::NoTemplateFits { .. } => {
                "`kvmsnap image get` keeps one of a machine with the same disks"
            }
            Self::RemoteTree { .. } => {
                "`kvmsnap image update` takes such trees, and says what does not fit before it writes"
            }
            Self::ManyDomains { known, .. } => {
                return Some(format!("name one of {}", known.join(", ")));
            }
            Self::NoDomain { known, .. } => {
                return Some(match known.is_empty() {
                    true => "it has none at all: --connect names another libvirt".to_owned(),
                    false => format!("it has {}", known.join(", ")),
                });
            }
            Self::Restore(error) => error.hint()?,
            Self::Location(error) => error.hint()?,
            Self::Method(error) => error.hint(),
            Self::Lock(LockError::Held { .. }) => "wait until it is done",
            Self::NoName { .. } => "name it with --name",
            Self::Config(ConfigError::Invalid { problem, .. }) => return problem.hint(),
            Self::Config(ConfigError::Read { .. }) => "`kvmsnap config example` prints one",
            Self::NoJobs => "`kvmsnap config example` prints a configuration with one",
            Self::NoJob { known, .. } if !known.is_empty() => {
                return Some(format!("there is {}", known.join(", ")));
            }
            Self::StepsFailed { .. } => "`kvmsnap history` tells what came of earlier runs",
            Self::StillActive { .. } => "wait, or see `kvmsnap doctor`",
            Self::NoRepositoryGiven { known } if !known.is_empty() => {
                return Some(format!("--repository names one of {}", known.join(", ")));
            }
            Self::NoRepositoryGiven { .. } => {
                "give --repository or set KVMSNAP_REPOSITORY, or configure one: `kvmsnap config example`"
            }
            Self::NoRule => "--keep-daily 14 --keep-weekly 8 --keep-monthly 12 is a good start",
            Self::TooManyDropped { in_future: None, .. } => {
                "--dry-run shows them; if clock and rules are right, --allow-many goes ahead"
            }
            Self::TooManyDropped { .. } => {
                "mend the clock; `kvmsnap forget --snapshot` drops a snapshot that carries a wrong time"
            }
            Self::StillNeeded { .. } => {
                "`kvmsnap protect --undo` unprotects; another backup makes it neither last nor anchor"
            }
            Self::NoPasswordGiven => "give --password-file or set KVMSNAP_PASSWORD_FILE",
            Self::Password(PasswordError::NoCredential { .. }) => {
                "systemd hands it to a unit with LoadCredential=; by hand give --password-file"
            }
            Self::TooFewFiles { .. } => "`ulimit -n`, or LimitNOFILE= of the unit, allows more",
            Self::TooLittleMemory { .. } => {
                "`ulimit -v` allows more; MemoryMax= of the unit limits what is really used"
            }
            Self::Leftover(BackupError::Hypervisor(HypervisorError::Overlay(_))) => {
                "the guest goes on on its overlays: `kvmsnap purge` or the next backup brings it back"
            }
            Self::ImageLeftover(_) => {
                "the guest goes on on its overlays: `kvmsnap purge` or the next backup brings it back"
            }
            Self::Leftover(_) => "`kvmsnap doctor --repair` or the next backup mends it",
            Self::Leftovers { .. } => "`kvmsnap doctor --repair` mends it",
            Self::Catalog(CatalogError::NotFound { .. }) => "`kvmsnap list` shows what there is",
            Self::Journal(JournalError::Damaged { .. }) => {
                "it tells what a run made in a guest; move it away once you have read it"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }

    fn repository(&self) -> Option<&RepositoryError> {
        match self {
            Self::Repository(error)
            | Self::Catalog(CatalogError::Repository(error))
            | Self::Plan(PlanError::Catalog(CatalogError::Repository(error)))
            | Self::Backup(BackupError::Store(error))
            | Self::Restore(RestoreError::Repository(error)) => Some(error),
            _ => None,
        }
    }
}

fn repository_code(error: &RepositoryError) -> u8 {
    match error {
        RepositoryError::NotARepository { .. } | RepositoryError::ConfigMissing { .. } => {
            NO_REPOSITORY
        }
        RepositoryError::Backend { source } if source.is_away() => NO_REPOSITORY,
        RepositoryError::Locked { .. } => LOCKED,
        RepositoryError::WrongPassword { .. } => WRONG_PASSWORD,
        _ => FAILED,
    }
}

fn repository_hint(error: &RepositoryError) -> Option<String> {
    let hint = match error {
        RepositoryError::NotARepository { .. } => "`kvmsnap repository init` makes one",
        RepositoryError::Locked { .. } => {
            "wait until it is done; a lock whose owner died is broken by itself after 30 minutes"
        }
        RepositoryError::LockLost { .. } => {
            "nothing was recorded: run it again. Did this host sleep, or do the clocks of the hosts differ?"
        }
        RepositoryError::Backend { source } | RepositoryError::LockNotWritable { source }
            if source.is_full() =>
        {
            "free some room: nothing was lost, and what was stored already is used again"
        }
        RepositoryError::Backend { source } => store_hint(source)?,
        RepositoryError::InUseUnknown { .. } => {
            "`kvmsnap verify` tells what is damaged and whom it affects, `--repair` mends it"
        }
        RepositoryError::SnapshotNotFound { .. } | RepositoryError::SnapshotAmbiguous { .. } => {
            "`kvmsnap list` shows what there is"
        }
        RepositoryError::Damaged { file, .. } if file.kind == FileKind::Lock => {
            "reading goes on without it; `kvmsnap verify --repair` removes it once it has watched for 30 \
             minutes that nobody renews it"
        }
        RepositoryError::NoSnapshots { .. } => {
            "a backup that did not finish leaves this, and the next one uses it; otherwise, is all of \
             the folder `snapshots` there? `kvmsnap prune --allow-empty` removes the data"
        }
        RepositoryError::Damaged { .. }
        | RepositoryError::DamagedBlob { .. }
        | RepositoryError::MissingBlob { .. } => {
            "`kvmsnap verify --read-data` tells which snapshots are affected"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

fn backup_hint(error: &BackupError) -> Option<String> {
    let hint = match error {
        BackupError::Hypervisor(error) | BackupError::Read(ReadError::Hypervisor(error)) => {
            return hypervisor_hint(error);
        }
        BackupError::Quiesce(QuiesceError::Required { .. }) => {
            "`--quiesce auto` makes a crash-consistent backup instead"
        }
        BackupError::Read(ReadError::BadBlocks { .. }) => {
            "nothing was recorded: look after the storage below the image"
        }
        BackupError::Read(ReadError::Nbd { .. }) => {
            "nothing was recorded and the guest goes on; where the scratch was full or slow, \
             --scratch-dir names a better place"
        }
        BackupError::Died { .. } => {
            "nothing was recorded; if QEMU was killed, the next backup reads everything once"
        }
        BackupError::Left { .. } => "nothing was recorded: back it up where it runs now",
        _ => return None,
    };
    Some(hint.to_owned())
}

fn image_hint(error: &ImageError) -> Option<&'static str> {
    match error {
        error if error.is_full() => {
            Some("nothing was kept: make room there, or choose another place")
        }
        ImageError::NoImage { .. } => Some("`kvmsnap image list STORE` shows what there is"),
        ImageError::Name { .. } => Some(
            "a name is one part of a path, begins with neither dot nor dash, and has at most 200 bytes",
        ),
        ImageError::Exists { .. } => Some("nothing is ever written over: choose another name"),
        ImageError::Busy { .. } => Some("wait until it is done"),
        ImageError::Interrupted { .. } => {
            Some("`kvmsnap image update IMAGE --tree TREE` finishes it, and brings it up to date")
        }
        ImageError::Damaged { .. } => Some("`kvmsnap image check` tells what is damaged"),
        ImageError::Refused { source, .. } => source.hint(),
        ImageError::Tool(ToolError::Failed { words, .. }) if is_lock(words) => Some(
            "a guest uses it: name its domain instead, or copy a frozen file of `kvmsnap create`",
        ),
        ImageError::Tool(error) if error.is_limit() => Some(
            "a limit of memory, time or length ended it: the image asks for more than an honest one does",
        ),
        ImageError::Tool(ToolError::Start { .. }) => {
            Some("it is in the package qemu-utils or, `setpriv` and `prlimit`, util-linux")
        }
        _ => None,
    }
}

fn stop_hint(error: &StopError) -> Option<&'static str> {
    match error {
        StopError::StillRuns { .. } => Some(
            "nothing was recorded; should it shut down yet, it is started again. --stop-timeout waits \
             longer, --power-off switches it off then",
        ),
        StopError::GoingDown { .. } => Some("it is started again once it is off"),
        StopError::Transient { .. } | StopError::Stands { .. } => {
            Some("`--method auto` backs it up as it is")
        }
        _ => None,
    }
}

fn hypervisor_hint(error: &HypervisorError) -> Option<String> {
    let hint = match error {
        HypervisorError::Overlay(error) => error.hint()?,
        HypervisorError::Monitor { source: QmpError::NoGreeting { .. }, .. } => {
            "QEMU serves one client a socket: end the other one, or give QEMU a second monitor"
        }
        HypervisorError::Monitor { source: QmpError::NotQmp { .. }, .. } => {
            "--qmp takes the socket of `-qmp unix:SOCKET,server=on,wait=off`"
        }
        HypervisorError::Monitor { source: QmpError::Connect { .. }, .. } => {
            "is QEMU running, and may this user use its socket?"
        }
        HypervisorError::Connect { .. } => {
            "is libvirtd running, and may this user use it? --connect names another libvirt"
        }
        HypervisorError::Host { step, .. } if step.contains("scratch") => {
            "--scratch-dir names another folder for it"
        }
        HypervisorError::ScratchLow { .. } => {
            "nothing was recorded and the guest goes on; --scratch-dir names a roomier place, and \
             `--method suspend` needs none, but pauses the guest until it was read"
        }
        HypervisorError::PointInTimeLost { .. } => "nothing was recorded; back up again",
        HypervisorError::Started { .. } | HypervisorError::GuestGoesOn => {
            "nothing was recorded; back up again"
        }
        HypervisorError::Migrated { .. } => "back it up there; its dirty bitmaps went with it",
        HypervisorError::Migrating => "nothing was recorded: back it up where it runs then",
        HypervisorError::NoVolume { .. } => {
            "--disk names those that are, `--method auto` takes what is possible"
        }
        HypervisorError::SnapshotFull { .. } => {
            "nothing was recorded and the guest goes on; --lvm-size makes it larger, or give the pool room"
        }
        HypervisorError::Tool { tool: "lvcreate", .. } => {
            "--lvm-size says how large a snapshot is made; `vgs` says what is left"
        }
        HypervisorError::Host { step, .. } if step.contains("`lvs`") => "it is in the package lvm2",
        HypervisorError::ImageInUse { .. } => {
            "the domain may be starting, or another one have the same disk, also on another host"
        }
        HypervisorError::Tool { tool: "qemu-img", step, .. } if step.contains("header") => {
            "--exclude-disk leaves the disk out"
        }
        HypervisorError::Tool { tool: "qemu-storage-daemon", .. } => {
            "it is in the package qemu-system-common"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

/// The error, its causes and its hint, as they are printed: what others wrote into names moves no cursor.
pub fn describe(error: &CommandError) -> String {
    let mut text = format!("error: {error}\n");
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        let _ = writeln!(text, "caused by: {source}");
        cause = source.source();
    }
    if let Some(hint) = error.hint() {
        let _ = writeln!(text, "hint: {hint}");
    }
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}
