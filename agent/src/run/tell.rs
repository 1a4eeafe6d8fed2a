//! What people should know of a run.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::history::{Outcome, Step};
use super::state::StateError;
use crate::notify::{Event, Kind, Subject};

/// What of these steps people should know of, and what went well.
pub fn of_steps(steps: &[Step]) -> (Vec<Event>, Vec<Subject>) {
    let (mut events, mut well): (Vec<Event>, Vec<Subject>) = (Vec::new(), Vec::new());
    for step in steps {
        let subject = subject(step);
        let kind = match step.outcome {
            Outcome::Failed => Kind::Failure,
            Outcome::Warning => Kind::Warning,
            Outcome::Done => {
                well.push(subject);
                continue;
            }
            // Whoever asked for it knows.
            Outcome::Aborted => continue,
        };
        let title = title(step);
        events.push(Event { kind, subject, title, text: step.text.clone() });
    }
    (events, well)
}

/// What a step is about.
pub fn subject(step: &Step) -> Subject {
    let job = Some(step.job.clone()).filter(|job| !job.is_empty());
    let work = match (step.work.as_str(), &step.repository) {
        ("backup", _) | (_, None) => step.work.clone(),
        (work, _) if work.starts_with("copy") => work.to_owned(),
        ("repository", Some(repository)) => format!("repository {repository}"),
        (work, Some(repository)) => format!("{work} in {repository}"),
    };
    Subject { job, domain: step.domain.clone(), work }
}

fn title(step: &Step) -> String {
    let ends = match step.outcome {
        Outcome::Failed => "failed",
        _ => "gave a warning",
    };
    match (step.work.as_str(), &step.domain, &step.repository) {
        ("repository", _, Some(repository)) => format!("repository {repository} does not answer"),
        ("libvirt", ..) => "libvirt cannot be asked for its domains".to_owned(),
        ("pace", ..) => format!("job {} takes longer than its interval", step.job),
        ("repair", ..) => "something is left of an earlier run".to_owned(),
        (work, Some(domain), _) => format!("{work} of {domain} {ends}"),
        (work, None, Some(repository)) => format!("{work} in {repository} {ends}"),
        (work, None, None) => format!("{work} of job {} {ends}", step.job),
    }
}

/// A time by the host's clock.
pub fn local(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M").to_string()
}

/// That a domain's backups are too old, or too few; with what may be the reason.
pub fn too_old(job: &str, domain: &str, why: &str, text: String) -> Event {
    let title = format!("{domain}: {why}");
    Event { kind: Kind::Failure, subject: age_of(job, domain), title, text }
}

/// That a run of a job did not come to its end.
pub fn cut_off(job: &str, begun: Option<Timestamp>) -> Event {
    let begun = begun.map(|time| format!("it began at {}; ", local(time))).unwrap_or_default();
    Event {
        kind: Kind::Failure,
        subject: of_job(job, "run"),
        title: format!("the last run of job {job} did not come to its end"),
        text: format!("{begun}it was killed, or the host went down"),
    }
}

/// That a job was not begun in time.
pub fn missed(job: &str, due: Timestamp) -> Event {
    Event {
        kind: Kind::Warning,
        subject: of_job(job, "window"),
        title: format!("job {job} was not begun within its window"),
        text: format!("it was due at {}", local(due)),
    }
}

/// That a job that is active takes too long.
pub fn too_slow(job: &str, text: String) -> Event {
    let subject = of_job(job, "pace");
    let title = format!("job {job} takes longer than its interval");
    Event { kind: Kind::Warning, subject, title, text }
}

/// That nothing can be kept.
pub fn not_kept(error: &StateError) -> Event {
    Event {
        kind: Kind::Failure,
        subject: keeping(),
        title: "no job is begun: what is known of them cannot be kept".to_owned(),
        text: format!("{error}: {}", error.source),
    }
}

/// That something can be kept.
pub fn keeping() -> Subject {
    Subject { job: None, domain: None, work: "state".to_owned() }
}

/// That people can be told.
pub fn telling() -> Subject {
    Subject { job: None, domain: None, work: "alerts".to_owned() }
}

/// Something about a whole job.
pub fn of_job(job: &str, work: &str) -> Subject {
    Subject { job: Some(job.to_owned()), domain: None, work: work.to_owned() }
}

/// The age of a domain's backups.
pub fn age_of(job: &str, domain: &str) -> Subject {
    Subject { job: Some(job.to_owned()), domain: Some(domain.to_owned()), work: "age".to_owned() }
}
