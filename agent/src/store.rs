//! From what was read to a snapshot: chunks into packs, then the index, then trees, then the snapshot.

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use repository::{
    AnnouncedLock, BlobId, FileId, Index, Lock, Node, Repository, RepositoryError, SnapshotFile,
    Tree, Writer, WriterOptions,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::catalog;
use crate::hypervisor::MachineFile;
use crate::manifest::Manifest;
use crate::read::Piece;
use crate::read::chunk_map::{ChunkMap, Fate};

/// Pieces that wait for the writer, of at most 1 MiB each.
const PIECES_MAX: usize = 8;

/// Length in bytes of the chunks of a machine's files.
const FILE_CHUNK_LEN: usize = 1 << 20;

/// A store that takes pieces.
#[derive(Debug)]
pub struct Store {
    sink: mpsc::Sender<Piece>,
    feeder: JoinHandle<Result<Writer, RepositoryError>>,
}

/// All pieces are in; the chunks that were stored are known.
#[derive(Debug)]
pub struct Stored {
    writer: Writer,
    chunks: Vec<repository::Stored>,
}

/// Durable packs and index, and the snapshot file to be written.
#[derive(Debug)]
#[must_use = "without its snapshot file a backup does not exist"]
pub struct Durable {
    file: SnapshotFile,
    /// What all that was written under.
    lock: Lock,
}

impl Store {
    /// Starts a writer; its lock settles while it works. `chunk_sizes` are the disks' chunk lengths in
    /// bytes, by index.
    ///
    /// # Errors
    /// When its threads cannot be started.
    pub fn start(
        repository: &Repository,
        index: Arc<Index>,
        chunk_sizes: Vec<u32>,
        lock: AnnouncedLock,
    ) -> Result<Self, RepositoryError> {
        let writer = Writer::under(lock, repository, index, WriterOptions::default())?;
        let (sink, mut pieces) = mpsc::channel::<Piece>(PIECES_MAX);
        let feeder = tokio::task::spawn_blocking(move || {
            while let Some(Piece { disk, chunk, data }) = pieces.blocking_recv() {
                writer.submit(disk, chunk, chunk_sizes[disk as usize] as usize, data)?;
            }
            Ok(writer)
        });
        Ok(Self { sink, feeder })
    }

    /// Where pieces go.
    pub fn sink(&self) -> &mpsc::Sender<Piece> {
        &self.sink
    }

    /// Waits until all pieces have their ids.
    ///
    /// # Errors
    /// Whatever stopped the writer.
    pub async fn drain(self) -> Result<Stored, RepositoryError> {
        drop(self.sink);
        let writer = self.feeder.await.map_err(|_| RepositoryError::WriterDied)??;
        blocking(move || {
            let chunks = writer.drain()?;
            Ok(Stored { writer, chunks })
        })
        .await
    }
}

impl Stored {
    /// Bytes that a disk's chunks added to the repository.
    pub fn bytes_stored(&self, disk: u32) -> u64 {
        let of_disk = self.chunks.iter().filter(|chunk| chunk.disk == disk);
        of_disk.map(|chunk| u64::from(chunk.stored_len)).sum()
    }

    /// The content of a disk: what was read, zeros, and the parent's chunks for the rest.
    ///
    /// # Errors
    /// Whatever stopped the writer, or [`RepositoryError::MissingBlob`] when the map inherits a chunk
    /// that the parent does not have.
    pub fn content(
        &self,
        disk: u32,
        map: &ChunkMap,
        parent: &[BlobId],
    ) -> Result<Vec<BlobId>, RepositoryError> {
        let missing = BlobId([0; 32]);
        let mut content = vec![missing; map.chunks() as usize];
        for stored in self.chunks.iter().filter(|stored| stored.disk == disk) {
            content[stored.chunk as usize] = stored.id;
        }
        for chunk in 0..map.chunks() {
            let slot = &mut content[chunk as usize];
            match map.fate(chunk) {
                Fate::Read => {}
                Fate::Zero => *slot = self.zero_id(map.len(&(chunk..chunk + 1)))?,
                Fate::Inherit => *slot = parent.get(chunk as usize).copied().unwrap_or(missing),
            }
        }
        match content.contains(&missing) {
            true => Err(RepositoryError::MissingBlob { id: missing }),
            false => Ok(content),
        }
    }

    fn zero_id(&self, len: u64) -> Result<BlobId, RepositoryError> {
        self.writer.zero_id(u32::try_from(len).expect("a chunk is at most a few MiB"))
    }

    /// Stores manifest and trees; packs and index are durable when this returns. `disks` holds the
    /// content of each disk of the manifest, in its order, and when it last changed; `files` go beside
    /// them, and are as old as those in `earlier` that they equal.
    ///
    /// The manifest lies beside the domain's folder: so the folder of a guest that did nothing is the
    /// parent's, and its long lists of chunks are not stored again.
    ///
    /// # Errors
    /// Whatever the repository says; then nothing refers to what was stored.
    pub async fn finish(
        self,
        manifest: Manifest,
        disks: Vec<(Vec<BlobId>, Timestamp)>,
        files: Vec<MachineFile>,
        earlier: Vec<Node>,
    ) -> Result<Durable, RepositoryError> {
        blocking(move || {
            let Self { writer, .. } = self;
            let time = manifest.time;
            let text = serde_json::to_vec_pretty(&manifest).expect("it has only string keys");
            let text_len = text.len() as u64;
            let blob = writer.save_blob(Bytes::from(text))?;
            let mut nodes = Vec::new();
            for (disk, (content, changed)) in manifest.disks.iter().zip(disks) {
                let name = catalog::disk_file(&disk.target);
                nodes.push(Node::file(&name, disk.size, content, changed));
            }
            for file in files {
                nodes.push(save_file(&writer, file, &earlier, time)?);
            }
            let folder = writer.save_tree(&Tree::new(nodes))?;
            let domain = manifest.domain.as_str();
            let root = writer.save_tree(&Tree::new(vec![
                Node::dir(domain, folder, time),
                Node::file(&catalog::manifest_file(&manifest.domain), text_len, vec![blob], time),
            ]))?;
            let lock = writer.finish()?.lock.expect("it was given one");
            let mut file = SnapshotFile::new(root, time);
            file.paths = vec![format!("/{domain}")];
            file.hostname.clone_from(&manifest.host);
            file.tags = catalog::tags(&manifest, &blob);
            file.parent = manifest.parent.as_ref().and_then(|id| id.parse().ok());
            file.program_version = Some(manifest.program.clone());
            Ok(Durable { file, lock })
        })
        .await
    }
}

/// Stores a file of the machine.
fn save_file(
    writer: &Writer,
    file: MachineFile,
    earlier: &[Node],
    now: Timestamp,
) -> Result<Node, RepositoryError> {
    let (name, bytes) = (file.name, Bytes::from(file.content));
    let (size, mut content) = (bytes.len() as u64, Vec::new());
    for start in (0..bytes.len()).step_by(FILE_CHUNK_LEN) {
        let end = (start + FILE_CHUNK_LEN).min(bytes.len());
        content.push(writer.save_blob(bytes.slice(start..end))?);
    }
    let same = |node: &&Node| node.name == name && node.content() == content;
    let changed = earlier.iter().find(same).map_or(now, |node| node.mtime);
    Ok(Node::file(&name, size, content, changed))
}

impl Durable {
    /// Fails when others may have taken away what nothing refers to yet.
    ///
    /// # Errors
    /// [`RepositoryError::LockLost`].
    pub fn verify(&self) -> Result<(), RepositoryError> {
        self.lock.verify()
    }

    /// Writes the snapshot file: from here on the backup exists. Then the lock goes.
    ///
    /// # Errors
    /// Whatever the repository says. The file may exist all the same.
    pub async fn record(self, repository: &Repository) -> Result<FileId, RepositoryError> {
        let repository = repository.clone();
        blocking(move || {
            let id = repository.save_snapshot(&self.file)?;
            if let Err(error) = self.lock.release() {
                tracing::warn!(%error, "the lock on the repository stays until it is stale");
            }
            Ok(id)
        })
        .await
    }
}

/// Runs what blocks on a thread of its own.
///
/// # Errors
/// Those of `work`.
pub async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
