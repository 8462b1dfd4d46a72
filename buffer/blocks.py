"""Memory for records, used again once nobody refers to it any more.

A record of a megabyte is a fresh mapping for the allocator each time, and to touch its pages for
the first time takes longer than to read, copy and check it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque

import numpy as np
from numpy.typing import NDArray

MAX_IDLE_BYTES = 128 << 20
_LEAST_BYTES = 64 << 10
"""Smaller pieces come from memory that the allocator keeps itself."""


class Blocks:
    """Hands out memory, and takes it back when the last view of it is gone, on any thread."""

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        """
        Args:
            max_idle_bytes: memory kept for later.
        """
        self._max_idle_bytes = max_idle_bytes
        self._idle: defaultdict[int, deque[NDArray[np.uint8]]] = defaultdict(deque)
        self._idle_bytes = 0
        self._lent: dict[int, tuple[weakref.ref[NDArray[np.uint8]], NDArray[np.uint8]]] = {}
        """By the reference's id: a weak reference to the view handed out, and its block."""

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Uninitialised memory, [num_bytes]. Keep it, or any view of it, as long as you like."""
        if num_bytes < _LEAST_BYTES:
            return np.empty(num_bytes, np.uint8)
        size = _rounded_up(num_bytes)
        try:
            block = self._idle[size].pop()
            self._idle_bytes -= size
        except IndexError:
            block = np.empty(size, np.uint8)
        view = block[:num_bytes]
        gone = weakref.ref(view, self._take_back)
        self._lent[id(gone)] = gone, block
        return view

    def _take_back(self, gone: weakref.ref[NDArray[np.uint8]]) -> None:
        _, block = self._lent.pop(id(gone))
        # Two threads at once may miscount the idle bytes by a block: it bounds memory, no more.
        if self._idle_bytes + block.size <= self._max_idle_bytes:
            self._idle_bytes += block.size
            self._idle[block.size].append(block)


def _rounded_up(num_bytes: int) -> int:
    """Next of eight sizes between two powers of two, so that records of about one size share."""
    unit = 1 << max((num_bytes - 1).bit_length() - 4, 0)
    return -(-num_bytes // unit) * unit
