"""Lookups for a whole batch at once: plain loops over arrays, compiled if numba is installed.

Without numba the same functions run as Python, ten times slower for a batch. They compute the same.

Shapes: S rows of requests, L tokens of a row, H chains, C tokens of the ring, N lengths of n-grams,
R requests that ask, V votes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Counts = NDArray[np.int64]

HASH_BITS = 30
"""Products with the multiplier stay within 64 bits."""
MULTIPLIER = 0x1E3779B1
MASK = (1 << HASH_BITS) - 1
END = -1
"""Follows every finished sequence in the ring; no token id is negative."""
MAX_VOTES = 4
"""Latest occurrences that vote on the next token."""
MAX_WALK = 64
"""Maximum links of a chain of finished traffic to follow: bounds the time of a lookup."""


ARE_COMPILED = find_spec("numba") is not None


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call and keep the code on disk; other threads run during later ones."""
    if not ARE_COMPILED:
        return function
    from numba import njit

    compiled: Callable[..., Any] = njit(cache=True, nogil=True)(function)
    return compiled


class Texts(NamedTuple):
    """The texts of running requests, one in a row. Positions whose last ``min_match`` tokens have
    the same hash are in one chain, latest first."""

    tokens_SL: Ids
    lengths_S: Counts
    linked_S: Counts
    """Leading tokens that are in chains. The last token of a text never is: nothing follows it."""
    heads_SH: Ids
    """Latest position of each chain; -1: none."""
    before_SL: Ids
    """The position before it in its chain."""
    seeds_S: Counts
    """First value of the hashes of the request's namespace, in finished traffic."""
    namespaces_S: Counts
    """Number of the request's namespace."""


class Ring(NamedTuple):
    """Finished traffic; see ``recent.Chains``."""

    tokens_C: Ids
    namespaces_C: Counts
    """Number of the namespace of each position; see ``recent.number_of``."""
    heads_NH: Ids
    befores_NC: Ids


class Matches(NamedTuple):
    """The longest match of each row, as it was found last."""

    lengths_S: Counts
    """0: nowhere."""
    are_own_S: NDArray[np.bool_]
    """In the request itself, else in the ring."""
    counts_S: Counts
    """Number of its latest occurrences that are known, up to ``MAX_VOTES``."""
    slots_SV: Counts
    """Index of the last token of each of them, latest first."""
    at_S: Counts
    """Length of the text when it was looked up; -1: never."""
    generations_S: Counts
    """Generation of the ring at that time."""


@_compiled
def _link(texts: Texts, row: int, min_match: int) -> None:
    """Put all tokens that have a continuation into chains."""
    tokens, heads = texts.tokens_SL[row], texts.heads_SH[row]
    end = max(texts.lengths_S[row] - 1, 0)
    for position in range(texts.linked_S[row], end):
        if position >= min_match - 1:
            value = 0
            for back in range(min_match):
                value = (value + int(tokens[position - back])) * MULTIPLIER & MASK
            chain = value % len(heads)
            texts.before_SL[row, position] = heads[chain]
            heads[chain] = position
    texts.linked_S[row] = end


@_compiled
def _find_own(
    texts: Texts, row: int, tail: Counts, min_match: int, max_match: int, slots: Counts
) -> tuple[int, int]:
    """The longest suffix of ``tail`` in a request's own text.

    Args:
        slots: [V] receives where it ends, latest first.

    Returns:
        Its length, and the number of occurrences found.
    """
    size = len(tail)
    if size < min_match:
        return 0, 0
    tokens, heads = texts.tokens_SL[row], texts.heads_SH[row]
    value = 0
    for back in range(min_match):
        value = (value + int(tail[size - 1 - back])) * MULTIPLIER & MASK
    position = heads[value % len(heads)]
    best, count, most = min_match - 1, 0, min(size, max_match)
    while position >= 0:
        shared, limit = 0, min(most, position + 1)
        while shared < limit and tokens[position - shared] == tail[size - 1 - shared]:
            shared += 1
        if shared > best:
            best, count = shared, 0
        if shared == best and shared >= min_match and count < MAX_VOTES:
            slots[count] = position
            count += 1
            if best == most and count == MAX_VOTES:
                break
        position = texts.before_SL[row, position]
    return (best, count) if count else (0, 0)


@_compiled
def _find_finished(
    ring: Ring,
    tail: Counts,
    seed: int,
    namespace: int,
    oldest: int,
    low: int,
    high: int,
    min_match: int,
    slots: Counts,
) -> tuple[int, int]:
    """The longest suffix of ``tail`` in finished traffic, of low..high tokens.

    Args:
        oldest: first position that is still held.
        slots: [V] receives where it ends, latest first, if there is one.

    Returns:
        Its length, and the number of occurrences found; 0 without one.
    """
    size, capacity = len(tail), len(ring.tokens_C)
    low, high = max(low, min_match), min(high, size)
    best, count = 0, 0
    if low > high:
        return best, count
    hashes = np.empty(high, np.int64)
    value = seed
    for back in range(high):
        value = (value + int(tail[size - 1 - back])) * MULTIPLIER & MASK
        hashes[back] = value
    found = np.empty(MAX_VOTES, np.int64)
    # If a suffix occurred, so did all shorter ones: bisect, trying the longest first.
    num = high
    while low <= high:
        chain = hashes[num - 1] * ring.heads_NH.shape[1] >> HASH_BITS
        position, votes = ring.heads_NH[num - min_match, chain], 0
        for _ in range(MAX_WALK):
            if position < oldest or votes == MAX_VOTES:
                break
            slot = position % capacity
            if ring.namespaces_C[slot] == namespace and slot >= num - 1:
                shared = 0
                while shared < num and ring.tokens_C[slot - shared] == tail[size - 1 - shared]:
                    shared += 1
                if shared == num:
                    found[votes] = slot
                    votes += 1
            position = ring.befores_NC[num - min_match, slot]
        if votes:
            best, count, low = num, votes, num + 1
            slots[:votes] = found[:votes]
        else:
            high = num - 1
        num = (low + high + 1) // 2
    return best, count


@_compiled
def _search(
    texts: Texts,
    ring: Ring,
    row: int,
    tail: Counts,
    oldest: int,
    min_match: int,
    max_match: int,
    slots: Counts,
) -> tuple[int, bool, int]:
    """The longest match anywhere, the request's own on ties: its length, whether it is the
    request's own, and the number of occurrences in ``slots``."""
    own, own_count = _find_own(texts, row, tail, min_match, max_match, slots)
    seed, namespace = texts.seeds_S[row], texts.namespaces_S[row]
    length, count = _find_finished(
        ring, tail, seed, namespace, oldest, own + 1, max_match, min_match, slots
    )
    return (length, False, count) if length else (own, True, own_count)


@_compiled
def find(
    rows_R: Counts,
    texts: Texts,
    ring: Ring,
    matches: Matches,
    oldest: int,
    generation: int,
    min_match: int,
    max_match: int,
) -> int:
    """Bring the matches of some rows up to date; returns how many had to be looked up."""
    num_searched = 0
    for row in rows_R:
        length = texts.lengths_S[row]
        if matches.at_S[row] == length and matches.generations_S[row] == generation:
            continue
        num_searched += 1
        _link(texts, row, min_match)
        tail = texts.tokens_SL[row, max(0, length - max_match) : length].astype(np.int64)
        matches.lengths_S[row], matches.are_own_S[row], matches.counts_S[row] = _search(
            texts, ring, row, tail, oldest, min_match, max_match, matches.slots_SV[row]
        )
        matches.at_S[row], matches.generations_S[row] = length, generation
    return num_searched


@_compiled
def _continue(
    texts: Texts, ring: Ring, row: int, is_own: bool, slots: Counts, draft: Counts, num: int, k: int
) -> int:
    """Append to ``draft[:num]`` what followed the occurrences, until k or until all have ended:
    token by token the most frequent one, the latest on ties. Returns the new number of tokens.

    The request's own occurrences never end: they run on into the draft itself, as in LZ77.
    """
    length, offset = texts.lengths_S[row], 0
    votes = np.empty(len(slots), np.int64)
    while num < k:
        offset += 1
        for i in range(len(slots)):
            at = slots[i] + offset
            if not is_own:
                votes[i] = ring.tokens_C[at]
            elif at < length:
                votes[i] = texts.tokens_SL[row, at]
            else:
                votes[i] = draft[at - length]
        chosen, most = END, 0
        for i in range(len(slots)):
            count = 0
            for j in range(len(slots)):
                count += votes[j] == votes[i]
            if votes[i] != END and count > most:
                chosen, most = votes[i], count
        if chosen == END:
            return num
        draft[num] = chosen
        num += 1
        slots = slots[votes[: len(slots)] == chosen]
    return num


@_compiled
def propose(
    rows_R: Counts,
    most_R: Counts,
    texts: Texts,
    ring: Ring,
    matches: Matches,
    oldest: int,
    min_match: int,
    max_match: int,
    drafts_RK: Counts,
) -> Counts:
    """Continue the matches of some rows, which are up to date.

    Args:
        most_R: largest number of tokens for each.
        drafts_RK: receives the tokens.

    Returns:
        [R] number of tokens.
    """
    lens_R = np.zeros(len(rows_R), np.int64)
    for r in range(len(rows_R)):
        row, k, draft = rows_R[r], most_R[r], drafts_RK[r]
        length, is_own = matches.lengths_S[row], matches.are_own_S[row]
        slots = matches.slots_SV[row, : matches.counts_S[row]].copy()
        num, size = 0, texts.lengths_S[row]
        while num < k and length:
            num = _continue(texts, ring, row, is_own, slots, draft, num, k)
            if num < k:  # finished sequences ended here: look up the proposal itself
                own = min(size, max(0, max_match - num))
                tail = np.empty(own + min(num, max_match), np.int64)
                tail[:own] = texts.tokens_SL[row, size - own : size]
                tail[own:] = draft[num - (len(tail) - own) : num]
                again = np.empty(MAX_VOTES, np.int64)
                length, is_own, count = _search(
                    texts, ring, row, tail, oldest, min_match, max_match, again
                )
                slots = again[:count]
        lens_R[r] = num
    return lens_R
