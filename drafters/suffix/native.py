"""The search of the suffix index, compiled by Numba: one call for a batch of requests.

Everything lies in flat arrays (``layout``). A running request is a row of a table and a block of
an arena of int32: its tokens and hash chains over them. Finished traffic is a ring of tokens with
hash chains of its own, as in zlib. Chains: for a length n of an n-gram, a table from its hash to
the latest position where it ends, and from every position to the one before it with the same hash.
Positions only increase, so nothing is ever deleted.

Finished traffic has chains for every length; a lookup bisects the length and follows at most
``MAX_WALK`` links of each chain, which bounds its time for any traffic. A request has chains for
some lengths, *rungs*, such as 2, 3, 4 and 8: that of the longest rung with an occurrence is
followed to its end, or until ``MAX_VOTES`` of the longest possible are found, so the answer is
exact. That takes a third of the memory, which matters more than the steps: the texts of 128
requests stay in a core's cache. The multiplier of these hashes is secret, so that nobody can write
a prompt whose n-grams all fall into one chain.

The functions keep the interpreter's lock: a call takes microseconds, and a thread that gives the
lock away may wait milliseconds to get it back. ``compiled`` imports this module, because it knows
where compiled code is kept.

A batch goes through each stage of its searches together, and each stage asks for the memory of the
next one (``native_memory``): one request alone would wait for its memory a dozen times.

Numba counts the references to each array that a function is given, which takes longer than the
searching. So inner functions take whole arrays and an index instead of slices, allocate nothing,
and are compiled without that counting (``native_ring.inner``).

Shapes: R requests, S rows of the table, L lengths of n-grams, C chains of each, N slots of the
ring, B kinds of match, M tokens of the longest n-gram. The ring is ``tokens`` [N] int32, ``spaces``
[N] int64, ``heads`` [L, C] int32, ``links`` [N, L] int32. ``values`` [B] float64 is what kinds are
worth, ``kinds`` [7, 4] int64 see ``kinds.table``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from drafters.suffix.layout import (
    END,
    GENERATION,
    IS_OWN,
    KIND,
    LINKED,
    LONGEST,
    MASK,
    MAX_VOTES,
    MOST_RECENT,
    MULTIPLIER,
    NOW,
    NUM,
    NUM_MATCHED,
    RING_SHIFT,
    ROOM,
    SECRET,
    SEED,
    SHIFT,
    SHORTEST,
    SLOTS,
    SPACE,
    TEXT,
    VALUES,
    VERSION,
    VOTES,
)
from drafters.suffix.native_ahead import (
    ask_chains,
    ask_occurrence,
    hash_tail,
    list_due,
    rung_after,
)
from drafters.suffix.native_memory import ask_row
from drafters.suffix.native_ring import (
    AT,
    COUNT,
    DUE,
    FOUND,
    HIGH,
    LEAST,
    LENGTH,
    LOW,
    NUM_OWN,
    OWN_KIND,
    OWN_VOTES,
    SIZE,
    TODO,
    TOP,
    WALKED,
    find_all,
    find_finished,
    inner,
    num_equal,
)

_entry = njit(cache=True)

# ---- called from Python --------------------------------------------------------------------------


@_entry
def extend(arena, table, rows, lens, news, first, start):
    """Append tokens to requests ``first`` and following.

    Args:
        rows: [R] int64 rows of the table.
        lens: [R] int64 tokens of each.
        news: [sum of lens] int32.
        start: index in ``news`` of the tokens of request ``first``.

    Returns:
        The request that has no room for its tokens, and where these begin; R and the end if all
        had.
    """
    for r in range(first, len(rows)):
        row, num = rows[r], lens[r]
        if table[row, NUM] + num > table[row, ROOM]:
            return r, start
        at = table[row, TEXT] + table[row, NUM]
        for j in range(num):
            arena[at + j] = news[start + j]
        table[row, NUM] += num
        start += num
    return len(rows), start


@_entry
def link_finished(tokens, heads, links, state, seed, start, num):
    """Enter the n-grams of a finished sequence into the chains; the last token is part of none,
    because nothing follows it.

    Args:
        start: position of its first token.
        num: number of its tokens.
    """
    slot = start % len(tokens)
    hashes = np.full(max(num - 1, 0), seed, np.int64)
    for n in range(1, min(state[LONGEST], num - 1) + 1):
        # A length at a time, and its heads asked for while hashes are computed: they are on as many
        # lines of the cache as there are tokens, which waiting one by one would take five times as
        # long.
        for i in range(n - 1, num - 1):
            hashes[i] = (hashes[i] + tokens[slot + i - n + 1]) * MULTIPLIER & MASK
            if n >= state[SHORTEST]:
                ask_row(heads, n - state[SHORTEST], hashes[i] >> state[RING_SHIFT])
        if n >= state[SHORTEST]:
            length = n - state[SHORTEST]
            for i in range(n - 1, num - 1):
                chain = hashes[i] >> state[RING_SHIFT]
                links[slot + i, length] = heads[length, chain]
                heads[length, chain] = start + i


@_entry
def look(arena, table, rows, tokens, spaces, heads, links, state, values, kinds, found):
    """Find the match of each request that is to be continued; a request of which nothing changed
    since the last call is not searched again.

    Args:
        found: [R] int64, receives the kind of each.
    """
    num, longest = len(rows), state[LONGEST]
    own = np.empty((num, NUM_OWN), np.int64)
    tails, hashes = np.empty((num, longest), np.int32), np.empty((num, longest), np.int32)
    ends, others = np.empty((num, MAX_VOTES), np.int32), np.empty((num, MAX_VOTES), np.int32)
    _update(
        arena, table, rows, tokens, spaces, heads, links, state, values, kinds,
        own, tails, hashes, ends, others,
    )  # fmt: skip
    for r in range(num):
        found[r] = table[rows[r], KIND]


@_entry
def draft(
    arena, table, rows, tokens, spaces, heads, links, state, values, kinds, most, lens, drafts
):
    """Propose what followed the match of each request.

    Args:
        most: [R] int64 largest number of tokens of each.
        lens: [R] int64, receives how many there are.
        drafts: [R, K] int64, receives them.
    """
    num, longest = len(rows), state[LONGEST]
    own = np.empty((num, NUM_OWN), np.int64)
    tails, hashes = np.empty((num, longest), np.int32), np.empty((num, longest), np.int32)
    ends, others = np.empty((num, MAX_VOTES), np.int32), np.empty((num, MAX_VOTES), np.int32)
    _update(
        arena, table, rows, tokens, spaces, heads, links, state, values, kinds,
        own, tails, hashes, ends, others,
    )  # fmt: skip
    for r in range(num):
        row, k, have = rows[r], most[r], 0
        kind, is_own, count = table[row, KIND], table[row, IS_OWN], table[row, VOTES]
        for i in range(count):
            ends[r, i] = table[row, SLOTS + i]
        while have < k and kind:
            have = _continue(
                arena, table, row, tokens, is_own, ends, r, count, drafts, have, k, others
            )
            if have < k:  # finished sequences ended here: look up the proposal itself
                size = _tail(arena, table, row, state, drafts, r, have, tails)
                hash_tail(tails, r, size, size, np.int64(0), state[SECRET], hashes)
                kind, count, least = _own_match(
                    arena, table, row, tails, r, size, state, values, kinds, ends, hashes
                )
                hash_tail(tails, r, size, size, table[row, SEED], np.int64(MULTIPLIER), hashes)
                length, votes = find_finished(
                    tails, r, size, hashes, table[row, SPACE], least, longest,
                    tokens, spaces, heads, links, state, others,
                )  # fmt: skip
                kind, is_own, count = _better(
                    kind, count, length, votes, tokens, values, kinds, ends, others, r
                )
        lens[r] = have


# ---- called by these -----------------------------------------------------------------------------


@inner
def _update(
    arena, table, rows, tokens, spaces, heads, links, state, values, kinds,
    own, tails, hashes, ends, others,
):  # fmt: skip
    """Bring the matches of requests up to date."""
    num_due = list_due(arena, table, rows, state, own)
    for i in range(num_due):
        r = own[i, DUE]
        own[r, SIZE] = _tail(arena, table, rows[r], state, tails, r, 0, tails)
        ask_chains(arena, table, rows[r], tails, r, own[r, SIZE], state, hashes)
    for i in range(num_due):
        r = own[i, DUE]
        _link(arena, table, rows[r], state)
        ask_occurrence(arena, table, rows[r], r, own[r, SIZE], state, hashes)
    num = 0
    for i in range(num_due):
        r = own[i, DUE]
        row, size, high = rows[r], own[r, SIZE], own[r, HIGH]
        kind, count, least = _own_match(
            arena, table, row, tails, r, size, state, values, kinds, ends, hashes
        )
        own[r, OWN_KIND], own[r, OWN_VOTES], own[r, LEAST] = kind, count, least
        own[r, LENGTH] = own[r, COUNT] = own[r, WALKED] = own[r, FOUND] = 0
        low, top = max(least, state[SHORTEST]), min(high, size)
        if least and low <= top:
            hash_tail(tails, r, top, size, table[row, SEED], np.int64(MULTIPLIER), hashes)
            own[r, LOW], own[r, TOP], own[r, AT] = low, top, top
            ask_row(heads, top - state[SHORTEST], hashes[r, top - 1] >> state[RING_SHIFT])
            own[num, TODO] = r
            num += 1
    find_all(own, num, table, rows, tails, hashes, tokens, spaces, heads, links, state, others)
    for i in range(num_due):
        r = own[i, DUE]
        row, kind, count, least = rows[r], own[r, OWN_KIND], own[r, OWN_VOTES], own[r, LEAST]
        is_own, most_recent = 1, own[r, HIGH]
        if 0 < least <= own[r, HIGH]:
            length, votes = own[r, LENGTH], own[r, COUNT]
            most_recent = length if length else max(least, state[SHORTEST]) - 1
            kind, is_own, count = _better(
                kind, count, length, votes, tokens, values, kinds, ends, others, r
            )
        table[row, KIND], table[row, IS_OWN], table[row, VOTES] = kind, is_own, count
        for i in range(count):
            table[row, SLOTS + i] = ends[r, i]
        table[row, MOST_RECENT], table[row, NUM_MATCHED] = most_recent, table[row, NUM]
        table[row, GENERATION], table[row, VALUES] = state[NOW], state[VERSION]


@inner
def _link(arena, table, row, state):
    """Enter the n-grams of a request's text that have a continuation into its chains."""
    # Locals: after each store the compiler would read the arrays again.
    text, room = table[row, TEXT], table[row, ROOM]
    shift, stop = table[row, SHIFT], table[row, NUM] - 1
    shortest, longest, secret = state[SHORTEST], state[LONGEST], state[SECRET]
    for end in range(table[row, LINKED], stop):
        value, base, rung, n = np.int64(0), text + room, shortest, 0
        most = min(longest, end + 1)
        while rung <= most:
            while n < rung:
                value = (value + arena[text + end - n]) * secret & MASK
                n += 1
            chain = base + (value >> shift)
            arena[base + room + end] = arena[chain]
            arena[chain] = end
            base, rung = base + 2 * room, rung_after(rung)
    table[row, LINKED] = max(stop, 0)


@inner
def _tail(arena, table, row, state, drafts, r, num, tails):
    """The last tokens of a text and a draft of ``num`` tokens. Returns how many there are."""
    of_text = table[row, NUM]
    size = min(of_text + num, state[LONGEST])
    at = of_text + num - size
    for j in range(size):
        tails[r, j] = (
            arena[table[row, TEXT] + at + j] if at + j < of_text else drafts[r, at + j - of_text]
        )
    return size


@inner
def _own_match(arena, table, row, tails, r, size, state, values, kinds, ends, hashes):
    """The longest match in a request's own text.

    Args:
        hashes: of the tail, under the secret.
        ends: receives where the match ends.

    Returns:
        Its kind, the number of its occurrences, and the length from which on a match in finished
        traffic may be worth more, 0 if none is.
    """
    kind = 0
    length, count = _find_own(arena, table, row, tails, r, size, state, ends, hashes)
    if length:
        kind = _kind(arena, table[row, TEXT], ends, r, count, length, kinds, 3)
    return kind, count, _least_better(values, kinds, kind)


@inner
def _find_own(arena, table, row, tails, r, size, state, ends, hashes):
    """Length of the longest suffix of a tail that has a continuation in the request, and in how
    many places; ``ends`` receives them, latest first."""
    text, room, rung = table[row, TEXT], table[row, ROOM], state[SHORTEST]
    if size < rung:
        return 0, 0
    base, shift = text + room, table[row, SHIFT]
    while rung_after(rung) <= size:
        base, rung = base + 2 * room, rung_after(rung)
    length, count = 0, 0
    while length == 0 and rung >= state[SHORTEST]:
        # What the next rung would have found is longer than ``most``.
        most = min(size, rung_after(rung) - 1)
        end = np.int64(arena[base + (hashes[r, rung - 1] >> shift)])
        while end >= 0 and (length < most or count < MAX_VOTES):
            n = num_equal(arena, text + end, tails, r, size, min(most, end + 1))
            if n >= rung and n > length:
                length, count = n, 0
            if n >= rung and n == length and count < MAX_VOTES:
                ends[r, count] = end
                count += 1
            end = np.int64(arena[base + room + end])
        base, rung = base - 2 * room, rung - 1 if rung <= 4 else rung >> 1
    return length, count


@inner
def _better(kind, count, length, votes, tokens, values, kinds, ends, others, r):
    """The better one of a match in the request and one in finished traffic, the request's own on
    ties. Returns its kind, whether it is the request's own, and the number of occurrences.

    Args:
        length: of the match in finished traffic; 0: there is none.
        ends: where the former ends; receives where the better one does.
        others: where the latter ends.
    """
    if length:
        other = _kind(tokens, 0, others, r, votes, length, kinds, 0)
        if kind == 0 or values[other] > values[kind]:
            for i in range(votes):
                ends[r, i] = others[r, i]
            return other, 0, votes
    return kind, 1, count


@inner
def _kind(tokens, base, ends, r, count, length, kinds, first):
    """Number of the kind of a match, see ``kinds.number_of``. Its rows of ``kinds`` begin at
    ``first``."""
    votes, follower = 1, tokens[base + ends[r, 0] + 1]
    for i in range(1, count):
        votes = 2 if votes and tokens[base + ends[r, i] + 1] == follower else 0
    size = kinds.shape[1] - 1
    while length < kinds[6, size]:
        size -= 1
    return kinds[first + votes, size]


@inner
def _least_better(values, kinds, own):
    """See ``kinds.least_better``; 0: none is worth more."""
    for size in range(kinds.shape[1]):
        for votes in range(3):
            if own == 0 or values[kinds[votes, size]] > values[own]:
                return kinds[6, size]
    return 0


@inner
def _continue(arena, table, row, finished, is_own, ends, r, count, drafts, num, k, nexts):
    """Append to a draft of ``num`` tokens what followed the match, until k or until every
    occurrence ended. Returns the new number.

    The request's own occurrences never end: they run on into the draft itself, as in LZ77. The most
    frequent token is next, the latest of equals.

    Args:
        nexts: overwritten.
    """
    text, of_text = table[row, TEXT], table[row, NUM]
    offset = 0
    while num < k:
        offset += 1
        for i in range(count):
            at = ends[r, i] + offset
            if not is_own:
                nexts[r, i] = finished[at]
            elif at < of_text:
                nexts[r, i] = arena[text + at]
            else:
                nexts[r, i] = drafts[r, at - of_text]
        chosen, most = np.int64(END), 0
        for i in range(count):
            votes = 0
            for j in range(count):
                votes += nexts[r, j] == nexts[r, i]
            if nexts[r, i] != END and votes > most:
                chosen, most = nexts[r, i], votes
        if most == 0:
            return num
        drafts[r, num] = chosen
        num += 1
        kept = 0
        for i in range(count):
            if nexts[r, i] == chosen:
                ends[r, kept] = ends[r, i]
                kept += 1
        count = kept
    return num
