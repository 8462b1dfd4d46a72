"""What a policy would have brought, from decisions that another one made with known probability.

Three estimates of a mean over steps (Dudik, Langford and Li 2011, arXiv:1103.4601). ``IPS`` weighs
each step in which the log did what the policy would do by how unlikely that was. ``SNIPS`` divides
by the sum of these weights instead of by the number of steps, which trades a small bias for much
scatter. ``doubly robust`` starts from a model of every action and corrects it by weighted
residuals: it is right if either the model or the probabilities are, and scatters less the better
the model is.

A throughput is a quotient of two means, tokens and seconds, both estimated on the same steps; then
IPS and SNIPS agree. Intervals are percentiles of a bootstrap over blocks of neighbouring steps,
because requests last for many steps and their rounds resemble each other.

Shapes: S steps, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_WEIGHT = 50.0
"""Larger weights are cut off: one step must not decide."""
BLOCK_STEPS = 16
LEAST_BLOCKS = 8
"""With fewer nothing is estimated: resampling one block, or two, gives an interval without width,
which is no certainty."""
RESAMPLES = 400
_NOTHING = 1e-12


def block_steps(num_steps: int) -> int:
    """Steps of a block that is resampled as one; fewer for a load that has few."""
    return max(min(BLOCK_STEPS, num_steps // LEAST_BLOCKS), 1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float
    """95 % of the resampled values are between both."""
    effective_steps: float
    """Steps that the weights are worth, (sum w)^2 / sum w^2; with less than some hundreds, believe
    little."""


@dataclass(frozen=True, slots=True)
class Reward:
    """What the steps of a log brought, of one sort."""

    logged: Floats
    """[S] as observed, by the actions that were taken."""
    model_logged: Floats | None = None
    """[S] what a model says of the actions that were taken."""
    model_target: Floats | None = None
    """[S] what it says of the actions that the policy would take. Both, or neither: with them the
    estimate is doubly robust."""
    weights: Floats | None = None
    """[S] of this reward, where they are not those of the steps."""


def importance_weights(is_same: NDArray[np.bool_], propensity: Floats) -> Floats:
    """[S] weights of steps: 0 where the policy would have done something else.

    Args:
        is_same: [S] the policy would have taken the logged action. For one that draws its actions,
            of the one that it drew: right on average.
        propensity: [S] probability with which the log took it.

    Raises:
        ValueError: a step was taken with probability 0.
    """
    if (propensity <= 0).any():
        raise ValueError("a logged action has probability 0, so it cannot be weighed")
    return np.minimum(np.where(is_same, 1 / propensity, 0.0), MAX_WEIGHT)


def normalised(weights: Floats, groups: NDArray[np.int64]) -> Floats:
    """[S] weights with mean 1 in every group of steps. Those of a group without any stay 0.

    Args:
        groups: [S].
    """
    found = weights.copy()
    for one in np.unique(groups).tolist():
        rows = groups == one
        found[rows] /= max(float(weights[rows].mean()), _NOTHING)
    return found


def by_position(
    kept: Floats,
    survival: Floats,
    taken: NDArray[np.int64],
    wanted: NDArray[np.int64],
    propensity: Floats,
    strata: NDArray[np.int64],
) -> Floats:
    """[S] doubly robust tokens that a policy's drafts keep, from every draft that was long enough.

    Whether a draft's first j tokens are kept does not depend on how many follow. So a step with K
    tells of position j what one with any other K >= j would, and its weight is shared among these:
    1 / propensity, divided by how many they are (balanced importance sampling; the side
    observations of Alon et al. 2017, arXiv:1409.8428). Where every K is as likely as the others of
    0 to 8, position 1 is known from eight ninths of the steps, not from the ninth whose K is 1.

    Args:
        kept: [S, K] requests of the batch that kept position 1, 2, ... and all before it.
        survival: [S, K] what a model expects of that, without the step's outcome.
        taken: [S] K of the log.
        wanted: [S] K of the policy.
        propensity: [S] of the log's decision; ``inf`` for a step that must not count.
        strata: [S] load of each step; weights have mean 1 in each.
    """
    found = np.zeros(len(taken))
    most = kept.shape[1]
    for j in range(1, most + 1):
        weights = np.minimum(np.where(taken >= j, 1 / propensity, 0.0), MAX_WEIGHT)
        weights = normalised(weights, strata)
        expected = survival[:, j - 1]
        found += np.where(wanted >= j, expected + weights * (kept[:, j - 1] - expected), 0.0)
    return found


def ips(reward: Reward, weights: Floats, seed: int = 0) -> Estimate | None:
    """Inverse propensity scoring; ``None`` if no step counts, or there are too few."""
    return _estimate(weights * reward.logged, np.ones_like(weights), weights, seed)


def snips(reward: Reward, weights: Floats, seed: int = 0) -> Estimate | None:
    """The self-normalised estimate; ``None`` if no step counts, or there are too few."""
    return _estimate(weights * reward.logged, weights, weights, seed)


def doubly_robust(reward: Reward, weights: Floats, seed: int = 0) -> Estimate | None:
    """The doubly robust estimate of a reward that has a model; ``None`` if no step counts, or there
    are too few."""
    return _estimate(_corrected(reward, weights), np.ones_like(weights), weights, seed)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """An estimate, and the same of resampled steps."""

    value: float
    resampled: Floats
    """[B]"""
    weights: Floats
    """[S] of the steps."""

    def estimate(self) -> Estimate:
        """With its interval."""
        low, high = np.percentile(self.resampled, (2.5, 97.5)).tolist()
        effective = float(self.weights.sum() ** 2 / (self.weights**2).sum())
        return Estimate(self.value, low, high, effective)

    def over(self, other: Sampled) -> Estimate:
        """Quotient of two estimates from the same steps, whose resamples are the same blocks."""
        quotient = Sampled(
            self.value / other.value, self.resampled / other.resampled, self.weights
        ).estimate()
        fewer = min(quotient.effective_steps, other.estimate().effective_steps)
        return Estimate(quotient.value, quotient.low, quotient.high, fewer)


def throughput(
    tokens: Reward,
    seconds: Reward,
    weights: Floats,
    strata: NDArray[np.int64] | None = None,
    seed: int = 0,
    *,
    work: Floats | None = None,
) -> Sampled | None:
    """Tokens per second; doubly robust in those of the two that have a model.

    Args:
        strata: [S] load of each step. Every load has its own estimate, and the whole is that of the
            same work over the time that it would take, each load at its own speed. ``None``: all
            steps are alike.
        work: [S] tokens of each step by which loads weigh. They must be those of the log for
            policies that are compared: one that drafts more at some loads would give these more
            weight by its own. ``None``: ``tokens.logged``.

    Returns:
        ``None`` if some load has no step that counts, or all of them are too few steps.
    """
    if len(weights) < LEAST_BLOCKS * BLOCK_STEPS:
        return None
    above, below = _corrected(tokens, weights), _corrected(seconds, weights)
    strata = np.zeros(len(weights), np.int64) if strata is None else strata
    total, times, resampled = 0.0, 0.0, np.zeros(RESAMPLES)
    for number, one in enumerate(np.unique(strata).tolist()):
        rows = strata == one
        found = _Sums.of(above[rows], below[rows], weights[rows], seed + number)
        if found is None:
            return None
        own = float((tokens.logged if work is None else work)[rows].sum())
        total += own
        times += own / found.value
        resampled += own / found.resampled
    return Sampled(total / times, total / resampled, weights)


def mean_of(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Of a policy that draws its decisions, over several seeds on one log; they share the steps, so
    the mean is about as uncertain as each. ``None`` if one is not known."""
    known = [one for one in estimates if one is not None]
    if len(known) < len(estimates):
        return None
    names = ("value", "low", "high", "effective_steps")
    return Estimate(*(float(np.mean([getattr(one, name) for one in known])) for name in names))


def _corrected(reward: Reward, weights: Floats) -> Floats:
    weights = weights if reward.weights is None else reward.weights
    if reward.model_logged is None or reward.model_target is None:
        return weights * reward.logged
    return reward.model_target + weights * (reward.logged - reward.model_logged)


def _estimate(above: Floats, below: Floats, weights: Floats, seed: int) -> Estimate | None:
    """Quotient of two sums over steps."""
    if len(weights) < LEAST_BLOCKS * BLOCK_STEPS:
        return None
    found = _Sums.of(above, below, weights, seed)
    return None if found is None else Sampled(found.value, found.resampled, weights).estimate()


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """A quotient of two sums over steps, and the same over resampled blocks of steps."""

    value: float
    resampled: Floats
    """[B]; a resample that misses all steps that count takes the value itself."""

    @classmethod
    def of(cls, above: Floats, below: Floats, weights: Floats, seed: int) -> _Sums | None:
        """``None`` if no step counts. A load with few steps has shorter blocks."""
        if not weights.any() or below.sum() <= 0:
            return None
        value = float(above.sum() / below.sum())
        starts = np.arange(0, len(above), block_steps(len(above)))
        blocks = np.add.reduceat(np.stack((above, below)), starts, axis=1)
        drawn = np.random.default_rng(seed).integers(0, len(starts), (RESAMPLES, len(starts)))
        sums = blocks[:, drawn].sum(axis=2)
        counts = sums[1] > 0
        return cls(value, np.where(counts, sums[0] / np.where(counts, sums[1], 1.0), value))
