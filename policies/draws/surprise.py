"""Samples in which the target rejected more of the drafts are more likely.

The surprise of a sample is the mean, over the draft tokens that the target verified, of
``1 - min(1, p(x) / q(x))``: the probability that the token x is rejected. Where tokens were drawn
from q, its expectation is one minus the overlap ``sum_x min(p(x), q(x))`` of both distributions;
for a greedy target, and for drafts without a distribution (q = 1), it is the share of tokens that
the target would not have chosen. Drafts of other drafters than the one in training do not count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from buffer.records import Count, Rounds
from configs.schema import TrainerSettings
from policies.draws.interface import Places, Pool, weighted_order

LEAST = 0.1
"""Surprise below which a sample is not drawn more seldom: what is well known must stay known."""


def draw(pool: Pool, settings: TrainerSettings, random: np.random.Generator) -> Places:
    """In proportion to the surprise, but at least ``LEAST``; a sample without drafts counts as the
    others do on average."""
    surprise = pool.surprise_N
    is_known = np.isfinite(surprise)
    usual = float(surprise[is_known].mean()) if is_known.any() else LEAST
    return weighted_order(np.log(np.where(is_known, surprise, usual).clip(min=LEAST)), random)


def surprise_of(rounds: Rounds, drafter: str) -> float | None:
    """Surprise in 0..1 of one trace; ``None`` if the drafter proposed nothing that was verified.

    Args:
        rounds: checked by ``buffer.codec``.
        drafter: kind of the drafter in training.
    """
    if drafter not in rounds.drafters:
        return None
    num_p, num_q = rounds.counts[Count.NUM_P], rounds.counts[Count.NUM_Q]
    is_own = rounds.counts[Count.DRAFTER] == rounds.drafters.index(drafter)
    num_own = num_p * is_own
    if not num_own.any():
        return None
    chosen = np.repeat(is_own, num_p)
    logp = rounds.p_logp[chosen].astype(np.float64)
    # The place of each of these tokens in q_logp: its round's first, plus its place in the round.
    first_p, first_q = np.cumsum(num_p) - num_p, np.cumsum(num_q) - num_q
    within = np.arange(len(rounds.p_logp)) - np.repeat(first_p, num_p)
    place = (np.repeat(first_q, num_p) + within)[chosen]
    has_q = np.repeat(num_q > 0, num_p)[chosen]
    logq = np.zeros(len(logp))
    logq[has_q] = rounds.q_logp[place[has_q]]
    return float(_rejected(logp, logq).mean())


def _rejected(logp: NDArray[np.float64], logq: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability of rejection; a token that q excludes (-inf) was never drawn, and counts 0."""
    with np.errstate(invalid="ignore"):
        log_ratio = np.where(np.isneginf(logq), 0.0, logp - logq)
    rejected: NDArray[np.float64] = 1 - np.exp(np.minimum(log_ratio, 0.0))
    return rejected
