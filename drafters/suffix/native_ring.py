"""The compiled search of finished traffic, of which ``native`` has the rest.

Chains are followed link by link. A lookup of one request does that on its own; a batch does it
together, because the time goes into waiting for memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from drafters.suffix.layout import (
    LAP,
    MAX_VOTES,
    MAX_WALK,
    OLDEST,
    RING_SHIFT,
    SHORTEST,
    SPACE,
)
from drafters.suffix.native_memory import ask, ask_row

_any_njit: Any = njit  # its type leaves out the option
inner = _any_njit(cache=True, _nrt=False)
"""Compiles functions that allocate nothing; see ``native``."""

DUE, SIZE, HIGH, OWN_KIND, OWN_VOTES, LEAST, TODO = range(7)
"""Columns of ``own``: in the first rows, the requests that are searched; tokens of a tail; bound on
the length of a match in finished traffic; kind and votes of its own match; length from which on one
in finished traffic may be worth more, 0 for none; and in the first rows, the requests that are
being looked up."""
LOW, TOP, AT, POSITION, WALKED, FOUND, LENGTH, COUNT = range(7, 15)
"""Of a lookup: lengths that are left and the one that is tried; the position that is looked at,
links followed and occurrences found for that length; the best length and its occurrences."""
NUM_OWN = 15


@inner
def find_all(
    own, num, table, rows, tails, hashes, tokens, spaces, heads, links, state, others
):  # fmt: skip
    """``find_finished`` for a batch, link by link of all chains.

    A lookup needs other memory at every step, and asks for it before the others of the batch are
    looked at. Most matches go on as they did before, and the first length that is tried is the last
    one.

    Args:
        num: requests to look up, whose numbers are in ``own``.
    """
    shortest, oldest = state[SHORTEST], state[OLDEST]
    while num:
        for i in range(num):
            r = own[i, TODO]
            if own[r, WALKED] == 0:
                at = own[r, AT]
                own[r, POSITION] = heads[at - shortest, hashes[r, at - 1] >> state[RING_SHIFT]]
            if own[r, POSITION] >= oldest:
                slot = slot_of(own[r, POSITION], tokens, state)
                ask(tokens, slot)
                ask(spaces, slot)
        left = 0
        for i in range(num):
            r = own[i, TODO]
            if _step(
                own, r, table[rows[r], SPACE], tails, hashes, tokens, spaces, heads, links, state,
                others,
            ):  # fmt: skip
                own[left, TODO] = r
                left += 1
        num = left


@inner
def _step(own, r, space, tails, hashes, tokens, spaces, heads, links, state, others):
    """Look at one position of a lookup. Returns whether there is another one to look at."""
    at, position, found = own[r, AT], own[r, POSITION], own[r, FOUND]
    if position >= state[OLDEST]:
        slot = slot_of(position, tokens, state)
        is_ours = slot >= at - 1 and spaces[slot] == space
        if is_ours and num_equal(tokens, slot, tails, r, own[r, SIZE], at) == at:
            others[r, found] = slot
            found += 1
        own[r, FOUND] = found
        own[r, WALKED] += 1
        own[r, POSITION] = links[slot, at - state[SHORTEST]]
        if found < MAX_VOTES and own[r, WALKED] < MAX_WALK:
            return True
    # If a suffix occurred, so did all shorter ones: bisect, trying the longest first.
    if found:
        own[r, LENGTH], own[r, COUNT], own[r, LOW] = at, found, at + 1
    else:
        own[r, TOP] = at - 1
    own[r, AT] = (own[r, LOW] + own[r, TOP] + 1) >> 1
    own[r, WALKED] = own[r, FOUND] = 0
    if own[r, LOW] > own[r, TOP]:
        return False
    at = own[r, AT]
    ask_row(heads, at - state[SHORTEST], hashes[r, at - 1] >> state[RING_SHIFT])
    return True


@inner
def slot_of(position, tokens, state):
    """Where the ring has a position that was not evicted."""
    slot = position - state[LAP]
    return slot if slot >= 0 else slot + len(tokens)


@inner
def num_equal(tokens, end, tails, r, size, most):
    """How many of the last tokens up to ``end`` are those of a tail, ``most`` at most."""
    for j in range(most):
        if tokens[end - j] != tails[r, size - 1 - j]:
            return j
    return most


@inner
def find_finished(
    tails, r, size, hashes, space, low, high, tokens, spaces, heads, links, state, ends
):
    """Like ``_find_own`` in finished traffic of a namespace, for lengths from ``low``, 0 for none,
    to ``high``; slots of the ring."""
    length, count = 0, 0
    if low == 0:
        return length, count
    low, high = max(low, state[SHORTEST]), min(high, size)
    n = high
    # If a suffix occurred, so did all shorter ones: bisect, trying the longest first.
    while low <= high:
        position = heads[n - state[SHORTEST], hashes[r, n - 1] >> state[RING_SHIFT]]
        found = _occurrences(
            tails, r, size, n, np.int64(position), space, tokens, spaces, links, state, ends
        )
        if found:
            length, count, low = n, found, n + 1
        else:
            high = n - 1
        n = (low + high + 1) >> 1
    return length, count


@inner
def _occurrences(tails, r, size, n, position, space, tokens, spaces, links, state, ends):
    """Where the last ``n`` tokens of a tail occurred in finished traffic of a namespace; ``ends``
    receives the latest ones. Returns how many.

    Args:
        position: of the latest with their hash.
    """
    at, found = n - state[SHORTEST], 0
    for _ in range(MAX_WALK):
        if position < state[OLDEST]:
            break
        slot = slot_of(position, tokens, state)
        is_ours = slot >= n - 1 and spaces[slot] == space
        if is_ours and num_equal(tokens, slot, tails, r, size, n) == n:
            ends[r, found] = slot
            found += 1
            if found == MAX_VOTES:
                break
        position = np.int64(links[slot, at])
    return found
