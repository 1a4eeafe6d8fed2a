//! Domains of libvirt that are shut off: their images are read as they lie there, without starting QEMU.
//!
//! The dirty bitmaps are those in the images themselves; what libvirt knows of checkpoints counts only
//! when the domain runs. A bitmap that begins here gets its checkpoint then, see `reclaim`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::OnceCell;
use virt::connect::Connect;
use virt::domain::{
    Domain, DomainShutoffReason, DomainShutoffReasonEnum, DomainStateReason, DomainStateReasonEnum,
};

use super::connection::DomainHandle;
use super::xml::{self, Backing, DomainDisk, Remote};
use super::{LibvirtDomain, Places, definition, sys, was_migrated};
use crate::capture::image::{self, Chain, Image, Reason, Use};
use crate::capture::libvirt_job;
use crate::capture::offline::{self, Server};
use crate::capture::place::Place;
use crate::hypervisor::{
    Choice, Claim, Cut, Disk, Exports, GuestIo, Hypervisor, HypervisorError, Machine, MachineFile,
    Reach, Skipped, Tracking,
};
use crate::journal::{DiskRecord, Record, Recorded};
use crate::manifest::Consistency;
use crate::names::{DiskName, RunId};
use crate::overlay::Layers;
use crate::overlay::libvirt::LibvirtLayers;
use crate::stop::Stop;

/// How often libvirt is asked whether the domain was started meanwhile.
const STATE_POLL: Duration = Duration::from_secs(1);

/// One domain of libvirt that is shut off.
#[derive(Debug)]
pub struct ShutOffDomain {
    handle: DomainHandle,
    run_dir: PathBuf,
    /// Whether its description is stored with its secrets.
    secrets: bool,
    /// The domain as it was when it was first looked at.
    seen: OnceCell<xml::Domain>,
    /// The images of each disk that was discovered.
    chains: OnceCell<Vec<(DiskName, Chain)>>,
    server: Mutex<Option<Server>>,
    /// What starts it again.
    stop: Option<Arc<Stop>>,
}

impl ShutOffDomain {
    /// The domain of a handle.
    pub fn new(handle: DomainHandle, run_dir: &Path, secrets: bool) -> Self {
        Self {
            handle,
            run_dir: run_dir.to_owned(),
            secrets,
            seen: OnceCell::new(),
            chains: OnceCell::new(),
            server: Mutex::new(None),
            stop: None,
        }
    }

    /// The same domain, that may have been shut down for its backup and is started again once it was read.
    pub fn stopped_by(self, stop: Option<Arc<Stop>>) -> Self {
        Self { stop, ..self }
    }

    /// The images of its disks, from the top down; after `discover`.
    pub fn images(&self) -> &[(DiskName, Chain)] {
        self.chains.get().map_or(&[], Vec::as_slice)
    }

    /// The domain, asked for once.
    async fn look(&self) -> Result<&xml::Domain, HypervisorError> {
        self.seen.get_or_try_init(async || self.handle.describe().await).await
    }

    /// A disk, the volume that it names looked up.
    async fn with_volume(&self, disk: &DomainDisk) -> Result<DomainDisk, HypervisorError> {
        let mut disk = disk.clone();
        if let Some((pool, volume)) = disk.volume.clone() {
            let step = format!("find the volume of `{}`", disk.target);
            let find = move |connection: &Connect| {
                let pool = connection.lookup_storage_pool_by_name(&pool)?;
                pool.lookup_storage_vol_by_name(&volume)?.path()
            };
            disk.file = Some(self.handle.libvirt().ask(&step, find).await?.into());
        }
        Ok(disk)
    }

    /// Makes sure that the domain does not run.
    ///
    /// # Errors
    /// [`HypervisorError::Started`], libvirt's.
    pub async fn check_off(&self) -> Result<(), HypervisorError> {
        match self.handle.is_active().await? {
            true => Err(HypervisorError::Started { domain: self.look().await?.name.clone() }),
            false => Ok(()),
        }
    }

    async fn reason(&self) -> Result<DomainStateReasonEnum, HypervisorError> {
        Ok(self.handle.ask("tell its state", Domain::state).await?.1)
    }

    /// How consistent the way it ended has left its disks.
    ///
    /// # Errors
    /// [`HypervisorError::Migrated`]: they are not at rest.
    async fn consistency(&self) -> Result<Consistency, HypervisorError> {
        let reason = self.reason().await?;
        if was_migrated(reason) {
            return Err(HypervisorError::Migrated { domain: self.look().await?.name.clone() });
        }
        let clean = DomainShutoffReasonEnum::from(DomainShutoffReason::Shutdown);
        Ok(match reason == DomainStateReasonEnum::from(DomainStateReason::Shutoff(clean)) {
            true => Consistency::Filesystem,
            false => Consistency::Crash,
        })
    }

    /// The images of the disks of a run.
    fn chains(&self, record: &Record) -> Vec<Chain> {
        let known = self.images();
        let of_disk = |disk: &DiskRecord| known.iter().find(|(target, _)| *target == disk.disk);
        record.disks.iter().filter_map(of_disk).map(|(_, chain)| chain.clone()).collect()
    }

    fn take_server(&self) -> Option<Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Removes dirty bitmaps from the images.
    async fn drop_from_images(&self, bitmaps: &[(String, String)]) -> Result<(), HypervisorError> {
        for (target, bitmap) in bitmaps {
            let disk = self.look().await?.disks.iter().find(|disk| disk.target == *target);
            let Some(disk) = disk else { continue };
            let image = top(&self.with_volume(disk).await?);
            // A bitmap in an image that is gone is gone with it.
            let is_there = |image: &Image| image.path().is_some_and(Path::exists);
            if let Some(image) = image.filter(|i| i.format == "qcow2" && is_there(i)) {
                image.remove_bitmap(bitmap).await?;
            }
        }
        Ok(())
    }
}

fn top(disk: &DomainDisk) -> Option<Image> {
    let local = disk.file.clone().or_else(|| disk.device.clone()).map(Place::Local);
    let nbd = || disk.remote.as_ref()?.nbd.clone().map(Place::Nbd);
    let place = local.or_else(nbd)?;
    Some(Image { place, format: disk.format.clone(), data_file: None })
}

/// The images that a description names for a disk, from the top down, and whether it leaves open what
/// lies beneath the last one.
fn named(disk: &DomainDisk) -> Result<(Vec<Image>, bool), Reason> {
    if disk.is_encrypted {
        return Err("its image is encrypted, and only a domain that runs has the key: back it up \
                    while it runs"
            .into());
    }
    let elsewhere = || match &disk.remote {
        Some(Remote { protocol, .. }) => format!(
            "its image is reached by {protocol}, with what only a domain that runs has: back it up \
             while it runs"
        ),
        None => "an image of it is not on this host: back it up while it runs".to_owned(),
    };
    let mut images = vec![top(disk).ok_or_else(elsewhere)?];
    let mut backing = &disk.backing;
    while let Backing::Image { format, path, backing: next } = backing {
        let path = path.clone().ok_or_else(elsewhere)?;
        images.push(Image::local(path, format));
        backing = next;
    }
    Ok((images, *backing == Backing::Unsaid))
}

/// Whether a disk at rest can keep dirty bitmaps.
fn tracking(chain: &Chain) -> Result<Tracking, HypervisorError> {
    let image = &chain.images[0];
    Ok(match &chain.header.bitmaps {
        None => Tracking::Unsupported(match image.format.as_str() {
            "qcow2" => super::OLD_QCOW2.to_owned(),
            format => format!("{format} images keep no dirty bitmaps"),
        }),
        Some(_) if image.path().is_none() => Tracking::Unsupported(
            "its image lies on the network, where no dirty bitmap is begun while the domain is off"
                .to_owned(),
        ),
        Some(_) if image.used()? == Use::Reads => Tracking::Unsupported(
            "its image lies beneath the disk of a guest that runs, and can keep no new dirty bitmap \
             until that ends"
                .to_owned(),
        ),
        Some(bitmaps) => Tracking::Bitmaps(bitmaps.clone()),
    })
}

fn disk(target: DiskName, chain: &Chain) -> Result<Disk, HypervisorError> {
    let name = target.to_string();
    Ok(Disk {
        target,
        device: name.clone(),
        root: name.clone(),
        format: name,
        driver: chain.images[0].format.clone(),
        size: chain.header.size,
        image: chain.images[0].path().map(Path::to_owned),
        tracking: tracking(chain)?,
    })
}

impl Hypervisor for ShutOffDomain {
    async fn name(&self) -> Result<Option<String>, HypervisorError> {
        Ok(Some(self.look().await?.name.clone()))
    }

    async fn discover(&self, choice: &Choice) -> Result<Machine, HypervisorError> {
        self.check_off().await?;
        let consistency = self.consistency().await?;
        let seen = self.look().await?;
        let (mut disks, mut chains, mut skipped) = (Vec::new(), Vec::new(), seen.skipped.clone());
        for seen in &seen.disks {
            if let Some(left_out) = choice.leaves_out(&seen.target) {
                skipped.push(left_out);
                continue;
            }
            let target: DiskName = seen.target.parse().map_err(HypervisorError::DiskName)?;
            let chain = match named(&self.with_volume(seen).await?) {
                Ok((images, goes_on)) => image::chain(images, goes_on).await?,
                Err(reason) => Err(reason),
            };
            match chain {
                Ok(chain) => {
                    disks.push(disk(target.clone(), &chain)?);
                    chains.push((target, chain));
                }
                Err(reason) => {
                    tracing::warn!("disk `{target}` is left out: {reason}");
                    skipped.push(Skipped::disk(target.to_string(), reason));
                }
            }
        }
        // A second look finds the same.
        let _ = self.chains.set(chains);
        Ok(Machine {
            uuid: self.handle.address().uuid,
            runs: false,
            shut_off: Some(consistency),
            disks,
            skipped,
        })
    }

    async fn definition(&self) -> Result<Vec<MachineFile>, HypervisorError> {
        definition::of_machine(&self.handle, self.look().await?, self.secrets).await
    }

    async fn firmware(&self) -> (Vec<MachineFile>, Vec<String>) {
        let seen = self.seen.get().expect("a backup looks at the domain first");
        definition::firmware(seen, &self.handle.address().uuid).await
    }

    async fn reclaim(&self, _: &mut Machine, _: &[Claim]) -> Result<(), HypervisorError> {
        // The images name every bitmap that they have.
        Ok(())
    }

    async fn layers(&self) -> Result<impl Layers, HypervisorError> {
        LibvirtLayers::new(self.handle.clone()).await
    }

    fn reach(&self) -> Reach {
        Reach::Domain(self.handle.address())
    }

    async fn guest_io(&self) -> Result<GuestIo, HypervisorError> {
        Ok(GuestIo::default())
    }

    fn names(&self, _: &RunId, _index: usize, disk: &Disk) -> DiskRecord {
        DiskRecord::untouched(disk)
    }

    fn listens_at(&self, _: &RunId) -> Option<PathBuf> {
        // Its socket lies in the run's folder.
        None
    }

    async fn danger(&self) -> HypervisorError {
        loop {
            tokio::time::sleep(STATE_POLL).await;
            // A libvirt that is away for a moment is asked again at the end, by `confirm`.
            if let Err(error @ HypervisorError::Started { .. }) = self.check_off().await {
                return error;
            }
        }
    }

    async fn prepare(&self, recorded: &Recorded, _: &[Disk]) -> Result<(), HypervisorError> {
        offline::check_unused(&self.chains(recorded.record()))
    }

    async fn cut(&self, recorded: &Recorded) -> Result<Cut, HypervisorError> {
        let time = Timestamp::now();
        offline::add_bitmaps(recorded, &self.chains(recorded.record())).await?;
        Ok(Cut { time, pause: None })
    }

    async fn export(&self, recorded: &Recorded) -> Result<Exports, HypervisorError> {
        let chains = self.chains(recorded.record());
        // In this order: a start that the question missed shows in the images.
        let marks = offline::marks(&chains)?;
        self.check_off().await?;
        let (server, exports) =
            offline::serve(recorded, &chains, marks, false, &self.run_dir).await?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(exports)
    }

    async fn confirm(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        self.check_off().await?;
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let server = server.as_ref().expect("what is confirmed was exported");
        server.confirm(recorded, &self.chains(recorded.record()))
    }

    async fn release(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        if let Some(mut server) = self.take_server() {
            server.end().await?;
        }
        if let Some(stop) = &self.stop {
            stop.start_again().await?;
        }
        // The run may have begun while the domain ran.
        libvirt_job::remove_files(recorded.record())
    }

    async fn drop_bitmaps(&self, bitmaps: &[(String, String)]) -> Result<(), HypervisorError> {
        let off = !self.handle.is_active().await?;
        if off && was_migrated(self.reason().await?) {
            // They went with the guest, and its images are in use.
            return Ok(());
        }
        match self.drop_from_images(if off { bitmaps } else { &[] }).await {
            // Now that it runs its QEMU has the bitmaps.
            Ok(()) | Err(HypervisorError::ImageInUse { .. }) if self.handle.is_active().await? => {
                let domain = self.handle.address();
                let libvirt = self.handle.libvirt();
                let domain = LibvirtDomain::new(libvirt, &domain.uuid, Places::default(), false);
                return domain.drop_bitmaps(bitmaps).await;
            }
            dropped => dropped?,
        }
        let mut names: Vec<&String> = bitmaps.iter().map(|(_, name)| name).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let step = format!("forget the checkpoint `{name}`");
            let name = name.clone();
            let forget = move |domain: &Domain| sys::checkpoint_delete(domain, &name, true);
            self.handle.change(&step, forget).await?;
        }
        Ok(())
    }
}
