//! `kvmsnap copy`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ::repository::{
    AnnouncedLock, Copied, Copier, CopyProgress, FileId, LockMode, ReadBack, Repository,
    SnapshotFile, Snapshots,
};
use clap::Args;
use glob::Pattern;
use serde_json::json;

use super::list::local_time;
use super::{Context, Stop, announce_lock_to_read};
use crate::catalog::{Catalog, domain_of, is_ours, short};
use crate::error::CommandError;
use crate::progress::{Progress, human_bytes};
use crate::replicate::{self, Failed, Lacking};
use crate::retention::Machine;
use crate::share::Share;
use crate::store::blocking;

/// Copy snapshots into another repository, which has a password of its own
///
/// Copies what the other repository lacks, of each machine what is newer than the last snapshot that both
/// have: so a replica may drop snapshots by rules of its own. What was stored there already is not sent
/// again, also after a copy that was killed. What was copied is read back, a share of its data too.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap copy --to offsite
  kvmsnap copy --to sftp:keeper@host:/srv/replica --to-password-file /etc/kvmsnap/replica
  kvmsnap copy --to offsite web 'db-*' --limit-upload 4MiB
  kvmsnap copy --to offsite latest:web --dry-run")]
pub struct CopyArgs {
    /// Only these snapshots, or those of these domains, by name or pattern
    #[arg(value_name = "SNAPSHOT|DOMAIN")]
    wanted: Vec<String>,
    /// Also the snapshots of this very machine, if there are any (can be repeated)
    #[arg(long, value_name = "DOMAIN/UUID")]
    machine: Vec<Machine>,
    /// Where to: a name from the configuration, or a location
    #[arg(long, value_name = "REPOSITORY")]
    to: String,
    /// The password of that repository; unless configured, that of this one
    #[arg(long, value_name = "FILE")]
    to_password_file: Option<PathBuf>,
    /// Also copy what is older than the last snapshot that both have
    #[arg(long)]
    older: bool,
    /// How much of what was sent is read back
    #[arg(long, value_name = "SHARE", default_value = "1%")]
    read_back: Share,
    /// Only say what would be copied
    #[arg(long)]
    dry_run: bool,
    /// So many seconds others have to let go of the other repository
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    wait: u64,
}

/// Runs it.
///
/// # Errors
/// [`CommandError::NotCopied`] after naming each snapshot that is damaged, [`CommandError::BadReplica`],
/// and whatever the repositories say.
pub async fn run(args: CopyArgs, context: &Context) -> Result<(), CommandError> {
    let source = context.open().await?;
    let target = context.another(&args.to, args.to_password_file.as_deref())?;
    let target = blocking(move || target.open()).await?;
    let task = Task {
        args,
        json: context.global.json,
        state_dir: context.global.state_dir.clone(),
        progress: context.progress.clone(),
        source,
        target,
    };
    context.until_stopped(move |stop| task.copy(stop)).await
}

struct Task {
    args: CopyArgs,
    json: bool,
    state_dir: PathBuf,
    progress: Progress,
    source: Repository,
    target: Repository,
}

impl Task {
    fn copy(&self, stop: &Stop) -> Result<(), CommandError> {
        self.progress.phase("looking for what the other repository lacks");
        let lock = announce_lock_to_read(&self.source)?;
        let (index, unreadable) = self.source.index_salvaged()?;
        for (file, error) in unreadable {
            tracing::error!(%file, %error, "an index file is passed over");
        }
        let index = Arc::new(index);
        let _lock = lock.map(AnnouncedLock::settle).transpose()?;
        let snapshots = self.source.snapshots()?;
        for (id, error) in &snapshots.damaged {
            tracing::error!(snapshot = %short(id), %error, "a snapshot is passed over");
        }
        let catalog = Catalog::new(&self.source, Arc::clone(&index));
        let mut failed = Failed::read(&self.state_dir, self.source.id(), self.target.id());
        if self.args.dry_run {
            let lacking = self.lacking(&catalog, &snapshots, &self.target.snapshots()?, &failed)?;
            self.progress.finish();
            return self.print_plan(&lacking);
        }
        let patience = Duration::from_secs(self.args.wait);
        let theirs = self.target.lock_within(LockMode::Shared, patience, &|_| stop.check())?;
        let there = self.target.snapshots()?;
        if snapshots.damaged.is_empty() {
            failed.retain(|known| {
                snapshots.good.iter().any(|(id, file)| file.first_id(id) == *known)
            });
        }
        let lacking = self.lacking(&catalog, &snapshots, &there, &failed)?;
        let copier = Copier::new(
            (&self.source, index, &snapshots),
            (&self.target, theirs, &there),
            self.args.read_back.percent(),
        )?;
        self.copy_all(copier, &lacking, &mut failed, stop)
    }

    /// What is to be copied of what was asked for.
    fn lacking(
        &self,
        catalog: &Catalog,
        snapshots: &Snapshots,
        there: &Snapshots,
        failed: &Failed,
    ) -> Result<Lacking, CommandError> {
        let (domains, ids) = self.wanted(catalog, snapshots)?;
        let is_all = self.args.wanted.is_empty() && self.args.machine.is_empty();
        let is_wanted = |(_, file): &&(FileId, SnapshotFile)| {
            let of_domain =
                |pattern: &Pattern| domain_of(file).is_some_and(|name| means(pattern, name));
            let is_machine_s = self.args.machine.iter().any(|machine| machine.may_have(file));
            is_ours(file) && (is_all || is_machine_s || domains.iter().any(of_domain))
        };
        let of_domains = snapshots.good.iter().filter(is_wanted).cloned().collect();
        let mut lacking = replicate::lacking(of_domains, &there.good, self.args.older);
        // Those that were named, and those that could not be copied before, however old.
        let named = snapshots.good.iter().filter(|snapshot| {
            let (id, file) = snapshot;
            ids.contains(id) || (failed.has(&file.first_id(id)) && is_wanted(snapshot))
        });
        for (id, file) in replicate::lacking(named.cloned().collect(), &there.good, true).snapshots
        {
            if !lacking.snapshots.iter().any(|(known, _)| *known == id) {
                lacking.older -= usize::from(!ids.contains(&id));
                lacking.snapshots.push((id, file));
            }
        }
        let place = |id: &FileId| snapshots.good.iter().position(|(known, _)| known == id);
        lacking.snapshots.sort_by_cached_key(|(id, _)| place(id));
        Ok(lacking)
    }

    /// A word means domains, if there are such, else a snapshot.
    fn wanted(
        &self,
        catalog: &Catalog,
        snapshots: &Snapshots,
    ) -> Result<(Vec<Pattern>, Vec<FileId>), CommandError> {
        let (mut domains, mut ids) = (Vec::new(), Vec::new());
        for word in &self.args.wanted {
            let of_it = |pattern: &Pattern| {
                let mut names = snapshots.good.iter().filter_map(|(_, file)| domain_of(file));
                names.any(|name| means(pattern, name))
            };
            match Pattern::new(word).or_else(|_| Pattern::new(&Pattern::escape(word))) {
                Ok(pattern) if of_it(&pattern) => domains.push(pattern),
                _ => {
                    let name = word.parse().unwrap_or_else(|never| match never {});
                    ids.push(catalog.find(&name)?.id);
                }
            }
        }
        Ok((domains, ids))
    }

    fn copy_all(
        &self,
        mut copier: Copier,
        lacking: &Lacking,
        known: &mut Failed,
        stop: &Stop,
    ) -> Result<(), CommandError> {
        let (mut copies, mut failed) = (Vec::new(), 0);
        for (id, file) in &lacking.snapshots {
            let told = |step| self.tell(id, file, step);
            match copier.copy(id, file, &|| stop.check(), &told) {
                Ok(copied) => {
                    self.progress.finish();
                    known.note(file.first_id(id), true);
                    self.print_copied(id, file, &copied)?;
                    copies.push(copied);
                }
                Err(error) if error.is_damage() => {
                    self.progress.finish();
                    known.note(file.first_id(id), false);
                    self.print_failed(id, file, &error.into())?;
                    failed += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.progress.phase("reading back");
        let read_back = copier.read_back(&copies, &|| stop.check()).map_err(|error| match error
            .is_damage()
        {
            true => CommandError::BadReplica {
                location: self.target.location(),
                source: Box::new(error),
            },
            false => error.into(),
        })?;
        self.progress.finish();
        self.print_end(&copies, failed, lacking.older, &read_back)?;
        match failed {
            0 => Ok(()),
            failed => Err(CommandError::NotCopied { failed, count: lacking.snapshots.len() }),
        }
    }

    fn tell(&self, id: &FileId, file: &SnapshotFile, step: CopyProgress) {
        match step {
            CopyProgress::Blobs { done: 1, total } => {
                let domain = domain_of(file).unwrap_or_default();
                self.progress.count(&format!("copying {} of {domain}", short(id)), total);
            }
            CopyProgress::Blobs { done, .. } => self.progress.reach(done),
            _ => self.progress.phase(&format!("comparing {}", short(id))),
        }
    }

    fn print_plan(&self, lacking: &Lacking) -> Result<(), CommandError> {
        let mut out = std::io::stdout().lock();
        for (id, file) in &lacking.snapshots {
            let domain = domain_of(file).unwrap_or_default();
            match self.json {
                true => writeln!(
                    out,
                    "{}",
                    json!({"source": id, "domain": domain, "time": file.time, "dry_run": true})
                )?,
                false => {
                    let time = local_time(file.time);
                    writeln!(out, "{} of {domain}, {time}: would be copied", short(id))?;
                }
            }
        }
        if !self.json {
            let (count, older) = (lacking.snapshots.len(), tell_older(lacking.older));
            writeln!(out, "{count} snapshots to copy to {}{older}", self.target.location())?;
        }
        Ok(())
    }

    fn print_copied(
        &self,
        id: &FileId,
        file: &SnapshotFile,
        copied: &Copied,
    ) -> Result<(), CommandError> {
        let mut out = std::io::stdout().lock();
        let domain = domain_of(file).unwrap_or_default();
        if self.json {
            let line = json!({
                "source": id, "id": copied.id, "short_id": short(&copied.id), "domain": domain,
                "time": file.time, "blobs": copied.blobs, "blobs_sent": copied.sent_blobs,
                "bytes_sent": copied.sent_bytes,
            });
            return Ok(writeln!(out, "{line}")?);
        }
        let (here, there, time) = (short(id), short(&copied.id), local_time(file.time));
        let sent = human_bytes(copied.sent_bytes);
        Ok(writeln!(out, "{here} of {domain}, {time}: copied as {there}, {sent} sent")?)
    }

    fn print_failed(
        &self,
        id: &FileId,
        file: &SnapshotFile,
        error: &CommandError,
    ) -> Result<(), CommandError> {
        let domain = domain_of(file).unwrap_or_default();
        if self.json {
            let line = json!({
                "source": id, "domain": domain, "time": file.time, "error": error.to_string(),
            });
            writeln!(std::io::stdout().lock(), "{line}")?;
        }
        tracing::error!("snapshot {} of {domain} is not copied: {error}", short(id));
        Ok(())
    }

    fn print_end(
        &self,
        copies: &[Copied],
        failed: usize,
        older: usize,
        read_back: &ReadBack,
    ) -> Result<(), CommandError> {
        let mut out = std::io::stdout().lock();
        let (count, location) = (copies.len(), self.target.location());
        let sent: u64 = copies.iter().map(|copied| copied.sent_bytes).sum();
        if self.json {
            let line = json!({
                "to": location, "snapshots": count, "failed": failed, "older_not_copied": older,
                "bytes_sent": sent, "bytes_read_back": read_back.bytes,
            });
            return Ok(writeln!(out, "{line}")?);
        }
        let (sent, back) = (human_bytes(sent), human_bytes(read_back.bytes));
        let older = tell_older(older);
        Ok(writeln!(
            out,
            "{count} snapshots copied to {location}, {sent} sent, {back} of data read back{older}"
        )?)
    }
}

/// Whether a pattern means a domain; a name may look like a pattern.
fn means(pattern: &Pattern, name: &str) -> bool {
    pattern.as_str() == name || pattern.matches(name)
}

fn tell_older(older: usize) -> String {
    match older {
        0 => String::new(),
        older => format!("; {older} older ones that it lacks are left alone (--older copies them)"),
    }
}
