//! Whether a folder of images is what its record says: files, checksums, headers, tables.
//!
//! Nothing opens an image before its header was looked at.

use std::io;
use std::ops::Range;

use crate::copy::{self, Tables};
use crate::error::ImageError;
use crate::folder::Image;
use crate::inspect::{self, Format, InspectError, Policy};
use crate::record::{DiskFile, OtherFile};
use crate::sums;
use crate::tool::ToolError;

/// The longest file that is no disk; kernels and initrds are the longest.
const FILE_LEN_MAX: u64 = 1 << 30;

/// What is wrong with a file of an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// It is not there.
    #[error("it is missing")]
    Missing,
    /// It is not as long as it was.
    #[error("it has {len} bytes instead of {expected}")]
    Length {
        /// Its length in bytes.
        len: u64,
        /// What the record says.
        expected: u64,
    },
    /// Parts of it are not what they were.
    #[error("damaged: {}", in_words(.ranges))]
    Damaged {
        /// Ranges of bytes.
        ranges: Vec<Range<u64>>,
    },
    /// It is not what it was.
    #[error("its content is another one")]
    Digest,
    /// Its header is not to be trusted.
    #[error("no tool shall open it: {0}")]
    Header(InspectError),
    /// It has another disk in it.
    #[error("a guest sees {size} bytes instead of {expected}")]
    Size {
        /// Bytes that a guest sees.
        size: u64,
        /// What the record says.
        expected: u64,
    },
    /// Its tables are wrong.
    #[error("{} of its tables' entries are wrong", .0.wrong)]
    Tables(Tables),
    /// A tool could not read it.
    #[error("{0}")]
    Tool(ToolError),
}

fn in_words(ranges: &[Range<u64>]) -> String {
    const SHOWN_MAX: usize = 8;
    let show = |range: &Range<u64>| format!("bytes {} to {}", range.start, range.end);
    let mut words: Vec<_> = ranges.iter().take(SHOWN_MAX).map(show).collect();
    if ranges.len() > SHOWN_MAX {
        words.push(format!("and {} more", ranges.len() - SHOWN_MAX));
    }
    words.join(", ")
}

/// Checks a disk against the image's record: its length and header, then every byte, then what QEMU's tools
/// say of its tables. `progress` gets the bytes that were read each time.
///
/// # Errors
/// [`ImageError`] where it cannot be told; what is wrong with the disk is no error.
pub async fn disk(
    image: &Image,
    disk: &DiskFile,
    progress: impl FnMut(u64) + Send + 'static,
) -> Result<Vec<Problem>, ImageError> {
    let path = image.record().disk_path(image.folder(), disk);
    let file = match image.open_file(&disk.file) {
        Err(error) if is_missing(&error) => return Ok(vec![Problem::Missing]),
        file => file?,
    };
    let mut problems = Vec::new();
    let len = file.metadata().map_err(ImageError::file("look at", &path))?.len();
    if len != disk.file_len {
        problems.push(Problem::Length { len, expected: disk.file_len });
    }
    let mut safe = None;
    match inspect::inspect(&path, Format::Qcow2, &Policy::default()) {
        Ok(inspected) if inspected.size != disk.size => {
            problems.push(Problem::Size { size: inspected.size, expected: disk.size });
        }
        Ok(inspected) => safe = Some(inspected.bounds()),
        Err(ImageError::Refused { source, .. }) => problems.push(Problem::Header(source)),
        Err(error) => return Err(error),
    }
    let (sums, file_len) = (disk.sums.clone(), disk.file_len);
    let check = move || sums::check(file, &sums, file_len, progress);
    let ranges = tokio::task::spawn_blocking(check)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)));
    let ranges = ranges.map_err(ImageError::file("read", &path))?;
    if !ranges.is_empty() {
        problems.push(Problem::Damaged { ranges });
    }
    if let Some(bounds) = safe {
        match copy::check_tables(&path, bounds).await {
            Ok(tables) if tables.wrong > 0 => problems.push(Problem::Tables(tables)),
            Ok(_) => {}
            Err(ImageError::Tool(error @ ToolError::Failed { .. })) => {
                problems.push(Problem::Tool(error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(problems)
}

/// Makes sure that an image is what its record says before something is made of it.
///
/// # Errors
/// [`ImageError::Damaged`] with the first problem; [`ImageError`] where it cannot be told.
pub async fn all_sound(
    image: &Image,
    progress: impl Fn(u64) + Clone + Send + 'static,
) -> Result<(), ImageError> {
    let mut problems = Vec::new();
    for one in &image.record().disks {
        let progress = progress.clone();
        let found = disk(image, one, progress).await?;
        problems.extend(found.into_iter().map(|problem| (&one.file, problem)));
    }
    for one in &image.record().files {
        problems.extend(other(image, one)?.into_iter().map(|problem| (&one.file, problem)));
    }
    match problems.first() {
        None => Ok(()),
        Some((file, problem)) => {
            let (path, problem) = (image.folder().join(file), problem.to_string());
            Err(ImageError::Damaged { path, problem })
        }
    }
}

/// Checks a file that is no disk against the image's record.
///
/// # Errors
/// As [`disk`].
pub fn other(image: &Image, other: &OtherFile) -> Result<Vec<Problem>, ImageError> {
    let path = image.folder().join(&other.file);
    let file = match image.open_file(&other.file) {
        Err(error) if is_missing(&error) => return Ok(vec![Problem::Missing]),
        file => file?,
    };
    let len = file.metadata().map_err(ImageError::file("look at", &path))?.len();
    if len > FILE_LEN_MAX {
        return Ok(vec![Problem::Length { len, expected: FILE_LEN_MAX }]);
    }
    let found = sums::make(file, len, |_| {}).map_err(ImageError::file("read", path))?;
    Ok(match found.sha256 == other.sha256 {
        true => Vec::new(),
        false => vec![Problem::Digest],
    })
}

fn is_missing(error: &ImageError) -> bool {
    matches!(error, ImageError::File { source, .. } if source.kind() == io::ErrorKind::NotFound)
}
