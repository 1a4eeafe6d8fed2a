//! `kvmsnap run`: what is due is done, one job after the other, each step as a process of its own.
//!
//! It only decides, starts, waits, tries again, records and tells. Nothing of it is needed to restore.

mod backups;
pub mod child;
pub mod damage;
mod digest;
pub mod due;
mod fresh;
pub mod history;
mod places;
pub mod state;
pub mod tell;
mod upkeep;
pub mod watch;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::config::{self, Config, Job, Length};
use crate::notify::{Event, Subject};
use crate::schedule::Verdict;
use child::Launcher;
use due::Due;
use history::{Outcome, Record, Step};
use places::Places;
use state::{State, StateError};

pub use fresh::Wanted;

/// How often somebody looks what people should know while a run goes on, and how long that may take.
const LOOK_EVERY: Duration = Duration::from_secs(5 * 60);
const LOOK_TIMEOUT: Duration = Duration::from_secs(5 * 60);
/// How long it may take to mend what earlier runs left.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(2 * 3600);
/// How long any other step may take where nothing is configured.
const STEP_TIMEOUT: Duration = Duration::from_secs(7 * 86_400);

/// A machine that can be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// What its backups are called.
    pub name: String,
    /// Which of all machines with that name it is, where that is known before its backup.
    pub uuid: Option<String>,
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
    /// Why something cannot be kept.
    trouble: Option<StateError>,
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
    /// What is known now.
    pub state: State,
    /// Why something could not be kept: then nothing more was begun, for it would be done again and again.
    pub trouble: Option<StateError>,
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
        Self { with, record, well: Vec::new(), trouble: None }
    }

    /// Does these jobs.
    pub async fn run(mut self, jobs: &[Due<'_>]) -> Ended {
        if !jobs.is_empty() {
            self.keep();
            if self.trouble.is_none() {
                self.repair().await;
            }
        }
        let looks = tokio::spawn(look_on(self.with.launcher.clone()));
        for due in jobs {
            if self.with.launcher.is_asked_to_stop() || self.trouble.is_some() {
                break;
            }
            self.job(due).await;
        }
        looks.abort();
        self.record.ended = Some(self.with.clock.now());
        let (mut events, mut well) = tell::of_steps(&self.record.steps);
        well.append(&mut self.well);
        events.extend(self.digest());
        self.keep();
        match &self.trouble {
            Some(error) => events.push(tell::not_kept(error)),
            None => well.push(tell::keeping()),
        }
        let Self { with, record, trouble, .. } = self;
        Ended { record, events, well, state: with.state, trouble }
    }

    /// Keeps what is known and, once there are any, the steps that were done.
    fn keep(&mut self) {
        let Begin { state, state_dir, config, .. } = &self.with;
        let kept = keep(state, &self.record, state_dir, config);
        self.trouble = self.trouble.take().or(kept.err());
    }

    fn over(&mut self, step: Step) {
        (self.with.tell)(&step);
        self.record.steps.push(step);
    }

    fn is_here(&self, domain: &str) -> bool {
        watch::is_here(&self.with.machines, self.with.problem.is_some(), domain)
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

    async fn job(&mut self, due: &Due<'_>) {
        let Due { name, job, .. } = *due;
        let (start, begun) = (self.with.clock.now(), Instant::now());
        let first_step = self.record.steps.len();
        let mut places = Places::new(self.with.config.repositories_of(job));
        if matches!(due.backup, Verdict::Due(_)) {
            self.with.state.job(name).begin(start);
            self.keep();
            if self.trouble.is_some() {
                return;
            }
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
        self.pace((name, job), start);
        let now = self.with.clock.now();
        let steps = &self.record.steps[first_step..];
        let failures = steps.iter().filter(|step| step.outcome >= Outcome::Aborted).count();
        let state = self.with.state.job(name);
        state.failures = failures as u64;
        state.duration_ms = u64::try_from(begun.elapsed().as_millis()).ok();
        if failures == 0 {
            state.last_success = Some(now);
        }
        // What a person has ended is over; what the host's end has cut off is not.
        if !self.with.launcher.is_asked_by_host() {
            state.begun = 0;
        }
        self.keep();
    }

    /// Backs up the domains of a job.
    async fn back_up(&mut self, (name, job): (&str, &Job), start: Timestamp, places: &mut Places) {
        let of_job = self.with.machines.iter().filter(|machine| job.is_about(&machine.name));
        let mut machines: Vec<Machine> = of_job.cloned().collect();
        machines.sort_by_cached_key(|machine| job.rank(&machine.name));
        let libvirt = Step::begin(name, "libvirt", None, None);
        let missing = match self.with.problem.clone() {
            Some(problem) => {
                self.over(libvirt.end(Outcome::Failed, problem));
                Vec::new()
            }
            None => {
                self.well.push(tell::subject(&libvirt));
                missing(job, &machines)
            }
        };
        for (domain, text) in &missing {
            let step = Step::begin(name, "backup", domain.as_deref(), None);
            self.over(step.end(Outcome::Warning, text));
        }
        if machines.is_empty() {
            return;
        }
        self.well.push(tell::subject(&Step::begin(name, "backup", None, None)));
        for machine in &machines {
            let known = self.with.state.job(name).domains.entry(machine.name.clone()).or_default();
            known.last_attempt = Some(start);
        }
        let Self {
            with: Begin { config, launcher, state_dir, state, tell, .. },
            record,
            trouble,
            ..
        } = self;
        // Whatever ends this run, what was done until then is known.
        let over = |step: Step| {
            tell(&step);
            let domain = step.domain.clone().unwrap_or_default();
            let known = state.job(name).domains.entry(domain).or_default();
            known.meet(step.uuid.as_deref(), start);
            known.note(&step, start);
            record.steps.push(step);
            *trouble = trouble.take().or(keep(state, record, state_dir, config).err());
        };
        backups::run(launcher, config, (name, job), machines, places, over).await;
    }

    /// Says when a job takes longer than there is time until the next one.
    fn pace(&mut self, (name, job): (&str, &Job), start: Timestamp) {
        let step = Step::begin(name, "pace", None, None);
        match watch::too_slow(job, start, self.with.clock.now()) {
            Some(text) => self.over(step.end(Outcome::Warning, text)),
            None => self.well.push(tell::subject(&step)),
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
}

fn keep(
    state: &State,
    record: &Record,
    state_dir: &Path,
    config: &Config,
) -> Result<(), StateError> {
    state.save(state_dir)?;
    match record.steps.is_empty() {
        true => Ok(()),
        false => record.save(state_dir, config.run.keep_results.get()),
    }
}

/// What a job names and this host does not have: a domain, or all of them; in words.
fn missing(job: &Job, machines: &[Machine]) -> Vec<(Option<String>, String)> {
    let is_here = |name: &str| machines.iter().any(|machine| machine.name == name);
    let named = job.domains.iter().filter(|pattern| !pattern.is_open());
    let named = named.map(config::Pattern::as_str).filter(|name| job.is_about(name));
    let missing: Vec<_> = named
        .filter(|name| !is_here(name))
        .map(|name| (Some(name.to_owned()), "this host has no such domain".to_owned()))
        .collect();
    if machines.is_empty() && missing.is_empty() {
        let patterns: Vec<_> = job.domains.iter().map(ToString::to_string).collect();
        let text = format!("this host has no domain that {} means", patterns.join(", "));
        return vec![(None, text)];
    }
    missing
}

/// systemd's timer starts no second run beside one that hangs, so nobody else would tell of it.
async fn look_on(launcher: Launcher) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let answer = launcher.run(None, &["run", "--only-look"], LOOK_TIMEOUT).await;
        if !answer.is_done() && !answer.is_aborted() {
            tracing::warn!("cannot look how old backups are: {}", answer.reason());
        }
    }
}

/// What is asked of the backups of a job's domains.
pub fn wanted<'a>(config: &'a Config, job: &Job, now: Timestamp) -> impl Fn(&str) -> Wanted + 'a {
    // It takes a while, and is the same for all of them.
    let interval = job.schedule.interval(now, job.timezone.get());
    move |domain| {
        let settings = config.domain(domain);
        Wanted::new(settings.max_age.map(Length::get), settings.min_snapshots, interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_that_is_named_and_missing_is_told() {
        let job = |domains: &str| {
            let text = format!("[job.a]\nschedule = \"03:00\"\ndomains = {domains}\n");
            let text = format!("[repository.main]\nlocation = \"/srv\"\n{text}");
            Config::parse(&text).unwrap().job.into_values().next().unwrap()
        };
        let web = Machine { name: "web".to_owned(), uuid: None, arguments: Vec::new() };
        let told = |domains, machines: &[Machine]| -> Vec<Option<String>> {
            missing(&job(domains), machines).into_iter().map(|(domain, _)| domain).collect()
        };
        assert_eq!(
            told("[\"web\", \"db\", \"x-*\"]", std::slice::from_ref(&web)),
            [Some("db".to_owned())]
        );
        assert_eq!(told("[\"x-*\"]", &[]), [None]);
        assert_eq!(told("[\"web\", \"x-*\"]", &[web]), []);
    }
}
