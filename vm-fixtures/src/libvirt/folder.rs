//! Folders that QEMU under libvirt can reach, and what is left of tests that were killed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;

use super::{Libvirt, open, try_virsh};
use crate::process::pid_in;

const IMAGES: &str = "/var/lib/libvirt/images";
const PREFIX: &str = "kvmsnap-fixture-";
/// Locked for as long as the folder's test lives.
const OWNER: &str = ".owner";

/// A folder of a test; its content and its domains go away with it.
#[derive(Debug)]
pub struct Folder {
    folder: TempDir,
    name: String,
    _owner: File,
    _libvirt: Libvirt,
}

impl Folder {
    /// A new one; the caller sees to it that nobody sweeps meanwhile.
    #[track_caller]
    pub(super) fn new(libvirt: Libvirt) -> Self {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix(PREFIX).permissions(fs::Permissions::from_mode(0o755));
        let folder = builder.tempdir_in(IMAGES).expect("libvirt's folder for images is there");
        let owner = open(&folder.path().join(OWNER));
        owner.try_lock().expect("nobody else knows the file");
        let name = folder.path().file_name().expect("a folder has a name");
        let name = name.to_string_lossy().into_owned();
        Self { folder, name, _owner: owner, _libvirt: libvirt }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Its own name, which those of its domains begin with.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A test may have failed while the daemon was stopped. Where it does not start, the next sweep
        // finds the folder's domains.
        let _ = super::daemon::ensure();
        forget_domains(&self.name);
    }
}

/// Ends and removes what killed tests have left.
pub(super) fn sweep() {
    let Ok(entries) = fs::read_dir(IMAGES) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(PREFIX) && has_no_owner(&entry.path()) {
            forget_domains(&name);
            // What cannot be removed now is found by the next sweep.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether nobody has a folder any more. Its owner may be about to remove it.
fn has_no_owner(folder: &Path) -> bool {
    match File::options().write(true).open(folder.join(OWNER)) {
        Ok(owner) => owner.try_lock().is_ok(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn forget_domains(folder: &str) {
    let domains = try_virsh(&["list", "--all", "--name"]).unwrap_or_default();
    domains.lines().filter(|name| name.starts_with(folder)).for_each(forget_domain);
}

/// Ends a domain and removes all that libvirt keeps about it. Each step may find nothing to do.
fn forget_domain(name: &str) {
    let _ = try_virsh(&["destroy", name]);
    if let Some(pid) = pid_in(&pid_file(name)) {
        let _ = kill(pid, Signal::SIGKILL);
    }
    let everything = ["--managed-save", "--snapshots-metadata", "--checkpoints-metadata"];
    let _ = try_virsh(&[&["undefine", name, "--nvram"], &everything[..]].concat());
    let logs = ["/var/log/libvirt/qemu", "/var/log/swtpm/libvirt/qemu"];
    for entry in logs.iter().flat_map(fs::read_dir).flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        // `NAME.log`, `NAME.log.0` when it has become long, `NAME-swtpm.log`.
        if file.strip_prefix(name).is_some_and(|rest| rest.starts_with(['.', '-'])) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Where libvirt keeps the process id of a domain's QEMU.
pub(super) fn pid_file(name: &str) -> std::path::PathBuf {
    Path::new("/run/libvirt/qemu").join(format!("{name}.pid"))
}
