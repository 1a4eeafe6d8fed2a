//! What a backup takes over unread from those that it continues.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use repository::{BlobId, FileId, Index, Node, Tree};

use crate::catalog::{Backup, Catalog, disk_file, take_content};
use crate::names::DiskName;

/// Where a backup finds what it takes over. To read that takes its time for large disks, and needs nothing of
/// the guest.
#[derive(Debug, Clone)]
pub struct Inheritance {
    catalog: Catalog,
    index: Arc<Index>,
    /// The last backup that has any of the disks.
    parent: Option<Backup>,
    disks: Vec<Heir>,
}

/// A disk, and the backup that it continues, unless it is read whole.
#[derive(Debug, Clone)]
pub struct Heir {
    /// The disk.
    pub target: DiskName,
    /// The backup.
    pub continues: Option<Backup>,
}

/// What a backup takes over.
#[derive(Debug)]
pub struct Inherited {
    /// The content of each disk, or what is wrong with it; nothing for those that are read whole.
    pub disks: Vec<Result<Content, Damage>>,
    /// What else is in the parent's folder.
    pub files: Vec<Node>,
}

/// The content of a disk in the backup that it continues.
#[derive(Debug, Default)]
pub struct Content {
    /// Its chunks.
    pub chunks: Vec<BlobId>,
    /// When these last changed.
    pub changed: Option<Timestamp>,
}

/// A backup that cannot be continued.
#[derive(Debug)]
pub struct Damage {
    /// The backup.
    pub backup: FileId,
    /// What is wrong with it, in words for the user.
    pub what: String,
}

impl Inheritance {
    /// For these disks; `parent` is the last backup that has any of them.
    pub fn new(
        catalog: &Catalog,
        index: &Arc<Index>,
        parent: Option<Backup>,
        disks: Vec<Heir>,
    ) -> Self {
        Self { catalog: catalog.clone(), index: Arc::clone(index), parent, disks }
    }

    /// Reads it; blocks.
    pub fn read(&self) -> Inherited {
        let mut folders = HashMap::new();
        let disks = self.disks.iter().map(|heir| {
            let Some(backup) = &heir.continues else { return Ok(Content::default()) };
            let content = self.content(&heir.target, backup, &mut folders);
            content.map_err(|what| {
                let what = format!("the last backup is damaged: {what}");
                Damage { backup: backup.id, what }
            })
        });
        let disks = disks.collect();
        let folder = self.parent.as_ref().and_then(|parent| folders.remove(&parent.id)?.ok());
        let is_disk = |node: &Node| self.disks.iter().any(|h| disk_file(&h.target) == node.name);
        let files = folder.map_or_else(Vec::new, |folder| folder.nodes);
        Inherited { disks, files: files.into_iter().filter(|node| !is_disk(node)).collect() }
    }

    /// The content of a disk. What is inherited unread must be there to the last chunk.
    fn content(
        &self,
        target: &DiskName,
        backup: &Backup,
        folders: &mut HashMap<FileId, Result<Tree, String>>,
    ) -> Result<Content, String> {
        let read = || self.catalog.folder(backup).map_err(|error| error.to_string());
        let folder = folders.entry(backup.id).or_insert_with(read);
        let folder = folder.as_mut().map_err(|damage| damage.clone())?;
        let lacks = "it lacks the disk";
        let disk = backup.manifest.disks.iter().find(|disk| &disk.target == target);
        let disk = disk.ok_or(lacks)?;
        let (chunks, changed) = take_content(folder, target).ok_or(lacks)?;
        if chunks.len() as u64 != disk.size.div_ceil(u64::from(disk.chunk_size)) {
            return Err("its chunks do not add up to its size".to_owned());
        }
        match chunks.iter().filter(|id| !self.index.contains(id)).count() {
            0 => Ok(Content { chunks, changed: Some(changed) }),
            missing => Err(format!("the repository lacks {missing} of its chunks")),
        }
    }
}
