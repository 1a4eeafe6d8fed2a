//! Where the files of a repository are kept. Every effect on a repository goes through [`Backend`].

mod access;
mod address;
mod early;
mod http;
mod local;
mod pace;
mod rest;
mod retry;
mod s3;
mod sftp;

use std::{fmt, io, num::NonZeroU64, sync::Arc};

pub(crate) use self::local::is_alive;
pub use self::{
    access::Access,
    address::{Address, AddressError, S3Address, SftpAddress},
    local::{Begun, LocalFolder},
    pace::Pace,
    rest::RestServer,
    s3::S3Bucket,
    sftp::SftpFolder,
};
use crate::FileId;

/// The kinds of files a repository consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileKind {
    /// The one file that makes a folder a repository; its id is [`FileId::CONFIG`].
    Config,
    /// A master key, sealed with a password.
    Key,
    /// A finished backup.
    Snapshot,
    /// Which blobs are in which packs.
    Index,
    /// Blobs.
    Pack,
    /// Somebody is using the repository.
    Lock,
}

impl FileKind {
    /// Every kind, `Config` first.
    pub const ALL: [Self; 6] =
        [Self::Config, Self::Key, Self::Snapshot, Self::Index, Self::Pack, Self::Lock];

    /// The folder that holds files of this kind; for `Config` the name of the file itself.
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Key => "keys",
            Self::Snapshot => "snapshots",
            Self::Index => "index",
            Self::Pack => "data",
            Self::Lock => "locks",
        }
    }

    /// How many bytes a file of this kind may have, stored or uncompressed. Bigger ones are refused.
    pub const fn len_max(self) -> u64 {
        match self {
            Self::Config | Self::Key | Self::Lock => 1 << 20,
            Self::Snapshot => 64 << 20,
            Self::Index => 512 << 20,
            Self::Pack => 4 << 30,
        }
    }
}

/// A file of the repository; displays as its path inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileRef {
    /// What the file is.
    pub kind: FileKind,
    /// Its name.
    pub id: FileId,
}

impl fmt::Display for FileRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, id } = self;
        match kind {
            FileKind::Config => f.write_str("config"),
            FileKind::Pack => write!(f, "data/{:02x}/{id}", id.0[0]),
            _ => write!(f, "{}/{id}", kind.folder()),
        }
    }
}

/// Why a [`Backend`] did not do what it was asked. `file` is a path, absolute where there is one.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The file or folder is not there.
    #[error("{file} does not exist")]
    NotFound {
        /// Path of the file.
        file: String,
    },
    /// `config` is there already; other kinds are replaced by equal content.
    #[error("{file} exists already")]
    Exists {
        /// Path of the file.
        file: String,
    },
    /// The file is bigger than [`FileKind::len_max`].
    #[error("{file} has {len} bytes, at most {len_max} are allowed")]
    TooLarge {
        /// Path of the file.
        file: String,
        /// Its length in bytes.
        len: u64,
        /// The bound in bytes.
        len_max: u64,
    },
    /// The file ends before the range that was asked for.
    #[error("{file} ends before byte {end}")]
    Truncated {
        /// Path of the file.
        file: String,
        /// End of the range in bytes.
        end: u64,
    },
    /// The other side does not say what it should.
    #[error("{file}: {problem}")]
    Protocol {
        /// What it is about.
        file: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// S3 needs a key.
    #[error("no key was given for {location}")]
    NoCredentials {
        /// The repository.
        location: String,
    },
    /// The store failed.
    #[error("cannot {operation} {file}")]
    Io {
        /// A verb: `write`, `read`, `list`, …
        operation: &'static str,
        /// Path of the file or folder.
        file: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
}

impl BackendError {
    /// The file is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// The store has no room left, or the quota is used up.
    pub fn is_full(&self) -> bool {
        self.io_kind().is_some_and(|kind| {
            matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        })
    }

    /// The store can be read but not be written by us.
    pub fn is_read_only(&self) -> bool {
        self.io_kind().is_some_and(|kind| {
            matches!(kind, io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied)
        })
    }

    /// The store cannot be reached, or does not answer.
    pub fn is_away(&self) -> bool {
        self.io_kind().is_some_and(|kind| {
            use io::ErrorKind as Kind;
            matches!(
                kind,
                Kind::ConnectionAborted
                    | Kind::ConnectionRefused
                    | Kind::ConnectionReset
                    | Kind::HostUnreachable
                    | Kind::NetworkUnreachable
                    | Kind::ResourceBusy
                    | Kind::TimedOut
            )
        })
    }

    fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}

/// A store for the files of one repository. All calls block; all may come from many threads at once.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Ids and lengths in bytes of all files of `kind`, in no particular order. A folder that is not there
    /// is [`BackendError::NotFound`]: it is lost, or not mounted, and says nothing about its files. Only
    /// stores without folders have none to miss.
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError>;

    /// The whole content of a file, at most [`FileKind::len_max`] bytes.
    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError>;

    /// Fills `buffer` from byte `offset` of a file; [`BackendError::Truncated`] if it is too short.
    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError>;

    /// Stores a file: all or nothing, and durable once this returns.
    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError>;

    /// Begins to store a file, which is there, and durable, only once [`Backend::settle`] returns: for
    /// stores in which making many files durable at once costs little more than one. Others write it.
    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError>;

    /// Ends what [`Backend::begin`] began. After an error each file is there whole or not at all.
    fn settle(&self, files: Vec<Begun>) -> Result<(), BackendError>;

    /// Removes a file; [`BackendError::NotFound`] if there is none.
    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError>;

    /// Whether a listing shows whatever anybody has written before it began. Some stores are late.
    fn lists_at_once(&self) -> bool {
        false
    }

    /// Where the repository is, to show to a person. Has no secrets.
    fn location(&self) -> String;

    /// Removes what killed writers left behind and nothing mentions; returns how many files.
    fn sweep(&self) -> Result<usize, BackendError> {
        Ok(0)
    }

    /// How many bytes a second it takes at most, where that is limited.
    fn upload_limit(&self) -> Option<NonZeroU64> {
        None
    }
}

impl Address {
    /// Opens the store. Whether it holds a repository is not looked at.
    ///
    /// # Errors
    /// Why the store cannot be used, as far as that shows without asking for a file.
    pub fn open(&self, access: &Arc<Access>) -> Result<Box<dyn Backend>, BackendError> {
        Ok(match self {
            Self::Folder(path) => Box::new(LocalFolder::open(path)?.paced(&access.pace)),
            Self::Sftp(address) => Box::new(SftpFolder::new(address, access)),
            Self::S3(address) => Box::new(S3Bucket::new(address, access)?),
            Self::Rest(url) => Box::new(RestServer::new(url, access)?),
        })
    }

    /// Makes what a repository needs there: folders, the bucket. What exists is left as it is.
    ///
    /// # Errors
    /// Why it cannot be made.
    pub fn create(&self, access: &Arc<Access>) -> Result<Box<dyn Backend>, BackendError> {
        Ok(match self {
            Self::Folder(path) => Box::new(LocalFolder::create(path)?.paced(&access.pace)),
            Self::Sftp(address) => Box::new(SftpFolder::create(address, access)?),
            Self::S3(address) => Box::new(S3Bucket::create(address, access)?),
            Self::Rest(url) => Box::new(RestServer::create(url, access)?),
        })
    }
}

/// A part of a file, as it is asked for over HTTP.
struct Range {
    header: String,
    end: u64,
    len: u64,
}

impl Range {
    /// `None` for no bytes at all, which HTTP cannot ask for.
    fn of(offset: u64, buffer: &[u8]) -> Option<Self> {
        let len = buffer.len() as u64;
        let end = offset.saturating_add(len);
        let header = format!("bytes={offset}-{}", end.saturating_sub(1));
        (len > 0).then_some(Self { header, end, len })
    }

    fn fill(
        &self,
        buffer: &mut [u8],
        file: &str,
        content: Result<Vec<u8>, BackendError>,
    ) -> Result<(), BackendError> {
        let truncated = || BackendError::Truncated { file: file.to_owned(), end: self.end };
        match content {
            Ok(content) if content.len() == buffer.len() => {
                buffer.copy_from_slice(&content);
                Ok(())
            }
            Ok(_) | Err(BackendError::Truncated { .. }) => Err(truncated()),
            Err(error) => Err(error),
        }
    }
}
