"""The overlay method: what a guest feels while it writes to overlays and is brought back, and how long
that takes beside the time in which the overlays were written."""

import json
import time

from guest import Guest
from kvmsnap import Kvmsnap
from latency import Load, idle, pooled
from measure import median, percentile
from report import Section, Target, mib, ratio
from settings import say
from work_unit import Disk, empty_ext4

NOISE_MIB = 16
# What the guest writes to an overlay, from memory and past its page cache.
WRITTEN_MIB = 256
WRITE = f"for at in $(seq 0 {NOISE_MIB} {WRITTEN_MIB - NOISE_MIB}); do " \
        "dd if=/tmp/noise of=/dev/vdc bs=1M seek=$at oflag=direct conv=notrunc 2>/dev/null || exit 1; done"


def overlay(settings, work):
    work.need(6 * settings.disk_bytes)
    disk = Disk(settings, work)
    live, blank = disk.live_copy(work), empty_ext4(work, WRITTEN_MIB)
    # The second disk gives the guest agent a file system to freeze.
    disks = ["--image", f"vda={live}", "--ext4", "vdb=64", "--image", f"vdc={blank}"]
    with Guest(settings, work, *disks) as guest:
        guest.exec("dd", "if=/dev/urandom", "of=/tmp/noise", "bs=1M", f"count={NOISE_MIB}")
        load = Load(guest, settings)
        idle(load, settings)
        backups, purges = [], []
        for number in range(settings.rounds):
            say(f"round {number + 1} of {settings.rounds}")
            backups.append(_backup(settings, work, guest, load))
            purges.append(_purge(settings, work, guest, load))
        idle(load, settings)
        found = {name: pooled(windows) for name, windows in load.finish().items()}
    return _section(load, found, backups, purges), disk


def _backup(settings, work, guest, load):
    """A backup with its way back; returns its seconds and what it tells of the guest's longest stall."""
    host = Kvmsnap(settings, work)
    start = time.time()
    cost, record = host.backup(guest, "--method", "overlay")
    load.window("backup", start, time.time())
    say(f"  backup: {cost.wall:.1f} s, longest stall told {record['longest_stall_ms']} ms")
    return cost.wall, record["longest_stall_ms"]


def _purge(settings, work, guest, load):
    """Overlays that are written to and written back: seconds of both, bytes, and the stall that is told."""
    host = Kvmsnap(settings, work)
    host.run("create", *guest.words)
    start = time.perf_counter()
    guest.exec("sh", "-c", WRITE)
    wrote = time.perf_counter() - start
    start = time.time()
    done = host.run("purge", "--qmp", guest.qmp)
    load.window("purge", start, time.time())
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    took = sum(line["duration_ms"] for line in lines) / 1e3
    told = max(line["longest_stall_ms"] for line in lines)
    say(f"  written in {wrote:.2f} s, written back in {took:.2f} s, longest stall told {told} ms")
    return wrote, took, sum(line["bytes"] for line in lines), told


def _section(load, found, backups, purges):
    table = [["what", "s", "operations", "a second", "p50 ms", "p99 ms", "longest ms", "told ms"]]
    told = {"backup": max(stall for _, stall in backups), "purge": max(row[3] for row in purges)}
    job = {"backup": median([wall for wall, _ in backups]), "purge": median([row[1] for row in purges])}
    for name, title in [("idle", "no backup"), ("backup", "**kvmsnap backup --method overlay**, to its end"),
                        ("purge", "**kvmsnap purge** of what was written")]:
        values = found[name]
        took = f"{job[name]:.1f}" if name in job else "–"
        table.append([title, took, len(values), f"{len(values) / load.seconds(name):.0f}",
                      f"{median(values):.2f}", f"{percentile(values, 0.99):.2f}", f"{max(values):.1f}",
                      told.get(name, "–")])
    share = median([took / wrote for wrote, took, *_ in purges])
    wrote, size = median([row[0] for row in purges]), median([row[2] for row in purges])
    text = ["The guest and its load are those of “The guest while it is backed up”, and go on all the while. "
            "A backup puts overlays above all disks, reads the images, and writes the overlays back, at "
            "200 MiB a second at most. For `purge` the guest writes "
            f"{WRITTEN_MIB} MiB to the overlay of another disk first, in requests of 1 MiB past its page "
            f"cache, in {wrote:.2f} s; {mib(size)} MiB are written back in {job['purge']:.2f} s. “Told” is "
            "`longest_stall_ms`, the upper bound that kvmsnap reports of what it sees from outside; of "
            f"the {len(purges)} rounds the highest."]
    longest = max(max(found["backup"]), max(found["purge"]))
    targets = [
        Target("overlay: longest operation", "≤ 100 ms",
               f"{longest:.0f} ms (idle {max(found['idle']):.0f})", longest <= 100),
        Target("overlay: written back ÷ written", "≤ 2", ratio(share), share <= 2),
    ]
    return Section("overlay", table, text, targets)


SECTIONS = {"overlay": overlay}
