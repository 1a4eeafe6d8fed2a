//! What people have been told already: a failure that lasts is told once and then now and then, and its end
//! is told too.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Event, Kind, Queue, Subject};
use crate::durable;

/// Name of the file in the state folder.
const FILE: &str = "alerts.json";

/// What lasts is told again this part of its time earlier.
const SLACK: i32 = 24;

/// What is known to be wrong. Losing it costs one more message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    problems: Vec<Problem>,
    /// What people were to be told and could not be yet.
    #[serde(default)]
    pub queue: Queue,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Problem {
    #[serde(flatten)]
    subject: Subject,
    kind: Kind,
    since: Timestamp,
    /// When that it is of a kind was last told.
    #[serde(default)]
    told_as: BTreeMap<Kind, Timestamp>,
}

/// Why what is known cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep what people have been told in {}", .path.display())]
pub struct KnownError {
    path: PathBuf,
    source: io::Error,
}

impl Known {
    /// Reads it from the state folder, or from where it was kept when that was full. What is not there, or
    /// makes no sense, is nothing.
    pub fn load(state_dir: &Path, run_dir: &Path) -> Self {
        let text = fs::read(run_dir.join(FILE)).or_else(|_| fs::read(state_dir.join(FILE)));
        serde_json::from_slice(&text.unwrap_or_default()).unwrap_or_default()
    }

    /// Keeps it there; in the folder of sockets where it cannot be, so that a full disk is told once and not
    /// every few minutes.
    ///
    /// # Errors
    /// [`KnownError`]; then the old one is still there.
    pub fn save(&self, state_dir: &Path, run_dir: &Path) -> Result<(), KnownError> {
        match self.write(state_dir) {
            Ok(()) => {
                // There mostly is none.
                let _ = fs::remove_file(run_dir.join(FILE));
                Ok(())
            }
            Err(error) => self.write(run_dir).map_err(|_| error),
        }
    }

    fn write(&self, folder: &Path) -> Result<(), KnownError> {
        let path = folder.join(FILE);
        let write = || {
            fs::create_dir_all(folder)?;
            durable::write_json(&path, self)
        };
        write().map_err(|source| KnownError { path, source })
    }

    /// Of what happened, what is to be told: what is new or of another kind, what lasts and was told `remind`
    /// ago as what it is, and the end of what was wrong. `well` are the subjects that went well; a subject that is in neither was
    /// not tried, and nothing is known of it.
    pub fn sift(
        &mut self,
        events: Vec<Event>,
        well: &[Subject],
        now: Timestamp,
        remind: SignedDuration,
    ) -> Vec<Event> {
        let mut told = Vec::new();
        // What failed in one part and went well in another is not well.
        let failed: Vec<Subject> = events.iter().map(|event| event.subject.clone()).collect();
        for event in events {
            if matches!(event.kind, Kind::Recovery | Kind::Digest) {
                told.push(event);
                continue;
            }
            let known = self.problems.iter_mut().find(|known| known.subject == event.subject);
            match known {
                Some(known) => {
                    let is_due = known.told_as.get(&event.kind).is_none_or(|told| {
                        let age = now.duration_since(*told);
                        // A clock that was set back must not silence anybody. A nightly job ends a bit
                        // earlier or later.
                        age + remind / SLACK >= remind || age < SignedDuration::ZERO
                    });
                    known.kind = event.kind;
                    if is_due {
                        known.told_as.insert(event.kind, now);
                        told.push(event);
                    }
                }
                None => {
                    let (subject, kind) = (event.subject.clone(), event.kind);
                    let told_as = [(kind, now)].into();
                    self.problems.push(Problem { subject, kind, since: now, told_as });
                    told.push(event);
                }
            }
        }
        let is_over =
            |known: &mut Problem| well.contains(&known.subject) && !failed.contains(&known.subject);
        for over in self.problems.extract_if(.., is_over) {
            told.push(recovery(over, now));
        }
        told
    }
}

fn recovery(over: Problem, now: Timestamp) -> Event {
    let Problem { subject, kind, since, .. } = over;
    let what = match &subject.domain {
        Some(domain) => format!("{} of {domain}", subject.work),
        None => subject.work.clone(),
    };
    let minutes = now.duration_since(since).as_mins().max(0);
    let lasted = match minutes {
        0..120 => format!("{minutes} min"),
        120..2880 => format!("{} h", minutes / 60),
        _ => format!("{} days", minutes / 1440),
    };
    let title = format!("{what} is well again, after {lasted} of {}", kind.as_str());
    Event { kind: Kind::Recovery, subject, title, text: String::new() }
}

#[cfg(test)]
mod tests {
    use super::super::tests::event;
    use super::*;

    const REMIND: SignedDuration = SignedDuration::from_hours(24);

    fn at(hour: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + hour * 3600).unwrap()
    }

    fn kinds(told: &[Event]) -> Vec<Kind> {
        told.iter().map(|event| event.kind).collect()
    }

    #[test]
    fn a_failure_that_lasts_is_told_once_a_day_and_its_end_once() {
        let (mut known, failure) = (Known::default(), event(Kind::Failure, "web"));
        let mut told = Vec::new();
        for hour in 0..50 {
            let events = known.sift(vec![failure.clone()], &[], at(hour), REMIND);
            told.extend(events.iter().map(|_| hour));
        }
        assert_eq!(told, [0, 23, 46], "about once a day");
        let well = [failure.subject.clone()];
        let end = known.sift(Vec::new(), &well, at(50), REMIND);
        assert_eq!(end[0].title, "backup of web is well again, after 2 days of failure");
        assert_eq!(known, Known::default());
        assert_eq!(known.sift(Vec::new(), &well, at(51), REMIND), []);
    }

    #[test]
    fn what_gets_worse_or_better_is_told_at_once_and_what_goes_to_and_fro_is_not() {
        let mut known = Known::default();
        let mut sift =
            |kind, hour| kinds(&known.sift(vec![event(kind, "web")], &[], at(hour), REMIND));
        assert_eq!(sift(Kind::Warning, 0), [Kind::Warning]);
        assert_eq!(sift(Kind::Failure, 1), [Kind::Failure]);
        assert_eq!(sift(Kind::Warning, 2), []);
        assert_eq!(sift(Kind::Failure, 3), []);
        let mut known = Known::default();
        let mut sift =
            |kind, hour| kinds(&known.sift(vec![event(kind, "web")], &[], at(hour), REMIND));
        assert_eq!(sift(Kind::Failure, 0), [Kind::Failure]);
        assert_eq!(sift(Kind::Warning, 1), [Kind::Warning], "it is not as bad any more");
    }

    #[test]
    fn what_fails_in_one_part_and_goes_well_in_another_is_not_well_again() {
        let (mut known, failure) = (Known::default(), event(Kind::Failure, "web"));
        let well = [failure.subject.clone()];
        for (hour, count) in [(0, 1), (1, 0), (2, 0)] {
            let told = known.sift(vec![failure.clone()], &well, at(hour), REMIND);
            assert_eq!(told.len(), count, "at {hour}: {told:?}");
        }
    }

    #[test]
    fn nothing_is_known_of_what_was_not_tried() {
        let mut known = Known::default();
        let failure = event(Kind::Failure, "web");
        known.sift(vec![failure], &[], at(0), REMIND);
        let other = [event(Kind::Failure, "db").subject];
        assert_eq!(known.sift(Vec::new(), &other, at(1), REMIND), []);
    }

    #[test]
    fn r17_a_clock_that_was_set_back_silences_nobody() {
        let (mut known, failure) = (Known::default(), event(Kind::Failure, "web"));
        known.sift(vec![failure.clone()], &[], at(9000), REMIND);
        assert_eq!(known.sift(vec![failure], &[], at(1), REMIND).len(), 1);
    }

    #[test]
    fn what_is_known_outlives_the_run_and_its_loss_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let (state, run) = (folder.path().join("state"), folder.path().join("run"));
        assert_eq!(Known::load(&state, &run), Known::default());
        let mut known = Known::default();
        known.sift(vec![event(Kind::Warning, "web")], &[], at(0), REMIND);
        known.queue.push("mail", [event(Kind::Digest, "web")], at(0));
        known.save(&state, &run).unwrap();
        assert_eq!(Known::load(&state, &run), known);
        fs::write(state.join(FILE), "{").unwrap();
        assert_eq!(Known::load(&state, &run), Known::default());
        // Where the state folder takes nothing.
        fs::remove_dir_all(&state).unwrap();
        fs::write(&state, "").unwrap();
        known.save(&state, &run).unwrap();
        assert_eq!(Known::load(&state, &run), known);
        fs::remove_file(&state).unwrap();
        known.save(&state, &run).unwrap();
        assert!(!run.join(FILE).exists());
    }

    #[test]
    fn what_an_older_version_knew_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let text = r#"{"problems": [{"job": "nightly", "domain": "web", "work": "backup",
            "kind": "failure", "since": "2026-11-01T00:00:00Z", "told": "2026-11-01T00:00:00Z"}]}"#;
        fs::write(folder.path().join(FILE), text).unwrap();
        let mut known = Known::load(folder.path(), &folder.path().join("run"));
        let well = [event(Kind::Failure, "web").subject];
        assert_eq!(kinds(&known.sift(Vec::new(), &well, at(0), REMIND)), [Kind::Recovery]);
    }
}
