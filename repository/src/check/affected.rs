//! Which snapshots a problem makes impossible to restore.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{Affects, Finding, Problem, SnapshotRef};
use crate::{BlobId, BlobKind, FileId, Reader, SnapshotFile, Snapshots};

/// Folders nested deeper than this are not followed; nobody writes such trees.
const DEPTH_MAX: usize = 256;

/// The blobs that are lost, and by which findings.
pub(super) struct Needs<'a> {
    reader: &'a Reader,
    lost: HashMap<(BlobKind, BlobId), BTreeSet<usize>>,
    /// Findings that concern a folder and all beneath it.
    known: HashMap<BlobId, Arc<BTreeSet<usize>>>,
}

impl<'a> Needs<'a> {
    pub(super) fn new(reader: &'a Reader, findings: &[Finding]) -> Self {
        let mut bad_copies: HashMap<(BlobKind, BlobId), HashSet<FileId>> = HashMap::new();
        for finding in findings {
            if let (Affects::Copies(blobs), Some(file)) = (&finding.affects, finding.file) {
                for blob in blobs {
                    bad_copies.entry(*blob).or_default().insert(file.id);
                }
            }
        }
        let another_is_good = |blob: &(BlobKind, BlobId)| {
            let mut copies = reader.index().locations(blob.0, &blob.1);
            copies.any(|copy| !bad_copies.get(blob).is_some_and(|bad| bad.contains(&copy.pack)))
        };
        let mut lost: HashMap<_, BTreeSet<usize>> = HashMap::new();
        for (number, finding) in findings.iter().enumerate() {
            let blobs: Vec<_> = match &finding.affects {
                Affects::Needing(blobs) => blobs.clone(),
                Affects::Copies(blobs) => {
                    blobs.iter().filter(|blob| !another_is_good(blob)).copied().collect()
                }
                Affects::Nobody | Affects::Everybody | Affects::Snapshot(_) => continue,
            };
            for blob in blobs {
                lost.entry(blob).or_default().insert(number);
            }
        }
        Self { reader, lost, known: HashMap::new() }
    }

    /// Names the affected snapshots of each finding; equal findings are reported once.
    pub(super) fn attribute(mut self, findings: Vec<Finding>, all: &Snapshots) -> Vec<Problem> {
        let damaged = all.damaged.iter().map(|&(id, _)| SnapshotRef::unreadable(id));
        let mut affected: Vec<Vec<SnapshotRef>> = vec![Vec::new(); findings.len()];
        for (id, file) in &all.good {
            let concerned =
                if self.lost.is_empty() { Arc::default() } else { self.of(file.tree, 0) };
            for &number in concerned.iter() {
                affected[number].push(SnapshotRef::new(*id, file));
            }
        }
        let mut seen = HashSet::new();
        let mut problems = Vec::new();
        for (finding, mut affected) in findings.into_iter().zip(affected) {
            let Finding { file, blob, defect, affects } = finding;
            if blob.is_some() && !seen.insert((file, blob)) {
                continue;
            }
            match affects {
                Affects::Snapshot(id) => affected = vec![SnapshotRef::unreadable(id)],
                Affects::Everybody => {
                    affected =
                        all.good.iter().map(|(id, file)| SnapshotRef::new(*id, file)).collect();
                    affected.extend(damaged.clone());
                }
                Affects::Nobody | Affects::Needing(_) | Affects::Copies(_) => {}
            }
            problems.push(Problem { file, blob, defect, affected });
        }
        problems
    }

    fn of(&mut self, tree: BlobId, depth: usize) -> Arc<BTreeSet<usize>> {
        if let Some(known) = self.known.get(&tree) {
            return Arc::clone(known);
        }
        let mut concerned = self.lost.get(&(BlobKind::Tree, tree)).cloned().unwrap_or_default();
        // A folder that cannot be read has its own finding.
        if let (true, Ok(folder)) = (depth < DEPTH_MAX, self.reader.tree(&tree)) {
            for node in &folder.nodes {
                for id in node.content() {
                    concerned.extend(self.lost.get(&(BlobKind::Data, *id)).into_iter().flatten());
                }
                if let Some(subtree) = node.subtree {
                    concerned.extend(self.of(subtree, depth + 1).iter());
                }
            }
        }
        let concerned = Arc::new(concerned);
        self.known.insert(tree, Arc::clone(&concerned));
        concerned
    }
}

impl SnapshotRef {
    fn new(id: FileId, file: &SnapshotFile) -> Self {
        Self { id, time: Some(file.time), paths: file.paths.clone() }
    }

    fn unreadable(id: FileId) -> Self {
        Self { id, time: None, paths: Vec::new() }
    }
}
