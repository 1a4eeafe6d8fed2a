//! Who and where we are, as key, lock and snapshot files record it.

use std::{fs, time::Duration};

use sha2::{Digest, Sha256};

pub(crate) fn hostname() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| "localhost".to_owned())
}

pub(crate) fn username() -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::getuid()).ok().flatten();
    user.map_or_else(|| nix::unistd::getuid().to_string(), |user| user.name)
}

/// Changes with every start of the host's kernel.
pub(crate) fn boot_id() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_owned())
}

/// A digest of `/etc/machine-id`, which itself is not to be shown around (`machine-id(5)`).
pub(crate) fn machine() -> Option<String> {
    let text = fs::read_to_string("/etc/machine-id").ok().filter(|text| !text.trim().is_empty())?;
    let digest = Sha256::new().chain_update(b"kvmsnap lock ").chain_update(text.trim()).finalize();
    Some(const_hex::encode(&digest[..16]))
}

/// Time since the host started, also while it slept: nobody sets this clock.
pub(crate) fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.try_into().unwrap_or_default()
}

/// When process `pid` of this host started, in clock ticks since boot (`proc_pid_stat(5)`, field 22).
pub(crate) fn process_start(pid: u32) -> Option<u64> {
    stat(pid, 22)?.parse().ok()
}

/// Whether process `pid` has ended, and is only there until its parent takes note of that: in some containers
/// nobody ever does. Its first thread may end before the others.
pub(crate) fn is_zombie(pid: u32) -> bool {
    let is_over = stat(pid, 3).is_some_and(|state| matches!(state.as_str(), "Z" | "X"));
    is_over && stat(pid, 20).and_then(|threads| threads.parse().ok()).is_some_and(|n: u32| n <= 1)
}

/// A field of `/proc/PID/stat`, counted as in `proc_pid_stat(5)`, from the third on.
fn stat(pid: u32, field: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program may contain anything, even parentheses: count from the last one.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(field - 3).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::backend::is_alive;

    #[test]
    fn a_process_has_one_start_time() {
        let start = process_start(std::process::id());
        assert!(start.is_some_and(|start| start > 0));
        assert_eq!(start, process_start(std::process::id()));
        assert_eq!(process_start(u32::MAX), None);
    }

    #[test]
    fn r18_a_process_that_ended_is_dead_also_where_nobody_takes_note() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        assert!(!is_zombie(std::process::id()));
        let deadline = Instant::now() + Duration::from_secs(30);
        while is_alive(child.id().cast_signed()) {
            assert!(Instant::now() < deadline, "it counts as alive");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(is_zombie(child.id()));
        child.wait().unwrap();
    }
}
