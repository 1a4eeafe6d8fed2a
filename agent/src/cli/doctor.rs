//! `kvmsnap doctor`

use std::io::Write;
use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::Context;
use crate::error::CommandError;
use crate::hypervisor::Reach;
use crate::hypervisor::libvirt::connection::DomainHandle;
use crate::journal::{Journal, Recorded};
use crate::lock::{DomainLock, LockError};
use crate::overlay::files::is_same;
use crate::overlay::fill::{Fill, LOW};
use crate::overlay::record::{DiskRecord, Held, Purpose, Records, Stage};
use crate::recover;
use crate::restore::in_place;

/// Name what earlier runs left on this host, and mend it
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap doctor            says what is left; exit code 1 if anything is
  kvmsnap doctor --repair   mends it without stopping a guest")]
pub struct DoctorArgs {
    /// Mend it
    #[arg(long)]
    repair: bool,
}

#[derive(Serialize)]
struct Finding<'a> {
    run: &'a str,
    domain: &'a str,
    reach: String,
    started: jiff::Timestamp,
    state: &'static str,
    mended: bool,
}

/// Runs it.
///
/// # Errors
/// [`CommandError::Leftovers`] when something is left at the end.
pub async fn run(args: DoctorArgs, context: &Context) -> Result<(), CommandError> {
    let journal = context.journal()?;
    let (pending, damaged) = journal.pending()?;
    let exchanges = in_place::unfinished(&context.global.state_dir)?;
    let (overlays, unread) = Records::open(&context.global.state_dir)?.all()?;
    let is_clean = pending.is_empty() && damaged.is_empty() && exchanges.is_empty();
    let is_clean = is_clean && overlays.is_empty() && unread.is_empty();
    let mut left = damaged.len() + unread.len();
    for error in &unread {
        tracing::error!("{error}: it tells of a guest that writes to overlays");
    }
    for held in &overlays {
        let is_beneath = |disk: &DiskRecord| {
            let above = overlays.iter().flat_map(|other| &other.record().disks);
            above.into_iter().any(|other| is_same(&other.base.path, &disk.overlay))
        };
        let is_beneath = held.record().disks.iter().any(is_beneath);
        left += usize::from(!examine_overlays(held, is_beneath, args.repair, context).await?);
    }
    for record in &exchanges {
        left += usize::from(!examine_exchange(record, args.repair, context).await?);
    }
    let mut out = std::io::stdout().lock();
    if is_clean && !context.global.json {
        writeln!(out, "nothing is left of earlier runs")?;
    }
    for error in &damaged {
        tracing::error!("{error}: it tells what a run made in a guest");
    }
    for recorded in pending {
        let record = recorded.record();
        let (state, mended) = match examine(&journal, &recorded, args.repair, context).await {
            Ok(found) => found,
            // One guest that cannot be helped keeps nobody from the others.
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, domain = %record.domain, "cannot mend it");
                ("its run ended without letting go of the guest, which cannot be reached", false)
            }
        };
        let finding = Finding {
            run: record.run.as_str(),
            domain: record.domain.as_str(),
            reach: record.reach.to_string(),
            started: record.started,
            state,
            mended,
        };
        left += usize::from(!mended && state != RUNNING);
        match context.global.json {
            true => context.print_json(&mut out, &finding)?,
            false => {
                let mended = if mended { "; mended" } else { "" };
                let time = super::list::local_time(record.started);
                writeln!(out, "{} (run {}, {time}): {state}{mended}", record.domain, record.run)?;
            }
        }
    }
    match left {
        0 => Ok(()),
        count => Err(CommandError::Leftovers { count }),
    }
}

/// Tells of a machine that writes to overlays, and says whether that is as it was meant to be; `is_beneath`
/// where other overlays lie above these.
async fn examine_overlays(
    held: &Held,
    is_beneath: bool,
    repair: bool,
    context: &Context,
) -> Result<bool, CommandError> {
    let record = held.record();
    let lock = lock(&context.global.run_dir, &record.reach, repair).await;
    if let Err(CommandError::Lock(error @ LockError::Held { .. })) = lock {
        tracing::info!(target: "progress", "{error}");
        return Ok(true);
    }
    let is_above = record.disks.iter().all(|disk| disk.stage == Stage::Above);
    let is_whole = record.held.is_some() && is_above;
    let of_backup = record.purpose == Purpose::Backup;
    let state = match is_whole {
        _ if of_backup => "a backup could not bring the guest back, which writes to overlays",
        true if record.purpose == Purpose::Tracking => {
            "overlays track what changes from one backup to the next"
        }
        false if record.purpose == Purpose::Tracking && is_beneath => {
            "an overlay that tracked what changed is not written back yet, which the next backup does"
        }
        true => "its images hold still, the guest writes to overlays",
        false => "a create or purge of it did not end",
    };
    let state_dir = &context.global.state_dir;
    if repair
        && of_backup
        && let Err(error) = recover::end_overlays_wherever(record, state_dir).await
    {
        let error: &dyn std::error::Error = &error;
        tracing::error!(error, domain = %record.domain, "cannot bring it back");
    }
    let mended = !Records::open(state_dir)?.path(record).exists();
    let stays = record.purpose == Purpose::Tracking && !mended;
    let fills: Vec<_> = record.disks.iter().filter(|_| stays).filter_map(Fill::of).collect();
    let since = record.held.map_or(record.begun, |held| held.time);
    let mut out = std::io::stdout().lock();
    if context.global.json {
        let overlays: Vec<_> = record.disks.iter().map(|disk| &disk.overlay).collect();
        let line = serde_json::json!({
            "domain": record.domain, "reach": record.reach.to_string(), "since": since,
            "overlays": overlays, "state": state, "mended": mended, "fill": fills,
        });
        context.print_json(&mut out, &line)?;
    } else {
        let time = super::list::local_time(since);
        let ends = if mended { "mended" } else { "`kvmsnap purge` ends it" };
        writeln!(out, "{} (overlays, {time}): {state}; {ends}", record.domain)?;
        for fill in &fills {
            let low = if fill.is_low { format!(": {LOW}") } else { String::new() };
            writeln!(out, "{} (overlays, {time}): {fill}{low}", record.domain)?;
        }
    }
    let is_low = fills.iter().any(|fill| fill.is_low);
    Ok(mended || (is_whole && !of_backup && !is_low))
}

/// Tells of a restore in place that stopped between two disks, and says whether it is finished now.
async fn examine_exchange(
    record: &in_place::Record,
    repair: bool,
    context: &Context,
) -> Result<bool, CommandError> {
    let global = &context.global;
    let _lock = match DomainLock::on_reach(&global.run_dir, &Reach::Domain(record.address.clone()))
    {
        // It may be the restore itself, which takes a moment.
        Err(error @ LockError::Held { .. }) => {
            tracing::info!(target: "progress", "{error}");
            return Ok(true);
        }
        lock => lock?,
    };
    let mut mended = false;
    if repair {
        let handle = DomainHandle::connect(&record.address).await?;
        match in_place::finish(&handle, &global.state_dir, record).await {
            Ok(()) => mended = true,
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, domain = record.domain, "cannot finish it");
            }
        }
    }
    let mut out = std::io::stdout().lock();
    for disk in &record.disks {
        let waits = disk.restored.exists();
        if global.json {
            let line = serde_json::json!({
                "domain": record.domain, "snapshot": record.snapshot, "target": disk.disk,
                "image": disk.image, "restored": !waits, "before": disk.before, "mended": mended,
            });
            context.print_json(&mut out, &line)?;
            continue;
        }
        let state = match waits {
            true => format!("as it was; the restored one waits as {}", disk.restored.display()),
            false => format!("restored; what it was is kept as {}", disk.before.display()),
        };
        let image = disk.image.display();
        writeln!(out, "{} (restore in place), {}: {image} is {state}", record.domain, disk.disk)?;
    }
    Ok(mended)
}

const RUNNING: &str = "a backup is running";
const OVER: &str = "its run is over, and has left nothing";

/// Locks the way to a machine. Who is to mend it waits for a guard that is about it already.
async fn lock(run_dir: &Path, reach: &Reach, repair: bool) -> Result<DomainLock, CommandError> {
    match repair {
        true => super::backup::lock(run_dir, reach).await,
        false => Ok(DomainLock::on_reach(run_dir, reach)?),
    }
}

/// Says what became of a run, and whether what it left is mended now.
async fn examine(
    journal: &Journal,
    recorded: &Recorded,
    repair: bool,
    context: &Context,
) -> Result<(&'static str, bool), CommandError> {
    let run_dir = &context.global.run_dir;
    let _lock = match lock(run_dir, &recorded.record().reach, repair).await {
        Err(CommandError::Lock(LockError::Held { .. })) => return Ok((RUNNING, false)),
        lock => lock?,
    };
    // As it is now that nobody else writes to it: what it holds back there must be known.
    let Some(recorded) = journal.of_run(&recorded.record().run)? else {
        return Ok((OVER, true));
    };
    let record = recorded.record();
    let state = match record.stopped.is_none() && recover::has_ended(record, run_dir).await? {
        _ if !record.snapshots.is_empty() => "its run ended without removing its LVM snapshots",
        true => "QEMU has ended, and with it all that the run had made in it",
        false if record.stopped.is_some() => {
            "its run ended before it started the domain again that it had shut down"
        }
        false if record.suspends && record.holds_guest => {
            "its run ended while the guest stood still for it"
        }
        false => "its run ended without letting go of the guest",
    };
    if repair {
        recover::undo_wherever(journal, &recorded, run_dir).await?;
    }
    Ok((state, repair))
}
