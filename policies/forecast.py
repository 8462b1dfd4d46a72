"""Expected tokens and mean seconds of every arm of a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from policies.acceptance import MAX_DRAFT, AcceptanceModel, Floats
from policies.interface import StepObs
from policies.step_time import StepTimes

_MIX_GAIN = 0.02
"""Gain of the moving average of how rows spread over kinds of match."""

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


class Gains(NamedTuple):
    """Arms of drafters that need matches against one arm that needs none."""

    arms: tuple[Arm, ...]
    """[A]"""
    gains: Floats
    """[A, 6] more tokens of a row in each bucket."""
    seconds: Floats
    """[A] more seconds of a step."""


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
        max_draft: int,
        matching: Collection[str] = (),
    ) -> None:
        """
        Args:
            needing: drafters, and mixes, that are of use only where a request has a match.
            max_draft: largest K of both models.
            matching: drafters among those that need a match, no mixes.
        """
        self.max_draft = max_draft
        self._acceptance = acceptance
        self._times = times
        self._needing = needing
        self._matching = matching
        self._mix = np.array([1.0] + [0.0] * (acceptance.num_buckets - 1))
        """[B] share of rows by kind of match, in steps without a drafter that needs one."""
        self._known: dict[str, _Usual] = {}
        """What each drafter is expected to bring as rows usually are, while it is still true."""
        self._rows: dict[int, list[float]] = {}
        """Rows by kind of match as they usually are, by batch."""
        self._drafters_last: tuple[str, ...] = ()
        """Those that could propose in the last step that was forecast,"""
        self._was_capped = 0
        """and its longest draft if some requests could have less; 0: all could have it."""
        self._tables: dict[tuple[str, int], tuple[Floats, Floats]] = {}
        """By drafter and K: what is expected by kind of match, and what ``_capped`` made of it."""

    def forecast(self, obs: StepObs, max_k: int) -> Forecast:
        """Predict every arm of a step."""
        self._drafters_last, self._was_capped = obs.drafters, 0
        if obs.matches is None:
            rows, by_match = self._usual_rows(obs.batch), None
        else:
            rows = by_kind(obs.matches, self._acceptance.num_buckets)
            by_match = np.array(rows)
        by_cap = None
        if obs.caps.count(max_k) < obs.batch and min(obs.caps) < max_k:
            by_cap, self._was_capped = self._by_cap(obs, max_k), max_k
        has_match = obs.matches is not None and any(obs.matches)
        seconds, tokens, usual = {}, {}, {}
        for drafter in obs.drafters:
            if drafter in self._needing and not has_match:
                continue
            seconds[drafter] = [0.0, *self._times.arm_times(drafter, obs.batch)[:max_k]]
            usual[drafter] = tokens[drafter] = self._usual_tokens(drafter, obs.batch)[: max_k + 1]
            if by_cap is not None:
                tokens[drafter] = (by_cap @ self._capped(drafter, max_k)).tolist()
            elif by_match is not None:
                expected = self._acceptance.expected_tokens(drafter)[:, : max_k + 1]
                tokens[drafter] = (by_match @ expected).tolist()
        return Forecast(
            obs.batch, obs.caps, max_k, self._times.plain_s(obs.batch), seconds, tokens, usual, rows
        )

    def prepare(self, batch: int, *, looks: bool) -> None:
        """Compute what the next forecast will most likely ask for, while the device works: the same
        batch and drafters as in the last one.

        Args:
            looks: matches will be known, so that drafters that need one can propose.
        """
        for drafter in self._drafters_last:
            if looks or drafter not in self._needing:
                self._times.arm_times(drafter, batch)
                self._usual_tokens(drafter, batch)
                if self._was_capped:
                    self._capped(drafter, self._was_capped)
        self._times.plain_s(batch)

    def over(self, seen: Forecast, blind: Arm) -> Gains:
        """What drafters that need matches gain over an arm that needs none, by length of match.
        No mixes: who drafts for which request is planned."""
        (drafter, k), max_k = blind, seen.max_k
        used = self._acceptance.expected_tokens(drafter)[:, k] if k else np.ones(len(seen.rows))
        blind_s = seen.arm(blind)[1]
        gains, seconds = [], []
        for kind in self._matching:
            expected = self._acceptance.expected_tokens(kind)
            gains.append((expected[:, 1 : max_k + 1] - used[:, None]).T)
            seconds += self._times.arm_times(kind, seen.batch)[:max_k]
        arms = tuple((kind, each) for kind in self._matching for each in range(1, max_k + 1))
        return Gains(arms, np.concatenate(gains), np.array(seconds) - blind_s)

    def needing_match(self, batch: int) -> tuple[Floats, Floats]:
        """All arms of drafters that need matches, mixes left out.

        Returns:
            [B, A] expected tokens of a row by kind of match, and [A] seconds.
        """
        tokens = [self._acceptance.expected_tokens(kind)[:, 1:] for kind in self._matching]
        seconds = [self._times.arm_times(kind, batch) for kind in self._matching]
        return np.concatenate(tokens, axis=1), np.concatenate(seconds)

    def doubt(self, arm: Arm, batch: int) -> float:
        """How uncertain a drafting arm is: its time relative to a plain step, or what one more
        position would add; 0 for plain decoding."""
        drafter, k = arm
        if not k:
            return 0.0
        of_tokens = self._acceptance.doubt(drafter, min(k + 1, self.max_draft))
        return max(of_tokens, self._times.doubt(drafter, k, batch))

    def spread(self, arm: Arm, batch: int) -> float:
        """How uncertain an arm's speed relative to plain decoding is."""
        return math.hypot(self._acceptance.spread(*arm), self._times.doubt(*arm, batch))

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

    def _capped(self, drafter: str, max_k: int) -> Floats:
        """[B * (max_k + 1), max_k + 1] expected tokens of a row by kind of match and by those it
        may have."""
        expected = self._acceptance.expected_tokens(drafter)
        known = self._tables.get((drafter, max_k))
        if known is None or known[0] is not expected:
            table = expected[:, _CAPPED[max_k]].reshape(-1, max_k + 1)
            known = self._tables[drafter, max_k] = expected, table
        return known[1]

    def _by_cap(self, obs: StepObs, max_k: int) -> Floats:
        """[B * (max_k + 1)] rows by kind of match and by the tokens that they may have."""
        num = self._acceptance.num_buckets
        caps = np.minimum(np.fromiter(obs.caps, np.int64, obs.batch), max_k)
        if obs.matches is not None:
            codes = np.frombuffer(bytes(obs.matches), np.uint8) * np.int64(max_k + 1) + caps
            return np.bincount(codes, minlength=self._acceptance.num_buckets * (max_k + 1)).astype(
                np.float64
            )
        found = np.zeros((num, max_k + 1))
        found[0] = np.bincount(caps, minlength=max_k + 1)
        # Those that may have all of them have matches as usual.
        found[:, max_k] = self._usual_rows(int(found[0, max_k]))
        return found.reshape(-1)

    def note_mix(self, seen: Forecast) -> None:
        """Count the rows of a step that a drafter that needs a match leaves to others."""
        self._mix += _MIX_GAIN * (np.array(seen.rows) / seen.batch - self._mix)
        self._known.clear()
        self._rows.clear()


def by_kind(matches: Sequence[int], num_kinds: int) -> list[float]:
    """[num_kinds] rows by kind of match."""
    kinds = bytes(matches)  # counted by C, at a tenth of the time of integers
    return [float(kinds.count(kind)) for kind in range(num_kinds)]


_CAPPED = [np.minimum(np.arange(k + 1)[:, None], np.arange(k + 1)) for k in range(MAX_DRAFT + 1)]
"""[K + 1, K + 1] by K: tokens that a row has, by its cap and by K of the step."""
