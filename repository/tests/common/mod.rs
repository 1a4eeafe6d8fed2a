//! What the tests of the repository share: small backups, and stock restic to judge them.
#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod memory;

use std::{
    io::Write,
    path::Path,
    process::{Command, Output},
    sync::Arc,
};

use bytes::Bytes;
use jiff::Timestamp;
use repository::{
    Backend, BlobId, DiskReader, FileId, Index, Kdf, LocalFolder, Node, Reader, Repository,
    RepositoryError, SnapshotFile, Tree, Writer, WriterOptions, WriterStats,
};

pub(crate) const PASSWORD: &str = "correct horse";
pub(crate) const CHUNK: usize = 4096;

/// Bytes that look random and are the same in every run.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Bytes that compress well and differ for each seed.
pub(crate) fn text(seed: u64, len: usize) -> Vec<u8> {
    format!("line {seed} of a text that repeats itself\n")
        .into_bytes()
        .into_iter()
        .cycle()
        .take(len)
        .collect()
}

/// A disk with text, noise, zeros and a short last chunk.
pub(crate) fn disk(seed: u64) -> Vec<u8> {
    let zeros = vec![0; 2 * CHUNK];
    [text(seed, 3 * CHUNK), noise(seed, 2 * CHUNK), zeros, text(seed, CHUNK), noise(seed + 1, 777)]
        .concat()
}

pub(crate) fn init(backend: Arc<dyn Backend>) -> Repository {
    Repository::init(backend, PASSWORD.as_bytes(), Kdf::WEAK_FOR_TESTS).unwrap()
}

pub(crate) fn open(backend: Arc<dyn Backend>) -> Result<Repository, RepositoryError> {
    Repository::open(backend, PASSWORD.as_bytes())
}

pub(crate) fn folder(path: &Path) -> Arc<dyn Backend> {
    Arc::new(LocalFolder::create(path).unwrap())
}

/// Stores a disk like a backup does: lock, chunks, manifest, trees, snapshot.
pub(crate) fn back_up(
    repository: &Repository,
    name: &str,
    disk: &[u8],
    chunk_len: usize,
) -> Result<(FileId, WriterStats), RepositoryError> {
    let lock = repository.lock(repository::LockMode::Shared)?;
    let stored = store(repository, name, disk, chunk_len);
    let released = lock.release();
    let stored = stored?;
    released?;
    Ok(stored)
}

/// As [`back_up`], but without a lock and its delay.
pub(crate) fn store(
    repository: &Repository,
    name: &str,
    disk: &[u8],
    chunk_len: usize,
) -> Result<(FileId, WriterStats), RepositoryError> {
    let writer = Writer::new(repository, Arc::new(repository.index()?), WriterOptions::default())?;
    for (number, chunk) in disk.chunks(chunk_len).enumerate() {
        writer.submit(0, number as u64, chunk_len, Bytes::copy_from_slice(chunk))?;
    }
    let mut stored = writer.drain()?;
    stored.sort_by_key(|stored| stored.chunk);
    let content: Vec<BlobId> = stored.iter().map(|stored| stored.id).collect();
    let time = Timestamp::now();
    let manifest = format!("{{\"domain\":\"{name}\"}}");
    let manifest_id = writer.save_blob(Bytes::from(manifest.clone()))?;
    let inner = Tree::new(vec![
        Node::file("vda.raw", disk.len() as u64, content, time),
        Node::file("manifest.json", manifest.len() as u64, vec![manifest_id], time),
    ]);
    let inner = writer.save_tree(&inner)?;
    let root = writer.save_tree(&Tree::new(vec![Node::dir(name, inner, time)]))?;
    let stats = writer.finish()?.stats;
    let mut snapshot = SnapshotFile::new(root, time);
    snapshot.paths = vec![format!("/{name}")];
    snapshot.tags = vec!["kvmsnap".to_owned()];
    Ok((repository.save_snapshot(&snapshot)?, stats))
}

/// Reads the disk of a snapshot back, with this index.
pub(crate) fn read_disk(
    repository: &Repository,
    index: Index,
    snapshot: &SnapshotFile,
) -> Result<Vec<u8>, RepositoryError> {
    let reader = Arc::new(Reader::new(repository, Arc::new(index), 1 << 20));
    let root = reader.tree(&snapshot.tree)?;
    let inner = reader.tree(&root.nodes[0].subtree.expect("a folder"))?;
    let manifest = inner.node("manifest.json").expect("a file");
    reader.blob(&manifest.content()[0])?;
    let node = inner.node("vda.raw").expect("a file");
    // Our reader knows zeros by their id; stock restic reads them, so they must be there as well.
    node.content().iter().try_for_each(|id| reader.blob(id).map(drop))?;
    let disk = DiskReader::new(reader, node.content().to_vec(), node.size)?;
    let mut content = vec![0xee; node.size as usize];
    disk.read_at(0, &mut content)?;
    Ok(content)
}

/// Reads the disk of a snapshot back.
pub(crate) fn restore(repository: &Repository, id: &FileId) -> Result<Vec<u8>, RepositoryError> {
    read_disk(repository, repository.index()?, &repository.snapshot(id)?)
}

/// Whether stock restic is here. Without it the test is skipped aloud, or fails where everything is
/// required.
pub(crate) fn has_restic() -> bool {
    if Command::new("restic").arg("version").output().is_ok_and(|output| output.status.success()) {
        return true;
    }
    let required = std::env::var("KVMSNAP_REQUIRE_QEMU").is_ok_and(|value| value == "1");
    assert!(!required, "restic is not installed, and KVMSNAP_REQUIRE_QEMU=1");
    // Past the test harness, which swallows what `eprintln!` says.
    std::io::stderr().write_all(b"SKIPPED: restic is not installed\n").unwrap();
    false
}

pub(crate) fn restic(repository: &Path, arguments: &[&str]) -> Output {
    restic_command(repository, arguments).output().expect("restic starts")
}

pub(crate) fn restic_command(repository: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("restic");
    command.arg("--repo").arg(repository).arg("--no-cache").args(arguments);
    command.env("RESTIC_PASSWORD", PASSWORD).env_remove("RESTIC_REPOSITORY");
    command
}

/// Runs restic, which must succeed; returns what it printed.
pub(crate) fn restic_ok(repository: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = restic(repository, arguments);
    let (out, err) = (&output.stdout, String::from_utf8_lossy(&output.stderr));
    let shown = String::from_utf8_lossy(&out[..out.len().min(4000)]).into_owned();
    assert!(output.status.success(), "restic {arguments:?}\n{shown}\n{err}");
    output.stdout
}
