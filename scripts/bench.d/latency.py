"""What a guest feels of a backup: latency of its own operations, and how long it is frozen."""

import os
import signal
import time

import measure
from guest import Guest
from kvmsnap import Kvmsnap
from measure import median, percentile
from report import Section, Target, ratio
from settings import BenchError, say
from work_unit import Disk

UNTIL = "/tmp/enough"
FREEZE_MIB = 512
UNPACED_S = 5
# For the load to settle before a window opens.
SETTLE_S = 2


class Load:
    """A paced load in the guest, and windows of host time to judge it by."""

    def __init__(self, guest, settings):
        self.guest, self.windows = guest, {}
        # What an earlier load has left.
        guest.exec("rm", "-f", UNTIL)
        self.skew = _skew(guest)
        self.pid = guest.spawn("oracle", "latency", "/dev/vda", str(settings.load_rate), UNTIL)
        time.sleep(SETTLE_S)

    def window(self, name, start, end):
        """Operations issued between two moments of the host's clock belong to `name`."""
        self.windows.setdefault(name, []).append((start, end))

    def finish(self):
        """Ends the load; returns latencies in milliseconds by name, a list for each of its windows."""
        self.guest.exec("touch", UNTIL)
        first, *lines = self.guest.wait(self.pid).splitlines()
        started = int(first) / 1e6 - self.skew
        found = {name: [[] for _ in spans] for name, spans in self.windows.items()}
        for line in lines:
            issued, latency = (int(number) / 1e6 for number in line.split())
            at = started + issued
            for name, spans in self.windows.items():
                for values, (start, end) in zip(found[name], spans):
                    # One that is under way when a window opens belongs to it too.
                    if start <= at + latency and at < end:
                        values.append(latency * 1e3)
        for name, windows in found.items():
            if len(pooled(windows)) < 100:
                raise BenchError(f"{len(pooled(windows))} operations in `{name}`: too few to judge")
        return found

    def seconds(self, name):
        return sum(end - start for start, end in self.windows[name])


def _skew(guest):
    """The guest's clock minus the host's, from the quickest of some answers."""
    tries = []
    for _ in range(10):
        before = time.time()
        there = guest.agent("guest-get-time") / 1e9
        after = time.time()
        tries.append((after - before, there - (before + after) / 2))
    return min(tries)[1]


def latency(settings, work):
    work.need(5 * settings.disk_bytes)
    disk = Disk(settings, work)
    live = disk.live_copy(work)
    # The second disk gives the guest agent a file system to freeze.
    with measure.in_memory(live), \
            Guest(settings, work, "--image", f"vda={live}", "--ext4", "vdb=64") as guest:
        return felt("latency", settings, work, guest, unpaced=_unpaced), disk


def felt(name, settings, work, guest, unpaced=None, path=""):
    """The section of this name about a guest with a disk `vda`; `path` begins the names of its
    targets."""
    load = Load(guest, settings)
    idle(load, settings)
    took = []
    for number in range(settings.rounds):
        say(f"  a full backup under load, {number + 1} of {settings.rounds}")
        host = Kvmsnap(settings, work)
        # What the harness itself does is not to be felt: writing out what went with the repository before, and
        # following the memory.
        os.sync()
        start = time.time()
        cost, record = host.backup(guest, memory=False)
        load.window("backup", start, time.time())
        took.append(cost.wall)
        say(f"    {cost.wall:.1f} s; {record['warnings'] or 'no warnings'}")
        idle(load, settings)
    say(f"  a full backup whose repository stalls for {settings.stall_s} s")
    host = Kvmsnap(settings, work)
    backup = host.start_backup(guest, memory=False)
    try:
        time.sleep(median(took) / 2)
        backup.signal(signal.SIGSTOP)
        start = time.time()
        time.sleep(settings.stall_s)
        load.window("stalled", start, time.time())
        backup.signal(signal.SIGCONT)
        backup.finish()
    finally:
        backup.stop()
    names = [("idle", "no backup", "–"),
             ("backup", "**kvmsnap, full, paced**", f"{median(took):.1f}"),
             ("stalled", f"**kvmsnap, stopped half-way for {settings.stall_s} s**", "–")]
    if unpaced:
        say("  reading as fast as it goes, by nbdcopy")
        names.append(("unpaced", "`nbdcopy` of the live disk to null, over and over, as fast as it goes",
                      f"{unpaced(guest, work, load):.1f}"))
    idle(load, settings)
    found = load.finish()
    return _felt(name, names, settings, load, found, path)


def _felt(name, names, settings, load, found, path):
    table = [["method", "job s", "operations", "a second", "p50 ms", "p99 ms", "longest ms"]]
    for window, title, job in names:
        values = pooled(found[window])
        rate = len(values) / load.seconds(window)
        table.append([title, job, len(values), f"{rate:.0f}", f"{median(values):.2f}",
                      f"{percentile(values, 0.99):.2f}", f"{max(values):.1f}"])
    text = [f"A guest reads and writes 4 KiB at random places of the whole disk, {settings.load_rate} "
            "operations a second in equal parts by four threads past its page cache, and measures each "
            "from issue to end inside the guest. It is emulated, and its processor shares the "
            f"{_cores()} with QEMU, kvmsnap and all else: what it feels is contention for the processor "
            "as much as for the disk. The image is locked in the host's memory where that is allowed. Windows "
            "are host time; the guest's clock was compared with it. "
            f"“No backup” is {settings.idle_s} s before and after each of the {len(found['backup'])} "
            "backups; a ratio is the median of theirs, each with the two such windows beside it."]
    idles, targets = found["idle"], []
    for window, title, beside in [
            ("backup", "guest during a backup", list(zip(idles, idles[1:]))),
            ("stalled", "guest with a stalled repository", [idles[-2:]])]:
        share = median([percentile(values, 0.99) / percentile(pooled(quiet), 0.99)
                        for values, quiet in zip(found[window], beside)])
        longest = max(pooled(found[window]))
        targets.append(Target(f"{path}{title}, p99 ÷ idle", "≤ 1.5", ratio(share), share <= 1.5))
        targets.append(Target(f"{path}{title}, longest", "≤ 50 ms",
                              f"{longest:.0f} ms (idle {max(pooled(idles)):.0f})", longest <= 50))
    return Section(name, table, text, targets)


def pooled(windows):
    """The values of several windows as those of one."""
    return [value for values in windows for value in values]


def _cores():
    return f"{len(os.sched_getaffinity(0))} cores"


def idle(load, settings):
    time.sleep(SETTLE_S)
    start = time.time()
    time.sleep(settings.idle_s)
    load.window("idle", start, time.time())


def _unpaced(guest, work, load):
    """Reads the live disk whole, without point in time or pace, for long enough to judge; returns the
    seconds of one time."""
    path = work.run / "unpaced.sock"
    guest.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    guest.command("block-export-add", type="nbd", id="unpaced", name="unpaced",
                  **{"node-name": "vda-format"})
    walls, start = [], time.time()
    while time.time() < start + UNPACED_S:
        before = time.time()
        walls.append(measure.run(["nbdcopy", f"nbd+unix:///unpaced?socket={path}", "null:"]).wall)
        load.window("unpaced", before, time.time())
    guest.command("nbd-server-stop")
    return median(walls)


def freeze(settings, work):
    with Guest(settings, work, "--ext4", f"vda={FREEZE_MIB}") as guest:
        return frozen("freeze", settings, work, guest), None


def frozen(name, settings, work, guest, path=""):
    """The section of this name about a guest with an ext4 of FREEZE_MIB at `/mnt/vda`; `path` begins
    the name of its target."""
    host = Kvmsnap(settings, work)
    # Small files all the while, so that a freeze has something to write back.
    writer = "n=0; while [ ! -e /tmp/enough ]; do n=$((n+1)); " \
             "oracle files write /mnt/vda $((n*20%400)) $((n*20%400+20)) --slow-ms 5; done"
    pid = guest.spawn("sh", "-c", writer)
    host.backup(guest)
    own, agent = [], []
    for number in range(settings.freezes):
        _, record = host.backup(guest)
        if record["freeze_ms"] is None:
            raise BenchError(f"the guest was not frozen: {record['warnings']}")
        own.append(record["freeze_ms"])
        start = time.perf_counter()
        guest.agent("guest-fsfreeze-freeze")
        guest.agent("guest-fsfreeze-thaw")
        agent.append((time.perf_counter() - start) * 1e3)
        say(f"  {number + 1} of {settings.freezes}: frozen {own[-1]} ms, "
            f"agent alone {agent[-1]:.0f} ms")
    guest.exec("touch", UNTIL)
    guest.wait(pid)
    table = [["what", "times", "p50 ms", "p99 ms", "longest ms"]]
    for title, values in [("**kvmsnap backup**, freeze to thaw", own),
                          ("the agent alone: freeze, then thaw at once", agent)]:
        table.append([title, len(values), f"{median(values):.0f}",
                      f"{percentile(values, 0.99):.0f}", f"{max(values):.0f}"])
    worst, limit = percentile(own, 0.99), 50 + percentile(agent, 0.99)
    text = [f"Incremental backups of an emulated guest with an ext4 disk of {FREEZE_MIB} MiB on which small "
            "files are written all the while; in turns with the fixture's own agent, which freezes and "
            "thaws with nothing in between."]
    targets = [Target(f"{path}freeze to thaw, p99", f"≤ 50 ms + the agent = {limit:.0f} ms",
                      f"{worst:.0f} ms", worst <= limit)]
    return Section(name, table, text, targets)


SECTIONS = {"latency": latency, "freeze": freeze}
