//! What the tests of the program share that need no guest: a repository of hand-made backups, the program
//! as a process, and stock restic to judge.
#![allow(dead_code, reason = "each test file uses a part")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use repository::{
    BlobId, FileId, Kdf, LocalFolder, Node, Repository, SnapshotFile, Tree, Writer, WriterOptions,
};
use serde_json::{Value, json};

pub(crate) const PASSWORD: &str = "correct horse";
pub(crate) const CHUNK: usize = 4096;

/// A repository in a folder, and the state of one host.
pub(crate) struct Host {
    _scratch: tempfile::TempDir,
    pub(crate) folder: PathBuf,
    pub(crate) repository: Repository,
    state: PathBuf,
    password: PathBuf,
}

/// A hand-made backup.
pub(crate) struct Backup<'a> {
    pub(crate) domain: &'a str,
    pub(crate) uuid: &'a str,
    pub(crate) time: Timestamp,
    pub(crate) parent: Option<FileId>,
    /// The disks, by target, with their content.
    pub(crate) disks: Vec<(&'a str, Vec<u8>)>,
    /// Disks that it lacks.
    pub(crate) lacks: Vec<&'a str>,
}

impl<'a> Backup<'a> {
    pub(crate) fn of(domain: &'a str, time: Timestamp, content: Vec<u8>) -> Self {
        let disks = vec![("vda", content)];
        Self { domain, uuid: "1-1-1", time, parent: None, disks, lacks: Vec::new() }
    }
}

impl Host {
    /// A new repository below `place`.
    pub(crate) fn in_folder(place: &Path) -> Self {
        let scratch = tempfile::tempdir_in(place).unwrap();
        let folder = scratch.path().join("repository");
        let backend = Arc::new(LocalFolder::create(&folder).unwrap());
        let repository =
            Repository::init(backend, PASSWORD.as_bytes(), Kdf::WEAK_FOR_TESTS).unwrap();
        let (state, password) = (scratch.path().join("state"), scratch.path().join("password"));
        fs::write(&password, PASSWORD).unwrap();
        fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).unwrap();
        Self { _scratch: scratch, folder, repository, state, password }
    }

    pub(crate) fn new() -> Self {
        Self::in_folder(&std::env::temp_dir())
    }

    pub(crate) fn writer(&self) -> Writer {
        let index = Arc::new(self.repository.index().unwrap());
        Writer::new(&self.repository, index, WriterOptions::default()).unwrap()
    }

    /// Makes a backup as kvmsnap does, but for its lock.
    pub(crate) fn back_up(&self, backup: &Backup<'_>) -> FileId {
        let writer = self.writer();
        let file = store(&writer, backup);
        writer.finish().unwrap();
        self.repository.save_snapshot(&file).unwrap()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmsnap"));
        command.args(args).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env("TZ", "UTC").env("KVMSNAP_REPOSITORY", &self.folder);
        command.env("KVMSNAP_PASSWORD_FILE", &self.password).env("KVMSNAP_STATE_DIR", &self.state);
        command.env("KVMSNAP_RUN_DIR", self.state.join("run"));
        command
    }

    pub(crate) fn kvmsnap(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs the program, which must succeed; returns what it printed.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.kvmsnap(args);
        let err = String::from_utf8_lossy(&output.stderr);
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{args:?}\n{out}\n{err}");
        out
    }

    /// As [`Self::ok`], what it printed as JSON, line by line.
    pub(crate) fn lines(&self, args: &[&str]) -> Vec<Value> {
        let out = self.ok(&[args, &["--json"]].concat());
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(crate) fn snapshots(&self) -> Vec<FileId> {
        let all = self.repository.snapshots().unwrap();
        assert!(all.damaged.is_empty(), "{:?}", all.damaged);
        all.good.into_iter().map(|(id, _)| id).collect()
    }

    /// Stock restic finds nothing wrong.
    pub(crate) fn judge(&self) {
        if !has_restic() {
            return;
        }
        let mut restic = Command::new("restic");
        restic.args(["--no-cache", "check", "--read-data", "--repo"]).arg(&self.folder);
        restic.env("RESTIC_PASSWORD", PASSWORD).env_remove("RESTIC_REPOSITORY");
        let output = restic.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
    }
}

/// Stores what a backup consists of; its snapshot file is to be written once the writer has finished.
pub(crate) fn store(writer: &Writer, backup: &Backup<'_>) -> SnapshotFile {
    let Backup { domain, uuid, time, .. } = *backup;
    let (mut nodes, mut disks) = (Vec::new(), Vec::new());
    for (target, content) in &backup.disks {
        let chunks = content.chunks(CHUNK).map(Bytes::copy_from_slice);
        let ids: Vec<BlobId> = chunks.map(|chunk| writer.save_blob(chunk).unwrap()).collect();
        let size = content.len() as u64;
        nodes.push(Node::file(&format!("{target}.raw"), size, ids, time));
        disks.push(json!({
            "target": target, "size": size, "chunk_size": CHUNK, "format": "qcow2", "image": null,
            "kind": "full", "reason": "", "bitmap": format!("kvmsnap-{time}"), "bytes_changed": size,
            "bytes_read": size, "bytes_zero": 0, "bytes_audited": 0, "bytes_stored": size,
        }));
    }
    let lacks = backup.lacks.iter();
    let skipped: Vec<Value> =
        lacks.map(|disk| json!({"device": disk, "reason": "broken", "is_disk": true})).collect();
    let manifest = json!({
        "version": 1, "program": "kvmsnap 0.1.0", "run": "0123456789abcdef", "domain": domain,
        "uuid": uuid, "host": "here", "time": time, "kind": "full", "method": "bitmap",
        "consistency": "crash", "parent": backup.parent, "freeze_ms": null, "pause_ms": null,
        "duration_ms": 1, "warnings": [], "disks": disks, "skipped": skipped,
    });
    let text = serde_json::to_vec(&manifest).unwrap();
    let len = text.len() as u64;
    let blob = writer.save_blob(Bytes::from(text)).unwrap();
    let folder = writer.save_tree(&Tree::new(nodes)).unwrap();
    let root = writer.save_tree(&Tree::new(vec![
        Node::dir(domain, folder, time),
        Node::file(&format!("{domain}.manifest.json"), len, vec![blob], time),
    ]));
    let mut file = SnapshotFile::new(root.unwrap(), time);
    file.paths = vec![format!("/{domain}")];
    file.parent = backup.parent;
    file.tags = vec!["kvmsnap".into(), format!("uuid={uuid}"), format!("manifest={blob}")];
    file
}

pub(crate) fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// Bytes that look random and are the same in every run.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Whether stock restic is here. Without it the test is skipped aloud, or fails where everything is
/// required.
fn has_restic() -> bool {
    if Command::new("restic").arg("version").output().is_ok_and(|output| output.status.success()) {
        return true;
    }
    let required = std::env::var("KVMSNAP_REQUIRE_QEMU").is_ok_and(|value| value == "1");
    assert!(!required, "restic is not installed, and KVMSNAP_REQUIRE_QEMU=1");
    // Past the test harness, which swallows what `eprintln!` says.
    std::io::stderr().write_all(b"SKIPPED: restic is not installed\n").unwrap();
    false
}
