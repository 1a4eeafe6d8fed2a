//! `kvmsnap prune`

use std::cell::Cell;
use std::io::Write;
use std::mem::discriminant;
use std::time::Duration;

use ::repository::{FileId, PruneOptions, PruneProgress, PruneReport, Repository, RepositoryError};
use clap::Args;

use super::Context;
use crate::catalog::short;
use crate::error::CommandError;
use crate::progress::{Progress, human_bytes};
use crate::share::Share;
use crate::units::parse_bytes;

/// Free the room of what no snapshot needs
///
/// The long part, which copies what is needed of packs that are mostly waste, runs beside backups of other
/// hosts. Only to take away what nothing needs it waits until it is alone with the repository; backups that
/// start meanwhile wait for it. It may be interrupted at any time: every snapshot stays whole.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap prune --dry-run
  kvmsnap prune --max-unused 10% --max-repack 50GiB")]
pub struct PruneArgs {
    /// So much waste may stay, of what stays
    #[arg(long, value_name = "SHARE", default_value = "5%")]
    max_unused: Share,
    /// Copy at most so many bytes of packs, like 50GiB; the next prune goes on
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    max_repack: Option<u64>,
    /// Remove all data where there is no snapshot at all
    #[arg(long)]
    allow_empty: bool,
    /// Do nothing where there is no snapshot at all, as after a first backup that did not finish
    #[arg(long, conflicts_with = "allow_empty")]
    skip_empty: bool,
    /// Only say what would be freed
    #[arg(long)]
    dry_run: bool,
    /// So many seconds others have to let go of the repository
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    wait: u64,
}

/// Runs it.
///
/// # Errors
/// Whatever the repository says, and [`CommandError::Damaged`] when damaged packs were left as they are.
pub async fn run(args: PruneArgs, context: &Context) -> Result<(), CommandError> {
    let mut options = PruneOptions::default();
    options.max_unused = args.max_unused.percent();
    options.max_repack = args.max_repack.unwrap_or(u64::MAX);
    options.allow_empty = args.allow_empty;
    options.dry_run = args.dry_run;
    options.patience = Duration::from_secs(args.wait);
    match prune(context.open().await?, options, context).await {
        Err(CommandError::Repository(RepositoryError::NoSnapshots { packs }))
            if args.skip_empty =>
        {
            print_skipped(packs, context)
        }
        outcome => outcome,
    }
}

fn print_skipped(packs: u64, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    if context.global.json {
        let line = serde_json::json!({"snapshots": 0, "packs": packs, "skipped": true});
        return context.print_json(&mut out, &line);
    }
    writeln!(out, "no snapshot: the next backup uses what is in {packs} packs, which stay")?;
    Ok(())
}

/// Prunes, and prints what came of it.
///
/// # Errors
/// Those of [`run`].
pub async fn prune(
    repository: Repository,
    options: PruneOptions,
    context: &Context,
) -> Result<(), CommandError> {
    let (progress, dry_run) = (context.progress.clone(), options.dry_run);
    let report = context
        .until_stopped(move |stop| {
            let last = Cell::new(None);
            Ok(repository.prune(&options, &|step| {
                let is_new = last.replace(Some(discriminant(&step))) != Some(discriminant(&step));
                tell(&progress, &step, is_new);
                stop.check()
            })?)
        })
        .await?;
    context.progress.finish();
    print(&report, dry_run, context)?;
    match report.damaged.len() {
        0 => Ok(()),
        problems => Err(CommandError::Damaged { problems }),
    }
}

fn tell(progress: &Progress, step: &PruneProgress, is_new: bool) {
    match step {
        PruneProgress::Repacking { total, .. } if is_new => progress.count("copying packs", *total),
        PruneProgress::Repacking { done, .. } => progress.reach(*done),
        PruneProgress::Waiting { held } if is_new => progress.phase(&format!("waiting: {held}")),
        PruneProgress::Metadata if is_new => progress.phase("reading snapshots and index"),
        PruneProgress::Trees { .. } if is_new => progress.phase("finding out what is in use"),
        PruneProgress::Removing { .. } if is_new => {
            progress.phase("taking away what nothing needs");
        }
        _ => {}
    }
}

fn print(report: &PruneReport, dry_run: bool, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    let freed = i128::from(report.bytes_removed) - i128::from(report.bytes_repacked);
    if context.global.json {
        let line = serde_json::json!({
            "dry_run": dry_run, "snapshots": report.snapshots, "packs": report.packs,
            "bytes": report.bytes, "packs_repacked": report.packs_repacked,
            "bytes_repacked": report.bytes_repacked, "packs_removed": report.packs_removed,
            "packs_unreferenced": report.packs_unreferenced,
            "bytes_removed": report.bytes_removed, "bytes_freed": freed,
            "bytes_unused": report.bytes_unused,
            "index_files_written": report.index_files_written,
            "index_files_removed": report.index_files_removed,
            "damaged": report.damaged.iter().map(FileId::to_hex).collect::<Vec<_>>(),
            "store_full": report.is_full,
        });
        return context.print_json(&mut out, &line);
    }
    let [would_be, is] = if dry_run { ["would be ", "would be"] } else { ["", "is"] };
    let freed = human_bytes(u64::try_from(freed).unwrap_or(0));
    let (packs, bytes) = (report.packs, human_bytes(report.bytes));
    writeln!(out, "{} snapshots in {packs} packs ({bytes})", report.snapshots)?;
    writeln!(
        out,
        "{} packs {would_be}removed, what is needed of {} of them copied ({})",
        report.packs_removed,
        report.packs_repacked,
        human_bytes(report.bytes_repacked)
    )?;
    let unused = human_bytes(report.bytes_unused);
    writeln!(out, "{freed} {is} freed, {unused} of waste stay")?;
    if report.is_full {
        tracing::warn!("the store became full: prune once more with the room that was freed");
    }
    for pack in &report.damaged {
        tracing::error!("pack {} is damaged and stays as it is", short(pack));
    }
    Ok(())
}
