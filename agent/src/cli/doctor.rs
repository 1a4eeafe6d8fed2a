//! `kvmsnap doctor`

use std::io::Write;
use std::path::Path;

use clap::Args;
use qmp_client::QmpError;
use serde::Serialize;

use super::Context;
use crate::error::CommandError;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::{self, KnownDomain, LibvirtDomain, Places};
use crate::hypervisor::qmp::BareQemu;
use crate::hypervisor::{HypervisorError, Reach};
use crate::journal::{Journal, Process, Record, Recorded};
use crate::lock::{DomainLock, LockError};
use crate::recover;

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
    let mut out = std::io::stdout().lock();
    if pending.is_empty() && damaged.is_empty() && !context.global.json {
        writeln!(out, "nothing is left of earlier runs")?;
    }
    let mut left = damaged.len();
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

const RUNNING: &str = "a backup is running";

/// Says what became of a run, and whether what it left is mended now.
async fn examine(
    journal: &Journal,
    recorded: &Recorded,
    repair: bool,
    context: &Context,
) -> Result<(&'static str, bool), CommandError> {
    let record = recorded.record();
    let run_dir = &context.global.run_dir;
    let _lock = match DomainLock::on_reach(run_dir, &record.reach) {
        Err(LockError::Held { .. }) => return Ok((RUNNING, false)),
        lock => lock?,
    };
    let left = "its run ended without letting go of the guest";
    let gone = match reach_machine(record, run_dir).await? {
        Some(Machine::Bare(qemu)) if repair => {
            recover::undo(&qemu, journal, recorded, run_dir).await?;
            false
        }
        Some(Machine::Libvirt(domain)) if repair => {
            recover::undo(&*domain, journal, recorded, run_dir).await?;
            false
        }
        Some(_) => false,
        None => true,
    };
    if gone && repair {
        recover::forget(journal, recorded, run_dir)?;
    }
    let ended = "QEMU has ended, and with it all that the run had made in it";
    Ok((if gone { ended } else { left }, repair))
}

enum Machine {
    Bare(BareQemu),
    Libvirt(Box<LibvirtDomain>),
}

/// Reaches the machine of a record; `None` where it has ended.
async fn reach_machine(record: &Record, run_dir: &Path) -> Result<Option<Machine>, CommandError> {
    match &record.reach {
        Reach::Monitor(socket) => {
            match BareQemu::connect(socket, run_dir, None, false).await {
                // A socket can be moved; a process that ended has ended.
                Err(HypervisorError::Monitor { source: QmpError::Connect { .. }, .. })
                    if !record.qemu.is_some_and(Process::is_alive) =>
                {
                    Ok(None)
                }
                connected => Ok(Some(Machine::Bare(connected?))),
            }
        }
        Reach::Domain(address) => {
            let libvirt = Libvirt::connect(&address.uri).await?;
            let known = libvirt::domains(&libvirt).await?;
            let active = |domain: &KnownDomain| domain.uuid == address.uuid && domain.is_active;
            let domain = known
                .iter()
                .any(active)
                .then(|| LibvirtDomain::new(&libvirt, &address.uuid, Places::default(), false));
            Ok(domain.map(Box::new).map(Machine::Libvirt))
        }
    }
}
