//! R01: kvmsnap is killed, or fails, at each of its effects on the world outside.
//!
//! The list of effects is a golden file, so that a new one does not come without its test. To accept a
//! change: `KVMSNAP_BLESS=1 cargo test -p integration --test crash golden`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use integration::faults::{
    Contents, Fault, STILL_MAX, assert_goes_on, kinds, wait_for_export, wait_until,
};
use integration::restored::assert_same_bytes;
use integration::{Host, assert_guest_is_free, finish, spawn, tool};
use nix::sys::signal::Signal;
use vm_fixtures::{Disk, Guest, MIB};

const DISKS: [&str; 2] = ["vda", "vdb"];
const SIZE: u64 = 4 * MIB;
/// Machines that are tested at once: a round waits more than it works.
const WORKERS: usize = 4;
/// The guard waits three seconds for another run, and a busy machine longer.
const GUARD_TIMEOUT: Duration = Duration::from_secs(120);
const IMPLICIT: &[&str] = &["--implicit-filter"];
const SUSPEND: &[&str] = &["--method", "suspend"];

/// A machine with two disks that has one backup, and what its disks hold.
struct Scene {
    host: Host,
    guest: Guest,
    contents: Contents,
    more: &'static [&'static str],
}

impl Scene {
    fn new(more: &'static [&'static str]) -> Option<Self> {
        let disks = DISKS.map(|id| Disk::new(id, SIZE));
        let guest = disks.into_iter().fold(Guest::without_os(), vm_fixtures::GuestBuilder::disk);
        let guest = guest.boot()?;
        let mut scene =
            Self { host: Host::new(), guest, contents: Contents::new(&DISKS, SIZE), more };
        scene.contents.scribble(&scene.guest, 100);
        scene.host.backup_and_compare(&scene.guest, &scene.contents, more);
        Some(scene)
    }

    /// The effects of an incremental backup.
    fn effects(&mut self) -> Vec<String> {
        self.contents.scribble(&self.guest, 101);
        self.host.effects(self.host.backup_command(&self.guest, self.more))
    }

    /// One fault, and what must be true afterwards.
    fn survives(&mut self, fault: Fault, n: usize, effect: &str) {
        let Self { host, guest, contents, more } = self;
        let case = format!("{fault:?} at {n}, {effect}");
        contents.scribble(guest, 2 * n);

        let outcome = finish(spawn(fault.at(n, host.backup_command(guest, more))));

        let (ended, before) = (Instant::now(), contents.clone());
        assert_goes_on(guest);
        assert_eq!(guest.status(), "running", "{case}");
        contents.scribble(guest, 2 * n + 1);
        assert!(ended.elapsed() < 12 * STILL_MAX, "{case}: {:?}", ended.elapsed());
        host.assert_honest(&case, fault, &outcome, &before);
        if fault != Fault::Crash && host.undo_records() == 0 {
            assert_guest_is_free(guest, &DISKS);
        }
        let next = host.try_backup(guest, more);
        assert_eq!(next.code, Some(0), "{case}: {next:?}");
        let next = serde_json::from_str(&next.stdout).expect("one JSON object");
        assert!(kinds(&next).values().all(|kind| kind == "incremental"), "{case}: {next}");
        let warnings = next["warnings"].as_array().expect("a list of warnings");
        let is_expected = |warning: &serde_json::Value| {
            *more == SUSPEND && warning.to_string().contains("the guest stood still")
        };
        assert!(warnings.iter().all(is_expected), "{case}: {next}");
        host.assert_holds(&next, contents);
        host.assert_all_clean(guest, &DISKS);
    }
}

/// A fault at every `stride`-th effect of an incremental backup.
fn sweep(fault: fn(usize) -> Fault, more: &'static [&'static str], stride: usize) {
    let Some(mut scene) = Scene::new(more) else { return };
    let effects = scene.effects();
    drop(scene);
    let effects = &effects;
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            scope.spawn(move || {
                let mut scene = Scene::new(more).expect("QEMU is there");
                for n in (1..=effects.len()).step_by(stride).skip(worker).step_by(WORKERS) {
                    scene.survives(fault(n), n, &effects[n - 1]);
                }
                scene.host.assert_restic_is_content();
            });
        }
    });
}

#[test]
fn r01_killed_at_each_effect_loses_only_the_run_in_progress() {
    sweep(|_| Fault::Crash, &[], 1);
}

#[test]
fn r01_killed_with_the_implicit_filter_loses_only_the_run_in_progress() {
    sweep(|_| Fault::Crash, IMPLICIT, 3);
}

#[test]
fn r01_effects_that_fail_fail_the_run_and_harm_nobody() {
    sweep(Fault::failing, &[], 1);
}

#[test]
fn r01_failures_with_the_implicit_filter_harm_nobody() {
    sweep(Fault::failing, IMPLICIT, 3);
}

#[test]
fn r01_p2_killed_at_each_effect_while_its_guest_stands_still_the_guest_goes_on() {
    sweep(|_| Fault::Crash, SUSPEND, 1);
}

#[test]
fn r01_p2_failures_while_the_guest_stands_still_let_it_go_on() {
    sweep(Fault::failing, SUSPEND, 3);
}

#[test]
fn r01_the_golden_list_of_effects_is_complete() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    let Some(mut implicit) = Scene::new(IMPLICIT) else { return };
    let Some(mut suspended) = Scene::new(SUSPEND) else { return };
    let fresh = Host::without_repository();
    let restored = scene.host.folder().join("restored");
    let restore = |host: &Host| {
        let mut command = host.command(["restore", "latest:fixture", "--to"]);
        command.arg(&restored);
        command
    };
    for (scene, title) in [
        (&mut scene, "incremental backup"),
        (&mut implicit, "incremental backup by the implicit filter"),
        (&mut suspended, "incremental backup of a guest that stands still"),
    ] {
        scene.contents.scribble(&scene.guest, 101);
        scene.host.golden_effects(title, scene.host.backup_command(&scene.guest, scene.more));
    }
    scene.host.golden_effects("restore", restore(&scene.host));
    fresh.golden_effects("repository init", fresh.command(["repository", "init"]));
}

#[test]
fn r01_p2_a_killed_run_is_undone_by_its_guard_where_no_other_run_comes() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    scene.contents.write_noise(&scene.guest, "vda", 0, MIB as usize, 7);
    let slow = ["--limit-read", "64KiB"];
    let mut running = spawn(scene.host.backup_command(&scene.guest, &slow));
    wait_for_export(&scene.guest, &mut running);

    integration::faults::signal(running.pid(), Signal::SIGKILL);

    finish(running);
    wait_until(GUARD_TIMEOUT, "the guard undoes the run", || scene.host.undo_records() == 0);
    assert_guest_is_free(&scene.guest, &DISKS);
    let next = scene.host.backup_and_compare(&scene.guest, &scene.contents, &[]);
    assert_eq!(next["kind"], "incremental", "{next}");
    scene.host.assert_all_clean(&scene.guest, &DISKS);
}

#[test]
fn r01_p5_a_killed_restore_leaves_no_half_disk_under_a_final_name_and_is_taken_up() {
    let Some(scene) = Scene::new(&[]) else { return };
    let restore = |to: &Path, format: &str, more: &[&str]| {
        let to = to.to_str().expect("a plain path");
        let mut command = scene.host.command(["restore", "latest:fixture", "--format", format]);
        command.args(["--to", to]).args(more);
        command
    };
    for format in ["raw", "qcow2"] {
        let first = scene.host.folder().join(format!("{format}-first"));
        let effects = scene.host.effects(restore(&first, format, &[]));
        assert!(effects.iter().filter(|effect| *effect == "restore: write").count() > 2);
        for n in 1..=effects.len() {
            let to = scene.host.folder().join(format!("{format}-{n}"));
            let outcome = finish(spawn(Fault::Crash.at(n, restore(&to, format, &[]))));
            assert_eq!(outcome.code, None, "{outcome:?}");
            let missing = |disk: &&str| !to.join(format!("{disk}.{format}")).exists();
            let missing: Vec<&str> = DISKS.iter().copied().filter(missing).collect();
            for disk in DISKS.iter().filter(|disk| !missing.contains(disk)) {
                assert_same_image(format, &first, &to, disk);
            }

            // The same command, but for disks that have their names already.
            let more: Vec<&str> = missing.iter().flat_map(|disk| ["--disk", disk]).collect();
            let all = missing.len() == DISKS.len();
            if !missing.is_empty() {
                let again = restore(&to, format, if all { &[] } else { &more });
                assert_eq!(finish(spawn(again)).code, Some(0), "after effect {n}");
            }

            DISKS.iter().for_each(|disk| assert_same_image(format, &first, &to, disk));
            assert_eq!(names(&to), names(&first), "nothing is left after effect {n}");
        }
    }
    // Breaks the lock of the last one that was killed.
    scene.host.list();
    scene.host.assert_nothing_left();
    scene.host.assert_restic_is_content();
}

/// The same bytes, and to QEMU the same disk.
fn assert_same_image(format: &str, one: &Path, other: &Path, disk: &str) {
    let [one, other] = [one, other].map(|folder| folder.join(format!("{disk}.{format}")));
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", format, "-F", format]).args([&one, &other]);
    tool(compare);
    assert_same_bytes(&one, &other);
}

fn names(folder: &Path) -> BTreeSet<OsString> {
    let entries = fs::read_dir(folder).expect("a folder");
    entries.map(|entry| entry.expect("an entry").file_name()).collect()
}

#[test]
fn p5_a_restore_takes_up_only_what_proves_to_be_right_and_sweeps_the_rest() {
    let Some(mut scene) = Scene::new(&[]) else { return };
    let to = scene.host.new_folder();
    let restore = |format: &str| {
        let mut command = scene.host.command(["restore", "latest:fixture", "--format", format]);
        command.arg("--to").arg(&to);
        command
    };
    let begun = |format: &str| {
        let outcome = finish(spawn(Fault::Crash.at(4, restore(format))));
        assert_eq!(outcome.code, None, "{outcome:?}");
        let left: Vec<_> = names(&to).into_iter().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        to.join(&left[0])
    };
    // All of it is there, but nothing is as it was: neither data nor holes.
    let partial = begun("raw");
    fs::write(&partial, vec![0xee; SIZE as usize + 1]).expect("a file of ours");
    assert_eq!(finish(spawn(restore("raw"))).code, Some(0));
    scene.contents.assert_restored(&to);
    fs::remove_dir_all(&to).expect("a folder of ours");

    // Another format, and then another snapshot.
    begun("raw");
    begun("qcow2");
    scene.contents.scribble(&scene.guest, 102);
    scene.host.backup(&scene.guest, &[]);
    assert_eq!(finish(spawn(restore("raw"))).code, Some(0));
    scene.contents.assert_restored(&to);
    assert_eq!(names(&to), ["manifest.json", "vda.raw", "vdb.raw"].map(OsString::from).into());
}

#[test]
fn r01_a_killed_repository_init_can_be_made_again() {
    let whole = Host::without_repository();
    let effects = whole.effects(whole.command(["repository", "init"]));
    for n in 1..=effects.len() {
        for fault in [Fault::Crash, Fault::FailOnce, Fault::FailForGood] {
            let host = Host::without_repository();
            let init = host.command(["repository", "init"]);
            let outcome = finish(spawn(fault.at(n, init)));
            assert_ne!(outcome.code, Some(0), "{fault:?} at {n}: {outcome:?}");

            host.ok(["repository", "init"]);

            assert!(host.list().is_empty());
            host.assert_restic_is_content();
        }
    }
}

#[test]
fn r01_random_kills_of_a_freezing_backup_never_hold_the_guest_for_a_second() {
    let plan = Guest::builder()
        .disk(Disk::new("vda", 64 * MIB).mounted(vm_fixtures::FileSystem::Ext4))
        .disk(Disk::new("vdb", 16 * MIB));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    // The longest time between two writes to the frozen file system is what the guest suffers.
    guest.write_file("/tmp/beat", BEAT.as_bytes());
    let whole = host.backup(&guest, &[]);
    assert_eq!(whole["consistency"], "filesystem", "{whole}");
    let took = host.try_backup(&guest, &[]).took;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for turn in 0..10 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(turn);
        let delay = took.mul_f64(((random >> 33) % 1000) as f64 / 1000.0);
        // Not by the writer itself, which may come to it only after it was told to stop.
        guest.sh("rm -f /tmp/stop");
        let beat = guest.spawn(&["sh", "/tmp/beat"]);

        let running = spawn(host.backup_command(&guest, &[]));
        // Not synchronisation: the moment of the kill is what is random here.
        std::thread::sleep(delay);
        integration::faults::signal(running.pid(), Signal::SIGKILL);
        finish(running);

        let case = format!("killed after {delay:?} of {took:?}");
        assert_goes_on(&guest);
        let gap = longest_gap(&guest, beat, &case);
        assert!(gap < STILL_MAX, "{case}: the guest stood still for {gap:?}");
        let next = host.backup(&guest, &[]);
        assert_eq!(next["kind"], "incremental", "{case}: {next}");
        assert_eq!(next["consistency"], "filesystem", "{case}: {next}");
        host.assert_all_clean(&guest, &["vda", "vdb"]);
    }
    host.assert_restic_is_content();
}

/// Writes to a file system again and again until told to stop; prints the longest time, in hundredths
/// of a second, between two writes.
const BEAT: &str = r#"
max=0; read last _ < /proc/uptime; last=${last%.*}${last#*.}
while [ ! -e /tmp/stop ]; do
    echo "$last" > /mnt/vda/beat
    read now _ < /proc/uptime; now=${now%.*}${now#*.}
    [ $((now - last)) -gt $max ] && max=$((now - last))
    last=$now
done
echo $max
"#;

fn longest_gap(guest: &Guest, beat: i64, case: &str) -> Duration {
    guest.sh("touch /tmp/stop");
    let start = Instant::now();
    loop {
        if let Some(output) = guest.poll(beat) {
            let hundredths: u64 = output.stdout.trim().parse().expect("a number of hundredths");
            return Duration::from_millis(hundredths * 10);
        }
        if start.elapsed() > Duration::from_secs(60) {
            // Whether it was told to stop, and where it waits.
            let state = format!("ls /tmp/stop; cat /proc/{beat}/stat /proc/{beat}/wchan");
            let state = guest.exec(&["sh", "-c", &state]);
            panic!("{case}: the guest's writer hangs: {state:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
