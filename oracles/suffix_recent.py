"""Finished traffic: hash chains over a ring of tokens, as in zlib.

For every n-gram length a table maps the hash of an n-gram to its latest position, and every
position to the previous one with the same hash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

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
_MOST_WAITING = 16_384
"""Tokens of finished sequences that may wait to be indexed; one longer sequence may too. Bounds the
time of the first lookup after a long rest."""


def _hash_suffixes(tokens: list[int], seed: int) -> list[int]:
    """Hash of the last 1, 2, ... tokens."""
    value, hashes = seed, []
    for token in reversed(tokens):
        value = (value + token) * _MULTIPLIER & MASK
        hashes.append(value)
    return hashes


@dataclass(frozen=True, slots=True)
class _Placed:
    """A finished sequence in the ring."""

    tokens: NDArray[np.int32]
    start: int
    """Position of its first token."""
    seed: int
    """First value of its hashes."""


class Chains:
    """Tokens in a ring, with a table of hash chains for each n-gram length."""

    def __init__(self, capacity: int, min_match: int, max_match: int) -> None:
        bits = max(10, (capacity - 1).bit_length())
        self.capacity = capacity
        self.min_match = min_match
        self.max_match = max_match
        self._shift = _HASH_BITS - bits
        self._num_chains = 1 << bits  # for each length
        num_lengths = max_match - min_match + 1
        self._tokens = np.full(capacity, END, dtype=np.int32)
        self._owners = np.zeros(capacity, dtype=np.int32)
        self._heads = np.full((num_lengths, 1 << bits), -1, dtype=np.int32)
        self._prevs = np.full((num_lengths, capacity), -1, dtype=np.int32)
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

    def link(self, texts: Sequence[_Placed]) -> None:
        """Index all n-grams within texts, which were put in this order; the last token of each is
        not part of any, because nothing follows it."""
        sizes = np.array([len(text.tokens) - 1 for text in texts])
        tokens = np.concatenate([text.tokens[:-1] for text in texts]).astype(np.int64)
        before = np.cumsum(sizes) - sizes
        index = np.arange(len(tokens))
        reach = index - np.repeat(before, sizes) + 1
        starts = np.array([text.start for text in texts])
        positions = index + np.repeat(starts - before, sizes)
        hashes = np.repeat(np.array([text.seed for text in texts]), sizes)
        keys = []
        bits = len(tokens).bit_length()
        for n in range(1, min(self.max_match, sizes.max()) + 1):
            hashes[n - 1 :] = (hashes[n - 1 :] + tokens[: len(tokens) - n + 1]) * _MULTIPLIER & MASK
            if n >= self.min_match:
                ends = np.flatnonzero(reach >= n)
                chain = (hashes[ends] >> self._shift) + (n - self.min_match) * self._num_chains
                keys.append(chain << bits | ends)
        if keys:
            # Sorting keys that hold chain and index is five times as fast as a stable argsort.
            ordered = np.sort(np.concatenate(keys))
            self._link_ordered(ordered >> bits, positions[ordered & ((1 << bits) - 1)])

    def _link_ordered(self, chains: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Append positions to chains; both ascend, positions within each chain."""
        heads, prevs = self._heads.reshape(-1), self._prevs.reshape(-1)
        is_first = np.append(True, chains[1:] != chains[:-1])
        is_last = np.append(is_first[1:], True)
        before = np.append(np.int64(0), positions[:-1]).astype(np.int32)
        before[is_first] = heads[chains[is_first]]
        rows = chains // self._num_chains
        prevs[rows * self.capacity + positions % self.capacity] = before
        heads[chains[is_last]] = positions[is_last]

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
    """The newest ``capacity`` tokens of finished sequences, separators included.

    A sequence waits until ``catch_up`` indexes it. Where nobody looks for long, the newest ones
    wait, ``_MOST_WAITING`` tokens and no more than ``capacity``; older ones are skipped: never
    indexed, and counted.
    """

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
        self._waiting: deque[tuple[list[int], str, int]] = deque()  # tokens, namespace, seed
        self.num_waiting_tokens = 0
        self.num_skipped_sequences = 0
        self.num_skipped_tokens = 0

    @property
    def generation(self) -> int:
        """Changes with every sequence that is indexed."""
        return self._next_owner

    @property
    def num_sequences(self) -> int:
        return len(self._live)

    @property
    def token_view(self) -> memoryview[int]:
        return self._chains.token_view

    def add(self, tokens: list[int], namespace: str, seed: int) -> None:
        """Let a finished sequence wait to be indexed. One beyond ``capacity`` keeps its end."""
        capacity = self._chains.capacity
        kept = tokens[max(0, len(tokens) - (capacity - 1)) :]
        if not kept:
            return
        self._waiting.append((kept, namespace, seed))
        self.num_waiting_tokens += len(kept)
        while len(self._waiting) > 1 and (
            self.num_waiting_tokens > _MOST_WAITING
            or self.num_waiting_tokens + len(self._waiting) > capacity
        ):
            num_tokens = len(self._waiting.popleft()[0])
            self.num_waiting_tokens -= num_tokens
            self.num_skipped_sequences += 1
            self.num_skipped_tokens += num_tokens

    def catch_up(self) -> None:
        """Index the sequences that wait."""
        if not self._waiting:
            return
        placed = [self._put(*waiting) for waiting in self._waiting]
        self._waiting.clear()
        self.num_waiting_tokens = 0
        # Little room before the ring's end may have evicted the first of them again.
        self._chains.link(placed[-len(self._live) :])

    def _put(self, tokens: list[int], namespace: str, seed: int) -> _Placed:
        """Put a sequence into the ring; the oldest ones are evicted to make room."""
        size = len(tokens) + 1
        start = self._place(size)
        while self._live and self.oldest < start + size - self._chains.capacity:
            self._evict_oldest()
        owner = self._next_owner
        self._live[owner] = (start, len(tokens), namespace)
        self._owners.setdefault(namespace, set()).add(owner)
        self._next_owner, self._next_position = owner + 1, start + size
        self.oldest = next(iter(self._live.values()))[0]
        self.num_tokens += len(tokens)
        ids = np.array([*tokens, END], dtype=np.int32)
        self._chains.put(ids, start, owner)
        return _Placed(ids[:-1], start, seed)

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
