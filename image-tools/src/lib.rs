//! Image files at rest: what their headers may say, checksummed copies, templates for disaster recovery,
//! and guest file systems, which only an appliance touches.
//!
//! This crate knows no domain and no repository. A guest's bytes are never parsed outside the appliance,
//! a format is never guessed, and no image is opened for writing but those made here.

pub mod appliance;
pub mod fit;
pub mod flavour;
pub mod fstab;
pub mod record;
pub mod rsync;
pub mod update;
