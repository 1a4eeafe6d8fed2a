//! An image's file systems are looked at in an appliance, on overlays that go with it.

use std::path::PathBuf;

use image_tools::ImageError;
use image_tools::appliance::Options;
use image_tools::compare::{self, Event, Request};
use image_tools::flavour::Flavour;
use image_tools::folder::Image;
use image_tools::private::PrivateFolder;

use super::update::{Layer, UpdateImageError, lay_over, while_there_is_room};

/// What is on an image's disks.
///
/// # Errors
/// [`UpdateImageError`].
pub async fn flavour(image: &Image, options: &Options) -> Result<Flavour, UpdateImageError> {
    let (_folder, layers) = throw_away(image).await?;
    let overlays = overlays(&layers);
    let look = image_tools::update::flavour(&overlays, options);
    while_there_is_room(None, look).await
}

/// Checks an image's file systems, or compares its files with a tree, as `request` says; what is found goes
/// to `on`.
///
/// # Errors
/// [`UpdateImageError`], where it cannot be told.
pub async fn examine(
    image: &Image,
    mut request: Request,
    on: impl FnMut(Event<'_>),
) -> Result<(), UpdateImageError> {
    let (_folder, layers) = throw_away(image).await?;
    request.drives = overlays(&layers);
    while_there_is_room(None, compare::compare(&request, on)).await
}

/// Overlays on an image's disks, in a folder that goes when it is dropped. They take little: the journals
/// of file systems that were in use.
async fn throw_away(image: &Image) -> Result<(PrivateFolder, Vec<Layer>), UpdateImageError> {
    let folder = PrivateFolder::new().map_err(ImageError::file("make", "a temporary folder"))?;
    let layers = lay_over(image, folder.path()).await?;
    Ok((folder, layers))
}

fn overlays(layers: &[Layer]) -> Vec<PathBuf> {
    layers.iter().map(|layer| layer.overlay.clone()).collect()
}
