"""What policies share that draft K tokens and let the device cut each request's draft.

K is ``policy.draft_k``, because drafting is over before anybody knows where a draft is cut: what a
cut saves is verification. So drafts are cut only in steps that verify packed rows: the room for
them is the mean length that cuts have left lately, and some more. In a small share of the steps
nothing is cut, and the figures are noted all the same, so that other rules can be judged on the
traces.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from configs.policies import CuttingSettings
from policies.allocation import Allocation, Cut
from policies.average import Average
from policies.interface import Decision, Outcome, PolicyContext
from policies.lengths import LengthPolicy, spread
from policies.live_costs import size_of

_GAIN = 0.1
"""Gain of the mean length that cuts leave, for each size of batch."""


class CuttingPolicy(LengthPolicy):
    """A fixed K, and an allocation on top of it."""

    cut: ClassVar[Cut]

    def __init__(
        self,
        context: PolicyContext,
        drafter: str,
        draft_k: int,
        random_share: float,
        how: CuttingSettings,
    ) -> None:
        """
        Args:
            random_share: share of steps whose drafts are not cut.
        """
        super().__init__(context, drafter)
        self._draft_k, self._random_share, self._how = draft_k, random_share, how
        self._kept: dict[int, Average] = {}

    @abstractmethod
    def allocation(self) -> Allocation | None:
        """The cut of the next step, its budget left out; ``None``: decode plainly. A threshold of 0
        cuts nothing."""

    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """Always the same K, as long as there is a rule to cut by."""
        k = min(self._draft_k, max_k) if self.allocation() is not None else 0
        return spread(k, max_k, 0.0)

    def completed(self, decision: Decision, batch: int) -> Decision:
        """Add the cut, or, in a share of the steps, one that leaves everything."""
        allocation = self.allocation()
        assert allocation is not None, "without a rule K is 0"
        share = self._random_share if allocation.may_cut else 0.0
        if self._rng.random() < share:
            chance = decision.propensity * share
            return replace(
                decision, propensity=chance, explore=True,
                allocation=replace(allocation, threshold=0.0),
            )  # fmt: skip
        chance = decision.propensity * (1 - share)
        budget = self._budget_each(batch, decision.draft_k)
        allocation = replace(allocation, budget_each=budget)
        return replace(decision, propensity=chance, allocation=allocation)

    def _budget_each(self, batch: int, draft_k: int) -> float | None:
        kept = self._kept.get(size_of(batch))
        if not self._how.packed or kept is None:
            return None
        wanted = kept.mean * self._how.headroom + self._how.slack
        return min(wanted, float(draft_k))

    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Follow how long drafts are after the cut."""
        allocation, lens = outcome.decision.allocation, outcome.rows.num_verified
        if allocation is None or not allocation.may_cut or not lens:
            return
        kept = self._kept.setdefault(size_of(outcome.batch), Average(_GAIN))
        kept.add(sum(lens) / len(lens))
        self.learn_cut(outcome)

    def learn_cut(self, outcome: Outcome) -> None:
        """Learn from a step whose drafts were cut."""

    def forget(self, calibration: dict[str, Any]) -> None:
        """Drafts of other weights may be longer or shorter."""
        self._kept.clear()

    def state(self) -> dict[str, Any]:
        """Mean lengths by size of batch, and the threshold."""
        allocation = self.allocation()
        return {
            "mean_length": {str(2**size): round(a.mean, 3) for size, a in self._kept.items()},
            "threshold": None if allocation is None else round(allocation.threshold, 4),
        }
