//! Which jobs are due, and why.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::state::{JobState, State};
use crate::config::{Config, Job, Length, Prune, Window};
use crate::schedule::{Plan, Schedule, Verdict};

/// A job, and what of it is due.
#[derive(Debug, Clone)]
pub struct Due<'a> {
    /// Its name.
    pub name: &'a str,
    /// The job.
    pub job: &'a Job,
    /// Whether its backups are.
    pub backup: Verdict,
    /// Whether room in its repository is to be given back at a time of its own.
    pub prune: bool,
    /// Whether its repository is to be verified at a time of its own.
    pub verify: bool,
    /// When its backups are due next.
    pub next: Option<Timestamp>,
}

impl Due<'_> {
    /// Whether there is anything to do.
    pub fn is_due(&self) -> bool {
        matches!(self.backup, Verdict::Due(_)) || self.verify || self.prune
    }

    /// Why, or why not.
    pub fn reason(&self, show: impl Fn(Timestamp) -> String) -> String {
        match self.backup {
            Verdict::Due(since) => format!("due since {}", show(since)),
            _ if self.prune => "room in its repository is to be given back".to_owned(),
            _ if self.verify => "its repository is to be verified".to_owned(),
            Verdict::Missed(since) => {
                format!("was due at {}, and its window has closed", show(since))
            }
            Verdict::Done => "not due".to_owned(),
        }
    }
}

/// How a job follows its schedule on this host.
pub fn plan<'a>(job: &'a Job, seed: &'a str) -> Plan<'a> {
    Plan {
        schedule: &job.schedule,
        zone: job.timezone.get(),
        delay_max: job.random_delay.map_or(Duration::ZERO, Length::get),
        seed,
        window: job.window.map(Window::get),
    }
}

/// What makes a job's delay its own.
pub fn seed(host: &str, job: &str) -> String {
    format!("{host}\n{job}")
}

/// All jobs, those first that were due first.
pub fn all<'a>(config: &'a Config, state: &State, host: &str, now: Timestamp) -> Vec<Due<'a>> {
    let none = JobState::default();
    let mut jobs: Vec<Due<'a>> = Vec::new();
    for (name, job) in &config.job {
        let known = state.jobs.get(name.as_str()).unwrap_or(&none);
        let seed = seed(host, name.as_str());
        let plan = plan(job, &seed);
        let repository = config.repositories_of(job).into_iter().next();
        let of_repository = repository.as_ref().and_then(|name| state.repositories.get(name));
        let verified = repository.as_ref().and_then(|name| known.verified.get(name));
        let is_due = |schedule: &Schedule, last| is_due(schedule, job.timezone.get(), last, now);
        let verify = job.verify().and_then(|verify| verify.schedule);
        let verify = verify
            .is_some_and(|schedule| is_due(&schedule, verified.and_then(|verified| verified.last)));
        let prune = match job.prune() {
            Prune::At(schedule) => is_due(schedule, of_repository.and_then(|it| it.last_prune)),
            Prune::Never | Prune::Weekly => false,
        };
        jobs.push(Due {
            name: name.as_str(),
            job,
            backup: plan.verdict(now, known.start_that_counts()),
            prune,
            verify,
            next: plan.next(now),
        });
    }
    let since = |due: &Due<'_>| match due.backup {
        Verdict::Due(since) => (0, since),
        _ => (1, now),
    };
    jobs.sort_by_key(|due| (since(due), due.name));
    jobs
}

/// Whether something with a schedule of its own is due. What was never done is not missed: it waits for its
/// first time after the beginning, which `last` then is.
pub fn is_due(
    schedule: &Schedule,
    zone: &TimeZone,
    last: Option<Timestamp>,
    now: Timestamp,
) -> bool {
    let plan = Plan { schedule, zone, delay_max: Duration::ZERO, seed: "", window: None };
    last.is_some() && matches!(plan.verdict(now, last), Verdict::Due(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn jobs_are_due_by_their_schedules_and_the_longest_waiting_is_first() {
        let config = Config::parse(
            "[repository.main]\nlocation = \"/srv\"\n\
             [job.a]\nschedule = \"every 15 min\"\n\
             [job.b]\nschedule = \"03:00\"\ntimezone = \"UTC\"\n\
             [job.c]\nschedule = \"sunday 01:00\"\ntimezone = \"UTC\"\n\
             [job.d]\nschedule = \"01:00\"\ntimezone = \"UTC\"\nwindow = \"1h\"\n",
        )
        .unwrap();
        let now = at("2026-11-21T09:05:00Z");
        let mut state = State::default();
        state.job("c").last_start = Some(at("2026-11-15T01:00:30Z"));
        let jobs = all(&config, &state, "host", now);
        let names: Vec<_> = jobs.iter().map(|due| (due.name, due.is_due())).collect();
        assert_eq!(names, [("b", true), ("a", true), ("c", false), ("d", false)]);
        let reason = |n: usize| jobs[n].reason(|time| time.to_string());
        assert_eq!(reason(0), "due since 2026-11-21T03:00:00Z");
        assert_eq!(reason(2), "not due");
        assert!(reason(3).contains("its window has closed"));
        assert_eq!(jobs[2].next, Some(at("2026-11-22T01:00:00Z")));
    }

    #[test]
    fn p3_a_job_that_was_cut_off_is_caught_up_once_within_its_window() {
        let config = Config::parse(
            "[repository.main]\nlocation = \"/srv\"\n[job.a]\nschedule = \"03:00\"\n\
             timezone = \"UTC\"\nwindow = \"4h\"\n",
        )
        .unwrap();
        let mut state = State::default();
        state.job("a").begin(at("2026-11-22T03:00:00Z"));
        let verdict = |state: &State, now| all(&config, state, "host", at(now))[0].backup;
        let due = at("2026-11-22T03:00:00Z");
        assert_eq!(verdict(&state, "2026-11-22T03:05:00Z"), Verdict::Due(due));
        assert_eq!(verdict(&state, "2026-11-22T08:00:00Z"), Verdict::Missed(due));
        state.job("a").begin(at("2026-11-22T03:05:00Z"));
        assert_eq!(verdict(&state, "2026-11-22T03:10:00Z"), Verdict::Done, "not again and again");
        assert!(matches!(verdict(&state, "2026-11-23T03:00:00Z"), Verdict::Due(_)));
    }

    #[test]
    fn a_repository_is_verified_at_a_time_of_its_own() {
        let config = Config::parse(
            "[repository.main]\nlocation = \"/srv\"\n[job.a]\nschedule = \"03:00\"\n\
             timezone = \"UTC\"\nverify = { schedule = \"sunday 12:00\" }\n",
        )
        .unwrap();
        let mut state = State::default();
        state.job("a").last_start = Some(at("2026-11-22T03:00:00Z"));
        let is_due = |state: &State, now| all(&config, state, "host", at(now))[0].is_due();
        assert!(!is_due(&state, "2026-11-22T13:00:00Z"), "its first time is yet to come");
        let verified = state.job("a").verified.entry("main".to_owned()).or_default();
        verified.last = Some(at("2026-11-20T00:00:00Z"));
        assert!(!is_due(&state, "2026-11-22T11:00:00Z"));
        assert!(is_due(&state, "2026-11-22T12:00:00Z"));
    }
}
