//! `kvmsnap image deploy`

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use image_tools::folder::Image;

use super::Context;
use crate::cli::restore::define::{SEARCHABLE, print_domain, print_plan, random_uuid};
use crate::error::CommandError;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::image::deploy::{Deploy, DeployError};
use crate::names::DomainName;
use crate::restore::plan::{self, Place, Plan, Wanted};
use crate::restore::{Format, RestoreError, Stop, define, host};
use crate::store::blocking;

/// Make an image a machine of this host: copy its disks to where they belong, and define it in libvirt
///
/// Without --to or --pool the disks go where the machine's description says. Nothing is written over. It
/// gets a new uuid and new MAC addresses unless told otherwise.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap image deploy /srv/images/web --keep-identity --start
  kvmsnap image deploy /srv/images/web --name web-2 --to /var/lib/libvirt/images/web-2
  kvmsnap image deploy /srv/images/web --pool default --dry-run")]
pub struct DeployArgs {
    /// The image's folder
    image: PathBuf,
    /// Another name for the machine
    #[arg(long, value_name = "NAME")]
    name: Option<DomainName>,
    /// Keep its uuid and MAC addresses, where no domain here has them
    #[arg(long)]
    keep_identity: bool,
    /// The folder for its disks
    #[arg(long, value_name = "FOLDER", conflicts_with = "pool")]
    to: Option<PathBuf>,
    /// A storage pool of libvirt for its disks, of the type dir
    #[arg(long, value_name = "POOL")]
    pool: Option<String>,
    /// Another description of the machine than the image's, as libvirt's XML
    #[arg(long, value_name = "FILE")]
    xml: Option<PathBuf>,
    /// Start it
    #[arg(long)]
    start: bool,
    /// Show what would be done
    #[arg(long)]
    dry_run: bool,
}

/// Runs it.
///
/// # Errors
/// [`DeployError`].
pub async fn run(args: DeployArgs, context: &Context) -> Result<(), CommandError> {
    let prepared = context.until_interrupted(async { Ok(prepare(&args, context).await?) }).await?;
    let Prepared { deploy, libvirt, place, plan } = prepared;
    print_plan(&plan, args.dry_run, context)?;
    if args.dry_run {
        return Ok(());
    }
    let (stop, progress) = (Stop::default(), context.progress.clone());
    let stopper = stop.clone();
    let work = {
        let place = place.clone();
        blocking(move || {
            let copied = deploy.copy(&place, SEARCHABLE, &progress, &stop);
            copied.map(|named| (deploy, named))
        })
    };
    tokio::pin!(work);
    let copied = tokio::select! {
        copied = &mut work => copied,
        () = context.interrupted() => {
            stopper.stop();
            // It ends between two parts and removes what it wrote.
            work.await.and(Err(RestoreError::Interrupted.into()))
        }
    };
    context.progress.finish();
    let (deploy, named) = copied?;
    let mut out = std::io::stdout().lock();
    for (disk, (path, _)) in deploy.disks.iter().zip(&named) {
        if context.global.json {
            let line = serde_json::json!({"target": disk, "path": path, "deployed": true});
            context.print_json(&mut out, &line)?;
        } else {
            writeln!(out, "{disk}: copied to {}", path.display())?;
        }
    }
    drop(out);
    // From here on each step is short, and none is left half done.
    let contents = deploy.contents(&plan);
    let defined = define::define(&libvirt, &plan, &place, contents, &deploy.networks).await;
    // From here on the disks have an owner, or are left to the user.
    drop(named);
    defined.map_err(DeployError::from)?;
    print_domain(&plan, "defined", context)?;
    if let Some(pool) = &args.pool {
        define::refresh_pool(&libvirt, pool).await?;
    }
    if args.start {
        define::start(&libvirt, &plan).await.map_err(DeployError::from)?;
        print_domain(&plan, "started", context)?;
    }
    Ok(())
}

/// An image that can be deployed, and how.
struct Prepared {
    deploy: Deploy,
    libvirt: Libvirt,
    place: Place,
    plan: Plan,
}

async fn prepare(args: &DeployArgs, context: &Context) -> Result<Prepared, DeployError> {
    let (folder, xml) = (args.image.clone(), args.xml.clone());
    let mut deploy = blocking(move || Deploy::read(&Image::open(&folder)?, xml.as_deref())).await?;
    let libvirt =
        Libvirt::connect(&context.global.connect).await.map_err(define::DefineError::from)?;
    let name = args.name.clone().map_or_else(|| deploy.name(), Ok)?;
    let place = match (&args.to, &args.pool) {
        (Some(folder), _) => {
            // A domain's description has whole paths.
            let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
            Place::new(folder, String::new())
        }
        (None, Some(pool)) => {
            let folder = define::pool_folder(&libvirt, pool).await?;
            Place::new(folder, format!("{name}-"))
        }
        (None, None) => deploy.places(&name)?,
    };
    let looked = host::look(&libvirt, &deploy.domain).await.map_err(define::DefineError::from)?;
    let wanted = Wanted {
        name: Some(&name),
        keep_identity: args.keep_identity,
        start: args.start,
        place: &place,
        format: Format::Qcow2,
        disks: &deploy.disks,
        files: &deploy.files,
        networks: &deploy.networks,
        uuid: &random_uuid(),
        generation: &random_uuid(),
    };
    let plan = plan::plan(deploy.domain.clone(), &looked, &wanted)?;
    deploy.used = looked.domains.iter().flat_map(|domain| domain.images.clone()).collect();
    define::check(&plan, &looked, &place, |copy| deploy.is_left(copy, &place))?;
    deploy.targets(&place)?;
    Ok(Prepared { deploy, libvirt, place, plan })
}
