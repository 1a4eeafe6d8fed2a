//! Overlays that stay between two backups: what they hold is what changed.
//!
//! Each backup freezes the overlay on top under a fresh one and reads what it holds. Once that is recorded
//! the frozen one is written into the image beneath it while the guest goes on above. A backup that fails
//! has its fresh overlay written into the older one, which goes on counting.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use super::files::{self, Growth, is_same};
use super::purge::{Purge, refuse_snapshots};
use super::record::{DiskRecord, Held, Purpose, Record, Records, Stage};
use super::{Chain, Layers, OverlayError};
use crate::hypervisor::{Machine, Reach, Tracking};
use crate::names::DiskName;

/// How often a job is looked at.
const POLL: Duration = Duration::from_millis(100);

/// What is known of how a machine's changes are tracked.
#[derive(Debug, Default)]
pub struct Tracker {
    /// The disks whose changes an overlay holds, with their records.
    on_top: Vec<DiskRecord>,
    /// Why changes cannot be tracked that way now, in words.
    lost: Option<String>,
}

/// Looks at how a machine's changes are tracked. Changes nothing.
///
/// # Errors
/// [`OverlayError`].
pub async fn look(
    layers: &impl Layers,
    records: &Records,
    reach: &Reach,
) -> Result<Tracker, OverlayError> {
    let tracked = tracking(records, reach)?;
    let mut tracker = Tracker::default();
    if tracked.is_empty() {
        return Ok(tracker);
    }
    let chains = layers.chains().await?.unwrap_or_default();
    for record in tracked.iter().map(Held::record) {
        for disk in &record.disks {
            let Some(chain) = chains.iter().find(|chain| chain.disk == disk.disk) else { continue };
            let at = chain.images.iter().position(|image| is_same(&image.path, &disk.overlay));
            let is_ours = files::is_ours(disk)? == Some(true);
            match at {
                Some(0) if is_ours && disk.stage == Stage::Above => {
                    tracker.on_top.push(disk.clone());
                }
                Some(depth) if depth > 0 && lies_beneath(&tracked, disk) => {}
                // One that was written back waits for its end.
                None if matches!(disk.stage, Stage::Back(_)) => {}
                _ => tracker.lost = Some(lost(record, disk)),
            }
        }
    }
    Ok(tracker)
}

/// The records of the overlays that track a machine's changes, oldest first.
fn tracking(records: &Records, reach: &Reach) -> Result<Vec<Held>, OverlayError> {
    let mut all = records.all_of(reach)?;
    all.retain(|held| held.record().purpose == Purpose::Tracking);
    Ok(all)
}

/// Whether another of these overlays lies above an overlay.
fn lies_beneath(all: &[Held], disk: &DiskRecord) -> bool {
    let disks = all.iter().flat_map(|held| &held.record().disks);
    disks.into_iter().any(|above| is_same(&above.base.path, &disk.overlay))
}

fn lost(record: &Record, disk: &DiskRecord) -> String {
    format!(
        "disk `{}` runs without its overlay {}, which holds what the guest wrote since {}; nothing was \
         deleted, and `kvmsnap purge` says more",
        disk.disk,
        disk.overlay.display(),
        record.held.map_or(record.begun, |held| held.time),
    )
}

impl Tracker {
    /// Why changes cannot be tracked by overlays until a person has decided something.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// Has a machine's disks tell of their own images, and of the overlays that hold what changed.
    pub fn describe(&self, machine: &mut Machine) {
        for disk in &mut machine.disks {
            let known = self.on_top.iter().find(|known| known.disk == disk.target);
            let overlay = known.map(|known| known.overlay.display().to_string());
            if let Some(known) = known {
                disk.driver.clone_from(&known.base.format);
                disk.image = Some(known.base.path.clone());
            }
            disk.tracking = Tracking::Overlay(overlay);
        }
    }
}

/// Writes overlays that lie beneath others of these into the images beneath them, and deletes them. The
/// guest goes on above. What cannot be done for one disk keeps no other.
///
/// # Errors
/// The first [`OverlayError`]; calling it again goes on from there, and until then nothing is lost.
pub async fn sink<L: Layers>(
    purge: &Purge<'_, L>,
    reach: &Reach,
    mut interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), OverlayError> {
    let (layers, records) = (purge.layers, purge.records);
    settle(layers, records, reach).await?;
    let mut failed = None;
    for mut lower in tracking(records, reach)? {
        for index in 0..lower.record().disks.len() {
            match sink_disk(purge, &mut lower, index, interrupt.as_mut()).await {
                Err(OverlayError::Interrupted) => return Err(OverlayError::Interrupted),
                sunk => failed = failed.or(sunk.err()),
            }
        }
    }
    settle(layers, records, reach).await?;
    for lower in tracking(records, reach)? {
        let mut stages = lower.record().disks.iter().map(|disk| &disk.stage);
        if stages.all(|stage| matches!(stage, Stage::Back(_))) {
            failed = failed.or(purge.run(lower, interrupt.as_mut()).await.err());
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Writes an overlay into its image where it lies beneath another one and right above that image.
async fn sink_disk<L: Layers>(
    purge: &Purge<'_, L>,
    lower: &mut Held,
    index: usize,
    interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), OverlayError> {
    let (layers, records) = (purge.layers, purge.records);
    let disk = lower.record().disks[index].clone();
    // The guest may have been started on it again: then it is no longer ours to write back.
    if matches!(disk.stage, Stage::Back(_)) || !is_between(layers, &disk).await? {
        return Ok(());
    }
    refuse_snapshots(&disk).await?;
    if let Some(by) = layers.others(&disk.base.path, &disk.disk).await? {
        let (base, overlay) = (disk.base.path.clone(), disk.overlay.clone());
        return Err(OverlayError::Shared { disk: disk.disk, base, overlay, by });
    }
    // From here on the base does not hold still.
    records.update(lower, |record| record.disks[index].stage = Stage::Committing)?;
    purge.progress.phase(&format!("writing back {}", disk.overlay.display()));
    let base = Growth::of(&disk.base.path);
    layers.commit(lower, &disk, purge.budget.rate).await?;
    let begun = Instant::now();
    let words =
        |words: &str| OverlayError::JobFailed { disk: disk.disk.clone(), words: words.to_owned() };
    // One that is not waited for goes on, and the next backup joins it.
    let sunk = wait(purge, lower, &disk, base, interrupt).await?;
    // libvirt keeps no word of a job that failed: the chain tells.
    match sunk && is_between(layers, &disk).await? {
        true => Err(words("its job has ended early")),
        false if sunk => Ok(()),
        false => {
            let seconds = begun.elapsed().as_secs();
            tracing::info!("{}: not written back within {seconds} s, that goes on", disk.disk);
            Ok(())
        }
    }
}

/// Whether an overlay lies right above its image, and beneath another one.
async fn is_between(layers: &impl Layers, disk: &DiskRecord) -> Result<bool, OverlayError> {
    let chains = layers.chains().await?.unwrap_or_default();
    let Some(chain) = chains.iter().find(|chain| chain.disk == disk.disk) else { return Ok(false) };
    Ok(chain.images.windows(3).any(|images| {
        is_same(&images[1].path, &disk.overlay) && is_same(&images[2].path, &disk.base.path)
    }))
}

/// Waits until a job that writes an overlay into the image beneath it has ended, as long as is allowed.
async fn wait<L: Layers>(
    purge: &Purge<'_, L>,
    held: &Held,
    disk: &DiskRecord,
    base: Option<Growth>,
    mut interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<bool, OverlayError> {
    let (layers, begun) = (purge.layers, Instant::now());
    let failed = |words| OverlayError::JobFailed { disk: disk.disk.clone(), words };
    while !layers.has_sunk(held, disk).await?.map_err(failed)? {
        if let Err(grows) = base.as_ref().map_or(Ok(()), |base| base.check(&disk.disk)) {
            layers.cancel(held, disk).await?;
            return Err(grows);
        }
        if begun.elapsed() >= purge.budget.deadline {
            return Ok(false);
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            () = interrupt.as_mut() => return Err(OverlayError::Interrupted),
        }
    }
    Ok(true)
}

/// Finds out which overlays lie no longer beneath those above them: what they held is in the image beneath.
/// Records that, for those above are put above that image from here on.
///
/// # Errors
/// [`OverlayError`].
pub async fn settle(
    layers: &impl Layers,
    records: &Records,
    reach: &Reach,
) -> Result<(), OverlayError> {
    let all = records.all_of(reach)?;
    let begun = |held: &&Held| {
        let mut disks = held.record().disks.iter();
        held.record().purpose == Purpose::Tracking && disks.any(|d| d.stage == Stage::Committing)
    };
    if !all.iter().any(|held| begun(&held)) {
        return Ok(());
    }
    let Some(chains) = layers.chains().await? else { return Ok(()) };
    for mut lower in records.all_of(reach)?.into_iter().filter(|held| begun(&held)) {
        for index in 0..lower.record().disks.len() {
            let disk = lower.record().disks[index].clone();
            if disk.stage != Stage::Committing {
                continue;
            }
            for mut upper in records.all_of(reach)? {
                let at = above(&upper, &disk).filter(|_| upper.record().id != lower.record().id);
                let Some(at) = at.filter(|at| has_gone(&chains, &upper.record().disks[*at], &disk))
                else {
                    continue;
                };
                layers.close(&lower).await?;
                files::make_durable(&disk.base.path)?;
                let still = files::mark(&disk.base.path)?;
                let spent = files::mark(&disk.overlay)?;
                records.update(&mut upper, |record| {
                    let upper = &mut record.disks[at];
                    (upper.base, upper.still) = (disk.base.clone(), still);
                })?;
                records.update(&mut lower, |record| {
                    record.disks[index].stage = Stage::Back(spent);
                })?;
                break;
            }
        }
    }
    Ok(())
}

/// Which disk of a record is recorded above an overlay, or above the image beneath that already.
fn above(held: &Held, disk: &DiskRecord) -> Option<usize> {
    let is_it = |above: &DiskRecord| {
        is_same(&above.base.path, &disk.overlay) || is_same(&above.base.path, &disk.base.path)
    };
    held.record().disks.iter().position(is_it)
}

/// Whether an overlay lies right above the base of the one that was beneath it.
fn has_gone(chains: &[Chain], upper: &DiskRecord, lower: &DiskRecord) -> bool {
    let name: &DiskName = &upper.disk;
    let Some(chain) = chains.iter().find(|chain| chain.disk == *name) else { return false };
    chain.images.windows(2).any(|pair| {
        is_same(&pair[0].path, &upper.overlay) && is_same(&pair[1].path, &lower.base.path)
    })
}
