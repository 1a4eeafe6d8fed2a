//! Restore to new files, and on request define the machine.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use xmltree::Element;

use super::{Disks, RestoreArgs, Source};
use crate::cli::Context;
use crate::error::CommandError;
use crate::hypervisor::Role;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::xml;
use crate::names::DiskName;
use crate::restore::define::{self, DefineError};
use crate::restore::plan::{self, LineKind, Place, Plan, Wanted};
use crate::restore::{files, host};
use crate::store::blocking;

/// Access rights of a folder for images alone, and of one that QEMU's user must search.
const CLOSED: u32 = 0o700;
pub(in crate::cli) const SEARCHABLE: u32 = 0o711;

/// Runs it.
///
/// # Errors
/// Whatever the restore says.
pub(super) async fn run(
    args: &RestoreArgs,
    source: Source,
    context: &Context,
) -> Result<(), CommandError> {
    let libvirt = match args.define || args.pool.is_some() {
        true => {
            let connect = async { Ok(Libvirt::connect(&context.global.connect).await?) };
            Some(context.until_interrupted(connect).await?)
        }
        false => None,
    };
    let look = async { Ok(place(args, &source, libvirt.as_ref()).await?) };
    let place = context.until_interrupted(look).await?;
    let machine = match &libvirt {
        Some(libvirt) if args.define => {
            let look = prepare(args, &source, &place, libvirt);
            Some((libvirt, context.until_interrupted(look).await?))
        }
        _ => None,
    };
    if let Some((_, machine)) = &machine {
        print_plan(&machine.plan, args.dry_run, context)?;
    }
    let disks = Disks {
        place: place.clone(),
        folder_mode: if args.define { SEARCHABLE } else { CLOSED },
        format: args.format,
        disks: args.disk.clone(),
        dry_run: args.dry_run,
    };
    let restored = disks.restore(&source, context).await?;
    super::print(&source, &restored, args.dry_run, context)?;
    if args.dry_run {
        return Ok(());
    }
    // From here on each step is short, and none is left half done.
    if let Some((libvirt, machine)) = machine {
        let (plan, networks) = (&machine.plan, &machine.networks);
        let contents = contents(&source, plan).await?;
        define::define(libvirt, plan, &place, contents, networks).await?;
        print_domain(plan, "defined", context)?;
        if args.start {
            define::start(libvirt, plan).await?;
            print_domain(plan, "started", context)?;
        }
    }
    if let (Some(libvirt), Some(pool)) = (&libvirt, &args.pool) {
        define::refresh_pool(libvirt, pool).await?;
    }
    Ok(())
}

/// Where the files go: into a folder, or a pool that others use too.
async fn place(
    args: &RestoreArgs,
    source: &Source,
    libvirt: Option<&Libvirt>,
) -> Result<Place, DefineError> {
    match (&args.to, &args.pool, libvirt) {
        (_, Some(pool), Some(libvirt)) => {
            let folder = define::pool_folder(libvirt, pool).await?;
            let name = args.name.as_ref().unwrap_or(&source.backup.manifest.domain);
            Ok(Place::new(folder, format!("{name}-")))
        }
        (to, _, _) => {
            let folder = to.clone().unwrap_or_default();
            // A domain's description has whole paths.
            let folder = std::path::absolute(&folder).unwrap_or(folder);
            Ok(Place::new(folder, String::new()))
        }
    }
}

/// A machine that will be defined.
struct Machine {
    plan: Plan,
    /// The descriptions of networks in the backup, by name.
    networks: BTreeMap<String, String>,
}

async fn prepare(
    args: &RestoreArgs,
    source: &Source,
    place: &Place,
    libvirt: &Libvirt,
) -> Result<Machine, CommandError> {
    let (domain, networks) = descriptions(source).await?;
    let host = host::look(libvirt, &domain).await?;
    let disks: Vec<DiskName> = match args.disk.is_empty() {
        true => source.backup.manifest.disks.iter().map(|disk| disk.target.clone()).collect(),
        false => args.disk.clone(),
    };
    let wanted = Wanted {
        name: args.name.as_ref(),
        keep_identity: args.keep_identity,
        start: args.start,
        place,
        format: args.format,
        disks: &disks,
        files: &source.backup.manifest.files,
        networks: &networks,
        uuid: &random_uuid(),
        generation: &random_uuid(),
    };
    let plan = plan::plan(domain, &host, &wanted)?;
    define::check(&plan, &host, place, |_| false)?;
    Ok(Machine { plan, networks })
}

/// The description of the machine, and those of the networks by their names.
async fn descriptions(
    source: &Source,
) -> Result<(Element, BTreeMap<String, String>), CommandError> {
    let source = source.clone();
    blocking(move || {
        let (catalog, backup) = (source.catalog(), &source.backup);
        let files = &backup.manifest.files;
        let folder = catalog.folder(backup)?;
        let read = |file| files::content(&catalog, backup, &folder, file);
        let domain = files::description(files).ok_or(DefineError::NoDescription)?;
        let domain = Element::parse(read(domain)?.as_slice()).map_err(DefineError::Description)?;
        let mut networks = BTreeMap::new();
        for file in files.iter().filter(|file| file.role == Role::Network) {
            let text = String::from_utf8_lossy(&read(file)?).into_owned();
            if let Some(name) =
                xml::parse(&text).ok().and_then(|network| xml::text(&network, "name"))
            {
                networks.insert(name, text);
            }
        }
        Ok((domain, networks))
    })
    .await
}

/// What the plan's files hold.
async fn contents(source: &Source, plan: &Plan) -> Result<Vec<(PathBuf, Vec<u8>)>, CommandError> {
    let (source, copies) = (source.clone(), plan.copies.clone());
    blocking(move || {
        let (catalog, backup) = (source.catalog(), &source.backup);
        let folder = catalog.folder(backup)?;
        let mut contents = Vec::new();
        for copy in copies {
            let files = &backup.manifest.files;
            for file in files.iter().filter(|file| file.name == copy.file) {
                contents.push((copy.to.clone(), files::content(&catalog, backup, &folder, file)?));
            }
        }
        Ok(contents)
    })
    .await
}

/// A uuid of version 4 (RFC 9562).
pub(in crate::cli) fn random_uuid() -> String {
    let random: u128 = rand::random();
    let uuid = random & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let digits = format!("{uuid:032x}");
    let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
    parts.join("-")
}

/// The plan: on standard output where it is what was asked for, else told beside it.
pub(in crate::cli) fn print_plan(
    plan: &Plan,
    dry_run: bool,
    context: &Context,
) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    for line in &plan.lines {
        match (context.global.json, dry_run, line.kind) {
            (true, _, _) => context.print_json(&mut out, line)?,
            (_, true, _) => writeln!(out, "{line}")?,
            (_, _, LineKind::Obstacle) => tracing::warn!("{line}"),
            _ => tracing::info!(target: "progress", "{line}"),
        }
    }
    Ok(())
}

pub(in crate::cli) fn print_domain(
    plan: &Plan,
    verb: &str,
    context: &Context,
) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    match context.global.json {
        true => {
            let line = serde_json::json!({"domain": plan.name, "uuid": plan.uuid, "state": verb});
            context.print_json(&mut out, &line)
        }
        false => Ok(writeln!(out, "{}: {verb} (uuid {})", plan.name, plan.uuid)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_random_and_say_so() {
        let uuid = random_uuid();
        let parts: Vec<_> = uuid.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert_eq!(&uuid[14..15], "4");
        assert!("89ab".contains(&uuid[19..20]), "{uuid}");
        assert_ne!(uuid, random_uuid());
    }
}
