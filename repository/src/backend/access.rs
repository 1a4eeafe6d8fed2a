//! How a store is reached: what an address does not say, or must not.

use std::{fmt, sync::Arc, time::Duration};

use rusty_s3::Credentials;

use super::Pace;

/// How long a server may take nothing, or say nothing, where nothing else is given.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What is needed to reach stores besides their addresses. Debug shows no secrets.
#[derive(Debug, Default)]
pub struct Access {
    /// Limits on what is sent and received.
    pub pace: Arc<Pace>,
    /// Certificates to trust instead of those that the system trusts, in the PEM format.
    pub ca_certificates: Option<Vec<u8>>,
    /// The region of S3; `us-east-1` where none is given.
    pub region: Option<String>,
    /// The program that reaches another machine, with its first arguments; `ssh` where it is empty.
    pub ssh: Vec<String>,
    /// How long a server may take nothing, or say nothing; 30 s where it is not given.
    pub silence_max: Option<Duration>,
    pub(super) s3: Option<S3Key>,
    pub(super) login: Login,
}

/// A key of S3.
pub(super) struct S3Key(pub(super) Credentials);

/// Who to be at a REST server.
#[derive(Default)]
pub(super) struct Login {
    pub(super) user: Option<String>,
    pub(super) password: String,
}

impl Access {
    pub(super) fn silence_max(&self) -> Duration {
        self.silence_max.unwrap_or(SILENCE_MAX)
    }

    /// With a key of S3: its name, its secret, and the token of a key that was lent.
    #[must_use]
    pub fn with_s3_key(mut self, name: &str, secret: &str, token: Option<&str>) -> Self {
        let credentials = match token {
            Some(token) => Credentials::new_with_token(name, secret, token),
            None => Credentials::new(name, secret),
        };
        self.s3 = Some(S3Key(credentials));
        self
    }

    /// With a password for a REST server, and a user for addresses that name none.
    #[must_use]
    pub fn with_login(mut self, user: Option<&str>, password: &str) -> Self {
        self.login = Login { user: user.map(str::to_owned), password: password.to_owned() };
        self
    }
}

impl fmt::Debug for S3Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("S3Key")
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}
