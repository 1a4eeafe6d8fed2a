//! Which blobs snapshots need.

use std::collections::HashSet;

use crate::{
    BlobId, BlobKind, Defect, FileId, Index, NodeKind, Reader, RepositoryError, Snapshots,
};

/// What the snapshots that were walked need, by one index: one bit for each blob that it knows.
pub(super) struct Walk<'a> {
    reader: &'a Reader,
    used: Vec<u64>,
    seen: Seen,
}

/// What need not be walked again.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) snapshots: HashSet<FileId>,
    trees: HashSet<BlobId>,
}

/// The ids of blobs that are in use, sorted.
pub(super) struct Used(Vec<BlobId>);

impl Used {
    pub(super) fn contains(&self, id: &BlobId) -> bool {
        self.0.binary_search(id).is_ok()
    }

    /// Those that are in either.
    pub(super) fn and(mut self, other: Self) -> Self {
        if !other.0.is_empty() {
            self.0.extend(other.0);
            self.0.sort_unstable();
            self.0.dedup();
        }
        self
    }
}

impl<'a> Walk<'a> {
    /// Goes by the index of `reader`, past what was seen before.
    pub(super) fn new(reader: &'a Reader, seen: Seen) -> Self {
        Self { reader, used: vec![0; reader.index().len().div_ceil(64)], seen }
    }

    /// Marks what the snapshots need that were not walked before. An error means that it is not known what
    /// is in use: a snapshot, a folder or the index cannot be read, or the index lacks something.
    pub(super) fn snapshots(
        &mut self,
        snapshots: &Snapshots,
        mut step: impl FnMut(u64) -> Result<(), RepositoryError>,
    ) -> Result<(), RepositoryError> {
        if let Some((_, error)) = snapshots.damaged.first() {
            return Err(error.clone().cannot_tell());
        }
        let new = snapshots.good.iter().filter(|(id, _)| self.seen.snapshots.insert(*id));
        let mut todo: Vec<BlobId> = new.map(|(_, file)| file.tree).collect();
        let mut done = 0;
        while let Some(id) = todo.pop() {
            if self.seen.trees.insert(id) {
                self.tree(&id, &mut todo).map_err(RepositoryError::cannot_tell)?;
                done += 1;
                step(done)?;
            }
        }
        Ok(())
    }

    fn tree(&mut self, id: &BlobId, todo: &mut Vec<BlobId>) -> Result<(), RepositoryError> {
        self.mark(BlobKind::Tree, id)?;
        for node in &self.reader.tree(id)?.nodes {
            node.content().iter().try_for_each(|id| self.mark(BlobKind::Data, id))?;
            match node.subtree {
                Some(subtree) => todo.push(subtree),
                None if node.kind == NodeKind::Dir => {
                    let source = Defect::OutOfRange { field: "subtree" };
                    return Err(RepositoryError::InvalidTree { id: *id, source });
                }
                None => {}
            }
        }
        Ok(())
    }

    fn mark(&mut self, kind: BlobKind, id: &BlobId) -> Result<(), RepositoryError> {
        let number = self.reader.index().number(kind, id);
        let number = number.ok_or(RepositoryError::MissingBlob { id: *id })?;
        self.used[number / 64] |= 1 << (number % 64);
        Ok(())
    }

    pub(super) fn finish(self) -> (Used, Seen) {
        let is_used = |number: usize| self.used[number / 64] >> (number % 64) & 1 == 1;
        let index: &Index = self.reader.index();
        let mut ids = Vec::with_capacity(self.used.iter().map(|w| w.count_ones() as usize).sum());
        index.for_each_blob(|number, copies| {
            ids.extend(copies.first().filter(|_| is_used(number)).map(|copy| copy.blob.id));
        });
        ids.dedup();
        (Used(ids), self.seen)
    }
}
