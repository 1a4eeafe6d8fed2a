//! `kvmsnap protect`

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::Context;
use crate::catalog::{Catalog, SnapshotName, short};
use crate::error::CommandError;
use crate::retention::PROTECTED;

/// Protect snapshots from `kvmsnap forget`, or no longer
///
/// A protected snapshot carries the tag `protected`. As with restic's own change of tags, the snapshot gets
/// another id.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap protect latest:web
  kvmsnap protect web@2026-11-20T03:00
  kvmsnap protect --undo 1a2b3c4d")]
pub struct ProtectArgs {
    /// The snapshots
    #[arg(value_name = "SNAPSHOT", required = true)]
    snapshots: Vec<SnapshotName>,
    /// Take the protection away
    #[arg(long)]
    undo: bool,
    /// So many seconds others have to let go of the repository
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u64,
}

/// Runs it.
///
/// # Errors
/// Whatever the repository says.
pub async fn run(args: ProtectArgs, context: &Context) -> Result<(), CommandError> {
    let repository = context.open().await?;
    let progress = context.progress.clone();
    let undo = args.undo;
    let changed = context
        .until_stopped(move |stop| {
            let patience = Duration::from_secs(args.wait);
            let _lock = super::lock_exclusively(&repository, patience, &progress, stop)?;
            let catalog = Catalog::new(&repository, Arc::new(repository.index()?));
            // All of them are found before the first is changed.
            let found = args.snapshots.iter().map(|name| Ok(catalog.find(name)?.id));
            let found = found.collect::<Result<Vec<_>, CommandError>>()?;
            let change = |id| {
                let changed = repository.retag_snapshot(&id, |tags| {
                    tags.retain(|tag| tag != PROTECTED);
                    tags.extend((!undo).then(|| PROTECTED.to_owned()));
                })?;
                Ok((id, changed))
            };
            found.into_iter().map(change).collect::<Result<Vec<_>, CommandError>>()
        })
        .await?;
    context.progress.finish();
    let mut out = std::io::stdout().lock();
    for (before, id) in changed {
        if context.global.json {
            let line = serde_json::json!({
                "id": id, "short_id": short(&id), "before": before, "protected": !undo,
            });
            context.print_json(&mut out, &line)?;
        } else {
            let state = if undo { "no longer protected" } else { "protected" };
            writeln!(out, "{} is {state}, and is now called {}", short(&before), short(&id))?;
        }
    }
    Ok(())
}
