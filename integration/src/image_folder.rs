//! Folders of images as `kvmsnap image` keeps them, made by hand.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::tool;

/// How much of a file has a checksum of its own.
const EXTENT_LEN: usize = 4 << 20;

/// Makes a folder of a machine with one disk, `vda`, of which it takes a copy, and of other files.
///
/// # Panics
/// When it cannot.
pub fn image_folder(folder: &Path, qcow2: &Path, files: &[(&str, &[u8])]) -> PathBuf {
    fs::create_dir_all(folder).expect("a folder of ours");
    let disk = folder.join("vda.qcow2");
    fs::copy(qcow2, &disk).expect("a copy");
    let of_file = |(name, content): &(&str, &[u8])| {
        let path = folder.join(name);
        fs::write(&path, content).expect("a folder of ours");
        json!({"file": name, "sha256": sha256(&path)})
    };
    let files: Vec<Value> = files.iter().map(of_file).collect();
    let mut info = Command::new("qemu-img");
    info.args(["info", "--output=json", "-f", "qcow2"]).arg(&disk);
    let info: Value = serde_json::from_slice(&tool(info).stdout).expect("JSON");
    let name = folder.file_name().expect("a name").to_string_lossy();
    let record = json!({
        "version": 1, "machine": name, "time": "2026-11-20T03:00:00Z",
        "origin": {"file": qcow2}, "files": files, "flavour": null,
        "disks": [{
            "target": "vda", "file": "vda.qcow2", "size": info["virtual-size"],
            "file_len": fs::metadata(&disk).expect("a copy").len(),
            "sums": {"sha256": sha256(&disk), "extent_len": EXTENT_LEN, "crc32": crc32(&disk)},
        }],
    });
    fs::write(folder.join("image.json"), record.to_string()).expect("a folder of ours");
    folder.to_owned()
}

/// What an image's folder says of itself.
///
/// # Panics
/// When it cannot be read.
pub fn record(folder: &Path) -> Value {
    let text = fs::read(folder.join("image.json")).expect("a record");
    serde_json::from_slice(&text).expect("JSON")
}

/// The SHA-256 of a file, by a tool that is none of ours.
///
/// # Panics
/// When it cannot be read.
pub fn sha256(file: &Path) -> String {
    let mut command = Command::new("sha256sum");
    command.arg(file);
    let output = String::from_utf8(tool(command).stdout).expect("digits");
    output.split(' ').next().unwrap_or_default().to_owned()
}

fn crc32(file: &Path) -> Vec<u32> {
    let mut file = File::open(file).expect("a file of ours");
    let mut sums = Vec::new();
    loop {
        let mut extent = Vec::new();
        let part = file.by_ref().take(EXTENT_LEN as u64);
        { part }.read_to_end(&mut extent).expect("a file of ours");
        match extent.is_empty() {
            true => return sums,
            false => sums.push(crc32fast::hash(&extent)),
        }
    }
}
