"""The policy of the engines under test. Imports nothing of the project at run time, so that
``side.py`` can use it with any version of the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policies.interface import Decision, DraftPolicy, Outcome, StepObs


@dataclass(frozen=True, slots=True)
class StepTime:
    """One decode step that computed no prompt."""

    seconds: float
    batch: int
    num_accepted: int

    @property
    def tokens_per_request(self) -> float:
        return 1 + self.num_accepted / self.batch


class PolicySwitch:
    """A ``DraftPolicy`` that delegates to another one, chosen for each turn of a benchmark.

    Records when each step was planned, how long it took, and when weights were swapped.
    """

    wants_profile: bool

    def __init__(self, own: DraftPolicy) -> None:
        """
        Args:
            own: the policy from the settings; used until another is chosen.
        """
        self.own = own
        self.playing = own
        self.wants_profile = getattr(own, "wants_profile", False)
        self.steps: list[StepTime] = []
        self.planned_s: list[float] = []
        """``time.perf_counter()`` at each plan."""
        self.swapped: list[int] = []
        """Index into ``planned_s`` of the last plan before each swap."""

    def play(self, policy: DraftPolicy | None = None) -> None:
        """Delegate to ``policy`` (``None``: the settings' own) and clear the records."""
        self.playing = self.own if policy is None else policy
        for kept in (self.steps, self.planned_s, self.swapped):
            kept.clear()

    def rest(self) -> Decision | None:
        return self.playing.rest()

    def wants_matches(self) -> bool:
        return self.playing.wants_matches()

    def match_values(self, drafter: str) -> list[float] | None:
        known = getattr(self.playing, "match_values", None)
        return None if known is None else known(drafter)

    def plan(self, obs: StepObs) -> Decision:
        self.planned_s.append(time.perf_counter())
        return self.playing.plan(obs)

    def observe(self, outcome: Outcome) -> None:
        if not outcome.has_prefill:
            accepted = sum(outcome.rows.num_accepted)
            self.steps.append(StepTime(outcome.step_s, outcome.batch, accepted))
        self.playing.observe(outcome)

    def on_swap(self, *swap: Any) -> None:
        self.swapped.append(len(self.planned_s) - 1)
        self.own.on_swap(*swap)

    def calibrate(self, *samples: Any) -> None:
        """Costs measured at start-up are passed only to the settings' own policy."""
        calibrate = getattr(self.own, "calibrate", None)
        if calibrate is not None:
            calibrate(*samples)

    def figures(self) -> dict[str, Any]:
        return self.playing.figures()
