//! Telling people: what goes wrong, what is well again, and that there is somebody who would tell.
//!
//! [`known::Known`] decides without I/O what is worth telling; each kind of channel has a file of its own.

mod command;
pub mod known;
mod log;
mod mail;
mod queue;
mod web;

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::schedule::Schedule;

pub use self::command::Program;
pub use self::log::Log;
pub use self::mail::Mail;
pub use self::queue::Queue;
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

impl NotifyError {
    /// Whether the same is refused however often it is told. A program that fails may have a reason that
    /// passes.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Mail { source, .. } => source.is_permanent(),
            // RFC 9110, section 15.5.9, RFC 8470, section 5.2, and RFC 6585, section 4: later it may be taken.
            Self::Web { source, .. } => match **source {
                ureq::Error::StatusCode(408 | 425 | 429) => false,
                ureq::Error::StatusCode(status) => (400..500).contains(&status),
                _ => false,
            },
            _ => false,
        }
    }
}

/// What came of telling one channel.
#[derive(Debug)]
pub struct Told {
    /// The channel, in words that hold no secret.
    pub channel: String,
    /// Whether it was told.
    pub outcome: Result<(), NotifyError>,
}

/// One of those who are told.
struct Channel<'a> {
    /// What it is called in the queue.
    name: String,
    /// The same in words that hold no secret.
    words: String,
    /// What it is told; everything where not given.
    on: Option<&'a [Kind]>,
    via: Via<'a>,
}

enum Via<'a> {
    Log(Log),
    Mail(&'a Mail),
    Webhook(&'a Webhook),
    Program(&'a Program),
}

impl Alerts {
    /// Takes note of what each channel is to be told.
    pub fn enqueue(&self, queue: &mut Queue, events: &[Event], now: Timestamp) {
        let channels = self.channels();
        for channel in &channels {
            let is_wanted =
                |event: &&Event| channel.on.is_none_or(|kinds| kinds.contains(&event.kind));
            queue.push(&channel.name, events.iter().filter(is_wanted).cloned(), now);
        }
        queue.keep(|name| channels.iter().any(|channel| channel.name == name));
    }

    /// Tells everybody what waits for them; what cannot be told goes on waiting, for a while. One that cannot be
    /// told keeps nobody from the others.
    pub async fn deliver(&self, host: &str, queue: &mut Queue, now: Timestamp) -> Vec<Told> {
        let mut told = Vec::new();
        for Channel { name, words, via, .. } in self.channels() {
            let events = queue.due(&name, now);
            if events.is_empty() {
                continue;
            }
            let count = events.len();
            let outcome = match via {
                Via::Log(log) => log.tell(&events),
                Via::Mail(mail) => mail.tell(host, events).await,
                Via::Webhook(webhook) => webhook.tell(host, events).await,
                Via::Program(program) => program.tell(host, &events).await,
            };
            let given_up = match &outcome {
                Ok(()) => {
                    queue.clear(&name);
                    0
                }
                // The same would keep back all that is newer.
                Err(error) if error.is_refusal() => {
                    queue.clear(&name);
                    count
                }
                Err(_) => queue.failed(&name, now),
            };
            if given_up > 0 {
                tracing::error!("{words} never got {given_up} messages: nobody tries again");
            }
            told.push(Told { channel: words, outcome });
        }
        told
    }

    fn channels(&self) -> Vec<Channel<'_>> {
        let mut channels = Vec::new();
        if self.log.enabled {
            let words = "the system's log".to_owned();
            channels.push(Channel {
                name: "log".to_owned(),
                words,
                on: None,
                via: Via::Log(self.log),
            });
        }
        if let Some(mail) = &self.mail {
            let to: Vec<String> = mail.to.iter().map(|to| to.email.to_string()).collect();
            let words = format!("mail to {}", to.join(", "));
            let on = mail.on.as_deref().or(Some(&self.on));
            channels.push(Channel { name: "mail".to_owned(), words, on, via: Via::Mail(mail) });
        }
        for (webhook, number) in self.webhook.iter().zip(1..) {
            let (name, words) = (format!("webhook {number}"), "a webhook".to_owned());
            let on = webhook.on.as_deref().or(Some(&self.on));
            channels.push(Channel { name, words, on, via: Via::Webhook(webhook) });
        }
        for (program, number) in self.command.iter().zip(1..) {
            let words = format!("the program {}", program.run.first().map_or("", String::as_str));
            let on = program.on.as_deref().or(Some(&self.on));
            let via = Via::Program(program);
            channels.push(Channel { name: format!("program {number}"), words, on, via });
        }
        channels
    }

    /// What would be found out at the first alarm: a key or section of the configuration, and what is wrong
    /// with it.
    ///
    /// # Errors
    /// The first.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if self.remind_hours == 0 {
            return Err(("remind-hours", "`remind-hours` is 1 or more".to_owned()));
        }
        if self.mail.as_ref().is_some_and(|mail| mail.to.is_empty()) {
            return Err(("[alerts.mail]", "a mail goes to somebody: `to` is empty".to_owned()));
        }
        if self.command.iter().any(|program| program.run.is_empty()) {
            return Err(("[[alerts.command]]", "`run` names no program".to_owned()));
        }
        for webhook in &self.webhook {
            web::check(webhook.url.as_deref(), webhook.url_file.as_deref())
                .map_err(|why| ("[[alerts.webhook]]", why))?;
        }
        if let Some(ping) = &self.ping {
            web::check(ping.url.as_deref(), ping.url_file.as_deref())
                .map_err(|why| ("[alerts.ping]", why))?;
        }
        Ok(())
    }

    /// Why files with secrets cannot be used.
    pub fn unusable_secrets(&self) -> Vec<NotifyError> {
        let mail = self.mail.iter().flat_map(|mail| &mail.password_file);
        let tokens = self.webhook.iter().flat_map(|webhook| &webhook.token_file);
        let secrets = mail.chain(tokens).map(|path| web::secret(path).map(drop));
        let addresses = self.webhook.iter().filter_map(|webhook| webhook.url_file.as_deref());
        let addresses = addresses.chain(self.ping.iter().filter_map(|it| it.url_file.as_deref()));
        secrets.chain(addresses.map(web::secret_address)).filter_map(Result::err).collect()
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
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;

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

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_second(minute * 60).unwrap()
    }

    fn alerts(text: &str) -> Alerts {
        toml::from_str(text).unwrap()
    }

    /// A web service that answers so many calls; the number of events in each.
    fn service(calls: usize) -> (String, std::thread::JoinHandle<Vec<usize>>) {
        service_that_says("200 OK", calls)
    }

    fn service_that_says(
        status: &'static str,
        calls: usize,
    ) -> (String, std::thread::JoinHandle<Vec<usize>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let answer = move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            let (mut line, mut length) = (String::new(), 0);
            while stream.read_line(&mut line).unwrap() > 2 {
                let header = line.to_ascii_lowercase();
                length = header
                    .strip_prefix("content-length:")
                    .map_or(length, |it| it.trim().parse().unwrap());
                line.clear();
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).unwrap();
            let end = "content-length: 0\r\nconnection: close\r\n\r\n";
            stream.get_mut().write_all(format!("HTTP/1.1 {status}\r\n{end}").as_bytes()).unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            body["events"].as_array().unwrap().len()
        };
        (url, std::thread::spawn(move || (0..calls).map(|_| answer()).collect()))
    }

    #[tokio::test]
    async fn what_cannot_be_told_waits_and_keeps_nobody_from_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("url");
        let ((there, heard), (away, heard_late)) = (service(2), service(1));
        let alerts = alerts(&format!(
            "log = {{ enabled = false }}\n[[webhook]]\nurl = {there:?}\n\
             [[webhook]]\nurl-file = {file:?}\non = [\"failure\"]\n"
        ));
        let mut queue = Queue::default();
        alerts.enqueue(&mut queue, &[event(Kind::Failure, "web"), event(Kind::Digest, "")], at(0));
        let told = alerts.deliver("alder", &mut queue, at(0)).await;
        assert!(told[0].outcome.is_ok() && told[1].outcome.is_err(), "{told:?}");

        // It is told with the next one, once it is there.
        std::fs::write(&file, away).unwrap();
        let kept = serde_json::to_vec(&queue).unwrap();
        let mut queue: Queue = serde_json::from_slice(&kept).unwrap();
        alerts.enqueue(&mut queue, &[event(Kind::Failure, "db")], at(5));
        let told = alerts.deliver("alder", &mut queue, at(5)).await;
        assert!(told.iter().all(|told| told.outcome.is_ok()), "{told:?}");
        assert_eq!(heard.join().unwrap(), [2, 1]);
        assert_eq!(heard_late.join().unwrap(), [2]);
        assert!(alerts.deliver("alder", &mut queue, at(5)).await.is_empty());
    }

    #[tokio::test]
    async fn what_a_channel_refuses_keeps_back_nothing_newer_and_what_it_may_take_later_waits() {
        let ((refusing, _), (busy, _)) =
            (service_that_says("400 Bad Request", 1), service_that_says("429 Too Many", 1));
        let alerts = alerts(&format!(
            "log = {{ enabled = false }}\n[[webhook]]\nurl = {refusing:?}\n\
             [[webhook]]\nurl = {busy:?}\n"
        ));
        let mut queue = Queue::default();
        alerts.enqueue(&mut queue, &[event(Kind::Failure, "web")], at(0));
        let told = alerts.deliver("alder", &mut queue, at(0)).await;
        assert!(told.iter().all(|told| told.outcome.is_err()), "{told:?}");
        assert!(queue.due("webhook 1", at(5)).is_empty());
        assert!(queue.due("webhook 2", at(4)).is_empty(), "it is left alone for a while");
        assert_eq!(queue.due("webhook 2", at(5)).len(), 1);
    }

    #[test]
    fn what_waits_for_a_channel_has_a_limit_and_goes_with_the_channel() {
        let (mut queue, mut alerts) = (Queue::default(), alerts("[[command]]\nrun = [\"a\"]\n"));
        let events = vec![event(Kind::Failure, "web"); 300];
        alerts.enqueue(&mut queue, &events, at(0));
        assert_eq!(queue.due("program 1", at(0)).len(), 200);
        alerts.command.clear();
        alerts.enqueue(&mut queue, &[], at(0));
        assert!(queue.due("program 1", at(0)).is_empty());
    }

    #[test]
    fn a_channel_that_can_tell_nobody_is_refused() {
        for (text, place) in [
            ("remind-hours = 0", "remind-hours"),
            ("[mail]\nto = []", "[alerts.mail]"),
            ("[[command]]\nrun = []", "[[alerts.command]]"),
            ("[[webhook]]\ntoken-file = \"/t\"", "[[alerts.webhook]]"),
            ("[ping]", "[alerts.ping]"),
            ("[ping]\nurl = \"ping.example.org\"", "[alerts.ping]"),
        ] {
            assert_eq!(alerts(text).check().unwrap_err().0, place, "{text}");
        }
        assert!(alerts("[ping]\nurl = \"https://ping.example.org/1\"").check().is_ok());
    }

    #[test]
    fn a_file_with_a_secret_that_is_not_there_is_found_before_the_first_alarm() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("url");
        let text = format!(
            "[ping]\nurl-file = {file:?}\n[[webhook]]\nurl = \"http://a/\"\ntoken-file = {file:?}"
        );
        assert_eq!(alerts(&text).unusable_secrets().len(), 2);
        std::fs::write(&file, "nonsense").unwrap();
        assert_eq!(alerts(&text).unusable_secrets().len(), 1, "it is a token, and no address");
    }

    #[test]
    fn a_section_without_channels_tells_the_system_s_log() {
        let alerts = Alerts::default();
        assert!(alerts.log.enabled && alerts.mail.is_none() && alerts.ping.is_none());
    }
}
