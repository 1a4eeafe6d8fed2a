"""libvirt's daemon: started where none runs, and ended again.

The test rig shares one daemon among all tests of the machine by a lock on one file
(vm-fixtures/src/libvirt.rs), and a run joins in: it holds the lock shared, and the last to leave ends
what one of them has started."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

from settings import BenchError, Skipped, program_of_root

RUN = Path("/run/kvmsnap-fixtures")
OWN = RUN / "own-daemons"
# libvirtd uses the other.
DAEMONS = ["virtlogd", "libvirtd"]
URI = "qemu:///system"
# A test that restarts the daemon has it alone for some minutes.
JOIN_LIMIT_S = 900
START_LIMIT_S = 60
STOP_LIMIT_S = 20
VIRSH_LIMIT_S = 120


def virsh(*words, script=None, check=True):
    """Runs a command of virsh, or a script of such commands; returns what it printed."""
    done = subprocess.run(["virsh", "-q", "-c", URI, *map(str, words)], text=True, input=script or "",
                          timeout=VIRSH_LIMIT_S, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "LC_ALL": "C"})
    if check and (done.returncode or script and done.stderr):
        raise BenchError(f"`virsh {' '.join(map(str, words))}` failed: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def running():
    """libvirt answers as long as this is entered."""
    missing = [name for name in ["virsh", *DAEMONS] if program_of_root(name) is None]
    if missing:
        raise Skipped(f"`{missing[0]}` is not installed: `scripts/packages bench` installs it")
    if os.geteuid() != 0:
        raise Skipped(f"domains of {URI} need root")
    RUN.mkdir(exist_ok=True)
    # A daemon that is started inherits neither of the files: Python closes them.
    with open(RUN / "users", "a") as users:
        _lock(users, fcntl.LOCK_SH)
        try:
            with open(RUN / "lock", "a") as one_at_a_time:
                _lock(one_at_a_time, fcntl.LOCK_EX)
                _ensure()
            yield
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)
            # Whoever can have it alone now is the last.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _stop_own()


def _lock(file, how):
    deadline = time.monotonic() + JOIN_LIMIT_S
    while True:
        try:
            return fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BenchError(f"tests keep libvirt to themselves for {JOIN_LIMIT_S} s")
            time.sleep(0.1)


def _answers():
    done = subprocess.run(["virsh", "-q", "-c", URI, "uri"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=VIRSH_LIMIT_S)
    return done.returncode == 0


def _ensure():
    _let_qemu_open_kvm()
    if _answers():
        return
    if Path("/run/systemd/system").exists():
        raise Skipped("libvirtd does not run: `systemctl start libvirtd`")
    for name in DAEMONS:
        if _pid_of(name) is None:
            with open(OWN, "a") as own:
                own.write(f"{name}\n")
            subprocess.run([program_of_root(name), "-d"], stdin=subprocess.DEVNULL,
                           timeout=START_LIMIT_S, check=False)
    deadline = time.monotonic() + START_LIMIT_S
    while not _answers():
        if time.monotonic() > deadline:
            raise BenchError("libvirtd does not answer; its message is above")
        time.sleep(0.02)


def _let_qemu_open_kvm():
    """As udev does. Otherwise libvirt 9 asks QEMU anew what it can do, some 25 times for each domain
    that is defined: more than a minute (vm-fixtures/src/libvirt/daemon.rs)."""
    kvm = Path("/dev/kvm")
    if kvm.exists() and not Path("/run/udev/control").exists() and kvm.stat().st_mode & 0o6 != 0o6:
        kvm.chmod(0o666)


def _stop_own():
    own = OWN.read_text().split() if OWN.exists() else []
    for name in [name for name in reversed(DAEMONS) if name in own]:
        for number in [signal.SIGTERM, signal.SIGKILL]:
            _end(name, number)
    OWN.unlink(missing_ok=True)


def _end(name, number):
    pid = _pid_of(name)
    if pid is None:
        return
    os.kill(pid, number)
    deadline = time.monotonic() + STOP_LIMIT_S
    while _pid_of(name) == pid and time.monotonic() < deadline:
        time.sleep(0.02)


def _pid_of(name):
    """The process that wrote the daemon's pid file, if it still is that daemon."""
    try:
        pid = int(Path(f"/run/{name}.pid").read_text())
        return pid if Path(f"/proc/{pid}/comm").read_text().strip() == name else None
    except (OSError, ValueError):
        return None
