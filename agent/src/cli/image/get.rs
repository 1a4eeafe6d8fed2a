//! `kvmsnap image get`

use std::cell::RefCell;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{ArgGroup, Args};
use image_tools::ImageError;
use image_tools::copy::Bounds;
use image_tools::folder::Image;
use image_tools::inspect::{self, Policy};
use image_tools::record::{DiskFile, Origin};
use jiff::Timestamp;

use super::{Context, ImageLine, origin};
use crate::capture::image::{Chain, node};
use crate::capture::offline;
use crate::catalog::SnapshotName;
use crate::cli::backup::{OverlayArgs, choose, lock, recover_earlier};
use crate::cli::restore::{Disks, Source as Backup};
use crate::cli::{OpenRepository, overlays};
use crate::error::CommandError;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::shut_off::ShutOffDomain;
use crate::hypervisor::libvirt::{self, KnownDomain, LibvirtDomain, Places};
use crate::hypervisor::{Choice, Hypervisor, Machine, MachineFile, Skipped};
use crate::image::get::{Get, Source};
use crate::image::hold::{Hold, read_still};
use crate::lock::DomainLock;
use crate::names::{DiskName, DomainName, printable};
use crate::overlay::create::{self, Request};
use crate::overlay::libvirt::LibvirtLayers;
use crate::overlay::record::{Held, Purpose, Records};
use crate::overlay::{OverlayError, files};
use crate::plan;
use crate::progress::human_bytes;
use crate::quiesce::Mode;
use crate::restore::plan::Place;
use crate::restore::{self, Format, Stop};
use crate::store::blocking;

/// The most disks that are taken from files: `vda` to `vdz`.
const FILES_MAX: usize = 26;
/// Where a snapshot's disks are restored to, in the folder of the image.
const RESTORED: &str = "restored";

/// Keep a machine's images as a template for disaster recovery
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true), after_help = "\
Examples:
  kvmsnap image get web --into /srv/templates
  kvmsnap image get --from latest:web --into /srv/templates --name web-2026
  kvmsnap image get --file web.qcow2 --format qcow2 --into /srv/templates

A running domain goes on meanwhile: it writes to overlays, as with `kvmsnap create`. The copy is
compressed, compared with what it was made from, and has its name only when it is whole.")]
pub struct GetArgs {
    /// A domain of libvirt, running or shut off: its name or uuid
    #[arg(value_name = "DOMAIN", group = "source")]
    domain: Option<String>,
    /// A snapshot in the repository: an id, a unique prefix of one, latest:DOMAIN, or DOMAIN@TIME
    #[arg(long, value_name = "SNAPSHOT", group = "source")]
    from: Option<SnapshotName>,
    /// An image file, of several disks one each, in their order
    #[arg(long, value_name = "IMAGE", group = "source", requires_all = ["format", "name"])]
    file: Vec<PathBuf>,
    /// The format of the files; it is never guessed
    #[arg(long, value_name = "FORMAT", requires = "file")]
    format: Option<Format>,
    /// The folder that gets a folder with the images
    #[arg(long, value_name = "STORE")]
    into: PathBuf,
    /// What the image is called; as the machine unless given
    #[arg(long, value_name = "NAME")]
    name: Option<DomainName>,
    /// Only this disk (can be repeated)
    #[arg(long, value_name = "DISK", conflicts_with = "file")]
    disk: Vec<DiskName>,
    /// Whether file systems are frozen for the instant
    #[arg(long, value_name = "MODE", default_value = "auto")]
    quiesce: Mode,
    /// Keep the domain's description with its secrets, such as passwords of consoles
    #[arg(long)]
    with_secrets: bool,
    #[command(flatten, next_help_heading = "A domain that runs")]
    overlays: OverlayArgs,
}

/// Runs it.
///
/// # Errors
/// Whatever the source or the copy says; nothing has the name then.
pub async fn run(args: GetArgs, context: &Context) -> Result<(), CommandError> {
    let outcome = match (&args.from, &args.domain) {
        (Some(snapshot), _) => from_snapshot(snapshot, &args, context).await,
        (None, Some(domain)) => from_domain(domain, &args, context).await,
        (None, None) => from_files(&args, context).await,
    };
    context.progress.finish();
    let (image, leftover) = outcome?;
    print(&image, context)?;
    leftover.map_or(Ok(()), |error| Err(CommandError::ImageLeftover(error)))
}

/// What was kept, and what keeps the guest from its own images.
type Kept = (Image, Option<OverlayError>);

impl GetArgs {
    fn begin<'a>(&self, machine: &str, context: &'a Context) -> Result<Get<'a>, ImageError> {
        let name = self.name.as_ref().map_or(machine, DomainName::as_str);
        Get::begin(&self.into, name, &context.progress)
    }
}

// ---- files --------------------------------------------------------------------------------------

async fn from_files(args: &GetArgs, context: &Context) -> Result<Kept, CommandError> {
    let name = args.name.as_ref().expect("clap asks for it").as_str();
    let format = match args.format.expect("clap asks for it") {
        Format::Raw => inspect::Format::Raw,
        Format::Qcow2 => inspect::Format::Qcow2,
    };
    if args.file.len() > FILES_MAX {
        return Err(CommandError::TooManyFiles { max: FILES_MAX });
    }
    let mut sources = Vec::new();
    for (letter, file) in ('a'..='z').zip(&args.file) {
        let inspected = inspect::inspect(file, format, &Policy::default())?;
        if inspected.header.as_ref().is_some_and(|header| header.is_dirty) {
            tracing::warn!(
                "{}: whoever wrote to it last did not close it; what a guest sees is whole",
                file.display()
            );
        }
        let (target, size) = (format!("vd{letter}"), inspected.size);
        let (graph, bounds) = (inspected.graph(), inspected.bounds());
        sources.push(Source { target, size, graph, bounds });
    }
    let work = async {
        let (mut get, time) = (args.begin(name, context)?, Timestamp::now());
        for source in &sources {
            get.copy(source).await?;
        }
        let origin = Origin::File(std::path::absolute(&args.file[0])?);
        Ok((get.finish(name.to_owned(), time, origin, &[]).await?, None))
    };
    context.until_interrupted(work).await
}

// ---- snapshots ----------------------------------------------------------------------------------

async fn from_snapshot(
    snapshot: &SnapshotName,
    args: &GetArgs,
    context: &Context,
) -> Result<Kept, CommandError> {
    let open = context.until_interrupted(context.open_to_read()).await?;
    let OpenRepository { repository, lock: _lock, index } = open;
    let (catalog, wanted) =
        (crate::catalog::Catalog::new(&repository, Arc::clone(&index)), snapshot.clone());
    let find = blocking(move || {
        let backup = catalog.find(&wanted)?;
        let folder = catalog.folder(&backup)?;
        let mut files = Vec::new();
        for file in &backup.manifest.files {
            let content = restore::files::content(&catalog, &backup, &folder, file)?;
            let (name, role, source) = (file.name.clone(), file.role, file.source.clone());
            files.push(MachineFile { name, role, source, content });
        }
        Ok::<_, CommandError>((Arc::new(backup), files))
    });
    let (backup, files) = context.until_interrupted(find).await?;
    let manifest = &backup.manifest;
    warn_of_missing(&manifest.skipped);
    if let Some(disk) =
        args.disk.iter().find(|disk| manifest.disks.iter().all(|known| &known.target != *disk))
    {
        return Err(restore::RestoreError::UnknownDisk { disk: disk.clone() }.into());
    }
    let mut get = args.begin(manifest.domain.as_str(), context)?;
    let source = Backup { repository, index, backup: Arc::clone(&backup), stop: Stop::default() };
    let is_wanted = |disk: &DiskName| args.disk.is_empty() || args.disk.contains(disk);
    for disk in manifest.disks.iter().filter(|disk| is_wanted(&disk.target)) {
        // One at a time: it takes its room only until it is copied.
        let folder = get.folder().join(RESTORED);
        let disks = Disks {
            place: Place::new(folder.clone(), String::new()),
            folder_mode: 0o700,
            format: Format::Qcow2,
            disks: vec![disk.target.clone()],
            dry_run: false,
        };
        for restored in disks.restore(&source, context).await? {
            let (target, size) = (disk.target.to_string(), disk.size);
            let graph = image_tools::copy::graph(&restored.path)?;
            let disk = Source { target, size, graph, bounds: Bounds::of_disk(size) };
            context.until_interrupted(async { Ok(get.copy(&disk).await?) }).await?;
        }
        std::fs::remove_dir_all(&folder).map_err(ImageError::file("remove", folder))?;
    }
    let (machine, time) = (manifest.domain.to_string(), manifest.time);
    let origin = Origin::Snapshot(backup.id.to_string());
    let finish = async { Ok(get.finish(machine, time, origin, &files).await?) };
    Ok((context.until_interrupted(finish).await?, None))
}

// ---- domains ------------------------------------------------------------------------------------

async fn from_domain(
    wanted: &str,
    args: &GetArgs,
    context: &Context,
) -> Result<Kept, CommandError> {
    let choosing = async {
        let libvirt = Libvirt::connect(&context.global.connect).await?;
        let known = libvirt::domains(&libvirt).await?;
        Ok((choose(&known, &[wanted.to_owned()])?, libvirt))
    };
    let (chosen, libvirt) = context.until_interrupted(choosing).await?;
    let [known] = &chosen[..] else {
        let (wanted, known) = (wanted.to_owned(), chosen.into_iter().map(|d| d.name).collect());
        return Err(CommandError::ManyDomains { wanted, known });
    };
    let (run_dir, reach) = (&context.global.run_dir, overlays::reach(&libvirt, known));
    let _lock = context.until_interrupted(lock(run_dir, &reach)).await?;
    let is_active = async { Ok(libvirt.domain(&known.uuid).is_active().await?) };
    match context.until_interrupted(is_active).await? {
        true => from_running(&libvirt, known, args, context).await,
        false => {
            let work = from_shut_off(&libvirt, known, args, context);
            context.until_interrupted(work).await
        }
    }
}

async fn from_running(
    libvirt: &Libvirt,
    known: &KnownDomain,
    args: &GetArgs,
    context: &Context,
) -> Result<Kept, CommandError> {
    let (run_dir, journal) = (&context.global.run_dir, context.journal()?);
    let records = Records::open(&context.global.state_dir)?;
    let domain = LibvirtDomain::new(libvirt, &known.uuid, Places::default(), args.with_secrets);
    let reach = domain.reach();
    let name: DomainName = known.name.parse()?;
    let look = async {
        recover_earlier(&domain, &journal, run_dir).await?;
        let machine = discover(&domain, &name, args).await?;
        let files = domain.definition().await?;
        let layers = LibvirtLayers::new(libvirt.domain(&known.uuid)).await?;
        let held = overlays::records_of(libvirt, known, &records).await?;
        Ok((machine, files, layers, held.into_iter().next()))
    };
    let (machine, files, layers, held) = context.until_interrupted(look).await?;
    let mut get = args.begin(&known.name, context)?;
    let firmware = RefCell::new(None);
    let look = async || drop(firmware.replace(Some(domain.firmware().await)));
    let copy = async |held: &Held, chains: &[Chain]| {
        let disks = held.record().disks.iter().zip(chains);
        let is_wanted = |disk: &DiskName| machine.disks.iter().any(|known| known.target == *disk);
        for (disk, chain) in disks.filter(|(disk, _)| is_wanted(&disk.disk)) {
            get.copy(&source(&disk.disk, chain)).await?;
        }
        Ok(held.record().held.expect("its images hold still").time)
    };
    let held = match held {
        Some(held) => create::settle(&layers, &records, held).await?,
        None => None,
    };
    let (time, brought) = match held {
        // Somebody has them hold still already, and ends that.
        Some(held) => {
            let domain = name.clone();
            match held.record().purpose {
                Purpose::User => {}
                Purpose::Tracking => return Err(OverlayError::Tracked { domain }.into()),
                Purpose::Backup => return Err(OverlayError::NotStill { domain }.into()),
            }
            look().await;
            let work = read_still(&layers, &held, copy);
            (context.until_interrupted(work).await?, Ok(()))
        }
        None => {
            let request = Request {
                applications: context.config()?.domain(&known.name).applications(),
                purpose: Purpose::Backup,
                quiesce: args.quiesce,
                agent: domain.agent(),
                folder: args.overlays.overlay_dir.clone(),
                reserve: args.overlays.reserve.unwrap_or(files::RESERVE),
            };
            let hold = Hold {
                layers: &layers,
                records: &records,
                journal: &journal,
                run_dir,
                machine: &machine,
                domain: &name,
                reach: &reach,
                request: &request,
                budget: args.overlays.budget(),
                progress: &context.progress,
            };
            let end = async {
                tokio::select! {
                    danger = domain.danger() => danger.into(),
                    () = context.interrupted() => CommandError::Interrupted,
                }
            };
            hold.read(look, copy, end, || context.interrupted_anew()).await?
        }
    };
    let (firmware, unread) = firmware.take().unwrap_or_default();
    let files = [files, firmware].concat();
    let work = finish(get, known, time, (&files, &unread));
    Ok((context.until_interrupted(work).await?, brought.err()))
}

async fn from_shut_off(
    libvirt: &Libvirt,
    known: &KnownDomain,
    args: &GetArgs,
    context: &Context,
) -> Result<Kept, CommandError> {
    let run_dir = &context.global.run_dir;
    let domain = ShutOffDomain::new(libvirt.domain(&known.uuid), run_dir, args.with_secrets);
    recover_earlier(&domain, &context.journal()?, run_dir).await?;
    let name: DomainName = known.name.parse()?;
    let machine = discover(&domain, &name, args).await?;
    let _domain_lock = DomainLock::on_domain(run_dir, &name, &machine.uuid)?;
    let (disks, chains): (Vec<_>, Vec<_>) = domain.images().iter().cloned().unzip();
    offline::check_unused(&chains)?;
    let mut get = args.begin(&known.name, context)?;
    // In this order: a start that the question misses shows in the images.
    let (marks, time) = (offline::marks(&chains)?, Timestamp::now());
    domain.check_off().await?;
    let mut files = domain.definition().await?;
    let (firmware, unread) = domain.firmware().await;
    files.extend(firmware);
    let copy = async {
        for (disk, chain) in disks.iter().zip(&chains) {
            get.copy(&source(disk, chain)).await?;
        }
        Ok::<_, CommandError>(())
    };
    tokio::select! {
        copied = copy => copied?,
        danger = domain.danger() => return Err(danger.into()),
    }
    domain.check_off().await?;
    offline::confirm(disks.iter().zip(&chains), &marks)?;
    Ok((finish(get, known, time, (&files, &unread)).await?, None))
}

/// The disks that are asked for; what is left out is told.
async fn discover(
    domain: &impl Hypervisor,
    name: &DomainName,
    args: &GetArgs,
) -> Result<Machine, CommandError> {
    let choice = Choice { only: args.disk.clone(), excluded: Vec::new() };
    let machine = domain.discover(&choice).await?;
    plan::check_wanted(&machine, name, &args.disk)?;
    let is_asked_for = |left: &&Skipped| choice.leaves_out(&left.device).is_none();
    let missing: Vec<_> = machine.skipped.iter().filter(is_asked_for).cloned().collect();
    warn_of_missing(&missing);
    match machine.disks.is_empty() {
        true => Err(OverlayError::NoDisk { domain: name.clone() }.into()),
        false => Ok(machine),
    }
}

fn warn_of_missing(skipped: &[Skipped]) {
    for skipped in skipped.iter().filter(|skipped| skipped.is_disk) {
        tracing::warn!("disk `{}` will be missing: {}", skipped.device, skipped.reason);
    }
}

fn source(disk: &DiskName, chain: &Chain) -> Source {
    let (target, size) = (disk.to_string(), chain.header.size);
    Source { target, size, graph: node(&chain.images), bounds: Bounds::of_disk(size) }
}

async fn finish(
    get: Get<'_>,
    known: &KnownDomain,
    time: Timestamp,
    (files, unread): (&[MachineFile], &[String]),
) -> Result<Image, CommandError> {
    for words in unread {
        tracing::warn!("{words}");
    }
    let origin = Origin::Domain(known.uuid.clone());
    Ok(get.finish(known.name.clone(), time, origin, files).await?)
}

// ---- output -------------------------------------------------------------------------------------

fn print(image: &Image, context: &Context) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    if context.global.json {
        return context.print_json(&mut out, &ImageLine::new(image));
    }
    let record = image.record();
    let sum = |field: fn(&DiskFile) -> u64| human_bytes(record.disks.iter().map(field).sum());
    let (folder, count) = (printable(&image.folder().to_string_lossy()), record.disks.len());
    let disks = if count == 1 { "disk" } else { "disks" };
    let (size, stored) = (sum(|disk| disk.size), sum(|disk| disk.file_len));
    let from = origin(&record.origin);
    writeln!(out, "{folder}: {count} {disks} of {size} in {stored}, from {from}")?;
    Ok(())
}
