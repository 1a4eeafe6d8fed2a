//! Overlays at rest, through `qemu-img`: made, written back, compared.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::capture::image::{Image, is_lock, qemu_img_within, stacked};
use crate::effect;
use crate::hypervisor::HypervisorError;

/// How long it may take to make an empty image.
const MAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long it may take to write one image into another, which both may have TiB.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

/// A file or block device of this host that is an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalImage {
    /// Where it lies.
    pub path: PathBuf,
    /// Its format, in QEMU's words.
    pub format: String,
}

impl LocalImage {
    /// The image for QEMU's tools.
    pub fn image(&self) -> Image {
        Image::local(&self.path, &self.format)
    }
}

/// Makes a file an empty qcow2 image of `size` bytes above another one. Opens neither that nor what lies
/// beneath it.
///
/// # Errors
/// [`HypervisorError::Tool`].
pub async fn make(overlay: &Path, base: &LocalImage, size: u64) -> Result<(), HypervisorError> {
    let step = format!("make the overlay {}", overlay.display());
    let (path, base_path) = (overlay.to_string_lossy(), base.path.to_string_lossy());
    let size = size.to_string();
    let above = ["-u", "-b", &base_path, "-F", &base.format];
    let arguments = [&["create", "-q", "-f", "qcow2"][..], &above, &[&path, &size]].concat();
    qemu_img_within(&step, &arguments, MAKE_TIMEOUT).await.map(drop)
}

/// Writes what the first of these images, from the top down, holds into the second; both keep it. Runs to
/// its end whatever becomes of us, and may be run again.
///
/// # Errors
/// [`HypervisorError::ImageInUse`], [`HypervisorError::Tool`].
pub async fn commit(chain: &[Image]) -> Result<(), HypervisorError> {
    let step = format!("commit {}", chain[0].place);
    effect::about_to("qemu-img: commit")
        .map_err(|source| HypervisorError::Host { step: step.clone(), source })?;
    let arguments = ["commit", "-q", "-d", &stacked(chain)];
    match qemu_img_within(&step, &arguments, COMMIT_TIMEOUT).await {
        Err(HypervisorError::Tool { words, .. }) if is_lock(&words) => {
            Err(HypervisorError::ImageInUse { image: chain[0].place.to_string() })
        }
        outcome => outcome.map(drop),
    }
}

/// Whether the first of these images, above the others, shows what these show alone.
///
/// # Errors
/// [`HypervisorError::Tool`].
pub async fn adds_nothing(chain: &[Image]) -> Result<bool, HypervisorError> {
    let step = format!("compare {} with what is beneath", chain[0].place);
    let [above, beneath] = [stacked(chain), stacked(&chain[1..])];
    let arguments = ["compare", "-q", "--force-share", &above, &beneath];
    match qemu_img_within(&step, &arguments, COMMIT_TIMEOUT).await {
        Ok(_) => Ok(true),
        // It differs without a word, and says what keeps it from telling.
        Err(HypervisorError::Tool { words, .. }) if words.is_empty() => Ok(false),
        Err(error) => Err(error),
    }
}
