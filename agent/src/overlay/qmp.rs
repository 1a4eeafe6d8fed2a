//! Overlays in a QEMU that nobody manages, through its monitor.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use qmp_client::QmpError;
use serde::Deserialize;
use serde_json::{Value, json};

use super::at_rest::LocalImage;
use super::files::is_same;
use super::record::{DiskRecord, Held};
use super::stall::{Bins, Series};
use super::{Chain, Layers, OverlayError, Written};
use crate::capture::node_name;
use crate::hypervisor::graph::{self, BASES_MAX, BlockDevice, Graph, Layer, NodeChain};
use crate::hypervisor::monitor::{ANSWER_TIMEOUT, Histogram, Monitor, Step};
use crate::hypervisor::{GuestIo, HypervisorError};
use crate::journal::Process;
use crate::names::DiskName;

/// How long QEMU may take to go on with another image, or to end a job.
const JOB_TIMEOUT: Duration = Duration::from_secs(60);
const JOB_POLL: Duration = Duration::from_millis(10);

/// One QEMU; `None` where it has ended.
#[derive(Debug)]
pub struct QmpLayers {
    monitor: Option<Monitor>,
}

/// A member of `query-jobs`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Job {
    id: String,
    status: String,
    #[serde(default)]
    current_progress: u64,
    #[serde(default)]
    total_progress: u64,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Status {
    running: bool,
    status: String,
}

impl QmpLayers {
    /// Reaches the QEMU at a socket. It has ended where nobody listens and its process, where that is
    /// known, is gone.
    ///
    /// # Errors
    /// [`HypervisorError::Monitor`].
    pub async fn connect(socket: &Path, known: Option<Process>) -> Result<Self, HypervisorError> {
        match Monitor::connect(socket, ANSWER_TIMEOUT).await {
            Err(HypervisorError::Monitor { source: QmpError::Connect { .. }, .. })
                if known.is_some_and(|process| !process.is_alive()) =>
            {
                Ok(Self { monitor: None })
            }
            connected => Ok(Self { monitor: Some(connected?) }),
        }
    }

    /// The QEMU of a monitor.
    pub fn of(monitor: Monitor) -> Self {
        Self { monitor: Some(monitor) }
    }

    /// A QEMU that has ended.
    pub fn ended() -> Self {
        Self { monitor: None }
    }

    /// Whether there is a QEMU.
    pub fn is_there(&self) -> bool {
        self.monitor.is_some()
    }

    fn monitor(&self) -> Result<&Monitor, HypervisorError> {
        let ended = || HypervisorError::NotRunning { domain: "QEMU".to_owned() };
        self.monitor.as_ref().ok_or_else(ended)
    }

    async fn node_chains(&self) -> Result<(Vec<NodeChain>, Graph), HypervisorError> {
        let monitor = self.monitor()?;
        let devices: Vec<BlockDevice> = monitor.query("query-block", json!({})).await?;
        let graph = monitor.graph().await?;
        Ok((graph::chains(&devices, &graph)?, graph))
    }

    /// The images of one disk; a device that is gone has none.
    async fn chain(&self, disk: &DiskRecord) -> Result<NodeChain, HypervisorError> {
        let (chains, _) = self.node_chains().await?;
        let found = chains.into_iter().find(|chain| chain.disk == disk.disk);
        found.ok_or_else(|| HypervisorError::PointInTimeLost {
            disk: disk.disk.clone(),
            what: "its device is gone".to_owned(),
        })
    }

    async fn job(&self, held: &Held, disk: &DiskRecord) -> Result<Option<Job>, HypervisorError> {
        let id = job_id(held, disk);
        let jobs: Vec<Job> = self.monitor()?.query("query-jobs", json!({})).await?;
        Ok(jobs.into_iter().find(|job| job.id == id))
    }

    /// Waits until a job has ended, and clears it away. Returns why it failed.
    async fn end(&self, held: &Held, disk: &DiskRecord) -> Result<Option<String>, HypervisorError> {
        let start = Instant::now();
        loop {
            let Some(job) = self.job(held, disk).await? else { return Ok(None) };
            if job.status == "concluded" {
                let dismiss = json!({"id": job.id});
                self.monitor()?.run(Step::new("clear a job away", "job-dismiss", dismiss)).await?;
                return Ok(job.error);
            }
            if start.elapsed() > JOB_TIMEOUT {
                let what = format!("the job `{}`", job.id);
                return Err(HypervisorError::StillInUse { what, waited: JOB_TIMEOUT });
            }
            tokio::time::sleep(JOB_POLL).await;
        }
    }
}

/// Where the bins begin and end that the guest's operations are sorted into, in nanoseconds: from one
/// millisecond to half a minute, each a fifth longer than the one before.
fn boundaries() -> impl Iterator<Item = u64> {
    std::iter::successors(Some(1_000_000), |bound| Some(bound / 5 * 6))
        .take_while(|bound| *bound < 36_000_000_000)
}

fn local(layer: Layer) -> LocalImage {
    LocalImage { path: layer.path, format: layer.format }
}

/// Whether the guest goes on with its base: a job that is not there may have ended otherwise, and have been
/// cleared away by somebody else.
fn went_on(ended: Option<String>, top: Option<&Path>, base: &Path) -> Result<(), String> {
    match (ended, top) {
        (None, Some(top)) if is_same(top, base) => Ok(()),
        (words, _) => Err(words.unwrap_or_else(|| "the guest stays on the overlay".to_owned())),
    }
}

fn index_of(held: &Held, disk: &DiskRecord) -> usize {
    let disks = &held.record().disks;
    disks.iter().position(|other| other.disk == disk.disk).expect("a disk of the record")
}

fn overlay_node(held: &Held, disk: &DiskRecord) -> String {
    node_name(&held.record().id, 'o', index_of(held, disk))
}

fn job_id(held: &Held, disk: &DiskRecord) -> String {
    node_name(&held.record().id, 'c', index_of(held, disk))
}

impl Layers for QmpLayers {
    fn process(&self) -> Option<Process> {
        self.monitor.as_ref().and_then(Monitor::process)
    }

    async fn chains(&self) -> Result<Option<Vec<Chain>>, HypervisorError> {
        if self.monitor.is_none() {
            return Ok(None);
        }
        let (chains, _) = self.node_chains().await?;
        let chain = |chain: NodeChain| Chain {
            disk: chain.disk,
            images: chain.layers.into_iter().map(local).collect(),
        };
        Ok(Some(chains.into_iter().map(chain).collect()))
    }

    fn owner(&self, _: &LocalImage) -> Option<(u32, u32)> {
        let meta = fs::metadata(format!("/proc/{}", self.process()?.pid)).ok()?;
        Some((meta.uid(), meta.gid()))
    }

    async fn open(&self, held: &Held) -> Result<(), HypervisorError> {
        let monitor = self.monitor()?;
        for disk in &held.record().disks {
            let chain = self.chain(disk).await?;
            if chain.layers.len() > BASES_MAX {
                let disk = disk.disk.clone();
                return Err(HypervisorError::ChainTooLong { disk, max: BASES_MAX });
            }
            let cache = chain.cache;
            let cache = json!({"direct": cache.direct, "no-flush": cache.no_flush});
            let file = json!({
                "driver": "file", "filename": disk.overlay, "discard": "unmap", "cache": cache,
            });
            let arguments = json!({
                "driver": "qcow2", "node-name": overlay_node(held, disk), "file": file,
                "backing": null, "discard": "unmap", "cache": cache,
            });
            let what = format!("open the overlay {}", disk.overlay.display());
            monitor.run(Step::new(what, "blockdev-add", arguments)).await?;
        }
        Ok(())
    }

    async fn put(&self, held: &Held) -> Result<(), HypervisorError> {
        let mut actions = Vec::new();
        for disk in &held.record().disks {
            // Filters such as a throttle stay above.
            let layers = self.chain(disk).await?.layers;
            let top = layers.first().filter(|layer| layer.path == disk.base.path);
            let Some(top) = top else {
                let what = "it has another image by now".to_owned();
                return Err(HypervisorError::PointInTimeLost { disk: disk.disk.clone(), what });
            };
            let data = json!({"node": top.node, "overlay": overlay_node(held, disk)});
            actions.push(json!({"type": "blockdev-snapshot", "data": data}));
        }
        let arguments = json!({"actions": actions});
        let what = "put overlays above the disks";
        self.monitor()?.run(Step::new(what, "transaction", arguments)).await.map(drop)
    }

    async fn close(&self, held: &Held) -> Result<(), HypervisorError> {
        let Some(monitor) = &self.monitor else { return Ok(()) };
        for disk in &held.record().disks {
            // A job that ended while nobody looked.
            if self.job(held, disk).await?.is_some_and(|job| job.status == "concluded") {
                self.end(held, disk).await?;
            }
            // Under our name, or under one that whoever started QEMU on the overlay gave it.
            loop {
                let (chains, graph) = self.node_chains().await?;
                let used: Vec<&str> = chains
                    .iter()
                    .flat_map(|chain| &chain.layers)
                    .map(|layer| layer.node.as_str())
                    .collect();
                // One that was never put has no plain name of its file.
                let ours = overlay_node(held, disk);
                let ours = graph.contains(&ours).then_some(ours.as_str());
                let nodes: Vec<_> = ours.into_iter().chain(graph.nodes_of(&disk.overlay)).collect();
                if nodes.iter().any(|node| used.contains(node)) {
                    break;
                }
                // Those without a name of their own go with the others.
                let named = nodes.into_iter().find(|node| !node.starts_with('#'));
                let Some(node) = named else { break };
                let arguments = json!({"node-name": node});
                monitor.run_until_free("close an overlay", "blockdev-del", arguments).await?;
            }
        }
        Ok(())
    }

    async fn commit(
        &self,
        held: &Held,
        disk: &DiskRecord,
        rate: Option<u64>,
    ) -> Result<(), HypervisorError> {
        match self.job(held, disk).await? {
            Some(job) if job.status == "concluded" => drop(self.end(held, disk).await?),
            Some(_) => return Ok(()),
            None => {}
        }
        let chain = self.chain(disk).await?;
        let at = chain.layers.windows(2).position(|pair| {
            is_same(&pair[0].path, &disk.overlay) && is_same(&pair[1].path, &disk.base.path)
        });
        let Some(at) = at else {
            let what = "it runs on another image by now".to_owned();
            return Err(HypervisorError::PointInTimeLost { disk: disk.disk.clone(), what });
        };
        let (overlay, base) = (&chain.layers[at], &chain.layers[at + 1]);
        let mut arguments = json!({
            "job-id": job_id(held, disk), "device": chain.root, "top-node": overlay.node,
            "base-node": base.node, "auto-dismiss": false, "speed": rate.unwrap_or(0),
        });
        if at > 0 {
            // What the overlay above will name as the image beneath it.
            arguments["backing-file"] = json!(base.path);
        }
        let what = format!("write back the overlay of `{}`", disk.disk);
        self.monitor()?.run(Step::new(what, "block-commit", arguments)).await.map(drop)
    }

    async fn written(
        &self,
        held: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<Option<Written>, String>, HypervisorError> {
        let Some(job) = self.job(held, disk).await? else { return Ok(Ok(None)) };
        if job.status == "concluded" {
            let words = || "it ended before it was told to".to_owned();
            return Ok(Err(self.end(held, disk).await?.unwrap_or_else(words)));
        }
        Ok(Ok(Some(Written {
            done: job.current_progress,
            total: job.total_progress,
            is_ready: job.status == "ready",
        })))
    }

    async fn has_sunk(
        &self,
        held: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<bool, String>, HypervisorError> {
        match self.job(held, disk).await? {
            None => Ok(Ok(true)),
            Some(job) if job.status == "concluded" => {
                Ok(self.end(held, disk).await?.map_or(Ok(true), Err))
            }
            Some(_) => Ok(Ok(false)),
        }
    }

    async fn pivot(
        &self,
        held: &Held,
        disk: &DiskRecord,
    ) -> Result<Result<(), String>, HypervisorError> {
        let what = format!("go on with the image of `{}`", disk.disk);
        let arguments = json!({"id": job_id(held, disk)});
        self.monitor()?.run(Step::new(what, "job-complete", arguments)).await?;
        let ended = self.end(held, disk).await?;
        let layers = self.chain(disk).await?.layers;
        Ok(went_on(ended, layers.first().map(|top| &*top.path), &disk.base.path))
    }

    async fn cancel(&self, held: &Held, disk: &DiskRecord) -> Result<(), HypervisorError> {
        let Some(job) = self.job(held, disk).await? else { return Ok(()) };
        if job.status != "concluded" {
            // By force: a job that is ready would otherwise take its time to end well.
            let arguments = json!({"device": job.id, "force": true});
            self.monitor()?.run(Step::new("end a job", "block-job-cancel", arguments)).await?;
        }
        self.end(held, disk).await.map(drop)
    }

    async fn limits(&self, disk: &DiskRecord) -> Result<Value, HypervisorError> {
        Ok(Value::Object(self.chain(disk).await?.limits))
    }

    fn lowered(limits: &Value, rate: u64) -> Value {
        let mut lowered = limits.clone();
        // QEMU takes a limit of all or limits of each kind, and no peaks without a limit.
        let total = limits["bps"].as_u64().filter(|limit| *limit > 0);
        let (key, known) = match total {
            Some(total) => ("bps", total),
            None => ("bps_wr", limits["bps_wr"].as_u64().filter(|l| *l > 0).unwrap_or(rate)),
        };
        lowered[key] = known.min(rate).into();
        for part in ["_max", "_max_length"] {
            if let Some(peaks) = lowered.as_object_mut() {
                peaks.remove(&format!("{key}{part}"));
            }
        }
        lowered
    }

    async fn limit(
        &self,
        _: &Held,
        disk: &DiskRecord,
        limits: &Value,
    ) -> Result<(), HypervisorError> {
        let mut arguments = limits.clone();
        arguments["id"] = self.chain(disk).await?.qdev.into();
        let what = format!("limit the I/O of `{}`", disk.disk);
        self.monitor()?.run(Step::new(what, "block_set_io_throttle", arguments)).await.map(drop)
    }

    async fn watch_io(&self, _: &Held) -> Result<(), HypervisorError> {
        let monitor = self.monitor()?;
        // QEMU exchanges the bins without a lock in some versions, and other threads count in them.
        if monitor.has_io_threads().await? {
            return Ok(());
        }
        for device in monitor.device_stats().await? {
            // Somebody else's tell as much.
            if device.stats.kinds().iter().any(|(_, sorted)| sorted.is_some()) {
                continue;
            }
            let boundaries: Vec<u64> = boundaries().collect();
            let arguments = json!({"id": device.qdev, "boundaries": boundaries});
            let what = "sort what the guest does by its time";
            monitor.run(Step::new(what, "block-latency-histogram-set", arguments)).await?;
        }
        Ok(())
    }

    async fn io(&self) -> Result<Vec<Series>, HypervisorError> {
        let devices = self.monitor()?.device_stats().await?;
        let series = |(counts, sorted): (GuestIo, Option<&Histogram>)| Series {
            counts,
            bins: sorted.map(|sorted| Bins {
                boundaries: sorted.boundaries.clone(),
                counts: sorted.bins.clone(),
            }),
        };
        Ok(devices.iter().flat_map(|device| device.stats.kinds().map(series)).collect())
    }

    async fn forget_io(&self, _: &Held) -> Result<(), HypervisorError> {
        let Some(monitor) = &self.monitor else { return Ok(()) };
        for device in monitor.device_stats().await? {
            let is_ours = |sorted: &Histogram| sorted.boundaries.iter().copied().eq(boundaries());
            if device.stats.kinds().iter().any(|(_, sorted)| sorted.is_some_and(is_ours)) {
                let arguments = json!({"id": device.qdev});
                let what = "sort what the guest does no more";
                monitor.run(Step::new(what, "block-latency-histogram-set", arguments)).await?;
            }
        }
        Ok(())
    }

    async fn runs(&self) -> Result<bool, HypervisorError> {
        let status: Status = self.monitor()?.query("query-status", json!({})).await?;
        Ok(status.running)
    }

    async fn pause(&self, _: &Held) -> Result<(), HypervisorError> {
        self.monitor()?.run(Step::new("pause the guest", "stop", json!({}))).await.map(drop)
    }

    async fn resume(&self, ours: bool) -> Result<(), HypervisorError> {
        let Some(monitor) = &self.monitor else { return Ok(()) };
        let status: Status = monitor.query("query-status", json!({})).await?;
        if status.status == "io-error" || (ours && status.status == "paused") {
            monitor.run(Step::new("let the guest go on", "cont", json!({}))).await?;
        }
        Ok(())
    }

    async fn check_off(&self) -> Result<(), OverlayError> {
        Ok(())
    }

    async fn point_back(&self, _: &DiskRecord) -> Result<(), HypervisorError> {
        // Who starts it knows how.
        Ok(())
    }

    async fn names(&self, image: &Path) -> Result<Option<String>, HypervisorError> {
        if self.monitor.is_none() {
            return Ok(None);
        }
        let (_, graph) = self.node_chains().await?;
        Ok(graph.nodes_of(image).first().map(|node| format!("QEMU's node `{node}`")))
    }

    async fn others(
        &self,
        image: &Path,
        disk: &DiskName,
    ) -> Result<Option<String>, HypervisorError> {
        let chains = self.chains().await?.unwrap_or_default();
        let has = |chain: &&Chain| chain.images.iter().any(|other| is_same(&other.path, image));
        let mut others = chains.iter().filter(|chain| chain.disk != *disk);
        Ok(others.find(has).map(|chain| format!("disk `{}` of the same guest", chain.disk)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_is_gone_is_no_proof_that_the_guest_went_on_with_its_image() {
        let (base, overlay) = (Path::new("/base"), Path::new("/overlay"));
        assert!(went_on(None, Some(base), base).is_ok());
        assert!(went_on(None, Some(overlay), base).is_err());
        assert!(went_on(None, None, base).is_err());
        assert_eq!(went_on(Some("no room".into()), Some(base), base), Err("no room".into()));
    }

    #[test]
    fn r13_a_limit_is_lowered_and_others_stay() {
        let free = json!({"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 7, "group": "g"});
        let lowered = QmpLayers::lowered(&free, 100);
        assert_eq!(lowered, json!({"bps": 0, "bps_rd": 0, "bps_wr": 100, "iops": 7, "group": "g"}));
        let total = json!({"bps": 1000, "bps_max": 5000, "bps_wr": 0});
        assert_eq!(QmpLayers::lowered(&total, 100), json!({"bps": 100, "bps_wr": 0}));
        let low = json!({"bps": 0, "bps_wr": 50});
        assert_eq!(QmpLayers::lowered(&low, 100)["bps_wr"], 50);
    }
}
