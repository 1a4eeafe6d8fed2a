//! Nothing is ever deleted that a chain names: random sequences of `create`, `purge`, `backup`, crashes of
//! `kvmsnap` and of QEMU, and restarts on the overlays or on the images themselves.
//!
//! After each command all images that a running or recorded chain names are there. After each sequence the
//! guest reads what it wrote last, or, where it was started on its own images meanwhile, `purge` says so and
//! deletes nothing; then its chains end at one image.
//!
//! A run takes some fixed seeds and some new ones; `KVMSNAP_SEQUENCES=500` asks for so many new ones.
//! Each failure names its seed; `KVMSNAP_SEED=N` runs that one alone.

#![expect(clippy::print_stdout, reason = "seeds and stories are for whoever runs it")]

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use integration::faults::signal;
use integration::overlays::{files_in, plan};
use integration::restored::text;
use integration::{Host, Outcome, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::{Disk, Format, Guest, qemu_available};

const DISKS: [&str; 2] = ["vda", "vdb"];
const BLOCK: usize = 64 << 10;
const BLOCKS: usize = 16;
/// Sequences of a plain run: with seeds that are always the same, and with new ones.
const FIXED: u64 = 40;
const FRESH: u64 = 20;

/// A generator of which the seed tells all (Steele and others, SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((mixed ^ (mixed >> 31)) % limit as u64).expect("less than a usize")
    }

    fn one_in(&mut self, many: usize) -> bool {
        self.below(many) == 0
    }
}

/// An overlay of a record, and how far it was brought back.
struct Recorded {
    disk: String,
    overlay: PathBuf,
    base: PathBuf,
    /// Whether its images are known to hold still.
    held: bool,
    back: bool,
    /// Whether QEMU was told to go on with the image.
    pivoting: bool,
}

/// A machine, what its disks show, and what it would be started on.
struct Machine {
    host: Host,
    qmp: PathBuf,
    guest: Option<Guest>,
    tops: BTreeMap<&'static str, PathBuf>,
    view: BTreeMap<&'static str, [u8; BLOCKS]>,
    random: Random,
    /// What was done, for whoever has to understand a failure.
    story: Vec<String>,
    written: u8,
}

impl Machine {
    fn new() -> Self {
        let host = Host::new();
        let qmp = host.folder().join("qmp");
        let images = host.folder().join("images");
        fs::create_dir(&images).expect("a new folder");
        let mut machine = Self {
            host,
            qmp,
            guest: None,
            tops: BTreeMap::new(),
            view: DISKS.map(|disk| (disk, [0; BLOCKS])).into(),
            random: Random(0),
            story: Vec::new(),
            written: 0,
        };
        for disk in DISKS {
            let image = machine.own(disk);
            let size = (BLOCKS * BLOCK).to_string();
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", format_of(&image).driver()]).arg(&image).arg(size);
            tool(create);
            machine.tops.insert(disk, image);
        }
        machine
    }

    fn images(&self) -> PathBuf {
        self.host.folder().join("images")
    }

    fn own(&self, disk: &str) -> PathBuf {
        self.images().join(if disk == "vda" { "vda.qcow2" } else { "vdb.raw" })
    }

    fn guest(&self) -> &Guest {
        self.guest.as_ref().expect("it runs")
    }

    fn tell(&mut self, what: impl Into<String>) {
        self.story.push(what.into());
    }

    // ---- its life -------------------------------------------------------------------------------

    fn start(&mut self) {
        // QEMU does not replace the socket of one that was killed.
        let _ = fs::remove_file(&self.qmp);
        let disk = |(disk, top): (&&str, &PathBuf)| Disk::existing(disk, top, format_of(top));
        let disks: Vec<Disk> = self.tops.iter().map(disk).collect();
        let tops: Vec<_> = self.tops.values().map(|top| name(top)).collect();
        self.tell(format!("start on {tops:?}"));
        // Its firmware need not run.
        self.guest = plan(&self.qmp, disks).args(["-S"]).boot();
    }

    /// Sees what the disks run on: that is what the machine would be started on again.
    fn look(&mut self) {
        let Some(guest) = &self.guest else { return };
        let blocks = guest.qmp_command("query-block", &json!({}));
        for disk in DISKS {
            let device = guest.device(disk);
            let blocks = blocks.as_array().expect("a list");
            let block = blocks.iter().find(|block| block["qdev"] == *device).expect("a device");
            self.tops.insert(disk, text(&block["inserted"], "file").into());
        }
    }

    fn end(&mut self, kindly: bool) {
        self.look();
        self.tell(if kindly { "quit" } else { "kill" });
        let guest = self.guest.take().expect("it runs");
        match kindly {
            true => drop(guest.quit()),
            false => guest.kill(),
        }
    }

    fn write(&mut self) {
        let (disk, block) = (DISKS[self.random.below(2)], self.random.below(BLOCKS));
        self.written = self.written % 250 + 1;
        self.tell(format!("write {} to {block} of {disk}", self.written));
        let write = format!("write -P {} {} {BLOCK}", self.written, block * BLOCK);
        self.guest().qemu_io(disk, &write);
        self.guest().qemu_io(disk, "flush");
        self.view.get_mut(disk).expect("a disk")[block] = self.written;
    }

    // ---- what is done to it ---------------------------------------------------------------------

    /// Runs `kvmsnap`, killed at one of its effects where `crash` says so.
    fn run(&mut self, command: &str, crash: Option<usize>) -> Outcome {
        self.run_with(command, &[], crash)
    }

    fn run_with(&mut self, command: &str, more: &[&str], crash: Option<usize>) -> Outcome {
        let mut built = self.host.command([command, "--json", "--qmp"]);
        built.arg(&self.qmp).args(more);
        if let Some(n) = crash {
            built.env("KVMSNAP_CRASH_AT", n.to_string());
        }
        let outcome = finish(spawn(built));
        self.tell(format!("{command} {crash:?}: {:?} {}", outcome.code, outcome.stderr));
        self.look();
        self.check(&outcome);
        outcome
    }

    /// The same, while QEMU is killed at some moment.
    fn run_while_killed(&mut self, command: &str) {
        let mut built = self.host.command([command, "--json", "--qmp"]);
        built.arg(&self.qmp);
        self.look();
        let running = spawn(built);
        let delay = Duration::from_micros(self.random.below(60_000) as u64);
        std::thread::sleep(delay);
        signal(self.guest().pid(), Signal::SIGKILL);
        self.guest.take().expect("it ran").kill();
        let outcome = finish(running);
        let (code, stderr) = (outcome.code, &outcome.stderr);
        self.tell(format!("{command}, QEMU killed after {delay:?}: {code:?} {stderr}"));
        // What it ran on at the end nobody has seen: whoever starts it again goes by what it ran on before, and
        // by the records.
        for disk in DISKS {
            let known = self.records().into_iter().find(|known| known.disk == disk && !known.back);
            let is_on = |known: &Recorded| known.held || self.tops[disk] == known.overlay;
            let overlay = known.filter(is_on).map(|known| known.overlay);
            self.tops.insert(disk, overlay.unwrap_or_else(|| self.own(disk)));
        }
        self.check(&outcome);
    }

    fn records(&self) -> Vec<Recorded> {
        let mut all = Vec::new();
        for path in files_in(&self.host.state().join("overlays"), ".json") {
            let record = fs::read(path).expect("a record");
            let record: Value = serde_json::from_slice(&record).expect("a record");
            let recorded = |disk: &Value| Recorded {
                disk: text(disk, "disk").to_owned(),
                overlay: text(disk, "overlay").into(),
                base: text(&disk["base"], "path").into(),
                held: !record["held"].is_null(),
                back: disk["stage"].get("back").is_some(),
                pivoting: disk["stage"].get("pivoting").is_some(),
            };
            all.extend(record["disks"].as_array().expect("a list").iter().map(recorded));
        }
        all
    }

    /// What must be true at any time.
    #[track_caller]
    fn check(&self, outcome: &Outcome) {
        assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
        for known in self.records().iter().filter(|known| known.held && !known.back) {
            for image in [&known.overlay, &known.base] {
                assert!(image.exists(), "{} is recorded and gone", image.display());
            }
        }
        let Some(guest) = &self.guest else { return };
        for node in guest.named_nodes() {
            let image = Path::new(node["file"].as_str().unwrap_or_default());
            let is_image = image.starts_with(self.images());
            assert!(!is_image || image.exists(), "{} is open and gone", image.display());
        }
    }

    /// What the disks show is what the guest wrote.
    #[track_caller]
    fn assert_view(&self) {
        for (disk, blocks) in &self.view {
            let shown = self.shown(disk);
            assert_eq!(shown.as_slice(), blocks, "{disk}");
        }
    }

    /// The bytes that the blocks of a disk are full of, through what it runs on or would run on.
    #[track_caller]
    fn shown(&self, disk: &str) -> Vec<u8> {
        let top = &self.tops[disk];
        let raw = self.host.folder().join("shown.raw");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-U", "-f", format_of(top).driver(), "-O", "raw"]);
        convert.arg(top).arg(&raw);
        tool(convert);
        let shown = fs::read(raw).expect("a copy");
        let byte = |block: &[u8]| {
            assert!(block.iter().all(|byte| *byte == block[0]), "a torn block of {disk}");
            block[0]
        };
        shown.chunks(BLOCK).map(byte).collect()
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn format_of(image: &Path) -> Format {
    match image.extension().is_some_and(|extension| extension == "raw") {
        true => Format::Raw,
        false => Format::Qcow2,
    }
}

// ---- a sequence ---------------------------------------------------------------------------------

impl Machine {
    fn sequence(&mut self, seed: u64) {
        self.random = Random(seed);
        self.story = vec![format!("seed {seed}")];
        for _ in 0..3 + self.random.below(6) {
            match &self.guest {
                Some(_) => self.step_running(),
                None if self.random.one_in(6) && self.would_fork() => {
                    self.fork();
                    break;
                }
                None => self.step_off(),
            }
        }
        self.settle();
    }

    fn crash(&mut self, effects: usize) -> Option<usize> {
        self.random.one_in(2).then(|| self.random.below(effects) + 1)
    }

    fn step_running(&mut self) {
        match self.random.below(20) {
            0..6 => self.write(),
            6..11 => {
                let crash = self.crash(9);
                self.run("create", crash);
            }
            11..15 => {
                let crash = self.crash(21);
                self.run("purge", crash);
            }
            15 => {
                let command = ["create", "purge"][self.random.below(2)];
                self.run_while_killed(command);
            }
            16 => {
                let crash = self.crash(30);
                self.run("backup", crash);
            }
            17 => self.end(true),
            _ => self.end(false),
        }
    }

    fn step_off(&mut self) {
        match self.random.below(8) {
            0..2 => {
                let crash = self.crash(12);
                self.purge_off(crash);
            }
            2 => drop(self.run("create", None)),
            _ => self.start(),
        }
    }

    /// Purges while the machine is off; its disks are at their own images where that was done.
    fn purge_off(&mut self, crash: Option<usize>) -> Outcome {
        let outcome = self.run("purge", crash);
        for disk in DISKS {
            let known = self.records();
            let is_left = |known: &Recorded| known.disk == disk && !known.back;
            if !known.iter().any(is_left) {
                self.tops.insert(disk, self.own(disk));
            }
        }
        outcome
    }

    /// Whether the overlays hold what the images do not, so that a start on these shows another time.
    fn would_fork(&self) -> bool {
        self.records().iter().any(|known| known.held && !known.back && !known.pivoting)
    }

    /// Somebody starts the guest on its own images by mistake.
    fn fork(&mut self) {
        let (tops, view) = (self.tops.clone(), self.view.clone());
        let overlays = || self.records().into_iter().filter(|known| !known.back);
        let overlays: Vec<PathBuf> = overlays().map(|known| known.overlay).collect();
        self.tops = DISKS.map(|disk| (disk, self.own(disk))).into();
        self.start();
        let mut written = Vec::new();
        while self.random.one_in(2) {
            let before = self.view.clone();
            self.write();
            written.extend(DISKS.into_iter().filter(|disk| before[disk] != self.view[disk]));
        }
        let outcome = self.run("purge", None);
        let may_be_back = self.records().iter().any(|known| known.pivoting);
        let says = if may_be_back { "" } else { "runs without its overlay" };
        self.assert_refused(&outcome, says, &overlays);
        self.end(true);
        if written.is_empty() && self.random.one_in(2) {
            // The mistake is noticed.
            (self.tops, self.view) = (tops, view);
            return;
        }
        let outcome = self.purge_off(None);
        if outcome.code == Some(0) {
            return;
        }
        self.assert_refused(&outcome, "", &overlays);
        if written.is_empty() {
            (self.tops, self.view) = (tops, view);
            return;
        }
        // What was written to the images counts from here on.
        self.tell("give up the overlays, as the hint says");
        for file in files_in(&self.host.state().join("overlays"), ".json") {
            fs::remove_file(file).expect("a record");
        }
        for overlay in files_in(&self.images(), "kvmsnap-") {
            fs::remove_file(overlay).expect("an overlay");
        }
        for disk in DISKS {
            let shown = self.shown(disk);
            self.view.insert(disk, shown.try_into().expect("all blocks"));
        }
    }

    #[track_caller]
    fn assert_refused(&self, outcome: &Outcome, words: &str, overlays: &[PathBuf]) {
        let said = outcome.stderr.contains("error: ") && outcome.stderr.contains(words);
        assert!(outcome.code == Some(1) && said, "{outcome:?}");
        assert!(overlays.iter().all(|overlay| overlay.exists()), "nothing is deleted");
    }

    /// Brings the guest back, and looks at what it has.
    #[track_caller]
    fn settle(&mut self) {
        if self.guest.is_none() && self.random.one_in(2) {
            let outcome = self.purge_off(None);
            let refused = ["cannot be told", "was written to while"]
                .iter()
                .any(|words| outcome.stderr.contains(words));
            let refused = outcome.code == Some(1) && refused;
            assert!(outcome.code == Some(0) || refused, "{outcome:?}");
        }
        if self.guest.is_none() {
            self.start();
        }
        let mut outcome = self.run("purge", None);
        for disk in DISKS {
            if !outcome.stderr.contains(&format!("just as disk `{disk}` went back")) {
                continue;
            }
            // It was started anew where it ran, and that was its own image: the hint is followed.
            self.assert_view();
            let known = self.records().into_iter().find(|known| known.disk == disk);
            let overlay = known.expect("it is recorded").overlay;
            self.tell(format!("delete {}", name(&overlay)));
            fs::remove_file(overlay).expect("an overlay");
            outcome = self.run("purge", None);
        }
        for disk in DISKS {
            let changed = format!("{} was written to while", self.own(disk).display());
            if !outcome.stderr.contains(&changed) {
                continue;
            }
            // A start on the image that wrote nothing of the guest's may have changed its dirty bitmaps.
            self.assert_view();
            let top = self.tops[disk].clone();
            self.tell(format!("adopt {}", name(&top)));
            outcome =
                self.run_with("purge", &["--adopt", top.to_str().expect("a plain path")], None);
        }
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        for disk in DISKS {
            assert_eq!(self.tops[disk], self.own(disk));
        }
        for node in self.guest().named_nodes() {
            let file = node["file"].as_str().unwrap_or_default();
            assert!(!file.contains("kvmsnap-"), "{node} is left");
        }
        let left = [
            files_in(&self.images(), "kvmsnap-"),
            files_in(&self.host.state().join("overlays"), ""),
        ];
        assert_eq!(left.concat(), Vec::<PathBuf>::new());
        self.assert_view();
    }
}

/// Runs sequences one after the other on one machine, and on a new one after a failure.
fn run_all(seeds: &[u64]) -> Vec<u64> {
    let mut machine = None;
    let mut failed = Vec::new();
    for seed in seeds {
        let mut current = machine.take().unwrap_or_else(|| {
            let mut machine = Machine::new();
            machine.start();
            machine
        });
        let ran = AssertUnwindSafe(|| current.sequence(*seed));
        match catch_unwind(ran) {
            Ok(()) => machine = Some(current),
            Err(_) => {
                println!("failed: {}", current.story.join("\n  "));
                failed.push(*seed);
            }
        }
    }
    failed
}

#[test]
fn nothing_is_ever_deleted_that_a_chain_names() {
    if !qemu_available() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let first = u64::from(now.subsec_nanos()) << 20 | now.as_secs() & 0xF_FFFF;
    let seeds: Vec<u64> = match (number("KVMSNAP_SEED"), number("KVMSNAP_SEQUENCES")) {
        (Some(seed), _) => vec![seed],
        (None, Some(count)) => (first..first + count).collect(),
        (None, None) => (0..FIXED).chain(first..first + FRESH).collect(),
    };
    println!("sequences with seeds {seeds:?}");
    let start = Instant::now();
    let half = seeds.len().div_ceil(2);
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            seeds.chunks(half).map(|part| scope.spawn(move || run_all(part))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("it returns")).collect()
    });
    println!("{} sequences took {:?}", seeds.len(), start.elapsed());
    assert_eq!(failed, Vec::<u64>::new(), "seeds of sequences that broke a promise");
}
