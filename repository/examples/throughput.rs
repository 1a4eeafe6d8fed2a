//! How fast bytes from memory become a repository, and come back; beside `zstd -1 -T2`.
//!
//! `cargo run --release -p repository --example throughput -- [FILE] [FOLDER]` takes up to 1 GiB of
//! FILE, or of the files in `/usr/lib`, and makes its repository in FOLDER, or in `/tmp`.
#![expect(clippy::print_stdout, reason = "a program for people")]

use std::{
    error::Error,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use bytes::Bytes;
use repository::{
    CheckOptions, DiskReader, Kdf, LocalFolder, Reader, Repository, SnapshotFile, Tree, Writer,
    WriterOptions,
};

const LEN: usize = 1 << 30;
const CHUNK: usize = 128 << 10;
/// What is handed in at once.
const PIECE: usize = 1 << 20;
const ROUNDS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let source = arguments.next().unwrap_or_else(|| PathBuf::from("/usr/lib"));
    let mut content = Vec::with_capacity(LEN);
    collect(&source, &mut content)?;
    let content = Bytes::from(content);
    let parent = arguments.next().unwrap_or_else(std::env::temp_dir);
    println!("{} MiB of {}, chunks of {} KiB", content.len() >> 20, source.display(), CHUNK >> 10);
    for round in 1..=ROUNDS {
        println!("round {round}");
        timed("zstd -1 -T2", content.len(), || zstd_alone(&content))?;
        let folder = parent.join(format!("kvmsnap-throughput-{}", std::process::id()));
        let measured = measure(&content, &folder);
        fs::remove_dir_all(&folder)?;
        measured?;
    }
    Ok(())
}

fn measure(content: &Bytes, folder: &Path) -> Result<(), Box<dyn Error>> {
    let backend = Arc::new(LocalFolder::create(folder)?);
    let repository = Repository::init(backend, b"secret", Kdf::WEAK_FOR_TESTS)?;
    let write = || write(&repository, content);
    let ids = timed("write", content.len(), write)?;
    timed("write again", content.len(), write)?;
    let index = Arc::new(repository.index()?);
    let reader = Arc::new(Reader::new(&repository, index, 8 << 20));
    let disk = DiskReader::new(reader, ids, content.len() as u64)?;
    timed("read, two threads", content.len(), || read(&disk, content))?;
    timed("check --read-data", content.len(), || {
        let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {})?;
        assert!(report.is_clean(), "{report:?}");
        Ok(())
    })
}

fn write(
    repository: &Repository,
    content: &Bytes,
) -> Result<Vec<repository::BlobId>, Box<dyn Error>> {
    let index = Arc::new(repository.index()?);
    let writer = Writer::new(repository, index, WriterOptions::default())?;
    for start in (0..content.len()).step_by(PIECE) {
        let end = content.len().min(start + PIECE);
        writer.submit(0, (start / CHUNK) as u64, CHUNK, content.slice(start..end))?;
    }
    let mut stored = writer.drain()?;
    stored.sort_unstable_by_key(|stored| stored.chunk);
    let tree = writer.save_tree(&Tree::default())?;
    let stats = writer.finish()?.stats;
    repository.save_snapshot(&SnapshotFile::new(tree, "2026-01-01T00:00:00Z".parse()?))?;
    println!("    {stats:?}");
    Ok(stored.into_iter().map(|stored| stored.id).collect())
}

fn read(disk: &DiskReader, content: &[u8]) -> Result<(), Box<dyn Error>> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), repository::RepositoryError> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let range = disk.chunk_range(next.fetch_add(1, Ordering::Relaxed));
            let (start, end) = (range.start as usize, range.end as usize);
            if start == end {
                return Ok(());
            }
            let buffer = &mut buffer[..end - start];
            disk.read_at(range.start, buffer)?;
            assert_eq!(buffer, &content[start..end]);
        }
    };
    thread::scope(|scope| {
        let other = scope.spawn(work);
        work()?;
        Ok(other.join().expect("no panic")?)
    })
}

fn zstd_alone(content: &[u8]) -> Result<(), Box<dyn Error>> {
    let mut encoder = zstd::Encoder::new(io::sink(), 1)?;
    encoder.multithread(2)?;
    encoder.write_all(content)?;
    encoder.finish()?;
    Ok(())
}

fn timed<T>(
    name: &str,
    len: usize,
    work: impl FnOnce() -> Result<T, Box<dyn Error>>,
) -> Result<T, Box<dyn Error>> {
    let start = Instant::now();
    let done = work()?;
    let seconds = start.elapsed().as_secs_f64();
    println!("  {name:<20} {seconds:6.2} s  {:7.0} MB/s", len as f64 / seconds / 1e6);
    Ok(done)
}

/// Appends the content of a file, or of all files below a folder, up to `LEN` bytes.
fn collect(path: &Path, content: &mut Vec<u8>) -> io::Result<()> {
    let kind = fs::symlink_metadata(path)?.file_type();
    if kind.is_file() {
        let left = LEN.saturating_sub(content.len()) as u64;
        File::open(path)?.take(left).read_to_end(content)?;
    } else if kind.is_dir() {
        let mut entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::path);
        for entry in entries {
            if content.len() < LEN {
                collect(&entry.path(), content)?;
            }
        }
    }
    Ok(())
}
