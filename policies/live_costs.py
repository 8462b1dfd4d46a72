"""Seconds of a step in units of a plain one, followed in service at the cost of a few additions.

The shape over K and batch is that of the start-up profile. Two things are learned: how fast plain
steps are now, by size of the batch, and by what factor the time that drafting adds differs from the
profile's. That is much less than ``policies.step_time`` knows, and takes a hundredth of its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from policies.average import Average
from policies.curves import Profile
from policies.interface import CostSample, DrafterTraits

_SPEED_GAIN, _COST_GAIN = 0.05, 0.02
_MOST_RATIO = 4.0
"""A step that took longer than so many predicted ones counts as that many: a machine's hiccup."""


def size_of(batch: int) -> int:
    """Size of a batch: 0 for 1 request, 1 for 2 and 3, 2 for 4 to 7, ..."""
    return batch.bit_length() - 1


class LiveCosts:
    """Times of one drafter's steps at every K and batch."""

    def __init__(self, drafters: Mapping[str, DrafterTraits], drafter: str, max_draft: int) -> None:
        self._drafters = drafters
        self._drafter = drafter
        self._max_draft = max_draft
        self.calibrate([])

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start over from a profile."""
        self._profile = Profile(samples, self._max_draft, self._drafters)
        self._plain: dict[int, Average] = {}
        self._all_plain = Average(_SPEED_GAIN, mean=1.0)
        self._added: tuple[float, float] | None = None
        """Averages of what drafting added to a plain step and of what it was predicted to add."""
        self._known: dict[int, list[float]] = {}

    @property
    def is_known(self) -> bool:
        """A plain step's time is more than a guess."""
        return self._profile.is_measured or self._all_plain.num > 0

    def plain_s(self, batch: int) -> float:
        """Predicted seconds of a plain step."""
        own = self._plain.get(size_of(batch), self._all_plain)
        return self._profile.plain_s(batch) * own.mean

    def shares(self, batch: int) -> list[float]:
        """[max_draft + 1] predicted times at K = 0, 1, ... relative to a plain step; 1 at 0. Must
        not be changed."""
        found = self._known.get(batch)
        if found is None:
            cost = self.cost
            added = self._profile.increments(self._drafter, batch)
            found = self._known[batch] = [1 + cost * one for one in added]
        return found

    @property
    def cost(self) -> float:
        """What drafting adds, relative to the profile."""
        return 1.0 if self._added is None else max(self._added[0] / self._added[1], 0.05)

    def observe(self, draft_k: int, batch: int, step_s: float) -> None:
        """Take in a step without prompts.

        Args:
            draft_k: K of a step of this drafter; 0: plain decoding.
            step_s: above 0, planning left out.
        """
        if draft_k == 0:
            ratio = min(step_s / self._profile.plain_s(batch), _MOST_RATIO * self._all_plain.mean)
            own = self._plain.setdefault(size_of(batch), Average(_SPEED_GAIN))
            own.add(ratio)
            self._all_plain.add(ratio)
            return
        predicted = self._profile.increments(self._drafter, batch)[draft_k]
        share = min(step_s / self.plain_s(batch), _MOST_RATIO * (1 + predicted))
        above, below = self._added or (predicted, predicted)
        self._added = (
            above + _COST_GAIN * (share - 1 - above),
            below + _COST_GAIN * (predicted - below),
        )
        self._known.clear()

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "plain": {str(2**size): round(one.mean, 4) for size, one in self._plain.items()},
            "cost": round(self.cost, 4),
        }
