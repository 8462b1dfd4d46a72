"""Expected tokens and mean seconds of every arm of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from policies.acceptance import NUM_BUCKETS, AcceptanceModel, Floats, match_bucket
from policies.interface import StepObs
from policies.step_time import StepTimes

_MIX_GAIN = 0.02
"""Gain of the moving average of how rows spread over match buckets."""

_NONE_CAPPED: Counter[tuple[int, int]] = Counter()

Arm = tuple[str, int]
"""A drafter and K; plain decoding is ``PLAIN_ARM``."""
PLAIN_ARM: Arm = ("none", 0)


class Forecast(NamedTuple):
    """Predictions for one step. Lists are over K = 0, 1, ... max_k."""

    batch: int
    caps: tuple[int, ...]
    """[batch] largest K of each request."""
    max_k: int
    plain_s: float
    seconds: dict[str, list[float]]
    """Of a step by each drafter that can propose now, switching aside."""
    tokens: dict[str, list[float]]
    """Over this batch, each row held to its cap."""
    usual_tokens: dict[str, list[float]]
    """Over a batch of this size with the matches that rows usually have."""
    rows: list[float]
    """[6] rows by match bucket; where nobody looked, as they usually are."""

    def arm(self, arm: Arm) -> tuple[float, float]:
        """(tokens, seconds) of an arm."""
        drafter, k = arm
        if k == 0:
            return float(self.batch), self.plain_s
        return self.tokens[drafter][k], self.seconds[drafter][k]


class Forecaster:
    """Combines acceptance with step times."""

    def __init__(
        self,
        acceptance: AcceptanceModel,
        times: StepTimes,
        needing: Collection[str],
    ) -> None:
        """
        Args:
            needing: drafters, and mixes, that are of use only where a request has a match.
        """
        self._acceptance = acceptance
        self._times = times
        self._needing = needing
        self._mix = np.array([1.0] + [0.0] * (NUM_BUCKETS - 1))
        """[6] share of rows in each bucket, in steps without a drafter that needs a match."""

    def forecast(self, obs: StepObs, max_k: int) -> Forecast:
        """Predict every arm of a step."""
        rows = self._usual_rows(obs.batch) if obs.matches is None else by_bucket(obs.matches)
        full, capped = rows, _NONE_CAPPED
        if min(obs.caps) < max_k:
            full, capped = self._by_cap(obs, max_k)
        has_match = obs.matches is not None and any(obs.matches)
        weights = np.array((full, obs.batch * self._mix))
        seconds, tokens, usual = {}, {}, {}
        for drafter in obs.drafters:
            if drafter in self._needing and not has_match:
                continue
            expected = self._acceptance.expected_tokens(drafter)[:, : max_k + 1]
            seconds[drafter] = [0.0, *self._times.arm_times(drafter, obs.batch)[:max_k]]
            tokens[drafter], usual[drafter] = (weights @ expected).tolist()
            if capped:
                _add_capped(tokens[drafter], capped, expected)
        return Forecast(
            obs.batch, obs.caps, max_k, self._times.plain_s(obs.batch), seconds, tokens, usual, rows
        )

    def _usual_rows(self, batch: int) -> list[float]:
        rows: list[float] = (batch * self._mix).tolist()
        return rows

    def _by_cap(self, obs: StepObs, max_k: int) -> tuple[list[float], Counter[tuple[int, int]]]:
        """Rows by bucket that may have ``max_k`` tokens, and the others by (bucket, cap)."""
        if obs.matches is None:
            short = [cap for cap in obs.caps if cap < max_k]
            return self._usual_rows(obs.batch - len(short)), Counter((0, cap) for cap in short)
        full, capped = [0.0] * NUM_BUCKETS, Counter[tuple[int, int]]()
        for match, cap in zip(obs.matches, obs.caps, strict=True):
            if cap >= max_k:
                full[match_bucket(match)] += 1
            else:
                capped[match_bucket(match), cap] += 1
        return full, capped

    def note_mix(self, seen: Forecast) -> None:
        """Count the rows of a step that a drafter that needs a match leaves to others."""
        self._mix += _MIX_GAIN * (np.array(seen.rows) / seen.batch - self._mix)


def by_bucket(matches: Iterable[int]) -> list[float]:
    """[6] rows by match bucket."""
    rows = [0.0] * NUM_BUCKETS
    for match, count in Counter(matches).items():
        rows[match_bucket(match)] += count
    return rows


def _add_capped(totals: list[float], capped: Counter[tuple[int, int]], expected: Floats) -> None:
    for (bucket, cap), count in capped.items():
        by_k = expected[bucket].tolist()
        for k in range(len(totals)):
            totals[k] += count * by_k[min(k, cap)]
