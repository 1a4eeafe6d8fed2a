"""What kvmsnap is compared with, on the same bytes in the same round."""

import shutil
import subprocess
import time

import measure
from daemon import URI
from settings import BenchError, Skipped

START_LIMIT_S = 30


class FrozenExport:
    """A read-only export of the frozen image by `qemu-nbd`; `with` ends it."""

    def __init__(self, disk, work):
        self.socket = work.run / "frozen.sock"
        self.child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "qemu-nbd", "--read-only", "--persistent",
             "--shared=16", "--format=qcow2", f"--socket={self.socket}", str(disk.qcow2)],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_LIMIT_S
        while not self.socket.exists():
            if self.child.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise BenchError("qemu-nbd does not start; its message is above")
            time.sleep(0.01)
        self.uri = f"nbd+unix:///?socket={self.socket}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.terminate()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait(10)


def nbdcopy_to_null(export):
    return measure.run(["nbdcopy", export.uri, "null:"], also=[export.child.pid])


def nbdcopy_to_raw(export, disk, work):
    target = work.run / "nbdcopy.raw"
    target.unlink(missing_ok=True)
    cost = measure.run(["nbdcopy", export.uri, target], also=[export.child.pid], sync=[target],
                       warm=(work.run, disk.data_bytes))
    return cost, _size_and_remove(target)


def convert(disk, work, *options):
    target = work.run / "converted.qcow2"
    target.unlink(missing_ok=True)
    cost = measure.run(["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", *options,
                        disk.qcow2, target], sync=[target], warm=(work.run, disk.data_bytes))
    return cost, _size_and_remove(target)


def zstd(disk, raw, work):
    target = work.run / "disk.zst"
    target.unlink(missing_ok=True)
    cost = measure.run(["zstd", "-1", "-T2", "-q", raw, "-o", target], sync=[target],
                       warm=(work.run, disk.data_bytes))
    return cost, _size_and_remove(target)


def _size_and_remove(path):
    size = measure.allocated(path)
    path.unlink()
    return size


class Restic:
    """restic with a new repository, backing up one raw image."""

    def __init__(self, work, image, disk):
        self.folder, self.image = work.folder("restic"), image
        self.warm = (work.run, disk.data_bytes)
        self.repository = self.folder / "repository"
        password = self.folder / "password"
        password.write_text("of no value\n")
        self.env = {
            "RESTIC_REPOSITORY": str(self.repository),
            "RESTIC_PASSWORD_FILE": str(password),
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }
        self._run("init", "--repository-version", "2")

    def _run(self, *words, sync=(), warm=None):
        return measure.run(["restic", "--quiet", *words], env=self.env, cwd=self.image.parent,
                           sync=sync, warm=warm)

    def backup(self, warm=False):
        return self._run("backup", self.image.name, sync=[self.repository],
                         warm=self.warm if warm else None)

    def restore(self):
        target = self.folder / "restored"
        cost = self._run("restore", "latest", "--target", str(target), sync=[self.folder],
                         warm=self.warm)
        shutil.rmtree(target)
        return cost

    def check(self):
        return self._run("check", "--read-data")

    def bytes_stored(self):
        return measure.bytes_in(self.repository)


class Virtnbdbackup:
    """Debian's backup tool for libvirt, with a domain to back up."""

    @staticmethod
    def must_be_there():
        for program in ["virtnbdbackup", "virtnbdrestore"]:
            if shutil.which(program) is None:
                raise Skipped(f"`{program}` is not installed: `scripts/packages bench` installs it")

    def __init__(self, work, images, domain, disk):
        self.folder, self.domain = work.folder("virtnbdbackup"), domain
        self.scratch = images.folder("virtnbdbackup")
        self.warm = (work.run, disk.data_bytes)

    def compressed(self):
        """A full backup without a checkpoint, with its compression, lz4; and what it takes."""
        return self._backup("compressed", "copy", "-z", warm=self.warm)

    def full(self):
        """A full backup that others build on; and what it takes."""
        return self._backup("chain", "full", warm=self.warm)

    def incremental(self):
        return self._backup("chain", "inc")

    def _backup(self, name, level, *options, warm=None):
        target = self.folder / name
        before = measure.bytes_in(target)
        cost = measure.run(["virtnbdbackup", "-U", URI, "-d", self.domain.name, "-l", level, "-n",
                            *options, "-S", self.scratch, "-o", target],
                           also=[self.domain.pid], sync=[self.folder], warm=warm)
        return cost, measure.bytes_in(target) - before

    def restore(self, target):
        """Restores the chain into a new folder."""
        shutil.rmtree(target, ignore_errors=True)
        return measure.run(["virtnbdrestore", "-U", URI, "-n", "-L", self.folder / "restore.log",
                            "-i", self.folder / "chain", "-o", target],
                           sync=[target.parent], warm=self.warm)
