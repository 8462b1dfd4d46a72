"""Thompson sampling of K: as often as it is the best one, by what is known of acceptance.

What is known of position j is a Beta law over P(kept | all before it kept), of counts that fade. A
draw of all positions gives the expected tokens of every K; divided by step times, one K is best.
The share of draws in which it is, is its probability. Drawing takes longer than a plan may, so the
shares are computed for some steps at a time, after an outcome; as a gain, the propensity of every
decision is known exactly, which is not so if each decision has a draw of its own.

Source: Thompson 1933; Chapelle and Li 2011. Counts that fade: Raj and Kalyani 2017,
arXiv:1707.09727.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from configs.schema import PolicySettings
from policies.interface import Outcome, PolicyContext
from policies.lengths import LengthPolicy, spread
from policies.live_costs import size_of

_DRAWS = 64
_PRIOR = (1.2, 0.8)
"""Rounds kept and rejected that every position starts with."""


class ThompsonPolicy(LengthPolicy):
    """Draws K from the shares in which it was best."""

    kind = "thompson"

    def __init__(
        self,
        context: PolicyContext,
        drafter: str,
        half_life: float,
        refresh: int,
        random_share: float,
    ) -> None:
        super().__init__(context, drafter)
        self._keep = 0.5 ** (1 / half_life)
        self._refresh, self._random_share = refresh, random_share
        self._numbers = np.random.default_rng(context.seed)
        self._since = 0
        """Steps since the shares were computed."""
        self._shares: dict[int, list[float]] = {}
        """By size of batch."""
        self.forget({})

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter``, ``policy.random_share`` and ``policy.thompson``."""
        own = settings.thompson
        return cls(
            context, settings.drafter, own.half_life_steps, own.refresh, settings.random_share
        )

    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """Shares of draws in which each K was best; those of longer ones fall to ``max_k``."""
        shares = self._shares.get(size_of(batch))
        if shares is None:
            shares = self._shares[size_of(batch)] = self._drawn_shares(batch)
        mixed = spread(max_k, max_k, self._random_share)
        mixed[max_k] -= 1 - self._random_share
        for k, share in enumerate(shares):
            mixed[min(k, max_k)] += (1 - self._random_share) * share
        return mixed

    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Count each position that was reached."""
        if outcome.decision.draft_k:
            self._kept *= self._keep
            self._rejected *= self._keep
            for verified, accepted in zip(
                outcome.rows.num_verified, outcome.rows.num_accepted, strict=True
            ):
                self._kept[:accepted] += 1
                if accepted < verified:
                    self._rejected[accepted] += 1
        self._since += 1
        if self._since >= self._refresh:
            self._since = 0
            self._shares = {size_of(outcome.batch): self._drawn_shares(outcome.batch)}

    def forget(self, calibration: dict[str, Any]) -> None:
        """Start over from the prior."""
        self._kept, self._rejected = np.zeros((2, self.max_draft))
        self._shares.clear()

    def state(self) -> dict[str, Any]:
        """Mean acceptance by position."""
        kept, rejected = self._kept + _PRIOR[0], self._rejected + _PRIOR[1]
        return {"hazards": (kept / (kept + rejected)).round(4).tolist()}

    def _drawn_shares(self, batch: int) -> list[float]:
        shape = _DRAWS, self.max_draft
        hazards = self._numbers.beta(self._kept + _PRIOR[0], self._rejected + _PRIOR[1], shape)
        tokens = np.ones((_DRAWS, self.max_draft + 1))
        tokens[:, 1:] += np.cumprod(hazards, axis=1).cumsum(axis=1)
        best = (tokens / self.costs.shares(batch)).argmax(axis=1)
        shares: list[float] = (np.bincount(best, minlength=self.max_draft + 1) / _DRAWS).tolist()
        return shares
