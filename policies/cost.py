"""Step time in seconds by (drafter, K, batch).

A step is drafting plus verification, which includes everything else, so all drafters share the
verification table. Both tables start from the profile taken at start-up and follow live steps. A
common factor absorbs at once what slows all arms alike (a busy machine, longer contexts), so that
arms not tried lately stay comparable with the one in use.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from policies.interface import CostSample, DrafterTraits

_OUTLIER = 5.0
"""A step slower or faster than predicted by this factor is a hiccup and is ignored."""
_MAX_OUTLIERS = 16
"""More hiccups in a row than this are taken for a lasting change."""
_CALIBRATED_WEIGHT = 16.0
_TRUSTED_WEIGHT = 8.0
"""Observations a cell needs before its error moves the common factor."""
_MIN_GAIN, _MAX_GAIN = 0.03, 0.3
_IDLE_GAIN = 0.002
"""Growth of a cell's gain per step without an observation of it."""
_MAX_DRIFT_GAIN = 0.5
_SCALE_GAIN = 0.1
_SCALE_RETURN = 0.002
"""Share of its logarithm that the common factor loses each step; cells absorb lasting changes."""
_STALE_PLAIN = 0.1
"""Change of the common factor's logarithm that calls for another plain step: if the cost of one arm
is mistaken for a slow machine, plain decoding looks just as slow."""
_PUBLISH = 0.005
"""Relative change of a cell above which the curves are recomputed."""
_DEFAULT_STEP_S = 0.01
_VERIFY_PER_TOKEN = 0.03
"""Time to verify one more draft token before anything is measured, as a share of a plain step."""


@dataclass(slots=True)
class _Cell:
    mean_s: float
    weight: float
    seen_at: int
    published_s: float
    seen_scale: float
    """Common factor at the last update."""

    def update(self, value_s: float, clock: int, scale: float) -> bool:
        """Move towards a new value and return True if the published one changed.

        The old value weighs less the longer ago it was observed and the more the common factor has
        moved since.
        """
        idle_gain = min(_MAX_GAIN, _IDLE_GAIN * (clock - self.seen_at))
        drift_gain = min(_MAX_DRIFT_GAIN, 3 * abs(math.log(scale / self.seen_scale)))
        gain = max(1 / (self.weight + 1), _MIN_GAIN, idle_gain, drift_gain)
        self.mean_s += gain * (value_s - self.mean_s)
        self.weight += 1
        self.seen_at, self.seen_scale = clock, scale
        if abs(self.mean_s - self.published_s) <= _PUBLISH * self.published_s:
            return False
        self.published_s = self.mean_s
        return True


_Key = tuple[str, int]
"""("verify" or a drafter's kind, K)."""


class CostModel:
    """Predicted step seconds for every drafter, K and batch, measured or not."""

    def __init__(self, max_draft: int, drafters: Mapping[str, DrafterTraits]) -> None:
        """
        Args:
            max_draft: largest K ever asked for.
            drafters: traits by kind; no other kind may be observed or asked for.
        """
        self._max_draft = max_draft
        self._drafters = drafters
        self._cells: dict[_Key, dict[int, _Cell]] = {}
        self._curves: dict[tuple[str, int], list[float]] = {}
        self._scale = 1.0
        self._plain_scale = 1.0
        self._clock = 0
        self._outliers = 0

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start from a profile: the median over equal (drafter, K, batch)."""
        values: dict[tuple[str, int, int], list[float]] = {}
        for sample in samples:
            key = ("verify", sample.draft_k, sample.batch)
            values.setdefault(key, []).append(sample.step_s - sample.draft_s)
            if sample.draft_k:
                key = (sample.drafter, sample.draft_k, sample.batch)
                values.setdefault(key, []).append(sample.draft_s)
        for (name, k, batch), seconds in values.items():
            middle = median(seconds)
            cell = _Cell(middle, _CALIBRATED_WEIGHT, self._clock, middle, self._scale)
            self._cells.setdefault((name, k), {})[batch] = cell
        self._curves.clear()

    def observe(
        self, drafter: str, draft_k: int, batch: int, step_s: float, draft_s: float | None
    ) -> None:
        """Learn from a live step without prefill.

        Args:
            draft_s: ``None`` if it included catching up and so does not show the cost of drafting.
        """
        self._clock += 1
        if draft_s is None:
            draft_s = self._scale * self._curve(drafter, batch)[draft_k]
        predicted_s = self.step_s(drafter, draft_k, batch)
        if not self._believes(step_s / predicted_s, draft_k, batch):
            return
        cell = self._cells.get(("verify", draft_k), {}).get(batch)
        if cell is not None and cell.weight >= _TRUSTED_WEIGHT:
            # The ratio itself has mean 1. Its logarithm has a mean below 0 where steps are noisy:
            # the factor would fall forever, and with it the figures of arms not tried again.
            self._scale *= 1 + _SCALE_GAIN * (step_s / predicted_s - 1)
            self._scale **= 1 - _SCALE_RETURN
        self._update("verify", draft_k, batch, max(step_s - draft_s, 0.0) / self._scale)
        if draft_k:
            self._update(drafter, draft_k, batch, draft_s / self._scale)
        else:
            self._plain_scale = self._scale

    def knows_plain(self, batch: int) -> bool:
        """True if plain steps were timed at a batch within a factor of 2, or below and above it."""
        cells = self._cells.get(("verify", 0), {})
        return any(batch <= 2 * known and known <= 2 * batch for known in cells) or (
            bool(cells) and min(cells) < batch < max(cells)
        )

    @property
    def plain_is_stale(self) -> bool:
        """True if the machine seems to have changed speed since plain decoding was last timed."""
        return abs(math.log(self._scale / self._plain_scale)) > _STALE_PLAIN

    def least_plain_s(self, batch: int) -> float:
        """Seconds of a plain step, now or when one was last timed, whichever is less."""
        return min(self._scale, self._plain_scale) * self._curve("verify", batch)[0]

    def step_s(self, drafter: str, draft_k: int, batch: int) -> float:
        """Predicted seconds of one step."""
        seconds = self._curve("verify", batch)[draft_k]
        if draft_k:
            seconds += self._curve(drafter, batch)[draft_k]
        return self._scale * seconds

    def arm_times(self, drafter: str, batch: int) -> list[float]:
        """``step_s`` at K = 0, 1, ... max_draft, non-decreasing."""
        scale = self._scale
        verify, draft = self._curve("verify", batch), self._curve(drafter, batch)
        return [scale * (v + d) for v, d in zip(verify, draft, strict=True)]

    def catch_up_s(self, drafter: str, pending_rows: int, batch: int) -> float:
        """Seconds per step that catching up adds, beyond the rows of an ordinary step.

        A row of catching up costs 1/32 of a drafted token (it is prefill). The cost is spread over
        8 steps, for which the drafter is assumed to stay in use, like the switch cost of Nightjar.
        """
        excess = max(0, pending_rows - batch * (self._max_draft + 1))
        if not excess or not self._max_draft:
            return 0.0
        return self._scale * self._curve(drafter, batch)[1] * excess / batch / 32 / 8

    def figures(self) -> dict[str, Any]:
        """JSON-ready: the common factor and every measured cell, milliseconds."""
        return {
            "scale": round(self._scale, 4),
            "cells_ms": {
                f"{name}/{k}/{batch}": round(1000 * cell.mean_s, 4)
                for (name, k), cells in sorted(self._cells.items())
                for batch, cell in sorted(cells.items())
            },
        }

    def _believes(self, ratio: float, draft_k: int, batch: int) -> bool:
        is_known = batch in self._cells.get(("verify", draft_k), {})
        is_outlier = is_known and not 1 / _OUTLIER <= ratio <= _OUTLIER
        self._outliers = self._outliers + 1 if is_outlier else 0
        return not is_outlier or self._outliers > _MAX_OUTLIERS

    def _update(self, name: str, k: int, batch: int, value_s: float) -> None:
        cells = self._cells.setdefault((name, k), {})
        cell = cells.get(batch)
        if cell is None:
            guess_s = self._curve(name, batch)[k] if cells else value_s
            weight = 2.0 if cells else 0.0
            cells[batch] = cell = _Cell(guess_s, weight, self._clock, 0.0, self._scale)
        if cell.update(value_s, self._clock, self._scale):
            self._curves.clear()

    def _curve(self, name: str, batch: int) -> list[float]:
        """Unscaled seconds at K = 0, 1, ... max_draft."""
        curve = self._curves.get((name, batch))
        if curve is None:
            curve = self._build_curve(name, batch)
            self._curves[name, batch] = curve
        return curve

    def _build_curve(self, name: str, batch: int) -> list[float]:
        known: dict[int, tuple[float, float]] = {}
        for k in range(self._max_draft + 1):
            cells = self._cells.get((name, k))
            if cells:
                known[k] = _at_batch(cells, batch)
        if name == "verify":
            slope = _VERIFY_PER_TOKEN
            if not known:
                known[0] = (_DEFAULT_STEP_S, 1.0)
            unit_s = min(value for value, _ in known.values())
        else:
            slope = self._drafters[name].prior_draft_cost
            known[0] = (0.0, 1e6)
            unit_s = self._curve("verify", batch)[0]
        return _isotonic(_fill(known, self._max_draft, slope * unit_s))


def _at_batch(cells: dict[int, _Cell], batch: int) -> tuple[float, float]:
    """(seconds, weight) at a batch: its own cell, or interpolated between its neighbours; constant
    below the smallest batch, with the last slope (at least 0) beyond the largest."""
    own = cells.get(batch)
    if own is not None:
        return own.published_s, own.weight
    batches = sorted(cells)
    at = bisect.bisect(batches, batch)
    if at == 0:
        return cells[batches[0]].published_s, 1.0
    low = batches[at - 1]
    low_s = cells[low].published_s
    if at < len(batches):
        high = batches[at]
        slope = (cells[high].published_s - low_s) / (high - low)
    elif len(batches) > 1:
        before = batches[at - 2]
        slope = max(0.0, (low_s - cells[before].published_s) / (low - before))
    else:
        slope = 0.0
    return low_s + slope * (batch - low), 1.0


def _fill(
    known: dict[int, tuple[float, float]], max_draft: int, default_slope: float
) -> list[tuple[float, float]]:
    """(seconds, weight) at every K: linear between known ones, last slope kept beyond."""
    ks = sorted(known)
    filled = []
    for k in range(max_draft + 1):
        if k in known:
            filled.append(known[k])
            continue
        at = bisect.bisect(ks, k)
        left, right = (at - 1, at) if 0 < at < len(ks) else (len(ks) - 2, len(ks) - 1)
        if at == 0 or left < 0:
            base = ks[0] if at == 0 else ks[-1]
            slope = default_slope
        else:
            base = ks[left] if at < len(ks) else ks[right]
            slope = (known[ks[right]][0] - known[ks[left]][0]) / (ks[right] - ks[left])
        filled.append((max(known[base][0] + slope * (k - base), 0.0), 0.5))
    return filled


def _isotonic(points: Sequence[tuple[float, float]]) -> list[float]:
    """Weighted isotonic regression: the closest non-decreasing curve, by pooling violators."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in points:
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return [value for value, _, count in pools for _ in range(count)]
