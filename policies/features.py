"""What a learned policy sees before it decides: figures of earlier steps, the batch, and times.

Server and trainer use this very class, so a policy is fitted on what it will see. Nothing in it
depends on a drawn token of the step to come.
"""

from __future__ import annotations

from collections.abc import Sequence

NAMES = (
    "batch",
    "cost_1",
    "cost_half",
    "cost_most",
    "tokens_fast",
    "tokens_slow",
    "hazard_1",
    "hazard_2",
    "hazard_3",
    "hazard_4",
    "hazard_deep",
    "last_k",
    "last_accepted",
    "all_kept",
)
"""In the order of ``Features.vector``."""
NUM_FEATURES = len(NAMES)

_FAST, _SLOW = 0.3, 0.02
_HAZARD_GAIN = 0.02
_NUM_HAZARDS = 5
"""Positions 1 to 4, and all deeper ones together."""
_FIRST_HAZARD = 0.6
_MOST_COST = 8.0
"""Relative cost of a draft beyond which it does not matter how much it is."""


class Features:
    """The running figures of one server, or of one replayed log."""

    def __init__(self, max_draft: int) -> None:
        """
        Args:
            max_draft: K by which lengths are divided, >= 1.
        """
        self._max_draft = max_draft
        self.forget()

    def forget(self) -> None:
        """Start over: other weights draft."""
        self._fast = self._slow = 1.5
        self._hazards = [_FIRST_HAZARD] * _NUM_HAZARDS
        self._last_k, self._last_accepted, self._all_kept = 0.0, 0.0, 0.0

    def observe(
        self, draft_k: int, num_verified: Sequence[int], num_accepted: Sequence[int]
    ) -> None:
        """Take in the rounds of a step; a plain one says only that it was plain."""
        self._last_k = draft_k / self._max_draft
        if not draft_k or not num_accepted:
            return
        size = len(num_accepted)
        mean = sum(num_accepted) / size
        self._fast += _FAST * (1 + mean - self._fast)
        self._slow += _SLOW * (1 + mean - self._slow)
        self._last_accepted = mean / self._max_draft
        kept = sum(map(int.__eq__, num_verified, num_accepted))
        self._all_kept += _FAST * (kept / size - self._all_kept)
        hazards = self._hazards
        for verified, accepted in zip(num_verified, num_accepted, strict=True):
            for j in range(min(accepted + 1, verified)):
                at = min(j, _NUM_HAZARDS - 1)
                hazards[at] += _HAZARD_GAIN * ((j < accepted) - hazards[at])

    def vector(self, batch: int, shares: Sequence[float]) -> list[float]:
        """[NUM_FEATURES] what is known before a step.

        Args:
            shares: [max_draft + 1] times of a step at K = 0, 1, ... relative to a plain one.
        """
        return [
            batch.bit_length() / 8,
            min(shares[1] - 1, _MOST_COST),
            min(shares[len(shares) // 2] - 1, _MOST_COST),
            min(shares[-1] - 1, _MOST_COST),
            self._fast / self._max_draft,
            self._slow / self._max_draft,
            *self._hazards,
            self._last_k,
            self._last_accepted,
            self._all_kept,
        ]
