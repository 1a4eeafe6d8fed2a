"""Domains of libvirt, and a folder for their images that libvirt's QEMU can reach."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path

import daemon
from daemon import virsh
from guest import Guest, Lines, Silent
from settings import BenchError, Folder

IMAGES = Path("/var/lib/libvirt/images")
LOGS = Path("/var/log/libvirt/qemu")
# All domains of a run begin with it, so that the next one finds what a killed one has left.
NAME = "kvmsnap-bench"
BOOT_LIMIT_S = 180
ASK_AGAIN_S = 1
REPLY_LIMIT_S = 60
PROGRAM_LIMIT_S = 240

XML = """<domain type='{kind}'>
  <name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os><features><acpi/></features>{cpu}
  <devices>{devices}<controller type='usb' model='none'/><memballoon model='none'/></devices>
</domain>
"""
DISK = """<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2' discard='unmap'/><source file='{image}'/>
  <target dev='{target}' bus='virtio'/><alias name='ua-{target}'/>
</disk>
"""
# The guest's agent as libvirt connects to it, and the fixture's own.
CHANNELS = """<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<channel type='unix'><source mode='bind' path='{socket}'/>
  <target type='virtio' name='org.kvmsnap.fixture.0'/>
</channel>
"""


@contextlib.contextmanager
def images(bytes_wanted):
    """A folder below libvirt's own for images. It goes away at the end, with all domains of the run."""
    path = IMAGES / NAME
    with daemon.running(), open(daemon.RUN / NAME, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchError(f"another run uses {path}")
        try:
            _forget()
            path.mkdir(mode=0o755)
            folder = Folder(path)
            folder.need(bytes_wanted)
            yield folder
        finally:
            _forget()


def _forget():
    """Ends and removes all that a run has made. Each step may find nothing to do."""
    for name in virsh("list", "--all", "--name", check=False).split():
        if name.startswith(f"{NAME}-"):
            virsh("destroy", name, check=False)
            virsh("undefine", name, "--checkpoints-metadata", check=False)
    for log in LOGS.glob(f"{NAME}-*.log*"):
        log.unlink(missing_ok=True)
    shutil.rmtree(IMAGES / NAME, ignore_errors=True)


class Domain:
    """A domain that runs; `with` ends and undefines it."""

    def __init__(self, folder, title, disks, system=None):
        """`disks` are pairs of target and image; `system` is what the guest boots, if anything."""
        self.name = f"{NAME}-{title}"
        own = folder.folder(f"domain-{title}")
        devices = "".join(DISK.format(target=target, image=image) for target, image in disks)
        if system:
            devices += CHANNELS.format(socket=own / "agent.sock")
        kvm = os.environ.get("KVMSNAP_ACCEL") == "kvm"
        xml = own / "domain.xml"
        xml.write_text(XML.format(
            kind="kvm" if kvm else "qemu", name=self.name, memory=256 if system else 64,
            cpu="<cpu mode='host-passthrough'/>" if kvm else "", boot=system or "", devices=devices))
        virsh("define", xml)
        virsh("start", self.name)
        self.pid = int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text())
        self._agent = Agent(own / "agent.sock") if system else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._agent:
            self._agent.close()
        virsh("destroy", self.name, check=False)
        virsh("undefine", self.name, "--checkpoints-metadata", check=False)

    @property
    def words(self):
        """How kvmsnap is told of it."""
        return [self.name]

    def write(self, disk, extents):
        """Writes files into a disk, through its device: pairs of offset and path."""
        device = f"/machine/peripheral/ua-{disk}/virtio-backend"
        virsh(script="".join(
            f"qemu-monitor-command {self.name} --hmp "
            f"'qemu-io -d {device} \"write -s {path} {offset} {path.stat().st_size}\"'\n"
            for offset, path in extents))

    def agent(self, command, **arguments):
        return self._agent.execute(command, **arguments)

    def spawn(self, program, *words):
        return self.agent("guest-exec", path=program, arg=list(words), **{"capture-output": True})["pid"]

    def wait(self, pid):
        deadline = time.monotonic() + PROGRAM_LIMIT_S
        while time.monotonic() < deadline:
            status = self.agent("guest-exec-status", pid=pid)
            if status["exited"]:
                if status.get("exitcode") != 0:
                    raise BenchError(f"in the guest: {status}")
                return base64.b64decode(status.get("out-data", "")).decode()
            time.sleep(0.01)
        raise BenchError("a program in the guest does not end")

    def exec(self, *words):
        return self.wait(self.spawn(*words))


class Agent:
    """A client of QEMU's guest agent (its protocol is QEMU's qga/qapi-schema.json)."""

    def __init__(self, path):
        """Waits until the guest is up."""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.lines = Lines(self.socket.fileno(), "the guest's agent")
        deadline = time.monotonic() + BOOT_LIMIT_S
        # What is sent before the agent runs may be lost; what is not is answered late.
        while not self._answers(time.monotonic_ns()):
            if time.monotonic() > deadline:
                raise BenchError("the guest has no agent")

    def close(self):
        self.socket.close()

    def execute(self, command, **arguments):
        self._send(command, **arguments)
        reply = self.lines.next(REPLY_LIMIT_S)
        if "return" not in reply:
            raise BenchError(f"the guest's agent says {reply} to `{command}`")
        return reply["return"]

    def _answers(self, identity):
        self._send("guest-sync", id=identity)
        try:
            while self.lines.next(ASK_AGAIN_S).get("return") != identity:
                pass
            return True
        except Silent:
            return False

    def _send(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")


def fixture_system(settings, work, folder, options):
    """The fixture guest's kernel and initramfs, where libvirt's QEMU can read them, as XML. `options`
    end the kernel's command line (vm-fixtures/guest/init)."""
    # A machine of the fixture's own knows where they are.
    with Guest(settings, work) as guest:
        words = Path(f"/proc/{guest.pid}/cmdline").read_text().split("\0")
        kernel, initramfs, line = (words[words.index(option) + 1]
                                   for option in ["-kernel", "-initrd", "-append"])
        shutil.copyfile(kernel, folder.run / "kernel")
        shutil.copyfile(initramfs, folder.run / "initramfs")
    return (f"<kernel>{folder.run}/kernel</kernel><initrd>{folder.run}/initramfs</initrd>"
            f"<cmdline>{line} {options}</cmdline>")
