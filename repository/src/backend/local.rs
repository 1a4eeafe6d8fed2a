//! A repository in a folder of a mounted file system.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    num::NonZeroU64,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        signal::kill,
        statfs::{
            BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs,
        },
    },
    unistd::Pid,
};
use rustix::fs::{Advice, OFlags, fadvise, fcntl_getfl, fcntl_setfl};

use super::{Backend, BackendError, FileKind, FileRef, Pace};
use crate::{FileId, host};

/// Temporary files younger than this may belong to a writer on another host.
const TEMPORARY_AGE_MIN: Duration = Duration::from_secs(24 * 60 * 60);

/// File systems that are this host's alone, so that a listing shows all that was written before, and a direct
/// write waits for no network.
const LOCAL: [FsType; 5] =
    [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC, ZFS_SUPER_MAGIC];
/// OpenZFS, `include/sys/fs/zfs.h`.
const ZFS_SUPER_MAGIC: FsType = FsType(0x2fc1_2fc1);

/// So many bytes of a file are sent to the disk at once…
const PART_LEN: usize = 1 << 20;
/// Place in the file, place in memory and length of a direct write are multiples of this: few disks have
/// longer blocks.
const BLOCK_LEN: usize = 4096;
/// …and so many written to the page cache by one call of the system. With large folios a kernel without preemption may copy
/// 1 MiB in one go, 6 ms where memory must be fetched from the host (ext4, Linux 6.18), and a guest's QEMU waits
/// for that processor.
const CALL_LEN: usize = 64 << 10;

/// A repository in a local folder. Files are 0600, folders 0700.
#[derive(Debug, Clone)]
pub struct LocalFolder {
    root: PathBuf,
    pace: Arc<Pace>,
}

impl LocalFolder {
    /// Creates the folder with its parents and subfolders; what exists is left as it is.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, BackendError> {
        let folder = Self { root: path.as_ref().to_path_buf(), pace: Arc::default() };
        for kind in FileKind::ALL.into_iter().filter(|&kind| kind != FileKind::Config) {
            create_folders(&folder.root.join(kind.folder()))?;
        }
        Ok(folder)
    }

    /// Opens a folder that exists. Whether it is a repository is not looked at.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, BackendError> {
        let path = path.as_ref();
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                Ok(Self { root: path.to_path_buf(), pace: Arc::default() })
            }
            Ok(_) => Err(BackendError::NotFound { file: format!("folder {}", path.display()) }),
            Err(source) => Err(failed("open", path, source)),
        }
    }

    /// Writes and reads no faster than allowed: it may be a folder of another machine.
    #[must_use]
    pub fn paced(mut self, pace: &Arc<Pace>) -> Self {
        self.pace = Arc::clone(pace);
        self
    }

    fn path(&self, kind: FileKind, id: &FileId) -> PathBuf {
        self.root.join(FileRef { kind, id: *id }.to_string())
    }

    fn is_local(&self) -> bool {
        statfs(&self.root).is_ok_and(|stat| LOCAL.contains(&stat.filesystem_type()))
    }

    /// The folders that hold files of `kind`.
    fn folders(&self, kind: FileKind) -> Result<Vec<PathBuf>, BackendError> {
        let folder = self.root.join(kind.folder());
        if kind != FileKind::Pack {
            return Ok(vec![folder]);
        }
        let named = entries(&folder)?.into_iter().filter(|(name, _)| {
            name.len() == 2 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        });
        Ok(named.map(|(_, entry)| entry.path()).collect())
    }
}

/// A file that [`Backend::begin`] began. Dropped, it goes away.
#[derive(Debug)]
pub struct Begun(Option<NewFile>);

impl Begun {
    /// For stores where a file is durable as soon as it is written.
    pub fn done() -> Self {
        Self(None)
    }
}

/// A file under its temporary name.
#[derive(Debug)]
struct NewFile {
    kind: FileKind,
    /// Kept open: if the system cannot write it out, that is told here and only once.
    file: File,
    temporary: PathBuf,
    path: PathBuf,
}

impl NewFile {
    /// Gives it its name.
    fn place(&self) -> Result<(), BackendError> {
        let Self { kind, temporary, path, .. } = self;
        let placed = match kind {
            // Fails where there is one: two programs must not both believe they made the repository.
            FileKind::Config => fs::hard_link(temporary, path),
            _ => fs::rename(temporary, path),
        };
        placed.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists if *kind == FileKind::Config => {
                BackendError::Exists { file: path.display().to_string() }
            }
            _ => failed("write", path, source),
        })
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Once it was renamed there is none. A leftover is swept later.
        let _ = fs::remove_file(&self.temporary);
    }
}

impl Backend for LocalFolder {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        if kind == FileKind::Config {
            let path = self.root.join("config");
            return match fs::metadata(&path) {
                Ok(metadata) => Ok(vec![(FileId::CONFIG, metadata.len())]),
                Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                Err(source) => Err(failed("list", &path, source)),
            };
        }
        let mut files = Vec::new();
        // `locks` alone may be missing: copies of a repository lack it where nobody had a lock.
        if kind != FileKind::Lock {
            let folder = self.root.join(kind.folder());
            fs::read_dir(&folder).map_err(|source| failed("list", &folder, source))?;
        }
        for folder in self.folders(kind)? {
            for (name, entry) in entries(&folder)? {
                let Ok(id) = name.parse::<FileId>() else { continue };
                match entry.metadata() {
                    Ok(metadata) if metadata.is_file() => files.push((id, metadata.len())),
                    Ok(_) => {}
                    Err(source) if source.kind() == io::ErrorKind::NotFound => {}
                    Err(source) => return Err(failed("list", &entry.path(), source)),
                }
            }
        }
        Ok(files)
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        let path = self.path(kind, id);
        let file = File::open(&path).map_err(|source| failed("read", &path, source))?;
        let len = file.metadata().map_err(|source| failed("read", &path, source))?.len();
        if len > kind.len_max() {
            let file = path.display().to_string();
            return Err(BackendError::TooLarge { file, len, len_max: kind.len_max() });
        }
        let mut content = vec![0; usize::try_from(len).expect("bounded by `len_max`")];
        read_exact_at(&file, &path, 0, &mut content)?;
        self.pace.after_receiving(content.len());
        Ok(content)
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        let path = self.path(kind, id);
        let file = File::open(&path).map_err(|source| failed("read", &path, source))?;
        read_exact_at(&file, &path, offset, buffer)?;
        self.pace.after_receiving(buffer.len());
        Ok(())
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        self.settle(vec![self.begin(kind, id, content)?])
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        let path = self.path(kind, id);
        let folder = path.parent().expect("every file is in a folder");
        let random: u64 = rand::random();
        let name = if kind == FileKind::Config { "config".to_owned() } else { id.to_hex() };
        let temporary = folder.join(format!("{name}-tmp-{}-{random:016x}", std::process::id()));
        let file = match create_new(&temporary) {
            // `keys` is always there: without it the repository's file system is not mounted, and
            // folders made now would hide under it.
            Err(source)
                if source.kind() == io::ErrorKind::NotFound && self.root.join("keys").is_dir() =>
            {
                create_folders(folder)?;
                create_new(&temporary)
            }
            other => other,
        };
        let file = file.map_err(|source| failed("write", &path, source))?;
        // From here on dropping it removes the temporary file.
        let new = NewFile { kind, file, temporary, path };
        write_out(&new.file, content, self.is_local(), &self.pace)
            .map_err(|source| failed("write", &new.path, source))?;
        Ok(Begun(Some(new)))
    }

    fn settle(&self, files: Vec<Begun>) -> Result<(), BackendError> {
        let files: Vec<NewFile> = files.into_iter().filter_map(|Begun(new)| new).collect();
        // One kind of step after the other: then a journal commits all of it once, not each file.
        for new in &files {
            new.file.sync_all().map_err(|source| failed("write", &new.path, source))?;
        }
        files.iter().try_for_each(NewFile::place)?;
        let folders: BTreeSet<_> = files.iter().filter_map(|new| new.path.parent()).collect();
        for folder in folders {
            let synced = File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(|source| failed("sync", folder, source))?;
        }
        Ok(())
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        let path = self.path(kind, id);
        fs::remove_file(&path).map_err(|source| failed("remove", &path, source))
    }

    fn lists_at_once(&self) -> bool {
        // Shares of other hosts keep listings for a while.
        self.is_local()
    }

    fn location(&self) -> String {
        self.root.display().to_string()
    }

    fn upload_limit(&self) -> Option<NonZeroU64> {
        self.pace.upload_limit()
    }

    fn sweep(&self) -> Result<usize, BackendError> {
        let mut swept = 0;
        for kind in FileKind::ALL {
            let folders = match kind {
                FileKind::Config => vec![self.root.clone()],
                _ => self.folders(kind)?,
            };
            for folder in folders {
                for (name, entry) in entries(&folder)? {
                    let abandoned = owner_of_temporary(&name).is_some_and(|pid| !is_alive(pid))
                        && entry.metadata().is_ok_and(|metadata| {
                            let age = metadata.modified().ok().and_then(|at| at.elapsed().ok());
                            metadata.is_file() && age.is_some_and(|age| age > TEMPORARY_AGE_MIN)
                        });
                    if abandoned && fs::remove_file(entry.path()).is_ok() {
                        swept += 1;
                    }
                }
            }
        }
        Ok(swept)
    }
}

/// The process id in the name of a temporary file of ours; `None` for any other name.
fn owner_of_temporary(name: &str) -> Option<i32> {
    let (file, owner) = name.split_once("-tmp-")?;
    let (pid, random) = owner.split_once('-')?;
    let ours = (file == "config" || file.parse::<FileId>().is_ok())
        && random.len() == 16
        && random.bytes().all(|byte| byte.is_ascii_hexdigit());
    ours.then(|| pid.parse().ok()).flatten()
}

/// Whether this host has a process `pid`; true when in doubt.
pub(crate) fn is_alive(pid: i32) -> bool {
    pid > 0
        && kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
        && !host::is_zombie(pid.cast_unsigned())
}

/// Entries with UTF-8 names; others cannot be ours. A folder that is not there has none.
fn entries(folder: &Path) -> Result<Vec<(String, fs::DirEntry)>, BackendError> {
    let listing = match fs::read_dir(folder) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) if source.kind() == io::ErrorKind::NotADirectory => return Ok(Vec::new()),
        other => other.map_err(|source| failed("list", folder, source))?,
    };
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|source| failed("list", folder, source))?;
        found.extend(entry.file_name().into_string().ok().map(|name| (name, entry)));
    }
    Ok(found)
}

/// Creates a folder and its missing parents, each durable in its parent.
fn create_folders(folder: &Path) -> Result<(), BackendError> {
    if folder.is_dir() {
        return Ok(());
    }
    let parent = match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create_folders(parent)?;
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
        other => other.map_err(|source| failed("create", folder, source))?,
    }
    let synced = File::open(parent).and_then(|parent| parent.sync_all());
    synced.map_err(|source| failed("sync", parent, source))
}

fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Writes a file: directly to the disk what can be, the rest through the page cache.
fn write_out(file: &File, content: &[u8], directly: bool, pace: &Pace) -> io::Result<()> {
    let is_direct = directly && content.len() >= PART_LEN && set_direct(file, true).is_ok();
    let written = match is_direct {
        true => {
            let written = write_directly(file, content, pace)?;
            set_direct(file, false)?;
            written
        }
        false => 0,
    };
    write_cached(file, content, written, pace)
}

/// Writes whole blocks past the page cache. The memory of the host is left to its guests, and no processor is
/// held up by a copy into memory that the kernel must find first. Returns how far it came: what the disk does
/// not take like this the page cache does.
fn write_directly(mut file: &File, content: &[u8], pace: &Pace) -> io::Result<usize> {
    let mut memory = vec![0; PART_LEN + BLOCK_LEN];
    let begin = memory.as_ptr().align_offset(BLOCK_LEN);
    let mut written = 0;
    for part in content[..content.len() - content.len() % BLOCK_LEN].chunks(PART_LEN) {
        pace.before_sending(part.len());
        let aligned = &mut memory[begin..begin + part.len()];
        aligned.copy_from_slice(part);
        match file.write(aligned) {
            Ok(len) => written += len,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => break,
            Err(error) => return Err(error),
        }
        if written % PART_LEN > 0 {
            break;
        }
    }
    Ok(written)
}

fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, direct);
    Ok(fcntl_setfl(file, flags)?)
}

/// Writes a file from `offset` on, where its cursor is, and sends it on its way to the disk part by part: when
/// the file is made durable there is little left to wait for, and nobody else's writes queue behind it.
fn write_cached(mut file: &File, content: &[u8], mut offset: usize, pace: &Pace) -> io::Result<()> {
    for part in content[offset..].chunks(PART_LEN) {
        pace.before_sending(part.len());
        for piece in part.chunks(CALL_LEN) {
            file.write_all(piece)?;
        }
        if let Some(len) = NonZeroU64::new(PART_LEN as u64).filter(|_| part.len() == PART_LEN) {
            // On Linux this begins to write out what is dirty, and waits for nothing. A hint.
            let _ = fadvise(file, offset as u64, Some(len), Advice::DontNeed);
        }
        offset += part.len();
    }
    Ok(())
}

fn read_exact_at(
    file: &File,
    path: &Path,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), BackendError> {
    file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => BackendError::Truncated {
            file: path.display().to_string(),
            end: offset.saturating_add(buffer.len() as u64),
        },
        _ => failed("read", path, source),
    })
}

fn failed(operation: &'static str, path: &Path, source: io::Error) -> BackendError {
    let file = path.display().to_string();
    match source.kind() {
        io::ErrorKind::NotFound => BackendError::NotFound { file },
        _ => BackendError::Io { operation, file, source: Arc::new(source) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(folder: &LocalFolder, content: &[u8]) -> (FileId, Begun) {
        let id = FileId::of(content);
        (id, folder.begin(FileKind::Pack, &id, content).unwrap())
    }

    #[test]
    fn p1_what_was_begun_is_there_once_it_is_settled_and_not_before() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = LocalFolder::create(scratch.path()).unwrap();
        let contents = [vec![1; 3 * PART_LEN + 5], vec![2; PART_LEN], vec![3], Vec::new()];
        let (ids, begun): (Vec<_>, Vec<_>) =
            contents.iter().map(|content| begin(&folder, content)).unzip();
        assert_eq!(folder.list(FileKind::Pack).unwrap(), []);
        folder.settle(begun).unwrap();
        for (id, content) in ids.iter().zip(&contents) {
            assert_eq!(&folder.read(FileKind::Pack, id).unwrap(), content);
        }
    }

    #[test]
    fn p3_what_was_begun_and_given_up_leaves_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = LocalFolder::create(scratch.path()).unwrap();
        let (id, begun) = begin(&folder, b"a pack");
        let parent = folder.path(FileKind::Pack, &id);
        let files = || fs::read_dir(parent.parent().unwrap()).unwrap().count();
        assert_eq!(files(), 1);
        drop(begun);
        assert_eq!(files(), 0);
    }
}
