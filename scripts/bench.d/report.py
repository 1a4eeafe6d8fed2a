"""docs/benchmarks.md: a part for each section, so that a run of some sections leaves the others; the
targets; and below a marker what people have written, which every run keeps."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from settings import MIB

MARKER = "<!-- Written by hand from here on: every run keeps it. -->"
BY_HAND = """
## Why a target is not met, and what would be needed

Nothing written yet.
"""
TITLES = {
    "full": "Full backup",
    "incremental": "Incremental backup",
    "restore": "Restore",
    "verify": "Verify all data",
    "latency": "The guest while it is backed up",
    "overlay": "The guest on overlays and on its way back",
    "freeze": "Freeze to thaw",
    "libvirt": "Domains of libvirt",
    "libvirt_latency": "The guest of a domain while it is backed up",
    "libvirt_freeze": "Freeze to thaw of a domain",
    "scale": "Size of the disk",
    "memory": "Memory at 1 TiB",
    "snapshots": "Number of snapshots",
}
# In the order of the table; those of which nothing is known are shown as not measured.
TARGETS = [
    ("full ÷ `zstd -1 -T2`", "≤ 1.1"),
    ("restic ÷ full", "≥ 2.5"),
    ("incremental, wall", "≤ 2 × floor + 0.3 s"),
    ("incremental, stored / dirty", "≤ 1.0"),
    ("incremental, only dirty chunks read", "yes"),
    ("nothing changed, beyond opening", "≤ 0.3 s"),
    ("nothing changed, stored", "a few KiB (≤ 16)"),
    ("restore raw ÷ `nbdcopy`", "≤ 1.0"),
    ("restore qcow2 ÷ `nbdcopy`", "≤ 1.0"),
    ("restic check ÷ verify", "≥ 2"),
    ("largest disk ÷ 4 GiB, same area changed", "≤ 2"),
    ("largest disk ÷ 4 GiB, change scattered", "≤ 2"),
    ("snapshots 10 → most, backup", "≤ 1.2"),
    ("snapshots 10 → most, list", "≤ 1.2"),
    ("memory at 1 TiB", "≤ 256 MiB"),
    ("guest during a backup, p99 ÷ idle", "≤ 1.5"),
    ("guest during a backup, longest", "≤ 50 ms"),
    ("guest with a stalled repository, p99 ÷ idle", "≤ 1.5"),
    ("guest with a stalled repository, longest", "≤ 50 ms"),
    ("overlay: longest operation", "≤ 100 ms"),
    ("overlay: written back ÷ written", "≤ 2"),
    ("freeze to thaw, p99", "≤ 50 ms + the agent"),
    ("libvirt: virtnbdbackup ÷ full", "> 1.0"),
    ("libvirt: virtnbdbackup, compressed ÷ full", "≥ 1.8"),
    ("libvirt: virtnbdbackup ÷ incremental", "≥ 3"),
    ("libvirt: virtnbdrestore ÷ restore", "≥ 3"),
    ("libvirt: guest during a backup, p99 ÷ idle", "≤ 1.5"),
    ("libvirt: guest during a backup, longest", "≤ 50 ms"),
    ("libvirt: guest with a stalled repository, p99 ÷ idle", "≤ 1.5"),
    ("libvirt: guest with a stalled repository, longest", "≤ 50 ms"),
    ("libvirt: freeze to thaw, p99", "≤ 50 ms + the agent"),
]


@dataclass
class Target:
    """One target and whether it is met."""

    name: str
    wanted: str
    measured: str
    met: bool


@dataclass
class Section:
    """What one section has to say."""

    name: str
    table: list
    text: list = field(default_factory=list)
    targets: list = field(default_factory=list)


def seconds(value):
    return f"{value:.2f}"


def ratio(value):
    return f"{value:.2f}"


def mib(value):
    """Bytes as MiB, small amounts with a decimal."""
    amount = value / MIB
    return f"{amount:.0f}" if amount >= 100 else f"{amount:.1f}"


def write(settings, disk, sections):
    """Writes the sections measured now over those of earlier runs."""
    path = settings.output
    old = path.read_text() if path.exists() else ""
    generated, _, by_hand = old.partition(MARKER)
    bodies = dict(re.findall(r"<!-- section (\w+) -->\n(.*?)<!-- end -->\n", generated, re.DOTALL))
    unit = _unit(settings, disk)
    for section in sections:
        parts = [_table(section.table), *section.text, f"*{unit}*"]
        bodies[section.name] = "\n\n".join(parts) + "\n"
    rows = _targets(generated, sections)
    parts = [_head(), _table([["target", "wanted", "measured", ""], *rows])]
    for name, title in TITLES.items():
        if name in bodies:
            parts.append(f"## {title}\n\n<!-- section {name} -->\n{bodies[name]}<!-- end -->")
    text = "\n\n".join(parts) + f"\n\n{MARKER}\n" + (by_hand.lstrip("\n") and by_hand or BY_HAND)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")
    new.replace(path)


def _targets(generated, sections):
    known = {}
    for line in generated.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0] in dict(TARGETS):
            known[cells[0]] = cells
    for target in (target for section in sections for target in section.targets):
        assert target.name in dict(TARGETS), target.name
        verdict = "met" if target.met else "**not met**"
        known[target.name] = [target.name, target.wanted, target.measured, verdict]
    return [known.get(name, [name, wanted, "–", "not measured"]) for name, wanted in TARGETS]


def _table(rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    # The first column is text, the others are numbers.
    lines.insert(1, "|---" + "|--:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def _head():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    return f"""# Benchmarks

Written by `make bench`. `scripts/bench full latency` measures only these sections; the parts of the others
stay as they are.

Machine of the last run: {os.cpu_count()} cores ({_processor()}), {memory:.0f} GiB of memory, {release}, \
{version("qemu-system-x86_64")}, restic {version("restic")}. Warm page cache; \
machines of this kind are shared and noisy, so compare the ratios of one run, not seconds of two.

How: the rounds alternate between kvmsnap and its peers, in the opposite order every other time; each
number is the median of the rounds, each ratio one of medians of the same run. Seconds of wall time
include making the result durable. Right before a command that writes much, as much memory is written
once: a virtual machine whose host takes back free memory would otherwise measure its host. CPU seconds are those of all processes: the command, its children, and
the share of QEMU or `qemu-nbd`. Memory is the kernel's high-water mark; it is reset when the repository is
open, because the key derivation takes up to 128 MiB for a moment before that. Guests are emulated (TCG) unless
`KVMSNAP_ACCEL=kvm`.

## Targets"""


def _unit(settings, disk):
    trial = " **A trial: too small to be quoted.**" if settings.is_trial else ""
    if disk is None:
        return f"Measured with disks of its own, described above.{trial}"
    repeated = "" if not disk.repeated else f", repeated {disk.repeated} times with other bytes"
    return (f"Disk: {mib(disk.size)} MiB, ext4 with {disk.files} real files of {mib(disk.file_bytes)} "
            f"MiB{repeated}; {settings.rounds} rounds.{trial}")


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def version(program):
    words = {"restic": ["version"]}.get(program, ["--version"])
    done = subprocess.run([program, *words], text=True, stdout=subprocess.PIPE, timeout=30)
    found = re.search(r"(\d+\.\d+(\.\d+)?)", done.stdout)
    name = {"qemu-system-x86_64": "QEMU "}.get(program, "")
    return name + (found.group(1) if found else "of unknown version")
