//! R01 for domains of libvirt: kvmsnap is killed, or fails, at each of its effects on the world outside.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use integration::faults::{Contents, kinds};
use integration::libvirt::takes_sockets;
use integration::{Host, finish, spawn};
use serde_json::{Value, json};
use vm_fixtures::libvirt::{Domain, Libvirt};
use vm_fixtures::{Disk, Guest, MIB};

const DISKS: [&str; 2] = ["vda", "vdb"];
const SIZE: u64 = 4 * MIB;
const PIECE_LEN: usize = 192 << 10;
/// Domains that are tested at once: a round waits more than it works.
const WORKERS: usize = 3;

/// A running domain with two disks that has one backup, and what its disks hold.
struct Scene {
    host: Host,
    domain: Domain,
    contents: Contents,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// SIGKILL just before the effect.
    Crash,
    /// The effect fails.
    FailOnce,
    /// The effect fails, and all that follow.
    FailForGood,
}

impl Scene {
    fn new(libvirt: &Libvirt) -> Self {
        let disks = DISKS.map(|id| Disk::new(id, SIZE));
        let plan = disks.into_iter().fold(Guest::without_os(), vm_fixtures::GuestBuilder::disk);
        let domain = plan.under_libvirt().boot(libvirt);
        let mut scene = Self { host: Host::new(), domain, contents: Contents::new(&DISKS, SIZE) };
        scene.scribble(100);
        let outcome = finish(spawn(scene.command()));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        scene
    }

    fn command(&self) -> Command {
        self.host.command(["backup", "--json", self.domain.name()])
    }

    fn scribble(&mut self, turn: usize) {
        for (index, disk) in DISKS.into_iter().enumerate() {
            let byte = u8::try_from((turn * 2 + index) % 255 + 1).unwrap();
            let offset = (turn * 5 + index) % (SIZE as usize / PIECE_LEN) * PIECE_LEN;
            self.domain.qemu_io(disk, &format!("write -P {byte:#x} {offset} {PIECE_LEN}"));
            self.contents.note(disk, offset, &[byte; PIECE_LEN]);
        }
    }

    /// The effects of an incremental backup.
    fn effects(&mut self) -> Vec<String> {
        self.scribble(101);
        self.host.effects(self.command())
    }

    /// One fault, and what must be true afterwards.
    fn survives(&mut self, fault: Fault, n: usize, effect: &str) {
        let case = format!("{fault:?} at {n}, {effect}");
        self.scribble(2 * n);
        let mut command = self.command();
        match fault {
            Fault::Crash => command.env("KVMSNAP_CRASH_AT", n.to_string()),
            Fault::FailOnce => command.env("KVMSNAP_FAIL_AT", n.to_string()),
            Fault::FailForGood => command.env("KVMSNAP_FAIL_AT", format!("{n}+")),
        };

        let outcome = finish(spawn(command));

        assert_eq!(self.domain.state(), "running", "{case}");
        match (fault, outcome.code) {
            (Fault::Crash, code) => assert_eq!(code, None, "{case}: {outcome:?}"),
            (_, Some(0)) => {
                let snapshot: Value = serde_json::from_str(&outcome.stdout).expect("one object");
                self.host.assert_holds(&snapshot, &self.contents);
            }
            (_, Some(1)) => assert!(outcome.stderr.contains("error: "), "{case}: {outcome:?}"),
            _ => panic!("{case}: {outcome:?}"),
        }
        assert!(!outcome.stderr.contains("panicked"), "{case}: {outcome:?}");
        self.scribble(2 * n + 1);
        let next = finish(spawn(self.command()));
        assert_eq!(next.code, Some(0), "{case}: {next:?}");
        let next: Value = serde_json::from_str(&next.stdout).expect("one JSON object");
        assert!(kinds(&next).values().all(|kind| kind == "incremental"), "{case}: {next}");
        self.host.assert_holds(&next, &self.contents);
        self.assert_clean(&case);
    }

    /// Neither libvirt nor QEMU nor the host shows that there ever was a failure: one checkpoint, its
    /// bitmap on each disk, no job, export, scratch or socket.
    fn assert_clean(&self, case: &str) {
        self.host.assert_nothing_left();
        let checkpoints = self.domain.virsh("checkpoint-list", &["--name"]);
        assert_eq!(checkpoints.split_whitespace().count(), 1, "{case}: {checkpoints}");
        let job = self.domain.virsh("domjobinfo", &[]);
        assert!(job.contains("None"), "{case}: {job}");
        for command in ["query-jobs", "query-block-exports"] {
            let left = self.domain.qmp_command(command, &json!({}));
            assert_eq!(left, json!([]), "{case}: {command}");
        }
        for disk in DISKS {
            let bitmaps = self.domain.bitmaps(disk);
            assert_eq!(bitmaps.len(), 1, "{case}: one dirty bitmap on {disk}: {bitmaps:?}");
            let folder = self.domain.disk_path(disk).parent().unwrap().to_owned();
            let names = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.file_name());
            let ours = |name: &std::ffi::OsString| name.to_string_lossy().contains(".kvmsnap-");
            let scratch: Vec<_> = names.filter(ours).collect();
            assert!(scratch.is_empty(), "{case}: {scratch:?}");
        }
    }
}

/// A fault at every `stride`-th effect of an incremental backup.
fn sweep(fault: Fault, stride: usize) {
    let Some(libvirt) = Libvirt::start() else { return };
    let effects = Scene::new(&libvirt).effects();
    let (libvirt, effects) = (&libvirt, &effects);
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            scope.spawn(move || {
                let mut scene = Scene::new(libvirt);
                for n in (1..=effects.len()).step_by(stride).skip(worker).step_by(WORKERS) {
                    scene.survives(fault, n, &effects[n - 1]);
                }
                scene.host.assert_restic_is_content();
            });
        }
    });
}

#[test]
fn r01_killed_at_each_effect_on_a_domain_loses_only_the_run_in_progress() {
    sweep(Fault::Crash, 1);
}

#[test]
fn r01_an_effect_on_a_domain_that_fails_once_fails_the_run_and_harms_nobody() {
    sweep(Fault::FailOnce, 1);
}

#[test]
fn r01_effects_on_a_domain_that_fail_for_good_fail_the_run_and_the_next_one_mends() {
    sweep(Fault::FailForGood, 2);
}

/// A new effect does not come without its fault: the sweeps go through all of these.
#[test]
fn r01_the_effects_on_a_domain_are_known() {
    let Some(libvirt) = Libvirt::start() else { return };
    let effects: BTreeSet<String> = Scene::new(&libvirt).effects().into_iter().collect();
    let mut expected = BTreeSet::from([
        "guard: start",
        "journal: clear",
        "journal: write",
        "libvirt: end the backup job",
        "libvirt: remove the checkpoint",
        "libvirt: start a backup job",
        "repository: remove lock",
        "repository: settle packs",
        "repository: write index",
        "repository: write lock",
        "repository: write pack",
        "repository: write snapshot",
        "scratch: create",
        "watchdog: start",
    ]);
    if takes_sockets(&libvirt) {
        expected.insert("socket: create");
    }
    assert_eq!(effects.iter().map(String::as_str).collect::<BTreeSet<_>>(), expected);
}
