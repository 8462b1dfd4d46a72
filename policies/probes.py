"""Exploration that is paid for: short stretches of another arm among those of the best.

Idle arms become known, and known arms stay comparable, by interleaving: a stretch of plain steps or
of another drafter between steps of the best arm, on the same traffic. A neural drafter's first step
after others is a catch-up, so single steps of it would never tell what it costs to draft.

A stretch is charged its predicted loss against the best arm when it begins, and afterwards whatever
it took beyond or below the prediction. It is paid from accounts that grow by a share of the time
spent, 0.8 % while drafting pays and otherwise what settings state: exploration costs no more,
however bad a drafter is, and an expensive stretch is postponed, never dropped. Another K of the
drafter in use is cheap and wanted often, and would leave nothing to compare drafting with plain
decoding, so it has an account of its own. Whatever is believed of an idle drafter, evidence keeps
coming at a rate that only its cost bounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Set
from typing import NamedTuple

from policies.choice import Choice
from policies.forecast import PLAIN_ARM, Arm, Forecast

_BUDGET = 0.008
"""Share of the time that stretches may lose while drafting pays."""
_START_STEPS, _MOST_STEPS = 3.0, 12.0
"""Balance of each account at first and at most, in plain steps."""
_LEAST_STRETCH, _USUAL_STRETCH, _MOST_STRETCH = 2, 6, 32
"""Steps of a stretch of plain decoding or of an idle neural drafter; for others one is enough. It
is longer where the arm loses less than the switch costs: arms that are nearly as good as the best
are the hardest to tell from it, and cost the least. It is shorter where a step loses much."""
_TRIAL_STEPS = 8
"""Least steps of a neural drafter where plain decoding is the base: the first one says nothing of
the others' time, and step times that are far off take four surprises in a row to be given up. A
stretch that loses too much is ended."""
_MUCH_STEPS = 3.0
"""Plain steps that a stretch may lose before it is shortened, or ended if it was not foreseen."""
_OWED_STEPS = 4.0
"""Steps of plain decoding, or of what its arm is believed to lose, that a stretch leaves owed."""
_MOST_LOST = 2.0
"""Largest loss of a step that counts against its stretch, in plain steps."""
_WORTH_MORE = 1.0
"""Plain steps' worth of time that a stretch must have saved to be continued at no charge."""
_DOUBT = 0.02
"""Standard deviation of the predicted ratio of arms from which on they are compared more often."""
_DOUBT_STEPS = 8
_MOST_HASTE = 8.0
_MOST_EXCESS = 25.0
"""Largest charge of a step beyond its prediction, relative to it; more is a machine's hiccup."""


class Stretch(NamedTuple):
    """Steps of one arm, to be explored."""

    arm: Arm
    num_steps: int
    propensity: float
    """Probability with which exactly this stretch was begun at its first step."""


class _Option(NamedTuple):
    """A stretch that could begin."""

    arm: Arm
    weight: float
    num_steps: int
    loss_s: float
    """Seconds that it is predicted to lose; it switches once."""


class Explorer:
    """Decides when to begin a stretch and of what."""

    def __init__(
        self, explore: float, seed: int, neural: Set[str], plain_budget: float = _BUDGET
    ) -> None:
        """
        Args:
            explore: share of steps that explore once figures are known.
            neural: kinds of the drafters that must catch up.
            plain_budget: share of the time that stretches may lose while drafting does not pay.
        """
        self._explore = explore
        self._plain_budget = plain_budget
        self._neural = neural
        self._rng = random.Random(seed)
        self.accounts_s: dict[bool, float] = {}
        """Balances: of stretches of the drafter in use (True) and of others (False)."""
        self._wanted_s = 0.0
        """Loss of the most expensive stretch that was an option of late."""
        self._most_owed_s = 0.0
        """What a stretch may leave to be earned: beyond what is believed of its arm, its loss was a
        passing disturbance, after which nothing is to be silent for long."""
        self._num_changes = -1
        self._was_slow = False
        self._haste, self._num_draws = 1.0, 0
        self._gained = "none"
        self._gain_steps = 0.0
        """Plain steps' worth of time that the stretch under way, or the last one, has saved."""

    def earn(self, step_s: float, plain_s: float, *, is_drafted: bool) -> None:
        """Add a step's share to the accounts; one in which nothing was drafted is for others."""
        if not self.accounts_s:
            self.accounts_s = dict.fromkeys((True, False), _START_STEPS * plain_s)
        most_s = max(_MOST_STEPS * plain_s, self._wanted_s)
        half = _BUDGET / 2
        shares = {True: half, False: half} if is_drafted else {False: self._plain_budget}
        for is_own, share in shares.items():
            grown_s = self.accounts_s[is_own] + share * step_s
            self.accounts_s[is_own] = min(grown_s, most_s)

    def goes_on(self, left: Stretch | None, choice: Choice, num_changes: int) -> Stretch | None:
        """The stretch under way, unless it has cost much more than predicted, or step times have
        changed: then it ends, and beside drafts a stretch of plain steps begins, whatever it costs.

        Args:
            num_changes: changes of step times so far; the start is one more.
        """
        has_changed, self._num_changes = num_changes != self._num_changes, num_changes
        if not has_changed:
            return None if self._is_dear(choice.plain_s) else left
        return None if choice.base == "none" else Stretch(PLAIN_ARM, _USUAL_STRETCH, 1.0)

    def note_gain(
        self,
        drafter: str,
        num_steps: float,
        plain_s: float,
        *,
        is_charged: bool,
        catches_up: bool,
    ) -> None:
        """A step of a stretch has saved so many plain steps' worth of time, or lost them.

        Args:
            is_charged: the stretch was charged nothing when it began, because plain decoding is the
                base; what its steps gain and lose is.
        """
        self._gain_steps += max(num_steps, -_MOST_LOST)
        self._gained = drafter if self._gain_steps > _WORTH_MORE else "none"
        if is_charged:
            is_slow = num_steps < -_MOST_LOST
            # One step may be late; a second one is what the arm costs, and so is catching up.
            most = _MOST_EXCESS if catches_up or (is_slow and self._was_slow) else _MOST_LOST
            self._was_slow = is_slow
            left_s = self.accounts_s[False] + max(num_steps, -most) * plain_s
            self.accounts_s[False] = max(left_s, -self._most_owed_s)

    @property
    def more(self) -> Arm:
        """The arm of which more may follow at no charge: the last stretch of its drafter has paid
        for itself, whatever was predicted. Plain decoding if there is none.

        Estimates that remember a long time without use would take many stretches to follow.
        """
        return PLAIN_ARM if self._gained == "none" else (self._gained, 1)

    def goes_on_unplanned(self, plain_s: float, num_changes: int) -> bool:
        """Whether a stretch may go on without a plan, which would cost as much as its steps."""
        return num_changes == self._num_changes and not self._is_dear(plain_s)

    def _is_dear(self, plain_s: float) -> bool:
        return bool(self.accounts_s) and self.accounts_s[False] < -_MUCH_STEPS * plain_s

    def settle(self, step_s: float, predicted_s: float, *, catches_up: bool, is_own: bool) -> None:
        """Charge what an explored step took beyond its prediction, or return what it did not take.

        What another K of the drafter in use takes longer leaves little owed: mostly the machine is
        slow, or the drafter itself.

        Ordinary steps only count if two in a row took twice as long: one may be late, and the
        scatter of the others would move the account more than their losses.
        """
        was_slow, self._was_slow = self._was_slow, step_s > 2 * predicted_s
        if not catches_up and not (was_slow and self._was_slow):
            return
        excess_s = min(step_s - predicted_s, _MOST_EXCESS * predicted_s)
        account_s = self.accounts_s[False]
        least_s = min(account_s, -predicted_s) if is_own else -math.inf
        self.accounts_s[False] = max(account_s - excess_s, least_s)

    @property
    def wants_doubt(self) -> bool:
        """``note_doubt`` should be called before the next draw. That takes time, so it is not for
        every draw."""
        return self._num_draws % _DOUBT_STEPS == 0

    def note_doubt(self, doubt: float) -> None:
        """Explore the more often the less certain the best drafting arm is.

        Args:
            doubt: standard deviation of the logarithm of its speed relative to its neighbours'.
        """
        self._haste = min(max(1.0, doubt / _DOUBT), _MOST_HASTE)

    def draw(self, seen: Forecast, choice: Choice, num_steps: int) -> tuple[Stretch | None, float]:
        """A stretch to begin now, or ``None``; and the probability of ``None``.

        Args:
            num_steps: steps since this was asked last.
        """
        if not self._explore or not self.accounts_s:
            return None, 1.0
        self._num_draws += 1
        options = self._affordable(seen, choice)
        if not options:
            return None, 1.0
        total = sum(one.weight for one in options)
        mean_steps = sum(one.weight * one.num_steps for one in options) / total
        chance = min(self._explore * self._haste * num_steps / mean_steps, 0.5)
        if self._rng.random() >= chance:
            return None, 1 - chance
        one = self._rng.choices(options, weights=[one.weight for one in options])[0]
        return self._begin(one, choice, chance * one.weight / total), 1 - chance

    def trial(self, arm: Arm, choice: Choice) -> Stretch | None:
        """A stretch of an arm whose weights have changed, begun without a draw; ``None``: nothing
        is explored. What stretches of the former weights owe is forgotten."""
        if not self._explore or not self.accounts_s:
            return None
        self.accounts_s[False] = max(self.accounts_s[False], 0.0)
        return self._begin(self._option(arm, 1.0, choice), choice, 1.0)

    def _begin(self, one: _Option, choice: Choice, propensity: float) -> Stretch:
        if self._is_charged_later(one.arm, choice):
            self._most_owed_s = _OWED_STEPS * max(choice.plain_s, choice.loss_s(one.arm))
        else:
            self.accounts_s[_is_own(one.arm, choice)] -= one.loss_s
        self._gain_steps, self._gained = 0.0, "none"
        return Stretch(one.arm, one.num_steps, propensity)

    def _affordable(self, seen: Forecast, choice: Choice) -> list[_Option]:
        """The stretches that can be paid for now."""
        (drafter, k), options = choice.arm, {}
        if choice.base != "none":
            options[PLAIN_ARM] = self._haste
        if k:
            options[drafter, seen.max_k] = 1.0
            options[drafter, min(k + 2, seen.max_k)] = 1.0
            options[drafter, min(k + 1, seen.max_k)] = 2.0
            options[drafter, max(k - 1, 1)] = 2.0
        for idle in seen.seconds.keys() - {drafter}:
            arms = [(idle, k) for k in range(1, seen.max_k + 1)]
            options[max(arms, key=choice.values.__getitem__)] = 2.0
        options.pop(choice.arm, None)
        found = [self._option(arm, options[arm], choice) for arm in sorted(options)]
        self._wanted_s = max((one.loss_s for one in found), default=0.0)
        return [one for one in found if one.loss_s <= self.accounts_s[_is_own(one.arm, choice)]]

    def is_charged_later(self, drafter: str) -> bool:
        """Beside plain decoding, a stretch of this drafter is charged by what it loses."""
        return drafter in self._neural

    def _is_charged_later(self, arm: Arm, choice: Choice) -> bool:
        return choice.base == "none" and self.is_charged_later(arm[0])

    def _length(self, arm: Arm, choice: Choice) -> int:
        is_idle = arm[0] in self._neural and arm[0] != choice.base
        if not is_idle and arm != PLAIN_ARM:
            return 1
        switch_s = choice.charges_s[arm[0]]
        step_s = max(choice.loss_s(arm) - switch_s, switch_s / _MOST_STRETCH, 1e-9)
        least = _TRIAL_STEPS if self._is_charged_later(arm, choice) else _LEAST_STRETCH
        longest = max(least, round(_MUCH_STEPS * choice.plain_s / step_s))
        usual = max(_USUAL_STRETCH, least)
        return min(max(usual, round(switch_s / step_s)), longest, _MOST_STRETCH)

    def _option(self, arm: Arm, weight: float, choice: Choice) -> _Option:
        """A stretch of an arm, with what it is predicted to lose: it switches once.

        What is charged by what it does lose counts as at most a plain step: a prediction that is
        far too high would postpone for thousands of steps the only thing that can correct it.
        """
        num_steps = self._length(arm, choice)
        loss_s = choice.loss_s(arm) * num_steps - choice.charges_s[arm[0]] * (num_steps - 1)
        if self._is_charged_later(arm, choice):
            loss_s = min(loss_s, choice.plain_s)
        return _Option(arm, weight, num_steps, loss_s)


def _is_own(arm: Arm, choice: Choice) -> bool:
    return arm[1] > 0 and arm[0] == choice.arm[0]
