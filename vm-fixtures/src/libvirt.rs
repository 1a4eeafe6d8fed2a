//! A libvirt for tests: one system daemon, shared by all tests that run at a time, and domains in it.
//!
//! A second system daemon would take over the sockets of the first, so tests of all processes agree by
//! a lock on one file: whoever uses libvirt holds it shared, whoever restarts the daemon holds it
//! alone, and the last to leave ends a daemon that a test has started. One that ran before is used
//! and left alone. Debian's configuration is used as it is: QEMU runs as `libvirt-qemu`, and what
//! that user must not touch it cannot touch in a test either.

mod block_layer;
mod daemon;
mod domain;
mod folder;
mod other_host;
mod plan;

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

pub use self::domain::Domain;
pub use self::folder::Folder;
pub use self::other_host::OtherHost;
pub use self::plan::DomainBuilder;
use crate::tools::{available, qemu_available, required, run_unchecked, skip};

const URI: &str = "qemu:///system";
/// What the tests of one machine agree by.
const RUN_FOLDER: &str = "/run/kvmsnap-fixtures";
/// How long to wait for tests that need the daemon for themselves, or for all others to leave.
const JOIN_TIMEOUT: Duration = Duration::from_secs(900);

/// The daemon, for as long as this or a clone lives.
#[derive(Debug, Clone)]
pub struct Libvirt {
    user: Arc<User>,
}

#[derive(Debug)]
struct User {
    lock: File,
    alone: bool,
}

impl Libvirt {
    /// The daemon, started first where none runs, beside others who use it.
    ///
    /// `None`, said aloud, where QEMU or libvirt is not installed or we are not root.
    ///
    /// # Panics
    ///
    /// When it does not start; when something is missing and `KVMSNAP_REQUIRE_QEMU=1`.
    #[track_caller]
    pub fn start() -> Option<Self> {
        Self::join(false)
    }

    /// Like [`Self::start`], once nobody else uses it, so that it may be stopped. Never ask for it
    /// while holding another.
    #[track_caller]
    pub fn alone() -> Option<Self> {
        Self::join(true)
    }

    #[track_caller]
    fn join(alone: bool) -> Option<Self> {
        if !libvirt_available() {
            return None;
        }
        fs::create_dir_all(RUN_FOLDER).expect("root may write to /run");
        let lock = open(&Path::new(RUN_FOLDER).join("users"));
        let deadline = Instant::now() + JOIN_TIMEOUT;
        while let Err(error) = if alone { lock.try_lock() } else { lock.try_lock_shared() } {
            let busy = matches!(error, TryLockError::WouldBlock) && Instant::now() < deadline;
            assert!(busy, "no access to libvirt within {JOIN_TIMEOUT:?}: {error}");
            thread::sleep(Duration::from_millis(50));
        }
        let libvirt = Self { user: Arc::new(User { lock, alone }) };
        let _one_at_a_time = one_at_a_time();
        // Only what did not run when it was asked for is ended with the last test; what a test has
        // stopped and started again belongs to whom it did before.
        daemon::own(&daemon::ensure().unwrap_or_else(|error| panic!("{error}")));
        folder::sweep();
        Some(libvirt)
    }

    /// Ends libvirtd with this signal; the machines of its domains live on.
    ///
    /// # Panics
    ///
    /// Unless it came from [`Self::alone`].
    #[track_caller]
    pub fn stop_daemon(&self, signal: Signal) {
        assert!(self.user.alone, "others use the daemon too: ask for it with `Libvirt::alone`");
        daemon::stop("libvirtd", signal);
    }

    /// Starts libvirtd where it does not run.
    #[track_caller]
    pub fn start_daemon(&self) {
        let _one_at_a_time = one_at_a_time();
        daemon::ensure().unwrap_or_else(|error| panic!("{error}"));
    }

    /// Ends libvirtd with this signal and starts it again.
    #[track_caller]
    pub fn restart(&self, signal: Signal) {
        self.stop_daemon(signal);
        self.start_daemon();
    }

    /// A new folder below libvirt's own for images: QEMU's user can read it, and write only to the files
    /// that libvirt gives it. Domains whose names begin with the folder's are undefined with it.
    #[track_caller]
    pub fn folder(&self) -> Folder {
        let _one_at_a_time = one_at_a_time();
        Folder::new(self.clone())
    }

    /// Another host, that sees the same images.
    #[track_caller]
    pub fn other_host(&self) -> OtherHost {
        OtherHost::start()
    }

    /// Runs a command of `virsh`, which must succeed, and returns its standard output.
    #[track_caller]
    pub fn virsh(&self, args: &[&str]) -> String {
        match self.try_virsh(args) {
            Ok(output) => output,
            Err(error) => panic!("`virsh {}`: {error}", args.join(" ")),
        }
    }

    /// Runs a command of `virsh`: its standard output, or what it said when it failed.
    pub fn try_virsh(&self, args: &[&str]) -> Result<String, String> {
        try_virsh(args)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // Whoever can have it alone now is the last.
        if self.lock.unlock().is_ok() && self.lock.try_lock().is_ok() {
            daemon::stop_own();
        }
    }
}

fn libvirt_available() -> bool {
    let programs = [
        ("libvirtd", "libvirt-daemon"),
        ("virtlogd", "libvirt-daemon"),
        ("virsh", "libvirt-clients"),
    ];
    if !qemu_available() || !programs.iter().all(|(program, package)| available(program, package)) {
        return false;
    }
    let root = nix::unistd::geteuid().is_root();
    if !root {
        assert!(!required(), "tests with libvirt need root");
        skip("tests with libvirt need root");
    }
    root
}

fn try_virsh(args: &[&str]) -> Result<String, String> {
    try_virsh_at(URI, args)
}

fn try_virsh_at(uri: &str, args: &[&str]) -> Result<String, String> {
    let args = [&["-q", "-c", uri], args].concat();
    match run_unchecked("virsh", &args) {
        (true, stdout, _) => Ok(stdout),
        (false, _, stderr) => Err(stderr.trim().to_owned()),
    }
}

/// Held while the daemon or the list of folders changes. The lock dies with its process.
fn one_at_a_time() -> File {
    let lock = open(&Path::new(RUN_FOLDER).join("lock"));
    lock.lock().expect("/run is on a file system with locks");
    lock
}

fn open(path: &Path) -> File {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
