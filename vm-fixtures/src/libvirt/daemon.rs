//! Starts and ends libvirtd and virtlogd by hand: where tests run there is often no systemd.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{RUN_FOLDER, try_virsh};
use crate::process::{is_alive, pid_in};
use crate::tools::run_unchecked;

const START_TIMEOUT: Duration = Duration::from_secs(180);
/// How long a daemon may take to end before it is killed. libvirtd waits for calls that are under way, each of
/// which may wait 30 s for another.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);

/// Starts what does not run and waits until libvirt answers; the names of what it started.
pub(super) fn ensure() -> Result<Vec<&'static str>, String> {
    let_qemu_open_kvm();
    if try_virsh(&["uri"]).is_ok() {
        return Ok(Vec::new());
    }
    if Path::new("/run/systemd/system").exists() {
        return Err("libvirtd does not run: `systemctl start libvirtd`".to_owned());
    }
    let mut started = Vec::new();
    for daemon in ["virtlogd", "libvirtd"] {
        if pid_of(daemon).is_none() {
            let (success, _, stderr) = run_unchecked(daemon, &["-d"]);
            if !success {
                return Err(format!("{daemon} does not start: {stderr}"));
            }
            started.push(daemon);
        }
    }
    let deadline = Instant::now() + START_TIMEOUT;
    while let Err(error) = try_virsh(&["uri"]) {
        if Instant::now() > deadline {
            return Err(format!("libvirtd does not answer: {error}"));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(started)
}

/// Notes daemons to be ended once no test uses them.
pub(super) fn own(started: &[&str]) {
    if !started.is_empty() {
        let before = fs::read_to_string(own_daemons()).unwrap_or_default();
        let all = before + "\n" + &started.join("\n");
        fs::write(own_daemons(), all).expect("root may write to /run");
    }
}

/// Ends a daemon with this signal and waits until it is gone.
#[track_caller]
pub(super) fn stop(daemon: &str, signal: Signal) {
    let pid = pid_of(daemon).unwrap_or_else(|| panic!("{daemon} does not run"));
    kill(pid, signal).expect("root may send signals");
    let deadline = Instant::now() + STOP_TIMEOUT;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "{daemon} runs {STOP_TIMEOUT:?} after {signal}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ends the daemons that were noted.
pub(super) fn stop_own() {
    let own = fs::read_to_string(own_daemons()).unwrap_or_default();
    // libvirtd first, for it uses the other.
    for daemon in ["libvirtd", "virtlogd"].into_iter().filter(|daemon| own.contains(daemon)) {
        let Some(pid) = pid_of(daemon) else { continue };
        let deadline = Instant::now() + STOP_TIMEOUT;
        // One that has ended by itself is what we want.
        let _ = kill(pid, Signal::SIGTERM);
        while is_alive(pid) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        if is_alive(pid) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
    // It may not be there; the next test starts with what it finds.
    let _ = fs::remove_file(own_daemons());
}

fn own_daemons() -> PathBuf {
    Path::new(RUN_FOLDER).join("own-daemons")
}

/// The process that wrote the daemon's pid file, if it still is that daemon.
fn pid_of(daemon: &str) -> Option<Pid> {
    let pid = pid_in(Path::new(&format!("/run/{daemon}.pid")))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    (name.trim() == daemon).then_some(pid)
}

/// Lets everybody open `/dev/kvm`, as udev does. Without udev only root can open it, and libvirt 9 finds
/// out what QEMU can do with the right to override that, but takes what it found for outdated as QEMU's
/// user lacks it: it asks QEMU anew, four seconds, some 25 times for each definition. A group would
/// not do: another system in a folder that shares the device numbers its groups differently.
fn let_qemu_open_kvm() {
    let kvm = Path::new("/dev/kvm");
    let udev = Path::new("/run/udev/control").exists();
    if !udev && fs::metadata(kvm).is_ok_and(|kvm| kvm.permissions().mode() & 0o006 != 0o006) {
        // Without it tests are slow, no more.
        let _ = fs::set_permissions(kvm, fs::Permissions::from_mode(0o666));
    }
}
