//! A repository in a folder of a mounted file system.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{errno::Errno, sys::signal::kill, unistd::Pid};

use super::{Backend, BackendError, FileKind, FileRef};
use crate::FileId;

/// Temporary files younger than this may belong to a writer on another host.
const TEMPORARY_AGE_MIN: Duration = Duration::from_secs(24 * 60 * 60);

/// A repository in a local folder. Files are 0600, folders 0700.
#[derive(Debug, Clone)]
pub struct LocalFolder {
    root: PathBuf,
}

impl LocalFolder {
    /// Creates the folder with its parents and subfolders; what exists is left as it is.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, BackendError> {
        let folder = Self { root: path.as_ref().to_path_buf() };
        for kind in FileKind::ALL.into_iter().filter(|&kind| kind != FileKind::Config) {
            create_folders(&folder.root.join(kind.folder()))?;
        }
        Ok(folder)
    }

    /// Opens a folder that exists. Whether it is a repository is not looked at.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, BackendError> {
        let path = path.as_ref();
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Ok(Self { root: path.to_path_buf() }),
            Ok(_) => Err(BackendError::NotFound { file: format!("folder {}", path.display()) }),
            Err(source) => Err(failed("open", path, source)),
        }
    }

    fn path(&self, kind: FileKind, id: &FileId) -> PathBuf {
        self.root.join(FileRef { kind, id: *id }.to_string())
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
        read_exact_at(&file, &path, offset, buffer)
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        let path = self.path(kind, id);
        let folder = path.parent().expect("every file is in a folder");
        let random: u64 = rand::random();
        let name = if kind == FileKind::Config { "config".to_owned() } else { id.to_hex() };
        let temporary = folder.join(format!("{name}-tmp-{}-{random:016x}", std::process::id()));
        let written = match write_new(&temporary, content) {
            // `keys` is always there: without it the repository's file system is not mounted, and
            // folders made now would hide under it.
            Err(source)
                if source.kind() == io::ErrorKind::NotFound && self.root.join("keys").is_dir() =>
            {
                create_folders(folder)?;
                write_new(&temporary, content)
            }
            other => other,
        };
        let placed = written.and_then(|()| match kind {
            // Fails where there is one: two programs must not both believe they made the repository.
            FileKind::Config => {
                fs::hard_link(&temporary, &path).and_then(|()| fs::remove_file(&temporary))
            }
            _ => fs::rename(&temporary, &path),
        });
        let durable = placed.and_then(|()| File::open(folder)?.sync_all());
        durable.map_err(|source| {
            // The error that is reported is the first one; a leftover is swept later.
            let _ = fs::remove_file(&temporary);
            match source.kind() {
                io::ErrorKind::AlreadyExists if kind == FileKind::Config => {
                    BackendError::Exists { file: path.display().to_string() }
                }
                _ => failed("write", &path, source),
            }
        })
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        let path = self.path(kind, id);
        fs::remove_file(&path).map_err(|source| failed("remove", &path, source))
    }

    fn location(&self) -> String {
        self.root.display().to_string()
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
    pid > 0 && kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
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

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
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
