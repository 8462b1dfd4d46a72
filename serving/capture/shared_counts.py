"""Counts of the recorder in its own process, which the engine's process reads without asking."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

NAMES = (
    "written", "dropped", "failed", "withheld", "deleted", "missing", "recovered", "unrecovered",
    "lost_rows",
)  # fmt: skip
_BYTES = 8 * (1 + 2 * len(NAMES))
_TRIES = 1000


class SharedCounts:
    """One process writes them, another reads them; always all of one time.

    They lie there twice, behind the number of times that they were written. It tells which ones are
    whole, so a writer that is killed while it writes leaves those that it wrote before.
    """

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
        version = memory[0] + 1
        for place, name in enumerate(NAMES, _start(version)):
            memory[place] = counts.get(name, 0)
        memory[0] = version

    def read(self) -> dict[str, int]:
        """The last ones that were written."""
        for _ in range(_TRIES):  # one is enough, unless they are written twice meanwhile
            found = self._memory.tolist()
            if self._memory[0] == found[0]:
                start = _start(found[0])
                self._last = dict(zip(NAMES, found[start : start + len(NAMES)], strict=True))
                break
        return self._last


def _start(version: int) -> int:
    """Where the counts of this version lie."""
    return 1 + version % 2 * len(NAMES)


def new_counts() -> int:
    """A descriptor of memory for ``SharedCounts``, all zeros."""
    descriptor = os.memfd_create("slipstream-counts")
    os.ftruncate(descriptor, _BYTES)
    return descriptor
