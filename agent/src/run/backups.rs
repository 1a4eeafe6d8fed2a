//! The backups of a job: some at once, again what failed, and elsewhere where a repository is away.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::task::JoinSet;

use super::child::{Answer, Launcher};
use super::history::{Outcome, Step};
use super::places::Places;
use super::{Machine, STEP_TIMEOUT};
use crate::config::{Config, Job, Length};
use crate::method::Wanted;
use crate::metrics::BackupFigures;
use crate::units::human_duration;

/// How long to wait before what failed is tried again the first time.
const RETRY_PAUSE: Duration = Duration::from_secs(30);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(600);
/// Exit codes of what fails again however often it is tried.
const USAGE: u8 = 2;
const WRONG_PASSWORD: u8 = 12;

/// A machine whose backup is not made yet.
struct Pending {
    machine: Machine,
    attempts: u32,
    took: Duration,
    /// Why the last try failed.
    reason: String,
    /// Whether each try takes the service down.
    is_disturbing: bool,
}

/// Backs up machines, in their order. Each step is told when it is over.
pub async fn run(
    launcher: &Launcher,
    config: &Config,
    (name, job): (&str, &Job),
    machines: Vec<Machine>,
    places: &mut Places,
    mut tell: impl FnMut(Step),
) {
    let begin = |machine: Machine| Pending {
        is_disturbing: config.domain(&machine.name).method.is_some_and(Wanted::is_disturbing),
        machine,
        attempts: 0,
        took: Duration::ZERO,
        reason: String::new(),
    };
    let mut pending: Vec<Pending> = machines.into_iter().map(begin).collect();
    let mut pause = job.retry_pause.map_or(RETRY_PAUSE, Length::get);
    let mut retries = job.retries();
    while !pending.is_empty() {
        let repository = match places.settle(launcher).await {
            Ok(repository) => repository,
            Err(reason) => {
                pending.iter_mut().for_each(|it| it.reason.clone_from(&reason));
                if retries == 0 || !wait(launcher, pause, &pending).await {
                    break;
                }
                (retries, pause) = (retries - 1, longer(pause));
                continue;
            }
        };
        pending = round(launcher, (name, job), pending, &repository, &mut tell).await;
        if pending.is_empty() || launcher.is_asked_to_stop() {
            break;
        }
        if places.has_next() && !places.answers(launcher).await {
            places.advance();
            continue;
        }
        let (hopeless, again): (Vec<_>, Vec<_>) =
            pending.into_iter().partition(|it| retries == 0 || it.reason.is_empty());
        hopeless.into_iter().for_each(|it| tell(it.over(name, Some(&repository), launcher)));
        pending = again;
        if !pending.is_empty() && !wait(launcher, pause, &pending).await {
            break;
        }
        (retries, pause) = (retries.saturating_sub(1), longer(pause));
    }
    pending.into_iter().for_each(|it| tell(it.over(name, None, launcher)));
}

fn longer(pause: Duration) -> Duration {
    (pause * 2).min(RETRY_PAUSE_MAX)
}

/// Waits before what failed is tried again; `false` when somebody asks to stop.
async fn wait(launcher: &Launcher, pause: Duration, pending: &[Pending]) -> bool {
    for it in pending {
        let (machine, pause) = (&it.machine.name, human_duration(pause));
        tracing::warn!("{machine}: again in {pause}: {}", first_line(&it.reason));
    }
    launcher.sleep(pause).await
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

impl Pending {
    /// What has been done of it.
    fn step(&self, job: &str, repository: Option<&str>) -> Step {
        let mut step = Step::begin(job, "backup", Some(&self.machine.name), repository);
        step.attempts = self.attempts;
        step.duration_ms = u64::try_from(self.took.as_millis()).unwrap_or(u64::MAX);
        step.started = step.started.checked_sub(self.took).unwrap_or(step.started);
        step
    }

    /// What came of it in the end.
    fn over(mut self, job: &str, repository: Option<&str>, launcher: &Launcher) -> Step {
        let outcome = match launcher.is_asked_to_stop() {
            true => Outcome::Aborted,
            false => Outcome::Failed,
        };
        self.step(job, repository).end(outcome, std::mem::take(&mut self.reason))
    }
}

/// Tries each once and returns those to be tried again.
async fn round(
    launcher: &Launcher,
    (name, job): (&str, &Job),
    pending: Vec<Pending>,
    repository: &str,
    tell: &mut impl FnMut(Step),
) -> Vec<Pending> {
    let limit = limit(job);
    let (mut queue, mut at_work, mut again) = (pending.into_iter(), JoinSet::new(), Vec::new());
    loop {
        while at_work.len() < job.parallel()
            && let Some(mut it) = queue.next()
        {
            let (launcher, repository) = (launcher.clone(), repository.to_owned());
            at_work.spawn(async move {
                let begin = Instant::now();
                let mut arguments = vec!["backup".to_owned()];
                arguments.extend(it.machine.arguments.iter().cloned());
                let answer = launcher.run(Some(&repository), &arguments, limit).await;
                it.attempts += 1;
                it.took += begin.elapsed();
                (it, answer)
            });
        }
        let Some(ended) = at_work.join_next().await else { return again };
        let (mut it, answer) = match ended {
            Ok(ended) => ended,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        match done(&answer) {
            Some(done) => tell(Step {
                snapshot: Some(done.snapshot),
                uuid: done.uuid,
                figures: Some(done.figures),
                ..it.step(name, Some(repository)).end(done.outcome, done.text)
            }),
            None => {
                it.reason = answer.reason();
                match may_retry(&answer, it.is_disturbing) {
                    true => again.push(it),
                    false => tell(it.over(name, Some(repository), launcher)),
                }
            }
        }
    }
}

/// How long one backup may take.
fn limit(job: &Job) -> Duration {
    job.timeout.map_or(STEP_TIMEOUT, Length::get)
}

/// Whether what failed may be tried again: not what fails however often it is tried, nor what would harm more
/// than a backup that is missing.
fn may_retry(answer: &Answer, is_disturbing: bool) -> bool {
    let is_hopeless = matches!(answer.code, Some(USAGE | WRONG_PASSWORD));
    answer.is_aborted() || !(is_hopeless || is_disturbing || answer.is_too_slow())
}

/// A backup that was made.
struct Done {
    outcome: Outcome,
    snapshot: String,
    uuid: Option<String>,
    figures: BackupFigures,
    text: String,
}

/// The backup that a command has made, also one that failed only at cleaning up: that is not made again.
fn done(answer: &Answer) -> Option<Done> {
    let line =
        answer.lines.iter().find(|line| line["kind"].is_string() && line["id"].is_string())?;
    let disks = line["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let sum = |field: &str| disks.iter().filter_map(|disk| disk[field].as_u64()).sum();
    let warnings = line["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut warnings: Vec<String> = warnings.map(str::to_owned).collect();
    // What the snapshot does not tell: a hook that failed after it, something that is left in the guest.
    for logged in answer.warnings() {
        if !warnings.iter().any(|warning| logged.contains(warning.as_str())) {
            warnings.push(logged);
        }
    }
    let figures = BackupFigures {
        duration_ms: line["duration_ms"].as_u64().unwrap_or_default(),
        freeze_ms: line["freeze_ms"].as_u64(),
        bytes_changed: sum("bytes_changed"),
        bytes_read: sum("bytes_read"),
        bytes_stored: sum("bytes_stored"),
        scratch_peak: line["bytes_scratch_peak"].as_u64(),
        incremental: line["kind"] == "incremental",
        warnings: warnings.len() as u64,
    };
    let (outcome, text) = match (answer.is_done(), warnings.is_empty()) {
        (true, true) => (Outcome::Done, String::new()),
        (true, false) => (Outcome::Warning, warnings.join("\n")),
        (false, _) => (Outcome::Warning, answer.reason()),
    };
    let uuid = line["uuid"].as_str().map(str::to_owned);
    Some(Done { outcome, snapshot: line["id"].as_str()?.to_owned(), uuid, figures, text })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::child::Stopped;
    use super::*;

    #[test]
    fn a_first_backup_over_a_slow_line_has_days_unless_told_otherwise() {
        let limit = |text: &str| {
            let repository = "[repository.main]\nlocation = \"/srv\"\n";
            let text = format!("{repository}[job.a]\nschedule = \"03:00\"\n{text}");
            limit(&Config::parse(&text).unwrap().job.into_values().next().unwrap())
        };
        assert_eq!(limit("").as_secs() / 86_400, 7);
        assert_eq!(limit("timeout = \"2h\"").as_secs(), 7200);
    }

    #[test]
    fn what_takes_a_service_down_or_too_long_is_not_tried_again() {
        let answer = |code, was_stopped| Answer { code, was_stopped, ..Answer::default() };
        let too_long = Some(Stopped::TooLong(Duration::from_secs(60)));
        assert!(may_retry(&answer(Some(1), None), false));
        assert!(!may_retry(&answer(Some(1), None), true));
        assert!(!may_retry(&answer(Some(130), too_long), false));
        assert!(!may_retry(&answer(Some(WRONG_PASSWORD), None), false));
        // So that all that is left is told at once.
        assert!(may_retry(&answer(None, Some(Stopped::Asked)), true));
    }

    #[test]
    fn what_a_backup_logged_is_a_warning_even_if_it_was_made() {
        let line = json!({"kind": "full", "id": "a1", "uuid": "u", "warnings": ["not frozen"]});
        let answer = |errors: &str| Answer {
            code: Some(0),
            lines: vec![line.clone()],
            errors: errors.to_owned(),
            ..Answer::default()
        };
        let made = done(&answer(" WARN not frozen\n WARN hook `notify`: exit code 1\n")).unwrap();
        assert_eq!(made.outcome, Outcome::Warning);
        assert_eq!(made.text, "not frozen\nhook `notify`: exit code 1");
        assert_eq!((made.figures.warnings, made.uuid.as_deref()), (2, Some("u")));
    }
}
