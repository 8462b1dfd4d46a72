"""Finished traffic: hash chains over a ring of tokens, as in zlib.

For every n-gram length a table maps the hash of an n-gram to its latest position, and every
position to the previous one with the same hash. Positions only increase and index the ring, so an
evicted position is one that is too old.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.suffix.layout import END

_MOST_WAITING = 16_384
"""Tokens of finished sequences that may wait to be indexed; one longer sequence may too. Bounds the
time of the first lookup after a long rest."""
_LINE = 16
"""Values of int32 in a line of a cache."""
Tokens = NDArray[np.int32]


class Ring(NamedTuple):
    """Tokens with hash chains. N slots, L lengths, C chains of each.

    ``spaces`` and ``links`` are columns of one array, so that all that a slot has besides its token
    is in one line of a cache: a lookup waits for memory, not for the processor.
    """

    tokens: Tokens
    """[N]."""
    spaces: NDArray[np.int64]
    """[N or more] number of the namespace of each."""
    heads: Tokens
    """[L, C] latest position."""
    links: Tokens
    """[N or more, L] position before each in its chain; -1: none."""

    @classmethod
    def empty(cls, capacity: int, num_lengths: int) -> Ring:
        """A ring of ``capacity`` slots."""
        num_chains = 1 << max(10, (capacity - 1).bit_length())
        # Two slots at least: one row alone is contiguous, which would be another type to Numba.
        slots = _in_lines(max(capacity, 2), 2 + num_lengths)
        spaces, links = slots.view(np.int64)[:, 0], slots[:, 2 : 2 + num_lengths]
        spaces[:] = 0
        return cls(
            np.full(capacity, END, np.int32),
            spaces,
            np.full((num_lengths, num_chains), -1, np.int32),
            links,
        )


def _in_lines(num: int, width: int) -> Tokens:
    """[num, width or more], -1 everywhere; each row begins with a line of the cache."""
    width = -(-width // _LINE) * _LINE
    values = np.full(num * width + _LINE, -1, np.int32)
    start = -values.ctypes.data // values.itemsize % _LINE
    return values[start : start + num * width].reshape(num, width)


class Finished(NamedTuple):
    """A finished sequence."""

    tokens: Tokens
    namespace: str
    space: int
    """Number of its namespace,"""
    seed: int
    """and first value of the hashes."""


class _Placed(NamedTuple):
    """A finished sequence in the ring."""

    start: int
    """Position of its first token."""
    num_tokens: int
    namespace: str


class Namespaces:
    """Numbers of namespaces that are in use. A number is never given to another one."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._users: dict[str, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def take(self, namespace: str) -> int:
        """The number of a namespace, for one more user."""
        if namespace not in self._numbers:
            self._numbers[namespace], self._next = self._next, self._next + 1
        self._users[namespace] = self._users.get(namespace, 0) + 1
        return self._numbers[namespace]

    def give_back(self, namespace: str) -> None:
        """One user less."""
        self._users[namespace] -= 1
        if not self._users[namespace]:
            del self._users[namespace], self._numbers[namespace]


class RecentText:
    """The newest ``capacity`` tokens of finished sequences, separators included.

    A sequence waits until ``catch_up`` indexes it. Where nobody looks for long, the newest ones
    wait, ``_MOST_WAITING`` tokens and no more than ``capacity``; older ones are skipped: never
    indexed, and counted.
    """

    _MAX_POSITION = (1 << 31) - 1

    def __init__(self, capacity: int, num_lengths: int, namespaces: Namespaces) -> None:
        """
        Args:
            namespaces: counts those that it holds.
        """
        self.ring = Ring.empty(max(capacity, 1), num_lengths)
        self._namespaces = namespaces
        self._live: deque[_Placed] = deque()
        self._next_position = 0
        self.generation = 0
        """Changes with every sequence that is indexed."""
        self.num_tokens = 0
        self.num_evicted_sequences = 0
        self.num_evicted_tokens = 0
        self._waiting: deque[Finished] = deque()
        self.num_waiting_tokens = 0
        self.num_skipped_sequences = 0
        self.num_skipped_tokens = 0

    @property
    def num_sequences(self) -> int:
        return len(self._live)

    @property
    def oldest(self) -> int:
        """Position of the first token; every position is smaller if there is none."""
        return self._live[0].start if self._live else self._next_position

    @property
    def lap(self) -> int:
        """Position of the ring's first slot in the lap that is under way."""
        return self._next_position - self._next_position % len(self.ring.tokens)

    def add(self, finished: Finished) -> None:
        """Let a finished sequence wait to be indexed. One beyond ``capacity`` keeps its end. It
        takes over the use of the namespace."""
        capacity = len(self.ring.tokens)
        kept = finished.tokens[max(0, len(finished.tokens) - (capacity - 1)) :]
        if not len(kept):
            self._namespaces.give_back(finished.namespace)
            return
        self._waiting.append(finished._replace(tokens=kept))
        self.num_waiting_tokens += len(kept)
        while len(self._waiting) > 1 and (
            self.num_waiting_tokens > _MOST_WAITING
            or self.num_waiting_tokens + len(self._waiting) > capacity
        ):
            skipped = self._waiting.popleft()
            self._namespaces.give_back(skipped.namespace)
            self.num_waiting_tokens -= len(skipped.tokens)
            self.num_skipped_sequences += 1
            self.num_skipped_tokens += len(skipped.tokens)

    def catch_up(self, native: Any, state: NDArray[np.int64]) -> None:
        """Index the sequences that wait.

        Args:
            native: the compiled functions.
            state: of the index.
        """
        if not self._waiting:
            return
        for finished in self._waiting:
            self._put(finished)
        seeds = [finished.seed for finished in self._waiting]
        self._waiting.clear()
        self.num_waiting_tokens = 0
        # Little room before the ring's end may have evicted the first of them again.
        num = min(len(seeds), len(self._live))
        first = len(self._live) - num
        for placed, seed in zip(islice(self._live, first, None), seeds[-num:], strict=True):
            native.link_finished(
                self.ring.tokens, self.ring.heads, self.ring.links, state, seed, placed.start,
                placed.num_tokens,
            )  # fmt: skip

    def _put(self, finished: Finished) -> None:
        """Put a sequence into the ring; the oldest ones are evicted to make room."""
        size, capacity = len(finished.tokens) + 1, len(self.ring.tokens)
        start = self._place(size)
        while self._live and self.oldest < start + size - capacity:
            self._evict_oldest()
        slot = start % capacity
        self.ring.tokens[slot : slot + size - 1] = finished.tokens
        self.ring.tokens[slot + size - 1] = END
        self.ring.spaces[slot : slot + size] = finished.space
        self._live.append(_Placed(start, size - 1, finished.namespace))
        self.generation += 1
        self._next_position = start + size
        self.num_tokens += size - 1

    def _place(self, size: int) -> int:
        """First position for a sequence that neither crosses the ring's end nor exceeds int32."""
        capacity = len(self.ring.tokens)
        room = capacity - self._next_position % capacity
        start = self._next_position if size <= room else self._next_position + room
        if start + size <= self._MAX_POSITION:
            return start
        while self._live:
            self._evict_oldest()
        self.ring = Ring.empty(capacity, len(self.ring.heads))
        return 0

    def _evict_oldest(self) -> None:
        evicted = self._live.popleft()
        self._namespaces.give_back(evicted.namespace)
        self.num_tokens -= evicted.num_tokens
        self.num_evicted_sequences += 1
        self.num_evicted_tokens += evicted.num_tokens
