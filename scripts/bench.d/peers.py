"""What kvmsnap is compared with, on the same bytes in the same round."""

import os
import shutil
import subprocess
import time

import measure
from settings import BenchError, say

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


DOMAIN = """<domain type='qemu'>
  <name>kvmsnap-bench-peer</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><disk type='file' device='disk'>
    <driver name='qemu' type='qcow2' discard='unmap'/><source file='{image}'/><target dev='vda' bus='virtio'/>
  </disk></devices>
</domain>
"""


class Virtnbdbackup:
    """Debian's backup tool for libvirt, on a machine of its own. Only where libvirt runs."""

    URI = "qemu:///system"

    @classmethod
    def reason_to_skip(cls):
        """Why it cannot be measured here, or None."""
        for program in ["virtnbdbackup", "virsh"]:
            if shutil.which(program) is None:
                return f"`{program}` is not installed"
        if cls._virsh("uri", check=False) != 0:
            return "libvirtd does not answer"
        return None

    @classmethod
    def _virsh(cls, *words, check=True):
        done = subprocess.run(["virsh", "--quiet", "-c", cls.URI, *words], text=True, timeout=60,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if check and done.returncode:
            raise BenchError(f"`virsh {' '.join(words)}` failed: {done.stdout}")
        return done.returncode

    def __init__(self, disk, work):
        self.folder, self.data_bytes = work.folder("virtnbdbackup"), disk.data_bytes
        image = disk.live_copy(work, "virtnbdbackup/peer")
        # libvirt's QEMU runs as a user of its own.
        os.chmod(self.folder, 0o755)
        os.chmod(image, 0o666)
        xml = self.folder / "domain.xml"
        xml.write_text(DOMAIN.format(image=image))
        self._virsh("create", str(xml))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._virsh("destroy", "kvmsnap-bench-peer", check=False)

    def backup(self, *options):
        target = self.folder / "backup"
        shutil.rmtree(target, ignore_errors=True)
        warm = (self.folder, self.data_bytes)
        cost = measure.run(["virtnbdbackup", "-U", self.URI, "-d", "kvmsnap-bench-peer", "-l", "copy",
                            *options, "-o", target], sync=[self.folder], warm=warm)
        return cost, measure.bytes_in(target)


def virtnbdbackup_or_why(disk, work):
    """Its cost and bytes stored, or None, said aloud."""
    reason = Virtnbdbackup.reason_to_skip()
    if reason is None:
        try:
            with Virtnbdbackup(disk, work) as peer:
                return peer.backup()
        except BenchError as error:
            reason = str(error)
    say(f"SKIPPED virtnbdbackup: {reason}")
    return None
