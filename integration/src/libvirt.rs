//! A domain of libvirt under test: what its disks hold, backups of it, and what must be true of domain
//! and host afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_fixtures::libvirt::{Domain, DomainBuilder, Libvirt};
use vm_fixtures::{Disk, Guest, MIB};

use crate::faults::{Contents, kinds, wait_until};
use crate::restored::text;
use crate::{Host, Outcome, Running, finish, spawn, tool};

/// Size in bytes of each disk, unless a test makes others.
pub const SIZE: u64 = 4 * MIB;
/// Length of a chunk of so small a disk, in bytes.
pub const CHUNK_LEN: u64 = 64 << 10;
/// Longest time for what takes a moment, on a machine that is slow and busy with other tests.
pub const WAIT: Duration = Duration::from_secs(120);
/// A write from outside that takes longer was held up by more than load: libvirt itself lets a call wait 30 s.
pub const HELD_UP: Duration = Duration::from_secs(20);
/// What a scribble writes to each disk: one chunk and a half.
const PIECE_LEN: usize = 192 << 10;
/// Where libvirt keeps what belongs to one running domain.
const DOMAIN_FOLDERS: &str = "/var/lib/libvirt/qemu";

/// A domain, a host that backs it up, and what its disks hold.
#[derive(Debug)]
pub struct Scene {
    /// The host.
    pub host: Host,
    /// The domain.
    pub domain: Domain,
    /// What its disks hold.
    pub contents: Contents,
    turn: usize,
}

impl Scene {
    /// A domain with two qcow2 disks and a raw one, `vda`, `vdb` and `vdc`, that has never run.
    #[track_caller]
    pub fn new(libvirt: &Libvirt) -> Self {
        let plan = Guest::without_os()
            .disk(Disk::new("vda", SIZE))
            .disk(Disk::new("vdb", SIZE))
            .disk(Disk::new("vdc", SIZE).raw());
        Self::of(plan.under_libvirt(), &["vda", "vdb", "vdc"], SIZE, libvirt)
    }

    /// A domain that has never run, all of whose disks are new and have one size in bytes.
    #[track_caller]
    pub fn of(plan: DomainBuilder, disks: &[&str], size: u64, libvirt: &Libvirt) -> Self {
        let domain = plan.define(libvirt);
        let contents = Contents::new(disks, size);
        let mut scene = Self { host: Host::new(), domain, contents, turn: 0 };
        scene.scribble();
        scene
    }

    /// The same domain as [`Self::new`], running, with one backup.
    #[track_caller]
    pub fn running(libvirt: &Libvirt) -> Self {
        let scene = Self::new(libvirt);
        scene.domain.start();
        assert_eq!(scene.backup()["kind"], "full");
        scene
    }

    // ---- what is written ------------------------------------------------------------------------

    /// Changes a piece of each disk: by the guest's QEMU where it runs, else by QEMU's own tool.
    #[track_caller]
    pub fn scribble(&mut self) {
        self.turn += 1;
        let disks: Vec<String> = self.contents.names().into_iter().map(str::to_owned).collect();
        for (index, disk) in disks.iter().enumerate() {
            let byte = u8::try_from((self.turn * 3 + index) % 255 + 1).expect("at most 255");
            let offset = (self.turn * 5 + index) % (SIZE as usize / PIECE_LEN) * PIECE_LEN;
            self.write(disk, offset, &[byte; PIECE_LEN]);
        }
    }

    /// Writes to a disk.
    #[track_caller]
    pub fn write(&mut self, disk: &str, offset: usize, bytes: &[u8]) {
        let file = self.domain.folder().join("buffer");
        fs::write(&file, bytes).expect("the domain's folder is writable");
        let write = format!("write -s {} {offset} {}", file.display(), bytes.len());
        match self.domain.pid() {
            None => {
                let image = self.domain.disk_path(disk);
                let mut tool_io = Command::new("qemu-io");
                let format = if is_raw(&image) { "raw" } else { "qcow2" };
                tool_io.args(["-f", format, "-c", &write]).arg(image);
                tool(tool_io);
            }
            Some(_) => drop(self.domain.qemu_io(disk, &write)),
        }
        self.contents.note(disk, offset, bytes);
    }

    /// Has the domain's QEMU bring to its images what was written: a QEMU that is killed loses no more.
    #[track_caller]
    pub fn flush(&self) {
        for disk in self.contents.names() {
            self.domain.qemu_io(disk, "flush");
        }
    }

    // ---- backups --------------------------------------------------------------------------------

    /// The command of a backup of the domain, with more arguments.
    pub fn command(&self, more: &[&str]) -> Command {
        let mut command = self.host.command(["backup", "--json", self.domain.name()]);
        command.args(more);
        command
    }

    /// Backs up and returns what came of it.
    pub fn try_backup(&self, more: &[&str]) -> Outcome {
        finish(spawn(self.command(more)))
    }

    /// Backs up, which must succeed, and compares what is restored.
    #[track_caller]
    pub fn backup(&self) -> Value {
        self.backup_with(&[])
    }

    /// The same with more arguments; all disks must be in it.
    #[track_caller]
    pub fn backup_with(&self, more: &[&str]) -> Value {
        self.assert_good(&self.try_backup(more))
    }

    /// A backup succeeded, and restores to what the disks hold. Returns the snapshot's JSON line.
    #[track_caller]
    pub fn assert_good(&self, outcome: &Outcome) -> Value {
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let snapshot: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
        self.host.assert_holds(&snapshot, &self.contents);
        snapshot
    }

    /// Starts a backup of the running domain that reads slowly, and waits until it reads: the job is
    /// there, and QEMU has read for it.
    #[track_caller]
    pub fn backup_slowly(&self, more: &[&str]) -> Running {
        self.backup_at("64KiB", more)
    }

    /// The same at another speed, in bytes a second.
    #[track_caller]
    pub fn backup_at(&self, speed: &str, more: &[&str]) -> Running {
        let running = spawn(self.command(&[&["--limit-read", speed], more].concat()));
        let job = || self.domain.try_virsh("backup-dumpxml", &[]).is_ok();
        let running = wait_with(running, "its job begins", job);
        let before = read_by(&self.domain);
        wait_with(running, "QEMU reads for it", || read_by(&self.domain) > before + CHUNK_LEN)
    }

    /// The same for a domain that is shut off, or is shut down for it: its storage daemon has all images open.
    #[track_caller]
    pub fn backup_at_rest_slowly(&self, more: &[&str]) -> Running {
        let images: Vec<PathBuf> = self.domain.disk_paths().into_values().collect();
        let running = spawn(self.command(&[&["--limit-read", "64KiB"], more].concat()));
        wait_with(running, "its images are exported", || {
            let mut daemons = daemons(&self.domain).into_iter().map(open_files);
            daemons.any(|open| images.iter().all(|image| open.contains(image)))
        })
    }

    /// Waits until QEMU reads nothing more by itself.
    #[track_caller]
    pub fn wait_until_qemu_rests(&self) {
        let mut last = read_by(&self.domain);
        let mut since = Instant::now();
        wait_until(WAIT, "QEMU rests", || {
            let now = read_by(&self.domain);
            if now != last {
                (last, since) = (now, Instant::now());
            }
            since.elapsed() > Duration::from_millis(300)
        });
    }

    /// The guards of the runs of this host.
    pub fn guards(&self) -> Vec<u32> {
        let state = self.host.state();
        processes(&["guard", state.to_str().expect("a plain path")])
    }

    // ---- what must be true ----------------------------------------------------------------------

    /// The dirty bitmaps in the image of a disk of a domain that is shut off.
    #[track_caller]
    pub fn bitmaps_at_rest(&self, disk: &str) -> Vec<Value> {
        let mut info = Command::new("qemu-img");
        info.args(["info", "-f", "qcow2", "--output=json"]).arg(self.domain.disk_path(disk));
        let info: Value = serde_json::from_slice(&tool(info).stdout).expect("JSON");
        let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array();
        bitmaps.cloned().unwrap_or_default()
    }

    /// The names of all checkpoints that libvirt knows of the domain.
    #[track_caller]
    pub fn checkpoints(&self) -> Vec<String> {
        let names = self.domain.virsh("checkpoint-list", &["--name"]);
        names.split_whitespace().map(str::to_owned).collect()
    }

    /// The disks that keep dirty bitmaps.
    #[track_caller]
    pub fn tracked(&self) -> Vec<&str> {
        let paths = self.domain.disk_paths();
        let names = self.contents.names().into_iter();
        names.filter(|disk| !is_raw(&paths[*disk])).collect()
    }

    /// Nothing is left of any run but one good dirty bitmap in each image that keeps them.
    #[track_caller]
    pub fn assert_clean(&self) {
        self.assert_clean_but_bitmaps();
        let runs = self.domain.pid().is_some();
        for disk in self.tracked() {
            let bitmaps = if runs { self.domain.bitmaps(disk) } else { self.bitmaps_at_rest(disk) };
            assert_eq!(bitmaps.len(), 1, "one dirty bitmap on {disk}: {bitmaps:?}");
        }
        // libvirt learns of one that began while the domain was off with the next backup.
        assert!(self.checkpoints().len() <= 1, "{:?}", self.checkpoints());
    }

    /// No undo record, lock, job, process, socket or scratch is left of any run.
    #[track_caller]
    pub fn assert_clean_but_bitmaps(&self) {
        self.host.assert_nothing_left();
        assert_eq!(daemons(&self.domain), Vec::<u32>::new(), "a storage daemon is left");
        let run = self.host.folder().join("run");
        assert_eq!(found(&run, &|path| path.is_dir()), Vec::<PathBuf>::new());
        let scratch = |path: &Path| name_of(path).starts_with(".kvmsnap-");
        assert_eq!(found(self.domain.folder(), &scratch), Vec::<PathBuf>::new());
        if self.domain.pid().is_some() {
            let job = self.domain.try_virsh("backup-dumpxml", &[]);
            assert!(job.is_err(), "a job is left: {job:?}");
            let exports = self.domain.qmp_command("query-block-exports", &serde_json::json!({}));
            assert_eq!(exports, serde_json::json!([]), "exports are left");
            let jobs = self.domain.qmp_command("query-jobs", &serde_json::json!({}));
            assert_eq!(jobs, serde_json::json!([]), "jobs are left");
            let socket = |path: &Path| name_of(path).starts_with("kvmsnap-");
            assert_eq!(found(&domain_folder(&self.domain), &socket), Vec::<PathBuf>::new());
        }
    }
}

/// Waits until something is true of a backup that goes on meanwhile.
///
/// # Panics
/// When the backup ends before, or nothing comes of it.
#[track_caller]
pub fn wait_with(running: Running, what: &str, is_true: impl Fn() -> bool) -> Running {
    let mut running = Some(running);
    wait_until(WAIT, what, || {
        if running.as_mut().is_some_and(Running::has_ended) {
            let outcome = running.take().map(finish);
            panic!("the backup ended before {what}: {outcome:?}");
        }
        is_true()
    });
    running.expect("it goes on")
}

/// Whether this libvirt takes the socket of a backup job from us. 11.3 says so and refuses.
pub fn takes_sockets(libvirt: &Libvirt) -> bool {
    let told = libvirt.virsh(&["version", "--daemon"]);
    let version = told.lines().find_map(|line| line.strip_prefix("Running against daemon: "));
    let mut numbers = version.expect("its version").trim().split('.').map(str::parse::<u32>);
    let mut next = || numbers.next().expect("three numbers").expect("a number");
    (next(), next()) >= (11, 4)
}

/// Each disk that keeps dirty bitmaps was read by one, a little of it, and the others were scanned;
/// nothing was to be warned of.
///
/// # Panics
/// When it was not so.
#[track_caller]
pub fn assert_incremental(snapshot: &Value, method: &str) {
    let kinds = kinds(snapshot);
    let disks = snapshot["disks"].as_array().expect("a list of disks");
    for disk in disks {
        let kind = kinds[text(disk, "target")].as_str();
        let raw = disk["format"] == "raw";
        assert_eq!(kind, if raw { "rescan" } else { "incremental" }, "{snapshot}");
        // A piece lies in three chunks, and what a test writes besides in two.
        let read = disk["bytes_read"].as_u64().expect("a count of bytes");
        assert!(raw || (1..=5 * CHUNK_LEN).contains(&read), "{read} bytes: {snapshot}");
    }
    assert_eq!(snapshot["method"], method, "{snapshot}");
    assert_eq!(snapshot["warnings"].as_array().map_or(0, Vec::len), 0, "{snapshot}");
}

/// The storage daemons that have the images of a domain, also one that is about to become one.
pub fn daemons(domain: &Domain) -> Vec<u32> {
    processes(&["storage-daemon", domain.folder().to_str().expect("a plain path")])
}

/// The processes whose command lines have all these words.
pub fn processes(words: &[&str]) -> Vec<u32> {
    let has_them = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        words.iter().all(|word| line.contains(word))
    };
    let entries = fs::read_dir("/proc").expect("/proc is there").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(has_them).collect()
}

/// The files that a process has open; none where it has ended.
fn open_files(pid: u32) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect()
}

/// Bytes that the domain's QEMU has read by system calls, whatever it says itself.
#[track_caller]
fn read_by(domain: &Domain) -> u64 {
    let pid = domain.pid().expect("its QEMU runs");
    let io = fs::read_to_string(format!("/proc/{pid}/io")).expect("QEMU lives");
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("a counter");
    line.parse().expect("a number")
}

/// The folder that libvirt has made for a running domain.
#[track_caller]
fn domain_folder(domain: &Domain) -> PathBuf {
    let prefix = format!("domain-{}-", domain.virsh("domid", &[]).trim());
    let folders = found(Path::new(DOMAIN_FOLDERS), &|path| name_of(path).starts_with(&prefix));
    folders.into_iter().next().expect("libvirt made a folder")
}

fn found(folder: &Path, is_it: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| is_it(path)).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_raw(image: &Path) -> bool {
    image.extension().is_some_and(|extension| extension == "raw")
}
