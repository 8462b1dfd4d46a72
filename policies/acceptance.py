"""Acceptance of each draft position: Kaplan-Meier hazards with decay.

A round that verified k tokens and accepted A observes positions 1 to min(A + 1, k) and none beyond:
longer drafts are right-censored. The hazards c_j = P(position j accepted | all before it accepted)
therefore give the expected tokens of *every* k, whichever was tried.

Old evidence loses weight in two ways: by a half-life in rounds, and at once when a change detector
(Page 1954, CUSUM) finds that traffic has changed.

Evidence is kept by length of the text match, for neural drafters too: text that has occurred before
is easy for them as well. Judged by its average, a neural drafter looks best exactly where no match
exists, and there it is worst (documentation, K = 4, bundled target: 1.8 tokens per step without a
match, 2.7 after a match of 6 to 8; benchmarks/by_match.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from policies.interface import DrafterTraits

MAX_DRAFT = 16
"""Largest K that settings allow."""
NUM_BUCKETS = 6
"""Buckets of ``match_bucket``."""
_PRIOR_WEIGHT = 4.0
"""Rounds that the prior of a position counts for."""
_FLOOR_WEIGHT = 4.0
"""Rounds that decay leaves of old observations: an idle drafter is remembered, but weakly."""
_POOL_WEIGHT, _POOL_FLOOR = 2.0, 8.0
"""Rounds that a drafter's pool of all buckets counts for as the prior of each bucket, and rounds
that decay leaves of the pool itself."""
_SWAP_WEIGHT = 2.0
"""Rounds that the evidence of the former weights counts for after a swap without calibration."""
_CALIBRATION_WEIGHT = 16.0
"""Rounds that a published calibration counts for: a dozen live rounds outvote it."""
_DEPTH_FACTOR = 0.97
"""Prior of c_{j + 1} relative to c_j."""
_IDLE_RATE = 0.25
"""Decay of a drafter's evidence in a round without it, relative to a round with it."""
_SHIFT_DRIFT, _SHIFT_LIMIT = 0.5, 10.0
"""Drift and limit of the CUSUM, in standard deviations: a shift by one is found after 20 steps;
false alarms are rare and cost only some precision."""
_SHIFT_WEIGHT = 12.0
"""Rounds that the evidence from before a detected shift counts for."""
_SURPRISE_GAIN = 0.02
"""Gain of the moving variance of surprises."""
_MIN_STEPS = 8
"""Least half-life in steps: at a batch of 64, 200 rounds are three steps, mostly noise."""
_POOL = -1
"""Bucket number of a drafter's pool."""


def match_bucket(match: int) -> int:
    """Bucket of a match by its length in tokens: 0, 1-2, 3, 4-5, 6-8, 9 or more."""
    if match <= 3:
        return max(match - 1, 1) if match else 0
    return 3 if match <= 5 else 4 if match <= 8 else 5


@dataclass(slots=True)
class _Evidence:
    """Decayed counts of one (drafter, bucket)."""

    first: float
    """Prior of c_1."""
    seen_at: float = 0.0
    """Rounds that the engine had done at the last update."""
    reached: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFT)
    accepted: list[float] = field(default_factory=lambda: [0.0] * MAX_DRAFT)
    expected: list[float] | None = None
    """Cache of ``expected_tokens`` for k = 0, 1, ..."""
    variance: float = 1.0
    """Variance of one round's surprise: tokens accepted minus tokens expected."""
    above: float = 0.0
    """Upward CUSUM of surprises."""
    below: float = 0.0
    """Downward CUSUM of surprises."""
    num_shifts: int = 0
    pool: _Evidence | None = None
    """Source of every position's prior, if the drafter's buckets share one."""

    def rescale(self, factor: float, floor: float) -> None:
        """Multiply all weights, keeping ratios; no weight is brought below ``floor``."""
        for j, reached in enumerate(self.reached):
            if reached > floor:
                kept = max(reached * factor, floor)
                self.accepted[j] *= kept / reached
                self.reached[j] = kept
        self.expected = None

    def limit(self, weight: float) -> None:
        """Cap the weight of every position, in rounds."""
        self.rescale(0.0, weight)

    def notices_shift(self, surprise: float, rounds: int) -> bool:
        """Update Page's CUSUM with one step's summed surprise; an alarm resets it."""
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
        """Count ``count`` equal rounds."""
        for j in range(min(num_accepted + 1, num_verified)):
            self.reached[j] += count
        for j in range(num_accepted):
            self.accepted[j] += count
        self.expected = None

    def hazards(self) -> list[float]:
        """Posterior means of c_1, c_2, ... c_16."""
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
        """Replace all evidence by ``weights[j]`` rounds at ``hazards[j]``."""
        for j, (hazard, weight) in enumerate(zip(hazards, weights, strict=True)):
            self.reached[j], self.accepted[j] = weight, weight * hazard
        self.above = self.below = 0.0
        self.expected = None


class AcceptanceModel:
    """Conditional acceptance by (drafter, bucket, position), decayed by rounds.

    The buckets of a drafter with a single prior share a pool of its rounds, from which each bucket
    takes its prior; the buckets of a drafter with a prior for each are independent.
    """

    def __init__(self, half_life_rounds: float, drafters: Mapping[str, DrafterTraits]) -> None:
        """
        Args:
            half_life_rounds: rounds after which an old observation counts half.
            drafters: traits by kind; no other kind may be observed or asked for.

        Raises:
            ValueError: a drafter has neither one prior nor one for each bucket.
        """
        for kind, traits in drafters.items():
            if len(traits.prior_acceptance) not in (1, NUM_BUCKETS):
                raise ValueError(
                    f"prior_acceptance of drafter {kind!r} must hold 1 or {NUM_BUCKETS} values, "
                    f"got {len(traits.prior_acceptance)}"
                )
        self._half_life_rounds = half_life_rounds
        self._drafters = drafters
        self._evidence: dict[tuple[str, int], _Evidence] = {}
        self._clock = 0.0
        self._published: dict[str, list[float]] = {}
        """Calibration of the weights in force, by drafter."""

    def tick(self, num_rounds: int) -> None:
        """Advance the clock by rounds that the engine did, with any drafter or none."""
        self._clock += num_rounds

    def observe(
        self,
        drafter: str,
        bucket: int,
        outcomes: Sequence[tuple[int, int, int]],
        batch: int,
    ) -> None:
        """Learn from rounds of one step.

        Args:
            outcomes: (num_verified, num_accepted, number of such rounds), num_verified >= 1.
            batch: requests of the step; sets the least half-life.
        """
        evidence = self._of(drafter, bucket)
        for part, floor in ((evidence.pool, _POOL_FLOOR), (evidence, _FLOOR_WEIGHT)):
            if part is not None:
                self._take_in(part, self._expected(drafter, bucket, part), outcomes, batch, floor)
        if evidence.pool is not None:
            self._forget_expected(drafter)

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
        """Expected tokens of a round, the target's own included, at k = 0, 1, ... 16.

        All 1 in bucket 0 of a drafter that needs a match: it proposes nothing there.
        """
        return self._expected(drafter, bucket, self._of(drafter, bucket))

    def _expected(self, drafter: str, bucket: int, evidence: _Evidence) -> list[float]:
        if evidence.expected is None:
            survival, total, expected = 1.0, 1.0, [1.0]
            is_silent = bucket == 0 and self._drafters[drafter].needs_match
            for hazard in evidence.hazards():
                survival *= 0.0 if is_silent else hazard
                total += survival
                expected.append(total)
            evidence.expected = expected
        return evidence.expected

    def on_swap(self, drafter: str, calibration: dict[str, Any]) -> None:
        """Adapt a drafter's evidence to new weights.

        With the calibration of both the former and the new weights, live evidence moves by their
        difference in log-odds, so that hard text stays hard. With the new one only, the calibration
        replaces the evidence of a drafter with a pool. Otherwise the evidence becomes a weak
        memory; the same holds without a pool, since a calibration does not tell buckets apart.
        """
        pool = self._of(drafter, _POOL) if self._has_pool(drafter) else None
        old, new = self._published.pop(drafter, []), _valid_hazards(calibration.get("acceptance"))
        own = [e for (name, _), e in self._evidence.items() if name == drafter]
        if new:
            self._published[drafter] = new
        if new and old:
            shifts = _shifts(old, new)
            moved = [list(map(_moved, e.hazards(), shifts)) for e in own]  # before the pool moves
            for evidence, hazards in zip(own, moved, strict=True):
                weights = [min(reached, _CALIBRATION_WEIGHT) for reached in evidence.reached]
                evidence.become(hazards, weights)
        elif new and pool is not None:
            for evidence in own:
                evidence.become([0.0] * MAX_DRAFT, [0.0] * MAX_DRAFT)
            known = new[:MAX_DRAFT]
            unknown = [0.0] * (MAX_DRAFT - len(known))
            pool.become(known + unknown, [_CALIBRATION_WEIGHT] * len(known) + unknown)
        else:
            for evidence in own:
                evidence.limit(_SWAP_WEIGHT)
                evidence.above = evidence.below = 0.0
        for evidence in own:
            evidence.seen_at = self._clock
        self._forget_expected(drafter)

    def _forget_expected(self, drafter: str) -> None:
        """Clear the caches of all buckets of a drafter whose pool changed."""
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
            priors, pool = self._drafters[drafter].prior_acceptance, None
            if self._has_pool(drafter) and bucket != _POOL:
                pool = self._of(drafter, _POOL)
            first = priors[0] if self._has_pool(drafter) else priors[bucket]
            evidence = _Evidence(first, seen_at=self._clock, pool=pool)
            self._evidence[drafter, bucket] = evidence
        return evidence

    def _has_pool(self, drafter: str) -> bool:
        return len(self._drafters[drafter].prior_acceptance) == 1


def _shifts(old: Sequence[float], new: Sequence[float]) -> list[float]:
    """Difference in log-odds at every position; the last known one also holds for all beyond."""
    known = [_log_odds(b) - _log_odds(a) for a, b in zip(old, new, strict=False)][:MAX_DRAFT]
    return known + known[-1:] * (MAX_DRAFT - len(known))


def _moved(hazard: float, shift: float) -> float:
    return 1 / (1 + math.exp(-_log_odds(hazard) - shift))


def _log_odds(hazard: float) -> float:
    inside = min(max(hazard, 1e-3), 1 - 1e-3)
    return math.log(inside / (1 - inside))


def _valid_hazards(value: Any) -> list[float]:
    """The published figures, or nothing if they are not a list of probabilities."""
    if not isinstance(value, list | tuple):
        return []
    is_valid = all(isinstance(c, int | float) and 0 <= c <= 1 for c in value)
    return [float(c) for c in value] if is_valid else []
