//! `kvmsnap purge`

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Context;
use super::backup::{lock, undo_earlier};
use super::overlays::{self, Machines, StallLine, WayBack};
use crate::error::CommandError;
use crate::hypervisor::Reach;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::{KnownDomain, LibvirtDomain, Places};
use crate::hypervisor::monitor::ANSWER_TIMEOUT;
use crate::hypervisor::qmp::BareQemu;
use crate::names::DomainName;
use crate::overlay::Layers;
use crate::overlay::files::is_same;
use crate::overlay::libvirt::LibvirtLayers;
use crate::overlay::purge::{self, Brought, Purge};
use crate::overlay::qmp::QmpLayers;
use crate::overlay::record::{DiskRecord, Held, Records};
use crate::overlay::track;
use crate::progress::human_bytes;

/// Bring guests back onto their own images after `create`, running or not
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap purge web
  kvmsnap purge --all --deadline 600 --max-pause 0.5
  kvmsnap purge web --adopt /var/lib/libvirt/images/web.snap1

An overlay is deleted only when it is written back and no domain, running or defined, names it.")]
pub struct PurgeArgs {
    #[command(flatten)]
    machines: Machines,
    #[command(flatten)]
    way_back: WayBack,
    /// Write an overlay that kvmsnap did not make into the image beneath it, and delete it; refused where
    /// any other domain or process uses that image
    #[arg(long, value_name = "OVERLAY", conflicts_with = "all")]
    adopt: Option<PathBuf>,
}

/// Runs it.
///
/// # Errors
/// Whatever keeps a guest from its own images; of several domains, how many failed.
pub async fn run(args: PurgeArgs, context: &Context) -> Result<(), CommandError> {
    let Some(socket) = &args.machines.qmp else {
        return overlays::each(&args.machines, context, async |libvirt, known| {
            of_domain(libvirt, known, &args, context).await
        })
        .await;
    };
    let monitor = overlays::monitor(socket);
    let reach = Reach::Monitor(monitor.clone());
    let _lock = context.until_interrupted(lock(&context.global.run_dir, &reach)).await?;
    let records = Records::open(&context.global.state_dir)?;
    let held = records.all_of(&reach)?;
    if held.is_empty() && args.adopt.is_none() {
        return nothing(&reach.to_string());
    }
    let known = held.last().and_then(|held| held.record().qemu);
    let connect = async {
        let layers = QmpLayers::connect(&monitor, known).await?;
        if !layers.is_there() {
            return Ok(layers);
        }
        // QEMU serves one client at a time.
        drop(layers);
        // What a killed backup left stands above the overlay, or uses it.
        let (run_dir, journal) = (&context.global.run_dir, context.journal()?);
        let qemu = BareQemu::connect(&monitor, run_dir, None, false, ANSWER_TIMEOUT).await?;
        undo_earlier(&qemu, &journal, run_dir).await?;
        drop(qemu);
        Ok(QmpLayers::connect(&monitor, known).await?)
    };
    let layers = context.until_interrupted(connect).await?;
    // A backup's own are gone by now.
    let held = records.all_of(&reach)?;
    let name: DomainName = "qemu".parse()?;
    bring_back(&layers, &records, held, (name, String::new(), reach), &args, context).await
}

async fn of_domain(
    libvirt: &Libvirt,
    known: &KnownDomain,
    args: &PurgeArgs,
    context: &Context,
) -> Result<(), CommandError> {
    let reach = overlays::reach(libvirt, known);
    let _lock = context.until_interrupted(lock(&context.global.run_dir, &reach)).await?;
    let records = Records::open(&context.global.state_dir)?;
    let held = async { overlays::records_of(libvirt, known, &records).await };
    let held = context.until_interrupted(held).await?;
    if held.is_empty() && args.adopt.is_none() {
        return match args.machines.all {
            true => Ok(()),
            false => nothing(&format!("domain `{}`", known.name)),
        };
    }
    let handle = libvirt.domain(&known.uuid);
    let connect = async {
        if handle.is_active().await? {
            let domain = LibvirtDomain::new(libvirt, &known.uuid, Places::default(), false);
            undo_earlier(&domain, &context.journal()?, &context.global.run_dir).await?;
        }
        Ok(LibvirtLayers::new(handle).await?)
    };
    let layers = context.until_interrupted(connect).await?;
    // A backup's own are gone by now.
    let held = records.all_of(&reach)?;
    let machine = (known.name.parse()?, known.uuid.clone(), reach);
    bring_back(&layers, &records, held, machine, args, context).await
}

fn nothing(what: &str) -> Result<(), CommandError> {
    tracing::info!(target: "progress", "{what} writes to no overlay of kvmsnap");
    Ok(())
}

async fn bring_back<L: Layers>(
    layers: &L,
    records: &Records,
    mut held: Vec<Held>,
    machine: (DomainName, String, Reach),
    args: &PurgeArgs,
    context: &Context,
) -> Result<(), CommandError> {
    let budget = args.way_back.budget();
    let purge = Purge { layers, records, budget, progress: &context.progress };
    let interrupt = context.interrupted();
    tokio::pin!(interrupt);
    // A backup may still have an overlay beneath another one written back, or was killed after that.
    let before = held.len();
    track::join(&purge, &machine.2, interrupt.as_mut()).await?;
    if before > 0 {
        held = records.all_of(&machine.2)?;
    }
    if let Some(overlay) = &args.adopt {
        let overlay = std::path::absolute(overlay).unwrap_or_else(|_| overlay.clone());
        let is_it = |disk: &DiskRecord| is_same(&disk.overlay, &overlay);
        match held.iter_mut().find(|held| held.record().disks.iter().any(is_it)) {
            // An adoption that was interrupted is gone on with.
            Some(known) => purge::vouch(layers, records, known, &overlay).await?,
            None => held.push(purge::adopt(layers, records, &overlay, machine).await?),
        }
    }
    // The newest lies on top.
    for held in held.into_iter().rev() {
        finish(&purge, held, interrupt.as_mut(), context).await?;
    }
    Ok(())
}

async fn finish<L: Layers>(
    purge: &Purge<'_, L>,
    held: Held,
    interrupt: std::pin::Pin<&mut impl Future<Output = ()>>,
    context: &Context,
) -> Result<(), CommandError> {
    let domain = held.record().domain.clone();
    let brought = purge.run(held, interrupt).await;
    context.progress.finish();
    for disk in brought? {
        print(&domain, &disk, context)?;
    }
    Ok(())
}

fn print(domain: &DomainName, brought: &Brought, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    let Brought { disk, bytes, took, slowed, paused, stall } = brought;
    let millis = |duration: &Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if context.global.json {
        let stall = stall.map(StallLine::of);
        let line = serde_json::json!({
            "domain": domain, "disk": disk.disk, "image": disk.base.path, "overlay": disk.overlay,
            "bytes": bytes, "duration_ms": millis(took), "slowed": slowed,
            "pause_ms": paused.as_ref().map(millis),
            "longest_stall_ms": stall.map(|stall| stall.longest_stall_ms),
            "longest_stall_at_least_ms": stall.map(|stall| stall.longest_stall_at_least_ms),
        });
        return context.print_json(&mut out, &line);
    }
    let slowed = if *slowed { ", the guest slowed down" } else { "" };
    let paused = paused.map_or_else(String::new, |p| format!(", paused for {} ms", millis(&p)));
    let stall = stall.map_or_else(String::new, |s| format!(", the guest's longest stall {s}"));
    let seconds = took.as_secs_f64();
    let rate = human_bytes((*bytes as f64 / seconds.max(0.001)) as u64);
    writeln!(
        out,
        "{domain}/{}: back on {}, {} in {seconds:.1} s ({rate}/s){slowed}{paused}{stall}",
        disk.disk,
        disk.base.path.display(),
        human_bytes(*bytes),
    )?;
    Ok(())
}
