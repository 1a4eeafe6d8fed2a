//! `kvmsnap image check`

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use image_tools::check::{self, Problem};
use image_tools::folder::Image;

use super::Context;
use crate::error::CommandError;
use crate::names::printable;
use crate::store::blocking;

/// Check an image against its record: every byte, and what the disks' headers and tables say
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap image check /srv/templates/web
  kvmsnap image check /srv/templates/web --json")]
pub struct CheckArgs {
    /// The image's folder
    image: PathBuf,
}

/// Runs it.
///
/// # Errors
/// [`CommandError::Damaged`] after telling of each problem; whatever keeps it from looking.
pub async fn run(args: CheckArgs, context: &Context) -> Result<(), CommandError> {
    let image = blocking(move || Image::open(&args.image)).await?;
    let problems = check_files(&image, context).await?;
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

fn print(file: &str, problems: &[Problem], context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    if context.global.json {
        let words: Vec<_> = problems.iter().map(ToString::to_string).collect();
        let damaged: Vec<_> = problems.iter().filter_map(damaged).flatten().collect();
        let line = serde_json::json!({
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
