"""The arm to play, with the price of changing arms.

A neural drafter is fast as long as it drafts in every step; coming back to it costs a catch-up. So
one way to decode is the *base*, plain decoding or a drafter on the device, chosen by its speed over
the usual mix of matches, and other arms interrupt it where they gain more in this step than
returning to the base will cost. Comparing arms step by step instead loses the catch-ups: an index
that is a little better at every other step makes the whole slower than the drafter alone.

Arms of one step are compared by tokens minus seconds times the speed reached so far, so that the
quotient of all tokens and all seconds grows (Dinkelbach 1967), not the mean of quotients of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from operator import sub
from typing import NamedTuple

from policies.forecast import PLAIN_ARM, Arm, Forecast, Outline

_HYSTERESIS = 1.01
"""Predicted speed relative to the base that another drafter on the device needs to replace it."""
_RIVAL = 1.03
"""Speed of plain decoding with an index relative to the base that it needs to replace it."""
_STAY_STEPS = 64.0
"""Steps that a base is assumed to stay: it must earn its catch-up back in these."""
_DOUBT = 1.0
"""Standard deviations by which a drafter must be slower than plain decoding to be left for it."""
_TELLING = 0.1
"""Share by which a trial may lose more than with a drafter's best K, to tell of longer ones."""
_RATE_GAIN = 0.02
"""Gain of moving averages over steps."""
_MOST_SAVED = 0.9
"""Largest share of their time that steps are believed to have saved."""


class Footing(NamedTuple):
    """What a choice rests on and what does not depend on the requests of the step, so that it can
    be computed before these are known."""

    base: str
    alone: float
    """Tokens per second of the base without its interruptions,"""
    speed: float
    """and with them."""
    plain: float
    """Tokens per second of plain decoding."""
    charges_s: dict[str, float]
    """Seconds of switching, by drafter."""
    plain_worth: float
    """Tokens that this speed makes in a plain step, switching included."""
    worth: dict[str, list[float]]
    """[K + 1] by drafter that may propose: in a step of its arms. Infinite at 0, which no drafter
    has."""
    on_device: Set[str]
    """Drafters among these that must catch up."""


class Choice(NamedTuple):
    """The best arm of a step, and what others would lose against it."""

    arm: Arm
    base: str
    speed: float
    """Tokens per second reached with the base and its interruptions."""
    values: dict[str, list[float]]
    """[K + 1] by drafter: tokens of each arm, less what this speed makes in its seconds, switching
    included. That of plain decoding is the only one of ``none``; no other drafter has one at 0."""
    charges_s: dict[str, float]
    """Seconds of switching in these, by drafter."""
    plain_s: float
    """Seconds of a plain step."""
    alone: float
    """Tokens per second of the base without its interruptions."""

    @property
    def best_draft(self) -> Arm:
        """The best arm that drafts; plain decoding if none can."""
        if self.arm[1]:
            return self.arm
        return best_of(self.values, lambda drafter: drafter != "none") or PLAIN_ARM

    def best_of(self, drafter: str) -> Arm:
        """The best arm of a drafter that can propose now."""
        by_k = self.values[drafter]
        return drafter, by_k.index(max(by_k))

    def telling(self, drafter: str) -> Arm:
        """The longest draft of a drafter that loses hardly more than its best one: its rounds tell
        of all shorter ones."""
        by_k, (best, best_k) = self.values[drafter], self.arm
        most = max(by_k)
        least = most - _TELLING * max(self.values[best][best_k] - most, 0.0)
        return drafter, max(k for k, value in enumerate(by_k) if value >= least)

    def has(self, arm: Arm) -> bool:
        """Whether it could be played."""
        drafter, k = arm
        return drafter in self.values and k < len(self.values[drafter])

    def loss_s(self, arm: Arm) -> float:
        """Seconds that an arm loses against the best for the same tokens."""
        (best, best_k), (drafter, k) = self.arm, arm
        return (self.values[best][best_k] - self.values[drafter][k]) / self.speed


def best_of(
    values: Mapping[str, Sequence[float]], may: Callable[[str], bool] | None = None
) -> Arm | None:
    """The best arm of the drafters that may be chosen, the first of equals; ``None`` without any.

    Args:
        values: as ``Choice.values``.
        may: ``None``: all.
    """
    arm, most = None, -math.inf
    for drafter, by_k in values.items():
        if may is None or may(drafter):
            here = max(by_k)
            if here > most:
                arm, most = (drafter, by_k.index(here)), here
    return arm


class Chooser:
    """Keeps the base between steps."""

    def __init__(
        self, margin: float, rows: Mapping[str, frozenset[str]], needing: Collection[str] = ()
    ) -> None:
        """
        Args:
            margin: predicted speed relative to plain decoding that drafting needs.
            rows: by drafter on the device and mix, the drafters whose rows its steps compute.
            needing: drafters and mixes that are of use only where a request has a match: they
                interrupt, and are never the base.
        """
        self._margin = margin
        self._rows = rows
        self._needing = needing
        self.base = "none"
        self._pace = 1.0
        """What ``pace`` was at the last choice."""
        self._leads: dict[str, float] = dict.fromkeys(("none", *rows), 1.0)
        """Speed of each base with its interruptions and what finding them takes, relative to the
        base alone, when it was the base last."""
        self._broken = dict.fromkeys(rows, 0.0)
        """Share of the steps of each drafter on the device and mix that come right after an
        interruption where it is the base; what is not the base any more is slowly forgotten."""

    def footing(
        self,
        outline: Outline,
        fresh: str,
        catch_up_s: Mapping[str, float],
        overhead_s: float = 0.0,
        spread: Callable[[Arm], float] = lambda _arm: 0.0,
        *,
        plain_lead: float = 1.0,
        return_s: Mapping[str, float] | None = None,
    ) -> Footing:
        """What the choice of a step rests on; nothing changes before ``take``.

        Args:
            fresh: the drafter or mix of the last step.
            catch_up_s: seconds to come back to each drafter on the device that may propose, with
                the rows that it lacks now.
            overhead_s: seconds of planning in each step of a base that drafts, and in no other.
            spread: standard deviation of the logarithm of an arm's speed relative to plain
                decoding; asked where drafting may have to end.
            plain_lead: speed of plain decoding with an index, relative to plain decoding alone.
            return_s: seconds to come back to each of them after an interruption, which leaves few
                rows missing; ``None``: as ``catch_up_s``. A base that lacks all rows, because they
                were forgotten, must compute them sooner or later, and once: that neither makes
                its interruptions dearer nor this step.
        """
        return_s = catch_up_s if return_s is None else return_s
        base, alone = self._best_base(outline, catch_up_s, return_s, overhead_s, spread, plain_lead)
        speed = alone * self._lead(base)
        charges = self._charges(base, outline, fresh, catch_up_s, return_s)
        least = speed if base != "none" else speed * self._margin
        worth = {
            drafter: [math.inf, *[(s + charges[drafter]) * least for s in seconds[1:]]]
            for drafter, seconds in outline.seconds.items()
        }
        plain_worth = (outline.plain_s + charges["none"]) * speed
        plain = outline.batch / outline.plain_s
        return Footing(
            base, alone, speed, plain, charges, plain_worth, worth, frozenset(catch_up_s)
        )

    def weigh(self, seen: Forecast, footing: Footing, *, looked: bool = True) -> Choice:
        """Choose the arm of a step; nothing changes before ``take``.

        Args:
            footing: of the outline that the forecast was made from.
            looked: matches of this step are known.
        """
        base, alone, speed, plain, charges_s, plain_worth, worth, _ = footing
        best, arm = seen.batch - plain_worth, PLAIN_ARM
        values = {"none": [best]}
        for drafter, tokens in seen.tokens.items():
            by_k = values[drafter] = list(map(sub, tokens, worth[drafter]))
            if (here := max(by_k)) > best:
                best, arm = here, (drafter, by_k.index(here))
        if arm is PLAIN_ARM and alone < plain:
            # In doubt a base goes on drafting: a step without it would tell nothing.
            most = max(values[base])
            arm = base, values[base].index(most)
            values["none"] = [math.nextafter(most, -math.inf)]
        elif base == "none" and not looked:
            # All steps look alike: what is not worth being the base is not worth it in any step.
            below = math.nextafter(values["none"][0], -math.inf)
            for other in values.keys() & footing.on_device:
                values[other] = [min(value, below) for value in values[other]]
            arm = best_of(values) or PLAIN_ARM
        if len(values) < len(charges_s):  # of those that can propose in this step
            charges_s = {drafter: charges_s[drafter] for drafter in values}
        return Choice(arm, base, speed, values, charges_s, seen.plain_s, alone)

    def take(self, choice: Choice, seen: Forecast, fresh: str, look_s: float = 0.0) -> None:
        """Go on from a choice: its base is kept, and whether it interrupts that is noted.

        Args:
            look_s: seconds that the look at the matches of this step takes; 0 without one.
        """
        self.base = choice.base
        self._pace = choice.speed * choice.plain_s / seen.batch
        tokens, seconds = seen.arm(choice.arm)
        reached = tokens / (seconds + look_s) / choice.alone
        self._leads[self.base] += _RATE_GAIN * (reached - self._leads[self.base])
        for drafter, share in self._broken.items():
            if drafter != self.base:
                self._broken[drafter] = (1 - _RATE_GAIN) * share
            elif choice.arm[0] == self.base:
                is_broken = not self.goes_on(self.base, fresh)
                self._broken[drafter] = share + _RATE_GAIN * (is_broken - share)

    def rested(self, num_steps: int, saved: float, num_back: int, num_broken: int) -> None:
        """Take in steps that no choice was made for: they are most steps of a base that is seldom
        interrupted, and without them the few that are would seem to be the rule.

        Args:
            saved: plain steps' worth of time that interruptions among them have saved, at the speed
                reached with them, beyond what finding them took.
            num_back: steps of the base among them,
            num_broken: and those of these that came right after an interruption.
        """
        if not num_steps:
            return
        kept = (1 - _RATE_GAIN) ** num_steps
        # Times are averaged: few steps scatter, and a mean of speeds would be above the speed.
        left = 1 - min(saved / num_steps, _MOST_SAVED)
        self._leads[self.base] = 1 / (kept / self._leads[self.base] + (1 - kept) * left)
        gone = 1 - (1 - _RATE_GAIN) ** num_back
        for drafter, share in self._broken.items():
            if drafter == self.base and num_back:
                self._broken[drafter] = share + gone * (num_broken / num_back - share)
            elif drafter != self.base:
                self._broken[drafter] = kept * share

    def interruption(self, base: str, own_s: float) -> tuple[float, float]:
        """Seconds that are charged to a step that interrupts a base, and to the one after it.

        Args:
            own_s: seconds to come back to the base.
        """
        broken = self._broken.get(base, 0.0)
        return (1 - broken) * own_s, broken * own_s

    def _best_base(
        self,
        seen: Outline,
        catch_up_s: Mapping[str, float],
        return_s: Mapping[str, float],
        overhead_s: float,
        spread: Callable[[Arm], float],
        plain_lead: float,
    ) -> tuple[str, float]:
        """The base, and its speed alone in tokens per second.

        A drafter is left for plain decoding only where it is slower beyond doubt. Whoever stops
        drafting stops learning what drafts bring, so leaving by mistake lasts, while staying by
        mistake is over as soon as more rounds are known."""
        plain = seen.batch / seen.plain_s
        speeds, arms = {"none": plain}, {}
        for drafter, own_s in return_s.items():
            if drafter in self._needing:
                continue
            usual, seconds = seen.usual_tokens[drafter], seen.seconds[drafter]
            late_s = own_s * self._broken.get(drafter, 0.0) + overhead_s
            by_k = [t / (s + late_s) for t, s in zip(usual[1:], seconds[1:], strict=True)]
            speeds[drafter] = max(by_k)
            arms[drafter] = drafter, 1 + by_k.index(speeds[drafter])
        best = max(speeds, key=speeds.__getitem__)
        base = self.base if self.base in speeds else "none"
        own = speeds[base]
        if base == "none":
            entry = 1 + catch_up_s.get(best, 0.0) / seen.plain_s / _STAY_STEPS
            reached = speeds[best] * self._lead(best)
            if (
                best != "none"
                and speeds[best] > plain * self._margin * entry
                and reached > plain * plain_lead * entry
            ):
                base = best
        elif self._is_left(base, own, plain, plain_lead, lambda: spread(arms[base])):
            base = "none"
        elif best != "none" and speeds[best] > own * _HYSTERESIS:
            base = best
        return base, speeds[base]

    @property
    def plain_lead(self) -> float:
        """Speed of plain decoding with its interruptions, relative to plain decoding alone, while
        it is the base; otherwise 1."""
        return self._lead("none") if self.base == "none" else 1.0

    @property
    def pace(self) -> float:
        """Tokens of a request that the base, with its interruptions, makes in the time of a plain
        step."""
        return self.plain_lead if self.base == "none" else self._pace

    def _lead(self, base: str) -> float:
        """A base that is not interrupted is at least as fast as it is alone."""
        return max(self._leads[base], 1.0)

    def _is_left(
        self, base: str, own: float, plain: float, plain_lead: float, spread: Callable[[], float]
    ) -> bool:
        """Whether a drafter is left for plain decoding, or for plain decoding with an index."""
        if plain * plain_lead > own * self._lead(base) * _RIVAL:
            return True
        least = plain * (1 + (self._margin - 1) / 2)
        return own < least and own * (1 + _DOUBT * spread()) < least

    def _charges(
        self,
        base: str,
        seen: Outline,
        fresh: str,
        catch_up_s: Mapping[str, float],
        return_s: Mapping[str, float],
    ) -> dict[str, float]:
        """Seconds of switching that each drafter's arm causes.

        A drafter on the device that is not the base must catch up now. The base's own catch-up is
        charged once for each interruption: to leaving the base where it mostly goes on, because
        coming back is then certain, and to coming back where it seldom does.
        """
        charges = dict.fromkeys(("none", *seen.seconds), 0.0)
        own_s, broken = return_s.get(base, 0.0), self._broken.get(base, 0.0)
        is_whole = self.goes_on(base, fresh)
        for drafter in charges:
            if drafter == base:
                charges[drafter] = 0.0 if is_whole else broken * own_s
                continue
            if is_whole and not self.goes_on(base, drafter):
                charges[drafter] += (1 - broken) * own_s
            if not self.goes_on(drafter, fresh):
                charges[drafter] += catch_up_s.get(drafter, 0.0)
        return charges

    def goes_on(self, drafter: str, before: str) -> bool:
        """Whether a drafter or mix need not catch up after a step by another: that step has
        computed its rows."""
        if drafter == before:
            return True
        own = self._rows.get(drafter)
        return own is not None and own <= self._rows.get(before, frozenset())
