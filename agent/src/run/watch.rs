//! What people should know whether or not a job is done: backups that are too old, runs without an end, times
//! that were missed. Judged by what is known, without I/O.

use jiff::{SignedDuration, Timestamp};

use super::due::{self, Due};
use super::state::{Pause, State};
use super::{Machine, tell, wanted};
use crate::config::{Config, Job};
use crate::metrics::{DomainFigures, Figures, JobFigures, RepositoryFigures};
use crate::notify::{Event, Subject};
use crate::schedule::Verdict;
use crate::units::human_duration;

/// What is known of a host.
#[derive(Debug, Clone, Copy)]
pub struct Watch<'a> {
    /// What is configured.
    pub config: &'a Config,
    /// What is known.
    pub state: &'a State,
    /// The machines that there are.
    pub machines: &'a [Machine],
    /// Whether there may be more of them.
    pub has_more: bool,
    /// The host's name.
    pub host: &'a str,
    /// What time it is.
    pub now: Timestamp,
}

/// When that is looked at.
#[derive(Debug, Clone, Copy)]
pub enum Moment<'a> {
    /// Before these jobs are begun.
    Begin(&'a [Due<'a>]),
    /// After all that was due.
    End,
    /// While nothing is begun.
    Paused(Pause),
    /// While another run is active.
    Active,
}

impl Watch<'_> {
    /// What people should know, and what is well.
    pub fn look(&self, moment: Moment<'_>) -> (Vec<Event>, Vec<Subject>) {
        let (mut events, mut well) = (Vec::new(), Vec::new());
        let active = match moment {
            Moment::Active => self.active(),
            _ => None,
        };
        for due in due::all(self.config, self.state, self.host, self.now) {
            let known = self.state.jobs.get(due.name).cloned().unwrap_or_default();
            let is_active = active == Some(due.name);
            let mut is_busy =
                matches!(moment, Moment::Begin(jobs) if jobs.iter().any(|it| it.name == due.name));
            let is_known =
                |at| known.domains.values().any(|it| it.since.is_some_and(|it| it <= at));
            match due.backup {
                _ if known.has_no_end() && is_active => {
                    let start = known.last_start.unwrap_or(self.now);
                    let slow = too_slow(due.job, start, self.now);
                    is_busy = slow.is_none();
                    events.extend(slow.map(|text| tell::too_slow(due.name, text)));
                }
                _ if known.has_no_end() => events.push(tell::cut_off(due.name, known.last_start)),
                Verdict::Missed(at) if is_known(at) => events.push(tell::missed(due.name, at)),
                _ => well.extend(["run", "window"].map(|work| tell::of_job(due.name, work))),
            }
            // What is being backed up is judged after that.
            if !is_busy {
                self.look_at_age(&due, moment, &mut events, &mut well);
            }
        }
        (events, well)
    }

    /// The job that the active run is at.
    fn active(&self) -> Option<&str> {
        let begun = self.state.jobs.iter().filter(|(_, known)| known.has_no_end());
        begun.max_by_key(|(_, known)| known.last_start).map(|(name, _)| name.as_str())
    }

    /// Whether the backups of a job's domains are young enough.
    fn look_at_age(
        &self,
        due: &Due<'_>,
        moment: Moment<'_>,
        events: &mut Vec<Event>,
        well: &mut Vec<Subject>,
    ) {
        let Some(known) = self.state.jobs.get(due.name) else { return };
        let wanted = wanted(self.config, due.job, self.now);
        for (domain, known) in
            known.domains.iter().filter(|(domain, _)| self.is_of(due.job, domain))
        {
            match wanted(domain).lacks(known, self.now) {
                Some(why) => {
                    let text = match moment {
                        Moment::Paused(pause) => format!(
                            "all jobs are paused since {}: `kvmsnap run --resume` ends that",
                            tell::local(pause.since)
                        ),
                        _ => String::new(),
                    };
                    events.push(tell::too_old(due.name, domain, &why, text));
                }
                None => well.push(tell::age_of(due.name, domain)),
            }
        }
    }

    /// Whether a job is about a domain that is here. One that is gone is backed up elsewhere, or not needed any
    /// more.
    fn is_of(&self, job: &Job, domain: &str) -> bool {
        job.is_about(domain) && is_here(self.machines, self.has_more, domain)
    }

    /// Figures for Prometheus.
    pub fn figures(&self) -> Figures {
        let mut figures = Figures::default();
        for (name, known) in &self.state.repositories {
            let figure = |bytes| RepositoryFigures { repository: name.clone(), bytes };
            figures.repositories.extend(known.bytes.map(figure));
        }
        for (name, job) in &self.config.job {
            let Some(known) = self.state.jobs.get(name.as_str()) else { continue };
            figures.jobs.push(JobFigures {
                job: name.to_string(),
                last_success: known.last_success,
                duration_ms: known.duration_ms,
                failures: known.failures,
            });
            let wanted = wanted(self.config, job, self.now);
            for (domain, known) in known.domains.iter().filter(|(it, _)| self.is_of(job, it)) {
                figures.domains.push(DomainFigures {
                    job: name.to_string(),
                    domain: domain.clone(),
                    last_success: known.last_good,
                    last_attempt: known.last_attempt,
                    failed: known.failed,
                    stale: wanted(domain).lacks(known, self.now).is_some(),
                    snapshots: known.snapshots.unwrap_or_default(),
                    last: known.last,
                });
            }
        }
        figures
    }
}

/// Takes note of the machines that each job is about, also of one that is never begun.
pub fn meet(state: &mut State, config: &Config, machines: &[Machine], now: Timestamp) {
    for (name, job) in &config.job {
        let repositories = config.repositories_of(job);
        for machine in machines.iter().filter(|machine| job.is_about(&machine.name)) {
            let domains = &mut state.job(name.as_str()).domains;
            let known = domains.entry(machine.name.clone()).or_default();
            known.meet(machine.uuid.as_deref(), now);
            known.keep_places(&repositories, now);
        }
    }
}

/// Whether a domain is here, as far as that is known.
pub fn is_here(machines: &[Machine], has_more: bool, domain: &str) -> bool {
    has_more || machines.iter().any(|machine| machine.name == domain)
}

/// Whether a job takes longer than there is time from one of its times to the next, in words.
pub fn too_slow(job: &Job, start: Timestamp, now: Timestamp) -> Option<String> {
    let interval = job.schedule.gap(start, job.timezone.get())?;
    let took = now.duration_since(start);
    if took <= interval {
        return None;
    }
    let [took, interval] = [took, interval].map(|length| {
        let length = SignedDuration::from_secs(length.as_secs().max(1));
        human_duration(length.unsigned_abs())
    });
    Some(format!("it took {took} so far, and is due every {interval}"))
}

#[cfg(test)]
mod tests {
    use super::super::state::DomainState;
    use super::*;
    use crate::notify::Kind;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn config(job: &str) -> Config {
        let text = "[repository.main]\nlocation = \"/srv\"\n[job.a]\ntimezone = \"UTC\"\n";
        Config::parse(&format!("{text}schedule = \"03:00\"\n{job}")).unwrap()
    }

    fn web() -> Machine {
        Machine { name: "web".to_owned(), uuid: None, arguments: Vec::new() }
    }

    /// What is told, by its kind and work.
    fn told(config: &Config, state: &State, now: &str, moment: Moment<'_>) -> Vec<(Kind, String)> {
        let machines = [web()];
        let watch =
            Watch { config, state, machines: &machines, has_more: false, host: "h", now: at(now) };
        let (events, _) = watch.look(moment);
        events.into_iter().map(|event| (event.kind, event.subject.work)).collect()
    }

    fn one(kind: Kind, work: &str) -> Vec<(Kind, String)> {
        vec![(kind, work.to_owned())]
    }

    #[test]
    fn p3_the_age_of_a_job_that_is_never_begun_is_told_and_that_its_window_closes() {
        let (config, mut state) = (config("window = \"1h\""), State::default());
        meet(&mut state, &config, &[web()], at("2026-11-20T05:00:00Z"));
        let told = |now| told(&config, &state, now, Moment::End);
        assert_eq!(told("2026-11-20T05:00:00Z"), [], "its first time is yet to come");
        assert_eq!(told("2026-11-21T05:00:00Z"), one(Kind::Warning, "window"));
        let both = [one(Kind::Warning, "window"), one(Kind::Failure, "age")].concat();
        assert_eq!(told("2026-11-22T06:00:00Z"), both);
    }

    #[test]
    fn p3_a_run_without_an_end_is_told_unless_it_is_active_and_then_when_it_takes_too_long() {
        let (config, mut state) = (config(""), State::default());
        state.job("a").begin(at("2026-11-20T03:00:00Z"));
        let told = |now, moment| told(&config, &state, now, moment);
        assert_eq!(told("2026-11-20T03:05:00Z", Moment::End), one(Kind::Failure, "run"));
        assert_eq!(told("2026-11-20T03:05:00Z", Moment::Begin(&[])), one(Kind::Failure, "run"));
        assert_eq!(told("2026-11-20T03:05:00Z", Moment::Active), []);
        assert_eq!(told("2026-11-21T03:05:00Z", Moment::Active), one(Kind::Warning, "pace"));
    }

    #[test]
    fn p3_the_age_is_told_while_jobs_are_paused_and_while_a_run_hangs() {
        let (config, mut state) = (config(""), State::default());
        meet(&mut state, &config, &[web()], at("2026-11-20T00:00:00Z"));
        let now = "2026-11-22T01:00:00Z";
        let pause = Pause { since: at("2026-11-20T00:00:00Z"), until: None };
        let age = one(Kind::Failure, "age");
        assert_eq!(told(&config, &state, now, Moment::Paused(pause)), age);
        assert_eq!(told(&config, &state, now, Moment::Active), age, "another job hangs");
        state.job("a").begin(at("2026-11-20T03:00:00Z"));
        let both = [one(Kind::Warning, "pace"), age].concat();
        assert_eq!(told(&config, &state, now, Moment::Active), both, "the job itself hangs");
        state.job("a").begin(at("2026-11-22T00:59:00Z"));
        assert_eq!(told(&config, &state, now, Moment::Active), [], "it is being done");
    }

    #[test]
    fn of_a_domain_that_is_gone_there_are_neither_alarms_nor_figures() {
        let (config, mut state) = (config(""), State::default());
        let gone =
            DomainState { since: Some(at("2026-01-01T00:00:00Z")), ..DomainState::default() };
        state.job("a").domains.insert("gone".to_owned(), gone);
        let now = at("2026-11-22T01:00:00Z");
        let watch = |has_more| Watch {
            config: &config,
            state: &state,
            machines: &[],
            has_more,
            host: "h",
            now,
        };
        assert!(watch(false).look(Moment::End).0.is_empty());
        assert!(watch(false).figures().domains.is_empty());
        // Where libvirt cannot be asked, it may be there.
        assert_eq!(watch(true).look(Moment::End).0.len(), 1);
        assert!(watch(true).figures().domains[0].stale);
    }
}
