//! `kvmsnap repository`

use std::io::Write;

use ::repository::{Kdf, Repository};
use clap::Subcommand;
use serde::Serialize;

use super::{Context, Wanted};
use crate::error::CommandError;
use crate::location;
use crate::store::blocking;

/// Make a repository, or look at one
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  kvmsnap repository init -r /srv/backup -p /etc/kvmsnap/password
  kvmsnap repository info")]
pub enum RepositoryCommand {
    /// Make a repository in an empty or new folder, here or elsewhere
    #[command(after_help = "\
Examples:
  kvmsnap repository init -r /srv/backup -p /etc/kvmsnap/password
  kvmsnap repository init -r sftp:keeper@host:/srv/backup
  kvmsnap repository init -r s3://s3.example.org/bucket/prefix
  kvmsnap repository init -r rest:https://keeper@host:8000/
  restic -r /srv/backup --password-file /etc/kvmsnap/password snapshots")]
    Init,
    /// Say what a repository holds
    #[command(after_help = "\
Examples:
  kvmsnap repository info
  kvmsnap repository info --json | jq .bytes")]
    Info,
    /// Fails unless a repository can be reached and opened
    #[command(hide = true)]
    Answers,
    /// Says how many bytes its packs take, and reads nothing for it
    #[command(hide = true)]
    Size,
}

#[derive(Serialize)]
struct Info {
    location: String,
    id: String,
    format_version: u32,
    snapshots: usize,
    damaged_snapshots: usize,
    packs: usize,
    blobs: usize,
    bytes: u64,
}

/// Runs it.
///
/// # Errors
/// Whatever the repository says.
pub async fn run(command: RepositoryCommand, context: &Context) -> Result<(), CommandError> {
    match command {
        RepositoryCommand::Init => init(context).await,
        RepositoryCommand::Info => info(context).await,
        RepositoryCommand::Answers => context.open().await.map(drop),
        RepositoryCommand::Size => size(context).await,
    }
}

async fn init(context: &Context) -> Result<(), CommandError> {
    let Wanted { location, route, password } = context.wanted()?;
    let repository = blocking(move || {
        let backend = location::create(&location, &route)?;
        Ok::<_, CommandError>(Repository::init(backend, &password, Kdf::default())?)
    })
    .await?;
    let mut out = std::io::stdout().lock();
    if context.global.json {
        let made = serde_json::json!({"location": repository.location(), "id": repository.id()});
        return context.print_json(&mut out, &made);
    }
    writeln!(out, "made the repository {} in {}", short(repository.id()), repository.location())?;
    if !context.global.quiet {
        tracing::warn!("keep the password: without it nobody can read the backups");
    }
    Ok(())
}

async fn info(context: &Context) -> Result<(), CommandError> {
    let open = context.open_to_read().await?;
    let info = blocking(move || {
        let snapshots = open.repository.snapshots()?;
        let packs = open.repository.backend().list(::repository::FileKind::Pack);
        let packs = packs.map_err(::repository::RepositoryError::from)?;
        Ok::<_, CommandError>(Info {
            location: open.repository.location(),
            id: open.repository.id().to_owned(),
            format_version: 2,
            snapshots: snapshots.good.len(),
            damaged_snapshots: snapshots.damaged.len(),
            packs: packs.len(),
            blobs: open.index.len(),
            bytes: packs.iter().map(|(_, len)| len).sum(),
        })
    })
    .await?;
    let mut out = std::io::stdout().lock();
    if context.global.json {
        return context.print_json(&mut out, &info);
    }
    writeln!(out, "location   {}", info.location)?;
    writeln!(out, "id         {}", info.id)?;
    writeln!(out, "format     restic, version {}", info.format_version)?;
    writeln!(out, "snapshots  {}", info.snapshots)?;
    writeln!(out, "packs      {} ({})", info.packs, crate::progress::human_bytes(info.bytes))?;
    writeln!(out, "blobs      {}", info.blobs)?;
    if info.damaged_snapshots > 0 {
        return Err(CommandError::Damaged { problems: info.damaged_snapshots });
    }
    Ok(())
}

async fn size(context: &Context) -> Result<(), CommandError> {
    let repository = context.open().await?;
    let packs = blocking(move || {
        let packs = repository.backend().list(::repository::FileKind::Pack);
        packs.map_err(::repository::RepositoryError::from)
    })
    .await?;
    let bytes: u64 = packs.iter().map(|(_, len)| len).sum();
    let mut out = std::io::stdout().lock();
    match context.global.json {
        true => context.print_json(&mut out, &serde_json::json!({"bytes": bytes})),
        false => Ok(writeln!(out, "{bytes}")?),
    }
}

fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}
