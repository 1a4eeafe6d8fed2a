//! Images at rest: what they are, what lies beneath them, and their dirty bitmaps, through `qemu-img`.
//!
//! No format is ever guessed: it comes from libvirt, or, beneath an image, from that image's header,
//! as QEMU takes it. Each image is opened with its graph spelled out, so that nothing which an image
//! names is opened unasked.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use serde::Deserialize;
use serde_json::{Value, json};

use super::place::Place;
use crate::effect;
use crate::hypervisor::{Bitmap, BitmapHealth, HypervisorError};

const TOOL: &str = "qemu-img";
/// How long `qemu-img` may take; it touches little more than headers.
const TOOL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long another `qemu-img` may hold an image: that of a run which was killed goes on to its end.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(50);
/// The longest chain; libvirt's own limit (`virDomainStorageSource`, 200 images).
const CHAIN_LEN_MAX: usize = 200;
/// The byte of an image that whoever writes to it holds locked, and the byte that whoever allows
/// nobody to write holds (QEMU's block/file-posix.c: `RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE`, and
/// bit 1 of the permissions).
const LOCK_WRITES: i64 = 101;
pub const LOCK_NO_WRITERS: i64 = 201;

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Where it lies.
    pub place: Place,
    /// Its format, in QEMU's words.
    pub format: String,
    /// The file or block device that holds its data, where that is another one.
    pub data_file: Option<PathBuf>,
}

/// What an image says of itself.
#[derive(Debug, Clone)]
pub struct Header {
    /// Size in bytes of the disk in it.
    pub size: u64,
    /// Its dirty bitmaps; `None` where it can keep none.
    pub bitmaps: Option<Vec<Bitmap>>,
    /// The image beneath it: where it is, and its format where it is told.
    pub backing: Option<(String, Option<String>)>,
    /// The file that holds its data, where that is another one.
    pub data_file: Option<String>,
    /// The names of its internal snapshots.
    pub snapshots: Vec<String>,
}

impl Header {
    /// An overlay that libvirt makes takes on the dirty bitmaps of the image that it goes above: each
    /// has counted only a part of the writes.
    fn see_beneath(&mut self, beneath: &Self) {
        for bitmap in self.bitmaps.iter_mut().flatten() {
            if beneath.bitmaps.iter().flatten().any(|other| other.name == bitmap.name) {
                bitmap.health = BitmapHealth::Partial;
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    full_backing_filename: Option<String>,
    backing_filename: Option<String>,
    backing_filename_format: Option<String>,
    format_specific: Option<FormatSpecific>,
    #[serde(default)]
    snapshots: Vec<InternalSnapshot>,
}

#[derive(Deserialize)]
struct InternalSnapshot {
    name: String,
}

#[derive(Deserialize)]
struct FormatSpecific {
    data: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2 {
    compat: String,
    #[serde(default)]
    bitmaps: Vec<Qcow2Bitmap>,
    data_file: Option<String>,
}

#[derive(Deserialize)]
struct Qcow2Bitmap {
    name: String,
    flags: Vec<String>,
}

/// How another process uses an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Not at all, or without minding us.
    None,
    /// It reads, and nobody may write: the image lies beneath the disk of a guest that runs.
    Reads,
    /// It writes.
    Writes,
}

impl Image {
    /// An image that is a file or block device of this host.
    pub fn local(path: impl Into<PathBuf>, format: impl Into<String>) -> Self {
        Self { place: Place::Local(path.into()), format: format.into(), data_file: None }
    }

    /// The file or block device of this host that it is.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Local(path) => Some(path),
            Place::Nbd(_) => None,
        }
    }

    /// All files and block devices of this host that hold a part of it.
    fn files(&self) -> impl Iterator<Item = &Path> {
        self.path().into_iter().chain(self.data_file.as_deref())
    }

    /// The image as a node of QEMU's block layer, above this one.
    fn node_above(&self, backing: &Value) -> Value {
        let file = self.place.node();
        let mut node = match self.format.as_str() {
            "raw" => json!({"driver": "raw", "file": file}),
            format => json!({"driver": format, "file": file, "backing": backing}),
        };
        if let Some(data) = &self.data_file {
            node["data-file"] = Place::Local(data.clone()).node();
        }
        node
    }

    /// The image alone, as `qemu-img` takes it.
    fn alone(&self) -> String {
        format!("json:{}", self.node_above(&Value::Null))
    }

    /// Reads its header. Changes nothing, and does not mind who uses it.
    ///
    /// # Errors
    /// [`HypervisorError::Tool`].
    pub async fn header(&self) -> Result<Header, HypervisorError> {
        let step = format!("read the header of {}", self.place);
        let arguments = ["info", "--output=json", "--force-share", &self.alone()];
        let text = qemu_img(&step, &arguments).await?;
        let info: Info = serde_json::from_slice(&text)
            .map_err(|source| HypervisorError::Reply { command: format!("{TOOL} info"), source })?;
        Ok(read_header(&self.format, info))
    }

    /// Begins a dirty bitmap.
    ///
    /// # Errors
    /// [`HypervisorError::ImageInUse`], [`HypervisorError::Tool`].
    pub async fn add_bitmap(&self, name: &str) -> Result<(), HypervisorError> {
        let step = format!("begin a dirty bitmap in {}", self.place);
        self.change(&step, &["bitmap", "--add", &self.alone(), name]).await
    }

    /// Removes a dirty bitmap, where the image has it.
    ///
    /// # Errors
    /// [`HypervisorError::ImageInUse`], [`HypervisorError::Tool`].
    pub async fn remove_bitmap(&self, name: &str) -> Result<(), HypervisorError> {
        let step = format!("remove a dirty bitmap from {}", self.place);
        let start = Instant::now();
        // A killed run may still be adding it.
        while self.used()? == Use::Writes && start.elapsed() < LOCK_TIMEOUT {
            tokio::time::sleep(LOCK_POLL).await;
        }
        let header = self.header().await?;
        if !header.bitmaps.iter().flatten().any(|bitmap| bitmap.name == name) {
            return Ok(());
        }
        let data_file = header.data_file.map(PathBuf::from);
        let whole = Self { data_file, ..self.clone() };
        self.change(&step, &["bitmap", "--remove", &whole.alone(), name]).await
    }

    async fn change(&self, step: &str, arguments: &[&str]) -> Result<(), HypervisorError> {
        let start = Instant::now();
        loop {
            effect::about_to(&format!("{TOOL}: {}", arguments[1]))
                .map_err(|source| HypervisorError::Host { step: step.to_owned(), source })?;
            match qemu_img(step, arguments).await {
                Ok(_) => return Ok(()),
                Err(HypervisorError::Tool { words, .. }) if is_lock(&words) => {}
                Err(error) => return Err(error),
            }
            if start.elapsed() > LOCK_TIMEOUT {
                return Err(HypervisorError::ImageInUse { image: self.place.to_string() });
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
    }

    /// Asks how other processes use the image, by the locks that QEMU takes. Takes none. What lies on
    /// the network has none.
    ///
    /// # Errors
    /// [`HypervisorError::Host`] when it cannot be opened for reading.
    pub fn used(&self) -> Result<Use, HypervisorError> {
        let mut used = Use::None;
        for path in self.files() {
            used = used.max(use_of(path).map_err(|source| cannot_look_at(path, source))?);
        }
        Ok(used)
    }

    /// What shows that somebody wrote to the image. Block devices are asked how often they were
    /// written to, and `top` ones also when anything about them changed, which happens to images
    /// beneath when another guest starts. What lies on the network does not show it.
    ///
    /// # Errors
    /// [`HypervisorError::Host`].
    pub fn mark(&self, is_top: bool) -> Result<Mark, HypervisorError> {
        let mark =
            |path: &Path| FileMark::of(path, is_top).map_err(|source| cannot_look_at(path, source));
        Ok(Mark { files: self.files().map(mark).collect::<Result<_, _>>()? })
    }
}

/// Whether the locks of an image tell who uses it: not every file system keeps any.
///
/// # Errors
/// The system's, when it cannot be opened for reading.
pub fn keeps_locks(path: &Path) -> io::Result<bool> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    Ok(is_locked(&file, LOCK_WRITES)?.is_some())
}

fn cannot_look_at(path: &Path, source: io::Error) -> HypervisorError {
    HypervisorError::Host { step: format!("look at the image {}", path.display()), source }
}

fn use_of(path: &Path) -> io::Result<Use> {
    let mut options = File::options();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    // A file system without locks has none.
    let is_locked = |byte| is_locked(&file, byte).map(|locked| locked == Some(true));
    Ok(match (is_locked(LOCK_WRITES)?, is_locked(LOCK_NO_WRITERS)?) {
        (true, _) => Use::Writes,
        (false, true) => Use::Reads,
        (false, false) => Use::None,
    })
}

/// An image as it was at one moment, as far as writes to it go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    files: Vec<FileMark>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct FileMark {
    inode: (u64, u64),
    len: u64,
    modified: Option<(i64, i64)>,
    changed: Option<(i64, i64)>,
    written: Option<[u64; 2]>,
}

impl FileMark {
    fn of(path: &Path, is_top: bool) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        let is_device = meta.file_type().is_block_device();
        Ok(Self {
            inode: (meta.dev(), meta.ino()),
            len: meta.len(),
            modified: (!is_device).then(|| (meta.mtime(), meta.mtime_nsec())),
            changed: (is_top && !is_device).then(|| (meta.ctime(), meta.ctime_nsec())),
            written: is_device.then(|| writes_to(meta.rdev())).transpose()?,
        })
    }
}

/// Finished writes and discards of a block device since it is there (the kernel's
/// Documentation/block/stat.rst).
fn writes_to(device: u64) -> io::Result<[u64; 2]> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"))?;
    let fields: Vec<u64> =
        text.split_ascii_whitespace().filter_map(|field| field.parse().ok()).collect();
    // Kernels before 4.18 count no discards.
    let writes = fields.get(4).ok_or(io::ErrorKind::InvalidData)?;
    Ok([*writes, fields.get(11).copied().unwrap_or(0)])
}

/// `None` where the file system keeps no locks.
fn is_locked(file: &File, byte: i64) -> io::Result<Option<bool>> {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) => Ok(Some(lock.l_type != libc::F_UNLCK as i16)),
        Err(nix::errno::Errno::ENOLCK | nix::errno::Errno::EOPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// QEMU's words for an image that another process has locked.
pub fn is_lock(words: &str) -> bool {
    words.contains("Failed to get") && words.contains("lock")
}

fn read_header(format: &str, info: Info) -> Header {
    let qcow2 = info.format_specific.filter(|_| format == "qcow2");
    let qcow2 = qcow2.and_then(|specific| serde_json::from_value::<Qcow2>(specific.data).ok());
    let data_file = qcow2.as_ref().and_then(|qcow2| qcow2.data_file.clone());
    let read = |bitmap: Qcow2Bitmap| {
        let has = |flag| bitmap.flags.iter().any(|known| known == flag);
        let health = match (has("in-use"), has("auto")) {
            (true, _) => BitmapHealth::Inconsistent,
            (false, true) => BitmapHealth::Good,
            (false, false) => BitmapHealth::NotRecording,
        };
        Bitmap { name: bitmap.name, health }
    };
    let keeps = |qcow2: &Qcow2| qcow2.compat != "0.10";
    let bitmaps = qcow2.filter(keeps).map(|qcow2| qcow2.bitmaps.into_iter().map(read).collect());
    let backing = info.full_backing_filename.or(info.backing_filename);
    let backing = backing.map(|path| (path, info.backing_filename_format));
    let snapshots = info.snapshots.into_iter().map(|snapshot| snapshot.name).collect();
    Header { size: info.virtual_size, bitmaps, backing, data_file, snapshots }
}

/// Why what lies beneath an image cannot be followed, in words.
pub type Reason = String;

/// The images of a disk.
#[derive(Debug, Clone)]
pub struct Chain {
    /// From the top down.
    pub images: Vec<Image>,
    /// What the top says of itself.
    pub header: Header,
}

/// Finds the images of a disk. `images` are those that the domain's description names, from the top
/// down; where that does not say whether anything lies beneath them (`goes_on`), their headers do.
///
/// # Errors
/// The outer one where `qemu-img` fails, the inner one where the chain leads where nothing is opened.
pub async fn chain(
    mut images: Vec<Image>,
    goes_on: bool,
) -> Result<Result<Chain, Reason>, HypervisorError> {
    let mut top: Option<Header> = None;
    let mut next = 0;
    while let Some(image) = images.get_mut(next) {
        let header = image.header().await?;
        let above = image.place.to_string();
        if let Some(data) = header.data_file.clone().map(PathBuf::from) {
            if !data.is_absolute() {
                let data = data.display();
                return Ok(Err(format!(
                    "where {above} keeps its data is not told in full: {data}"
                )));
            }
            image.data_file = Some(data);
        }
        next += 1;
        if let (Some((path, format)), true) = (&header.backing, goes_on && next == images.len()) {
            let Some(format) = format.clone() else {
                return Ok(Err(format!(
                    "{above} does not tell the format of the image beneath it"
                )));
            };
            let path = PathBuf::from(path);
            if !path.is_absolute() {
                let path = path.display();
                return Ok(Err(format!(
                    "what lies beneath {above} is no file of this host: {path}"
                )));
            }
            if next == CHAIN_LEN_MAX {
                return Ok(Err(format!("more than {CHAIN_LEN_MAX} images lie beneath each other")));
            }
            images.push(Image::local(path, format));
        }
        match &mut top {
            None => top = Some(header),
            Some(top) => top.see_beneath(&header),
        }
    }
    let header = top.expect("a disk has an image");
    Ok(Ok(Chain { images, header }))
}

/// A chain as `qemu-img` takes it.
pub fn stacked(chain: &[Image]) -> String {
    let above = |backing, image: &Image| image.node_above(&backing);
    format!("json:{}", chain.iter().rev().fold(Value::Null, above))
}

/// A chain as a read-only node of QEMU's block layer, which keeps nobody from using the images.
pub fn node(chain: &[Image]) -> Value {
    chain.iter().rev().fold(Value::Null, |backing, image| {
        let mut node = image.node_above(&backing);
        node["read-only"] = true.into();
        node["force-share"] = true.into();
        node
    })
}

/// Runs `qemu-img` and returns its output. What it has begun it ends, whatever becomes of us: stopped in
/// between it would leave the image's bitmaps unusable.
async fn qemu_img(step: &str, arguments: &[&str]) -> Result<Vec<u8>, HypervisorError> {
    qemu_img_within(step, arguments, TOOL_TIMEOUT).await
}

/// The same with a deadline of its own.
///
/// # Errors
/// [`HypervisorError::Tool`], [`HypervisorError::StillInUse`].
pub async fn qemu_img_within(
    step: &str,
    arguments: &[&str],
    waited: Duration,
) -> Result<Vec<u8>, HypervisorError> {
    let host = |source| HypervisorError::Host { step: step.to_owned(), source };
    let mut command = tokio::process::Command::new(TOOL);
    command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).process_group(0);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let running = command.spawn().map_err(host)?.wait_with_output();
    let output = tokio::time::timeout(waited, running).await.map_err(|_| {
        HypervisorError::StillInUse { what: format!("{TOOL}, asked to {step},"), waited }
    })?;
    let output = output.map_err(host)?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(HypervisorError::Tool {
            tool: TOOL,
            step: step.to_owned(),
            words: words(TOOL, &output.stderr),
        }),
    }
}

/// What a tool said, without its name.
pub fn words(tool: &str, stderr: &[u8]) -> String {
    const LEN_MAX: usize = 1000;
    let text = String::from_utf8_lossy(stderr);
    let text = text.trim();
    let text = text.strip_prefix(tool).and_then(|text| text.strip_prefix(": ")).unwrap_or(text);
    text.chars().take(LEN_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(format: &str, specific: &Value) -> Header {
        let info = json!({
            "virtual-size": 1 << 20, "format": format, "backing-filename": "base",
            "full-backing-filename": "/images/base", "backing-filename-format": "raw",
            "format-specific": {"type": format, "data": specific},
        });
        read_header(format, serde_json::from_value(info).unwrap())
    }

    fn qcow2(compat: &str) -> Header {
        let bitmap = |name: &str, flags: &[&str]| json!({"name": name, "flags": flags});
        let bitmaps =
            [bitmap("good", &["auto"]), bitmap("broken", &["in-use", "auto"]), bitmap("off", &[])];
        header("qcow2", &json!({"compat": compat, "bitmaps": bitmaps}))
    }

    fn health(header: &Header) -> Vec<BitmapHealth> {
        header.bitmaps.iter().flatten().map(|bitmap| bitmap.health).collect()
    }

    #[test]
    fn r03_the_flags_of_a_bitmap_tell_what_it_is_worth() {
        use BitmapHealth::{Good, Inconsistent, NotRecording};
        assert_eq!(health(&qcow2("1.1")), [Good, Inconsistent, NotRecording]);
        assert!(qcow2("0.10").bitmaps.is_none());
        assert!(header("vmdk", &json!({})).bitmaps.is_none());
    }

    #[test]
    fn p1_a_bitmap_that_an_image_beneath_has_too_counts_only_a_part() {
        use BitmapHealth::{Good, Partial};
        let mut top = qcow2("1.1");
        top.bitmaps.as_mut().unwrap().truncate(1);
        top.see_beneath(&header("qcow2", &json!({"compat": "1.1"})));
        assert_eq!(health(&top), [Good]);
        top.see_beneath(&qcow2("1.1"));
        assert_eq!(health(&top), [Partial]);
    }

    #[test]
    fn nothing_of_a_chain_is_left_for_qemu_to_find_out() {
        let image = |path: &str, format: &str| Image::local(path, format);
        let file = |path: &str| json!({"driver": "file", "filename": path});
        let expected = json!({
            "driver": "qcow2", "file": file("/a,b"), "read-only": true, "force-share": true,
            "backing": {"driver": "raw", "file": file("/c"), "read-only": true, "force-share": true},
        });
        assert_eq!(node(&[image("/a,b", "qcow2"), image("/c", "raw")]), expected);
        let data = Image { data_file: Some("/d".into()), ..image("/a", "qcow2") };
        assert_eq!(node(&[data])["data-file"], file("/d"));
        let alone = image("/c", "qcow2").alone();
        assert!(alone.starts_with("json:{") && alone.contains("\"backing\":null"), "{alone}");
    }

    #[test]
    fn a_file_that_is_written_to_is_told_from_one_that_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let image = Image::local(file.path(), "raw");
        let before = image.mark(true).unwrap();
        assert_eq!(image.mark(true).unwrap(), before);
        file.as_file().set_len(1).unwrap();
        assert_ne!(image.mark(true).unwrap(), before);
        assert_eq!(image.used().unwrap(), Use::None);
    }

    #[test]
    fn what_a_tool_says_is_taken_without_its_name() {
        let locked = b"qemu-img: Could not open 'a': Failed to get \"write\" lock\nIs another\n";
        let words = words("qemu-img", locked);
        assert!(words.starts_with("Could not open") && words.ends_with("another"), "{words}");
        assert!(is_lock(&words) && !is_lock("Failed to find a block"));
    }
}
