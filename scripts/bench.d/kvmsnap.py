"""The program under measurement, on a host of its own."""

import json
import shutil

import measure

NAME = "bench"


class Kvmsnap:
    """kvmsnap with a repository, state and password in one folder."""

    def __init__(self, settings, work, folder="kvmsnap"):
        self.program = settings.program("kvmsnap")
        self.folder = work.folder(folder)
        self.repository = self.folder / "repository"
        password = self.folder / "password"
        password.write_text("of no value\n")
        self.env = {
            "KVMSNAP_REPOSITORY": str(self.repository),
            "KVMSNAP_PASSWORD_FILE": str(password),
            "KVMSNAP_STATE_DIR": str(self.folder / "state"),
            "KVMSNAP_RUN_DIR": str(self.folder / "run"),
        }
        self.run("repository", "init")

    def run(self, *words, **options):
        """Runs a command to its end."""
        return self.start(*words, **options).finish()

    def start(self, *words, memory=False, also=(), sync=(), warm=None):
        """Starts a command. `memory` follows its high-water mark once the repository is open; `warm` is
        how many bytes of memory are touched before."""
        locks = self.repository / "locks" if memory else None
        return measure.Command([self.program, "--json", *words], env=self.env, also=also, sync=sync,
                               locks=locks, warm=warm and (self.folder, warm))

    def start_backup(self, guest, *more, memory=True, warm=None):
        return self.start("backup", *guest.words, *more, memory=memory, also=[guest.pid],
                          sync=[self.repository], warm=warm)

    def backup(self, guest, *more, memory=True, warm=None):
        """A backup: its cost and the snapshot's record."""
        cost = self.start_backup(guest, *more, memory=memory, warm=warm).finish()
        return cost, json.loads(cost.stdout)

    def opening(self):
        """What it costs to open the repository: listing a domain that is not there."""
        return self.run("list", "nobody")

    def restore(self, target, image_format, name=NAME, warm=None):
        """Restores the newest snapshot into a new folder."""
        shutil.rmtree(target, ignore_errors=True)
        return self.run("restore", f"latest:{name}", "--to", str(target), "--format", image_format,
                        memory=True, sync=[target.parent], warm=warm)

    def bytes_stored(self):
        """Bytes of all files of the repository."""
        return measure.bytes_in(self.repository)


def only_disk(record):
    """The record of the one disk that the machines here have."""
    (disk,) = (disk for disk in record["disks"] if disk["target"] == "vda")
    return disk
