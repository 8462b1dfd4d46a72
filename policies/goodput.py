"""The default policy: the arm with the most expected tokens per second, plain decoding included.

Arms are plain decoding and every (drafter, K). What a step brings and what it takes are learned
apart and combined when it is planned: acceptance does not depend on the machine (``acceptance``,
``versions``), step time does not depend on weights (``step_time``, ``switching``). ``choice``
compares the arms and prices changes between them, ``probes`` explores, ``rest`` leaves out plans,
and all that either takes is on one account, the ``ledger``.

Planning takes time, and looking up the matches of a batch takes more. So the policy plans once for
several steps and goes on with the base between them, and looks at matches only where that finds
more than it costs. Where it does, a glance at them tells most steps that need no plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from configs.schema import PolicySettings
from policies.choice import Choice, Chooser, best_of
from policies.fixed import PLAIN
from policies.forecast import PLAIN_ARM, Arm, Forecaster, by_kind, kinds_of
from policies.glance import Glance
from policies.grouped import GroupedAcceptance
from policies.interface import (
    CostSample,
    Decision,
    DraftPolicy,
    Outcome,
    PolicyContext,
    StepObs,
)
from policies.ledger import Ledger
from policies.lessons import Lessons, Predicted
from policies.picks import Kinds, Picker, picked_mixes, rows_of, with_mixes
from policies.probes import Explorer, Stretch
from policies.rest import Rest
from policies.step_time import StepTimes
from policies.switching import FEW_ROWS, SwitchCosts
from policies.trials import Trials
from policies.versions import VersionMemory
from policies.weighed import Basis, Like, Made, Steps, Weighed

_MORE_STEPS = 6
"""Steps by which a stretch of drafts that saves time is continued."""
_LENGTH_STEPS = 8
"""Steps of a stretch of the base at another K where the first ones say nothing of its time. Where
they do, and where every step is planned because matches are looked up for it, one is enough."""
_PLAIN = replace(PLAIN, policy="goodput")
_PLAIN_REST = replace(_PLAIN, reason="rest")


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
                plain decoding is faster, see ``ledger``.

        Raises:
            ValueError: a drafter has neither one prior acceptance nor one for each kind of match.
        """
        drafters = with_mixes(context.drafters, context.mixes)
        kinds = self._kinds = Kinds.of(context.drafters, context.mixes)
        self._acceptance = GroupedAcceptance(
            half_life_rounds, drafters, context.max_draft, context.mixes
        )
        self._versions = VersionMemory(self._acceptance, drafters)
        self._times = StepTimes(context.max_draft, drafters)
        self._switches = SwitchCosts(kinds.on_device)
        self._forecaster = Forecaster(
            self._acceptance, self._times, kinds.needing, context.max_draft, kinds.matching
        )
        self._chooser = Chooser(margin, rows_of(context.drafters, context.mixes), kinds.needing)
        self._ledger = Ledger(probe_share, tries_matches=bool(kinds.matching))
        self._explorer = Explorer(
            explore, context.seed, kinds.blind, self._ledger, tries_beside=not kinds.matching
        )
        self._rest = Rest(self._ledger, is_mixed=bool(kinds.mixed))
        self._lessons = Lessons(
            kinds, self._acceptance, self._times, self._switches, self._chooser, self._explorer,
            self._rest, self._ledger,
        )  # fmt: skip
        self._steps = Steps(Trials(kinds.blind, after_changes=not kinds.matching))
        self._basis: Basis | None = None
        """For the next plan, if that is as the last one was and nothing is learned before it,"""
        self._ahead: Weighed | None = None
        """and all that it weighs, if its requests are alike too."""
        picked = picked_mixes(context.drafters, context.mixes)
        self._picker = Picker(picked, self._acceptance, explore, context.seed, kinds.matching)

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
        self._basis = self._ahead = None

    def start_from(self, other: DraftPolicy) -> None:
        """Take over step times, and what coming back to drafters costs.

        Raises:
            TypeError: the other one is of another class.
        """
        if not isinstance(other, GoodputPolicy):
            raise TypeError(f"start_from needs a GoodputPolicy, got {type(other).__name__}")
        self._times.start_from(other._times)
        self._switches.start_from(other._switches)
        self._basis = self._ahead = None

    def plain_s(self, batch: int) -> float | None:
        """Predicted seconds of a plain step; ``None`` while it is only a guess."""
        return self._times.plain_s(batch) if self._times.is_known else None

    def rest(self) -> Decision | None:
        """The base, for some steps after a plan, unless looks at matches pay; plain decoding, until
        the last plan is paid for."""
        self._settle()
        stretch = self._explorer.under_way
        if stretch is not None and (decision := self._stretching(stretch)) is not None:
            return decision
        if self._kinds.matching and self._rest.wants_look():
            return None
        # Without a drafter on the device, a plan without a look finds nothing.
        may_plan = bool(self._kinds.on_device) and self._rest.may_plan
        if self._rest.left or (self._rest.is_resting and not may_plan):
            return self._resting()
        return None

    def _resting(self, arm: Arm | None = None, propensity: float = 1.0) -> Decision:
        """Go on as planned, or with the arm of a glance."""
        drafter, k = self._rest.take(arm)
        if not k and propensity == 1.0:
            return self._steps.note(_PLAIN_REST)
        return self._steps.note(Decision(drafter, k, propensity, False, "rest", "goodput"))

    def _unless_untried(self, obs: StepObs, arm: Arm, num_since: int) -> Decision:
        """Go on with the base, or draft at a match that may be worth more than is believed."""
        if (found := self._rest.untried(obs)) is None:
            return self._resting(arm)
        (drafter, k), loss_s, tokens, seconds = found
        is_drawn, propensity = self._explorer.draws_match(loss_s, num_since)
        if not is_drawn:
            return self._resting(arm, propensity)
        self._rest.take((drafter, k))
        note = Predicted(tokens / obs.batch, seconds, False, {})
        probe = Decision(drafter, k, propensity, True, "probe", "goodput", note=note)
        return self._steps.note(probe)

    def _stretching(self, stretch: Stretch) -> Decision | None:
        """The next step of a stretch, which needs no plan unless matches are looked up for every
        step; ``None``: it must be planned."""
        batch = self._acceptance.batch
        plain_s = self._times.plain_s(batch)
        drafter, k = stretch.arm
        if not self._needs_no_plan(stretch):
            return None
        on_trial = self._explorer.is_on_trial(drafter, self._chooser.base)
        self._explorer.take(stretch)
        seconds = self._times.arm_times(drafter, batch)[k - 1] if k else plain_s
        note = Predicted(self._steps.tokens, seconds, False, {}, on_trial)
        decision = Decision(drafter, k, 1.0, True, "probe", "goodput", note=note)
        return self._steps.note(decision)

    def _needs_no_plan(self, stretch: Stretch) -> bool:
        """Whether a stretch goes on without a plan."""
        drafter, _ = stretch.arm
        if self._steps.drafter != drafter:
            return False
        if drafter in self._picker.mixes:  # who drafts for which request is planned
            return False
        on_trial = self._explorer.is_on_trial(drafter, self._chooser.base)
        if self._kinds.matching and self._rest.pays and not on_trial:
            return False
        return self._explorer.goes_on_unplanned(self._times.num_changes)

    def wants_matches(self) -> bool:
        """Where looking pays, and now and then to know whether it would."""
        self._settle()
        return bool(self._kinds.matching) and (not self._kinds.on_device or self._rest.wants_look())

    def match_values(self, drafter: str) -> list[float] | None:
        """Expected tokens of its longest draft, by kind of match."""
        return self._acceptance.match_values(drafter)

    def plan(self, obs: StepObs) -> Decision:
        """Choose a drafter and K for the next step."""
        self._settle()
        self._acceptance.glance(obs.groups)
        self._times.follow(obs.context, obs.batch)
        is_paid = self._explorer.more != "none"
        self._rest.plan_begins(looked=obs.matches is not None, is_paid=is_paid)
        if (glanced := self._rest.glanced(obs)) is not None:
            arm, gain = glanced
            rows = by_kind(kinds_of(obs.matches or b""), self._acceptance.num_buckets)
            num_since = self._rest.num_unlooked
            self._rest.note_matches(rows, obs.batch, is_planned=False)
            self._rest.note_glance(gain)
            return self._resting(arm) if gain else self._unless_untried(obs, arm, num_since)
        self._lessons.learn_gathered()
        return self._steps.note(self._decide(obs))

    def observe(self, outcome: Outcome) -> None:
        """Learn acceptance from every step, and times from steps without prefill. What the next
        plan needs is computed here, while the device works."""
        self._settle()
        self._times.follow(outcome.context, outcome.batch)
        self._steps.clock_s += outcome.step_s
        if self._kinds.matching:
            if (batch := self._rest.learn_looks()) is not None:
                tokens, seconds = self._forecaster.needing_match(batch)
                self._rest.index_alone.learn(tokens, seconds / self._times.plain_s(batch))
            self._rest.index_alone.appraise()
        self._lessons.learn(outcome)
        self._acceptance.follow(outcome.rows.groups)
        if self._rest.left and self._like.is_far_from(self._steps.like):
            self._rest.left = 0  # the plan that is still followed is for others
        if outcome.decision.policy:
            self.prepare(outcome.batch)
        else:  # no plan was wanted, and the next step is likely to want none
            self._basis = self._ahead = None

    @property
    def _like(self) -> Like:
        """What the requests of the last step are like: the same record while nothing changes."""
        known, mix, context = self._steps.now, self._acceptance.mix, self._times.context
        if known.mix is not mix or known.context != context:
            known = self._steps.now = Like(mix, context)
        return known

    def prepare(self, batch: int) -> None:
        """Compute what the next plan will weigh, while the device works.

        The next plan mostly is for a batch like that of the last one with a look, or without.
        Drafters that cannot propose in it are not asked for: what is known of idle ones fades when
        it is.

        Args:
            batch: requests of the last step.
        """
        self._basis = self._ahead = None
        if not self._kinds.on_device or not self._rest.is_over:
            return
        stretch = self._explorer.under_way
        if stretch is not None and self._needs_no_plan(stretch):
            return
        self._lessons.learn_gathered()
        looks = bool(self._kinds.matching) and self._rest.wants_look()
        obs = self._steps.obs.get(looks)
        if obs is not None:
            self._forecaster.prepare(obs.drafters, batch)
        if self._explorer.wants_doubt:
            self._explorer.note_doubt(self._forecaster.doubt(self._steps.best, batch))
        if obs is not None and obs.batch == batch:
            self._basis = self._based(obs, obs.longest(self._forecaster.max_draft))
            self._ahead = self._weigh(obs, self._basis)

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Start from what is known of this drafter's version; that of others is untouched."""
        self._settle()
        self._lessons.learn_gathered()
        self._versions.on_swap(drafter, version, calibration)
        self._acceptance.on_swap(drafter, version, calibration)
        for mix, members in self._kinds.members.items():
            if drafter in members:
                self._versions.on_change(mix)
        self._rest.reset()
        self._basis = self._ahead = None
        self._explorer.under_way = None
        if drafter in self._kinds.on_device:
            self._steps.trials.swapped(drafter, self._steps.clock_s)

    def figures(self) -> dict[str, Any]:
        """JSON-ready state. Any thread may ask, so that nothing is settled here: it may be that of
        one step before."""
        return {
            "kind": "goodput",
            "base": self._chooser.base,
            "decisions": dict(self._steps.counts),
            "acceptance": self._acceptance.figures(),
            "versions": self._versions.figures(),
            "step_time": self._times.figures(),
            "catch_up": self._switches.figures(),
            "catch_up_forced": round(self._switches.forced, 5),
            "looks": self._rest.figures(),
            "picks": self._picker.figures(),
            "ledger": self._ledger.figures(),
        }

    def _decide(self, obs: StepObs) -> Decision:
        max_k = obs.longest(self._forecaster.max_draft)
        if max_k == 0 or not obs.drafters or not self._times.is_known:
            return _PLAIN
        steps, looked = self._steps, obs.matches is not None
        basis, ahead, steps.obs[looked] = self._basis, self._ahead, obs
        steps.like = like = self._like
        self._basis = self._ahead = None
        fresh = self._fresh(obs)
        if basis is None or not basis.is_for(obs, max_k, fresh, like):
            may_match = obs.matches is None or any(obs.matches)
            basis, ahead = self._based(obs, max_k, may_match=may_match), None
        if ahead is None or obs.matches != basis.obs.matches or obs.caps != basis.obs.caps:
            ahead = self._weigh(obs, basis)
        steps.made, steps.best = Made(ahead, steps.drafter, looked), ahead.draft
        arm, propensity, reason = self._decided(ahead, looked=looked)
        (drafter, k), (tokens, seconds) = arm, ahead.seen.arm(arm)
        catches_up = drafter != fresh and self._lessons.catches_up(drafter, fresh)
        if catches_up:
            seconds += basis.catch_up_s[drafter]
        steps.tokens, explore = tokens / obs.batch, reason == "probe"
        on_trial = explore and self._explorer.is_on_trial(drafter, ahead.choice.base)
        picks = self._picker.pick(obs, drafter, k) if drafter in self._picker.mixes else None
        note = Predicted(steps.tokens, seconds, catches_up, obs.pending_rows, on_trial)
        # By position: names take a third as long again.
        return Decision(drafter, k, propensity, explore, reason, "goodput", None, picks, note)

    def _based(self, obs: StepObs, max_k: int, *, may_match: bool = True) -> Basis:
        """Compute what arms take and which one is the base, for a batch of this size."""
        self._chooser.rested(*self._rest.rested())
        outline = self._forecaster.outline(obs, max_k, may_match=may_match)
        fresh = self._fresh(obs)
        catch_up_s = {
            kind: self._switches.seconds(
                kind, obs.pending_rows.get(kind, 0), obs.batch, outline.plain_s
            )
            for kind in obs.drafters
            if kind in self._kinds.on_device
        }
        return_s = {
            kind: self._switches.seconds(kind, 0, obs.batch, outline.plain_s) for kind in catch_up_s
        }
        footing = self._chooser.footing(
            outline, fresh, catch_up_s,
            (self._rest.overhead + self._switches.forced) * outline.plain_s,
            lambda arm: self._forecaster.spread(arm, obs.batch), plain_lead=self._plain_lead,
            return_s=return_s,
        )  # fmt: skip
        return Basis(obs, max_k, fresh, outline, catch_up_s, footing, self._like)

    def _fresh(self, obs: StepObs) -> str:
        """The drafter or mix of the last decision; ``none`` if it lacks rows, although it drafted:
        former weights came back."""
        drafter = self._steps.drafter
        return "none" if obs.pending_rows.get(drafter, 0) > FEW_ROWS * obs.batch else drafter

    def _weigh(self, obs: StepObs, basis: Basis) -> Weighed:
        """Compare the arms of a step; nothing but what is remembered of the batch changes."""
        seen = self._forecaster.forecast(obs, basis.outline)
        footing = basis.footing
        choice = self._chooser.weigh(seen, footing, looked=obs.matches is not None)
        blind = choice.arm
        if footing.alone < footing.plain or not self._needs_no_look(blind[0]):
            # It is not the best arm of all, or is none of those that are asked for.
            blind = best_of(choice.values, self._needs_no_look) or PLAIN_ARM
        num_steps, begin_s = 1, 0.0
        if obs.matches is None and (fresh := self._switches.fresh(choice.arm[0])):
            num_steps, begin_s = _LENGTH_STEPS, fresh * seen.plain_s
        options = self._explorer.options(seen, choice, num_steps=num_steps, begin_s=begin_s)
        return Weighed(basis, seen, choice, options, blind, choice.best_draft)

    @property
    def _plain_lead(self) -> float:
        """Speed of plain decoding with an index as a rival of drafters. Where a mix has the index,
        a drafter goes on with it at no catch-up, and what that would bring is not known before."""
        return 1.0 if self._kinds.mixed else self._rest.plain_lead

    def _decided(self, weighed: Weighed, *, looked: bool) -> tuple[Arm, float, str]:
        """The best arm, or that of a step of a stretch, with its probability and the reason."""
        choice, blind = weighed.choice, weighed.blind
        self._rest.left, self._rest.is_resting = 0, False
        if choice.base == "none" and not self._rest.is_plain:
            self._ledger.turns_plain()
        self._rest.is_plain = choice.base == "none"
        self._steps.look = weighed if looked else None
        stretch, propensity = None, 1.0
        goes_on = self._explorer.under_way is not None
        # A look is expensive while plain decoding is the base: what it found is not left unused,
        # unless looks are made at every step, or a drafter has caught up for nothing else.
        finds = looked and choice.arm[0] in self._kinds.needing
        is_kept = finds and self._rest.is_plain and self._explorer.more == "none"
        if is_kept:  # whether looks pay is asked below
            self._note_look()
        may_explore = not is_kept or self._rest.pays or goes_on
        self._steps.trials.follow(choice.base, self._acceptance.num_shifts)
        if may_explore and not goes_on and self._steps.trials.are_due:
            stretch = self._steps.trials.next(choice, self._explorer, self._steps.clock_s)
        if may_explore and stretch is None:
            stretch, propensity = self._next_stretch(weighed)
        if stretch is not None:
            return self._explorer.take(stretch).arm, propensity, "probe"
        is_whole = choice.base in ("none", choice.arm[0], self._steps.drafter)
        # A glance goes on with an interruption as well as it begins one.
        is_whole |= finds and self._steps.drafter in self._kinds.matching and not self._kinds.mixed
        # A mix is planned for every step: which request it drafts for how may change at each.
        if blind[0] == choice.base and is_whole and blind[0] not in self._picker.mixes:
            self._rest.is_resting = True
        return choice.arm, propensity, "goodput" if choice.arm[1] else "plain"

    def _settle(self) -> None:
        """Note what the last plan has chosen. That is for when the device works; nothing is asked
        of the policy before it is done."""
        made, self._steps.made = self._steps.made, None
        if made is None:
            return
        self._note_look()
        basis, seen, choice, _, blind, _ = made.weighed
        look_share = self._rest.look_share if made.looked else 0.0
        self._chooser.take(choice, seen, made.before, look_share * seen.plain_s)
        if made.looked and self._needs_no_look(choice.arm[0]):
            self._forecaster.note_mix(seen)
        if self._rest.is_resting:
            glance = self._glance(basis, choice, blind) if seen.is_whole else None
            self._rest.begin(blind, glance, looked=made.looked, is_interrupted=choice.arm != blind)

    def _glance(self, basis: Basis, choice: Choice, blind: Arm) -> Glance | None:
        """What decides without a plan on steps with a look."""
        if not self._kinds.matching:
            return None
        outline, batch = basis.outline, basis.outline.batch
        own_s = self._switches.seconds(choice.base, 0, batch, outline.plain_s)
        leave_s, back_s = self._chooser.interruption(choice.base, own_s)
        return Glance(
            lambda: self._forecaster.with_matching(outline), batch, choice.speed, blind,
            self._kinds.matching, leave_s=leave_s * (1 - self._rest.lasting), back_s=back_s,
            hopeful=self._acceptance.hopeful_tokens,
        )  # fmt: skip

    def _note_look(self) -> None:
        """Note what the look of the last plan has found."""
        weighed, self._steps.look = self._steps.look, None
        if weighed is None:
            return
        seen = weighed.seen
        if self._kinds.matching:
            self._rest.note_matches(seen.rows, seen.batch, is_planned=True)
        self._rest.note_find(weighed.choice.loss_s(weighed.blind) / seen.plain_s)

    def _needs_no_look(self, drafter: str) -> bool:
        return drafter == "none" or drafter in self._kinds.blind

    def _next_stretch(self, weighed: Weighed) -> tuple[Stretch | None, float]:
        """The stretch under way or one that begins now, and the probability of what is returned."""
        choice = weighed.choice
        left = self._explorer.goes_on(choice, self._times.num_changes)
        if left is not None and choice.has(left.arm):
            return left, 1.0
        stretch, nothing = self._explorer.draw(weighed.options, choice, self._rest.num_since)
        if stretch is not None:
            return stretch, stretch.propensity
        more = self._explorer.more
        may_go_on = self._rest.is_plain or not self._kinds.matching
        if may_go_on and more not in ("none", choice.base) and more in choice.values:
            arm = choice.best_of(more) if self._rest.is_plain else choice.telling(more)
            return Stretch(arm, _MORE_STEPS, nothing), nothing
        return None, nothing
