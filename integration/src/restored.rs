//! What restores yield, side by side: ours, stock restic's, and what QEMU's own tools make of them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::faults::kinds;
use crate::{Host, tool};

impl Host {
    /// Restores a snapshot in a format into a new folder and returns the folder.
    #[track_caller]
    pub fn restore_as(&self, snapshot: &str, format: &str) -> PathBuf {
        let to = self.new_folder();
        let to_text = to.to_str().expect("a plain path");
        self.ok(["restore", snapshot, "--format", format, "--to", to_text]);
        to
    }

    /// Restores a snapshot by stock `restic restore` and returns the folder with its disks.
    #[track_caller]
    pub fn restore_by_restic(&self, snapshot: &Value) -> PathBuf {
        let to = self.new_folder();
        let (id, domain) = (text(snapshot, "id"), text(snapshot, "domain"));
        self.restic(&["restore", id, "--target", to.to_str().expect("a plain path")]);
        to.join(domain)
    }

    /// Writes a disk by stock `restic dump` into a new file and returns the file.
    #[track_caller]
    pub fn dump_by_restic(&self, snapshot: &Value, disk: &str) -> PathBuf {
        let to = self.new_folder().join("dump");
        let (id, domain) = (text(snapshot, "id"), text(snapshot, "domain"));
        let mut command = self.restic_command(&["dump", id, &format!("/{domain}/{disk}.raw")]);
        let file = File::create_new(&to).expect("a new file");
        let status = command.stdout(Stdio::from(file)).status().expect("restic runs");
        assert!(status.success(), "restic dump of {disk}");
        to
    }

    /// `restic restore` and `restic dump` yield bit for bit the raw images in a folder.
    #[track_caller]
    pub fn assert_restic_yields(&self, snapshot: &Value, raw: &Path) {
        let restored = self.restore_by_restic(snapshot);
        for disk in kinds(snapshot).keys() {
            let ours = raw.join(format!("{disk}.raw"));
            assert_same_bytes(&ours, &restored.join(format!("{disk}.raw")));
            let dump = self.dump_by_restic(snapshot, disk);
            assert_same_bytes(&ours, &dump);
            fs::remove_file(dump).expect("a file of ours");
        }
        fs::remove_dir_all(restored).expect("a folder of ours");
    }

    /// The ids of a disk's chunks, as stock restic reads them from the snapshot's trees.
    #[track_caller]
    pub fn chunk_ids(&self, snapshot: &Value, disk: &str) -> Vec<String> {
        let json = |arguments: &[&str]| -> Value {
            serde_json::from_slice(&self.restic(arguments)).expect("restic prints JSON")
        };
        let node = |tree: &Value, name: &str| -> Value {
            let nodes = tree["nodes"].as_array().expect("a tree has nodes");
            let found = nodes.iter().find(|node| node["name"] == name);
            found.unwrap_or_else(|| panic!("no `{name}` in {tree}")).clone()
        };
        let file = json(&["cat", "snapshot", text(snapshot, "id")]);
        let root = json(&["cat", "blob", text(&file, "tree")]);
        let folder = node(&root, text(snapshot, "domain"));
        let folder = json(&["cat", "blob", text(&folder, "subtree")]);
        let content = node(&folder, &format!("{disk}.raw"))["content"].take();
        serde_json::from_value(content).expect("a list of ids")
    }

    /// A new empty folder, gone with the host.
    pub fn new_folder(&self) -> PathBuf {
        tempfile::tempdir_in(self.folder()).expect("a folder").keep()
    }
}

/// A field of an object that is text.
///
/// # Panics
/// When it is not.
#[track_caller]
pub fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object[field].as_str().unwrap_or_else(|| panic!("no text `{field}` in {object}"))
}

/// What a snapshot tells of one disk.
///
/// # Panics
/// When it has no such disk.
#[track_caller]
pub fn disk<'a>(snapshot: &'a Value, target: &str) -> &'a Value {
    let disks = snapshot["disks"].as_array().expect("a list of disks");
    let found = disks.iter().find(|disk| disk["target"] == target);
    found.unwrap_or_else(|| panic!("no disk `{target}` in {snapshot}"))
}

/// Two files hold the same bytes.
///
/// # Panics
/// When they do not.
#[track_caller]
pub fn assert_same_bytes(one: &Path, other: &Path) {
    let length = |path: &Path| fs::metadata(path).expect("a restored file").len();
    assert_eq!(length(one), length(other), "{} and {}", one.display(), other.display());
    let mut cmp = Command::new("cmp");
    cmp.args([one, other]);
    tool(cmp);
}

/// A raw and a qcow2 image hold the same disk, says QEMU's own tool; the qcow2 image is without fault.
///
/// # Panics
/// When they do not.
#[track_caller]
pub fn assert_same_disk(raw: &Path, qcow2: &Path) {
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-q", "-f", "raw", "-F", "qcow2"]).args([raw, qcow2]);
    tool(compare);
    // To compare, a longer image with zeros at its end is the same.
    let mut info = Command::new("qemu-img");
    info.args(["info", "--output=json", "-f", "qcow2"]).arg(qcow2);
    let info: Value = serde_json::from_slice(&tool(info).stdout).expect("JSON");
    assert_eq!(info["virtual-size"], fs::metadata(raw).expect("a restored file").len());
    let mut check = Command::new("qemu-img");
    check.args(["check", "-q", "-f", "qcow2"]).arg(qcow2);
    tool(check);
}

/// Bytes that a file takes on its file system.
///
/// # Panics
/// When there is no such file.
#[track_caller]
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).expect("a file").blocks() * 512
}
