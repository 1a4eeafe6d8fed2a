//! What a repository needs after backups: it is thinned out, and proved to be sound.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;

use super::Runner;
use super::child::Answer;
use super::due;
use super::history::{Outcome, Step};
use crate::config::{Job, Length, Prune, VerifyPlan};
use crate::progress::human_bytes;
use crate::retention::Policy;

/// How long one such step may take.
const TIMEOUT: Duration = Duration::from_secs(7 * 86_400);
/// How long a list of snapshots may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const WEEK: Duration = Duration::from_secs(7 * 86_400);
/// By how much a daily time may come early and still be a day after the last.
const SLACK: Duration = Duration::from_secs(3600);
/// The most parts that data is read in.
const PARTS_MAX: u64 = 10_000;

impl<F: FnMut(&Step)> Runner<'_, F> {
    /// Does what is due in the repository that a job has used.
    pub(super) async fn upkeep(&mut self, named: (&str, &Job), repository: &str) {
        let job = named.1;
        let mut replicas = Vec::new();
        for copy in &job.copy {
            let to = copy.to.get_ref().as_str();
            // Backups went there because another repository is away.
            if to == repository {
                continue;
            }
            replicas.push(to);
            if self.copy(named, repository, to).await == Outcome::Done {
                self.forget(named, to, copy.keep.as_ref(), &[]).await;
                self.prune(named, to).await;
            }
        }
        self.forget(named, repository, job.keep.as_ref(), &replicas).await;
        self.prune(named, repository).await;
        self.verify(named, repository).await;
        self.count(named, repository).await;
    }

    /// Runs a step and tells of it; says whether it is done. `summary` finds words for what it printed.
    async fn step(
        &mut self,
        (job, work, repository): (&str, &str, &str),
        arguments: &[String],
        summary: impl Fn(&Answer) -> String,
    ) -> Outcome {
        let (step, begin) = (Step::begin(job, work, None, Some(repository)), Instant::now());
        let answer = self.with.launcher.run(Some(repository), arguments, TIMEOUT).await;
        let (outcome, text) = match () {
            () if answer.is_done() => (Outcome::Done, summary(&answer)),
            () if answer.is_aborted() => (Outcome::Aborted, String::new()),
            () => (Outcome::Failed, [summary(&answer), answer.reason()].join("\n")),
        };
        let duration_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.over(Step { duration_ms, ..step }.end(outcome, text.trim()));
        outcome
    }

    /// The domains of a job by name: other hosts may have domains in the same repository that its patterns
    /// mean too.
    fn domains(&mut self, (name, job): (&str, &Job)) -> Vec<String> {
        let known = self.with.state.job(name).domains.keys().filter(|domain| job.is_about(domain));
        known.map(|domain| glob::Pattern::escape(domain)).collect()
    }

    /// Copies the snapshots of the job's domains into another repository.
    async fn copy(&mut self, named: (&str, &Job), repository: &str, to: &str) -> Outcome {
        let mut arguments = vec!["copy".to_owned(), "--to".to_owned(), to.to_owned()];
        let domains = self.domains(named);
        if domains.is_empty() {
            return Outcome::Aborted;
        }
        arguments.extend(domains);
        let summary = |_: &Answer| String::new();
        self.step((named.0, &format!("copy to {to}"), repository), &arguments, summary).await
    }

    /// Drops the snapshots of the job's domains that no rule keeps, but what a replica has to get yet.
    async fn forget(
        &mut self,
        named: (&str, &Job),
        repository: &str,
        keep: Option<&Policy>,
        replicas: &[&str],
    ) {
        let Some(keep) = keep.filter(|keep| !keep.is_empty()) else { return };
        let (name, domains) = (named.0, self.domains(named));
        if domains.is_empty() {
            return;
        }
        let mut arguments = vec!["forget".to_owned()];
        arguments.extend(domains);
        arguments.extend(keep.to_args());
        arguments.extend(replicas.iter().map(|to| format!("--not-copied-to={to}")));
        let summary = |answer: &Answer| {
            let Some(last) = answer.lines.last().filter(|line| line["kept"].is_u64()) else {
                return String::new();
            };
            format!("{} snapshots dropped, {} stay", last["dropped"], last["kept"])
        };
        self.step((name, "forget", repository), &arguments, summary).await;
        // Also one that failed half-way may have dropped some.
        self.with.state.repository(repository).has_waste = true;
    }

    /// Gives back the room of what no snapshot needs.
    async fn prune(&mut self, (name, job): (&str, &Job), repository: &str) {
        let (now, known) = (self.with.clock.now(), self.with.state.repository(repository).clone());
        let is_due = match (job.prune(), known.last_prune) {
            (Prune::Never, _) => false,
            // Its first time is yet to come.
            (_, None) => {
                self.with.state.repository(repository).last_prune = Some(now);
                false
            }
            (Prune::At(schedule), last) => due::is_due(schedule, job.timezone.get(), last, now),
            (Prune::Weekly, Some(last)) => known.has_waste && is_past(last, WEEK, now),
        };
        if !is_due {
            return;
        }
        let summary = |_: &Answer| String::new();
        let named = (name, "prune", repository);
        let outcome = self.step(named, &["prune".to_owned()], summary).await;
        if outcome != Outcome::Aborted {
            let known = self.with.state.repository(repository);
            (known.last_prune, known.has_waste) = (Some(now), outcome != Outcome::Done);
        }
    }

    /// Proves that backups can be restored, and reads the part of the data whose turn it is.
    async fn verify(&mut self, (name, job): (&str, &Job), repository: &str) {
        let Some(plan) = job.verify() else { return };
        let (now, known) = (self.with.clock.now(), self.with.state.repository(repository).clone());
        if !is_due(&plan, job, known.last_verify, now) {
            return;
        }
        let mut arguments = vec!["verify".to_owned()];
        let parts = parts(&plan, job, now);
        let part = known.part % parts.unwrap_or(1);
        if let Some(parts) = parts {
            arguments.push(format!("--read-data={}/{parts}", part + 1));
        }
        let summary = |answer: &Answer| {
            let problems = answer.lines.iter().filter(|line| line["problem"].is_string());
            let affected = problems.clone().flat_map(|line| line["snapshots"].as_array()).flatten();
            let mut affected: Vec<&str> = affected.filter_map(Value::as_str).collect();
            affected.sort_unstable();
            affected.dedup();
            let mut text: Vec<String> =
                problems.filter_map(|line| line["problem"].as_str()).map(str::to_owned).collect();
            if !affected.is_empty() {
                let short = affected.iter().map(|id| id.get(..8).unwrap_or(id));
                text.push(format!("snapshots affected: {}", short.collect::<Vec<_>>().join(", ")));
            }
            if let Some(read) = answer.lines.last().and_then(|line| line["bytes_read"].as_u64()) {
                text.push(format!("{} read", human_bytes(read)));
            }
            text.join("\n")
        };
        let outcome = self.step((name, "verify", repository), &arguments, summary).await;
        if matches!(outcome, Outcome::Done | Outcome::Failed) {
            let known = self.with.state.repository(repository);
            known.last_verify = Some(now);
            known.part = (part + 1) % parts.unwrap_or(1);
        }
    }

    /// Counts the snapshots of the job's domains, and the room that the repository takes.
    async fn count(&mut self, (name, job): (&str, &Job), repository: &str) {
        let size = ["repository", "size"];
        let answer = self.with.launcher.run(Some(repository), &size, LIST_TIMEOUT).await;
        let bytes = answer.lines.first().and_then(|line| line["bytes"].as_u64());
        self.with.state.repository(repository).bytes = bytes;
        let answer = self.with.launcher.run(Some(repository), &["list"], LIST_TIMEOUT).await;
        // A damaged one does not hide the others.
        if answer.code.is_none() || (answer.lines.is_empty() && !answer.is_done()) {
            return;
        }
        let is_first =
            self.with.config.repositories_of(job).first().is_some_and(|it| it == repository);
        let of = |line: &&Value, domain: &str| line["domain"] == domain;
        for (domain, known) in &mut self.with.state.job(name).domains {
            if !job.is_about(domain) {
                continue;
            }
            let lines = answer.lines.iter().filter(|line| of(line, domain));
            known.snapshots = Some(lines.clone().count() as u64);
            let has_last =
                lines.clone().any(|line| line["id"].as_str() == known.snapshot.as_deref());
            if has_last {
                continue;
            }
            let times = lines.filter_map(|line| line["time"].as_str()?.parse().ok());
            let newest = times.max();
            // The others may have younger ones.
            known.last_good = if is_first { newest } else { known.last_good.max(newest) };
        }
    }
}

/// Whether a repository is to be verified now: at the times of its own, else once a day.
fn is_due(plan: &VerifyPlan, job: &Job, last: Option<Timestamp>, now: Timestamp) -> bool {
    match (&plan.schedule, last) {
        (_, None) => true,
        (Some(schedule), Some(_)) => due::is_due(schedule, job.timezone.get(), last, now),
        (None, Some(last)) => is_past(last, DAY, now),
    }
}

/// Whether so much has passed, more or less. A clock that was set back says nothing.
fn is_past(last: Timestamp, length: Duration, now: Timestamp) -> bool {
    let age = now.duration_since(last);
    age.is_negative() || age.unsigned_abs() + SLACK >= length
}

/// In how many parts all data is read, one each time; `None` where none is read.
fn parts(plan: &VerifyPlan, job: &Job, now: Timestamp) -> Option<u32> {
    let all_in = plan.read_all_in.map(Length::get)?;
    let zone = job.timezone.get();
    let interval = match &plan.schedule {
        Some(schedule) => schedule.interval(now, zone),
        None => job.schedule.interval(now, zone).max(DAY),
    };
    let parts = (all_in.as_secs() / interval.as_secs().max(1)).clamp(1, PARTS_MAX);
    u32::try_from(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn job(text: &str) -> Job {
        let text = format!("[job.a]\ntimezone = \"UTC\"\n{text}");
        Config::parse(&text).unwrap().job.into_values().next().unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn all_data_is_read_in_the_time_that_is_configured() {
        let now = at("2026-11-21T12:00:00Z");
        for (text, expected) in [
            ("schedule = \"03:00\"\nverify = { read-all-in = \"30d\" }", Some(30)),
            ("schedule = \"every 15 min\"\nverify = { read-all-in = \"30d\" }", Some(30)),
            ("schedule = \"sunday 03:00\"\nverify = { read-all-in = \"30d\" }", Some(4)),
            ("schedule = \"sunday 03:00\"\nverify = { read-all-in = \"3d\" }", Some(1)),
            ("schedule = \"03:00\"", None),
        ] {
            let job = job(text);
            assert_eq!(parts(&job.verify().unwrap(), &job, now), expected, "{text}");
        }
    }

    #[test]
    fn a_repository_is_verified_once_a_day_unless_told_when() {
        let daily = job("schedule = \"every 15 min\"");
        let plan = daily.verify().unwrap();
        let last = Some(at("2026-11-21T12:00:00Z"));
        assert!(is_due(&plan, &daily, None, at("2026-11-21T12:00:00Z")));
        assert!(!is_due(&plan, &daily, last, at("2026-11-22T10:45:00Z")));
        assert!(is_due(&plan, &daily, last, at("2026-11-22T11:15:00Z")));
        // r17: the clock was wrong then, or is now.
        assert!(is_due(&plan, &daily, last, at("2026-11-01T00:00:00Z")));
        let weekly = job("schedule = \"03:00\"\nverify = { schedule = \"sunday 12:00\" }");
        let plan = weekly.verify().unwrap();
        assert!(!is_due(&plan, &weekly, last, at("2026-11-22T11:59:00Z")));
        assert!(is_due(&plan, &weekly, last, at("2026-11-22T12:00:00Z")));
        assert!(job("schedule = \"03:00\"\nverify = false").verify().is_none());
    }
}
