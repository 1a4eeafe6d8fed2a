//! A point in time of disks on logical volumes, by LVM's snapshots: of a thin volume a thin one, of any
//! other one a classic one, which takes what the guest overwrites, up to its size.
//!
//! A classic snapshot that is full is invalid, and so is all that is read from it from then on. So its use
//! is watched while it is read, and looked at once more before what was read is called good.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::libc;
use serde::{Deserialize, Serialize};

use super::image::words;
use crate::effect;
use crate::hypervisor::HypervisorError;
use crate::names::{DiskName, RunId};

/// How long one of LVM's tools may take: it may wait for another one, and for the disks of the host.
const TOOL_TIMEOUT: Duration = Duration::from_secs(60);
/// How full, in percent, a snapshot or pool may become before the backup is given up.
const FULL_PERCENT: f64 = 90.0;
/// A classic snapshot takes this share of its volume unless told otherwise, and at least so many bytes.
const SIZE_FRACTION: u64 = 5;
const SIZE_MIN: u64 = 64 << 20;
/// How long a snapshot may stay in use after its reader was ended.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(10);
const REMOVE_POLL: Duration = Duration::from_millis(200);

/// A snapshot of a run; its undo record names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The volume group.
    pub group: String,
    /// The volume.
    pub volume: String,
    /// The snapshot.
    pub name: String,
}

impl Snapshot {
    /// Its device.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.group).join(&self.name)
    }

    fn full_name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    fn is(&self, volume: &Volume) -> bool {
        volume.group == self.group && volume.name == self.name && volume.origin == self.volume
    }
}

/// A logical volume, as `lvs` tells (lvs(8), lvmreport(7)).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Volume {
    #[serde(rename = "vg_name")]
    group: String,
    #[serde(rename = "lv_name")]
    name: String,
    #[serde(rename = "lv_attr")]
    attributes: String,
    #[serde(rename = "lv_size")]
    size: String,
    origin: String,
    #[serde(rename = "pool_lv")]
    pool: String,
    data_percent: String,
    metadata_percent: String,
    #[serde(rename = "lv_kernel_major")]
    major: String,
    #[serde(rename = "lv_kernel_minor")]
    minor: String,
}

const FIELDS: &str = "vg_name,lv_name,lv_attr,lv_size,origin,pool_lv,data_percent,metadata_percent,\
                      lv_kernel_major,lv_kernel_minor";

#[derive(Deserialize)]
struct Report {
    report: Vec<Volumes>,
}

#[derive(Deserialize)]
struct Volumes {
    #[serde(default)]
    lv: Vec<Volume>,
}

impl Volume {
    /// Of the fifth letter of the attributes: the states `I`, `S` (invalid) and `m`, `M` (failed merge).
    fn is_invalid(&self) -> bool {
        self.attributes.chars().nth(4).is_some_and(|state| "ISmM".contains(state))
    }

    fn fullness(&self) -> f64 {
        let percent = |text: &str| text.parse::<f64>().unwrap_or(0.0);
        percent(&self.data_percent).max(percent(&self.metadata_percent))
    }

    /// A snapshot of it for a run.
    pub fn snapshot(&self, run: &RunId, index: usize) -> Snapshot {
        Snapshot {
            group: self.group.clone(),
            volume: self.name.clone(),
            name: format!("kvmsnap-{run}-{index}"),
        }
    }

    /// The size in bytes of a classic snapshot of it, unless one is asked for.
    fn snapshot_size(&self) -> u64 {
        let size: u64 = self.size.parse().unwrap_or(0);
        (size / SIZE_FRACTION).max(SIZE_MIN)
    }
}

/// All logical volumes of this host.
///
/// # Errors
/// [`HypervisorError::Tool`] and what [`tool`] says.
pub async fn volumes() -> Result<Vec<Volume>, HypervisorError> {
    let arguments = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", FIELDS];
    read(&tool("lvs", "list the logical volumes", &arguments).await?)
}

fn read(text: &[u8]) -> Result<Vec<Volume>, HypervisorError> {
    let report: Report = serde_json::from_slice(text)
        .map_err(|source| HypervisorError::Reply { command: "lvs".to_owned(), source })?;
    Ok(report.report.into_iter().flat_map(|volumes| volumes.lv).collect())
}

/// The volume that a disk's image is, whatever the path names it.
///
/// # Errors
/// [`HypervisorError::NoVolume`].
pub fn of_image(
    volumes: &[Volume],
    disk: &DiskName,
    image: Option<&Path>,
) -> Result<Volume, HypervisorError> {
    let none = || HypervisorError::NoVolume { disk: disk.clone() };
    let meta = image.and_then(|image| std::fs::metadata(image).ok()).ok_or_else(none)?;
    if !meta.file_type().is_block_device() {
        return Err(none());
    }
    let device = [libc::major(meta.rdev()), libc::minor(meta.rdev())].map(|n| n.to_string());
    let is_it = |volume: &&Volume| [&volume.major, &volume.minor] == [&device[0], &device[1]];
    volumes.iter().find(is_it).cloned().ok_or_else(none)
}

/// Makes the snapshots, of each volume one; thin ones of thin volumes, else classic ones of `size` bytes.
///
/// # Errors
/// [`HypervisorError::Tool`]; [`remove`] takes away what was made.
pub async fn create(
    snapshots: &[Snapshot],
    volumes: &[Volume],
    size: Option<u64>,
) -> Result<(), HypervisorError> {
    for (snapshot, volume) in snapshots.iter().zip(volumes) {
        let origin = format!("{}/{}", volume.group, volume.name);
        // Thin snapshots are left alone at a start of the host unless told otherwise; ours is used now.
        let room = match volume.pool.is_empty() {
            true => {
                vec!["--size".to_owned(), format!("{}b", size.unwrap_or(volume.snapshot_size()))]
            }
            false => vec!["--setactivationskip".to_owned(), "n".to_owned()],
        };
        let mut arguments =
            vec!["--yes", "--snapshot", "--permission", "r", "--name", snapshot.name.as_str()];
        arguments.extend(room.iter().map(String::as_str));
        arguments.push(&origin);
        let step = format!("make a snapshot of {origin}");
        announced("lvcreate", &step)?;
        tool("lvcreate", &step, &arguments).await?;
    }
    Ok(())
}

/// Says when a snapshot has become too full, or is no longer what it was.
///
/// # Errors
/// [`HypervisorError::SnapshotFull`], [`HypervisorError::PointInTimeLost`].
pub fn check(disks: &[(&DiskName, &Snapshot)], volumes: &[Volume]) -> Result<(), HypervisorError> {
    for (disk, snapshot) in disks {
        let lost = |what: &str| HypervisorError::PointInTimeLost {
            disk: (*disk).clone(),
            what: what.to_owned(),
        };
        let found = volumes.iter().find(|volume| snapshot.is(volume));
        let found = found.ok_or_else(|| lost("its LVM snapshot is gone"))?;
        let full = |percent: f64| HypervisorError::SnapshotFull {
            disk: (*disk).clone(),
            what: snapshot.full_name(),
            percent: percent as u8,
        };
        if found.is_invalid() {
            return Err(full(100.0));
        }
        // Of a thin snapshot it is the pool that runs full, under its volume and the guest too.
        let is_pool = |volume: &&Volume| volume.group == found.group && volume.name == found.pool;
        let filled = match found.pool.is_empty() {
            true => found.fullness(),
            false => volumes.iter().find(is_pool).map_or(0.0, Volume::fullness),
        };
        if filled >= FULL_PERCENT {
            return Err(full(filled));
        }
    }
    Ok(())
}

/// Removes the snapshots, whatever of them exists.
///
/// # Errors
/// [`HypervisorError::Tool`]. Calling it again goes on from there.
pub async fn remove(snapshots: &[Snapshot]) -> Result<(), HypervisorError> {
    if snapshots.is_empty() {
        return Ok(());
    }
    let start = Instant::now();
    while snapshots.iter().any(is_being_made) && start.elapsed() < TOOL_TIMEOUT {
        tokio::time::sleep(REMOVE_POLL).await;
    }
    let volumes = volumes().await?;
    for snapshot in snapshots.iter().filter(|ours| volumes.iter().any(|known| ours.is(known))) {
        let (name, start) = (snapshot.full_name(), Instant::now());
        let step = format!("remove the snapshot {name}");
        announced("lvremove", &step)?;
        loop {
            match tool("lvremove", &step, &["--yes", &name]).await {
                // Its reader was ended, and is about to be gone.
                Err(HypervisorError::Tool { .. }) if start.elapsed() < REMOVE_TIMEOUT => {
                    tokio::time::sleep(REMOVE_POLL).await;
                }
                removed => break removed.map(drop)?,
            }
        }
    }
    Ok(())
}

/// Whether the `lvcreate` of a run that was killed is still at it: nobody stops it, for that could leave
/// the volume suspended.
fn is_being_made(snapshot: &Snapshot) -> bool {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut lines = processes.filter_map(|it| std::fs::read(it.path().join("cmdline")).ok());
    let name = snapshot.name.as_bytes();
    lines.any(|line| {
        let mut words = line.split(|byte| *byte == 0);
        words.next().is_some_and(|tool| tool.ends_with(b"lvcreate")) && words.any(|it| it == name)
    })
}

fn announced(name: &'static str, step: &str) -> Result<(), HypervisorError> {
    effect::about_to(&format!("lvm: {name}"))
        .map_err(|source| HypervisorError::Host { step: step.to_owned(), source })
}

/// Runs one of LVM's tools and returns its output. What it has begun it ends, whatever becomes of us.
async fn tool(
    tool: &'static str,
    step: &str,
    arguments: &[&str],
) -> Result<Vec<u8>, HypervisorError> {
    let host = |source| HypervisorError::Host { step: format!("{step} with `{tool}`"), source };
    let mut command = tokio::process::Command::new(tool);
    command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).process_group(0);
    // Else it complains of every descriptor that it did not open.
    command.env("LVM_SUPPRESS_FD_WARNINGS", "1");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let running = command.spawn().map_err(host)?.wait_with_output();
    let output = tokio::time::timeout(TOOL_TIMEOUT, running).await.map_err(|_| {
        let what = format!("{tool}, asked to {step},");
        HypervisorError::StillInUse { what, waited: TOOL_TIMEOUT }
    })?;
    let output = output.map_err(host)?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => {
            let (step, words) = (step.to_owned(), words(tool, &output.stderr));
            Err(HypervisorError::Tool { tool, step, words })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As LVM 2.03.16 prints it.
    const TOLD: &[u8] = br#"{"report": [{"lv": [
        {"vg_name":"vg", "lv_name":"lv", "lv_attr":"owi-a-s---", "lv_size":"67108864", "origin":"",
         "pool_lv":"", "data_percent":"", "metadata_percent":"", "lv_kernel_major":"253",
         "lv_kernel_minor":"0"},
        {"vg_name":"vg", "lv_name":"kvmsnap-0123456789abcdef-0", "lv_attr":"sri-a-s---",
         "lv_size":"8388608", "origin":"lv", "pool_lv":"", "data_percent":"50.29",
         "metadata_percent":"", "lv_kernel_major":"253", "lv_kernel_minor":"3"},
        {"vg_name":"vg", "lv_name":"pool", "lv_attr":"twi-aotz--", "lv_size":"67108864", "origin":"",
         "pool_lv":"", "data_percent":"12.00", "metadata_percent":"10.94", "lv_kernel_major":"253",
         "lv_kernel_minor":"5"},
        {"vg_name":"vg", "lv_name":"thin-snapshot", "lv_attr":"Vri-a-tz--", "lv_size":"134217728",
         "origin":"thin", "pool_lv":"pool", "data_percent":"99.00", "metadata_percent":"",
         "lv_kernel_major":"253", "lv_kernel_minor":"6"}
    ]}]}"#;

    fn snapshot(volume: &str, name: &str) -> Snapshot {
        Snapshot { group: "vg".into(), volume: volume.into(), name: name.into() }
    }

    fn checked(snapshot: &Snapshot, volumes: &[Volume]) -> Result<(), HypervisorError> {
        check(&[(&"vda".parse().unwrap(), snapshot)], volumes)
    }

    #[test]
    fn p1_a_snapshot_that_is_full_invalid_or_gone_is_not_called_good() {
        let ours = snapshot("lv", "kvmsnap-0123456789abcdef-0");
        let mut volumes = read(TOLD).unwrap();
        checked(&ours, &volumes).unwrap();
        volumes[1].attributes = "sri-I-s---".into();
        let invalid = checked(&ours, &volumes);
        assert!(matches!(invalid, Err(HypervisorError::SnapshotFull { percent: 100, .. })));
        volumes[1].attributes = "sri-a-s---".into();
        volumes[1].data_percent = "90.01".into();
        let full = checked(&ours, &volumes);
        assert!(matches!(full, Err(HypervisorError::SnapshotFull { percent: 90, .. })));
        let gone = |checked| matches!(checked, Err(HypervisorError::PointInTimeLost { .. }));
        assert!(gone(checked(&snapshot("other", "kvmsnap-0123456789abcdef-0"), &volumes)));
        assert!(gone(checked(&ours, &volumes[..1])));
    }

    #[test]
    fn p2_of_a_thin_snapshot_the_pool_is_what_runs_full() {
        let ours = snapshot("thin", "thin-snapshot");
        let mut volumes = read(TOLD).unwrap();
        checked(&ours, &volumes).unwrap();
        for (data, metadata) in [("95.00", "1.00"), ("1.00", "95.00")] {
            (volumes[2].data_percent, volumes[2].metadata_percent) = (data.into(), metadata.into());
            let full = checked(&ours, &volumes);
            assert!(matches!(full, Err(HypervisorError::SnapshotFull { percent: 95, .. })));
        }
    }

    #[test]
    fn what_is_no_report_is_an_error() {
        for text in [&b""[..], b"{}", b"[]", br#"{"report": [{"lv": [{"lv_name": 1}]}]}"#] {
            assert!(read(text).is_err());
        }
        assert_eq!(read(br#"{"report": [{"lv": []}]}"#).unwrap(), []);
    }
}
