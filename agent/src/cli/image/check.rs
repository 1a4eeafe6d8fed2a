//! `kvmsnap image check`

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use image_tools::check::{self, Problem};
use image_tools::compare::{Event, Request};
use image_tools::folder::Image;
use image_tools::rsync::{Change, Tree};
use serde_json::json;

use super::{ApplianceArgs, Context};
use crate::error::CommandError;
use crate::image::look;
use crate::names::printable;
use crate::store::blocking;

/// Check an image against its record: every byte, and what the disks' headers and tables say
///
/// On request also what is inside: its file systems, and whether its files are those of a tree. That is done in
/// an appliance of libguestfs, and the image stays as it is. Differences that `image update` makes itself are
/// counted as such and are no problem: what grub-install writes, an initramfs that was made anew, /.autorelabel,
/// a missing /tmp, and the times of the folders above. --json names each of them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap image check /srv/templates/web
  kvmsnap image check /srv/templates/web --file-systems
  kvmsnap image check /srv/images/shop --tree /srv/rsync/shop")]
pub struct CheckArgs {
    /// The image's folder
    image: PathBuf,
    /// Have its file systems checked, too
    #[arg(long)]
    file_systems: bool,
    /// Compare every file, its content and all that belongs to it, with a tree: a folder, HOST:PATH by ssh, or
    /// rsync://HOST/MODULE
    #[arg(long, value_name = "TREE")]
    tree: Option<String>,
    /// Do not compare what matches (can be repeated); as with `image update`
    #[arg(long, value_name = "PATTERN", requires = "tree")]
    exclude: Vec<String>,
    #[command(flatten)]
    appliance: ApplianceArgs,
}

/// Runs it.
///
/// # Errors
/// [`CommandError::Damaged`] after telling of each problem; whatever keeps it from looking.
pub async fn run(args: CheckArgs, context: &Context) -> Result<(), CommandError> {
    let tree = args.tree.as_deref().map(Tree::parse).transpose()?;
    let image = blocking(move || Image::open(&args.image)).await?;
    let mut problems = check_files(&image, context).await?;
    // What is inside a damaged disk says nothing.
    if problems == 0 && (args.file_systems || tree.is_some()) {
        let request = Request {
            drives: Vec::new(),
            file_systems: args.file_systems,
            tree,
            excludes: args.exclude,
            appliance: args.appliance.options(),
        };
        problems += check_inside(&image, request, context).await?;
    }
    match problems {
        0 => Ok(()),
        problems => Err(CommandError::Damaged { problems }),
    }
}

/// Checks each file, tells of it, and returns how many problems there are.
async fn check_files(image: &Image, context: &Context) -> Result<usize, CommandError> {
    let mut problems = 0;
    for disk in &image.record().disks {
        context.progress.bytes(&format!("checking {}", disk.file), disk.file_len);
        let progress = context.progress.clone();
        let found = check::disk(image, disk, move |bytes| progress.read(bytes)).await?;
        problems += found.len();
        print(&disk.file, &found, context)?;
    }
    for file in &image.record().files {
        let found = check::other(image, file)?;
        problems += found.len();
        print(&file.file, &found, context)?;
    }
    context.progress.finish();
    Ok(problems)
}

/// Has an appliance look into the disks, tells what it finds, and returns how many problems there are.
async fn check_inside(
    image: &Image,
    request: Request,
    context: &Context,
) -> Result<usize, CommandError> {
    let compares = request.tree.is_some();
    let (mut problems, mut different) = (0, 0);
    // Why an update makes a difference, and how many there are.
    let mut excused: BTreeMap<&str, usize> = BTreeMap::new();
    let mut failed = None;
    let outcome = look::examine(image, request, |event| {
        match &event {
            Event::Stage(stage) => return context.progress.phase(stage),
            Event::FileSystem { problem, .. } => problems += usize::from(problem.is_some()),
            Event::Difference { made_by_update: None, .. } => different += 1,
            Event::Difference { made_by_update: Some(why), .. } => {
                *excused.entry(why).or_default() += 1;
                if !context.global.json {
                    return;
                }
            }
        }
        failed = failed.take().or_else(|| print_inside(&event, context).err());
    })
    .await;
    context.progress.finish();
    outcome?;
    failed.map_or(Ok(()), Err)?;
    if compares && !context.global.json {
        let verdict = match different {
            0 => "those of the tree".to_owned(),
            different => format!("{different} differ from the tree"),
        };
        writeln!(std::io::stdout(), "files: {verdict}")?;
        for (why, count) in excused {
            writeln!(std::io::stdout(), "  beside {count} that the update made: {why}")?;
        }
    }
    Ok(problems + different)
}

fn print_inside(event: &Event<'_>, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    match event {
        Event::FileSystem { device, kind, problem } => {
            if context.global.json {
                let line = json!({
                    "file_system": device, "kind": kind, "ok": problem.is_none(),
                    "problem": problem,
                });
                return context.print_json(&mut out, &line);
            }
            writeln!(
                out,
                "{}, {}: {}",
                printable(device),
                printable(kind),
                match problem {
                    None => "good",
                    Some(_) => "damaged",
                }
            )?;
            for line in problem.iter().flat_map(|problem| problem.lines()) {
                writeln!(out, "  {}", printable(line))?;
            }
        }
        Event::Difference { item, made_by_update } => {
            if context.global.json {
                let change = match item.change {
                    Change::Added => "missing",
                    Change::Content => "content",
                    Change::Metadata => "attributes",
                    Change::Deleted => "extra",
                };
                let line = json!({
                    "path": item.path, "difference": change, "made_by_update": made_by_update,
                });
                return context.print_json(&mut out, &line);
            }
            let words = match item.change {
                Change::Added => "missing in the image",
                Change::Content => "another content",
                Change::Metadata => "another owner, mode, time or attribute",
                Change::Deleted => "not in the tree",
            };
            writeln!(out, "{}: {words}", printable(&item.path))?;
        }
        Event::Stage(_) => {}
    }
    Ok(())
}

fn print(file: &str, problems: &[Problem], context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    if context.global.json {
        let words: Vec<_> = problems.iter().map(ToString::to_string).collect();
        let damaged: Vec<_> = problems.iter().filter_map(damaged).flatten().collect();
        let line = json!({
            "file": file, "ok": problems.is_empty(), "problems": words, "damaged": damaged,
        });
        return context.print_json(&mut out, &line);
    }
    if problems.is_empty() {
        writeln!(out, "{}: good", printable(file))?;
    }
    for problem in problems {
        writeln!(out, "{}: {}", printable(file), printable(&problem.to_string()))?;
    }
    Ok(())
}

/// The first byte of each damaged range, and the one behind its last.
fn damaged(problem: &Problem) -> Option<Vec<[u64; 2]>> {
    match problem {
        Problem::Damaged { ranges } => {
            Some(ranges.iter().map(|range| [range.start, range.end]).collect())
        }
        _ => None,
    }
}
