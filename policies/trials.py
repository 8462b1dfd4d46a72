"""Drafters that are tried for a few steps whatever is believed of them, because the belief may be
what is wrong.

That is so after a swap, and where the traffic has changed. What the drafter in use keeps shows a
change after a few rounds; what is known of the others is of other traffic then, and the explorer's
draws, which go by what is known, may come to them no sooner than the next change. So each is tried
once, the most promising one first, at its longest draft that takes hardly more time.

A change is assumed where the rounds of the drafter in use no longer fit, and where a drafter takes
the place of plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from policies.choice import Choice
from policies.forecast import PLAIN_ARM
from policies.probes import Explorer, Stretch

_SETTLE_S = 0.2
"""Seconds of steps between a swap and the trial of its weights: a server is busy with what belongs
to the swap, and a trial is too short for its times to bear that."""
_LEAD = 0.1
"""Time that the best arm saves beside a plain step, as a share of it, from which on others are
tried after a change: drafting pays for that."""


class Trials:
    """Knows which drafters are to be tried."""

    def __init__(self, kinds: Collection[str], *, after_changes: bool = True) -> None:
        """
        Args:
            kinds: drafters and mixes on the device that need no match.
            after_changes: they are also tried after changes of the traffic, and not after swaps
                alone.
        """
        self._kinds = frozenset(kinds if after_changes else ())
        self._swapped: dict[str, float] = {}
        """Neural drafters whose weights changed, and that have not drafted since; with the time
        when they did."""
        self._doubted: set[str] = set()
        """What is known of these is of other traffic."""
        self._may_owe = False
        """A trial of these may come before it is paid for."""
        self._base, self._num_shifts = "none", 0

    def swapped(self, drafter: str, clock_s: float) -> None:
        """A drafter has other weights."""
        self._swapped[drafter] = clock_s

    def follow(self, base: str, num_shifts: Callable[[str], int]) -> None:
        """Notice a change of the traffic.

        Args:
            num_shifts: returns how often the rounds of a drafter have stopped fitting so far.
        """
        before, self._base = self._base, base
        if base == "none":
            return
        known, self._num_shifts = self._num_shifts, num_shifts(base)
        if before == base and self._num_shifts > known:
            self._doubted, self._may_owe = {*self._kinds} - {base}, True
        elif before == "none":
            self._doubted, self._may_owe = {*self._kinds} - {base}, False

    def next(self, choice: Choice, explorer: Explorer, clock_s: float) -> Stretch | None:
        """A stretch of one of them, if it may begin now.

        Args:
            clock_s: time of all steps so far.
        """
        in_use = {choice.base, choice.arm[0]}
        for kind in self._swapped.keys() & in_use:
            del self._swapped[kind]
        self._doubted -= in_use
        for kind in sorted(self._swapped.keys() & choice.values.keys()):
            if clock_s < self._swapped[kind] + _SETTLE_S:
                continue
            if (stretch := explorer.trial(choice.best_of(kind), choice)) is not None:
                del self._swapped[kind]
                return stretch
        if self._doubted and choice.loss_s(PLAIN_ARM) > _LEAD * choice.plain_s:
            able = self._doubted & choice.values.keys()
            for kind in sorted(able, key=lambda one: (-max(choice.values[one]), one)):
                if stretch := explorer.trial(choice.telling(kind), choice, owes=self._may_owe):
                    self._doubted.discard(kind)
                    return stretch
        return None

    @property
    def are_due(self) -> bool:
        """Some drafter is to be tried."""
        return bool(self._swapped or self._doubted)
