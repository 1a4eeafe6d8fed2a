//! `kvmsnap verify`

use std::cell::Cell;
use std::io::Write;
use std::mem::discriminant;
use std::path::PathBuf;
use std::sync::Arc;

use ::repository::{
    AnnouncedLock, CheckOptions, CheckProgress, CheckReport, FileId, Problem, RepairOptions,
    RepairProgress, RepairReport, Repository, SnapshotRef,
};
use clap::Args;

use super::{Context, Wanted, announce_lock_to_read};
use crate::catalog::{Catalog, SnapshotName, short};
use crate::error::CommandError;
use crate::progress::human_bytes;
use crate::run::damage::Mark;
use crate::share::Share;
use crate::store::blocking;

/// Prove that backups can be restored, and name the snapshots that cannot
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap verify                    every chunk of every snapshot is where the index says
  kvmsnap verify --read-data        … and has the content its name promises
  kvmsnap verify --read-data=10%    … for a random tenth of the packs
  kvmsnap verify --read-data=3/30   … for the third of thirty parts, which together are all
  kvmsnap verify --read-data --repair --from offsite
                                    … and mend what is damaged, with what a replica has")]
pub struct VerifyArgs {
    /// Only tell of these snapshots
    snapshots: Vec<SnapshotName>,
    /// Read and verify the data, all of it or a share
    #[arg(long, value_name = "SHARE", num_args = 0..=1, require_equals = true,
          default_missing_value = "100%", value_parser = parse_read)]
    read_data: Option<Read>,
    /// Save what is good of damaged packs, and have the next backup store anew what is not
    #[arg(long)]
    repair: bool,
    /// Fetch what is damaged or missing from this repository
    #[arg(long, value_name = "REPOSITORY", requires = "repair")]
    from: Option<String>,
    /// The password of that repository; by default that of this one
    #[arg(long, value_name = "FILE", requires = "from")]
    from_password_file: Option<PathBuf>,
}

/// What is read.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Read {
    Share(Share),
    /// One part, from 0, of so many.
    Part(u32, u32),
}

impl Read {
    fn is_all(self) -> bool {
        match self {
            Self::Share(share) => share.percent() >= 100.0,
            Self::Part(_, of) => of == 1,
        }
    }
}

/// Runs it.
///
/// # Errors
/// [`CommandError::Damaged`] after naming each problem.
pub async fn run(args: VerifyArgs, context: &Context) -> Result<(), CommandError> {
    let repository = context.open().await?;
    let (wanted, read) = (args.snapshots, args.read_data);
    let mark = Mark::of(&context.global.state_dir, repository.id());
    let known = mark.look().filter(|_| wanted.is_empty() && read.is_some_and(Read::is_all));
    let mut report = look(&repository, &wanted, read, context).await?;
    let replica = args.from.map(|name| context.another(&name, args.from_password_file.as_deref()));
    let replica = replica.transpose()?;
    let mut left = 0;
    if args.repair && !report.is_clean() {
        let mended = mend(&repository, report, replica, context).await?;
        print_mended(&mended, context)?;
        left = mended.unreadable.len();
        // What was mended was read; whom the rest affects shows without.
        report = look(&repository, &wanted, None, context).await?;
    }
    match report.problems.len().max(left) {
        0 => {
            if let Some(Err(error)) = known.map(|known| mark.take_away(&known)) {
                tracing::warn!(%error, "the next run reads again what it found to be damaged");
            }
            Ok(())
        }
        problems => Err(CommandError::Damaged { problems }),
    }
}

/// Checks the repository and prints what concerns the snapshots that were named; the report has no more.
async fn look(
    repository: &Repository,
    names: &[SnapshotName],
    read: Option<Read>,
    context: &Context,
) -> Result<CheckReport, CommandError> {
    let (mut report, wanted) =
        context.until_interrupted(check(repository, names, read, context)).await?;
    context.progress.finish();
    let concerns = |problem: &Problem| {
        // What affects nobody that is known may affect anybody.
        wanted.is_empty()
            || problem.affected.is_empty()
            || problem.affected.iter().any(|snapshot| wanted.contains(&snapshot.id))
    };
    report.problems.retain(concerns);
    print(&report, repository.id(), context)?;
    Ok(report)
}

async fn check(
    repository: &Repository,
    names: &[SnapshotName],
    read: Option<Read>,
    context: &Context,
) -> Result<(CheckReport, Vec<FileId>), CommandError> {
    let reading = repository.clone();
    let lock = blocking(move || announce_lock_to_read(&reading)).await?;
    let settling = async {
        let lock = blocking(move || lock.map(AnnouncedLock::settle).transpose()).await?;
        Ok::<_, CommandError>(lock)
    };
    let options = match read {
        None => CheckOptions::default(),
        Some(Read::Share(share)) => CheckOptions::new(Some(share.percent())),
        Some(Read::Part(part, of)) => CheckOptions::part(part, of),
    };
    let (repository, progress, names) =
        (repository.clone(), context.progress.clone(), names.to_vec());
    let checking = blocking(move || {
        let (index, _) = repository.index_of_readable()?;
        let catalog = Catalog::new(&repository, Arc::new(index));
        let wanted = names.iter().map(|name| catalog.find(name).map(|backup| backup.id));
        let wanted = wanted.collect::<Result<Vec<_>, _>>()?;
        let told = |step| tell(&progress, step);
        let report = repository.check(&options, &told)?;
        Ok::<_, CommandError>((report, wanted))
    });
    // Held here and not by the thread that reads: an interrupted check lets go of it at once.
    let (_lock, checked) = tokio::try_join!(settling, checking)?;
    Ok(checked)
}

/// Mends what was found.
async fn mend(
    repository: &Repository,
    found: CheckReport,
    replica: Option<Wanted>,
    context: &Context,
) -> Result<RepairReport, CommandError> {
    let (repository, progress) = (repository.clone(), context.progress.clone());
    let mended = context
        .until_stopped(move |stop| {
            let replica = replica.map(|wanted| wanted.open()).transpose()?;
            let options = RepairOptions::default();
            let last = Cell::new(None);
            let step = |step: RepairProgress| {
                if last.replace(Some(discriminant(&step))) != Some(discriminant(&step)) {
                    match &step {
                        RepairProgress::Waiting { held } => {
                            progress.phase(&format!("waiting: {held}"));
                        }
                        _ => progress.phase("mending what is damaged"),
                    }
                }
                stop.check()
            };
            Ok(repository.repair(&found, replica.as_ref(), &options, &step)?)
        })
        .await?;
    context.progress.finish();
    Ok(mended)
}

fn print_mended(mended: &RepairReport, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    if context.global.json {
        let line = serde_json::json!({
            "repaired_packs": mended.packs, "repaired_index_files": mended.index_files,
            "blobs_saved": mended.blobs_saved, "blobs_fetched": mended.blobs_fetched,
            "blobs_lost": mended.blobs_lost, "unreadable_packs": mended.unreadable,
        });
        return context.print_json(&mut out, &line);
    }
    let RepairReport { packs, index_files, blobs_saved, blobs_fetched, blobs_lost, .. } = mended;
    writeln!(
        out,
        "mended {packs} packs and {index_files} index files: {blobs_saved} blobs saved, \
         {blobs_fetched} fetched, {blobs_lost} lost"
    )?;
    if *blobs_lost > 0 {
        tracing::warn!("the next backup of each guest stores what it still has of what was lost");
    }
    Ok(())
}

fn tell(progress: &crate::progress::Progress, step: CheckProgress) {
    match step {
        CheckProgress::Trees { done: 0 } => progress.phase("checking trees"),
        CheckProgress::Packs { done: 0, total, .. } => progress.count("checking packs", total),
        CheckProgress::Packs { done, .. } => progress.reach(done),
        _ => {}
    }
}

fn print(report: &CheckReport, id: &str, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    for problem in &report.problems {
        let affected: Vec<_> = problem.affected.iter().map(|s| s.id.to_string()).collect();
        if context.global.json {
            let line = serde_json::json!({
                "problem": problem.defect.to_string(),
                "file": problem.file.map(|file| file.to_string()),
                "blob": problem.blob.map(|blob| blob.to_string()),
                "snapshots": affected,
            });
            context.print_json(&mut out, &line)?;
        } else {
            let place = match (problem.file, problem.blob) {
                (Some(file), _) => file.to_string(),
                (None, Some(blob)) => format!("blob {blob}"),
                (None, None) => "repository".to_owned(),
            };
            writeln!(out, "{place}: {}", problem.defect)?;
            for snapshot in &problem.affected {
                writeln!(out, "  affects {}", describe(snapshot))?;
            }
        }
    }
    if report.has_only_data() {
        tracing::warn!(
            "there is not one snapshot, but data: a backup did not finish, or all are lost"
        );
    }
    if context.global.json {
        let line = serde_json::json!({
            "snapshots": report.snapshots, "packs": report.packs, "packs_read": report.packs_read,
            "bytes_read": report.bytes_read, "problems": report.problems.len(),
            "unreferenced_packs": report.unreferenced_packs.len(),
            "only_data": report.has_only_data(), "repository": id,
        });
        return context.print_json(&mut out, &line);
    }
    let read = match report.packs_read {
        0 => "their data was not read".to_owned(),
        packs => format!("{packs} of them read ({})", human_bytes(report.bytes_read)),
    };
    let (snapshots, packs) = (report.snapshots, report.packs);
    let found = report.problems.len();
    writeln!(out, "{snapshots} snapshots, {packs} packs, {read}: {found} problems")?;
    if !report.unreferenced_packs.is_empty() {
        let count = report.unreferenced_packs.len();
        writeln!(out, "{count} packs of runs that did not finish; harmless, a prune frees them")?;
    }
    Ok(())
}

fn describe(snapshot: &SnapshotRef) -> String {
    let time = snapshot.time.map_or("at an unknown time".to_owned(), super::list::local_time);
    format!("{} {time} {}", short(&snapshot.id), snapshot.paths.join(" "))
}

fn parse_read(text: &str) -> Result<Read, String> {
    if let Some((part, of)) = text.split_once('/') {
        return match (part.parse::<u32>(), of.parse::<u32>()) {
            (Ok(part @ 1..), Ok(of)) if part <= of => Ok(Read::Part(part - 1, of)),
            _ => Err("use a part like 3/30".to_owned()),
        };
    }
    match text.parse::<Share>() {
        Ok(share) if share.is_nothing() => Err("use a share above 0%".to_owned()),
        share => share.map(Read::Share).map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_a_share_or_a_part() {
        assert_eq!(parse_read("3/30"), Ok(Read::Part(2, 30)));
        assert_eq!(parse_read("1/1"), Ok(Read::Part(0, 1)));
        assert!(matches!(parse_read("10%"), Ok(Read::Share(_))));
        let is_all = |text| parse_read(text).unwrap().is_all();
        assert!(is_all("1/1") && is_all("100%") && !is_all("99.9%") && !is_all("1/2"));
        for text in ["0/3", "4/3", "/", "a/b", "1/0", "0%"] {
            assert!(parse_read(text).is_err(), "{text}");
        }
    }
}
