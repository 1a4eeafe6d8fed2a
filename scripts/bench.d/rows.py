"""What was measured, over the rounds."""

from measure import median
from settings import say


class Row:
    """What was measured of one way to do something."""

    def __init__(self):
        self.costs, self.stored, self.read = [], [], []

    def add(self, cost, stored=None, read=None):
        self.costs.append(cost)
        self.stored += [] if stored is None else [stored]
        self.read += [] if read is None else [read]

    @property
    def wall(self):
        return median([cost.wall for cost in self.costs])

    @property
    def cpu(self):
        return median([cost.cpu for cost in self.costs])

    def peak(self, field):
        """The highest memory over the rounds in MiB, or None where it was not followed."""
        known = [getattr(cost, field) for cost in self.costs]
        known = [value for value in known if value is not None]
        return max(known) / 1024 if known else None

    def memory(self):
        """Peak memory in words, with and without the key derivation."""
        after = self.peak("rss_open")
        after = "not known" if after is None else f"{after:.0f} MiB"
        return (f"{after} once the repository was open ({self.peak('rss'):.0f} MiB with the key "
                "derivation)")


class Rows(dict):
    """Rows by name."""

    def note(self, name, cost, **more):
        self.setdefault(name, Row()).add(cost, **more)
        say(f"  {name}: {cost.wall:.2f} s, {cost.cpu:.2f} s of CPU")


def in_turn(number, *acts):
    """Every other round in the opposite order, so that nobody always comes after the same one."""
    for act in acts if number % 2 == 0 else reversed(acts):
        act()
