"""Finished traffic: hash chains over a ring of tokens, as in zlib.

For every n-gram length a table maps the hash of an n-gram to its latest position, and every
position to the previous one with the same hash.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_HASH_BITS = 30
"""One digit of a Python int: products stay on CPython's fast path."""
_MULTIPLIER = 0x1E3779B1
MASK = (1 << _HASH_BITS) - 1
END = -1
"""Follows every finished sequence in the ring; no token id is negative."""
MAX_VOTES = 4
"""Latest occurrences that vote on the next token."""
_MAX_WALK = 64
"""Maximum links of a chain to follow: bounds the time of a lookup for any traffic."""


def _hash_suffixes(tokens: list[int], seed: int) -> list[int]:
    """Hash of the last 1, 2, ... tokens."""
    value, hashes = seed, []
    for token in reversed(tokens):
        value = (value + token) * _MULTIPLIER & MASK
        hashes.append(value)
    return hashes


class Chains:
    """Tokens in a ring, with a table of hash chains for each n-gram length."""

    def __init__(self, capacity: int, min_match: int, max_match: int) -> None:
        bits = max(10, (capacity - 1).bit_length())
        self.capacity = capacity
        self.min_match = min_match
        self.max_match = max_match
        self._shift = _HASH_BITS - bits
        self._num_lengths = max_match - min_match + 1
        self._tokens = np.full(capacity, END, dtype=np.int32)
        self._owners = np.zeros(capacity, dtype=np.int32)
        self._heads = np.full((self._num_lengths, 1 << bits), -1, dtype=np.int32)
        self._prevs = np.full((self._num_lengths, capacity), -1, dtype=np.int32)
        # Python reads a memoryview's element three times as fast as an array's.
        self.token_view = self._tokens.data
        self._owner_view = self._owners.data
        self._head_views = [row.data for row in self._heads]
        self._prev_views = [row.data for row in self._prevs]

    def put(self, tokens: NDArray[np.int32], at: int, owner: int) -> None:
        """Store tokens, beginning at position ``at``; they may not straddle the ring's end."""
        slot = at % self.capacity
        self._tokens[slot : slot + len(tokens)] = tokens
        self._owners[slot : slot + len(tokens)] = owner

    def link(self, start: int, stop: int, seed: int) -> None:
        """Index all n-grams within start..stop-1."""
        slot = start % self.capacity
        tokens = self._tokens[slot : slot + stop - start].astype(np.int64)
        hashes = np.full(len(tokens), seed, dtype=np.int64)
        for n in range(1, min(self.max_match, len(tokens)) + 1):
            shorter = hashes[-(len(tokens) - n + 1) :]
            hashes = (shorter + tokens[: len(tokens) - n + 1]) * _MULTIPLIER & MASK
            if n >= self.min_match:
                self._link_length(n - self.min_match, hashes >> self._shift, start + n - 1)

    def _link_length(self, row: int, slots: NDArray[np.int64], at: int) -> None:
        """Chain the n-grams of one length, which end at consecutive positions from ``at``."""
        heads, prevs = self._heads[row], self._prevs[row]
        order = np.argsort(slots, kind="stable")
        ordered, positions = slots[order], (order + at).astype(np.int32)
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        before = np.empty(len(order), dtype=np.int32)
        before[1:] = positions[:-1]
        before[is_first] = heads[ordered[is_first]]
        prevs[positions % self.capacity] = before
        is_last = np.append(is_first[1:], True)
        heads[ordered[is_last]] = positions[is_last]

    def find(
        self, tail: list[int], seed: int, bounds: tuple[int, int], oldest: int, owners: set[int]
    ) -> tuple[int, list[int]]:
        """Length, within ``bounds``, of the longest indexed suffix of ``tail``, and where it ends,
        latest first."""
        best: tuple[int, list[int]] = (0, [])
        low, high = max(bounds[0], self.min_match), min(bounds[1], len(tail))
        if low > high:
            return best
        # If a suffix occurred, so did all shorter ones: bisect, trying the longest first.
        hashes = _hash_suffixes(tail[-high:], seed)
        n = high
        while low <= high:
            found = self._occurrences(tail, n, hashes[n - 1], oldest, owners)
            if found:
                best, low = (n, found), n + 1
            else:
                high = n - 1
            n = (low + high + 1) // 2
        return best

    def _occurrences(
        self, tail: list[int], n: int, value: int, oldest: int, owners: set[int]
    ) -> list[int]:
        """Positions where the last ``n`` tokens of ``tail`` end, latest first."""
        found: list[int] = []
        position = self._head_views[n - self.min_match][value >> self._shift]
        if position < oldest:  # the usual case
            return found
        prev, view, capacity = self._prev_views[n - self.min_match], self.token_view, self.capacity
        gram = tail[-n:]
        for _ in range(_MAX_WALK):
            slot = position % capacity
            if (
                view[slot] == gram[-1]
                and view[slot - n + 1 : slot + 1].tolist() == gram
                and self._owner_view[slot] in owners
            ):
                found.append(position)
                if len(found) == MAX_VOTES:
                    break
            position = prev[slot]
            if position < oldest:
                break
        return found


class RecentText:
    """The newest ``capacity`` tokens of finished sequences, separators included."""

    _MAX_POSITION = (1 << 31) - 1

    def __init__(self, capacity: int, min_match: int, max_match: int) -> None:
        self._chains = Chains(max(capacity, 1), min_match, max_match)
        self._live: dict[int, tuple[int, int, str]] = {}  # owner -> (start, num_tokens, namespace)
        self._owners: dict[str, set[int]] = {}
        self._next_position = 0
        self._next_owner = 0
        self.oldest = 0
        self.num_tokens = 0
        self.num_evicted_sequences = 0
        self.num_evicted_tokens = 0

    @property
    def generation(self) -> int:
        """Changes with every ``add``."""
        return self._next_owner

    @property
    def num_sequences(self) -> int:
        return len(self._live)

    @property
    def token_view(self) -> memoryview[int]:
        return self._chains.token_view

    def add(self, tokens: NDArray[np.int32], namespace: str, seed: int) -> None:
        """Add a finished sequence; the oldest ones are evicted to make room."""
        capacity = self._chains.capacity
        kept = tokens[max(0, len(tokens) - (capacity - 1)) :]
        if not len(kept):
            return
        size = len(kept) + 1
        start = self._place(size)
        while self._live and self.oldest < start + size - capacity:
            self._evict_oldest()
        owner = self._next_owner
        self._live[owner] = (start, len(kept), namespace)
        self._owners.setdefault(namespace, set()).add(owner)
        self._next_owner, self._next_position = owner + 1, start + size
        self.oldest = next(iter(self._live.values()))[0]
        self.num_tokens += len(kept)
        self._chains.put(np.append(kept, np.int32(END)), start, owner)
        self._chains.link(start, start + size - 2, seed)

    def find(
        self, tail: list[int], seed: int, bounds: tuple[int, int], namespace: str
    ) -> tuple[int, list[int]]:
        owners = self._owners.get(namespace)
        if not owners:
            return 0, []
        return self._chains.find(tail, seed, bounds, self.oldest, owners)

    def slot(self, position: int) -> int:
        return position % self._chains.capacity

    def _place(self, size: int) -> int:
        """First position for a sequence that neither crosses the ring's end nor exceeds int32."""
        capacity = self._chains.capacity
        room = capacity - self._next_position % capacity
        start = self._next_position if size <= room else self._next_position + room
        if start + size <= self._MAX_POSITION:
            return start
        while self._live:
            self._evict_oldest()
        self._chains = Chains(capacity, self._chains.min_match, self._chains.max_match)
        return 0

    def _evict_oldest(self) -> None:
        owner = next(iter(self._live))
        _, num_tokens, namespace = self._live.pop(owner)
        self._owners[namespace].discard(owner)
        if not self._owners[namespace]:
            del self._owners[namespace]
        self.num_tokens -= num_tokens
        self.num_evicted_sequences += 1
        self.num_evicted_tokens += num_tokens
        if self._live:
            self.oldest = next(iter(self._live.values()))[0]
