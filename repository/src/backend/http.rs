//! What the stores behind HTTP share: requests with deadlines, and answers as errors.

use std::{
    io::{self, ErrorKind, Read},
    sync::Arc,
    time::Duration,
};

use ureq::{
    Agent, AsSendBody, Body, SendBody,
    http::{Method, Request, Response, header},
    tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem},
    unversioned::{
        resolver::DefaultResolver,
        transport::{ConnectProxyConnector, Connector, RustlsConnector, TcpConnector},
    },
};

use super::{Access, BackendError, Pace, early::Hear, pace::PART_LEN};

/// How long connecting may take, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What a request may take in all: this, and as long as its bytes need at a crawl.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// The slowest line that is waited for, in bytes a second.
const CRAWL: u64 = 16 << 10;
/// Idle connections that are kept: one for each thread of a restore.
const IDLE_MAX: usize = 16;
/// So much of an answer that says no is looked at.
const REFUSAL_LEN_MAX: u64 = 4 << 10;

/// A client of one server.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    pace: Arc<Pace>,
}

/// What to ask for. Debug shows no address: it may be signed.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    /// Where; never shown.
    pub(super) url: &'a str,
    /// Names and values of headers.
    pub(super) headers: &'a [(&'a str, &'a str)],
    /// What to send.
    pub(super) content: Option<&'a [u8]>,
    /// A verb for errors.
    pub(super) operation: &'static str,
    /// What it is about, as a person may see it.
    pub(super) file: &'a str,
    /// How many bytes the answer may have.
    pub(super) answer_len_max: u64,
}

/// A server's answer that says no.
#[derive(Debug, thiserror::Error)]
#[error("the server answered {status}{}", code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default())]
struct Refusal {
    status: u16,
    /// What S3 calls it.
    code: Option<String>,
}

impl Client {
    pub(super) fn new(access: &Access) -> Result<Self, BackendError> {
        let tls = TlsConfig::builder().root_certs(match &access.ca_certificates {
            Some(pem) => RootCerts::new_with_certs(&certificates(pem)?),
            None => RootCerts::PlatformVerifier,
        });
        let config = Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            // A request with a key goes where the user said, and nowhere else.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(access.silence_max()))
            .timeout_per_write(Some(access.silence_max()))
            .max_idle_connections(IDLE_MAX)
            .max_idle_connections_per_host(IDLE_MAX)
            .output_buffer_size(PART_LEN)
            .input_buffer_size(PART_LEN)
            .user_agent("kvmsnap")
            .build();
        // ureq's own chain, and below TLS what hears answers that come early.
        let chain = ().chain(ConnectProxyConnector::default()).chain(TcpConnector::default());
        let chain = chain.chain(Hear).chain(RustlsConnector::default());
        let agent = Agent::with_parts(config, chain, DefaultResolver::default());
        Ok(Self { agent, pace: Arc::clone(&access.pace) })
    }

    /// Sends a request; returns the status and the headers with what is left to read.
    pub(super) fn send(&self, call: &Call<'_>) -> Result<Answer<'_>, BackendError> {
        let mut request = Request::builder().method(call.method.clone()).uri(call.url);
        for (name, value) in call.headers {
            request = request.header(*name, *value);
        }
        let sent_len = call.content.map_or(0, <[u8]>::len) as u64;
        let seconds = sent_len.max(call.answer_len_max.min(1 << 30)) / CRAWL;
        let timeout = REQUEST_TIMEOUT + Duration::from_secs(seconds);
        let response = match call.content {
            Some(content) => {
                request = request.header(header::CONTENT_LENGTH, content.len());
                let mut paced = Paced { content, pace: &self.pace };
                self.run(request.body(SendBody::from_reader(&mut paced)), timeout)
            }
            None => self.run(request.body(()), timeout),
        };
        let response = response.map_err(|error| call.failed(io_error(error)))?;
        Ok(Answer { response, pace: &self.pace })
    }

    fn run(
        &self,
        request: Result<Request<impl AsSendBody>, ureq::http::Error>,
        timeout: Duration,
    ) -> Result<Response<Body>, ureq::Error> {
        let request = self.agent.configure_request(request?).timeout_global(Some(timeout));
        self.agent.run(request.build())
    }

    /// As [`Self::send`], for a request that must be answered with this status.
    pub(super) fn ask(&self, call: &Call<'_>, wanted: &[u16]) -> Result<Answer<'_>, BackendError> {
        let answer = self.send(call)?;
        match wanted.contains(&answer.status()) {
            true => Ok(answer),
            false => Err(answer.refusal(call)),
        }
    }
}

impl Call<'_> {
    pub(super) fn failed(&self, source: io::Error) -> BackendError {
        let (operation, file) = (self.operation, self.file.to_owned());
        BackendError::Io { operation, file, source: Arc::new(source) }
    }
}

/// What a server answered.
pub(super) struct Answer<'a> {
    response: Response<Body>,
    pace: &'a Pace,
}

impl Answer<'_> {
    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// How long the content is, as far as the server says.
    pub(super) fn content_len(&self) -> Option<u64> {
        let value = self.response.headers().get(header::CONTENT_LENGTH)?;
        value.to_str().ok()?.parse().ok()
    }

    /// The content, at most [`Call::answer_len_max`] bytes.
    pub(super) fn content(self, call: &Call<'_>) -> Result<Vec<u8>, BackendError> {
        let len_max = call.answer_len_max;
        let too_large =
            |len| Err(BackendError::TooLarge { file: call.file.to_owned(), len, len_max });
        let announced = self.content_len();
        if let Some(len) = announced.filter(|&len| len > len_max) {
            return too_large(len);
        }
        let mut content = Vec::new();
        let mut reader = self.response.into_body().into_reader().take(len_max + 1);
        let mut part = vec![0; PART_LEN];
        loop {
            match reader.read(&mut part) {
                Ok(0) => break,
                Ok(len) => {
                    self.pace.after_receiving(len);
                    content.extend_from_slice(&part[..len]);
                }
                Err(source) if source.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(call.failed(unwrapped(source))),
            }
        }
        match content.len() as u64 {
            len if len > len_max => too_large(len),
            len if announced.is_some_and(|announced| announced != len) => {
                Err(call.failed(io::Error::from(ErrorKind::UnexpectedEof)))
            }
            _ => Ok(content),
        }
    }

    /// The error that an answer stands for.
    pub(super) fn refusal(self, call: &Call<'_>) -> BackendError {
        let status = self.status();
        let mut text = Vec::new();
        // What cannot be read has nothing to add.
        let _ =
            self.response.into_body().into_reader().take(REFUSAL_LEN_MAX).read_to_end(&mut text);
        let code = code_of(&String::from_utf8_lossy(&text));
        let kind = match status {
            404 => return BackendError::NotFound { file: call.file.to_owned() },
            // It has no such range.
            416 => return BackendError::Truncated { file: call.file.to_owned(), end: 0 },
            401 | 403 => ErrorKind::PermissionDenied,
            408 => ErrorKind::TimedOut,
            429 | 500 | 502 | 503 | 504 => ErrorKind::ResourceBusy,
            // restic's REST server: a full disk and its quota are 507, up to 0.10 the quota is 413. Where its disk
            // becomes full in the last moment of a file it is 500, as any other fault of its own.
            413 | 507 => ErrorKind::StorageFull,
            _ => ErrorKind::Other,
        };
        call.failed(io::Error::new(kind, Refusal { status, code }))
    }
}

/// S3's name of an error, letters only: nothing else of what a server says is shown.
fn code_of(text: &str) -> Option<String> {
    let code = text.split_once("<Code>")?.1.split_once("</Code>")?.0;
    let is_name = !code.is_empty() && code.len() <= 64;
    (is_name && code.chars().all(|c| c.is_ascii_alphanumeric())).then(|| code.to_owned())
}

/// Content that is sent no faster than allowed.
struct Paced<'a> {
    content: &'a [u8],
    pace: &'a Pace,
}

impl Read for Paced<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.content.len().min(buffer.len()).min(PART_LEN);
        self.pace.before_sending(len);
        let (part, rest) = self.content.split_at(len);
        buffer[..len].copy_from_slice(part);
        self.content = rest;
        Ok(len)
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<Certificate<'static>>, BackendError> {
    let unusable = |problem| BackendError::Io {
        operation: "use",
        file: "the certificates to trust".to_owned(),
        source: Arc::new(invalid(problem)),
    };
    let mut found = Vec::new();
    for item in parse_pem(pem) {
        // A file may hold keys, too.
        if let PemItem::Certificate(certificate) =
            item.map_err(|_| unusable("not in the PEM format"))?
        {
            found.push(certificate);
        }
    }
    if found.is_empty() { Err(unusable("there are none")) } else { Ok(found) }
}

fn invalid(problem: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, problem)
}

/// An error of the connection. The address may be signed, so errors that show it lose it.
fn io_error(error: ureq::Error) -> io::Error {
    match error {
        ureq::Error::Io(source) => unwrapped(source),
        ureq::Error::Timeout(_) => {
            io::Error::new(ErrorKind::TimedOut, "no answer in time, or none that was complete")
        }
        ureq::Error::HostNotFound => {
            io::Error::new(ErrorKind::HostUnreachable, "there is no host of this name")
        }
        ureq::Error::ConnectionFailed => ErrorKind::ConnectionRefused.into(),
        ureq::Error::BadUri(_) | ureq::Error::RequireHttpsOnly(_) | ureq::Error::Http(_) => {
            invalid("cannot be asked for so")
        }
        other => io::Error::other(other.to_string()),
    }
}

/// ureq wraps its own errors to get them through a reader.
fn unwrapped(source: io::Error) -> io::Error {
    match source.downcast::<ureq::Error>() {
        Ok(error) => io_error(error),
        Err(source) => source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s16_of_a_refusal_only_a_name_is_shown() {
        let text = |code| format!("<Error><Code>{code}</Code><Message>x</Message></Error>");
        assert_eq!(code_of(&text("AccessDenied")).as_deref(), Some("AccessDenied"));
        assert_eq!(code_of(&text("a\u{1b}[31m")), None);
        assert_eq!(code_of(&text("")), None);
        assert_eq!(code_of("<Code>AccessDenied"), None);
    }
}
