"""AdaEDL: stop where a bound on acceptance by the entropy of the drafter's distribution is low.

A draft ends before the first position with ``1 - sqrt(gamma H) < lambda``. The threshold lambda
follows acceptance: with ``AR`` a moving average of accepted over verified tokens, lambda rises by
epsilon while ``AR < alpha``, falls by it where AR is higher and a draft was not kept whole, and
moves towards the new value with weight ``1 - beta2``. The paper decodes one request; in a batch,
the tokens of a step are taken together.

Source: Agrawal et al. 2024, arXiv:2410.18351, Section 3 and Algorithm 1. Defaults are its own, but
for the first threshold, which it does not give.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from configs.policies import AdaEdlSettings, CuttingSettings
from configs.schema import PolicySettings
from policies.allocation import Allocation, Cut
from policies.cutting import CuttingPolicy
from policies.interface import Outcome, PolicyContext


class AdaEdlPolicy(CuttingPolicy):
    """Cuts by a threshold on the entropy bound that follows acceptance."""

    kind = "adaedl"
    cut = Cut("entropy", cumulative=False)
    device_cuts: ClassVar = (cut,)

    def __init__(
        self,
        context: PolicyContext,
        drafter: str,
        draft_k: int,
        random_share: float,
        how: CuttingSettings,
        own: AdaEdlSettings,
    ) -> None:
        super().__init__(context, drafter, draft_k, random_share, how)
        self._own = own
        self._threshold, self._rate = own.threshold, own.alpha

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter``, ``policy.draft_k``, ``policy.random_share``, ``policy.cutting``
        and ``policy.adaedl``."""
        return cls(
            context, settings.drafter, settings.draft_k, settings.random_share, settings.cutting,
            settings.adaedl,
        )  # fmt: skip

    def allocation(self) -> Allocation:
        """The threshold of now."""
        return Allocation(self.cut, self._threshold, gamma=self._own.gamma)

    def learn_cut(self, outcome: Outcome) -> None:
        """Move the threshold."""
        own, rows = self._own, outcome.rows
        verified, accepted = sum(rows.num_verified), sum(rows.num_accepted)
        if verified:
            self._rate += (1 - own.beta1) * (accepted / verified - self._rate)
        moved = self._threshold
        if self._rate < own.alpha:
            moved += own.epsilon
        elif accepted != outcome.decision.draft_k * len(rows):
            moved -= own.epsilon
        self._threshold += (1 - own.beta2) * (moved - self._threshold)
        self._threshold = min(max(self._threshold, _LEAST), 1.0)

    def forget(self, calibration: dict[str, Any]) -> None:
        """Start the threshold over."""
        super().forget(calibration)
        self._threshold, self._rate = self._own.threshold, self._own.alpha

    def state(self) -> dict[str, Any]:
        """Also the moving average of acceptance."""
        return {**super().state(), "acceptance": round(self._rate, 4)}


_LEAST = 1e-3
"""A threshold of 0 would say that nothing is cut."""
