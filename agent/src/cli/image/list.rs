//! `kvmsnap image list`

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use comfy_table::{Table, presets};
use image_tools::ImageError;
use image_tools::flavour::Flavour;
use image_tools::folder::{self, Unfinished};
use image_tools::record::{BootSign, BootTrial, DiskFile};

use super::{Context, ImageLine};
use crate::cli::list::local_time;
use crate::error::{CommandError, describe};
use crate::names::printable;
use crate::progress::human_bytes;
use crate::store::blocking;

/// List the images in a folder
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap image list /srv/templates
  kvmsnap image list /srv/templates --json | jq -r .folder")]
pub struct ListArgs {
    /// The folder that holds a folder for each image
    store: PathBuf,
}

/// Runs it.
///
/// # Errors
/// When the folder cannot be listed, and [`CommandError::UnusableImages`] after listing the others.
pub async fn run(args: ListArgs, context: &Context) -> Result<(), CommandError> {
    let look = move || Ok((folder::list(&args.store)?, folder::unfinished(&args.store)?));
    let ((images, unusable), unfinished) = blocking::<_, ImageError>(look).await?;
    let mut out = std::io::stdout().lock();
    if context.global.json {
        for image in &images {
            context.print_json(&mut out, &ImageLine::new(image))?;
        }
    } else {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "NAME", "MACHINE", "TIME", "DISKS", "SIZE", "STORED", "FLAVOUR", "BOOTED",
        ]);
        for image in &images {
            let record = image.record();
            let sum = |field: fn(&DiskFile) -> u64| {
                human_bytes(record.disks.iter().map(field).fold(0, u64::saturating_add))
            };
            table.add_row([
                printable(&image.name()),
                printable(&record.machine),
                local_time(record.time),
                record.disks.len().to_string(),
                sum(|disk| disk.size),
                sum(|disk| disk.file_len),
                record.flavour.as_ref().map_or("-".to_owned(), in_short),
                record.boot.as_ref().map_or("-", trial).to_owned(),
            ]);
        }
        writeln!(out, "{}", table.trim_fmt())?;
    }
    for left in &unfinished {
        match left {
            Unfinished::Part(name) => tracing::warn!(
                "{}: a part that a killed run has left; the next image of this name removes it",
                printable(name)
            ),
            Unfinished::Update(name) => tracing::warn!(
                "{}: its update was interrupted; `kvmsnap image update` with the same arguments finishes it",
                printable(name)
            ),
        }
    }
    let count = unusable.len();
    for error in unusable {
        tracing::error!("{}", describe(&error.into()).trim_end());
    }
    match count {
        0 => Ok(()),
        count => Err(CommandError::UnusableImages { count }),
    }
}

/// A flavour in a few words, like `bios lvm ext4+xfs`.
fn in_short(flavour: &Flavour) -> String {
    let mut kinds: Vec<_> = flavour.file_systems.iter().map(|fs| printable(&fs.kind)).collect();
    kinds.retain(|kind| kind != "swap");
    kinds.sort();
    kinds.dedup();
    let mut words = vec![flavour.boot.to_string().to_lowercase()];
    words.extend((!flavour.volume_groups.is_empty()).then(|| "lvm".to_owned()));
    words.push(kinds.join("+"));
    words.join(" ")
}

/// How a trial start ended, in a word.
fn trial(trial: &BootTrial) -> &'static str {
    match trial.sign {
        Some(BootSign::Agent) => "agent",
        Some(BootSign::Login) => "login",
        None => "no",
    }
}
