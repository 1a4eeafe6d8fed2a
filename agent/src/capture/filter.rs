//! A point in time by our own `copy-before-write` filter between the guest's device and its image
//! (QEMU ≥ 7.1).
//!
//! `on-cbw-error: break-snapshot` makes a full or slow scratch the backup's problem, never the guest's.
//! The filter is built without its `bitmap` option, which would forbid reading beside the dirty parts.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::room::{Scratch, Watched};
use super::{
    add_export_bitmaps, add_exports, add_file_node, add_new_bitmaps, remove_export_bitmaps,
    remove_exports, remove_nodes, scratch_file, scratch_folder,
};
use crate::hypervisor::monitor::{Monitor, Step};
use crate::hypervisor::{Care, Cut, Disk, Exports, HypervisorError};
use crate::journal::{DiskRecord, Recorded};

/// How long a guest's write may wait for its old block to be saved before the point in time is given
/// up in its favour, in seconds.
const WRITE_TIMEOUT_S: u32 = 1;

/// Adds scratch and filter of each disk, beside the guest's path to it, and begins the new bitmaps.
/// Returns the scratch of each, and watches the room beside it.
///
/// # Errors
/// The first step that failed; `release` takes away what was made.
pub async fn prepare(
    monitor: &Monitor,
    recorded: &Recorded,
    disks: &[Disk],
    scratch_dir: Option<&Path>,
) -> Result<Watched, HypervisorError> {
    let record = recorded.record();
    let mut scratch = Vec::new();
    for (names, disk) in record.disks.iter().zip(disks) {
        let file = scratch_file(scratch_folder(scratch_dir, disk), disk, disk.size)?;
        let step = || format!("keep the scratch file of `{}`", disk.target);
        let kept = file.try_clone();
        let kept = kept.map_err(|source| HypervisorError::Host { step: step(), source })?;
        scratch.push(Scratch { disk: disk.target.clone(), file: Arc::new(kept) });
        if let Some(low) = scratch.last().and_then(Scratch::low) {
            return Err(low.into());
        }
        add_file_node(monitor, record, &names.scratch, file).await?;
        let arguments = json!({
            "driver": "copy-before-write", "node-name": names.filter,
            "file": names.root, "target": names.scratch,
            "on-cbw-error": "break-snapshot", "cbw-timeout": WRITE_TIMEOUT_S,
            // What the guest discards still reaches its image.
            "discard": "unmap",
        });
        let what = format!("add a copy-before-write filter for `{}`", names.disk);
        monitor.run(Step::new(what, "blockdev-add", arguments)).await?;
    }
    add_new_bitmaps(monitor, record).await?;
    Watched::begin(scratch).map_err(|source| {
        let step = "start a thread that watches the room of the scratch".to_owned();
        HypervisorError::Host { step, source }
    })
}

/// Puts all filters below their devices in one instant.
///
/// With several disks the guest's processors stand still for it. All commands go to QEMU in one
/// write, `cont` among them, so that the guest goes on even if this process is stopped meanwhile; if
/// it is killed, the watchdog lets the guest go on.
///
/// # Errors
/// The first step that failed; `release` takes the filters out again.
pub async fn cut(monitor: &Monitor, recorded: &Recorded) -> Result<Cut, HypervisorError> {
    let record = recorded.record();
    let mut steps = Vec::new();
    if record.pauses {
        steps.push(Step::new("pause the guest", "stop", json!({})));
    }
    for disk in &record.disks {
        steps.push(set_drive(disk, &disk.filter));
    }
    if record.pauses {
        steps.push(Step::new("let the guest go on", "cont", json!({})));
    }
    let start = Instant::now();
    let time = Timestamp::now();
    monitor.run_all(steps).await?;
    Ok(Cut { time, pause: record.pauses.then(|| start.elapsed()) })
}

/// Adds the nodes that show the point in time, and exports them.
///
/// The exports are writable only so that TRIM can release what was read from the scratch; QEMU
/// refuses writes to the node.
///
/// # Errors
/// The first step that failed; `release` takes away what was made.
pub async fn export(
    monitor: &Monitor,
    recorded: &Recorded,
    run_dir: &Path,
    care: impl Fn(usize) -> Care,
) -> Result<Exports, HypervisorError> {
    for disk in &recorded.record().disks {
        let arguments = json!({
            "driver": "snapshot-access", "node-name": disk.snapshot, "file": disk.filter,
            "discard": "unmap",
        });
        let what = format!("show the point in time of `{}`", disk.disk);
        monitor.run(Step::new(what, "blockdev-add", arguments)).await?;
    }
    add_export_bitmaps(monitor, recorded.record()).await?;
    add_exports(monitor, recorded, run_dir, true, care).await
}

/// Asks whether each filter still stands where it was put. One that broke fails reads by itself.
///
/// # Errors
/// [`HypervisorError::PointInTimeLost`].
pub async fn confirm(monitor: &Monitor, recorded: &Recorded) -> Result<(), HypervisorError> {
    let exports = monitor.exports().await?;
    for disk in &recorded.record().disks {
        let lost = |what: &str| {
            Err(HypervisorError::PointInTimeLost { disk: disk.disk.clone(), what: what.into() })
        };
        if current_root(monitor, disk).await?.as_deref() != Some(&disk.filter) {
            return lost("its filter was taken out");
        }
        if !exports.contains(&disk.snapshot) {
            return lost("its export is gone");
        }
    }
    Ok(())
}

/// Takes away exports, nodes and copied bitmaps, whatever of them exists.
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
    for disk in &record.disks {
        remove_nodes(monitor, &[&disk.snapshot]).await?;
        if current_root(monitor, disk).await?.as_deref() == Some(&disk.filter) {
            monitor.run(set_drive(disk, &disk.root)).await?;
        }
        remove_nodes(monitor, &[&disk.filter, &disk.scratch]).await?;
    }
    monitor.forget_files(record.run.as_str()).await?;
    remove_export_bitmaps(monitor, record).await
}

fn set_drive(disk: &DiskRecord, node: &str) -> Step {
    let what = format!("attach `{}` to the node `{node}`", disk.disk);
    let arguments = json!({"path": disk.device, "property": "drive", "value": node});
    Step::new(what, "qom-set", arguments)
}

/// The node that a disk's device uses now; `None` where the device is gone.
async fn current_root(
    monitor: &Monitor,
    disk: &DiskRecord,
) -> Result<Option<String>, HypervisorError> {
    let devices: Vec<Value> = monitor.query("query-block", json!({})).await?;
    let id = disk.device.strip_prefix("/machine/peripheral/").unwrap_or(&disk.device);
    let device = devices.iter().find(|device| {
        device["qdev"].as_str().is_some_and(|qdev| qdev == disk.device || qdev == id)
    });
    Ok(device.and_then(|device| device["inserted"]["node-name"].as_str()).map(str::to_owned))
}
