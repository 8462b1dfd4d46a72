"""Sliding-window UCB over K, on tokens per time of a plain step.

Plain decoding brings exactly 1, so it is known without trying. An arm's index is its mean over the
window plus a width that falls with the number of its rounds. A step with K tells what every shorter
draft would have brought as well, so short arms cost no exploration; a longer one is never counted
as if it had ended where this one did.

Source: Garivier and Moulines 2011, arXiv:0805.3415, with the empirical variance in the width
(Audibert, Munos and Szepesvari 2009) because rewards of arms differ in scale.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

from configs.schema import PolicySettings
from policies.interface import Outcome, PolicyContext
from policies.lengths import LengthPolicy, spread, tokens_by_k
from policies.live_costs import size_of


class _Window:
    """Rewards of the last steps at one size of batch."""

    def __init__(self, num_arms: int, num_steps: int) -> None:
        self.steps: deque[list[float]] = deque()
        self._num_steps = num_steps
        self.counts = [0] * num_arms
        self.sums = [0.0] * num_arms
        self.squares = [0.0] * num_arms

    def add(self, rewards: list[float]) -> None:
        """Take in the rewards of K = 0, 1, ... up to the one that ran."""
        self.steps.append(rewards)
        self._count(rewards, 1)
        if len(self.steps) > self._num_steps:
            self._count(self.steps.popleft(), -1)

    def _count(self, rewards: list[float], sign: int) -> None:
        for k, reward in enumerate(rewards):
            self.counts[k] += sign
            self.sums[k] += sign * reward
            self.squares[k] += sign * reward * reward

    def index(self, k: int, width: float) -> float:
        count = self.counts[k]
        if not count:
            return math.inf
        mean = self.sums[k] / count
        variance = max(self.squares[k] / count - mean * mean, 0.0) + 1 / count
        return mean + width * math.sqrt(2 * variance * math.log(len(self.steps) + 1) / count)


class UcbPolicy(LengthPolicy):
    """Plays the K with the highest index, for each size of batch apart."""

    kind = "ucb"

    def __init__(
        self, context: PolicyContext, drafter: str, window: int, width: float, random_share: float
    ) -> None:
        super().__init__(context, drafter)
        self._window_steps, self._width, self._random_share = window, width, random_share
        self._windows: dict[int, _Window] = {}

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter``, ``policy.random_share`` and ``policy.ucb``."""
        own = settings.ucb
        return cls(context, settings.drafter, own.window, own.width, settings.random_share)

    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """The K with the highest index; of arms that were never tried, the longest."""
        window = self._window(batch)
        best, highest = 0, 1.0
        for k in range(1, max_k + 1):
            index = window.index(k, self._width)
            if index >= highest:
                best, highest = k, index
        return spread(best, max_k, self._random_share)

    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Count what every K up to the one that ran has brought."""
        k = outcome.decision.draft_k
        shares = self.costs.shares(outcome.batch)
        tokens = tokens_by_k(outcome, k)
        rewards = [t / s for t, s in zip(tokens, shares, strict=False)]
        self._window(outcome.batch).add(rewards)

    def forget(self, calibration: dict[str, Any]) -> None:
        """Start over."""
        self._windows.clear()

    def state(self) -> dict[str, Any]:
        """Mean rewards by size of batch."""
        return {
            "rewards": {
                str(2**size): [
                    round(total / count, 3) if count else None
                    for total, count in zip(window.sums, window.counts, strict=True)
                ]
                for size, window in self._windows.items()
            }
        }

    def _window(self, batch: int) -> _Window:
        size = size_of(batch)
        if size not in self._windows:
            self._windows[size] = _Window(self.max_draft + 1, self._window_steps)
        return self._windows[size]
