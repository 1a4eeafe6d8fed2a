//! What a repository needs after backups: it is thinned out, and proved to be sound.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use repository::FileId;
use serde_json::Value;

use super::child::Answer;
use super::damage::Mark;
use super::due;
use super::history::{Outcome, Step};
use super::state::Verified;
use super::{Begin, Runner, STEP_TIMEOUT};
use crate::config::{Job, Length, Prune, VerifyPlan};
use crate::progress::human_bytes;
use crate::retention::Policy;

/// How long a list of snapshots may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const WEEK: Duration = Duration::from_secs(7 * 86_400);
/// By how much a daily time may come early and still be a day after the last.
const SLACK: Duration = Duration::from_secs(3600);
/// So many parts that were damaged are read again each time.
const REREAD_MAX: usize = 4;
/// The most parts that data is read in.
const PARTS_MAX: u64 = 10_000;

impl<F: FnMut(&Step)> Runner<'_, F> {
    /// Does what is due in the repository that a job has used.
    pub(super) async fn upkeep(&mut self, named: (&str, &Job), repository: &str) {
        let job = named.1;
        // Whose uuid is not known has nothing copied.
        let mut is_all_copied = job.copy.is_empty() || !self.machines(named, true).is_empty();
        let mut replicas = Vec::new();
        for copy in &job.copy {
            let to = copy.to.get_ref().as_str();
            // Backups went there because another repository is away.
            if to == repository {
                is_all_copied = false;
                continue;
            }
            replicas.push(to);
            if self.copy(named, repository, to).await.is_done() {
                self.forget(named, to, copy.keep.as_ref(), &[]).await;
                self.prune(named, to).await;
            } else {
                is_all_copied = false;
            }
        }
        self.forget(named, repository, rules(job, repository), &replicas).await;
        self.prune(named, repository).await;
        self.verify(named, repository).await;
        self.count(named, repository).await;
        // The last snapshots of those that are gone are copied too; then they are none of the job's business.
        if is_all_copied && self.with.problem.is_none() {
            let machines = &self.with.machines;
            let is_here = |name: &String| machines.iter().any(|it| it.name == *name);
            let domains = &mut self.with.state.job(named.0).domains;
            domains.retain(|name, _| job.is_about(name) && is_here(name));
        }
    }

    /// Runs a command; the step that it is, with what came of it. `summary` finds words for what it printed.
    async fn attempt(
        &mut self,
        (job, work, repository): (&str, &str, &str),
        arguments: &[String],
        summary: impl Fn(&Answer) -> String,
    ) -> (Step, Answer) {
        let (step, begin) = (Step::begin(job, work, None, Some(repository)), Instant::now());
        let answer = self.with.launcher.run(Some(repository), arguments, STEP_TIMEOUT).await;
        let warnings = answer.warnings();
        let (outcome, mut text) = match () {
            () if answer.is_done() && warnings.is_empty() => (Outcome::Done, summary(&answer)),
            () if answer.is_done() => (Outcome::Warning, summary(&answer)),
            () if answer.is_aborted() => (Outcome::Aborted, String::new()),
            () => (Outcome::Failed, [summary(&answer), answer.reason()].join("\n")),
        };
        if outcome != Outcome::Aborted {
            text = [text, warnings.join("\n")].join("\n");
        }
        let duration_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        (Step { duration_ms, ..step }.end(outcome, text.trim()), answer)
    }

    /// The same, and tells of it; says what came of it.
    async fn step(
        &mut self,
        named: (&str, &str, &str),
        arguments: &[String],
        summary: impl Fn(&Answer) -> String,
    ) -> Outcome {
        let (step, _) = self.attempt(named, arguments, summary).await;
        let outcome = step.outcome;
        self.over(step);
        outcome
    }

    /// The machines of a job, as options of commands: other hosts may have namesakes of them in the same
    /// repository. With those that were here and are not any more only where they do no harm.
    fn machines(&self, (name, job): (&str, &Job), with_gone: bool) -> Vec<String> {
        let known = self.with.state.jobs.get(name).into_iter().flat_map(|known| &known.domains);
        let known = known.filter(|(domain, _)| job.is_about(domain));
        let known = known.filter(|(domain, _)| with_gone || self.is_here(domain));
        let machines = known.flat_map(|(domain, known)| known.machines(domain));
        machines.map(|machine| format!("--machine={machine}")).collect()
    }

    /// Copies the snapshots of the job's domains into another repository.
    async fn copy(&mut self, named: (&str, &Job), repository: &str, to: &str) -> Outcome {
        let mut arguments = vec!["copy".to_owned(), "--to".to_owned(), to.to_owned()];
        let machines = self.machines(named, true);
        if machines.is_empty() {
            return Outcome::Done;
        }
        arguments.extend(machines);
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
        // What is gone from here may be another host's by now, which has rules of its own.
        let (name, machines) = (named.0, self.machines(named, false));
        if machines.is_empty() {
            return;
        }
        let mut arguments = vec!["forget".to_owned()];
        arguments.extend(machines);
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
        let mut arguments = vec!["prune".to_owned()];
        // What a first backup has left that did not finish is no waste: the next one uses it.
        if !self.with.state.had_snapshots(repository) {
            arguments.push("--skip-empty".to_owned());
        }
        let summary = |answer: &Answer| match answer.lines.last() {
            Some(line) if line["skipped"] == true => "it has no snapshot yet".to_owned(),
            _ => String::new(),
        };
        let (step, answer) = self.attempt((name, "prune", repository), &arguments, summary).await;
        if step.outcome != Outcome::Aborted {
            let known = self.with.state.repository(repository);
            (known.last_prune, known.has_waste) = (Some(now), !step.outcome.is_done());
            let snapshots = answer.lines.last().and_then(|line| line["snapshots"].as_u64());
            known.had_snapshots |= snapshots.is_some_and(|count| count > 0);
        }
        self.over(step);
    }

    /// Proves that backups can be restored, and reads the part of the data whose turn it is. What was found
    /// to be damaged is read again too: it is well again when it was mended, not when another part is sound.
    async fn verify(&mut self, named: (&str, &Job), repository: &str) {
        let (name, job) = named;
        let Some(plan) = job.verify() else { return };
        let now = self.with.clock.now();
        if !is_due(&plan, job, self.verified(name, repository).last, now) {
            return;
        }
        self.forget_mended();
        let known = self.verified(name, repository).clone();
        let parts = parts(&plan, job, now);
        let turn = parts.map(|parts| (known.part % parts + 1, parts));
        for part in reread(&known, turn).into_iter().map(Some).chain([turn]) {
            let (mut step, answer) = self.verify_part(name, part, repository).await;
            if step.outcome == Outcome::Aborted {
                return self.over(step);
            }
            // The last line says that it came to its end.
            let end = answer.lines.last().filter(|line| line["bytes_read"].is_u64());
            let state_dir = &self.with.state_dir;
            let known =
                self.with.state.job(name).verified.entry(repository.to_owned()).or_default();
            if let (Some((number, parts)), Some(end)) = (part, end) {
                let is_sound = !is_damaged(&answer.lines, (number, parts));
                known.read((number, parts), is_sound);
                if !is_sound {
                    known.marked = mark(state_dir, &end["repository"]);
                }
                if part == turn {
                    known.part = number % parts;
                }
            }
            known.last = Some(now);
            if step.outcome.is_done() && !known.damaged.is_empty() {
                step.outcome = Outcome::Warning;
                step.text += "\nother parts of the data were damaged when they were last read";
            }
            self.over(step);
        }
    }

    /// What somebody has proved by hand to be sound since a run found it to be damaged, is.
    fn forget_mended(&mut self) {
        let Begin { state, state_dir, .. } = &mut self.with;
        for known in state.jobs.values_mut().flat_map(|job| job.verified.values_mut()) {
            if known.marked.as_ref().is_some_and(|id| Mark::of(state_dir, id).is_gone()) {
                (known.marked, known.damaged) = (None, BTreeSet::new());
            }
        }
    }

    fn verified(&mut self, job: &str, repository: &str) -> &mut Verified {
        self.with.state.job(job).verified.entry(repository.to_owned()).or_default()
    }

    async fn verify_part(
        &mut self,
        name: &str,
        part: Option<(u32, u32)>,
        repository: &str,
    ) -> (Step, Answer) {
        let mut arguments = vec!["verify".to_owned()];
        arguments.extend(part.map(|(part, parts)| format!("--read-data={part}/{parts}")));
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
        self.attempt((name, "verify", repository), &arguments, summary).await
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
        let now = self.with.clock.now();
        let host = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
        for (domain, known) in &mut self.with.state.job(name).domains {
            // Which of its namesakes it is is not known before its first backup.
            let Some(uuid) = known.uuid.clone().filter(|_| job.is_about(domain)) else { continue };
            known.count(now, repository, snapshots(&answer.lines, domain, &uuid));
            known.follow(namesakes(&answer.lines, domain, &host));
        }
    }
}

/// The rules for a repository: where backups went into a replica because another one is away, the replica's.
fn rules<'a>(job: &'a Job, repository: &str) -> Option<&'a Policy> {
    let as_replica = job.copy.iter().find(|copy| copy.to.get_ref() == repository);
    as_replica.map_or(job.keep.as_ref(), |copy| copy.keep.as_ref())
}

/// Tells those who verify by hand of damage; the repository's id where that is possible.
fn mark(state_dir: &Path, id: &Value) -> Option<String> {
    let id = id.as_str()?;
    match Mark::of(state_dir, id).set() {
        Ok(()) => Some(id.to_owned()),
        Err(error) => {
            tracing::warn!(%error, "damage is read again, also once it was mended by hand");
            None
        }
    }
}

/// The parts that were damaged and are read again now, in turns: one that stays damaged holds up no other.
fn reread(known: &Verified, turn: Option<(u32, u32)>) -> Vec<(u32, u32)> {
    let damaged: Vec<_> = known.damaged.iter().filter(|part| Some(**part) != turn).collect();
    let first = known.part as usize * REREAD_MAX % damaged.len().max(1);
    let in_turn = damaged.iter().cycle().skip(first).take(REREAD_MAX.min(damaged.len()));
    in_turn.map(|part| **part).collect()
}

/// Whether a problem is in a part of the data, `part` of `parts` from 1: not a damaged key or snapshot, nor a
/// pack that is missing in another part, which each verification finds.
fn is_damaged(lines: &[Value], (part, parts): (u32, u32)) -> bool {
    let problems = lines.iter().filter(|line| line["problem"].is_string());
    let files = problems.filter_map(|line| line["file"].as_str());
    let packs = files.filter_map(|file| file.strip_prefix("data/")?.rsplit('/').next());
    let packs = packs.filter_map(|name| name.parse::<FileId>().ok());
    packs.into_iter().any(|id| id.part(parts) + 1 == part)
}

/// The snapshots of a machine, of those that were listed.
fn snapshots<'a>(
    lines: &'a [Value],
    domain: &'a str,
    uuid: &'a str,
) -> impl Iterator<Item = (&'a str, Timestamp)> + Clone {
    let of_it = move |line: &&Value| line["domain"] == domain && line["uuid"] == uuid;
    let snapshot =
        |line: &'a Value| Some((line["id"].as_str()?, line["time"].as_str()?.parse().ok()?));
    lines.iter().filter(of_it).filter_map(snapshot)
}

/// The machines of that name that were backed up by this host and by no other, the newest first. What another
/// host has backed up too may be there now.
fn namesakes<'a>(lines: &'a [Value], domain: &str, host: &str) -> Vec<String> {
    let of_name: Vec<&Value> = lines.iter().filter(|line| line["domain"] == domain).collect();
    let elsewhere =
        |uuid: &Value| of_name.iter().any(|it| it["uuid"] == *uuid && it["host"] != host);
    let time = |line: &'a Value| line["time"].as_str()?.parse::<Timestamp>().ok();
    let mut ours = of_name.clone();
    ours.retain(|line| !elsewhere(&line["uuid"]));
    ours.sort_by_key(|line| std::cmp::Reverse(time(line)));
    let mut uuids: Vec<String> = Vec::new();
    for uuid in ours.iter().filter_map(|line| line["uuid"].as_str()) {
        if !uuids.iter().any(|known| known == uuid) {
            uuids.push(uuid.to_owned());
        }
    }
    uuids
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
    use serde_json::json;

    use super::*;
    use crate::config::Config;

    fn job(text: &str) -> Job {
        let repository = "[repository.main]\nlocation = \"/srv\"\n";
        let text = format!("{repository}[job.a]\ntimezone = \"UTC\"\n{text}");
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
    fn p3_a_replica_that_backups_fall_over_to_is_thinned_by_its_own_rules() {
        let repositories =
            "[repository.main]\nlocation = \"/a\"\n[repository.off]\nlocation = \"/b\"\n";
        let job = |copy: &str| {
            let text = format!(
                "{repositories}[job.a]\nschedule = \"03:00\"\nrepository = [\"main\", \"off\"]\n\
                 keep = {{ daily = 14 }}\ncopy = [{copy}]\n"
            );
            Config::parse(&text).unwrap().job.into_values().next().unwrap()
        };
        let kept = |job: &Job, repository| rules(job, repository).map(Policy::to_args);
        let with_rules = job("{ to = \"off\", keep = { daily = 30 } }");
        assert_eq!(kept(&with_rules, "off").unwrap(), ["--keep-daily=30"]);
        assert_eq!(kept(&with_rules, "main").unwrap(), ["--keep-daily=14"]);
        assert_eq!(kept(&job("{ to = \"off\" }"), "off"), None, "all stay there");
    }

    #[test]
    fn snapshots_of_another_host_s_namesake_are_not_counted() {
        let line = |id, uuid| json!({"id": id, "uuid": uuid, "domain": "web", "time": "2026-11-21T12:00:00Z"});
        let lines = [line("a", "ours"), line("b", "theirs"), json!({"id": "c"})];
        let ours: Vec<_> = snapshots(&lines, "web", "ours").map(|(id, _)| id).collect();
        assert_eq!(ours, ["a"]);
    }

    #[test]
    fn p3_a_lost_state_finds_the_earlier_machines_of_this_host_in_the_repository() {
        let line = |uuid, host, day| {
            let time = format!("2026-11-{day}T12:00:00Z");
            json!({"id": "a", "uuid": uuid, "domain": "web", "host": host, "time": time})
        };
        let lines = [
            line("oldest", "alder", 10),
            line("old", "alder", 11),
            line("moved", "alder", 12),
            line("moved", "birch", 13),
            line("theirs", "birch", 14),
            line("now", "alder", 15),
        ];
        let mut web = crate::run::state::DomainState::default();
        web.meet(Some("now"), at("2026-11-21T12:00:00Z"));
        web.follow(namesakes(&lines, "web", "alder"));
        web.follow(namesakes(&lines, "web", "alder"));
        assert_eq!(web.machines("web"), ["web/oldest", "web/old", "web/now"]);
    }

    #[test]
    fn p4_a_part_is_damaged_by_its_own_packs_alone() {
        let problem = |file: &str| json!({"problem": "missing", "file": file, "snapshots": []});
        // 0x00000021 is 33: the fourth of thirty parts.
        let pack = format!("data/00/00000021{}", "0".repeat(56));
        let end = json!({"problems": 2, "bytes_read": 5});
        let lines = [problem(&pack), json!({"problem": "missing", "blob": "b"}), end];
        assert!(is_damaged(&lines, (4, 30)));
        assert!(!is_damaged(&lines, (5, 30)));
        assert!(!is_damaged(&[problem(&pack.replace("data/00", "snapshots"))], (4, 30)));
    }

    #[test]
    fn p4_a_part_that_stays_damaged_holds_up_no_other() {
        let damaged = (1..=9).map(|part| (part, 30)).collect();
        let mut known = Verified { damaged, ..Verified::default() };
        let mut read = BTreeSet::new();
        for part in 0..3 {
            known.part = 20 + part;
            let again = reread(&known, Some((21 + part, 30)));
            assert_eq!(again.len(), REREAD_MAX);
            read.extend(again);
        }
        assert_eq!(read.len(), 9);
        assert_eq!(reread(&Verified::default(), None), []);
        known.damaged = [(3, 30), (4, 30)].into();
        assert_eq!(reread(&known, Some((3, 30))), [(4, 30)], "its turn has come anyway");
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
