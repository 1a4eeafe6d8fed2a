//! `kvmsnap show`

use std::io::Write;

use clap::Args;

use super::Context;
use super::list::{BackupLine, local_time};
use crate::catalog::SnapshotName;
use crate::error::CommandError;
use crate::progress::human_bytes;
use crate::store::blocking;

/// Show everything about one snapshot
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap show latest:web
  kvmsnap show web@2026-11-20T03:00
  kvmsnap show 1a2b3c4d --json")]
pub struct ShowArgs {
    /// An id, a unique prefix of one, latest:DOMAIN, or DOMAIN@TIME
    snapshot: SnapshotName,
}

/// Runs it.
///
/// # Errors
/// Whatever the repository says.
pub async fn run(args: ShowArgs, context: &Context) -> Result<(), CommandError> {
    let open = context.open_to_read().await?;
    let backup = blocking(move || open.catalog().find(&args.snapshot)).await?;
    let manifest = &backup.manifest;
    let mut out = std::io::stdout().lock();
    if context.global.json {
        return context.print_json(&mut out, &BackupLine::new(&backup.id, manifest));
    }
    let milliseconds = |ms: Option<u64>| ms.map_or("no".to_owned(), |ms| format!("{ms} ms"));
    writeln!(out, "snapshot     {}", backup.id)?;
    writeln!(out, "domain       {} ({})", manifest.domain, manifest.uuid)?;
    writeln!(out, "time         {}", local_time(manifest.time))?;
    writeln!(out, "host         {}", manifest.host)?;
    writeln!(out, "kind         {}", manifest.kind.as_str())?;
    writeln!(out, "method       {}", manifest.method.as_str())?;
    writeln!(out, "consistency  {}", manifest.consistency.as_str())?;
    for application in &manifest.applications {
        writeln!(out, "             {}", application.describe())?;
    }
    writeln!(out, "frozen       {}", milliseconds(manifest.freeze_ms))?;
    writeln!(out, "paused       {}", milliseconds(manifest.pause_ms))?;
    if let Some(bytes) = manifest.bytes_scratch_peak {
        writeln!(out, "scratch      {} at most", human_bytes(bytes))?;
    }
    writeln!(out, "parent       {}", manifest.parent.as_deref().unwrap_or("none"))?;
    writeln!(out, "made by      {} in {} ms", manifest.program, manifest.duration_ms)?;
    for disk in &manifest.disks {
        writeln!(out, "disk         {}", disk.target)?;
        writeln!(out, "  size       {}", human_bytes(disk.size))?;
        writeln!(out, "  chunks     {}", human_bytes(disk.chunk_size.into()))?;
        writeln!(out, "  image      {} ({})", disk.image.as_deref().unwrap_or("-"), disk.format)?;
        writeln!(out, "  kind       {}: {}", disk.kind.as_str(), disk.reason)?;
        writeln!(out, "  changed    {}", human_bytes(disk.bytes_changed))?;
        writeln!(out, "  read       {}", human_bytes(disk.bytes_read))?;
        writeln!(out, "  audited    {}", human_bytes(disk.bytes_audited))?;
        writeln!(out, "  zero       {}", human_bytes(disk.bytes_zero))?;
        writeln!(out, "  stored     {}", human_bytes(disk.bytes_stored))?;
        writeln!(out, "  bitmap     {}", disk.bitmap.as_deref().unwrap_or("none"))?;
        if let Some(overlay) = &disk.overlay {
            writeln!(out, "  overlay    {overlay} tracks what changed since")?;
        }
    }
    for skipped in &manifest.skipped {
        writeln!(out, "left out     {}: {}", skipped.device, skipped.reason)?;
    }
    for warning in &manifest.warnings {
        writeln!(out, "warning      {warning}")?;
    }
    Ok(())
}
