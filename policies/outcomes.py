"""What became of the draft tokens of a request: a drafter's actions, and their reward.

A pure function of its rounds. Tokens behind the first rejected one of a round were not verified, so
nothing is known of them. Every committed token was verified in one round at most, which makes at
most one outcome for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Drafted:
    """One round of the drafter in training."""

    anchor: int
    draft_ids: Sequence[int]
    num_accepted: int
    q_logp: Sequence[float] | None
    """Of each draft token; ``None`` if they were not drawn from a distribution."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """By position p: what was drafted for the token at p + 1. T tokens."""

    depth_T: npt.NDArray[np.int32]
    """Draft tokens of the same round before it; -1: nothing was verified here."""
    rejected_T: npt.NDArray[np.int32]
    """The token that was rejected; -1: the committed token was drafted."""
    q_logp_T: npt.NDArray[np.float32]
    """Log probability with which it was drawn; NaN if it was not drawn."""


def outcomes_of(num_tokens: int, rounds: Iterable[Drafted]) -> Outcomes:
    """The outcomes of a request of so many tokens."""
    depth, rejected = (np.full(num_tokens, -1, dtype=np.int32) for _ in range(2))
    q_logp = np.full(num_tokens, np.nan, dtype=np.float32)
    for one in rounds:
        num_verified = min(one.num_accepted + 1, len(one.draft_ids))
        for at in range(min(num_verified, num_tokens - 1 - one.anchor)):
            place = one.anchor + at
            depth[place] = at
            if at == one.num_accepted:
                rejected[place] = one.draft_ids[at]
            if one.q_logp is not None:
                q_logp[place] = one.q_logp[at]
    return Outcomes(depth, rejected, q_logp)
