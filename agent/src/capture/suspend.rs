//! A point in time of a guest that stands still: its images as its own QEMU shows them, exported while
//! nobody writes to them.
//!
//! It needs neither room nor a filter. Should anybody let the guest go on meanwhile, or should anything
//! else write to an image, the point in time is lost: a dirty bitmap that begins in the pause tells.

use std::path::Path;
use std::time::Instant;

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

use super::{
    add_export_bitmaps, add_exports, add_new_bitmaps, remove_bitmaps, remove_export_bitmaps,
    remove_exports,
};
use crate::hypervisor::monitor::{Monitor, Step};
use crate::hypervisor::{Care, Cut, Exports, HypervisorError};
use crate::journal::{DiskRecord, Recorded};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Node {
    node_name: String,
    #[serde(default)]
    dirty_bitmaps: Vec<NodeBitmap>,
}

#[derive(Deserialize)]
struct NodeBitmap {
    name: Option<String>,
    count: u64,
}

/// Pauses the guest, unless somebody has already, and begins the new bitmaps and those that tell of
/// writes.
///
/// # Errors
/// The first step that failed; `release` lets the guest go on.
pub async fn cut(monitor: &Monitor, recorded: &Recorded) -> Result<Cut, HypervisorError> {
    let record = recorded.record();
    let start = Instant::now();
    if record.pauses {
        // QEMU waits for the guest's requests and flushes all images before it answers.
        monitor.run(Step::new("pause the guest", "stop", json!({}))).await?;
    }
    let time = Timestamp::now();
    add_new_bitmaps(monitor, record).await?;
    for disk in &record.disks {
        let what = format!("watch for writes to `{}`", disk.disk);
        let arguments = json!({"node": disk.format, "name": disk.scratch, "persistent": false});
        monitor.run(Step::new(what, "block-dirty-bitmap-add", arguments)).await?;
    }
    Ok(Cut { time, pause: record.pauses.then(|| start.elapsed()) })
}

/// Exports the images, read-only.
///
/// # Errors
/// The first step that failed; `release` takes away what was made.
pub async fn export(
    monitor: &Monitor,
    recorded: &Recorded,
    run_dir: &Path,
) -> Result<Exports, HypervisorError> {
    add_export_bitmaps(monitor, recorded.record()).await?;
    add_exports(monitor, recorded, run_dir, false, |_| Care::None).await
}

/// Makes sure that the guest still stands, and that nobody has written to its images.
///
/// # Errors
/// [`HypervisorError::GuestGoesOn`], [`HypervisorError::PointInTimeLost`].
pub async fn confirm(monitor: &Monitor, recorded: &Recorded) -> Result<(), HypervisorError> {
    let disks = &recorded.record().disks;
    let lost = |disk: &DiskRecord, what: &str| {
        Err(HypervisorError::PointInTimeLost { disk: disk.disk.clone(), what: what.into() })
    };
    if monitor.guest_runs().await? {
        return Err(HypervisorError::GuestGoesOn);
    }
    let nodes: Vec<Node> = monitor.query("query-named-block-nodes", json!({})).await?;
    for disk in disks {
        let of_disk = nodes.iter().filter(|node| node.node_name == disk.format);
        let bitmap = of_disk
            .flat_map(|node| &node.dirty_bitmaps)
            .find(|bitmap| bitmap.name.as_ref() == Some(&disk.scratch));
        match bitmap {
            Some(bitmap) if bitmap.count == 0 => {}
            Some(_) => return lost(disk, "it was written to while it was read"),
            None => return lost(disk, "nothing tells any more whether it was written to"),
        }
    }
    Ok(())
}

/// Takes away exports and bitmaps, whatever of them exists. The guest goes on already.
///
/// # Errors
/// The first step that failed. Calling it again goes on from there.
pub async fn release(
    monitor: &Monitor,
    recorded: &Recorded,
    run_dir: &Path,
) -> Result<(), HypervisorError> {
    let record = recorded.record();
    remove_exports(monitor, record, run_dir).await?;
    let watching = |disk: &DiskRecord| (disk.format.clone(), disk.scratch.clone());
    remove_bitmaps(monitor, &record.disks.iter().map(watching).collect::<Vec<_>>()).await?;
    remove_export_bitmaps(monitor, record).await
}
