//! Undoing what an earlier run left: one idempotent function for each record of the journal, run at the
//! start of every backup under the domain's lock. It touches only what the record names.

use std::future::pending;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use qmp_client::QmpError;

use crate::capture::{self, libvirt_job, lvm};
use crate::hypervisor::libvirt::connection::{DomainHandle, Libvirt};
use crate::hypervisor::libvirt::shut_off::ShutOffDomain;
use crate::hypervisor::libvirt::{self, KnownDomain, LibvirtDomain, Places};
use crate::hypervisor::monitor::ANSWER_TIMEOUT;
use crate::hypervisor::qmp::BareQemu;
use crate::hypervisor::{Hypervisor, HypervisorError, Reach};
use crate::journal::{Journal, JournalError, Phase, Process, Record, Recorded};
use crate::names::BitmapNames;
use crate::overlay::converge::Budget;
use crate::overlay::libvirt::LibvirtLayers;
use crate::overlay::purge::Purge;
use crate::overlay::qmp::QmpLayers;
use crate::overlay::record::{Purpose, Records};
use crate::overlay::{self, Layers, OverlayError};
use crate::progress::{Progress, When};
use crate::quiesce::{FREEZE_TIMEOUT, guest_agent};
use crate::stop::{self, StopError};

/// How long a command that is about something else waits for a guest on its way back from overlays.
pub const IN_PASSING: Budget =
    Budget { deadline: Duration::from_secs(30), pause_max: Duration::from_millis(500), rate: None };
/// How long one waits that is there for nothing else, and that nobody waits for.
pub const UNATTENDED: Budget = Budget { deadline: Duration::from_secs(3600), ..IN_PASSING };

/// Why something could not be undone. Its record stays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecoverError {
    /// QEMU cannot be asked or refuses.
    #[error("cannot undo what run {} left in the guest `{}`", .record.run, .record.domain)]
    Hypervisor {
        /// What is to be undone.
        record: Box<Record>,
        /// Why not.
        source: HypervisorError,
    },
    /// A domain cannot be started again.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Undoes a record of a machine, then clears it. Overlays stay: they have records of their own, by which
/// [`end_overlays`] writes them back.
///
/// # Errors
/// [`RecoverError`]; calling it again goes on from there.
pub async fn undo(
    hypervisor: &impl Hypervisor,
    journal: &Journal,
    recorded: &Recorded,
    run_dir: &Path,
) -> Result<(), RecoverError> {
    let record = recorded.record();
    if record.overlays {
        let failed = |source| RecoverError::Hypervisor { record: Box::new(record.clone()), source };
        let_go_of_ours(hypervisor, record).await.map_err(failed)?;
        capture::remove_socket(run_dir, &record.run).map_err(failed)?;
        return Ok(journal.clear(recorded)?);
    }
    if record.qemu.is_some() && record.qemu != hypervisor.process() {
        // Another QEMU is reached that way by now.
        return forget(journal, recorded, run_dir).await;
    }
    tracing::warn!(run = %record.run, domain = %record.domain, "undoing what an earlier run left");
    let undone = async {
        if record.holds_guest {
            let_go(hypervisor, record).await?;
        }
        lvm::remove(&record.snapshots).await?;
        hypervisor.release(recorded).await?;
        hypervisor.drop_bitmaps(&obsolete_bitmaps(record)).await
    };
    undone
        .await
        .map_err(|source| RecoverError::Hypervisor { record: Box::new(record.clone()), source })?;
    Ok(journal.clear(recorded)?)
}

/// Undoes a record, however its machine is reached.
///
/// # Errors
/// [`RecoverError`]; calling it again goes on from there.
pub async fn undo_wherever(
    journal: &Journal,
    recorded: &Recorded,
    run_dir: &Path,
) -> Result<(), RecoverError> {
    let record = recorded.record();
    if record.stopped.is_some() {
        return Ok(stop::undo(journal, recorded).await?);
    }
    let failed = |source| RecoverError::Hypervisor { record: Box::new(record.clone()), source };
    match reach(record, run_dir).await.map_err(failed)? {
        Some(Machine::Bare(qemu)) => wholly(&qemu, journal, recorded, run_dir).await,
        Some(Machine::Libvirt(domain)) => wholly(&*domain, journal, recorded, run_dir).await,
        Some(Machine::ShutOff(domain)) => wholly(&*domain, journal, recorded, run_dir).await,
        // The overlays of one that has ended are written back at rest.
        None if record.overlays && matches!(record.reach, Reach::Monitor(_)) => {
            let layers = QmpLayers::ended();
            let ended = end_overlays(&layers, journal.state_dir(), &record.reach, UNATTENDED).await;
            ended.map_err(failed)?;
            forget(journal, recorded, run_dir).await
        }
        None => forget(journal, recorded, run_dir).await,
    }
}

/// Undoes a record, and writes back the overlays of its run. While that lasts the record stays.
async fn wholly(
    hypervisor: &impl Hypervisor,
    journal: &Journal,
    recorded: &Recorded,
    run_dir: &Path,
) -> Result<(), RecoverError> {
    let record = recorded.record();
    if record.overlays {
        let failed = |source| RecoverError::Hypervisor { record: Box::new(record.clone()), source };
        let_go_of_ours(hypervisor, record).await.map_err(failed)?;
        let layers = hypervisor.layers().await.map_err(failed)?;
        let ended = end_overlays(&layers, journal.state_dir(), &record.reach, UNATTENDED).await;
        ended.map_err(failed)?;
    }
    undo(hypervisor, journal, recorded, run_dir).await
}

/// Lets the very guest go on that a run may have paused or frozen, not another one that is reached that way.
async fn let_go_of_ours(
    hypervisor: &impl Hypervisor,
    record: &Record,
) -> Result<(), HypervisorError> {
    match record.holds_guest && record.qemu == hypervisor.process() {
        true => let_go(hypervisor, record).await,
        false => Ok(()),
    }
}

/// Brings a guest back, within a budget, from the overlays that a backup has left. Where a person must
/// decide, that is said, and the overlays stay.
///
/// # Errors
/// [`HypervisorError`] where another try may do better.
pub async fn end_overlays(
    layers: &impl Layers,
    state_dir: &Path,
    reach: &Reach,
    budget: Budget,
) -> Result<(), HypervisorError> {
    let records = Records::open(state_dir).map_err(OverlayError::from)?;
    overlay::track::settle(layers, &records, reach).await?;
    let all = records.all_of(reach).map_err(OverlayError::from)?;
    let progress = Progress::new(When::Never, true);
    let purge = Purge { layers, records: &records, budget, progress: &progress };
    // The newest lies on top.
    for held in all.into_iter().rev().filter(|held| held.record().purpose == Purpose::Backup) {
        let domain = held.record().domain.clone();
        match purge.run(held, pin!(pending())).await {
            Ok(_) => {}
            Err(
                error @ (OverlayError::Hypervisor(_)
                | OverlayError::TooSlow { .. }
                | OverlayError::BaseGrows { .. }),
            ) => {
                return Err(error.into());
            }
            Err(error) => {
                tracing::error!(%domain, "what a backup left stays, see `kvmsnap purge`: {error}");
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The same for a record of overlays, however its machine is reached.
///
/// # Errors
/// As [`end_overlays`].
pub async fn end_overlays_wherever(
    record: &overlay::record::Record,
    state_dir: &Path,
) -> Result<(), HypervisorError> {
    match &record.reach {
        Reach::Monitor(socket) => {
            let layers = QmpLayers::connect(socket, record.qemu).await?;
            end_overlays(&layers, state_dir, &record.reach, UNATTENDED).await
        }
        Reach::Domain(address) => {
            let layers = LibvirtLayers::new(DomainHandle::connect(address).await?).await?;
            end_overlays(&layers, state_dir, &record.reach, UNATTENDED).await
        }
    }
}

/// Whether the machine of a record has ended. Changes nothing.
///
/// # Errors
/// [`HypervisorError`] when that cannot be told.
pub async fn has_ended(record: &Record, run_dir: &Path) -> Result<bool, HypervisorError> {
    Ok(reach(record, run_dir).await?.is_none())
}

enum Machine {
    Bare(BareQemu),
    Libvirt(Box<LibvirtDomain>),
    ShutOff(Box<ShutOffDomain>),
}

/// Reaches the machine of a record; `None` where it has ended.
async fn reach(record: &Record, run_dir: &Path) -> Result<Option<Machine>, HypervisorError> {
    match &record.reach {
        Reach::Monitor(socket) => {
            match BareQemu::connect(socket, run_dir, None, false, ANSWER_TIMEOUT).await {
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
            let found = known.into_iter().find(|domain| domain.uuid == address.uuid);
            Ok(found.map(|KnownDomain { uuid, is_active, .. }| match is_active {
                true => {
                    let domain = LibvirtDomain::new(&libvirt, &uuid, Places::default(), false);
                    Machine::Libvirt(Box::new(domain))
                }
                false => {
                    let domain = ShutOffDomain::new(libvirt.domain(&uuid), run_dir, false);
                    Machine::ShutOff(Box::new(domain))
                }
            }))
        }
    }
}

/// Clears a record whose QEMU has ended, and with it all that the run had made in it. A dirty bitmap
/// that was saved to the image all the same is dropped by the next backup.
///
/// # Errors
/// [`RecoverError`].
pub async fn forget(
    journal: &Journal,
    recorded: &Recorded,
    run_dir: &Path,
) -> Result<(), RecoverError> {
    let record = recorded.record();
    let snapshots = lvm::remove(&record.snapshots).await;
    snapshots
        .map_err(|source| RecoverError::Hypervisor { record: Box::new(record.clone()), source })?;
    capture::remove_socket(run_dir, &record.run)
        .and_then(|()| match record.reach {
            Reach::Monitor(_) => Ok(()),
            Reach::Domain(_) => libvirt_job::remove_files(record),
        })
        .map_err(|source| RecoverError::Hypervisor { record: Box::new(record.clone()), source })?;
    Ok(journal.clear(recorded)?)
}

/// The bitmaps that a run leaves behind and nobody needs, each a node and a name.
pub fn obsolete_bitmaps(record: &Record) -> Vec<(String, String)> {
    let names = BitmapNames::of_repository(&record.repository_id);
    let bitmaps = record.disks.iter().filter_map(|disk| {
        let name = match record.phase {
            Phase::Capturing => disk.bitmap_new.as_ref(),
            Phase::Recording => None,
            // A copy of the repository may have been continued by a bitmap of the original's chain.
            Phase::Recorded => disk.bitmap_old.as_ref().filter(|name| names.owns(name)),
        };
        Some((disk.format.clone(), name?.clone()))
    });
    bitmaps.collect()
}

/// Lets the guest go on and thaws it. The watchdog has done so already unless it was killed too.
///
/// # Errors
/// When it cannot be let go on.
pub async fn let_go(hypervisor: &impl Hypervisor, record: &Record) -> Result<(), HypervisorError> {
    if record.pauses {
        hypervisor.let_go_on().await?;
    }
    if let Some(agent) = &record.agent
        && let Err(error) = guest_agent::thaw(agent, None, FREEZE_TIMEOUT).await
    {
        tracing::warn!(%error, "cannot ask the guest agent to thaw the guest");
    }
    Ok(())
}
