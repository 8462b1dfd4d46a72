"""How step times vary around what is typical, and what late steps add to their mean.

A step's time counts up to 2.5 standard deviations above the typical one, as measured of late. What
a late step takes beyond is not discarded: it is averaged apart, over all steps, and added to the
time of every arm, because a host is late as often beside a draft as without one. A drafter's own
average replaces the common one as far as its steps prove that it differs. Typical time plus late
time is the mean time, heavy tails included, without the variance of a mean.

Where rounds overlap, a step that the host reads late is followed by one that seems short by as
much, so what such a step lacks is taken back from the lateness before it. Otherwise a drafter that
is tried for a few steps now and then would seem faster than it is: its late steps would count for
all drafters, and its short ones for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from policies.average import Average

CLIP = 2.5
"""Standard deviations up to which a surprise counts."""
_NOISE_START = 0.1
"""Standard deviation of the logarithm of a step's time before anything is measured."""
_NOISE_LEAST = 0.02
_NOISE_GAIN = 0.03
_RATIO_GAIN = 0.003
_RATIO_PROOF = 2.0
"""Square of the standard errors by which a drafter's own ratio must differ from the common one
before it counts; beyond that it counts the more the clearer it differs (James-Stein)."""
_LATE_GAIN, _OWN_LATE_GAIN = 0.003, 0.001
"""Gains of the averages of late time, over all steps and over those of one drafter."""
_LATE_PROOF = 2.0
"""Late steps of like size on which a drafter's own lateness must rest."""
_LATE_SD = 0.03
"""Prior standard deviation of a drafter's own excess from the common one, as a share of a step."""


class Scatter:
    """Follows the times of steps, given the typical ones."""

    def __init__(self, drafters: Iterable[str]) -> None:
        self.noise = _NOISE_START
        """Standard deviation of the logarithm of a step's time."""
        self._ratio = Average(_RATIO_GAIN, mean=1.0)
        """Time of a step, as far as it counts, relative to the typical one."""
        self._own_ratio = {kind: Average(_RATIO_GAIN) for kind in ("none", *drafters)}
        self._num_observed = 0
        self._late = Average(_LATE_GAIN)
        self._own_late = {kind: Average(_OWN_LATE_GAIN) for kind in ("none", *drafters)}
        self._owed_s = 0.0
        """What the last step took beyond what counted."""

    def spread(self, surprise: float, doubt: float) -> None:
        """Learn how far steps lie from what is predicted, as far as the prediction is not what is
        wrong.

        Every step counts. If only those did whose prediction is surer than they scatter, calm
        steps would bring the scatter down to where none is, and it would stay there for ever.

        Args:
            surprise: logarithm of the step's time relative to the prediction.
            doubt: variance of that prediction.
        """
        expected = math.sqrt(self.noise**2 + doubt)
        # The mean size of a normal deviate is 0.8 standard deviations.
        size = min(abs(surprise), 3 * expected) / 0.8
        moved = _NOISE_GAIN * (size - expected) * self.noise / expected
        self.noise = max(_NOISE_LEAST, self.noise + moved)

    def observe(self, kind: str, step_s: float, typical_s: float) -> None:
        """Take in a step whose prediction is sure.

        Args:
            kind: its drafter, or ``none``.
        """
        self._num_observed += 1
        back_s = min(self._owed_s, max(typical_s - step_s, 0.0))
        counted = min((step_s + back_s) / typical_s, math.exp(CLIP * self.noise))
        self._ratio.add(counted)
        self._own_ratio[kind].add(counted)
        late_s = step_s - counted * typical_s
        self._owed_s = max(late_s, 0.0)
        self._late.add(late_s)
        self._own_late[kind].add(late_s)

    def ratio(self, kind: str) -> float:
        """Mean of the time of a drafter's steps, as far as it counts, relative to the typical one.

        Each has its own: a slice of time that a trainer takes from the GPU doubles a plain step
        and lengthens one of five draft tokens by a quarter.
        """
        own, common = self._own_ratio[kind], self._ratio
        difference = own.mean - common.mean
        squares = own.weight * difference**2 / max(common.variance, 1e-9)
        if squares <= _RATIO_PROOF:
            return common.mean
        return common.mean + (1 - _RATIO_PROOF / squares) * difference

    def late_s(self, kind: str, plain_s: float) -> float:
        """Mean seconds that a drafter's steps are late.

        Args:
            plain_s: typical seconds of a plain step.
        """
        own, common = self._own_late[kind], self._late
        # The common variance: a drafter's own is 0 until one of its steps is late.
        proof = (_LATE_SD * plain_s) ** 2 * own.weight
        share = proof / (proof + common.variance) if proof else 0.0
        # The common variance forgets sooner than the mean of a drafter that is seldom used. A mean
        # above the common one that rests on one late step, or on two, proves nothing.
        if own.mean > common.mean and own.weight * own.mean**2 <= _LATE_PROOF * own.square:
            return common.mean
        return common.mean + share * (own.mean - common.mean)

    def is_late(self, step_s: float, typical_s: float) -> bool:
        """Whether a step took so long that the rest is lateness."""
        return step_s > math.exp(CLIP * self.noise) * typical_s

    def figures(self) -> dict[str, Any]:
        """JSON-ready, milliseconds."""
        return {
            "scatter": round(self.noise, 4),
            "late_ms": round(1000 * self._late.mean, 4),
            "own_late_ms": {k: round(1000 * a.mean, 4) for k, a in self._own_late.items()},
        }
