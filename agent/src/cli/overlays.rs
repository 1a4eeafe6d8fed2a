//! What `create` and `purge` share: which machines are meant, and how they are reached.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::{Context, backup};
use crate::error::{CommandError, INTERRUPTED};
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::{self, KnownDomain};
use crate::hypervisor::{Machine, Reach, Tracking};
use crate::overlay::converge::Budget;
use crate::overlay::files::is_same;
use crate::overlay::libvirt::LibvirtLayers;
use crate::overlay::record::{Held, Purpose, Records};
use crate::overlay::stall::Stall;
use crate::overlay::track::{self, Tracker};
use crate::units::parse_bytes;

/// The machines that are meant.
#[derive(Debug, Args)]
pub struct Machines {
    /// Domains of libvirt: names, patterns of names, or uuids
    #[arg(value_name = "DOMAIN", required_unless_present_any = ["all", "qmp"], conflicts_with = "qmp")]
    pub domains: Vec<String>,
    /// All domains of libvirt
    #[arg(long, conflicts_with_all = ["domains", "qmp"])]
    pub all: bool,
    /// The monitor socket of a QEMU that nothing else manages
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
}

/// One socket has one record and one lock, under whatever name it is given.
pub fn monitor(socket: &Path) -> PathBuf {
    fs::canonicalize(socket).unwrap_or_else(|_| std::path::absolute(socket).unwrap_or_default())
}

/// How a domain is reached.
pub fn reach(libvirt: &Libvirt, known: &KnownDomain) -> Reach {
    Reach::Domain(libvirt.domain(&known.uuid).address())
}

/// Does something with each domain of libvirt that is meant.
///
/// # Errors
/// That of the only one; of several domains, how many failed.
pub async fn each(
    machines: &Machines,
    context: &Context,
    work: impl AsyncFn(&Libvirt, &KnownDomain) -> Result<(), CommandError>,
) -> Result<(), CommandError> {
    let uri = &context.global.connect;
    let libvirt = context.until_interrupted(async { Ok(Libvirt::connect(uri).await?) }).await?;
    let known = async { Ok(libvirt::domains(&libvirt).await?) };
    let chosen = backup::choose(&context.until_interrupted(known).await?, &machines.domains)?;
    let (count, mut failed) = (chosen.len(), 0);
    for known in chosen {
        match work(&libvirt, &known).await {
            Ok(()) => {}
            Err(error) if count == 1 || error.code() == INTERRUPTED => return Err(error),
            Err(error) => {
                // One domain that cannot be helped keeps nobody from the others.
                let text = crate::error::describe(&error);
                tracing::error!("domain `{}`: {}", known.name, text.trim_end());
                failed += 1;
            }
        }
    }
    match failed {
        0 => Ok(()),
        failed => Err(CommandError::SomeFailed { failed, count }),
    }
}

/// Has a backup begin no dirty bitmap in an overlay that `create` made, for `purge` would delete it: the
/// disk is read whole, and the dirty bitmaps in its own image go on counting. Returns whether there are
/// overlays.
///
/// # Errors
/// When the records cannot be read.
pub fn leave_untracked(
    machine: &mut Machine,
    reach: &Reach,
    state_dir: &Path,
) -> Result<bool, CommandError> {
    let held = Records::open(state_dir)?.all_of(reach)?;
    let overlays: Vec<_> = held.iter().flat_map(|held| &held.record().disks).collect();
    for disk in &mut machine.disks {
        let is_it = |path: &PathBuf| overlays.iter().any(|known| known.overlay == *path);
        if disk.image.as_ref().is_some_and(is_it) {
            let reason = "an overlay is above its image: `kvmsnap purge` ends that".to_owned();
            disk.tracking = Tracking::Unsupported(reason);
        }
    }
    Ok(!held.is_empty())
}

/// The overlays that track the changes of a domain that runs, where nothing keeps its next backup from
/// reading by them. Changes nothing.
///
/// # Errors
/// [`CommandError`].
pub async fn tracker(
    libvirt: &Libvirt,
    known: &KnownDomain,
    reach: &Reach,
    state_dir: &Path,
) -> Result<Option<Tracker>, CommandError> {
    let records = Records::open(state_dir)?;
    let all = records.all_of(reach)?;
    let track = |held: &Held| held.record().purpose == Purpose::Tracking;
    if !known.is_active || all.is_empty() || !all.iter().all(track) {
        return Ok(None);
    }
    let layers = LibvirtLayers::new(libvirt.domain(&known.uuid)).await?;
    let tracker = track::look(&layers, &records, reach).await?;
    Ok(Some(tracker).filter(|tracker| tracker.lost().is_none()))
}

/// How a guest is brought back onto its own images.
#[derive(Debug, Clone, Args)]
pub struct WayBack {
    /// How long a guest may write as fast as it likes; then it is slowed down, half as long again
    #[arg(long, value_name = "SECONDS", default_value = "3600", value_parser = parse_seconds)]
    deadline: Duration,
    /// How long it may stand still where that was not enough; 0 for never
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = parse_seconds)]
    max_pause: Duration,
    /// Write back at most so many bytes a second, like 100MiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    limit_rate: Option<u64>,
}

impl WayBack {
    /// What is allowed.
    pub fn budget(&self) -> Budget {
        Budget { deadline: self.deadline, pause_max: self.max_pause, rate: self.limit_rate }
    }
}

/// The guest's longest stall, as `--json` prints it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StallLine {
    /// No operation of the guest took longer.
    pub longest_stall_ms: u64,
    /// One took at least so long.
    pub longest_stall_at_least_ms: u64,
}

impl StallLine {
    /// That of a stall.
    pub fn of(stall: Stall) -> Self {
        let [longest_stall_at_least_ms, longest_stall_ms] = stall.millis();
        Self { longest_stall_ms, longest_stall_at_least_ms }
    }
}

/// The records of a domain, oldest first. Those of one that is gone, whose images this one has, are its own
/// from here on: it was defined anew with another uuid.
///
/// # Errors
/// [`CommandError`].
pub async fn records_of(
    libvirt: &Libvirt,
    known: &KnownDomain,
    records: &Records,
) -> Result<Vec<Held>, CommandError> {
    let reach = reach(libvirt, known);
    let found = records.all_of(&reach)?;
    if !found.is_empty() {
        return Ok(found);
    }
    let domains = libvirt::domains(libvirt).await?;
    let is_gone = |held: &Held| match &held.record().reach {
        Reach::Domain(other) => {
            let is_here = libvirt.domain(&known.uuid).address().uri == other.uri;
            is_here && domains.iter().all(|domain| domain.uuid != other.uuid)
        }
        Reach::Monitor(_) => false,
    };
    let mut orphans = records.all()?.0;
    orphans.retain(is_gone);
    if orphans.is_empty() {
        return Ok(orphans);
    }
    let disks = libvirt.domain(&known.uuid).describe().await?.disks;
    let tops: Vec<_> = disks.iter().filter_map(|d| d.file.as_ref().or(d.device.as_ref())).collect();
    orphans.retain(|held| {
        let images = held.record().disks.iter().flat_map(|disk| [&disk.overlay, &disk.base.path]);
        images.into_iter().any(|image| tops.iter().any(|top| is_same(top, image)))
    });
    for held in &mut orphans {
        let record = held.record();
        tracing::warn!(
            "domain `{}`, which is gone, had these images: domain `{}` takes over its overlays",
            record.domain,
            known.name
        );
        records.update(held, |record| {
            (record.reach, record.uuid) = (reach.clone(), known.uuid.clone());
        })?;
    }
    Ok(orphans)
}

/// A time span in seconds, with a fraction where one is wanted.
///
/// # Errors
/// In words, where it is none.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "use a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
