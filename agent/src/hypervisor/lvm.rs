//! A machine that runs, however it is reached, whose disks are on logical volumes: their point in time is
//! taken beside QEMU, by snapshots of LVM.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::time::timeout;

use super::{
    Choice, Claim, Cut, Disk, Exports, GuestIo, Hypervisor, HypervisorError, Machine, MachineFile,
    Reach, Tracking,
};
use crate::capture::image::{self, Image};
use crate::capture::lvm::{self, Snapshot, Volume};
use crate::capture::offline::{self, Server};
use crate::journal::{DiskRecord, Process, Record, Recorded};
use crate::names::{DiskName, RunId};
use crate::overlay::Layers;

/// How long a guest stands still at most while the snapshots of several disks are made.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How often the use of the snapshots is looked at.
const USE_POLL: Duration = Duration::from_millis(500);

/// A machine on logical volumes.
#[derive(Debug)]
pub struct OnVolumes<H> {
    machine: H,
    run_dir: PathBuf,
    /// Size in bytes of a classic snapshot.
    size: Option<u64>,
    /// The volume of each disk that was discovered.
    volumes: OnceLock<Vec<(DiskName, Volume)>>,
    server: Mutex<Option<Server>>,
    /// What is watched: the snapshots, once they are there.
    watched: OnceLock<Record>,
}

impl<H: Hypervisor> OnVolumes<H> {
    /// A machine, and how many bytes a classic snapshot of each of its disks takes.
    pub fn new(machine: H, run_dir: &Path, size: Option<u64>) -> Self {
        Self {
            machine,
            run_dir: run_dir.to_owned(),
            size,
            volumes: OnceLock::new(),
            server: Mutex::new(None),
            watched: OnceLock::new(),
        }
    }

    /// The machine itself.
    pub fn machine(&self) -> &H {
        &self.machine
    }

    /// The volumes of disks, in their order.
    fn volumes_of<'a>(&self, disks: impl Iterator<Item = &'a DiskName>) -> Vec<Volume> {
        let known = self.volumes.get().map_or(&[][..], Vec::as_slice);
        let of_disk = |disk: &DiskName| known.iter().find(|(target, _)| target == disk);
        disks.filter_map(of_disk).map(|(_, volume)| volume.clone()).collect()
    }
}

async fn check(record: &Record) -> Result<(), HypervisorError> {
    let names = record.disks.iter().map(|disk| &disk.disk);
    let disks: Vec<_> = names.zip(&record.snapshots).collect();
    lvm::check(&disks, &lvm::volumes().await?)
}

impl<H: Hypervisor> Hypervisor for OnVolumes<H> {
    async fn name(&self) -> Result<Option<String>, HypervisorError> {
        self.machine.name().await
    }

    async fn discover(&self, choice: &Choice) -> Result<Machine, HypervisorError> {
        let mut machine = self.machine.discover(choice).await?;
        let known = lvm::volumes().await?;
        let mut volumes = Vec::new();
        for disk in &mut machine.disks {
            let image = disk.image.as_deref().filter(|_| disk.driver == "raw");
            volumes.push((disk.target.clone(), lvm::of_image(&known, &disk.target, image)?));
            let reason = "LVM does not tell what changed since the last backup";
            disk.tracking = Tracking::Unsupported(reason.to_owned());
        }
        // A second look finds the same.
        let _ = self.volumes.set(volumes);
        Ok(machine)
    }

    async fn definition(&self) -> Result<Vec<MachineFile>, HypervisorError> {
        self.machine.definition().await
    }

    async fn firmware(&self) -> (Vec<MachineFile>, Vec<String>) {
        self.machine.firmware().await
    }

    async fn reclaim(&self, _: &mut Machine, _: &[Claim]) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn reach(&self) -> Reach {
        self.machine.reach()
    }

    async fn guest_io(&self) -> Result<GuestIo, HypervisorError> {
        self.machine.guest_io().await
    }

    fn names(&self, _: &RunId, _index: usize, disk: &Disk) -> DiskRecord {
        DiskRecord::untouched(disk)
    }

    fn snapshots(&self, run: &RunId, disks: &[&DiskName]) -> Vec<Snapshot> {
        let volumes = self.volumes_of(disks.iter().copied());
        volumes.iter().enumerate().map(|(index, volume)| volume.snapshot(run, index)).collect()
    }

    fn listens_at(&self, _: &RunId) -> Option<PathBuf> {
        // Its socket lies in the run's folder.
        None
    }

    async fn layers(&self) -> Result<impl Layers, HypervisorError> {
        self.machine.layers().await
    }

    fn process(&self) -> Option<Process> {
        self.machine.process()
    }

    async fn has_left(&self) -> bool {
        self.machine.has_left().await
    }

    fn pauses(&self, disks: usize) -> bool {
        disks > 1
    }

    async fn danger(&self) -> HypervisorError {
        loop {
            tokio::time::sleep(USE_POLL).await;
            let Some(record) = self.watched.get() else { continue };
            match check(record).await {
                // A tool that is away for a moment is asked again, and at the end by `confirm`.
                Ok(()) | Err(HypervisorError::Tool { .. } | HypervisorError::StillInUse { .. }) => {
                }
                Err(error) => return error,
            }
        }
    }

    async fn prepare(&self, _: &Recorded, _: &[Disk]) -> Result<(), HypervisorError> {
        Ok(())
    }

    async fn cut(&self, recorded: &Recorded) -> Result<Cut, HypervisorError> {
        let record = recorded.record();
        let volumes = self.volumes_of(record.disks.iter().map(|disk| &disk.disk));
        let start = Instant::now();
        if record.pauses {
            self.machine.pause().await?;
        }
        let time = Timestamp::now();
        // The kernel brings to a volume what was written to it before its snapshot.
        let made = lvm::create(&record.snapshots, &volumes, self.size);
        let made = match record.pauses {
            // What has been begun is waited for when it is removed.
            true => timeout(PAUSE_MAX, made).await.unwrap_or_else(|_| {
                let what = "LVM, which the guest stands still for,".to_owned();
                Err(HypervisorError::StillInUse { what, waited: PAUSE_MAX })
            }),
            false => made.await,
        };
        if record.pauses {
            self.machine.let_go_on().await?;
        }
        let pause = record.pauses.then(|| start.elapsed());
        made?;
        Ok(Cut { time, pause })
    }

    async fn export(&self, recorded: &Recorded) -> Result<Exports, HypervisorError> {
        let record = recorded.record();
        let _ = self.watched.set(record.clone());
        let mut chains = Vec::new();
        for (disk, snapshot) in record.disks.iter().zip(&record.snapshots) {
            let image = Image::local(snapshot.path(), "raw");
            let chain = image::chain(vec![image], false).await?;
            let lost = |what| HypervisorError::PointInTimeLost { disk: disk.disk.clone(), what };
            chains.push(chain.map_err(lost)?);
        }
        let (server, exports) =
            offline::serve(recorded, &chains, Vec::new(), false, &self.run_dir).await?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(exports)
    }

    async fn confirm(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        check(recorded.record()).await
    }

    async fn release(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut server) = server {
            server.end().await?;
        }
        lvm::remove(&recorded.record().snapshots).await
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.machine.pause().await
    }

    async fn let_go_on(&self) -> Result<(), HypervisorError> {
        self.machine.let_go_on().await
    }

    async fn drop_bitmaps(&self, bitmaps: &[(String, String)]) -> Result<(), HypervisorError> {
        self.machine.drop_bitmaps(bitmaps).await
    }
}
