//! The backups in a repository: found, read and named.

use std::cell::OnceCell;
use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use repository::{
    BlobId, FileId, Index, Node, Reader, Repository, RepositoryError, SnapshotFile, Snapshots, Tree,
};

use crate::manifest::Manifest;
use crate::names::{BitmapNames, DiskName, DomainName};

/// Tag of every snapshot that kvmsnap writes.
pub const TAG: &str = "kvmsnap";
/// Prefix of the tag that names the machine.
const TAG_UUID: &str = "uuid=";
/// Prefix of the tag that names the manifest's blob, so that a list need not read disks' trees.
const TAG_MANIFEST: &str = "manifest=";
/// Of a snapshot that lacks disks.
const TAG_PARTIAL: &str = "partial";
/// End of the manifest's name in a snapshot.
const MANIFEST_SUFFIX: &str = ".manifest.json";
/// Memory for manifests and trees; disks have their own readers.
const CACHE_LEN: usize = 8 << 20;

/// Why backups could not be found or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// A manifest does not parse.
    #[error("the manifest of snapshot {} cannot be read", short(.snapshot))]
    Manifest {
        /// The snapshot.
        snapshot: FileId,
        /// Why.
        source: serde_json::Error,
    },
    /// A manifest written by a newer program.
    #[error("snapshot {} was written by a newer kvmsnap (manifest version {version})", short(.snapshot))]
    Newer {
        /// The snapshot.
        snapshot: FileId,
        /// Its version.
        version: u32,
    },
    /// A snapshot that another program made.
    #[error("snapshot {} was not made by kvmsnap", short(.snapshot))]
    Foreign {
        /// The snapshot.
        snapshot: FileId,
    },
    /// A part of a snapshot's tree is not there.
    #[error("snapshot {} has no `{path}`", short(.snapshot))]
    Incomplete {
        /// The snapshot.
        snapshot: FileId,
        /// What is missing.
        path: String,
    },
    /// Nothing is called so.
    #[error("no snapshot matches `{wanted}`")]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// Not a snapshot's name.
    #[error("`{wanted}` is not a date and time")]
    Time {
        /// What was asked for.
        wanted: String,
        /// Why.
        source: jiff::Error,
    },
}

/// The first eight digits of an id, as restic shows it.
pub fn short(id: &FileId) -> String {
    id.to_string().chars().take(8).collect()
}

/// A backup.
#[derive(Debug, Clone)]
pub struct Backup {
    /// The snapshot's id.
    pub id: FileId,
    /// Its file.
    pub file: SnapshotFile,
    /// Its record.
    pub manifest: Manifest,
}

/// The name of a snapshot on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotName {
    /// An id or a prefix of one.
    Prefix(String),
    /// The last one of a domain.
    Latest(String),
    /// The last one of a domain at or before a time.
    At(String, String),
}

impl std::str::FromStr for SnapshotName {
    type Err = std::convert::Infallible;
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if let Some(domain) = name.strip_prefix("latest:") {
            return Ok(Self::Latest(domain.to_owned()));
        }
        match name.rsplit_once('@') {
            Some((domain, time)) => Ok(Self::At(domain.to_owned(), time.to_owned())),
            None => Ok(Self::Prefix(name.to_owned())),
        }
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefix(prefix) => f.write_str(prefix),
            Self::Latest(domain) => write!(f, "latest:{domain}"),
            Self::At(domain, time) => write!(f, "{domain}@{time}"),
        }
    }
}

/// The backups of one machine. Each manifest is read when it is come to: of a thousand backups the next
/// one mostly needs the last.
#[derive(Debug)]
pub struct History {
    catalog: Catalog,
    uuid: String,
    /// Oldest first.
    snapshots: Vec<(FileId, SnapshotFile, OnceCell<Option<Backup>>)>,
}

impl History {
    /// Whether a snapshot is among them, by the name that it was given first or that it has now.
    pub fn has(&self, wanted: &FileId) -> bool {
        self.snapshots.iter().any(|(id, file, _)| id == wanted || file.first_id(id) == *wanted)
    }

    /// The backups, newest first. One that cannot be read is passed over.
    pub fn newest_first(&self) -> impl Iterator<Item = &Backup> + Clone {
        self.snapshots
            .iter()
            .rev()
            .filter_map(|(id, file, backup)| backup.get_or_init(|| self.read(*id, file)).as_ref())
    }

    fn read(&self, id: FileId, file: &SnapshotFile) -> Option<Backup> {
        match self.catalog.manifest(id, file) {
            Ok(mut manifest) if manifest.uuid == self.uuid => {
                self.leave_bitmaps_of_others(&mut manifest);
                Some(Backup { id, file: file.clone(), manifest })
            }
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(%error, "an earlier backup is passed over");
                None
            }
        }
    }
}

impl History {
    /// A snapshot that was copied from another repository tells of a dirty bitmap that belongs to the chain
    /// there: a backup into this one would take it away.
    fn leave_bitmaps_of_others(&self, manifest: &mut Manifest) {
        let names = BitmapNames::of_repository(self.catalog.repository.id());
        for disk in &mut manifest.disks {
            disk.bitmap = disk.bitmap.take().filter(|bitmap| names.owns(bitmap));
        }
    }
}

/// The backups of a repository, as far as its index knows them.
#[derive(Debug, Clone)]
pub struct Catalog {
    repository: Repository,
    reader: Arc<Reader>,
}

impl Catalog {
    /// Reads through an index.
    pub fn new(repository: &Repository, index: Arc<Index>) -> Self {
        let reader = Arc::new(Reader::new(repository, index, CACHE_LEN));
        Self { repository: repository.clone(), reader }
    }

    /// All snapshots, whoever made them.
    ///
    /// # Errors
    /// [`CatalogError::Repository`] when they cannot be listed.
    pub fn snapshots(&self) -> Result<Snapshots, CatalogError> {
        Ok(self.repository.snapshots()?)
    }

    /// All backups that `wanted` accepts by their snapshot file, oldest first, and what cannot be
    /// read: a damaged one does not hide the others.
    ///
    /// # Errors
    /// [`CatalogError::Repository`] when the snapshots cannot be listed.
    pub fn backups(
        &self,
        wanted: impl Fn(&SnapshotFile) -> bool,
    ) -> Result<(Vec<Backup>, Vec<CatalogError>), CatalogError> {
        let snapshots = self.repository.snapshots()?;
        let mut broken: Vec<CatalogError> =
            snapshots.damaged.into_iter().map(|(_, error)| error.into()).collect();
        let mut backups = Vec::new();
        for (id, file) in snapshots.good {
            if !is_ours(&file) || !wanted(&file) {
                continue;
            }
            match self.manifest(id, &file) {
                Ok(manifest) => backups.push(Backup { id, file, manifest }),
                Err(error) => broken.push(error),
            }
        }
        Ok((backups, broken))
    }

    /// The backups of a machine under a name.
    ///
    /// # Errors
    /// [`CatalogError::Repository`] when the snapshots cannot be listed.
    pub fn history(&self, domain: &DomainName, uuid: &str) -> Result<History, CatalogError> {
        let listed = self.repository.snapshots()?;
        for (_, error) in listed.damaged {
            tracing::warn!(%error, "an earlier backup is passed over");
        }
        // Tags may have been changed by another program; the manifest has the last word.
        let may_be = |file: &SnapshotFile| {
            is_of(file, domain.as_str())
                && is_ours(file)
                && uuid_of(file).is_none_or(|tag| tag == uuid)
        };
        let ours = listed.good.into_iter().filter(|(_, file)| may_be(file));
        let snapshots = ours.map(|(id, file)| (id, file, OnceCell::new())).collect();
        Ok(History { catalog: self.clone(), uuid: uuid.to_owned(), snapshots })
    }

    /// Of these dirty bitmaps those that backups of a machine under other names tell of.
    ///
    /// # Errors
    /// [`CatalogError::Repository`] when the snapshots cannot be listed.
    pub fn claimed_by_other_names(
        &self,
        domain: &DomainName,
        uuid: &str,
        mut bitmaps: Vec<String>,
    ) -> Result<Vec<String>, CatalogError> {
        let mut claimed = Vec::new();
        if bitmaps.is_empty() {
            return Ok(claimed);
        }
        let other = |file: &SnapshotFile| {
            !is_of(file, domain.as_str())
                && is_ours(file)
                && uuid_of(file).is_none_or(|tag| tag == uuid)
        };
        let snapshots = self.repository.snapshots()?.good;
        for (id, file) in snapshots.iter().rev().filter(|(_, file)| other(file)) {
            let manifest = match self.manifest(*id, file) {
                Ok(manifest) => manifest,
                // It may tell of any of them, once it can be read again.
                Err(error) => {
                    tracing::warn!(%error, "dirty bitmaps of a backup that cannot be read stay");
                    claimed.append(&mut bitmaps);
                    break;
                }
            };
            if manifest.uuid != uuid {
                continue;
            }
            let began: Vec<&String> =
                manifest.disks.iter().filter_map(|disk| disk.bitmap.as_ref()).collect();
            claimed.extend(bitmaps.extract_if(.., |name| began.contains(&&*name)));
            if bitmaps.is_empty() {
                break;
            }
        }
        Ok(claimed)
    }

    /// The backup of this name.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] and what reading it may cause.
    pub fn find(&self, name: &SnapshotName) -> Result<Backup, CatalogError> {
        let not_found = || CatalogError::NotFound { wanted: name.to_string() };
        match name {
            SnapshotName::Prefix(prefix) => {
                let (id, file) = self.repository.find_snapshot(prefix)?;
                if !is_ours(&file) {
                    return Err(CatalogError::Foreign { snapshot: id });
                }
                let manifest = self.manifest(id, &file)?;
                Ok(Backup { id, file, manifest })
            }
            SnapshotName::Latest(domain) => {
                let backups = self.readable(|file| is_of(file, domain))?;
                backups.into_iter().next_back().ok_or_else(not_found)
            }
            SnapshotName::At(domain, time) => {
                let until = parse_time(time)
                    .map_err(|source| CatalogError::Time { wanted: time.clone(), source })?;
                let backups = self.readable(|file| is_of(file, domain) && file.time <= until)?;
                backups.into_iter().next_back().ok_or_else(not_found)
            }
        }
    }

    /// The backups that can be read. What cannot be read may be what was asked for, so it is told.
    fn readable(
        &self,
        wanted: impl Fn(&SnapshotFile) -> bool,
    ) -> Result<Vec<Backup>, CatalogError> {
        let (backups, broken) = self.backups(wanted)?;
        for error in broken {
            tracing::error!(%error, "a snapshot that may be newer is passed over");
        }
        Ok(backups)
    }

    /// The folder of a backup's domain; [`take_content`] finds disks in it.
    ///
    /// # Errors
    /// [`CatalogError::Incomplete`] and what reading the trees may cause.
    pub fn folder(&self, backup: &Backup) -> Result<Tree, CatalogError> {
        let folder = backup.manifest.domain.as_str();
        let root = self.reader.tree(&backup.file.tree)?;
        let subtree = root.node(folder).and_then(|node| node.subtree);
        let incomplete =
            || CatalogError::Incomplete { snapshot: backup.id, path: folder.to_owned() };
        Ok(self.reader.tree(&subtree.ok_or_else(incomplete)?)?)
    }

    /// The content of a file that lies beside the disks.
    ///
    /// # Errors
    /// [`CatalogError::Repository`].
    pub fn content(&self, file: &Node) -> Result<Vec<u8>, CatalogError> {
        let mut content = Vec::new();
        for blob in file.content() {
            content.extend_from_slice(&self.reader.blob(blob)?);
        }
        Ok(content)
    }

    /// The record of the backup that a snapshot is.
    ///
    /// # Errors
    /// [`CatalogError`] when it is not there or cannot be read.
    pub fn manifest(&self, id: FileId, file: &SnapshotFile) -> Result<Manifest, CatalogError> {
        let tagged = file.tags.iter().find_map(|tag| tag.strip_prefix(TAG_MANIFEST));
        let blob = match tagged.and_then(|blob| blob.parse().ok()) {
            Some(blob) => blob,
            None => self.manifest_in_tree(id, file)?,
        };
        let text = self.reader.blob(&blob)?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|source| CatalogError::Manifest { snapshot: id, source })?;
        match manifest.version {
            version if version > Manifest::VERSION => {
                Err(CatalogError::Newer { snapshot: id, version })
            }
            _ => Ok(manifest),
        }
    }

    /// Where another program has changed the tags.
    fn manifest_in_tree(&self, id: FileId, file: &SnapshotFile) -> Result<BlobId, CatalogError> {
        let root = self.reader.tree(&file.tree)?;
        let named = |node: &&Node| node.name.ends_with(MANIFEST_SUFFIX) && node.subtree.is_none();
        match root.nodes.iter().find(named).map(Node::content) {
            Some([blob]) => Ok(*blob),
            _ => Err(CatalogError::Incomplete { snapshot: id, path: MANIFEST_SUFFIX.to_owned() }),
        }
    }
}

/// Whether kvmsnap made a snapshot.
pub fn is_ours(file: &SnapshotFile) -> bool {
    file.tags.iter().any(|tag| tag == TAG)
}

/// The domain of a snapshot, by its path.
pub fn domain_of(file: &SnapshotFile) -> Option<&str> {
    match file.paths.as_slice() {
        [path] => path.strip_prefix('/'),
        _ => None,
    }
}

/// The uuid of a snapshot's machine, by its tags.
pub fn uuid_of(file: &SnapshotFile) -> Option<&str> {
    file.tags.iter().find_map(|tag| tag.strip_prefix(TAG_UUID))
}

/// Whether a snapshot is one of a domain.
pub fn is_of(file: &SnapshotFile, domain: &str) -> bool {
    file.paths.iter().any(|path| path.strip_prefix('/') == Some(domain))
}

/// Whether a snapshot is known to lack disks that were to be backed up.
pub fn is_partial(file: &SnapshotFile) -> bool {
    file.tags.iter().any(|tag| tag == TAG_PARTIAL)
}

/// The tags of a snapshot.
pub fn tags(manifest: &Manifest, blob: &BlobId) -> Vec<String> {
    let partial = (!manifest.is_whole()).then(|| TAG_PARTIAL.to_owned());
    let tags = [
        TAG.to_owned(),
        format!("{TAG_UUID}{}", manifest.uuid),
        format!("kind={}", manifest.kind.as_str()),
        format!("{TAG_MANIFEST}{blob}"),
    ];
    tags.into_iter().chain(partial).collect()
}

/// The name of a domain's manifest in a snapshot, beside the domain's folder and never its name.
pub fn manifest_file(domain: &DomainName) -> String {
    format!("{domain}{MANIFEST_SUFFIX}")
}

/// Takes the chunks of a disk, and when they last changed, out of the folder of a backup.
pub fn take_content(folder: &mut Tree, disk: &DiskName) -> Option<(Vec<BlobId>, Timestamp)> {
    let name = disk_file(disk);
    let node = folder.nodes.iter_mut().find(|node| node.name == name)?;
    Some((node.content.take()?, node.mtime))
}

/// The name of a disk's content in a snapshot.
pub fn disk_file(disk: &DiskName) -> String {
    format!("{disk}.raw")
}

/// A time with an offset, or a local one; without a time of day, the whole day.
/// A time as a user gives it.
///
/// # Errors
/// Where it is none.
pub fn parse_time(text: &str) -> Result<Timestamp, jiff::Error> {
    if let Ok(timestamp) = text.parse::<Timestamp>() {
        return Ok(timestamp);
    }
    let local: DateTime = match text.parse::<jiff::civil::Date>() {
        Ok(date) if !text.contains(['T', ' ', ':']) => date.at(23, 59, 59, 999_999_999),
        _ => text.parse()?,
    };
    Ok(local.to_zoned(TimeZone::system())?.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_named_by_prefix_latest_or_time() {
        let name = |text: &str| text.parse::<SnapshotName>().unwrap();
        assert_eq!(name("1a2b"), SnapshotName::Prefix("1a2b".into()));
        assert_eq!(name("latest:web"), SnapshotName::Latest("web".into()));
        assert_eq!(
            name("me@web@2026-11-20T03:00"),
            SnapshotName::At("me@web".into(), "2026-11-20T03:00".into())
        );
    }

    #[test]
    fn a_time_without_offset_is_local_and_a_date_is_its_last_moment() {
        let zulu = parse_time("2026-11-20T03:00:00Z").unwrap();
        assert_eq!(zulu.to_string(), "2026-11-20T03:00:00Z");
        let day = parse_time("2026-11-20").unwrap().to_zoned(TimeZone::system());
        assert_eq!((day.hour(), day.minute()), (23, 59));
        assert!(parse_time("yesterday").is_err());
    }
}
