//! Overlays of a domain of libvirt, running or shut off.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use virt::connect::Connect;
use virt::domain::{
    Domain, DomainPausedReason, DomainState, DomainStateReason, DomainStateReasonEnum,
};
use virt_sys as flags;

use super::at_rest::LocalImage;
use super::files::is_same;
use super::record::{DiskRecord, Held};
use super::stall::Series;
use super::{Chain, Layers, OverlayError, Written};
use crate::hypervisor::HypervisorError;
use crate::hypervisor::libvirt::connection::{DomainHandle, Libvirt};
use crate::hypervisor::libvirt::xml::{self, Backing, DomainDisk};
use crate::hypervisor::libvirt::{self, sys};
use crate::journal::Process;
use crate::names::DiskName;

/// Where libvirt keeps the process ids of its QEMUs.
const PID_FILES: &str = "/run/libvirt/qemu";
/// The longest chain; libvirt's own limit (`virDomainStorageSource`, 200 images).
const CHAIN_LEN_MAX: usize = 200;
/// How often a definition is read anew that somebody else changes at the same time.
const DEFINE_ATTEMPTS: usize = 5;
/// How often an image is read again whose header makes no sense, and how long is waited before.
const READ_TRIES: u32 = 10;
const READ_PAUSE: Duration = Duration::from_millis(100);

/// One domain.
#[derive(Debug)]
pub struct LibvirtLayers {
    handle: DomainHandle,
    name: String,
    process: Option<Process>,
}

impl LibvirtLayers {
    /// The domain of a handle.
    ///
    /// # Errors
    /// libvirt's.
    pub async fn new(handle: DomainHandle) -> Result<Self, HypervisorError> {
        let name = handle.describe().await?.name;
        let pid = fs::read_to_string(Path::new(PID_FILES).join(format!("{name}.pid")));
        let pid = pid.ok().and_then(|pid| pid.trim().parse().ok());
        let process = match handle.is_active().await? {
            true => pid.and_then(Process::of),
            false => None,
        };
        Ok(Self { handle, name, process })
    }

    async fn disk(&self, disk: &DiskRecord) -> Result<Option<DomainDisk>, HypervisorError> {
        let described = self.handle.describe().await?;
        Ok(described.disks.into_iter().find(|found| found.target == disk.disk.as_str()))
    }
}

/// The images of a disk that its description names, from the top down.
fn images(disk: &DomainDisk) -> Vec<LocalImage> {
    let top = disk.file.clone().or_else(|| disk.device.clone());
    let top = top.map(|path| LocalImage { path, format: disk.format.clone() });
    let mut images: Vec<LocalImage> = top.into_iter().collect();
    let mut backing = &disk.backing;
    while let Backing::Image { format, path, backing: next } = backing {
        let path = path.clone().unwrap_or_default();
        images.push(LocalImage { path, format: format.clone() });
        backing = next;
    }
    images
}

/// Whether an image, or one beneath it by their headers, is this one; in words why that cannot be told.
async fn leads_to(libvirt: &Libvirt, top: &xml::Top, image: &Path) -> Result<bool, String> {
    let path = match (&top.path, &top.volume) {
        (Some(path), _) => path.clone(),
        (None, Some((pool, volume))) => {
            let (pool_name, volume_name) = (pool.clone(), volume.clone());
            let find = move |connection: &Connect| {
                let pool = connection.lookup_storage_pool_by_name(&pool_name)?;
                pool.lookup_storage_vol_by_name(&volume_name)?.path()
            };
            match libvirt.ask("find a volume", find).await {
                Ok(path) => path.into(),
                // What is not there leads nowhere.
                Err(HypervisorError::Libvirt { source, .. }) if source.is_no_volume() => {
                    return Ok(false);
                }
                Err(error) => {
                    return Err(format!("volume `{volume}` of pool `{pool}` ({})", told(&error)));
                }
            }
        }
        // It has no medium, or one on the network.
        (None, None) => return Ok(false),
    };
    let mut next = LocalImage { path, format: top.format.clone() };
    for _ in 0..CHAIN_LEN_MAX {
        if is_same(&next.path, image) {
            return Ok(true);
        }
        if next.format == "raw" || matches!(next.path.try_exists(), Ok(false)) {
            return Ok(false);
        }
        let above = next.path.display().to_string();
        let header = match next.image().header().await {
            // It was deleted meanwhile.
            Err(_) if matches!(next.path.try_exists(), Ok(false)) => return Ok(false),
            header => header,
        };
        let header = header.map_err(|error| format!("image {above} ({})", told(&error)))?;
        let Some((path, format)) = header.backing else { return Ok(false) };
        let path = PathBuf::from(path);
        match (path.is_absolute(), format) {
            (true, Some(format)) => next = LocalImage { path, format },
            _ if is_same(&path, image) => return Ok(true),
            (false, _) if !path.to_string_lossy().starts_with("json:") => return Ok(false),
            _ => return Err(format!("image {above} (what lies beneath it is not told in full)")),
        }
    }
    Err(format!(
        "image {} (more than {CHAIN_LEN_MAX} images lie beneath each other)",
        next.path.display()
    ))
}

fn told(error: &HypervisorError) -> String {
    let source = std::error::Error::source(error);
    source.map_or_else(|| error.to_string(), ToString::to_string)
}

impl LibvirtLayers {
    /// Which domain has an image in a chain, in words; that of one disk of our own does not count.
    async fn named_by(
        &self,
        image: &Path,
        own: Option<&DiskName>,
    ) -> Result<Option<String>, HypervisorError> {
        let libvirt = self.handle.libvirt();
        let ours = self.handle.address().uuid;
        let is_it = |path: &Path| is_same(path, image);
        for known in libvirt::domains(libvirt).await? {
            let handle = libvirt.domain(&known.uuid);
            let inactive = flags::VIR_DOMAIN_XML_INACTIVE;
            let describe =
                move |domain: &Domain| Ok([domain.xml_desc(0)?, domain.xml_desc(inactive)?]);
            let descriptions = match handle.ask("describe a domain", describe).await {
                // One may be undefined meanwhile.
                Err(gone) if gone.is_gone() => continue,
                descriptions => descriptions?,
            };
            let mut tops = BTreeSet::new();
            for description in descriptions {
                let mut description = xml::parse(&description).map_err(HypervisorError::Xml)?;
                if let Some(disk) = own.filter(|_| known.uuid == ours) {
                    xml::remove_disk(&mut description, disk.as_str());
                }
                if xml::names_image(&description, &is_it) {
                    return Ok(Some(format!("the domain `{}`", known.name)));
                }
                tops.extend(xml::tops(&description));
            }
            for top in tops {
                let mut found = leads_to(libvirt, &top, image).await;
                // One in use may have been written to while its header was read.
                for _ in 1..READ_TRIES {
                    if found.is_ok() {
                        break;
                    }
                    tokio::time::sleep(READ_PAUSE).await;
                    found = leads_to(libvirt, &top, image).await;
                }
                match found {
                    Ok(true) => return Ok(Some(format!("the domain `{}`", known.name))),
                    Ok(false) => {}
                    Err(unread) => {
                        let by = format!(
                            "perhaps the domain `{}`, of which the {unread} cannot be read,",
                            known.name
                        );
                        return Ok(Some(by));
                    }
                }
            }
        }
        Ok(None)
    }
}

fn limits_of(limits: &Value) -> sys::IoLimits {
    ["total", "read", "write"].map(|name| limits[name].as_u64().unwrap_or(0))
}

fn value_of([total, read, write]: sys::IoLimits) -> Value {
    serde_json::json!({"total": total, "read": read, "write": write})
}

impl Layers for LibvirtLayers {
    fn process(&self) -> Option<Process> {
        self.process
    }

    async fn chains(&self) -> Result<Option<Vec<Chain>>, HypervisorError> {
        if !self.handle.is_active().await? {
            return Ok(None);
        }
        let described = self.handle.describe().await?;
        let chain = |disk: &DomainDisk| {
            Some(Chain { disk: disk.target.parse().ok()?, images: images(disk) })
        };
        Ok(Some(described.disks.iter().filter_map(chain).collect()))
    }

    fn owner(&self, base: &LocalImage) -> Option<(u32, u32)> {
        // libvirt has given it to the user that QEMU runs as.
        let meta = fs::metadata(&base.path).ok()?;
        Some((meta.uid(), meta.gid()))
    }

    async fn open(&self, _: &Held) -> Result<(), HypervisorError> {
        // libvirt opens and puts them in one step.
        Ok(())
    }

    async fn put(&self, held: &Held) -> Result<(), HypervisorError> {
        let disks = &held.record().disks;
        let overlays: Vec<_> =
            disks.iter().map(|disk| (disk.disk.as_str(), disk.overlay.as_path())).collect();
        let named = |target: &String| overlays.iter().any(|(disk, _)| disk == target);
        let targets = self.handle.describe().await?.targets;
        let others: Vec<_> = targets.into_iter().filter(|target| !named(target)).collect();
        let snapshot = xml::write_overlays(&overlays, &others);
        let how = flags::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | flags::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            | flags::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | flags::VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT;
        let put = move |domain: &Domain| domain.create_snapshot_xml(&snapshot, how).map(drop);
        self.handle.change("put overlays above the disks", put).await
    }

    async fn close(&self, _: &Held) -> Result<(), HypervisorError> {
        // libvirt closes what no disk is above.
        Ok(())
    }

    async fn commit(
        &self,
        _: &Held,
        disk: &DiskRecord,
        rate: Option<u64>,
    ) -> Result<(), HypervisorError> {
        let (target, rate) = (disk.disk.to_string(), rate.unwrap_or(0));
        let step = format!("write back the overlay of `{target}`");
        let found = self.disk(disk).await?;
        let top = found.as_ref().and_then(|found| images(found).into_iter().next());
        if top.is_some_and(|top| !is_same(&top.path, &disk.overlay)) {
            let [base, overlay] = [&disk.base.path, &disk.overlay].map(|p| p.display().to_string());
            // One that a killed run has begun goes on by itself.
            let commit = move |domain: &Domain| match sys::block_job(domain, &target)? {
                Some(job) if job.commits => Ok(()),
                // libvirt refuses where a job of somebody else is under way.
                _ => sys::commit_between(domain, &target, (&base, &overlay), rate),
            };
            return self.handle.change(&step, commit).await;
        }
        // One that a killed purge has begun. libvirt refuses a second job.
        let begun = found.and_then(|disk| disk.mirror);
        match begun {
            Some(into) if is_same(&into, &disk.base.path) => Ok(()),
            Some(into) => {
                let what = format!("a job of somebody else writes it to {}", into.display());
                Err(HypervisorError::PointInTimeLost { disk: disk.disk.clone(), what })
            }
            None => {
                let commit = move |domain: &Domain| sys::commit_top(domain, &target, rate);
                self.handle.change(&step, commit).await
            }
        }
    }

    async fn written(
        &self,
        _: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<Option<Written>, String>, HypervisorError> {
        // READY is what the description says: a job that has done all may not be ready yet.
        let is_ready = self.disk(disk).await?.is_some_and(|disk| disk.is_ready);
        let target = disk.disk.to_string();
        let step = format!("tell how far the job on `{target}` is");
        let ask = move |domain: &Domain| sys::block_job(domain, &target);
        let job = self.handle.ask(&step, ask).await?;
        Ok(Ok(job.map(|job| Written { done: job.done, total: job.total, is_ready })))
    }

    async fn has_sunk(
        &self,
        _: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<bool, String>, HypervisorError> {
        let target = disk.disk.to_string();
        let step = format!("tell how far the job on `{target}` is");
        let ask = move |domain: &Domain| sys::block_job(domain, &target);
        // libvirt keeps no word of one that failed: the chain tells.
        Ok(Ok(self.handle.ask(&step, ask).await?.is_none()))
    }

    async fn pivot(
        &self,
        _: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<(), String>, HypervisorError> {
        let target = disk.disk.to_string();
        let step = format!("go on with the image of `{target}`");
        let pivot = move |domain: &Domain| sys::block_job_end(domain, &target, true);
        self.handle.change(&step, pivot).await?;
        let on_base = |found: DomainDisk| {
            images(&found).first().is_some_and(|top| top.path == disk.base.path)
        };
        Ok(match self.disk(disk).await?.is_some_and(on_base) {
            true => Ok(()),
            false => Err("the guest did not go on with the disk's own image".to_owned()),
        })
    }

    async fn cancel(&self, _: &Held, disk: &DiskRecord) -> Result<(), HypervisorError> {
        let target = disk.disk.to_string();
        let step = format!("end the job on `{target}`");
        let end = move |domain: &Domain| match sys::block_job(domain, &target)? {
            Some(job) if job.commits => sys::block_job_end(domain, &target, false),
            _ => Ok(()),
        };
        self.handle.change(&step, end).await
    }

    async fn limits(&self, disk: &DiskRecord) -> Result<Value, HypervisorError> {
        let target = disk.disk.to_string();
        let step = format!("tell the limits of `{target}`");
        let ask = move |domain: &Domain| sys::io_limits(domain, &target);
        Ok(value_of(self.handle.ask(&step, ask).await?))
    }

    fn lowered(limits: &Value, rate: u64) -> Value {
        let [mut total, read, mut write] = limits_of(limits);
        // libvirt takes a limit of all or limits of each kind.
        match (total, write) {
            (0, 0) => write = rate,
            (0, _) => write = write.min(rate),
            _ => total = total.min(rate),
        }
        value_of([total, read, write])
    }

    async fn limit(
        &self,
        _: &Held,
        disk: &DiskRecord,
        limits: &Value,
    ) -> Result<(), HypervisorError> {
        let (target, limits) = (disk.disk.to_string(), limits_of(limits));
        let step = format!("limit the I/O of `{target}`");
        let set = move |domain: &Domain| sys::set_io_limits(domain, &target, limits);
        self.handle.change(&step, set).await
    }

    async fn watch_io(&self, _: &Held) -> Result<(), HypervisorError> {
        // libvirt only counts.
        Ok(())
    }

    async fn io(&self) -> Result<Vec<Series>, HypervisorError> {
        let kinds = self.handle.ask("count what the guest does", sys::block_stats).await?;
        Ok(kinds.into_iter().map(|counts| Series { counts, bins: None }).collect())
    }

    async fn forget_io(&self, _: &Held) -> Result<(), HypervisorError> {
        Ok(())
    }

    async fn runs(&self) -> Result<bool, HypervisorError> {
        let (state, _) = self.handle.ask("tell its state", Domain::state).await?;
        Ok(state == DomainState::Running.into())
    }

    async fn pause(&self, _: &Held) -> Result<(), HypervisorError> {
        self.handle.change("pause the guest", Domain::suspend).await
    }

    async fn resume(&self, ours: bool) -> Result<(), HypervisorError> {
        if ours {
            return self.handle.let_go_on().await;
        }
        let (_, reason) = self.handle.ask("tell its state", Domain::state).await?;
        let no_room = DomainStateReason::Paused(DomainPausedReason::IOError.into());
        match reason == DomainStateReasonEnum::from(no_room) {
            true => self.handle.change("let the guest go on", Domain::resume).await,
            false => Ok(()),
        }
    }

    async fn check_off(&self) -> Result<(), OverlayError> {
        let ask = |domain: &Domain| domain.has_managed_save(0);
        match self.handle.ask("tell whether its memory is saved", ask).await? {
            true => Err(OverlayError::Saved { domain: self.name.clone() }),
            false => Ok(()),
        }
    }

    async fn point_back(&self, disk: &DiskRecord) -> Result<(), HypervisorError> {
        let secure = flags::VIR_DOMAIN_XML_INACTIVE | flags::VIR_DOMAIN_XML_SECURE;
        let describe = move |domain: &Domain| domain.xml_desc(secure);
        let step = "describe the disks of the domain anew";
        for _ in 0..DEFINE_ATTEMPTS {
            let before = self.handle.ask("describe the domain", describe).await?;
            let mut description = xml::parse(&before).map_err(HypervisorError::Xml)?;
            let (overlay, base) = (&disk.overlay, &disk.base);
            if !xml::point_disk(&mut description, overlay, &base.path, &base.format) {
                return Ok(());
            }
            let description = xml::write(&description);
            // Somebody may be editing it.
            let define = move |domain: &Domain| {
                let is_it = domain.xml_desc(secure)? == before;
                is_it
                    .then(|| domain.connect()?.define_domain_xml_flags(&description, 0))
                    .transpose()
            };
            if self.handle.change(step, define).await?.is_some() {
                return Ok(());
            }
        }
        let source = std::io::Error::other("somebody else is changing its definition");
        Err(HypervisorError::Host { step: step.to_owned(), source })
    }

    async fn names(&self, image: &Path) -> Result<Option<String>, HypervisorError> {
        self.named_by(image, None).await
    }

    async fn others(
        &self,
        image: &Path,
        disk: &DiskName,
    ) -> Result<Option<String>, HypervisorError> {
        self.named_by(image, Some(disk)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r13_a_limit_of_all_and_one_of_writes_are_never_mixed() {
        let lowered = |limits| limits_of(&LibvirtLayers::lowered(&value_of(limits), 100));
        assert_eq!(lowered([0, 0, 0]), [0, 0, 100]);
        assert_eq!(lowered([0, 7, 50]), [0, 7, 50]);
        assert_eq!(lowered([1000, 0, 0]), [100, 0, 0]);
    }
}
