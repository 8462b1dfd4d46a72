"""How likely each draft position is kept: Kaplan-Meier hazards that forget.

A round that verified k tokens and kept A tells of every position up to A + 1 and of none beyond
min(A + 1, k): longer drafts are right-censored, shorter ones known exactly. So with
c_j = P(position j kept | all before it kept), expected tokens of *any* k follow from rounds at one.

Two clocks forget: a half-life in rounds, and a change detector (Page 1954, CUSUM) that cuts the
weight of all that was seen before traffic turned.

Figures are kept apart by the length of the suffix match, for neural drafters too: text that has
occurred before is easy for both. Judged by its average, a neural drafter looks best exactly where
the index has nothing to offer, and it is worst there (documentation, K = 4, bundled target: 1.8
tokens a step without a match, 2.7 after a match of 6 to 8; benchmarks/by_match.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_DRAFT = 16
"""Largest K that settings allow."""
_PRIOR_WEIGHT = 4.0
"""Rounds that the prior of a position is worth."""
_FLOOR_WEIGHT = 4.0
"""Rounds that an old observation keeps: an idle drafter is remembered, but weakly."""
_POOL_WEIGHT, _POOL_FLOOR = 2.0, 8.0
"""Rounds that all buckets of a neural drafter together are worth as the prior of each; rounds that
the pool keeps when idle."""
_SWAP_WEIGHT = 2.0
"""Rounds that the evidence of the former weights is worth after a swap to unknown ones."""
_CALIBRATION_WEIGHT = 16.0
"""Rounds that a published calibration is worth: a dozen live rounds outvote it."""
_DEPTH_FACTOR = 0.97
"""Prior of position j + 1 relative to c_j."""
_IDLE_RATE = 0.25
"""A round without this drafter ages its figures so many times as much as one with it."""
_SHIFT_DRIFT, _SHIFT_LIMIT = 0.5, 10.0
"""CUSUM of standardised surprises: a shift by one standard deviation is found after 20 steps; false
alarms are rare, and cost some precision only."""
_SHIFT_WEIGHT = 12.0
"""Rounds that the evidence from before a detected shift is worth."""
_SURPRISE_GAIN = 0.02
_MIN_STEPS = 8
"""Half-life in steps at least: at a batch of 64, 200 rounds are three steps, mostly noise."""
_FIRST = {"suffix": (0.0, 0.35, 0.45, 0.55, 0.7, 0.8)}
"""Prior of c_1 by bucket; 0.6 for neural drafters."""
_POOL = -1
"""Bucket number of all rows of a neural drafter together."""


def suffix_bucket(match: int) -> int:
    """Buckets of match length: 0, 1-2, 3, 4-5, 6-8, 9 and more."""
    if match <= 3:
        return max(match - 1, 1) if match else 0
    return 3 if match <= 5 else 4 if match <= 8 else 5


@dataclass(slots=True)
class _Evidence:
    """Decayed counts of one (drafter, bucket)."""

    first: float
    """Prior of c_1."""
    seen_at: float = 0.0
    """Rounds that the engine had done when this was last updated."""
    reached: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFT)
    accepted: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFT)
    expected: list[float] | None = None
    """Cache of ``expected_tokens`` for k = 0, 1, ..."""
    variance: float = 1.0
    """Of a round's surprise: tokens accepted minus tokens expected."""
    above: float = 0.0
    """CUSUM of surprises upward."""
    below: float = 0.0
    """The same downward."""
    num_shifts: int = 0
    pool: _Evidence | None = None
    """Prior of every position, where there is one."""

    def rescale(self, factor: float, floor: float) -> None:
        """Weigh everything less; ratios stay. Weights under ``floor`` are left as they are."""
        for j, reached in enumerate(self.reached):
            if reached > floor:
                kept = max(reached * factor, floor)
                self.accepted[j] *= kept / reached
                self.reached[j] = kept
        self.expected = None

    def limit(self, weight: float) -> None:
        """Let no position weigh more than so many rounds."""
        self.rescale(0.0, weight)

    def notices_shift(self, surprise: float, rounds: int) -> bool:
        """Page's CUSUM on the sum of surprises of one step; starts again after an alarm."""
        z = surprise / math.sqrt(max(self.variance, 0.01) * rounds)
        self.variance += _SURPRISE_GAIN * (surprise**2 / rounds - self.variance)
        self.above = max(0.0, self.above + z - _SHIFT_DRIFT)
        self.below = max(0.0, self.below - z - _SHIFT_DRIFT)
        if max(self.above, self.below) < _SHIFT_LIMIT:
            return False
        self.above = self.below = 0.0
        self.num_shifts += 1
        return True

    def add(self, num_verified: int, num_accepted: int, count: int) -> None:
        for j in range(min(num_accepted + 1, num_verified)):
            self.reached[j] += count
        for j in range(num_accepted):
            self.accepted[j] += count
        self.expected = None

    def hazards(self) -> list[float]:
        if self.pool is not None:
            return [
                (accepted + _POOL_WEIGHT * prior) / (reached + _POOL_WEIGHT)
                for accepted, reached, prior in zip(
                    self.accepted, self.reached, self.pool.hazards(), strict=True
                )
            ]
        prior, hazards = self.first, []
        for accepted, reached in zip(self.accepted, self.reached, strict=True):
            hazard = (accepted + _PRIOR_WEIGHT * prior) / (reached + _PRIOR_WEIGHT)
            hazards.append(hazard)
            prior = _DEPTH_FACTOR * hazard
        return hazards

    def become(self, hazards: Sequence[float], weights: Sequence[float]) -> None:
        """Take so many rounds at these hazards for all that was seen."""
        for j, (hazard, weight) in enumerate(zip(hazards, weights, strict=True)):
            self.reached[j], self.accepted[j] = weight, weight * hazard
        self.above = self.below = 0.0
        self.expected = None


class AcceptanceModel:
    """Conditional acceptance by (drafter, bucket, position), decayed by rounds."""

    def __init__(self, half_life_rounds: float) -> None:
        self._half_life_rounds = half_life_rounds
        self._evidence: dict[tuple[str, int], _Evidence] = {}
        self._clock = 0.0
        self._published: dict[str, list[float]] = {}
        """Calibration of the weights in force, by drafter."""

    def tick(self, num_rounds: int) -> None:
        """The engine did so many rounds, with whatever drafter."""
        self._clock += num_rounds

    def observe(
        self,
        drafter: str,
        bucket: int,
        outcomes: Sequence[tuple[int, int, int]],
        batch: int,
    ) -> None:
        """Take in rounds of one step.

        Args:
            outcomes: (num_verified, num_accepted, number of such rounds), num_verified >= 1.
            batch: requests of the step; bounds the half-life below in steps.
        """
        evidence = self._of(drafter, bucket)
        for part, floor in ((evidence.pool, _POOL_FLOOR), (evidence, _FLOOR_WEIGHT)):
            if part is not None:
                self._take_in(part, self._expected(drafter, bucket, part), outcomes, batch, floor)
        if evidence.pool is not None:
            self._stale(drafter)

    def _take_in(
        self,
        evidence: _Evidence,
        expected: list[float],
        outcomes: Sequence[tuple[int, int, int]],
        batch: int,
        floor: float,
    ) -> None:
        rounds = sum(count for _, _, count in outcomes)
        idle = max(0.0, self._clock - evidence.seen_at - rounds)
        half_life = max(self._half_life_rounds, _MIN_STEPS * batch)
        factor = math.exp2(-(rounds + _IDLE_RATE * idle) / half_life)
        surprise = sum((kept + 1 - expected[k]) * count for k, kept, count in outcomes)
        evidence.rescale(factor, floor)
        if evidence.notices_shift(surprise, rounds):
            evidence.limit(_SHIFT_WEIGHT)
        for num_verified, num_accepted, count in outcomes:
            evidence.add(num_verified, num_accepted, count)
        evidence.seen_at = self._clock

    def hazards(self, drafter: str, bucket: int) -> list[float]:
        """c_1, c_2, ... c_16, each in [0, 1]."""
        return self._of(drafter, bucket).hazards()

    def expected_tokens(self, drafter: str, bucket: int) -> list[float]:
        """Tokens of a round, the target's own included, at k = 0, 1, ... 16.

        A suffix row without a match proposes nothing: 1 whatever k is.
        """
        return self._expected(drafter, bucket, self._of(drafter, bucket))

    def _expected(self, drafter: str, bucket: int, evidence: _Evidence) -> list[float]:
        if evidence.expected is None:
            survival, total, expected = 1.0, 1.0, [1.0]
            is_silent = drafter == "suffix" and bucket == 0
            for hazard in evidence.hazards():
                survival *= 0.0 if is_silent else hazard
                total += survival
                expected.append(total)
            evidence.expected = expected
        return evidence.expected

    def on_swap(self, drafter: str, calibration: dict[str, Any]) -> None:
        """New weights of a neural drafter.

        With published figures of both the former and the new weights, what was learnt live moves by
        their difference in log-odds, so that what is hard stays hard; with those of the new ones
        only, they replace it; with none, it becomes a weak memory.
        """
        pool = self._of(drafter, _POOL)
        old, new = self._published.pop(drafter, []), _valid_hazards(calibration.get("acceptance"))
        mine = [e for (name, _), e in self._evidence.items() if name == drafter]
        if new:
            self._published[drafter] = new
        if new and old:
            shifts = _shifts(old, new)
            moved = [list(map(_moved, e.hazards(), shifts)) for e in mine]  # before the pool moves
            for evidence, hazards in zip(mine, moved, strict=True):
                weights = [min(reached, _CALIBRATION_WEIGHT) for reached in evidence.reached]
                evidence.become(hazards, weights)
        elif new:
            for evidence in mine:
                evidence.become([0.0] * MAX_DRAFT, [0.0] * MAX_DRAFT)
            known = new[:MAX_DRAFT]
            unknown = [0.0] * (MAX_DRAFT - len(known))
            pool.become(known + unknown, [_CALIBRATION_WEIGHT] * len(known) + unknown)
        else:
            for evidence in mine:
                evidence.limit(_SWAP_WEIGHT)
                evidence.above = evidence.below = 0.0
        for evidence in mine:
            evidence.seen_at = self._clock
        self._stale(drafter)

    def _stale(self, drafter: str) -> None:
        """The pool has changed, and with it what all its buckets expect."""
        for (name, _), evidence in self._evidence.items():
            if name == drafter:
                evidence.expected = None

    def figures(self) -> dict[str, Any]:
        """JSON-ready: hazards and weights by ``drafter/bucket``."""
        return {
            f"{drafter}/{'all' if bucket == _POOL else bucket}": {
                "hazards": [round(value, 4) for value in evidence.hazards()],
                "rounds": [round(value, 1) for value in evidence.reached],
                "shifts": evidence.num_shifts,
            }
            for (drafter, bucket), evidence in sorted(self._evidence.items())
        }

    def _of(self, drafter: str, bucket: int) -> _Evidence:
        evidence = self._evidence.get((drafter, bucket))
        if evidence is None:
            pool = None
            if drafter not in _FIRST and bucket != _POOL:
                pool = self._of(drafter, _POOL)
            first = _FIRST[drafter][bucket] if drafter in _FIRST else 0.6
            evidence = _Evidence(first, seen_at=self._clock, pool=pool)
            self._evidence[drafter, bucket] = evidence
        return evidence


def _shifts(old: Sequence[float], new: Sequence[float]) -> list[float]:
    """Difference in log-odds at every position; the last known one holds for all beyond."""
    known = [_log_odds(b) - _log_odds(a) for a, b in zip(old, new, strict=False)][:MAX_DRAFT]
    return known + known[-1:] * (MAX_DRAFT - len(known))


def _moved(hazard: float, shift: float) -> float:
    return 1 / (1 + math.exp(-_log_odds(hazard) - shift))


def _log_odds(hazard: float) -> float:
    inside = min(max(hazard, 1e-3), 1 - 1e-3)
    return math.log(inside / (1 - inside))


def _valid_hazards(value: Any) -> list[float]:
    """The published figures, or nothing when they are no list of probabilities."""
    if not isinstance(value, list | tuple):
        return []
    is_valid = all(isinstance(c, int | float) and 0 <= c <= 1 for c in value)
    return [float(c) for c in value] if is_valid else []
