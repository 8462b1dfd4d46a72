"""Numbers that several processes add up together: one row each in shared memory.

A process writes only to its own row, and whoever is asked adds all rows. Memory outlives the
processes that map it: one that is killed and started again goes on from the numbers in its row, so
counts are lost neither by a crash nor by a restart, and no disk is needed.
"""

from __future__ import annotations

import mmap
import os
import tempfile

_ITEM_BYTES = 8


class Tallies:
    """Numbers of this process, and the sums over all processes."""

    def __init__(self, memory: memoryview[float], num_rows: int, row: int) -> None:
        """
        Args:
            memory: [num_rows * width] float64.
            row: the row of this process. Only one process, and one thread of it, may have it.
        """
        self._width = len(memory) // num_rows
        self._rows = [
            memory[start : start + self._width]
            for start in range(0, num_rows * self._width, self._width)
        ]
        self._own = self._rows[row]

    @classmethod
    def private(cls, width: int) -> Tallies:
        """Of one process alone."""
        return cls(memoryview(bytearray(width * _ITEM_BYTES)).cast("d"), 1, 0)

    @classmethod
    def mapped(cls, descriptor: int, num_rows: int, row: int) -> Tallies:
        """In memory from ``shared_memory``."""
        return cls(memoryview(mmap.mmap(descriptor, 0)).cast("d"), num_rows, row)

    def add(self, place: int, amount: float) -> None:
        """Add to one number of this process."""
        self._own[place] += amount

    def totals(self) -> list[float]:
        """[width], sums over all processes."""
        return [sum(column) for column in zip(*self._rows, strict=True)]


def shared_memory(num_rows: int, width: int) -> int:
    """A file descriptor of memory for ``Tallies.mapped``, all zeros. Processes inherit it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("slipstream-tallies")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_rows * width * _ITEM_BYTES)
    return descriptor
