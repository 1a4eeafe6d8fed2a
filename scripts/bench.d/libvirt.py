"""Domains of libvirt: full, incremental and restore beside Debian's virtnbdbackup, and what a guest
feels."""

import shutil

import measure
from domain import Domain, fixture_system, images
from kvmsnap import Kvmsnap, only_disk
from latency import FREEZE_MIB, felt, frozen
from measure import median
from peers import Virtnbdbackup
from report import Section, Target, mib, ratio, seconds, version
from rows import Rows, in_turn
from settings import BenchError, say
from work_unit import EXTENT, Changes, Disk, empty_ext4

ROWS = [
    ("full", "**kvmsnap, full**", "full"),
    ("peer", "virtnbdbackup, full, plain", "full"),
    ("peer compressed", "virtnbdbackup, full, compressed (lz4)", "full"),
    ("incremental", "**kvmsnap, incremental**", "incremental"),
    ("peer incremental", "virtnbdbackup, incremental, plain", "incremental"),
    ("restore", "**kvmsnap restore**, full and incremental, to qcow2", "restore"),
    ("peer restore", "virtnbdrestore, full and incremental, plain (CPU without that of its `qemu-nbd`)",
     "restore"),
]
TARGETS = [
    ("libvirt: virtnbdbackup ÷ full", "> 1.0", "peer", "full", lambda share: share > 1.0),
    ("libvirt: virtnbdbackup, compressed ÷ full", "≥ 1.8", "peer compressed", "full",
     lambda share: share >= 1.8),
    ("libvirt: virtnbdbackup ÷ incremental", "≥ 3", "peer incremental", "incremental",
     lambda share: share >= 3),
    ("libvirt: virtnbdrestore ÷ restore", "≥ 3", "peer restore", "restore", lambda share: share >= 3),
]


class Round:
    """One round: two running domains with the same bytes, one for each program."""

    def __init__(self, host, disk, rows, own, peer, target):
        self.host, self.disk, self.rows = host, disk, rows
        self.own, self.peer, self.target = own, peer, target
        self.warm = disk.data_bytes

    def full(self):
        cost, record = self.host.backup(self.own, warm=self.warm)
        if record["kind"] != "full":
            raise BenchError(f"that was no full backup: {record}")
        self.rows.note("full", cost, stored=self.host.bytes_stored())

    def full_of_peer(self):
        for name, act in [("peer compressed", self.peer.compressed), ("peer", self.peer.full)]:
            cost, stored = act()
            self.rows.note(name, cost, stored=stored)

    def incremental(self, changes):
        before = self.host.bytes_stored()
        # Who follows its memory takes a part of a processor, and this is short.
        cost, record = self.host.backup(self.own, memory=False)
        if record["kind"] != "incremental" or only_disk(record)["bytes_changed"] != changes.bytes:
            raise BenchError(f"that was no incremental backup of {changes.bytes} bytes: {record}")
        self.rows.note("incremental", cost, stored=self.host.bytes_stored() - before)

    def incremental_of_peer(self, changes):
        cost, stored = self.peer.incremental()
        if not changes.bytes <= stored < 2 * changes.bytes:
            raise BenchError(f"virtnbdbackup took {stored} bytes of {changes.bytes} that changed")
        self.rows.note("peer incremental", cost, stored=stored)

    def restore(self):
        self.rows.note("restore", self.host.restore(self.target / "own", "qcow2", self.own.name,
                                                    warm=self.warm))

    def restore_of_peer(self):
        self.rows.note("peer restore", self.peer.restore(self.target / "peer"))

    def compare(self):
        say("  comparing what the two have restored")
        restored = [next((self.target / name).glob("*.qcow2")) for name in ["own", "peer"]]
        measure.run(["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", *restored])


def libvirt(settings, work):
    Virtnbdbackup.must_be_there()
    work.need(8 * settings.disk_bytes)
    disk, rows = Disk(settings, work), Rows()
    with images(2 * settings.disk_bytes) as folder:
        for number in range(settings.rounds):
            say(f"round {number + 1} of {settings.rounds}")
            changed = _round(settings, work, folder, disk, rows, number)
    return _section(rows, changed), disk


def _round(settings, work, folder, disk, rows, number):
    live = [[("vda", disk.live_copy(folder, title))] for title in ["own", "peer"]]
    with Domain(folder, "own", live[0]) as own, Domain(folder, "peer", live[1]) as other:
        peer = Virtnbdbackup(work, folder, other, disk)
        act = Round(Kvmsnap(settings, work), disk, rows, own, peer, work.folder("restored"))
        in_turn(number, act.full, act.full_of_peer)
        changes = Changes(disk, folder, seed=number)
        for domain in [own, other]:
            domain.write("vda", changes.extents)
        in_turn(number, lambda: act.incremental(changes), lambda: act.incremental_of_peer(changes))
        in_turn(number, act.restore, act.restore_of_peer)
        if number == 0:
            act.compare()
        shutil.rmtree(act.target)
        return changes.bytes


def _section(rows, changed):
    table = [["what", "wall s", "÷ kvmsnap", "CPU s", "stored MiB"]]
    for name, title, own in ROWS:
        row = rows[name]
        table.append([title, seconds(row.wall), ratio(row.wall / rows[own].wall), seconds(row.cpu),
                      mib(median(row.stored)) if row.stored else "–"])
    text = [
        f"libvirt {version('virsh')}, virtnbdbackup {version('virtnbdbackup')}. Each round makes two "
        "domains with copies of the same disk, for virtnbdbackup refuses a domain that has checkpoints "
        "of others. Both run all the while, idle, and nothing boots in them. Each program backs up its "
        f"own domain; then the same {changed // EXTENT} random extents of 64 KiB ({mib(changed)} MiB) are "
        "written to both through their QEMU, and each makes an incremental backup and restores it. "
        "What the two restored was compared in the first round (`qemu-img compare`): identical.",
        "virtnbdbackup's compressed mode is `-l copy -z`, the plain one `-l full`, on which `-l inc` "
        "builds; virtnbdrestore restores these two. kvmsnap has one mode: compressed, encrypted, "
        "deduplicated, the bitmap audited. CPU seconds are with the share of the domain's QEMU. Peak "
        f"memory of kvmsnap {rows['full'].memory()}.",
    ]
    targets = []
    for name, wanted, peer, own, is_met in TARGETS:
        share = rows[peer].wall / rows[own].wall
        targets.append(Target(name, wanted, ratio(share), is_met(share)))
    return Section("libvirt", table, text, targets)


def libvirt_latency(settings, work):
    work.need(5 * settings.disk_bytes)
    disk = Disk(settings, work)
    with images(2 * settings.disk_bytes) as folder:
        # The second disk gives the guest agent a file system to freeze.
        live = disk.live_copy(folder)
        disks = [("vda", live), ("vdb", empty_ext4(folder, 64))]
        system = fixture_system(settings, work, folder, "fixture.wait=vda fixture.mount=vdb:ext4:vdb")
        with measure.in_memory(live), Domain(folder, "guest", disks, system) as guest:
            return felt("libvirt_latency", settings, work, guest, path="libvirt: "), disk


def libvirt_freeze(settings, work):
    with images(4 * FREEZE_MIB << 20) as folder:
        system = fixture_system(settings, work, folder, "fixture.mount=vda:ext4:vda")
        with Domain(folder, "guest", [("vda", empty_ext4(folder, FREEZE_MIB))], system) as guest:
            return frozen("libvirt_freeze", settings, work, guest, path="libvirt: "), None


SECTIONS = {"libvirt": libvirt, "libvirt_latency": libvirt_latency, "libvirt_freeze": libvirt_freeze}
