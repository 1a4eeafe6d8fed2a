"""A fixture machine in a process of its own, driven by one line of JSON each way."""

import json
import os
import select
import subprocess

from kvmsnap import NAME
from settings import BenchError

# A guest boots under emulation, and a shut-down writes everything back.
REPLY_LIMIT_S = 300


class Silent(BenchError):
    """No answer came in time."""


class Lines:
    """Lines of JSON that come from somebody by a descriptor."""

    def __init__(self, descriptor, who):
        self.descriptor, self.who, self.unread = descriptor, who, b""

    def next(self, limit_s):
        while b"\n" not in self.unread:
            ready, _, _ = select.select([self.descriptor], [], [], limit_s)
            part = os.read(self.descriptor, 1 << 20) if ready else b""
            if not part:
                raise Silent(f"{self.who} is silent or gone")
            self.unread += part
        line, self.unread = self.unread.split(b"\n", 1)
        return json.loads(line)


class Guest:
    """A machine; `with` ends it."""

    def __init__(self, settings, work, *arguments):
        self.child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", settings.program("fixture-guest"),
             *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(work.run), "KVMSNAP_ORACLE": settings.program("oracle")},
        )
        self.lines = Lines(self.child.stdout.fileno(), "the fixture guest (see above)")
        try:
            ready = self.lines.next(REPLY_LIMIT_S)
        except BaseException:
            self.close()
            raise
        self.pid, self.qmp, self.qga = ready["pid"], ready["qmp"], ready["qga"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the machine: its fixture kills QEMU when its standard input is closed."""
        self.child.stdin.close()
        try:
            self.child.wait(60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait(10)
        self.child.stdout.close()

    @property
    def words(self):
        """How kvmsnap is told of it."""
        agent = ["--qga", self.qga] if self.qga else []
        return ["--qmp", self.qmp, *agent, "--name", NAME]

    def ask(self, *words):
        """One request of the fixture: a command and its arguments."""
        self.child.stdin.write(json.dumps(words).encode() + b"\n")
        self.child.stdin.flush()
        return self.lines.next(REPLY_LIMIT_S)

    def command(self, name, /, **arguments):
        """A QMP command on the fixture's own monitor."""
        return self.ask("qmp", name, arguments)

    def agent(self, name, /, **arguments):
        """A command on the fixture's own agent in the guest."""
        return self.ask("agent", name, arguments)

    def write(self, disk, extents):
        """Writes files into a disk, through its device: pairs of offset and path."""
        for offset, path in extents:
            self.ask("qemu-io", disk, f"write -s {path} {offset} {path.stat().st_size}")

    def spawn(self, *words):
        return self.ask("spawn", *words)

    def wait(self, pid):
        return self.ask("wait", pid)

    def exec(self, *words):
        return self.wait(self.spawn(*words))
