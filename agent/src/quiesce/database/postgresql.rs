//! PostgreSQL: a checkpoint, so that little is replayed after a restore. It has no lock for all that is
//! committed; a server that did not shut down always replays its log from the last checkpoint.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, Error, NoTls};

use super::{CONNECT_TIMEOUT, Database, DatabaseError};

/// A session of an account.
#[derive(Debug)]
pub struct Session {
    client: Client,
    connection: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // It would end by itself, but a server that says nothing could keep it.
        self.connection.abort();
    }
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub async fn connect(database: &Database) -> Result<Self, DatabaseError> {
        let mut config = Config::new();
        config
            .host(&database.host)
            .port(database.port())
            .user(&database.user)
            .dbname(database.database.as_deref().unwrap_or("postgres"))
            .application_name("kvmsnap")
            .connect_timeout(CONNECT_TIMEOUT);
        if let Some(password) = database.password()? {
            config.password(password);
        }
        let (client, connection) = config.connect(NoTls).await.map_err(refused("let us in"))?;
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to PostgreSQL ended");
            }
        });
        Ok(Self { client, connection })
    }

    /// Has it write out all that is committed, and begin its log anew from there.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub async fn checkpoint(&self, limit: Duration) -> Result<(), DatabaseError> {
        // Should this end give it up, or hang, the server does not go on.
        let limit = format!("SET statement_timeout = {}", millis(limit));
        self.client.batch_execute(&limit).await.map_err(refused("limit the session"))?;
        self.client.batch_execute("CHECKPOINT").await.map_err(refused("make a checkpoint"))
    }
}

fn millis(length: Duration) -> u128 {
    length.as_millis()
}

fn refused(step: &'static str) -> impl FnOnce(Error) -> DatabaseError {
    move |source| DatabaseError::PostgreSql { step, source: Box::new(source) }
}
