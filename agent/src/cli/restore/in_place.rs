//! Restore in the place of the images that a domain has.

use std::fs;
use std::io::Write;

use jiff::Timestamp;

use super::{Disks, RestoreArgs, Source};
use crate::cli::Context;
use crate::error::CommandError;
use crate::hypervisor::Reach;
use crate::hypervisor::libvirt::connection::{DomainHandle, Libvirt};
use crate::lock::DomainLock;
use crate::overlay::OverlayError;
use crate::overlay::record::Records;
use crate::restore::Restored;
use crate::restore::in_place::{self, InPlaceError, Wanted};

/// Access rights of the folder in which a disk waits.
const CLOSED: u32 = 0o700;

/// Runs it.
///
/// # Errors
/// Whatever the restore says.
pub(super) async fn run(
    args: &RestoreArgs,
    source: Source,
    context: &Context,
) -> Result<(), CommandError> {
    let manifest = &source.backup.manifest;
    let connect = async { Ok(Libvirt::connect(&context.global.connect).await?) };
    let handle = context.until_interrupted(connect).await?.domain(&manifest.uuid);
    let run_dir = &context.global.run_dir;
    let reach = Reach::Domain(handle.address());
    let _reach_lock = DomainLock::on_reach(run_dir, &reach)?;
    let _domain_lock = DomainLock::on_domain(run_dir, &manifest.domain, &manifest.uuid)?;
    let state_dir = &context.global.state_dir;
    let unfinished = in_place::unfinished(state_dir)?;
    if unfinished.iter().any(|record| record.address == handle.address()) {
        return Err(InPlaceError::Unfinished.into());
    }
    let overlays = Records::open(state_dir).and_then(|records| records.of(&reach));
    if overlays.map_err(OverlayError::from)?.is_some() {
        return Err(InPlaceError::Overlaid { domain: manifest.domain.to_string() }.into());
    }
    let suffix = Timestamp::now().strftime("%Y%m%dT%H%M%S.%3fZ").to_string();
    let look = in_place::look(&handle, &source.backup.id, manifest, &args.disk, &suffix);
    let wanted = context.until_interrupted(async { Ok(look.await?) }).await?;
    if !args.dry_run {
        let work = async {
            restore(&wanted, &source, &handle, context).await?;
            // Short, and taken up again where it is killed.
            let (snapshot, domain) = (&source.backup.id, manifest.domain.as_str());
            Ok(in_place::exchange(&handle, state_dir, snapshot, domain, &wanted).await?)
        };
        work.await.inspect_err(|_: &CommandError| tell_what_waits(&wanted))?;
    }
    let size = |wanted: &Wanted| {
        let disk = manifest.disks.iter().find(|disk| disk.target == wanted.exchange.disk);
        disk.map_or(0, |disk| disk.size)
    };
    for disk in &wanted {
        let names = &disk.exchange;
        let (target, path) = (names.disk.clone(), names.image.clone());
        let restored = Restored { disk: target, path, size: size(disk) };
        super::print(&source, &[restored], args.dry_run, context)?;
        if args.dry_run || names.before.exists() {
            print_kept(disk, args.dry_run, context)?;
        }
    }
    Ok(())
}

/// Restores the disks beside their images, without touching these.
async fn restore(
    wanted: &[Wanted],
    source: &Source,
    handle: &DomainHandle,
    context: &Context,
) -> Result<(), CommandError> {
    for disk in wanted.iter().filter(|disk| !disk.is_restored()) {
        let disks = Disks {
            place: disk.place.clone(),
            folder_mode: CLOSED,
            format: disk.format,
            disks: vec![disk.exchange.disk.clone()],
            dry_run: false,
        };
        disks.restore(source, context).await?;
    }
    match handle.is_active().await? {
        true => {
            Err(InPlaceError::Runs { domain: source.backup.manifest.domain.to_string() }.into())
        }
        false => Ok(()),
    }
}

/// Names what a later run goes on with, and removes folders that hold nothing.
fn tell_what_waits(wanted: &[Wanted]) {
    for disk in wanted {
        let folder = &disk.place.folder;
        if fs::remove_dir(folder).is_err() && disk.is_restored() {
            let target = &disk.exchange.disk;
            tracing::warn!("{target}: the restored image waits in {}", folder.display());
        }
    }
}

fn print_kept(disk: &Wanted, dry_run: bool, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    let (target, before) = (&disk.exchange.disk, &disk.exchange.before);
    if context.global.json {
        let line = serde_json::json!({"target": target, "before": before, "kept": !dry_run});
        return context.print_json(&mut out, &line);
    }
    let verb = if dry_run { "would be kept" } else { "is kept" };
    Ok(writeln!(out, "{target}: what it was {verb} as {}", before.display())?)
}
