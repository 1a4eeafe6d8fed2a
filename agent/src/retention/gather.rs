//! What the planner has to know of each snapshot, read from the repository.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use repository::{FileId, SnapshotFile};

use super::{Candidate, Machine};
use crate::catalog::{Catalog, CatalogError, domain_of, is_ours, is_partial, uuid_of};
use crate::manifest::Manifest;

/// Tag of a snapshot that no rule drops.
pub const PROTECTED: &str = "protected";
/// So many backups of a machine are looked through for the last one that began to track a disk. One that is
/// dropped all the same costs the next backup a rescan, no more.
const LOOKED_THROUGH_MAX: usize = 16;

/// The snapshots of a repository that rules may drop.
#[derive(Debug, Default)]
pub struct Gathered {
    /// In the order of their chains, oldest first.
    pub candidates: Vec<Candidate>,
    /// Those that cannot be read. They stay.
    pub broken: Vec<CatalogError>,
}

/// What a replica has, by which it is known what it lacks.
#[derive(Debug, Clone, Default)]
pub struct NotCopied {
    /// What the replica is called.
    pub name: String,
    known: HashSet<FileId>,
}

impl NotCopied {
    /// A replica with these snapshots.
    pub fn to(name: &str, replica: &[(FileId, SnapshotFile)]) -> Self {
        let known = replica.iter().map(|(id, file)| file.first_id(id)).collect();
        Self { name: name.to_owned(), known }
    }
}

/// Collects what is to be known of the snapshots that `wanted` accepts, and of what replicas lack.
///
/// # Errors
/// [`CatalogError::Repository`] when the snapshots cannot be listed.
pub fn gather(
    catalog: &Catalog,
    wanted: impl Fn(&SnapshotFile) -> bool,
    replicas: &[NotCopied],
) -> Result<Gathered, CatalogError> {
    let listed = catalog.snapshots()?;
    let mut gathered = Gathered::default();
    gathered.broken.extend(listed.damaged.into_iter().map(|(_, error)| error.into()));
    let mut groups: BTreeMap<Machine, Vec<usize>> = BTreeMap::new();
    let ours = listed.good.iter().filter(|(_, file)| is_ours(file) && wanted(file));
    let ours: Vec<&(FileId, SnapshotFile)> = ours.collect();
    for (id, file) in &ours {
        match machine(catalog, id, file) {
            Ok(machine) => {
                groups.entry(machine.clone()).or_default().push(gathered.candidates.len());
                gathered.candidates.push(Candidate {
                    id: *id,
                    machine,
                    time: file.time,
                    tags: file.tags.clone(),
                    is_whole: false,
                    is_partial: is_partial(file),
                    is_unreadable: false,
                    is_anchor: false,
                    not_copied_to: Vec::new(),
                    last_in: Vec::new(),
                });
            }
            Err(error) => gathered.broken.push(error),
        }
    }
    let files: BTreeMap<FileId, &SnapshotFile> =
        ours.iter().map(|(id, file)| (*id, file)).collect();
    for places in groups.values() {
        look_through(catalog, &files, places, &mut gathered);
        for replica in replicas {
            compare(&files, places, &mut gathered.candidates, replica);
        }
    }
    Ok(gathered)
}

/// Whose a snapshot is: by its tags, or where somebody changed these by its manifest.
fn machine(catalog: &Catalog, id: &FileId, file: &SnapshotFile) -> Result<Machine, CatalogError> {
    if let (Some(domain), Some(uuid)) = (domain_of(file), uuid_of(file)) {
        return Ok(Machine { domain: domain.to_owned(), uuid: uuid.to_owned() });
    }
    let manifest = catalog.manifest(*id, file)?;
    Ok(Machine { domain: manifest.domain.to_string(), uuid: manifest.uuid })
}

/// Finds the last whole backup of a machine, and those that the next one may continue: each disk has a chain
/// of its own. Reads no more manifests than that takes, mostly one.
fn look_through(
    catalog: &Catalog,
    files: &BTreeMap<FileId, &SnapshotFile>,
    places: &[usize],
    gathered: &mut Gathered,
) {
    // The disks of the newest backup that no backup was found to have yet, and to have begun to track.
    let (mut lacking, mut untracked) = (None::<BTreeSet<String>>, BTreeSet::new());
    let mut is_found = false;
    for (looked_at, &place) in places.iter().rev().enumerate() {
        let is_done = lacking.as_ref().is_some_and(BTreeSet::is_empty) && untracked.is_empty();
        if is_found && (is_done || looked_at >= LOOKED_THROUGH_MAX) {
            break;
        }
        let candidate = &mut gathered.candidates[place];
        let manifest = match catalog.manifest(candidate.id, files[&candidate.id]) {
            Ok(manifest) => manifest,
            Err(error) => {
                candidate.is_unreadable = true;
                gathered.broken.push(error);
                continue;
            }
        };
        candidate.is_whole = manifest.is_whole();
        is_found |= candidate.is_whole;
        let lacking = lacking.get_or_insert_with(|| {
            untracked = targets(&manifest);
            untracked.clone()
        });
        for disk in &manifest.disks {
            let is_last = lacking.remove(disk.target.as_str());
            let is_tracked = disk.bitmap.is_some() || disk.overlay.is_some();
            let began = is_tracked && untracked.remove(disk.target.as_str());
            candidate.is_anchor |= is_last || began;
        }
    }
}

/// The disks that a machine had, also those that could not be backed up.
fn targets(manifest: &Manifest) -> BTreeSet<String> {
    let there = manifest.disks.iter().map(|disk| disk.target.to_string());
    there.chain(manifest.missing_disks().into_iter().map(str::to_owned)).collect()
}

/// What is newer than the newest that a replica has too must be copied yet. What is older was copied and
/// dropped there by the replica's own rules.
fn compare(
    files: &BTreeMap<FileId, &SnapshotFile>,
    places: &[usize],
    candidates: &mut [Candidate],
    replica: &NotCopied,
) {
    for &place in places.iter().rev() {
        let candidate = &mut candidates[place];
        if replica.known.contains(&files[&candidate.id].first_id(&candidate.id)) {
            candidate.last_in.push(replica.name.clone());
            return;
        }
        candidate.not_copied_to.push(replica.name.clone());
    }
}
