//! Telling people: what goes wrong, what is well again, and that there is somebody who would tell.
//!
//! [`known::Known`] decides without I/O what is worth telling; each kind of channel has a file of its own.

mod command;
pub mod known;
mod log;
mod mail;
mod web;

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::schedule::Schedule;

pub use self::command::Program;
pub use self::log::Log;
pub use self::mail::Mail;
pub use self::web::{Ping, Webhook};

/// How long one channel may take for what it has to tell.
const CHANNEL_TIMEOUT: Duration = Duration::from_secs(60);

/// What an event is, the worst first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Something was not done.
    Failure,
    /// It was done, but a person should look.
    Warning,
    /// What had failed, or given a warning, is well again.
    Recovery,
    /// What happened since the last digest.
    Digest,
}

impl Kind {
    /// Its word, as in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failure => "failure",
            Self::Warning => "warning",
            Self::Recovery => "recovery",
            Self::Digest => "digest",
        }
    }
}

/// What an event is about: a failure and its recovery have the same.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Subject {
    /// The job, where it is about one.
    pub job: Option<String>,
    /// The domain, where it is about one.
    pub domain: Option<String>,
    /// What was to be done: `backup`, `age`, `forget`, `prune`, `verify`, `copy to offsite`, `run`.
    pub work: String,
}

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What it is.
    pub kind: Kind,
    /// What it is about.
    #[serde(flatten)]
    pub subject: Subject,
    /// One line.
    pub title: String,
    /// The rest, of any number of lines; may be empty.
    pub text: String,
}

/// Who is told, and what: the section `[alerts]` of the configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Alerts {
    /// What is told where a channel says nothing else.
    pub on: Vec<Kind>,
    /// After how many hours a failure that lasts is told again.
    pub remind_hours: u32,
    /// When a digest of what happened is told, by the host's clock.
    pub digest: Option<Schedule>,
    /// By mail.
    pub mail: Option<Mail>,
    /// To web services.
    pub webhook: Vec<Webhook>,
    /// By programs of the administrator's.
    pub command: Vec<Program>,
    /// To the system's log.
    pub log: Log,
    /// A dead man's switch, which raises the alarm when it hears nothing.
    pub ping: Option<Ping>,
}

impl Default for Alerts {
    fn default() -> Self {
        Self {
            on: vec![Kind::Failure, Kind::Warning, Kind::Recovery, Kind::Digest],
            remind_hours: 24,
            digest: None,
            mail: None,
            webhook: Vec::new(),
            command: Vec::new(),
            log: Log::default(),
            ping: None,
        }
    }
}

/// Why a channel could not tell what it was given. Names no secret: addresses of web services may hold one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotifyError {
    /// A file with a password, a token or an address cannot be read.
    #[error("cannot read {}", .path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is written there is no address of a web service.
    #[error("the {channel} has no usable address")]
    Address {
        /// The channel.
        channel: &'static str,
    },
    /// No mail can be made of it.
    #[error("cannot write a mail")]
    Message(#[from] lettre::error::Error),
    /// The mail's sender is no address.
    #[error("`{address}` is no address of a sender")]
    Sender {
        /// As it would be.
        address: String,
        /// Why.
        source: lettre::address::AddressError,
    },
    /// The mail server does not take it.
    #[error("the mail server {server} does not take the mail")]
    Mail {
        /// The server.
        server: String,
        /// Why.
        source: lettre::transport::smtp::Error,
    },
    /// A web service does not take it.
    #[error("{host} does not take it")]
    Web {
        /// The host of the service.
        host: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// A program cannot be started or spoken to.
    #[error("cannot run `{program}`")]
    Program {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{program}` failed ({status}): {said}")]
    ProgramFailed {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// The end of what it said.
        said: String,
    },
    /// A program takes too long.
    #[error("`{program}` was ended after {} s", CHANNEL_TIMEOUT.as_secs())]
    ProgramSlow {
        /// The program.
        program: String,
    },
    /// There is no log on this system.
    #[error("cannot write to the system's log")]
    Log(#[source] io::Error),
}

/// What came of telling one channel.
#[derive(Debug)]
pub struct Told {
    /// The channel, in words that hold no secret.
    pub channel: String,
    /// Whether it was told.
    pub outcome: Result<(), NotifyError>,
}

impl Alerts {
    /// Tells everybody what they want to hear. One that cannot be told keeps nobody from the others.
    pub async fn tell(&self, host: &str, events: &[Event]) -> Vec<Told> {
        let mut told = Vec::new();
        if self.log.enabled && !events.is_empty() {
            let outcome = self.log.tell(events);
            told.push(Told { channel: "the system's log".to_owned(), outcome });
        }
        if let Some((mail, events)) = self.mail.as_ref().and_then(|it| self.of(it, &it.on, events))
        {
            let to: Vec<String> = mail.to.iter().map(|to| to.email.to_string()).collect();
            let outcome = mail.tell(host, events).await;
            told.push(Told { channel: format!("mail to {}", to.join(", ")), outcome });
        }
        for (webhook, events) in self.webhook.iter().filter_map(|it| self.of(it, &it.on, events)) {
            let outcome = webhook.tell(host, events).await;
            told.push(Told { channel: "a webhook".to_owned(), outcome });
        }
        for (program, events) in self.command.iter().filter_map(|it| self.of(it, &it.on, events)) {
            let channel = format!("the program {}", program.run.first().map_or("", String::as_str));
            told.push(Told { channel, outcome: program.tell(host, &events).await });
        }
        told
    }

    /// A channel, with those of the events that it wants; `None` where it wants none.
    fn of<'a, C>(
        &self,
        channel: &'a C,
        on: &Option<Vec<Kind>>,
        events: &[Event],
    ) -> Option<(&'a C, Vec<Event>)> {
        let on = on.as_ref().unwrap_or(&self.on);
        let events: Vec<Event> =
            events.iter().filter(|event| on.contains(&event.kind)).cloned().collect();
        (!events.is_empty()).then_some((channel, events))
    }
}

/// One line that says what a mail or a message is about.
fn headline(host: &str, events: &[Event]) -> String {
    match events {
        [event] => format!("{host}: {}", event.title),
        _ => {
            let mut counts = Vec::new();
            for (kind, one, many) in [
                (Kind::Failure, "failure", "failures"),
                (Kind::Warning, "warning", "warnings"),
                (Kind::Recovery, "recovery", "recoveries"),
            ] {
                match events.iter().filter(|event| event.kind == kind).count() {
                    0 => {}
                    1 => counts.push(format!("1 {one}")),
                    count => counts.push(format!("{count} {many}")),
                }
            }
            if counts.is_empty() {
                counts.push("digest".to_owned());
            }
            format!("{host}: {}", counts.join(", "))
        }
    }
}

/// All of it, as plain text.
fn plain_text(events: &[Event]) -> String {
    let mut text = String::new();
    for event in events {
        let _ = writeln!(text, "{}: {}", event.kind.as_str(), event.title);
        for line in event.text.lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn event(kind: Kind, domain: &str) -> Event {
        Event {
            kind,
            subject: Subject {
                job: Some("nightly".to_owned()),
                domain: Some(domain.to_owned()),
                work: "backup".to_owned(),
            },
            title: format!("backup of {domain}"),
            text: "cannot connect\nhint: start it".to_owned(),
        }
    }

    #[test]
    fn one_event_is_named_and_several_are_counted() {
        let web = event(Kind::Failure, "web");
        assert_eq!(headline("alder", std::slice::from_ref(&web)), "alder: backup of web");
        let both = [web.clone(), event(Kind::Recovery, "db"), web];
        assert_eq!(headline("alder", &both), "alder: 2 failures, 1 recovery");
        assert_eq!(
            plain_text(&both[..1]),
            "failure: backup of web\n    cannot connect\n    hint: start it\n"
        );
    }

    #[test]
    fn a_section_without_channels_tells_the_system_s_log() {
        let alerts = Alerts::default();
        assert!(alerts.log.enabled && alerts.mail.is_none() && alerts.ping.is_none());
    }
}
