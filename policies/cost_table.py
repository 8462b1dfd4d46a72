"""What a step takes by batch and K, from the rounds of traces, and what a drafter is worth by it.

The trainer judges candidates by it: tokens_per_step alone says nothing about K, because deeper
drafts cost more time, and about load, because in a large batch every draft token costs. Traces
carry the time of each step, so the trainer needs no server for this.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT = 200
"""Newest step times kept for each size of batch and K."""
_LEAST = 8
"""Times from which on their median counts."""
_SORTED_TRACES = 32
_AGEING = 0.999
"""What is left, after every trace, of the weight of a batch size."""


@dataclass(frozen=True, slots=True)
class SpeedTable:
    """Speed of drafting relative to plain decoding, for each token that a step yields; by size of
    batch."""

    weights: tuple[float, ...]
    """[sizes] share of the traffic; sums to 1."""
    gains: tuple[tuple[float, ...], ...]
    """[sizes][K - 1] time of a plain step over that of a step with K draft tokens; 0 leaves that K
    out."""

    @property
    def max_k(self) -> int:
        """Largest K."""
        return len(self.gains[0])

    def best(self, tokens: Sequence[float]) -> tuple[int, ...]:
        """[sizes] the fastest K >= 1. Where even that is slower than plain decoding, a server does
        not draft, and which drafter it would have used makes no difference there.

        Args:
            tokens: tokens_per_step at K = 1, 2, ...
        """
        speeds = ([t * g for t, g in zip(tokens, row, strict=True)] for row in self.gains)
        return tuple(1 + max(range(len(s)), key=s.__getitem__) for s in speeds)

    def speedup(self, tokens: Sequence[float], ks: Sequence[int]) -> float:
        """Mean over the traffic at these K; linear in ``tokens``, so that a sum over chains gives
        the sum of their speeds."""
        return sum(
            weight * row[k - 1] * tokens[k - 1]
            for weight, row, k in zip(self.weights, self.gains, ks, strict=True)
        )


def by_tokens(draft_k: int) -> SpeedTable:
    """The table to use while step times are unknown: its "speedup" is tokens_per_step at this K."""
    return SpeedTable((1.0,), ((*[0.0] * (draft_k - 1), 1.0),))


@dataclass(slots=True)
class CostTable:
    """Step times seen in traces."""

    times: dict[tuple[int, int], deque[float]] = field(default_factory=dict)
    """Seconds of the newest steps by (size, K)."""
    weights: Counter[int] = field(default_factory=Counter)
    """Rounds by size, older ones counting less."""
    num_traces: int = 0
    _known: dict[int, dict[int, float]] = field(default_factory=dict)
    """Medians by K, by size of batch; anew every ``_SORTED_TRACES`` traces, and while there are few
    traces for each."""

    def observe(
        self,
        batch_R: NDArray[np.int32],
        draft_k_R: NDArray[np.int32],
        step_s_R: NDArray[np.float64],
        num_traces: int = 1,
    ) -> None:
        """Take in rounds of traces: plain ones and those of one drafter.

        Args:
            batch_R, draft_k_R, step_s_R: of each round.
            num_traces: how many traces they are of.
        """
        before, self.num_traces = self.num_traces, self.num_traces + num_traces
        if before < _SORTED_TRACES or before // _SORTED_TRACES < self.num_traces // _SORTED_TRACES:
            self._known.clear()
        for size in self.weights:
            self.weights[size] *= _AGEING**num_traces  # type: ignore[assignment]
        size_R = np.frexp(np.maximum(batch_R, 1))[1] - 1
        for size, number in zip(*np.unique(size_R, return_counts=True), strict=True):
            self.weights[int(size)] += int(number)
        is_timed_R = step_s_R > 0
        pairs, which_R = unique_pairs(size_R[is_timed_R], draft_k_R[is_timed_R])
        # Grouped by pair, in order within each.
        step_s_R = step_s_R[is_timed_R][np.argsort(which_R, kind="stable")]
        ends = np.bincount(which_R, minlength=len(pairs)).cumsum().tolist()
        for pair, start, end in zip(pairs, [0, *ends], ends, strict=False):
            kept = self.times.setdefault(pair, deque(maxlen=_KEPT))
            kept.extend(step_s_R[start:end][-_KEPT:].tolist())

    def step_s(self, batch: int, draft_k: int) -> float | None:
        """Seconds of a step; ``None`` if it was never seen often enough, nor enough others to draw
        a line through. The median: steps that came late, or had prompts to compute, do not count.
        """
        return _on_line(self._medians(max(batch, 1).bit_length() - 1), draft_k)

    def speed_table(self, max_k: int) -> SpeedTable | None:
        """For K = 1 .. ``max_k``, of the sizes of batch of which it is known; ``None``: none."""
        weights, gains = [], []
        for size, weight in self.weights.items():
            medians = self._medians(size)
            plain_s = _on_line(medians, 0)
            times = [_on_line(medians, k) for k in range(1, max_k + 1)]
            if plain_s is not None and all(times):
                weights.append(float(weight))
                gains.append(tuple(plain_s / t for t in times if t))
        total = sum(weights)
        return SpeedTable(tuple(w / total for w in weights), tuple(gains)) if weights else None

    def _medians(self, size: int) -> dict[int, float]:
        if size not in self._known:
            self._known[size] = {
                k: median(times)
                for (its, k), times in self.times.items()
                if its == size and len(times) >= _LEAST
            }
        return self._known[size]


def unique_pairs(
    first_R: NDArray[Any], second_R: NDArray[Any]
) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
    """The different pairs of values at the same place, both below 2**31 and not negative; and for
    each place, which of them is there."""
    joined_R = first_R.astype(np.int64) << 32 | second_R.astype(np.int64)
    pairs, which_R = np.unique(joined_R, return_inverse=True)
    return [(pair >> 32, pair & 0xFFFFFFFF) for pair in pairs.tolist()], which_R


def _on_line(medians: dict[int, float], draft_k: int) -> float | None:
    """The median itself, or the value of the line through all of them; never below that at a
    smaller K that was measured. A step does not get faster by drafting: where medians say so, the
    times at the smaller K are of a busier hour."""
    found = medians[draft_k] if draft_k in medians else _extrapolated(medians, draft_k)
    return None if found is None else max([found, *(t for k, t in medians.items() if k < draft_k)])


def _extrapolated(medians: dict[int, float], draft_k: int) -> float | None:
    """Where nothing was measured, by the line through what was; ``None`` without one."""
    if len(medians) < 2:
        return None
    ks, times = np.array(list(medians)), np.array(list(medians.values()))
    spread = ks - ks.mean()
    slope = max(float((spread * (times - times.mean())).sum() / (spread**2).sum()), 0.0)
    found = float(times.mean()) + slope * (draft_k - float(ks.mean()))
    return max(found, min(medians.values()) * 0.1)
