//! By a program of the administrator's.

use std::io;
use std::process::Stdio;

use serde::Deserialize;
use tokio::io::AsyncWriteExt;

use super::{CHANNEL_TIMEOUT, Event, Kind, NotifyError, headline};
use crate::bound;

/// How much of what it says is shown, in characters.
const SAID_MAX: usize = 400;

/// A program that is started once for all that there is to tell: one JSON object per line on its standard
/// input, the headline in `KVMSNAP_ALERT`, the worst kind in `KVMSNAP_ALERT_KIND`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Program {
    /// The program and its arguments; no shell reads them.
    pub run: Vec<String>,
    /// What it is told, where it is not what everybody is told.
    pub on: Option<Vec<Kind>>,
}

impl Program {
    pub(super) async fn tell(&self, host: &str, events: &[Event]) -> Result<(), NotifyError> {
        let program = self.run.first().cloned().unwrap_or_default();
        let failed = |source| NotifyError::Program { program: program.clone(), source };
        let worst =
            events.iter().map(|event| event.kind).min().expect("there is something to tell");
        let mut command = bound::command(&program);
        command.args(self.run.iter().skip(1));
        command.env("KVMSNAP_ALERT", headline(host, events));
        command.env("KVMSNAP_ALERT_KIND", worst.as_str());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let mut lines = Vec::new();
        for event in events {
            serde_json::to_writer(&mut lines, event).map_err(|error| failed(error.into()))?;
            lines.push(b'\n');
        }
        let mut input = child.stdin.take().expect("it was piped");
        let feeding = async {
            match input.write_all(&lines).await {
                // It need not read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                written => written?,
            }
            drop(input);
            Ok::<_, io::Error>(())
        };
        let both = async { tokio::try_join!(feeding, child.wait_with_output()) };
        let output = match tokio::time::timeout(CHANNEL_TIMEOUT, both).await {
            Ok(Ok(((), output))) => output,
            Ok(Err(source)) => return Err(failed(source)),
            Err(_) => return Err(NotifyError::ProgramSlow { program }),
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        let said = crate::names::printable(&said).chars().take(SAID_MAX).collect();
        Err(NotifyError::ProgramFailed { program, status: output.status.to_string(), said })
    }
}
