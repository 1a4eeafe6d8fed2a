//! `kvmsnap backup`

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use repository::Repository;
use serde::Serialize;

use super::list::BackupLine;
use super::overlays::{self, StallLine, WayBack};
use super::{Context, Opening};
use crate::backup::{Finished, Host, Request, Run, Target};
use crate::capture::overlay::{Overlaid, Settings};
use crate::config::{self, Size, TrackHow};
use crate::error::{CommandError, INTERRUPTED};
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::shut_off::ShutOffDomain;
use crate::hypervisor::libvirt::{self, KnownDomain, LibvirtDomain, Places};
use crate::hypervisor::lvm::OnVolumes;
use crate::hypervisor::monitor::ANSWER_TIMEOUT;
use crate::hypervisor::qmp::BareQemu;
use crate::hypervisor::{Choice, Hypervisor, HypervisorError, Machine, Reach};
use crate::journal::{Journal, Record};
use crate::last_known::LastKnown;
use crate::lock::{DomainLock, LockError};
use crate::manifest::{Kind, Method};
use crate::method::{self, Able, TrackBy, Wanted};
use crate::names::{BitmapNames, DiskName, DomainName, NameError};
use crate::overlay::converge::Budget;
use crate::overlay::files;
use crate::overlay::purge::Purge;
use crate::overlay::record::{Purpose, Records};
use crate::overlay::track::{self, Tracker};
use crate::plan::{self, Plan, PlanError};
use crate::progress::human_bytes;
use crate::quiesce::Mode;
use crate::quiesce::guest_agent::AgentAddress;
use crate::read::{Audit, Limits};
use crate::recover;
use crate::share::Share;
use crate::stop::{self, Stop};
use crate::units::parse_bytes;

/// How long to wait for a guard that undoes an earlier run.
const GUARD_TIMEOUT: Duration = Duration::from_secs(60);
const GUARD_POLL: Duration = Duration::from_millis(50);

/// Back up guests, running or shut off: all of each the first time, then what changed
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  kvmsnap backup web db
  kvmsnap backup 'web-*' --exclude-disk web-1/vdb
  kvmsnap backup --all
  kvmsnap backup --qmp /run/vm/web.qmp --qga /run/vm/web.qga --name web --dry-run

Without --qmp the guests are domains of libvirt. A QEMU that nothing manages needs a monitor for
kvmsnap alone: -qmp unix:/run/vm/web.qmp,server=on,wait=off")]
pub struct BackupArgs {
    /// Domains of libvirt: names, patterns of names, or uuids
    #[arg(value_name = "DOMAIN", required_unless_present_any = ["all", "qmp"], conflicts_with = "qmp")]
    domains: Vec<String>,
    /// All domains of libvirt, running or shut off
    #[arg(long, conflicts_with_all = ["domains", "qmp"])]
    all: bool,
    /// The monitor socket of a QEMU that nothing else manages
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// The socket of its guest agent, to freeze file systems for the point in time
    #[arg(long, value_name = "SOCKET", requires = "qmp")]
    qga: Option<PathBuf>,
    /// What the backup is called; QEMU's own name where it has one
    #[arg(long, value_name = "NAME", requires = "qmp")]
    name: Option<DomainName>,
    /// Read everything, whatever the dirty bitmaps say
    #[arg(long)]
    full: bool,
    /// How the point in time is taken; auto unless given
    #[arg(long, value_name = "METHOD", env = "KVMSNAP_METHOD")]
    method: Option<Wanted>,
    /// How long a guest may take to shut down for --method stop, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "300",
          value_parser = clap::value_parser!(u64).range(1..=1200))]
    stop_timeout: u64,
    /// Switch a guest off that does not shut down in time, as by pulling its plug
    #[arg(long, conflicts_with = "qmp")]
    power_off: bool,
    /// How large a snapshot is made for --method lvm of each disk that is not on a thin volume, like 10GiB; a
    /// fifth of the disk unless given
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    lvm_size: Option<u64>,
    /// How changes are tracked from one backup to the next instead of by dirty bitmaps; kept until `purge`
    #[arg(long, value_name = "HOW", env = "KVMSNAP_TRACKING")]
    tracking: Option<TrackBy>,
    /// Whether file systems are frozen; auto unless given
    #[arg(long, value_name = "MODE")]
    quiesce: Option<Mode>,
    /// Only this disk (can be repeated)
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskName>,
    /// Not this disk, of all domains or of one (can be repeated)
    #[arg(long, value_name = "[DOMAIN/]DISK")]
    exclude_disk: Vec<Exclusion>,
    /// Read at most so many bytes a second, like 100MiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    limit_read: Option<u64>,
    /// How much of what dirty bitmaps call unchanged is read and compared, to find those that lie; 0%
    /// for nothing. Unless given 0.1%, at most 32 MiB a disk. Never less than 16 chunks a disk
    #[arg(long, value_name = "SHARE", env = "KVMSNAP_AUDIT")]
    audit: Option<Share>,
    /// Where old blocks are saved while they are read; beside each image unless given
    #[arg(long, value_name = "FOLDER", env = "KVMSNAP_SCRATCH_DIR")]
    scratch_dir: Option<PathBuf>,
    /// Where libvirt's QEMU listens for us; a folder of libvirt's own unless given
    #[arg(long, value_name = "FOLDER", env = "KVMSNAP_SOCKET_DIR", conflicts_with = "qmp")]
    socket_dir: Option<PathBuf>,
    /// Store the domain's description with its secrets, such as passwords of consoles
    #[arg(long, conflicts_with = "qmp")]
    with_secrets: bool,
    /// How long QEMU's export may keep silent, in seconds; its monitor 10 at most
    #[arg(long, value_name = "SECONDS", default_value = "30", env = "KVMSNAP_TIMEOUT",
          value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Show what would be done, and why
    #[arg(long)]
    dry_run: bool,
    /// Use the filter of a backup job, as for QEMU before 7.1
    #[arg(long, hide_short_help = true, requires = "qmp")]
    implicit_filter: bool,
    #[command(flatten, next_help_heading = "The overlay method")]
    overlays: OverlayArgs,
}

/// Bytes a second at most that a backup writes back unless told otherwise: less than half of what a SATA
/// SSD takes, and yet a day's writes in minutes. `purge` is waited for, and takes all it gets.
const WRITE_BACK_RATE: u64 = 200 << 20;

/// What the overlay method may do.
#[derive(Debug, Clone, Args)]
pub(super) struct OverlayArgs {
    /// Where overlays go; beside each image unless given
    #[arg(long, value_name = "FOLDER", env = "KVMSNAP_OVERLAY_DIR")]
    pub overlay_dir: Option<PathBuf>,
    /// Room to reserve for what the guest writes to each disk meanwhile, 1GiB unless given
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub reserve: Option<u64>,
    #[command(flatten)]
    way_back: WayBack,
}

impl OverlayArgs {
    fn settings(&self, tracks: bool) -> Settings {
        let (folder, reserve) = (self.overlay_dir.clone(), self.reserve.unwrap_or(files::RESERVE));
        Settings { folder, reserve, budget: self.budget(), tracks }
    }

    /// How long the guest may take on its way back.
    pub fn budget(&self) -> Budget {
        let budget = self.way_back.budget();
        Budget { rate: budget.rate.or(Some(WRITE_BACK_RATE)), ..budget }
    }
}

impl BackupArgs {
    fn method(&self) -> Wanted {
        self.method.unwrap_or(Wanted::Auto)
    }

    /// These, with what is configured of a domain where nothing was given.
    fn with(&self, configured: &config::Domain) -> Self {
        let config::Domain { disks, exclude_disks, method, .. } = configured.clone();
        let config::Domain { tracking, quiesce, limit_read, .. } = configured;
        let config::Domain { scratch_dir, overlay_dir, .. } = configured;
        let mut args = self.clone();
        if args.disk.is_empty() {
            args.disk = disks.unwrap_or_default();
        }
        let excluded = exclude_disks.into_iter().flatten();
        args.exclude_disk.extend(excluded.map(|disk| Exclusion { domain: None, disk }));
        args.method = args.method.or(method);
        if tracking == &Some(TrackHow::Overlay) {
            args.tracking = args.tracking.or(Some(TrackBy::Overlay));
        }
        args.quiesce = args.quiesce.or(*quiesce);
        args.limit_read = args.limit_read.or(limit_read.map(Size::bytes));
        args.scratch_dir = args.scratch_dir.or_else(|| scratch_dir.clone());
        args.overlays.overlay_dir = args.overlays.overlay_dir.or_else(|| overlay_dir.clone());
        args
    }
}

/// Runs it.
///
/// # Errors
/// Whatever the backup says; of several domains, how many failed.
pub async fn run(args: BackupArgs, context: &Context) -> Result<(), CommandError> {
    let configured = context.config()?;
    if let Some(socket) = &args.qmp {
        let name = args.name.as_ref().map(DomainName::as_str);
        let args = args.with(&name.map_or_else(Default::default, |name| configured.domain(name)));
        args.method().check_unmanaged()?;
        // One socket has one undo record and one lock, under whatever name it is given.
        let monitor = fs::canonicalize(socket).unwrap_or_else(|_| socket.clone());
        let answer = ANSWER_TIMEOUT.min(Duration::from_secs(args.timeout));
        let (implicit, run_dir) = (args.implicit_filter, &context.global.run_dir);
        let scratch_dir = args.scratch_dir.as_deref();
        let connect = BareQemu::connect(&monitor, run_dir, scratch_dir, implicit, answer);
        let connect = async {
            let qemu = connect.await?;
            Ok(if args.method() == Wanted::Suspend { qemu.suspended() } else { qemu })
        };
        let agent = args.qga.clone().map(AgentAddress::Socket);
        let (reach, opening) = (Reach::Monitor(monitor.clone()), context.open());
        let _lock = context.until_interrupted(lock(run_dir, &reach)).await?;
        if args.method() == Wanted::Lvm {
            let connect = async { Ok(OnVolumes::new(connect.await?, run_dir, args.lvm_size)) };
            return back_up(reach, connect, opening, |_| agent, None, &args, context).await;
        }
        return back_up(reach, connect, opening, |_| agent, None, &args, context).await;
    }
    let choosing = async {
        let libvirt = Libvirt::connect(&context.global.connect).await?;
        let known = libvirt::domains(&libvirt).await?;
        let chosen = choose(&known, &args.domains)?;
        Ok((libvirt, chosen))
    };
    // The key is derived once for all domains, while libvirt is asked about them.
    let mut opening = context.begin_to_open()?;
    let (libvirt, chosen) = context.until_interrupted(choosing).await?;
    let (mut failed, count) = (0, chosen.len());
    if count == 0 {
        // Also who has nothing to back up hears that there is nowhere to.
        context.until_interrupted(opening.repository()).await?;
    }
    for known in chosen {
        let args = args.with(&configured.domain(&known.name));
        match back_up_domain(&libvirt, &known, &mut opening, &args, context).await {
            Ok(()) => {}
            // Its guest is for the other host to back up.
            Err(CommandError::Hypervisor(error @ HypervisorError::Migrated { .. })) if args.all => {
                tracing::warn!("left out: {error}");
            }
            Err(error) if count == 1 || opening.has_failed() => return Err(error),
            Err(error) if error.code() == INTERRUPTED => return Err(error),
            Err(error) => {
                // One domain that cannot be backed up keeps nobody from the others.
                let text = crate::error::describe(&error);
                tracing::error!("domain `{}`: {}", known.name, text.trim_end());
                failed += 1;
            }
        }
    }
    match failed {
        0 => Ok(()),
        failed => Err(CommandError::SomeFailed { failed, count }),
    }
}

/// Backs up one domain of libvirt, as it is by now: running, or shut off.
async fn back_up_domain(
    libvirt: &Libvirt,
    known: &KnownDomain,
    opening: &mut Opening,
    args: &BackupArgs,
    context: &Context,
) -> Result<(), CommandError> {
    let opening = opening.repository();
    let handle = libvirt.domain(&known.uuid);
    let reach = Reach::Domain(handle.address());
    let (run_dir, journal) = (&context.global.run_dir, context.journal()?);
    let _lock = context.until_interrupted(lock(run_dir, &reach)).await?;
    let is_active = async {
        if !args.dry_run {
            stop::undo_earlier(&journal, &reach).await?;
        }
        let is_active = handle.is_active().await?;
        if is_active && args.method() == Wanted::Stop && !args.dry_run {
            // What is in a QEMU that runs is undone there, before it is shut down.
            let domain = LibvirtDomain::new(libvirt, &known.uuid, Places::default(), false);
            recover_earlier(&domain, &journal, run_dir).await?;
        }
        Ok(is_active)
    };
    let is_active = context.until_interrupted(is_active).await?;
    let stops = args.method() == Wanted::Stop && !args.dry_run;
    if is_active && !stops {
        let (scratch, sockets) = (args.scratch_dir.clone(), args.socket_dir.clone());
        let places = Places { scratch, sockets };
        let domain = LibvirtDomain::new(libvirt, &known.uuid, places, args.with_secrets);
        let domain = if args.method() == Wanted::Suspend { domain.suspended() } else { domain };
        if args.method() == Wanted::Lvm {
            let connect = async { Ok(OnVolumes::new(domain, run_dir, args.lvm_size)) };
            let agent = |domain: &OnVolumes<LibvirtDomain>| domain.machine().agent();
            return back_up(reach, connect, opening, agent, None, args, context).await;
        }
        let connect = async { Ok(domain) };
        let agent = LibvirtDomain::agent;
        return back_up(reach, connect, opening, agent, None, args, context).await;
    }
    let domain = ShutOffDomain::new(handle.clone(), run_dir, args.with_secrets);
    let stop = is_active.then(|| {
        let allowed = (Duration::from_secs(args.stop_timeout), args.power_off);
        Ok::<_, NameError>(Arc::new(Stop::new(
            handle,
            known.name.parse()?,
            allowed,
            journal,
            run_dir,
        )))
    });
    let stop = stop.transpose()?;
    let domain = domain.stopped_by(stop.clone());
    let (connect, stop_first) = (async { Ok(domain) }, stop.as_deref());
    let done = back_up(reach, connect, opening, |_| None, stop_first, args, context).await;
    let Some(stop) = stop else { return done };
    // Not to be interrupted.
    match (stop.finish().await, done) {
        (Ok(()), done) => done,
        (Err(error), Ok(())) => Err(error.into()),
        (Err(error), Err(failed)) => {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "the domain is off, and its guard goes on trying to start it");
            Err(failed)
        }
    }
}

/// The domains that are asked for, each once; all where nothing is.
pub(super) fn choose(
    known: &[KnownDomain],
    wanted: &[String],
) -> Result<Vec<KnownDomain>, CommandError> {
    if wanted.is_empty() {
        return Ok(known.to_vec());
    }
    let mut chosen: Vec<KnownDomain> = Vec::new();
    for wanted in wanted {
        // A name may look like a pattern.
        let exact = |domain: &&KnownDomain| domain.name == *wanted || domain.uuid == *wanted;
        let mut found: Vec<_> = known.iter().filter(exact).collect();
        if let (true, Ok(pattern)) = (found.is_empty(), glob::Pattern::new(wanted)) {
            found = known.iter().filter(|domain| pattern.matches(&domain.name)).collect();
        }
        if found.is_empty() {
            let known = known.iter().map(|domain| domain.name.clone()).collect();
            return Err(CommandError::NoDomain { wanted: wanted.clone(), known });
        }
        let new = found.into_iter().filter(|found| !chosen.contains(found)).cloned();
        let new: Vec<_> = new.collect();
        chosen.extend(new);
    }
    Ok(chosen)
}

/// Backs up one guest, the way to which is locked.
async fn back_up<H: Hypervisor>(
    reach: Reach,
    connect: impl Future<Output = Result<H, HypervisorError>>,
    opening: impl Future<Output = Result<Repository, CommandError>>,
    agent: impl FnOnce(&H) -> Option<AgentAddress>,
    stop: Option<&Stop>,
    args: &BackupArgs,
    context: &Context,
) -> Result<(), CommandError> {
    let run_dir = &context.global.run_dir;
    context.progress.phase("connecting");
    let journal = context.journal()?;
    // Opening the repository takes its time; meanwhile the guest shows what it does without us.
    let look = async {
        let hypervisor = connect.await?;
        let before = hypervisor.guest_io().await?;
        if !args.dry_run {
            recover_earlier(&hypervisor, &journal, run_dir).await?;
        }
        let found = match stop {
            Some(_) => None,
            None => Some(discover(&hypervisor, &reach, args).await?),
        };
        Ok::<_, CommandError>((hypervisor, before, found))
    };
    let open = async { Context::add_to(opening.await?).await };
    let both = async {
        // Each comes to its end whatever becomes of the other: an undo is not left half done, a lock not held.
        let (looked, open) = tokio::join!(look, open);
        let open = open?;
        Ok((looked?, open))
    };
    let ((hypervisor, before, found), open) = context.until_interrupted(both).await?;
    // Only now: for a repository that cannot be opened nobody shuts a guest down.
    if let Some(stop) = stop {
        context.progress.phase("waiting for the guest to shut down");
        context.until_interrupted(async { Ok(stop.shut_down().await?) }).await?;
    }
    let (domain, mut machine) = match found {
        Some(found) => found,
        None => context.until_interrupted(discover(&hypervisor, &reach, args)).await?,
    };
    plan::check_wanted(&machine, &domain, &args.disk)?;
    for exclusion in args.exclude_disk.iter().filter(|exclusion| exclusion.domain.is_some()) {
        let disk = exclusion.disk.as_str();
        if exclusion.is_about(&domain) && machine.skipped.iter().all(|left| left.device != disk) {
            tracing::warn!("domain `{domain}` has no disk `{disk}`, which --exclude-disk names");
        }
    }
    let _domain_lock = DomainLock::on_domain(run_dir, &domain, &machine.uuid)?;
    let catalog = open.catalog();
    let earlier = catalog.history(&domain, &machine.uuid).map_err(PlanError::from)?;
    let claims = plan::claims(&machine, &earlier.newest_first());
    if args.dry_run {
        hypervisor.presume(&mut machine, &claims);
    } else {
        let reclaim = async { Ok(hypervisor.reclaim(&mut machine, &claims).await?) };
        context.until_interrupted(reclaim).await?;
    }
    let state_dir = &context.global.state_dir;
    let tracker = async { tracker(&hypervisor, &machine, &reach, args, context).await };
    let tracker = context.until_interrupted(tracker).await?;
    let is_held = overlays::leave_untracked(&mut machine, &reach, state_dir)?;
    let mut able = Able::of(&machine, hypervisor.no_job());
    able.is_off &= !stop.is_some_and(Stop::is_down);
    (able.is_held, able.tracks) = (is_held && tracker.is_none(), tracker.is_some());
    let method = method::choose(args.method(), &able)?;
    let tracker = tracker.filter(|_| method.method == Method::Overlay);
    match &tracker {
        Some(tracker) => tracker.describe(&mut machine),
        None => method.leave_bitmaps(&mut machine),
    }
    let request = Request {
        applications: context.config()?.domain(domain.as_str()).applications(),
        quiesce: args.quiesce.unwrap_or(Mode::Auto),
        agent: agent(&hypervisor),
        limits: Limits { bytes_per_second: args.limit_read },
        audit: args.audit.map_or(Audit::Usual, Audit::Share),
        timeout: Duration::from_secs(args.timeout),
    };
    let newest_first = earlier.newest_first();
    let (index, full) = (&open.index, args.full);
    let last_known = LastKnown::of(state_dir, open.repository.id(), &domain, &machine.uuid);
    let mut plan = plan::plan(machine, method, domain, &newest_first, &catalog, index, full)?;
    plan.warnings.extend(last_known.is_gone(&open.repository, &earlier));
    if args.dry_run {
        plan.check();
        return print_plan(&plan, context);
    }
    if args.qmp.is_some() {
        // Only there one machine may be backed up under several names.
        plan.keep_of_other_names(&catalog, &BitmapNames::of_repository(open.repository.id()))?;
    }
    print_reasons(&plan, context);
    let target = Target { repository: open.repository, index: open.index };
    let name = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
    let host = Host { name, journal, run_dir: run_dir.clone() };
    let by_overlays = args.overlays.settings(tracker.is_some());
    let (progress, lock) = (&context.progress, open.lock);
    let (target, host, plan, request) = (&target, &host, &plan, &request);
    let finished = match plan.method.method {
        Method::Overlay => {
            let (layers, records) = (hypervisor.layers().await?, Records::open(state_dir)?);
            let (inner, run_dir) = (&hypervisor, run_dir.clone());
            let hypervisor = &Overlaid::new(inner, layers, records, by_overlays, run_dir, progress);
            let run = Run { hypervisor, plan, before, target, host, request, progress };
            run.execute(lock, context.interrupted(), || context.interrupted_anew()).await
        }
        _ => {
            let hypervisor = &hypervisor;
            let run = Run { hypervisor, plan, before, target, host, request, progress };
            run.execute(lock, context.interrupted(), || context.interrupted_anew()).await
        }
    };
    context.progress.finish();
    let finished = finished?;
    if let Err(error) = last_known.remember(finished.id, finished.manifest.time) {
        tracing::warn!(%error, "should this snapshot be taken away, nobody will notice");
    }
    print_result(&finished, context)?;
    for disk in finished.manifest.disks.iter().filter(|_| args.qmp.is_some()) {
        if let Some(overlay) = &disk.overlay {
            let target = &disk.target;
            tracing::warn!(
                "{target}: the guest writes to {overlay} from here on: start it with that from now on"
            );
        }
    }
    match finished.leftover {
        None => Ok(()),
        Some(error) => Err(CommandError::Leftover(error)),
    }
}

/// What a machine is called, and what it has.
async fn discover(
    hypervisor: &impl Hypervisor,
    reach: &Reach,
    args: &BackupArgs,
) -> Result<(DomainName, Machine), CommandError> {
    let domain: DomainName = match &args.name {
        Some(name) => name.clone(),
        None => {
            let name = hypervisor.name().await?;
            name.ok_or_else(|| CommandError::NoName { reach: reach.clone() })?.parse()?
        }
    };
    let of_it = args.exclude_disk.iter().filter(|exclusion| exclusion.is_about(&domain));
    let excluded = of_it.map(|exclusion| exclusion.disk.clone()).collect();
    let choice = Choice { only: args.disk.clone(), excluded };
    Ok((domain, hypervisor.discover(&choice).await?))
}

/// The overlays that track the changes of a machine that runs, where there are any or shall be. What an
/// earlier backup has read is written back first.
async fn tracker(
    hypervisor: &impl Hypervisor,
    machine: &Machine,
    reach: &Reach,
    args: &BackupArgs,
    context: &Context,
) -> Result<Option<Tracker>, CommandError> {
    let records = Records::open(&context.global.state_dir)?;
    let all = records.all_of(reach)?;
    let of = |purpose| all.iter().any(|held| held.record().purpose == purpose);
    let by_user = of(Purpose::User) || of(Purpose::Backup);
    let is_wanted = matches!(args.tracking, Some(TrackBy::Overlay)) || of(Purpose::Tracking);
    if !is_wanted || by_user || machine.shut_off.is_some() {
        return Ok(None);
    }
    let layers = hypervisor.layers().await?;
    let (budget, progress) = (args.overlays.budget(), &context.progress);
    let purge = Purge { layers: &layers, records: &records, budget, progress };
    if !args.dry_run {
        track::settle(&layers, &records, reach).await?;
        track::look(&layers, &records, reach).await?.keep_doubts(&records, reach)?;
        let interrupt = std::pin::pin!(context.interrupted());
        if let Err(error) = track::sink(&purge, reach, interrupt).await {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "what an earlier backup has read is not written back yet");
        }
        track::check_sunk(&layers, &records, reach).await?;
    }
    let tracker = track::look(&layers, &records, reach).await?;
    if let Some(why) = tracker.lost() {
        let hint = why.hint().unwrap_or("`kvmsnap purge` says more");
        tracing::error!("{why}; until then nothing tracks what changes ({hint})");
        return Ok(None);
    }
    for (disk, image) in tracker.changed() {
        let image = image.display();
        tracing::warn!(
            "disk `{disk}`: {image} was written to beneath the overlay that tracks what changes: all of \
             the disk is read"
        );
    }
    Ok(Some(tracker))
}

/// Locks the way to a machine. A guard that undoes an earlier run there is waited for.
pub(super) async fn lock(run_dir: &Path, reach: &Reach) -> Result<DomainLock, CommandError> {
    let start = Instant::now();
    loop {
        match DomainLock::on_reach(run_dir, reach) {
            Err(LockError::Held { is_guard: true, .. }) if start.elapsed() < GUARD_TIMEOUT => {
                tokio::time::sleep(GUARD_POLL).await;
            }
            locked => return Ok(locked?),
        }
    }
}

/// A disk that the user does not want, of all domains or of one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Exclusion {
    domain: Option<DomainName>,
    disk: DiskName,
}

impl Exclusion {
    fn is_about(&self, domain: &DomainName) -> bool {
        self.domain.as_ref().is_none_or(|of| of == domain)
    }
}

impl FromStr for Exclusion {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        // Neither name can hold a slash.
        let (domain, disk) = match text.rsplit_once('/') {
            Some((domain, disk)) => (Some(domain.parse()?), disk),
            None => (None, text),
        };
        Ok(Self { domain, disk: disk.parse()? })
    }
}

/// Undoes what earlier runs left in this machine, and brings its guest back from their overlays.
pub(super) async fn recover_earlier(
    hypervisor: &impl Hypervisor,
    journal: &Journal,
    run_dir: &Path,
) -> Result<(), CommandError> {
    undo_earlier(hypervisor, journal, run_dir).await?;
    let (reach, state_dir) = (hypervisor.reach(), journal.state_dir());
    if Records::open(state_dir)?.of(&reach)?.is_none() {
        return Ok(());
    }
    let layers = hypervisor.layers().await?;
    let ended = recover::end_overlays(&layers, state_dir, &reach, recover::IN_PASSING).await;
    if let Err(error) = ended {
        let error: &dyn std::error::Error = &error;
        tracing::warn!(error, "the guest still writes to the overlays of an earlier backup");
    }
    Ok(())
}

/// Undoes what earlier runs left in this machine, but for overlays. What cannot be read may be of another
/// one.
pub(super) async fn undo_earlier(
    hypervisor: &impl Hypervisor,
    journal: &Journal,
    run_dir: &Path,
) -> Result<(), CommandError> {
    let (pending, damaged) = journal.pending()?;
    for error in damaged {
        tracing::error!(%error, "an undo record is passed over");
    }
    let reach = hypervisor.reach();
    // What was shut down has been started again already, or is on its way down.
    let is_it = |record: &Record| record.reach == reach && record.stopped.is_none();
    for recorded in pending.iter().filter(|recorded| is_it(recorded.record())) {
        recover::undo(hypervisor, journal, recorded, run_dir).await?;
    }
    Ok(())
}

fn print_reasons(plan: &Plan, context: &Context) {
    if context.global.quiet {
        return;
    }
    for skipped in &plan.machine.skipped {
        tracing::info!("{}: left out, {}", skipped.device, skipped.reason);
    }
    tracing::info!("method {}: {}", plan.method.method.as_str(), plan.method.reason);
    for planned in &plan.disks {
        let (kind, reason) = (planned.decision.kind.as_str(), &planned.decision.reason);
        let method = plan.method.of_disk(planned.decision.tracked).as_str();
        tracing::info!("{}: {kind} by {method}, {reason}", planned.disk.target);
    }
}

fn print_plan(plan: &Plan, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    if !context.global.json {
        let (method, reason) = (plan.method.method.as_str(), &plan.method.reason);
        writeln!(out, "{}: method {method}: {reason}", plan.domain)?;
    }
    for planned in &plan.disks {
        let (disk, decision) = (&planned.disk, &planned.decision);
        if context.global.json {
            context.print_json(
                &mut out,
                &serde_json::json!({
                    "domain": plan.domain, "target": disk.target, "size": disk.size,
                    "kind": decision.kind, "reason": decision.reason,
                    "parent": plan.parent.map(|parent| parent.to_string()),
                    "tracked": decision.kind == Kind::Incremental,
                    "method": plan.method.method, "method_reason": plan.method.reason,
                    "disk_method": plan.method.of_disk(decision.tracked),
                }),
            )?;
        } else {
            let (kind, reason) = (decision.kind.as_str(), &decision.reason);
            let size = human_bytes(disk.size);
            let method = plan.method.of_disk(decision.tracked).as_str();
            let (domain, target) = (&plan.domain, &disk.target);
            writeln!(out, "{domain}/{target}: {size}, {kind} by {method}: {reason}")?;
        }
    }
    if !context.global.json {
        for skipped in &plan.machine.skipped {
            writeln!(out, "{}/{}: left out: {}", plan.domain, skipped.device, skipped.reason)?;
        }
    }
    Ok(())
}

/// A backup that was made, as `--json` prints it.
#[derive(Serialize)]
struct Done<'a> {
    #[serde(flatten)]
    line: BackupLine<'a>,
    #[serde(flatten)]
    stall: Option<StallLine>,
}

fn print_result(finished: &Finished, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    let manifest = &finished.manifest;
    if context.global.json {
        let line = BackupLine::new(&finished.id, manifest);
        return context
            .print_json(&mut out, &Done { line, stall: finished.stall.map(StallLine::of) });
    }
    for warning in &manifest.warnings {
        tracing::warn!("{warning}");
    }
    for disk in &manifest.disks {
        writeln!(
            out,
            "{}/{}: {} ({}): {} changed, {} read, {} stored",
            manifest.domain,
            disk.target,
            disk.kind.as_str(),
            disk.reason,
            human_bytes(disk.bytes_changed),
            human_bytes(disk.bytes_read),
            human_bytes(disk.bytes_stored),
        )?;
    }
    let held = match (manifest.freeze_ms, manifest.pause_ms) {
        (Some(ms), _) => format!(", frozen for {ms} ms"),
        (None, Some(ms)) => format!(", paused for {ms} ms"),
        (None, None) => String::new(),
    };
    writeln!(
        out,
        "snapshot {} of {}: {}, {}-consistent{held}, {:.1} s",
        crate::catalog::short(&finished.id),
        manifest.domain,
        manifest.kind.as_str(),
        manifest.consistency.as_str(),
        manifest.duration_ms as f64 / 1000.0,
    )?;
    if let Some(stall) = finished.stall {
        let domain = &manifest.domain;
        writeln!(
            out,
            "{domain}: the guest's longest stall on its way back from overlays: {stall}"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_excluded_of_all_domains_or_of_one() {
        let web: DomainName = "web".parse().unwrap();
        let excludes = |text: &str| text.parse::<Exclusion>().map(|it| it.is_about(&web));
        assert_eq!(excludes("vdb"), Ok(true));
        assert_eq!(excludes("web/vdb"), Ok(true));
        assert_eq!(excludes("web-1/vdb"), Ok(false));
        for text in ["", "web/", "/vdb", "a/b/c"] {
            assert!(text.parse::<Exclusion>().is_err(), "{text}");
        }
    }
}
