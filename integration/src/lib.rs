//! What the tests share: a host with its own repository, state and password, on which the built
//! `kvmsnap` runs as a process of its own.

pub mod faults;
pub mod image_folder;
pub mod images;
pub mod libvirt;
pub mod overlays;
pub mod restored;
pub mod scripted_agent;
pub mod sequences;
pub mod servers;

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use repository::{Kdf, LocalFolder, Repository};
use serde_json::Value;
use tempfile::TempDir;
use vm_fixtures::Guest;
use vm_fixtures::servers::Server;

const PASSWORD: &str = "correct horse";
/// How long one command may take before the test fails: many times what any takes on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(300);

/// A host: repository, password, state, all in a folder that goes away.
#[derive(Debug)]
pub struct Host {
    folder: TempDir,
    /// Where the repository is: a folder, or a location elsewhere.
    repository: PathBuf,
    restic_repository: PathBuf,
    restic_arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// A host with a new repository.
    pub fn new() -> Self {
        let host = Self::without_repository();
        host.make_repository();
        host
    }

    /// A host whose repository has not been made.
    pub fn without_repository() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let password = folder.path().join("password");
        fs::write(&password, format!("{PASSWORD}\n")).expect("a password file");
        fs::set_permissions(&password, Permissions::from_mode(0o600)).expect("a file of ours");
        fs::write(folder.path().join("kvmsnap.toml"), "").expect("a configuration");
        let repository = folder.path().join("repository");
        let restic_repository = repository.clone();
        let (restic_arguments, environment) = (Vec::new(), Vec::new());
        Self { folder, repository, restic_repository, restic_arguments, environment }
    }

    /// A host with a new repository on a server.
    pub fn with_repository_on(server: &Server) -> Self {
        let mut host = Self::without_repository();
        host.repository = PathBuf::from(server.location());
        host.restic_repository = PathBuf::from(server.restic_location());
        host.restic_arguments = server.restic_arguments().to_vec();
        host.environment = server.environment().to_vec();
        host.ok(["repository", "init"]);
        host
    }

    /// Another host that has the repository of this one.
    pub fn neighbour(&self) -> Self {
        let mut host = Self::without_repository();
        host.repository.clone_from(&self.repository);
        host.restic_repository.clone_from(&self.restic_repository);
        host
    }

    /// The same host with its repository somewhere else, such as a small tmpfs.
    pub fn with_repository_at(repository: &Path) -> Self {
        let mut host = Self::without_repository();
        host.repository = repository.to_owned();
        host.restic_repository = repository.to_owned();
        host.make_repository();
        host
    }

    /// Makes the repository in its folder, with a password that costs nothing to try: tests start thousands
    /// of programs that do.
    fn make_repository(&self) {
        let folder = LocalFolder::create(&self.repository).expect("a folder of ours");
        let made = Repository::init(Arc::new(folder), PASSWORD.as_bytes(), Kdf::WEAK_FOR_TESTS);
        made.expect("a new repository");
    }

    /// A folder for what the test needs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The repository.
    pub fn repository(&self) -> &Path {
        &self.repository
    }

    /// The file with the password.
    pub fn password_file(&self) -> PathBuf {
        self.folder().join("password")
    }

    /// The configuration, empty unless the test writes it.
    pub fn config(&self) -> PathBuf {
        self.folder().join("kvmsnap.toml")
    }

    /// The state folder.
    pub fn state(&self) -> PathBuf {
        self.folder().join("state")
    }

    /// `kvmsnap` with these arguments, on this host, not started.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(program());
        command
            .args(arguments)
            // Whatever this machine has configured.
            .env("KVMSNAP_CONFIG", self.config())
            .env("KVMSNAP_REPOSITORY", &self.repository)
            .env("KVMSNAP_PASSWORD_FILE", self.password_file())
            .env("KVMSNAP_STATE_DIR", self.state())
            .env("KVMSNAP_RUN_DIR", self.folder().join("run"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Runs `kvmsnap` and returns what came of it.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Outcome {
        finish(spawn(self.command(arguments)))
    }

    /// Runs `kvmsnap`, which must succeed, and returns its standard output.
    pub fn ok<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        outcome.stdout
    }

    /// The command of a backup of a guest, with more arguments.
    pub fn backup_command(&self, guest: &Guest, more: &[&str]) -> Command {
        let mut command = self.command(["backup", "--json", "--qmp"]);
        command.arg(guest.qmp());
        if guest.has_agent() {
            command.arg("--qga").arg(guest.qga());
        }
        command.args(more);
        command
    }

    /// Backs up a guest and returns what came of it.
    pub fn try_backup(&self, guest: &Guest, more: &[&str]) -> Outcome {
        finish(spawn(self.backup_command(guest, more)))
    }

    /// Backs up a guest, which must succeed, and returns the snapshot's JSON line.
    pub fn backup(&self, guest: &Guest, more: &[&str]) -> Value {
        let outcome = self.try_backup(guest, more);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        serde_json::from_str(&outcome.stdout).expect("one JSON object")
    }

    /// All snapshots, oldest first.
    pub fn list(&self) -> Vec<Value> {
        let lines = self.ok(["list", "--json"]);
        lines.lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect()
    }

    /// Restores a snapshot as raw images into a new folder and returns the folder.
    pub fn restore(&self, snapshot: &str) -> PathBuf {
        let to = tempfile::tempdir_in(self.folder()).expect("a folder").keep();
        let to_text = to.to_str().expect("a plain path");
        self.ok(["restore", snapshot, "--format", "raw", "--to", to_text]);
        to
    }

    /// Stock restic on the repository, not started.
    pub fn restic_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("restic");
        command
            .args(["--no-cache", "--repo"])
            .arg(&self.restic_repository)
            .arg("--password-file")
            .arg(self.password_file())
            .args(&self.restic_arguments)
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Runs stock restic on the repository; it must succeed. Returns its standard output.
    pub fn restic(&self, arguments: &[&str]) -> Vec<u8> {
        let output = self.restic_command(arguments).output().expect("restic runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "restic {arguments:?}: {stderr}");
        output.stdout
    }

    /// Stock restic finds nothing wrong, every byte read.
    pub fn assert_restic_is_content(&self) {
        self.restic(&["check", "--read-data"]);
    }

    /// Nothing is left of any run: no undo record, no lock on the repository.
    pub fn assert_nothing_left(&self) {
        let names = |folder: &Path| -> Vec<_> {
            let entries = fs::read_dir(folder).map(|entries| entries.flatten().collect());
            entries.unwrap_or_else(|_| Vec::new()).iter().map(fs::DirEntry::file_name).collect()
        };
        assert_eq!(self.undo_records(), 0, "an undo record is left");
        // A run that was killed while it wrote its lock leaves a temporary file, which locks nobody out.
        // The store keeps it for a day: another host may own it.
        let mut locks = names(&self.repository.join("locks"));
        locks.retain(|name| !is_temporary_of_the_dead(name));
        assert!(locks.is_empty(), "locks are left: {locks:?}");
    }
}

/// Whether a name in a repository is that of a file that a process of this host never finished, and is
/// gone: `ID-tmp-PID-RANDOM`.
fn is_temporary_of_the_dead(name: &OsStr) -> bool {
    let owner = name.to_str().and_then(|name| name.split_once("-tmp-"));
    let pid = owner.and_then(|(_, owner)| owner.split_once('-')?.0.parse().ok());
    pid.is_some_and(|pid| kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH))
}

/// The guest runs on its own disks, with nothing of kvmsnap below it but good dirty bitmaps of backups.
///
/// # Panics
/// When something is left.
pub fn assert_guest_is_free(guest: &Guest, disks: &[&str]) {
    let nodes: Vec<_> =
        guest.node_names().into_iter().filter(|name| name.starts_with("kvmsnap")).collect();
    assert!(nodes.is_empty(), "left in QEMU: {nodes:?}");
    let exports = guest.qmp_command("query-block-exports", &serde_json::json!({}));
    assert_eq!(exports, serde_json::json!([]), "exports are left");
    let jobs = guest.qmp_command("query-jobs", &serde_json::json!({}));
    assert_eq!(jobs, serde_json::json!([]), "jobs are left");
    for disk in disks {
        assert_eq!(guest.active_node(disk), vm_fixtures::Disk::format_node(disk));
        let exported = guest.bitmaps(&vm_fixtures::Disk::format_node(disk));
        let copies =
            exported.iter().filter(|b| b["name"].as_str().unwrap_or("").ends_with("export"));
        assert_eq!(copies.count(), 0, "a copied bitmap is left on {disk}");
    }
}

/// What came of a command.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    start: Instant,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child of ours").is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only a test that failed leaves it running; one that ended is not hurt.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a command with its output kept.
///
/// # Panics
/// When it cannot be started.
pub fn spawn(mut command: Command) -> Running {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Running { child, start: Instant::now() }
}

/// Waits for a command's end.
///
/// # Panics
/// When it takes longer than five minutes.
pub fn finish(mut running: Running) -> Outcome {
    let (stdout, stderr) = (running.child.stdout.take(), running.child.stderr.take());
    let collect = |pipe: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_end(&mut text).expect("a pipe of ours");
            }
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let stdout = collect(stdout.map(|pipe| Box::new(pipe) as _));
    let stderr = collect(stderr.map(|pipe| Box::new(pipe) as _));
    let status = loop {
        if let Some(status) = running.child.try_wait().expect("a child of ours") {
            break status;
        }
        assert!(running.start.elapsed() < TIMEOUT, "the command hangs: {:?}", waits(running.pid()));
        std::thread::sleep(Duration::from_millis(5));
    };
    let took = running.start.elapsed();
    let (stdout, stderr) = (stdout.join().expect("collected"), stderr.join().expect("collected"));
    Outcome { code: status.code(), stdout, stderr, took }
}

/// What each thread of a process waits for in the kernel, as `proc(5)` tells: name and function.
fn waits(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let wait = |task: fs::DirEntry| {
        let text = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        format!("{} {}", text("comm").trim_end(), text("wchan"))
    };
    tasks.map(wait).collect()
}

/// Runs a tool, which must succeed.
///
/// # Panics
/// When it fails.
pub fn tool(mut command: Command) -> Output {
    let output = command.stdin(Stdio::null()).output().expect("the tool runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    output
}

/// The program under test: built beside the tests, unless `KVMSNAP_PROGRAM` names another.
pub fn program() -> PathBuf {
    if let Some(program) = std::env::var_os("KVMSNAP_PROGRAM") {
        return PathBuf::from(program);
    }
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.parent().and_then(Path::parent).expect("target/PROFILE/deps");
    let program = folder.join("kvmsnap");
    assert!(program.exists(), "{} is missing: `cargo build` makes it", program.display());
    program
}
