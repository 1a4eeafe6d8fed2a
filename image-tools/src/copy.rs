//! A copy of a disk as one stand-alone qcow2 image, compressed and sparse, compared with its source.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::ImageError;
use crate::inspect::{self, Format, Policy};
use crate::record::DiskFile;
use crate::sums;
use crate::tool::{self, Limits};

const TOOL: &str = "qemu-img";

/// What a copy may take: an image can ask for more than is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of data that are read.
    pub data: u64,
    /// Bytes of the file that the copy becomes.
    pub file_len: u64,
}

impl Bounds {
    /// Those of a disk of so many bytes, whatever is on it.
    pub fn of_disk(size: u64) -> Self {
        // The tables take less than 1 in 64; what cannot be compressed is kept as it is.
        Self { data: size, file_len: size.saturating_add(size / 64).saturating_add(4 << 20) }
    }
}

/// A stand-alone qcow2 image as a read-only node of QEMU's block layer.
///
/// # Errors
/// [`ImageError::NotUtf8`], [`ImageError::File`].
pub fn graph(image: &Path) -> Result<Value, ImageError> {
    let path = image.canonicalize().map_err(ImageError::file("find", image))?;
    let Some(name) = path.to_str() else { return Err(ImageError::NotUtf8 { path }) };
    let file = json!({"driver": "file", "filename": name});
    Ok(json!({"driver": "qcow2", "file": file, "backing": null, "read-only": true}))
}

/// Makes an empty overlay on a stand-alone qcow2 image, for what is written to it from here on.
///
/// # Errors
/// [`ImageError`].
pub async fn lay_over(base: &Path, size: u64, to: &Path) -> Result<(), ImageError> {
    let base = base.canonicalize().map_err(ImageError::file("find", base))?;
    let to = std::path::absolute(to).map_err(ImageError::file("find", to))?;
    let step = format!("make the overlay {}", to.display());
    let mut arguments =
        ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"].map(Into::into).to_vec();
    arguments.extend([base.into_os_string(), to.clone().into_os_string()]);
    let limits = Limits::writing(0, Bounds::of_disk(size).file_len);
    tool::succeed(TOOL, &step, &arguments, &limits, None).await?;
    fs::set_permissions(&to, Permissions::from_mode(0o600))
        .map_err(ImageError::file("change the mode of", to))
}

/// An overlay and the image beneath it as a read-only node of QEMU's block layer.
///
/// # Errors
/// As [`graph`].
pub fn graph_over(overlay: &Path, base: &Path) -> Result<Value, ImageError> {
    let mut node = graph(overlay)?;
    node["backing"] = graph(base)?;
    Ok(node)
}

/// Writes what is in an overlay into the image beneath it. It may be done again after it was interrupted.
///
/// # Errors
/// [`ImageError::Tool`]; the image is neither old nor new then.
pub async fn write_back(
    overlay: &Path,
    base: &Path,
    size: u64,
    progress: &mut dyn FnMut(f64),
) -> Result<(), ImageError> {
    let step = format!("write the changes into {}", base.display());
    let mut node = graph_over(overlay, base)?;
    node["read-only"] = false.into();
    // -d: the overlay is not emptied, so that this can be done again.
    let arguments = ["commit".into(), "-p".into(), "-d".into(), tool::named(&node)];
    let limits = Limits::writing(size, Bounds::of_disk(size).file_len);
    tool::succeed(TOOL, &step, &arguments, &limits, Some(progress)).await?;
    Ok(())
}

/// Copies the disk that a read-only node shows to a new file in a folder of ours. `progress`
/// gets the percentage that is done.
///
/// # Errors
/// [`ImageError::Tool`]; what of the file there is, is worth nothing.
pub async fn copy(
    source: &Value,
    bounds: Bounds,
    to: &Path,
    progress: &mut dyn FnMut(f64),
) -> Result<(), ImageError> {
    let to = std::path::absolute(to).map_err(ImageError::file("find", to))?;
    let step = format!("copy the disk to {}", to.display());
    let mut arguments = ["convert", "-p", "-c", "-O", "qcow2", "-o", "compression_type=zstd"]
        .map(Into::into)
        .to_vec();
    // An absolute path is taken for neither an option nor a protocol.
    arguments.extend([tool::named(source), to.clone().into_os_string()]);
    let limits = Limits::writing(bounds.data, bounds.file_len);
    tool::succeed(TOOL, &step, &arguments, &limits, Some(progress)).await?;
    fs::set_permissions(&to, Permissions::from_mode(0o600))
        .map_err(ImageError::file("change the mode of", to))
}

/// Makes sure that a copy shows what its source does, byte for byte.
///
/// # Errors
/// [`ImageError::Differs`], [`ImageError::Tool`].
pub async fn compare(
    source: &Value,
    bounds: Bounds,
    copy: &Path,
    progress: &mut dyn FnMut(f64),
) -> Result<(), ImageError> {
    let step = format!("compare {} with its source", copy.display());
    let images = [tool::named(source), tool::named(&graph(copy)?)];
    let mut arguments = vec!["compare".into(), "-p".into()];
    arguments.extend(images);
    let limits = Limits::reading(bounds.data);
    let output = tool::run(TOOL, &step, &arguments, &limits, Some(progress)).await?;
    match output.code {
        0 => Ok(()),
        // It says so on standard output, beside its progress.
        1 => Err(ImageError::Differs { copy: copy.to_owned() }),
        _ => Err(output.failed(TOOL, &step).into()),
    }
}

/// Makes a finished image durable, and its entry in a record. Reads all of it; `progress` gets the bytes that
/// were read each time.
///
/// # Errors
/// [`ImageError`].
pub fn seal(image: &Path, target: &str, progress: impl FnMut(u64)) -> Result<DiskFile, ImageError> {
    // QEMU counts a disk in sectors: one whose size is none of them grew by a part of one.
    let size = inspect::inspect(image, Format::Qcow2, &Policy::default())?.size;
    let file = File::open(image).map_err(ImageError::file("read", image))?;
    file.sync_all().map_err(ImageError::file("make durable", image))?;
    let file_len = file.metadata().map_err(ImageError::file("look at", image))?.len();
    let sums = sums::make(file, file_len, progress).map_err(ImageError::file("read", image))?;
    let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(DiskFile { target: target.to_owned(), file: name, size, file_len, sums })
}

/// What `qemu-img check` says of an image's tables: how many are wrong, and how many clusters are lost.
///
/// # Errors
/// [`ImageError::Tool`] where it cannot tell.
pub async fn check_tables(image: &Path, bounds: Bounds) -> Result<Tables, ImageError> {
    let step = format!("check the tables of {}", image.display());
    let arguments = ["check".into(), "--output=json".into(), tool::named(&graph(image)?)];
    let output = tool::run(TOOL, &step, &arguments, &Limits::reading(bounds.data), None).await?;
    let count = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64).unwrap_or(0);
    // 2: errors, 3: lost clusters (qemu-img(1)).
    match (output.code, serde_json::from_slice::<Value>(&output.stdout)) {
        (0 | 2 | 3, Ok(told)) => Ok(Tables {
            wrong: count(&told, "corruptions") + count(&told, "check-errors"),
            lost: count(&told, "leaks"),
        }),
        _ => Err(output.failed(TOOL, &step).into()),
    }
}

/// What is wrong with an image's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tables {
    /// Entries that are wrong or cannot be read.
    pub wrong: u64,
    /// Clusters that are counted and not used, which does no harm.
    pub lost: u64,
}
