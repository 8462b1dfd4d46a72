"""Which versions of a drafter draft alike, so that steps of one tell what drafts of another bring.

A version is like the newest one unless its drafts keep another number of tokens, by more than
chance explains and by more than matters. Versions are compared from the newest back, and what lies
before one that is unlike is left out: traffic may have been another then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from policies.logged import Floats, LoggedStep

_POSITIONS = 4
"""Draft positions that are compared."""
_CHANCE = 13.8
"""Squared standard errors, over all positions, that are not chance any more: one in a thousand for
two of them."""
_SPREAD = 2.0
"""Variance of counts relative to that of independent rounds: those of a request are alike."""
_MATTERS = 0.03
"""Relative difference of the tokens that a draft is expected to bring."""
_LEAST_ROUNDS = 30
"""At a position, in both versions, for it to be compared."""


def first_alike(steps: Sequence[LoggedStep], drafter: str) -> tuple[int, int]:
    """Where the steps begin that are of versions which draft like the newest one.

    Args:
        steps: in order; what other drafters did is passed over.

    Returns:
        Number of the first such step, and the oldest of these versions.

    Raises:
        ValueError: the drafter drafted nothing.
    """
    counts: dict[int, Floats] = {}
    first: dict[int, int] = {}
    for at, step in enumerate(steps):
        if step.drafter != drafter or step.is_mixed or not step.draft_k:
            continue
        first.setdefault(step.version, at)
        own = counts.setdefault(step.version, np.zeros((2, _POSITIONS)))
        for row in step.rows:
            own[0, : min(row.num_accepted + 1, row.num_verified, _POSITIONS)] += 1
            own[1, : min(row.num_accepted, _POSITIONS)] += 1
    if not counts:
        raise ValueError(f"no step was drafted by {drafter!r}")
    newest, *older = sorted(counts, reverse=True)
    oldest, start = newest, first[newest]
    for version in older:
        if not are_alike(counts[newest], counts[version]):
            break
        oldest, start = version, min(start, first[version])
    unlike = [at for version, at in _last(steps, drafter).items() if version < oldest]
    return max([start, *(at + 1 for at in unlike)]), oldest


def _last(steps: Sequence[LoggedStep], drafter: str) -> dict[int, int]:
    """Last step of each version."""
    return {
        step.version: at
        for at, step in enumerate(steps)
        if step.drafter == drafter and not step.is_mixed and step.draft_k
    }


def are_alike(one: Floats, other: Floats) -> bool:
    """Whether two versions draft alike as far as is known.

    Args:
        one, other: [2, J] rounds that reached each position, and that kept it.
    """
    enough = np.minimum(one[0], other[0]) >= _LEAST_ROUNDS
    if not enough[0]:
        return True  # nothing speaks against it
    num = int(enough.argmin()) if not enough.all() else len(enough)
    (reached, kept), (reached_b, kept_b) = one[:, :num], other[:, :num]
    pooled = (kept + kept_b) / (reached + reached_b)
    variance = _SPREAD * pooled * (1 - pooled) * (1 / reached + 1 / reached_b)
    differences = kept / reached - kept_b / reached_b
    far = float((differences**2 / np.maximum(variance, 1e-9)).sum())
    tokens, tokens_b = (
        1 + float(np.cumprod(hazards).sum()) for hazards in (kept / reached, kept_b / reached_b)
    )
    return far < _CHANCE + 2 * (num - 2) or abs(math.log(tokens / tokens_b)) < _MATTERS
