"""What else the machine does: the part of its processors' time that goes to other processes.

Linux counts that time since the machine was started, in /proc/stat. Elsewhere nothing is known.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

#: The part from which on a note says so. On two cores it is a fifth of one: as many rounds of a
#: call on both meet somebody, and more than a fifth disturbed is more than a median bears well.
BUSY = 0.1

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Used:
    """Seconds of all processors together, since the machine was started.

    Attributes:
        total: how many there were.
        busy: what was used; by other virtual machines too, where the system is told of it.
        own: what this process and its children that have ended have used of it.
    """

    total: float
    busy: float
    own: float

    @classmethod
    def now(cls, stat: Path = _STAT) -> Used | None:
        """Read it, or return None where it is not to be had."""
        try:
            name, *ticks = stat.read_text().splitlines()[0].split()
            user, nice, system, idle, waiting, *interrupts_and_stolen = map(int, ticks[:8])
        except (OSError, ValueError, IndexError):
            return None
        if name != "cpu":
            return None
        times = os.times()
        busy = user + nice + system + sum(interrupts_and_stolen)
        second = os.sysconf("SC_CLK_TCK")
        return cls((busy + idle + waiting) / second, busy / second, sum(times[:4]))

    def others(self, later: Used | None) -> float | None:
        """Return the part of all processors' time that others have used until then."""
        if later is None or later.total <= self.total:
            return None
        others = (later.busy - self.busy) - (later.own - self.own)
        # Ticks are counted coarser than a process's own time: a little less than nothing is none.
        return min(max(others / (later.total - self.total), 0.0), 1.0)


def others(seconds: float) -> float | None:
    """Wait and return the part that others use meanwhile; None if unknown."""
    before = Used.now()
    if before is None:
        return None
    time.sleep(seconds)
    return before.others(Used.now())


def busy(share: float | None) -> bool:
    """Whether others use so much that results suffer, as far as is known."""
    return share is not None and share > BUSY
