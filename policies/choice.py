"""The arm to play, with the price of changing arms.

A neural drafter is fast as long as it drafts in every step; coming back to it costs a catch-up. So
one way to decode is the *base*, plain decoding or a neural drafter, chosen by its speed over the
usual mix of matches, and other arms interrupt it where they gain more in this step than returning
to the base will cost. Comparing arms step by step instead loses the catch-ups: an index that is a
little better at every other step makes the whole slower than the drafter alone.

Arms of one step are compared by tokens minus seconds times the speed reached so far, so that the
quotient of all tokens and all seconds grows (Dinkelbach 1967), not the mean of quotients of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from policies.forecast import PLAIN_ARM, Arm, Forecast

_HYSTERESIS = 1.01
"""Predicted speed relative to the base that another neural drafter needs to replace it."""
_STAY_STEPS = 64.0
"""Steps that a base is assumed to stay: it must earn its catch-up back in these."""
_DOUBT = 1.0
"""Standard deviations by which a drafter must be slower than plain decoding to be left for it."""
_RATE_GAIN = 0.02
"""Gain of moving averages over steps."""


class Choice(NamedTuple):
    """The best arm of a step, and what others would lose against it."""

    arm: Arm
    base: str
    speed: float
    """Tokens per second reached with the base and its interruptions."""
    values: dict[Arm, float]
    """Tokens of each arm, less what this speed makes in its seconds, switching included."""
    charges_s: dict[str, float]
    """Seconds of switching in these, by drafter."""
    plain_s: float
    """Seconds of a plain step."""

    @property
    def best_draft(self) -> Arm:
        """The best arm that drafts; plain decoding if none can."""
        if self.arm[1]:
            return self.arm
        drafting = (arm for arm in self.values if arm[1])
        return max(drafting, key=self.values.__getitem__, default=PLAIN_ARM)

    def loss_s(self, arm: Arm) -> float:
        """Seconds that an arm loses against the best for the same tokens."""
        return (self.values[self.arm] - self.values[arm]) / self.speed


class Chooser:
    """Keeps the base between steps."""

    def __init__(
        self, margin: float, rows: Mapping[str, frozenset[str]], needing: Collection[str] = ()
    ) -> None:
        """
        Args:
            margin: predicted speed relative to plain decoding that drafting needs.
            rows: by neural drafter and mix, the drafters whose rows its steps compute.
            needing: drafters and mixes that are of use only where a request has a match: they
                interrupt, and are never the base.
        """
        self._margin = margin
        self._rows = rows
        self._needing = needing
        self.base = "none"
        self._lead = 1.0
        """Speed of the base with its interruptions, relative to the base alone."""
        self._broken = 0.0
        """Share of the base's steps that come right after an interruption."""

    def choose(
        self,
        seen: Forecast,
        fresh: str,
        catch_up_s: Mapping[str, float],
        overhead_s: float = 0.0,
        spread: Callable[[Arm], float] = lambda _arm: 0.0,
        *,
        looked: bool = True,
    ) -> Choice:
        """Choose the arm of a step.

        Args:
            fresh: the drafter or mix of the last step.
            catch_up_s: seconds to come back to each neural drafter that can propose now.
            overhead_s: seconds of planning in each step of a base that drafts, and in no other.
            spread: standard deviation of the logarithm of an arm's speed relative to plain
                decoding; asked where drafting may have to end.
            looked: matches of this step are known.
        """
        alone = self._choose_base(seen, catch_up_s, overhead_s, spread)
        speed = alone * self._lead
        charges = self._charges(seen, fresh, catch_up_s)
        least = speed if self.base != "none" else speed * self._margin
        values = {PLAIN_ARM: seen.batch - (seen.plain_s + charges["none"]) * speed}
        for drafter, seconds in seen.seconds.items():
            charge, tokens = charges[drafter], seen.tokens[drafter]
            for k in range(1, seen.max_k + 1):
                values[drafter, k] = tokens[k] - (seconds[k] + charge) * least
        arm = max(values, key=values.__getitem__)
        if arm == PLAIN_ARM and alone < seen.batch / seen.plain_s:
            # In doubt a base goes on drafting: a step without it would tell nothing.
            arm = max(((self.base, k) for k in range(1, seen.max_k + 1)), key=values.__getitem__)
            values[PLAIN_ARM] = math.nextafter(values[arm], -math.inf)
        elif self.base == "none" and not looked:
            # All steps look alike: what is not worth being the base is not worth it in any step.
            for other, value in values.items():
                if other[0] in catch_up_s:
                    values[other] = min(value, math.nextafter(values[PLAIN_ARM], -math.inf))
            arm = max(values, key=values.__getitem__)
        self._note(seen, arm, fresh, alone)
        return Choice(arm, self.base, speed, values, charges, seen.plain_s)

    def _choose_base(
        self,
        seen: Forecast,
        catch_up_s: Mapping[str, float],
        overhead_s: float,
        spread: Callable[[Arm], float],
    ) -> float:
        """Choose the base and return its speed alone, tokens per second.

        A drafter is left for plain decoding only where it is slower beyond doubt. Whoever stops
        drafting stops learning what drafts bring, so leaving by mistake lasts, while staying by
        mistake is over as soon as more rounds are known."""
        plain = seen.batch / seen.plain_s
        speeds, arms = {"none": plain}, {}
        for drafter, catch_s in catch_up_s.items():
            if drafter in self._needing:
                continue
            usual, seconds = seen.usual_tokens[drafter], seen.seconds[drafter]
            late_s = catch_s * self._broken + overhead_s
            by_k = [usual[k] / (seconds[k] + late_s) for k in range(1, seen.max_k + 1)]
            speeds[drafter] = max(by_k)
            arms[drafter] = drafter, 1 + by_k.index(speeds[drafter])
        best = max(speeds, key=speeds.__getitem__)
        own = speeds.get(self.base)
        if own is None:
            self.base, own = "none", plain
        if self.base == "none":
            entry = 1 + catch_up_s.get(best, 0.0) / seen.plain_s / _STAY_STEPS
            if best != "none" and speeds[best] > plain * self._margin * entry:
                self.base = best
        elif own < (least := plain * (1 + (self._margin - 1) / 2)) and (
            own * (1 + _DOUBT * spread(arms[self.base])) < least
        ):
            self.base = "none"
        elif best != "none" and speeds[best] > own * _HYSTERESIS:
            self.base = best
        return speeds[self.base]

    def _charges(
        self, seen: Forecast, fresh: str, catch_up_s: Mapping[str, float]
    ) -> dict[str, float]:
        """Seconds of switching that each drafter's arm causes.

        A neural drafter that is not the base must catch up now. The base's own catch-up is charged
        once for each interruption: to leaving the base where it mostly goes on, because coming back
        is then certain, and to coming back where it seldom does.
        """
        charges = dict.fromkeys(("none", *seen.seconds), 0.0)
        own_s = catch_up_s.get(self.base, 0.0)
        is_whole = self.goes_on(self.base, fresh)
        for drafter in charges:
            if drafter == self.base:
                charges[drafter] = 0.0 if is_whole else self._broken * own_s
                continue
            if is_whole and not self.goes_on(self.base, drafter):
                charges[drafter] += (1 - self._broken) * own_s
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

    def _note(self, seen: Forecast, arm: Arm, fresh: str, alone: float) -> None:
        tokens, seconds = seen.arm(arm)
        self._lead += _RATE_GAIN * (max(1.0, tokens / seconds / alone) - self._lead)
        if arm[0] == self.base:
            is_broken = not self.goes_on(self.base, fresh)
            self._broken += _RATE_GAIN * (is_broken - self._broken)
