//! `kvmsnap forget`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ::repository::{
    AnnouncedLock, FileId, Lock, PruneOptions, Repository, RepositoryError, SnapshotFile,
};
use clap::Args;
use comfy_table::{Table, presets};
use glob::Pattern;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::list::local_time;
use super::{Context, Stop, Wanted, prune};
use crate::catalog::{Catalog, SnapshotName, domain_of, short};
use crate::error::CommandError;
use crate::progress::Progress;
use crate::retention::{self, Earlier, Group, Machine, NotCopied, Policy, Reason, Rule, Within};
use crate::store::blocking;

/// So many snapshots may be dropped to make room for the lock itself.
const ROOM_MAKERS_MAX: usize = 8;

/// Drop the snapshots that no rule keeps
///
/// Going back from the newest snapshot of each machine, each rule keeps the newest of each of its hours,
/// days, weeks, months or years, as many as it is told. What only dropped snapshots hold is freed by
/// `kvmsnap prune`. Never dropped are the last good snapshot of a machine, the one that the next
/// incremental backup continues, protected ones, and what a replica named with --not-copied-to lacks.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap forget --keep-daily 14 --keep-weekly 8 --keep-monthly 12 --dry-run
  kvmsnap forget 'web-*' --keep-last 3 --keep-within 7d --prune
  kvmsnap forget --snapshot 1a2b3c4d")]
pub struct ForgetArgs {
    /// Only snapshots of these domains, by name or pattern
    #[arg(value_name = "DOMAIN")]
    domains: Vec<Pattern>,
    /// Only snapshots of this very machine, where others have the same name (can be repeated)
    #[arg(long, value_name = "DOMAIN/UUID", conflicts_with = "domains")]
    machine: Vec<Machine>,
    #[command(flatten)]
    rules: Rules,
    /// Drop this snapshot and no other (can be repeated)
    #[arg(long, value_name = "SNAPSHOT", conflicts_with_all = ["domains", "machine", "Rules"])]
    snapshot: Vec<SnapshotName>,
    /// Keep what this repository has to get a copy of yet, and the last one that it has (can be repeated)
    #[arg(long, value_name = "REPOSITORY")]
    not_copied_to: Vec<String>,
    /// The password of those repositories; by default that of this one
    #[arg(long, value_name = "FILE", requires = "not_copied_to")]
    not_copied_password_file: Option<PathBuf>,
    /// Drop most of a machine's snapshots at once, which looks like a mistake
    #[arg(long)]
    allow_many: bool,
    /// Only say what would be dropped, and why the others stay
    #[arg(long)]
    dry_run: bool,
    /// Free the room at once, as `kvmsnap prune` does
    #[arg(long, conflicts_with = "dry_run")]
    prune: bool,
    /// So many seconds others have to let go of the repository
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    wait: u64,
}

#[derive(Debug, Args)]
#[group(id = "Rules", multiple = true)]
struct Rules {
    /// Keep the newest N
    #[arg(long, value_name = "N", default_value_t)]
    keep_last: u32,
    /// Keep the newest of each of N hours
    #[arg(long, value_name = "N", default_value_t)]
    keep_hourly: u32,
    /// Keep the newest of each of N days
    #[arg(long, value_name = "N", default_value_t)]
    keep_daily: u32,
    /// Keep the newest of each of N weeks
    #[arg(long, value_name = "N", default_value_t)]
    keep_weekly: u32,
    /// Keep the newest of each of N months
    #[arg(long, value_name = "N", default_value_t)]
    keep_monthly: u32,
    /// Keep the newest of each of N years
    #[arg(long, value_name = "N", default_value_t)]
    keep_yearly: u32,
    /// Keep all that are at most so much older than the newest, like 7d or 1y6m
    #[arg(long, value_name = "LENGTH")]
    keep_within: Option<Within>,
    /// Keep all with this tag (can be repeated)
    #[arg(long, value_name = "TAG")]
    keep_tag: Vec<String>,
}

impl Rules {
    fn policy(&self) -> Policy {
        Policy {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within,
            tags: self.keep_tag.clone(),
        }
    }
}

/// Runs it.
///
/// # Errors
/// [`CommandError::NoRule`], [`CommandError::TooManyDropped`], and whatever the repository says.
pub async fn run(args: ForgetArgs, context: &Context) -> Result<(), CommandError> {
    let policy = args.rules.policy();
    if policy.is_empty() && args.snapshot.is_empty() {
        return Err(CommandError::NoRule);
    }
    let repository = context.open().await?;
    let mut options = PruneOptions::default();
    options.patience = Duration::from_secs(args.wait);
    let pruned = args.prune.then(|| repository.clone());
    let replicas = args.replicas(context).await?;
    let task = Task {
        progress: context.progress.clone(),
        state_dir: context.global.state_dir.clone(),
        replicas,
        policy,
        args,
    };
    let (task, outcome) = context
        .until_stopped(move |stop| {
            let outcome = task.forget(&repository, stop)?;
            Ok((task, outcome))
        })
        .await?;
    context.progress.finish();
    task.print(&outcome, context)?;
    if let Some(repository) = pruned {
        prune::prune(repository, options, context).await?;
    }
    task.refused(&outcome).next().map_or(Ok(()), Err)
}

impl ForgetArgs {
    /// What the replicas that were named have.
    async fn replicas(&self, context: &Context) -> Result<Vec<NotCopied>, CommandError> {
        let password_file = self.not_copied_password_file.as_deref();
        let named = |name: &String| Ok((name.clone(), context.another(name, password_file)?));
        let replicas: Vec<(String, Wanted)> =
            self.not_copied_to.iter().map(named).collect::<Result<_, CommandError>>()?;
        let open = |(name, wanted): (String, Wanted)| {
            let replica = wanted.open()?.snapshots()?;
            Ok::<_, CommandError>(NotCopied::to(&name, &replica.good))
        };
        blocking(move || replicas.into_iter().map(open).collect()).await
    }
}

struct Task {
    args: ForgetArgs,
    policy: Policy,
    replicas: Vec<NotCopied>,
    state_dir: PathBuf,
    progress: Progress,
}

/// What was found, and what was dropped of it.
struct Outcome {
    groups: Vec<Group>,
    dropped: Vec<FileId>,
    unreadable: usize,
}

impl Task {
    fn forget(&self, repository: &Repository, stop: &Stop) -> Result<Outcome, CommandError> {
        let _lock = match self.args.dry_run {
            true => {
                super::announce_lock_to_read(repository)?.map(AnnouncedLock::settle).transpose()?
            }
            false => Some(self.lock(repository, stop)?),
        };
        self.progress.phase("looking for what no rule keeps");
        let catalog = catalog(repository)?;
        let mut earlier = Earlier::read(&self.state_dir, repository.id());
        let (groups, unreadable) = self.plan(&catalog, &earlier)?;
        let mut outcome = Outcome { groups, dropped: Vec::new(), unreadable };
        if self.args.dry_run {
            return Ok(outcome);
        }
        let going: Vec<FileId> =
            outcome.groups.iter().filter(|group| self.may(group)).flat_map(dropped).collect();
        self.progress.count("dropping snapshots", going.len() as u64);
        for id in going {
            stop.check()?;
            remove(repository, &id)?;
            outcome.dropped.push(id);
            self.progress.reach(outcome.dropped.len() as u64);
        }
        if self.args.snapshot.is_empty() {
            let machines = outcome.groups.iter().filter(|group| self.may(group));
            let remembered = earlier.remember(machines.map(|group| &group.machine), &self.policy);
            if let Err(error) = remembered {
                tracing::warn!(%error, "these rules are not remembered for next time");
            }
        }
        Ok(outcome)
    }

    /// The lock that restic takes for it. On a full store a lock needs room, which the first snapshots to
    /// go give: they go before the lock, see [`Task::make_room`].
    fn lock(&self, repository: &Repository, stop: &Stop) -> Result<Lock, CommandError> {
        let patience = Duration::from_secs(self.args.wait);
        for _ in 0..ROOM_MAKERS_MAX {
            match super::lock_exclusively(repository, patience, &self.progress, stop) {
                Err(RepositoryError::LockNotWritable { source }) if source.is_full() => {
                    if !self.make_room(repository)? {
                        return Err(RepositoryError::LockNotWritable { source }.into());
                    }
                }
                locked => return Ok(locked?),
            }
        }
        Ok(super::lock_exclusively(repository, patience, &self.progress, stop)?)
    }

    /// Drops one snapshot without a lock. Whoever else does so at the same moment takes one too, so it is one
    /// of a machine of which two others stay.
    fn make_room(&self, repository: &Repository) -> Result<bool, CommandError> {
        let catalog = catalog(repository)?;
        let earlier = Earlier::read(&self.state_dir, repository.id());
        let (groups, _) = self.plan(&catalog, &earlier)?;
        let has_more = |group: &&Group| group.decisions.iter().filter(|d| d.stays()).count() > 1;
        let mut groups = groups.iter().filter(|group| self.may(group)).filter(has_more);
        let Some(id) = groups.find_map(|group| dropped(group).next()) else { return Ok(false) };
        remove(repository, &id)?;
        tracing::info!(snapshot = %id, "dropped first: the store is too full even for a lock");
        Ok(true)
    }

    fn plan(
        &self,
        catalog: &Catalog,
        earlier: &Earlier,
    ) -> Result<(Vec<Group>, usize), CommandError> {
        let named = self.named(catalog)?;
        let matches = |file: &SnapshotFile| {
            let domain = domain_of(file).unwrap_or_default();
            let (patterns, machines) = (&self.args.domains, &self.args.machine);
            (patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(domain)))
                && (machines.is_empty() || machines.iter().any(|machine| machine.may_have(file)))
        };
        let gathered = retention::gather(catalog, matches, &self.replicas)?;
        for error in &gathered.broken {
            tracing::error!(%error, "a snapshot cannot be judged");
        }
        let tz = TimeZone::system();
        let earlier = |machine: &_| earlier.of(machine);
        let candidates = &gathered.candidates;
        let mut groups = retention::plan(candidates, &self.policy, earlier, Timestamp::now(), &tz);
        if !self.args.machine.is_empty() {
            groups.retain(|group| self.args.machine.contains(&group.machine));
        }
        if !named.is_empty() {
            only(&mut groups, &named);
        }
        Ok((groups, gathered.broken.len()))
    }

    /// The snapshots that were asked for by name.
    fn named(&self, catalog: &Catalog) -> Result<Vec<FileId>, CommandError> {
        let find = |name| Ok(catalog.find(name)?.id);
        self.args.snapshot.iter().map(find).collect()
    }

    /// Whether what goes of a machine's snapshots may go.
    fn may(&self, group: &Group) -> bool {
        self.args.allow_many || !self.args.snapshot.is_empty() || group.unexpected.is_none()
    }

    fn refused<'a>(&'a self, outcome: &'a Outcome) -> impl Iterator<Item = CommandError> + 'a {
        let refused = outcome.groups.iter().filter(|group| !self.may(group));
        let too_many = refused.map(|group| CommandError::TooManyDropped {
            domain: group.machine.domain.clone(),
            dropped: dropped(group).count(),
            of: group.decisions.len(),
            in_future: group.in_future.map(|(id, time)| (short(&id), local_time(time))),
        });
        let needed = outcome.groups.iter().filter(|_| !self.args.snapshot.is_empty());
        let needed = needed.flat_map(|group| &group.decisions).filter(|decision| decision.stays());
        let needed = needed.map(|decision| CommandError::StillNeeded {
            snapshot: short(&decision.id),
            reasons: words(&decision.reasons),
        });
        needed.chain(too_many)
    }

    fn print(&self, outcome: &Outcome, context: &Context) -> Result<(), CommandError> {
        let mut out = std::io::stdout().lock();
        for error in self.refused(outcome).skip(1) {
            tracing::error!("{error}");
        }
        let (mut stay, mut go) = (0, 0);
        for group in &outcome.groups {
            let may = self.may(group);
            go += if may { dropped(group).count() } else { 0 };
            stay += group.decisions.len() - if may { dropped(group).count() } else { 0 };
            if context.global.json {
                for decision in &group.decisions {
                    let reasons: Vec<_> = decision.reasons.iter().map(Reason::to_string).collect();
                    let line = serde_json::json!({
                        "id": decision.id, "short_id": short(&decision.id),
                        "domain": group.machine.domain, "uuid": group.machine.uuid,
                        "time": decision.time, "keep": decision.stays() || !may,
                        "reasons": reasons, "dropped": outcome.dropped.contains(&decision.id),
                    });
                    context.print_json(&mut out, &line)?;
                }
            } else if !context.global.quiet {
                writeln!(out, "{}\n{}\n", self.heading(group), self.table(group))?;
            }
        }
        if context.global.json {
            let line = serde_json::json!({
                "kept": stay, "dropped": outcome.dropped.len(), "to_drop": go,
                "unreadable": outcome.unreadable, "dry_run": self.args.dry_run,
                "rules": self.policy.to_args(),
            });
            return context.print_json(&mut out, &line);
        }
        let verb = if self.args.dry_run { "would be dropped" } else { "dropped" };
        writeln!(out, "{stay} snapshots stay, {go} {verb}")?;
        Ok(())
    }

    fn heading(&self, group: &Group) -> String {
        let go = dropped(group).count();
        let goes = match (self.may(group), self.args.dry_run) {
            (false, _) => "would go, which is refused",
            (true, true) => "would go",
            (true, false) => "went",
        };
        let stay = group.decisions.len() - go;
        format!("{} ({}): {stay} stay, {go} {goes}", group.machine.domain, group.machine.uuid)
    }

    /// A column for each rule, which shows the generations of grandfather, father and son.
    fn table(&self, group: &Group) -> String {
        let rules: Vec<Rule> =
            Rule::ALL.into_iter().filter(|&rule| self.policy.count(rule) > 0).collect();
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let mut header = vec!["ID".to_owned(), "TIME".to_owned()];
        header.extend(rules.iter().map(|rule| rule.as_str().to_uppercase()));
        header.push("WHY".to_owned());
        table.set_header(header);
        for decision in &group.decisions {
            let mut row = vec![short(&decision.id), local_time(decision.time)];
            let kept_by = |rule| decision.reasons.iter().any(|reason| reason.rule() == Some(rule));
            row.extend(rules.iter().map(|&rule| if kept_by(rule) { "x" } else { "" }.to_owned()));
            row.push(match decision.stays() {
                true => words(&decision.reasons),
                false => "goes: no rule keeps it".to_owned(),
            });
            table.add_row(row);
        }
        table.trim_fmt()
    }
}

/// Of all snapshots only those that were named go, and of these only such that nothing but a rule keeps.
fn only(groups: &mut Vec<Group>, named: &[FileId]) {
    for group in groups.iter_mut() {
        group.decisions.retain(|decision| named.contains(&decision.id));
    }
    groups.retain(|group| !group.decisions.is_empty());
}

fn catalog(repository: &Repository) -> Result<Catalog, CommandError> {
    let (index, unreadable) = repository.index_of_readable()?;
    for (file, error) in unreadable {
        tracing::error!(%file, %error, "an index file is passed over");
    }
    Ok(Catalog::new(repository, Arc::new(index)))
}

fn dropped(group: &Group) -> impl Iterator<Item = FileId> {
    group.dropped().map(|decision| decision.id)
}

fn words(reasons: &[Reason]) -> String {
    reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join(", ")
}

/// What is gone already was dropped by somebody else.
fn remove(repository: &Repository, id: &FileId) -> Result<(), RepositoryError> {
    match repository.remove_snapshot(id) {
        Err(RepositoryError::Backend { source }) if source.is_not_found() => Ok(()),
        other => other,
    }
}
