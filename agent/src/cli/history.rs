//! `kvmsnap history`

use std::io::Write;
use std::time::Duration;

use clap::Args;
use comfy_table::{Table, presets};
use serde_json::json;

use super::Context;
use super::list::local_time;
use crate::error::CommandError;
use crate::progress::human_bytes;
use crate::run::history::{Outcome, Record, Step};
use crate::units::human_duration;

/// Show what came of runs, oldest first
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap history
  kvmsnap history --failed --steps
  kvmsnap history --last 1 --json | jq '.steps[].outcome'")]
pub struct HistoryArgs {
    /// Only so many of the newest
    #[arg(long, value_name = "N", default_value = "20", value_parser = clap::value_parser!(u32).range(1..))]
    last: u32,
    /// Only runs of which something failed
    #[arg(long)]
    failed: bool,
    /// Also each step of each run
    #[arg(long)]
    steps: bool,
}

/// Runs it.
///
/// # Errors
/// When nobody reads it.
pub fn run(args: &HistoryArgs, context: &Context) -> Result<(), CommandError> {
    let mut records = Record::load(&context.global.state_dir, args.last as usize);
    records.retain(|record| !args.failed || record.outcome() == Outcome::Failed);
    let mut out = std::io::stdout().lock();
    if context.global.json {
        for record in &records {
            let line = json!({
                "id": record.id, "started": record.started, "ended": record.ended,
                "outcome": record.outcome(), "done": record.count(Outcome::Done),
                "warnings": record.count(Outcome::Warning), "failed": record.count(Outcome::Failed),
                "aborted": record.count(Outcome::Aborted), "steps": record.steps,
            });
            context.print_json(&mut out, &line)?;
        }
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["STARTED", "TOOK", "JOBS", "DONE", "WARNINGS", "FAILED", "OUTCOME"]);
    for record in &records {
        table.add_row(row(record));
        for step in record.steps.iter().filter(|_| args.steps) {
            table.add_row(step_row(step));
        }
    }
    Ok(writeln!(out, "{}", table.trim_fmt())?)
}

fn row(record: &Record) -> Vec<String> {
    let took = record.ended.and_then(|ended| {
        let length = Duration::try_from(ended.duration_since(record.started)).ok()?;
        Some(human_duration(length))
    });
    let mut jobs: Vec<&str> = record.steps.iter().map(|step| step.job.as_str()).collect();
    jobs.retain(|job| !job.is_empty());
    jobs.dedup();
    let outcome = match record.ended {
        Some(_) => record.outcome().as_str(),
        None => "did not end",
    };
    vec![
        local_time(record.started),
        took.unwrap_or_default(),
        jobs.join(", "),
        record.count(Outcome::Done).to_string(),
        record.count(Outcome::Warning).to_string(),
        record.count(Outcome::Failed).to_string(),
        outcome.to_owned(),
    ]
}

fn step_row(step: &Step) -> Vec<String> {
    let what = match (&step.domain, &step.repository) {
        (Some(domain), _) => format!("{} of {domain}", step.work),
        (None, Some(repository)) => format!("{} in {repository}", step.work),
        (None, None) => step.work.clone(),
    };
    let stored =
        step.figures.map(|figures| format!("{} stored", human_bytes(figures.bytes_stored)));
    let text = step.text.lines().next().map(str::to_owned);
    vec![
        format!("  {}", local_time(step.started)),
        human_duration(Duration::from_millis(step.duration_ms)),
        format!("{}: {what}", step.job),
        String::new(),
        String::new(),
        String::new(),
        [Some(step.outcome.as_str().to_owned()), stored, text]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(": "),
    ]
}
