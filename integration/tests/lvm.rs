//! Disks on logical volumes, whose point in time is a snapshot of LVM. The host is a guest of its own, for
//! the machine that the tests run on may have no device mapper.

use std::thread;
use std::time::{Duration, Instant};

use integration::program;
use serde_json::Value;
use vm_fixtures::{InnerHost, MIB, Output};

/// How long what is emulated twice may take.
const WAIT: Duration = Duration::from_secs(600);
/// A guest with a disk on a classic volume and one on a thin one, both known to its QEMU as their device.
const SETUP: &str = "
pvcreate -q /dev/vdb && vgcreate -q vg /dev/vdb
lvcreate -q -y -n classic -L 32m vg
lvcreate -q -y -T -L 64m vg/pool && lvcreate -q -y -T -V 32m -n thin vg/pool
for lv in classic thin; do dd if=/dev/urandom of=/dev/vg/$lv bs=1M count=16 conv=fsync; done
echo 'correct horse' > /tmp/password
kvmsnap repository init";
const QEMU: &str = "
disk() { echo \"-blockdev driver=raw,node-name=$1-format,file.driver=host_device,file.filename=/dev/vg/$2 \
  -device virtio-blk-pci,drive=$1-format,id=$1\"; }
qemu-system-x86_64 -name web -m 32 -nodefaults -display none -qmp unix:/tmp/qmp,server=on,wait=off \
  $(disk vda classic) $(disk vdb thin) -daemonize -pidfile /tmp/qemu.pid";
/// What a command says, which it fails with and leaves nothing, where LVM takes longer than a guest may stand
/// still, or QEMU or the watchdog longer than they may to answer: as each may when all is emulated twice beside
/// other tests.
const TOO_SLOW: [&str; 3] =
    ["LVM, which the guest stands still for,", "no answer to `", "did not answer within "];
const BACKUP: &str = "kvmsnap backup --json --qmp /tmp/qmp --method lvm";

/// The inner host and its guest.
struct Scene {
    host: InnerHost,
}

impl Scene {
    /// A guest with one more argument for its QEMU: `-S` for one that does not begin to run.
    fn new(argument: &str) -> Option<Self> {
        let host = InnerHost::boot(&[&program()], &[256 * MIB])?;
        let scene = Self { host };
        scene.ok(SETUP);
        scene.ok(&format!("{QEMU} {argument}"));
        Some(scene)
    }

    /// A script, with what every `kvmsnap` needs in its environment.
    fn script(script: &str) -> String {
        let variables = "KVMSNAP_REPOSITORY=/tmp/repository KVMSNAP_PASSWORD_FILE=/tmp/password \
                         KVMSNAP_STATE_DIR=/tmp/state KVMSNAP_RUN_DIR=/tmp/run";
        format!("export {variables}; {script}")
    }

    fn run(&self, script: &str) -> Output {
        self.host.exec(&["sh", "-c", &Self::script(script)])
    }

    #[track_caller]
    fn ok(&self, script: &str) -> String {
        let output = self.run(script);
        assert!(output.success(), "`{script}`: {output:?}");
        output.stdout
    }

    /// Starts a backup that reads slowly, and waits until it reads both disks' snapshots.
    #[track_caller]
    fn start(&self, more: &str) -> i64 {
        let script = format!("exec {BACKUP} {more}");
        let start = || self.host.start(&["sh", "-c", &Self::script(&script)]);
        let mut pid = start();
        self.wait("the snapshots are read", || {
            if let Some(ended) = self.host.poll(pid) {
                assert!(is_too_slow(&ended), "{ended:?}");
                self.assert_clean();
                pid = start();
            }
            self.ok("ps").contains("qemu-storage-daemon")
        });
        pid
    }

    /// Runs a script, again where this machine was too slow for it.
    #[track_caller]
    fn run_in_time(&self, script: &str) -> Output {
        let mut output = None;
        self.wait("it is fast enough", || !is_too_slow(output.insert(self.run(script))));
        output.expect("it was run")
    }

    #[track_caller]
    fn finish(&self, pid: i64) -> Output {
        let start = Instant::now();
        loop {
            match self.host.poll(pid) {
                Some(output) => return output,
                None => assert!(start.elapsed() < WAIT, "the backup hangs"),
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    #[track_caller]
    fn wait(&self, what: &str, mut is_true: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_true() {
            assert!(start.elapsed() < WAIT, "not within {WAIT:?}: {what}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The digests of both volumes.
    fn digests(&self) -> Vec<String> {
        words(&self.ok("sha256sum < /dev/vg/classic; sha256sum < /dev/vg/thin"))
    }

    /// A snapshot restores to what the volumes held.
    #[track_caller]
    fn assert_restores(&self, snapshot: &Value, digests: &[String]) {
        let id = snapshot["id"].as_str().expect("a snapshot has an id");
        let restored = self.ok(&format!(
            "kvmsnap restore {id} --format raw --to /tmp/restored > /dev/null && cd /tmp/restored && \
             sha256sum < vda.raw; sha256sum < vdb.raw; rm -r /tmp/restored"
        ));
        assert_eq!(words(&restored), digests);
    }

    /// Only the volumes of the host are left, and no undo record.
    #[track_caller]
    fn assert_clean(&self) {
        let left = words(&self.ok("lvs --noheadings -o lv_name; ls /tmp/state/journal"));
        assert_eq!(left, ["classic", "pool", "thin"]);
    }
}

fn is_too_slow(output: &Output) -> bool {
    output.code == 1 && TOO_SLOW.iter().any(|words| output.stderr.contains(words))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().filter(|word| *word != "-").map(str::to_owned).collect()
}

#[test]
fn p1_volumes_are_backed_up_as_they_were_while_they_are_written_to() {
    let Some(scene) = Scene::new("") else { return };
    let before = scene.digests();
    let backup = scene.start("--limit-read 4MiB");
    for volume in ["classic", "thin"] {
        scene
            .ok(&format!("dd if=/dev/urandom of=/dev/vg/{volume} bs=1M seek=8 count=3 conv=fsync"));
    }

    let outcome = scene.finish(backup);

    assert_eq!(outcome.code, 0, "{outcome:?}");
    let made: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
    assert_eq!((&made["method"], &made["kind"]), (&"lvm".into(), &"full".into()), "{made}");
    scene.assert_restores(&made, &before);
    scene.assert_clean();
    assert!(scene.digests().iter().all(|digest| !before.contains(digest)), "both were written to");

    let next = scene.run_in_time(BACKUP);
    assert!(next.success(), "{next:?}");
    let next: Value = serde_json::from_str(&next.stdout).expect("one JSON object");

    assert_eq!(next["kind"], "rescan", "{next}");
    // Only a guest that runs is paused: it went on after the first one.
    assert!(next["pause_ms"].as_u64().is_some(), "{next}");
    scene.assert_clean();
}

#[test]
fn p1_a_snapshot_that_overflows_fails_the_backup_and_leaves_nothing() {
    let Some(scene) = Scene::new("-S") else { return };
    let backup = scene.start("--limit-read 64KiB --lvm-size 8MiB");

    scene.ok("dd if=/dev/urandom of=/dev/vg/classic bs=1M count=16 conv=fsync");

    let outcome = scene.finish(backup);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("% full"), "{outcome:?}");
    assert!(outcome.stderr.contains("--lvm-size makes it larger"), "{outcome:?}");
    scene.assert_clean();
    assert_eq!(scene.ok("kvmsnap list --json"), "");
}

#[test]
fn r01_the_snapshots_of_a_killed_run_are_removed_and_no_others() {
    let Some(scene) = Scene::new("-S") else { return };
    scene.ok("lvcreate -q -y -s -n mine -L 8m vg/classic");
    let names = || words(&scene.ok("lvs --noheadings -o lv_name"));
    let backup = scene.start("--limit-read 64KiB");

    scene.ok(&format!("kill -KILL {backup}"));

    scene.finish(backup);
    let mine = ["classic", "mine", "pool", "thin"];
    scene.wait("the guard removes them", || names() == mine);
    let effects = scene.run_in_time(&format!(
        "rm -f /tmp/effects; KVMSNAP_EFFECTS=/tmp/effects {BACKUP} > /tmp/made && cat /tmp/effects"
    ));
    let effects: Vec<&str> = effects.stdout.lines().collect();
    let lvm = effects.iter().enumerate().filter(|(_, effect)| effect.starts_with("lvm: "));
    let lvm: Vec<usize> = lvm.map(|(index, _)| index + 1).collect();
    assert_eq!(lvm.len(), 4, "{effects:?}");
    for n in &lvm[1..] {
        // Its guard would do the same while doctor looks, in three seconds: in which two more programs may not
        // even have been started here.
        let killed = scene.run_in_time(&format!(
            "KVMSNAP_CRASH_AT={n} {BACKUP}; code=$?; \
             set -- $(ps | grep 'self/ex[e] guard') && kill -KILL $1 && exit $code"
        ));
        assert_eq!(killed.code, 137, "{killed:?}");
        if lvm.ends_with(&[*n]) {
            // They do not end with its QEMU.
            scene.ok("kill -KILL $(cat /tmp/qemu.pid)");
        }

        let told = scene.run_in_time("kvmsnap doctor");
        let mended = scene.run_in_time("kvmsnap doctor --repair");

        assert!(mended.success(), "killed at effect {n}: {mended:?}");
        assert!(told.stdout.contains("without removing its LVM snapshots"), "{told:?}");
        assert_eq!(names(), mine, "killed at effect {n}: {told:?}");
        assert_eq!(scene.ok("ls /tmp/state/journal"), "", "killed at effect {n}: {told:?}");
    }
}
