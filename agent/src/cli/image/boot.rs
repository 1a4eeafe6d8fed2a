//! `kvmsnap image boot`

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use image_tools::folder::Image;
use image_tools::record::{BootSign, BootTrial};

use super::Context;
use crate::error::CommandError;
use crate::image::boot::{Accel, Outcome, Trial, Wait};
use crate::store::blocking;
use crate::units::parse_bytes;

/// Start an image in a throw-away machine without a network, and wait until it is up
///
/// The image stays as it is. What the serial console said and a picture of the screen are kept in the
/// folder `boot` beside it, and how it ended in its record.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap image boot /srv/images/web
  kvmsnap image boot /srv/images/web --deadline 600 --memory 4GiB --wait agent")]
pub struct BootArgs {
    /// The image's folder
    image: PathBuf,
    #[command(flatten)]
    options: BootOptions,
}

/// How a machine is tried.
#[derive(Debug, Args)]
pub struct BootOptions {
    /// How many seconds it may take until it is up
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86400))]
    deadline: u64,
    /// The machine's memory
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = parse_bytes)]
    memory: u64,
    /// What shows that it is up: its guest agent answers, or its serial console asks for a login
    #[arg(long, value_name = "SIGN", default_value = "any")]
    wait: Wait,
    /// What it is run by; kvm is quicker where it works
    #[arg(long, value_name = "ACCEL", env = "KVMSNAP_ACCEL", default_value = "tcg")]
    accel: Accel,
}

impl BootOptions {
    /// What machines are run by.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// The trial of an image.
    pub fn trial<'a>(&self, image: &'a Image) -> Trial<'a> {
        Trial {
            folder: image.folder(),
            record: image.record(),
            deadline: Duration::from_secs(self.deadline),
            memory: self.memory,
            wait: self.wait,
            accel: self.accel,
        }
    }
}

/// Runs it.
///
/// # Errors
/// When the image cannot be tried, or does not come up.
pub async fn run(args: BootArgs, context: &Context) -> Result<(), CommandError> {
    let mut image = blocking(move || Image::open(&args.image)).await?;
    let trial = try_image(&mut image, &args.options, context).await?;
    let mut out = std::io::stdout().lock();
    if context.global.json {
        let folder = image.folder();
        return context.print_json(&mut out, &serde_json::json!({"folder": folder, "boot": trial}));
    }
    let sign = match trial.sign {
        Some(BootSign::Login) => "it asked for a login",
        _ => "its agent answered",
    };
    let seconds = trial.elapsed_ms as f64 / 1000.0;
    Ok(writeln!(out, "{}: {sign} after {seconds:.1} s", image.name())?)
}

/// Tries an image and keeps in its record how that ended.
///
/// # Errors
/// When the image cannot be tried, or does not come up.
pub async fn try_image(
    image: &mut Image,
    options: &BootOptions,
    context: &Context,
) -> Result<BootTrial, CommandError> {
    context.progress.phase(&format!("starting {} for a trial", image.name()));
    let outcome: Outcome = {
        let trial = options.trial(image);
        context.until_interrupted(async { Ok(trial.run().await?) }).await?
    };
    context.progress.finish();
    let result = outcome.trial.clone();
    image.change(|record| record.boot = Some(result))?;
    let trial = options.trial(image);
    Ok(outcome.check(&trial)?)
}
