"""What a step teaches the default policy: acceptance, times, and what its account earned or spent.

Steps of a rest are gathered and learned at the next plan, because learning takes the host longer
than deciding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from policies.choice import Chooser
from policies.forecast import PLAIN_ARM
from policies.grouped import GroupedAcceptance
from policies.interface import Decision, Outcome
from policies.ledger import Ledger
from policies.picks import Kinds
from policies.probes import Explorer
from policies.rest import Gathered, Rest
from policies.round_counts import Counted
from policies.step_time import StepTimes
from policies.switching import FRESH_STEPS, SwitchCosts

_TIMED_STEPS = 8
"""One in so many steps of a rest updates the step times: that takes longer than deciding."""
_LEAST_SHARE = 0.2
"""Least share of a step's time that is left to it when the hidden time of its look is taken off."""


_MOST_PRESUMED = 2.0
"""Plain steps that a step of a trial is presumed to take at most where its time says nothing: if
the prediction is far too high, nothing but trials can correct it."""


class Predicted(NamedTuple):
    """The note of a step that was planned, or that belongs to a stretch."""

    tokens: float
    """Of a request, the target's own included."""
    seconds: float
    """Catching up included."""
    catches_up: bool
    pending_rows: Mapping[str, int]
    on_trial: bool = False
    """It is charged by what it loses, see ``probes``."""

    def columns(self) -> Mapping[str, float]:
        return {"tokens": self.tokens, "seconds": self.seconds}


def _was_planned(decision: Decision) -> bool:
    """Whether it took a plan. No policy is asked for requests that allow no drafts, and they do not
    pay for what it learns either."""
    return bool(decision.policy) and decision.reason != "rest"


class Lessons:
    """Feeds outcomes to the models of one policy."""

    def __init__(
        self,
        kinds: Kinds,
        acceptance: GroupedAcceptance,
        times: StepTimes,
        switches: SwitchCosts,
        chooser: Chooser,
        explorer: Explorer,
        rest: Rest,
        ledger: Ledger,
    ) -> None:
        self._kinds = kinds
        self._acceptance = acceptance
        self._times = times
        self._switches = switches
        self._chooser = chooser
        self._explorer = explorer
        self._rest = rest
        self._ledger = ledger
        self.drafter = "none"
        """That of the last step observed."""
        self._resting: list[Outcome] = []
        """Steps of a rest that were not taken in yet."""
        self._tried: dict[str, Counted] = {}
        """Rounds of a trial, by drafter, learned when it is over or the next step is planned."""
        self._arm, self._num_alike = PLAIN_ARM, FRESH_STEPS
        """Arm of the last step, and steps in a row before it that had the same one; as many as
        needed for those that are not fresh by nature."""

    def learn(self, outcome: Outcome) -> None:
        """Take in a step. Of a rest, several are taken in at a time: learning from each would take
        the host as long as committing it."""
        if self._goes_on(outcome):
            self._resting.append(outcome)
            if len(self._resting) >= _TIMED_STEPS:
                self._learn_rest()
            return
        self._learn_rest()
        self._acceptance.tick(outcome.batch)
        self._switches.stepped()
        plain_s = self._times.plain_s(outcome.batch)
        if not (outcome.has_prefill and self._kinds.matching):
            self._rest.note_cost(outcome.plan_s, plain_s)
        self._ledger.pay_off(outcome.step_s / plain_s)
        if outcome.decision.drafter in self._kinds.needing and not outcome.has_prefill:
            self._rest.note_saved(
                outcome.rows.tokens_each - (outcome.step_s - outcome.plan_s) / plain_s
            )
        if self._kinds.matching and not outcome.has_prefill and outcome.step_s > outcome.plan_s:
            self._compare_look(outcome, plain_s)
        self._count_alike(outcome)
        is_alike = outcome.decision.drafter == self.drafter and not outcome.num_caught_up
        if not _was_planned(outcome.decision) and is_alike:
            self._learn_rows()
            self._gather(outcome)
            return
        note = outcome.decision.note
        predicted = note if isinstance(note, Predicted) else None
        if predicted is None or not predicted.on_trial or not self._tried:
            self.learn_gathered()
        if outcome.decision.draft_k:
            self._count_rows(outcome)
            if predicted is None or not predicted.on_trial:
                self._learn_rows()
        if not outcome.has_prefill and outcome.step_s > outcome.plan_s:
            self._observe_time(outcome, predicted.pending_rows if predicted else {})
            self._earn(outcome.step_s, outcome.batch, is_drafted=outcome.decision.draft_k > 0)
            if predicted and outcome.decision.explore:
                self._charge(outcome, predicted, plain_s, outcome.step_s)
            elif outcome.decision.draft_k:
                self._ledger.earned_s += outcome.rows.tokens_each * plain_s - outcome.step_s
        elif predicted and predicted.on_trial:
            # Where requests begin and end, many steps say nothing of their time: on a busy server
            # nearly all. They are not free for that.
            self._charge(outcome, predicted, plain_s, self._presumed_s(predicted, plain_s))
        self.drafter = outcome.decision.drafter

    def _goes_on(self, outcome: Outcome) -> bool:
        """Whether a step that nobody planned did what those before it did, and found nothing."""
        decision = outcome.decision
        return (
            not _was_planned(decision)
            and (decision.drafter, decision.draft_k) == self._arm
            and decision.drafter == self.drafter
            and decision.drafter not in self._kinds.needing
            and outcome.rows.matches is None
            and not outcome.num_caught_up
            and not self._rest.owes_a_plan
        )

    def _learn_rest(self) -> None:
        """Take in the steps that ``_goes_on`` told of, all of them of one arm."""
        if not (resting := self._resting):
            return
        self._resting = []
        num_steps = len(resting)
        self._switches.stepped(num_steps)
        # Requests come and go, and hardly change what a step takes.
        plain_s = self._times.plain_s(sum([one.batch for one in resting]) // num_steps)
        self._ledger.pay_off(sum([one.step_s for one in resting]) / plain_s)
        self._num_alike += num_steps
        for outcome in resting:
            self._acceptance.tick(outcome.batch)
            is_timed = not outcome.has_prefill and outcome.step_s > outcome.plan_s
            if is_timed and self._kinds.matching:
                self._compare_look(outcome, self._times.plain_s(outcome.batch))
            self._gather(outcome)

    def _count_alike(self, outcome: Outcome) -> None:
        """Count steps in a row of one K. Where another drafter was in use before, the first step
        catches up; where each step looks at matches, none repeats the one before."""
        before, self._arm = self._arm, (outcome.decision.drafter, outcome.decision.draft_k)
        if self._arm == before:
            self._num_alike += 1
            return
        is_own = self._arm[0] == before[0] in self._kinds.on_device
        self._num_alike = 0 if is_own and outcome.rows.matches is None else FRESH_STEPS

    def _compare_look(self, outcome: Outcome, plain_s: float) -> None:
        """Compare the time of a step with and without a look, in arms that need none."""
        drafter, k = outcome.decision.drafter, outcome.decision.draft_k
        if drafter in self._kinds.needing or self.catches_up(drafter, self.drafter):
            return
        if outcome.num_caught_up:
            return
        arm_s = self._times.arm_times(drafter, outcome.batch)[k - 1] if k else plain_s
        # Not relative to what was expected: that follows the speed of the machine too fast.
        as_plain_s = outcome.step_s - outcome.plan_s - (arm_s - plain_s)
        looked = outcome.rows.matches is not None
        self._rest.look_time.note(as_plain_s, plain_s, looked=looked, always=self._rest.pays)

    def _charge(
        self, outcome: Outcome, predicted: Predicted, plain_s: float, step_s: float
    ) -> None:
        """Charge a step of a stretch what it took.

        Args:
            step_s: its seconds, or those that were predicted where it says nothing of them.
        """
        drafter = outcome.decision.drafter
        # Another K of the base is no trial of it. Otherwise its gain over plain decoding would call
        # for more of it where it is the base no longer.
        is_base = drafter == self._chooser.base and not self._kinds.matching
        if drafter in self._kinds.on_device and not is_base:
            k, batch = outcome.decision.draft_k, outcome.batch
            took, is_late = self._times.in_plain_steps(drafter, k, batch, step_s)
            pace = self._chooser.pace if predicted.on_trial else self._chooser.plain_lead
            worth = outcome.rows.tokens_each / pace
            if predicted.on_trial:
                worth += self._unforeseen(outcome, pace)
            self._explorer.note_gain(
                drafter,
                worth - step_s / plain_s,
                plain_s,
                on_trial=predicted.on_trial,
                catches_up=predicted.catches_up,
                kept=outcome.rows.tokens_each - 1,
                on_time=worth - took,
                is_late=is_late,
            )
        if not predicted.on_trial:
            self._explorer.settle(
                step_s,
                predicted.seconds,
                plain_s,
                catches_up=predicted.catches_up,
                is_own=drafter == self._chooser.base != "none",
            )

    def _unforeseen(self, outcome: Outcome, pace: float) -> float:
        """Plain steps' worth of time by which drafts of the base, as long as these, would have
        brought less in these very rounds than is believed of it, where they tell.

        After a change, what is believed of it lags behind, and whatever is tried would seem to
        gain."""
        own = outcome.rows.judged.get(self._chooser.base)
        if own is None:
            return 0.0
        k, batch = outcome.decision.draft_k, outcome.batch
        took = self._times.arm_times(self._chooser.base, batch)[k - 1] / self._times.plain_s(batch)
        return took - own.tokens_each / pace

    @staticmethod
    def _presumed_s(predicted: Predicted, plain_s: float) -> float:
        """Seconds of a step of a trial whose time says nothing."""
        most_s = math.inf if predicted.catches_up else _MOST_PRESUMED * plain_s
        return min(predicted.seconds, most_s)

    def _gather(self, outcome: Outcome) -> None:
        """Learn from a step of a rest: its time now and then, the rest at the next plan."""
        self._rest.gathered.add(outcome)
        is_timed = not outcome.has_prefill and outcome.step_s > outcome.plan_s
        if is_timed and self._rest.gathered.num_steps % _TIMED_STEPS == 0:
            self._observe_time(outcome, {})

    def learn_gathered(self) -> None:
        """Learn from the steps of a rest or a trial that were not learned from yet."""
        self._learn_rest()
        self._learn_rows()
        if not self._rest.gathered.num_steps:
            return
        gathered, self._rest.gathered = self._rest.gathered, Gathered()
        if gathered.counted.rounds:
            self._acceptance.learn(gathered.drafter, gathered.counted, self._acceptance.batch)
        plain_s, is_drafted = (
            self._times.plain_s(self._acceptance.batch),
            gathered.drafter != "none",
        )
        if seconds := gathered.seconds + gathered.num_untimed * plain_s:
            self._earn(seconds, self._acceptance.batch, is_drafted=is_drafted)
        if gathered.seconds and is_drafted:
            self._ledger.earned_s += gathered.tokens_each * plain_s - gathered.seconds

    def _earn(self, seconds: float, batch: int, *, is_drafted: bool) -> None:
        self._ledger.save(seconds, self._times.plain_s(batch), is_drafted=is_drafted)

    def catches_up(self, drafter: str, before: str) -> bool:
        """Whether a drafter must catch up after a step by another one."""
        return drafter in self._kinds.on_device and not self._chooser.goes_on(drafter, before)

    def _count_rows(self, outcome: Outcome) -> None:
        found = {outcome.decision.drafter: outcome.rows}
        # The length of a match decides who drafts, and a drafter that needs one is known by it.
        found |= {k: outcome.rows.by(k) for k in self._kinds.matching if outcome.rows.drafters}
        found |= {kind: rows for kind, rows in outcome.rows.judged.items() if kind not in found}
        for drafter, rows in found.items():
            self._tried.setdefault(drafter, Counted()).add(rows)

    def _learn_rows(self) -> None:
        tried, self._tried = self._tried, {}
        for drafter, counted in tried.items():
            if counted.rounds:
                self._acceptance.learn(drafter, counted, self._acceptance.batch)

    def _observe_time(self, outcome: Outcome, pending_rows: Mapping[str, int]) -> None:
        (drafter, k), batch = (outcome.decision.drafter, outcome.decision.draft_k), outcome.batch
        # Most steps are not planned. What planning takes must not look like the time of an arm that
        # is only tried in steps that are.
        step_s = outcome.step_s - outcome.plan_s
        plain_s = self._times.plain_s(batch)
        looked = outcome.rows.matches is not None
        if looked:
            hidden_s = self._rest.look_time.hidden * plain_s
            step_s = max(step_s - hidden_s, _LEAST_SHARE * step_s)
        if self.catches_up(drafter, self.drafter):
            usual_s = self._times.arm_times(drafter, batch)[k - 1]
            pending = pending_rows.get(drafter, 0)
            self._switches.observe(drafter, step_s - usual_s, pending, batch, plain_s)
            return
        if outcome.num_caught_up:
            usual_s = self._times.arm_times(drafter, batch)[k - 1]
            self._switches.observe_forced(step_s - usual_s, plain_s)
            return
        if self._num_alike < FRESH_STEPS:
            usual_s = self._times.arm_times(drafter, batch)[k - 1]
            self._switches.observe_fresh(drafter, step_s - usual_s, plain_s)
            if self._switches.fresh(drafter):
                return
        if k and drafter not in self._kinds.on_device:
            k = max(outcome.rows.num_verified, default=k)
        self._times.observe(drafter, k, batch, step_s)
