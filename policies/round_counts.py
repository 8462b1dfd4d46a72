"""Rounds counted by what they verified and kept, which acceptance is learned from.

Shapes: K draft tokens, U different rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from policies.interface import RowOutcomes

Outcomes = Mapping[tuple[int, int], int]
"""Number of rounds by (num_verified, num_accepted), num_verified >= 1."""
ByBucket = Mapping[int | None, Outcomes]
"""Rounds by bucket, the kind of match; under ``None`` those whose match nobody looked up."""
Ints = NDArray[np.int64]


class Excess(NamedTuple):
    """What rounds are expected to have kept beyond others."""

    kept: NDArray[np.float64]
    """[K] rounds that kept each position."""
    tokens: float


Beyond = Mapping[int | None, Excess]
"""By bucket; under ``None`` all buckets together."""
NOTHING_BEYOND: Beyond = {}


class Counted:
    """Rounds of one drafter in which something was verified."""

    def __init__(self) -> None:
        self.rounds: dict[int | None, Counter[tuple[int, int]]] = {}
        """By kind of match."""
        self.steps: list[RowOutcomes] = []
        """Those among them that tell the group of each request."""

    def add(self, rows: RowOutcomes) -> None:
        """Count the rounds of a step."""
        matches = repeat(None) if rows.matches is None else rows.matches
        rounds = zip(matches, rows.num_verified, rows.num_accepted, strict=False)
        for (match, num_verified, num_accepted), count in Counter(rounds).items():
            if num_verified:
                self.rounds.setdefault(match, Counter())[num_verified, num_accepted] += count
        if rows.groups:
            self.steps.append(rows)


class Rounds(NamedTuple):
    """Rounds of some steps by all that is known of them beforehand. U different ones."""

    buckets_U: Ints
    """Kind of match; -1 where nobody looked."""
    groups_U: Ints
    verified_U: Ints
    """>= 1."""
    accepted_U: Ints
    counts_U: Ints

    @classmethod
    def of(cls, steps: Sequence[RowOutcomes]) -> Rounds:
        """Count the rounds in which something was verified."""
        columns = []
        for rows in steps:
            assert rows.groups is not None, "nobody told the groups"
            buckets = -1 if rows.matches is None else np.array(list(rows.matches))
            groups = np.frombuffer(rows.groups, np.uint8).astype(np.int64)
            column = np.array((rows.num_verified, rows.num_accepted))
            code = ((buckets + 1 << 8 | groups) << 8 | column[0]) << 8 | column[1]
            columns.append(code[column[0] > 0])
        code, counts = np.unique(np.concatenate(columns), return_counts=True)
        return cls((code >> 24) - 1, code >> 16 & 255, code >> 8 & 255, code & 255, counts)


def counts_of(outcomes: Outcomes, max_draft: int) -> list[list[int]]:
    """Rounds that reached each position, and those that accepted it."""
    reached, accepted = [0] * max_draft, [0] * max_draft
    for (num_verified, num_accepted), count in outcomes.items():
        for j in range(num_accepted):
            reached[j] += count
            accepted[j] += count
        if num_accepted < num_verified:
            reached[num_accepted] += count
    return [reached, accepted]
