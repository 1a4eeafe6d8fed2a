//! Deduplicated, compressed, encrypted store in the restic format, version 2.
//!
//! `docs/repository-format.md` says what is written where and in which order. Everything here is
//! synchronous and may be used from many threads; every effect on the store goes through [`Backend`].
//!
//! Writing: [`Repository::lock`], [`Repository::index`], [`Writer`], [`Repository::save_snapshot`].
//! Reading: [`Repository::index`], [`Reader`], [`DiskReader`].

mod backend;
mod blob;
mod check;
mod copy;
mod crypto;
mod disk;
mod error;
mod host;
mod id;
mod index;
mod key;
mod lock;
mod pack;
mod polynomial;
mod prune;
mod reader;
mod repair;
mod repository;
mod snapshot;
mod tree;
mod writer;

pub use self::{
    backend::{
        Access, Address, AddressError, Backend, BackendError, Begun, FileKind, FileRef,
        LocalFolder, Pace, RestServer, S3Address, S3Bucket, SftpAddress, SftpFolder,
    },
    check::{CheckOptions, CheckProgress, CheckReport, Problem, SnapshotRef},
    copy::{Copied, Copier, CopyProgress, ReadBack},
    disk::{DiskExtent, DiskReader, ExtentKind, Sweep},
    error::{Defect, RepositoryError},
    id::{BlobId, FileId, ParseIdError},
    index::{Index, Location},
    key::Kdf,
    lock::{AnnouncedLock, Lock, LockMode},
    pack::BlobKind,
    prune::{PruneOptions, PruneProgress, PruneReport},
    reader::Reader,
    repair::{RepairOptions, RepairProgress, RepairReport},
    repository::Repository,
    snapshot::{SnapshotFile, Snapshots},
    tree::{Node, NodeKind, Tree},
    writer::{Finished, Stored, Writer, WriterOptions, WriterStats},
};
