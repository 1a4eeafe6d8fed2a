"""What grows with the disk or with the number of snapshots, and what must not."""

import os
import random

import measure
from guest import Guest
from kvmsnap import Kvmsnap, only_disk
from measure import median
from report import Section, Target, mib, ratio, seconds
from settings import BenchError, say
from work_unit import EXTENT

GIB = 1 << 30
SMALLEST = 4 * GIB
# Extents of 64 KiB that change between two backups of a disk of any size.
CHANGES = 160
DATA = 4096
SNAPSHOTS_FEW = 10


def sparse_disk(work, size, extents, area, seed=1):
    """A qcow2 of `size` bytes with random data in extents of 64 KiB within its first `area` bytes."""
    chosen = random.Random(seed)
    raw, image = work.run / "sparse.raw", work.run / "sparse.qcow2"
    for path in [raw, image]:
        path.unlink(missing_ok=True)
    with open(raw, "wb") as file:
        try:
            file.truncate(size)
        except OSError as error:
            raise BenchError(f"no sparse file of {size // GIB} GiB in {work.run}: {error}")
        for slot in sorted(chosen.sample(range(area // EXTENT), extents)):
            os.pwrite(file.fileno(), chosen.randbytes(EXTENT), slot * EXTENT)
    measure.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, image])
    raw.unlink()
    return image


class Writer:
    """Writes random extents into a running machine's disk."""

    def __init__(self, guest, work):
        self.guest, self.folder = guest, work.folder("changes")
        self.chosen = random.Random(7)

    def change(self, count, area):
        extents = []
        for number, slot in enumerate(sorted(self.chosen.sample(range(area // EXTENT), count))):
            path = self.folder / str(number)
            path.write_bytes(self.chosen.randbytes(EXTENT))
            extents.append((slot * EXTENT, path))
        self.guest.write("vda", extents)


def scale(settings, work):
    work.need(4 * GIB)
    sizes = [size * GIB for size in [4, 64, 1024, 8192] if size < settings.largest_gib]
    sizes.append(settings.largest_gib * GIB)
    table = [["disk", "chunk KiB", "full s", "same area changed: s", "read MiB", "stored MiB",
              "change scattered: s", "read MiB", "stored MiB", "CPU s", "memory MiB"]]
    walls = {}
    for size in sizes:
        say(f"  a disk of {size // GIB} GiB")
        image = sparse_disk(work, size, DATA, SMALLEST)
        host = Kvmsnap(settings, work)
        with Guest(settings, work, "--no-os", "--image", f"vda={image}") as guest:
            writer = Writer(guest, work)
            full, record = host.backup(guest)
            cells = [f"{size // GIB} GiB", only_disk(record)["chunk_size"] >> 10, seconds(full.wall)]
            memory = [full.rss_open]
            for area in [SMALLEST, size]:
                costs, records = [], []
                for _ in range(settings.rounds):
                    writer.change(CHANGES, area)
                    cost, record = host.backup(guest)
                    if record["kind"] != "incremental":
                        raise BenchError(f"that was no incremental backup: {record}")
                    costs.append(cost)
                    records.append(only_disk(record))
                wall = median([cost.wall for cost in costs])
                walls[size, area == size] = wall
                memory += [cost.rss_open for cost in costs]
                cells += [seconds(wall), mib(median([disk["bytes_read"] for disk in records])),
                          mib(median([disk["bytes_stored"] for disk in records]))]
                say(f"    {wall:.2f} s")
                if size == SMALLEST:
                    # Here both are the same.
                    walls[size, False] = wall
            cells += [seconds(median([cost.cpu for cost in costs])),
                      f"{max(value or 0 for value in memory) / 1024:.0f}"]
        table.append(cells)
        image.unlink()
    text = [f"Sparse disks with {DATA} extents of 64 KiB of random data in their first 4 GiB; between two "
            f"backups {CHANGES} random extents of 64 KiB ({mib(CHANGES * EXTENT)} MiB) change, once within "
            "these 4 GiB, once all over the disk, where the larger chunks of larger disks show. CPU is that "
            "of the scattered ones, memory the highest of the row once the repository was open."]
    largest = sizes[-1]
    same = walls[largest, False] / walls[SMALLEST, False]
    scattered = walls[largest, True] / walls[SMALLEST, True]
    targets = [
        Target("largest disk ÷ 4 GiB, same area changed", f"≤ 2 at {largest // GIB} GiB", ratio(same),
               same <= 2),
        Target("largest disk ÷ 4 GiB, change scattered", f"≤ 2 at {largest // GIB} GiB",
               ratio(scattered), scattered <= 2),
    ]
    return Section("scale", table, text, targets), None


def memory(settings, work):
    size = 1024 * GIB
    extents = settings.memory_extents
    work.need(4 * extents * EXTENT + GIB)
    say(f"  a disk of 1 TiB with {extents} scattered extents")
    image = sparse_disk(work, size, extents, size)
    host = Kvmsnap(settings, work)
    rows = []
    with Guest(settings, work, "--no-os", "--image", f"vda={image}") as guest:
        cost, record = host.backup(guest)
        rows.append(("full", cost, only_disk(record)["bytes_read"]))
        Writer(guest, work).change(CHANGES, size)
        cost, record = host.backup(guest)
        rows.append(("incremental", cost, only_disk(record)["bytes_read"]))
    rows.append(("verify --read-data", host.run("verify", "--read-data", memory=True), None))
    target = work.folder("restored") / "images"
    rows.append(("restore qcow2", host.restore(target, "qcow2"), None))
    table = [["what", "wall s", "read MiB", "peak MiB, repository open", "peak MiB, all"]]
    for title, cost, read in rows:
        after = "not known" if cost.rss_open is None else f"{cost.rss_open / 1024:.0f}"
        table.append([title, seconds(cost.wall), "–" if read is None else mib(read), after,
                      f"{cost.rss / 1024:.0f}"])
    text = [f"A sparse disk of 1 TiB with {extents} random extents of 64 KiB "
            f"({mib(extents * EXTENT)} MiB) all over it. A disk full of data would have a longer index: "
            "see the costs named in docs/architecture.md."]
    peak = max(cost.rss_open or 0 for _, cost, _ in rows) / 1024
    targets = [Target("memory at 1 TiB", "≤ 256 MiB", f"{peak:.0f} MiB", peak <= 256)]
    return Section("memory", table, text, targets), None


def snapshots(settings, work):
    size = GIB
    image = sparse_disk(work, size, 256, size)
    host = Kvmsnap(settings, work)
    marks = sorted({SNAPSHOTS_FEW, min(100, settings.snapshots), settings.snapshots})
    table = [["snapshots", "backup s", "list s", "opening s", "CPU s of a backup", "memory MiB"]]
    walls = {}
    with Guest(settings, work, "--no-os", "--image", f"vda={image}") as guest:
        writer = Writer(guest, work)
        made = 0
        for mark in marks:
            say(f"  up to {mark} snapshots")
            # The backups that are measured are the last ones before the mark.
            costs = []
            while made < mark:
                writer.change(1, size)
                cost, _ = host.backup(guest)
                made += 1
                costs.append(cost)
                if made % 100 == 0:
                    say(f"    {made}: {cost.wall:.2f} s")
            costs = costs[-settings.rounds:]
            lists = [host.run("list") for _ in range(settings.rounds)]
            openings = [host.opening() for _ in range(settings.rounds)]
            wall = [median([cost.wall for cost in some]) for some in [costs, lists, openings]]
            walls[mark] = wall
            table.append([mark, *map(seconds, wall), seconds(median([cost.cpu for cost in costs])),
                          f"{max(cost.rss_open or 0 for cost in costs) / 1024:.0f}"])
    most = marks[-1]
    backup, listing = (walls[most][at] / walls[SNAPSHOTS_FEW][at] for at in [0, 1])
    text = ["Incremental backups of a disk of 1 GiB, each with one changed extent of 64 KiB, so that each "
            "adds its own pack, index and tree; nothing is pruned."]
    targets = [Target("snapshots 10 → most, backup", f"≤ 1.2 at {most}", ratio(backup), backup <= 1.2),
               Target("snapshots 10 → most, list", f"≤ 1.2 at {most}", ratio(listing),
                      listing <= 1.2)]
    return Section("snapshots", table, text, targets), None


SECTIONS = {"scale": scale, "memory": memory, "snapshots": snapshots}
