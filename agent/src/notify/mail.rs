//! By mail, through an SMTP server (RFC 5321).

use std::path::PathBuf;

use lettre::message::{Mailbox, header};
use lettre::transport::smtp::SmtpTransportBuilder;
use lettre::transport::smtp::authentication::Credentials;
use lettre::{Message, SmtpTransport, Transport};
use serde::Deserialize;

use super::{CHANNEL_TIMEOUT, Event, Kind, NotifyError, headline, plain_text};
use crate::store::blocking;

/// How a mail is sent.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Mail {
    /// To whom.
    pub to: Vec<Mailbox>,
    /// From whom: `kvmsnap@HOST` unless given.
    pub from: Option<Mailbox>,
    /// The mail server, by name or address.
    #[serde(default = "localhost")]
    pub server: String,
    /// Its port: unless given 25 without encryption, 587 with `starttls`, 465 with `tls`.
    pub port: Option<u16>,
    /// How what is said to it is encrypted: `starttls` unless it is `localhost`.
    pub encryption: Option<Encryption>,
    /// The account there, where one is needed.
    pub user: Option<String>,
    /// A file with the account's password.
    pub password_file: Option<PathBuf>,
    /// What is told by mail, where it is not what everybody is told.
    pub on: Option<Vec<Kind>>,
}

/// How what is said to a mail server is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encryption {
    /// Not at all.
    None,
    /// After a greeting in the clear (RFC 3207); refused where the server cannot.
    Starttls,
    /// From the first byte on (RFC 8314).
    Tls,
}

fn localhost() -> String {
    "localhost".to_owned()
}

impl Mail {
    /// Sends one mail that tells all of it.
    pub(super) async fn tell(&self, host: &str, events: Vec<Event>) -> Result<(), NotifyError> {
        let from = match &self.from {
            Some(from) => from.clone(),
            None => {
                let address = format!("kvmsnap@{host}");
                let parsed = address.parse();
                parsed.map_err(|source| NotifyError::Sender { address, source })?
            }
        };
        let mut message = Message::builder().from(from).subject(headline(host, &events));
        for to in &self.to {
            message = message.to(to.clone());
        }
        let message = message.header(header::ContentType::TEXT_PLAIN).body(plain_text(&events))?;
        let server = self.transport()?.timeout(Some(CHANNEL_TIMEOUT)).build();
        let name = self.server.clone();
        blocking(move || match server.send(&message) {
            Ok(_) => Ok(()),
            Err(source) => Err(NotifyError::Mail { server: name, source }),
        })
        .await
    }

    fn transport(&self) -> Result<SmtpTransportBuilder, NotifyError> {
        let usual = match self.server.as_str() {
            "localhost" | "127.0.0.1" | "::1" => Encryption::None,
            _ => Encryption::Starttls,
        };
        let failed = |source| NotifyError::Mail { server: self.server.clone(), source };
        let mut builder = match self.encryption.unwrap_or(usual) {
            Encryption::None => SmtpTransport::builder_dangerous(&self.server),
            Encryption::Starttls => SmtpTransport::starttls_relay(&self.server).map_err(failed)?,
            Encryption::Tls => SmtpTransport::relay(&self.server).map_err(failed)?,
        };
        if let Some(port) = self.port {
            builder = builder.port(port);
        }
        if let Some(user) = &self.user {
            let password = self.password_file.as_deref().map(super::web::secret).transpose()?;
            builder =
                builder.credentials(Credentials::new(user.clone(), password.unwrap_or_default()));
        }
        Ok(builder)
    }
}
