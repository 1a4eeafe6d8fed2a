//! `[[domain."web".database]]`: servers that flush what they hold, and hold still for the point in time, over
//! the network with an account that may do little else.
//!
//! A lock lives on one connection, which a task of the watchdog process owns: it lets go when it is told to, at
//! its own deadline, and with the process. Should even that hang, the server itself ends a session that has
//! said nothing for as long.

mod mariadb;
mod postgresql;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::application::State;
use crate::config::{PasswordError, read_password};
use crate::units;

/// How long what writes to a server may be kept waiting unless told otherwise: as long as a guest may be frozen.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_TIMEOUT_MIN: Duration = Duration::from_secs(2);
const LOCK_TIMEOUT_MAX: Duration = Duration::from_secs(60);
/// How long a server may take to let us in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take to flush what it holds before anything waits for it.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(120);
/// How long for what came since, while hooks were told already: one that needs longer would need it under its lock.
const FLUSH_AGAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take to say once more that nothing has changed, or that it lets go.
const WORD_TIMEOUT: Duration = Duration::from_secs(1);

/// What kind of server it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// MariaDB.
    MariaDb,
    /// MySQL.
    MySql,
    /// PostgreSQL.
    PostgreSql,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::MariaDb => "mariadb",
            Self::MySql => "mysql",
            Self::PostgreSql => "postgresql",
        }
    }

    fn port(self) -> u16 {
        match self {
            Self::MariaDb | Self::MySql => 3306,
            Self::PostgreSql => 5432,
        }
    }
}

/// A server whose data is on the guest's disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Database {
    /// What it is.
    pub kind: Kind,
    /// Its name in the network, or its address.
    pub host: String,
    /// Its port where that is not the usual one.
    pub port: Option<u16>,
    /// The account.
    pub user: String,
    /// A file with the account's password, where it has one.
    pub password_file: Option<PathBuf>,
    /// The database to connect to, where the server wants one (PostgreSQL: `postgres` unless given).
    pub database: Option<String>,
    /// How long what writes to it may be kept waiting.
    #[serde(
        default = "usual_timeout",
        deserialize_with = "lock_timeout",
        serialize_with = "units::duration::serialize"
    )]
    pub timeout: Duration,
    /// Whether there is no backup without it.
    #[serde(default)]
    pub required: bool,
}

fn usual_timeout() -> Duration {
    LOCK_TIMEOUT
}

fn lock_timeout<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let timeout = units::duration::deserialize(from)?;
    match (LOCK_TIMEOUT_MIN..=LOCK_TIMEOUT_MAX).contains(&timeout) {
        true => Ok(timeout),
        false => Err(serde::de::Error::custom("a database may be locked for 2s to 60s")),
    }
}

/// Why a server does not hold still.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatabaseError {
    /// There is no password.
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// The password is no text.
    #[error("the password in {} is not UTF-8", .path.display())]
    NotText {
        /// Its file.
        path: PathBuf,
    },
    /// MariaDB or MySQL refuses, or is away.
    #[error("it refuses to {step}")]
    MariaDb {
        /// What was asked for.
        step: &'static str,
        /// What it said.
        source: Box<mysql_async::Error>,
    },
    /// PostgreSQL refuses, or is away.
    #[error("it refuses to {step}")]
    PostgreSql {
        /// What was asked for.
        step: &'static str,
        /// What it said.
        source: Box<tokio_postgres::Error>,
    },
    /// The server did not do it in time.
    #[error("it did not {step} within {}", units::human_duration(*.waited))]
    Late {
        /// What was asked for.
        step: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// The lock's own deadline passed.
    #[error("it was let go after {}, before the point in time", units::human_duration(*.held))]
    Expired {
        /// How long it was held.
        held: Duration,
    },
    /// The task that holds it is gone.
    #[error("nobody holds it any more")]
    Gone,
}

impl Database {
    /// What it is called in messages.
    pub fn name(&self) -> String {
        let port = self.port();
        let host = match self.host.parse() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            _ => crate::names::printable(&self.host),
        };
        format!("{} {host}:{port}", self.kind.as_str())
    }

    /// How long connecting, flushing twice and locking may take at most.
    pub fn time_max(&self) -> Duration {
        CONNECT_TIMEOUT + FLUSH_TIMEOUT + FLUSH_AGAIN_TIMEOUT + self.timeout + WORD_TIMEOUT
    }

    /// Connects, and has the server write out what it holds: nothing waits for that.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub async fn connect(&self) -> Result<Session, DatabaseError> {
        let connect = async {
            Ok(match self.kind {
                Kind::MariaDb | Kind::MySql => {
                    Connection::MariaDb(mariadb::Session::connect(self).await?)
                }
                Kind::PostgreSql => {
                    Connection::PostgreSql(postgresql::Session::connect(self).await?)
                }
            })
        };
        let connection = within(CONNECT_TIMEOUT, "answer", connect).await?;
        Session { connection, timeout: self.timeout }.flush(FLUSH_TIMEOUT).await
    }

    fn port(&self) -> u16 {
        self.port.unwrap_or_else(|| self.kind.port())
    }

    fn password(&self) -> Result<Option<String>, DatabaseError> {
        let Some(path) = &self.password_file else { return Ok(None) };
        let text = String::from_utf8(read_password(path)?);
        text.map(Some).map_err(|_| DatabaseError::NotText { path: path.clone() })
    }
}

async fn within<T>(
    waited: Duration,
    step: &'static str,
    work: impl Future<Output = Result<T, DatabaseError>>,
) -> Result<T, DatabaseError> {
    timeout(waited, work).await.map_err(|_| DatabaseError::Late { step, waited })?
}

#[derive(Debug)]
enum Connection {
    MariaDb(mariadb::Session),
    PostgreSql(postgresql::Session),
}

/// A server that has flushed what it holds.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    timeout: Duration,
}

impl Session {
    /// Has the server write out what came since it connected, right before the locks: what is left to do under its
    /// own is little then.
    ///
    /// # Errors
    /// [`DatabaseError`]; nobody waits for it then.
    pub async fn flush_again(self) -> Result<Self, DatabaseError> {
        self.flush(FLUSH_AGAIN_TIMEOUT).await
    }

    async fn flush(mut self, limit: Duration) -> Result<Self, DatabaseError> {
        match &mut self.connection {
            Connection::MariaDb(session) => {
                within(limit, "write out what it holds", session.flush()).await?;
            }
            Connection::PostgreSql(session) => {
                within(limit, "make a checkpoint", session.checkpoint(limit)).await?;
            }
        }
        Ok(self)
    }

    /// Has the server hold still. From here on until it is let go, or the timeout is over, what writes to it waits.
    ///
    /// # Errors
    /// [`DatabaseError`]; nobody waits then.
    pub async fn lock(self) -> Result<Locked, DatabaseError> {
        let deadline = Instant::now() + self.timeout;
        let late = || DatabaseError::Late { step: "hold still", waited: self.timeout };
        match self.connection {
            Connection::MariaDb(mut session) => {
                let locked = timeout_at(deadline, session.lock(self.timeout)).await;
                let state = locked.map_err(|_| late())??;
                let (words, heard) = mpsc::channel(1);
                let task = tokio::spawn(hold(session, heard, deadline, self.timeout));
                Ok(Locked { state, holder: Some(Holder { words, task }) })
            }
            Connection::PostgreSql(_) => {
                // Nothing holds it still: what it writes after its checkpoint is replayed when it starts.
                let why = "PostgreSQL replays what it wrote since its last checkpoint".to_owned();
                Ok(Locked { state: State::Flushed { why }, holder: None })
            }
        }
    }
}

/// What its holder is told.
enum Word {
    /// Say whether nothing has changed.
    Confirm(oneshot::Sender<bool>),
    /// Let go.
    Release,
}

#[derive(Debug)]
struct Holder {
    words: mpsc::Sender<Word>,
    task: JoinHandle<Result<(), DatabaseError>>,
}

/// A server that holds still. It is let go when this is dropped.
#[derive(Debug)]
#[must_use = "the server is let go when this is dropped"]
pub struct Locked {
    state: State,
    holder: Option<Holder>,
}

/// Owns the locked connection.
async fn hold(
    mut session: mariadb::Session,
    mut words: mpsc::Receiver<Word>,
    deadline: Instant,
    timeout_max: Duration,
) -> Result<(), DatabaseError> {
    loop {
        let Ok(word) = timeout_at(deadline, words.recv()).await else {
            // The end of the connection is the end of the lock.
            session.hang_up();
            return Err(DatabaseError::Expired { held: timeout_max });
        };
        match word {
            Some(Word::Confirm(answer)) => {
                let is_clean = timeout(WORD_TIMEOUT, session.is_clean()).await;
                // Whoever asked may have given up.
                let _ = answer.send(matches!(is_clean, Ok(Ok(true))));
            }
            Some(Word::Release) => {
                return within(WORD_TIMEOUT, "let go", session.unlock()).await;
            }
            None => {
                session.hang_up();
                return Ok(());
            }
        }
    }
}

impl Locked {
    /// Asks once more whether it starts without recovery: now that it was locked, and its guest frozen.
    pub async fn confirm(&mut self) {
        let (State::Clean, Some(holder)) = (&self.state, &self.holder) else { return };
        let (answer, heard) = oneshot::channel();
        let asked = timeout(WORD_TIMEOUT, async {
            holder.words.send(Word::Confirm(answer)).await.ok()?;
            heard.await.ok()
        });
        if !matches!(asked.await, Ok(Some(true))) {
            let why = "it wrote by itself between its checkpoint and the point in time".to_owned();
            self.state = State::Flushed { why };
        }
    }

    /// Hangs up, and tells how it held still up to here.
    pub fn abandon(self) -> State {
        match &self.holder {
            Some(holder) if holder.task.is_finished() => State::failed(&DatabaseError::Gone),
            _ => self.state,
        }
    }

    /// Lets it go, and tells how it held still up to here.
    pub async fn release(self) -> State {
        let Some(Holder { words, task }) = self.holder else { return self.state };
        // One that has ended says why.
        let _ = words.send(Word::Release).await;
        match task.await {
            Ok(Ok(())) => self.state,
            Ok(Err(error)) => State::failed(&error),
            Err(_) => State::failed(&DatabaseError::Gone),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(more: &str) -> Result<Database, String> {
        let text = format!("kind = \"mariadb\"\nhost = \"db\"\nuser = \"kvmsnap\"\n{more}");
        toml::from_str(&text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_database_is_read_and_handed_on_as_it_is_written() {
        let read = database("password-file = \"/p\"\ntimeout = \"3s\"\nrequired = true").unwrap();
        assert_eq!(read.name(), "mariadb db:3306");
        assert_eq!(read.timeout, Duration::from_secs(3));
        let handed_on = serde_json::to_string(&read).unwrap();
        assert_eq!(serde_json::from_str::<Database>(&handed_on).unwrap(), read);
        assert_eq!(database("").unwrap().timeout, LOCK_TIMEOUT);
    }

    #[test]
    fn a_lock_that_keeps_writers_for_minutes_is_refused() {
        for text in ["timeout = \"5min\"", "timeout = \"1s\"", "timeout = 5", "password = \"x\""] {
            assert!(database(text).is_err(), "{text}");
        }
    }
}
