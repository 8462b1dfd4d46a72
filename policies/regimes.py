"""What is usual of a drafter's drafts, now and before its traffic changed.

Traffic has moods: code after prose, one tenant's hour after another's. A change detector (Page
1954) says when the rounds since some moment no longer fit what is usual. These rounds then begin a
regime of their own, and the one before is remembered beside it, not mixed into it: a new regime
starts without the old one's evidence, and a return to the old one is recognised after a few rounds
instead of being learned again. Between both, a filter keeps the probability of each, by how well
they predict the rounds that come; without rounds it forgets, as fast as regimes have changed so
far.

Shapes: B + 1 rows of evidence, K draft tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from policies.cusum import Cusum

Floats = NDArray[np.float64]
Counts = Sequence[Sequence[float]]

_NOTHING = 1e-9
_LEAST_CHANCE = 0.01
"""A hazard is taken for no less, and no more than 1 less this, by the filter."""
_TEMPER = 0.5
"""Weight of a round in the filter: rounds of one request resemble each other."""
_SURE = 4.0
"""Largest log-odds of a regime,"""
_OPENED = 2.0
"""those of one that has just begun,"""
_OVER = -1.0
"""and those at which the other one takes its place."""
_EXPLAINED = 4.0
"""Nats that a regime may predict rounds worse than hazards fitted to them do, and explain them; and
by which the moment at which a shift most likely began must tell more than all rounds suspected."""
_LEAST_ROUNDS = 20.0
"""Rounds from which on a regime is worth remembering."""
_KEPT_ROUNDS = 4.0
"""Those that its evidence counts for in the one that follows it."""
_STAY, _LEAST_STAY = 1000.0, 50.0
"""Rounds that a regime lasts before any was seen to end, and at least."""
_STAY_GAIN = 0.3
_MOST_STEPS = 512
"""Kept of a shift that is suspected."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Decayed counts of one drafter's rounds, by bucket and position; the last row is the pool.

    Shapes: B buckets, K draft tokens.
    """

    reached: Floats
    """[B + 1, K] rounds in which the position was verified and all before it were accepted."""
    accepted: Floats
    """[B + 1, K] those in which it was accepted too."""

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Evidence:
        return cls(np.zeros(shape), np.zeros(shape))

    def row(self, at: int) -> Floats:
        """[2, K] counts of one row, copied."""
        return np.array((self.reached[at], self.accepted[at]))

    def limited(self, weight: float) -> Evidence:
        """The same ratios, with the weight of every position capped."""
        return self.scaled(np.minimum(self.reached, weight))

    def scaled(self, reached: Floats) -> Evidence:
        """The same ratios with other weights; none where there were none."""
        ratios = self.accepted / np.maximum(self.reached, _NOTHING)
        return Evidence(reached, reached * ratios)

    def times(self, factors: Floats | float) -> Evidence:
        """Copies in which every count is multiplied."""
        return Evidence(factors * self.reached, factors * self.accepted)


class Shift(NamedTuple):
    """Rounds of a shift, [2, K] that reached each position and that accepted it."""

    suspected: Floats
    """All since the detector was at rest: whether they fit what is known is judged by these, of
    which no chance was picked."""
    since: Floats
    """Those since the shift most likely began."""


class Since:
    """Watches the rows of one drafter's evidence for shifts, and keeps the rounds since the moment
    at which each most likely began: that at which its detector was last at rest."""

    def __init__(self, num_rows: int) -> None:
        self._cusums = [Cusum() for _ in range(num_rows)]
        self._fewer = [deque[Counts](maxlen=_MOST_STEPS) for _ in range(num_rows)]
        self._more = [deque[Counts](maxlen=_MOST_STEPS) for _ in range(num_rows)]
        """Steps since the detector's two sums were last 0."""

    def notices(
        self, row: int, counts: Counts, surprise: float, rounds: int, usual: Floats
    ) -> Shift | None:
        """Take in the rounds of one step.

        Args:
            counts: [2, K] that reached each position, and that accepted it.
            surprise: tokens less those expected, summed.
            usual: [K] hazards that the shift is from.

        Returns:
            ``None`` without a shift.
        """
        cusum, fewer, more = self._cusums[row], self._fewer[row], self._more[row]
        fewer.append(counts)
        more.append(counts)
        if cusum.notices_shift(surprise, rounds):
            found = _shift(more if surprise > 0 else fewer, usual)
            fewer.clear()
            more.clear()
            return found
        if not cusum.below:
            fewer.clear()
        if not cusum.above:
            more.clear()
        return None

    def reset(self) -> None:
        """Start over, as other weights draft now."""
        for cusum, fewer, more in zip(self._cusums, self._fewer, self._more, strict=True):
            cusum.reset()
            fewer.clear()
            more.clear()

    def num_shifts(self, row: int) -> int:
        """Shifts that were noticed."""
        return self._cusums[row].num_shifts


def _shift(steps: Iterable[Counts], usual: Floats) -> Shift:
    """Find the moment from which on rounds fit hazards of their own best, compared with the usual
    ones. A detector at work has mostly begun by chance before that, and every round of the former
    traffic would take dozens of new ones to be outvoted.

    Args:
        steps: rounds since the detector was at rest, the newest last.
        usual: [K] hazards before.
    """
    tails: Floats = np.array([*steps], dtype=np.float64)[::-1].cumsum(axis=0)
    reached, accepted = tails[:, 0], tails[:, 1]
    inside = np.clip(accepted / np.maximum(reached, _NOTHING), _LEAST_CHANCE, 1 - _LEAST_CHANCE)
    known = np.clip(usual, _LEAST_CHANCE, 1 - _LEAST_CHANCE)
    kept, lost = np.log(inside / known), np.log((1 - inside) / (1 - known))
    gains = (accepted * kept + (reached - accepted) * lost).sum(axis=1)
    best = int(gains.argmax())
    # Of many moments one fits best by chance, and unequal requests resemble a shift.
    return Shift(tails[-1], tails[best if gains[best] > gains[-1] + _EXPLAINED else -1])


class Regimes:
    """The regime in force, and the one before it, of one row of evidence."""

    def __init__(self, max_draft: int) -> None:
        self.former = np.zeros((2, max_draft))
        """[2, K] rounds of the other regime that reached each position, and that accepted it."""
        self._odds: float | None = None
        """Log-odds that the regime in force is; ``None`` while there is no other."""
        self._began = self._seen = 0.0
        """Rounds that the engine had done then, and at the last observation."""
        self._stay = _STAY
        self._hazards: list[float] = []
        self._former_hazards: list[float] = []

    @property
    def is_alone(self) -> bool:
        """No other regime is known."""
        return self._odds is None

    def learn(self, own: Sequence[float], former: Sequence[float]) -> None:
        """Take hazards of both by position."""
        self._hazards, self._former_hazards = list(own), list(former)

    def share(self, clock: float) -> float:
        """Probability of the regime in force."""
        if self._odds is None:
            return 1.0
        stay = max(self._stay, self._seen - self._began)
        known = 1 / (1 + math.exp(-self._odds)) - 0.5
        return 0.5 + known * math.exp(-2 * max(clock - self._seen, 0.0) / stay)

    def mixed(self, clock: float) -> list[float]:
        """Hazards over both."""
        share = self.share(clock)
        if share == 1:
            return self._hazards
        survivals = [
            share * one + (1 - share) * other
            for one, other in zip(
                accumulate(self._hazards, mul), accumulate(self._former_hazards, mul), strict=True
            )
        ]
        before = [1.0, *survivals[:-1]]
        return [s / max(b, _NOTHING) for s, b in zip(survivals, before, strict=True)]

    def returns(self, counts: Floats, clock: float) -> bool:
        """Take in rounds, and say whether the other regime is in force now. It has taken the place
        of this one then: the caller exchanges their evidence.

        Args:
            counts: [2, K].
        """
        if self._odds is None:
            self._seen = clock
            return False
        share = self.share(clock)
        rounds = counts.tolist()
        gain = self._fit(self._hazards, rounds) - self._fit(self._former_hazards, rounds)
        odds = math.log(share / (1 - share)) + _TEMPER * gain
        self._odds, self._seen = min(max(odds, -_SURE), _SURE), clock
        if self._odds > _OVER:
            return False
        self._ends(clock, -self._odds)
        self._hazards, self._former_hazards = self._former_hazards, self._hazards
        return True

    def begins(self, shift: Shift, own: Floats, clock: float) -> Floats:
        """Begin a regime with a shift, unless a known one explains it.

        Args:
            own: [2, K] rounds of the regime in force, those of the shift included.

        Returns:
            [2, K] rounds of the regime in force.
        """
        known = [self._hazards] if self.is_alone else [self._hazards, self._former_hazards]
        rounds, since = shift.suspected.tolist(), shift.since
        if self._fit(None, rounds) - max(self._fit(h, rounds) for h in known) <= _EXPLAINED:
            return own
        before = np.maximum(own - since, 0.0)
        if before[0, 0] >= _LEAST_ROUNDS:
            self.former = before
            self._former_hazards = self._hazards
        if self.former[0, 0]:
            self._ends(clock, _OPENED)
        is_worse = float(since[1].sum()) < sum(map(mul, since[0].tolist(), self._hazards))
        # Where less is kept, what is seen anew replaces what was known; where more is, this stays,
        # because few lucky rounds among many are found by any detector.
        left = np.maximum(_KEPT_ROUNDS - is_worse * since[0], 0.0)
        begun: Floats = since + np.minimum(1.0, left / np.maximum(before[0], _NOTHING)) * before
        return begun

    def forget(self, clock: float) -> None:
        """Other weights draft from now on."""
        self.former = np.zeros_like(self.former)
        self._odds, self._stay = None, _STAY
        self._began = self._seen = clock

    def _ends(self, clock: float, odds: float) -> None:
        if self._odds is not None:
            length = max(clock - self._began, _LEAST_STAY)
            self._stay *= (length / self._stay) ** _STAY_GAIN
        self._odds, self._began, self._seen = odds, clock, clock

    @staticmethod
    def _fit(hazards: Iterable[float] | None, rounds: Sequence[Sequence[float]]) -> float:
        """Log-likelihood of rounds; ``None``: by the hazards that fit them best."""
        reached, accepted = rounds
        total = 0.0
        if hazards is None:
            hazards = (a / max(n, _NOTHING) for n, a in zip(reached, accepted, strict=True))
        for hazard, n, a in zip(hazards, reached, accepted, strict=True):
            if n <= 0:
                break
            inside = min(max(hazard, _LEAST_CHANCE), 1 - _LEAST_CHANCE)
            total += a * math.log(inside) + (n - a) * math.log(1 - inside)
        return total
