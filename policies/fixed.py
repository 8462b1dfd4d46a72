"""The fixed policy: one drafter and one K, as a baseline or where nothing may vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from configs.schema import PolicySettings
from policies.interface import CostSample, Decision, Outcome, PolicyContext, StepObs

PLAIN = Decision("none", 0, 1.0, explore=False, reason="plain")
_PLAIN = replace(PLAIN, policy="fixed")


class FixedPolicy:
    """Implements ``DraftPolicy``. Learns nothing."""

    wants_profile = False
    wants_guard = False
    """A baseline must not be changed."""

    def __init__(self, drafter: str, draft_k: int, *, needs_match: bool = True) -> None:
        """
        Args:
            needs_match: the drafter proposes only where a match was found.
        """
        self._drafter = drafter
        self._draft_k = draft_k
        self._needs_match = needs_match

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Draft with ``policy.drafter`` and K = ``policy.draft_k``."""
        traits = context.drafters.get(settings.drafter)
        needs_match = traits is not None and traits.needs_match
        return cls(settings.drafter, settings.draft_k, needs_match=needs_match)

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Do nothing: times do not change the decision."""

    def rest(self) -> Decision | None:
        """``None``: caps and ready drafters are checked at every step."""
        return None

    def wants_matches(self) -> bool:
        """Only for a drafter that needs them."""
        return self._needs_match and self._draft_k > 0

    def plan(self, obs: StepObs) -> Decision:
        """The configured K, capped by engine and requests; plain if the drafter is not ready."""
        k = obs.longest(self._draft_k)
        if k == 0 or self._drafter not in obs.drafters:
            return _PLAIN
        return Decision(self._drafter, k, 1.0, explore=False, reason="fixed", policy="fixed")

    def observe(self, outcome: Outcome) -> None:
        """Do nothing."""

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Do nothing."""

    def figures(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {"kind": "fixed", "drafter": self._drafter, "draft_k": self._draft_k}
