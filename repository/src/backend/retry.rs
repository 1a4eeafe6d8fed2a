//! Trying again what a network, or a server that is started anew, made fail.

use std::{
    io::ErrorKind,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::BackendError;

/// Waits before the second and the third try.
const WAITS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];

/// How often things are tried at one store.
#[derive(Debug)]
pub(super) struct Patience {
    /// Nothing is begun again that has taken so long already: whoever waits for it has a deadline too.
    begin_again_within: Duration,
    /// The store was silent for as long as it may be: until it answers, nothing is tried twice. So who has
    /// failed because of it and puts things in order does not wait as long once more.
    is_spent: AtomicBool,
}

impl Patience {
    /// With a store that may be silent for so long: who was is not asked again.
    pub(super) fn new(silence_max: Duration) -> Self {
        Self { begin_again_within: silence_max * 2 / 3, is_spent: AtomicBool::new(false) }
    }

    /// Does something that may be done twice, up to three times.
    pub(super) fn retry<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let start = Instant::now();
        let mut waits = WAITS.into_iter();
        loop {
            let outcome = attempt();
            let error = match &outcome {
                Err(error) if is_transient(error) => error,
                _ => {
                    self.is_spent.store(false, Ordering::Relaxed);
                    return outcome;
                }
            };
            let goes_on = |wait: &Duration| {
                !self.is_spent.load(Ordering::Relaxed)
                    && start.elapsed() + *wait < self.begin_again_within
            };
            let Some(wait) = waits.next().filter(goes_on) else {
                let silent = error.io_kind() == Some(ErrorKind::TimedOut);
                self.is_spent.fetch_or(silent, Ordering::Relaxed);
                return outcome;
            };
            tracing::debug!(%error, "trying again");
            thread::sleep(wait);
        }
    }

    /// As [`Self::retry`], for a removal: what a first try removed and could not tell of is gone.
    pub(super) fn retry_removal(
        &self,
        mut attempt: impl FnMut() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let mut tries = 0;
        self.retry(|| {
            tries += 1;
            match attempt() {
                Err(error) if error.is_not_found() && tries > 1 => Ok(()),
                other => other,
            }
        })
    }
}

fn is_transient(error: &BackendError) -> bool {
    error.io_kind().is_some_and(|kind| {
        matches!(
            kind,
            ErrorKind::BrokenPipe
                | ErrorKind::ConnectionAborted
                | ErrorKind::ConnectionRefused
                | ErrorKind::ConnectionReset
                | ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
                | ErrorKind::ResourceBusy
                | ErrorKind::TimedOut
                | ErrorKind::UnexpectedEof
                | ErrorKind::WouldBlock
        )
    })
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use super::*;

    fn failure(kind: ErrorKind) -> BackendError {
        let source = Arc::new(io::Error::from(kind));
        BackendError::Io { operation: "read", file: "a".to_owned(), source }
    }

    #[test]
    fn r14_only_what_may_pass_is_tried_again() {
        let count = |kind| {
            let mut tries = 0;
            let outcome: Result<(), _> = Patience::new(Duration::from_secs(30)).retry(|| {
                tries += 1;
                Err(failure(kind))
            });
            assert!(outcome.is_err());
            tries
        };
        assert_eq!(count(ErrorKind::ConnectionReset), 3);
        assert_eq!(count(ErrorKind::PermissionDenied), 1);
    }

    #[test]
    fn r14_a_store_that_stays_silent_is_not_waited_for_again_until_it_answers() {
        let patience = Patience::new(Duration::from_secs(30));
        let tries = || {
            let mut tries = 0;
            let outcome: Result<(), _> = patience.retry(|| {
                tries += 1;
                Err(failure(ErrorKind::TimedOut))
            });
            assert!(outcome.is_err());
            tries
        };
        assert_eq!((tries(), tries()), (3, 1));
        patience.retry(|| Ok(())).unwrap();
        assert_eq!(tries(), 3);
    }

    #[test]
    fn a_file_that_a_first_try_removed_is_removed() {
        let not_found = || BackendError::NotFound { file: "a".to_owned() };
        let mut answers = vec![Err(not_found()), Err(failure(ErrorKind::TimedOut))];
        let patience = Patience::new(Duration::from_secs(30));
        patience.retry_removal(|| answers.pop().unwrap()).unwrap();
        assert!(patience.retry_removal(|| Err(not_found())).unwrap_err().is_not_found());
    }
}
