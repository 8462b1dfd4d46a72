"""The one account of drafting: what it has earned, and what finding out about it may take.

Whoever stops drafting stops learning what drafts would bring, so evidence is bought all the time:
stretches of steps of another arm, plans, and looks at the matches of a batch. While drafting pays,
stretches may take 0.8 % of the time, half of it for another K of the drafter in use, which is cheap
and wanted often and would leave nothing to compare drafting with plain decoding. While plain
decoding is faster, everything together may take a stated share of the time (0.5 %): six tenths of
it for stretches, a tenth for plans without a look, two tenths for those with one, and a tenth for
drafts at matches that are believed not to be worth it. Without a drafter that needs matches, this
is for stretches, too.

Stretches are paid from savings, so an expensive one is postponed and never dropped; they are known
in seconds. Plans and looks are owed, because what they take is known afterwards; they are known in
plain steps' worth of time. A balance below 0 is a debt, and nothing more is bought for that purpose
before it is earned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

_DRAFTING_SHARE = 0.008
"""Share of the time that stretches may lose while drafting pays."""
_MATCH_SHARE = 0.002
"""Likewise, that drafts at matches which are believed not to be worth it may lose."""
_START_STEPS, _MOST_STEPS = 3.0, 12.0
"""Balance for stretches of each sort at first and at most, in plain steps."""


class Purpose(IntEnum):
    """What is bought."""

    LENGTH = 0
    """A stretch of another K of the drafter in use; seconds."""
    ARM = 1
    """A stretch of plain decoding or of another drafter; seconds."""
    PLAN = 2
    """A plan without a look; plain steps' worth of time."""
    LOOK = 3
    """A plan with a look at matches, or a look alone; likewise. What looks have found is credit."""
    MATCH = 4
    """A draft at a match that is believed not to be worth it; seconds."""


_STRETCHES = Purpose.LENGTH, Purpose.ARM, Purpose.MATCH
PARTS = {
    Purpose.LENGTH: 0.0, Purpose.ARM: 0.6, Purpose.PLAN: 0.1, Purpose.LOOK: 0.2, Purpose.MATCH: 0.1
}  # fmt: skip
"""Parts of the stated share while plain decoding is faster; then no K of a drafter is in use."""


class Ledger:
    """Balances by purpose, and what was earned and spent since the start."""

    def __init__(self, share: float, *, tries_matches: bool = True) -> None:
        """
        Args:
            share: of the time that finding out whether drafting pays may take while plain decoding
                is faster.
            tries_matches: there is a drafter that needs matches. Otherwise its part is for other
                arms.
        """
        self.share = share
        self._of_arm = PARTS[Purpose.ARM] + (0.0 if tries_matches else PARTS[Purpose.MATCH])
        self._balances = [0.0] * len(Purpose)
        self.is_open = False
        """Stretches have their first balance: a plain step's time is known."""
        self.wanted_s = 0.0
        """Loss of the most expensive stretch that was an option of late: so much can be saved."""
        self.earned_s = 0.0
        """Seconds that steps with drafts have saved against plain decoding, those of stretches
        left out; below 0 if they took longer."""
        self._spent_s = [0.0] * len(Purpose)

    def balance(self, purpose: Purpose) -> float:
        """What may be spent now; below 0, what is owed."""
        return self._balances[purpose]

    def affords(self, purpose: Purpose, cost: float = 0.0) -> bool:
        """Whether so much may be spent now: by default, whether nothing is owed."""
        return self._balances[purpose] >= cost

    def charge(
        self,
        purpose: Purpose,
        cost: float,
        *,
        most_owed: float = math.inf,
        most: float = math.inf,
    ) -> None:
        """Take a cost from a balance, or add to it what was gained, at a cost below 0. That of a
        stretch counts as spent.

        Args:
            most_owed: the balance does not stay below this debt, whatever led to it.
            most: what is gained does not lift the balance above this.
        """
        balance = max(self._balances[purpose] - cost, -most_owed)
        if cost < 0:
            balance = min(balance, max(self._balances[purpose], most))
        self._balances[purpose] = balance
        if purpose in _STRETCHES:
            self._spent_s[purpose] += cost

    def credit(self, purpose: Purpose, gain: float, most: float) -> None:
        """Add a gain to a balance, which does not exceed ``most``."""
        self._balances[purpose] = min(self._balances[purpose] + gain, most)

    def turns_plain(self) -> None:
        """A drafter was left for plain decoding: what was saved for other K of it pays what other
        arms owe."""
        saved_s, owed_s = self._balances[Purpose.LENGTH], -self._balances[Purpose.ARM]
        paid_s = max(min(saved_s, owed_s), 0.0)
        self._balances[Purpose.LENGTH] -= paid_s
        self._balances[Purpose.ARM] += paid_s

    def forgive(self, *purposes: Purpose) -> None:
        """Forget debts: what was bought is of no use any more."""
        for purpose in purposes:
            self._balances[purpose] = max(self._balances[purpose], 0.0)

    def clear(self, *purposes: Purpose) -> None:
        """Forget debts and credit."""
        for purpose in purposes:
            self._balances[purpose] = 0.0

    def save(self, step_s: float, plain_s: float, *, is_drafted: bool) -> None:
        """Let the time of a step earn its share for stretches. One in which nothing was drafted
        earns for other arms alone.

        Args:
            plain_s: of a plain step.
        """
        if not self.is_open:
            self.is_open = True
            for purpose in _STRETCHES:
                self._balances[purpose] = _START_STEPS * plain_s
        most_s = max(_MOST_STEPS * plain_s, self.wanted_s)
        half = _DRAFTING_SHARE / 2
        if is_drafted:
            self.credit(Purpose.LENGTH, half * step_s, most_s)
            self.credit(Purpose.ARM, half * step_s, most_s)
            self.credit(Purpose.MATCH, _MATCH_SHARE * step_s, _START_STEPS * plain_s)
        else:
            share_s = self.share * step_s
            self.credit(Purpose.ARM, self._of_arm * share_s, most_s)
            self.credit(Purpose.MATCH, PARTS[Purpose.MATCH] * share_s, _START_STEPS * plain_s)

    def pay_off(self, num_steps: float) -> None:
        """Let so many plain steps' worth of time earn its share for plans and looks that are owed.
        Nothing is saved for them."""
        for purpose in (Purpose.PLAN, Purpose.LOOK):
            if (balance := self._balances[purpose]) < 0:
                earned = PARTS[purpose] * self.share * num_steps
                self._balances[purpose] = min(balance + earned, 0.0)

    def note_spent(self, purpose: Purpose, seconds: float) -> None:
        """Count what a plan or a look took, owed or not."""
        self._spent_s[purpose] += seconds

    def figures(self) -> dict[str, Any]:
        """JSON-ready: seconds that drafting has earned and that each purpose has taken since the
        start, and balances."""
        return {
            "share": self.share,
            "earned_s": round(self.earned_s, 6),
            "spent_s": _by_name(self._spent_s),
            "balances": _by_name(self._balances),
        }


def _by_name(values: Sequence[float]) -> dict[str, float]:
    return {one.name.lower(): round(values[one], 6) for one in Purpose}
