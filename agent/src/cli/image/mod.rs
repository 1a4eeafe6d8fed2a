//! `kvmsnap image`: one file for each of its commands.

mod boot;
mod check;
mod deploy;
mod get;
mod info;
mod list;
mod match_;
mod update;

use clap::{Args, Subcommand};
use image_tools::appliance::Options;
use image_tools::folder::Image;
use image_tools::record::{DiskFile, Origin};
use serde::Serialize;
use serde_json::json;

use super::Context;
use crate::error::CommandError;
use crate::image::boot::Accel;
use crate::names::printable;

/// Images for disaster recovery: templates, and machines made from them
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  kvmsnap image get web --into /srv/templates
  kvmsnap image list /srv/templates
  kvmsnap image check /srv/templates/web")]
pub enum ImageCommand {
    Get(Box<get::GetArgs>),
    List(list::ListArgs),
    Info(info::InfoArgs),
    Check(check::CheckArgs),
    Match(match_::MatchArgs),
    Update(Box<update::UpdateArgs>),
    Boot(boot::BootArgs),
    Deploy(deploy::DeployArgs),
}

/// How the appliance runs that looks at file systems.
#[derive(Debug, Args)]
pub struct ApplianceArgs {
    /// What the appliance is run by; kvm is quicker where it works
    #[arg(long, value_name = "ACCEL", env = "KVMSNAP_ACCEL", default_value = "tcg")]
    accel: Accel,
}

impl ApplianceArgs {
    fn options(&self) -> Options {
        Options { emulate: self.accel == Accel::Tcg }
    }
}

/// Runs it.
///
/// # Errors
/// Whatever the command says.
pub async fn run(command: ImageCommand, context: &Context) -> Result<(), CommandError> {
    match command {
        ImageCommand::Get(args) => get::run(*args, context).await,
        ImageCommand::List(args) => context.until_interrupted(list::run(args, context)).await,
        ImageCommand::Update(args) => update::run(*args, context).await,
        ImageCommand::Boot(args) => boot::run(args, context).await,
        ImageCommand::Deploy(args) => deploy::run(args, context).await,
        ImageCommand::Info(args) => context.until_interrupted(info::run(args, context)).await,
        ImageCommand::Match(args) => context.until_interrupted(match_::run(args, context)).await,
        ImageCommand::Check(args) => context.until_interrupted(check::run(args, context)).await,
    }
}

/// An image as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
pub struct ImageLine(serde_json::Value);

impl ImageLine {
    /// The line of an image, its checksums but for one of each file left out.
    pub fn new(image: &Image) -> Self {
        let record = image.record();
        let disk = |disk: &DiskFile| {
            json!({
                "target": disk.target, "file": disk.file, "size": disk.size,
                "file_len": disk.file_len, "sha256": disk.sums.sha256,
            })
        };
        Self(json!({
            "name": image.name(), "folder": image.folder(), "machine": record.machine,
            "time": record.time, "origin": record.origin,
            "disks": record.disks.iter().map(disk).collect::<Vec<_>>(),
            "files": record.files, "flavour": record.flavour, "boot": record.boot,
        }))
    }
}

impl ImageLine {
    /// The same with one field more.
    fn with(mut self, field: &str, value: serde_json::Value) -> Self {
        self.0[field] = value;
        self
    }
}

/// Where images come from, in words.
fn origin(origin: &Origin) -> String {
    match origin {
        Origin::Domain(uuid) => format!("the domain {}", printable(uuid)),
        Origin::Snapshot(id) => format!("the snapshot {}", printable(id)),
        Origin::File(path) => format!("the file {}", printable(&path.to_string_lossy())),
        Origin::Update { template, tree } => {
            let template = printable(&template.to_string_lossy());
            format!("the template {template}, with the files of {}", printable(tree))
        }
    }
}
