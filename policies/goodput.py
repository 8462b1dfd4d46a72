"""The default policy: the arm with the most expected tokens per second, plain decoding included.

Arms are plain decoding and every (drafter, K). What a step brings and what it takes are learned
apart and combined when it is planned: acceptance does not depend on the machine (``acceptance``,
``versions``), step time does not depend on weights (``step_time``, ``switching``). ``choice``
compares the arms and prices changes between them, ``probes`` pays for exploring.

Planning takes time, and looking up the matches of a batch takes more. So the policy plans once for
several steps and goes on with the base between them, and looks at matches only where that finds
more than it costs. Where it does, a glance at them tells most steps that need no plan.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np

from configs.schema import PolicySettings
from policies.acceptance import AcceptanceModel
from policies.choice import Choice, Chooser
from policies.fixed import PLAIN
from policies.forecast import PLAIN_ARM, Arm, Forecast, Forecaster
from policies.interface import (
    CostSample,
    Decision,
    Outcome,
    PolicyContext,
    StepObs,
)
from policies.picks import Picker, needing_match, rows_of, with_mixes
from policies.probes import Explorer, Stretch
from policies.rest import Gathered, Glance, Rest, count_rows
from policies.step_time import StepTimes
from policies.switching import SwitchCosts
from policies.versions import VersionMemory

_MORE_STEPS = 6
"""Steps by which a stretch of drafts that saves time is continued."""
_TIMED_STEPS = 8
"""One in so many steps of a rest updates the step times: that takes longer than deciding."""
_PLAIN = replace(PLAIN, policy="goodput")


def _decision(arm: Arm, propensity: float, reason: str, *, explore: bool = False) -> Decision:
    return Decision(*arm, propensity, explore, reason, "goodput")


class _Planned(NamedTuple):
    """A step until it is observed."""

    decision: Decision
    seconds: float
    """Predicted, catching up included."""
    catches_up: bool
    pending_rows: Mapping[str, int]


class _Steps:
    """Decisions until their outcomes are known."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Decisions by reason."""
        self.drafter = "none"
        """That of the last decision."""
        self.observed = "none"
        """That of the last step observed."""
        self.best = PLAIN_ARM
        """The best arm that drafts, when one was chosen last."""
        self.untried: set[str] = set()
        """Neural drafters whose weights changed, and that have not drafted since."""
        self._awaited: deque[_Planned] = deque(maxlen=8)

    def note(self, decision: Decision) -> Decision:
        self.drafter = decision.drafter
        self.counts[decision.reason] += 1
        return decision

    def await_outcome(self, planned: _Planned) -> None:
        self._awaited.append(planned)

    def take(self, decision: Decision) -> _Planned | None:
        """What was predicted for a step, if it was planned; older ones were never observed."""
        if decision.reason == "rest":  # and the step planned behind it is observed later
            return None
        while self._awaited:
            planned = self._awaited.popleft()
            if planned.decision is decision:
                return planned
        return None

    def forget(self) -> None:
        """A swap came: a step that it overtakes is never observed."""
        self._awaited.clear()


class GoodputPolicy:
    """Implements ``DraftPolicy``. Deterministic for one seed and one sequence of calls."""

    wants_profile = True
    wants_guard = False
    """Plain decoding is one of its arms."""

    def __init__(
        self,
        context: PolicyContext,
        *,
        explore: float,
        half_life_rounds: float,
        margin: float,
        probe_share: float = 0.005,
    ) -> None:
        """
        Args:
            explore: share of steps that try another arm once figures are known, as far as the
                account allows.
            half_life_rounds: rounds after which an old observation counts half.
            margin: predicted speed relative to plain decoding that drafting needs.
            probe_share: share of the time that finding out whether drafting pays may take while
                plain decoding is faster: seven tenths of it for stretches of drafts, a tenth for
                plans without a look at matches, and two tenths for those with one.

        Raises:
            ValueError: a drafter has neither one prior acceptance nor one for each kind of match.
        """
        drafters = with_mixes(context.drafters, context.mixes)
        self._neural = {kind for kind, traits in drafters.items() if traits.is_neural}
        self._needing = needing_match(context.drafters, context.mixes)
        self._max_draft = context.max_draft
        self._acceptance = AcceptanceModel(half_life_rounds, drafters, context.max_draft)
        self._versions = VersionMemory(self._acceptance, drafters)
        self._times = StepTimes(context.max_draft, drafters)
        self._switches = SwitchCosts(self._neural)
        self._forecaster = Forecaster(self._acceptance, self._times, self._needing)
        rows = rows_of(context.drafters, context.mixes)
        self._chooser = Chooser(margin, rows, self._needing)
        catching_up = self._neural - self._needing
        self._explorer = Explorer(explore, context.seed, catching_up, 0.7 * probe_share)
        self._rest = Rest(0.1 * probe_share, 0.2 * probe_share)
        self._gathered = Gathered()
        self._stretch: Stretch | None = None
        self._steps = _Steps()
        matching = [kind for kind, traits in drafters.items() if traits.needs_match]
        self._picker = Picker(context.mixes, self._acceptance, explore, context.seed, matching)

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.explore``, ``half_life_rounds``, ``margin`` and ``probe_share``."""
        return cls(
            context,
            explore=settings.explore,
            half_life_rounds=settings.half_life_rounds,
            margin=settings.margin,
            probe_share=settings.probe_share,
        )

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start the step times from those measured at start-up."""
        self._times.calibrate(samples)

    def plain_s(self, batch: int) -> float | None:
        """Predicted seconds of a plain step; ``None`` while it is only a guess."""
        return self._times.plain_s(batch) if self._times.is_known else None

    def rest(self) -> Decision | None:
        """The base, for some steps after a plan, unless looks at matches pay; plain decoding, until
        the last plan is paid for."""
        if self._stretch is not None and (decision := self._stretching()) is not None:
            return decision
        if self._picker.matching and self._rest.wants_look():
            return None
        # Without a neural drafter, a plan without a look finds nothing.
        may_plan = bool(self._neural) and self._rest.may_plan
        if self._rest.left or (self._rest.is_resting and not may_plan):
            return self._resting()
        return None

    def _resting(self, arm: Arm | None = None) -> Decision:
        """Go on as planned, or with the arm of a glance."""
        base = self._rest.take()
        return self._steps.note(_decision(base if arm is None else arm, 1.0, "rest"))

    def _stretching(self) -> Decision | None:
        """The next step of a stretch, which needs no plan unless matches are looked up for every
        step; ``None``: it must be planned."""
        stretch, plain_s = self._stretch, self._times.plain_s(self._acceptance.batch)
        assert stretch is not None
        (drafter, k), changes = stretch.arm, self._times.num_changes
        if self._steps.drafter != drafter:
            return None
        if drafter in self._picker.mixes:  # who drafts for which request is planned
            return None
        if self._picker.matching and self._rest.pays:
            return None
        if not self._explorer.goes_on_unplanned(plain_s, changes):
            return None
        left = stretch.num_steps - 1
        self._stretch = stretch._replace(num_steps=left) if left else None
        decision = _decision(stretch.arm, 1.0, "probe", explore=True)
        seconds = self._times.arm_times(drafter, self._acceptance.batch)[k - 1] if k else plain_s
        self._steps.await_outcome(_Planned(decision, seconds, False, {}))
        return self._steps.note(decision)

    def wants_matches(self) -> bool:
        """Where looking pays, and now and then to know whether it would."""
        return bool(self._picker.matching) and (not self._neural or self._rest.wants_look())

    def match_values(self, drafter: str) -> list[float] | None:
        """Expected tokens of its longest draft, by kind of match."""
        return self._acceptance.match_values(drafter)

    def plan(self, obs: StepObs) -> Decision:
        """Choose a drafter and K for the next step."""
        is_paid = self._explorer.more != PLAIN_ARM
        self._rest.plan_begins(looked=obs.matches is not None, is_paid=is_paid)
        if (glanced := self._rest.glanced(obs)) is not None:
            arm, gain = glanced
            self._rest.note_find(gain)
            return self._resting(arm)
        self._learn_gathered()
        return self._steps.note(self._decide(obs))

    def observe(self, outcome: Outcome) -> None:
        """Learn acceptance from every step, and times from steps without prefill. What the next
        plan needs is computed here, while the device works."""
        self._learn(outcome)
        if self._neural and self._rest.is_over:
            self._learn_gathered()
            self._forecaster.prepare(outcome.batch)
            if self._explorer.wants_doubt:
                self._explorer.note_doubt(self._doubt(self._steps.best, outcome.batch))

    def _learn(self, outcome: Outcome) -> None:
        self._acceptance.tick(outcome.batch)
        plain_s = self._times.plain_s(outcome.batch)
        if not outcome.has_prefill:
            self._rest.note_cost(outcome.plan_s / plain_s)
        self._rest.passed(outcome.step_s / plain_s)
        if outcome.decision.drafter in self._needing and not outcome.has_prefill:
            self._rest.note_saved(
                outcome.rows.tokens_each - (outcome.step_s - outcome.plan_s) / plain_s
            )
        if outcome.decision.reason == "rest" and outcome.decision.drafter == self._steps.observed:
            self._gather(outcome)
            return
        self._learn_gathered()
        planned = self._steps.take(outcome.decision)
        if outcome.decision.draft_k:
            self._observe_rows(outcome)
        if not outcome.has_prefill and outcome.step_s > outcome.plan_s:
            self._observe_time(outcome, planned.pending_rows if planned else {})
            self._earn(outcome.step_s, outcome.batch, is_drafted=outcome.decision.draft_k > 0)
            is_neural = outcome.decision.drafter in self._neural
            is_later = self._rest.is_plain and self._explorer.is_charged_later(
                outcome.decision.drafter
            )
            if outcome.decision.explore and is_neural:
                self._explorer.note_gain(
                    outcome.decision.drafter,
                    outcome.rows.tokens_each - outcome.step_s / plain_s,
                    plain_s,
                    is_charged=is_later,
                    catches_up=planned is not None and planned.catches_up,
                )
            if planned and planned.decision.explore and not is_later:
                self._explorer.settle(
                    outcome.step_s,
                    planned.seconds,
                    catches_up=planned.catches_up,
                    is_own=outcome.decision.drafter == self._chooser.base != "none",
                )
        self._steps.observed = outcome.decision.drafter

    def _gather(self, outcome: Outcome) -> None:
        """Learn from a step of a rest: its time now and then, the rest at the next plan."""
        self._gathered.add(outcome)
        is_timed = not outcome.has_prefill and outcome.step_s > outcome.plan_s
        if is_timed and self._gathered.num_steps % _TIMED_STEPS == 0:
            self._observe_time(outcome, {})

    def _learn_gathered(self) -> None:
        gathered, self._gathered = self._gathered, Gathered()
        if gathered.rounds:
            self._acceptance.observe(gathered.drafter, gathered.rounds, self._acceptance.batch)
        if gathered.seconds:
            is_drafted = gathered.drafter != "none"
            self._earn(gathered.seconds, self._acceptance.batch, is_drafted=is_drafted)

    def _earn(self, seconds: float, batch: int, *, is_drafted: bool) -> None:
        self._explorer.earn(seconds, self._times.plain_s(batch), is_drafted=is_drafted)

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Start from what is known of this drafter's version; that of others is untouched."""
        self._learn_gathered()
        self._versions.on_swap(drafter, version, calibration)
        for mix, members in self._picker.mixes.items():
            if drafter in members:
                self._versions.on_change(mix)
        self._rest.reset()
        self._stretch = None
        self._steps.untried.update({drafter} & self._neural)
        self._steps.forget()

    def figures(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {
            "kind": "goodput",
            "base": self._chooser.base,
            "decisions": dict(self._steps.counts),
            "acceptance": self._acceptance.figures(),
            "versions": self._versions.figures(),
            "step_time": self._times.figures(),
            "catch_up": self._switches.figures(),
            "picks": self._picker.figures(),
        }

    def _decide(self, obs: StepObs) -> Decision:
        max_k = obs.longest(self._max_draft)
        if max_k == 0 or not obs.drafters or not self._times.is_known:
            return _PLAIN
        seen = self._forecaster.forecast(obs, max_k)
        catch_up_s = {
            kind: self._switches.seconds(
                kind, obs.pending_rows.get(kind, 0), obs.batch, seen.plain_s
            )
            for kind in seen.seconds
            if kind in self._neural
        }
        overhead_s = self._rest.overhead * seen.plain_s
        choice = self._chooser.choose(
            seen, self._steps.drafter, catch_up_s, overhead_s,
            lambda arm: self._spread(arm, obs.batch), looked=obs.matches is not None,
        )  # fmt: skip
        if obs.matches is not None and self._needs_no_look(choice.arm):
            self._forecaster.note_mix(seen)
        self._steps.best = choice.best_draft
        decision = self._decision(seen, choice, looked=obs.matches is not None)
        if decision.drafter in self._picker.mixes:
            picks = self._picker.pick(obs, decision.drafter, decision.draft_k)
            decision = replace(decision, picks=picks)
        seconds = seen.arm((decision.drafter, decision.draft_k))[1]
        catches_up = self._catches_up(decision.drafter, self._steps.drafter)
        if catches_up:
            seconds += catch_up_s[decision.drafter]
        self._steps.await_outcome(_Planned(decision, seconds, catches_up, obs.pending_rows))
        return decision

    def _decision(self, seen: Forecast, choice: Choice, *, looked: bool) -> Decision:
        """The best arm, or a step of a stretch."""
        self._rest.left, self._rest.is_resting = 0, False
        self._rest.is_plain = choice.base == "none"
        blind = max(filter(self._needs_no_look, choice.values), key=choice.values.__getitem__)
        if looked:
            self._rest.note_find(choice.loss_s(blind) / seen.plain_s)
        stretch, propensity = None, 1.0
        # A look is expensive while plain decoding is the base: what it found is not left unused.
        finds = looked and choice.arm[0] in self._needing
        is_kept = finds and self._rest.is_plain and self._explorer.more == PLAIN_ARM
        if not is_kept or self._rest.pays:
            stretch = self._trial(seen, choice)
        if stretch is None and not is_kept:
            stretch, propensity = self._next_stretch(seen, choice)
        if stretch is not None:
            if stretch.num_steps > 1:
                self._stretch = stretch._replace(num_steps=stretch.num_steps - 1)
            return _decision(stretch.arm, propensity, "probe", explore=True)
        goes_on = choice.base in ("none", choice.arm[0], self._steps.drafter)
        # A mix is planned for every step: which request it drafts for how may change at each.
        if blind[0] == choice.base and goes_on and blind[0] not in self._picker.mixes:
            self._rest.is_resting = True
            self._rest.begin(blind, self._glance_over(seen, choice, blind) if looked else None)
        reason = "goodput" if choice.arm[1] else "plain"
        return _decision(choice.arm, propensity, reason)

    def _glance_over(self, seen: Forecast, choice: Choice, blind: Arm) -> Glance | None:
        """What drafters that need matches gain over an arm without, by kind of match."""
        if not self._picker.matching or min(seen.caps) < seen.max_k:
            return None
        expected = {
            kind: self._acceptance.expected_tokens(kind)
            for kind in {*self._needing, *({blind[0]} & self._neural)}
        }
        used = expected[blind[0]][:, blind[1]] if blind[1] else np.ones(len(seen.rows))
        blind_s = seen.arm(blind)[1]
        arms, gains, losses = [], [], []
        for kind in self._needing:
            times = self._times.arm_times(kind, seen.batch)
            charge_s = choice.charges_s.get(kind, 0.0) - choice.charges_s[blind[0]]
            for k in range(1, seen.max_k + 1):
                arms.append((kind, k))
                gains.append(expected[kind][:, k] - used)
                losses.append((times[k - 1] - blind_s + charge_s) * choice.speed)
        step_tokens = choice.speed * seen.plain_s
        return Glance(tuple(arms), np.array(gains), np.array(losses), step_tokens)

    def _needs_no_look(self, arm: Arm) -> bool:
        return arm == PLAIN_ARM or (arm[0] in self._neural and arm[0] not in self._needing)

    def _catches_up(self, drafter: str, before: str) -> bool:
        """Whether a drafter must catch up after a step by another one."""
        return drafter in self._neural and not self._chooser.goes_on(drafter, before)

    def _trial(self, seen: Forecast, choice: Choice) -> Stretch | None:
        """A few steps of a drafter whose weights have just changed, where it is not the base.

        What is known of it was measured on other traffic, and the step times perhaps on a busier
        machine. If either is wrong, only drafting can tell, and the explorer's draws may come no
        sooner than the next swap.
        """
        for kind in sorted(self._steps.untried & seen.seconds.keys()):
            if choice.base == kind or choice.arm[0] == kind:
                self._steps.untried.discard(kind)
                continue
            arm = max(((kind, k) for k in range(1, seen.max_k + 1)), key=choice.values.__getitem__)
            if (stretch := self._explorer.trial(arm, choice)) is not None:
                self._steps.untried.discard(kind)
                return stretch
        return None

    def _next_stretch(self, seen: Forecast, choice: Choice) -> tuple[Stretch | None, float]:
        """The stretch under way or one that begins now, and the probability of what is returned."""
        left, self._stretch = self._stretch, None
        left = self._explorer.goes_on(left, choice, self._times.num_changes)
        if left is not None and (left.arm == PLAIN_ARM or left.arm in choice.values):
            return left, 1.0
        stretch, nothing = self._explorer.draw(seen, choice, self._rest.num_since)
        if stretch is not None:
            return stretch, stretch.propensity
        more = self._explorer.more
        if self._rest.is_plain and more[1] and more in choice.values:
            return Stretch(more, _MORE_STEPS, nothing), nothing
        return None, nothing

    def _doubt(self, arm: Arm, batch: int) -> float:
        """How uncertain a drafting arm is: its time relative to a plain step, or what one more
        position would add."""
        drafter, k = arm
        if not k:
            return 0.0
        of_tokens = self._acceptance.doubt(drafter, min(k + 1, self._max_draft))
        return max(of_tokens, self._times.doubt(drafter, k, batch))

    def _spread(self, arm: Arm, batch: int) -> float:
        """How uncertain an arm's speed relative to plain decoding is."""
        return math.hypot(self._acceptance.spread(*arm), self._times.doubt(*arm, batch))

    def _observe_rows(self, outcome: Outcome) -> None:
        found = {outcome.decision.drafter: outcome.rows}
        # The length of a match decides who drafts, and a drafter that needs one is known by it.
        found |= {k: outcome.rows.by(k) for k in self._picker.matching if outcome.rows.drafters}
        for drafter, rows in found.items():
            seen: dict[int | None, Counter[tuple[int, int]]] = {}
            count_rows(rows, seen)
            if seen:
                self._acceptance.observe(drafter, seen, outcome.batch)

    def _observe_time(self, outcome: Outcome, pending_rows: Mapping[str, int]) -> None:
        (drafter, k), batch = (outcome.decision.drafter, outcome.decision.draft_k), outcome.batch
        # Most steps are not planned. What planning takes must not look like the time of an arm that
        # is only tried in steps that are.
        step_s = outcome.step_s - outcome.plan_s
        plain_s = self._times.plain_s(batch)
        if self._catches_up(drafter, self._steps.observed):
            usual_s = self._times.arm_times(drafter, batch)[k - 1]
            pending = pending_rows.get(drafter, 0)
            self._switches.observe(drafter, step_s - usual_s, pending, batch, plain_s)
            return
        if k and drafter not in self._neural:
            k = max(outcome.rows.num_verified, default=k)
        self._times.observe(drafter, k, batch, step_s)
