"""Counts of the recorder in its own process, which the engine's process reads without asking."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

NAMES = (
    "written", "dropped", "failed", "withheld", "deleted", "missing", "recovered", "unrecovered",
    "lost_rows",
)  # fmt: skip
_BYTES = 8 * (1 + len(NAMES))
_TRIES = 1000


class SharedCounts:
    """One process writes them, another reads them; all of one time, or those read before."""

    def __init__(self, descriptor: int) -> None:
        """
        Args:
            descriptor: from ``new_counts``; it may be closed afterwards.
        """
        self._memory = memoryview(mmap.mmap(descriptor, _BYTES)).cast("q")
        self._last = dict.fromkeys(NAMES, 0)

    def write(self, counts: Mapping[str, int]) -> None:
        """
        Args:
            counts: by name; what lacks is 0.
        """
        memory = self._memory
        memory[0] |= 1  # odd: the others are being written
        for place, name in enumerate(NAMES, 1):
            memory[place] = counts.get(name, 0)
        memory[0] += 1

    def read(self) -> dict[str, int]:
        """All of them. If the writer was killed while it wrote, those read before."""
        for _ in range(_TRIES):
            version, *values = self._memory.tolist()
            if version % 2 == 0 and self._memory[0] == version:
                self._last = dict(zip(NAMES, values, strict=True))
                break
        return self._last


def new_counts() -> int:
    """A descriptor of memory for ``SharedCounts``, all zeros."""
    descriptor = os.memfd_create("slipstream-counts")
    os.ftruncate(descriptor, _BYTES)
    return descriptor
