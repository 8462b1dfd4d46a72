"""Step times at every K and batch, interpolated from the profile taken at start-up.

A step is a plain step plus an increment: drafting, and the verification of K more tokens. All
drafters share the verification that was measured; what was not measured takes a drafter's priors.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from policies.interface import CostSample, DrafterTraits

DEFAULT_STEP_S = 0.01
"""A plain step before anything is measured."""
_VERIFY_PER_TOKEN = 0.03
"""Time to verify one more draft token of one request before anything is measured, as a share of a
plain step; of more requests, as if four were verified at once."""
_HOST_SHARE = 0.02
"""Time that any draft takes beside its tokens, as a share of a plain step: positive, so that a
factor on an increment can express every increment."""

Floats = NDArray[np.float64]
_AtBatch = dict[int, float]
"""Seconds by batch."""


class Profile:
    """Interpolates start-up measurements. Built once; it does not change."""

    def __init__(
        self, samples: Sequence[CostSample], max_draft: int, drafters: Mapping[str, DrafterTraits]
    ) -> None:
        """
        Args:
            samples: steps timed at start-up; may be empty.
            max_draft: largest K ever asked for.
            drafters: traits by kind; no other kind may be asked for.
        """
        self._max_draft = max_draft
        self._drafters = drafters
        self._verify = _medians((s.draft_k, s.batch, s.step_s - s.draft_s) for s in samples)
        self._draft = {
            kind: _medians((s.draft_k, s.batch, s.draft_s) for s in samples if s.drafter == kind)
            for kind in drafters
        }
        self._known: dict[tuple[str, int], list[float]] = {}

    @property
    def is_measured(self) -> bool:
        """Plain steps were timed."""
        return 0 in self._verify

    def plain_s(self, batch: int) -> float:
        """Seconds of a plain step."""
        return _at_batch(self._verify[0], batch) if self.is_measured else DEFAULT_STEP_S

    def increments(self, drafter: str, batch: int) -> list[float]:
        """[max_draft + 1] seconds beyond a plain step at K = 0, 1, ..., as shares of it.

        0 at K = 0, positive and not decreasing after it.
        """
        found = self._known.get((drafter, batch))
        if found is None:
            found = self._known[drafter, batch] = self._increments(drafter, batch).tolist()
        return found

    def _increments(self, drafter: str, batch: int) -> Floats:
        plain_s = self.plain_s(batch)
        ks = np.arange(self._max_draft + 1)
        verify = _curve(
            self._verify, ks, batch, plain_s, _VERIFY_PER_TOKEN * (batch + 3) / 4 * plain_s
        )
        slope = self._drafters[drafter].prior_draft_cost * plain_s
        draft = _curve(self._draft[drafter], ks, batch, 0.0, slope)
        shares = np.maximum.accumulate(verify - plain_s + draft) / plain_s
        return np.where(ks > 0, np.maximum(shares, 0.0) + _HOST_SHARE, 0.0)


def _medians(timed: object) -> dict[int, _AtBatch]:
    """Median seconds by K and batch."""
    values: dict[int, dict[int, list[float]]] = {}
    for k, batch, seconds in timed:  # type: ignore[attr-defined]
        values.setdefault(k, {}).setdefault(batch, []).append(seconds)
    return {k: {b: median(v) for b, v in cells.items()} for k, cells in values.items()}


def _curve(
    cells: Mapping[int, _AtBatch], ks: NDArray[np.int64], batch: int, zero_s: float, slope_s: float
) -> Floats:
    """Seconds at every K: ``zero_s`` at 0, linear between measured ones, the last slope beyond;
    ``slope_s`` for each token where none was measured."""
    known = {k: _at_batch(at, batch) for k, at in cells.items() if k > 0}
    if not known:
        return zero_s + slope_s * ks.astype(np.float64)
    at = np.array([0, *sorted(known)])
    values = np.array([zero_s, *(known[k] for k in sorted(known))])
    last = (values[-1] - values[-2]) / (at[-1] - at[-2])
    curve: Floats = np.interp(ks, at, values) + max(last, 0.0) * np.maximum(ks - at[-1], 0)
    return curve


def _at_batch(cells: _AtBatch, batch: int) -> float:
    """Seconds at a batch: measured, or interpolated between its neighbours; constant below the
    smallest batch, with the last slope (0 at least) beyond the largest."""
    batches = sorted(cells)
    at = bisect.bisect_left(batches, batch)
    if at == 0:
        return cells[batches[0]]
    if at == len(batches):
        if len(batches) == 1:
            return cells[batches[0]]
        low, high = batches[-2], batches[-1]
        slope = max(0.0, (cells[high] - cells[low]) / (high - low))
        return cells[high] + slope * (batch - high)
    low, high = batches[at - 1], batches[at]
    return cells[low] + (cells[high] - cells[low]) * (batch - low) / (high - low)
