"""Where the suffix index keeps what in its arrays, and the bounds of its searches."""

from __future__ import annotations

HASH_BITS = 30
MULTIPLIER = 0x1E3779B1
MASK = (1 << HASH_BITS) - 1
END = -1
"""Follows every finished sequence in the ring; no token id is negative."""
MAX_VOTES = 4
"""Latest occurrences that vote on the next token."""
MAX_WALK = 64
"""Maximum links of a chain of finished traffic to follow."""

# Columns of the table of running requests, int64.
TEXT = 0
"""Index in the arena of its block: ``ROOM`` tokens, and for every rung the heads of ``ROOM`` chains
and ``ROOM`` links."""
ROOM = 1
"""Tokens that its block has room for, a power of two."""
SHIFT = 2
"""Bits of a hash that do not choose its chain."""
NUM = 3
"""Tokens."""
LINKED = 4
"""Tokens whose n-grams are in the chains."""
SEED = 5
"""First value of the hashes of its namespace."""
SPACE = 6
"""Number of its namespace."""
NUM_MATCHED = 7
"""Tokens when the match was found."""
MOST_RECENT = 8
"""No match in finished traffic was longer then."""
GENERATION = 9
"""Of finished traffic at that time; -1: nobody has looked."""
VALUES = 10
"""Version of the values of kinds at that time."""
KIND = 11
"""Number of the kind of the match; 0: none."""
IS_OWN = 12
"""The match is in the request itself, else in finished traffic."""
VOTES = 13
"""Occurrences found."""
SLOTS = 14
"""Indices of their last tokens, latest first: in the text, or in the ring."""
NUM_COLUMNS = SLOTS + MAX_VOTES
INTEGERS_IN_LINE = 8
"""Of int64 in a line of the cache."""

# Entries of the state of an index, int64.
OLDEST = 0
"""Oldest position in the ring."""
NOW = 1
"""Generation of finished traffic: changes with every sequence that is indexed."""
VERSION = 2
"""Version of the values of kinds."""
SHORTEST = 3
"""Shortest n-gram."""
LONGEST = 4
"""Longest n-gram."""
SECRET = 5
"""Multiplier of the hashes of running requests."""
LAP = 6
"""Position of the ring's first slot in the lap that is under way."""
RING_SHIFT = 7
"""Bits of a hash that do not choose its chain in the ring."""
NUM_SEARCHES = 8
"""Searches so far."""
NUM_ENTRIES = 9


def shift_of(num_chains: int) -> int:
    """Bits of a hash that do not choose among so many chains, a power of two."""
    return HASH_BITS - (num_chains.bit_length() - 1)
