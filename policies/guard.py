"""A floor under any policy: it may draft only while drafting is measurably faster than not to.

Every drafted step is worth its tokens less its time, both per request and in plain steps; plain
decoding is worth 0. The guard lets its policy draft while the lower bound of the mean worth is
above 0, so a policy that is wrong about times or acceptance costs what finding out costs:

- **On.** Now and then a few plain steps are mixed in, because without them nobody knows what a
  plain step takes now. A change detector (Page's CUSUM) watches the worth; when it reports a
  change, what was known before is dropped, and a trial begins.
- **Trial.** At the start, after a swap and after a change, a limited number of drafted steps. It
  ends as soon as the mean is clearly below 0, and with "off" unless the lower bound is above 0.
- **Off.** Plain steps, left by further trials at random times, each failure doubling their mean
  distance, up to a limit: the off state is never for good. The distance is at least so long that
  what the last trial lost is a stated share of the time. Nobody looks at the batch meanwhile.

All randomness is in the propensity of the decisions. A step that continues a trial or a stretch of
plain steps was certain, and says so.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from policies.average import Average
from policies.cusum import Cusum
from policies.interface import (
    CostSample,
    Decision,
    DraftPolicy,
    Outcome,
    PolicyContext,
    StepObs,
    TakesPublished,
    ValuesMatches,
)
from policies.lengths import drafter_for
from policies.live_costs import LiveCosts

_BOUND = 1.0
"""Standard errors between the mean worth and its bounds."""
_GAIN = 0.002
"""Gain of the mean worth: it remembers a thousand steps. Changes are for the detector."""
_LEAST_STEPS = 4
"""Drafted steps from which on a mean is believed at all."""
_LEAST_SD = 0.02
"""Standard deviation of a step's worth that is assumed at least."""
_TRIAL_STEPS = 32
_FIRST_REST, _LONGEST_REST = 64, 2048
"""Mean number of plain steps between trials: at first and at most."""
_PLAIN_CHANCE, _PLAIN_STEPS = 1 / 512, 3
"""How often plain steps are mixed in while drafting pays, and how many."""
_MOST_LOSS = -3.0
"""Least worth of a step that counts: more is a machine's hiccup."""


@dataclass(slots=True)
class _Trial:
    """What is known of a trial beside its steps."""

    lost: float = 0.0
    """Plain steps' worth of time that it has lost so far."""
    chance: float | None = None
    """Probability with which ``rest`` has begun it in the step that is planned now."""


class _Asked(NamedTuple):
    """The note of a decision that the guard's policy made."""

    decision: Decision
    """As the policy made it."""

    def columns(self) -> Mapping[str, float]:
        return self.decision.columns()


class Guard:
    """Implements ``DraftPolicy`` around another one."""

    wants_profile = True

    def __init__(
        self,
        inner: DraftPolicy,
        context: PolicyContext,
        drafter: str,
        probe_share: float = 0.005,
    ) -> None:
        """
        Args:
            drafter: kind of the drafter that ``inner`` uses, as far as one is known.
            probe_share: share of the time that trials may lose while drafting is off.
        """
        self.inner = inner
        self._probe_share = probe_share
        self._costs = LiveCosts(context.drafters, drafter_for(drafter, context), context.max_draft)
        self._rng = random.Random(context.seed + 1)
        self._was_drafting = False
        """The last step observed was drafted: the next one need not catch up."""
        self.num_shifts = self.num_trials = 0
        self._rest_steps = _FIRST_REST
        self._trial = _Trial()
        self._begin()

    def _begin(self) -> None:
        """Nothing is known of the drafter: a few plain steps if need be, then a trial."""
        self._worth = Average(_GAIN)
        self._cusum = Cusum()
        self.is_on = False
        self._trial_left = _TRIAL_STEPS
        self._trial.lost = 0.0
        self._plain_left = 0 if self._costs.is_known else _PLAIN_STEPS
        self._rest_steps = _FIRST_REST

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Take in step times measured at start-up."""
        self._costs.calibrate(samples)
        self.inner.calibrate(samples)
        self._plain_left = 0 if self._costs.is_known else _PLAIN_STEPS

    def rest(self) -> Decision | None:
        """Plain decoding where the policy may not draft; nobody needs to look at the batch then."""
        if self._plain_left:
            self._plain_left -= 1
            return self._plain(1.0, "guard")
        if self.is_on or self._trial_left:
            return None
        chance = 1 / self._rest_steps
        if self._rng.random() >= chance:
            return self._plain(1 - chance, "off")
        self._trial_left, self._trial.lost, self._trial.chance = _TRIAL_STEPS, 0.0, chance
        return None

    def wants_matches(self) -> bool:
        """As the policy says, unless it will not be asked."""
        may_draft = self.is_on or self._trial_left > 0
        return may_draft and not self._plain_left and self.inner.wants_matches()

    def match_values(self, drafter: str) -> list[float] | None:
        """As the policy values them, if it does."""
        inner = self.inner
        return inner.match_values(drafter) if isinstance(inner, ValuesMatches) else None

    def plan(self, obs: StepObs) -> Decision:
        """The policy's decision where it may draft, and plain decoding elsewhere."""
        if self._trial.chance is None and (resting := self.rest()) is not None:
            return resting
        chance, self._trial.chance = self._trial.chance, None
        if chance is not None:
            return self._ask(obs, chance)
        if self.is_on and self._rng.random() < _PLAIN_CHANCE:
            self._plain_left = _PLAIN_STEPS - 1
            inner = self.inner.plan(obs)  # it may have wanted no draft either
            return self._plain(_of_plain(_PLAIN_CHANCE, self.inner, inner), "guard")
        return self._ask(obs, 1 - _PLAIN_CHANCE if self.is_on else 1.0)

    def _plain(self, propensity: float, reason: str) -> Decision:
        return Decision("none", 0, propensity, explore=False, reason=reason, policy=self._kind)

    def _ask(self, obs: StepObs, chance: float) -> Decision:
        """The policy's decision, which it was asked for with this probability."""
        inner = self.inner.plan(obs)
        propensity = chance * inner.propensity
        if not inner.draft_k:
            propensity += 1 - chance  # the guard itself would have decoded plainly
        return inner.asked_for(min(propensity, 1.0), _Asked(inner))

    def observe(self, outcome: Outcome) -> None:
        """Weigh a drafted step, learn the time of a plain one, and pass on what is the policy's."""
        is_drafted = outcome.decision.draft_k > 0
        if not outcome.has_prefill and outcome.step_s > outcome.plan_s:
            if not is_drafted:
                self._costs.observe(0, outcome.batch, outcome.step_s - outcome.plan_s)
            elif self._was_drafting:
                self._weigh(outcome)
                self._judge_trial()
        self._was_drafting = is_drafted
        if isinstance(asked := outcome.decision.note, _Asked):
            self.inner.observe(replace(outcome, decision=asked.decision))

    def _weigh(self, outcome: Outcome) -> None:
        # With the time of planning, which plain decoding does without.
        seconds = outcome.step_s / self._costs.plain_s(outcome.batch)
        worth = max(outcome.rows.tokens_each - seconds, _MOST_LOSS)
        self._trial.lost -= worth
        expected = self._worth.mean if self._worth.num >= _LEAST_STEPS else worth
        self._worth.add(worth)
        if self._cusum.notices_shift(worth - expected, 1):
            self.num_shifts += 1
            self._worth = Average(_GAIN)
            self.is_on, self._trial_left, self._trial.lost = False, _TRIAL_STEPS, 0.0
            self._rest_steps = _FIRST_REST
        elif self.is_on and self._bounds()[0] < 0:
            self.is_on = False
            self._rest_steps = _FIRST_REST

    def _judge_trial(self) -> None:
        """Count a step of a trial, and end one that has failed or that is over."""
        if not self._trial_left:
            return
        self._trial_left -= 1
        low, high = self._bounds()
        if self._trial_left and high > 0:
            return
        self._trial_left = 0
        self.is_on = low > 0
        self.num_trials += 1
        if not self.is_on:
            earned_after = math.ceil(self._trial.lost / self._probe_share)
            self._rest_steps = max(min(2 * self._rest_steps, _LONGEST_REST), earned_after)
            # A later trial judges by its own steps, in case things have changed meanwhile.
            self._worth = Average(_GAIN)

    def _bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the mean worth."""
        worth = self._worth
        if worth.num < _LEAST_STEPS:
            return -math.inf, math.inf
        error = _BOUND * math.sqrt(max(worth.variance, _LEAST_SD**2) / worth.weight)
        return worth.mean - error, worth.mean + error

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Other weights: a trial tells whether they pay."""
        self.inner.on_swap(drafter, version, calibration)
        self._begin()

    @property
    def _kind(self) -> str:
        return str(getattr(self.inner, "kind", type(self.inner).__name__))

    def refused(self, drafter: str) -> str | None:
        """As the policy says, if networks are published for it."""
        inner = self.inner
        return inner.refused(drafter) if isinstance(inner, TakesPublished) else None

    def figures(self) -> dict[str, Any]:
        """The policy's, and under ``guard`` its own. JSON-ready."""
        low, high = self._bounds()
        guard = {
            "is_on": self.is_on,
            "worth": round(self._worth.mean, 4),
            "bounds": None if math.isinf(low) else [round(low, 4), round(high, 4)],
            "trials": self.num_trials,
            "shifts": self.num_shifts,
            "rest_steps": self._rest_steps,
        }
        return self.inner.figures() | {"guard": guard}


def _of_plain(chance: float, inner: DraftPolicy, decision: Decision) -> float:
    """Probability of a plain step that the guard has chosen, or else the policy might have."""
    own = decision.propensity if not decision.draft_k else getattr(inner, "plain_chance", 0.0)
    return float(min(chance + (1 - chance) * own, 1.0))
