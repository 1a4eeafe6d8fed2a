//! `kvmsnap image match`

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use image_tools::fit::template::{self, Fit};
use image_tools::fit::{Misfit, tree};
use image_tools::folder::{self, Image};
use image_tools::rsync::Tree;
use serde_json::json;

use super::Context;
use crate::error::{CommandError, describe};
use crate::names::printable;
use crate::store::blocking;

/// Find the templates that a machine's files fit, and tell what differs in the others
///
/// It compares what `image info --look` has noted with the tree's etc/fstab, the notes of LVM and the boot
/// loader in it, and what its files need. Nothing is started or written.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap image match --tree /srv/rsync/shop /srv/templates
  kvmsnap image match --tree /srv/rsync/shop /srv/templates --json | jq -r 'select(.fits) | .folder'")]
pub struct MatchArgs {
    /// The folder that holds a folder for each template
    store: PathBuf,
    /// The machine's files: a folder of this host
    #[arg(long, value_name = "TREE")]
    tree: String,
}

/// Runs it.
///
/// # Errors
/// [`CommandError::NoTemplateFits`] after telling why; whatever keeps it from looking.
pub async fn run(args: MatchArgs, context: &Context) -> Result<(), CommandError> {
    let Tree::Folder(folder) = Tree::parse(&args.tree)? else {
        return Err(CommandError::RemoteTree { tree: args.tree });
    };
    context.progress.phase("looking at the tree");
    let machine = blocking(move || tree::read(&folder)).await?;
    context.progress.finish();
    let store = args.store.clone();
    let (images, unusable) = blocking(move || folder::list(&store)).await?;
    let mut fitting = 0;
    for image in &images {
        let fit =
            image.record().flavour.as_ref().map(|flavour| template::compare(flavour, &machine));
        fitting += usize::from(fit.as_ref().is_some_and(|fit| fit.misfits.is_empty()));
        print(image, fit.as_ref(), context)?;
    }
    let unlooked = images.iter().filter(|image| image.record().flavour.is_none()).count();
    for error in unusable {
        tracing::error!("{}", describe(&error.into()).trim_end());
    }
    match fitting {
        0 => Err(CommandError::NoTemplateFits { store: args.store, unlooked }),
        _ => Ok(()),
    }
}

/// `fit` is `None` where nothing is known of the template's disks.
fn print(image: &Image, fit: Option<&Fit>, context: &Context) -> Result<(), CommandError> {
    let words = |misfits: &[Misfit]| misfits.iter().map(ToString::to_string).collect::<Vec<_>>();
    let misfits = fit.map_or(Vec::new(), |fit| words(&fit.misfits));
    let remarks: Vec<_> = fit.into_iter().flat_map(|fit| &fit.remarks).collect();
    let remarks: Vec<_> = remarks.iter().map(ToString::to_string).collect();
    let fits = fit.map(|fit| fit.misfits.is_empty());
    let mut out = std::io::stdout().lock();
    if context.global.json {
        let line = json!({
            "name": image.name(), "folder": image.folder(), "fits": fits, "misfits": misfits,
            "differences": remarks,
        });
        return context.print_json(&mut out, &line);
    }
    let verdict = match fits {
        Some(true) => "fits",
        Some(false) => "does not fit",
        None => "nobody has looked at its disks yet (`kvmsnap image info --look`)",
    };
    writeln!(out, "{}: {verdict}", printable(&image.name()))?;
    for line in misfits {
        writeln!(out, "  {}", printable(&line))?;
    }
    for line in remarks {
        writeln!(out, "  not in the way: {}", printable(&line))?;
    }
    Ok(())
}
