//! MariaDB and MySQL: a global read lock, and InnoDB's log at a checkpoint where the account may ask for one.

use std::time::Duration;

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error, OptsBuilder};
use tokio::time::Instant;

use super::{Database, DatabaseError, State};

/// Bytes of InnoDB's log after a checkpoint that left nothing to do: the record of the checkpoint itself.
const CHECKPOINT_AGE_CLEAN: u64 = 16;
/// How long InnoDB may go on writing by itself under the lock, such as when it purges old versions of rows.
const SETTLE_TIMEOUT_MAX: Duration = Duration::from_secs(2);
const SETTLE_PAUSE: Duration = Duration::from_millis(20);
/// `ER_SPECIFIC_ACCESS_DENIED_ERROR`; `ER_UNKNOWN_SYSTEM_VARIABLE`: MySQL, and older versions of MariaDB.
const NOT_FOR_US: [u16; 2] = [1227, 1193];

/// A session of an account.
#[derive(Debug)]
pub struct Session {
    connection: Conn,
    /// Why the account may not ask for checkpoints, or the server knows none.
    no_checkpoint: Option<String>,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub async fn connect(database: &Database) -> Result<Self, DatabaseError> {
        let options = OptsBuilder::default()
            .ip_or_hostname(database.host.clone())
            .tcp_port(database.port())
            // Else it looks for a socket in this host's file system, which is another server's.
            .prefer_socket(false)
            .user(Some(database.user.clone()))
            .pass(database.password()?)
            .db_name(database.database.clone())
            .stmt_cache_size(0);
        let connection = Conn::new(options).await.map_err(refused("let us in"))?;
        Ok(Self { connection, no_checkpoint: None })
    }

    /// Has InnoDB and Aria write out what they hold, while everybody goes on writing.
    ///
    /// # Errors
    /// [`DatabaseError`]; not where the account may not ask for it.
    pub async fn flush(&mut self) -> Result<(), DatabaseError> {
        let flushed = match self.checkpoint().await {
            Ok(()) => self.checkpoint_of_aria().await,
            refused => refused,
        };
        match flushed {
            Err(Error::Server(error)) if NOT_FOR_US.contains(&error.code) => {
                self.no_checkpoint = Some(error.message);
                Ok(())
            }
            flushed => flushed.map_err(refused("write out what it holds")),
        }
    }

    /// Takes the global read lock: from then on nothing is committed, nor tables changed. A statement that runs
    /// keeps it, and what comes after it, waiting: so it gives up after half of `timeout`.
    ///
    /// # Errors
    /// [`DatabaseError`]; no lock is held then.
    pub async fn lock(&mut self, timeout: Duration) -> Result<State, DatabaseError> {
        let (wait, idle) = ((timeout.as_secs() / 2).max(1), timeout.as_secs() + 1);
        // A session whose other end says nothing any more, stopped or gone, ends by itself.
        let limits = format!("SET SESSION lock_wait_timeout = {wait}, wait_timeout = {idle}");
        self.run(&limits, "limit the session").await?;
        self.run("FLUSH TABLES WITH READ LOCK", "lock its tables").await?;
        if let Some(why) = &self.no_checkpoint {
            return Ok(State::Flushed { why: format!("its log is replayed: {why}") });
        }
        self.checkpoint_of_aria().await.map_err(refused("make a checkpoint of Aria"))?;
        let start = Instant::now();
        let settle = SETTLE_TIMEOUT_MAX.min(timeout / 4);
        self.purge(settle).await?;
        loop {
            self.checkpoint().await.map_err(refused("make a checkpoint"))?;
            if self.is_clean().await? {
                return Ok(State::Clean);
            }
            if start.elapsed() > settle {
                let why = "it went on writing by itself under the lock".to_owned();
                return Ok(State::Flushed { why });
            }
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
    }

    /// Whether InnoDB's log ends with a checkpoint: a copy of its files starts without recovery.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub async fn is_clean(&mut self) -> Result<bool, DatabaseError> {
        let ask = "SHOW GLOBAL STATUS LIKE 'Innodb_checkpoint_age'";
        let answer: Option<(String, u64)> =
            self.connection.query_first(ask).await.map_err(refused("tell its checkpoint's age"))?;
        Ok(answer.is_some_and(|(_, age)| age <= CHECKPOINT_AGE_CLEAN))
    }

    /// Lets go. That it could says that it held the lock up to here.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub async fn unlock(mut self) -> Result<(), DatabaseError> {
        self.run("UNLOCK TABLES", "let go").await?;
        // The lock is gone, whatever comes of this.
        let _ = self.connection.disconnect().await;
        Ok(())
    }

    /// Ends the connection at once, and the lock with it.
    pub fn hang_up(self) {
        drop(self.connection);
    }

    /// Has InnoDB finish what it does by itself after statements, which it logs too: old versions of rows are
    /// removed, and every new row is marked as seen by all.
    async fn purge(&mut self, settle: Duration) -> Result<(), DatabaseError> {
        let limit = settle.as_secs_f64();
        self.run(&format!("SET SESSION max_statement_time = {limit}"), "limit the session").await?;
        match self.connection.query_drop("SET GLOBAL innodb_max_purge_lag_wait = 0").await {
            // There is too much of it, or no way to wait for it: then the checkpoint's age tells.
            Err(Error::Server(_)) | Ok(()) => {}
            Err(error) => return Err(refused("tidy up")(error)),
        }
        self.run("SET SESSION max_statement_time = 0", "limit the session").await
    }

    async fn checkpoint(&mut self) -> Result<(), Error> {
        self.connection.query_drop("SET GLOBAL innodb_log_checkpoint_now = ON").await
    }

    /// System tables are Aria's, which makes a full checkpoint when its interval is set anew (`ma_checkpoint.c`).
    async fn checkpoint_of_aria(&mut self) -> Result<(), Error> {
        let anew = "SET GLOBAL aria_checkpoint_interval = @@GLOBAL.aria_checkpoint_interval";
        self.connection.query_drop(anew).await
    }

    async fn run(&mut self, statement: &str, step: &'static str) -> Result<(), DatabaseError> {
        self.connection.query_drop(statement).await.map_err(refused(step))
    }
}

fn refused(step: &'static str) -> impl FnOnce(Error) -> DatabaseError {
    move |source| DatabaseError::MariaDb { step, source: Box::new(source) }
}
