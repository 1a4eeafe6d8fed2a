//! What a backup will do, decided from what is there: the backup it continues, and for each disk how
//! it is read and why.

use std::ops::RangeInclusive;
use std::sync::Arc;

use repository::{FileId, Index};

use crate::catalog::{Backup, Catalog, CatalogError};
use crate::hypervisor::{BitmapHealth, Claim, Disk, Machine, Tracking};
use crate::inherit::{Damage, Heir, Inheritance};
use crate::manifest::{DiskManifest, Kind};
use crate::method::Chosen;
use crate::names::{BitmapNames, DiskName, DomainName};

/// A disk that would need more chunks than fit memory and a snapshot's tree: 32 TiB.
pub const DISK_SIZE_MAX: u64 = 32 << 40;

/// Why no backup can be planned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Earlier backups could not be read.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// There is nothing to back up.
    #[error("domain `{domain}` has no disk to back up{}", reasons(.skipped))]
    NoDisk {
        /// The domain.
        domain: DomainName,
        /// What was left out, and why.
        skipped: Vec<(String, String)>,
    },
    /// A disk that was asked for is not there.
    #[error("domain `{domain}` has no disk `{disk}`")]
    UnknownDisk {
        /// The domain.
        domain: DomainName,
        /// What was asked for.
        disk: DiskName,
        /// What there is.
        known: Vec<String>,
    },
    /// A disk that was asked for cannot be backed up.
    #[error("disk `{disk}` of domain `{domain}` is left out: {reason}")]
    LeftOut {
        /// The domain.
        domain: DomainName,
        /// What was asked for.
        disk: DiskName,
        /// Why it is left out.
        reason: String,
        /// What there is besides.
        known: Vec<String>,
    },
    /// A disk is larger than a snapshot can describe.
    #[error("disk `{disk}` has {size} bytes, at most {} TiB can be backed up", DISK_SIZE_MAX >> 40)]
    TooLarge {
        /// The disk.
        disk: DiskName,
        /// Its size in bytes.
        size: u64,
    },
}

fn reasons(skipped: &[(String, String)]) -> String {
    let reasons: Vec<_> =
        skipped.iter().map(|(device, reason)| format!("{device}: {reason}")).collect();
    match reasons.is_empty() {
        true => String::new(),
        false => format!(" ({})", reasons.join("; ")),
    }
}

/// A backup about to be made: the machine, the earlier backup it continues, and what will be done.
#[derive(Debug)]
pub struct Plan {
    /// What the backup will be called.
    pub domain: DomainName,
    /// The machine.
    pub machine: Machine,
    /// How the point in time is taken.
    pub method: Chosen,
    /// The last of the backups that its disks continue.
    pub parent: Option<FileId>,
    /// For each disk, how it is read.
    pub disks: Vec<PlannedDisk>,
    /// What is taken over from earlier backups.
    pub inheritance: Inheritance,
    /// Dirty bitmaps of this repository that stay, for backups of the machine under other names.
    pub kept: Vec<String>,
    /// What the operator should know whatever comes of the backup.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Reads what would be taken over, as a backup does later: what cannot be, makes a rescan.
    pub fn check(&mut self) {
        let inherited = self.inheritance.read();
        for (planned, content) in self.disks.iter_mut().zip(inherited.disks) {
            if let Err(damage) = content {
                planned.decision.rescan_after(&self.domain, &planned.disk.target, damage);
            }
        }
    }

    /// Looks for dirty bitmaps by which backups of this machine under other names go on. They stay, as
    /// long as there is a backup that tells of them.
    ///
    /// # Errors
    /// [`PlanError::Catalog`] when the backups cannot be listed.
    pub fn keep_of_other_names(
        &mut self,
        catalog: &Catalog,
        names: &BitmapNames,
    ) -> Result<(), PlanError> {
        let of_disk = |planned: &PlannedDisk| {
            let mut bitmaps = stale_bitmaps(&planned.disk, names, &[]);
            bitmaps.retain(|name| planned.decision.bitmap_old.as_ref() != Some(name));
            bitmaps
        };
        let mut unknown: Vec<String> = self.disks.iter().flat_map(of_disk).collect();
        unknown.sort_unstable();
        unknown.dedup();
        self.kept = catalog.claimed_by_other_names(&self.domain, &self.machine.uuid, unknown)?;
        Ok(())
    }
}

/// A disk about to be backed up.
#[derive(Debug)]
pub struct PlannedDisk {
    /// The disk.
    pub disk: Disk,
    /// How it is read.
    pub decision: Decision,
}

/// Lengths of a chunk in bytes that a manifest may name.
const CHUNK_SIZES: RangeInclusive<u32> = 4096..=8 << 20;

/// How a disk will be read whose checkpoint libvirt does not know any more.
const LOST: &str = "dirty bitmap, if QEMU still has it: libvirt has lost its checkpoint, which a \
                    backup looks for; else a rescan";

/// How one disk will be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What is read.
    pub kind: Kind,
    /// Why, in words for the user.
    pub reason: String,
    /// Length of a chunk in bytes.
    pub chunk_size: u32,
    /// The dirty bitmap to read by.
    pub bitmap_old: Option<String>,
    /// Whether a new bitmap can begin.
    pub tracked: bool,
    /// Size in bytes of the disk in the parent.
    pub parent_size: Option<u64>,
}

impl Decision {
    /// Reads a disk whole, for what it continues is damaged.
    pub fn rescan_after(&mut self, domain: &DomainName, disk: &DiskName, damage: Damage) {
        self.kind = Kind::Rescan;
        self.reason = damage.what;
        tracing::error!(parent = %damage.backup, "{domain}/{disk}: {}: rescan", self.reason);
    }
}

/// The dirty bitmaps that the machine's disks should have, by the last backup of each.
pub fn claims<'a>(
    machine: &Machine,
    newest_first: &(impl Iterator<Item = &'a Backup> + Clone),
) -> Vec<Claim> {
    let mut claims: Vec<Claim> = Vec::new();
    for disk in &machine.disks {
        let last = newest_first.clone().find_map(|backup| {
            let disk = backup.manifest.disks.iter().find(|known| known.target == disk.target)?;
            Some((backup.manifest.time, disk.bitmap.as_ref()))
        });
        let Some((time, Some(bitmap))) = last else { continue };
        match claims.iter_mut().find(|claim| &claim.bitmap == bitmap) {
            Some(claim) => claim.disks.push(disk.target.clone()),
            None => {
                let (bitmap, disks) = (bitmap.clone(), vec![disk.target.clone()]);
                claims.push(Claim { bitmap, time, disks });
            }
        }
    }
    claims
}

/// Makes sure that the machine has the disks that are asked for.
///
/// # Errors
/// [`PlanError::UnknownDisk`], [`PlanError::LeftOut`].
pub fn check_wanted(
    machine: &Machine,
    domain: &DomainName,
    wanted: &[DiskName],
) -> Result<(), PlanError> {
    for disk in wanted {
        if machine.disks.iter().any(|known| &known.target == disk) {
            continue;
        }
        let (domain, disk) = (domain.clone(), disk.clone());
        let there = machine.disks.iter().map(|known| known.target.to_string());
        // Nobody has looked at what was not asked for.
        let left =
            machine.skipped.iter().filter(|left| left.is_disk && left.device != disk.as_str());
        let mut known: Vec<String> = there.chain(left.map(|left| left.device.clone())).collect();
        known.sort_unstable();
        return Err(match machine.skipped.iter().find(|left| left.device == disk.as_str()) {
            Some(left) => PlanError::LeftOut { domain, disk, reason: left.reason.clone(), known },
            None => PlanError::UnknownDisk { domain, disk, known },
        });
    }
    Ok(())
}

/// Decides what a backup of a machine would do, given the earlier ones, newest first. Changes nothing.
///
/// # Errors
/// [`PlanError`] for disks that cannot be backed up and parents that cannot be read.
pub fn plan<'a>(
    machine: Machine,
    method: Chosen,
    domain: DomainName,
    newest_first: &(impl Iterator<Item = &'a Backup> + Clone),
    catalog: &Catalog,
    index: &Arc<Index>,
    full: bool,
) -> Result<Plan, PlanError> {
    if machine.disks.is_empty() {
        let skipped = machine.skipped.into_iter().map(|s| (s.device, s.reason)).collect();
        return Err(PlanError::NoDisk { domain, skipped });
    }
    if let Some(disk) = machine.disks.iter().find(|disk| disk.size > DISK_SIZE_MAX) {
        return Err(PlanError::TooLarge { disk: disk.target.clone(), size: disk.size });
    }
    let mut parent: Option<&Backup> = None;
    let (mut disks, mut heirs) = (Vec::new(), Vec::new());
    for disk in &machine.disks {
        let earlier = find_parent(disk, newest_first);
        parent =
            earlier.map(|(backup, _)| backup).into_iter().chain(parent).max_by_key(|b| b.file.time);
        let decision = decide(disk, earlier.map(|(_, earlier)| earlier), full);
        let continues = earlier.filter(|_| decision.kind == Kind::Incremental);
        let continues = continues.map(|(backup, _)| backup.clone());
        heirs.push(Heir { target: disk.target.clone(), continues });
        disks.push(PlannedDisk { disk: disk.clone(), decision });
    }
    let inheritance = Inheritance::new(catalog, index, parent.cloned(), heirs);
    let parent = parent.map(|parent| parent.id);
    let (kept, warnings) = (Vec::new(), Vec::new());
    Ok(Plan { domain, machine, method, parent, disks, inheritance, kept, warnings })
}

/// The backup that a disk continues, and what it says of the disk: the last one whose dirty bitmap the
/// disk still has, for a clock can jump but a random name cannot; else the last one with the disk.
///
/// Each disk has its own: a backup of some disks does not end the history of the others.
fn find_parent<'a>(
    disk: &Disk,
    newest_first: &(impl Iterator<Item = &'a Backup> + Clone),
) -> Option<(&'a Backup, &'a DiskManifest)> {
    let mut of_disk = newest_first.clone().filter_map(|backup| {
        let earlier = backup.manifest.disks.iter().find(|d| d.target == disk.target)?;
        Some((backup, earlier))
    });
    let continues =
        |earlier: &DiskManifest| decide(disk, Some(earlier), false).kind == Kind::Incremental;
    match &disk.tracking {
        Tracking::Unsupported(_) => of_disk.next(),
        _ => of_disk.clone().find(|(_, earlier)| continues(earlier)).or_else(|| of_disk.next()),
    }
}

/// Decides how a disk is read, given what the parent says of it.
pub fn decide(disk: &Disk, parent: Option<&DiskManifest>, full: bool) -> Decision {
    let mut decision = Decision {
        kind: Kind::Full,
        reason: String::new(),
        chunk_size: parent
            .map(|parent| parent.chunk_size)
            .filter(|size| CHUNK_SIZES.contains(size))
            .unwrap_or_else(|| chunk_size(disk.size)),
        bitmap_old: None,
        tracked: matches!(disk.tracking, Tracking::Bitmaps(_)),
        parent_size: parent.map(|parent| parent.size),
    };
    let Some(parent) = parent else {
        decision.reason = "no earlier backup of this disk".into();
        return decision;
    };
    decision.kind = Kind::Rescan;
    if full {
        decision.reason = "asked for with --full".into();
        return decision;
    }
    let bitmaps = match &disk.tracking {
        Tracking::Bitmaps(bitmaps) => bitmaps,
        Tracking::Overlay(overlay) => {
            (decision.kind, decision.reason) = decide_by_overlay(disk, overlay.as_deref(), parent);
            return decision;
        }
        Tracking::Unsupported(reason) => {
            decision.reason.clone_from(reason);
            return decision;
        }
    };
    let Some(wanted) = &parent.bitmap else {
        decision.reason = "the last backup began no dirty bitmap".into();
        return decision;
    };
    decision.reason = match bitmaps.iter().find(|bitmap| &bitmap.name == wanted) {
        None => "the dirty bitmap of the last backup is gone".into(),
        Some(bitmap) => match bitmap.health {
            BitmapHealth::Inconsistent => {
                "the dirty bitmap is inconsistent: QEMU ended without closing the image".into()
            }
            BitmapHealth::Broken => {
                "the dirty bitmap is missing or inconsistent: QEMU ended without closing the image"
                    .into()
            }
            BitmapHealth::NotRecording => "the dirty bitmap was switched off".into(),
            BitmapHealth::Partial => {
                "the image was put above another one since, and the dirty bitmap lies in both"
                    .into()
            }
            BitmapHealth::Transient => "the dirty bitmap is not the one of the last backup".into(),
            BitmapHealth::Good | BitmapHealth::Lost if disk.size < parent.size => {
                "the disk was shrunk".into()
            }
            BitmapHealth::Good | BitmapHealth::Lost if decision.chunk_size != parent.chunk_size => {
                "the last backup has chunks of another size".into()
            }
            health @ (BitmapHealth::Good | BitmapHealth::Lost) => {
                decision.kind = Kind::Incremental;
                decision.bitmap_old = Some(wanted.clone());
                match (health, disk.size > parent.size) {
                    (BitmapHealth::Lost, _) => LOST.into(),
                    (_, true) => "dirty bitmap; the grown part counts as changed".into(),
                    (_, false) => "dirty bitmap".into(),
                }
            }
        },
    };
    decision
}

/// Decides how a disk is read whose changes an overlay tracks: it holds what changed since the very backup
/// at which it began.
fn decide_by_overlay(disk: &Disk, overlay: Option<&str>, parent: &DiskManifest) -> (Kind, String) {
    let rescan = |reason: &str| (Kind::Rescan, reason.to_owned());
    match overlay {
        None => rescan("no overlay has tracked what changed since the last backup"),
        Some(_) if parent.overlay.as_deref() != overlay => {
            rescan("the overlay did not begin with the last backup")
        }
        Some(_) if disk.size < parent.size => rescan("the disk was shrunk"),
        Some(_) if !CHUNK_SIZES.contains(&parent.chunk_size) => {
            rescan("the last backup has chunks of another size")
        }
        Some(_) => (Kind::Incremental, "the overlay since the last backup".to_owned()),
    }
}

/// Dirty bitmaps of this repository on a disk that no backup needs any more.
pub fn stale_bitmaps(disk: &Disk, names: &BitmapNames, kept: &[String]) -> Vec<String> {
    let bitmaps = disk.tracking.bitmaps().iter().map(|bitmap| &bitmap.name);
    bitmaps.filter(|name| names.owns(name) && !kept.contains(name)).cloned().collect()
}

/// Length of a chunk for a disk of `size` bytes: small enough that scattered writes stay cheap, large
/// enough that the list of chunks stays small.
pub fn chunk_size(size: u64) -> u32 {
    const GIB: u64 = 1 << 30;
    const KIB: u32 = 1 << 10;
    match size {
        _ if size <= 16 * GIB => 64 * KIB,
        _ if size <= 64 * GIB => 128 * KIB,
        _ if size <= 128 * GIB => 256 * KIB,
        _ if size <= 256 * GIB => 512 * KIB,
        _ if size <= 1024 * GIB => 1024 * KIB,
        _ if size <= 2048 * GIB => 2048 * KIB,
        _ => 4096 * KIB,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Bitmap;
    use crate::names::RunId;

    fn disk(size: u64, tracking: Tracking) -> Disk {
        Disk {
            target: "vda".parse().unwrap(),
            device: "/machine/peripheral/vda".into(),
            root: "root".into(),
            format: "fmt".into(),
            driver: "qcow2".into(),
            size,
            image: None,
            tracking,
        }
    }

    fn bitmaps(name: &str, health: BitmapHealth) -> Tracking {
        Tracking::Bitmaps(vec![Bitmap { name: name.into(), health }])
    }

    fn parent(size: u64) -> DiskManifest {
        DiskManifest {
            target: "vda".parse().unwrap(),
            size,
            chunk_size: 65536,
            format: "qcow2".into(),
            image: None,
            kind: Kind::Full,
            reason: String::new(),
            method: None,
            bitmap: Some("c1".into()),
            overlay: Some("o1".into()),
            bytes_changed: 0,
            bytes_read: 0,
            bytes_zero: 0,
            bytes_audited: 0,
            bytes_stored: 0,
        }
    }

    #[test]
    fn r22_only_the_very_bitmap_of_the_parent_makes_a_backup_incremental() {
        use BitmapHealth::*;
        let kind = |tracking| decide(&disk(100, tracking), Some(&parent(100)), false).kind;
        assert_eq!(kind(bitmaps("c1", Good)), Kind::Incremental);
        assert_eq!(kind(bitmaps("c0", Good)), Kind::Rescan);
        assert_eq!(kind(bitmaps("c1", Inconsistent)), Kind::Rescan);
        assert_eq!(kind(bitmaps("c1", NotRecording)), Kind::Rescan);
        assert_eq!(kind(bitmaps("c1", Partial)), Kind::Rescan);
        assert_eq!(kind(bitmaps("c1", Transient)), Kind::Rescan);
        assert_eq!(kind(bitmaps("c1", Lost)), Kind::Incremental, "it is what a backup hopes for");
        assert_eq!(kind(Tracking::Bitmaps(Vec::new())), Kind::Rescan);
        assert_eq!(kind(Tracking::Unsupported("raw".into())), Kind::Rescan);
    }

    #[test]
    fn r22_only_the_very_overlay_that_began_with_the_parent_makes_a_backup_incremental() {
        let kind = |overlay: Option<&str>, size| {
            let tracking = Tracking::Overlay(overlay.map(str::to_owned));
            decide(&disk(size, tracking), Some(&parent(100)), false).kind
        };
        assert_eq!(kind(Some("o1"), 100), Kind::Incremental);
        assert_eq!(kind(Some("o1"), 200), Kind::Incremental);
        assert_eq!(kind(Some("o1"), 50), Kind::Rescan);
        assert_eq!(kind(Some("o0"), 100), Kind::Rescan);
        assert_eq!(kind(None, 100), Kind::Rescan);
    }

    #[test]
    fn r06_a_grown_disk_stays_incremental_and_a_shrunk_one_is_read_whole() {
        let tracking = || bitmaps("c1", BitmapHealth::Good);
        let grown = decide(&disk(200, tracking()), Some(&parent(100)), false);
        assert_eq!((grown.kind, grown.parent_size), (Kind::Incremental, Some(100)));
        let shrunk = decide(&disk(50, tracking()), Some(&parent(100)), false);
        assert_eq!(shrunk.kind, Kind::Rescan);
        assert_eq!(shrunk.bitmap_old, None);
    }

    #[test]
    fn r07_a_disk_without_a_parent_is_full_and_keeps_no_other_from_being_incremental() {
        let new = decide(&disk(1, Tracking::Bitmaps(Vec::new())), None, false);
        assert_eq!((new.kind, new.tracked), (Kind::Full, true));
    }

    #[test]
    fn the_chunk_size_of_the_first_backup_stays() {
        let grown =
            decide(&disk(1 << 50, bitmaps("c1", BitmapHealth::Good)), Some(&parent(9)), false);
        assert_eq!(grown.chunk_size, 65536);
        for (size, expected) in [
            (1, 64),
            (16 << 30, 64),
            ((16 << 30) + 1, 128),
            (64 << 30, 128),
            ((64 << 30) + 1, 256),
            (8 << 40, 4096),
        ] {
            assert_eq!(chunk_size(size), expected << 10, "{size}");
        }
    }

    #[test]
    fn bitmaps_of_others_are_never_stale() {
        let names = BitmapNames::of_repository("0123456789");
        let (old, new) = (names.begun_by(&RunId::random()), names.begun_by(&RunId::random()));
        let foreign = BitmapNames::of_repository("9876543210").begun_by(&RunId::random());
        let all = [&old, &new, &foreign, "other"];
        let bitmap = |name: &&str| Bitmap { name: (*name).into(), health: BitmapHealth::Good };
        let all: Vec<&str> = all.iter().map(AsRef::as_ref).collect();
        let disk = disk(1, Tracking::Bitmaps(all.iter().map(bitmap).collect()));
        assert_eq!(stale_bitmaps(&disk, &names, &[]), [old.clone(), new.clone()]);
        assert_eq!(stale_bitmaps(&disk, &names, &[old]), [new]);
    }
}
