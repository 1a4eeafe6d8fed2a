//! What happened since people last heard, in a few lines. No I/O.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use jiff::Timestamp;

use super::history::{Outcome, Record, Step};
use super::state::State;
use super::tell::local;
use crate::notify::{Event, Kind, Subject};
use crate::progress::human_bytes;

/// What runs did since then, and how old the backups of each domain are.
pub fn of(records: &[Record], state: &State, since: Timestamp) -> Event {
    let steps = || records.iter().flat_map(|record| &record.steps);
    let is_bad = |step: &&Step| step.outcome >= Outcome::Aborted;
    let (runs, bad) = (records.len(), steps().filter(is_bad).count());
    let mut text = String::new();
    for (job, known) in &state.jobs {
        for (domain, known) in &known.domains {
            let of_it = |step: &&Step| step.job == *job && step.domain.as_ref() == Some(domain);
            let made = steps().filter(of_it).filter_map(|step| step.figures);
            let (count, stored) =
                made.fold((0, 0), |(count, sum), it| (count + 1, sum + it.bytes_stored));
            let last = known.last_good.map_or("never".to_owned(), local);
            let stored = human_bytes(stored);
            let _ =
                writeln!(text, "{domain} ({job}): {count} backups, {stored} stored, last {last}");
        }
    }
    for (repository, known) in &state.repositories {
        if let Some(bytes) = known.bytes {
            let _ = writeln!(text, "{repository}: {}", human_bytes(bytes));
        }
    }
    let mut failures: BTreeMap<String, usize> = BTreeMap::new();
    for step in steps().filter(is_bad) {
        let whose = step.domain.as_ref().or(step.repository.as_ref()).unwrap_or(&step.job);
        *failures.entry(format!("{} of {whose}", step.work)).or_default() += 1;
    }
    for (what, times) in failures {
        let _ = writeln!(text, "{what} failed {times} times");
    }
    let since = local(since);
    let title = match bad {
        0 => format!("since {since}: {runs} runs, all well"),
        bad => format!("since {since}: {runs} runs, in which {bad} steps failed"),
    };
    let subject = Subject { job: None, domain: None, work: "digest".to_owned() };
    Event { kind: Kind::Digest, subject, title, text }
}

#[cfg(test)]
mod tests {
    use super::super::state::{DomainState, JobState};
    use super::*;
    use crate::metrics::BackupFigures;

    #[test]
    fn a_digest_counts_what_was_done_and_names_what_failed() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let figures = BackupFigures { bytes_stored: 1 << 20, ..BackupFigures::default() };
        let step = |work, domain| Step::begin("nightly", work, Some(domain), Some("main"));
        let good = Step { figures: Some(figures), ..step("backup", "web").end(Outcome::Done, "") };
        let bad = step("backup", "db").end(Outcome::Failed, "no room");
        let record = |steps| Record { steps, ended: Some(now), ..Record::begin(now) };
        let records = [record(vec![good.clone(), bad]), record(vec![good])];
        let mut state = State::default();
        let web = DomainState { last_good: Some(now), ..DomainState::default() };
        let domains = [("web".to_owned(), web), ("db".to_owned(), DomainState::default())].into();
        state.jobs.insert("nightly".to_owned(), JobState { domains, ..JobState::default() });

        let event = of(&records, &state, now);

        assert_eq!(event.kind, Kind::Digest);
        assert!(event.title.ends_with("2 runs, in which 1 steps failed"), "{}", event.title);
        assert!(event.text.contains("web (nightly): 2 backups, 2.00 MiB stored"), "{}", event.text);
        assert!(event.text.contains("db (nightly): 0 backups, 0 B stored, last never"));
        assert!(event.text.contains("backup of db failed 1 times"), "{}", event.text);
    }
}
