//! Domains of libvirt. Everything goes through libvirt: its domains' monitors stay untouched.

mod checkpoints;
pub mod connection;
mod definition;
pub mod shut_off;
pub mod sys;
pub mod xml;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::mem;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::OnceCell;
use virt::connect::Connect;
use virt::domain::{
    Domain, DomainShutoffReason, DomainShutoffReasonEnum, DomainState, DomainStateReason,
    DomainStateReasonEnum,
};

use super::{
    Bitmap, BitmapHealth, Choice, Claim, Cut, Disk, Exports, GuestIo, Hypervisor, HypervisorError,
    Machine, MachineFile, Reach, Tracking,
};
use crate::capture::libvirt_job::{self, GuardedScratch};
use crate::capture::place::beside;
use crate::capture::write_back::WriteBack;
use crate::journal::{DiskRecord, Record, Recorded};
use crate::names::{DiskName, RunId};
use crate::overlay::Layers;
use crate::overlay::libvirt::LibvirtLayers;
use crate::quiesce::guest_agent::AgentAddress;
use connection::{DomainHandle, Libvirt};
use xml::DomainDisk;

/// How often the scratch is looked at.
const SCRATCH_POLL: Duration = Duration::from_millis(10);
/// How often libvirt is asked whether a guest that is to stand still does.
const STATE_POLL: Duration = Duration::from_millis(200);
/// Where libvirt keeps what belongs to one running domain: QEMU may make sockets there, whatever
/// confines it (libvirt's `qemuDomainSetPrivatePathsOld`, and virt-aa-helper's rule for it).
const DOMAIN_FOLDERS: &str = "/var/lib/libvirt/qemu";
/// From which libvirt on a backup job is offered a socket, as `major * 1000000 + minor * 1000 + micro`. One
/// that refuses it notes that as an error in its log, and 11.3, whose documents have it first, refuses.
const SOCKETS_FROM: u32 = 11_004_000;
/// Length in bytes to which libvirt cuts a domain's name in such a path.
const SHORT_NAME_LEN: usize = 20;

/// Why a disk keeps no dirty bitmaps.
const OLD_QCOW2: &str =
    "qcow2 version 2 keeps no dirty bitmaps; `qemu-img amend -o compat=1.1` changes that";

/// What a user allows of the host.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Where old blocks are saved; beside each image where not given.
    pub scratch: Option<PathBuf>,
    /// Where QEMU listens; a folder of libvirt's where not given.
    pub sockets: Option<PathBuf>,
}

/// One domain of libvirt.
#[derive(Debug)]
pub struct LibvirtDomain {
    handle: DomainHandle,
    places: Places,
    /// Whether its description is stored with its secrets.
    secrets: bool,
    /// The domain as it was when it was first looked at.
    seen: OnceCell<xml::Domain>,
    /// Whether its libvirt and QEMU can run backup jobs.
    offers_jobs: OnceLock<bool>,
    /// Whether libvirt may take the socket of a backup job, asked for once.
    takes_sockets: OnceCell<bool>,
    /// Size in bytes of each disk of the run.
    sizes: Mutex<Vec<u64>>,
    scratch: Mutex<Vec<GuardedScratch>>,
    /// Keeps the scratch on its way to its disk.
    write_back: Mutex<Option<WriteBack>>,
    /// Whether its guest is to stand still until it was read.
    suspends: bool,
    /// Whether the guest is to stand still just now.
    stands: AtomicBool,
}

/// A domain that a host has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KnownDomain {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    /// Whether a QEMU runs for it.
    pub is_active: bool,
}

/// The domains that a host has, by name.
///
/// # Errors
/// libvirt's.
pub async fn domains(libvirt: &Libvirt) -> Result<Vec<KnownDomain>, HypervisorError> {
    let list = |connection: &Connect| {
        let known = |domain: &Domain| {
            let (name, uuid) = (domain.name()?, domain.uuid_string()?);
            Ok(KnownDomain { name, uuid, is_active: domain.is_active()? })
        };
        let listed = connection.list_all_domains(0)?;
        // One may be undefined meanwhile.
        let is_there = |known: &Result<_, _>| !known.as_ref().is_err_and(sys::is_no_domain);
        listed.iter().map(known).filter(is_there).collect::<Result<Vec<_>, _>>()
    };
    let mut domains = libvirt.ask("list its domains", list).await?;
    domains.sort();
    Ok(domains)
}

impl LibvirtDomain {
    /// The domain with this uuid.
    pub fn new(libvirt: &Libvirt, uuid: &str, places: Places, secrets: bool) -> Self {
        Self {
            handle: libvirt.domain(uuid),
            places,
            secrets,
            seen: OnceCell::new(),
            offers_jobs: OnceLock::new(),
            takes_sockets: OnceCell::new(),
            sizes: Mutex::new(Vec::new()),
            scratch: Mutex::new(Vec::new()),
            write_back: Mutex::new(None),
            suspends: false,
            stands: AtomicBool::new(false),
        }
    }

    /// The same domain, whose guest is to stand still until it was read.
    pub fn suspended(self) -> Self {
        Self { suspends: true, ..self }
    }

    /// Whether a guest that is to stand still does not.
    async fn goes_on(&self) -> Result<bool, HypervisorError> {
        Ok(self.state().await? == DomainState::Running && self.stands.load(Ordering::SeqCst))
    }

    /// Looks after the scratch; the room that it takes is none while the guest stands still.
    fn guard_scratch(&self) -> Result<(), HypervisorError> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.iter_mut().try_for_each(|scratch| match self.suspends {
            true => scratch.is_there(),
            false => scratch.guard(),
        })
    }

    /// The scratch that is written out before the job ends.
    fn unwritten(&self) -> Vec<Arc<File>> {
        let scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.iter().filter_map(GuardedScratch::unwritten).collect()
    }

    /// The way to the guest agent, where the domain has a channel for one; after `discover`.
    pub fn agent(&self) -> Option<AgentAddress> {
        self.seen().has_agent.then(|| AgentAddress::Domain(self.handle.address()))
    }

    /// Whether its libvirt and QEMU can run backup jobs; those that do not tell can.
    async fn offers_jobs(&self) -> Result<bool, HypervisorError> {
        let emulator = self.look().await?.emulator.clone();
        let ask = move |connection: &Connect| {
            connection.domain_capabilities(emulator.as_deref(), None, None, None, 0)
        };
        let told = self.handle.libvirt().ask("tell what its QEMU can do", ask).await;
        let told = told.ok().and_then(|text| xml::parse(&text).ok());
        Ok(told.is_none_or(|told| xml::offers_backup_jobs(&told)))
    }

    /// The domain, asked for once.
    async fn look(&self) -> Result<&xml::Domain, HypervisorError> {
        self.seen.get_or_try_init(async || self.handle.describe().await).await
    }

    fn seen(&self) -> &xml::Domain {
        self.seen.get().expect("a backup looks at the domain first")
    }

    async fn state(&self) -> Result<DomainState, HypervisorError> {
        let state = self.handle.ask("tell its state", Domain::state).await?.0;
        Ok(state.unwrap_or(DomainState::NoState))
    }

    /// Whether libvirt may take the socket of a backup job. To QEMU under SELinux it would be of no use: a
    /// socket bears the label of the process that made it, and nobody changes that.
    async fn takes_sockets(&self) -> Result<bool, HypervisorError> {
        let ask = async || {
            let libvirt = self.handle.libvirt();
            let version = libvirt.ask("tell its version", Connect::lib_version).await?;
            Ok(version >= SOCKETS_FROM && !self.seen().has_selinux)
        };
        self.takes_sockets.get_or_try_init(ask).await.copied()
    }

    /// The disks of the domain that a record does not name.
    fn others(&self, record: &Record) -> Vec<String> {
        let named = |target: &&String| record.disks.iter().all(|d| d.disk.as_str() != *target);
        self.seen().targets.iter().filter(named).cloned().collect()
    }

    async fn disk(&self, disk: &DomainDisk, bitmaps: &[Bitmap]) -> Result<Disk, HypervisorError> {
        let target: DiskName = disk.target.parse().map_err(HypervisorError::DiskName)?;
        let name = disk.target.clone();
        let step = format!("tell the size of `{target}`");
        let size = self.handle.ask(&step, move |domain| sys::disk_size(domain, &name)).await?;
        Ok(Disk {
            device: disk.target.clone(),
            root: disk.target.clone(),
            format: disk.target.clone(),
            driver: disk.format.clone(),
            size,
            image: disk.file.clone().or_else(|| disk.device.clone()),
            tracking: tracking(disk, bitmaps),
            target,
        })
    }
}

/// Whether a domain is shut off because it was migrated to another host.
pub fn was_migrated(reason: DomainStateReasonEnum) -> bool {
    let migrated = DomainShutoffReasonEnum::from(DomainShutoffReason::Migrated);
    reason == DomainStateReasonEnum::from(DomainStateReason::Shutoff(migrated))
}

fn is_active(state: DomainState) -> bool {
    use DomainState::{Blocked, PMSuspended, Paused, Running, Shutdown};
    matches!(state, Running | Blocked | Paused | Shutdown | PMSuspended)
}

/// The folder that libvirt keeps for a running domain.
fn domain_folder(domain: &xml::Domain) -> PathBuf {
    let mut short = domain.name.as_str();
    if let Some((end, _)) = short.char_indices().nth(SHORT_NAME_LEN) {
        short = &short[..end];
    }
    Path::new(DOMAIN_FOLDERS).join(format!("domain-{}-{short}", domain.id.unwrap_or(0)))
}

/// Whether a disk can keep dirty bitmaps: only qcow2 from version 3 on holds them.
fn tracking(disk: &DomainDisk, bitmaps: &[Bitmap]) -> Tracking {
    if disk.format != "qcow2" {
        return Tracking::Unsupported(format!("{} images keep no dirty bitmaps", disk.format));
    }
    let image = disk.file.as_deref().or(disk.device.as_deref());
    match image.and_then(qcow2_version) {
        Some(2) => Tracking::Unsupported(OLD_QCOW2.to_owned()),
        _ => Tracking::Bitmaps(bitmaps.to_vec()),
    }
}

/// The version that the header of a qcow2 image gives (bytes 4 to 7, QEMU's docs/interop/qcow2.txt),
/// where it can be read.
fn qcow2_version(image: &Path) -> Option<u32> {
    let mut options = File::options();
    options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    let mut header = [0; 8];
    options.open(image).ok()?.read_exact(&mut header).ok()?;
    let (magic, version) = header.split_at(4);
    (magic == b"QFI\xfb").then(|| u32::from_be_bytes(version.try_into().expect("four bytes")))
}

impl Hypervisor for LibvirtDomain {
    async fn name(&self) -> Result<Option<String>, HypervisorError> {
        Ok(Some(self.look().await?.name.clone()))
    }

    async fn discover(&self, choice: &Choice) -> Result<Machine, HypervisorError> {
        let seen = self.look().await?;
        let state = self.state().await?;
        if !is_active(state) {
            return Err(HypervisorError::NotRunning { domain: seen.name.clone() });
        }
        // A second look finds the same.
        let _ = self.offers_jobs.set(self.offers_jobs().await?);
        let mut bitmaps: BTreeMap<String, Vec<Bitmap>> = BTreeMap::new();
        for (_, of_disks) in self.checkpoints(true).await? {
            for (target, bitmap) in of_disks {
                bitmaps.entry(target).or_default().push(bitmap);
            }
        }
        let mut machine = Machine {
            uuid: self.handle.address().uuid,
            runs: state == DomainState::Running,
            shut_off: None,
            disks: Vec::new(),
            skipped: seen.skipped.clone(),
        };
        for disk in &seen.disks {
            if let Some(skipped) = choice.leaves_out(&disk.target) {
                machine.skipped.push(skipped);
                continue;
            }
            let of_disk = bitmaps.get(&disk.target).map_or(&[][..], Vec::as_slice);
            machine.disks.push(self.disk(disk, of_disk).await?);
        }
        Ok(machine)
    }

    async fn definition(&self) -> Result<Vec<MachineFile>, HypervisorError> {
        definition::of_machine(&self.handle, self.seen(), self.secrets).await
    }

    async fn firmware(&self) -> (Vec<MachineFile>, Vec<String>) {
        definition::firmware(self.seen(), &self.handle.address().uuid).await
    }

    async fn reclaim(
        &self,
        machine: &mut Machine,
        claims: &[Claim],
    ) -> Result<(), HypervisorError> {
        for claim in claims {
            self.reclaim_one(machine, claim).await?;
        }
        Ok(())
    }

    fn presume(&self, machine: &mut Machine, claims: &[Claim]) {
        for disk in &mut machine.disks {
            let claimed = claims.iter().filter(|claim| claim.disks.contains(&disk.target));
            let Tracking::Bitmaps(bitmaps) = &mut disk.tracking else { continue };
            for claim in claimed {
                if bitmaps.iter().all(|known| known.name != claim.bitmap) {
                    let (name, health) = (claim.bitmap.clone(), BitmapHealth::Lost);
                    bitmaps.push(Bitmap { name, health });
                }
            }
        }
    }

    async fn layers(&self) -> Result<impl Layers, HypervisorError> {
        LibvirtLayers::new(self.handle.clone()).await
    }

    fn no_job(&self) -> Option<String> {
        let lacks = self.offers_jobs.get() == Some(&false);
        lacks.then(|| "this libvirt, or the QEMU of the domain, offers no backup jobs".to_owned())
    }

    fn reach(&self) -> Reach {
        Reach::Domain(self.handle.address())
    }

    async fn has_left(&self) -> bool {
        match self.handle.ask("tell its state", Domain::state).await {
            Ok((_, reason)) => was_migrated(reason),
            Err(error) => {
                matches!(error, HypervisorError::Libvirt { source, .. } if source.is_no_domain())
            }
        }
    }

    async fn guest_io(&self) -> Result<GuestIo, HypervisorError> {
        let kinds = self.handle.ask("count what the guest does", sys::block_stats).await?;
        Ok(kinds.into_iter().sum())
    }

    fn names(&self, run: &RunId, _index: usize, disk: &Disk) -> DiskRecord {
        let beside = || disk.image.as_deref().and_then(beside).map(Path::to_owned);
        let folder = self.places.scratch.clone().or_else(beside);
        let folder = folder.unwrap_or_else(|| domain_folder(self.seen()));
        let scratch = folder.join(format!(".kvmsnap-{run}-{}.scratch", disk.target));
        DiskRecord {
            scratch: scratch.to_string_lossy().into_owned(),
            ..DiskRecord::untouched(disk)
        }
    }

    fn listens_at(&self, run: &RunId) -> Option<PathBuf> {
        let folder = self.places.sockets.clone().unwrap_or_else(|| domain_folder(self.seen()));
        Some(folder.join(format!("kvmsnap-{run}.nbd")))
    }

    fn pauses(&self, _disks: usize) -> bool {
        self.suspends
    }

    fn suspends(&self) -> bool {
        self.suspends
    }

    async fn danger(&self) -> HypervisorError {
        let mut asked = Instant::now();
        loop {
            if let Err(error) = self.guard_scratch() {
                return error;
            }
            tokio::time::sleep(SCRATCH_POLL).await;
            if self.stands.load(Ordering::SeqCst) && asked.elapsed() > STATE_POLL {
                asked = Instant::now();
                // A libvirt that is away for a moment is asked again.
                if let Ok(true) = self.goes_on().await {
                    return HypervisorError::GuestGoesOn;
                }
            }
        }
    }

    async fn prepare(&self, recorded: &Recorded, disks: &[Disk]) -> Result<(), HypervisorError> {
        if !self.suspends {
            libvirt_job::check_room(recorded.record(), disks)?;
        }
        // Not while the guest is frozen.
        self.takes_sockets().await?;
        let sizes = disks.iter().map(|disk| disk.size);
        *self.sizes.lock().unwrap_or_else(PoisonError::into_inner) = sizes.collect();
        Ok(())
    }

    async fn cut(&self, recorded: &Recorded) -> Result<Cut, HypervisorError> {
        let others = self.others(recorded.record());
        let takes_sockets = self.takes_sockets().await?;
        let start = Instant::now();
        let pauses = recorded.record().pauses;
        if pauses {
            self.pause().await?;
        }
        let cut = libvirt_job::cut(&self.handle, recorded, &others, takes_sockets).await?;
        self.stands.store(self.suspends, Ordering::SeqCst);
        Ok(Cut { pause: pauses.then(|| start.elapsed()), ..cut })
    }

    async fn export(&self, recorded: &Recorded) -> Result<Exports, HypervisorError> {
        let sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let disks = recorded.record().disks.iter().zip(sizes);
        let scratch = disks.map(|(names, size)| GuardedScratch::open(names, size));
        let scratch = scratch.collect::<Result<Vec<_>, _>>()?;
        if !self.suspends {
            // Without it the guest waits now and then.
            let write_back = WriteBack::begin(scratch.iter().map(GuardedScratch::file).collect());
            *self.write_back.lock().unwrap_or_else(PoisonError::into_inner) = write_back.ok();
        }
        *self.scratch.lock().unwrap_or_else(PoisonError::into_inner) = scratch;
        libvirt_job::export(recorded)
    }

    async fn confirm(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        if self.goes_on().await? {
            return Err(HypervisorError::GuestGoesOn);
        }
        libvirt_job::confirm(&self.handle, recorded).await
    }

    fn scratch_peak(&self) -> Option<u64> {
        let scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        // It never shrinks.
        (!scratch.is_empty()).then(|| scratch.iter().map(GuardedScratch::holds).sum())
    }

    async fn release(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        drop(self.write_back.lock().unwrap_or_else(PoisonError::into_inner).take());
        // The job goes on meanwhile: its scratch is looked after, and first.
        tokio::select! {
            biased;
            _ = self.danger() => {}
            () = libvirt_job::write_out(self.unwritten()) => {}
        }
        libvirt_job::release(&self.handle, recorded).await
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.handle.change("pause the guest", Domain::suspend).await
    }

    async fn let_go_on(&self) -> Result<(), HypervisorError> {
        self.stands.store(false, Ordering::SeqCst);
        if self.suspends {
            // It was read to the end, or given up: nobody watches the scratch any more. But until the job has
            // ended, what the guest overwrites goes there, and there was no room reserved for it.
            let scratch =
                mem::take(&mut *self.scratch.lock().unwrap_or_else(PoisonError::into_inner));
            let reserved = scratch.into_iter().try_for_each(|mut scratch| scratch.guard());
            if let Err(HypervisorError::ScratchLow { .. }) = reserved {
                self.handle.change("end the backup job", sys::abort_job).await?;
            }
        }
        self.handle.let_go_on().await
    }

    async fn drop_bitmaps(&self, bitmaps: &[(String, String)]) -> Result<(), HypervisorError> {
        let mut checkpoints: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (target, name) in bitmaps {
            checkpoints.entry(name).or_default().push(target);
        }
        for (name, targets) in checkpoints {
            self.drop_checkpoint(name, &targets).await?;
        }
        Ok(())
    }
}
