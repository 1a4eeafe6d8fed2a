//! Real NBD tools for the tests: found or skipped aloud, started, and killed when dropped.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::print_stderr, reason = "skipped tests say so")]

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nbd::{Client, Options};
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;

/// Whether all tools are installed. Says so if not, and fails with `KVMSNAP_REQUIRE_QEMU=1`.
pub(crate) fn have(tools: &[&str]) -> bool {
    let missing: Vec<_> = tools.iter().filter(|tool| !installed(tool)).collect();
    if missing.is_empty() {
        return true;
    }
    let required = std::env::var_os("KVMSNAP_REQUIRE_QEMU").is_some_and(|value| value == "1");
    assert!(!required, "KVMSNAP_REQUIRE_QEMU=1, but these are missing: {missing:?}");
    eprintln!("SKIPPED: these are not installed: {missing:?}");
    false
}

fn installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}

/// Runs a tool to its end and returns what it printed; panics with its complaint if it fails.
pub(crate) fn run<S: AsRef<OsStr>>(tool: &str, args: &[S]) -> String {
    let output = Command::new(tool).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} failed: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// A server process with its socket, killed on drop.
pub(crate) struct Process {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Process {
    /// Starts a server and waits for its socket.
    pub(crate) fn start<S: AsRef<OsStr>>(tool: &str, args: &[S], socket: PathBuf) -> Self {
        let mut command = Command::new(tool);
        let child = command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let mut process = Self { child, socket };
        let deadline = Instant::now() + Duration::from_secs(120);
        while std::os::unix::net::UnixStream::connect(&process.socket).is_err() {
            let ended = process.child.try_wait().unwrap();
            assert!(ended.is_none(), "{tool} ended at once: {ended:?}");
            assert!(Instant::now() < deadline, "{tool} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        process
    }

    /// `nbdkit` in the foreground with these arguments.
    pub(crate) fn nbdkit(folder: &TempDir, args: &[&str]) -> Self {
        let socket = folder.path().join("nbdkit.sock");
        let mut all = vec!["-f", "-U", socket.to_str().unwrap()];
        all.extend(args);
        Self::start("nbdkit", &all, socket.clone())
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) async fn client(&self, options: Options) -> Client {
        Client::connect(&self.socket, options).await.unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn options(export: &str, contexts: &[&str]) -> Options {
    Options {
        export: export.to_owned(),
        contexts: contexts.iter().map(|&context| context.to_owned()).collect(),
        timeout: Duration::from_secs(20),
        ..Options::default()
    }
}

pub(crate) fn uri(export: &str, socket: &Path) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}
