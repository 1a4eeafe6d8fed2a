"""What a run is told by the environment, where its files are, and that they go away again."""

import fcntl
import os
import shutil
import sys
from pathlib import Path

MIB = 1 << 20
CHECKOUT = Path(__file__).resolve().parents[2]
# The work unit of the targets: what is smaller or shorter is a trial and says so.
MIB_OF_WORK_UNIT = 2800
ROUNDS_OF_A_RESULT = 5


class BenchError(Exception):
    """A run cannot go on; the text says why."""


class Skipped(Exception):
    """A section cannot be measured here; the text says why."""


def say(text):
    """Progress, to standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def program_of_root(name):
    """Where a program is, also one that only root has in its path; or None."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _number(name, default, least=1):
    text = os.environ.get(name, str(default))
    if not text.isdigit() or int(text) < least:
        raise BenchError(f"{name} must be a whole number of at least {least}, not `{text}`")
    return int(text)


class Settings:
    """The settings of one run."""

    def __init__(self):
        self.mib = _number("BENCH_MIB", MIB_OF_WORK_UNIT, 64)
        self.rounds = _number("BENCH_ROUNDS", ROUNDS_OF_A_RESULT)
        self.snapshots = _number("BENCH_SNAPSHOTS", 1000, 20)
        self.freezes = _number("BENCH_FREEZES", 20, 2)
        self.idle_s = _number("BENCH_IDLE_S", 20, 2)
        self.stall_s = _number("BENCH_STALL_S", 5)
        self.load_rate = _number("BENCH_LOAD_RATE", 400, 4)
        self.memory_extents = _number("BENCH_MEMORY_EXTENTS", 16384)
        self.largest_gib = _number("BENCH_LARGEST_GIB", 8192, 8)
        self.sources = os.environ.get("BENCH_SOURCES", "/usr:/opt:/var/lib:/srv").split(":")
        self.programs = Path(os.environ.get("BENCH_BIN", CHECKOUT / "target" / "release"))
        self.output = Path(os.environ.get("BENCH_OUTPUT", CHECKOUT / "docs" / "benchmarks.md"))
        self.keep = os.environ.get("KEEP") == "1"
        # 2800 MiB of files on 4 GiB, and other amounts in proportion.
        parts = self.mib * 4096 / MIB_OF_WORK_UNIT / 64
        self.disk_bytes = -int(-parts // 1) * 64 * MIB

    @property
    def is_trial(self):
        """Whether the numbers are too small to be quoted."""
        return self.mib < MIB_OF_WORK_UNIT or self.rounds < ROUNDS_OF_A_RESULT

    def program(self, name):
        """A program of the workspace, which `make bench` has built."""
        path = self.programs / name
        if not path.is_file():
            raise BenchError(f"{path} is missing: `cargo build --release --workspace` makes it")
        return str(path)


class Folder:
    """Where files of a run are."""

    def __init__(self, run):
        self.run = run

    def folder(self, name):
        """A new, empty folder of this run."""
        path = self.run / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def need(self, bytes_wanted):
        """Refuses a run that would fill the disk."""
        free = shutil.disk_usage(self.run).free
        if free < bytes_wanted:
            raise BenchError(
                f"{self.run} has {free // MIB} MiB free, the run needs {bytes_wanted // MIB} MiB"
            )


class WorkFolder(Folder):
    """The folder that all files of a run are in. Removed at the end; with KEEP=1 the disk stays."""

    def __init__(self, settings):
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self.root = Path(os.environ.get("KVMSNAP_BENCH_DIR") or Path(cache) / "kvmsnap-bench")
        self.keep = settings.keep
        self.root = self.root.absolute()
        super().__init__(self.root / "run")
        if any(letter.isspace() or letter == '"' for letter in str(self.root)):
            raise BenchError(f"{self.root}: QEMU's monitor takes no path with spaces or quotes")

    def __enter__(self):
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.root / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BenchError(f"another run uses {self.root}; KVMSNAP_BENCH_DIR names another folder")
        self.base = self.root / "base"
        # Under the lock nobody uses what an earlier run may have left.
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir()
        self.base.mkdir(exist_ok=True)
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.run, ignore_errors=True)
        if not self.keep:
            shutil.rmtree(self.base, ignore_errors=True)
            (self.root / "lock").unlink(missing_ok=True)
            try:
                self.root.rmdir()
            except OSError:
                say(f"{self.root} holds files that are not of this run; it stays")
        self.lock.close()
