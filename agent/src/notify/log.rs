//! To the system's log, with levels.

use std::io;

use serde::Deserialize;

use super::{Event, Kind, NotifyError};
use crate::syslog::{self, Severity};

/// Whether the system's log is told; all of it, whatever else is told to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Log {
    /// Whether it is.
    pub enabled: bool,
}

impl Default for Log {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl Log {
    pub(super) fn tell(self, events: &[Event]) -> Result<(), NotifyError> {
        for event in events.iter().filter(|_| self.enabled) {
            let severity = match event.kind {
                Kind::Failure => Severity::Error,
                Kind::Warning => Severity::Warning,
                Kind::Recovery => Severity::Notice,
                Kind::Digest => Severity::Informational,
            };
            let line =
                event.text.lines().fold(event.title.clone(), |line, next| line + "; " + next);
            match syslog::write(severity, &line) {
                // A system without a log, such as a container.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                written => written.map_err(NotifyError::Log)?,
            }
        }
        Ok(())
    }
}
