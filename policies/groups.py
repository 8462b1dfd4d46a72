"""How much better or worse drafts of some requests are kept: shifts by temperature and by tenant.

The acceptance of a drafter (``policies.acceptance``) follows the traffic of the moment. In a batch,
or from one request to the next, requests differ in what is known of them beforehand: the
temperature at which they sample, and whose they are. Each such group has a shift in log-odds, the
same at every position, because text that is hard is so at every depth:

    P(position j kept | all before it, group) = sigmoid(log-odds of c_j + a[class] + b[tenant])

with a for the class of the temperature and b for the tenant. Both are 0 until a second group has
drafted. They are the state of an extended Kalman filter with a diagonal covariance, so a group with
little evidence stays near 0, the acceptance of all (hierarchical shrinkage), and one of a tenant
at a temperature that it never used before takes both its parts from others.

What the shifts explain is taken out of the counts that the common acceptance is made of
(``Excess``): it is that of a group without a shift, whoever has drafted lately, and no change of
the batch looks like a change of the traffic.

Shapes: B kinds of match, K draft tokens, U different rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policies.calibration import Calibration
from policies.log_odds import log_odds, shifted
from policies.round_counts import Beyond, Excess, Ints, Rounds
from policies.versions import remember

Floats = NDArray[np.float64]

CLASS_BOUNDS = (0.0, 0.5, 1.0)
"""Temperatures up to which requests are of class 0, 1 and 2; above are those of class 3."""
NUM_CLASSES = len(CLASS_BOUNDS) + 1
NUM_TENANTS = 64
"""Numbers of tenants; 0 is of all those that have none of their own."""
_MOST_TENANTS = 24
"""Tenants whose shift is kept, those that drafted last. An engine does not give a tenant's number
to another before more than these have drafted (``serving.engine.grouping``)."""
_CLASS_SD, _TENANT_SD = 1.0, 0.7
"""Prior standard deviations of shifts."""
_FORGET = 1 / 4000
"""Share by which a shift and its certainty return to the prior, in a round of its group."""
_TEMPER = 0.5
"""Weight of a round: rounds of one request resemble each other."""
_MOST = 4.0
"""Largest shift."""
_CARRIED, _CARRIED_DOUBT = 0.8, 0.3
"""What is left of shifts after a swap to weights of which nothing is known, and the share by which
they are as uncertain again as at first: hard text stays hard."""
_PUBLISHED_ROUNDS = 64.0
"""Rounds that a published acceptance of a class counts for."""


def group_of(tenant: int, temperature: float) -> int:
    """The number of a group, 0..255.

    Args:
        tenant: 0..63, see ``NUM_TENANTS``.
    """
    return tenant * NUM_CLASSES + class_of(temperature)


def class_of(temperature: float) -> int:
    """Class of a temperature; greedy requests have one of their own."""
    return sum(temperature > bound for bound in CLASS_BOUNDS)


class Mix(NamedTuple):
    """The groups of a batch."""

    shares: tuple[tuple[int, float], ...]
    """(group, share of the requests), in order of the groups; shares sum to 1."""

    @classmethod
    def of(cls, groups: Iterable[int]) -> Mix:
        """Count the group of every request."""
        counts = np.bincount(np.frombuffer(bytes(groups), np.uint8))
        at = np.flatnonzero(counts)
        shares = counts[at] / counts.sum()
        return cls(tuple(zip(at.tolist(), shares.tolist(), strict=True)))

    def distance(self, other: Mix) -> float:
        """Share of the requests, in 0..1, that are of other groups (total variation)."""
        own, others = dict(self.shares), dict(other.shares)
        return sum(abs(own.get(g, 0.0) - others.get(g, 0.0)) for g in {*own, *others}) / 2


@dataclass(slots=True)
class _Shift:
    """A normal belief about one shift."""

    prior: float
    """Variance."""
    mean: float = 0.0
    variance: float = -1.0

    def __post_init__(self) -> None:
        if self.variance < 0:
            self.variance = self.prior

    def forget(self, rounds: float) -> None:
        """Return to the prior by some rounds."""
        share = 1 - math.exp(-_FORGET * rounds)
        self.mean *= 1 - share
        self.variance += share * (self.prior - self.variance)

    def carried(self) -> _Shift:
        """What it says of other weights."""
        variance = self.variance + _CARRIED_DOUBT * (self.prior - self.variance)
        return _Shift(self.prior, _CARRIED * self.mean, variance)


_State = dict[tuple[str, int], _Shift]
"""By ``class`` or ``tenant``, and its number; that used last is the last one."""


class Weighed(NamedTuple):
    """Some rounds and what was expected of them. U different ones, of G groups."""

    buckets_U: Ints
    beyond_UK: Floats
    """Rounds that are expected to keep each position beyond those of a group without a shift,"""
    tokens_U: Floats
    """and tokens of whole drafts, likewise."""
    groups: list[int]
    """[G]"""
    surplus: list[float]
    """[G] tokens kept beyond those expected,"""
    weights: list[float]
    """[G] the variance of that,"""
    counts: list[int]
    """[G] and rounds."""

    def beyond(self) -> Beyond:
        """What ``AcceptanceModel.observe`` leaves out, by kind of match and of all."""
        everything = Excess(self.beyond_UK.sum(axis=0), float(self.tokens_U.sum()))
        found: dict[int | None, Excess] = {None: everything}
        for bucket in np.unique(self.buckets_U).tolist():
            if bucket >= 0:
                own = self.buckets_U == bucket
                found[bucket] = Excess(
                    self.beyond_UK[own].sum(axis=0), float(self.tokens_U[own].sum())
                )
        return found


class Shifts:
    """The shifts of one drafter's groups."""

    def __init__(self) -> None:
        self._state: _State = {}
        self._first: int | None = None
        """The first group that drafted."""
        self._known: dict[int, _State] = {}
        """Of versions that have left."""
        self.is_used = False
        """A second group has drafted."""
        self.number = 0
        """Of changes; what was computed from the shifts is valid while it is the same."""

    def of(self, group: int) -> float:
        """Shift of a group, in log-odds."""
        state = self._state
        return sum([state[key].mean for key in _keys(group) if key in state])

    def weigh(self, rounds: Rounds, hazards: Floats) -> Weighed:
        """Compare rounds with what the shifts say of them.

        Args:
            hazards: [B + 1, K] of a group without a shift by kind of match; the last row is for
                rounds whose match nobody looked up.
        """
        numbers, which_U = np.unique(rounds.groups_U, return_inverse=True)
        groups = numbers.tolist()
        shifts_U = np.array([self.of(group) for group in groups])[which_U]
        usual_UK = hazards[rounds.buckets_U]
        own_UK = shifted(usual_UK, shifts_U[:, None])
        place, verified_U = np.arange(hazards.shape[1]), rounds.verified_U
        reached_U = np.minimum(rounds.accepted_U + 1, verified_U)
        reached_UK = (place < reached_U[:, None]) * rounds.counts_U[:, None]
        kept_UK = (place < rounds.accepted_U[:, None]) * rounds.counts_U[:, None]
        both = np.stack((own_UK, usual_UK)).cumprod(axis=2).cumsum(axis=2)
        at = np.arange(len(verified_U))
        tokens_U = (both[0] - both[1])[at, verified_U - 1] * rounds.counts_U
        expected_UK = reached_UK * own_UK
        return Weighed(
            rounds.buckets_U,
            expected_UK - reached_UK * usual_UK,
            tokens_U,
            groups,
            np.bincount(which_U, (kept_UK - expected_UK).sum(axis=1)).tolist(),
            np.bincount(which_U, (expected_UK * (1 - own_UK)).sum(axis=1)).tolist(),
            np.bincount(which_U, rounds.counts_U).tolist(),
        )

    def learn(self, seen: Weighed) -> None:
        """Take in rounds that were weighed."""
        before = [self.of(group) for group in seen.groups]
        columns = zip(seen.groups, before, seen.surplus, seen.weights, seen.counts, strict=True)
        for group, shift, surplus, weight, count in columns:
            self._first = group if self._first is None else self._first
            self.is_used = self.is_used or group != self._first
            if self.is_used:
                # Another group's rounds may have moved a part of this one's shift.
                self._learn(group, surplus - weight * (self.of(group) - shift), weight, count)
                self.number += 1

    def is_news(self, groups: bytes) -> bool:
        """Whether there is anything to learn from a step: a second group."""
        if self.is_used:
            return True
        self._first = groups[0] if self._first is None else self._first
        return groups.count(self._first) < len(groups)

    def _learn(self, group: int, surplus: float, weight: float, num_rounds: int) -> None:
        """Take in rounds of one group.

        Args:
            surplus: tokens that were kept beyond those expected.
            weight: variance of that.
        """
        parts = [self._part(key) for key in _keys(group)]
        for part in parts:
            part.forget(num_rounds)
        scale = 1 + _TEMPER * weight * sum(part.variance for part in parts)
        for part in parts:
            moved = part.mean + part.variance * _TEMPER * surplus / scale
            part.mean = min(max(moved, -_MOST), _MOST)
            part.variance -= part.variance**2 * _TEMPER * weight / scale

    def _part(self, key: tuple[str, int]) -> _Shift:
        part = self._state.pop(key, None)
        if part is None:
            part = _Shift((_CLASS_SD if key[0] == "class" else _TENANT_SD) ** 2)
            tenants = [other for other in self._state if other[0] == "tenant"]
            if key[0] == "tenant" and len(tenants) == _MOST_TENANTS:
                del self._state[tenants[0]]
        self._state[key] = part
        return part

    def on_swap(self, leaving: int | None, version: int, calibration: Mapping[str, Any]) -> None:
        """Other weights draft from now on. A version that comes back has the shifts it left with;
        what a new one takes over is a part of the former's, and where its calibration tells the
        acceptance by class of temperature, that.

        Args:
            leaving: version that was in force, if that is known.
            calibration: see ``DraftPolicy.on_swap``.
        """
        if leaving is not None:
            remember(self._known, leaving, self._state)
        known = self._known.get(version)
        self._state = {
            key: _Shift(part.prior, part.mean, part.variance) if known else part.carried()
            for key, part in (known or self._state).items()
        }
        if not known:
            self._take(calibration)
        self.number += 1

    def _take(self, calibration: Mapping[str, Any]) -> None:
        """Start classes from published figures."""
        published = published_shifts(calibration)
        for number, (shift, weight) in published.items():
            part = self._part(("class", number))
            variance = 1 / (1 / part.prior + weight)
            part.mean = shift * weight * variance
            part.variance = variance
        self.is_used = self.is_used or len(published) > 1

    def figures(self) -> dict[str, Any]:
        """JSON-ready: shift and standard deviation of classes and tenants, once there are two."""
        if not self.is_used:
            return {}
        return {
            f"{what}/{number}": [round(part.mean, 3), round(math.sqrt(part.variance), 3)]
            for (what, number), part in sorted(self._state.items())
        }


def published_shifts(calibration: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """Shift of each class against all, and its weight, by the first position of what was published
    as ``acceptance`` and ``acceptance_by_temperature``; nothing of what is malformed."""
    read = Calibration.of(calibration)
    if not read.acceptance:
        return {}
    found, whole = {}, log_odds(read.acceptance[0])
    for name, of_class in read.by_temperature.items():
        if of_class and name in _CLASS_NAMES:
            weight = _TEMPER * _PUBLISHED_ROUNDS * of_class[0] * (1 - of_class[0])
            found[_CLASS_NAMES.index(name)] = (log_odds(of_class[0]) - whole, weight)
    return found


_CLASS_NAMES = tuple(str(number) for number in range(NUM_CLASSES))
"""As JSON has them."""


@cache
def _keys(group: int) -> tuple[tuple[str, int], ...]:
    tenant, number = divmod(group, NUM_CLASSES)
    return ("class", number), ("tenant", tenant)
