//! `kvmsnap config`

use std::io::Write;

use clap::Subcommand;
use jiff::Timestamp;
use serde_json::json;

use super::Context;
use super::run::{host, in_zone, machines, of_job};
use crate::config::example::EXAMPLE;
use crate::config::{Config, Length, PATH, Prune};
use crate::error::CommandError;
use crate::retention::Policy;
use crate::run::due::{self, Due};
use crate::run::state::State;
use crate::run::{Machine, wanted};
use crate::units::human_duration;

/// So many times of each job are shown.
const TIMES: usize = 3;

/// Check the configuration, or print an example of one
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  kvmsnap config example > /etc/kvmsnap/kvmsnap.toml
  kvmsnap config check")]
pub enum ConfigCommand {
    /// Say in words what will happen, and when next
    #[command(after_help = "\
Examples:
  kvmsnap config check
  kvmsnap config check --config new.toml --json | jq .next")]
    Check,
    /// Print a commented example with every key that there is
    #[command(after_help = "\
Examples:
  kvmsnap config example > /etc/kvmsnap/kvmsnap.toml")]
    Example,
}

/// Runs it.
///
/// # Errors
/// What is wrong in the configuration.
pub async fn run(command: &ConfigCommand, context: &Context) -> Result<(), CommandError> {
    match command {
        ConfigCommand::Example => Ok(std::io::stdout().lock().write_all(EXAMPLE.as_bytes())?),
        ConfigCommand::Check => check(context).await,
    }
}

async fn check(context: &Context) -> Result<(), CommandError> {
    let config = context.config()?;
    config.check_alerts(context.global.config.as_deref())?;
    let state = State::load(&context.global.state_dir);
    let now = Timestamp::now();
    let (machines, problem) = match config.job.is_empty() {
        true => (Vec::new(), None),
        false => machines(config, context).await?,
    };
    if let Some(problem) = problem {
        let problem: &dyn std::error::Error = &problem;
        tracing::warn!(problem, "libvirt's domains are not known");
    }
    let host = host();
    let jobs = due::all(config, &state, &host, now);
    let mut out = std::io::stdout().lock();
    if context.global.json {
        for due in &jobs {
            let domains: Vec<&str> = of_job(due, &machines).map(|it| it.name.as_str()).collect();
            let line = json!({
                "job": due.name, "domains": domains, "next": times(due, &host, now),
                "repositories": config.repositories_of(due.job),
                "keep": due.job.keep, "due": due.is_due(),
            });
            context.print_json(&mut out, &line)?;
        }
        return look_at_secrets(config);
    }
    let file = context.global.config.as_deref().unwrap_or(PATH.as_ref());
    writeln!(out, "{} makes sense.", file.display())?;
    for (name, repository) in &config.repository {
        let password = repository.password_source().unwrap_or("from --password-file".to_owned());
        writeln!(out, "\nRepository {name}: {}, its password {password}.", repository.location)?;
    }
    for due in &jobs {
        writeln!(out)?;
        for line in describe(config, due, &machines, &host, now) {
            writeln!(out, "{line}")?;
        }
    }
    for machine in machines.iter().filter(|it| !jobs.iter().any(|due| due.job.is_about(&it.name))) {
        tracing::warn!("no job backs up `{}`", machine.name);
    }
    if config.job.is_empty() {
        writeln!(out, "\nNo job is configured: `kvmsnap run` has nothing to do.")?;
    }
    look_at_secrets(config)
}

/// Whether what stands in files of its own can be had, before it is needed.
fn look_at_secrets(config: &Config) -> Result<(), CommandError> {
    let mut problems: Vec<(String, Box<dyn std::error::Error>)> = Vec::new();
    for (name, repository) in &config.repository {
        if let Err(error) = repository.check_password_file() {
            problems.push((format!("the password of the repository {name}"), error.into()));
        }
    }
    for error in config.alerts.unusable_secrets() {
        problems.push(("who is told of failures".to_owned(), error.into()));
    }
    for (what, error) in &problems {
        tracing::error!(error = &**error, "{what}");
    }
    match problems.len() {
        0 => Ok(()),
        count => Err(CommandError::UnusableSecrets { count }),
    }
}

/// Rules of retention, in words.
fn rules(keep: &Policy) -> String {
    let rules = keep.to_args();
    let rules = rules.iter().map(|rule| rule.trim_start_matches("--keep-").replace('=', " "));
    rules.collect::<Vec<_>>().join(", ")
}

/// The next times of a job.
fn times(due: &Due<'_>, host: &str, now: Timestamp) -> Vec<Timestamp> {
    let seed = due::seed(host, due.name);
    let plan = due::plan(due.job, &seed);
    std::iter::successors(plan.next(now), |time| plan.next(*time)).take(TIMES).collect()
}

/// What a job does, in words.
fn describe(
    config: &Config,
    due: &Due<'_>,
    machines: &[Machine],
    host: &str,
    now: Timestamp,
) -> Vec<String> {
    let job = due.job;
    let times = times(due, host, now).into_iter();
    let times: Vec<_> = times.map(|time| in_zone(time, job.timezone.get())).collect();
    let mut lines = vec![format!("Job {}: {}.", due.name, job.schedule)];
    let mut say = |line: String| lines.push(format!("  {line}"));
    say(format!("Next: {}.", times.join(", ")));
    if due.is_due() {
        say("It is due now: the next `kvmsnap run` does it.".to_owned());
    }
    if let Some(window) = job.window {
        say(format!("It begins at most {window} after its time; else it waits for the next."));
    }
    let names: Vec<&str> = of_job(due, machines).map(|it| it.name.as_str()).collect();
    match names.as_slice() {
        [] => say("It means no domain that is here now.".to_owned()),
        names if job.parallel() > 1 => {
            say(format!("Backs up {}, {} at once.", names.join(", "), job.parallel()));
        }
        names => say(format!("Backs up {}, one after the other.", names.join(", "))),
    }
    let repositories = config.repositories_of(job);
    match repositories.as_slice() {
        [] => {}
        [only] => say(format!("Into the repository {only}.")),
        [first, others @ ..] => {
            say(format!("Into {first}; where that does not answer, into {}.", others.join(", ")));
        }
    }
    match job.retries() {
        0 => say("What fails is not tried again before the next time.".to_owned()),
        1 => say("What fails is tried once more.".to_owned()),
        retries => say(format!("What fails is tried up to {retries} times more.")),
    }
    match job.keep.as_ref().filter(|keep| !keep.is_empty()) {
        None => say("All snapshots stay: the repository grows without end.".to_owned()),
        Some(keep) => say(format!("Of the snapshots of each domain stay: {}.", rules(keep))),
    }
    for copy in &job.copy {
        let keep = match &copy.keep {
            None => "all stay there".to_owned(),
            Some(keep) => format!("there stay: {}", rules(keep)),
        };
        say(format!("They are copied to {}; {keep}.", copy.to.get_ref()));
    }
    match job.prune() {
        Prune::Never => say("What nothing needs is not pruned here.".to_owned()),
        Prune::At(schedule) => say(format!("What nothing needs is pruned {schedule}.")),
        Prune::Weekly if job.keep.is_some() => {
            say("What nothing needs is pruned once a week.".to_owned());
        }
        Prune::Weekly => {}
    }
    match job.verify() {
        None => say("Its repository is not verified.".to_owned()),
        Some(plan) => {
            let when = plan.schedule.map_or("once a day".to_owned(), |it| it.to_string());
            let data = plan.read_all_in.map_or("no data is read".to_owned(), |length| {
                format!("all data is read in {}", human_duration(Length::get(length)))
            });
            say(format!("Its repository is verified {when}; {data}."));
        }
    }
    let wanted = wanted(config, job, now);
    for name in names {
        let wanted = wanted(name);
        let count = match wanted.count_min {
            0 => String::new(),
            count => format!(", and when it has fewer than {count} snapshots"),
        };
        let age = human_duration(wanted.age_max);
        say(format!("Alarm when the last good backup of {name} is older than {age}{count}."));
    }
    lines
}
