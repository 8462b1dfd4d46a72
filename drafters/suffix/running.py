"""Texts of the running requests, in the arrays that the compiled search works on."""

from __future__ import annotations

import secrets
from array import array
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.suffix.layout import (
    GENERATION,
    HASH_BITS,
    LINKED,
    NUM,
    NUM_COLUMNS,
    ROOM,
    SEED,
    SHIFT,
    SPACE,
    TEXT,
    shift_of,
)

Integers = NDArray[np.int64]
_LEAST_ROOM = 64
"""Tokens of the smallest block."""
_FIRST_ROWS, _FIRST_ARENA = 64, 1 << 16


class Arena:
    """Blocks of int32 in one array, which grows."""

    def __init__(self) -> None:
        self.values = np.empty(_FIRST_ARENA, np.int32)
        self._used = 0
        self._free: dict[int, list[int]] = defaultdict(list)
        """Blocks given back, by size."""

    def take(self, size: int) -> int:
        """Index of a block of so many values, which are undefined."""
        if self._free[size]:
            return self._free[size].pop()
        at, self._used = self._used, self._used + size
        if self._used > len(self.values):
            grown = np.empty(1 << (self._used - 1).bit_length(), np.int32)
            grown[:at] = self.values[:at]
            self.values = grown
        return at

    def give_back(self, at: int, size: int) -> None:
        self._free[size].append(at)

    def clear(self) -> None:
        """Take all blocks back, whatever their sizes."""
        self._used = 0
        self._free.clear()


def rungs(shortest: int, longest: int) -> list[int]:
    """Lengths of n-grams that a request has chains for: n-grams of 4 tokens and more are so rare
    that every other power of two suffices."""
    found = [shortest]
    while (after := found[-1] + 1 if found[-1] < 4 else 2 * found[-1]) <= longest:
        found.append(after)
    return found


class RunningTexts:
    """Tokens of the running requests, and chains over those that were looked up."""

    def __init__(self, min_match: int, max_match: int) -> None:
        self.table = np.zeros((_FIRST_ROWS, NUM_COLUMNS), np.int64)
        self.secret = secrets.randbelow(1 << (HASH_BITS - 1)) << 1 | 1
        """Multiplier of the hashes."""
        self._arena = Arena()
        self._num_rungs = len(rungs(min_match, max_match))
        self._rows: dict[str, int] = {}
        self._free = list(range(_FIRST_ROWS))
        self._last: tuple[list[str], Integers] = [], np.zeros(0, np.int64)
        """Keys asked for last, and their rows."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def arena(self) -> NDArray[np.int32]:
        """All tokens and chains."""
        return self._arena.values

    def row(self, key: str) -> int:
        """The row of a request.

        Raises:
            ValueError: it is not running.
        """
        row = self._rows.get(key)
        if row is None:
            raise ValueError(f"no sequence {key!r} is running; begin it first")
        return row

    def rows(self, keys: Sequence[str]) -> Integers:
        """[R] rows of requests, not to be changed."""
        if keys != self._last[0]:
            try:
                found = list(map(self._rows.__getitem__, keys))
            except KeyError:
                found = list(map(self.row, keys))  # raises what says more
            self._last = list(keys), np.array(found, np.int64)
        return self._last[1]

    def begin(self, key: str, tokens: Sequence[int], seed: int, space: int) -> None:
        """Store a prompt.

        Args:
            seed: first value of the hashes of its namespace.
            space: number of its namespace.
        """
        if key in self._rows:
            raise ValueError(f"sequence {key!r} has begun already")
        if not self._free:
            num = len(self.table)
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
            self._free = list(range(num, 2 * num))
        row = self._rows[key] = self._free.pop()
        self._forget_last()
        self.table[row] = 0
        self.table[row, [NUM, SEED, SPACE, GENERATION]] = len(tokens), seed, space, -1
        # Most answers are shorter than their prompts, and those that are not move once or twice.
        self._move(row, np.fromiter(tokens, np.int32, len(tokens)), len(tokens) * 3 // 2)

    def extend(self, keys: Sequence[str], news: Sequence[Sequence[int]], native: Any) -> None:
        """Append tokens to requests.

        Args:
            native: the compiled functions; ``None`` before they are there.
        """
        if len(keys) != len(news):
            raise ValueError(f"{len(keys)} sequences, but tokens of {len(news)}")
        if native is None:
            for key, tokens in zip(keys, news, strict=True):
                self._append(self.row(key), tokens)
            return
        rows = self.rows(keys)
        lens = np.fromiter(map(len, news), np.int64, len(news))
        # Through an array of C integers: half the time of making one of numpy from objects.
        flat = np.asarray(array("i", list(chain.from_iterable(news))))
        r, at = native.extend(self.arena, self.table, rows, lens, flat, 0, 0)
        while r < len(rows):
            self._make_room(rows[r], int(lens[r]))
            r, at = native.extend(self.arena, self.table, rows, lens, flat, r, at)

    def _append(self, row: int, tokens: Sequence[int]) -> None:
        self._make_room(row, len(tokens))
        at = int(self.table[row, TEXT] + self.table[row, NUM])
        self.arena[at : at + len(tokens)] = tokens
        self.table[row, NUM] += len(tokens)

    def tokens(self, row: int) -> NDArray[np.int32]:
        """The text of a request: a view that the next call may move."""
        at, num = self.table[row, [TEXT, NUM]].tolist()
        return self.arena[at : at + num]

    def finish(self, key: str) -> None:
        """Give back what a request holds."""
        row = self.row(key)
        del self._rows[key]
        self._forget_last()
        self._free.append(row)
        self._give_back(row)
        if not self._rows:
            self._arena.clear()

    def _make_room(self, row: int, num: int) -> None:
        """Move a text to a larger block if it needs that to grow by ``num`` tokens. Its chains are
        built again by the next lookup."""
        needed = int(self.table[row, NUM]) + num
        if needed > self.table[row, ROOM]:
            tokens = self.tokens(row).copy()
            self._give_back(row)
            self._move(row, tokens, needed)

    def _move(self, row: int, tokens: NDArray[np.int32], num: int) -> None:
        """Give a text a block for ``num`` tokens."""
        room = max(_LEAST_ROOM, 1 << max(num - 1, 0).bit_length())
        at, size = self._arena.take(self._size_of_block(room)), self._size_of_block(room)
        self.arena[at : at + len(tokens)] = tokens
        self.arena[at + room : at + size].reshape(-1, 2, room)[:, 0] = -1
        self.table[row, [TEXT, ROOM, SHIFT, LINKED]] = at, room, shift_of(room), 0

    def _give_back(self, row: int) -> None:
        at, room = self.table[row, [TEXT, ROOM]].tolist()
        self._arena.give_back(at, self._size_of_block(room))

    def _size_of_block(self, room: int) -> int:
        return (1 + 2 * self._num_rungs) * room

    def _forget_last(self) -> None:
        self._last = [], np.zeros(0, np.int64)
