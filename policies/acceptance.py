"""How likely each draft position is kept: Kaplan-Meier hazards that forget.

A round that verified k tokens and kept A tells of every position up to A + 1 and of none beyond
min(A + 1, k): longer drafts are right-censored, shorter ones known exactly. So with
c_j = P(position j kept | all before it kept), expected tokens of *any* k follow from rounds at one.

Two clocks forget: a half-life in rounds, and a change detector (Page 1954, CUSUM) that cuts the
weight of all that was seen before traffic turned.
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
_SWAP_WEIGHT = 2.0
"""Rounds that the evidence of the former weights is worth after a swap."""
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


def suffix_bucket(match: int) -> int:
    """Buckets of match length: 0, 1-2, 3, 4-5, 6-8, 9 and more."""
    if match <= 3:
        return max(match - 1, 1) if match else 0
    return 3 if match <= 5 else 4 if match <= 8 else 5


def bucket_of(drafter: str, suffix_match: int) -> int:
    """Bucket whose figures apply to a row."""
    return suffix_bucket(suffix_match) if drafter == "suffix" else 0


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
        prior, hazards = self.first, []
        for accepted, reached in zip(self.accepted, self.reached, strict=True):
            hazard = (accepted + _PRIOR_WEIGHT * prior) / (reached + _PRIOR_WEIGHT)
            hazards.append(hazard)
            prior = _DEPTH_FACTOR * hazard
        return hazards


class AcceptanceModel:
    """Conditional acceptance by (drafter, bucket, position), decayed by rounds."""

    def __init__(self, half_life_rounds: float) -> None:
        self._half_life_rounds = half_life_rounds
        self._evidence: dict[tuple[str, int], _Evidence] = {}
        self._clock = 0.0

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
        rounds = sum(count for _, _, count in outcomes)
        idle = max(0.0, self._clock - evidence.seen_at - rounds)
        half_life = max(self._half_life_rounds, _MIN_STEPS * batch)
        factor = math.exp2(-(rounds + _IDLE_RATE * idle) / half_life)
        expected = self.expected_tokens(drafter, bucket)
        surprise = sum((kept + 1 - expected[k]) * count for k, kept, count in outcomes)
        evidence.rescale(factor, _FLOOR_WEIGHT)
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
        evidence = self._of(drafter, bucket)
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
        """New weights: the former figures become a weak prior, or the published ones count."""
        evidence = self._of(drafter, 0)
        published = _valid_hazards(calibration.get("acceptance"))
        if not published:
            evidence.limit(_SWAP_WEIGHT)
        else:
            evidence.reached = [0.0] * MAX_DRAFT
            evidence.accepted = [0.0] * MAX_DRAFT
            for j, hazard in enumerate(published[:MAX_DRAFT]):
                evidence.reached[j] = _CALIBRATION_WEIGHT
                evidence.accepted[j] = _CALIBRATION_WEIGHT * hazard
        evidence.seen_at = self._clock
        evidence.above = evidence.below = 0.0
        evidence.expected = None

    def figures(self) -> dict[str, Any]:
        """JSON-ready: hazards and weights by ``drafter/bucket``."""
        return {
            f"{drafter}/{bucket}": {
                "hazards": [round(value, 4) for value in evidence.hazards()],
                "rounds": [round(value, 1) for value in evidence.reached],
                "shifts": evidence.num_shifts,
            }
            for (drafter, bucket), evidence in sorted(self._evidence.items())
        }

    def _of(self, drafter: str, bucket: int) -> _Evidence:
        evidence = self._evidence.get((drafter, bucket))
        if evidence is None:
            first = _FIRST[drafter][bucket] if drafter in _FIRST else 0.6
            evidence = self._evidence[drafter, bucket] = _Evidence(first, seen_at=self._clock)
        return evidence


def _valid_hazards(value: Any) -> list[float]:
    """The published figures, or nothing when they are no list of probabilities."""
    if not isinstance(value, list | tuple):
        return []
    is_valid = all(isinstance(c, int | float) and 0 <= c <= 1 for c in value)
    return [float(c) for c in value] if is_valid else []
