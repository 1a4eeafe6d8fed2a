//! What people should know of a run.

use super::history::{Outcome, Step};
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

/// That a domain's backups are too old, or too few.
pub fn too_old(job: &str, domain: &str, why: &str) -> Event {
    Event {
        kind: Kind::Failure,
        subject: age_of(job, domain),
        title: format!("{domain}: {why}"),
        text: String::new(),
    }
}

/// The age of a domain's backups.
pub fn age_of(job: &str, domain: &str) -> Subject {
    Subject { job: Some(job.to_owned()), domain: Some(domain.to_owned()), work: "age".to_owned() }
}
