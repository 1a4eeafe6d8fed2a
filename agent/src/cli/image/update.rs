//! `kvmsnap image update`

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use image_tools::appliance::Options;
use image_tools::folder::Image;
use image_tools::folder::rework::Rework;
use image_tools::rsync::{self, Tree, TreeError};
use serde_json::json;

use super::boot::{BootOptions, try_image};
use super::{Context, ImageLine};
use crate::error::CommandError;
use crate::image::again::{again, finish};
use crate::image::boot::Accel;
use crate::image::update::{self, CHANGES, Updated, Wanted};
use crate::names::printable;
use crate::progress::human_bytes;
use crate::store::blocking;

/// Make the image of a machine from a template of its flavour and a copy of the machine's files
///
/// The files are those that rsync made, with owners by number, links, ACLs and attributes. The template's file
/// systems are made equal to them in an appliance of libguestfs; the template itself stays as it is.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap image update /srv/templates/web --tree /srv/rsync/shop --output /srv/images/shop --boot-test
  kvmsnap image update /srv/templates/web --tree root@store:/srv/rsync/shop --output /srv/images/shop
  kvmsnap image update /srv/templates/web --tree rsync://store/shop --output /srv/images/shop --exclude '/var/cache/*'
  kvmsnap image update /srv/images/shop --tree /srv/rsync/shop

The last one brings an image up to date that was made before: it writes only what changed since.
Made for it: rsync -aHAXS --numeric-ids --delete --exclude='/proc/*' --exclude='/sys/*' --exclude='/dev/*' \
--exclude='/run/*' root@shop:/ /srv/rsync/shop/")]
pub struct UpdateArgs {
    /// The template's folder, or an image that was made from one
    #[arg(value_name = "IMAGE")]
    template: PathBuf,
    /// The machine's files: a folder, HOST:PATH by ssh, or rsync://HOST/MODULE
    #[arg(long, value_name = "TREE")]
    tree: String,
    /// The folder that becomes the image; the image itself where it was made from a template before
    #[arg(long, short, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Leave what matches as the template has it (can be repeated); as rsync's, from the machine's /
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Which files count as equal: those of one content, or of one size and time. Content, unless the image
    /// was made from the same tree before
    #[arg(long, value_name = "BY")]
    compare: Option<Compare>,
    /// What the machine is called; as its files say unless given
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Start the image for a trial when it is made
    #[arg(long)]
    boot_test: bool,
    #[command(flatten, next_help_heading = "The trial")]
    boot: BootOptions,
}

/// How files are compared.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Compare {
    /// By what is in them.
    Content,
    /// By size and time.
    Time,
}

/// Runs it.
///
/// # Errors
/// Whatever keeps the image from being made, or from starting.
pub async fn run(args: UpdateArgs, context: &Context) -> Result<(), CommandError> {
    let finish = async { Ok(finish(&args.template, &context.progress).await?) };
    context.until_interrupted(finish).await?;
    let tree = Tree::parse(&args.tree)?;
    tree.probe()?;
    // The next update asks whether it is of the same tree.
    let tree_name = match &tree {
        Tree::Folder(path) => {
            let unreadable = |source| TreeError::Folder { path: path.clone(), source };
            fs::canonicalize(path).map_err(unreadable)?.to_string_lossy().into_owned()
        }
        _ => args.tree.clone(),
    };
    let wanted = Wanted {
        tree,
        tree_name,
        compare: args.compare.map(|by| match by {
            Compare::Content => rsync::Compare::Content,
            Compare::Time => rsync::Compare::Time,
        }),
        excludes: args.exclude.clone(),
        machine: args.name.clone(),
        appliance: Options { emulate: args.boot.accel() == Accel::Tcg },
    };
    let work = async {
        Ok(match &args.output {
            Some(output) => {
                let path = args.template.clone();
                let template = blocking(move || Image::open(&path)).await?;
                update::make(&template, output, &wanted, &context.progress).await?
            }
            None => again(&args.template, &wanted, &context.progress).await?,
        })
    };
    let outcome = context.until_interrupted(work).await;
    context.progress.finish();
    if matches!(outcome, Err(CommandError::Interrupted)) && Rework::is_interrupted(&args.template) {
        let name = args.template.display();
        tracing::warn!("{name} is half written and has no name: the same command finishes it");
    }
    let mut updated = outcome?;
    let trial = match args.boot_test {
        true => Some(try_image(&mut updated.image, &args.boot, context).await),
        false => None,
    };
    print(&updated, context)?;
    trial.transpose().map(drop)
}

fn print(updated: &Updated, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    let Updated { image, report, written } = updated;
    if context.global.json {
        let line = ImageLine::new(image).with(
            "update",
            json!({
                "added": report.added, "changed": report.changed, "attributes": report.metadata,
                "deleted": report.deleted, "file_bytes": report.file_bytes,
                "written_bytes": written, "identities": report.identities,
                "boot": report.boot, "skipped": report.skipped,
            }),
        );
        return context.print_json(&mut out, &line);
    }
    let folder = printable(&image.folder().to_string_lossy());
    writeln!(out, "{folder}: the machine {}", printable(&image.record().machine))?;
    writeln!(
        out,
        "  {} files added, {} changed, {} with other attributes, {} deleted; {} written",
        report.added,
        report.changed,
        report.metadata,
        report.deleted,
        human_bytes(*written),
    )?;
    for words in report.identities.iter().chain(&report.boot) {
        writeln!(out, "  {}", printable(words))?;
    }
    for (what, why) in &report.skipped {
        writeln!(out, "  left as it is: {}: {}", printable(what), printable(why))?;
    }
    writeln!(out, "  file by file: {folder}/{CHANGES}")?;
    if let Some(trial) = &image.record().boot
        && trial.sign.is_some()
    {
        writeln!(out, "  it was up after {:.1} s", trial.elapsed_ms as f64 / 1000.0)?;
    }
    Ok(())
}
