"""Expected tokens and mean seconds of every arm of a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Set
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from policies.acceptance import MAX_DRAFT, AcceptanceModel
from policies.drafter_acceptance import Floats
from policies.interface import StepObs
from policies.step_time import StepTimes

_MIX_GAIN = 0.02
"""Gain of the moving average of how rows spread over kinds of match."""

Arm = tuple[str, int]
"""A drafter and K; plain decoding is ``PLAIN_ARM``."""
Bytes = NDArray[np.uint8]
PLAIN_ARM: Arm = ("none", 0)


class Outline(NamedTuple):
    """What can be predicted of a step before its requests are known. Lists are over K = 0, 1, ...
    max_k."""

    batch: int
    max_k: int
    plain_s: float
    seconds: Mapping[str, list[float]]
    """Of a step by each drafter that may propose, switching aside."""
    usual_tokens: Mapping[str, list[float]]
    """Over a batch of this size with the matches that rows usually have, by drafters that need
    none."""
    expected: Mapping[str, Floats]
    """[B, K + 1] expected tokens of a row in each bucket, by drafter; K is the largest of all."""


class Forecast(NamedTuple):
    """Predictions for one step. Lists are over K = 0, 1, ... max_k. There are B kinds of match."""

    batch: int
    is_whole: bool
    """Every request may have drafts of ``max_k``."""
    max_k: int
    plain_s: float
    seconds: Mapping[str, list[float]]
    """Of a step by each drafter that can propose now, switching aside."""
    tokens: dict[str, list[float]]
    """Over this batch, each row held to its cap."""
    rows: Floats
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
    tokens: Floats
    """[A, B] more tokens of a row in each bucket."""
    seconds: Floats
    """[A] more seconds of a step."""

    @classmethod
    def over(cls, blind: Arm, outline: Outline, matching: Iterable[str]) -> Self:
        """Over an arm of a drafter that needs no match.

        Args:
            matching: drafters of the outline that need a match. No mixes: who drafts for which
                request is planned.
        """
        arms: list[Arm] = []
        tokens, seconds = [], []
        (drafter, k), expected = blind, outline.expected
        blind_s = outline.seconds[drafter][k] if k else outline.plain_s
        for kind in matching:
            used = expected[drafter][:, k] if k else np.ones(len(expected[kind]))
            tokens.append((expected[kind][:, 1 : outline.max_k + 1] - used[:, None]).T)
            seconds += outline.seconds[kind][1:]
            arms += [(kind, each) for each in range(1, outline.max_k + 1)]
        # No draft makes a step shorter than a plain one, whatever few late steps seem to say.
        longer = np.maximum(np.array(seconds), outline.plain_s) - blind_s
        return cls(tuple(arms), np.concatenate(tokens), longer)


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
        needing: Set[str],
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
        self._rows: dict[int, Floats] = {}
        """Rows by kind of match as they usually are, by batch."""
        self._noted: list[Forecast] = []
        """Steps of which the mix is still to be counted."""
        self._tables: dict[tuple[tuple[str, ...], bool], tuple[Outline, Floats]] = {}
        """By drafters and whether caps count: the latest outline and what ``_table`` made of it."""

    def outline(self, obs: StepObs, max_k: int, *, may_match: bool = True) -> Outline:
        """What does not depend on the requests of a step: by its batch and its drafters alone.

        Args:
            may_match: some request may have a match. Otherwise mixes that need one are left out.
        """
        seconds, usual, expected = {}, {}, {}
        idle = set() if may_match else self._needing - {*self._matching}
        for drafter in obs.drafters:
            if drafter in idle:
                continue
            expected[drafter] = self._acceptance.expected_tokens(drafter)
            seconds[drafter] = [0.0, *self._times.arm_times(drafter, obs.batch)[:max_k]]
            if drafter not in self._needing:
                usual[drafter] = self._usual_tokens(drafter, obs.batch)[: max_k + 1]
        plain_s = self._times.plain_s(obs.batch)
        return Outline(obs.batch, max_k, plain_s, seconds, usual, expected)

    def forecast(self, obs: StepObs, outline: Outline) -> Forecast:
        """Predict every arm of a step.

        Args:
            outline: of it, or of one with the same batch, with these drafters among others, and
                with nothing learned since.
        """
        batch, max_k, plain_s, seconds, usual, _ = outline
        caps, has_match = obs.caps, False
        is_whole = caps.count(max_k) == batch
        if obs.matches is None:
            kinds, rows = None, self._usual_rows(batch)
        else:
            kinds = kinds_of(obs.matches)
            rows = by_kind(kinds, self._acceptance.num_buckets)
            has_match = rows.item(0) < batch
        by_cap = None if is_whole else self._by_cap(caps, kinds, max_k)
        drafters = obs.drafters if has_match else self._needing_none(obs.drafters)
        if len(drafters) < len(seconds):
            seconds = {drafter: seconds[drafter] for drafter in drafters}
        if by_cap is not None:
            tokens = self._summed(by_cap, drafters, outline, is_capped=True)
        elif kinds is not None:
            tokens = self._summed(rows, drafters, outline, is_capped=False)
        else:
            tokens = {drafter: usual[drafter] for drafter in drafters}
        return Forecast(batch, is_whole, max_k, plain_s, seconds, tokens, rows)

    def prepare(self, drafters: Iterable[str], batch: int) -> None:
        """Compute what the next outline will most likely ask for, while the device works.

        Args:
            drafters: those that can propose.
        """
        for drafter in drafters:
            self._times.arm_times(drafter, batch)
            self._usual_tokens(drafter, batch)
        self._times.plain_s(batch)

    def needing_match(self, batch: int) -> tuple[Floats, Floats]:
        """All arms of drafters that need matches, mixes left out.

        Returns:
            [B, A] expected tokens of a row by kind of match, and [A] seconds.
        """
        tokens = [self._acceptance.expected_tokens(kind)[:, 1:] for kind in self._matching]
        seconds = [self._times.arm_times(kind, batch) for kind in self._matching]
        return np.concatenate(tokens, axis=1), np.concatenate(seconds)

    def with_matching(self, outline: Outline) -> Outline:
        """An outline in which drafters that need matches, mixes left out, may propose."""
        if outline.expected.keys() >= {*self._matching}:
            return outline
        seconds, expected = dict(outline.seconds), dict(outline.expected)
        for kind in self._matching:
            expected[kind] = self._acceptance.expected_tokens(kind)
            times = self._times.arm_times(kind, outline.batch)
            seconds[kind] = [0.0, *times[: outline.max_k]]
        return outline._replace(seconds=seconds, expected=expected)

    def doubt(self, arm: Arm, batch: int) -> float:
        """How uncertain a drafting arm is: its time relative to a plain step, or what one more
        position would add; 0 for plain decoding."""
        drafter, k = arm
        if not k:
            return 0.0
        of_tokens = self._acceptance.doubt(drafter, k + 1)
        return max(of_tokens, self._times.doubt(drafter, k, batch))

    def spread(self, arm: Arm, batch: int) -> float:
        """How uncertain an arm's speed relative to plain decoding is."""
        return math.hypot(self._acceptance.spread(*arm), self._times.doubt(*arm, batch))

    def _usual_tokens(self, drafter: str, batch: int) -> list[float]:
        """[max_draft + 1] expected tokens of a step as its rows usually are."""
        if self._noted:
            self._settle()
        expected = self._acceptance.expected_tokens(drafter)
        known = self._known.get(drafter)
        if known is None or known.batch != batch or known.expected is not expected:
            tokens = (batch * self._mix @ expected).tolist()
            known = self._known[drafter] = _Usual(batch, expected, tokens)
        return known.tokens

    def _usual_rows(self, batch: int) -> Floats:
        if self._noted:
            self._settle()
        rows = self._rows.get(batch)
        if rows is None:
            rows = self._rows[batch] = batch * self._mix
        return rows

    def _needing_none(self, drafters: tuple[str, ...]) -> tuple[str, ...]:
        if self._needing.isdisjoint(drafters):
            return drafters
        return tuple(kind for kind in drafters if kind not in self._needing)

    def _summed(
        self, rows: Floats, drafters: tuple[str, ...], outline: Outline, *, is_capped: bool
    ) -> dict[str, list[float]]:
        """[max_k + 1] expected tokens of a step by drafter, in one product for all of them.

        Args:
            rows: [B], or [B * (max_k + 1)] where some requests may have fewer tokens.
        """
        if not drafters:
            return {}
        key = drafters, is_capped
        known = self._tables.get(key)
        if known is None or known[0] is not outline:
            known = self._tables[key] = outline, _table(drafters, outline, is_capped=is_capped)
        return dict(zip(drafters, (rows @ known[1]).tolist(), strict=True))

    def _by_cap(self, caps: bytes, kinds: Bytes | None, max_k: int) -> Floats:
        """[B * (max_k + 1)] rows by kind of match and by the tokens that they may have."""
        shape = self._acceptance.num_buckets, max_k + 1
        held = np.frombuffer(caps.translate(_HELD[max_k]), np.uint8)
        if kinds is not None:
            codes = kinds * np.int64(max_k + 1) + held
            return np.bincount(codes, minlength=shape[0] * shape[1]).astype(np.float64)
        found = np.zeros(shape)
        found[0] = np.bincount(held, minlength=max_k + 1)
        # Those that may have all of them have matches as usual.
        found[:, max_k] = self._usual_rows(int(found[0, max_k]))
        return found.reshape(-1)

    def note_mix(self, seen: Forecast) -> None:
        """Count the rows of a step that a drafter that needs a match leaves to others."""
        self._noted.append(seen)

    def _settle(self) -> None:
        """Count what was noted. A plan only notes: counting is for when the device works."""
        for seen in self._noted:
            self._mix += _MIX_GAIN * (seen.rows / seen.batch - self._mix)
        self._noted.clear()
        self._known.clear()
        self._rows.clear()


def _table(drafters: Iterable[str], outline: Outline, *, is_capped: bool) -> Floats:
    """[drafters, B, max_k + 1] expected tokens of a row by kind of match; [drafters,
    B * (max_k + 1), max_k + 1] by kind of match and by the tokens that it may have."""
    width = outline.max_k + 1
    used = _CAPPED[outline.max_k] if is_capped else slice(width)
    expected = [outline.expected[drafter] for drafter in drafters]
    return np.array([one[:, used].reshape(-1, width) for one in expected])


def kinds_of(matches: bytes) -> Bytes:
    """[batch] kinds of match as numpy counts them fastest."""
    return np.frombuffer(matches, np.uint8)


def by_kind(matches: Bytes, num_kinds: int) -> Floats:
    """[num_kinds] rows by kind of match."""
    return np.bincount(matches, minlength=num_kinds).astype(np.float64)


_CAPPED = [np.minimum(np.arange(k + 1)[:, None], np.arange(k + 1)) for k in range(MAX_DRAFT + 1)]
"""[K + 1, K + 1] by K: tokens that a row has, by its cap and by K of the step."""
_HELD = [bytes(min(cap, k) for cap in range(256)) for k in range(MAX_DRAFT + 1)]
"""By K: what is used of each cap. ``bytes.translate`` takes a third of the time of numpy."""
