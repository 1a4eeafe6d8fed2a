//! `[domain."web-*"]`: how domains are backed up, by hand as well as by `kvmsnap run`.

use std::path::PathBuf;

use serde::Deserialize;

use super::value::{Length, Size};
use crate::method::Wanted;
use crate::names::DiskName;
use crate::quiesce::Mode;
use crate::quiesce::application::Applications;
use crate::quiesce::database::Database;
use crate::quiesce::hook::Hook;

/// Settings of the domains that a name or pattern means. What is not set is left to a vaguer pattern.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Domain {
    /// Only these disks.
    pub disks: Option<Vec<DiskName>>,
    /// Not these disks.
    pub exclude_disks: Option<Vec<DiskName>>,
    /// How the point in time is taken.
    pub method: Option<Wanted>,
    /// How changes are tracked from one backup to the next.
    pub tracking: Option<TrackHow>,
    /// Whether file systems are frozen.
    pub quiesce: Option<Mode>,
    /// Bytes a second that are read at most.
    pub limit_read: Option<Size>,
    /// Where old blocks are saved while they are read.
    pub scratch_dir: Option<PathBuf>,
    /// Where overlays go.
    pub overlay_dir: Option<PathBuf>,
    /// Servers that are flushed and locked for the point in time.
    pub database: Option<Vec<Database>>,
    /// Commands and scripts around it.
    pub hook: Option<Vec<Hook>>,
    /// Whether the guest discards what its file systems no longer use before.
    pub trim: Option<bool>,
    /// The monitor socket of a QEMU that no libvirt manages: it is backed up under this name.
    pub qmp: Option<PathBuf>,
    /// The socket of its guest agent.
    pub qga: Option<PathBuf>,
    /// How old its last good backup may be.
    pub max_age: Option<Length>,
    /// How many snapshots of it there must be at least.
    pub min_snapshots: Option<u32>,
}

/// How changes are tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrackHow {
    /// By dirty bitmaps, where the images keep them.
    Bitmap,
    /// By overlays that stay.
    Overlay,
}

impl Domain {
    /// These settings, and those of a vaguer pattern where there are none.
    pub fn or(self, vague: &Self) -> Self {
        let vague = vague.clone();
        Self {
            disks: self.disks.or(vague.disks),
            exclude_disks: self.exclude_disks.or(vague.exclude_disks),
            method: self.method.or(vague.method),
            tracking: self.tracking.or(vague.tracking),
            quiesce: self.quiesce.or(vague.quiesce),
            limit_read: self.limit_read.or(vague.limit_read),
            scratch_dir: self.scratch_dir.or(vague.scratch_dir),
            overlay_dir: self.overlay_dir.or(vague.overlay_dir),
            database: self.database.or(vague.database),
            hook: self.hook.or(vague.hook),
            trim: self.trim.or(vague.trim),
            qmp: self.qmp.or(vague.qmp),
            qga: self.qga.or(vague.qga),
            max_age: self.max_age.or(vague.max_age),
            min_snapshots: self.min_snapshots.or(vague.min_snapshots),
        }
    }

    /// Who is told of a point in time.
    pub fn applications(self) -> Applications {
        Applications {
            hooks: self.hook.unwrap_or_default(),
            databases: self.database.unwrap_or_default(),
            trim: self.trim.unwrap_or_default(),
        }
    }
}
