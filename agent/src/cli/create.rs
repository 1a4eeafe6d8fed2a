//! `kvmsnap create`

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::backup::{lock, recover_earlier};
use super::overlays::{self, Machines};
use super::{Context, list::local_time};
use crate::error::CommandError;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::{KnownDomain, LibvirtDomain, Places};
use crate::hypervisor::monitor::ANSWER_TIMEOUT;
use crate::hypervisor::qmp::BareQemu;
use crate::hypervisor::{Choice, Hypervisor, Reach};
use crate::names::DomainName;
use crate::overlay::create::{self, Request};
use crate::overlay::libvirt::LibvirtLayers;
use crate::overlay::qmp::QmpLayers;
use crate::overlay::record::{Held, Purpose, Records};
use crate::overlay::{Layers, OverlayError, files};
use crate::quiesce::Mode;
use crate::quiesce::guest_agent::AgentAddress;
use crate::units::parse_bytes;

/// Have the images of running guests hold still, for any tool to copy; `purge` ends it
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap create web                  prints the files that hold still
  cp --sparse=always /var/lib/libvirt/images/web.qcow2 /mnt/
  kvmsnap purge web                   the guest goes back to its own images

The guest writes to overlays meanwhile: they take what it writes, so do not leave it so for long.")]
pub struct CreateArgs {
    #[command(flatten)]
    machines: Machines,
    /// The socket of the guest agent, to freeze file systems for the instant
    #[arg(long, value_name = "SOCKET", requires = "qmp")]
    qga: Option<PathBuf>,
    /// What the guest is called; QEMU's own name where it has one
    #[arg(long, value_name = "NAME", requires = "qmp")]
    name: Option<DomainName>,
    /// Whether file systems are frozen for the instant
    #[arg(long, value_name = "MODE", default_value = "auto")]
    quiesce: Mode,
    /// Where overlays go; beside each image unless given
    #[arg(long, value_name = "FOLDER", env = "KVMSNAP_OVERLAY_DIR")]
    overlay_dir: Option<PathBuf>,
    /// Room to reserve for what the guest writes to each disk, 1GiB unless given
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    reserve: Option<u64>,
}

/// Runs it.
///
/// # Errors
/// Whatever keeps the images from holding still; of several domains, how many failed.
pub async fn run(args: CreateArgs, context: &Context) -> Result<(), CommandError> {
    let Some(socket) = &args.machines.qmp else {
        return overlays::each(&args.machines, context, async |libvirt, known| {
            of_domain(libvirt, known, &args, context).await
        })
        .await;
    };
    let monitor = overlays::monitor(socket);
    let reach = Reach::Monitor(monitor.clone());
    let _lock = context.until_interrupted(lock(&context.global.run_dir, &reach)).await?;
    let qemu = async {
        let (run_dir, journal) = (&context.global.run_dir, context.journal()?);
        let qemu = BareQemu::connect(&monitor, run_dir, None, false, ANSWER_TIMEOUT).await?;
        recover_earlier(&qemu, &journal, run_dir).await?;
        Ok((qemu.name().await?, qemu.discover(&Choice::default()).await?))
    };
    let (name, machine) = context.until_interrupted(qemu).await?;
    let layers = QmpLayers::connect(&monitor, None).await?;
    let domain = match (&args.name, &name) {
        (Some(name), _) => name.clone(),
        (None, Some(name)) => name.parse()?,
        (None, None) => return Err(CommandError::NoName { reach }),
    };
    let agent = args.qga.clone().map(AgentAddress::Socket);
    let records = Records::open(&context.global.state_dir)?;
    let held = records.of(&reach)?;
    hold_still(&layers, &machine, (domain, reach, agent), (records, held), &args, context).await
}

async fn of_domain(
    libvirt: &Libvirt,
    known: &KnownDomain,
    args: &CreateArgs,
    context: &Context,
) -> Result<(), CommandError> {
    let (run_dir, reach) = (&context.global.run_dir, overlays::reach(libvirt, known));
    let _lock = context.until_interrupted(lock(run_dir, &reach)).await?;
    let domain: DomainName = known.name.parse()?;
    let handle = libvirt.domain(&known.uuid);
    if !context.until_interrupted(async { Ok(handle.is_active().await?) }).await? {
        // Of all domains those that are off need nothing.
        return match args.machines.all {
            true => Ok(()),
            false => Err(OverlayError::NotRunning { domain: known.name.clone() }.into()),
        };
    }
    let look = async {
        let hypervisor = LibvirtDomain::new(libvirt, &known.uuid, Places::default(), false);
        recover_earlier(&hypervisor, &context.journal()?, run_dir).await?;
        let machine = hypervisor.discover(&Choice::default()).await?;
        Ok((machine, hypervisor.agent(), LibvirtLayers::new(handle).await?))
    };
    let (machine, agent, layers) = context.until_interrupted(look).await?;
    let records = Records::open(&context.global.state_dir)?;
    let held = async { overlays::records_of(libvirt, known, &records).await };
    let held = context.until_interrupted(held).await?.into_iter().next();
    hold_still(&layers, &machine, (domain, reach, agent), (records, held), args, context).await
}

async fn hold_still(
    layers: &impl Layers,
    machine: &crate::hypervisor::Machine,
    (domain, reach, agent): (DomainName, Reach, Option<AgentAddress>),
    (records, held): (Records, Option<Held>),
    args: &CreateArgs,
    context: &Context,
) -> Result<(), CommandError> {
    if let Some(held) = held
        && let Some(held) = create::settle(layers, &records, held).await?
    {
        if held.record().purpose == Purpose::Tracking {
            let domain = held.record().domain.clone();
            return Err(OverlayError::Tracked { domain }.into());
        }
        let ours = held.record().purpose == Purpose::User;
        return match ours && create::holds_still(layers, &held).await? {
            true => print(&held, true, context),
            false => Err(OverlayError::NotStill { domain: held.record().domain.clone() }.into()),
        };
    }
    for skipped in &machine.skipped {
        tracing::info!("{}: left out, {}", skipped.device, skipped.reason);
    }
    let request = Request {
        applications: context.config()?.domain(domain.as_str()).applications(),
        purpose: Purpose::User,
        quiesce: args.quiesce,
        agent,
        folder: args.overlay_dir.clone(),
        reserve: args.reserve.unwrap_or(files::RESERVE),
    };
    let created =
        create::create(layers, &records, machine, domain, reach, &request, async || {}).await;
    let (held, warnings) = created?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    print(&held, false, context)
}

fn print(held: &Held, already: bool, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    let record = held.record();
    let since = record.held.expect("its images hold still");
    for disk in &record.disks {
        if context.global.json {
            let line = serde_json::json!({
                "domain": record.domain, "disk": disk.disk, "frozen": disk.base.path,
                "format": disk.base.format, "overlay": disk.overlay, "time": since.time,
                "consistency": since.consistency, "already": already,
            });
            context.print_json(&mut out, &line)?;
            continue;
        }
        let (base, overlay) = (disk.base.path.display(), disk.overlay.display());
        let (format, time) = (&disk.base.format, local_time(since.time));
        let already = if already { "already " } else { "" };
        let consistency = since.consistency.as_str();
        writeln!(
            out,
            "{}/{}: {base} ({format}) {already}holds still since {time}, {consistency}-consistent; \
             the guest writes to {overlay}",
            record.domain, disk.disk
        )?;
    }
    Ok(())
}
