"""What confidence says of acceptance, learned from rounds, and where a draft is best ended by it.

Positions are put into classes by depth (1, 2, 3 and all deeper ones) and by the probability of the
likeliest token. Counted are how often a position of each class is accepted if all before it are,
and which class follows which. A draft that was ended says nothing about positions that it left out,
and needs no correction for that: whether a position was drafted depends on classes alone, within
which acceptance is counted.

From these follows when to go on, by going back from the longest draft: a token is worth its
survival, less what its row of verification would bring elsewhere; a pass is worth what its token
may bring, the choice not to keep that included, less its time. Time counts at the speed reached, as
in ``choice``.

Shapes: K draft tokens, G classes of depth, B of confidence, S of survival.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policies.ending import NUM_SURVIVALS, Ending, survival_bound, survival_of

Floats = NDArray[np.float64]

EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""Between the classes of confidence."""
_NUM_CLASSES = len(EDGES) + 1
_DEPTHS = 4
"""Classes of depth."""
_POOL_WEIGHT, _DEPTH_WEIGHT = 4.0, 12.0
"""Positions that the prior of a class of confidence counts for, and those of its pool at one
depth."""
_NEXT_WEIGHT = 8.0
"""Passes that the pool of a class of confidence counts for at one depth, as to what follows it."""
_HALF_LIFE_ROUNDS = 4000.0
"""What confidence says changes slowly, and counts are few in the classes of deep positions."""
_SWAP_WEIGHT = 0.25
"""Share of the counts that is left when other weights draft: mostly they are alike."""
_NUM_TURNS, _SLOWNESS = 3, 1.5
"""Turns of the search for the speed reached; time of a drafted step, in those of its base."""
_GRID = np.array([survival_of(number) for number in range(NUM_SURVIVALS)])
_BOUNDS = -np.array([survival_bound(number) for number in range(NUM_SURVIVALS - 1)])
"""Between classes of survival, negative and therefore ascending."""
_CENTRES = (np.array((0.0, *EDGES)) + np.array((*EDGES, 1.0))) / 2


class Prices(NamedTuple):
    """What drafting takes, in plain steps."""

    base_s: float
    """A step whose draft ended before its first token."""
    pass_s: float
    """A pass of the drafter, and telling the host what it says."""
    rows_s: Sequence[float]
    """[K] verifying position 1, 2, ..., its pass not included."""


class EndingModel:
    """Counts of one drafter, and the tables made of them."""

    def __init__(self, max_draft: int) -> None:
        self._max_draft = max_draft
        self._depths = [min(j, _DEPTHS - 1) for j in range(max_draft)]
        self._reached = np.zeros((_DEPTHS, _NUM_CLASSES))
        self._accepted = np.zeros((_DEPTHS, _NUM_CLASSES))
        self._follows = np.zeros((_DEPTHS, _NUM_CLASSES, _NUM_CLASSES))
        self._first = np.ones(_NUM_CLASSES)
        """Classes of first positions."""
        self._made: tuple[Floats, Floats] | None = None
        self.num_rounds = 0
        """Learned from since the start or the last swap."""
        self._decayed = 0

    def learn(self, tops: Sequence[float], num_verified: int, num_accepted: int) -> None:
        """Take in a round.

        Args:
            tops: confidence in each position whose distribution was computed.
        """
        classes = np.searchsorted(EDGES, tops, side="right").tolist()
        self._first[classes[0]] += 1
        for j in range(min(num_accepted + 1, num_verified)):
            at = self._depths[j], classes[j]
            self._reached[at] += 1
            self._accepted[at] += j < num_accepted
        for j in range(1, min(len(classes) - 1, num_accepted) + 1):
            self._follows[self._depths[j], classes[j - 1], classes[j]] += 1
        self.num_rounds += 1

    def _decay(self) -> None:
        factor = 0.5 ** ((self.num_rounds - self._decayed) / _HALF_LIFE_ROUNDS)
        self._decayed = self.num_rounds
        self._scale(factor)

    def _scale(self, factor: float) -> None:
        for counts in (self._reached, self._accepted, self._follows, self._first):
            counts *= factor

    def on_swap(self) -> None:
        """Other weights draft from now on."""
        self._scale(_SWAP_WEIGHT)
        self.num_rounds = self._decayed = 0

    def _rates(self) -> tuple[Floats, Floats]:
        """Hazards and what follows, as of the last tables."""
        if self._made is None:
            self._made = self.hazards(), self.follows()
        return self._made

    def hazards(self) -> Floats:
        """[K, B] probability that a position is accepted if all before it are."""
        pooled = self._accepted.sum(axis=0) + _POOL_WEIGHT * (0.1 + 0.8 * _CENTRES)
        pooled /= self._reached.sum(axis=0) + _POOL_WEIGHT
        by_depth = (self._accepted + _DEPTH_WEIGHT * pooled) / (self._reached + _DEPTH_WEIGHT)
        found: Floats = by_depth[self._depths]
        return found

    def follows(self) -> Floats:
        """[K, B, B] probability of each class at a position, by the class of the one before it; of
        no meaning at the first."""
        marginal = self._follows.sum(axis=(0, 1)) + 1 / _NUM_CLASSES
        marginal /= marginal.sum()
        pooled = self._follows.sum(axis=0) + _POOL_WEIGHT * marginal
        pooled /= pooled.sum(axis=1, keepdims=True)
        by_depth = self._follows + _NEXT_WEIGHT * pooled
        by_depth /= by_depth.sum(axis=2, keepdims=True)
        found: Floats = by_depth[self._depths]
        return found

    def best(self, prices: Prices, rate: float = 1.0) -> tuple[Ending, float]:
        """The best way to end drafts, as far as is known, and the tokens that it is expected to
        make in the time of a plain step.

        Args:
            rate: where to search for the latter.
        """
        self._decay()
        self._made = None
        for _ in range(_NUM_TURNS):  # Dinkelbach: time counts at the speed that it leads to
            keeps, goes_on, first = self._tables(prices, rate)
            surplus = 1 + float(first @ self._first) / float(self._first.sum())
            # The surplus at a speed, 1 + tokens - speed * seconds, falls at least by the base.
            rate += (surplus - rate * prices.base_s) / prices.base_s / _SLOWNESS
        hazards = tuple(map(tuple, self._rates()[0].tolist()))
        return Ending(EDGES, hazards, tuple(map(_rows, keeps)), tuple(map(_rows, goes_on))), rate

    def _tables(
        self, prices: Prices, rate: float
    ) -> tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]], Floats]:
        """``Ending.keeps``, ``Ending.goes_on``, and [B] what a draft is worth by the class of its
        first position.

        Args:
            rate: tokens that a plain step's time is worth.
        """
        hazards, follows = self._rates()
        keeps, goes_on = [], []
        after = np.zeros((NUM_SURVIVALS, _NUM_CLASSES))
        """[S, B] value of the distribution of the next position, by survival before it."""
        for j in reversed(range(self._max_draft)):
            ahead = np.full_like(after, -1.0)
            if j + 1 < self._max_draft:
                ahead = after @ follows[j + 1].T - prices.pass_s * rate
            goes_on.append(ahead > 0)
            survival_SB = _GRID[:, None] * hazards[j]
            more = np.maximum(ahead[_classes(survival_SB), np.arange(_NUM_CLASSES)], 0.0)
            value = survival_SB - prices.rows_s[j] * rate + more
            keeps.append(value > 0)
            after = np.maximum(value, 0.0)
        return keeps[::-1], goes_on[::-1], after[0]

    def continuation(self, tops: Sequence[float], start: int, end: int) -> float:
        """Expected accepted tokens of positions start..end-1 (from 0) of a draft, if all tokens
        before them are accepted.

        Args:
            tops: confidence in the positions that are known; at least up to ``start``.
        """
        hazards, follows = self._rates()
        last = np.searchsorted(EDGES, tops[-1], side="right") if tops else 0
        now, survival, found = np.eye(_NUM_CLASSES)[last], 1.0, 0.0
        for j in range(start, end):
            if j < len(tops):
                now = np.eye(_NUM_CLASSES)[np.searchsorted(EDGES, tops[j], side="right")]
            else:
                now = now @ follows[j]
            kept = now * hazards[j]
            rate = float(kept.sum())
            survival *= rate
            found += survival
            now = kept / rate
        return found

    def drawn(self, tops: Sequence[float], start: int, end: int, rng: random.Random) -> int:
        """Number of accepted tokens of a draft of ``end`` tokens, drawn from what is known of it.

        Args: as ``continuation`` has them.
        """
        hazards, follows = self._rates()
        at = bisect_right(EDGES, tops[-1]) if tops else 0
        for j in range(start, end):
            if j < len(tops):
                at = bisect_right(EDGES, tops[j])
            elif j:
                at = rng.choices(range(_NUM_CLASSES), follows[j][at].tolist())[0]
            if rng.random() >= hazards[j, at]:
                return j
        return end

    def usual(self) -> list[float]:
        """[K] probability that a position is accepted if all before it are, whatever is known."""
        hazards, follows = self._rates()
        now = self._first / self._first.sum()
        found = []
        for j in range(self._max_draft):
            now = now @ follows[j] if j else now
            kept = now * hazards[j]
            found.append(float(kept.sum()))
            now = kept / found[-1]
        return found

    def figures(self) -> dict[str, Any]:
        """JSON-ready: acceptance by confidence at the first position, and rounds behind it."""
        return {
            "rounds": self.num_rounds,
            "acceptance": np.round(self.hazards()[0], 3).tolist(),
        }


def _classes(survival_SB: Floats) -> NDArray[np.int64]:
    return np.searchsorted(_BOUNDS, -survival_SB, side="right")


def _rows(table: NDArray[np.bool_]) -> tuple[tuple[bool, ...], ...]:
    return tuple(map(tuple, table.tolist()))
