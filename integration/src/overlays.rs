//! What the tests of `create` and `purge` on a QEMU that nothing manages share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use vm_fixtures::{Disk, Format, Guest, GuestBuilder, Inside, MIB};

use crate::faults::{self, Contents, signal, wait_until};
use crate::restored::text;
use crate::{Host, Outcome, assert_guest_is_free, finish, spawn, tool};

/// The disks of a scene: qcow2 and raw.
pub const DISKS: [&str; 2] = ["vda", "vdb"];
/// Their size in bytes.
pub const SIZE: u64 = 8 * MIB;

/// A purge so slow that the guest must be stopped, so fast that it soon goes on.
pub const STOPPED: [&str; 6] = ["--deadline", "0.8", "--max-pause", "600", "--limit-rate", "2MiB"];
/// A purge that gives up at once.
pub const HASTY: [&str; 6] = ["--deadline", "0.5", "--max-pause", "0", "--limit-rate", "64KiB"];

/// How long a QEMU is stopped, to see what is told of it.
const STILL: Duration = Duration::from_millis(400);
/// Longest time for what takes a moment, on a machine that is slow and busy with other tests.
const WAIT: Duration = Duration::from_secs(120);

/// A machine with a qcow2 disk and a raw one, and what they hold.
#[derive(Debug)]
pub struct Scene {
    /// Where `kvmsnap` runs.
    pub host: Host,
    /// The machine.
    pub guest: Guest,
    /// What its disks hold.
    pub contents: Contents,
    /// Its monitor.
    pub qmp: PathBuf,
}

impl Scene {
    /// A machine that runs, its disks written to once.
    pub fn new() -> Option<Self> {
        let host = Host::without_repository();
        let qmp = host.folder().join("qmp");
        let disks = [Disk::new("vda", SIZE), Disk::new("vdb", SIZE).raw()];
        let guest = plan(&qmp, disks).boot()?;
        let mut scene = Self { qmp, ..Self::of(guest, host) };
        scene.contents.scribble(&scene.guest, 1);
        Some(scene)
    }

    /// Starts QEMU again, on the overlays that `create` printed; the one before has ended.
    #[track_caller]
    pub fn start_on_overlays(&self, created: &[Value]) -> Guest {
        let disks = created.iter().map(|line| {
            let overlay = Path::new(text(line, "overlay"));
            Disk::existing(text(line, "disk"), overlay, Format::Qcow2)
        });
        plan(&self.qmp, disks).boot().expect("QEMU is there")
    }

    /// That of a machine.
    pub fn of(guest: Guest, host: Host) -> Self {
        let (contents, qmp) = (Contents::new(&DISKS, SIZE), guest.qmp());
        Self { host, guest, contents, qmp }
    }

    /// A command on this machine.
    pub fn command(&self, command: &str, more: &[&str]) -> Command {
        let mut built = self.host.command([command, "--json", "--qmp"]);
        built.arg(&self.qmp).args(more);
        built
    }

    /// Runs it.
    pub fn try_run(&self, command: &str, more: &[&str]) -> Outcome {
        finish(spawn(self.command(command, more)))
    }

    /// Runs it, which must succeed, and returns its JSON lines.
    #[track_caller]
    pub fn ok(&self, command: &str, more: &[&str]) -> Vec<Value> {
        let outcome = self.try_run(command, more);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        lines(&outcome)
    }

    /// The records of machines that write to overlays.
    pub fn records(&self) -> Vec<PathBuf> {
        files_in(&self.host.state().join("overlays"), ".json")
    }

    /// The overlays beside the images.
    pub fn overlays(&self) -> Vec<PathBuf> {
        files_in(self.guest.folder(), "kvmsnap-")
    }

    /// The guest runs on its own images and nothing is left of any overlay.
    #[track_caller]
    pub fn assert_back(&self) {
        assert_guest_is_free(&self.guest, &DISKS);
        assert_eq!(self.records(), Vec::<PathBuf>::new());
        assert_eq!(self.overlays(), Vec::<PathBuf>::new());
    }

    /// The disks hold what the guest wrote, says QEMU's own tool once it has ended.
    #[track_caller]
    pub fn assert_holds(&self) {
        if self.guest.ended().is_none() {
            self.guest.quit();
        }
        for (disk, format) in [("vda", "qcow2"), ("vdb", "raw")] {
            let raw = convert(&self.guest.disk_path(disk), format, self.host.folder());
            assert_eq!(first_difference(&raw, self.contents.of(disk)), None, "{disk}");
        }
    }
}

/// Brings a guest back that works on `disk`, and stops its QEMU for a moment meanwhile: `purge` reports no more
/// than the guest felt.
///
/// # Panics
/// When it is not so.
#[track_caller]
pub fn assert_tells_stall(
    guest: &Inside,
    (disk, qemu): (&str, u32),
    (purge, records): (Command, &Path),
    has_job: impl Fn() -> bool,
) {
    // So many that some are always under way.
    let load = guest.start_paced(disk, 1000);
    let running = spawn(purge);
    loop {
        wait_until(WAIT, "an overlay is written back", &has_job);
        signal(qemu, Signal::SIGSTOP);
        // Else that job has just ended, and another one begins.
        let is_in_time = files_in(records, ".json").iter().any(|record| {
            fs::read_to_string(record).is_ok_and(|text| text.contains(r#""committing""#))
        });
        if is_in_time {
            std::thread::sleep(STILL);
        }
        signal(qemu, Signal::SIGCONT);
        if is_in_time {
            break;
        }
    }
    let outcome = finish(running);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let felt = load.longest();
    let lines = lines(&outcome);
    let bound = |name: &str| {
        let told = lines.iter().map(|line| line[name].as_u64().expect("it is known"));
        Duration::from_millis(told.max().expect("a disk"))
    };
    let (least, most) = (bound("longest_stall_at_least_ms"), bound("longest_stall_ms"));
    let told = format!("told: {least:?} to {most:?}, felt: {felt:?}");
    // QEMU counts an operation from when it gets it. One that the guest was only about to ask for is felt there
    // and not seen here; so the upper bound is none for what the guest felt.
    assert!(felt >= STILL && least <= felt && least <= most, "{told}");
    // A command that changes the graph may have waited as long, and counts too: more so on a busy machine.
    assert!(most <= 4 * felt.max(Duration::from_secs(1)), "{told}");
    #[expect(clippy::print_stdout, reason = "a figure for whoever runs it")]
    {
        println!("{told}");
    }
}

/// A machine without a system whose monitor is at a place that outlives it.
pub fn plan(qmp: &Path, disks: impl IntoIterator<Item = Disk>) -> GuestBuilder {
    let monitor = ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())];
    disks.into_iter().fold(Guest::without_os().args(monitor), GuestBuilder::disk)
}

/// The JSON lines that a command printed.
///
/// # Panics
/// When they are none.
#[track_caller]
pub fn lines(outcome: &Outcome) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).expect("a JSON object");
    outcome.stdout.lines().map(parse).collect()
}

/// The files of a folder with this in their name.
pub fn files_in(folder: &Path, part: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let has = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().contains(part));
    entries.map(|entry| entry.path()).filter(has).collect()
}

/// A copy by QEMU's own tool, with its locks.
///
/// # Panics
/// When that fails.
#[track_caller]
pub fn convert(image: &Path, format: &str, folder: &Path) -> PathBuf {
    let raw = folder.join("copy.raw");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", format, "-O", "raw"]).arg(image).arg(&raw);
    tool(convert);
    raw
}

/// The first byte in which a raw image is not what it should be.
///
/// # Panics
/// When it is of another size.
#[track_caller]
pub fn first_difference(raw: &Path, content: &[u8]) -> Option<usize> {
    let found = fs::read(raw).expect("a copy");
    assert_eq!(found.len(), content.len());
    faults::first_difference(&found, content)
}
