//! `kvmsnap status`

use std::io::Write;
use std::path::Path;

use clap::Args;
use comfy_table::{Table, presets};
use jiff::Timestamp;
use serde::Serialize;

use super::list::local_time;
use super::{Context, OpenRepository, overlays};
use crate::catalog::Backup;
use crate::config::Config;
use crate::error::CommandError;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::shut_off::ShutOffDomain;
use crate::hypervisor::libvirt::{self, KnownDomain, LibvirtDomain, Places};
use crate::hypervisor::{Choice, Hypervisor, HypervisorError, Reach, Skipped};
use crate::journal::Recorded;
use crate::lock::{DomainLock, LockError};
use crate::manifest::{Kind, Method};
use crate::method::{self, Able, Wanted};
use crate::names::DomainName;
use crate::overlay::fill::{Fill, LOW};
use crate::overlay::record::{Held, Purpose, Record, Records};
use crate::plan;
use crate::run::due;
use crate::run::state::{DomainState, State};
use crate::store::blocking;

const NOT_HERE: &str = "not here";
const UNMANAGED: &str = "unmanaged";

/// Show for each domain its last backup, how the next one will be taken and why, and what is left
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap status
  kvmsnap status web --json | jq .next")]
pub struct StatusArgs {
    /// Only these domains
    #[arg(value_name = "DOMAIN")]
    domains: Vec<String>,
}

/// A domain as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
struct Line {
    domain: String,
    uuid: String,
    /// Where it is: `running`, `shut off`, `not here`, or `unmanaged`: named by its socket, and not looked at.
    state: &'static str,
    last: Option<Last>,
    next: Vec<Next>,
    /// How the point in time of the next one is taken.
    method: Option<Method>,
    /// What the next one leaves out.
    skipped: Vec<Skipped>,
    /// Why no backup can be taken.
    problem: Option<String>,
    /// Runs that left something behind.
    leftovers: Vec<String>,
    /// How full the overlays are that track its changes.
    overlays: Vec<Fill>,
    /// When a job backs it up next.
    due: Option<Timestamp>,
    /// Why its backups are not young or many enough for a job.
    stale: Option<String>,
}

impl Line {
    /// Of a domain nothing is known of but where it is.
    fn of(domain: &str, uuid: &str, state: &'static str) -> Self {
        Self {
            domain: domain.to_owned(),
            uuid: uuid.to_owned(),
            state,
            last: None,
            next: Vec::new(),
            method: None,
            skipped: Vec::new(),
            problem: None,
            leftovers: Vec::new(),
            overlays: Vec::new(),
            due: None,
            stale: None,
        }
    }
}

#[derive(Debug, Serialize)]
struct Last {
    id: String,
    time: Timestamp,
    kind: Kind,
    warnings: usize,
}

#[derive(Debug, Serialize)]
struct Next {
    target: String,
    kind: Kind,
    reason: String,
    /// Whether changes are tracked from the last backup to the next.
    tracked: bool,
}

/// Runs it.
///
/// # Errors
/// Whatever the repository says. A host without libvirt shows what the repository knows.
pub async fn run(args: StatusArgs, context: &Context) -> Result<(), CommandError> {
    let open = context.open_to_read().await?;
    let catalog = open.catalog();
    let (backups, broken) = blocking(move || catalog.backups(|_| true)).await?;
    for error in broken {
        tracing::error!(%error, "a snapshot is passed over");
    }
    let (pending, damaged) = context.journal()?.pending()?;
    for error in damaged {
        tracing::error!(%error, "an undo record is passed over");
    }
    let run_dir = &context.global.run_dir;
    let at_work = |recorded: &Recorded| {
        let lock = DomainLock::on_reach(run_dir, &recorded.record().reach);
        matches!(lock, Err(LockError::Held { is_guard: false, .. }))
    };
    let left: Vec<Recorded> = pending.into_iter().filter(|record| !at_work(record)).collect();
    let (libvirt, known) = match here(context).await {
        Ok((libvirt, known)) => (Some(libvirt), known),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "only what the repository knows is shown");
            (None, Vec::new())
        }
    };
    let mut lines = Vec::new();
    let folders = (run_dir.as_path(), context.global.state_dir.as_path());
    for domain in &known {
        let libvirt = libvirt.as_ref().expect("its domains came from it");
        if is_wanted(&args, &domain.name) {
            lines.push(line(domain, libvirt, &open, &backups, &left, folders).await);
        }
    }
    lines.extend(elsewhere(&known, &backups, &left).filter(|l| is_wanted(&args, &l.domain)));
    let (records, damaged) = Records::open(&context.global.state_dir)?.all()?;
    for error in damaged {
        tracing::error!(%error, "a record of overlays is passed over");
    }
    for line in &mut lines {
        line.overlays = fills(&records, line);
        for fill in line.overlays.iter().filter(|fill| fill.is_low) {
            tracing::warn!("{}: {fill}: {LOW}", line.domain);
        }
    }
    match context.config() {
        Ok(config) => {
            add_unmanaged(&mut lines, config, |name| is_wanted(&args, name));
            look_at_jobs(&mut lines, config, &backups, &context.global.state_dir);
        }
        Err(error) => tracing::warn!(%error, "what jobs do is not shown"),
    }
    lines.sort_by(|a, b| a.domain.cmp(&b.domain));
    let mut out = std::io::stdout().lock();
    if context.global.json {
        return lines.iter().try_for_each(|line| context.print_json(&mut out, line));
    }
    Ok(writeln!(out, "{}", table(&lines))?)
}

/// Those that no libvirt manages are here where the configuration says so, and also without a backup.
fn add_unmanaged(lines: &mut Vec<Line>, config: &Config, is_wanted: impl Fn(&str) -> bool) {
    for (name, _) in config.unmanaged().filter(|(name, _)| is_wanted(name)) {
        let mut of_it = lines.iter_mut().filter(|line| line.domain == name).peekable();
        if of_it.peek().is_none() {
            lines.push(Line::of(name, "", UNMANAGED));
            continue;
        }
        of_it.filter(|line| line.state == NOT_HERE).for_each(|line| line.state = UNMANAGED);
    }
}

/// When jobs back up domains next, and whether their backups are young and many enough.
fn look_at_jobs(lines: &mut [Line], config: &Config, backups: &[Backup], state_dir: &Path) {
    let (state, host, now) = (State::load(state_dir), super::run::host(), Timestamp::now());
    for due in due::all(config, &state, &host, now) {
        // What is no longer here is not backed up here.
        let is_of_it = |line: &&mut Line| line.state != NOT_HERE && due.job.is_about(&line.domain);
        let of_job = lines.iter_mut().filter(is_of_it);
        let wanted = crate::run::wanted(config, due.job, now);
        for line in of_job {
            line.due = line.due.into_iter().chain(due.next).min();
            let of_it = |backup: &&Backup| {
                let manifest = &backup.manifest;
                manifest.domain.as_str() == line.domain && manifest.uuid == line.uuid
            };
            let known = state.jobs.get(due.name).and_then(|job| job.domains.get(&line.domain));
            let known = DomainState {
                since: known.and_then(|known| known.since),
                in_future_since: known.and_then(|known| known.in_future_since),
                last_good: line.last.as_ref().map(|last| last.time),
                snapshots: Some(backups.iter().filter(of_it).count() as u64),
                ..DomainState::default()
            };
            line.stale = line.stale.take().or(wanted(&line.domain).lacks(&known, now));
        }
    }
}

/// How full the overlays are that track the changes of a domain.
fn fills(records: &[Held], line: &Line) -> Vec<Fill> {
    let is_it = |record: &&Record| {
        record.purpose == Purpose::Tracking
            && record.domain.as_str() == line.domain
            && record.uuid == line.uuid
    };
    let of_it = records.iter().map(Held::record).filter(is_it);
    of_it.flat_map(|record| &record.disks).filter_map(Fill::of).collect()
}

fn is_wanted(args: &StatusArgs, name: &str) -> bool {
    args.domains.is_empty() || args.domains.iter().any(|wanted| wanted == name)
}

async fn here(context: &Context) -> Result<(Libvirt, Vec<KnownDomain>), HypervisorError> {
    let libvirt = Libvirt::connect(&context.global.connect).await?;
    let known = libvirt::domains(&libvirt).await?;
    Ok((libvirt, known))
}

/// What is known of a domain of this host.
async fn line<L>(
    known: &KnownDomain,
    libvirt: &Libvirt,
    open: &OpenRepository<L>,
    backups: &[Backup],
    left: &[Recorded],
    (run_dir, state_dir): (&Path, &Path),
) -> Line {
    let state = if known.is_active { "running" } else { "shut off" };
    let mut line = Line {
        last: last(&known.name, &known.uuid, backups),
        leftovers: left_by(left, |reach| match reach {
            Reach::Domain(address) => address.uuid == known.uuid,
            Reach::Monitor(_) => false,
        }),
        ..Line::of(&known.name, &known.uuid, state)
    };
    let planned = async {
        let domain: DomainName = known.name.parse()?;
        let of_it = |backup: &&Backup| {
            backup.manifest.uuid == known.uuid && backup.manifest.domain == domain
        };
        let newest_first = backups.iter().rev().filter(of_it);
        let (mut machine, no_job) = match known.is_active {
            true => {
                let hypervisor = LibvirtDomain::new(libvirt, &known.uuid, Places::default(), false);
                let mut machine = hypervisor.discover(&Choice::default()).await?;
                let claims = plan::claims(&machine, &newest_first);
                hypervisor.presume(&mut machine, &claims);
                (machine, hypervisor.no_job())
            }
            false => {
                let hypervisor = ShutOffDomain::new(libvirt.domain(&known.uuid), run_dir, false);
                (hypervisor.discover(&Choice::default()).await?, None)
            }
        };
        let reach = overlays::reach(libvirt, known);
        let tracker = overlays::tracker(libvirt, known, &reach, state_dir).await?;
        let is_held = overlays::leave_untracked(&mut machine, &reach, state_dir)?;
        let mut able = Able::of(&machine, no_job);
        (able.is_held, able.tracks) = (is_held && tracker.is_none(), tracker.is_some());
        if let Some(tracker) = &tracker {
            tracker.describe(&mut machine);
        }
        let (catalog, index) = (open.catalog(), &open.index);
        let method = method::choose(Wanted::Auto, &able)?;
        let mut plan =
            plan::plan(machine, method, domain.clone(), &newest_first, &catalog, index, false)?;
        plan.check();
        Ok::<_, CommandError>(plan)
    };
    match planned.await {
        Ok(plan) => {
            let next = plan.disks.iter().map(|planned| Next {
                target: planned.disk.target.to_string(),
                kind: planned.decision.kind,
                reason: planned.decision.reason.clone(),
                tracked: planned.decision.kind == Kind::Incremental,
            });
            line.next = next.collect();
            line.method = Some(plan.method.method);
            line.skipped = plan.machine.skipped;
        }
        Err(error) => line.problem = Some(error.to_string()),
    }
    line
}

/// Machines that the repository or the journal knows and libvirt does not.
fn elsewhere<'a>(
    known: &'a [KnownDomain],
    backups: &'a [Backup],
    left: &'a [Recorded],
) -> impl Iterator<Item = Line> + 'a {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    backups.iter().rev().filter_map(move |backup| {
        let (domain, uuid) = (backup.manifest.domain.as_str(), backup.manifest.uuid.as_str());
        if known.iter().any(|known| known.uuid == uuid) || seen.contains(&(domain, uuid)) {
            return None;
        }
        seen.push((domain, uuid));
        Some(Line {
            last: last(domain, uuid, backups),
            leftovers: left
                .iter()
                .map(Recorded::record)
                .filter(|record| record.uuid == uuid && record.domain.as_str() == domain)
                .map(|record| record.run.to_string())
                .collect(),
            ..Line::of(domain, uuid, NOT_HERE)
        })
    })
}

fn left_by(left: &[Recorded], is_it: impl Fn(&Reach) -> bool) -> Vec<String> {
    let of_it = left.iter().map(Recorded::record).filter(|record| is_it(&record.reach));
    of_it.map(|record| record.run.to_string()).collect()
}

fn last(domain: &str, uuid: &str, backups: &[Backup]) -> Option<Last> {
    let of_it = |backup: &&Backup| {
        backup.manifest.uuid == uuid && backup.manifest.domain.as_str() == domain
    };
    backups.iter().rev().find(of_it).map(|backup| Last {
        id: backup.id.to_string(),
        time: backup.manifest.time,
        kind: backup.manifest.kind,
        warnings: backup.manifest.warnings.len(),
    })
}

fn table(lines: &[Line]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut header = vec!["DOMAIN", "STATE", "LAST BACKUP", "ID", "NEXT", "LEFT BEHIND"];
    // A column for what mostly is nothing would only be in the way.
    let tracks = lines.iter().any(|line| !line.overlays.is_empty());
    header.extend(tracks.then_some("OVERLAYS"));
    let has_jobs = lines.iter().any(|line| line.due.is_some());
    header.extend(has_jobs.then_some("DUE"));
    let is_stale = lines.iter().any(|line| line.stale.is_some());
    header.extend(is_stale.then_some("STALE"));
    table.set_header(header);
    for line in lines {
        let (time, id) = match &line.last {
            Some(last) => (local_time(last.time), last.id.chars().take(8).collect()),
            None => ("never".to_owned(), String::new()),
        };
        let mut row = vec![
            line.domain.clone(),
            line.state.to_owned(),
            time,
            id,
            summary(line),
            line.leftovers.join(" "),
        ];
        let fills: Vec<_> = line.overlays.iter().map(Fill::to_string).collect();
        row.extend(tracks.then(|| fills.join("; ")));
        row.extend(has_jobs.then(|| line.due.map(local_time).unwrap_or_default()));
        row.extend(is_stale.then(|| line.stale.clone().unwrap_or_default()));
        table.add_row(row);
    }
    table.trim_fmt()
}

/// How the next backup will be taken, disks of one kind and reason together.
fn summary(line: &Line) -> String {
    if let Some(problem) = &line.problem {
        return problem.clone();
    }
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for next in &line.next {
        let what = format!("{} ({})", next.kind.as_str(), next.reason);
        match groups.iter_mut().find(|(known, _)| *known == what) {
            Some((_, targets)) => targets.push(&next.target),
            None => groups.push((what, vec![&next.target])),
        }
    }
    let mut parts: Vec<_> =
        groups.iter().map(|(what, targets)| format!("{}: {what}", targets.join(", "))).collect();
    let left_out = line.skipped.iter().filter(|skipped| skipped.is_disk);
    parts.extend(left_out.map(|left| format!("{}: left out ({})", left.device, left.reason)));
    parts.join("; ")
}
