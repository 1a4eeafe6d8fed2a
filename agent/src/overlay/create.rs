//! The flow of `create`:
//!
//! ```text
//! what holds still already? ─► record ─► overlays made ─► opened by QEMU ─► quiesce ─► put ─► thaw ─► record
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::record::{DiskRecord, Held, HeldSince, Purpose, Record, Records, Stage};
use super::{Chain, Layers, OverlayError, files};
use crate::hypervisor::{Disk, Machine, Reach};
use crate::manifest::Consistency;
use crate::names::{DiskName, DomainName, RunId};
use crate::quiesce::application::{About, Applications, Ending};
use crate::quiesce::guest_agent::AgentAddress;
use crate::quiesce::{self, Mode, Wanted};

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Who wants it.
    pub purpose: Purpose,
    /// Whether the guest is frozen for the instant.
    pub quiesce: Mode,
    /// The guest agent, where one may be there.
    pub agent: Option<AgentAddress>,
    /// Who else is told of the instant.
    pub applications: Applications,
    /// Where overlays go; beside each image where not given.
    pub folder: Option<PathBuf>,
    /// Room in bytes to reserve for each disk.
    pub reserve: u64,
}

/// Whose overlays they will be, and what they will be called by.
#[derive(Debug)]
pub struct Owner {
    /// Names the files and nodes.
    pub id: RunId,
    /// The domain.
    pub domain: DomainName,
    /// Its uuid.
    pub uuid: String,
    /// How it is reached.
    pub reach: Reach,
    /// Who wants them.
    pub purpose: Purpose,
    /// Whether they stay from one backup to the next.
    pub stays: bool,
}

/// Has the images of a machine hold still. Under the machine's lock. `look` is called in that instant, while
/// the guest is frozen where it can be.
///
/// # Errors
/// [`OverlayError`]; the guest then writes to its own images as before, unless a record says otherwise.
pub async fn create(
    layers: &impl Layers,
    records: &Records,
    machine: &Machine,
    domain: DomainName,
    reach: Reach,
    request: &Request,
    look: impl AsyncFnOnce(),
) -> Result<(Held, Vec<String>), OverlayError> {
    let owner = Owner {
        id: RunId::random(),
        domain,
        uuid: machine.uuid.clone(),
        reach,
        purpose: request.purpose,
        stays: false,
    };
    let record = plan(layers, &machine.disks, owner, request.folder.as_deref()).await?;
    let (id, about) = (record.id.to_string(), About::of(&record));
    let (applications, agent) = (&request.applications, request.agent.as_ref());
    let mut warnings = applications.prepare(&about, agent, machine.runs).await?;
    let created = begin(layers, records, machine, record, request, look).await;
    let ending = match &created {
        Ok((held, _)) => Ending::of(&id, held.record().held.map(|since| since.consistency)),
        Err(error) => Ending::failed(error),
    };
    applications.conclude(&about, agent, machine.runs, &ending).await;
    let (held, more) = created?;
    warnings.extend(more);
    Ok((held, warnings))
}

async fn begin(
    layers: &impl Layers,
    records: &Records,
    machine: &Machine,
    record: Record,
    request: &Request,
    look: impl AsyncFnOnce(),
) -> Result<(Held, Vec<String>), OverlayError> {
    let mut held = records.begin(record)?;
    match take_effect(layers, records, &mut held, machine, request, look).await {
        Ok(warnings) => Ok((held, warnings)),
        Err(error) => match settle(layers, records, held).await {
            // A freeze was required, and did not last.
            Ok(Some(_)) if matches!(error, OverlayError::Quiesce(_)) => Err(error),
            // It took effect although its answer was lost.
            Ok(Some(held)) => Ok((held, vec![format!("the images hold still, although: {error}")])),
            Ok(None) => Err(error),
            Err(left) => {
                tracing::error!(error = %left, "`kvmsnap purge` removes what is left of it");
                Err(error)
            }
        },
    }
}

/// Finds out what became of a `create` that ended early, or of one long ago: `Some` where the images
/// hold still; else what it had made is removed.
///
/// # Errors
/// [`OverlayError`]; the record stays.
pub async fn settle(
    layers: &impl Layers,
    records: &Records,
    mut held: Held,
) -> Result<Option<Held>, OverlayError> {
    held.record().disks.iter().try_for_each(files::put_back)?;
    if held.record().held.is_some() {
        return Ok(Some(held));
    }
    let chains = layers.chains().await?;
    let runs = chains.is_some();
    let chains = chains.unwrap_or_default();
    let is_above = |disk: &DiskRecord| {
        let images = chains.iter().flat_map(|chain| &chain.images);
        images.into_iter().any(|image| files::is_same(&image.path, &disk.overlay))
    };
    let was_used = |disk: &DiskRecord| match disk.stage {
        // It was about to be deleted, and is.
        Stage::Back(_) if files::mark(&disk.overlay)?.is_none() => Ok(false),
        _ => files::is_untouched(disk).map(|untouched| !untouched),
    };
    // They are put in one instant, so one tells of all. What a guest wrote to is never thrown away.
    let mut took_effect = held.record().disks.iter().any(is_above);
    for disk in &held.record().disks {
        took_effect |= was_used(disk)?;
        // A machine that has ended may be described with an overlay that nobody wrote to yet.
        took_effect |= !runs && layers.names(&disk.overlay).await?.is_some();
    }
    if took_effect {
        let time = held.record().begun;
        let runs_on_them = held.record().disks.iter().all(is_above);
        hold(
            records,
            &mut held,
            HeldSince { time, consistency: Consistency::Crash },
            runs_on_them,
        )?;
        return Ok(Some(held));
    }
    layers.close(&held).await?;
    // Whoever is killed in between leaves a part of them, which is no sign of use.
    records.update(&mut held, |record| {
        record.disks.iter_mut().for_each(|disk| disk.stage = Stage::Back(disk.made));
    })?;
    for disk in &held.record().disks {
        files::delete(disk)?;
    }
    records.clear(&held)?;
    Ok(None)
}

/// Whether all images still show the instant that is recorded: the guest writes to the overlays, and nobody
/// has written to what lies beneath.
///
/// # Errors
/// [`OverlayError`].
pub async fn holds_still(layers: &impl Layers, held: &Held) -> Result<bool, OverlayError> {
    let chains = layers.chains().await?;
    for disk in &held.record().disks {
        let is_top = |chain: &Chain| {
            chain.images.first().is_some_and(|top| files::is_same(&top.path, &disk.overlay))
        };
        let is_above = chains.as_ref().is_none_or(|chains| chains.iter().any(is_top));
        let is_still = disk.still.is_none() || files::mark(&disk.base.path)? == disk.still;
        if disk.stage != Stage::Above || !is_above || !is_still {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Names all that will be made: overlays above these disks, in a folder or beside each image.
///
/// # Errors
/// [`OverlayError::NotRunning`], [`OverlayError::NoDisk`]; those of a disk whose overlay has no place.
pub async fn plan(
    layers: &impl Layers,
    wanted: &[Disk],
    owner: Owner,
    folder: Option<&Path>,
) -> Result<Record, OverlayError> {
    let Owner { id, domain, uuid, reach, purpose, stays } = owner;
    let not_running = || OverlayError::NotRunning { domain: domain.to_string() };
    let chains = layers.chains().await?.ok_or_else(not_running)?;
    let base = |disk: &DiskName| {
        let chain = chains.iter().find(|chain: &&Chain| chain.disk == *disk);
        let image = chain.and_then(|chain| chain.images.first()).cloned();
        let image = image.filter(|image| image.path.is_absolute() && image.path.exists());
        image.ok_or_else(|| OverlayError::NoImage { disk: disk.clone() })
    };
    let mut disks = Vec::new();
    for disk in wanted {
        let base = base(&disk.target)?;
        let overlay = files::place(folder, &base.path, &id, &disk.target)?;
        files::check_lasts(&overlay, &base.path, &disk.target, stays)?;
        disks.push(DiskRecord::new(disk.target.clone(), base, disk.size, overlay));
    }
    let images: BTreeSet<_> = disks.iter().map(|disk| &disk.base.path).collect();
    if disks.is_empty() || images.len() < disks.len() {
        return Err(OverlayError::NoDisk { domain });
    }
    let (qemu, begun) = (layers.process(), Timestamp::now());
    Ok(Record { id, domain, uuid, reach, qemu, begun, purpose, held: None, disks })
}

/// Makes the overlays, with so many bytes of room each, and has QEMU open them.
///
/// # Errors
/// [`OverlayError`]; [`settle`] removes what was made.
pub async fn make(
    layers: &impl Layers,
    records: &Records,
    held: &mut Held,
    reserve: u64,
) -> Result<(), OverlayError> {
    let mut made = Vec::new();
    for disk in &held.record().disks {
        made.push(files::make(disk, layers.owner(&disk.base), reserve).await?);
    }
    records.update(held, |record| {
        for (disk, made) in record.disks.iter_mut().zip(made) {
            disk.made = made;
        }
    })?;
    Ok(layers.open(held).await?)
}

async fn take_effect(
    layers: &impl Layers,
    records: &Records,
    held: &mut Held,
    machine: &Machine,
    request: &Request,
    look: impl AsyncFnOnce(),
) -> Result<Vec<String>, OverlayError> {
    make(layers, records, held, request.reserve).await?;
    let wanted = Wanted {
        mode: request.quiesce,
        agent: request.agent.as_ref(),
        applications: &request.applications,
        about: About::of(held.record()),
    };
    let quiesced = quiesce::quiesce(wanted, &held.record().reach, machine, false).await?;
    let time = Timestamp::now();
    look().await;
    let put = layers.put(held).await;
    // Whatever comes of it, the guest goes on.
    let thawed = quiesced.thaw().await;
    put?;
    let consistency = thawed.as_ref().map_or(Consistency::Crash, |outcome| outcome.consistency);
    hold(records, held, HeldSince { time, consistency }, true)?;
    Ok(thawed?.warnings)
}

/// Records that the images hold still; `now` where nobody can have written to them since.
///
/// # Errors
/// [`OverlayError::Record`], [`OverlayError::File`].
pub fn hold(
    records: &Records,
    held: &mut Held,
    since: HeldSince,
    now: bool,
) -> Result<(), OverlayError> {
    let mut still = Vec::new();
    for disk in held.record().disks.iter().filter(|_| now) {
        still.push(files::mark(&disk.base.path)?);
    }
    records.update(held, |record| {
        record.held = Some(since);
        record.disks.iter_mut().for_each(|disk| disk.stage = Stage::Above);
        for (disk, still) in record.disks.iter_mut().zip(still) {
            disk.still = still;
        }
    })?;
    Ok(())
}
