"""What a policy of K, or of K and a share that is verified, does in the steps of a log.

Shapes: S steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from policies.budgets import BudgetScores
from policies.logged import Floats
from policies.replayed_log import ReplayedLog

Ks = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PairPlay:
    """Decisions, and what they bring."""

    ks: Ks
    """[S]"""
    shares: Ks
    """[S] number of the share that is verified; the last one where nothing is cut."""
    num_shares: int
    tokens: Floats
    """[S] of the whole batch."""
    seconds: Floats
    """[S]"""
    budgets: BudgetScores | None = None
    """Of these steps; ``None``: nothing is cut in any."""

    @classmethod
    def of(
        cls, log: ReplayedLog, ks: Ks, shares: Ks | None = None,
        budgets: BudgetScores | None = None,
    ) -> Self:  # fmt: skip
        """
        Args:
            shares, budgets: both, or neither: everything is verified.
        """
        at = np.arange(len(ks))
        if shares is None or budgets is None:
            return cls(ks, np.zeros_like(ks), 1, log.tokens[at, ks], log.seconds[at, ks])
        place = at, ks, shares
        tokens, seconds = budgets.tokens[place], budgets.seconds[place]
        return cls(ks, shares, budgets.num_shares, tokens, seconds, budgets)

    def rows(self, kept: NDArray[np.bool_]) -> Self:
        """Those of some of the steps.

        Args:
            kept: [S].
        """
        return type(self)(
            self.ks[kept], self.shares[kept], self.num_shares, self.tokens[kept],
            self.seconds[kept], None if self.budgets is None else self.budgets.rows(kept),
        )  # fmt: skip

    @property
    def is_cut(self) -> NDArray[np.bool_]:
        """[S] a smaller share than everything is verified."""
        return (self.ks > 0) & (self.shares < self.num_shares - 1)

    @property
    def verified(self) -> float:
        """Share of the draft tokens that is verified; 1 where nothing is drafted."""
        drafted = self.ks.sum()
        kept = (self.ks * (self.shares + 1) / self.num_shares).sum()
        return float(kept / drafted) if drafted else 1.0
