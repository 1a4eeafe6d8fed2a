"""Full, incremental, nothing changed, restore and verify, alternating with their peers."""

import shutil
import time

import measure
import peers
from guest import Guest
from kvmsnap import Kvmsnap, only_disk
from measure import median
from nbd_reader import read_extents
from report import Section, Target, mib, ratio, seconds
from rows import Rows, in_turn
from settings import BenchError, say
from work_unit import EXTENT, Changes, Disk

NAMES = ["full", "incremental", "restore", "verify"]


class Rounds:
    """All rounds of a run."""

    def __init__(self, settings, work, wanted):
        self.settings, self.work, self.wanted = settings, work, wanted
        work.need(7 * settings.disk_bytes)
        self.disk = Disk(settings, work)
        self.live_raw = self.disk.live_raw_copy(work)
        self.rows = Rows()
        self.facts = {"only_dirty": True, "stored_nothing": [], "holes": []}

    def run(self):
        for number in range(self.settings.rounds):
            say(f"round {number + 1} of {self.settings.rounds}")
            self._round(number)
        sections = {"full": self._full, "incremental": self._incremental,
                    "restore": self._restore, "verify": self._verify}
        return [sections[name]() for name in NAMES if name in self.wanted]

    def _round(self, number):
        live = self.disk.live_copy(self.work)
        host = Kvmsnap(self.settings, self.work)
        with (Guest(self.settings, self.work, "--no-os", "--image", f"vda={live}") as guest,
              peers.FrozenExport(self.disk, self.work) as export):
            restic = peers.Restic(self.work, self.live_raw, self.disk)
            in_turn(number, lambda: self._full_of_kvmsnap(host, guest),
                    lambda: self._full_of_peers(export), lambda: self._full_of_restic(restic))
            changes = Changes(self.disk, self.work, seed=number)
            if "incremental" in self.wanted:
                in_turn(number, lambda: self._incremental_of_kvmsnap(host, guest, changes),
                        lambda: self._incremental_of_restic(restic, changes))
                changes.revert_in_file(self.live_raw, self.disk.raw)
            if "restore" in self.wanted:
                self._restores(host, guest, restic, live, check=number == 0)
            if "verify" in self.wanted:
                self.rows.note("verify", host.run("verify", "--read-data", memory=True))
                self.rows.note("restic check", restic.check())

    # ---- full -----------------------------------------------------------------------------------

    def _full_of_kvmsnap(self, host, guest):
        before = host.bytes_stored()
        cost, record = host.backup(guest, warm=self.disk.data_bytes)
        self.facts["chunk_size"] = only_disk(record)["chunk_size"]
        self.rows.note("full", cost, stored=host.bytes_stored() - before,
                  read=only_disk(record)["bytes_read"])

    def _full_of_peers(self, export):
        self.rows.note("nbdcopy null", peers.nbdcopy_to_null(export))
        cost, stored = peers.nbdcopy_to_raw(export, self.disk, self.work)
        self.rows.note("nbdcopy raw", cost, stored=stored)
        if "full" not in self.wanted:
            return
        cost, stored = peers.zstd(self.disk, self.live_raw, self.work)
        self.rows.note("zstd", cost, stored=stored)
        cost, stored = peers.convert(self.disk, self.work)
        self.rows.note("convert", cost, stored=stored)
        cost, stored = peers.convert(self.disk, self.work, "-c", "-o", "compression_type=zstd",
                                     "-m", "8")
        self.rows.note("convert zstd", cost, stored=stored)

    def _full_of_restic(self, restic):
        before = restic.bytes_stored()
        cost = restic.backup(warm=True)
        self.rows.note("restic", cost, stored=restic.bytes_stored() - before)

    def _full(self):
        rows, targets = self.rows, []
        full = rows["full"]
        names = [
            ("nbdcopy null", "`nbdcopy` qcow2 → null (reading alone)"),
            ("nbdcopy raw", "`nbdcopy` qcow2 → raw"),
            ("full", "**kvmsnap, compressed, encrypted, deduplicated**"),
            ("zstd", "`zstd -1 -T2` of the raw file"),
            ("convert", "`qemu-img convert`, plain qcow2"),
            ("convert zstd", "`qemu-img convert -c`, zstd, 8 coroutines"),
            ("restic", "restic, compressed and encrypted, of the raw file"),
        ]
        raw, zstd = rows["nbdcopy raw"].wall, rows["zstd"].wall
        table = [["what", "wall s", "× `nbdcopy` to raw", "× `zstd -1 -T2`", "CPU s", "stored MiB"]]
        for name, title in names:
            if name in rows:
                row = rows[name]
                stored = mib(median(row.stored)) if row.stored else "–"
                table.append([title, seconds(row.wall), ratio(row.wall / raw),
                              ratio(row.wall / zstd), seconds(row.cpu), stored])
        text = [f"kvmsnap read {mib(median(full.read))} MiB in chunks of "
                f"{self.facts['chunk_size'] // 1024} KiB through the running QEMU; the guest is idle. "
                f"Peak memory {full.memory()}."]
        targets.append(Target("full ÷ `zstd -1 -T2`", "≤ 1.1", ratio(full.wall / zstd),
                              full.wall <= 1.1 * zstd))
        faster = rows["restic"].wall / full.wall
        targets.append(Target("restic ÷ full", "≥ 2.5", ratio(faster), faster >= 2.5))
        return Section("full", table, text, targets)

    # ---- incremental ----------------------------------------------------------------------------

    def _incremental_of_kvmsnap(self, host, guest, changes):
        guest.write("vda", changes.extents)
        self.rows.note("floor", self._floor(guest, changes), read=changes.bytes)
        before = host.bytes_stored()
        cost, record = host.backup(guest)
        disk = only_disk(record)
        if record["kind"] != "incremental" or disk["bytes_changed"] != changes.bytes:
            raise BenchError(f"that was no incremental backup of {changes.bytes} bytes: {record}")
        self.rows.note("incremental", cost, stored=host.bytes_stored() - before, read=disk["bytes_read"])
        dirty_chunks = changes.chunk_bytes(disk["chunk_size"], disk["size"])
        self.facts["dirty"] = changes.bytes
        self.facts["audited"] = disk["bytes_audited"]
        self.facts["only_dirty"] &= disk["bytes_read"] <= dirty_chunks
        before = host.bytes_stored()
        cost, record = host.backup(guest)
        self.rows.note("nothing", cost, stored=host.bytes_stored() - before,
                  read=only_disk(record)["bytes_read"])
        self.rows.note("opening", host.opening())

    def _floor(self, guest, changes):
        """Reads the dirty extents of the live disk over NBD from the same QEMU, and keeps nothing."""
        address = {"type": "unix", "data": {"path": str(self.work.run / "floor.sock")}}
        guest.command("nbd-server-start", addr=address)
        guest.command("block-export-add", type="nbd", id="floor", name="floor",
                      **{"node-name": "vda-format"})
        cpu = time.process_time() + measure.cpu_of(guest.pid)
        start = time.perf_counter()
        read_extents(self.work.run / "floor.sock", "floor", changes.offsets, EXTENT)
        wall = time.perf_counter() - start
        cpu = time.process_time() + measure.cpu_of(guest.pid) - cpu
        guest.command("nbd-server-stop")
        return measure.Cost(wall, cpu, 0, None, "")

    def _incremental_of_restic(self, restic, changes):
        changes.apply_to_file(restic.image)
        before = restic.bytes_stored()
        cost = restic.backup()
        self.rows.note("restic incremental", cost, stored=restic.bytes_stored() - before)

    def _incremental(self):
        rows = self.rows
        names = [
            ("floor", "reading the dirty extents over NBD (floor)"),
            ("incremental", "**kvmsnap, incremental**"),
            ("restic incremental", "restic (reads all)"),
            ("nothing", "**kvmsnap, nothing changed**"),
            ("opening", "opening the repository alone (`kvmsnap list nobody`)"),
        ]
        dirty = self.facts["dirty"]
        table = [["what", "wall s", "CPU s", "read MiB", "stored MiB", "stored / dirty"]]
        for name, title in names:
            row = rows[name]
            of_changes = row.stored and name != "nothing"
            table.append([title, seconds(row.wall), seconds(row.cpu),
                          mib(median(row.read)) if row.read else "–",
                          mib(median(row.stored)) if row.stored else "–",
                          ratio(median(row.stored) / dirty) if of_changes else "–"])
        floor, incremental, nothing = rows["floor"], rows["incremental"], rows["nothing"]
        text = [
            f"{dirty // EXTENT} random extents of 64 KiB ({mib(dirty)} MiB) were written through the "
            "running QEMU; half of their 4 KiB blocks are random, half come from elsewhere on the disk. "
            "The floor is a client of the benchmark's own (`scripts/bench.d/nbd_reader.py`) that knows "
            "the offsets, reads them from the same QEMU just before the backup, 16 requests under way on "
            "one connection, and drops them; connecting is in it, starting a program is not. kvmsnap "
            f"also reads {mib(self.facts['audited'])} MiB of unchanged data to audit the bitmap. Peak "
            f"memory {incremental.memory()}.",
        ]
        limit = 2 * floor.wall + 0.3
        per_dirty = median(incremental.stored) / dirty
        beyond = nothing.wall - rows["opening"].wall
        targets = [
            Target("incremental, wall", f"≤ 2 × floor + 0.3 s = {seconds(limit)} s",
                   f"{seconds(incremental.wall)} s", incremental.wall <= limit),
            Target("incremental, stored / dirty", "≤ 1.0", ratio(per_dirty), per_dirty <= 1.0),
            Target("incremental, only dirty chunks read", "yes",
                   "yes" if self.facts["only_dirty"] else "no", self.facts["only_dirty"]),
            Target("nothing changed, beyond opening", "≤ 0.3 s", f"{seconds(beyond)} s",
                   beyond <= 0.3),
            Target("nothing changed, stored", "a few KiB (≤ 16)",
                   f"{median(nothing.stored) / 1024:.1f} KiB", median(nothing.stored) <= 16 << 10),
        ]
        return Section("incremental", table, text, targets)

    # ---- restore --------------------------------------------------------------------------------

    def _restores(self, host, guest, restic, live, check):
        target = self.work.folder("restored") / "images"
        self.rows.note("restore raw", host.restore(target, "raw", warm=self.disk.data_bytes))
        (image,) = target.glob("*.raw")
        self.facts["holes"].append((measure.allocated(image), image.stat().st_size))
        if check:
            say("  comparing the restored disk with the running one")
            measure.run(["qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2", image, live])
        shutil.rmtree(target)
        self.rows.note("restore qcow2", host.restore(target, "qcow2", warm=self.disk.data_bytes))
        shutil.rmtree(target)
        self.rows.note("restic restore", restic.restore())

    def _restore(self):
        rows = self.rows
        raw = rows["nbdcopy raw"]
        names = [("nbdcopy raw", "`nbdcopy` qcow2 → raw"), ("restore raw", "**kvmsnap, raw**"),
                 ("restore qcow2", "**kvmsnap, qcow2**"), ("restic restore", "restic")]
        table = [["what", "wall s", "× `nbdcopy` to raw", "CPU s"]]
        for name, title in names:
            row = rows[name]
            table.append([title, seconds(row.wall), ratio(row.wall / raw.wall), seconds(row.cpu)])
        taken, size = self.facts["holes"][-1]
        own = rows["restore raw"]
        text = [f"The restored raw image takes {mib(taken)} of {mib(size)} MiB. In the first round it was "
                "compared with the disk of the running machine (`qemu-img compare`): identical. Peak "
                f"memory {own.memory()}."]
        share = own.wall / raw.wall
        qcow2 = rows["restore qcow2"].wall / raw.wall
        targets = [Target("restore raw ÷ `nbdcopy`", "≤ 1.0", ratio(share), share <= 1.0),
                   Target("restore qcow2 ÷ `nbdcopy`", "≤ 1.0", ratio(qcow2), qcow2 <= 1.0)]
        return Section("restore", table, text, targets)

    def _verify(self):
        own, restic = self.rows["verify"], self.rows["restic check"]
        table = [["what", "wall s", "CPU s"],
                 ["**`kvmsnap verify --read-data`**", seconds(own.wall), seconds(own.cpu)],
                 ["`restic check --read-data`", seconds(restic.wall), seconds(restic.cpu)]]
        faster = restic.wall / own.wall
        return Section("verify", table, [f"Each on its own repository. Peak memory {own.memory()}."],
                       [Target("restic check ÷ verify", "≥ 2", ratio(faster), faster >= 2)])
