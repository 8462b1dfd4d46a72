"""Which positions matter more to a drafter than others: those where its drafts were rejected.

A pure function of a request's rounds. What a round drafted beyond the first rejected token is not
known to be wrong, and counts as any other position.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

LONG_RUN = 3
"""Rounds in a row of which nothing was kept, from which on a rejection counts twice: there the
drafter has lost the thread, while a single rejection may be the target's luck."""


def row_weights(
    num_tokens: int, rounds: Iterable[tuple[int, int, int]], rejected: float
) -> npt.NDArray[np.float32]:
    """Weight of the loss of the row at each position, 1 where nothing was rejected.

    The row at position p predicts the token at p + 1.

    Args:
        num_tokens: of the request.
        rounds: (anchor, tokens drafted, tokens kept) in order; those that drafted nothing do not
            interrupt a run.
        rejected: weight of a row whose draft token was rejected, >= 1; in a long run the excess
            over 1 is twice as large.

    Returns:
        [num_tokens].
    """
    weights = np.ones(num_tokens, dtype=np.float32)
    run = 0
    for anchor, num_drafted, num_kept in rounds:
        if not num_drafted:
            continue
        run = 0 if num_kept else run + 1
        place = anchor + num_kept
        if num_kept < num_drafted and place < num_tokens:
            weights[place] = 1 + (rejected - 1) * (2 if run >= LONG_RUN else 1)
    return weights
