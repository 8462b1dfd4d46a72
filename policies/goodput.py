"""The default policy: the arm with the most expected tokens per second, plain decoding included.

Arms are plain decoding and every (drafter, K). What a step brings and what it takes are learned
apart and combined when it is planned: acceptance does not depend on the machine (``acceptance``,
``versions``), step time does not depend on weights (``step_time``, ``switching``). ``choice``
compares the arms and prices changes between them, ``probes`` pays for exploring.

Inspecting the batch takes time that plain decoding does not need. Where plain decoding is the base
and inspection finds less than it costs, the policy rests between inspections.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from configs.schema import PolicySettings
from policies.acceptance import AcceptanceModel, match_bucket
from policies.choice import Choice, Chooser
from policies.fixed import PLAIN
from policies.forecast import PLAIN_ARM, Arm, Forecast, Forecaster
from policies.interface import CostSample, Decision, Outcome, PolicyContext, StepObs
from policies.probes import Explorer, Stretch
from policies.step_time import StepTimes
from policies.switching import SwitchCosts
from policies.versions import VersionMemory

_REST_SHARE = 0.01
"""Share of the time that inspections may take while they find less than they cost."""
_REST_GAIN = 0.05
"""Gain of the moving averages of what inspecting costs and finds."""
_MOST_REST = 64


class _Planned(NamedTuple):
    """A step until it is observed."""

    decision: Decision
    seconds: float
    """Predicted, catching up included."""
    catches_up: bool
    pending_rows: Mapping[str, int]


class _Rest:
    """Leaves out inspections that do not pay."""

    def __init__(self) -> None:
        self._cost = 0.0
        """Mean time of an inspection, as a share of a plain step."""
        self._find = 1.0
        """Mean time that an inspection saves beyond what the base takes, likewise."""
        self.left = 0
        self.arm: Arm = PLAIN_ARM
        """What is done meanwhile."""
        self.num_since = 1
        """Steps since the last inspection."""

    def note_cost(self, share: float) -> None:
        self._cost += _REST_GAIN * (share - self._cost)

    def note_find(self, share: float, arm: Arm | None) -> None:
        """Take in one inspection.

        Args:
            share: what it found beyond the best arm that needs none, relative to a plain step.
            arm: that arm, if it can go on without a switch; ``None``: there is no rest.
        """
        self._find += _REST_GAIN * (share - self._find)
        self.num_since = 1
        if arm is not None and self._find < self._cost:
            self.arm = arm
            self.left = min(math.ceil(self._cost / _REST_SHARE), _MOST_REST)

    def reset(self) -> None:
        self._find, self.left = 1.0, 0


class GoodputPolicy:
    """Implements ``DraftPolicy``. Deterministic for one seed and one sequence of calls."""

    wants_profile = True

    def __init__(
        self,
        context: PolicyContext,
        *,
        explore: float,
        half_life_rounds: float,
        margin: float,
    ) -> None:
        """
        Args:
            explore: share of steps that try another arm once figures are known, as far as the
                account allows.
            half_life_rounds: rounds after which an old observation counts half.
            margin: predicted speed relative to plain decoding that drafting needs.

        Raises:
            ValueError: a drafter has neither one prior acceptance nor one for each match bucket.
        """
        drafters = context.drafters
        self._neural = {kind for kind, traits in drafters.items() if traits.is_neural}
        self._max_draft = context.max_draft
        self._acceptance = AcceptanceModel(half_life_rounds, drafters, context.max_draft)
        self._versions = VersionMemory(self._acceptance, drafters)
        self._times = StepTimes(context.max_draft, drafters)
        self._switches = SwitchCosts(self._neural)
        self._forecaster = Forecaster(self._acceptance, self._times, drafters)
        self._chooser = Chooser(margin)
        self._explorer = Explorer(explore, context.seed, self._neural)
        self._rest = _Rest()
        self._stretch: Stretch | None = None
        self._planned = self._observed = "none"
        """Drafters of the last step planned and of the last one observed."""
        self._awaited: deque[_Planned] = deque(maxlen=8)
        """Steps planned and not observed yet."""
        self._decisions: Counter[str] = Counter()

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.explore``, ``policy.half_life_rounds`` and ``policy.margin``."""
        return cls(
            context,
            explore=settings.explore,
            half_life_rounds=settings.half_life_rounds,
            margin=settings.margin,
        )

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start the step times from those measured at start-up."""
        self._times.calibrate(samples)

    def rest(self) -> Decision | None:
        """Plain decoding, or drafts of the neural drafter in use, for some steps after inspections
        that found less than they cost."""
        if not self._rest.left:
            return None
        self._rest.left -= 1
        self._rest.num_since += 1
        self._planned = self._rest.arm[0]
        self._decisions["rest"] += 1
        return Decision(*self._rest.arm, 1.0, explore=False, reason="rest")

    def plan(self, obs: StepObs) -> Decision:
        """Choose a drafter and K for the next step."""
        decision = self._decide(obs)
        self._planned = decision.drafter
        self._decisions[decision.reason] += 1
        return decision

    def observe(self, outcome: Outcome) -> None:
        """Learn acceptance from every step, and times from steps without prefill."""
        self._acceptance.tick(outcome.batch)
        planned = self._take_awaited(outcome.decision)
        if outcome.decision.draft_k and outcome.decision.reason != "rest":  # else no match is known
            self._observe_rows(outcome)
        if not outcome.has_prefill and outcome.step_s > outcome.plan_s:
            self._observe_time(outcome, planned.pending_rows if planned else {})
            plain_s, is_drafted = self._times.plain_s(outcome.batch), outcome.decision.draft_k > 0
            self._explorer.earn(outcome.step_s, plain_s, is_drafted=is_drafted)
            if planned and planned.decision.explore:
                self._explorer.settle(
                    outcome.step_s, planned.seconds, catches_up=planned.catches_up
                )
        self._observed = outcome.decision.drafter

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Start from what is known of this drafter's version; that of others is untouched."""
        self._versions.on_swap(drafter, version, calibration)
        self._rest.reset()
        self._stretch = None
        self._awaited.clear()  # a step that a swap overtakes is never observed

    def figures(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {
            "kind": "goodput",
            "base": self._chooser.base,
            "decisions": dict(self._decisions),
            "acceptance": self._acceptance.figures(),
            "versions": self._versions.figures(),
            "step_time": self._times.figures(),
            "catch_up": self._switches.figures(),
        }

    def _decide(self, obs: StepObs) -> Decision:
        max_k = min(obs.max_draft, self._max_draft, max(obs.caps))
        if max_k == 0 or not obs.drafters or not self._times.is_known:
            return PLAIN
        seen = self._forecaster.forecast(obs, max_k)
        catch_up_s = {
            kind: self._switches.seconds(
                kind, obs.pending_rows.get(kind, 0), obs.batch, seen.plain_s
            )
            for kind in seen.seconds
            if kind in self._neural
        }
        choice = self._chooser.choose(seen, self._planned, catch_up_s)
        if choice.arm[0] in self._neural or choice.arm == PLAIN_ARM:
            self._forecaster.note_mix(seen)
        decision = self._decision(seen, choice)
        seconds = seen.arm((decision.drafter, decision.draft_k))[1]
        catches_up = decision.drafter in self._neural and decision.drafter != self._planned
        if catches_up:
            seconds += catch_up_s[decision.drafter]
        self._awaited.append(_Planned(decision, seconds, catches_up, obs.pending_rows))
        return decision

    def _decision(self, seen: Forecast, choice: Choice) -> Decision:
        """The best arm, or a step of a stretch."""
        stretch, propensity = self._next_stretch(seen, choice)
        if stretch is not None:
            if stretch.num_steps > 1:
                self._stretch = stretch._replace(num_steps=stretch.num_steps - 1)
            return Decision(*stretch.arm, propensity, explore=True, reason="probe")
        blind = max(filter(self._needs_no_look, choice.values), key=choice.values.__getitem__)
        found = choice.loss_s(blind) / seen.plain_s
        self._rest.note_find(found, blind if blind[0] == choice.base else None)
        reason = "goodput" if choice.arm[1] else "plain"
        return Decision(*choice.arm, propensity, explore=False, reason=reason)

    def _needs_no_look(self, arm: Arm) -> bool:
        return arm == PLAIN_ARM or arm[0] in self._neural

    def _next_stretch(self, seen: Forecast, choice: Choice) -> tuple[Stretch | None, float]:
        """The stretch under way or one that begins now, and the probability of what is returned."""
        left, self._stretch = self._stretch, None
        left = self._explorer.goes_on(left, choice, self._times.num_changes)
        if left is not None and (left.arm == PLAIN_ARM or left.arm in choice.values):
            return left, 1.0
        stretch, nothing = self._explorer.draw(
            seen, choice, lambda: self._doubt(seen, choice), self._rest.num_since
        )
        return (stretch, stretch.propensity) if stretch else (None, nothing)

    def _doubt(self, seen: Forecast, choice: Choice) -> float:
        """How uncertain the best drafting arm is: its time relative to a plain step, or what one
        more position would add."""
        drafter, k = choice.arm
        if not k:
            drafting = (arm for arm in choice.values if arm[1])
            drafter, k = max(drafting, key=choice.values.__getitem__, default=PLAIN_ARM)
        if not k:
            return 0.0
        of_tokens = self._acceptance.doubt(drafter, min(k + 1, seen.max_k))
        return max(of_tokens, self._times.doubt(drafter, k, seen.batch))

    def _take_awaited(self, decision: Decision) -> _Planned | None:
        """What was predicted for a step, if it was planned; older ones were never observed."""
        if decision.reason == "rest":  # and the step planned behind it is observed later
            return None
        while self._awaited:
            planned = self._awaited.popleft()
            if planned.decision is decision:
                return planned
        return None

    def _observe_rows(self, outcome: Outcome) -> None:
        seen: dict[int, dict[tuple[int, int], int]] = {}
        rows = Counter((r.match, r.num_verified, r.num_accepted) for r in outcome.rows)
        for (match, num_verified, num_accepted), count in rows.items():
            if num_verified:
                counts, key = seen.setdefault(match_bucket(match), {}), (num_verified, num_accepted)
                counts[key] = counts.get(key, 0) + count
        if seen:
            self._acceptance.observe(outcome.decision.drafter, seen, outcome.batch)

    def _observe_time(self, outcome: Outcome, pending_rows: Mapping[str, int]) -> None:
        (drafter, k), batch = (outcome.decision.drafter, outcome.decision.draft_k), outcome.batch
        plain_s = self._times.plain_s(batch)
        if outcome.plan_s:
            self._rest.note_cost(outcome.plan_s / plain_s)
        if drafter in self._neural and drafter != self._observed:
            usual_s = self._times.arm_times(drafter, batch)[k - 1]
            pending = pending_rows.get(drafter, 0)
            self._switches.observe(drafter, outcome.step_s - usual_s, pending, batch, plain_s)
            return
        if k and drafter not in self._neural:
            k = max((row.num_verified for row in outcome.rows), default=k)
        self._times.observe(drafter, k, batch, outcome.step_s - (0.0 if k else outcome.plan_s))
