"""SGLang's adaptive steps: tiers of K by batch, climbed by a moving average of accepted tokens.

Each slot of batch sizes has a list of tiers. Every few steps the average of accepted draft tokens
is compared with the tiers: below the next lower tier less a half it falls by one, above the present
one less a half it rises by one. From K = 0, where nothing can be learned, it rises to have a look.

Source: SGLang 0.5.23, ``--speculative-adaptive`` (pull requests 21599 and 24055). Defaults are its
own. It knows no times: the tiers stand for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from configs.policies import EmaTiersSettings
from configs.schema import PolicySettings
from policies.interface import Outcome, PolicyContext
from policies.lengths import LengthPolicy, spread

_HALF = 0.5
_DOWN_SMALL = -0.25
"""Added to the limit for falling in the first slot, which holds on to its tier for longer."""


@dataclass(slots=True)
class _Slot:
    """The state of one range of batch sizes."""

    tiers: tuple[int, ...]
    down: float
    at: int
    """Index of the tier in use."""
    average: float
    num_steps: int = 0
    """Since the tier changed last; at the beginning since the start."""
    has_settled: bool = False

    def observe(self, accepted: float, settings: EmaTiersSettings) -> None:
        """Take in the mean accepted tokens of a step of this slot."""
        if self.tiers[self.at]:
            self.average += settings.alpha * (accepted - self.average)
        self.num_steps += 1
        wait = settings.interval if self.has_settled else settings.warmup
        if self.num_steps >= wait:
            self.has_settled, self.num_steps = True, 0
            self._move()

    def _move(self) -> None:
        present = self.tiers[self.at]
        if present == 0:
            if len(self.tiers) > 1:
                self.at += 1
                self.average = self.tiers[self.at] - _HALF  # neither rises nor falls by itself
            return
        if self.at > 0:
            below = self.tiers[self.at - 1]
            limit = below - _HALF + self.down if below else _HALF + self.down
            if self.average <= limit:
                self.at -= 1
                return
        if self.average > present - _HALF and self.at + 1 < len(self.tiers):
            self.at += 1


class EmaTiersPolicy(LengthPolicy):
    """Moves K between tiers, one state for each range of batch sizes."""

    kind = "ema_tiers"

    def __init__(self, context: PolicyContext, drafter: str, settings: EmaTiersSettings) -> None:
        super().__init__(context, drafter)
        self._settings = settings
        self._slots = self._new_slots()

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter`` and ``policy.ema_tiers``."""
        return cls(context, settings.drafter, settings.ema_tiers)

    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """The tier in use."""
        slot = self._slot_of(batch)
        return spread(min(slot.tiers[slot.at], max_k), max_k, 0.0)

    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Move the average of this batch's slot, and now and then its tier."""
        accepted = outcome.rows.num_accepted
        if accepted:
            mean = sum(accepted) / len(accepted)
            self._slot_of(outcome.batch).observe(mean, self._settings)

    def forget(self, calibration: dict[str, Any]) -> None:
        """Start over, from the lowest tier that drafts."""
        self._slots = self._new_slots()

    def state(self) -> dict[str, Any]:
        """Tier and average of each slot."""
        return {
            "tiers": {
                str(batch): {"draft_k": slot.tiers[slot.at], "average": round(slot.average, 3)}
                for batch, slot in self._slots
            }
        }

    def _new_slots(self) -> list[tuple[int, _Slot]]:
        slots = []
        for number, (batch, tiers) in enumerate(sorted(self._settings.tiers)):
            at = next((i for i, k in enumerate(tiers) if k), 0)
            down = _DOWN_SMALL if number == 0 else 0.0
            slots.append((batch, _Slot(tuple(tiers), down, at, float(tiers[at]))))
        return slots

    def _slot_of(self, batch: int) -> _Slot:
        """That of the largest batch size that is not above this one."""
        fitting = [slot for smallest, slot in self._slots if smallest <= batch]
        return fitting[-1] if fitting else self._slots[0][1]
