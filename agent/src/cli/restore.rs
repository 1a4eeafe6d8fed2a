//! `kvmsnap restore`

pub(super) mod define;
mod in_place;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use ::repository::{AnnouncedLock, Index, Repository};
use clap::{ArgGroup, Args};

use super::{Context, OpenRepository};
use crate::catalog::{Backup, Catalog, SnapshotName};
use crate::error::CommandError;
use crate::manifest::DiskManifest;
use crate::names::{DiskName, DomainName};
use crate::progress::human_bytes;
use crate::restore::plan::Place;
use crate::restore::{Format, Restore, RestoreError, Restored, Stop};
use crate::store::blocking;

/// Write the disks of a snapshot to new image files, and bring the machine back
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("target").required(true), after_help = "\
Examples:
  kvmsnap restore latest:web --to /srv/restored
  kvmsnap restore 1a2b3c4d --to /srv/restored --format raw --disk vda
  kvmsnap restore latest:web --to /var/lib/libvirt/images/web --define --start
  kvmsnap restore latest:web --pool default --define --name web-2 --dry-run
  kvmsnap restore web@2026-11-20T03:00 --in-place

Without kvmsnap: restic -r REPOSITORY dump SNAPSHOT /web/vda.raw > vda.raw")]
pub struct RestoreArgs {
    /// An id, a unique prefix of one, latest:DOMAIN, or DOMAIN@TIME
    snapshot: SnapshotName,
    /// The folder for the images; nothing in it is written over
    #[arg(long, value_name = "FOLDER", group = "target")]
    to: Option<PathBuf>,
    /// A storage pool of libvirt for the images, of the type dir
    #[arg(long, value_name = "POOL", group = "target")]
    pool: Option<String>,
    /// Exchange the images of the domain, which must be shut off, and nothing else of it; the old ones
    /// are kept
    #[arg(long, group = "target", conflicts_with_all = ["define", "format"])]
    in_place: bool,
    /// The images' format
    #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
    format: Format,
    /// Only this disk (can be repeated)
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskName>,
    /// Define the machine in libvirt, with a new uuid and new MAC addresses
    #[arg(long)]
    define: bool,
    /// Start it
    #[arg(long, requires = "define")]
    start: bool,
    /// Give it another name
    #[arg(long, value_name = "NAME", requires = "define")]
    name: Option<DomainName>,
    /// Keep its uuid and MAC addresses, where no domain here has them
    #[arg(long, requires = "define")]
    keep_identity: bool,
    /// Show what would be done
    #[arg(long)]
    dry_run: bool,
}

/// Runs it.
///
/// # Errors
/// Whatever the restore says.
pub async fn run(args: RestoreArgs, context: &Context) -> Result<(), CommandError> {
    let open = context.until_interrupted(context.open_to_read_at_once()).await?;
    let OpenRepository { repository, lock, index } = open;
    let stop = Stop::default();
    let stopper = stop.clone();
    // Its lock settles meanwhile, for nothing is written to the repository, and is held to the end.
    let settling = tokio::task::spawn_blocking(move || {
        let settled = lock.map(AnnouncedLock::settle).transpose();
        settled.inspect_err(|_| stopper.stop())
    });
    let work = async {
        let (repository_again, index_again) = (repository.clone(), Arc::clone(&index));
        let snapshot = args.snapshot.clone();
        let find =
            blocking(move || Ok(Catalog::new(&repository_again, index_again).find(&snapshot)?));
        let backup = Arc::new(context.until_interrupted(find).await?);
        let source = Source { repository, index, backup, stop };
        match args.in_place {
            true => in_place::run(&args, source, context).await,
            false => define::run(&args, source, context).await,
        }
    };
    match (work.await, settling.await.expect("it does not panic")) {
        (Err(_), Err(error)) => Err(error.into()),
        // Every chunk of a whole disk was verified.
        (outcome, _) => outcome,
    }
}

/// A backup in a repository that is open.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub repository: Repository,
    pub index: Arc<Index>,
    pub backup: Arc<Backup>,
    /// Ends a restore.
    pub stop: Stop,
}

impl Source {
    fn catalog(&self) -> Catalog {
        Catalog::new(&self.repository, Arc::clone(&self.index))
    }
}

/// Disks that are to be restored.
#[derive(Debug, Clone)]
pub(super) struct Disks {
    pub place: Place,
    pub folder_mode: u32,
    pub format: Format,
    pub disks: Vec<DiskName>,
    pub dry_run: bool,
}

impl Disks {
    /// Restores them, or says what would be.
    pub(super) async fn restore(
        self,
        source: &Source,
        context: &Context,
    ) -> Result<Vec<Restored>, CommandError> {
        let stop = source.stop.clone();
        let (progress, source) = (context.progress.clone(), source.clone());
        let work = blocking(move || {
            let restore = Restore {
                repository: &source.repository,
                index: Arc::clone(&source.index),
                catalog: &source.catalog(),
                backup: &source.backup,
                place: &self.place,
                folder_mode: self.folder_mode,
                format: self.format,
                disks: &self.disks,
                progress: &progress,
                stop: source.stop.clone(),
            };
            if !self.dry_run {
                return Ok(restore.run()?);
            }
            let plan = restore.plan()?.into_iter();
            let would_be = |(disk, path): (&DiskManifest, PathBuf)| Restored {
                disk: disk.target.clone(),
                path,
                size: disk.size,
            };
            Ok(plan.map(would_be).collect())
        });
        tokio::pin!(work);
        let outcome = tokio::select! {
            outcome = &mut work => outcome,
            () = context.interrupted() => {
                stop.stop();
                // It ends between two chunks and removes what it wrote.
                work.await.and(Err(RestoreError::Interrupted.into()))
            }
        };
        context.progress.finish();
        outcome
    }
}

/// Tells what was restored, or would be.
fn print(
    source: &Source,
    restored: &[Restored],
    dry_run: bool,
    context: &Context,
) -> Result<(), CommandError> {
    for skipped in source.backup.manifest.skipped.iter().filter(|skipped| skipped.is_disk) {
        tracing::warn!("disk `{}` is not in this snapshot: {}", skipped.device, skipped.reason);
    }
    let mut out = std::io::stdout().lock();
    for Restored { disk, path, size } in restored {
        if context.global.json {
            let line = serde_json::json!({
                "snapshot": source.backup.id.to_string(), "target": disk, "path": path,
                "size": size, "restored": !dry_run,
            });
            context.print_json(&mut out, &line)?;
        } else {
            let verb = if dry_run { "would be restored" } else { "restored" };
            writeln!(out, "{disk}: {verb} to {} ({})", path.display(), human_bytes(*size))?;
        }
    }
    Ok(())
}
