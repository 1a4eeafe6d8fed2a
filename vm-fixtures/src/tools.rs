//! The programs of the host that the fixtures use, and what happens when one is missing.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

/// How long a tool may run: `mkfs` takes moments, making a Debian from its packages minutes.
const TOOL_TIMEOUT: Duration = Duration::from_secs(900);

/// What a fixture cannot work without, and the Debian package it is in.
const NEEDED: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("stdbuf", "coreutils"),
    ("qemu-img", "qemu-utils"),
    ("setpriv", "util-linux"),
];

/// Whether guests can be started here.
///
/// Says on standard error what is missing, past the capture of the test harness, so that a skipped
/// test does not look like one that passed.
///
/// # Panics
///
/// When something is missing and `KVMSNAP_REQUIRE_QEMU=1`.
pub fn qemu_available() -> bool {
    NEEDED.iter().all(|(program, package)| available(program, package))
}

/// Whether one program is there; the same outcome as [`qemu_available`] when it is not.
///
/// # Panics
///
/// When it is missing and `KVMSNAP_REQUIRE_QEMU=1`.
pub fn available(program: &str, package: &str) -> bool {
    let found = find(program).is_some();
    if !found {
        let hint = "`scripts/packages test` installs it";
        assert!(!required(), "`{program}` (package {package}) is missing: {hint}");
        skip(&format!("`{program}` (package {package}) is missing; {hint}"));
    }
    found
}

/// Says why a test does nothing.
pub(crate) fn skip(why: &str) {
    let thread = thread::current();
    let test = thread.name().unwrap_or("a test");
    // Nobody is left to tell when standard error is closed.
    let _ = std::io::stderr().write_all(format!("SKIPPED {test}: {why}\n").as_bytes());
}

/// Whether a missing program fails a test instead of skipping it.
pub(crate) fn required() -> bool {
    env::var_os("KVMSNAP_REQUIRE_QEMU").is_some_and(|value| value == "1")
}

/// Where a program is. Looks into the administrator's folders too: `mkfs.ext4` is not on a user's path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let admin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut candidates = env::split_paths(&path).chain(admin).map(|folder| folder.join(program));
    candidates.find(|candidate| candidate.is_file())
}

/// Runs a tool to its end and returns what it wrote to standard output.
///
/// # Panics
///
/// When it is missing, fails, or takes longer than a quarter of an hour.
#[track_caller]
pub fn run(program: &str, args: &[impl AsRef<OsStr>]) -> String {
    let (success, stdout, stderr) = run_unchecked(program, args);
    let args: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
    assert!(success, "`{program} {}` failed:\n{stdout}{stderr}", args.join(" "));
    stdout
}

/// Runs a tool to its end: whether it succeeded, its standard output, its standard error.
#[track_caller]
pub(crate) fn run_unchecked(program: &str, args: &[impl AsRef<OsStr>]) -> (bool, String, String) {
    let Some(path) = find(program) else {
        panic!("`{program}` is missing: `scripts/packages test` installs it")
    };
    let mut child = Command::new(path)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start `{program}`: {error}"));
    let mut stdout = child.stdout.take().expect("it was asked for");
    let mut stderr = child.stderr.take().expect("it was asked for");
    let stdout = thread::spawn(move || read_text(&mut stdout));
    let stderr = thread::spawn(move || read_text(&mut stderr));
    let deadline = Instant::now() + TOOL_TIMEOUT;
    let status = loop {
        if let Some(status) = child.try_wait().expect("the child is ours") {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().expect("the child is ours");
            child.wait().expect("the child is ours");
            panic!("`{program}` did not end within {TOOL_TIMEOUT:?}");
        }
        thread::sleep(Duration::from_millis(2));
    };
    let text = |reader: thread::JoinHandle<String>| reader.join().expect("reading cannot panic");
    (status.success(), text(stdout), text(stderr))
}

/// The shared libraries of a program, as the host's loader finds them, the loader itself included.
#[track_caller]
pub(crate) fn shared_libraries(program: &Path) -> Vec<PathBuf> {
    let listing = run("ldd", &[program]);
    let paths = listing.split_whitespace().filter(|word| word.starts_with('/'));
    paths.map(PathBuf::from).filter(|path| fs::metadata(path).is_ok()).collect()
}

fn read_text(pipe: &mut impl std::io::Read) -> String {
    let mut bytes = Vec::new();
    // What was read before an error is still the best account of what happened.
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
