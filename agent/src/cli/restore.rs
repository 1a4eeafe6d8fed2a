//! `kvmsnap restore`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use ::repository::{AnnouncedLock, FileId, Index, Repository};
use clap::Args;

use super::{Context, OpenRepository};
use crate::catalog::{Catalog, SnapshotName};
use crate::error::CommandError;
use crate::manifest::DiskManifest;
use crate::names::DiskName;
use crate::progress::{Progress, human_bytes};
use crate::restore::{Format, Restore, RestoreError, Restored, Stop};
use crate::store::blocking;

/// Write the disks of a snapshot to new image files
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap restore latest:web --to /srv/restored
  kvmsnap restore 1a2b3c4d --to /srv/restored --format raw --disk vda

Without kvmsnap: restic -r REPOSITORY dump SNAPSHOT /web/vda.raw > vda.raw")]
pub struct RestoreArgs {
    /// An id, a unique prefix of one, latest:DOMAIN, or DOMAIN@TIME
    snapshot: SnapshotName,
    /// The folder for the images; nothing in it is written over
    #[arg(long, value_name = "FOLDER")]
    to: PathBuf,
    /// The images' format
    #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
    format: Format,
    /// Only this disk (can be repeated)
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskName>,
    /// Show what would be written
    #[arg(long)]
    dry_run: bool,
}

/// Runs it.
///
/// # Errors
/// Whatever the restore says.
pub async fn run(args: RestoreArgs, context: &Context) -> Result<(), CommandError> {
    let stop = Stop::default();
    let open = context.until_interrupted(context.open_to_read_at_once()).await?;
    let (progress, stopper, dry_run) = (context.progress.clone(), stop.clone(), args.dry_run);
    let work = blocking(move || {
        let OpenRepository { repository, lock, index } = open;
        std::thread::scope(|scope| {
            // Its lock settles meanwhile: nothing is written to the repository.
            let settling = scope.spawn(|| {
                let settled = lock.map(AnnouncedLock::settle).transpose();
                settled.inspect_err(|_| stopper.stop())
            });
            let restored = restore(&args, &repository, &index, &progress, &stopper);
            let settled = settling.join().expect("it does not panic");
            match (restored, settled) {
                (Err(_), Err(error)) => Err(error.into()),
                // Every chunk of a whole disk was verified.
                (restored, _) => restored,
            }
        })
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
    let (id, files) = outcome?;
    let mut out = std::io::stdout().lock();
    for Restored { disk, path, size } in files {
        if context.global.json {
            let line = serde_json::json!({
                "snapshot": id.to_string(), "target": disk, "path": path, "size": size,
                "restored": !dry_run,
            });
            context.print_json(&mut out, &line)?;
        } else {
            let verb = if dry_run { "would be restored" } else { "restored" };
            writeln!(out, "{disk}: {verb} to {} ({})", path.display(), human_bytes(size))?;
        }
    }
    Ok(())
}

/// The snapshot, and the files that were written or would be.
fn restore(
    args: &RestoreArgs,
    repository: &Repository,
    index: &Arc<Index>,
    progress: &Progress,
    stop: &Stop,
) -> Result<(FileId, Vec<Restored>), CommandError> {
    let catalog = Catalog::new(repository, Arc::clone(index));
    let backup = catalog.find(&args.snapshot)?;
    let restore = Restore {
        repository,
        index: Arc::clone(index),
        catalog: &catalog,
        backup: &backup,
        folder: &args.to,
        format: args.format,
        disks: &args.disk,
        progress,
        stop: stop.clone(),
    };
    let would_be = |(disk, path): (&DiskManifest, PathBuf)| Restored {
        disk: disk.target.clone(),
        path,
        size: disk.size,
    };
    let files = match args.dry_run {
        true => restore.plan()?.into_iter().map(would_be).collect(),
        false => restore.run()?,
    };
    Ok((backup.id, files))
}
