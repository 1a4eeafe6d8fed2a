//! The main job from end to end, for people to watch: `make demo`.
//!
//! A guest keeps a diary on its disk. It is backed up twice while it writes; what is restored is booted in
//! another guest, and the diary there ends where the backup was taken.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use vm_fixtures::{Disk, FileSystem, Format, Guest, MIB};

const DISK: &str = "vda";
const DIARY: &str = "/mnt/vda/diary";

fn main() -> ExitCode {
    let start = Instant::now();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let host = Host { folder: folder.path().to_owned() };
    std::fs::write(host.path("password"), "correct horse battery staple\n").expect("a password");

    title("A guest boots: QEMU, a kernel, an agent, and a diary on an ext4 disk");
    let disk = Disk::new(DISK, 1024 * MIB).mounted(FileSystem::Ext4);
    let Some(guest) = Guest::builder().name("web").disk(disk).boot() else {
        return ExitCode::FAILURE;
    };
    say(&format!("up with its agent after {:.1} s", guest.boot_time().as_secs_f64()));
    // Some bulk, so that there is something to read, and a diary that never stops.
    guest.sh("dd if=/dev/urandom of=/mnt/vda/bulk bs=1M count=96 2>/dev/null; sync");
    guest.spawn(&["sh", "-c", &format!("n=0; while n=$((n+1)); do echo $n >> {DIARY}; done")]);
    let (qmp, qga) = (guest.qmp(), guest.qga());
    let backup = ["backup", "--qmp", text(&qmp), "--qga", text(&qga)];

    title("A repository, in the format of restic");
    host.kvmsnap(&["repository", "init"]);

    title("A full backup while the guest writes");
    host.kvmsnap(&backup);

    title("The guest goes on writing, then an incremental backup");
    let before = last_line(&guest, DIARY);
    host.kvmsnap(&backup);
    let after = last_line(&guest, DIARY);
    say(&format!("the diary was between line {before} and line {after} when this was taken"));

    title("What there is");
    host.kvmsnap(&["list"]);
    host.kvmsnap(&["verify", "--read-data"]);

    title("The host is lost: the guest ends, the disk is restored from the repository");
    guest.kill();
    drop(guest);
    let restored = host.path("restored");
    host.kvmsnap(&["restore", "latest:web", "--to", text(&restored)]);

    title("Another guest boots with the restored disk, and reads the diary");
    let image = Disk::existing(DISK, &restored.join("vda.qcow2"), Format::Qcow2);
    let Some(guest) = Guest::builder().name("web-restored").disk(image).boot() else {
        return ExitCode::FAILURE;
    };
    guest.sh("mkdir -p /restored && mount -t ext4 -o ro,noload /dev/vda /restored");
    let found = last_line(&guest, "/restored/diary");
    let gaps = guest.sh("n=0; while read line; do n=$((n+1)); [ \"$line\" = $n ] || echo $n; done < /restored/diary");
    say(&format!("the restored diary ends at line {found}, every line before it is there"));
    if !gaps.is_empty() || !(before..=after).contains(&found) {
        say("that is not the instant of the backup: the demo failed");
        return ExitCode::FAILURE;
    }

    title("And stock restic, which knows nothing of virtual machines, agrees");
    host.restic(&["check", "--read-data"]);
    say(&format!("done in {:.0} s", start.elapsed().as_secs_f64()));
    ExitCode::SUCCESS
}

/// The last whole line of the diary.
fn last_line(guest: &Guest, diary: &str) -> u64 {
    let line = guest.sh(&format!("tail -n 2 {diary} | head -n 1"));
    line.trim().parse().expect("the diary has numbered lines")
}

/// The host of the demo: everything is in one folder.
struct Host {
    folder: PathBuf,
}

impl Host {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn kvmsnap(&self, arguments: &[&str]) {
        let this = std::env::current_exe().expect("a program has a path");
        let mut command = Command::new(this.with_file_name("kvmsnap"));
        command
            .env("KVMSNAP_REPOSITORY", self.path("repository"))
            .env("KVMSNAP_PASSWORD_FILE", self.path("password"))
            .env("KVMSNAP_STATE_DIR", self.path("state"))
            .env("KVMSNAP_RUN_DIR", self.path("run"));
        run(command, "kvmsnap", arguments);
    }

    fn restic(&self, arguments: &[&str]) {
        let mut command = Command::new("restic");
        command
            .arg("--no-cache")
            .arg("--repo")
            .arg(self.path("repository"))
            .arg("--password-file")
            .arg(self.path("password"));
        run(command, "restic", arguments);
    }
}

/// Shows a command as a user would type it, and runs it.
fn run(mut command: Command, name: &str, arguments: &[&str]) {
    say(&format!("$ {name} {}", arguments.join(" ")));
    let status = command.args(arguments).status().expect("the program is built and installed");
    assert!(status.success(), "{name} failed");
}

fn title(text: &str) {
    say(&format!("\n== {text}"));
}

fn say(line: &str) {
    // With nobody to watch there is nothing to show.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}
