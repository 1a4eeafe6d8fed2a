//! Trying again what a network, or a server that is started anew, made fail.

use std::{
    io::ErrorKind,
    thread,
    time::{Duration, Instant},
};

use super::BackendError;

/// Waits before the second and the third try.
const WAITS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// Nothing is begun again that has taken so long already: whoever waits for it has a deadline too.
const BEGIN_AGAIN_WITHIN: Duration = Duration::from_secs(45);

/// Does something that may be done twice, up to three times.
pub(super) fn retry<T>(
    mut attempt: impl FnMut() -> Result<T, BackendError>,
) -> Result<T, BackendError> {
    let start = Instant::now();
    let mut waits = WAITS.into_iter();
    loop {
        match (attempt(), waits.next()) {
            (Err(error), Some(wait))
                if is_transient(&error) && start.elapsed() + wait < BEGIN_AGAIN_WITHIN =>
            {
                tracing::debug!(%error, "trying again");
                thread::sleep(wait);
            }
            (outcome, _) => return outcome,
        }
    }
}

/// As [`retry`], for a removal: what a first try removed and could not tell of is gone.
pub(super) fn retry_removal(
    mut attempt: impl FnMut() -> Result<(), BackendError>,
) -> Result<(), BackendError> {
    let mut tries = 0;
    retry(|| {
        tries += 1;
        match attempt() {
            Err(error) if error.is_not_found() && tries > 1 => Ok(()),
            other => other,
        }
    })
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
            let outcome: Result<(), _> = retry(|| {
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
    fn a_file_that_a_first_try_removed_is_removed() {
        let not_found = || BackendError::NotFound { file: "a".to_owned() };
        let mut answers = vec![Err(not_found()), Err(failure(ErrorKind::TimedOut))];
        retry_removal(|| answers.pop().unwrap()).unwrap();
        assert!(retry_removal(|| Err(not_found())).unwrap_err().is_not_found());
    }
}
