//! `[domain."web-*"]`: how domains are backed up, by hand as well as by `kvmsnap run`.

use std::path::PathBuf;

use serde::Deserialize;

use super::value::Size;
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
        // So that none is forgotten.
        let Self { disks, exclude_disks, method, tracking, quiesce, limit_read, .. } =
            vague.clone();
        let Self { scratch_dir, overlay_dir, database, hook, trim, .. } = vague.clone();
        Self {
            disks: self.disks.or(disks),
            exclude_disks: self.exclude_disks.or(exclude_disks),
            method: self.method.or(method),
            tracking: self.tracking.or(tracking),
            quiesce: self.quiesce.or(quiesce),
            limit_read: self.limit_read.or(limit_read),
            scratch_dir: self.scratch_dir.or(scratch_dir),
            overlay_dir: self.overlay_dir.or(overlay_dir),
            database: self.database.or(database),
            hook: self.hook.or(hook),
            trim: self.trim.or(trim),
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
