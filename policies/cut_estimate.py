"""Off-policy estimates of policies that choose a verification budget besides K.

Tokens of a cut draft are known from every step that verified a whole draft at least as long and
noted its figures: they tell what the cut would have left, and the outcome what that keeps. Seconds
are those of steps in which the log ran the same K under the same budget. Both are doubly robust;
what is wanted without a cut is estimated as ``policies.evaluation.sampled_rate`` does.

Shapes: S steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from policies.budgets import NOTED, BudgetScores, budget_of
from policies.evaluation import sampled_rate
from policies.logged import Floats, LoggedStep
from policies.off_policy import (
    MAX_WEIGHT,
    Estimate,
    Reward,
    Sampled,
    by_position,
    importance_weights,
    normalised,
    throughput,
)
from policies.played_pair import PairPlay
from policies.replayed_log import ReplayedLog


def off_policy_gain_of(log: ReplayedLog, ours: PairPlay, theirs: PairPlay) -> Estimate | None:
    """Speed of some decisions over that of others; ``None`` if that of one of them is not known."""
    rates = sampled_pair(log, ours), sampled_pair(log, theirs)
    return None if rates[0] is None or rates[1] is None else rates[0].over(rates[1])


def sampled_pair(log: ReplayedLog, play: PairPlay) -> Sampled | None:
    """Doubly robust tokens per second.

    Returns:
        ``None`` if at some load the log has no step in common with the decisions, or if there are
        too few steps.
    """
    budgets = play.budgets
    if budgets is None or not play.is_cut.any():
        return sampled_rate(log, play.ks)
    taken = np.array([step.draft_k for step in log.steps])
    may_cut = np.array([step.may_cut for step in log.steps])
    inside = taken <= log.max_draft
    propensity = np.array([step.propensity for step in log.steps])
    taken = np.minimum(taken, log.max_draft)
    wanted = np.array(
        [
            budget_of(share, play.num_shares, step.batch, k) if is_cut else k * step.batch
            for step, k, share, is_cut in zip(
                log.steps, play.ks.tolist(), play.shares.tolist(), play.is_cut, strict=True
            )
        ]
    )
    ran = np.array([_budget_run(step) for step in log.steps])
    weights = importance_weights((taken == play.ks) & (ran == wanted) & inside, propensity)
    in_row = np.concatenate(([False], taken[:-1] > 0)) | (taken == 0)
    means_something = in_row & np.array([step.is_timed for step in log.steps])
    timed = normalised(weights * means_something, 2 * log.sizes + (play.ks > 0))
    batches = np.array([step.batch for step in log.steps], np.float64)
    whole = np.where(inside & ~may_cut, propensity, np.inf)
    kept = _kept_whole(log, play, taken, whole, batches)
    kept = np.where(play.is_cut, _kept_cut(log, play, budgets, taken, whole, batches), kept)
    seconds = np.array([step.step_s for step in log.steps])
    at = np.arange(len(taken))
    # Also where the log does not tell what such a cut would keep.
    model = log.seconds[at, play.ks] - budgets.saved[at, play.ks, play.shares]
    return throughput(
        Reward(batches + kept, weights=np.ones(len(taken))),
        Reward(seconds, model, model, timed),
        weights * means_something,
        log.sizes,
        work=np.array([step.tokens for step in log.steps]),
    )


def _budget_run(step: LoggedStep) -> int:
    """Draft tokens that a logged step had room for over its batch; -1 if that is not known."""
    if not step.may_cut:
        return step.draft_k * step.batch
    found = (value for name, value in step.notes if name.endswith(f".{NOTED}"))
    each = next(found, None)
    return -1 if each is None else round(each * step.batch)


def _kept_whole(
    log: ReplayedLog,
    play: PairPlay,
    taken: NDArray[np.int64],
    propensity: Floats,
    batches: Floats,
) -> Floats:
    """[S] tokens that drafts keep where nothing is cut."""
    ks = np.where(play.is_cut, 0, play.ks)
    survival = batches[:, None] * np.cumprod(log.hazards)
    return by_position(log.survivors, survival, taken, ks, propensity, log.sizes)


def _kept_cut(
    log: ReplayedLog,
    play: PairPlay,
    budgets: BudgetScores,
    taken: NDArray[np.int64],
    propensity: Floats,
    batches: Floats,
) -> Floats:
    """[S] tokens that drafts keep where they are cut; the model is the mean of the load.

    Args:
        propensity: [S] of the log's decision; ``inf`` for a step that must not count.
    """
    found = np.zeros(len(taken))
    for k in np.unique(play.ks[play.is_cut]).tolist():
        tells = (taken >= k) & budgets.is_known[:, k] & np.isfinite(propensity)
        weights = normalised(
            np.minimum(np.where(tells, 1 / propensity, 0.0), MAX_WEIGHT), log.sizes
        )
        for share in np.unique(play.shares[play.is_cut & (play.ks == k)]).tolist():
            kept = budgets.tokens[:, k, share] / batches - 1
            model = _mean_by(kept, weights, log.sizes)
            here = play.is_cut & (play.ks == k) & (play.shares == share)
            found[here] = (batches * (model + weights * (kept - model)))[here]
    return found


def _mean_by(values: Floats, weights: Floats, groups: NDArray[np.int64]) -> Floats:
    """[S] weighted mean of each group; that of all where a group has no weight."""
    total = weights.sum()
    overall = float((weights * values).sum() / total) if total else 0.0
    found = np.full(len(values), overall)
    for one in np.unique(groups).tolist():
        rows = groups == one
        if weights[rows].any():
            found[rows] = (weights[rows] * values[rows]).sum() / weights[rows].sum()
    return found
