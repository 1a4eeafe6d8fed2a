//! A sparse raw image.

use super::fill::Target;
use super::{RestoreError, resume};

/// Writes a disk to a file that is new or holds a part of it already.
pub(super) fn write(target: &Target<'_>) -> Result<(), RestoreError> {
    let place = |chunk| Some(target.reader.chunk_range(chunk).start);
    let there = resume::take_up(target, target.reader.size(), place, |_, _| ())?;
    target.fill(|chunk| !there.has(chunk), |offset| offset, |_, _| ())
}
