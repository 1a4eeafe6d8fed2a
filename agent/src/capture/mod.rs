//! Points in time. Every method ends in one NBD server with one export for each disk, and in a
//! `release` that asks what exists and removes exactly that.

pub mod filter;
pub mod image;
pub mod job;
pub mod libvirt_job;
pub mod lvm;
pub mod offline;
pub mod overlay;
pub mod place;
pub mod room;
pub mod suspend;
pub mod write_back;

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use crate::hypervisor::monitor::{Monitor, Step};
use crate::hypervisor::{Care, Disk, Export, Exports, HypervisorError};
use crate::journal::{DiskRecord, Record, Recorded};
use crate::names::RunId;

/// Prefix of every node, export and job that a run makes; QEMU allows 31 bytes for a node-name.
pub fn node_name(run: &RunId, role: char, index: usize) -> String {
    format!("kvmsnap-{run}-{role}{index}")
}

/// A scratch file without a name: it can neither be left behind nor be opened by anybody else.
///
/// # Errors
/// [`HypervisorError::Host`] when the folder takes no file.
fn scratch_file(folder: &Path, disk: &Disk, len: u64) -> Result<File, HypervisorError> {
    let host = |source| HypervisorError::Host {
        step: format!("make a scratch file for `{}` in {}", disk.target, folder.display()),
        source,
    };
    crate::effect::about_to("scratch: create").map_err(host)?;
    let file = tempfile::tempfile_in(folder).map_err(host)?;
    file.set_len(len).map_err(host)?;
    Ok(file)
}

/// Where scratch goes that has no place beside an image; `/tmp` is often in the host's memory.
const SCRATCH_FOLDER: &str = "/var/tmp";

/// Where the scratch of a disk goes: the configured folder, else beside the image.
fn scratch_folder<'a>(configured: Option<&'a Path>, disk: &'a Disk) -> &'a Path {
    let beside = || disk.image.as_deref().and_then(place::beside);
    configured.or_else(beside).unwrap_or(Path::new(SCRATCH_FOLDER))
}

/// Adds a `file` node on an open file.
async fn add_file_node(
    monitor: &Monitor,
    record: &Record,
    node: &str,
    file: File,
) -> Result<(), HypervisorError> {
    let tag = record.run.as_str();
    let passed = monitor.pass_file(OwnedFd::from(file), tag).await?;
    let arguments = json!({
        "driver": "file", "node-name": node, "filename": passed.filename(), "discard": "unmap",
    });
    monitor.run(Step::new("add the scratch node", "blockdev-add", arguments)).await?;
    monitor.forget_files(tag).await
}

/// Begins the new dirty bitmaps. Before the point in time is as good as at it: what is written in
/// between is read once more by the next backup.
async fn add_new_bitmaps(monitor: &Monitor, record: &Record) -> Result<(), HypervisorError> {
    for disk in &record.disks {
        if let Some(bitmap) = &disk.bitmap_new {
            let what = format!("begin a dirty bitmap on `{}`", disk.disk);
            let arguments = json!({"node": disk.format, "name": bitmap, "persistent": true});
            monitor.run(Step::new(what, "block-dirty-bitmap-add", arguments)).await?;
        }
    }
    Ok(())
}

/// Copies each old bitmap into a disabled one, as only a disabled one can be exported. After the
/// point in time is as good as at it: what was written since is read as it was then.
async fn add_export_bitmaps(monitor: &Monitor, record: &Record) -> Result<(), HypervisorError> {
    for disk in &record.disks {
        let (Some(old), Some(export)) = (&disk.bitmap_old, &disk.bitmap_export) else { continue };
        let node = &disk.format;
        let what = format!("copy the dirty bitmap of `{}`", disk.disk);
        let actions = json!({"actions": [
            {"type": "block-dirty-bitmap-add",
             "data": {"node": node, "name": export, "disabled": true}},
            {"type": "block-dirty-bitmap-merge",
             "data": {"node": node, "target": export, "bitmaps": [old]}},
        ]});
        monitor.run(Step::new(what, "transaction", actions)).await?;
    }
    Ok(())
}

/// Questions to QEMU, each at least one round of its main loop: accept, notice the end, and one more.
const SETTLE_ROUNDS: usize = 3;
/// Name of the NBD server's socket in its folder.
const SOCKET: &str = "nbd.sock";

/// The folder of a run's socket.
fn socket_folder(run_dir: &Path, run: &RunId) -> PathBuf {
    run_dir.join(run.as_str())
}

/// QEMU's name of the NBD socket while it is passed; one that begins with a digit is refused.
fn descriptor_name(run: &RunId) -> String {
    format!("kvmsnap-{run}")
}

/// Starts QEMU's NBD server on a socket that this process makes, so that QEMU's user needs no rights.
async fn start_server(
    monitor: &Monitor,
    record: &Record,
    run_dir: &Path,
) -> Result<PathBuf, HypervisorError> {
    let folder = socket_folder(run_dir, &record.run);
    let socket = folder.join(SOCKET);
    let host = |source: io::Error| HypervisorError::Host {
        step: format!("make the socket {}", socket.display()),
        source,
    };
    crate::effect::about_to("socket: create").map_err(host)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(host)?;
    let listener = UnixListener::bind(&socket).map_err(host)?;
    let name = descriptor_name(&record.run);
    let step = Step::new("take the NBD socket", "getfd", json!({"fdname": name}));
    monitor.run(step.with_fd(OwnedFd::from(listener))).await?;
    let address = json!({"addr": {"type": "fd", "data": {"str": name}}});
    monitor.run(Step::new("start its NBD server", "nbd-server-start", address)).await?;
    Ok(socket)
}

/// Exports one node for each disk.
async fn add_exports(
    monitor: &Monitor,
    recorded: &Recorded,
    run_dir: &Path,
    writable: bool,
    care: impl Fn(usize) -> Care,
) -> Result<Exports, HypervisorError> {
    let record = recorded.record();
    let socket = start_server(monitor, record, run_dir).await?;
    let mut disks = Vec::new();
    for (index, disk) in record.disks.iter().enumerate() {
        let (name, care) = (&disk.snapshot, care(index));
        let node = if record.suspends { &disk.format } else { name };
        let mut arguments = json!({
            "type": "nbd", "id": name, "node-name": node, "name": name, "writable": writable,
        });
        if let Some(bitmap) = &disk.bitmap_export {
            // QEMU before 7.1 takes the name alone, and looks for it down the backing chain.
            arguments["bitmaps"] = match disk.job.is_some() || record.suspends {
                true => json!([bitmap]),
                false => json!([{"node": disk.format, "name": bitmap}]),
            };
        }
        let what = format!("export disk `{}`", disk.disk);
        monitor.run(Step::new(what, "block-export-add", arguments)).await?;
        let dirty_context =
            disk.bitmap_export.as_ref().map(|bitmap| format!("qemu:dirty-bitmap:{bitmap}"));
        let stream = Arc::new(connect(monitor, record, index, &socket).await?);
        disks.push(Export { name: name.clone(), dirty_context, care, stream });
    }
    // QEMU itself keeps the connections.
    Ok(Exports { disks, outlive_us: false, by_guest: true })
}

/// QEMU's name of our end of the connection to an export.
fn connection_name(run: &RunId, index: usize) -> String {
    format!("kvmsnap-{run}-c{index}")
}

/// Connects to the NBD server, and leaves our end of the connection with QEMU too.
///
/// So the connection outlives this process, until QEMU is told to close it. QEMU 7.2 as Debian has it
/// ends, and the guest with it, when the reader of a disk with an I/O thread goes away: its answer to
/// CVE-2024-7409 asserts that this is noticed in the main thread (tried).
async fn connect(
    monitor: &Monitor,
    record: &Record,
    index: usize,
    socket: &Path,
) -> Result<UnixStream, HypervisorError> {
    let host = |source: io::Error| HypervisorError::Host {
        step: format!("connect to {}", socket.display()),
        source,
    };
    let stream = UnixStream::connect(socket).map_err(host)?;
    let ours = stream.try_clone().map_err(host)?;
    let name = json!({"fdname": connection_name(&record.run, index)});
    monitor.run(Step::new("keep a connection", "getfd", name).with_fd(OwnedFd::from(ours))).await?;
    Ok(stream)
}

/// Ends the exports and the server, whatever of them exists.
async fn remove_exports(
    monitor: &Monitor,
    record: &Record,
    run_dir: &Path,
) -> Result<(), HypervisorError> {
    let close = async |name: String| {
        let close = Step::new("close a socket", "closefd", json!({"fdname": name}));
        match monitor.run(close).await {
            // Not there, or consumed.
            Ok(_) | Err(HypervisorError::Refused { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    };
    let ours = |id: &String| record.disks.iter().any(|disk| &disk.snapshot == id);
    let exports: Vec<String> = monitor.exports().await?.into_iter().filter(ours).collect();
    for id in &exports {
        let arguments = json!({"id": id, "mode": "hard"});
        monitor.run(Step::new("end an export", "block-export-del", arguments)).await?;
    }
    if record.nbd_server {
        // After the exports were told to end, in QEMU's main thread. Before they are waited for: an
        // answer that nobody reads keeps one standing. And before the server stops: QEMU waits, and the
        // guest with it, for who has connected and not yet chosen an export (all tried).
        for index in 0..record.disks.len() {
            close(connection_name(&record.run, index)).await?;
        }
    }
    for id in &exports {
        monitor.wait_export_gone(id).await?;
    }
    let folder = socket_folder(run_dir, &record.run);
    if record.nbd_server {
        // Consumed by the server, unless it did not start.
        close(descriptor_name(&record.run)).await?;
    }
    // With that descriptor closed nobody but our server can answer at our socket, and a server with
    // our exports is ours also where the socket's folder is lost. QEMU has only one.
    let answers = || UnixStream::connect(folder.join(SOCKET)).is_ok();
    if record.nbd_server && (!exports.is_empty() || answers()) {
        // QEMU 7.2 waits, and its guest with it, in `nbd-server-stop` for clients that have not said
        // yet which export they want (tried). So its main loop first notices who has gone.
        for _ in 0..SETTLE_ROUNDS {
            monitor.exports().await?;
        }
        let stop = Step::new("stop its NBD server", "nbd-server-stop", json!({}));
        match monitor.run(stop).await {
            Ok(_) | Err(HypervisorError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    remove_socket(run_dir, &record.run)
}

/// Removes the socket of a run; also where QEMU has ended.
///
/// # Errors
/// [`HypervisorError::Host`].
pub fn remove_socket(run_dir: &Path, run: &RunId) -> Result<(), HypervisorError> {
    let folder = socket_folder(run_dir, run);
    match fs::remove_dir_all(&folder) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(HypervisorError::Host { step: format!("remove {}", folder.display()), source })
        }
        _ => Ok(()),
    }
}

/// Removes the copies of the old bitmaps.
async fn remove_export_bitmaps(monitor: &Monitor, record: &Record) -> Result<(), HypervisorError> {
    let exported = |disk: &DiskRecord| Some((disk.format.clone(), disk.bitmap_export.clone()?));
    let bitmaps: Vec<_> = record.disks.iter().filter_map(exported).collect();
    remove_bitmaps(monitor, &bitmaps).await
}

/// Removes dirty bitmaps, each a node and a name, where they exist.
///
/// # Errors
/// As [`Monitor::run`].
pub async fn remove_bitmaps(
    monitor: &Monitor,
    bitmaps: &[(String, String)],
) -> Result<(), HypervisorError> {
    let graph = monitor.graph().await?;
    for (node, name) in bitmaps {
        if graph.bitmaps(node).iter().any(|bitmap| &bitmap.name == name) {
            let arguments = json!({"node": node, "name": name});
            let what = format!("remove the dirty bitmap `{name}`");
            monitor.run(Step::new(what, "block-dirty-bitmap-remove", arguments)).await?;
        }
    }
    Ok(())
}

/// Removes nodes, where they exist, in this order.
async fn remove_nodes(monitor: &Monitor, nodes: &[&str]) -> Result<(), HypervisorError> {
    let graph = monitor.graph().await?;
    for node in nodes.iter().filter(|node| graph.contains(node)) {
        let what = format!("remove the node `{node}`");
        monitor.run_until_free(&what, "blockdev-del", json!({"node-name": node})).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Tracking;

    #[test]
    fn scratch_goes_where_it_is_wanted_else_beside_the_image_else_to_a_folder_on_a_disk() {
        let mut disk = Disk {
            target: "vda".parse().unwrap(),
            device: String::new(),
            root: String::new(),
            format: String::new(),
            driver: "raw".to_owned(),
            size: 1,
            image: Some("/images/vda.raw".into()),
            tracking: Tracking::Overlay(None),
        };
        let wanted = Path::new("/scratch");
        assert_eq!(scratch_folder(Some(wanted), &disk), wanted);
        assert_eq!(scratch_folder(None, &disk), Path::new("/images"));
        for nowhere in [Some("json:{}".into()), None] {
            disk.image = nowhere;
            assert_eq!(scratch_folder(None, &disk), Path::new(SCRATCH_FOLDER));
        }
    }
}
