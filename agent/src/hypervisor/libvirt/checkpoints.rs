//! The checkpoints of a running domain: asked for, told of again, and removed disk by disk.
//!
//! libvirt takes and deletes a checkpoint only as a whole, and refuses where one of its dirty bitmaps is
//! missing or broken. But it lets a checkpoint be defined again over other disks, by the same name.

use virt::domain::Domain;

use super::{LibvirtDomain, is_active, sys, xml};
use crate::hypervisor::{Bitmap, BitmapHealth, Claim, Disk, HypervisorError, Machine, Tracking};
use crate::names::DiskName;

/// A checkpoint: its name, and the dirty bitmap of each disk that it covers.
type Checkpoint = (String, Vec<(String, Bitmap)>);

impl LibvirtDomain {
    /// All checkpoints that libvirt knows. The health of their bitmaps is asked for by `health`; it
    /// means nothing otherwise.
    pub(super) async fn checkpoints(
        &self,
        health: bool,
    ) -> Result<Vec<Checkpoint>, HypervisorError> {
        let list = move |domain: &Domain| sys::checkpoints(domain, health);
        let texts = self.handle.ask("describe its checkpoints", list).await?;
        let read = |(name, text): (String, String)| {
            let document = xml::parse(&text).map_err(HypervisorError::Xml)?;
            let bitmaps = xml::read_checkpoint(&name, &document);
            Ok((name, bitmaps))
        };
        texts.into_iter().map(read).collect()
    }

    /// Removes a checkpoint and its dirty bitmaps from these disks, also where a bitmap is missing or
    /// broken, or libvirt knows nothing of it. On its other disks it stays.
    pub(super) async fn drop_checkpoint(
        &self,
        name: &str,
        targets: &[&str],
    ) -> Result<(), HypervisorError> {
        let checkpoints = self.checkpoints(false).await?;
        let known = checkpoints.iter().find(|(known, _)| known == name);
        let covered = known.iter().flat_map(|(_, bitmaps)| bitmaps).map(|(on, _)| on.as_str());
        let rest: Vec<&str> = covered.filter(|on| !targets.contains(on)).collect();
        let step = format!("remove the checkpoint `{name}`");
        let delete = |metadata_only: bool| {
            let name = name.to_owned();
            move |domain: &Domain| sys::checkpoint_delete(domain, &name, metadata_only)
        };
        if known.is_some() && rest.is_empty() {
            match self.handle.change(&step, delete(false)).await {
                Err(HypervisorError::Libvirt { source, .. }) => {
                    tracing::debug!(%source, "removing a checkpoint disk by disk");
                }
                deleted => return deleted.map(drop),
            }
        }
        if !self.state().await.is_ok_and(is_active) {
            // libvirt removes dirty bitmaps only from running domains: the next backup does it.
            let domain = self.look().await?.name.clone();
            return Err(HypervisorError::NotRunning { domain });
        }
        for target in targets {
            self.redefine(name, None, &[target], false).await?;
            match self.handle.change(&step, delete(false)).await {
                Err(HypervisorError::Libvirt { source, .. }) => {
                    tracing::debug!(disk = target, %source, "the disk has no such bitmap");
                }
                deleted => drop(deleted?),
            }
        }
        match rest.is_empty() {
            true => self.handle.change(&step, delete(true)).await.map(drop),
            false => self.redefine(name, None, &rest, false).await,
        }
    }

    /// Finds the bitmaps of a checkpoint again that libvirt has lost, in whole or for some disks.
    pub(super) async fn reclaim_one(
        &self,
        machine: &mut Machine,
        claim: &Claim,
    ) -> Result<(), HypervisorError> {
        let has = |disk: &Disk| disk.tracking.bitmaps().iter().any(|b| b.name == claim.bitmap);
        let claimed = machine.disks.iter().filter(|disk| claim.disks.contains(&disk.target));
        let lost: Vec<&Disk> = claimed.filter(|disk| !has(disk)).collect();
        if lost.is_empty() {
            return Ok(());
        }
        // Also of disks that nobody has asked for.
        let known = self.checkpoints(false).await?;
        let known = known.iter().find(|(name, _)| *name == claim.bitmap);
        let known = known.iter().flat_map(|(_, bitmaps)| bitmaps).map(|(on, _)| on.as_str());
        let mut covered: Vec<&str> = known.collect();
        let mut found = Vec::new();
        for disk in &lost {
            let target = disk.target.as_str();
            match self.redefine(&claim.bitmap, Some(claim.time), &[target], true).await {
                Ok(()) => found.push(disk.target.clone()),
                Err(HypervisorError::Libvirt { source, .. }) if source.is_inconsistent() => {}
                Err(error) => return Err(error),
            }
        }
        if found.is_empty() {
            let lost: Vec<&str> = lost.iter().map(|disk| disk.target.as_str()).collect();
            return self.drop_checkpoint(&claim.bitmap, &lost).await;
        }
        tracing::info!(checkpoint = claim.bitmap, "libvirt is told of a checkpoint again");
        covered.extend(found.iter().map(DiskName::as_str));
        self.redefine(&claim.bitmap, Some(claim.time), &covered, false).await?;
        for disk in machine.disks.iter_mut().filter(|disk| found.contains(&disk.target)) {
            if let Tracking::Bitmaps(bitmaps) = &mut disk.tracking {
                let (name, health) = (claim.bitmap.clone(), BitmapHealth::Good);
                bitmaps.push(Bitmap { name, health });
            }
        }
        Ok(())
    }

    /// Tells libvirt of a checkpoint over these disks.
    async fn redefine(
        &self,
        name: &str,
        time: Option<jiff::Timestamp>,
        tracked: &[&str],
        validate: bool,
    ) -> Result<(), HypervisorError> {
        let time = time.unwrap_or_else(jiff::Timestamp::now);
        let others = self.look().await?.targets.iter().map(String::as_str);
        let others: Vec<&str> = others.filter(|target| !tracked.contains(target)).collect();
        let text = xml::write_checkpoint(name, Some(time), tracked, &others);
        let step = format!("define the checkpoint `{name}` again");
        let work = move |domain: &Domain| sys::checkpoint_redefine(domain, &text, validate);
        self.handle.change(&step, work).await
    }
}
