"""Detects that what is observed has changed (Page 1954, CUSUM)."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SHIFT_DRIFT, LIMIT = 0.5, 10.0
"""Drift and limit of the CUSUM, in standard deviations: a shift by one is found after 20 steps;
false alarms are rare and cost only some precision."""
_SURPRISE_GAIN = 0.02
"""Gain of the moving variance of surprises."""


@dataclass(slots=True)
class Cusum:
    """Page's change detector for one bucket's surprises: tokens accepted minus tokens expected."""

    variance: float = 1.0
    """Variance of one round's surprise."""
    above: float = 0.0
    below: float = 0.0
    num_shifts: int = 0

    def notices_shift(self, surprise: float, rounds: int) -> bool:
        """Take in one step's summed surprise; an alarm resets the detector."""
        z = surprise / math.sqrt(max(self.variance, 0.01) * rounds)
        self.variance += _SURPRISE_GAIN * (surprise**2 / rounds - self.variance)
        self.above = max(0.0, self.above + z - _SHIFT_DRIFT)
        self.below = max(0.0, self.below - z - _SHIFT_DRIFT)
        if max(self.above, self.below) < LIMIT:
            return False
        self.reset()
        self.num_shifts += 1
        return True

    def reset(self) -> None:
        """Start over, keeping the variance."""
        self.above = self.below = 0.0
