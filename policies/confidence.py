"""Stop on low confidence: a draft ends before the first position whose likeliest token has less
than a given probability.

The rule of transformers' ``assistant_confidence_threshold`` (a threshold in place of DISCO's
network, arXiv:2405.04304). Where drafts are drawn, other servers compare the *drawn* token's
probability, which is not lossless; here it is the likeliest token's, drawn or not.
"""

from __future__ import annotations

from typing import ClassVar, Self

from configs.policies import ConfidenceSettings, CuttingSettings
from configs.schema import PolicySettings
from policies.allocation import Allocation, Cut
from policies.cutting import CuttingPolicy
from policies.interface import PolicyContext


class ConfidencePolicy(CuttingPolicy):
    """Cuts by a threshold that never changes."""

    kind = "confidence"
    cut = Cut("top", cumulative=False)
    device_cuts: ClassVar = (cut,)

    def __init__(
        self,
        context: PolicyContext,
        drafter: str,
        draft_k: int,
        random_share: float,
        how: CuttingSettings,
        own: ConfidenceSettings,
    ) -> None:
        super().__init__(context, drafter, draft_k, random_share, how)
        self._threshold = own.threshold

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter``, ``policy.draft_k``, ``policy.random_share``, ``policy.cutting``
        and ``policy.confidence``."""
        return cls(
            context, settings.drafter, settings.draft_k, settings.random_share, settings.cutting,
            settings.confidence,
        )  # fmt: skip

    def allocation(self) -> Allocation:
        """The configured threshold."""
        return Allocation(self.cut, self._threshold)
