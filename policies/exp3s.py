"""EXP3.S over K: exponential weights with a fixed share, for rewards that nobody promises anything
about.

A step with K tells what every shorter draft would have brought. So the loss of K' is weighed by
the probability that *any* K >= K' ran, not that K' itself did: the estimate scatters much less.
Losses instead of rewards, and a little added to that probability, keep one lucky round of a draft
that is hardly ever tried from deciding everything.

Sources: Auer, Cesa-Bianchi, Freund and Schapire 2002 (EXP3.S); Alon et al. 2017 (side observations,
Exp3-SET); Neu 2015, arXiv:1506.03271 (implicit exploration). With ``mixing`` 1, every K is as
likely as the others, which makes a log on which any policy can be judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Self

from configs.policies import Exp3sSettings
from configs.schema import PolicySettings
from policies.interface import Outcome, PolicyContext
from policies.lengths import LengthPolicy, tokens_by_k
from policies.live_costs import size_of

_IMPLICIT = 0.005
"""Added to probabilities by which losses are divided. More of it flatters what is seldom tried."""
_FIRST_MOST = 2.0
"""Reward, in tokens per time of a plain step, that has no loss before a larger one is seen."""


class Exp3sPolicy(LengthPolicy):
    """Draws K by its weight, for each size of batch apart."""

    kind = "exp3s"

    def __init__(self, context: PolicyContext, drafter: str, settings: Exp3sSettings) -> None:
        super().__init__(context, drafter)
        self._settings = settings
        self._logs: dict[int, list[float]] = {}
        """[max_draft + 1] logarithms of weights by size of batch, the largest 0."""
        self._most: dict[int, float] = {}
        """Largest reward by size of batch."""

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter`` and ``policy.exp3s``."""
        return cls(context, settings.drafter, settings.exp3s)

    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """Weights of the K that can be used, mixed with an even law."""
        logs = self._logs_of(batch)[: max_k + 1]
        weights = [math.exp(one) for one in logs]
        mixing, total, even = self._settings.mixing, sum(weights), 1 / len(weights)
        if total <= 0:
            return [even] * len(weights)
        return [mixing * even + (1 - mixing) * one / total for one in weights]

    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Raise the weight of each K by what it has brought, as far as that is known."""
        if len(law) == 1:
            return
        k = outcome.decision.draft_k
        shares = self.costs.shares(outcome.batch)
        tokens = tokens_by_k(outcome, k)
        at_least = list(accumulate(reversed(law)))[::-1]
        logs, rate = self._logs_of(outcome.batch), self._settings.rate
        rewards = [brought / share for brought, share in zip(tokens, shares, strict=False)]
        size = size_of(outcome.batch)
        most = self._most[size] = max(self._most.get(size, _FIRST_MOST), *rewards)
        for j, reward in enumerate(rewards):
            logs[j] -= rate * (1 - reward / most) / (at_least[j] + _IMPLICIT)
        highest = max(logs)
        shared = self._settings.share * sum(math.exp(one - highest) for one in logs) / len(logs)
        logs[:] = [math.log(math.exp(one - highest) + shared) for one in logs]

    def forget(self, calibration: dict[str, Any]) -> None:
        """Start over."""
        self._logs.clear()

    def state(self) -> dict[str, Any]:
        """Weights by size of batch."""
        return {
            "weights": {
                str(2**size): [round(math.exp(one), 4) for one in logs]
                for size, logs in self._logs.items()
            }
        }

    def _logs_of(self, batch: int) -> list[float]:
        return self._logs.setdefault(size_of(batch), [0.0] * (self.max_draft + 1))
