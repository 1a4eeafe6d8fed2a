//! Random sequences of what is done to a machine with overlays, on any ground that runs machines: `create`,
//! `purge`, `backup`, crashes of `kvmsnap` and of QEMU, restarts on the overlays or on the images
//! themselves, definitions anew.
//!
//! After each command all images that a running or recorded chain names are there. After each sequence the
//! guest reads what it wrote last, or, where it was started on its own images meanwhile, `purge` says so and
//! deletes nothing; then its chains end at one image.
//!
//! A run takes some fixed seeds and some new ones; `KVMSNAP_SEQUENCES=500` asks for so many new ones.
//! Each failure names its seed; `KVMSNAP_SEED=N` runs that one alone.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use serde_json::Value;
use vm_fixtures::Format;

use crate::faults::signal;
use crate::overlays::files_in;
use crate::restored::text;
use crate::{Host, Outcome, finish, spawn, tool};

/// The disks of a machine: qcow2 and raw.
pub const DISKS: [&str; 2] = ["vda", "vdb"];
/// Bytes of a block, which is written as a whole.
pub const BLOCK: usize = 64 << 10;
/// Blocks of a disk.
pub const BLOCKS: usize = 16;

/// The image that each disk runs on.
pub type Tops = BTreeMap<&'static str, PathBuf>;

/// What runs a machine with [`DISKS`], and how a person deals with it.
pub trait Ground {
    /// Where `kvmsnap` runs.
    fn host(&self) -> &Host;

    /// The disk's own image.
    fn own(&self, disk: &str) -> PathBuf;

    /// Names the machine to `kvmsnap`.
    fn words(&self) -> Vec<String>;

    /// The process of the machine, where it runs.
    fn pid(&self) -> Option<u32>;

    /// Starts it on these images, or on what its definition names where it has one.
    fn start(&mut self, tops: &Tops);

    /// Ends it cleanly.
    fn quit(&mut self);

    /// Ends it with SIGKILL, also one that was killed already.
    fn kill(&mut self);

    /// What it runs on; also what it would be started on where it has a definition.
    fn tops(&self) -> Option<Tops>;

    /// Runs a `qemu-io` command on a disk of the machine that runs.
    fn qemu_io(&self, disk: &str, command: &str);

    /// QEMU's nodes.
    fn nodes(&self) -> Vec<Value>;

    /// Whether a definition says what it is started on.
    fn is_defined(&self) -> bool {
        false
    }

    /// Has its definition name these images.
    fn define_on(&mut self, _tops: &Tops) {}

    /// Defines it anew in one of several ways; returns which.
    fn define_anew(&mut self, _way: usize) -> &'static str {
        "nothing"
    }
}

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
struct Machine<G> {
    ground: G,
    tops: Tops,
    view: BTreeMap<&'static str, [u8; BLOCKS]>,
    random: Random,
    /// What was done, for whoever has to understand a failure.
    story: Vec<String>,
    written: u8,
}

impl<G: Ground> Machine<G> {
    /// One whose disks are all zero.
    fn new(ground: G) -> Self {
        let tops = DISKS.map(|disk| (disk, ground.own(disk))).into();
        let view = DISKS.map(|disk| (disk, [0; BLOCKS])).into();
        Self { ground, tops, view, random: Random(0), story: Vec::new(), written: 0 }
    }

    fn images(&self) -> PathBuf {
        self.ground.own(DISKS[0]).parent().expect("it lies in a folder").to_owned()
    }

    fn runs(&self) -> bool {
        self.ground.pid().is_some()
    }

    fn tell(&mut self, what: impl Into<String>) {
        self.story.push(what.into());
    }

    // ---- its life -------------------------------------------------------------------------------

    fn start(&mut self) {
        let tops: Vec<_> = self.tops.values().map(|top| name(top)).collect();
        self.tell(format!("start on {tops:?}"));
        self.ground.start(&self.tops);
    }

    /// Sees what the disks run on: that is what the machine would be started on again.
    fn look(&mut self) {
        if let Some(tops) = self.ground.tops() {
            self.tops = tops;
        }
    }

    fn end(&mut self, kindly: bool) {
        self.look();
        self.tell(if kindly { "quit" } else { "kill" });
        match kindly {
            true => self.ground.quit(),
            false => self.ground.kill(),
        }
        self.look();
    }

    /// A person has it start on these images from now on.
    fn decide(&mut self, tops: Tops) {
        let names: Vec<_> = tops.values().map(|top| name(top)).collect();
        self.tell(format!("to be started on {names:?}"));
        self.ground.define_on(&tops);
        self.tops = tops;
    }

    fn write(&mut self) {
        let (disk, block) = (DISKS[self.random.below(2)], self.random.below(BLOCKS));
        self.written = self.written % 250 + 1;
        self.tell(format!("write {} to {block} of {disk}", self.written));
        let write = format!("write -P {} {} {BLOCK}", self.written, block * BLOCK);
        self.ground.qemu_io(disk, &write);
        self.ground.qemu_io(disk, "flush");
        self.view.get_mut(disk).expect("a disk")[block] = self.written;
    }

    // ---- what is done to it ---------------------------------------------------------------------

    fn command(&self, command: &str) -> Command {
        let mut built = self.ground.host().command([command, "--json"]);
        built.args(self.ground.words());
        built
    }

    /// Runs `kvmsnap`, killed at one of its effects where `crash` says so.
    fn run(&mut self, command: &str, crash: Option<usize>) -> Outcome {
        self.run_with(command, &[], crash)
    }

    fn run_with(&mut self, command: &str, more: &[&str], crash: Option<usize>) -> Outcome {
        let mut built = self.command(command);
        built.args(more);
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
        self.look();
        let running = spawn(self.command(command));
        let delay = Duration::from_micros(self.random.below(60_000) as u64);
        std::thread::sleep(delay);
        signal(self.ground.pid().expect("it runs"), Signal::SIGKILL);
        self.ground.kill();
        let outcome = finish(running);
        let (code, stderr) = (outcome.code, &outcome.stderr);
        self.tell(format!("{command}, QEMU killed after {delay:?}: {code:?} {stderr}"));
        // What it ran on at the end nobody has seen: whoever starts it again goes by what it ran on before, and
        // by the records.
        for disk in DISKS {
            let known = self.records().into_iter().find(|known| known.disk == disk && !known.back);
            let is_on = |known: &Recorded| known.held || self.tops[disk] == known.overlay;
            let overlay = known.filter(is_on).map(|known| known.overlay);
            self.tops.insert(disk, overlay.unwrap_or_else(|| self.ground.own(disk)));
        }
        self.look();
        self.check(&outcome);
    }

    fn records(&self) -> Vec<Recorded> {
        let mut all = Vec::new();
        for path in files_in(&self.ground.host().state().join("overlays"), ".json") {
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
        for top in self.tops.values().filter(|_| self.ground.is_defined()) {
            assert!(top.exists(), "{} is defined and gone", top.display());
        }
        if !self.runs() {
            return;
        }
        let gone = || {
            let nodes = self.ground.nodes().into_iter();
            let files = nodes.filter_map(|node| Some(PathBuf::from(node["file"].as_str()?)));
            let gone = files.filter(|file| file.starts_with(self.images()) && !file.exists());
            gone.collect::<Vec<_>>()
        };
        // The guard of a killed backup removes a node, and then its file: it may do so between two looks.
        let (first, then) = (gone(), gone());
        let open = first.iter().find(|file| then.contains(file));
        assert!(open.is_none(), "{open:?} is open and gone");
    }

    /// What the disks show is what the guest wrote.
    #[track_caller]
    fn assert_view(&self) {
        for (disk, blocks) in &self.view {
            let shown = self.shown(disk, &self.tops[disk]);
            assert_eq!(shown.as_slice(), blocks, "{disk}");
        }
    }

    /// The bytes that the blocks of a disk are full of, through an image.
    #[track_caller]
    fn shown(&self, disk: &str, top: &Path) -> Vec<u8> {
        let raw = self.ground.host().folder().join("shown.raw");
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

    /// What each disk should run on: the overlay that is recorded to hold what the guest wrote. Where nothing
    /// is, or QEMU was told to go on with the image, whatever shows what the guest wrote.
    #[track_caller]
    fn right(&self) -> Tops {
        let records = self.records();
        let right = |disk: &'static str| {
            let (own, top) = (self.ground.own(disk), self.tops[disk].clone());
            let left = records.iter().find(|known| known.disk == disk && !known.back);
            let overlay = left.map(|known| known.overlay.clone());
            if let (Some(known), Some(overlay)) = (left, &overlay)
                && known.held
                && !known.pivoting
            {
                return (disk, overlay.clone());
            }
            let shows = |top: &PathBuf| top.exists() && self.shown(disk, top) == self.view[disk];
            let found = [Some(top), overlay, Some(own)].into_iter().flatten().find(shows);
            (disk, found.unwrap_or_else(|| panic!("nothing shows what {disk} had")))
        };
        DISKS.map(right).into()
    }

    /// A person sees that a definition names other images than it should.
    #[track_caller]
    fn notice(&mut self) {
        let right = self.right();
        if self.ground.is_defined() && right != self.tops {
            self.decide(right);
        }
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether a file is an overlay by its name; what a killed backup has left its guard removes.
fn is_overlay(name: &str) -> bool {
    name.contains("kvmsnap-") && name.ends_with(".qcow2")
}

/// The format of an image, by its name.
pub fn format_of(image: &Path) -> Format {
    match image.extension().is_some_and(|extension| extension == "raw") {
        true => Format::Raw,
        false => Format::Qcow2,
    }
}

// ---- a sequence ---------------------------------------------------------------------------------

impl<G: Ground> Machine<G> {
    fn sequence(&mut self, seed: u64) {
        self.random = Random(seed);
        self.story = vec![format!("seed {seed}")];
        for _ in 0..3 + self.random.below(6) {
            match self.runs() {
                true => self.step_running(),
                false if self.random.one_in(6) && self.would_fork() => {
                    self.fork();
                    break;
                }
                false => self.step_off(),
            }
        }
        self.settle();
    }

    fn crash(&mut self, effects: usize) -> Option<usize> {
        self.random.one_in(2).then(|| self.random.below(effects) + 1)
    }

    fn step_running(&mut self) {
        let kinds = if self.ground.is_defined() { 23 } else { 20 };
        match self.random.below(kinds) {
            0..6 => self.write(),
            6..11 => {
                let crash = self.crash(9);
                self.run("create", crash);
            }
            11..15 => {
                let crash = self.crash(25);
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
            18..20 => self.end(false),
            _ => self.define(),
        }
    }

    fn step_off(&mut self) {
        let kinds = if self.ground.is_defined() { 11 } else { 8 };
        match self.random.below(kinds) {
            0..2 => {
                let crash = self.crash(12);
                self.purge_off(crash);
            }
            2 => drop(self.run("create", None)),
            8.. => self.define(),
            _ => {
                self.notice();
                self.start();
            }
        }
    }

    fn define(&mut self) {
        let way = self.random.below(4);
        let done = self.ground.define_anew(way);
        self.tell(format!("defined anew: {done}"));
        self.look();
    }

    /// Purges while the machine is off; its disks are at their own images where that was done.
    fn purge_off(&mut self, crash: Option<usize>) -> Outcome {
        let outcome = self.run("purge", crash);
        for disk in DISKS {
            let known = self.records();
            let is_left = |known: &Recorded| known.disk == disk && !known.back;
            if !known.iter().any(is_left) {
                self.tops.insert(disk, self.ground.own(disk));
            }
        }
        self.look();
        outcome
    }

    /// Whether the overlays hold what the images do not, so that a start on these shows another time.
    fn would_fork(&self) -> bool {
        self.records().iter().any(|known| known.held && !known.back && !known.pivoting)
    }

    /// Somebody starts the guest on its own images by mistake.
    fn fork(&mut self) {
        self.notice();
        let (tops, view) = (self.tops.clone(), self.view.clone());
        let overlays = || self.records().into_iter().filter(|known| !known.back);
        let overlays: Vec<PathBuf> = overlays().map(|known| known.overlay).collect();
        self.decide(DISKS.map(|disk| (disk, self.ground.own(disk))).into());
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
            self.view = view;
            self.decide(tops);
            return;
        }
        let outcome = self.purge_off(None);
        if outcome.code == Some(0) {
            return;
        }
        self.assert_refused(&outcome, "", &overlays);
        if written.is_empty() {
            self.view = view;
            self.decide(tops);
            return;
        }
        // What was written to the images counts from here on.
        self.tell("give up the overlays, as the hint says");
        for file in files_in(&self.ground.host().state().join("overlays"), ".json") {
            fs::remove_file(file).expect("a record");
        }
        for overlay in files_in(&self.images(), "kvmsnap-") {
            fs::remove_file(overlay).expect("an overlay");
        }
        for disk in DISKS {
            let shown = self.shown(disk, &self.tops[disk]);
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
        if !self.runs() && self.random.one_in(2) {
            let outcome = self.purge_off(None);
            let refused = ["cannot be told", "was written to while"]
                .iter()
                .any(|words| outcome.stderr.contains(words));
            let refused = outcome.code == Some(1) && refused;
            assert!(outcome.code == Some(0) || refused, "{outcome:?}");
        }
        if !self.runs() {
            self.notice();
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
            let changed = format!("{} was written to while", self.ground.own(disk).display());
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
            assert_eq!(self.tops[disk], self.ground.own(disk));
        }
        for node in self.ground.nodes() {
            let file = name(Path::new(node["file"].as_str().unwrap_or_default()));
            assert!(!is_overlay(&file), "{node} is left");
        }
        let mut left = files_in(&self.images(), "kvmsnap-");
        left.retain(|file| is_overlay(&name(file)));
        left.extend(files_in(&self.ground.host().state().join("overlays"), ""));
        assert_eq!(left, Vec::<PathBuf>::new());
        self.assert_view();
    }
}

/// Runs sequences one after the other on one machine, and on a new one after a failure.
#[expect(clippy::print_stdout, reason = "seeds and stories are for whoever runs it")]
fn run_all<G: Ground>(seeds: &[u64], make: &impl Fn() -> G) -> Vec<u64> {
    let mut machine = None;
    let mut failed = Vec::new();
    for seed in seeds {
        let mut current = machine.take().unwrap_or_else(|| {
            let mut machine = Machine::new(make());
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

/// Runs sequences on a ground: of a plain run these many with seeds that are always the same, and as many
/// with new ones as `fresh` says. So many machines at once.
///
/// # Panics
/// When one broke a promise; all seeds are printed.
#[expect(clippy::print_stdout, reason = "seeds and stories are for whoever runs it")]
pub fn run<G: Ground>((fixed, fresh): (u64, u64), at_once: usize, make: impl Fn() -> G + Sync) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let first = u64::from(now.subsec_nanos()) << 20 | now.as_secs() & 0xF_FFFF;
    let seeds: Vec<u64> = match (number("KVMSNAP_SEED"), number("KVMSNAP_SEQUENCES")) {
        (Some(seed), _) => vec![seed],
        (None, Some(count)) => (first..first + count).collect(),
        (None, None) => (0..fixed).chain(first..first + fresh).collect(),
    };
    println!("sequences with seeds {seeds:?}");
    let start = Instant::now();
    let part = seeds.len().div_ceil(at_once);
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let make = &make;
        let threads: Vec<_> =
            seeds.chunks(part).map(|part| scope.spawn(move || run_all(part, make))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("it returns")).collect()
    });
    println!("{} sequences took {:?}", seeds.len(), start.elapsed());
    assert_eq!(failed, Vec::<u64>::new(), "seeds of sequences that broke a promise");
}
