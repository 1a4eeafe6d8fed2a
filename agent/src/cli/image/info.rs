//! `kvmsnap image info`

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use image_tools::flavour::Flavour;
use image_tools::folder::Image;
use image_tools::record::BootSign;

use super::{ApplianceArgs, Context, ImageLine, origin};
use crate::cli::list::local_time;
use crate::error::CommandError;
use crate::image::look;
use crate::names::printable;
use crate::progress::human_bytes;
use crate::store::blocking;

/// Show everything about one image
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap image info /srv/templates/web
  kvmsnap image info /srv/templates/web --json
  kvmsnap image info /srv/templates/web --look")]
pub struct InfoArgs {
    /// The image's folder
    image: PathBuf,
    /// Look at its disks in an appliance of libguestfs first, and note what is on them: its flavour
    #[arg(long)]
    look: bool,
    #[command(flatten)]
    appliance: ApplianceArgs,
}

/// Runs it.
///
/// # Errors
/// When the folder is no image, or its disks cannot be looked at.
pub async fn run(args: InfoArgs, context: &Context) -> Result<(), CommandError> {
    let mut image = blocking(move || Image::open(&args.image)).await?;
    if args.look {
        context.progress.phase(&format!("looking at the disks of {}", image.name()));
        let flavour = look::flavour(&image, &args.appliance.options()).await?;
        context.progress.finish();
        image.change(|record| record.flavour = Some(flavour))?;
    }
    let mut out = io::stdout().lock();
    if context.global.json {
        return context.print_json(&mut out, &ImageLine::new(&image));
    }
    let record = image.record();
    writeln!(out, "image        {}", printable(&image.folder().to_string_lossy()))?;
    writeln!(out, "machine      {}", printable(&record.machine))?;
    writeln!(out, "time         {}", local_time(record.time))?;
    writeln!(out, "made from    {}", origin(&record.origin))?;
    for disk in &record.disks {
        writeln!(out, "disk         {}", printable(&disk.target))?;
        writeln!(out, "  file       {}, {}", disk.file, human_bytes(disk.file_len))?;
        writeln!(out, "  size       {}", human_bytes(disk.size))?;
        writeln!(out, "  sha256     {}", disk.sums.sha256)?;
    }
    for file in &record.files {
        writeln!(out, "file         {}", file.file)?;
        writeln!(out, "  sha256     {}", printable(&file.sha256))?;
    }
    match &record.flavour {
        None => writeln!(out, "flavour      nobody has looked yet (`--look`)")?,
        Some(flavour) => write_flavour(&mut out, flavour)?,
    }
    match &record.boot {
        None => writeln!(out, "trial start  never")?,
        Some(trial) => {
            let seconds = trial.elapsed_ms as f64 / 1000.0;
            let outcome = match trial.sign {
                Some(BootSign::Agent) => {
                    let name = trial.host.as_deref().unwrap_or("a machine without a name");
                    let name = printable(name);
                    format!("the agent of {name} answered after {seconds:.1} s")
                }
                Some(BootSign::Login) => format!("it asked for a login after {seconds:.1} s"),
                None => format!("nothing was heard of it for {seconds:.1} s"),
            };
            writeln!(out, "trial start  {}: {outcome}", local_time(trial.time))?;
        }
    }
    Ok(())
}

fn write_flavour(out: &mut impl Write, flavour: &Flavour) -> io::Result<()> {
    writeln!(out, "flavour      {}", flavour.boot)?;
    for (number, disk) in flavour.disks.iter().enumerate() {
        let table = disk.table.as_deref().unwrap_or("no partition table");
        let size = human_bytes(disk.size);
        writeln!(out, "  disk {}     {size}, {}", number + 1, printable(table))?;
        for part in &disk.partitions {
            let (kind, start) = (printable(&part.kind), part.start);
            let size = human_bytes(part.size);
            writeln!(out, "    part {}   {size} from byte {start}, {kind}", part.number)?;
        }
    }
    for group in &flavour.volume_groups {
        writeln!(out, "  group      {}", printable(&group.name))?;
        for (volume, size) in &group.volumes {
            writeln!(out, "    volume   {}, {}", printable(volume), human_bytes(*size))?;
        }
    }
    for fs in &flavour.file_systems {
        let place = match &fs.mount {
            Some(mount) if *mount != fs.kind => format!(" at {}", printable(mount)),
            _ => String::new(),
        };
        let (device, kind) = (printable(&fs.device), printable(&fs.kind));
        writeln!(out, "  on         {device}: {kind}{place}")?;
    }
    Ok(())
}
