"""Mean step time by (drafter, K, batch), followed in traffic whose steps scatter and come late.

The typical time of a step is a product of unknown factors on the start-up profile:

    plain(batch) * speed * shape[batch]
        * (1 + read * context + increment(arm, batch) * cost[arm, batch])

where an arm is a drafter and K, and ``context`` is how much text a step reads, over the batch. Keys
and values are read once for all rows of a request, so long texts make plain steps longer, but not
what a draft adds to them: the longer a text, the better is a draft worth its time. ``speed`` is
that of the machine and may drift fast, ``shape`` is a factor of plain steps by size of the batch,
and ``cost`` is a factor of the drafter times one of its own for each K and one for each size of
batch. The logarithms of all of them form the state of an extended Kalman filter, so each step
updates what it says something about, by as much as it does: a plain step between drafting ones
tells the speed of the machine and so what the drafter costs. Without new evidence, factors become
uncertain again.

A surprise counts up to 2.5 standard deviations; ``scatter`` keeps the rest, so that means are right
where steps come late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from policies.curves import Floats, Profile
from policies.interface import CostSample, DrafterTraits
from policies.scatter import CLIP, Scatter

_SIZES = 8
"""Sizes of batch told apart: 1, 2-3, 4-7, ... 128 and more."""
_SPEED_SD, _SPEED_SD_UNMEASURED = 1.0, 3.0
"""Prior standard deviations, in logarithms, with and without a profile: of the machine's speed,"""
_SHAPE_SD, _SHAPE_SD_UNMEASURED = 0.15, 0.6
"""of a batch size's factor,"""
_DRAFTER_SD, _DRAFTER_SD_UNMEASURED = 0.5, 0.8
"""of a drafter's factor,"""
_OWN_SD = 0.2
"""and of its factors at one K and at one size of batch."""
_NEIGHBOURS = 4.0
"""Distance in K, or in doublings of the batch, over which the correlation of these falls to 1/e."""
_SPEED_DRIFT = 0.012
"""Standard deviations by which the speed drifts in a step,"""
_FORGET, _FORGET_STEPS = 2e-4, 16
"""Share by which everything else becomes as uncertain as at first, every so many steps."""
_MANY_OUTLIERS = 4
"""Surprises beyond what counts, in a row, that are a change instead,"""
_CHANGE_SD = 1.0
"""of this standard deviation."""
_MOST_SD = 3.0
"""Prior standard deviations by which the factors of drafters can fall: below, a draft would seem to
take no time, whatever its length, and no step would say much of the factor any more."""
_SURE = 2.0
"""Variance of a prediction, relative to that of the steps, up to which a step tells how late steps
are."""
_TAKEN_OVER = 0.02
"""Share by which factors that another model has learned become as uncertain as at first."""
_READ, _READ_SD = 0.1, 1.5
"""Prior of ``read`` by context in units of ``_CONTEXT_UNIT`` tokens: shares of a plain step (23 kB
of keys and values for each token of a model of 135 M parameters, 131 kB of one of 8 billion), and
standard deviation of its logarithm."""
_READ_AT = -1
"""Its place in the state."""
_CONTEXT_UNIT = 16384
_LEAST_CONTEXT = 256
"""Tokens over the batch; fewer are as many as these, and each half octave above is one context,"""
_NEXT_CONTEXT = 0.75
"""which is left for another one from so many half octaves on."""
_LEAST_SHARE = 0.15
"""Least slope of an arm's logarithm in its drafter's factor. The true one of a small increment
would take a factor of ten hundreds of steps to be found."""


class _Known(NamedTuple):
    """What was computed of the state as it is."""

    plain: dict[int, float]
    """Typical seconds of a plain step by batch."""
    arms: dict[tuple[str, int], list[float]]
    """What ``arm_times`` returns."""

    def clear(self) -> None:
        self.plain.clear()
        self.arms.clear()


class StepTimes:
    """Predicted mean seconds of a step for every drafter, K and batch, measured or not."""

    def __init__(self, max_draft: int, drafters: Mapping[str, DrafterTraits]) -> None:
        """
        Args:
            max_draft: largest K ever asked for.
            drafters: traits by kind; no other kind may be observed or asked for.
        """
        self._max_draft = max_draft
        self._drafters = drafters
        self.context = 0
        """Half octaves above ``_LEAST_CONTEXT`` that a step reads; 0 where nobody tells."""
        block = 1 + max_draft + _SIZES
        self._first = {kind: 1 + _SIZES + i * block for i, kind in enumerate(drafters)}
        """Index of a drafter's factor; those of K = 1, 2, ... and of the sizes follow."""
        self.calibrate([])

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start over from a profile."""
        self._profile = Profile(samples, self._max_draft, self._drafters)
        is_known = self._profile.is_measured
        self._prior = _prior(self._max_draft, len(self._drafters), is_known)
        self._state = np.zeros(len(self._prior))
        self._least = -_MOST_SD * np.sqrt(self._prior.diagonal())
        self._least[: 1 + _SIZES] = -math.inf  # of the machine, which may change by any factor
        self._values: list[float] = self._state.tolist()
        """The state again: reading numbers of a list is faster."""
        self._cov = self._prior.copy()
        self._scatter = Scatter(self._drafters)
        self._num_observed = self._outliers = 0
        self.num_changes = 0
        """Changes of the machine or of an arm's cost, noticed by many outliers in a row."""
        self._known = _Known({}, {})

    def start_from(self, other: StepTimes) -> None:
        """Take over the factors and the scatter that another model has learned. The factors are a
        little less certain here.

        Args:
            other: of the same drafters, and started from the same profile.
        """
        self._state = other._state.copy()
        self._cov = other._cov + _TAKEN_OVER * (self._prior - other._cov)
        self._scatter.noise = other._scatter.noise
        self._num_observed = other._num_observed
        self._values = self._state.tolist()
        self._known.clear()

    def follow(self, context: int | None, batch: int) -> None:
        """Predict times of steps that read so much text, from now on.

        Args:
            context: tokens of a request; ``None`` leaves what was told last.
        """
        if context is None:
            return
        half_octaves = 2 * math.log2(max(batch * context, 1) / _LEAST_CONTEXT)
        if abs(max(half_octaves, 0.0) - self.context) > _NEXT_CONTEXT:
            self.context = max(round(half_octaves), 0)
            self._known.clear()

    @property
    def _reading(self) -> float:
        """Time that reading the text takes, as a share of a plain step without any."""
        if not self.context:
            return 0.0
        tokens: float = _LEAST_CONTEXT * 2 ** (self.context / 2)
        return _READ * math.exp(self._values[_READ_AT]) * tokens / _CONTEXT_UNIT

    @property
    def is_known(self) -> bool:
        """A plain step's time is more than a guess."""
        return self._num_observed > 0 or self._profile.is_measured

    def observe(self, drafter: str, draft_k: int, batch: int, step_s: float) -> None:
        """Take in a live step without prefill.

        Args:
            drafter: of no meaning if ``draft_k`` is 0.
            step_s: above 0.
        """
        at, share, typical_s = self._linearised(drafter, draft_k, batch)
        self._drift()
        slopes = np.array([1.0, 1.0, *[share] * (len(at) - 2)])
        if reading := self._reading:
            # The share that the increment leaves is the plain step's, and of this the text's.
            at, own = [*at, _READ_AT], (1 - share) * reading / (1 + reading)
            slopes = np.append(slopes, own)
        moves = self._cov[:, at] @ slopes
        doubt = float(moves[at] @ slopes)
        noise = self._scatter.noise
        variance = doubt + noise**2
        surprise = math.log(step_s / typical_s)
        limit = CLIP * math.sqrt(variance)
        counted = min(max(surprise, -limit), limit)
        self._state += moves * (counted / variance)
        np.maximum(self._state, self._least, out=self._state)
        self._cov -= moves[:, None] * (moves / variance)
        self._num_observed += 1
        self._values = self._state.tolist()
        self._known.clear()
        self._notice_change(abs(surprise) > limit, at if draft_k else [])
        self._scatter.spread(surprise, doubt)
        if doubt < _SURE * noise**2:
            self._scatter.observe(drafter if draft_k else "none", step_s, typical_s)

    def _notice_change(self, is_outlier: bool, at: list[int]) -> None:
        """Take many outliers in a row for a change of the machine, or of what the arm costs."""
        self._outliers = self._outliers + 1 if is_outlier else 0
        if self._outliers == _MANY_OUTLIERS:
            self._outliers = 0
            self.num_changes += 1
            self._cov[0, 0] += _CHANGE_SD**2
            for drafter in at[2:3]:
                self._cov[drafter, drafter] += _CHANGE_SD**2

    def _drift(self) -> None:
        """Make all factors a little less certain."""
        if self._num_observed % _FORGET_STEPS == 0:
            speed = self._cov[0, 0]
            self._cov += _FORGET * (self._prior - self._cov)
            self._cov[0, 0] = speed
        self._cov[0, 0] += _SPEED_DRIFT**2

    def plain_s(self, batch: int) -> float:
        """Predicted seconds of a plain step."""
        typical_s = self._typical_plain_s(batch)
        return self._scatter.ratio("none") * typical_s + self._scatter.late_s("none", typical_s)

    def in_plain_steps(
        self, drafter: str, draft_k: int, batch: int, step_s: float
    ) -> tuple[float, bool]:
        """A step's time in plain steps, with lateness left out on both sides, and whether it was
        late. What is known of how late steps of this drafter are is added instead.

        A few steps tell whether they are faster than plain ones only so: of these, the mean has
        the lateness of many steps in it, and most stretches come without any.

        Args:
            step_s: of a step with drafts.
        """
        plain_s, scatter = self._typical_plain_s(batch), self._scatter
        _, _, typical_s = self._linearised(drafter, draft_k, batch)
        is_late = scatter.is_late(step_s, typical_s)
        usual_s = scatter.ratio(drafter) * typical_s
        late_s = scatter.late_s(drafter, plain_s) - scatter.late_s("none", plain_s)
        on_time_s = (usual_s if is_late else step_s) + late_s
        return on_time_s / (scatter.ratio("none") * plain_s), is_late

    def arm_times(self, drafter: str, batch: int) -> list[float]:
        """Predicted seconds at K = 1, 2, ... max_draft, not decreasing. Must not be changed."""
        found = self._known.arms.get((drafter, batch))
        if found is None:
            found = self._known.arms[drafter, batch] = self._arm_times(drafter, batch)
        return found

    def _arm_times(self, drafter: str, batch: int) -> list[float]:
        first, values = self._first[drafter], self._values
        common = math.exp(values[first] + values[first + 1 + self._max_draft + _size(batch)])
        typical_s = self._typical_plain_s(batch)
        mean_s = self._scatter.ratio(drafter) * typical_s
        late_s = self._scatter.late_s(drafter, typical_s)
        common /= 1 + self._reading
        times, longest = [], 0.0
        # In plain Python: for so few numbers it takes a third of the time of numpy.
        for increment, cost in zip(
            self._profile.increments(drafter, batch)[1:], values[first + 1 :], strict=False
        ):
            longest = max(longest, increment * common * math.exp(cost))
            times.append(mean_s * (1 + longest) + late_s)
        return times

    def doubt(self, drafter: str, draft_k: int, batch: int) -> float:
        """Standard deviation of the logarithm of an arm's time relative to a plain step's."""
        at, share, _ = self._linearised(drafter, draft_k, batch)
        variance = sum(self._cov.item(i, j) for i in at[2:] for j in at[2:])
        return share * math.sqrt(max(variance, 0.0))

    def figures(self) -> dict[str, Any]:
        """JSON-ready: factors on the start-up profile, scatter, and late time in milliseconds."""
        factors = np.exp(self._state).round(3).tolist()
        return {
            "speed": factors[0],
            "shapes": factors[1 : 1 + _SIZES],
            "read": round(_READ * factors[_READ_AT], 3),
            "costs": {
                kind: {
                    "drafter": factors[i],
                    "by_k": factors[i + 1 : i + 1 + self._max_draft],
                    "by_size": factors[i + 1 + self._max_draft : i + 1 + self._max_draft + _SIZES],
                }
                for kind, i in self._first.items()
            },
            **self._scatter.figures(),
        }

    def _typical_plain_s(self, batch: int) -> float:
        found = self._known.plain.get(batch)
        if found is None:
            log = self._values[0] + self._values[1 + _size(batch)]
            typical_s = self._profile.plain_s(batch) * math.exp(log) * (1 + self._reading)
            found = self._known.plain[batch] = typical_s
        return found

    def _linearised(self, drafter: str, k: int, batch: int) -> tuple[list[int], float, float]:
        """Indices of an arm's factors, the share of its time that the increment has, and its
        typical seconds."""
        size = _size(batch)
        plain_s = self._typical_plain_s(batch)
        if k == 0:
            return [0, 1 + size], 0.0, plain_s
        first = self._first[drafter]
        at = [0, 1 + size, first, first + k, first + 1 + self._max_draft + size]
        cost = math.exp(sum(self._values[i] for i in at[2:]))
        increment = self._profile.increments(drafter, batch)[k] * cost / (1 + self._reading)
        share = max(increment / (1 + increment), _LEAST_SHARE)
        return at, share, plain_s * (1 + increment)


def _prior(max_draft: int, num_drafters: int, is_measured: bool) -> Floats:
    """Covariance of all factors' logarithms; those of neighbouring K and sizes are alike."""
    by_k, by_size = (_OWN_SD**2 * _correlation(n) for n in (max_draft, _SIZES))
    drafter = np.array([[(_DRAFTER_SD if is_measured else _DRAFTER_SD_UNMEASURED) ** 2]])
    shape = (_SHAPE_SD if is_measured else _SHAPE_SD_UNMEASURED) ** 2 * _correlation(_SIZES)
    speed = np.array([[(_SPEED_SD if is_measured else _SPEED_SD_UNMEASURED) ** 2]])
    read = np.array([[_READ_SD**2]])
    blocks = [speed, shape, *[drafter, by_k, by_size] * num_drafters, read]
    prior = np.zeros((sum(map(len, blocks)),) * 2)
    at = 0
    for block in blocks:
        prior[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return prior


def _correlation(size: int) -> Floats:
    at = np.arange(size)
    found: Floats = np.exp(-np.abs(at[:, None] - at) / _NEIGHBOURS)
    return found


def _size(batch: int) -> int:
    return min(batch.bit_length() - 1, _SIZES - 1)
