"""Leaving out plans, and looks at matches, where they do not pay.

Planning and learning from a step take the host 0.15 to 0.3 ms, and looking up the matches of many
requests up to several times that (benchmarks/engine/host.py), while a step of a small target takes
a GPU 0.6 to 1.2 ms. So a plan holds for some steps, and looks are made at every step only where
they find more than they cost.

While plain decoding is the best there is, nothing pays for plans and looks. What they took is then
owed to the ledger: no other plan, and no other look, is made before the steps since have earned it.
That holds for whatever they take, expected or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.acceptance import Floats
from policies.average import Average
from policies.choice import Choice
from policies.forecast import PLAIN_ARM, Arm, Gains, Outline, by_kind, kinds_of
from policies.index_alone import IndexAlone, Look
from policies.interface import Outcome, StepObs
from policies.ledger import Ledger, Purpose
from policies.look_time import LookTime
from policies.round_counts import Counted

_REST_SHARE = 0.003
"""While drafting pays: share of the time that plans may take, and that looks may take while they
find less than they cost."""
_REST_GAIN = 0.05
"""Gain of the moving averages of what inspecting costs and finds."""
_MOST_REST, _LEAST_UNLOOKED, _MOST_UNLOOKED = 64, 8, 1024
"""While drafting pays: most steps without a plan, and least and most steps without a look at
matches where looking at every step does not pay."""
_LEAST_SILENT, _MANY_SILENT = 8, 16
"""Steps that a plan holds for at least, once neither drafts nor looks paid in so many plans in a
row, even if the host has time for a plan at every step: it is taken from other threads."""
_MOST_CREDIT = 8.0
"""Plain steps' worth of time that drafts which saved it let later looks take: traffic has matches
now and then, and learning that they pay on the average takes many looks."""
_MOST_OWED = 3.0
"""Plain steps' worth of time that looks may owe beside plain steps, however much they promise, and
that one plan leaves owed at most: the first one of a server may take twenty, and would keep an
index silent for twenty thousand steps."""
_MOST_COST = 3.0
"""Largest cost that is owed, relative to the average: more is a machine's hiccup."""


@dataclass(slots=True)
class _Plan:
    """The last one."""

    looked: bool | None = None
    """It looked at matches; ``None`` once its time is known."""
    is_paid: bool = False
    """Nobody owes what it took,"""
    by_glance: bool = False
    """and it was a glance."""


@dataclass(slots=True)
class _Steps:
    """Steps without a plan."""

    since_plan: int = 1
    """Since the last plan for several steps, the one of that plan included."""
    untold: int = 0
    """Those that ``rested`` has not told of,"""
    saved: float = 0.0
    """and plain steps' worth of time that looks alone have saved in these."""
    silent_plans: int = 0
    """Plans in a row by which nothing pays."""


class Rest:
    """Leaves out plans, and looks at matches, where they do not pay."""

    def __init__(self, ledger: Ledger) -> None:
        """
        Args:
            ledger: is owed what plans and looks take.
        """
        self._ledger = ledger
        self.is_resting = False
        """The last plan was for several steps."""
        self.is_plain = True
        """Plain decoding is the base."""
        self._costs = {looked: Average(_REST_GAIN) for looked in (False, True)}
        """Time of a plan without and with a look, as shares of a plain step."""
        self._glances = Average(_REST_GAIN)
        """Time of a look that needed no plan, likewise."""
        self._finds = {plain: Average(_REST_GAIN, mean=1.0) for plain in (False, True)}
        """Time that a look saves beyond what the best arm without one takes, likewise, beside
        drafts and beside plain decoding."""
        self.index_alone = IndexAlone()
        self.look_time = LookTime()
        self.num_unlooked = 0
        """Steps since the last look."""
        self.left = 0
        self.arm: Arm = PLAIN_ARM
        """What is done meanwhile."""
        self._steps = _Steps()
        self.gathered = Gathered()
        """Outcomes of steps without a plan."""
        self.glance: Glance | None = None
        """Replaces plans while looks find nothing; ``None``: every look is planned for."""
        self._plan = _Plan()

    @property
    def pays(self) -> bool:
        """Looking at every step finds more than it costs: beside drafts what looks took on the
        average, planned for or not; beside plain steps, where a look needs no plan of its own, what
        it takes by itself and its share of a plan, and as long as what was saved bears that out."""
        return self._pays(is_plain=self.is_plain)

    def _pays(self, *, is_plain: bool) -> bool:
        if is_plain and not self._ledger.affords(Purpose.LOOK, -_MOST_OWED):
            return False
        return self._finds[is_plain].mean >= self._look_cost(is_plain=is_plain)

    def _look_cost(self, *, is_plain: bool) -> float:
        cost = self.look_share
        if not is_plain:
            return cost
        planned = self._costs[False].mean
        if self._glances.num:
            alone = self._glances.mean + self.look_time.hidden
        else:
            alone = max(cost - planned, 0.0)
        return min(cost, alone + planned / max(self._num_steps(planned), 1))

    @property
    def num_since(self) -> int:
        """Steps since the last plan for several steps."""
        return self._steps.since_plan

    @property
    def look_share(self) -> float:
        """Time that a plan with a look takes, as a share of a plain step."""
        return self._costs[True].mean + self.look_time.hidden

    @property
    def plain_lead(self) -> float:
        """Speed of plain decoding, with an index where looks pay, relative to plain decoding."""
        if not self._pays(is_plain=True):
            return 1.0
        return self.index_alone.lead(self._look_cost(is_plain=True))

    @property
    def overhead(self) -> float:
        """Time that plans take in each step while drafting pays, as a share of a plain step."""
        return self._costs[False].mean / self._num_steps(self._costs[False].mean)

    @property
    def owes_a_plan(self) -> bool:
        """What the last plan took is not known yet."""
        return self._plan.looked is not None

    @property
    def may_plan(self) -> bool:
        """Another plan is paid for."""
        return not self.is_plain or self._ledger.affords(Purpose.PLAN)

    @property
    def is_over(self) -> bool:
        """The next step is planned, unless nobody can draft."""
        return not self.left and (not self.is_resting or self.may_plan)

    def wants_look(self) -> bool:
        if self.look_time.is_blind:
            return False
        if self.pays:
            return True
        if self.is_plain:
            return self._ledger.affords(Purpose.LOOK)
        least = math.ceil(self._look_cost(is_plain=False) / _REST_SHARE)
        return self.num_unlooked >= min(max(least, _LEAST_UNLOOKED), _MOST_UNLOOKED)

    def _num_steps(self, cost: float) -> int:
        """Steps that a plan holds for."""
        return min(max(math.ceil(cost / _REST_SHARE), 1), _MOST_REST)

    def plan_begins(self, *, looked: bool, is_paid: bool = False) -> None:
        """A plan is asked for.

        Args:
            is_paid: drafts that saved more time than a plan takes have led to it.
        """
        self._plan = _Plan(looked, is_paid)
        self.num_unlooked += not looked
        self._stepped(looked=looked)

    def note_cost(self, plan_s: float, plain_s: float) -> None:
        """Take in what the last plan took, unless that is known.

        Args:
            plan_s: its seconds; 0 where the host had time for it.
            plain_s: those of a plain step.
        """
        if self._plan.looked is not None:
            share, purpose = plan_s / plain_s, Purpose.LOOK if self._plan.looked else Purpose.PLAN
            self._ledger.note_spent(purpose, plan_s)
            self._costs[self._plan.looked].add(share)
            if self._plan.by_glance:
                self._glances.add(share)
            if self.is_plain and not self._plan.is_paid:
                hidden = self.look_time.hidden if self._plan.looked else 0.0
                usual = self._costs[self._plan.looked].mean + hidden
                charge = min(share + hidden, _MOST_COST * usual, _MOST_OWED)
                # Looks are made at every step as long as they seem to pay. Of these, only the last
                # is owed: all of them, after a swap, would forbid looks for ten thousand steps.
                most = max(charge, min(usual, _MOST_OWED))
                self._ledger.charge(purpose, charge, most_owed=most)
            self._plan.looked = None

    def note_saved(self, share: float) -> None:
        """Take in what a draft that needed a look has saved.

        Args:
            share: time of plain steps for the same tokens, less the time it took, relative to a
                plain step; below 0 if it was slower.
        """
        if self.is_plain:
            self._ledger.credit(Purpose.LOOK, max(share, -1.0), _MOST_CREDIT)

    def note_find(self, share: float) -> None:
        """Take in one look.

        Args:
            share: time that it saved beyond the best arm that needs none, relative to a plain step.
        """
        self._finds[self.is_plain].add(share)
        self.num_unlooked = 0

    def note_glance(self, share: float) -> None:
        """Take in a look that needed no plan, likewise."""
        self.note_find(share)
        self._steps.saved += share - self._glances.mean - self.look_time.hidden

    def rested(self) -> tuple[int, float]:
        """Steps without a plan since this was asked last, and what looks alone have saved in them,
        in plain steps."""
        found = self._steps.untold, self._steps.saved
        self._steps.untold, self._steps.saved = 0, 0.0
        return found

    def note_matches(self, rows: Floats, batch: int, *, is_planned: bool) -> None:
        """Keep the matches that a look found, for ``learn_looks``; before ``note_find``.

        Args:
            rows: [B] by kind of match.
            is_planned: the look was not a glance alone.
        """
        look = Look(rows, batch, self.num_unlooked <= 1, self.is_plain, is_planned)
        self.index_alone.pending.append(look)

    def learn_looks(self) -> int | None:
        """Learn from the looks since this was called last. That takes as long as much of a plan, so
        it is for when the device works.

        Returns:
            Requests of the last look that was planned for; ``None`` without one.
        """
        batch = None
        for look in self.index_alone.pending:
            saved = self.index_alone.note(look.rows, look.batch, is_dense=look.is_dense)
            if not look.is_plain:
                self._finds[True].add(saved)
            if look.is_planned:
                batch = look.batch
        self.index_alone.pending.clear()
        return batch

    def begin(self, arm: Arm, glance: Glance | None, *, looks: bool) -> None:
        """Go on with an arm until the next plan is due.

        Args:
            looks: there is a drafter that needs a match.
        """
        self.glance = glance
        self._steps.since_plan = 1
        self.arm = arm
        num_steps = self._num_steps(self._costs[False].mean) if self._costs[False].mean else 0
        is_silent = self.is_plain and glance is None and not (looks and self.pays)
        self._steps.silent_plans = self._steps.silent_plans + 1 if is_silent else 0
        is_known = self._steps.silent_plans > _MANY_SILENT
        self.left = max(num_steps, _LEAST_SILENT if is_known else 0)

    def take(self) -> Arm:
        """The arm of a step without a plan."""
        self._stepped(looked=False)
        self.left = max(self.left - 1, 0)
        self._steps.since_plan += 1
        self._steps.untold += 1
        self.num_unlooked += 1
        return self.arm

    def _stepped(self, *, looked: bool) -> None:
        self.look_time.stepped(looks=looked and self.pays, gain=self._gain_of_looks)

    def _gain_of_looks(self) -> float:
        """Time that looking at every step saves, in plain steps of one step."""
        return self._finds[self.is_plain].mean - self._look_cost(is_plain=self.is_plain)

    def glanced(self, obs: StepObs) -> tuple[Arm, float] | None:
        """The arm of a step by a glance at its matches, and the plain steps' worth of time that it
        saves beyond going on as before; ``None``: the step must be planned."""
        glance = self.glance
        if self.left <= 0 or glance is None or obs.matches is None:
            return None
        if obs.longest(self.arm[1]) < self.arm[1]:
            return None
        arm, gain = glance.best(obs.matches)
        may_go_on = arm is None or (self.is_plain and obs.longest(arm[1]) == arm[1])
        self._plan.by_glance = may_go_on
        return (self.arm if arm is None else arm, gain) if may_go_on else None

    def figures(self) -> dict[str, float]:
        """JSON-ready: time that a look takes beyond planning, in plain steps, and speed of plain
        decoding with an index relative to plain decoding."""
        return {
            "hidden": round(self.look_time.hidden, 4),
            "plain_lead": round(self.plain_lead, 4),
        }

    def reset(self) -> None:
        """Forget what looks found beside drafts: other weights draft now."""
        self.glance = None
        self._finds[False] = Average(_REST_GAIN, mean=1.0)
        self.left = 0
        self._ledger.clear(Purpose.PLAN, Purpose.LOOK)


class Glance:
    """Decides from a look alone, between plans, whether a drafter that needs matches gains, and at
    which K. While plain decoding is the base nothing must catch up afterwards, so that its arm is
    taken without a plan: a plan at every match would cost more than most matches save."""

    def __init__(
        self, outline: Outline, choice: Choice, blind: Arm, matching: Sequence[str]
    ) -> None:
        """
        Args:
            outline: of the last plan,
            choice: which was this.
            blind: the arm in use.
            matching: drafters of the outline that need a match, no mixes; at least one.
        """
        self._outline, self._choice, self._blind = outline, choice, blind
        self._matching = matching
        self._gains: tuple[Gains, Floats] | None = None
        """What they gain, and [A] tokens' worth of time that the step takes longer. ``None`` until
        the first look: most plans are followed by none."""

    def _weighed(self) -> tuple[Gains, Floats]:
        gains, charges_s = Gains.over(self._blind, self._outline, self._matching), []
        for drafter, _ in gains.arms:
            charges_s.append(self._choice.charges_s.get(drafter, 0.0))
        longer_s = gains.seconds + (np.array(charges_s) - self._choice.charges_s[self._blind[0]])
        return gains, longer_s * self._choice.speed

    def best(self, matches: bytes) -> tuple[Arm | None, float]:
        """The arm that gains the most with these matches, and the time that it saves in plain
        steps; ``None`` and 0 if none does."""
        if self._gains is None:
            self._gains = self._weighed()
        gains, losses = self._gains
        rows = by_kind(kinds_of(matches), gains.tokens.shape[1])
        values = (gains.tokens @ rows - losses).tolist()
        most = max(values)
        if most <= 0:
            return None, 0.0
        return gains.arms[values.index(most)], most / (self._choice.speed * self._choice.plain_s)


class Gathered:
    """Outcomes of a rest, learned at the next plan."""

    def __init__(self) -> None:
        self.drafter = "none"
        self.counted = Counted()
        self.num_steps = 0
        self.seconds = 0.0
        """Of steps whose time says something,"""
        self.tokens_each = 0.0
        """and the sum of tokens of a request in each of these."""

    def add(self, outcome: Outcome) -> None:
        self.num_steps += 1
        if not outcome.has_prefill:
            self.seconds += outcome.step_s
            if outcome.decision.draft_k:
                self.tokens_each += outcome.rows.tokens_each
        self.drafter = outcome.decision.drafter
        if outcome.decision.draft_k:
            self.counted.add(outcome.rows)
