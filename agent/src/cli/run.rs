//! `kvmsnap run`

use std::io::Write;
use std::time::Duration;

use clap::Args;
use comfy_table::{Table, presets};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::Context;
use super::list::local_time;
use crate::catalog;
use crate::config::Config;
use crate::error::CommandError;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::libvirt;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::lock::{AlertLock, LockError, RunLock};
use crate::notify::known::Known;
use crate::notify::{Event, Kind, Subject};
use crate::progress::human_bytes;
use crate::run::child::Launcher;
use crate::run::due::{self, Due};
use crate::run::history::{Outcome, Step};
use crate::run::state::{Pause, State};
use crate::run::tell;
use crate::run::watch::{self, Moment, Watch};
use crate::run::{Begin, Clock, Ended, Machine, Runner};
use crate::syslog;
use crate::units::{human_duration, parse_duration};

/// How long a run that is asked to stop may take to clean up.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1200);
const ABORT_POLL: Duration = Duration::from_millis(50);

/// Do what is due: back up, thin out, verify, and tell those who want to know
///
/// A timer starts this every few minutes. Jobs, their schedules and all else are in the configuration, see
/// `kvmsnap config`. What was missed while the host was off is caught up once. Where another run is
/// active, this one ends at once.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap run --dry-run         what is due and why, and when each job is next
  kvmsnap run                   what the timer starts
  kvmsnap run nightly --now     this job, due or not
  kvmsnap run --pause 2h        nothing runs for two hours
  kvmsnap run --abort           end the active run, and wait until all is cleaned up")]
pub struct RunArgs {
    /// Only these jobs
    #[arg(value_name = "JOB")]
    jobs: Vec<String>,
    /// Also what is not due
    #[arg(long)]
    now: bool,
    /// Only what is due; so it is unless --now is given
    #[arg(long, conflicts_with_all = ["now", "jobs"])]
    all_due: bool,
    /// Only say what is due and why, and when each job is next
    #[arg(long)]
    dry_run: bool,
    /// Run nothing until then, like 2h or 2026-11-22T06:00; until --resume where no time is given
    #[arg(long, value_name = "UNTIL", num_args = 0..=1, require_equals = false,
          conflicts_with_all = ["jobs", "now", "dry_run", "resume", "abort"])]
    pause: Option<Option<String>>,
    /// Run what is due again
    #[arg(long, conflicts_with_all = ["jobs", "now", "dry_run", "abort"])]
    resume: bool,
    /// Ask the active run to stop, and wait until it has cleaned up
    #[arg(long, conflicts_with_all = ["jobs", "now", "dry_run"])]
    abort: bool,
    /// Only tell people what they should know, as while another run is active
    #[arg(long, hide = true, conflicts_with_all = ["now", "jobs", "dry_run", "pause", "resume", "abort"])]
    only_look: bool,
    /// As if it were that time; for tests of schedules
    #[arg(long, value_name = "TIME", hide = true)]
    at: Option<Timestamp>,
}

/// Runs it.
///
/// # Errors
/// [`CommandError::StepsFailed`] after doing all else that is due.
pub async fn run(args: RunArgs, context: &Context) -> Result<(), CommandError> {
    let state_dir = &context.global.state_dir;
    let clock = Clock::new(args.at);
    if args.abort {
        return context.until_interrupted(abort(context)).await;
    }
    if args.resume {
        let was_paused = Pause::end(state_dir)?;
        let text = if was_paused { "jobs run again" } else { "nothing was paused" };
        return say(context, text, &json!({"paused": false}));
    }
    if let Some(until) = &args.pause {
        let until = until.as_deref().map(|text| parse_until(text, clock.now())).transpose()?;
        Pause { since: clock.now(), until }.begin(state_dir)?;
        let text = match until {
            Some(until) => format!("nothing runs until {}", local_time(until)),
            None => "nothing runs until `kvmsnap run --resume`".to_owned(),
        };
        return say(context, &text, &json!({"paused": true, "until": until}));
    }
    let config = context.config().inspect_err(|error| {
        // Nothing is backed up, and who is to be told is not known.
        syslog::tell(&format!("nothing is done: {error}"));
    })?;
    for wanted in &args.jobs {
        if !config.job.contains_key(wanted.as_str()) {
            let known = config.job.keys().map(ToString::to_string).collect();
            return Err(CommandError::NoJob { wanted: wanted.clone(), known });
        }
    }
    if config.job.is_empty() {
        return Err(CommandError::NoJobs);
    }
    if args.only_look {
        return watch_only(Moment::Active, config, clock, context).await;
    }
    let paused = Pause::load(state_dir, clock.now());
    if args.dry_run {
        return dry_run(&args, config, clock, paused, context).await;
    }
    if let Some(pause) = paused {
        let text = match pause.until {
            Some(until) => format!("paused until {}", local_time(until)),
            None => "paused: `kvmsnap run --resume` ends that".to_owned(),
        };
        watch_only(Moment::Paused(pause), config, clock, context).await?;
        return say(context, &text, &json!({"paused": true, "until": pause.until}));
    }
    let _lock = match RunLock::take(&context.global.run_dir) {
        Err(LockError::Held { holder, .. }) => {
            let text = format!("another run (process {holder}) is active: nothing is done");
            watch_only(Moment::Active, config, clock, context).await?;
            return say(context, &text, &json!({"active": holder}));
        }
        lock => lock?,
    };
    really(&args, config, clock, context).await
}

fn say(context: &Context, text: &str, line: &serde_json::Value) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    match context.global.json {
        true => context.print_json(&mut out, line),
        false if context.global.quiet => Ok(()),
        false => Ok(writeln!(out, "{text}")?),
    }
}

fn parse_until(text: &str, now: Timestamp) -> Result<Timestamp, CommandError> {
    let length = parse_duration(text).ok().and_then(|it| SignedDuration::try_from(it).ok());
    let second = |time: Timestamp| Timestamp::from_second(time.as_second()).unwrap_or(time);
    if let Some(until) = length.and_then(|length| now.checked_add(length).ok()) {
        return Ok(second(until));
    }
    let parsed = catalog::parse_time(text);
    Ok(parsed.map_err(|source| catalog::CatalogError::Time { wanted: text.to_owned(), source })?)
}

/// The jobs that were asked for, with those to be done now.
fn jobs<'a>(
    args: &RunArgs,
    config: &'a Config,
    state: &State,
    host: &str,
    now: Timestamp,
) -> Vec<Due<'a>> {
    let is_wanted =
        |due: &Due<'_>| args.jobs.is_empty() || args.jobs.iter().any(|it| it == due.name);
    let mut jobs = due::all(config, state, host, now);
    jobs.retain(is_wanted);
    if args.now {
        jobs.iter_mut().for_each(|due| due.backup = crate::schedule::Verdict::Due(now));
    }
    jobs
}

async fn dry_run(
    args: &RunArgs,
    config: &Config,
    clock: Clock,
    paused: Option<Pause>,
    context: &Context,
) -> Result<(), CommandError> {
    let state = State::load(&context.global.state_dir);
    let jobs = jobs(args, config, &state, &host(), clock.now());
    let (machines, problem) = machines(config, context).await?;
    if let Some(problem) = problem {
        return Err(problem.into());
    }
    let mut out = std::io::stdout().lock();
    if let Some(pause) = paused {
        let until = pause.until.map_or("`kvmsnap run --resume`".to_owned(), local_time);
        tracing::warn!("paused: nothing runs until {until}");
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["JOB", "WHY", "DOMAINS", "NEXT"]);
    for due in &jobs {
        let names: Vec<&str> = of_job(due, &machines).map(|it| it.name.as_str()).collect();
        if context.global.json {
            let line = json!({
                "job": due.name, "due": due.is_due(), "reason": due.reason(|it| it.to_string()),
                "domains": names, "next": due.next, "paused": paused.is_some(),
            });
            context.print_json(&mut out, &line)?;
        } else {
            let next = due.next.map_or("never".to_owned(), local_time);
            table.add_row([due.name.to_owned(), due.reason(local_time), names.join(", "), next]);
        }
    }
    if !context.global.json {
        writeln!(out, "{}", table.trim_fmt())?;
    }
    Ok(())
}

/// The machines of a job, in their order.
pub(super) fn of_job<'a>(
    due: &Due<'_>,
    machines: &'a [Machine],
) -> impl Iterator<Item = &'a Machine> {
    let mut of_it: Vec<_> = machines.iter().filter(|it| due.job.is_about(&it.name)).collect();
    of_it.sort_by_cached_key(|machine| due.job.rank(&machine.name));
    of_it.into_iter()
}

pub(super) fn host() -> String {
    nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned()
}

/// All machines that can be backed up here: those of libvirt, and those that are configured by their sockets.
/// Where libvirt cannot be asked, why not.
pub(super) async fn machines(
    config: &Config,
    context: &Context,
) -> Result<(Vec<Machine>, Option<HypervisorError>), CommandError> {
    let mut machines: Vec<Machine> = Vec::new();
    for (name, settings) in config.unmanaged() {
        let mut arguments = Vec::new();
        let sockets = [("--qmp", &settings.qmp), ("--qga", &settings.qga)];
        for (option, socket) in sockets {
            if let Some(socket) = socket {
                arguments.extend([option.to_owned(), socket.to_string_lossy().into_owned()]);
            }
        }
        arguments.extend(["--name".to_owned(), name.to_owned()]);
        machines.push(Machine { name: name.to_owned(), uuid: None, arguments });
    }
    // A host without libvirt names its machines.
    let is_named = |text: &str| machines.iter().any(|machine| machine.name == text);
    let mut patterns = config.job.values().flat_map(|job| &job.domains);
    if patterns.all(|pattern| is_named(pattern.as_str())) {
        return Ok((machines, None));
    }
    let asking = async {
        let libvirt = Libvirt::connect(&context.global.connect).await?;
        libvirt::domains(&libvirt).await
    };
    let (found, problem) = match context.until_interrupted(async { Ok(asking.await) }).await? {
        Ok(found) => (found, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    for known in found {
        if !machines.iter().any(|machine| machine.name == known.name) {
            // A name may begin like an option.
            let arguments = vec!["--".to_owned(), known.name.clone()];
            machines.push(Machine { name: known.name, uuid: Some(known.uuid), arguments });
        }
    }
    Ok((machines, problem))
}

/// Does nothing but tell people what they should know even so.
async fn watch_only(
    moment: Moment<'_>,
    config: &Config,
    clock: Clock,
    context: &Context,
) -> Result<(), CommandError> {
    let (machines, problem) = machines(config, context).await?;
    let (mut state, host, now) = (State::load(&context.global.state_dir), host(), clock.now());
    watch::meet(&mut state, config, &machines, now);
    let (state, machines, has_more) = (&state, &machines[..], problem.is_some());
    let watch = Watch { config, state, machines, has_more, host: &host, now };
    let (events, well) = watch.look(moment);
    tell_people((events, &well), &watch, context).await;
    Ok(())
}

async fn really(
    args: &RunArgs,
    config: &Config,
    clock: Clock,
    context: &Context,
) -> Result<(), CommandError> {
    let global = &context.global;
    let host = host();
    let mut state = State::load(&global.state_dir);
    let (machines, problem) = machines(config, context).await?;
    watch::meet(&mut state, config, &machines, clock.now());
    let jobs = jobs(args, config, &state, &host, clock.now());
    let due: Vec<Due<'_>> = jobs.iter().filter(|due| due.is_due()).cloned().collect();
    let problem = problem.map(|error| {
        let text = crate::error::describe(&error.into());
        text.trim_end().trim_start_matches("error: ").to_owned()
    });
    let has_more = problem.is_some();
    if !due.is_empty() {
        // What the jobs do may take long, or never end.
        let (state, machines, now) = (&state, &machines[..], clock.now());
        let watch = Watch { config, state, machines, has_more, host: &host, now };
        let (events, well) = watch.look(Moment::Begin(&due));
        tell_people((events, &well), &watch, context).await;
    }
    let launcher = Launcher {
        config: global.config.clone(),
        password_file: global.password_file.clone(),
        connect: global.connect.clone(),
        state_dir: global.state_dir.clone(),
        run_dir: global.run_dir.clone(),
        nice: config.run.nice.get(),
        idle_io: config.run.idle_io,
        interrupts: context.interrupts.clone(),
    };
    let ping = config.alerts.ping.as_ref().filter(|_| !due.is_empty());
    if let Some(ping) = ping
        && let Err(error) = ping.begun().await
    {
        tracing::warn!(%error, "cannot say that a run begins");
    }
    let tell = |step: &Step| {
        if let Err(error) = print(step, context) {
            tracing::debug!(%error, "nobody reads the output");
        }
    };
    let begin = Begin {
        config,
        launcher,
        clock,
        state_dir: global.state_dir.clone(),
        machines: machines.clone(),
        problem,
        state,
        tell,
    };
    let Ended { record, mut events, mut well, state, trouble } = Runner::new(begin).run(&due).await;
    let (failed, count) = (record.count(Outcome::Failed), record.steps.len());
    let aborted = record.count(Outcome::Aborted) > 0 || context.interrupts.borrow().times > 0;
    if let Some(ping) = ping {
        let why = match (aborted, failed) {
            (true, _) => Some("it was ended before all was done".to_owned()),
            (false, 0) => trouble.as_ref().map(ToString::to_string),
            (false, failed) => Some(format!("{failed} of {count} steps failed")),
        };
        if let Err(error) = ping.ended(why).await {
            tracing::warn!(%error, "cannot say that a run has ended");
        }
    }
    let (state, machines, now) = (&state, &machines[..], clock.now());
    let watch = Watch { config, state, machines, has_more, host: &host, now };
    let (more, fine) = watch.look(Moment::End);
    events.extend(more);
    well.extend(fine);
    tell_people((events, &well), &watch, context).await;
    if due.is_empty() && !global.quiet && !global.json {
        let next = jobs.iter().filter_map(|job| Some((job.next?, job.name))).min();
        let next = next.map(|(time, job)| format!(": {job} is next, {}", local_time(time)));
        tracing::info!(target: "progress", "nothing is due{}", next.unwrap_or_default());
    }
    match (trouble, failed) {
        (Some(trouble), _) => Err(trouble.into()),
        _ if aborted => Err(CommandError::Interrupted),
        (None, 0) => Ok(()),
        (None, failed) => Err(CommandError::StepsFailed { failed, count }),
    }
}

/// Tells people what they do not know yet, and writes the figures. What cannot be told makes no backup bad.
async fn tell_people(
    (mut events, well): (Vec<Event>, &[Subject]),
    watch: &Watch<'_>,
    context: &Context,
) {
    let Watch { config, now, host, .. } = *watch;
    let (mut well, subject) = (well.to_vec(), tell::telling());
    match &config.alerts_problem {
        None => well.push(subject),
        Some(problem) => events.push(Event {
            kind: Kind::Warning,
            subject,
            title: "not all are told: a part of [alerts] makes no sense".to_owned(),
            text: problem.to_string(),
        }),
    }
    let state_dir = &context.global.state_dir;
    // A run that is active and one that only looks may both have something to tell.
    let _lock = match AlertLock::take(&context.global.run_dir).await {
        Ok(lock) => Some(lock),
        Err(LockError::Held { holder, .. }) => {
            tracing::warn!("process {holder} is telling people, and does not end");
            return;
        }
        Err(error) => {
            tracing::warn!(%error, "people may be told twice");
            None
        }
    };
    let run_dir = &context.global.run_dir;
    let mut known = Known::load(state_dir, run_dir);
    let keep = |known: &Known| {
        if let Err(error) = known.save(state_dir, run_dir) {
            tracing::warn!(%error, "people may be told again");
        }
    };
    let remind = SignedDuration::from_hours(i64::from(config.alerts.remind_hours.max(1)));
    let events: Vec<Event> = known.sift(events, &well, now, remind);
    for event in &events {
        tracing::warn!("{}: {}", event.kind.as_str(), event.title);
    }
    config.alerts.enqueue(&mut known.queue, &events, now);
    if !events.is_empty() {
        // Whatever becomes of us, it will be told.
        keep(&known);
    }
    for told in config.alerts.deliver(host, &mut known.queue, now).await {
        if let Err(error) = told.outcome {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "cannot tell {}", told.channel);
        }
    }
    keep(&known);
    if let Some(metrics) = &config.metrics
        && let Err(error) = metrics.write(&watch.figures())
    {
        let error: &dyn std::error::Error = &error;
        tracing::error!(error, "no metrics");
    }
}

fn print(step: &Step, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    if context.global.json {
        return context.print_json(&mut out, step);
    }
    if context.global.quiet && step.outcome == Outcome::Done {
        return Ok(());
    }
    let what = match (&step.domain, &step.repository) {
        (Some(domain), _) => format!("{} of {domain}", step.work),
        (None, Some(repository)) => format!("{} of {repository}", step.work),
        (None, None) => step.work.clone(),
    };
    let took = human_duration(Duration::from_millis(step.duration_ms));
    let mut line = format!("{}: {what}: {}", step.job, step.outcome.as_str());
    if let (Some(figures), Some(snapshot)) = (&step.figures, &step.snapshot) {
        let kind = if figures.incremental { "incremental" } else { "full" };
        let (read, stored) = (human_bytes(figures.bytes_read), human_bytes(figures.bytes_stored));
        let short = snapshot.get(..8).unwrap_or(snapshot);
        line += &format!(": snapshot {short}, {kind}, {read} read, {stored} stored, {took}");
    }
    for text in step.text.lines() {
        line += &format!("\n  {text}");
    }
    Ok(writeln!(out, "{line}")?)
}

/// Asks the active run to stop and waits until it has.
async fn abort(context: &Context) -> Result<(), CommandError> {
    let run_dir = &context.global.run_dir;
    let begun = std::time::Instant::now();
    let mut asked = None;
    loop {
        match RunLock::take(run_dir) {
            Ok(_) if asked.is_none() => {
                return say(context, "no run is active", &json!({"active": null}));
            }
            Ok(_) => return say(context, "the run has ended", &json!({"active": null})),
            Err(LockError::Held { holder, .. }) => {
                if asked.as_ref() != Some(&holder) && RunLock::ask_to_stop(run_dir, &holder)? {
                    tracing::info!(target: "progress", "asked process {holder} to stop");
                    asked = Some(holder.clone());
                }
                if begun.elapsed() > ABORT_TIMEOUT {
                    return Err(CommandError::StillActive { holder });
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(ABORT_POLL).await;
    }
}

/// When a time is, for people in a zone of their own.
pub(super) fn in_zone(time: Timestamp, zone: &TimeZone) -> String {
    time.to_zoned(zone.clone()).strftime("%a %Y-%m-%d %H:%M %Z").to_string()
}
