"""Exploration that is paid for: short stretches of another arm among those of the best.

Idle arms become known, and known arms stay comparable, by interleaving: a stretch of plain steps or
of another drafter between steps of the best arm, on the same traffic. A neural drafter's first step
after others is a catch-up, so single steps of it would never tell what it costs to draft.

A stretch is charged its predicted loss against the best arm when it begins, and afterwards whatever
its catch-up took beyond or below the prediction. It is paid from an account that grows by 0.8 % of
the time spent: exploration costs less than 1 % however bad a drafter is, and an expensive stretch
is postponed, never dropped. So whatever is believed of an idle drafter, evidence keeps coming at a
rate that only its cost bounds, and no belief can lock.
"""

from __future__ import annotations

import random
from collections.abc import Set
from typing import NamedTuple

from policies.choice import Choice
from policies.forecast import PLAIN_ARM, Arm, Forecast

_BUDGET = 0.008
"""Share of the time that stretches may lose."""
_START_STEPS, _MOST_STEPS = 6.0, 12.0
"""Balance of the account at first and at most, in plain steps."""
_STRETCH = 4
"""Steps of a stretch of plain decoding or of an idle neural drafter; for others one is enough."""
_DOUBT = 0.02
"""Standard deviation of the predicted ratio of arms from which on they are compared more often."""
_MOST_HASTE = 8.0
_MOST_EXCESS = 25.0
"""Largest charge of a step beyond its prediction, relative to it; more is a machine's hiccup."""


class Stretch(NamedTuple):
    """Steps of one arm, to be explored."""

    arm: Arm
    num_steps: int
    propensity: float
    """Probability with which exactly this stretch was begun at its first step."""


class Explorer:
    """Decides when to begin a stretch and of what."""

    def __init__(self, explore: float, seed: int, neural: Set[str]) -> None:
        """
        Args:
            explore: share of steps that explore once figures are known.
            neural: kinds of the drafters that must catch up.
        """
        self._explore = explore
        self._neural = neural
        self._rng = random.Random(seed)
        self.account_s: float | None = None
        self._wanted_s = 0.0
        """Loss of the most expensive stretch that was an option of late."""
        self._num_changes = -1

    def earn(self, step_s: float, plain_s: float) -> None:
        """Add a step's share to the account."""
        if self.account_s is None:
            self.account_s = _START_STEPS * plain_s
        most_s = max(_MOST_STEPS * plain_s, self._wanted_s)
        self.account_s = min(self.account_s + _BUDGET * step_s, most_s)

    def check_plain(self, choice: Choice, num_changes: int) -> Stretch | None:
        """A stretch of plain steps, whatever it costs, if something has changed beside drafts.

        Args:
            num_changes: changes of step times so far; the start is one more.
        """
        has_changed, self._num_changes = num_changes != self._num_changes, num_changes
        if not has_changed or choice.base == "none":
            return None
        return Stretch(PLAIN_ARM, _STRETCH, 1.0)

    def settle(self, step_s: float, predicted_s: float) -> None:
        """Charge what a catch-up took beyond its prediction, or return what it did not take."""
        excess_s = min(step_s - predicted_s, _MOST_EXCESS * predicted_s)
        self.account_s = (self.account_s or 0.0) - excess_s

    def draw(
        self, seen: Forecast, choice: Choice, doubt: float, num_steps: int
    ) -> tuple[Stretch | None, float]:
        """A stretch to begin now, or ``None``; and the probability of ``None``.

        Args:
            doubt: standard deviation of the logarithm of the best drafting arm's speed relative to
                its neighbours'.
            num_steps: steps since this was asked last.
        """
        if not self._explore or self.account_s is None:
            return None, 1.0
        haste = min(max(1.0, doubt / _DOUBT), _MOST_HASTE)
        options = self._affordable(seen, choice, haste)
        if not options:
            return None, 1.0
        total = sum(options.values())
        mean_steps = sum(w * self._length(arm, choice) for arm, w in options.items()) / total
        chance = min(self._explore * haste * num_steps / mean_steps, 0.5)
        if self._rng.random() >= chance:
            return None, 1 - chance
        arm = self._rng.choices(list(options), weights=list(options.values()))[0]
        self.account_s -= self._loss_s(arm, choice)
        share = options[arm] / total
        return Stretch(arm, self._length(arm, choice), chance * share), 1 - chance

    def _affordable(self, seen: Forecast, choice: Choice, haste: float) -> dict[Arm, float]:
        """Weights of the stretches that the account can pay for now."""
        (drafter, k), options = choice.arm, {}
        if choice.base != "none":
            options[PLAIN_ARM] = haste
        if k:
            options[drafter, seen.max_k] = 1.0
            options[drafter, min(k + 2, seen.max_k)] = 1.0
            options[drafter, min(k + 1, seen.max_k)] = 2.0
            options[drafter, max(k - 1, 1)] = 2.0
        for idle in seen.seconds.keys() - {drafter}:
            arms = [(idle, k) for k in range(1, seen.max_k + 1)]
            options[max(arms, key=choice.values.__getitem__)] = 2.0
        options.pop(choice.arm, None)
        assert self.account_s is not None
        losses_s = {arm: self._loss_s(arm, choice) for arm in sorted(options)}
        self._wanted_s = max(losses_s.values(), default=0.0)
        return {a: options[a] for a, loss_s in losses_s.items() if loss_s <= self.account_s}

    def _length(self, arm: Arm, choice: Choice) -> int:
        is_idle = arm[0] in self._neural and arm[0] != choice.base
        return _STRETCH if is_idle or arm == PLAIN_ARM else 1

    def _loss_s(self, arm: Arm, choice: Choice) -> float:
        """Seconds that a stretch is predicted to lose; it switches once."""
        num_steps = self._length(arm, choice)
        return choice.loss_s(arm) * num_steps - choice.charges_s[arm[0]] * (num_steps - 1)
