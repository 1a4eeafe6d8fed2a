//! What can go wrong with a repository, and with one of its files.

use std::{io, sync::Arc};

use jiff::Timestamp;

use crate::{BackendError, BlobId, FileId, FileRef};

/// Why a repository did not do what it was asked. Cheap to clone: several threads may report it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RepositoryError {
    /// There is no `config`.
    #[error("{location} is not a repository")]
    NotARepository {
        /// Where it was looked for.
        location: String,
    },
    /// There is a repository already, or the remains of one.
    #[error("{location} holds a repository already")]
    AlreadyExists {
        /// Where.
        location: String,
    },
    /// `config` is gone, but packs, index files or snapshots are there.
    #[error("{location} has backups but no config file")]
    ConfigMissing {
        /// Where.
        location: String,
    },
    /// No key opens with this password.
    #[error("no key of {location} opens with this password")]
    WrongPassword {
        /// Where.
        location: String,
    },
    /// Only version 2 is supported.
    #[error("the repository has format version {version}, only version 2 is supported")]
    UnsupportedVersion {
        /// What `config` says.
        version: u32,
    },
    /// Parameters of the key derivation that are invalid or need absurd amounts of memory or time.
    #[error("the key derivation has unusable parameters N={n}, r={r}, p={p}")]
    UnusableKdf {
        /// CPU and memory cost.
        n: u64,
        /// Block size.
        r: u32,
        /// Parallelism.
        p: u32,
    },
    /// Somebody else holds a lock that conflicts.
    #[error(
        "the repository is locked {} by process {pid} of {username} on {hostname} since {since}",
        if *.exclusive { "exclusively" } else { "for reading and writing" }
    )]
    Locked {
        /// The other's host.
        hostname: String,
        /// The other's user.
        username: String,
        /// The other's process on that host.
        pid: u32,
        /// When the lock was taken or last refreshed.
        since: Timestamp,
        /// The other wants to be alone.
        exclusive: bool,
        /// The lock file.
        id: FileId,
    },
    /// The store is full or read-only: nothing can be written, but reading may go on without a lock.
    #[error("cannot write a lock file")]
    LockNotWritable {
        /// What the store said.
        source: BackendError,
    },
    /// The lock was taken away, or could not be refreshed in time and others may take it for abandoned.
    #[error(
        "the lock on the repository was lost: it was taken away, or not refreshed since {since}"
    )]
    LockLost {
        /// The last refresh that worked.
        since: Timestamp,
    },
    /// The store failed.
    #[error("the store of the repository failed")]
    Backend {
        /// What the store said.
        #[from]
        source: BackendError,
    },
    /// A file of the repository is damaged.
    #[error("{file} is damaged")]
    Damaged {
        /// Which.
        file: FileRef,
        /// How.
        source: Defect,
    },
    /// A blob is in a pack but cannot be had from it.
    #[error("blob {id} in pack {pack} is damaged")]
    DamagedBlob {
        /// Which blob.
        id: BlobId,
        /// Where it should be.
        pack: FileId,
        /// How.
        source: Defect,
    },
    /// No index file mentions the blob.
    #[error("blob {id} is not in the index")]
    MissingBlob {
        /// Which blob.
        id: BlobId,
    },
    /// A blob that should be a tree is not one.
    #[error("tree {id} cannot be understood")]
    InvalidTree {
        /// Which blob.
        id: BlobId,
        /// Why.
        source: Defect,
    },
    /// A file's chunks do not add up to its size.
    #[error("the chunks of a file have {actual} bytes, it should have {expected}")]
    SizeMismatch {
        /// What its node says, in bytes.
        expected: u64,
        /// What the index says, in bytes.
        actual: u64,
    },
    /// A read past the end of a disk.
    #[error("cannot read {len} bytes at {offset} of {size} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Size in bytes.
        size: u64,
    },
    /// No snapshot has this id or prefix.
    #[error("no snapshot `{prefix}`")]
    SnapshotNotFound {
        /// What was asked for.
        prefix: String,
    },
    /// Several snapshots have this prefix.
    #[error("{} snapshots begin with `{prefix}`", .candidates.len())]
    SnapshotAmbiguous {
        /// What was asked for.
        prefix: String,
        /// Those that have it.
        candidates: Vec<FileId>,
    },
    /// A blob is longer than the format allows.
    #[error("a blob of {len} bytes is too long, at most {len_max} are allowed")]
    BlobTooLong {
        /// Its length in bytes.
        len: u64,
        /// The bound in bytes.
        len_max: u64,
    },
    /// zstd refused to compress.
    #[error("cannot compress")]
    Compress {
        /// What zstd said.
        source: Arc<io::Error>,
    },
    /// No thread could be started.
    #[error("cannot start a thread")]
    Thread {
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A thread of the writer ended in a panic; nothing of this run may be recorded.
    #[error("a thread of the writer died")]
    WriterDied,
    /// The writer was aborted or dropped.
    #[error("the writer was stopped")]
    WriterStopped,
    /// What is in use is not known, so nothing may be removed.
    #[error("cannot tell what is in use: nothing was removed")]
    InUseUnknown {
        /// What cannot be read.
        source: Box<RepositoryError>,
    },
    /// There is data, but no snapshot that could need it. Lists that are lost, or cut short, look the same.
    #[error("{packs} packs are there but not one snapshot: nothing was removed")]
    NoSnapshots {
        /// Packs that the index knows.
        packs: u64,
    },
    /// Source and target of a copy are one repository.
    #[error("{location} is the same repository")]
    SameRepository {
        /// The target.
        location: String,
    },
    /// Somebody asked to stop.
    #[error("stopped before it was done")]
    Stopped,
    /// The store took nothing for too long.
    #[error("the store of the repository took nothing for {seconds} s")]
    Stalled {
        /// How long was waited.
        seconds: u64,
    },
}

impl RepositoryError {
    /// Damage that hides what is in use; other errors stay what they are.
    pub(crate) fn cannot_tell(self) -> Self {
        match self {
            Self::Damaged { .. }
            | Self::DamagedBlob { .. }
            | Self::MissingBlob { .. }
            | Self::InvalidTree { .. }
            | Self::SnapshotNotFound { .. } => Self::InUseUnknown { source: Box::new(self) },
            other => other,
        }
    }

    /// It is about content that is damaged or missing, not about a store that fails.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. }
                | Self::DamagedBlob { .. }
                | Self::MissingBlob { .. }
                | Self::InvalidTree { .. }
                | Self::SizeMismatch { .. }
        )
    }
}

/// What is wrong with a file or a blob.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Defect {
    /// The name is not the SHA-256 of the content.
    #[error("content does not match the name")]
    Name,
    /// Authentication failed: changed, or sealed with another key.
    #[error("authentication failed")]
    Authentication,
    /// Too short to be what it should be.
    #[error("only {len} bytes long")]
    Truncated {
        /// Its length in bytes.
        len: u64,
    },
    /// Longer than such a thing may be.
    #[error("longer than {len_max} bytes")]
    TooLong {
        /// The bound in bytes.
        len_max: u64,
    },
    /// zstd cannot decompress it.
    #[error("cannot decompress")]
    Compression,
    /// Has another length than it should have.
    #[error("{actual} bytes long instead of {expected}")]
    Length {
        /// In bytes.
        expected: u64,
        /// In bytes.
        actual: u64,
    },
    /// The plain content does not hash to the id.
    #[error("content does not match the id")]
    Digest,
    /// Not the JSON that it should be.
    #[error("not understood")]
    Json {
        /// What the parser said.
        source: Arc<serde_json::Error>,
    },
    /// A header entry of an unknown type.
    #[error("unknown blob type {kind}")]
    BlobType {
        /// The byte.
        kind: u8,
    },
    /// The blobs of a pack's header do not fill the pack, or overlap.
    #[error("the header does not fit the pack")]
    Header,
    /// The header of the pack and the index differ about it.
    #[error("the header differs from the index")]
    IndexDiffers,
    /// The file is not there.
    #[error("missing")]
    Missing,
    /// A value out of its range.
    #[error("`{field}` is out of range")]
    OutOfRange {
        /// Which.
        field: &'static str,
    },
    /// The store could not read it.
    #[error("cannot be read")]
    Unreadable {
        /// What the store said.
        source: Box<BackendError>,
    },
}

impl From<serde_json::Error> for Defect {
    fn from(source: serde_json::Error) -> Self {
        Self::Json { source: Arc::new(source) }
    }
}
