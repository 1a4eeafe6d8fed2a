//! All folders load, and the index knows every blob they refer to.

use std::collections::HashSet;

use super::{Affects, CheckProgress, Finding, defect_of, file_of};
use crate::{
    BlobId, BlobKind, Defect, FileKind, FileRef, NodeKind, Reader, Repository, RepositoryError,
};

/// What reading all folders brought to light.
#[derive(Default)]
pub(super) struct Trees {
    pub(super) findings: Vec<Finding>,
    /// Blobs that snapshots need and the index does not know.
    pub(super) missing: HashSet<(BlobKind, BlobId)>,
}

impl Repository {
    /// Reads each folder once, however many snapshots share it.
    pub(super) fn check_trees(
        &self,
        reader: &Reader,
        roots: &[BlobId],
        progress: &(dyn Fn(CheckProgress) + Sync),
    ) -> Result<Trees, RepositoryError> {
        let mut trees = Trees::default();
        let mut seen: HashSet<BlobId> = roots.iter().copied().collect();
        let mut todo: Vec<BlobId> = seen.iter().copied().collect();
        let mut done = 0;
        while let Some(id) = todo.pop() {
            match reader.tree(&id) {
                Ok(tree) => {
                    for node in &tree.nodes {
                        trees.check_node(reader, &id, node);
                        todo.extend(node.subtree.filter(|subtree| seen.insert(*subtree)));
                    }
                }
                Err(error) => trees.unreadable(reader, id, error)?,
            }
            done += 1;
            progress(CheckProgress::Trees { done });
        }
        Ok(trees)
    }
}

impl Trees {
    fn unreadable(
        &mut self,
        reader: &Reader,
        id: BlobId,
        error: RepositoryError,
    ) -> Result<(), RepositoryError> {
        let blob = (BlobKind::Tree, id);
        let (file, affects) = match &error {
            RepositoryError::DamagedBlob { pack, .. } => {
                let file = FileRef { kind: FileKind::Pack, id: *pack };
                (Some(file), Affects::Copies(vec![blob]))
            }
            _ => (file_of(reader.index(), BlobKind::Tree, &id), Affects::Needing(vec![blob])),
        };
        if matches!(error, RepositoryError::MissingBlob { .. }) {
            self.missing.insert(blob);
        }
        let defect = defect_of(error)?;
        self.findings.push(Finding { file, blob: Some(id), defect, affects });
        Ok(())
    }

    fn check_node(&mut self, reader: &Reader, tree: &BlobId, node: &crate::Node) {
        let mut found = |blob, defect| {
            let file = file_of(reader.index(), BlobKind::Tree, tree);
            let affects = Affects::Needing(vec![(BlobKind::Tree, *tree)]);
            self.findings.push(Finding { file, blob, defect, affects });
        };
        if node.kind == NodeKind::Dir && node.subtree.is_none() {
            found(Some(*tree), Defect::OutOfRange { field: "subtree" });
        }
        if node.kind != NodeKind::File {
            return;
        }
        let (mut len, mut missing) = (0, None);
        for id in node.content() {
            match reader.index().data_len(id) {
                Some(chunk_len) => len += u64::from(chunk_len),
                None => {
                    missing = Some(*id);
                    self.missing.insert((BlobKind::Data, *id));
                }
            }
        }
        if let Some(id) = missing {
            // One problem for each folder, not for each of a million chunks.
            let affects = Affects::Needing(vec![(BlobKind::Tree, *tree)]);
            let (file, defect) = (None, Defect::Missing);
            self.findings.push(Finding { file, blob: Some(id), defect, affects });
        } else if len != node.size {
            found(Some(*tree), Defect::Length { expected: node.size, actual: len });
        }
    }
}
