//! What the fault tests share: a model of what the disks hold, small file systems, and what must be
//! true of guest and host once a fault is over.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use vm_fixtures::Guest;

use crate::{Host, Outcome, Running, assert_guest_is_free, finish, spawn, tool};

/// How long a guest may stand still, whatever happens to a backup of it: a second, and what a busy machine adds
/// to that. Less than what a guest waits for that is forgotten: the guard takes three seconds, the watchdog ten.
pub const STILL_MAX: Duration = Duration::from_millis(2500);
/// Length of the pieces that the model writes: larger than one cluster, no multiple of a chunk.
const PIECE_LEN: usize = 192 << 10;

/// What each disk of a machine holds, kept beside it: what is restored is compared with this.
#[derive(Debug, Clone)]
pub struct Contents {
    disks: BTreeMap<String, Vec<u8>>,
}

impl Contents {
    /// Empty disks of one size, in bytes.
    pub fn new(disks: &[&str], size: u64) -> Self {
        let size = usize::try_from(size).expect("disks under test fit memory");
        let disks = disks.iter().map(|disk| ((*disk).to_owned(), vec![0; size])).collect();
        Self { disks }
    }

    /// The disks' names.
    pub fn names(&self) -> Vec<&str> {
        self.disks.keys().map(String::as_str).collect()
    }

    /// What a disk holds.
    pub fn of(&self, disk: &str) -> &[u8] {
        &self.disks[disk]
    }

    /// Writes a byte over a range of one disk, through the guest's device.
    #[track_caller]
    pub fn write(&mut self, guest: &Guest, disk: &str, offset: usize, len: usize, byte: u8) {
        guest.qemu_io(disk, &format!("write -P {byte} {offset} {len}"));
        self.disk(disk)[offset..offset + len].fill(byte);
    }

    /// Writes zeros over a range without sending them.
    #[track_caller]
    pub fn zero(&mut self, guest: &Guest, disk: &str, offset: usize, len: usize) {
        guest.qemu_io(disk, &format!("write -z -u {offset} {len}"));
        self.disk(disk)[offset..offset + len].fill(0);
    }

    /// Discards a range, which holds zeros afterwards where the image is qcow2 of version 3.
    #[track_caller]
    pub fn discard(&mut self, guest: &Guest, disk: &str, offset: usize, len: usize) {
        guest.qemu_io(disk, &format!("discard {offset} {len}"));
        self.disk(disk)[offset..offset + len].fill(0);
    }

    /// Changes a little on every disk, at a place and with a content of `turn`.
    #[track_caller]
    pub fn scribble(&mut self, guest: &Guest, turn: usize) {
        let names: Vec<String> = self.disks.keys().cloned().collect();
        for (index, disk) in names.iter().enumerate() {
            let pieces = self.disk(disk).len() / PIECE_LEN;
            let place = |n: usize| (n * 7 + index) % pieces * PIECE_LEN;
            let byte = u8::try_from((turn + index) % 255 + 1).expect("at most 255");
            self.zero(guest, disk, place(turn + 3), PIECE_LEN);
            self.write(guest, disk, place(turn), PIECE_LEN, byte);
        }
    }

    /// Writes what cannot be compressed, the same for the same seed, and has it flushed.
    #[track_caller]
    pub fn write_noise(&mut self, guest: &Guest, disk: &str, offset: usize, len: usize, seed: u64) {
        let noise = noise(len, seed);
        let file = guest.folder().join("noise");
        fs::write(&file, &noise).expect("the guest's folder is writable");
        guest.qemu_io(disk, &format!("write -s {} {offset} {len}", file.display()));
        guest.qemu_io(disk, "flush");
        self.disk(disk)[offset..offset + len].copy_from_slice(&noise);
    }

    /// Notes what the test wrote by other means.
    pub fn note(&mut self, disk: &str, offset: usize, bytes: &[u8]) {
        self.disk(disk)[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds an empty disk of `size` bytes.
    pub fn add(&mut self, disk: &str, size: u64) {
        self.disks.insert(disk.to_owned(), Vec::new());
        self.resize(disk, size);
    }

    /// Grows a disk's model by zeros, or cuts it.
    pub fn resize(&mut self, disk: &str, size: u64) {
        let size = usize::try_from(size).expect("disks under test fit memory");
        self.disk(disk).resize(size, 0);
    }

    /// The raw images in a folder hold exactly this.
    #[track_caller]
    pub fn assert_restored(&self, folder: &Path) {
        for (disk, content) in &self.disks {
            let restored = fs::read(folder.join(format!("{disk}.raw"))).expect("a restored disk");
            assert_eq!(restored.len(), content.len(), "the size of {disk}");
            assert_eq!(
                first_difference(&restored, content),
                None,
                "the first byte of {disk} that is not the guest's"
            );
        }
    }

    fn disk(&mut self, disk: &str) -> &mut Vec<u8> {
        self.disks.get_mut(disk).expect("a disk of this model")
    }
}

/// The first byte in which something is not what it should be.
pub fn first_difference(found: &[u8], wanted: &[u8]) -> Option<usize> {
    // Whole slices at once, which is a hundred times as fast as the search.
    (found != wanted).then(|| found.iter().zip(wanted).take_while(|(a, b)| a == b).count())
}

/// What happens at one of the effects that a command has on the world outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL just before the effect.
    Crash,
    /// The effect fails.
    FailOnce,
    /// The effect fails, and all that follow.
    FailForGood,
}

impl Fault {
    /// How the `n`-th effect of a command fails in a sweep: once, or with all that follow, in turn.
    pub fn failing(n: usize) -> Self {
        if n % 2 == 1 { Self::FailOnce } else { Self::FailForGood }
    }

    /// The same command, to which this happens at its `n`-th effect.
    pub fn at(self, n: usize, mut command: Command) -> Command {
        match self {
            Self::Crash => command.env("KVMSNAP_CRASH_AT", n.to_string()),
            Self::FailOnce => command.env("KVMSNAP_FAIL_AT", n.to_string()),
            Self::FailForGood => command.env("KVMSNAP_FAIL_AT", format!("{n}+")),
        };
        command
    }
}

/// A section of the golden file of effects has those that a command noted in `KVMSNAP_EFFECTS`.
#[track_caller]
pub fn assert_golden_log(title: &str, log: &Path) {
    let text = fs::read_to_string(log).expect("a command without effects is no command");
    let effects: Vec<_> = text.lines().map(str::to_owned).collect();
    assert_golden(title, &effects);
}

/// It has these in this order, each once.
#[track_caller]
fn assert_golden(title: &str, effects: &[String]) {
    let mut section = format!("# {title}\n");
    let mut seen: Vec<&String> = Vec::new();
    for effect in effects {
        if !seen.contains(&effect) {
            seen.push(effect);
            section.push_str(effect);
            section.push('\n');
        }
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/effects.golden");
    let text = fs::read_to_string(&golden).expect("the golden file");
    let head = format!("# {title}");
    let of_title = |section: &&str| section.lines().next() == Some(&head);
    let expected = text.split("\n\n").find(of_title);
    let is_same = expected.is_some_and(|expected| expected.trim_end() == section.trim_end());
    if !is_same && std::env::var_os("KVMSNAP_BLESS").is_some() {
        let others = text.split("\n\n").filter(|other| !of_title(other)).map(str::trim_end);
        let all: Vec<_> = others.chain([section.trim_end()]).collect();
        return fs::write(&golden, all.join("\n\n") + "\n").expect("the source is writable");
    }
    assert!(is_same, "the effects changed: see the head of crash.rs\n{section}\n{expected:?}");
}

impl Host {
    /// A backup to which a fault happened was killed by it, or says that it failed and why, or has
    /// stored what the disks held.
    #[track_caller]
    pub fn assert_honest(&self, case: &str, fault: Fault, outcome: &Outcome, contents: &Contents) {
        match (fault, outcome.code) {
            (Fault::Crash, code) => assert_eq!(code, None, "{case}: {outcome:?}"),
            (_, Some(0)) => {
                let snapshot = serde_json::from_str(&outcome.stdout).expect("one JSON object");
                self.assert_holds(&snapshot, contents);
            }
            (_, Some(1)) => assert!(outcome.stderr.contains("error: "), "{case}: {outcome:?}"),
            _ => panic!("{case}: {outcome:?}"),
        }
        assert!(!outcome.stderr.contains("panicked"), "{case}: {outcome:?}");
    }

    /// Backs up, which must succeed, restores what was stored and compares it with the model. Returns
    /// the snapshot's JSON line.
    #[track_caller]
    pub fn backup_and_compare(&self, guest: &Guest, contents: &Contents, more: &[&str]) -> Value {
        let snapshot = self.backup(guest, more);
        self.assert_holds(&snapshot, contents);
        snapshot
    }

    /// A snapshot restores to what the model holds.
    #[track_caller]
    pub fn assert_holds(&self, snapshot: &Value, contents: &Contents) {
        let folder = self.restore(snapshot["id"].as_str().expect("a snapshot has an id"));
        contents.assert_restored(&folder);
        fs::remove_dir_all(folder).expect("a folder of ours");
    }

    /// The effects of a command on the world outside, in their order.
    #[track_caller]
    pub fn effects(&self, mut command: Command) -> Vec<String> {
        let log = self.folder().join("effects");
        let outcome = finish(spawn({
            command.env("KVMSNAP_EFFECTS", &log);
            command
        }));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let text = fs::read_to_string(&log).expect("a command without effects is no command");
        fs::remove_file(&log).expect("a file of ours");
        text.lines().map(str::to_owned).collect()
    }

    /// The same once more, which must be those in the golden file of effects, each once. `KVMSNAP_BLESS=1`
    /// accepts a change.
    #[track_caller]
    pub fn golden_effects(&self, title: &str, command: Command) -> Vec<String> {
        let effects = self.effects(command);
        assert_golden(title, &effects);
        effects
    }

    /// Undo records that wait for the next run. One that was not yet written when its writer was killed
    /// says nothing, and is swept when it is old enough to be nobody's.
    pub fn undo_records(&self) -> usize {
        let Ok(entries) = fs::read_dir(self.state().join("journal")) else { return 0 };
        let partial = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b".partial-");
        entries.flatten().filter(|entry| !partial(&entry.file_name())).count()
    }

    /// Neither guest nor host shows that there ever was a failure: one dirty bitmap on each disk, no
    /// node, export, job, file descriptor, socket, lock or undo record of any run.
    #[track_caller]
    pub fn assert_all_clean(&self, guest: &Guest, disks: &[&str]) {
        self.assert_nothing_left();
        assert_guest_is_free(guest, disks);
        assert_eq!(guest.qmp_command("query-fdsets", &json!({})), json!([]), "file descriptors");
        for disk in disks {
            let bitmaps = guest.bitmaps(&vm_fixtures::Disk::format_node(disk));
            assert_eq!(bitmaps.len(), 1, "one dirty bitmap on {disk}: {bitmaps:?}");
        }
        let run = self.folder().join("run");
        let sockets = fs::read_dir(run).expect("the folder of locks").flatten();
        let sockets: Vec<_> = sockets.filter(|entry| entry.path().is_dir()).collect();
        assert!(sockets.is_empty(), "{sockets:?}");
    }
}

/// Bytes that cannot be compressed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        // Marsaglia's xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(len).collect()
}

/// Kinds of the disks of a snapshot, by target.
pub fn kinds(snapshot: &Value) -> BTreeMap<String, String> {
    let disks = snapshot["disks"].as_array().expect("a list of disks");
    let text = |disk: &Value, key: &str| disk[key].as_str().unwrap_or_default().to_owned();
    disks.iter().map(|disk| (text(disk, "target"), text(disk, "kind"))).collect()
}

/// The guest's processors run soon.
#[track_caller]
pub fn assert_goes_on(guest: &Guest) {
    wait_until(STILL_MAX, "the guest goes on", || guest.is_running());
}

/// A command failed by itself, and says why in so many words.
#[track_caller]
pub fn assert_says(outcome: &Outcome, code: i32, words: &str) {
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    assert!(outcome.stderr.contains("error: "), "{outcome:?}");
    let said = outcome.stderr.to_lowercase();
    assert!(said.contains(&words.to_lowercase()), "`{words}` is not in {outcome:?}");
}

/// Waits until something is true.
///
/// # Panics
/// When it is not within `timeout`.
#[track_caller]
pub fn wait_until(timeout: Duration, what: &str, mut is_true: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < timeout, "not within {timeout:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until a backup shows its point in time.
///
/// # Panics
/// When it ends before, or takes more than two minutes.
#[track_caller]
pub fn wait_for_export(guest: &Guest, running: &mut Running) {
    let exported = || guest.qmp_command("query-block-exports", &json!({})) != json!([]);
    wait_until(Duration::from_secs(120), "the point in time is exported", || {
        assert!(!running.has_ended(), "the backup ended before its export");
        exported()
    });
}

/// Sends a signal to a process that the test started.
///
/// # Panics
/// When there is no such process.
#[track_caller]
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("process ids are small"));
    kill(pid, signal).expect("a process of ours");
}

/// Kills a run with all that it has started: nobody is left who undoes what it made.
#[track_caller]
pub fn kill_with_helpers(running: Running) {
    let pid = running.pid();
    // It starts nothing more, and does not see its helpers die.
    signal(pid, Signal::SIGSTOP);
    for helper in children(pid) {
        signal(helper, Signal::SIGKILL);
    }
    signal(pid, Signal::SIGKILL);
    finish(running);
}

/// A small file system of its own, unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    /// Mounts a tmpfs of `size` bytes at a new folder.
    ///
    /// # Panics
    /// When this process may not mount.
    pub fn mount(folder: &Path, size: u64) -> Self {
        fs::create_dir(folder).expect("a new folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size},mode=0700"), "tmpfs"]).arg(folder);
        tool(mount);
        Self { folder: folder.to_owned() }
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Gives it another size.
    #[track_caller]
    pub fn resize(&self, size: u64) {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,size={size}")]).arg(&self.folder);
        tool(mount);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: QEMU may still hold a scratch file of a test that failed. There is nobody to tell
        // of a failure that a look at the mounts would not.
        let _ = Command::new("umount").arg("--lazy").arg(&self.folder).status();
    }
}

/// The process ids of the children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).map(Iterator::flatten);
    let children = tasks
        .into_iter()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    children
        .flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .map(|pid| pid.parse().expect("a process id"))
        .collect()
}

/// The process id of the watchdog of a run.
#[track_caller]
pub fn watchdog_of(pid: u32) -> u32 {
    let is_it = |child: &u32| {
        let line = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("quiesce-watchdog")
    };
    children(pid).into_iter().find(is_it).expect("a watchdog")
}
