//! `kvmsnap run`: what is due is done, one job after the other, each step as a process of its own.
//!
//! It only decides, starts, waits, tries again, records and tells. Nothing of it is needed to restore.

mod backups;
pub mod child;
mod digest;
pub mod due;
mod fresh;
pub mod history;
mod places;
pub mod state;
mod tell;
mod upkeep;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::config::{Config, Job, Length};
use crate::metrics::{DomainFigures, Figures, JobFigures, RepositoryFigures};
use crate::notify::{Event, Subject};
use crate::schedule::Verdict;
use crate::units::human_duration;
use child::Launcher;
use due::Due;
use history::{Outcome, Record, Step};
use places::Places;
use state::{State, StateError};

pub use fresh::Wanted;

/// How long it may take to mend what earlier runs left.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(2 * 3600);

/// A machine that can be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// What its backups are called.
    pub name: String,
    /// How `kvmsnap backup` is told of it.
    pub arguments: Vec<String>,
}

/// What time it is: the host's clock, or another one for those who try schedules.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    at: Option<Timestamp>,
    begun: Instant,
}

impl Clock {
    /// The host's clock, unless it shall be another time now.
    pub fn new(at: Option<Timestamp>) -> Self {
        Self { at, begun: Instant::now() }
    }

    /// Now.
    pub fn now(self) -> Timestamp {
        let passed = SignedDuration::try_from(self.begun.elapsed()).unwrap_or_default();
        self.at.map_or_else(Timestamp::now, |at| at.checked_add(passed).unwrap_or(at))
    }
}

/// A run.
pub struct Runner<'a, F> {
    with: Begin<'a, F>,
    record: Record,
    /// What goes well and is no step.
    well: Vec<Subject>,
}

/// What came of a run.
#[derive(Debug)]
pub struct Ended {
    /// What it did.
    pub record: Record,
    /// What people should know of.
    pub events: Vec<Event>,
    /// What went well.
    pub well: Vec<Subject>,
    /// Figures for Prometheus.
    pub figures: Figures,
}

/// What a run is begun with.
pub struct Begin<'a, F> {
    /// What is configured.
    pub config: &'a Config,
    /// How commands are started.
    pub launcher: Launcher,
    /// What time it is.
    pub clock: Clock,
    /// Where the state is.
    pub state_dir: PathBuf,
    /// The machines that there are.
    pub machines: Vec<Machine>,
    /// Why there may be more of them: libvirt cannot be asked.
    pub problem: Option<String>,
    /// What is known from earlier runs.
    pub state: State,
    /// Told of each step that is over.
    pub tell: F,
}

impl<'a, F: FnMut(&Step)> Runner<'a, F> {
    /// A run that has done nothing yet.
    pub fn new(with: Begin<'a, F>) -> Self {
        let record = Record::begin(with.clock.now());
        Self { with, record, well: Vec::new() }
    }

    /// Does these jobs, then looks whether all backups are young enough.
    ///
    /// # Errors
    /// [`StateError`] when nothing can be kept: then what was done would be done again and again.
    pub async fn run(mut self, jobs: &[Due<'_>]) -> Result<Ended, StateError> {
        if !jobs.is_empty() {
            self.keep_record()?;
            self.repair().await;
        }
        for due in jobs {
            if self.with.launcher.is_asked_to_stop() {
                break;
            }
            self.job(due).await?;
        }
        self.record.ended = Some(self.with.clock.now());
        if !self.record.steps.is_empty() {
            self.keep_record()?;
        }
        let (mut events, mut well) = tell::of_steps(&self.record.steps);
        well.append(&mut self.well);
        for (name, job) in &self.with.config.job {
            self.look_at_age((name.as_str(), job), &mut events, &mut well);
        }
        events.extend(self.digest());
        self.with.state.save(&self.with.state_dir)?;
        Ok(Ended { figures: self.figures(), record: self.record, events, well })
    }

    fn keep_record(&self) -> Result<(), StateError> {
        self.record.save(&self.with.state_dir, self.with.config.run.keep_results.get())
    }

    fn over(&mut self, step: Step) {
        (self.with.tell)(&step);
        self.record.steps.push(step);
    }

    /// Mends what earlier runs have left, in guests that are not backed up now too.
    async fn repair(&mut self) {
        let step = Step::begin("", "repair", None, None);
        let answer = self.with.launcher.run(None, &["doctor", "--repair"], REPAIR_TIMEOUT).await;
        match () {
            () if answer.is_done() => self.well.push(tell::subject(&step)),
            () if answer.is_aborted() => {}
            () => self.over(step.end(Outcome::Warning, answer.reason())),
        }
    }

    async fn job(&mut self, due: &Due<'_>) -> Result<(), StateError> {
        let Due { name, job, .. } = *due;
        let (start, begun) = (self.with.clock.now(), Instant::now());
        let first_step = self.record.steps.len();
        let mut places = Places::new(self.with.config.repositories_of(job));
        if matches!(due.backup, Verdict::Due(_)) {
            self.with.state.job(name).last_start = Some(start);
            self.with.state.save(&self.with.state_dir)?;
            self.back_up((name, job), start, &mut places).await;
        } else if let Err(reason) = places.settle(&self.with.launcher).await {
            tracing::debug!("no repository of job `{name}` answers: {reason}");
        }
        for (away, reason) in places.away().to_vec() {
            let outcome = if places.used().is_some() { Outcome::Warning } else { Outcome::Failed };
            self.over(Step::begin(name, "repository", None, Some(&away)).end(outcome, reason));
        }
        if let Some(repository) = places.used().map(str::to_owned) {
            if !places.away().iter().any(|(away, _)| *away == repository) {
                let step = Step::begin(name, "repository", None, Some(&repository));
                self.well.push(tell::subject(&step));
            }
            self.upkeep((name, job), &repository).await;
        }
        self.pace((name, job), begun.elapsed());
        let now = self.with.clock.now();
        let steps = &self.record.steps[first_step..];
        let failures = steps.iter().filter(|step| step.outcome >= Outcome::Aborted).count();
        let state = self.with.state.job(name);
        state.failures = failures as u64;
        state.duration_ms = u64::try_from(begun.elapsed().as_millis()).ok();
        if failures == 0 {
            state.last_success = Some(now);
        }
        self.with.state.save(&self.with.state_dir)?;
        self.keep_record()
    }

    /// Backs up the domains of a job.
    async fn back_up(&mut self, (name, job): (&str, &Job), start: Timestamp, places: &mut Places) {
        let mut machines: Vec<Machine> = self
            .with
            .machines
            .iter()
            .filter(|machine| job.is_about(&machine.name))
            .cloned()
            .collect();
        machines.sort_by_cached_key(|machine| job.rank(&machine.name));
        if let Some(problem) = self.with.problem.clone() {
            self.over(Step::begin(name, "libvirt", None, None).end(Outcome::Failed, problem));
        } else {
            self.well.push(tell::subject(&Step::begin(name, "libvirt", None, None)));
        }
        if machines.is_empty() && self.with.problem.is_some() {
            return;
        }
        if machines.is_empty() {
            let patterns: Vec<_> = job.domains.iter().map(ToString::to_string).collect();
            let text = format!("this host has no domain that {} means", patterns.join(", "));
            return self.over(Step::begin(name, "backup", None, None).end(Outcome::Warning, text));
        }
        for machine in &machines {
            let known = self.with.state.job(name).domains.entry(machine.name.clone()).or_default();
            known.since.get_or_insert(start);
            known.last_attempt = Some(start);
        }
        let (launcher, mut steps) = (self.with.launcher.clone(), Vec::new());
        let tell = &mut self.with.tell;
        let mut over = |step: Step| {
            tell(&step);
            steps.push(step);
        };
        backups::run(&launcher, (name, job), machines, places, &mut over).await;
        for step in &steps {
            let Some(domain) = &step.domain else { continue };
            let known = self.with.state.job(name).domains.entry(domain.clone()).or_default();
            known.failed = step.snapshot.is_none();
            if let Some(figures) = step.figures {
                known.last = Some(figures);
                known.last_good = Some(start);
                known.snapshot.clone_from(&step.snapshot);
                known.snapshots = known.snapshots.map(|count| count + 1);
            }
        }
        self.record.steps.extend(steps);
    }

    /// Says when a job takes longer than there is time until the next one.
    fn pace(&mut self, (name, job): (&str, &Job), took: Duration) {
        let interval = job.schedule.interval(self.with.clock.now(), job.timezone.get());
        let step = Step::begin(name, "pace", None, None);
        if took > interval {
            let (took, interval) = (human_duration(took), human_duration(interval));
            let text = format!("it took {took}, and is due every {interval}");
            self.over(step.end(Outcome::Warning, text));
        } else {
            self.well.push(tell::subject(&step));
        }
    }

    /// What happened since the last digest, where one is due. The first one is due after it was asked for.
    fn digest(&mut self) -> Option<Event> {
        let schedule = self.with.config.alerts.digest.as_ref()?;
        let now = self.with.clock.now();
        let since = *self.with.state.last_digest.get_or_insert(self.record.started);
        let due = schedule.last(now, &TimeZone::system())?;
        if due <= since {
            return None;
        }
        self.with.state.last_digest = Some(now);
        let mut records = Record::load(&self.with.state_dir, usize::MAX);
        records.retain(|record| record.started >= since);
        Some(digest::of(&records, &self.with.state, since))
    }

    /// Whether the backups of a job's domains are young enough, by what is known.
    fn look_at_age(
        &self,
        (name, job): (&str, &Job),
        events: &mut Vec<Event>,
        well: &mut Vec<Subject>,
    ) {
        let Some(known) = self.with.state.jobs.get(name) else { return };
        for (domain, known) in &known.domains {
            // One that is gone from here is backed up elsewhere, or not needed any more.
            if !job.is_about(domain) || !self.with.machines.iter().any(|it| it.name == *domain) {
                continue;
            }
            let wanted = self.wanted(job, domain);
            match wanted.lacks(known, self.with.clock.now()) {
                Some(why) => events.push(tell::too_old(name, domain, &why)),
                None => well.push(tell::age_of(name, domain)),
            }
        }
    }

    fn wanted(&self, job: &Job, domain: &str) -> Wanted {
        wanted(self.with.config, job, domain, self.with.clock.now())
    }

    fn figures(&self) -> Figures {
        let mut figures = Figures::default();
        for (name, known) in &self.with.state.repositories {
            let figure = |bytes| RepositoryFigures { repository: name.clone(), bytes };
            figures.repositories.extend(known.bytes.map(figure));
        }
        for (name, job) in &self.with.config.job {
            let Some(known) = self.with.state.jobs.get(name.as_str()) else { continue };
            figures.jobs.push(JobFigures {
                job: name.to_string(),
                last_success: known.last_success,
                duration_ms: known.duration_ms,
                failures: known.failures,
            });
            for (domain, known) in known.domains.iter().filter(|(domain, _)| job.is_about(domain)) {
                figures.domains.push(DomainFigures {
                    job: name.to_string(),
                    domain: domain.clone(),
                    last_success: known.last_good,
                    last_attempt: known.last_attempt,
                    failed: known.failed,
                    stale: self.wanted(job, domain).lacks(known, self.with.clock.now()).is_some(),
                    snapshots: known.snapshots.unwrap_or_default(),
                    last: known.last,
                });
            }
        }
        figures
    }
}

/// What is asked of a domain's backups by a job.
pub fn wanted(config: &Config, job: &Job, domain: &str, now: Timestamp) -> Wanted {
    let settings = config.domain(domain);
    let interval = job.schedule.interval(now, job.timezone.get());
    Wanted::new(settings.max_age.map(Length::get), settings.min_snapshots, interval)
}
