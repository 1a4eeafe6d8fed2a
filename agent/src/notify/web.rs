//! To web services: what happened as JSON, and the ping that a dead man's switch waits for.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ureq::Agent;
use ureq::http::Uri;
use ureq::tls::{RootCerts, TlsConfig};

use super::{CHANNEL_TIMEOUT, Event, Kind, NotifyError, headline, plain_text};
use crate::store::blocking;

/// A web service that is told by `POST`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Webhook {
    /// Its address.
    pub url: Option<String>,
    /// A file with its address, where that is a secret.
    pub url_file: Option<PathBuf>,
    /// A file with a token, sent as `Authorization: Bearer`.
    pub token_file: Option<PathBuf>,
    /// What it is told, where it is not what everybody is told.
    pub on: Option<Vec<Kind>>,
}

/// A web service that raises the alarm when nobody calls, such as Healthchecks: `/start` and `/fail` are added
/// to its address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Ping {
    /// Its address.
    pub url: Option<String>,
    /// A file with its address, where that is a secret.
    pub url_file: Option<PathBuf>,
}

/// The body of a webhook. `text` is what chat services show; fields are only ever added.
#[derive(Serialize)]
struct Body<'a> {
    host: &'a str,
    text: String,
    events: &'a [Event],
}

impl Webhook {
    pub(super) async fn tell(&self, host: &str, events: Vec<Event>) -> Result<(), NotifyError> {
        let url = address(self.url.as_ref(), self.url_file.as_deref(), "webhook")?;
        let token = self.token_file.as_deref().map(secret).transpose()?;
        let text = format!("{}\n{}", headline(host, &events), plain_text(&events));
        let body = serde_json::to_vec(&Body { host, text, events: &events });
        post(url, token, "application/json", body.expect("it has only string keys")).await
    }
}

impl Ping {
    /// Says that a run begins.
    ///
    /// # Errors
    /// [`NotifyError`].
    pub async fn begun(&self) -> Result<(), NotifyError> {
        self.call("/start", String::new()).await
    }

    /// Says that a run has ended, and with `failed` what failed.
    ///
    /// # Errors
    /// [`NotifyError`].
    pub async fn ended(&self, failed: Option<String>) -> Result<(), NotifyError> {
        match failed {
            None => self.call("", String::new()).await,
            Some(what) => self.call("/fail", what).await,
        }
    }

    async fn call(&self, suffix: &str, body: String) -> Result<(), NotifyError> {
        let url = address(self.url.as_ref(), self.url_file.as_deref(), "ping")?;
        let url = format!("{}{suffix}", url.trim_end_matches('/'));
        post(url, None, "text/plain; charset=utf-8", body.into_bytes()).await
    }
}

/// The first line of a file that nobody else may read, without white space around it.
pub(super) fn secret(path: &Path) -> Result<String, NotifyError> {
    let text = fs::read_to_string(path)
        .map_err(|source| NotifyError::Secret { path: path.to_owned(), source })?;
    Ok(text.trim().to_owned())
}

/// Whether a service can be told, as far as the configuration says.
pub(super) fn check(url: Option<&str>, file: Option<&Path>) -> Result<(), String> {
    match (url, file) {
        (None, None) => Err("it needs `url` or `url-file`".to_owned()),
        (Some(url), _) if host_of(url).is_none() => {
            Err("`url` is no address of a web service".to_owned())
        }
        _ => Ok(()),
    }
}

/// Whether there is an address in a file.
pub(super) fn secret_address(path: &Path) -> Result<(), NotifyError> {
    let address = secret(path)?;
    host_of(&address).map(drop).ok_or(NotifyError::Address { channel: "web service" })
}

fn host_of(url: &str) -> Option<String> {
    let uri = url.parse::<Uri>().ok()?;
    Some(uri.scheme().and(uri.authority())?.host().to_owned())
}

fn address(
    url: Option<&String>,
    file: Option<&Path>,
    channel: &'static str,
) -> Result<String, NotifyError> {
    match (url, file) {
        (Some(url), _) => Ok(url.clone()),
        (None, Some(file)) => secret(file),
        (None, None) => Err(NotifyError::Address { channel }),
    }
}

async fn post(
    url: String,
    token: Option<String>,
    kind: &'static str,
    body: Vec<u8>,
) -> Result<(), NotifyError> {
    let (Ok(uri), Some(host)) = (url.parse::<Uri>(), host_of(&url)) else {
        return Err(NotifyError::Address { channel: "web service" });
    };
    blocking(move || {
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let config = Agent::config_builder().timeout_global(Some(CHANNEL_TIMEOUT));
        let agent: Agent = config.tls_config(tls).build().into();
        let mut request = agent.post(uri).content_type(kind);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        match request.send(&body[..]) {
            Ok(_) => Ok(()),
            Err(source) => Err(NotifyError::Web { host, source: Box::new(source) }),
        }
    })
    .await
}
