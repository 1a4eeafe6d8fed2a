//! A point in time by the filter that is implicit in a backup job (QEMU before 7.1).
//!
//! Its scratch breaks guest writes when it is full, so its room is reserved before the start. Its
//! export shows the live disk when the job dies, so `confirm` asks for the very same job.

use std::fs::File;
use std::path::Path;

use jiff::Timestamp;
use nix::fcntl::{FallocateFlags, fallocate};
use serde::Deserialize;
use serde_json::json;

use super::{
    add_export_bitmaps, add_exports, add_file_node, add_new_bitmaps, remove_export_bitmaps,
    remove_exports, remove_nodes, scratch_file, scratch_folder,
};
use crate::hypervisor::monitor::{Monitor, Step};
use crate::hypervisor::{Care, Cut, Disk, Exports, HypervisorError};
use crate::journal::{DiskRecord, Recorded};

/// Room for qcow2's tables beside the data: 1/256 covers L2 tables and refcounts of 64 KiB clusters
/// many times over, and 4 MiB the rest.
const TABLES_FRACTION: u64 = 256;
const TABLES_LEN: u64 = 4 << 20;
const JOB_POLL: std::time::Duration = std::time::Duration::from_millis(20);
const JOB_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

#[derive(Debug, Deserialize)]
struct Job {
    id: String,
    status: String,
    error: Option<String>,
}

/// Makes a qcow2 scratch for each disk, its room reserved, and begins the new bitmaps.
///
/// # Errors
/// The first step that failed; `release` takes away what was made.
pub async fn prepare(
    monitor: &Monitor,
    recorded: &Recorded,
    disks: &[Disk],
    scratch_dir: Option<&Path>,
) -> Result<(), HypervisorError> {
    let record = recorded.record();
    for (names, disk) in record.disks.iter().zip(disks) {
        let folder = scratch_folder(scratch_dir, disk);
        let file = scratch_file(folder, disk, 0)?;
        reserve(&file, disk, folder, scratch_len(disk.size))?;
        add_file_node(monitor, record, &names.filter, file).await?;
        create_qcow2(monitor, names, disk.size).await?;
        let arguments = json!({
            "driver": "qcow2", "node-name": names.snapshot, "file": names.filter,
            "backing": names.root,
        });
        let what = format!("add the scratch of `{}`", names.disk);
        monitor.run(Step::new(what, "blockdev-add", arguments)).await?;
    }
    add_new_bitmaps(monitor, record).await
}

/// Starts all jobs in one transaction.
///
/// # Errors
/// QEMU's refusal; none of the jobs runs then.
pub async fn cut(monitor: &Monitor, recorded: &Recorded) -> Result<Cut, HypervisorError> {
    let backup = |disk: &DiskRecord| {
        json!({"type": "blockdev-backup", "data": {
            "job-id": job_id(disk), "device": disk.root, "target": disk.snapshot, "sync": "none",
        }})
    };
    let actions: Vec<_> = recorded.record().disks.iter().map(backup).collect();
    let time = Timestamp::now();
    let what = "start the backup jobs";
    monitor.run(Step::new(what, "transaction", json!({"actions": actions}))).await?;
    Ok(Cut { time, pause: None })
}

/// Exports the scratch over the live disk, which together show the point in time.
///
/// # Errors
/// The first step that failed; `release` takes away what was made.
pub async fn export(
    monitor: &Monitor,
    recorded: &Recorded,
    run_dir: &Path,
) -> Result<Exports, HypervisorError> {
    add_export_bitmaps(monitor, recorded.record()).await?;
    add_exports(monitor, recorded, run_dir, false, |_| Care::Twice).await
}

/// Asks whether each job still runs and has no error.
///
/// # Errors
/// [`HypervisorError::PointInTimeLost`].
pub async fn confirm(monitor: &Monitor, recorded: &Recorded) -> Result<(), HypervisorError> {
    let jobs: Vec<Job> = monitor.query("query-jobs", json!({})).await?;
    for disk in &recorded.record().disks {
        let what = match jobs.iter().find(|job| job.id == job_id(disk)) {
            Some(Job { error: Some(error), .. }) => error.clone(),
            Some(job) if job.status == "running" => continue,
            Some(job) => format!("its job is {}", job.status),
            None => "its job has ended".to_owned(),
        };
        return Err(HypervisorError::PointInTimeLost { disk: disk.disk.clone(), what });
    }
    Ok(())
}

/// Takes away exports, jobs, scratch and copied bitmaps, whatever of them exists.
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
        end_job(monitor, job_id(disk)).await?;
        end_job(monitor, &disk.scratch).await?;
        remove_nodes(monitor, &[&disk.snapshot, &disk.filter]).await?;
    }
    monitor.forget_files(record.run.as_str()).await?;
    remove_export_bitmaps(monitor, record).await
}

fn job_id(disk: &DiskRecord) -> &str {
    disk.job.as_deref().unwrap_or(&disk.snapshot)
}

/// The most that the scratch of a disk of `size` bytes can come to hold, in bytes.
pub fn scratch_len(size: u64) -> u64 {
    size.saturating_add(size / TABLES_FRACTION + TABLES_LEN)
}

/// Reserves `len` bytes for the scratch of a disk.
///
/// # Errors
/// [`HypervisorError::Host`] when the file system has no such room.
pub fn reserve(file: &File, disk: &Disk, folder: &Path, len: u64) -> Result<(), HypervisorError> {
    let step = || {
        let (target, folder) = (&disk.target, folder.display());
        format!("reserve {} MiB for the scratch of `{target}` in {folder}", len >> 20)
    };
    let host = |source| HypervisorError::Host { step: step(), source };
    let len_signed =
        i64::try_from(len).map_err(|_| host(std::io::ErrorKind::FileTooLarge.into()))?;
    fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, len_signed)
        .map_err(|errno| host(errno.into()))
}

/// Has QEMU write an empty qcow2 image into the scratch file.
async fn create_qcow2(
    monitor: &Monitor,
    names: &DiskRecord,
    size: u64,
) -> Result<(), HypervisorError> {
    let arguments = json!({"job-id": names.scratch, "options": {
        "driver": "qcow2", "file": names.filter, "size": size,
    }});
    let what = format!("make the scratch of `{}`", names.disk);
    monitor.run(Step::new(what, "blockdev-create", arguments)).await?;
    let start = std::time::Instant::now();
    loop {
        let jobs: Vec<Job> = monitor.query("query-jobs", json!({})).await?;
        match jobs.into_iter().find(|job| job.id == names.scratch) {
            Some(Job { status, error, .. }) if status == "concluded" => {
                let dismiss = json!({"id": names.scratch});
                monitor.run(Step::new("dismiss a job", "job-dismiss", dismiss)).await?;
                return match error {
                    None => Ok(()),
                    Some(error) => Err(HypervisorError::Host {
                        step: format!("make the scratch of `{}`", names.disk),
                        source: std::io::Error::other(error),
                    }),
                };
            }
            _ if start.elapsed() > JOB_TIMEOUT => {
                let what = format!("the job `{}`", names.scratch);
                return Err(HypervisorError::StillInUse { what, waited: JOB_TIMEOUT });
            }
            _ => tokio::time::sleep(JOB_POLL).await,
        }
    }
}

/// Ends a job, where it exists, and waits until it is gone.
async fn end_job(monitor: &Monitor, id: &str) -> Result<(), HypervisorError> {
    let start = std::time::Instant::now();
    loop {
        let jobs: Vec<Job> = monitor.query("query-jobs", json!({})).await?;
        let Some(job) = jobs.into_iter().find(|job| job.id == id) else { return Ok(()) };
        let (command, arguments) = match job.status.as_str() {
            "concluded" => ("job-dismiss", json!({"id": id})),
            _ => ("job-cancel", json!({"id": id})),
        };
        match monitor.run(Step::new("end a job", command, arguments)).await {
            // It may have ended between the question and the command.
            Ok(_) | Err(HypervisorError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        if start.elapsed() > JOB_TIMEOUT {
            return Err(HypervisorError::StillInUse {
                what: format!("the job `{id}`"),
                waited: JOB_TIMEOUT,
            });
        }
        tokio::time::sleep(JOB_POLL).await;
    }
}
