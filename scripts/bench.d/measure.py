"""Runs a command and says what it cost: wall time, CPU of all processes, peak memory."""

import contextlib
import ctypes
import mmap
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from settings import BenchError, say

TICKS = os.sysconf("SC_CLK_TCK")
# The times of files may lag behind the clock by so much.
CLOCK_STEP_S = 0.1
# No single command of a run may take longer.
LIMIT_S = 3600
PAGES_HIGH_WATER_RESET = "5"  # Linux, Documentation/filesystems/proc.rst, clear_refs


@dataclass
class Cost:
    """What one command cost."""

    wall: float
    cpu: float
    # KiB. With what happened before the repository was open, the key derivation above all.
    rss: int
    # KiB, the high-water mark once the repository was open; None where that was not asked for.
    rss_open: int | None
    stdout: str


@contextlib.contextmanager
def in_memory(path):
    """Keeps what a file has now in the page cache: a host may take back what nobody used for a while."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                          ctypes.c_long]
    libc.mlock.argtypes = libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    mapped = at != ctypes.c_void_p(-1).value
    if not mapped or libc.mlock(at, size):
        say(f"{path} may leave the host's memory: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        if mapped:
            libc.munmap(at, size)


def cpu_of(pid):
    """CPU seconds that a running process has used, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def sync_tree(paths, since):
    """Makes durable what has changed since a moment: files, or all below folders, and the folders too."""
    for path in map(Path, paths):
        below = [path]
        if path.is_dir():
            below += path.rglob("*")
        for one in below:
            if one.is_symlink() or not (one.is_file() or one.is_dir()):
                continue
            if one.stat().st_ctime < since - CLOCK_STEP_S:
                continue
            descriptor = os.open(one, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def warm_memory(folder, size):
    """Fills the page cache with a file of `size` bytes and drops it again.

    A virtual machine may have given its free memory back to its host; then whoever writes first pays
    for getting it back, up to ten times of what writing itself costs. This way nobody does."""
    part = bytes(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(size >> 20):
            file.write(part)


def bytes_in(folder):
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def allocated(path):
    """Bytes that a file takes on its file system; holes take none."""
    return Path(path).stat().st_blocks * 512


def median(values):
    return statistics.median(values)


def percentile(values, share):
    """The value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class _HighWater(threading.Thread):
    """Follows VmHWM from the moment on at which a lock appears in the repository.

    The key derivation takes up to 128 MiB for a moment before that. The mark is reset then, so that what
    the work itself needs shows; what it was before is kept."""

    def __init__(self, pid, locks):
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.refs = Path(f"/proc/{pid}/clear_refs")
        self.locks = Path(locks)
        self.before, self.after = 0, None
        self.ended = threading.Event()

    def run(self):
        try:
            while not self.ended.wait(0.002):
                if any(self.locks.iterdir()):
                    self.before = self._mark()
                    self.refs.write_text(PAGES_HIGH_WATER_RESET)
                    break
            while not self.ended.is_set():
                self.after = max(self.after or 0, self._mark())
                self.ended.wait(0.02)
        except (OSError, ValueError):
            return  # It has ended; the last sample stands.

    def _mark(self):
        for line in self.status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
        raise ValueError("a zombie has no memory")


class Command:
    """A command that runs."""

    def __init__(self, argv, env=None, cwd=None, also=(), sync=(), locks=None, warm=None):
        self.argv = [str(word) for word in argv]
        self.also, self.sync = list(also), list(sync)
        self.stdout = tempfile.TemporaryFile()
        self.stderr = tempfile.TemporaryFile()
        if warm:
            warm_memory(*warm)
        os.sync()  # What others wrote before must not be paid for now.
        self.cpu_before = sum(cpu_of(pid) for pid in self.also)
        self.start, self.begun = time.perf_counter(), time.time()
        self.child = subprocess.Popen(
            self.argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=self.stdout, stderr=self.stderr,
            env={**os.environ, **(env or {}), "LC_ALL": "C"},
        )
        self.water = _HighWater(self.child.pid, locks) if locks else None
        if self.water:
            self.water.start()

    def signal(self, number):
        """Sends a signal to the command, which has not been waited for."""
        os.kill(self.child.pid, number)

    def finish(self, codes=(0,)):
        """Waits for its end and returns its cost; files written are durable then."""
        overdue = threading.Timer(LIMIT_S, self.child.kill)
        overdue.start()
        try:
            _, status, usage = os.wait4(self.child.pid, 0)
        except BaseException:
            self.stop()
            raise
        finally:
            overdue.cancel()
        self.child.returncode = os.waitstatus_to_exitcode(status)
        sync_tree(self.sync, self.begun)
        wall = time.perf_counter() - self.start
        cpu = usage.ru_utime + usage.ru_stime
        cpu += sum(cpu_of(pid) for pid in self.also) - self.cpu_before
        after, before = None, 0
        if self.water:
            self.water.ended.set()
            self.water.join()
            before, after = self.water.before, self.water.after
        stdout, stderr = self._text(self.stdout), self._text(self.stderr)
        if self.child.returncode not in codes:
            raise BenchError(
                f"`{' '.join(self.argv)}` ended with {self.child.returncode}:\n{stdout}{stderr}"
            )
        return Cost(wall, cpu, max(usage.ru_maxrss, before), after, stdout)

    def stop(self):
        """Ends it whatever it does: politely, then not."""
        if self.child.returncode is not None:
            return
        for number, seconds in [(signal.SIGCONT, 0), (signal.SIGTERM, 10), (signal.SIGKILL, 10)]:
            try:
                self.child.send_signal(number)
                self.child.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                continue

    @staticmethod
    def _text(file):
        file.seek(0)
        with file:
            return file.read().decode(errors="replace")


def run(argv, **options):
    """Runs a command to its end, which must be good, and returns its cost."""
    return Command(argv, **options).finish()
