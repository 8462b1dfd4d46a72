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
from dataclasses import dataclass, field

from policies.average import Average, Typical
from policies.drafter_acceptance import Floats
from policies.forecast import PLAIN_ARM, Arm
from policies.glance import Glance
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
_FIND_GAIN = 0.02
"""That of what looks find: text that repeats itself comes and goes, and looks that stop in each
pause miss half of it."""
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
_LATE_GLANCES = 8
"""Looks beside plain steps for which the last plan goes on to serve, once another one is due: a
plan takes several times as long as a look, and nothing has been learned meanwhile."""
_KNOWN_COSTS = 5
"""Costs from which on that much may be owed; of each one before it half as much as of the next: the
first look of a server takes far longer than others, and nobody knows before the second one."""
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


class _Costs:
    """Time that the host takes, as shares of a plain step."""

    def __init__(self) -> None:
        self.plan = Typical(_REST_GAIN)
        """Of a plan without a look."""
        self.look = Typical(_REST_GAIN)
        """Of a look, planned for or not."""
        self.planned = Typical(_REST_GAIN)
        """Of one that was planned for,"""
        self.glance = Typical(_REST_GAIN)
        """and of one that was not."""
        self._looks: tuple[float, float, float] | None = None
        """What ``looks`` was asked last, and what it said; ``None`` once it says something else.
        Whether looks pay is asked several times in each step."""

    def add(self, share: float, *, looked: bool | None, by_glance: bool) -> Typical:
        """Take in a plan or a look; returns what is known of its like."""
        self._looks = None
        if not looked:
            own = self.plan
        else:
            self.look.add(share)
            own = self.glance if by_glance else self.planned
        own.add(share)
        return own

    @property
    def of_plan(self) -> float:
        """Of a plan beside that of its look. Without a drafter on the device every plan has one."""
        if self.plan.num or not self.glance.num:
            return self.plan.mean
        return max(self.planned.mean - self.glance.mean, 0.0)

    def looks(self, hidden: float) -> tuple[float, float]:
        """Of a look, and of one that shares its plan with the steps that this holds for.

        Args:
            hidden: what each takes beyond planning.
        """
        if self._looks is None or self._looks[0] != hidden:
            cost, planned = self.look.mean + hidden, self.of_plan
            alone = self.glance.mean + hidden if self.glance.num else max(cost - planned, 0.0)
            shared = min(cost, alone + planned / max(_num_steps(planned), 1))
            self._looks = hidden, cost, shared
        return self._looks[1:]


@dataclass(slots=True)
class _Steps:
    """Steps without a plan."""

    since_plan: int = 1
    """Since the last plan for several steps, the one of that plan included."""
    untold: int = 0
    """Those that ``rested`` has not told of;"""
    saved: float = 0.0
    """plain steps' worth of time that looks alone have saved in these,"""
    back: int = 0
    """steps of the base among these,"""
    broken: int = 0
    """and those that came right after an interruption."""
    is_interrupted: bool = False
    """The last step was of a drafter that needs matches."""
    was_better: bool = False
    """At a look in the last step, such a drafter was better, catching up aside."""
    lasts: Average = field(default_factory=lambda: Average(_REST_GAIN))
    """How often it still is in the step after such a one."""
    late_glances: int = 0
    """Looks since the last plan that needed none, although another plan was due."""
    silent_plans: int = 0
    """Plans in a row by which nothing pays."""


class Rest:
    """Leaves out plans, and looks at matches, where they do not pay."""

    def __init__(self, ledger: Ledger, *, is_mixed: bool = False) -> None:
        """
        Args:
            ledger: is owed what plans and looks take.
            is_mixed: beside drafts, what a look finds is planned for, because a mix may be better
                than the drafter that needs a match.
        """
        self._ledger, self._is_mixed = ledger, is_mixed
        self.is_resting = False
        """The last plan was for several steps."""
        self.is_plain = True
        """Plain decoding is the base."""
        self._costs = _Costs()
        self._finds = {plain: Average(_FIND_GAIN, mean=1.0) for plain in (False, True)}
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
        cost, shared = self._costs.looks(self.look_time.hidden)
        return cost if self._is_mixed and not is_plain else shared

    @property
    def num_since(self) -> int:
        """Steps since the last plan for several steps."""
        return self._steps.since_plan

    @property
    def look_share(self) -> float:
        """Time that a plan with a look takes, as a share of a plain step."""
        return self._costs.looks(self.look_time.hidden)[0]

    @property
    def plain_lead(self) -> float:
        """Speed of plain decoding, with an index where looks pay, relative to plain decoding."""
        if not self._pays(is_plain=True):
            return 1.0
        return self.index_alone.lead(self._look_cost(is_plain=True))

    @property
    def lasting(self) -> float:
        """How often a drafter that needs matches and is better than the base still is so in the
        next step; 0 before anything is known."""
        return self._steps.lasts.mean

    @property
    def overhead(self) -> float:
        """Time that plans take in each step while drafting pays, as a share of a plain step."""
        return self._costs.plan.mean / _num_steps(self._costs.plan.mean)

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
        if self._steps.is_interrupted or self._steps.was_better:
            return True
        least = math.ceil(self._look_cost(is_plain=False) / _REST_SHARE)
        return self.num_unlooked >= min(max(least, _LEAST_UNLOOKED), _MOST_UNLOOKED)

    def plan_begins(self, *, looked: bool, is_paid: bool = False) -> None:
        """A plan is asked for.

        Args:
            is_paid: drafts that saved more time than a plan takes have led to it.
        """
        plan = self._plan
        plan.looked, plan.is_paid, plan.by_glance = looked, is_paid, False
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
            looked, by_glance = self._plan.looked, self._plan.by_glance
            own = self._costs.add(share, looked=looked, by_glance=by_glance)
            if self.is_plain and not self._plan.is_paid:
                hidden = self.look_time.hidden if looked else 0.0
                usual = own.mean + hidden
                most_owed = _MOST_OWED * 2.0 ** min(own.num - _KNOWN_COSTS, 0)
                charge = min(share + hidden, _MOST_COST * usual, most_owed)
                # Looks are made at every step as long as they seem to pay. Of these, only the last
                # is owed: all of them, after a swap, would forbid looks for ten thousand steps.
                most = max(charge, min(usual, most_owed))
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
        self._steps.saved += share - self._costs.glance.mean - self.look_time.hidden

    def rested(self) -> tuple[int, float, int, int]:
        """Steps without a plan since this was asked last, what looks alone have saved in them, in
        plain steps, those of the base among them, and those that came after an interruption."""
        own = self._steps
        found = own.untold, own.saved, own.back, own.broken
        own.untold, own.saved, own.back, own.broken = 0, 0.0, 0, 0
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

    def begin(
        self, arm: Arm, glance: Glance | None, *, looked: bool, is_interrupted: bool = False
    ) -> None:
        """Go on with an arm until the next plan is due.

        Args:
            looked: the plan was made with matches.
            is_interrupted: the step of the plan is one of such a drafter.
        """
        self.glance = glance
        self._steps.since_plan, self._steps.late_glances = 1, 0
        self._steps.is_interrupted, self._steps.was_better = is_interrupted, is_interrupted
        self.arm = arm
        planned = self._costs.plan.mean if self._costs.plan.num else self._costs.planned.mean
        num_steps = _num_steps(planned) if planned else 0
        is_silent = self.is_plain and not looked and not (glance is not None and self.pays)
        self._steps.silent_plans = self._steps.silent_plans + 1 if is_silent else 0
        is_known = self._steps.silent_plans > _MANY_SILENT
        self.left = max(num_steps, _LEAST_SILENT if is_known else 0)

    def take(self, arm: Arm | None = None) -> Arm:
        """The arm of a step without a plan.

        Args:
            arm: of a glance; ``None``: the one that the plan is for.
        """
        own = self._steps
        self._stepped(looked=False)
        self.left = max(self.left - 1, 0)
        own.since_plan += 1
        own.untold += 1
        self.num_unlooked += 1
        is_back = arm is None or arm == self.arm
        own.back += is_back
        own.broken += is_back and own.is_interrupted
        own.is_interrupted = not is_back
        if self.num_unlooked > 1:
            own.was_better = False
        return self.arm if arm is None else arm

    def _stepped(self, *, looked: bool) -> None:
        self.look_time.stepped(looks=looked and self.pays, gain=self._gain_of_looks)

    def _gain_of_looks(self) -> float:
        """Time that looking at every step saves, in plain steps of one step."""
        return self._finds[self.is_plain].mean - self._look_cost(is_plain=self.is_plain)

    def glanced(self, obs: StepObs) -> tuple[Arm, float] | None:
        """The arm of a step by a glance at its matches, and the plain steps' worth of time that it
        saves beyond going on as before; ``None``: the step must be planned."""
        glance = self.glance
        if glance is None or obs.matches is None or not glance.is_for(obs.batch):
            return None
        if self.left <= 0:
            is_due = not (self.is_plain and self.is_resting)
            if is_due or self._steps.late_glances >= _LATE_GLANCES:
                return None
            self._steps.late_glances += 1
        if obs.longest(self.arm[1]) < self.arm[1]:
            return None
        own = self._steps
        arm, gain, is_better = glance.best(obs.matches, is_interrupted=own.is_interrupted)
        if own.was_better:
            own.lasts.add(float(is_better))
        own.was_better = is_better
        may_go_on = arm is None or self._may_draft(arm, obs)
        self._plan.by_glance = may_go_on
        return (self.arm if arm is None else arm, gain) if may_go_on else None

    def untried(self, obs: StepObs) -> tuple[Arm, float, float, float] | None:
        """After a glance that has found nothing: see ``Glance``."""
        glance = self.glance
        if glance is None or not obs.matches:
            return None
        found = glance.untried(obs.matches, is_interrupted=self._steps.is_interrupted)
        return found if found is not None and self._may_draft(found[0], obs) else None

    def _may_draft(self, arm: Arm, obs: StepObs) -> bool:
        """Whether an arm of a glance needs no plan."""
        drafter, k = arm
        is_able = drafter in obs.drafters and obs.longest(k) == k
        return is_able and (self.is_plain or not self._is_mixed)

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
        self._finds[False] = Average(_FIND_GAIN, mean=1.0)
        self.left = 0
        self._ledger.clear(Purpose.PLAN, Purpose.LOOK)


def _num_steps(cost: float) -> int:
    """Steps that a plan of this cost holds for."""
    return min(max(math.ceil(cost / _REST_SHARE), 1), _MOST_REST)


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
        self.num_untimed = 0
        """Plain steps whose time says nothing."""

    def add(self, outcome: Outcome) -> None:
        self.num_steps += 1
        if outcome.has_prefill:
            self.num_untimed += not outcome.decision.draft_k
        else:
            self.seconds += outcome.step_s
            if outcome.decision.draft_k:
                self.tokens_each += outcome.rows.tokens_each
        self.drafter = outcome.decision.drafter
        if outcome.decision.draft_k:
            self.counted.add(outcome.rows)
