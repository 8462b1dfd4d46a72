"""Always the same drafter and K: the yardstick, and the choice when nothing may vary."""

from __future__ import annotations

from typing import Any

from policies.interface import Decision, Outcome, StepObs

PLAIN = Decision("none", 0, 1.0, explore=False, reason="plain")


class FixedPolicy:
    """Implements ``DraftPolicy``. Learns nothing."""

    def __init__(self, drafter: str, draft_k: int) -> None:
        self._drafter = drafter
        self._draft_k = draft_k

    def rest(self) -> Decision | None:
        """Nothing to rest from: what a batch allows is looked at every time."""
        return None

    def plan(self, obs: StepObs) -> Decision:
        """K as configured, less where engine or requests allow less; plain without the drafter."""
        k = min(self._draft_k, obs.max_draft, max(obs.caps))
        if k == 0 or self._drafter not in obs.drafters:
            return PLAIN
        return Decision(self._drafter, k, 1.0, explore=False, reason="fixed")

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def on_swap(self, version: int, calibration: dict[str, Any]) -> None:
        """Nothing to forget."""

    def figures(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {"kind": "fixed", "drafter": self._drafter, "draft_k": self._draft_k}
