"""What a drafter may bring at most, by what its rounds leave open.

Whoever takes an index for poor after a few unlucky rounds, and does not try it again, never learns
better. So matches that are believed not to be worth a draft are tried where they may be: by an
upper bound of acceptance, which few rounds leave wide, and which time without any widens again.

Shapes: B kinds of match, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

_WEIGHT = 4.0
"""Rounds that what was known before the recent ones counts for: it was so when the drafter was last
in use."""
_DRIFT = 0.2
"""Standard deviation by which a kind of match changes in a half-life without a round of it."""
_MOST = 0.99
"""Largest bound of what a position keeps."""

Floats = NDArray[np.float64]


class Hopes:
    """Upper bounds of expected tokens, by drafter."""

    def __init__(self, half_life_rounds: float) -> None:
        self._half_life_rounds = half_life_rounds
        self._known: dict[str, tuple[Floats, Floats]] = {}
        """Expected tokens, and their bounds, which stay the same as long as these do."""
        self._drafted_at: dict[tuple[str, int | None], float] = {}
        """Rounds that the engine had done at the last one of each drafter and kind of match."""

    def drafted(self, drafter: str, kinds: Iterable[int | None], clock: float) -> None:
        """A drafter has had rounds of these kinds."""
        for kind in kinds:
            self._drafted_at[drafter, kind] = clock

    def tokens(
        self,
        drafter: str,
        expected: Floats,
        recent: Callable[[], tuple[Floats, Floats]],
        clock: float,
    ) -> Floats:
        """[B, K + 1] tokens of a round: those expected, with hazards a standard deviation higher.

        Args:
            expected: [B, K + 1].
            recent: returns [B, K] hazards, and the recent rounds behind them.
            clock: rounds that the engine has done.
        """
        known = self._known.get(drafter)
        if known is None or known[0] is not expected:
            hazards, rounds = recent()
            drafted_at = [self._drafted_at.get((drafter, b), 0.0) for b in range(len(hazards))]
            moved = _DRIFT**2 * (clock - np.array(drafted_at)) / self._half_life_rounds
            variance = hazards * (1 - hazards) / (rounds + _WEIGHT) + moved[:, None]
            terms = np.minimum(hazards + np.sqrt(variance), _MOST).cumprod(axis=1)
            terms[expected[:, 1] <= 1.0] = 0.0  # nothing can be drafted
            bound = np.ones_like(expected)
            bound[:, 1:] += terms.cumsum(axis=1)
            known = self._known[drafter] = expected, bound
        return known[1]
