//! Overlays that stay between two backups: what they hold is what changed.
//!
//! Each backup freezes the overlay on top under a fresh one and reads what it holds. Once that is recorded
//! the frozen one is written into the image beneath it while the guest goes on above. A backup that fails
//! has its fresh overlay written into the older one, which goes on counting.

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};

use super::files::{self, Growth, is_same};
use super::purge::{self, Place, Purge, refuse_snapshots};
use super::record::{DiskRecord, Held, Purpose, Record, Records, Stage};
use super::stall::{Stall, Watch};
use super::{Chain, Layers, OverlayError, at_rest};
use crate::hypervisor::{Machine, Reach, Tracking};
use crate::journal::Process;
use crate::names::DiskName;

/// How often a job is looked at.
const POLL: Duration = Duration::from_millis(100);

/// What is known of how a machine's changes are tracked.
#[derive(Debug, Default)]
pub struct Tracker {
    /// The disks whose changes an overlay holds, with their records.
    on_top: Vec<DiskRecord>,
    /// Disks and what was written to beneath the overlays on top of them, which so do not hold all changes.
    changed: Vec<(DiskName, PathBuf)>,
    /// Why changes cannot be tracked that way now.
    lost: Option<OverlayError>,
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
            if chains.iter().all(|chain| chain.disk != disk.disk) {
                continue;
            }
            let disk = as_it_lies(&tracked, &chains, disk, layers.process());
            match standing(&tracked, &chains, record, &disk)? {
                Standing::Gone => continue,
                Standing::Lost(why) => {
                    tracker.lost = Some(why);
                    continue;
                }
                Standing::Top if disk.doubtful => {
                    tracker.changed.push((disk.disk.clone(), disk.base.path.clone()));
                    tracker.on_top.push(disk);
                    continue;
                }
                Standing::Top => tracker.on_top.push(disk.clone()),
                Standing::Beneath => {}
            }
            let is_still = match disk.stage {
                // While it is written back, the image beneath it changes rightly, as long as nobody else can
                // have been there.
                Stage::Committing => is_at_work(&disk, layers.process()),
                _ => disk.still.is_none() || files::mark(&disk.base.path)? == disk.still,
            };
            if !is_still {
                tracker.changed.push((disk.disk, disk.base.path));
            }
        }
    }
    Ok(tracker)
}

/// Where an overlay is that tracks changes.
enum Standing {
    /// The guest writes to it.
    Top,
    /// Another one that tracks changes lies above it.
    Beneath,
    /// It was written back, and waits for its end.
    Gone,
    /// It holds changes no longer, or not all.
    Lost(OverlayError),
}

fn standing(
    all: &[Held],
    chains: &[Chain],
    record: &Record,
    disk: &DiskRecord,
) -> Result<Standing, OverlayError> {
    let place = purge::place(chains, disk);
    let is_back = matches!(disk.stage, Stage::Back(_));
    if is_back && matches!(place, Place::Absent) {
        return Ok(Standing::Gone);
    }
    let is_ours = files::is_ours(disk)?;
    let (name, overlay) = (disk.disk.clone(), disk.overlay.clone());
    let unpurged =
        |why| OverlayError::Unpurged { disk: name.clone(), overlay: overlay.clone(), why };
    Ok(Standing::Lost(match place {
        _ if is_ours == Some(false) => OverlayError::Replaced { overlay },
        Place::Top if is_back => OverlayError::Revived { overlay },
        Place::Top if is_ours.is_none() => unpurged("that file was deleted"),
        Place::Top if disk.stage != Stage::Above => unpurged("a purge of it did not end"),
        Place::Top => return Ok(Standing::Top),
        Place::Below(_) if lies_beneath(all, disk) => return Ok(Standing::Beneath),
        Place::Below(above) => OverlayError::Covered { disk: name, above },
        Place::Moved => OverlayError::Moved { disk: name, overlay },
        Place::Absent if matches!(disk.stage, Stage::Pivoting(_)) => purge::untrusted(disk),
        Place::Absent => purge::elsewhere(record, disk),
    }))
}

/// An overlay with the image that it lies on by now: the one that was beneath it may have been written back
/// since anybody looked.
fn as_it_lies(
    all: &[Held],
    chains: &[Chain],
    disk: &DiskRecord,
    process: Option<Process>,
) -> DiskRecord {
    let mut disks = all.iter().flat_map(|held| &held.record().disks);
    let gone = disks.find(|lower| {
        lower.stage == Stage::Committing
            && is_same(&lower.overlay, &disk.base.path)
            && has_gone(chains, disk, lower)
    });
    match gone {
        Some(lower) => DiskRecord {
            base: lower.base.clone(),
            still: None,
            doubtful: disk.doubtful || !is_at_work(lower, process),
            ..disk.clone()
        },
        None => disk.clone(),
    }
}

/// Whether the very QEMU that was told to write an overlay back still runs: nobody else wrote to its image.
fn is_at_work(disk: &DiskRecord, process: Option<Process>) -> bool {
    process.is_some() && disk.sunk_by == process
}

/// The records of the overlays that track a machine's changes, oldest first.
fn tracking(records: &Records, reach: &Reach) -> Result<Vec<Held>, OverlayError> {
    let mut all = records.all_of(reach)?;
    all.retain(|held| held.record().purpose == Purpose::Tracking);
    Ok(all)
}

/// What each overlay holds, in bytes, that tracked changes until those of a record were put above it.
///
/// # Errors
/// [`OverlayError::Record`].
pub fn held_beneath(
    records: &Records,
    above: &Record,
) -> Result<Vec<(DiskName, u64)>, OverlayError> {
    let mut held = Vec::new();
    for lower in tracking(records, &above.reach)? {
        for disk in &lower.record().disks {
            let is_it = |above: &&DiskRecord| is_same(&above.base.path, &disk.overlay);
            let found = above.disks.iter().find(is_it).zip(fs::metadata(&disk.overlay).ok());
            held.extend(found.map(|(_, metadata)| (disk.disk.clone(), metadata.len())));
        }
    }
    Ok(held)
}

/// Whether another of these overlays lies above an overlay.
fn lies_beneath(all: &[Held], disk: &DiskRecord) -> bool {
    let disks = all.iter().flat_map(|held| &held.record().disks);
    disks.into_iter().any(|above| is_same(&above.base.path, &disk.overlay))
}

impl Tracker {
    /// Why changes cannot be tracked by overlays until a person has decided something.
    pub fn lost(&self) -> Option<&OverlayError> {
        self.lost.as_ref()
    }

    /// The images that were written to although they lie beneath overlays, by disk: what changed in such a disk
    /// nobody knows, and a backup that reads all of it begins anew.
    pub fn changed(&self) -> &[(DiskName, PathBuf)] {
        &self.changed
    }

    /// Records the doubts about overlays on top: to write back what lies beneath wipes the traces away.
    ///
    /// # Errors
    /// [`OverlayError::Record`].
    pub fn keep_doubts(&self, records: &Records, reach: &Reach) -> Result<(), OverlayError> {
        for mut held in tracking(records, reach)? {
            let doubtful = |disk: &DiskRecord| {
                let is_on_top = self.on_top.iter().any(|top| top.overlay == disk.overlay);
                !disk.doubtful
                    && is_on_top
                    && self.changed.iter().any(|(name, _)| *name == disk.disk)
            };
            if held.record().disks.iter().any(doubtful) {
                records.update(&mut held, |record| {
                    for disk in record.disks.iter_mut() {
                        disk.doubtful |= doubtful(disk);
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Has a machine's disks tell of their own images, and of the overlays that hold what changed.
    pub fn describe(&self, machine: &mut Machine) {
        for disk in &mut machine.disks {
            let known = self.on_top.iter().find(|known| known.disk == disk.target);
            if let Some(known) = known {
                disk.driver.clone_from(&known.base.format);
                disk.image = Some(known.base.path.clone());
            }
            let is_whole = self.changed.iter().all(|(changed, _)| *changed != disk.target);
            let whole = known.filter(|_| is_whole);
            let overlay = whole.map(|known| known.overlay.display().to_string());
            disk.tracking = Tracking::Overlay(overlay);
        }
    }
}

/// Waits until no job writes back an overlay that lies beneath another one, as long as is allowed: QEMU runs one
/// job on a disk.
///
/// # Errors
/// [`OverlayError`].
pub async fn join<L: Layers>(
    purge: &Purge<'_, L>,
    reach: &Reach,
    mut interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), OverlayError> {
    let (layers, records) = (purge.layers, purge.records);
    settle(layers, records, reach).await?;
    for lower in tracking(records, reach)? {
        for disk in lower.record().disks.iter().filter(|disk| disk.stage == Stage::Committing) {
            if !is_between(layers, disk).await? {
                continue;
            }
            purge.progress.phase(&format!("writing back {}", disk.overlay.display()));
            let base = Growth::of(&disk.base.path);
            let mut watch = Watch::default();
            match wait(purge, &lower, disk, base, &mut watch, interrupt.as_mut()).await {
                Ok(true) => {}
                Ok(false) => return Err(OverlayError::Busy { disk: disk.disk.clone() }),
                // It is over, and the purge writes it back anew.
                Err(OverlayError::JobFailed { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    settle(layers, records, reach).await
}

/// Writes overlays that lie beneath others of these into the images beneath them, and deletes them. The
/// guest goes on above. What cannot be done for one disk keeps no other.
///
/// Returns the guest's longest stall meanwhile, where anything was written back.
///
/// # Errors
/// The first [`OverlayError`]; calling it again goes on from there, and until then nothing is lost.
pub async fn sink<L: Layers>(
    purge: &Purge<'_, L>,
    reach: &Reach,
    mut interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<Option<Stall>, OverlayError> {
    let (layers, records) = (purge.layers, purge.records);
    settle(layers, records, reach).await?;
    let (mut failed, mut watch) = (None, Watch::default());
    for mut lower in tracking(records, reach)? {
        for index in 0..lower.record().disks.len() {
            match sink_disk(purge, &mut lower, index, &mut watch, interrupt.as_mut()).await {
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
    failed.map_or_else(|| Ok(watch.stall()), Err)
}

/// Makes sure that no overlay is being written back any more: QEMU and libvirt put none above meanwhile.
///
/// # Errors
/// [`OverlayError::Busy`].
pub async fn check_sunk(
    layers: &impl Layers,
    records: &Records,
    reach: &Reach,
) -> Result<(), OverlayError> {
    for lower in tracking(records, reach)? {
        for disk in lower.record().disks.iter().filter(|disk| disk.stage == Stage::Committing) {
            // One that failed is no job any more.
            if is_between(layers, disk).await? && layers.has_sunk(&lower, disk).await? == Ok(false)
            {
                return Err(OverlayError::Busy { disk: disk.disk.clone() });
            }
        }
    }
    Ok(())
}

/// Writes an overlay into its image where it lies beneath another one and right above that image.
async fn sink_disk<L: Layers>(
    purge: &Purge<'_, L>,
    lower: &mut Held,
    index: usize,
    watch: &mut Watch,
    interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), OverlayError> {
    let (layers, records) = (purge.layers, purge.records);
    let disk = lower.record().disks[index].clone();
    // What somebody else put above it is told of no other image beneath. The guest may also have been started on
    // it again: then it is no longer ours to write back.
    let is_ours_above = lies_beneath(&tracking(records, &lower.record().reach)?, &disk);
    if matches!(disk.stage, Stage::Back(_)) || !is_ours_above || !is_between(layers, &disk).await? {
        return Ok(());
    }
    refuse_snapshots(&disk).await?;
    if let Some(by) = layers.others(&disk.base.path, &disk.disk).await? {
        let (base, overlay) = (disk.base.path.clone(), disk.overlay.clone());
        return Err(OverlayError::Shared { disk: disk.disk, base, overlay, by });
    }
    // From here on the base does not hold still.
    let sunk_by = layers.process();
    records.update(lower, |record| {
        let disk = &mut record.disks[index];
        (disk.stage, disk.sunk_by) = (Stage::Committing, sunk_by);
    })?;
    purge.progress.phase(&format!("writing back {}", disk.overlay.display()));
    let base = Growth::of(&disk.base.path);
    watch.observe(layers.io().await.ok());
    let begun = Instant::now();
    layers.commit(lower, &disk, purge.budget.rate).await?;
    watch.held_up(begun.elapsed());
    let words =
        |words: &str| OverlayError::JobFailed { disk: disk.disk.clone(), words: words.to_owned() };
    // One that is not waited for goes on, and the next backup joins it.
    let sunk = wait(purge, lower, &disk, base, watch, interrupt).await?;
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
    watch: &mut Watch,
    mut interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<bool, OverlayError> {
    let (layers, begun) = (purge.layers, Instant::now());
    let failed = |words| OverlayError::JobFailed { disk: disk.disk.clone(), words };
    while !layers.has_sunk(held, disk).await?.map_err(failed)? {
        watch.observe(layers.io().await.ok());
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
    watch.observe(layers.io().await.ok());
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
                let is_seen = is_at_work(&disk, layers.process());
                // The end that nobody saw may have been a power cut: QEMU brings the overlay above to its disk
                // before the image beneath.
                if !is_seen && !is_written_back(&disk).await? {
                    tracing::error!(
                        "disk `{}`: {} does not hold all of {}, which no image names any more: end the guest, \
                         write it back with `qemu-img commit`, and start the guest again",
                        disk.disk,
                        disk.base.path.display(),
                        disk.overlay.display(),
                    );
                    continue;
                }
                layers.close(&lower).await?;
                files::make_durable(&disk.base.path)?;
                let still = files::mark(&disk.base.path)?;
                let spent = files::mark(&disk.overlay)?;
                records.update(&mut upper, |record| {
                    let upper = &mut record.disks[at];
                    (upper.base, upper.still) = (disk.base.clone(), still);
                    upper.doubtful |= !is_seen;
                })?;
                records.update(&mut lower, |record| {
                    record.disks[index].stage = Stage::Back(spent);
                })?;
                renew(records, reach, &upper.record().disks[at].overlay)?;
                break;
            }
        }
    }
    Ok(())
}

/// Whether the image beneath holds all that an overlay held; also where that is gone.
async fn is_written_back(disk: &DiskRecord) -> Result<bool, OverlayError> {
    if files::is_ours(disk)? != Some(true) {
        return Ok(true);
    }
    Ok(at_rest::adds_nothing(&purge::images_of(disk).await?).await?)
}

/// Notes what an image is like whose header has just been told of another one beneath it.
fn renew(records: &Records, reach: &Reach, image: &Path) -> Result<(), OverlayError> {
    let still = files::mark(image)?;
    for mut above in records.all_of(reach)? {
        let mut disks = above.record().disks.iter();
        let at = disks.position(|disk| disk.still.is_some() && is_same(&disk.base.path, image));
        if let Some(at) = at {
            records.update(&mut above, |record| record.disks[at].still = still)?;
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
