//! The flow of `purge`, for each disk:
//!
//! ```text
//! where does it run? ─► on the overlay: write back, pivot ─► nothing names the overlay? ─► delete ─► forget
//!                    └► nowhere: write back at rest, point back ┘
//! ```
//!
//! Each step is recorded before it is done, and asks first what is true: a purge that was killed is gone
//! on with by the next.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};

use super::converge::{Budget, Measure, slow_rate};
use super::files::{Growth, is_same};
use super::record::{
    DiskRecord, FileMark, Held, HeldSince, Limits, Purpose, Record, Records, Stage,
};
use super::stall::{Stall, Watch};
use super::{Chain, Layers, OverlayError, Written, at_rest, create, files};
use crate::capture::image::{self, Image, Use};
use crate::hypervisor::{HypervisorError, Reach};
use crate::manifest::Consistency;
use crate::names::{DomainName, RunId};
use crate::progress::Progress;
use crate::quiesce::watchdog::Watchdog;

/// How often a job is looked at.
const POLL: Duration = Duration::from_millis(100);
/// The same when the guest stands still.
const POLL_PAUSED: Duration = Duration::from_millis(5);

/// What became of one disk.
#[derive(Debug)]
pub struct Brought {
    /// The disk.
    pub disk: DiskRecord,
    /// Bytes that were written back by this purge.
    pub bytes: u64,
    /// How long that took.
    pub took: Duration,
    /// Whether the guest was slowed down for it.
    pub slowed: bool,
    /// How long the guest's processors stood still for it.
    pub paused: Option<Duration>,
    /// The longest that any operation of the guest took meanwhile, on any disk; `None` where it did not run
    /// or that could not be told.
    pub stall: Option<Stall>,
}

/// A purge: what its steps share.
#[derive(Debug)]
pub struct Purge<'a, L> {
    /// The machine.
    pub layers: &'a L,
    /// The records.
    pub records: &'a Records,
    /// What the user allows.
    pub budget: Budget,
    /// Who is told how far it is.
    pub progress: &'a Progress,
}

/// An overlay being written back.
struct Course {
    started: Instant,
    slowed: bool,
    paused: Option<Duration>,
    last: Written,
    /// The image that is written to.
    base: Option<Growth>,
    /// What the guest does meanwhile.
    watch: Watch,
}

/// A guest that stands still, and the process that lets it go on if this one ends; none where somebody else
/// had paused it.
struct Pause {
    since: Instant,
    watchdog: Option<Watchdog>,
}

/// A record of an overlay that somebody else made: the user says that it is to be written back.
///
/// # Errors
/// [`OverlayError::NotAdopted`], [`OverlayError::Shared`], [`OverlayError::Record`].
pub async fn adopt(
    layers: &impl Layers,
    records: &Records,
    overlay: &Path,
    machine: (DomainName, String, Reach),
) -> Result<Held, OverlayError> {
    let (domain, uuid, reach) = machine;
    let chains = layers.chains().await?.unwrap_or_default();
    let is_top = |chain: &&Chain| chain.images.first().is_some_and(|i| is_same(&i.path, overlay));
    let on_top = chains.iter().find(is_top);
    let Some((disk, [top, base, ..])) = on_top.map(|chain| (&chain.disk, &chain.images[..])) else {
        return Err(OverlayError::NotAdopted { domain, overlay: overlay.to_owned() });
    };
    let failed = |source| OverlayError::File { step: "look at", path: overlay.to_owned(), source };
    // A block device is not ours to delete.
    let Some(made) = FileMark::of(overlay).map_err(failed)? else {
        return Err(OverlayError::NotAdopted { domain, overlay: overlay.to_owned() });
    };
    let mut others = layers.others(&base.path, disk).await?;
    if others.is_none() {
        let mut users = files::opened_by(&base.path).map_err(failed)?;
        users.retain(|pid| layers.process().is_none_or(|own| own.pid != *pid));
        // One of them is the machine's own where that cannot be told.
        let own = usize::from(layers.process().is_none());
        others = users.get(own).map(|pid| format!("the process {pid}"));
    }
    if let Some(by) = others {
        let (disk, base, overlay) = (disk.clone(), base.path.clone(), overlay.to_owned());
        return Err(OverlayError::Shared { disk, base, overlay, by });
    }
    tracing::warn!(
        "disk `{disk}`: {} is written into {} and then deleted",
        overlay.display(),
        base.path.display()
    );
    let now = jiff::Timestamp::now();
    let disk = DiskRecord {
        overlay_format: top.format.clone(),
        made: Some(made),
        // The guest runs above it, so nobody has written to it.
        still: files::mark(&base.path)?,
        ..DiskRecord::new(disk.clone(), base.clone(), 0, overlay.to_owned())
    };
    let held = Some(HeldSince { time: now, consistency: Consistency::Crash });
    let (id, qemu, purpose) = (RunId::random(), layers.process(), Purpose::User);
    let record =
        Record { id, domain, uuid, reach, qemu, begun: now, purpose, held, disks: vec![disk] };
    Ok(records.begin(record)?)
}

/// Notes that the user wants an overlay of ours written back although its image was written to: the guest
/// runs on it, and is well.
///
/// # Errors
/// [`OverlayError::NotAdopted`], [`OverlayError::Record`].
pub async fn vouch(
    layers: &impl Layers,
    records: &Records,
    held: &mut Held,
    overlay: &Path,
) -> Result<(), OverlayError> {
    let chains = layers.chains().await?.unwrap_or_default();
    for index in 0..held.record().disks.len() {
        let disk = &held.record().disks[index];
        if !is_same(&disk.overlay, overlay) || disk.stage != Stage::Above {
            continue;
        }
        if !matches!(place(&chains, disk), Place::Top) {
            let (domain, overlay) = (held.record().domain.clone(), overlay.to_owned());
            return Err(OverlayError::NotAdopted { domain, overlay });
        }
        let still = files::mark(&disk.base.path)?;
        records.update(held, |record| record.disks[index].still = still)?;
    }
    Ok(())
}

impl<L: Layers> Purge<'_, L> {
    /// Brings a machine back onto its own images. Under the machine's lock. When `interrupt` is ready it
    /// ends; what is not brought back yet stays recorded.
    ///
    /// # Errors
    /// [`OverlayError`]; calling it again goes on from there.
    pub async fn run(
        &self,
        held: Held,
        interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Vec<Brought>, OverlayError> {
        let Some(mut held) = create::settle(self.layers, self.records, held).await? else {
            return Ok(Vec::new());
        };
        self.lift_limits(&mut held).await?;
        if let Err(error) = self.layers.watch_io(&held).await {
            tracing::debug!(%error, "only the guest's mean latency is known");
        }
        let brought = self.bring_all_back(&mut held, interrupt).await;
        if let Err(error) = self.layers.forget_io(&held).await {
            tracing::debug!(%error, "QEMU goes on sorting what the guest does by its time");
        }
        let brought = brought?;
        self.records.clear(&held)?;
        // One whose overlay had no room stands still until now.
        self.layers.resume(false).await?;
        Ok(brought)
    }

    async fn bring_all_back(
        &self,
        held: &mut Held,
        mut interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Vec<Brought>, OverlayError> {
        if self.layers.chains().await?.is_none() {
            // All or none: disks of one machine belong to one time.
            let is_left = |disk: &&DiskRecord| !matches!(disk.stage, Stage::Back(_));
            for disk in held.record().disks.iter().filter(is_left) {
                self.to_write(held.record(), disk).await?;
            }
        }
        let (mut brought, mut stays, mut watch) = (Vec::new(), None, Watch::default());
        for index in 0..held.record().disks.len() {
            if !matches!(held.record().disks[index].stage, Stage::Back(_)) {
                let back = self.bring_back(held, index, watch, interrupt.as_mut()).await?;
                brought.push(back.0);
                // Nothing of what the guest feels between two disks is missed.
                watch = back.1.next();
            }
            // At once: a guest that was started on it again would run on what is older than its image.
            match self.delete(&held.record().disks[index]).await {
                Err(error @ (OverlayError::StillNamed { .. } | OverlayError::Revived { .. })) => {
                    stays = stays.or(Some(error));
                }
                deleted => deleted?,
            }
        }
        stays.map_or(Ok(brought), Err)
    }

    /// Deletes an overlay that was written back.
    async fn delete(&self, disk: &DiskRecord) -> Result<(), OverlayError> {
        if let (Stage::Back(then), Some(now)) = (&disk.stage, files::mark(&disk.overlay)?)
            && *then != Some(now)
        {
            return Err(OverlayError::Revived { overlay: disk.overlay.clone() });
        }
        let by = match self.recorded_above(&disk.overlay)? {
            None => self.layers.names(&disk.overlay).await?,
            by => by,
        };
        match by {
            Some(by) => Err(OverlayError::StillNamed { overlay: disk.overlay.clone(), by }),
            None => files::delete(disk),
        }
    }

    /// Whose overlay lies above an image by the records, in words: that is to be written into it.
    fn recorded_above(&self, image: &Path) -> Result<Option<String>, OverlayError> {
        let (all, damaged) = self.records.all()?;
        if let Some(damaged) = damaged.into_iter().next() {
            return Err(damaged.into());
        }
        let is_above = |disk: &&DiskRecord| is_same(&disk.base.path, image);
        let above = all.iter().flat_map(|held| &held.record().disks).find(is_above);
        Ok(above.map(|disk| format!("the overlay {}", disk.overlay.display())))
    }

    async fn bring_back(
        &self,
        held: &mut Held,
        index: usize,
        watch: Watch,
        interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<(Brought, Watch), OverlayError> {
        let mut course = Course {
            started: Instant::now(),
            slowed: false,
            paused: None,
            last: Written { done: 0, total: 0, is_ready: false },
            base: None,
            watch,
        };
        let disk = &held.record().disks[index];
        match self.layers.chains().await? {
            None => self.at_rest(held, index).await?,
            Some(chains) => match place(&chains, disk) {
                Place::Top => self.running(held, index, &mut course, interrupt).await?,
                Place::Below(above) => {
                    return Err(OverlayError::Covered { disk: disk.disk.clone(), above });
                }
                Place::Moved => {
                    let (disk, overlay) = (disk.disk.clone(), disk.overlay.clone());
                    return Err(OverlayError::Moved { disk, overlay });
                }
                Place::Absent if self.was_pivoted(disk, &chains) => {}
                Place::Absent if given_up(disk)? => {}
                Place::Absent if matches!(disk.stage, Stage::Pivoting(_)) => {
                    return Err(untrusted(disk));
                }
                Place::Absent => return Err(elsewhere(held.record(), disk)),
            },
        }
        self.layers.close(held).await?;
        // Before anything says that the overlay is of no use any more.
        files::make_durable(&held.record().disks[index].base.path)?;
        let spent = files::mark(&held.record().disks[index].overlay)?;
        self.set_stage(held, index, Stage::Back(spent))?;
        // What waited for the pivot has ended by now.
        self.observe(&mut course).await;
        let brought = Brought {
            disk: held.record().disks[index].clone(),
            bytes: course.last.done,
            took: course.started.elapsed(),
            slowed: course.slowed,
            paused: course.paused,
            stall: course.watch.stall(),
        };
        Ok((brought, course.watch))
    }

    /// Whether the very QEMU that was told to go on with the base has done so.
    fn was_pivoted(&self, disk: &DiskRecord, chains: &[Chain]) -> bool {
        let was_told = match &disk.stage {
            Stage::Pivoting(Some(process)) => self.layers.process() == Some(*process),
            _ => false,
        };
        let chain = chains.iter().find(|chain| chain.disk == disk.disk);
        let top = chain.and_then(|chain| chain.images.first());
        was_told && top.is_some_and(|top| is_same(&top.path, &disk.base.path))
    }

    // ---- a machine that does not run ------------------------------------------------------------

    async fn at_rest(&self, held: &mut Held, index: usize) -> Result<(), OverlayError> {
        let disk = held.record().disks[index].clone();
        if let Some(chain) = self.to_write(held.record(), &disk).await? {
            self.set_stage(held, index, Stage::Committing)?;
            self.progress.phase(&format!("writing back {}", disk.overlay.display()));
            at_rest::commit(&chain).await?;
        }
        // From here on it may be started on its own image, which holds all.
        self.set_stage(held, index, Stage::Pivoting(None))?;
        self.point_back(held, &disk).await
    }

    /// The images of a disk at rest, from the overlay down; `None` where the overlay adds nothing.
    async fn to_write(
        &self,
        record: &Record,
        disk: &DiskRecord,
    ) -> Result<Option<Vec<Image>>, OverlayError> {
        self.layers.check_off().await?;
        match files::is_ours(disk)? {
            None if given_up(disk)? => return Ok(None),
            None => return Err(missing(record, disk)),
            Some(false) => return Err(OverlayError::Replaced { overlay: disk.overlay.clone() }),
            Some(true) => {}
        }
        for image in [&disk.overlay_image(), &disk.base] {
            if image.image().used()? != Use::None {
                let image = image.path.display().to_string();
                return Err(HypervisorError::ImageInUse { image }.into());
            }
        }
        refuse_snapshots(disk).await?;
        let chain = images_of(disk).await?;
        if may_be_written(disk, &chain[1])? {
            return Ok(Some(chain));
        }
        self.progress.phase(&format!("comparing {} with its image", disk.overlay.display()));
        match at_rest::adds_nothing(&chain).await? {
            true => Ok(None),
            false => Err(untrusted(disk)),
        }
    }

    /// Has the machine start with the disk's own image. It may have started with the overlay meanwhile: then
    /// the next purge writes that back again.
    async fn point_back(&self, held: &Held, disk: &DiskRecord) -> Result<(), OverlayError> {
        self.layers.point_back(disk).await?;
        let chains = self.layers.chains().await?.unwrap_or_default();
        match place(&chains, disk) {
            Place::Absent => Ok(()),
            _ => Err(HypervisorError::Started { domain: held.record().domain.to_string() }.into()),
        }
    }

    // ---- a machine that runs --------------------------------------------------------------------

    async fn running(
        &self,
        held: &mut Held,
        index: usize,
        course: &mut Course,
        interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<(), OverlayError> {
        let disk = held.record().disks[index].clone();
        if disk.stage == Stage::Above && disk.still.is_some() && !is_still(&disk)? {
            return Err(untrusted(&disk));
        }
        refuse_snapshots(&disk).await?;
        let stage = disk.stage;
        // From here on the base does not hold still.
        self.set_stage(held, index, Stage::Committing)?;
        let disk = held.record().disks[index].clone();
        course.base = Growth::of(&disk.base.path);
        self.observe(course).await;
        let begun = Instant::now();
        let commit = self.layers.commit(held, &disk, self.budget.rate).await;
        course.watch.held_up(begun.elapsed());
        if let Err(error) = commit {
            // One that was refused, as by a job of somebody else, has begun nothing.
            if matches!(error, HypervisorError::Refused { .. } | HypervisorError::Libvirt { .. }) {
                self.set_stage(held, index, stage)?;
            }
            return Err(error.into());
        }
        let outcome = self.converge(held, index, course, interrupt).await;
        if outcome.is_err() {
            match self.layers.cancel(held, &disk).await {
                Err(left) => {
                    tracing::warn!(error = %left, "the job goes on; the next purge joins it");
                }
                Ok(()) => self.holds_again(held, index).await?,
            }
        }
        // Not before: a guest that writes as it likes would outrun the end of the job.
        let lifted = self.lift_limits(held).await;
        if outcome.is_err() {
            self.observe(course).await;
            if let Some(stall) = course.watch.stall() {
                tracing::info!(
                    target: "progress",
                    "disk `{}`: the guest's longest stall meanwhile: {stall}",
                    disk.disk
                );
            }
        }
        if let (Err(_), Err(left)) = (&outcome, &lifted) {
            tracing::warn!(error = %left, "the guest stays slowed down; the next purge lifts that");
        }
        outcome.and(lifted)
    }

    /// Notes what the base is like now that nobody writes to it: whoever purges later, when the guest does not
    /// run, can tell whether it ran on the base meanwhile.
    async fn holds_again(&self, held: &mut Held, index: usize) -> Result<(), OverlayError> {
        let disk = &held.record().disks[index];
        let chains = self.layers.chains().await?.unwrap_or_default();
        // Else the guest may have gone on with its base after all.
        if !matches!(place(&chains, disk), Place::Top) {
            return Ok(());
        }
        files::make_durable(&disk.base.path)?;
        let still = files::mark(&disk.base.path)?;
        self.records.update(held, |record| {
            let disk = &mut record.disks[index];
            (disk.stage, disk.still) = (Stage::Committing, still);
        })?;
        Ok(())
    }

    /// Waits until the guest can go on with its own image, then lets it; it is held back where it writes
    /// too fast.
    async fn converge(
        &self,
        held: &mut Held,
        index: usize,
        course: &mut Course,
        mut interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<(), OverlayError> {
        let disk = held.record().disks[index].clone();
        let (mut pause, mut is_told): (Option<Pause>, bool) = (None, false);
        loop {
            let failed = |words| OverlayError::JobFailed { disk: disk.disk.clone(), words };
            let written = self.layers.written(held, &disk).await?.map_err(failed)?;
            let written = written.ok_or_else(|| failed("its job is gone".to_owned()))?;
            course.last = written;
            self.observe(course).await;
            if !is_told {
                self.progress.bytes(&format!("writing back {}", disk.disk), written.total);
                is_told = true;
            }
            self.progress.reach_of(written.done, written.total);
            if written.is_ready {
                let pivoted = self.pivot(held, index, &mut pause, course).await;
                self.let_go_on(&mut pause, course).await?;
                return pivoted;
            }
            let elapsed = course.started.elapsed();
            if let Some(paused) = &pause {
                if paused.since.elapsed() >= self.budget.pause_max {
                    self.let_go_on(&mut pause, course).await?;
                    return Err(too_slow(&disk, written));
                }
                tokio::time::sleep(POLL_PAUSED).await;
                continue;
            }
            course.base.as_ref().map_or(Ok(()), |base| base.check(&disk.disk))?;
            let rate = (written.done as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
            match self.budget.measure(elapsed, written, rate) {
                Measure::None => {}
                Measure::Slow if course.slowed => {}
                Measure::Slow => {
                    self.slow_down(held, index, rate).await?;
                    course.slowed = true;
                }
                Measure::Pause => pause = Some(self.pause(held).await?),
                Measure::GiveUp => return Err(too_slow(&disk, written)),
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = interrupt.as_mut() => {
                    self.let_go_on(&mut pause, course).await?;
                    return Err(OverlayError::Interrupted);
                }
            }
        }
    }

    async fn pivot(
        &self,
        held: &mut Held,
        index: usize,
        pause: &mut Option<Pause>,
        course: &mut Course,
    ) -> Result<(), OverlayError> {
        self.set_stage(held, index, Stage::Pivoting(self.layers.process()))?;
        let disk = &held.record().disks[index];
        let pivot = self.layers.pivot(held, disk);
        tokio::pin!(pivot);
        // The guest stands still no longer than it may, however long this takes.
        let left = pause.as_ref().map(|p| self.budget.pause_max.saturating_sub(p.since.elapsed()));
        let begun = Instant::now();
        let pivoted = match left {
            None => pivot.await,
            Some(left) => match tokio::time::timeout(left, &mut pivot).await {
                Ok(pivoted) => pivoted,
                Err(_) => {
                    self.let_go_on(pause, course).await?;
                    pivot.await
                }
            },
        };
        course.watch.held_up(begun.elapsed());
        pivoted?.map_err(|words| OverlayError::JobFailed { disk: disk.disk.clone(), words })
    }

    async fn observe(&self, course: &mut Course) {
        course.watch.observe(self.layers.io().await.ok());
    }

    async fn slow_down(
        &self,
        held: &mut Held,
        index: usize,
        rate: u64,
    ) -> Result<(), OverlayError> {
        let disk = held.record().disks[index].clone();
        let limits = self.layers.limits(&disk).await?;
        let lowered = L::lowered(&limits, slow_rate(rate));
        let limits = Some(Limits { process: self.layers.process(), before: limits });
        self.records.update(held, |record| record.disks[index].limits = limits)?;
        tracing::warn!(
            "disk `{}`: the guest writes faster than its overlay is written back; it may write {} a \
             second for now",
            disk.disk,
            crate::progress::human_bytes(slow_rate(rate)),
        );
        Ok(self.layers.limit(held, &disk, &lowered).await?)
    }

    /// Sets the limits of the guest's I/O again that this purge, or one that was killed, has lowered.
    async fn lift_limits(&self, held: &mut Held) -> Result<(), OverlayError> {
        for index in 0..held.record().disks.len() {
            let disk = held.record().disks[index].clone();
            let Some(limits) = &disk.limits else { continue };
            let process = self.layers.process();
            if process.is_some() && process == limits.process {
                self.layers.limit(held, &disk, &limits.before).await?;
            }
            self.records.update(held, |record| record.disks[index].limits = None)?;
        }
        Ok(())
    }

    async fn pause(&self, held: &Held) -> Result<Pause, OverlayError> {
        // One that an administrator has paused stays so.
        if !self.layers.runs().await? {
            return Ok(Pause { since: Instant::now(), watchdog: None });
        }
        tracing::warn!("the guest stands still for at most {:?}", self.budget.pause_max);
        let started = Watchdog::start(None, &held.record().reach);
        let mut watchdog = started.map_err(crate::quiesce::QuiesceError::from)?;
        let pause_max = self.budget.pause_max;
        watchdog.will_pause(pause_max).await.map_err(crate::quiesce::QuiesceError::from)?;
        let since = Instant::now();
        self.layers.pause(held).await?;
        Ok(Pause { since, watchdog: Some(watchdog) })
    }

    async fn let_go_on(
        &self,
        pause: &mut Option<Pause>,
        course: &mut Course,
    ) -> Result<(), OverlayError> {
        let Some(Pause { since, watchdog: Some(watchdog) }) = pause.take() else { return Ok(()) };
        // Where it fails, the watchdog goes on trying once it is dropped.
        self.layers.resume(true).await?;
        let paused = since.elapsed();
        course.paused = Some(paused);
        course.watch.paused(paused);
        watchdog.done().await;
        Ok(())
    }

    fn set_stage(&self, held: &mut Held, index: usize, stage: Stage) -> Result<(), OverlayError> {
        if held.record().disks[index].stage != stage {
            self.records.update(held, |record| record.disks[index].stage = stage)?;
        }
        Ok(())
    }
}

/// The images of a disk from its overlay down.
pub(super) async fn images_of(disk: &DiskRecord) -> Result<Vec<Image>, OverlayError> {
    // Where the base has no data of its own, what lies beneath it counts.
    let beneath = image::chain(vec![disk.base.image()], true)
        .await?
        .map_err(|words| OverlayError::JobFailed { disk: disk.disk.clone(), words })?;
    Ok([vec![disk.overlay_image().image()], beneath.images].concat())
}

/// Where an overlay is.
#[derive(Debug)]
pub(super) enum Place {
    /// The guest writes to it, right above its image.
    Top,
    /// On top of another disk, or above another image than its own.
    Moved,
    /// Below others, of which this is on top.
    Below(PathBuf),
    /// In no chain of the machine.
    Absent,
}

/// Where an overlay is, by file: a machine that was started anew has it under another name.
pub(super) fn place(chains: &[Chain], disk: &DiskRecord) -> Place {
    let at = |chain: &&Chain| chain.images.iter().any(|image| is_same(&image.path, &disk.overlay));
    let Some(chain) = chains.iter().find(at) else { return Place::Absent };
    match chain.images.as_slice() {
        [top, below, ..] if is_same(&top.path, &disk.overlay) => {
            match chain.disk == disk.disk && is_same(&below.path, &disk.base.path) {
                true => Place::Top,
                false => Place::Moved,
            }
        }
        [top, ..] if !is_same(&top.path, &disk.overlay) => Place::Below(top.path.clone()),
        _ => Place::Moved,
    }
}

/// Whether the base is as it was when nobody wrote to it last.
fn is_still(disk: &DiskRecord) -> Result<bool, OverlayError> {
    Ok(disk.still.is_some() && files::mark(&disk.base.path)? == disk.still)
}

/// Whether what the guest wrote to the overlay can be written to the base at rest: nobody wrote there since.
fn may_be_written(disk: &DiskRecord, base: &Image) -> Result<bool, OverlayError> {
    // Another file with the base's data may be written to without a trace in the base.
    let tells = base.data_file.is_none();
    Ok(tells && matches!(disk.stage, Stage::Above | Stage::Committing) && is_still(disk)?)
}

/// Whether somebody has decided that the guest went back, and deleted the overlay.
fn given_up(disk: &DiskRecord) -> Result<bool, OverlayError> {
    Ok(matches!(disk.stage, Stage::Pivoting(_)) && files::mark(&disk.overlay)?.is_none())
}

/// Why the overlay is not written to the base, though it holds something else.
pub(super) fn untrusted(disk: &DiskRecord) -> OverlayError {
    let (base, overlay) = (disk.base.path.clone(), disk.overlay.clone());
    match disk.stage {
        Stage::Above if disk.still.is_some() => OverlayError::BaseChanged { base, overlay },
        Stage::Pivoting(_) => OverlayError::MayBeBack { disk: disk.disk.clone(), base, overlay },
        _ => OverlayError::BaseUnknown { base, overlay },
    }
}

/// Internal snapshots live in the file that would be deleted.
pub(super) async fn refuse_snapshots(disk: &DiskRecord) -> Result<(), OverlayError> {
    // One that a user has deleted while the guest runs is lost with all its snapshots already.
    if files::is_ours(disk)? != Some(true) {
        return Ok(());
    }
    let snapshots = disk.overlay_image().image().header().await?.snapshots;
    match snapshots.is_empty() {
        true => Ok(()),
        false => Err(OverlayError::HasSnapshots { overlay: disk.overlay.clone(), snapshots }),
    }
}

fn since(record: &Record) -> jiff::Timestamp {
    record.held.map_or(record.begun, |held| held.time)
}

/// Why what the guest wrote to an overlay is not written back: it runs, but not there.
pub(super) fn elsewhere(record: &Record, disk: &DiskRecord) -> OverlayError {
    let (disk, overlay) = (disk.disk.clone(), disk.overlay.clone());
    OverlayError::Elsewhere { disk, overlay, since: since(record) }
}

fn missing(record: &Record, disk: &DiskRecord) -> OverlayError {
    let (disk, overlay) = (disk.disk.clone(), disk.overlay.clone());
    OverlayError::Missing { disk, overlay, since: since(record) }
}

fn too_slow(disk: &DiskRecord, written: Written) -> OverlayError {
    let left = written.total.saturating_sub(written.done);
    OverlayError::TooSlow { disk: disk.disk.clone(), left }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overlay::at_rest::LocalImage;

    #[test]
    fn r23_what_cannot_be_told_is_not_called_a_change() {
        let image = LocalImage { path: "/dev/base".into(), format: "raw".into() };
        let mut disk = DiskRecord::new("vda".parse().unwrap(), image, 1, "/overlay".into());
        assert!(matches!(untrusted(&disk), OverlayError::BaseUnknown { .. }));
        disk.still = files::mark(Path::new("/proc/self/exe")).unwrap();
        assert!(matches!(untrusted(&disk), OverlayError::BaseChanged { .. }));
    }
}
