//! QEMU that nobody manages, through its monitor.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::graph::{self, BlockDevice};
use super::monitor::{Monitor, Step};
use super::{
    Care, Choice, Claim, Cut, Disk, Exports, GuestIo, Hypervisor, HypervisorError, Machine,
    MachineFile, Reach,
};
use crate::capture::room::Watched;
use crate::capture::{self, filter, job, node_name, suspend};
use crate::journal::{DiskRecord, Process, Recorded};
use crate::names::RunId;
use crate::overlay::Layers;
use crate::overlay::qmp::QmpLayers;

/// The first QEMU whose block layer has no lock for each I/O thread.
const THREADS_WITHOUT_LOCK: u32 = 9;
/// The first QEMU whose `snapshot-access` answers any request right; see [`Care::Clusters`].
const MIXED_REQUESTS_RIGHT: u32 = 8;

/// How often QEMU is asked whether its guest is being migrated, or goes on: its events tell the former only
/// to who has changed its settings.
const GUEST_POLL: Duration = Duration::from_millis(200);

/// How a point in time is taken, by what QEMU can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipe {
    /// An own `copy-before-write` filter that never breaks a guest's write.
    Filter,
    /// The filter that is implicit in a backup job.
    Job,
    /// None: the guest stands still.
    Suspend,
}

/// One QEMU, through its monitor.
#[derive(Debug)]
pub struct BareQemu {
    monitor: Monitor,
    /// `None` where it has no way of its own to a point in time.
    recipe: Option<Recipe>,
    run_dir: PathBuf,
    scratch_dir: Option<PathBuf>,
    /// The scratch of each disk of the run, in their order.
    scratch: OnceLock<Watched>,
    /// Whether the guest is to stand still just now.
    stands: AtomicBool,
}

#[derive(Deserialize)]
struct SchemaEntry {
    #[serde(default)]
    members: Vec<Value>,
    #[serde(default)]
    values: Vec<String>,
    #[serde(rename = "meta-type")]
    meta_type: String,
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct Name {
    name: Option<String>,
}

#[derive(Deserialize)]
struct Uuid {
    #[serde(rename = "UUID")]
    uuid: String,
}

impl BareQemu {
    /// Connects, and asks what this QEMU can do. `timeout` is how long it may take for an answer.
    ///
    /// # Errors
    /// [`HypervisorError::Monitor`].
    pub async fn connect(
        socket: &Path,
        run_dir: &Path,
        scratch_dir: Option<&Path>,
        implicit_filter: bool,
        timeout: Duration,
    ) -> Result<Self, HypervisorError> {
        let monitor = Monitor::connect(socket, timeout).await?;
        let schema: Vec<SchemaEntry> = monitor.query("query-qmp-schema", json!({})).await?;
        let recipe = match recipe(&schema) {
            Some(Recipe::Filter) if implicit_filter || filter_is_deadly(&monitor).await? => {
                Some(Recipe::Job)
            }
            recipe => recipe,
        };
        tracing::debug!(version = monitor.version(), ?recipe, "connected to QEMU");
        Ok(Self {
            monitor,
            recipe,
            run_dir: run_dir.to_owned(),
            scratch_dir: scratch_dir.map(Path::to_owned),
            scratch: OnceLock::new(),
            stands: AtomicBool::new(false),
        })
    }

    /// The same QEMU, whose guest is to stand still until it was read.
    pub fn suspended(self) -> Self {
        Self { recipe: self.recipe.map(|_| Recipe::Suspend), ..self }
    }

    /// Ready when a guest that is to stand still does not.
    async fn guest_goes_on(&self) -> HypervisorError {
        loop {
            tokio::time::sleep(GUEST_POLL).await;
            let stands = || self.stands.load(Ordering::SeqCst);
            // We may let it go on between question and answer.
            if stands() && matches!(self.monitor.guest_runs().await, Ok(true)) && stands() {
                return HypervisorError::GuestGoesOn;
            }
        }
    }

    fn recipe(&self) -> Result<Recipe, HypervisorError> {
        let version = || self.monitor.version();
        self.recipe.ok_or_else(|| HypervisorError::NoMethod { version: version() })
    }

    /// Ready when the room beside the scratch runs out.
    async fn room_ends(&self) -> HypervisorError {
        loop {
            match self.scratch.get() {
                Some(scratch) => return scratch.ends().await,
                // There is none yet.
                None => tokio::time::sleep(GUEST_POLL).await,
            }
        }
    }

    /// Ready when the guest goes to another QEMU.
    async fn guest_leaves(&self) -> HypervisorError {
        loop {
            match self.monitor.check_stays().await {
                // A monitor that hangs is for those to tell who need it.
                Err(error) if error.is_gone() || matches!(error, HypervisorError::Migrating) => {
                    return error;
                }
                _ => {}
            }
            tokio::time::sleep(GUEST_POLL).await;
        }
    }

    /// A fault of QEMU does not show in its schema, so here the version counts.
    fn care(&self, index: usize) -> Care {
        let scratch = self.scratch.get().and_then(|scratch| scratch.scratch(index));
        match scratch.filter(|_| self.monitor.major_version() < MIXED_REQUESTS_RIGHT) {
            Some(scratch) => Care::Clusters { scratch: Arc::clone(&scratch.file) },
            None => Care::None,
        }
    }
}

/// Whether an own filter may end QEMU: with a busy I/O thread, `blockdev-add` of a node above a disk in
/// it ends QEMU 7.2 within a few backups ("qemu_mutex_unlock_impl: Operation not permitted"). Backup
/// jobs do not (both tried). The lock that is at fault went away in QEMU 9.0.
async fn filter_is_deadly(monitor: &Monitor) -> Result<bool, HypervisorError> {
    if monitor.major_version() >= THREADS_WITHOUT_LOCK {
        return Ok(false);
    }
    monitor.has_io_threads().await
}

/// What QEMU offers, by its schema (`qapi/introspect.json`) and not by its version.
fn recipe(schema: &[SchemaEntry]) -> Option<Recipe> {
    let member = |wanted: &str| {
        schema.iter().any(|entry| entry.members.iter().any(|member| member["name"] == wanted))
    };
    // Enumerations list their values as `values`, newer schemas also as named `members`.
    let value = |wanted: &str| {
        schema.iter().any(|entry| entry.values.iter().any(|value| value == wanted))
            || member(wanted)
    };
    let command = |wanted: &str| {
        schema.iter().any(|entry| entry.meta_type == "command" && entry.name == wanted)
    };
    if !command("block-export-add") {
        return None;
    }
    if value("snapshot-access") && value("copy-before-write") && member("on-cbw-error") {
        return Some(Recipe::Filter);
    }
    command("blockdev-backup").then_some(Recipe::Job)
}

impl Hypervisor for BareQemu {
    async fn name(&self) -> Result<Option<String>, HypervisorError> {
        Ok(self.monitor.query::<Name>("query-name", json!({})).await?.name)
    }

    async fn discover(&self, choice: &Choice) -> Result<Machine, HypervisorError> {
        let uuid: Uuid = self.monitor.query("query-uuid", json!({})).await?;
        let devices: Vec<BlockDevice> = self.monitor.query("query-block", json!({})).await?;
        let graph = self.monitor.graph().await?;
        self.monitor.check_stays().await?;
        let runs = self.monitor.guest_runs().await?;
        graph::read_machine(uuid.uuid, runs, &devices, &graph, choice)
    }

    async fn definition(&self) -> Result<Vec<MachineFile>, HypervisorError> {
        // Who started it knows how.
        Ok(Vec::new())
    }

    async fn firmware(&self) -> (Vec<MachineFile>, Vec<String>) {
        (Vec::new(), Vec::new())
    }

    async fn reclaim(&self, _: &mut Machine, _: &[Claim]) -> Result<(), HypervisorError> {
        // QEMU names every bitmap that it has.
        Ok(())
    }

    async fn layers(&self) -> Result<impl Layers, HypervisorError> {
        Ok(QmpLayers::of(self.monitor.clone()))
    }

    fn no_job(&self) -> Option<String> {
        self.recipe().err().map(|error| error.to_string())
    }

    fn reach(&self) -> Reach {
        Reach::Monitor(self.monitor.socket().to_owned())
    }

    async fn guest_io(&self) -> Result<GuestIo, HypervisorError> {
        let devices = self.monitor.device_stats().await?;
        let kinds = devices.iter().flat_map(|device| device.stats.kinds());
        Ok(kinds.map(|(counts, _)| counts).sum())
    }

    fn names(&self, run: &RunId, index: usize, disk: &Disk) -> DiskRecord {
        DiskRecord {
            scratch: node_name(run, 's', index),
            filter: node_name(run, 'f', index),
            snapshot: node_name(run, 'a', index),
            job: (self.recipe == Some(Recipe::Job)).then(|| node_name(run, 'j', index)),
            ..DiskRecord::untouched(disk)
        }
    }

    fn listens_at(&self, _: &RunId) -> Option<PathBuf> {
        // Its socket lies in the run's folder.
        None
    }

    fn process(&self) -> Option<Process> {
        self.monitor.process()
    }

    fn pauses(&self, disks: usize) -> bool {
        match self.recipe {
            Some(Recipe::Filter) => disks > 1,
            Some(Recipe::Suspend) => true,
            Some(Recipe::Job) | None => false,
        }
    }

    fn suspends(&self) -> bool {
        self.recipe == Some(Recipe::Suspend)
    }

    async fn danger(&self) -> HypervisorError {
        tokio::select! {
            error = self.room_ends() => error,
            error = self.guest_leaves() => error,
            error = self.guest_goes_on() => error,
        }
    }

    async fn prepare(&self, recorded: &Recorded, disks: &[Disk]) -> Result<(), HypervisorError> {
        let scratch_dir = self.scratch_dir.as_deref();
        match self.recipe()? {
            Recipe::Filter => {
                let scratch = filter::prepare(&self.monitor, recorded, disks, scratch_dir).await?;
                self.scratch.set(scratch).expect("one connection makes one backup");
                Ok(())
            }
            Recipe::Job => job::prepare(&self.monitor, recorded, disks, scratch_dir).await,
            Recipe::Suspend => Ok(()),
        }
    }

    async fn cut(&self, recorded: &Recorded) -> Result<Cut, HypervisorError> {
        match self.recipe()? {
            Recipe::Filter => filter::cut(&self.monitor, recorded).await,
            Recipe::Job => job::cut(&self.monitor, recorded).await,
            Recipe::Suspend => {
                let cut = suspend::cut(&self.monitor, recorded).await?;
                self.stands.store(true, Ordering::SeqCst);
                Ok(cut)
            }
        }
    }

    async fn export(&self, recorded: &Recorded) -> Result<Exports, HypervisorError> {
        match self.recipe()? {
            Recipe::Filter => {
                let care = |index: usize| self.care(index);
                filter::export(&self.monitor, recorded, &self.run_dir, care).await
            }
            Recipe::Job => job::export(&self.monitor, recorded, &self.run_dir).await,
            Recipe::Suspend => suspend::export(&self.monitor, recorded, &self.run_dir).await,
        }
    }

    async fn confirm(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        // The filter stands on, but what the guest writes goes past it.
        self.monitor.check_stays().await?;
        match self.recipe()? {
            Recipe::Filter => {
                filter::confirm(&self.monitor, recorded).await?;
                self.scratch.get().map_or(Ok(()), Watched::check)
            }
            Recipe::Job => job::confirm(&self.monitor, recorded).await,
            Recipe::Suspend => suspend::confirm(&self.monitor, recorded).await,
        }
    }

    fn scratch_peak(&self) -> Option<u64> {
        self.scratch.get().map(Watched::peak)
    }

    async fn release(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        // By the recipe that the record was made with.
        if recorded.record().suspends {
            return suspend::release(&self.monitor, recorded, &self.run_dir).await;
        }
        match recorded.record().disks.iter().any(|disk| disk.job.is_some()) {
            true => job::release(&self.monitor, recorded, &self.run_dir).await,
            false => filter::release(&self.monitor, recorded, &self.run_dir).await,
        }
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.monitor.run(Step::new("pause the guest", "stop", json!({}))).await.map(drop)
    }

    async fn let_go_on(&self) -> Result<(), HypervisorError> {
        self.stands.store(false, Ordering::SeqCst);
        self.monitor.let_go_on().await
    }

    async fn drop_bitmaps(&self, bitmaps: &[(String, String)]) -> Result<(), HypervisorError> {
        capture::remove_bitmaps(&self.monitor, bitmaps).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(drivers: &Value, options: &[&str]) -> Vec<SchemaEntry> {
        let members: Vec<_> = options.iter().map(|name| json!({"name": name})).collect();
        let entries = json!([
            {"meta-type": "command", "name": "block-export-add", "arg-type": "1", "newer": true},
            {"meta-type": "command", "name": "blockdev-backup", "arg-type": "2"},
            drivers,
            {"meta-type": "object", "name": "3", "members": members},
        ]);
        serde_json::from_value(entries).unwrap()
    }

    #[test]
    fn the_schema_tells_what_qemu_can_do_whatever_its_version() {
        let values = ["copy-before-write", "snapshot-access", "qcow2"];
        let until_6_1 = json!({"meta-type": "enum", "name": "4", "values": values});
        let members: Vec<_> = values.iter().map(|name| json!({"name": name})).collect();
        let newer = json!({"meta-type": "enum", "name": "4", "members": members});
        assert_eq!(recipe(&schema(&until_6_1, &["on-cbw-error"])), Some(Recipe::Filter));
        assert_eq!(recipe(&schema(&newer, &["on-cbw-error"])), Some(Recipe::Filter));
        assert_eq!(recipe(&schema(&newer, &["target"])), Some(Recipe::Job));
        let older = json!({"meta-type": "enum", "name": "4", "values": ["qcow2"]});
        assert_eq!(recipe(&schema(&older, &["on-cbw-error"])), Some(Recipe::Job));
        assert_eq!(recipe(&[]), None);
    }
}
