//! Why images at rest could not be used.

use std::io;
use std::path::PathBuf;

use crate::inspect::InspectError;
use crate::record::RecordError;
use crate::tool::ToolError;

/// Why images could not be read, made or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file or folder cannot be used.
    #[error("cannot {step} {}", .path.display())]
    File {
        /// The step, to be read after "cannot".
        step: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder has no record.
    #[error("{} is no folder with a machine's images", .folder.display())]
    NoImage {
        /// The folder.
        folder: PathBuf,
    },
    /// The image is away from its name, for its disks were being written when that was interrupted.
    #[error("an update of the image {} was interrupted", .path.display())]
    Interrupted {
        /// Where it belongs.
        path: PathBuf,
    },
    /// A template, or what is beside its disks, is damaged: what is made of it would be, too.
    #[error("{} is damaged: {problem}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The folder's record cannot be used.
    #[error("the record {} cannot be used", .path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// Why not.
        source: RecordError,
    },
    /// The last part of a path is no name for a folder of images.
    #[error("{:?} is no name for a folder of images", .path)]
    Name {
        /// The path.
        path: PathBuf,
    },
    /// What a record names, or a user, is a link, device or folder where a file is wanted.
    #[error("{} is no regular file", .path.display())]
    NoFile {
        /// What it is.
        path: PathBuf,
    },
    /// What QEMU's tools are told is text.
    #[error("the path {} is no UTF-8", .path.display())]
    NotUtf8 {
        /// The path.
        path: PathBuf,
    },
    /// An image that no tool shall open.
    #[error("the image {} is refused", .path.display())]
    Refused {
        /// The image.
        path: PathBuf,
        /// Why.
        source: InspectError,
    },
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A copy is not what it was made from.
    #[error("the copy {} differs from its source", .copy.display())]
    Differs {
        /// The copy.
        copy: PathBuf,
    },
    /// Something has the name already.
    #[error("{} exists already", .path.display())]
    Exists {
        /// What exists.
        path: PathBuf,
    },
    /// Another process makes or changes it.
    #[error("another process is writing to {}", .path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
}

impl ImageError {
    /// For `map_err`: a step that failed on a file or folder.
    pub fn file(
        step: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> ImageError {
        let path = path.into();
        move |source| Self::File { step, path, source }
    }

    /// Whether the file system had no room left.
    pub fn is_full(&self) -> bool {
        let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        match self {
            Self::File { source, .. } => kinds.contains(&source.kind()),
            Self::Tool(ToolError::Failed { words, .. }) => {
                ["No space left", "Disk quota exceeded"].iter().any(|full| words.contains(full))
            }
            _ => false,
        }
    }
}
