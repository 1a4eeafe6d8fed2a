//! The flow of a backup:
//!
//! ```text
//! discover ─► quiesce ─► point in time ─► thaw ─► read ─► store ─► release ─► record ─► advance
//! ```

use std::future::{Future, pending};
use std::io;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use repository::{AnnouncedLock, FileId, Index, Node, Repository, RepositoryError};

use crate::guard::Guard;
use crate::hypervisor::{Cut, Disk, GuestIo, Hypervisor, HypervisorError, MachineFile};
use crate::inherit::{Content, Damage, Inherited};
use crate::journal::{DiskRecord, Journal, JournalError, Phase, Record, Recorded};
use crate::manifest::{DiskManifest, FileManifest, Kind, Manifest};
use crate::names::{BitmapNames, DomainName, RunId};
use crate::overlay::stall::Stall;
use crate::plan::{Decision, Plan, PlannedDisk, stale_bitmaps};
use crate::progress::Progress;
use crate::quiesce::application::{About, Applications, Ending};
use crate::quiesce::guest_agent::AgentAddress;
use crate::quiesce::{self, Mode, QuiesceError, Wanted, quiesce};
use crate::read::chunk_map::{ChunkMap, Fate};
use crate::read::pace::{Effort, Pace};
use crate::read::{Audit, Limits, ReadError, Source, Stream};
use crate::recover;
use crate::store::{Durable, Store, blocking};

/// What a backup says whose dirty bitmaps were only believed.
const NOT_AUDITED: &str =
    "the dirty bitmaps were not audited: nothing that they call unchanged was read";
/// How long hooks may take at the end of a backup that the user has interrupted.
const INTERRUPTED_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the reason for the end of an export may take to show, on a busy host.
const REASON_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a backup stopped. Fields, not sentences: callers match on them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// QEMU could not be asked or changed.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The guest could not be made consistent.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// The point in time could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The repository failed.
    #[error("cannot store the backup")]
    Store(#[from] RepositoryError),
    /// The undo record could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There is no process that would undo this run if it is killed.
    #[error("cannot run the guard that lets go of the guest if this process is killed")]
    Guard(#[source] io::Error),
    /// QEMU ended while its guest was backed up.
    #[error("domain `{domain}` died during the backup")]
    Died {
        /// The domain.
        domain: DomainName,
        /// How it showed.
        source: Box<BackupError>,
    },
    /// The machine is no longer on this host.
    #[error("domain `{domain}` left this host during the backup")]
    Left {
        /// The domain.
        domain: DomainName,
        /// How it showed.
        source: Box<BackupError>,
    },
    /// The user or the system asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Whether the guest is frozen.
    pub quiesce: Mode,
    /// The guest agent, where one may be there.
    pub agent: Option<AgentAddress>,
    /// Who else is told of the point in time.
    pub applications: Applications,
    /// What the user allows.
    pub limits: Limits,
    /// How much of what dirty bitmaps call unchanged is read and compared.
    pub audit: Audit,
    /// Longest time without an answer of QEMU's export.
    pub timeout: Duration,
}

/// The repository that a backup goes to.
#[derive(Debug)]
pub struct Target {
    /// The repository.
    pub repository: Repository,
    /// Its index.
    pub index: Arc<Index>,
}

/// This host.
#[derive(Debug)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// What must be undone.
    pub journal: Journal,
    /// Where sockets and locks are.
    pub run_dir: PathBuf,
}

/// A backup that exists, and whether the guest was left as it was found.
#[derive(Debug)]
pub struct Finished {
    /// The snapshot's id.
    pub id: FileId,
    /// Its record.
    pub manifest: Manifest,
    /// What could not be cleaned up; the journal keeps it for the next run.
    pub leftover: Option<BackupError>,
    /// The guest's longest stall while overlays were written back, where they were.
    pub stall: Option<Stall>,
}

/// One backup: what its stages share.
#[derive(Debug)]
pub struct Run<'a, H> {
    /// The way to QEMU.
    pub hypervisor: &'a H,
    /// What is done.
    pub plan: &'a Plan,
    /// What the guest had done on its disks a moment ago, to know its latency without us.
    pub before: GuestIo,
    /// Where it goes.
    pub target: &'a Target,
    /// Where it happens.
    pub host: &'a Host,
    /// What was asked for.
    pub request: &'a Request,
    /// Who is told how far it is.
    pub progress: &'a Progress,
}

/// A disk of the point in time, mapped.
struct Mapped {
    source: Source,
    map: ChunkMap,
    decision: Decision,
    /// What is taken over of it.
    content: Content,
    bytes_audited: u64,
}

/// What became of the guest once the point in time was taken.
enum Quiet {
    /// It goes on.
    LetGo(quiesce::Outcome),
    /// It stands still until it was read.
    Held(quiesce::Holding),
}

impl Quiet {
    /// Ready when a guest that stands still is held by nobody any more.
    async fn ends(&mut self) -> QuiesceError {
        match self {
            Self::LetGo(_) => pending().await,
            Self::Held(holding) => holding.ends().await,
        }
    }
}

/// What was read of a point in time.
struct Seen {
    disks: Vec<Mapped>,
    bytes_read: Vec<u64>,
    store: Store,
}

/// What a point in time needs beforehand.
struct Prepared {
    files: Vec<MachineFile>,
    warnings: Vec<String>,
}

/// A point in time that is there.
struct Taken {
    cut: Cut,
    quiet: Quiet,
    files: Vec<MachineFile>,
    warnings: Vec<String>,
}

/// A point in time that was read; the guest has nothing to do with it any more.
struct Captured {
    start: Instant,
    cut: Cut,
    quiesced: quiesce::Outcome,
    seen: Seen,
    scratch_peak: Option<u64>,
    files: Vec<MachineFile>,
    /// The same in the backup before.
    files_before: Vec<Node>,
}

impl<H: Hypervisor> Run<'_, H> {
    /// Makes the backup. When `interrupt` is ready it ends and the guest is let go; where that takes long, it
    /// is waited for until what `again` returns is ready. The lock settles while the point in time is taken and read, and
    /// is released at the end.
    ///
    /// # Errors
    /// [`BackupError`]; the guest has its disks back and the next backup is as incremental as this one
    /// was, unless a record in the journal says what is left.
    pub async fn execute<A: Future<Output = ()>>(
        &self,
        lock: AnnouncedLock,
        interrupt: impl Future<Output = ()>,
        again: impl FnOnce() -> A,
    ) -> Result<Finished, BackupError> {
        let names = BitmapNames::of_repository(self.target.repository.id());
        let mut recorded = self.host.journal.begin(self.undo_record(&names))?;
        let guard = match self.guard(&recorded) {
            Ok(guard) => guard,
            Err(error) => return Err(self.roll_back(&recorded, Ok(()), again, error).await),
        };
        let outcome = self.guarded(lock, interrupt, again, &mut recorded, &guard).await;
        // What could not be undone is left to it: it goes on trying.
        if !self.host.journal.has(&recorded) {
            guard.dismiss();
        }
        self.conclude(&outcome, recorded.record()).await;
        outcome
    }

    /// Tells the hooks what came of it.
    async fn conclude(&self, outcome: &Result<Finished, BackupError>, record: &Record) {
        let ending = match outcome {
            Ok(Finished { id, manifest, .. }) => {
                Ending::of(&id.to_string(), Some(manifest.consistency))
            }
            Err(error) => Ending::failed(error),
        };
        let (agent, runs) = (self.request.agent.as_ref(), self.plan.machine.runs);
        let about = self.about(record);
        let hooks = self.request.applications.conclude(&about, agent, runs, &ending);
        if !matches!(outcome, Err(BackupError::Interrupted)) {
            hooks.await;
        } else if tokio::time::timeout(INTERRUPTED_TIMEOUT, hooks).await.is_err() {
            tracing::warn!("the hooks at `after` were not waited for any longer");
        }
    }

    fn about(&self, record: &Record) -> About {
        let (domain, uuid) = (self.plan.domain.clone(), self.plan.machine.uuid.clone());
        About { domain, uuid, run: record.run.clone() }
    }

    fn guard(&self, recorded: &Recorded) -> Result<Guard, BackupError> {
        let run = &recorded.record().run;
        Guard::start(&self.host.journal, &self.host.run_dir, run).map_err(BackupError::Guard)
    }

    async fn guarded<A: Future<Output = ()>>(
        &self,
        lock: AnnouncedLock,
        interrupt: impl Future<Output = ()>,
        again: impl FnOnce() -> A,
        recorded: &mut Recorded,
        guard: &Guard,
    ) -> Result<Finished, BackupError> {
        let names = BitmapNames::of_repository(self.target.repository.id());
        tokio::pin!(interrupt);
        let captured = tokio::select! {
            captured = self.capture(recorded, lock, guard) => captured,
            danger = self.hypervisor.danger() => Err(danger.into()),
            () = &mut interrupt => Err(BackupError::Interrupted),
        };
        let captured = match captured {
            Err(error) => Err(self.known_better(error).await),
            captured => captured,
        };
        self.progress.phase("releasing the guest");
        guard.reads_no_more();
        let released = self.release(recorded).await;
        let stored = match captured {
            Ok(captured) => tokio::select! {
                stored = self.store(captured, recorded.record()) => stored,
                danger = self.danger_still() => Err(danger.into()),
                () = &mut interrupt => Err(BackupError::Interrupted),
            },
            Err(error) => Err(error),
        };
        match stored {
            Ok((durable, manifest)) => {
                let recording = self.record(recorded, durable).await;
                if let (Err(_), Err(left)) = (&recording, &released) {
                    tracing::error!(error = %left, "the guest is not as it was; the next run mends it");
                }
                let id = recording?;
                let advanced = self.advance(recorded, released, &names, interrupt).await;
                let (stall, leftover) = match advanced {
                    Ok(stall) => (stall, None),
                    Err(error) => (None, Some(error)),
                };
                Ok(Finished { id, manifest, leftover, stall })
            }
            Err(error) => Err(self.roll_back(recorded, released, again, error).await),
        }
    }

    /// Ready when the guest cannot wait until all is stored: its overlays grow until then.
    async fn danger_still(&self) -> HypervisorError {
        match self.hypervisor.puts_overlays() {
            true => self.hypervisor.danger().await,
            false => pending().await,
        }
    }

    /// Lets a guest go on that may be paused or frozen still, whatever became of its watchdog, and gives it
    /// its disks back.
    async fn release(&self, recorded: &Recorded) -> Result<(), HypervisorError> {
        let let_go = match recorded.record().holds_guest {
            true => recover::let_go(self.hypervisor, recorded.record()).await,
            false => Ok(()),
        };
        // Whatever came of that: a scratch that stays would grow.
        let released = self.hypervisor.release(recorded).await;
        let_go.and(released)
    }

    /// An export ends a moment before it shows why: whoever watches the guest may know. And who lets
    /// go of it before a job has come to its end would end the one that was waiting for that.
    async fn known_better(&self, error: BackupError) -> BackupError {
        match &error {
            BackupError::Read(ReadError::Nbd { source, .. }) if source.is_closed() => {}
            _ => return error,
        }
        match tokio::time::timeout(REASON_TIMEOUT, self.hypervisor.danger()).await {
            Ok(danger) => danger.into(),
            Err(_) => error,
        }
    }

    /// Names all that this run will make.
    fn undo_record(&self, names: &BitmapNames) -> Record {
        let run = RunId::random();
        let disk_record = |(index, planned): (usize, &PlannedDisk)| {
            let decision = &planned.decision;
            let export = || format!("kvmsnap-{run}-export");
            DiskRecord {
                bitmap_new: decision.tracked.then(|| names.begun_by(&run)),
                bitmap_old: decision.bitmap_old.clone(),
                bitmap_export: decision.bitmap_old.as_ref().map(|_| export()),
                ..self.hypervisor.names(&run, index, &planned.disk)
            }
        };
        let targets: Vec<_> = self.plan.disks.iter().map(|planned| &planned.disk.target).collect();
        Record {
            pid: std::process::id(),
            started: Timestamp::now(),
            domain: self.plan.domain.clone(),
            uuid: self.plan.machine.uuid.clone(),
            reach: self.hypervisor.reach(),
            qemu: self.hypervisor.process(),
            agent: self.request.agent.clone().filter(|_| self.request.quiesce != Mode::No),
            repository_id: self.target.repository.id().to_owned(),
            phase: Phase::Capturing,
            guest_runs: self.plan.machine.runs,
            holds_guest: false,
            pauses: self.plan.machine.runs && self.hypervisor.pauses(self.plan.disks.len()),
            suspends: self.hypervisor.suspends(),
            stopped: None,
            snapshots: self.hypervisor.snapshots(&run, &targets),
            nbd_server: false,
            overlays: self.hypervisor.puts_overlays(),
            socket: self.hypervisor.listens_at(&run),
            disks: self.plan.disks.iter().enumerate().map(disk_record).collect(),
            run,
        }
    }

    /// Takes the point in time and reads it to the end.
    async fn capture(
        &self,
        recorded: &mut Recorded,
        lock: AnnouncedLock,
        guard: &Guard,
    ) -> Result<Captured, BackupError> {
        let start = Instant::now();
        // Before the point in time: nobody waits for a repository that hangs, and no scratch fills.
        let (prepared, inherited) = tokio::try_join!(self.prepare(recorded), self.inherited())?;
        let Taken { mut cut, mut quiet, files, mut warnings } =
            self.point_in_time(recorded, prepared).await?;
        let Inherited { disks: contents, files: files_before } = inherited;
        let paused = Instant::now();
        self.host.journal.update(recorded, |record| {
            record.holds_guest = matches!(quiet, Quiet::Held(_));
            record.nbd_server = true;
        })?;
        let seen = tokio::select! {
            seen = self.see(recorded, lock, guard, contents, &mut warnings) => seen?,
            error = quiet.ends() => return Err(error.into()),
        };
        let scratch_peak = self.hypervisor.scratch_peak();
        let mut quiesced = match quiet {
            Quiet::LetGo(quiesced) => quiesced,
            Quiet::Held(holding) => {
                self.hypervisor.let_go_on().await?;
                let pause = cut.pause.unwrap_or_default() + paused.elapsed();
                cut.pause = Some(pause);
                let stood = format!("the guest stood still for {:.1} s", pause.as_secs_f64());
                warnings.push(format!("{stood}, until it was read"));
                let quiesced = holding.thaw().await?;
                self.host.journal.update(recorded, |record| record.holds_guest = false)?;
                quiesced
            }
        };
        quiesced.warnings.extend(warnings);
        quiesced.warnings.extend(self.plan.warnings.iter().cloned());
        Ok(Captured { start, cut, quiesced, seen, scratch_peak, files, files_before })
    }

    /// Reads the point in time to the end.
    async fn see(
        &self,
        recorded: &Recorded,
        lock: AnnouncedLock,
        guard: &Guard,
        contents: Vec<Result<Content, Damage>>,
        warnings: &mut Vec<String>,
    ) -> Result<Seen, BackupError> {
        let exports = self.hypervisor.export(recorded).await?;
        self.progress.phase("mapping");
        // All at once: QEMU hangs up on who takes too long to say what it wants.
        let mut sources = Vec::new();
        for (planned, export) in self.plan.disks.iter().zip(&exports.disks) {
            let (disk, timeout) = (&planned.disk, self.request.timeout);
            sources.push(Source::connect(export, &disk.target, disk.size, timeout).await?);
            // Not before: QEMU waits for who has connected and not yet said what it wants.
            if exports.outlive_us {
                guard.hold(&export.stream).map_err(BackupError::Guard)?;
            }
        }
        let pace = self.pace(exports.by_guest).await?;
        let mut disks = Vec::new();
        for ((planned, source), content) in self.plan.disks.iter().zip(sources).zip(contents) {
            disks.push(self.map(planned, source, content, pace.effort(), warnings).await?);
        }
        let incremental = |disk: &Mapped| disk.decision.kind == Kind::Incremental;
        if self.request.audit.is_off() && disks.iter().any(incremental) {
            warnings.push(NOT_AUDITED.to_owned());
        }
        let (store, bytes_read) = self.read(&disks, lock, pace).await?;
        self.hypervisor.confirm(recorded).await?;
        Ok(Seen { disks, bytes_read, store })
    }

    /// Waits until all that was read is durable; only the snapshot file is missing then.
    async fn store(
        &self,
        captured: Captured,
        record: &Record,
    ) -> Result<(Durable, Manifest), BackupError> {
        let Captured { start, cut, quiesced, seen, scratch_peak, files, files_before } = captured;
        let Seen { disks, bytes_read, store } = seen;
        self.progress.phase("storing");
        let stored = store.drain().await?;
        let kind = disks.iter().map(|disk| disk.decision.kind).max().unwrap_or(Kind::Full);
        let mut contents = Vec::new();
        let mut manifests = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            let planned = &self.plan.disks[index];
            let content = stored.content(index as u32, &disk.map, &disk.content.chunks)?;
            let unchanged = disk.content.changed.filter(|_| content == disk.content.chunks);
            contents.push((content, unchanged.unwrap_or(cut.time)));
            manifests.push(DiskManifest {
                target: planned.disk.target.clone(),
                size: planned.disk.size,
                chunk_size: disk.decision.chunk_size,
                format: planned.disk.driver.clone(),
                image: planned.disk.image.as_ref().map(|path| path.display().to_string()),
                kind: disk.decision.kind,
                reason: disk.decision.reason.clone(),
                method: Some(self.plan.method.of_disk(disk.decision.tracked)),
                bitmap: record.disks[index].bitmap_new.clone(),
                overlay: self.hypervisor.begins_overlay(&planned.disk.target),
                bytes_changed: disk.map.bytes_dirty(),
                bytes_read: bytes_read[index],
                bytes_zero: disk.map.bytes(Fate::Zero),
                bytes_audited: disk.bytes_audited,
                bytes_stored: stored.bytes_stored(index as u32),
            });
        }
        let manifest = Manifest {
            version: Manifest::VERSION,
            program: concat!("kvmsnap ", env!("CARGO_PKG_VERSION")).to_owned(),
            run: record.run.clone(),
            domain: self.plan.domain.clone(),
            uuid: self.plan.machine.uuid.clone(),
            host: self.host.name.clone(),
            time: cut.time,
            kind,
            method: self.plan.method.method,
            consistency: quiesced.consistency,
            parent: self.plan.parent.map(|parent| parent.to_string()),
            freeze_ms: quiesced.frozen.map(millis),
            pause_ms: cut.pause.map(millis),
            duration_ms: millis(start.elapsed()),
            bytes_scratch_peak: scratch_peak,
            applications: quiesced.applications,
            warnings: quiesced.warnings,
            disks: manifests,
            skipped: self.plan.machine.skipped.clone(),
            files: files.iter().map(FileManifest::of).collect(),
        };
        let durable = stored.finish(manifest.clone(), contents, files, files_before).await?;
        Ok((durable, manifest))
    }

    /// All that comes before the point in time and needs nothing of it.
    async fn prepare(&self, recorded: &Recorded) -> Result<Prepared, BackupError> {
        self.progress.phase("preparing");
        let (applications, about) = (&self.request.applications, self.about(recorded.record()));
        let (agent, machine) = (self.request.agent.as_ref(), &self.plan.machine);
        let warnings = applications.prepare(&about, agent, machine.runs).await?;
        let disks: Vec<Disk> = self.plan.disks.iter().map(|planned| planned.disk.clone()).collect();
        let files = self.hypervisor.definition().await?;
        self.hypervisor.prepare(recorded, &disks).await?;
        Ok(Prepared { files, warnings })
    }

    /// Reads what earlier backups leave to this one.
    async fn inherited(&self) -> Result<Inherited, BackupError> {
        let inheritance = self.plan.inheritance.clone();
        blocking(move || Ok(inheritance.read())).await
    }

    /// Quiesce, point in time, thaw: whatever comes of the second, the third follows at once.
    async fn point_in_time(
        &self,
        recorded: &mut Recorded,
        prepared: Prepared,
    ) -> Result<Taken, BackupError> {
        let Prepared { mut files, mut warnings } = prepared;
        let (applications, about) = (&self.request.applications, self.about(recorded.record()));
        let (agent, machine) = (self.request.agent.as_ref(), &self.plan.machine);
        self.host.journal.update(recorded, |record| record.holds_guest = record.guest_runs)?;
        self.progress.phase("taking the point in time");
        let (reach, pauses) = (self.hypervisor.reach(), recorded.record().pauses);
        let wanted = Wanted { mode: self.request.quiesce, agent, applications, about };
        let mut quiesced = quiesce(wanted, &reach, machine, pauses).await?;
        let announced = match pauses {
            true => quiesced.will_pause().await,
            false => Ok(()),
        };
        let cut = match announced {
            Ok(()) => self.hypervisor.cut(recorded).await.map_err(BackupError::from),
            Err(error) => Err(error.into()),
        };
        let (firmware, unread) = self.hypervisor.firmware().await;
        warnings.extend(unread);
        let is_held = recorded.record().pauses && recorded.record().suspends;
        let quiet = match &cut {
            Ok(_) if is_held => quiesced.hold().await.map(Quiet::Held),
            // A guest that may be paused cannot be thawed: its watchdog does so once it goes on.
            Err(_) if is_held => return Err(cut.expect_err("it is one")),
            _ => quiesced.thaw().await.map(Quiet::LetGo),
        };
        let (cut, quiet) = (cut?, quiet?);
        files.extend(firmware);
        Ok(Taken { cut, quiet, files, warnings })
    }

    /// How hard the point in time may be read, which the guest's own QEMU serves or not.
    async fn pace(&self, by_guest: bool) -> Result<Pace, BackupError> {
        let now = self.hypervisor.guest_io().await?;
        let works = self.plan.machine.runs && !self.hypervisor.suspends();
        // What a guest did before it stood still is none of its work.
        Ok(Pace::new(if works { self.before } else { now }, now, by_guest))
    }

    /// Finds out what of a disk is to be read, and whether its bitmap can be believed.
    async fn map(
        &self,
        planned: &PlannedDisk,
        source: Source,
        content: Result<Content, Damage>,
        effort: Effort,
        warnings: &mut Vec<String>,
    ) -> Result<Mapped, BackupError> {
        let (disk, mut decision) = (&planned.disk, planned.decision.clone());
        let content = content.unwrap_or_else(|damage| {
            decision.rescan_after(&self.plan.domain, &disk.target, damage);
            Content::default()
        });
        let parent_size = decision.parent_size.filter(|_| decision.kind == Kind::Incremental);
        let mut map = source.map(decision.chunk_size, parent_size, effort).await?;
        let mut bytes_audited = 0;
        let (audit, limits) = (self.request.audit, self.request.limits);
        if decision.kind == Kind::Incremental {
            let (bytes, differs) =
                source.audit(&map, &content.chunks, audit, limits, effort).await?;
            bytes_audited = bytes;
            if let Some(chunk) = differs {
                let offset = map.offset(chunk);
                let what = format!(
                    "disk `{}` differs at byte {offset} though its dirty bitmap says unchanged; \
                     it was read whole",
                    disk.target
                );
                tracing::error!("{what}");
                warnings.push(what);
                decision.kind = Kind::Rescan;
                decision.reason = "the dirty bitmap lied: unchanged data differs".into();
                map = source.map(decision.chunk_size, None, effort).await?;
            }
        }
        Ok(Mapped { source, map, decision, content, bytes_audited })
    }

    /// Reads all disks, one after the other, and stores what was read.
    async fn read(
        &self,
        disks: &[Mapped],
        lock: AnnouncedLock,
        mut pace: Pace,
    ) -> Result<(Store, Vec<u64>), BackupError> {
        let chunk_sizes = disks.iter().map(|disk| disk.decision.chunk_size).collect();
        let index = Arc::clone(&self.target.index);
        let store = Store::start(&self.target.repository, index, chunk_sizes, lock)?;
        self.progress.reading(disks.iter().map(|disk| disk.map.bytes(Fate::Read)).sum());
        let mut bytes_read = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            let stream = Stream {
                source: &disk.source,
                disk: index as u32,
                map: &disk.map,
                limits: self.request.limits,
                hypervisor: self.hypervisor,
                sink: store.sink(),
                progress: self.progress,
            };
            match stream.run(&mut pace).await {
                Ok(bytes) => bytes_read.push(bytes),
                // The store knows better why it stopped.
                Err(ReadError::StoreStopped) => {
                    return Err(match store.drain().await {
                        Ok(_) => ReadError::StoreStopped.into(),
                        Err(error) => error.into(),
                    });
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok((store, bytes_read))
    }

    /// Writes the snapshot file, last of all.
    async fn record(
        &self,
        recorded: &mut Recorded,
        durable: Durable,
    ) -> Result<FileId, BackupError> {
        self.progress.phase("recording");
        durable.verify()?;
        self.host.journal.update(recorded, |record| record.phase = Phase::Recording)?;
        Ok(durable.record(&self.target.repository).await?)
    }

    /// Drops the old bitmaps, now that nothing needs them, and the undo record with them.
    async fn advance(
        &self,
        recorded: &mut Recorded,
        released: Result<(), HypervisorError>,
        names: &BitmapNames,
        interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Option<Stall>, BackupError> {
        self.host.journal.update(recorded, |record| record.phase = Phase::Recorded)?;
        released?;
        // What it leaves has a record of its own.
        let finished = self.hypervisor.finish(recorded, interrupt).await;
        let mut bitmaps = recover::obsolete_bitmaps(recorded.record());
        for planned in &self.plan.disks {
            let stale = stale_bitmaps(&planned.disk, names, &self.plan.kept);
            bitmaps.extend(stale.into_iter().map(|name| (planned.disk.format.clone(), name)));
        }
        bitmaps.sort_unstable();
        bitmaps.dedup();
        match self.hypervisor.drop_bitmaps(&bitmaps).await {
            // The next backup drops them.
            Err(gone) if gone.is_gone() => {}
            dropped => dropped?,
        }
        self.host.journal.clear(recorded)?;
        Ok(finished?)
    }

    /// Drops the new bitmaps: the next backup reads by the old ones. Returns why the backup failed.
    async fn roll_back<A: Future<Output = ()>>(
        &self,
        recorded: &Recorded,
        released: Result<(), HypervisorError>,
        again: impl FnOnce() -> A,
        error: BackupError,
    ) -> BackupError {
        let bitmaps = recover::obsolete_bitmaps(recorded.record());
        if let Err(left) = self.hypervisor.finish(recorded, pin!(again())).await
            && !left.is_gone()
        {
            tracing::error!(error = %left, "the guest is not as it was; `kvmsnap purge` mends it");
        }
        let undone = match released {
            Ok(()) => self.hypervisor.drop_bitmaps(&bitmaps).await,
            Err(error) => Err(error),
        };
        match undone {
            Ok(()) => {
                if let Err(left) = self.host.journal.clear(recorded) {
                    tracing::warn!(error = %left, "an undo record of which nothing is left stays");
                }
                error
            }
            // All that was made in QEMU went with it. The next run clears the record.
            Err(gone) if gone.is_gone() => {
                let (domain, source) = (self.plan.domain.clone(), Box::new(error));
                match self.hypervisor.has_left().await {
                    true => BackupError::Left { domain, source },
                    false => BackupError::Died { domain, source },
                }
            }
            Err(left) => {
                tracing::error!(error = %left, "the guest is not as it was; the next run mends it");
                error
            }
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
