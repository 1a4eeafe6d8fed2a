//! A template becomes the image of another machine of its flavour, by the files of that machine.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use image_tools::ImageError;
use image_tools::appliance::Options;
use image_tools::check;
use image_tools::copy::{self, Bounds};
use image_tools::flavour::Flavour;
use image_tools::folder::Image;
use image_tools::inspect::{Format, Policy, inspect};
use image_tools::record::Origin;
use image_tools::rsync::{Change, Compare, Item, Tree};
use image_tools::update::{self, Event, Report, UpdateError};
use jiff::Timestamp;

use super::get::{About, Get, Source, announce};
use crate::capture::room::room;
use crate::progress::{Progress, human_bytes};

/// What differed, file by file, in the folder of the image.
pub const CHANGES: &str = "changes.log";

/// How often is looked whether there is room left.
const ROOM_POLL: Duration = Duration::from_millis(50);
/// Bytes that are left free where temporary files are: no guest has its images there.
const TEMPORARY_KEPT: u64 = 32 << 20;

/// What is wanted.
#[derive(Debug)]
pub struct Wanted {
    /// The machine's files.
    pub tree: Tree,
    /// The tree as the user named it.
    pub tree_name: String,
    /// How files are compared; by what is in them unless the image already is this machine's.
    pub compare: Option<Compare>,
    /// What stays as the template has it.
    pub excludes: Vec<String>,
    /// What the machine is called, where the user says so.
    pub machine: Option<String>,
    /// How the appliance runs.
    pub appliance: Options,
}

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateImageError {
    /// Images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A template stays as it is.
    #[error("{} is a template, not an image that was made from one", .folder.display())]
    Template {
        /// Its folder.
        folder: PathBuf,
    },
    /// Its disks are being written, and that was not finished: it has no name meanwhile.
    #[error("the image {} is half written", .folder.display())]
    Unfinished {
        /// Where it belongs.
        folder: PathBuf,
        /// Why.
        source: ImageError,
    },
    /// Their file systems.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

impl UpdateImageError {
    /// What the operator can do next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unfinished { .. } => {
                Some("nothing is lost: mend the cause, and the same command finishes it first")
            }
            Self::Template { .. } => Some("--output says which folder becomes the image"),
            Self::Update(UpdateError::Misfit(_)) => {
                Some("`kvmsnap image match --tree TREE STORE` finds the templates that fit")
            }
            Self::Update(UpdateError::TreeChanged(_)) => {
                Some("nothing was kept: wait until nobody writes to the tree, then try again")
            }
            Self::Update(UpdateError::Full(_)) => Some(
                "a changed file needs its room twice while it is copied: take a template with larger file systems, or leave something out with --exclude",
            ),
            Self::Update(UpdateError::Appliance(error)) => error.hint(),
            _ => None,
        }
    }
}

impl From<io::Error> for UpdateImageError {
    fn from(source: io::Error) -> Self {
        Self::Image(ImageError::file("write", CHANGES)(source))
    }
}

/// What was done.
#[derive(Debug)]
pub struct Updated {
    /// The image.
    pub image: Image,
    /// What differed.
    pub report: Report,
    /// Bytes that were written to the machine's disks.
    pub written: u64,
}

/// Makes an image at `output` from a template, which stays as it is.
///
/// # Errors
/// [`UpdateImageError`]; nothing has the name then.
pub async fn make(
    template: &Image,
    output: &Path,
    wanted: &Wanted,
    progress: &Progress,
) -> Result<Updated, UpdateImageError> {
    let name = output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let store = output.parent().unwrap_or(Path::new(""));
    let mut get = Get::begin(store, &name, progress)?;
    let overlays = get.folder().join("overlays");
    fs::create_dir(&overlays).map_err(ImageError::file("make", &overlays))?;
    let log = get.folder().join(CHANGES);
    check_sound(template, progress).await?;
    let layers = lay_over(template, &overlays).await?;
    let (report, flavour) = bring_up_to_date(&layers, template, wanted, &log, progress).await?;
    let written = allocated(&layers)?;
    for (layer, disk) in layers.iter().zip(&template.record().disks) {
        let graph = copy::graph_over(&layer.overlay, &layer.base)?;
        let (target, size) = (disk.target.clone(), disk.size);
        get.copy(&Source { target, size, graph, bounds: Bounds::of_disk(size) }).await?;
    }
    announce("update: sweep", "remove", &overlays)?;
    fs::remove_dir_all(&overlays).map_err(ImageError::file("remove", &overlays))?;
    let mut files = Vec::new();
    for other in &template.record().files {
        let path = template.folder().join(&other.file);
        let content = fs::read(&path).map_err(ImageError::file("read", path))?;
        files.push((other.file.clone(), content));
    }
    let about = About {
        machine: machine(wanted, &report, &name),
        time: Timestamp::now(),
        origin: origin(template, wanted),
        flavour: Some(flavour),
        files,
    };
    Ok(Updated { image: get.publish(about).await?, report, written })
}

/// One disk of an image, and what is written to it.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) base: PathBuf,
    pub(super) overlay: PathBuf,
}

/// Reads all of an image: what is damaged in it would get checksums that say it is not.
pub(super) async fn check_sound(image: &Image, progress: &Progress) -> Result<(), ImageError> {
    let len = image.record().disks.iter().map(|disk| disk.file_len).sum();
    progress.bytes("checking the image", len);
    let progress = progress.clone();
    check::all_sound(image, move |bytes| progress.read(bytes)).await
}

/// Makes an overlay in `folder` on each disk.
pub(super) async fn lay_over(
    template: &Image,
    folder: &Path,
) -> Result<Vec<Layer>, UpdateImageError> {
    let mut layers = Vec::new();
    for disk in &template.record().disks {
        let base = template.record().disk_path(template.folder(), disk);
        // It may come from outside: what it names must not be opened.
        inspect(&base, Format::Qcow2, &Policy::default())?;
        let overlay = folder.join(&disk.file);
        announce("update: overlay", "make", &overlay)?;
        copy::lay_over(&base, disk.size, &overlay).await?;
        layers.push(Layer { base, overlay });
    }
    Ok(layers)
}

/// Bytes that the overlays hold.
pub(super) fn allocated(layers: &[Layer]) -> Result<u64, ImageError> {
    use std::os::unix::fs::MetadataExt as _;
    let of = |layer: &Layer| {
        let metadata = fs::metadata(&layer.overlay);
        metadata
            .map(|found| found.blocks() * 512)
            .map_err(ImageError::file("look at", &layer.overlay))
    };
    layers.iter().map(of).sum()
}

/// Makes what the layers show equal to the tree.
pub(super) async fn bring_up_to_date(
    layers: &[Layer],
    template: &Image,
    wanted: &Wanted,
    log: &Path,
    progress: &Progress,
) -> Result<(Report, Flavour), UpdateImageError> {
    let record = template.record();
    let made_from = match &record.origin {
        Origin::Update { tree, .. } => Some(tree),
        _ => None,
    };
    let request = update::Request {
        drives: layers.iter().map(|layer| layer.overlay.clone()).collect(),
        tree: wanted.tree.clone(),
        compare: wanted.compare,
        excludes: wanted.excludes.clone(),
        made_as: made_from.map(|_| record.machine.clone()),
        is_same_tree: made_from == Some(&wanted.tree_name),
        appliance: wanted.appliance.clone(),
    };
    announce("update: files", "write", log)?;
    let file = File::create_new(log).map_err(ImageError::file("make", log))?;
    let mut changes = BufWriter::new(file);
    let (mut stage, mut count, mut sent, mut shown) = ("", 0_u64, 0, 0);
    let mut failed = None;
    let work = update::update(&request, |event| {
        match event {
            Event::Stage(now) => {
                stage = now;
                progress.phase(now);
            }
            Event::Item(item) => {
                count += 1;
                failed = failed.take().or(write_line(&mut changes, item).err());
            }
            Event::Sent(bytes) => sent = bytes,
        }
        // Often enough to see that it goes on, seldom enough for a log.
        if sent - shown >= 64 << 20 {
            shown = sent;
            progress.phase(&format!("{stage}: {count} differ, {} exchanged", human_bytes(sent)));
        }
    });
    let folder = log.parent().expect("it is in the image's folder");
    let outcome = while_there_is_room(Some(folder), work).await?;
    match failed.map_or_else(|| changes.flush(), Err) {
        Ok(()) => Ok(outcome),
        Err(error) => Err(error.into()),
    }
}

/// Does work in an appliance, until there is no more room where its disks grow: in `folder`, or among temporary
/// files.
pub(super) async fn while_there_is_room<T>(
    folder: Option<&Path>,
    work: impl Future<Output = Result<T, UpdateError>>,
) -> Result<T, UpdateImageError> {
    let beside = async {
        match folder {
            Some(folder) => room_ends(folder, u64::MAX).await,
            None => std::future::pending().await,
        }
    };
    // There the appliance has its own disk.
    let temporary = std::env::temp_dir();
    tokio::select! {
        outcome = work => Ok(outcome?),
        error = beside => Err(error.into()),
        error = room_ends(&temporary, TEMPORARY_KEPT) => Err(error.into()),
    }
}

/// Ready when a disk in a folder could soon grow no more, where QEMU would stop the appliance and wait, or at
/// `kept_max` bytes at the latest.
async fn room_ends(folder: &Path, kept_max: u64) -> ImageError {
    let full = |source: io::Error| ImageError::file("write to", folder)(source);
    let file = match File::open(folder) {
        Ok(file) => file,
        Err(error) => return full(error),
    };
    loop {
        if room(&file).is_some_and(|(free, kept)| free < kept.min(kept_max)) {
            return full(io::ErrorKind::StorageFull.into());
        }
        tokio::time::sleep(ROOM_POLL).await;
    }
}

fn write_line(to: &mut impl io::Write, item: &Item) -> io::Result<()> {
    let change = match item.change {
        Change::Added => "added",
        Change::Content => "changed",
        Change::Metadata => "attributes",
        Change::Deleted => "deleted",
    };
    writeln!(to, "{change}\t{}", item.path)
}

/// What the machine is called.
pub(super) fn machine(wanted: &Wanted, report: &Report, otherwise: &str) -> String {
    let told = wanted.machine.clone().or_else(|| report.hostname.clone());
    told.unwrap_or_else(|| otherwise.to_owned())
}

/// Where the image comes from.
pub(super) fn origin(template: &Image, wanted: &Wanted) -> Origin {
    let template = match &template.record().origin {
        // What was made from a template and is brought up to date again still comes from it.
        Origin::Update { template, .. } => template.clone(),
        _ => template.folder().to_owned(),
    };
    Origin::Update { template, tree: wanted.tree_name.clone() }
}
