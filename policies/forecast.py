"""Expected tokens and mean seconds of every arm of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from policies.acceptance import AcceptanceModel, Floats
from policies.interface import StepObs
from policies.step_time import StepTimes

_MIX_GAIN = 0.02
"""Gain of the moving average of how rows spread over kinds of match."""

_NONE_CAPPED: Counter[tuple[int, int]] = Counter()

Arm = tuple[str, int]
"""A drafter and K; plain decoding is ``PLAIN_ARM``."""
PLAIN_ARM: Arm = ("none", 0)


class Forecast(NamedTuple):
    """Predictions for one step. Lists are over K = 0, 1, ... max_k. There are B kinds of match."""

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
    """[B] rows by kind of match; where nobody looked, as they usually are."""

    def arm(self, arm: Arm) -> tuple[float, float]:
        """(tokens, seconds) of an arm."""
        drafter, k = arm
        if k == 0:
            return float(self.batch), self.plain_s
        return self.tokens[drafter][k], self.seconds[drafter][k]


class _Usual(NamedTuple):
    """Expected tokens of a step, and what they were computed from."""

    batch: int
    expected: Floats
    tokens: list[float]


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
        self._mix = np.array([1.0] + [0.0] * (acceptance.num_buckets - 1))
        """[B] share of rows by kind of match, in steps without a drafter that needs one."""
        self._known: dict[str, _Usual] = {}
        """What each drafter is expected to bring as rows usually are, while it is still true."""
        self._rows: dict[int, list[float]] = {}
        """Rows by kind of match as they usually are, by batch."""
        self._drafters_last: tuple[str, ...] = ()
        """Those that could propose in the last step that was forecast."""

    def forecast(self, obs: StepObs, max_k: int) -> Forecast:
        """Predict every arm of a step."""
        self._drafters_last = obs.drafters
        num = self._acceptance.num_buckets
        rows = self._usual_rows(obs.batch) if obs.matches is None else by_kind(obs.matches, num)
        full, capped = rows, _NONE_CAPPED
        if obs.caps.count(max_k) < obs.batch and min(obs.caps) < max_k:
            full, capped = self._by_cap(obs, max_k)
        has_match = obs.matches is not None and any(obs.matches)
        seconds, tokens, usual = {}, {}, {}
        for drafter in obs.drafters:
            if drafter in self._needing and not has_match:
                continue
            seconds[drafter] = [0.0, *self._times.arm_times(drafter, obs.batch)[:max_k]]
            usual[drafter] = tokens[drafter] = self._usual_tokens(drafter, obs.batch)[: max_k + 1]
            if full is not rows or obs.matches is not None:
                expected = self._acceptance.expected_tokens(drafter)[:, : max_k + 1]
                tokens[drafter] = (np.array(full) @ expected).tolist()
                if capped:
                    _add_capped(tokens[drafter], capped, expected)
        return Forecast(
            obs.batch, obs.caps, max_k, self._times.plain_s(obs.batch), seconds, tokens, usual, rows
        )

    def prepare(self, batch: int) -> None:
        """Compute what the next forecast will most likely ask for, while the device works: the same
        batch and drafters as in the last one, and nobody looks for matches."""
        for drafter in self._drafters_last:
            if drafter not in self._needing:
                self._times.arm_times(drafter, batch)
                self._usual_tokens(drafter, batch)
        self._times.plain_s(batch)

    def _usual_tokens(self, drafter: str, batch: int) -> list[float]:
        """[max_draft + 1] expected tokens of a step as its rows usually are."""
        expected = self._acceptance.expected_tokens(drafter)
        known = self._known.get(drafter)
        if known is None or known.batch != batch or known.expected is not expected:
            tokens = (batch * self._mix @ expected).tolist()
            known = self._known[drafter] = _Usual(batch, expected, tokens)
        return known.tokens

    def _usual_rows(self, batch: int) -> list[float]:
        rows = self._rows.get(batch)
        if rows is None:
            rows = self._rows[batch] = (batch * self._mix).tolist()
        return rows

    def _by_cap(self, obs: StepObs, max_k: int) -> tuple[list[float], Counter[tuple[int, int]]]:
        """Rows by kind that may have ``max_k`` tokens, and the others by (kind, cap)."""
        if obs.matches is None:
            short = [cap for cap in obs.caps if cap < max_k]
            return self._usual_rows(obs.batch - len(short)), Counter((0, cap) for cap in short)
        full, capped = [0.0] * self._acceptance.num_buckets, Counter[tuple[int, int]]()
        for match, cap in zip(obs.matches, obs.caps, strict=True):
            if cap >= max_k:
                full[match] += 1
            else:
                capped[match, cap] += 1
        return full, capped

    def note_mix(self, seen: Forecast) -> None:
        """Count the rows of a step that a drafter that needs a match leaves to others."""
        self._mix += _MIX_GAIN * (np.array(seen.rows) / seen.batch - self._mix)
        self._known.clear()
        self._rows.clear()


def by_kind(matches: Iterable[int], num_kinds: int) -> list[float]:
    """[num_kinds] rows by kind of match."""
    rows = [0.0] * num_kinds
    for match, count in Counter(matches).items():
        rows[match] += count
    return rows


def _add_capped(totals: list[float], capped: Counter[tuple[int, int]], expected: Floats) -> None:
    for (match, cap), count in capped.items():
        by_k = expected[match].tolist()
        for k in range(len(totals)):
            totals[k] += count * by_k[min(k, cap)]
