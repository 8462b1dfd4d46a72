"""Waits for a moment in which the machine has nothing else to do: what others load it with is no
property of the code that is measured. Linux only."""

from __future__ import annotations

import time
from pathlib import Path

_LOOK_S = 0.15
_LOOKS = 3
"""In a row, in which the machine must be idle."""
_MOST_BUSY = 0.08
"""Share of all cores."""


def wait_until_idle(longest_s: float) -> bool:
    """Wait until no core has work, so that what is measured at once begins on free cores.

    Args:
        longest_s: give up after so many seconds.

    Returns:
        Whether the machine is idle; ``False`` at once for 0 seconds.
    """
    until_s, num_idle = time.monotonic() + longest_s, 0
    while time.monotonic() < until_s:
        busy, total = _ticks()
        time.sleep(_LOOK_S)
        after, total_after = _ticks()
        is_idle = after - busy <= _MOST_BUSY * (total_after - total)
        num_idle = num_idle + 1 if is_idle else 0
        if num_idle == _LOOKS:
            return True
    return False


def _ticks() -> tuple[int, int]:
    """Ticks in which cores worked, and all ticks, since the machine started."""
    first = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, idle, waiting, *others = map(int, first.split()[1:9])
    busy = user + nice + system + sum(others)
    return busy, busy + idle + waiting
