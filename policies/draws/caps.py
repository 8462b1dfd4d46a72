"""No tenant and no domain has more than a set share of a batch.

A share is that of the rows with a loss, which is what an update learns from. Where whole pieces
would exceed it, the last piece of a stratum is shortened.

Shapes: P pieces, in the order in which they are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-9
_ROUNDS = 50
"""Of scaling; each takes about 10 microseconds."""
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Cap:
    """Bound of the influence of each stratum."""

    stratum_P: Ints
    """Number of each piece's stratum, from 0."""
    share: float
    """Largest share of the rows of a batch, 0 < share <= 1."""

    @property
    def num_strata(self) -> int:
        """One more than the largest number."""
        return int(self.stratum_P.max(initial=-1)) + 1


def rows_within(num_rows_P: Ints, num_tokens_P: Ints, budget: int, caps: Sequence[Cap]) -> Ints:
    """Rows of each piece that are trained on; 0: the piece is not in the batch.

    All rows are 0 if the caps leave no batch at all: with a share of a quarter, at least four
    strata are needed.

    Args:
        num_rows_P: rows with a loss.
        num_tokens_P: positions.
        budget: most positions of a batch.
        caps: up to two, which both hold.
    """
    other_P = num_tokens_P - num_rows_P
    in_full = int(_within_budget(num_rows_P, other_P, budget).sum())
    rows = _rows_within(num_rows_P, other_P, budget, caps, None)
    if len(caps) < 2 or 2 * rows.sum() >= in_full:
        return rows
    # In order, one stratum may have used up what another needed of a third.
    quota = _joint_quota(num_rows_P, *caps)
    other = _rows_within(num_rows_P, other_P, budget, caps, quota)
    return other if other.sum() > rows.sum() else rows


@dataclass(frozen=True, slots=True, eq=False)
class _Quota:
    """Shares of a batch that go to each pair of strata."""

    pair_P: Ints
    share: NDArray[np.float64]
    """[pairs]."""


def _rows_within(
    num_rows_P: Ints, other_P: Ints, budget: int, caps: Sequence[Cap], quota: _Quota | None
) -> Ints:
    """The largest batch that is found from the front of the order."""
    total = min((_largest_total(num_rows_P, cap) for cap in caps), default=int(num_rows_P.sum()))
    total = min(total, int(_within_budget(num_rows_P, other_P, budget).sum()))
    while total > 0:
        rows = num_rows_P
        if quota is not None:
            rows = _limited(rows, quota.pair_P, quota.share * total)
        for cap in caps:
            rows = _limited(rows, cap.stratum_P, np.full(cap.num_strata, cap.share * total))
        rows = _within_budget(rows, other_P, budget)
        found = int(rows.sum())
        if found and all(_holds(rows, cap, found) for cap in caps):
            return rows
        total = min(found, total - 1)
    return np.zeros_like(num_rows_P)


def _joint_quota(num_rows_P: Ints, first: Cap, second: Cap) -> _Quota:
    """Shares of all pairs of strata with which both caps hold, if there are any.

    Begins with what there is of each pair, and scales down whatever exceeds its share, in turn;
    what no cap bounds thereby grows relative to the rest.
    """
    num_pairs = first.num_strata * second.num_strata
    pair_P = first.stratum_P * second.num_strata + second.stratum_P
    rows: NDArray[Any] = np.bincount(pair_P, num_rows_P, num_pairs)
    rows = rows.reshape(first.num_strata, -1)
    for _ in range(_ROUNDS):
        rows = _scaled(_scaled(rows, first.share).T, second.share).T
    return _Quota(pair_P, rows.reshape(-1))


def _scaled(rows: NDArray[Any], share: float) -> NDArray[Any]:
    """Divided by their sum, and every line that has more than its share scaled down to it."""
    rows = rows / max(rows.sum(), _ROUNDING)
    lines = rows.sum(axis=1, keepdims=True)
    scaled: NDArray[Any] = rows * np.minimum(1, share / np.maximum(lines, _ROUNDING))
    return scaled


def strata_needed(share: float) -> int:
    """Fewest strata with which each can have at most this share."""
    return int(np.ceil(1 / share - _ROUNDING))


def _largest_total(num_rows_P: Ints, cap: Cap) -> int:
    """Largest batch in which no stratum has more than its share, for the rows that there are.

    R rows need ``sum_s min(A_s, share R) >= R`` of the strata's rows A_s. Whichever k strata are at
    their limit, the others must fill the rest: ``R <= rest_k / (1 - k share)``, which is tightest
    for the k largest.
    """
    ordered = np.sort(np.bincount(cap.stratum_P, num_rows_P))[::-1]
    rest = np.concatenate((ordered[::-1].cumsum()[::-1], [0]))
    left = 1 - cap.share * np.arange(len(rest))
    bounds = left > _ROUNDING
    return int((rest[bounds] / left[bounds] + _ROUNDING).min())


def _limited(rows_P: Ints, stratum_P: Ints, limits: NDArray[Any]) -> Ints:
    """The first rows of each stratum, up to its limit, rounded down."""
    by_stratum = np.argsort(stratum_P, kind="stable")
    strata, sums = stratum_P[by_stratum], rows_P[by_stratum].cumsum()
    before = sums - rows_P[by_stratum]
    is_first = np.diff(strata, prepend=-1) != 0
    before -= np.maximum.accumulate(np.where(is_first, before, 0))
    whole = np.floor(limits + _ROUNDING).astype(np.int64)[strata]
    kept = np.empty_like(rows_P)
    kept[by_stratum] = np.clip(whole - before, 0, rows_P[by_stratum])
    return kept


def _within_budget(rows_P: Ints, other_P: Ints, budget: int) -> Ints:
    """Rows of the pieces that fit; the first one always does.

    Args:
        other_P: positions of a piece besides its rows with a loss.
    """
    tokens = np.where(rows_P > 0, rows_P + other_P, 0).cumsum()
    smallest = tokens[tokens > 0].min(initial=np.iinfo(np.int64).max)
    kept: Ints = np.where(tokens <= max(budget, smallest), rows_P, 0)
    return kept


def _holds(rows_P: Ints, cap: Cap, total: int) -> bool:
    sums = np.bincount(cap.stratum_P, rows_P)
    return bool(sums.max() <= cap.share * total + _ROUNDING)
