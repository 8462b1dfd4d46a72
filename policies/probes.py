"""Exploration that is paid for: short stretches of another arm among those of the best.

Idle arms become known, and known arms stay comparable, by interleaving: a stretch of plain steps or
of another drafter between steps of the best arm, on the same traffic. A neural drafter's first step
after others is a catch-up, so single steps of it would never tell what it costs to draft.

A stretch is charged its predicted loss against the best arm when it begins, and afterwards whatever
it took beyond or below the prediction; beside plain decoding, a stretch of a drafter that must
catch up is *on trial* instead and charged by what it does lose. The ledger pays, so exploration
costs no more than it allows, however bad a drafter is. Whatever is believed of an idle drafter,
evidence keeps coming at a rate that only its cost bounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from policies.choice import Choice
from policies.forecast import PLAIN_ARM, Arm, Forecast
from policies.ledger import Ledger, Purpose

_LEAST_STRETCH, _USUAL_STRETCH, _MOST_STRETCH = 2, 6, 32
"""Steps of a stretch of plain decoding or of an idle drafter on the device; for others one is
enough. It is longer where the arm loses less than the switch costs: arms that are nearly as good as
the best are the hardest to tell from it, and cost the least. It is shorter where a step loses much.
"""
_TRIAL_STEPS = 8
"""Least steps of a drafter on the device where plain decoding is the base: the first one says
nothing of the others' time, and step times that are far off take four surprises in a row to be
given up. A stretch that loses too much is ended."""
_MUCH_STEPS = 3.0
"""Plain steps that a stretch may lose before it is shortened, or ended if it was not foreseen."""
_TRIAL_LOSS, _TRIED_STEPS = 2.0, 64
"""Plain steps that a trial beside another drafter may lose before it is over, and its most steps:
while it loses hardly anything it goes on, because rounds scatter more than drafters differ."""
_OWED_STEPS = 4.0
"""Steps of plain decoding, or of what its arm is believed to lose, that a stretch leaves owed."""
_ADVANCED_STEPS = 2.0
"""Plain steps that a trial beside another drafter leaves owed at most, and that one after a change
of the traffic may owe before it has begun. More would keep a server silent that then turns out to
be faster by plain decoding, which earns less."""
_FEW_KEPT = 0.25
"""Draft tokens of a request, in a step, below which a trial beside plain decoding need not go on
once its drafts have lost what coming back to them took. Whatever drafts take, so few hardly pay;
where more are kept, it is their time that may be believed wrongly, and one step tells little of
that."""
_GAINED_STEPS = 3.0
"""Plain steps to which what a trial gains lifts the account: enough to try the others."""
_MOST_LOST = 2.0
"""Largest loss of a step that counts against its stretch, in plain steps."""
_WORTH_MORE, _WORTH_SHARE = 1.0, 0.05
"""Plain steps' worth of time that a stretch must have saved to be continued at no charge, and the
share of its steps that this must be: what scatters adds up to a plain step now and then."""
_DOUBT = 0.02
"""Standard deviation of the predicted ratio of arms from which on they are compared more often."""
_DOUBT_STEPS = 8
_MOST_HASTE = 8.0
_MOST_EXCESS = 25.0
"""Largest charge of a step beyond its prediction, relative to it; more is a machine's hiccup."""


_LEAST_RELATIVE = 0.1
"""Least relative speed of plain decoding that counts there."""
_MOST_CHEAP = 4.0
"""Largest factor by which a trial beside another drafter is likelier for costing little."""
_OTHER = 2.0
"""Weight of a drafter that is not in use."""
_LENGTH, _ARM = Purpose.LENGTH, Purpose.ARM  # a member of an enum is found slowly in its class


class Stretch(NamedTuple):
    """Steps of one arm, to be explored."""

    arm: Arm
    num_steps: int
    propensity: float
    """Probability with which exactly this stretch was begun at its first step."""


class Option(NamedTuple):
    """A stretch that could begin."""

    arm: Arm
    weight: float
    num_steps: int
    purpose: Purpose
    """That pays for it."""
    usual_steps: int = 0
    """Those that it is mostly over after, if fewer; 0: all."""


Priced = tuple[Option, float]
"""With the seconds that it is predicted to lose; it switches once."""


@dataclass(slots=True)
class _Gain:
    """What the stretch under way, or the last one, has brought."""

    most_lost: float = _MUCH_STEPS
    """Plain steps that it may lose."""
    drafter: str = "none"
    """See ``Explorer.more``."""
    steps: float = 0.0
    """Plain steps' worth of time that it has saved since it caught up,"""
    num: int = 0
    """and steps in which it has."""
    lost: float = 0.0
    """Plain steps' worth of time that it has lost unforeseen."""
    least_steps: float = math.inf
    """Steps after which it is over if its drafts keep next to nothing,"""
    num_played: int = 0
    """those that are known,"""
    kept: float = 0.0
    """and what a request has kept of their drafts."""


class Explorer:
    """Decides when to begin a stretch and of what."""

    def __init__(
        self,
        explore: float,
        seed: int,
        on_device: Set[str],
        ledger: Ledger,
        *,
        tries_beside: bool = False,
    ) -> None:
        """
        Args:
            explore: share of steps that explore once figures are known.
            on_device: kinds of the drafters that must catch up.
            ledger: pays.
            tries_beside: beside a drafter, stretches of another one that must catch up are on
                trial, too. They go on without plans, so it is for servers that look nothing up.
        """
        self._tries_beside = tries_beside
        self._explore = explore
        self._on_device = on_device
        self._ledger = ledger
        self._rng = random.Random(seed)
        self.under_way: Stretch | None = None
        """What is left of the stretch that was begun last."""
        self._most_owed_s = 0.0
        """What a stretch may leave to be earned: beyond what is believed of its arm, its loss was a
        passing disturbance, after which nothing is to be silent for long."""
        self._num_changes = -1
        self._was_slow = self._was_late = False
        self._haste, self._num_draws = 1.0, 0
        self._gain = _Gain()

    def take(self, stretch: Stretch) -> Stretch:
        """Play a step of a stretch; what is left of it is under way."""
        left = stretch.num_steps - 1
        self.under_way = stretch._replace(num_steps=left) if left > 0 else None
        return stretch

    def goes_on(self, choice: Choice, num_changes: int) -> Stretch | None:
        """The stretch under way, unless it has cost much more than predicted, or step times have
        changed: then it ends, and beside drafts a stretch of plain steps begins, whatever it costs.

        Args:
            num_changes: changes of step times so far; the start is one more.
        """
        left, self.under_way = self.under_way, None
        has_changed, self._num_changes = num_changes != self._num_changes, num_changes
        if not has_changed:
            return None if self._is_over else left
        return None if choice.base == "none" else Stretch(PLAIN_ARM, _USUAL_STRETCH, 1.0)

    def note_gain(
        self,
        drafter: str,
        num_steps: float,
        plain_s: float,
        *,
        on_trial: bool,
        catches_up: bool,
        kept: float = math.inf,
        on_time: float | None = None,
        is_late: bool = False,
    ) -> None:
        """A step of a stretch has saved so many plain steps' worth of time, or lost them: beside
        the base and what interrupts it if it is on trial, otherwise beside plain decoding.

        Args:
            on_trial: the stretch was charged nothing when it began; what its steps gain and lose
                is.
            kept: draft tokens of a request that it has kept.
            on_time: what it has saved if lateness is left out. The stretch is judged and charged by
                that, but for a step that catches up and the second late step in a row: by then it
                is what the arm costs. ``None``: as ``num_steps``.
        """
        self._gain.num_played += 1
        self._gain.kept += kept
        was_late, self._was_late = self._was_late, is_late
        if not (on_time is None or catches_up or (is_late and was_late)):
            num_steps = on_time
        if not catches_up:  # what that took is spent, whether the stretch goes on or not
            self._gain.steps += max(num_steps, -_MOST_LOST)
            self._gain.num += 1
            is_worth = self._gain.steps > max(_WORTH_MORE, _WORTH_SHARE * self._gain.num)
            if on_trial and self._gain.most_lost == _TRIAL_LOSS:
                is_worth = self._gain.steps > -_TRIAL_LOSS / 2 and self._gain.num < _TRIED_STEPS
            self._gain.drafter = drafter if is_worth else "none"
        if on_trial:
            self._gain.lost = -self._gain.steps
            is_slow = num_steps < -_MOST_LOST
            # One step may be late; a second one is what the arm costs, and so is catching up.
            most = _MOST_EXCESS if catches_up or (is_slow and self._was_slow) else _MOST_LOST
            self._was_slow = is_slow
            cost_s = -max(num_steps, -most) * plain_s
            most_s = _GAINED_STEPS * plain_s
            self._ledger.charge(Purpose.ARM, cost_s, most_owed=self._most_owed_s, most=most_s)

    @property
    def more(self) -> str:
        """The drafter of which more may follow at no charge: its last stretch has paid for itself,
        whatever was predicted. ``none`` if there is none.

        Estimates that remember a long time without use would take many stretches to follow.
        """
        return self._gain.drafter

    def goes_on_unplanned(self, num_changes: int) -> bool:
        """Whether a stretch may go on without a plan, which would cost as much as its steps."""
        return num_changes == self._num_changes and not self._is_over

    @property
    def _is_over(self) -> bool:
        """The stretch under way costs more than was foreseen, or has shown what it was to show."""
        own = self._gain
        if own.lost > own.most_lost:
            return True
        if own.least_steps == math.inf:
            return False
        if own.drafter != "none":
            return True
        return own.num_played >= own.least_steps and own.kept < _FEW_KEPT * own.num_played

    def settle(
        self, step_s: float, predicted_s: float, plain_s: float, *, catches_up: bool, is_own: bool
    ) -> None:
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
        if not catches_up:
            self._gain.lost += excess_s / plain_s
        owed_s = -self._ledger.balance(Purpose.ARM)
        most_owed_s = max(owed_s, predicted_s) if is_own else math.inf
        self._ledger.charge(Purpose.ARM, excess_s, most_owed=most_owed_s)

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

    def draw(
        self, options: Sequence[Priced], choice: Choice, num_since: int
    ) -> tuple[Stretch | None, float]:
        """A stretch to begin now, or ``None``; and the probability of ``None``.

        Args:
            options: those of this choice.
            num_since: steps since this was asked last.
        """
        if not self._explore or not self._ledger.is_open:
            return None, 1.0
        self._num_draws += 1
        own_s, other_s = self._ledger.balance(_LENGTH), self._ledger.balance(_ARM)
        affordable: list[Priced] = []
        total = weighted_steps = wanted_s = 0.0
        for priced in options:
            (_, weight, num_steps, purpose, usual_steps), loss_s = priced
            if loss_s > wanted_s:
                wanted_s = loss_s
            if loss_s <= (own_s if purpose is _LENGTH else other_s):
                affordable.append(priced)
                total += weight
                weighted_steps += weight * (usual_steps or num_steps)
        self._ledger.wanted_s = wanted_s
        if not affordable:
            return None, 1.0
        mean_steps = weighted_steps / total
        chance = self._explore * self._haste * num_since / mean_steps
        if choice.base == "none" and self._tries_beside:
            # What is saved brings nothing while it is not spent.
            most_s = max(loss_s for _, loss_s in affordable)
            chance *= other_s / max(most_s, 1e-9)
        chance = min(chance, 0.5)
        if self._rng.random() >= chance:
            return None, 1 - chance
        at, reached = self._rng.random() * total, 0.0
        for priced in affordable:
            reached += priced[0].weight
            if at < reached:
                break
        one, loss_s = priced
        return self._begin(one, loss_s, choice, chance * one.weight / total), 1 - chance

    def trial(self, arm: Arm, choice: Choice, *, owes: bool | None = None) -> Stretch | None:
        """A stretch of an arm that is begun without a draw; ``None``: nothing is explored, or it
        cannot be afforded.

        Args:
            owes: the account may owe a little after it; otherwise it must be paid for. ``None``:
                its weights have changed: what stretches of the former ones owe is forgotten, and
                this one may cost what it does.
        """
        if not self._explore or not self._ledger.is_open:
            return None
        if owes is None:
            self._ledger.forgive(Purpose.ARM)
        one, loss_s = self._priced(arm, 1.0, _ARM, choice, choice.loss_s(arm))
        least_s = loss_s - (_ADVANCED_STEPS * choice.plain_s if owes else 0.0)
        if owes is not None and not self._ledger.affords(Purpose.ARM, least_s):
            return None
        return self._begin(one, loss_s, choice, 1.0, is_whole=owes is None)

    def draws_match(self, loss_s: float, num_since: int) -> tuple[bool, float]:
        """Whether to draft at a match that is believed not to be worth it, and the probability of
        what is returned.

        Args:
            loss_s: seconds that it is predicted to lose.
            num_since: steps since the last look.
        """
        if not self._explore or self._ledger.balance(Purpose.MATCH) < loss_s:
            return False, 1.0
        chance = min(self._explore * max(num_since, 1), 0.5)
        if self._rng.random() >= chance:
            return False, 1 - chance
        self._ledger.charge(Purpose.MATCH, loss_s)
        return True, chance

    def _begin(
        self,
        one: Option,
        loss_s: float,
        choice: Choice,
        propensity: float,
        *,
        is_whole: bool = False,
    ) -> Stretch:
        if self._is_on_trial(one.arm, choice):
            self._most_owed_s = _OWED_STEPS * max(choice.plain_s, choice.loss_s(one.arm))
            if choice.base != "none":
                self._most_owed_s = _ADVANCED_STEPS * choice.plain_s
        else:
            self._ledger.charge(one.purpose, loss_s)
        is_beside = choice.base != "none" and self._tries_beside
        least = math.inf if is_whole or not one.usual_steps else one.usual_steps
        most = _TRIAL_LOSS if is_beside else _MUCH_STEPS
        self._gain = _Gain(most, least_steps=least)
        return Stretch(one.arm, one.num_steps, propensity)

    def options(
        self, seen: Forecast, choice: Choice, *, num_steps: int = 1, begin_s: float = 0.0
    ) -> list[Priced]:
        """The stretches that could begin, whatever they lose, in the order of their arms; nothing
        changes.

        Args:
            num_steps: of a stretch of the base at another K.
            begin_s: seconds that it takes to begin and to end.
        """
        (drafter, k), base, speed, values, _, _, _ = choice
        most, on_device = values[drafter][k], self._on_device
        found: list[Priced] = []
        for kind in sorted(values):
            by_k = values[kind]
            if kind == "none":
                if k:
                    loss_s = (most - by_k[0]) / speed
                    weight = self._haste
                    if self._tries_beside:
                        weight *= _relative(by_k[0], speed * choice.plain_s) ** 2
                    found.append(self._priced(PLAIN_ARM, weight, _ARM, choice, loss_s))
            elif kind == drafter == base:
                step_s = num_steps / speed
                for one, at in _lengths(kind, k, seen.max_k, num_steps):
                    found.append((one, (most - by_k[at]) * step_s + begin_s))
            elif kind == drafter:
                for one, at in _lengths(kind, k, seen.max_k, 1):
                    loss_s = (most - by_k[at]) / speed
                    if kind in on_device:
                        found.append(self._priced(one.arm, one.weight, _LENGTH, choice, loss_s))
                    else:
                        found.append((one, loss_s))
            else:
                best = max(by_k)
                at, loss_s = by_k.index(best), (most - best) / speed
                if kind != base and kind in on_device:
                    if base == "none" or self._tries_beside:
                        at = choice.telling(kind)[1]
                        loss_s = (most - by_k[at]) / speed
                    found.append(self._priced((kind, at), _OTHER, _ARM, choice, loss_s))
                else:
                    found.append((_other(kind, at), loss_s))
        return found

    def is_on_trial(self, drafter: str, base: str) -> bool:
        """Whether a step of a stretch of this drafter is charged by what it loses."""
        if base != "none" and not self._tries_beside:
            return False
        return drafter != base and drafter in self._on_device

    def _is_on_trial(self, arm: Arm, choice: Choice) -> bool:
        return self.is_on_trial(arm[0], choice.base)

    def _priced(
        self, arm: Arm, weight: float, purpose: Purpose, choice: Choice, first_s: float
    ) -> Priced:
        """A stretch of plain decoding or of a drafter that is not the base, with its steps and what
        it is predicted to lose: it switches once.

        What is charged by what it does lose counts as at most a plain step: a prediction that is
        far too high would postpone for thousands of steps the only thing that can correct it.

        Args:
            first_s: what its first step loses.
        """
        on_trial = self._is_on_trial(arm, choice)
        switch_s = choice.charges_s[arm[0]]
        step_s = max(first_s - switch_s, switch_s / _MOST_STRETCH, 1e-9)
        least, num_steps = (_TRIAL_STEPS,) * 2 if on_trial else (_LEAST_STRETCH, _USUAL_STRETCH)
        if on_trial and choice.base != "none":
            weight *= min(choice.plain_s / max(first_s, 1e-9), _MOST_CHEAP)
            return Option(arm, weight, _TRIAL_STEPS, purpose), min(first_s, choice.plain_s)
        if (other := round(switch_s / step_s)) > num_steps:
            num_steps = min(other, _MOST_STRETCH)
        if (most := round(_MUCH_STEPS * choice.plain_s / step_s)) < num_steps:
            num_steps = max(most, least)
        if on_trial and self._tries_beside:
            usual = min(max(other, 1), num_steps)
            loss_s = min(first_s * usual - switch_s * (usual - 1), choice.plain_s)
            return Option(arm, weight, num_steps, purpose, usual), loss_s
        loss_s = first_s * num_steps - switch_s * (num_steps - 1)
        if on_trial:
            loss_s = min(loss_s, choice.plain_s)
        return Option(arm, weight, num_steps, purpose), loss_s


def _relative(value: float, reached: float) -> float:
    """Speed of plain decoding relative to the base's: the slower it is, the less there is to be
    known of it.

    Args:
        value: of a plain step, see ``Choice``.
        reached: tokens that the base makes in its time.
    """
    return min(max(1 + value / reached, _LEAST_RELATIVE), 1.0) if reached > 0 else 1.0


@cache
def _lengths(drafter: str, k: int, most_k: int, num_steps: int) -> tuple[tuple[Option, int], ...]:
    """Other K of the drafter in use that are worth a try, as options and as numbers."""
    weights = {most_k: 1.0, min(k + 2, most_k): 1.0}
    weights |= {min(k + 1, most_k): 2.0, max(k - 1, 1): 2.0}
    others = sorted(weights.keys() - {k})
    return tuple((Option((drafter, one), weights[one], num_steps, _LENGTH), one) for one in others)


@cache
def _other(drafter: str, k: int) -> Option:
    """A step of a drafter that is not in use."""
    return Option((drafter, k), _OTHER, 1, _ARM)
