"""The disk that everything is measured on, and what changes on it."""

import hashlib
import json
import os
import random
import shutil
import stat
from pathlib import Path

import measure
from settings import MIB, BenchError, program_of_root, say

EXTENT = 64 << 10
BLOCK = 4096
# One huge file must not decide how the disk compresses.
FILE_LEN_MAX = 64 * MIB
FILES_IN_A_FOLDER = 500
# Raise this when the disk comes out differently for the same settings.
VERSION = 1


class Disk:
    """A frozen ext4 disk of real files, as raw image and as qcow2."""

    def __init__(self, settings, work):
        self.raw, self.qcow2 = work.base / "disk.raw", work.base / "disk.qcow2"
        self.size = settings.disk_bytes
        facts = work.base / "facts.json"
        wanted = {"version": VERSION, "mib": settings.mib, "sources": settings.sources}
        known = json.loads(facts.read_text()) if facts.exists() else {}
        if {key: known.get(key) for key in wanted} != wanted:
            facts.unlink(missing_ok=True)
            known = wanted | self._build(settings, work)
            facts.write_text(json.dumps(known))
        self.files, self.file_bytes = known["files"], known["file_bytes"]
        self.repeated = known["repeated"]
        self.data_bytes = measure.allocated(self.raw)

    def _build(self, settings, work):
        staging = work.folder("staging")
        say(f"copying {settings.mib} MiB of files from {' '.join(settings.sources)}")
        known = _stage(settings, staging)
        say(f"making an ext4 of {self.size // MIB} MiB with {known['files']} files")
        self.raw.unlink(missing_ok=True)
        with open(self.raw, "wb") as image:
            image.truncate(self.size)
        # The staged files take blocks of 4 KiB; a reserve for root would only be empty.
        _mkfs(self.raw, "-m", "0", "-N", known["files"] * 5 // 4 + 4096, "-d", staging)
        shutil.rmtree(staging)
        _to_qcow2(self.raw, self.qcow2)
        return known

    def live_copy(self, folder, name="live"):
        """A qcow2 of its own for a running machine."""
        return _copy(self.qcow2, folder.run / f"{name}.qcow2")

    def live_raw_copy(self, work):
        """A raw image of its own, for peers that read files."""
        return _copy(self.raw, work.run / "live.raw")


def empty_ext4(folder, mib):
    """A qcow2 with an empty file system."""
    raw, image = folder.run / "empty.raw", folder.run / "empty.qcow2"
    with open(raw, "wb") as file:
        file.truncate(mib * MIB)
    _mkfs(raw)
    _to_qcow2(raw, image)
    raw.unlink()
    return image


def _mkfs(image, *options):
    mkfs = program_of_root("mkfs.ext4")
    if mkfs is None:
        raise BenchError("`mkfs.ext4` is missing: `scripts/packages bench` installs it")
    measure.run([mkfs, "-q", "-F", *options, image])


def _to_qcow2(raw, image):
    measure.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, image])


def _copy(source, target):
    measure.run(["cp", "--reflink=auto", "--sparse=always", source, target])
    return target


def _stage(settings, staging):
    """Copies files until there is enough, in an order that is random but always the same."""
    # Journal, inode tables and folders need their part of a small disk too.
    wanted = min(settings.mib * MIB, settings.disk_bytes * 9 // 10)
    candidates = sorted(_candidates(settings.sources))
    if not candidates:
        raise BenchError(f"no readable files in {' '.join(settings.sources)}")
    files = file_bytes = taken = 0
    repeated = 0
    while taken < wanted:
        # From the second time on, other bytes with the same statistics: nothing is deduplicated.
        table = bytes(range(256))
        if repeated:
            table = bytearray(table)
            random.Random(repeated).shuffle(table)
        for _, path in candidates:
            if taken >= wanted:
                break
            try:
                content = Path(path).read_bytes()
            except OSError:
                continue  # It went away, or may not be read after all.
            folder = staging / f"{files // FILES_IN_A_FOLDER:05}"
            folder.mkdir(exist_ok=True)
            content = content.translate(bytes(table)) if repeated else content
            (folder / f"{files % FILES_IN_A_FOLDER:03}-{Path(path).name[:80]}").write_bytes(content)
            files += 1
            file_bytes += len(content)
            taken += -(-len(content) // BLOCK) * BLOCK
        if files == 0:
            raise BenchError("none of the files can be read")
        repeated += 1
    return {"files": files, "file_bytes": file_bytes, "repeated": repeated - 1}


def _candidates(sources):
    """Files that everybody may read, each once, with a key that mixes them."""
    seen = set()
    for source in sources:
        if not os.path.isdir(source):
            continue
        device = os.stat(source).st_dev
        for folder, folders, names in os.walk(source):
            folders[:] = [name for name in folders if _is_on(os.path.join(folder, name), device)]
            for name in names:
                path = os.path.join(folder, name)
                try:
                    status = os.lstat(path)
                except OSError:
                    continue
                good = stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IROTH
                if not good or not 0 < status.st_size <= FILE_LEN_MAX:
                    continue
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                yield hashlib.sha1(os.fsencode(path)).digest(), path


def _is_on(path, device):
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_dev == device


class Changes:
    """Random extents of 64 KiB: half of their blocks are random, half come from elsewhere on the disk,
    so they compress like the pages of a database more than like a library."""

    def __init__(self, disk, place, seed, count=None, name="changes"):
        chosen = random.Random(seed)
        slots = disk.size // EXTENT
        self.offsets = sorted(
            slot * EXTENT for slot in chosen.sample(range(slots), count or slots // 100)
        )
        folder = place.folder(name)
        self.extents = []
        with open(disk.raw, "rb") as raw:
            for number, offset in enumerate(self.offsets):
                path = folder / str(number)
                path.write_bytes(_mixed(raw, disk.size, chosen))
                self.extents.append((offset, path))

    @property
    def bytes(self):
        return len(self.offsets) * EXTENT

    def chunk_bytes(self, chunk_size, disk_size):
        """Bytes of the chunks that any extent touches."""
        chunks = {at for offset in self.offsets
                  for at in range(offset // chunk_size, -(-(offset + EXTENT) // chunk_size))}
        return sum(min(chunk_size, disk_size - at * chunk_size) for at in chunks)

    def apply_to_file(self, path):
        """The same changes on a raw image, in place."""
        with open(path, "r+b") as image:
            for offset, content in self.extents:
                image.seek(offset)
                image.write(content.read_bytes())

    def revert_in_file(self, path, original):
        """Takes them back, so that the next round begins with the same bytes."""
        with open(path, "r+b") as image, open(original, "rb") as old:
            for offset in self.offsets:
                old.seek(offset)
                image.seek(offset)
                image.write(old.read(EXTENT))


def _mixed(raw, size, chosen):
    blocks = []
    for number in range(EXTENT // BLOCK):
        block = bytes(BLOCK)
        for _ in range(20 if number % 2 else 0):
            raw.seek(chosen.randrange(size // BLOCK) * BLOCK)
            block = raw.read(BLOCK)
            if any(block):
                break
        blocks.append(block if any(block) else chosen.randbytes(BLOCK))
    return b"".join(blocks)
