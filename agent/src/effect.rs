//! The counter through which every effect on the world outside passes, so that tests can end or fail
//! a run at each of them.
//!
//! `KVMSNAP_CRASH_AT=n` ends the process by SIGKILL just before its n-th effect, `KVMSNAP_FAIL_AT=n`
//! makes the n-th one fail (`n+`: that one and all later), `KVMSNAP_EFFECTS=FILE` appends the name of
//! each. Without these variables nothing happens here.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

struct Injection {
    crash_at: Option<u64>,
    fail_from: Option<u64>,
    fail_for_good: bool,
    log: Option<PathBuf>,
    count: AtomicU64,
}

static INJECTION: LazyLock<Injection> = LazyLock::new(|| {
    let text = |name: &str| std::env::var(name).ok();
    let fail = text("KVMSNAP_FAIL_AT").unwrap_or_default();
    Injection {
        crash_at: text("KVMSNAP_CRASH_AT").and_then(|n| n.parse().ok()),
        fail_from: fail.trim_end_matches('+').parse().ok(),
        fail_for_good: fail.ends_with('+'),
        log: text("KVMSNAP_EFFECTS").map(PathBuf::from),
        count: AtomicU64::new(0),
    }
});

/// Announces the effect that comes next. Call it right before anything that another process, a disk
/// or QEMU will see.
///
/// # Errors
/// Only the failure that `KVMSNAP_FAIL_AT` asks for.
pub fn about_to(name: &str) -> io::Result<()> {
    let injection = &*INJECTION;
    if injection.crash_at.is_none() && injection.fail_from.is_none() && injection.log.is_none() {
        return Ok(());
    }
    let n = injection.count.fetch_add(1, Ordering::SeqCst) + 1;
    if let Some(log) = &injection.log {
        let mut log = OpenOptions::new().create(true).append(true).open(log)?;
        writeln!(log, "{name}")?;
    }
    if injection.crash_at == Some(n) {
        let _ = kill(Pid::this(), Signal::SIGKILL);
    }
    match injection.fail_from {
        Some(from) if n == from || (n > from && injection.fail_for_good) => {
            Err(io::Error::other(format!("injected failure of effect {n}, {name}")))
        }
        _ => Ok(()),
    }
}
