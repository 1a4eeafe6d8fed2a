//! Image files at rest: what their headers may say, checksummed copies, templates for disaster recovery,
//! and guest file systems, which only an appliance touches.
//!
//! This crate knows no domain and no repository. A guest's bytes are never parsed outside the appliance,
//! a format is never guessed, and no image is opened for writing but those made here.

pub mod appliance;
pub mod check;
pub mod compare;
pub mod copy;
pub mod error;
pub mod fit;
pub mod flavour;
pub mod folder;
pub mod fstab;
mod initramfs;
pub mod inspect;
pub mod private;
pub mod record;
pub mod rsync;
pub mod sums;
pub mod tool;
pub mod update;

pub use error::ImageError;
