//! `kvmsnap list`

use std::io::Write;

use ::repository::FileId;
use clap::Args;
use comfy_table::{Table, presets};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use super::Context;
use crate::catalog::{is_of, short};
use crate::error::CommandError;
use crate::hypervisor::Skipped;
use crate::manifest::{Consistency, DiskManifest, Kind, Manifest, Method};
use crate::progress::human_bytes;
use crate::quiesce::application::Report;
use crate::store::blocking;

/// List snapshots, oldest first
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap list
  kvmsnap list web --json | jq -r .id")]
pub struct ListArgs {
    /// Only snapshots of these domains
    #[arg(value_name = "DOMAIN")]
    domains: Vec<String>,
}

/// A snapshot as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
pub struct BackupLine<'a> {
    id: String,
    short_id: String,
    domain: &'a str,
    uuid: &'a str,
    host: &'a str,
    time: Timestamp,
    kind: Kind,
    method: Method,
    consistency: Consistency,
    parent: Option<&'a str>,
    freeze_ms: Option<u64>,
    pause_ms: Option<u64>,
    duration_ms: u64,
    bytes_scratch_peak: Option<u64>,
    applications: &'a [Report],
    warnings: &'a [String],
    disks: &'a [DiskManifest],
    skipped: &'a [Skipped],
}

impl<'a> BackupLine<'a> {
    /// The line of a snapshot.
    pub fn new(id: &FileId, manifest: &'a Manifest) -> Self {
        Self {
            id: id.to_string(),
            short_id: short(id),
            domain: manifest.domain.as_str(),
            uuid: &manifest.uuid,
            host: &manifest.host,
            time: manifest.time,
            kind: manifest.kind,
            method: manifest.method,
            consistency: manifest.consistency,
            parent: manifest.parent.as_deref(),
            freeze_ms: manifest.freeze_ms,
            pause_ms: manifest.pause_ms,
            duration_ms: manifest.duration_ms,
            bytes_scratch_peak: manifest.bytes_scratch_peak,
            applications: &manifest.applications,
            warnings: &manifest.warnings,
            disks: &manifest.disks,
            skipped: &manifest.skipped,
        }
    }
}

/// Runs it.
///
/// # Errors
/// Whatever the repository says, and [`CommandError::Damaged`] after listing what can be read.
pub async fn run(args: ListArgs, context: &Context) -> Result<(), CommandError> {
    let open = context.open_to_read().await?;
    let (backups, broken) = blocking(move || {
        let wanted = |file: &_| {
            args.domains.is_empty() || args.domains.iter().any(|domain| is_of(file, domain))
        };
        open.catalog().backups(wanted)
    })
    .await?;
    let mut out = std::io::stdout().lock();
    if context.global.json {
        for backup in &backups {
            context.print_json(&mut out, &BackupLine::new(&backup.id, &backup.manifest))?;
        }
    } else {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let mut header =
            vec!["ID", "TIME", "DOMAIN", "KIND", "CONSISTENCY", "SIZE", "CHANGED", "STORED"];
        // A column for what mostly is nothing would only be in the way.
        let lacks_any = backups.iter().any(|backup| !backup.manifest.missing_disks().is_empty());
        header.extend(lacks_any.then_some("LEFT OUT"));
        table.set_header(header);
        for backup in &backups {
            let manifest = &backup.manifest;
            let sum = |field: fn(&DiskManifest) -> u64| {
                human_bytes(manifest.disks.iter().map(field).sum())
            };
            let mut row = vec![
                short(&backup.id),
                local_time(manifest.time),
                manifest.domain.to_string(),
                manifest.kind.as_str().to_owned(),
                manifest.consistency.as_str().to_owned(),
                sum(|disk| disk.size),
                sum(|disk| disk.bytes_changed),
                sum(|disk| disk.bytes_stored),
            ];
            row.extend(lacks_any.then(|| manifest.missing_disks().join(", ")));
            table.add_row(row);
        }
        writeln!(out, "{}", table.trim_fmt())?;
    }
    for error in &broken {
        tracing::error!("{error}");
    }
    match broken.len() {
        0 => Ok(()),
        problems => Err(CommandError::Damaged { problems }),
    }
}

/// A time as people read it, in this host's time zone.
pub fn local_time(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}
