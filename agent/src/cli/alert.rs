//! `kvmsnap alert`

use std::io::Write;

use clap::Args;
use jiff::Timestamp;

use super::Context;
use crate::error::CommandError;
use crate::notify::{Event, Kind, Queue, Subject, Told};

/// Tell everybody whom the configuration names: a test, or a message of yours
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap alert                                       is everybody reached?
  kvmsnap alert --kind warning 'the tape is full'     from a script of yours")]
pub struct AlertArgs {
    /// What to tell; a test unless given
    message: Option<String>,
    /// What kind of message it is
    #[arg(long, value_name = "KIND", default_value = "failure")]
    kind: Kind,
}

/// Runs it.
///
/// # Errors
/// [`CommandError::NotTold`] after naming each that cannot be told.
pub async fn run(args: AlertArgs, context: &Context) -> Result<(), CommandError> {
    let is_test = args.message.is_none();
    let test = || "a test: this is how a message looks".to_owned();
    let event = Event {
        kind: args.kind,
        subject: Subject { job: None, domain: None, work: "alert".to_owned() },
        title: args.message.unwrap_or_else(test),
        text: String::new(),
    };
    let host = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
    let config = context.config()?;
    config.check_alerts(context.global.config.as_deref())?;
    let (alerts, mut queue) = (&config.alerts, Queue::default());
    let now = Timestamp::now();
    alerts.enqueue(&mut queue, &[event], now);
    let mut told = alerts.deliver(&host, &mut queue, now).await;
    // As after a run that went well: a switch that raises the alarm would be no test.
    if let Some(ping) = alerts.ping.as_ref().filter(|_| is_test) {
        let channel = "the dead man's switch".to_owned();
        told.push(Told { channel, outcome: ping.ended(None).await });
    }
    let mut out = std::io::stdout().lock();
    let mut count = 0;
    for Told { channel, outcome } in told {
        let failed = outcome.err().map(|source| {
            let channel = channel.clone();
            crate::error::describe(&CommandError::CannotTell { channel, source })
        });
        if context.global.json {
            let line = serde_json::json!({
                "channel": channel, "told": failed.is_none(), "error": failed,
            });
            context.print_json(&mut out, &line)?;
        } else if failed.is_none() {
            writeln!(out, "told: {channel}")?;
        }
        if let Some(failed) = failed {
            tracing::error!("{}", failed.trim_end());
            count += 1;
        }
    }
    match count {
        0 => Ok(()),
        count => Err(CommandError::NotTold { count }),
    }
}
