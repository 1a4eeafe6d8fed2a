//! A point in time by overlays: the guest writes to them from that instant on, and its images hold still.
//!
//! A storage daemon of QEMU exports these read-only, as those of a domain that is shut off; then the guest
//! is brought back onto them. What is made has a record of its own ([`crate::overlay::record`]): where the
//! guest cannot be brought back the overlay stays, and so does that record.

use std::fs::File;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Mutex as AsyncMutex;

use super::image;
use super::offline::{self, Server};
use crate::hypervisor::{
    Choice, Claim, Cut, Disk, Exports, GuestIo, Hypervisor, HypervisorError, Machine, MachineFile,
    Reach,
};
use crate::journal::{DiskRecord, Phase, Process, Recorded};
use crate::manifest::Consistency;
use crate::names::{DiskName, RunId};
use crate::overlay::at_rest::LocalImage;
use crate::overlay::converge::Budget;
use crate::overlay::create::{self, Owner};
use crate::overlay::files::is_same;
use crate::overlay::fill::{Fill, LOW};
use crate::overlay::purge::Purge;
use crate::overlay::record::{self, Held, HeldSince, Purpose, Records};
use crate::overlay::stall::Stall;
use crate::overlay::{Layers, OverlayError, track};
use crate::progress::{Progress, human_bytes};

/// How often the room around the overlays is looked at.
const ROOM_POLL: Duration = Duration::from_millis(10);

/// What a user allows.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where overlays go; beside each image where not given.
    pub folder: Option<PathBuf>,
    /// Room in bytes to reserve for each disk.
    pub reserve: u64,
    /// How long the guest may take on its way back.
    pub budget: Budget,
    /// Whether the overlays stay until the next backup, and track what changes.
    pub tracks: bool,
}

/// A machine whose point in time is taken by overlays, reached through `H`.
#[derive(Debug)]
pub struct Overlaid<'a, H, L> {
    inner: &'a H,
    layers: L,
    records: Records,
    settings: Settings,
    run_dir: PathBuf,
    progress: &'a Progress,
    /// The overlays of this run.
    held: AsyncMutex<Option<Held>>,
    /// The overlays' folders, to know how much room is left there.
    folders: OnceLock<Vec<(PathBuf, File)>>,
    reading: Mutex<Option<Reading>>,
    /// The overlays that track what changes from this run on.
    begun: OnceLock<Vec<(DiskName, String)>>,
}

/// Who exports the images, and what they are.
#[derive(Debug)]
struct Reading {
    server: Server,
    chains: Vec<image::Chain>,
}

impl<'a, H, L> Overlaid<'a, H, L> {
    /// A machine, and the way to put overlays above its disks.
    pub fn new(
        inner: &'a H,
        layers: L,
        records: Records,
        settings: Settings,
        run_dir: PathBuf,
        progress: &'a Progress,
    ) -> Self {
        Self {
            inner,
            layers,
            records,
            settings,
            run_dir,
            progress,
            held: AsyncMutex::new(None),
            folders: OnceLock::new(),
            reading: Mutex::new(None),
            begun: OnceLock::new(),
        }
    }

    fn reading(&self) -> std::sync::MutexGuard<'_, Option<Reading>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The images that hold still beneath a machine's overlays, as QEMU has them, in the order of the record's
/// disks.
///
/// # Errors
/// [`OverlayError`].
pub async fn frozen(layers: &impl Layers, held: &Held) -> Result<Vec<image::Chain>, OverlayError> {
    let domain = || held.record().domain.to_string();
    let not_running = || OverlayError::NotRunning { domain: domain() };
    let known = layers.chains().await?.ok_or_else(not_running)?;
    let mut chains = Vec::new();
    for disk in &held.record().disks {
        let no_image = || OverlayError::NoImage { disk: disk.disk.clone() };
        let chain = known.iter().find(|chain| chain.disk == disk.disk).ok_or_else(no_image)?;
        let beneath = chain.images.get(1..).unwrap_or_default();
        let is_it = beneath.first().is_some_and(|base| is_same(&base.path, &disk.base.path));
        if !is_it || beneath.iter().any(|image| !image.path.is_absolute()) {
            return Err(no_image());
        }
        let images = beneath.iter().map(LocalImage::image).collect();
        let chain = image::chain(images, false).await?.map_err(|_| no_image())?;
        // What lies there, but is not known, would be read as zeros.
        let last = chain.images.last().expect("a disk has an image");
        if let Some((beneath, _)) = last.header().await?.backing {
            let (disk, image) = (disk.disk.clone(), last.place.to_string());
            return Err(OverlayError::ChainUnknown { disk, image, beneath });
        }
        chains.push(chain);
    }
    Ok(chains)
}

/// The folders of a machine's overlays; nobody looks after one that cannot be opened.
pub fn folders(held: &Held) -> Vec<(PathBuf, File)> {
    let folder = |disk: &record::DiskRecord| {
        let folder = disk.overlay.parent()?.to_owned();
        let file = File::open(&folder).ok()?;
        Some((folder, file))
    };
    held.record().disks.iter().filter_map(folder).collect()
}

/// Ready when the guest could soon write no more to its overlays in these folders.
pub async fn room_ends(folders: &[(PathBuf, File)]) -> OverlayError {
    loop {
        for (folder, file) in folders {
            match super::room::room(file) {
                Some((free, kept)) if free < kept => {
                    return OverlayError::NoRoom { folder: folder.clone(), free };
                }
                _ => {}
            }
        }
        tokio::time::sleep(ROOM_POLL).await;
    }
}

impl<H: Hypervisor, L: Layers> Overlaid<'_, H, L> {
    async fn make(&self, held: &mut Held) -> Result<(), OverlayError> {
        create::make(&self.layers, &self.records, held, self.settings.reserve).await?;
        self.folders.set(folders(held)).expect("one connection makes one backup");
        Ok(())
    }

    async fn serve(&self, recorded: &Recorded) -> Result<Exports, OverlayError> {
        let mut held = self.held.lock().await;
        let held = held.as_mut().expect("what is exported was prepared");
        let time = held.record().begun;
        let since = HeldSince { time, consistency: Consistency::Crash };
        create::hold(&self.records, held, since, true)?;
        let chains = frozen(&self.layers, held).await?;
        let marks = offline::marks(&chains)?;
        let (server, exports) =
            offline::serve(recorded, &chains, marks, self.settings.tracks, &self.run_dir).await?;
        *self.reading() = Some(Reading { server, chains });
        Ok(exports)
    }
}

impl<H: Hypervisor, L: Layers> Hypervisor for Overlaid<'_, H, L> {
    async fn name(&self) -> Result<Option<String>, HypervisorError> {
        self.inner.name().await
    }

    async fn discover(&self, choice: &Choice) -> Result<Machine, HypervisorError> {
        self.inner.discover(choice).await
    }

    async fn definition(&self) -> Result<Vec<MachineFile>, HypervisorError> {
        self.inner.definition().await
    }

    async fn firmware(&self) -> (Vec<MachineFile>, Vec<String>) {
        self.inner.firmware().await
    }

    async fn reclaim(
        &self,
        machine: &mut Machine,
        claims: &[Claim],
    ) -> Result<(), HypervisorError> {
        self.inner.reclaim(machine, claims).await
    }

    async fn layers(&self) -> Result<impl Layers, HypervisorError> {
        self.inner.layers().await
    }

    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    async fn guest_io(&self) -> Result<GuestIo, HypervisorError> {
        self.inner.guest_io().await
    }

    fn names(&self, _: &RunId, _: usize, disk: &Disk) -> DiskRecord {
        // The nodes are named by the record of the overlays.
        DiskRecord::untouched(disk)
    }

    fn listens_at(&self, _: &RunId) -> Option<PathBuf> {
        // Its socket lies in the run's folder.
        None
    }

    fn process(&self) -> Option<Process> {
        self.inner.process()
    }

    fn begins_overlay(&self, disk: &DiskName) -> Option<String> {
        let begun = self.begun.get()?;
        begun.iter().find(|(name, _)| name == disk).map(|(_, overlay)| overlay.clone())
    }

    fn puts_overlays(&self) -> bool {
        true
    }

    async fn has_left(&self) -> bool {
        self.inner.has_left().await
    }

    async fn danger(&self) -> HypervisorError {
        let room_ends = async {
            // Asked before there are overlays.
            loop {
                match self.folders.get() {
                    Some(folders) => return room_ends(folders).await,
                    None => tokio::time::sleep(ROOM_POLL).await,
                }
            }
        };
        tokio::select! {
            error = room_ends => error.into(),
            error = self.inner.danger() => error,
        }
    }

    async fn prepare(&self, recorded: &Recorded, disks: &[Disk]) -> Result<(), HypervisorError> {
        let record = recorded.record();
        let owner = Owner {
            id: record.run.clone(),
            domain: record.domain.clone(),
            uuid: record.uuid.clone(),
            reach: record.reach.clone(),
            purpose: Purpose::Backup,
            stays: self.settings.tracks,
        };
        let folder = self.settings.folder.as_deref();
        let planned = create::plan(&self.layers, disks, owner, folder).await?;
        if self.settings.tracks {
            let overlay = |disk: &record::DiskRecord| disk.overlay.display().to_string();
            let begun = planned.disks.iter().map(|disk| (disk.disk.clone(), overlay(disk)));
            self.begun.set(begun.collect()).expect("one connection makes one backup");
        }
        let held = self.records.begin(planned).map_err(OverlayError::from)?;
        let mut kept = self.held.lock().await;
        Ok(self.make(kept.insert(held)).await?)
    }

    async fn cut(&self, _: &Recorded) -> Result<Cut, HypervisorError> {
        let held = self.held.lock().await;
        let time = Timestamp::now();
        self.layers.put(held.as_ref().expect("what is cut was prepared")).await?;
        Ok(Cut { time, pause: None })
    }

    async fn export(&self, recorded: &Recorded) -> Result<Exports, HypervisorError> {
        Ok(self.serve(recorded).await?)
    }

    async fn confirm(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        let held = self.held.lock().await;
        let held = held.as_ref().expect("what is confirmed was prepared");
        if let Some(Reading { server, chains }) = &*self.reading() {
            server.confirm(recorded, chains)?;
        }
        match create::holds_still(&self.layers, held).await? {
            true => Ok(()),
            false => {
                let disk = recorded.record().disks[0].disk.clone();
                let what = "the guest does not run on its overlays any more".to_owned();
                Err(HypervisorError::PointInTimeLost { disk, what })
            }
        }
    }

    async fn release(&self, _: &Recorded) -> Result<(), HypervisorError> {
        let reading = self.reading().take();
        match reading {
            Some(mut reading) => reading.server.end().await,
            None => Ok(()),
        }
    }

    async fn finish(
        &self,
        recorded: &Recorded,
        interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Option<Stall>, HypervisorError> {
        let Some(mut held) = self.held.lock().await.take() else { return Ok(None) };
        let (layers, records, budget) = (&self.layers, &self.records, self.settings.budget);
        let purge = Purge { layers, records, budget, progress: self.progress };
        if self.settings.tracks && recorded.record().phase == Phase::Recorded {
            let kept = records.update(&mut held, |record| record.purpose = Purpose::Tracking);
            kept.map_err(OverlayError::from)?;
            let before = track::held_beneath(records, held.record())?;
            // The next backup goes on writing back what this one has read; but a chain that only grows
            // must not go unnoticed.
            let sunk = track::sink(&purge, &held.record().reach, interrupt).await;
            for disk in &held.record().disks {
                let before = before.iter().find(|(name, _)| *name == disk.disk);
                let (Some((_, held)), Some(fill)) = (before, Fill::of(disk)) else { continue };
                if fill.is_tight_after(*held) {
                    let held = human_bytes(*held);
                    tracing::warn!("{fill}, and {held} were written since the last backup: {LOW}");
                }
            }
            return Ok(sunk?);
        }
        let brought = purge.run(held, interrupt).await?;
        for disk in brought.iter().filter(|disk| disk.slowed || disk.paused.is_some()) {
            let paused = disk.paused.map_or(0, |paused| paused.as_millis());
            let disk = &disk.disk.disk;
            tracing::warn!(
                "{disk}: the guest was held back on its way back, and paused {paused} ms"
            );
        }
        Ok(brought.iter().filter_map(|disk| disk.stall).reduce(Stall::join))
    }

    async fn let_go_on(&self) -> Result<(), HypervisorError> {
        self.inner.let_go_on().await
    }

    async fn drop_bitmaps(&self, bitmaps: &[(String, String)]) -> Result<(), HypervisorError> {
        self.inner.drop_bitmaps(bitmaps).await
    }
}
