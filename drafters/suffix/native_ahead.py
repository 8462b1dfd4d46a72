"""The first stages of a search of the suffix index, of which ``native`` has the rest: which
requests are searched, and what memory each will need."""

from __future__ import annotations

import numpy as np

from drafters.suffix.layout import (
    GENERATION,
    INTEGERS_IN_LINE,
    LINKED,
    LONGEST,
    MASK,
    MOST_RECENT,
    NOW,
    NUM,
    NUM_COLUMNS,
    NUM_MATCHED,
    NUM_SEARCHES,
    ROOM,
    SECRET,
    SHIFT,
    SHORTEST,
    TEXT,
    VALUES,
    VERSION,
)
from drafters.suffix.native_memory import ask, ask_row
from drafters.suffix.native_ring import DUE, HIGH, inner

_MOST_NEW = 8
"""Tokens for whose chains a request asks ahead; only prompts have more at a time."""


@inner
def list_due(arena, table, rows, state, own):
    """List the requests that are to be searched. Returns how many there are."""
    num = 0
    for r in range(len(rows)):
        for column in range(0, NUM_COLUMNS, INTEGERS_IN_LINE):
            ask_row(table, rows[r], column)
    for r in range(len(rows)):
        row, high = rows[r], state[LONGEST]
        if table[row, GENERATION] == state[NOW]:
            # A match grows by at most one token per new token.
            new = table[row, NUM] - table[row, NUM_MATCHED]
            if new == 0 and table[row, VALUES] == state[VERSION]:
                continue
            high = max(table[row, MOST_RECENT], state[SHORTEST] - 1) + new
        end = table[row, TEXT] + table[row, NUM]
        ask(arena, end - 1)
        ask(arena, max(end - state[LONGEST], table[row, TEXT]))
        own[r, HIGH] = high
        own[num, DUE] = r
        num += 1
    state[NUM_SEARCHES] += num
    return num


@inner
def ask_chains(arena, table, row, tails, r, size, state, hashes):
    """Hash the end of a text, and ask for the heads and links that it will be searched in and
    entered into."""
    text, room, shift = table[row, TEXT], table[row, ROOM], table[row, SHIFT]
    stop, secret = table[row, NUM] - 1, state[SECRET]
    hash_tail(tails, r, size, size, np.int64(0), secret, hashes)
    base, rung = text + room, state[SHORTEST]
    while rung <= size:
        ask(arena, base + (hashes[r, rung - 1] >> shift))
        base, rung = base + 2 * room, rung_after(rung)
    for end in range(max(table[row, LINKED], stop - _MOST_NEW), stop):
        value, base, rung, n = np.int64(0), text + room, state[SHORTEST], 0
        most = min(state[LONGEST], end + 1)
        while rung <= most:
            while n < rung:
                value = (value + arena[text + end - n]) * secret & MASK
                n += 1
            ask(arena, base + (value >> shift))
            if end == stop - 1:
                ask(arena, base + room + end)
            base, rung = base + 2 * room, rung_after(rung)


@inner
def ask_occurrence(arena, table, row, r, size, state, hashes):
    """Ask for the first place that a text will be compared with, and for the link from there."""
    text, room, shift = table[row, TEXT], table[row, ROOM], table[row, SHIFT]
    base, rung, end, at = text + room, state[SHORTEST], np.int64(-1), text
    while rung <= size:
        latest = np.int64(arena[base + (hashes[r, rung - 1] >> shift)])
        if latest >= 0:
            end, at = latest, base + room + latest
        base, rung = base + 2 * room, rung_after(rung)
    if end >= 0:
        ask(arena, text + end)
        ask(arena, at)


@inner
def rung_after(rung):
    """The next length that a request has chains for, see ``running.rungs``."""
    return rung + 1 if rung < 4 else 2 * rung


@inner
def hash_tail(tails, r, num, size, value, multiplier, hashes):
    """Hashes of the last 1, 2, ... ``num`` of ``size`` tokens."""
    for n in range(num):
        value = (value + tails[r, size - n - 1]) * multiplier & MASK
        hashes[r, n] = value
