"""What a learned policy sees before it decides: figures of earlier steps, the batch, and times.

Server and trainer use this very class, so a policy is fitted on what it will see. Nothing in it
depends on a drawn token of the step to come.

Plain steps tell nothing of drafts. In these, what was seen of late fades to what is usual:
otherwise a policy that stops drafting where text is hard sees hard text for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from policies.groups import NUM_CLASSES

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
    "tokens_middle",
    "recent_hazard_1",
    "recent_hazard_2",
    "greedy",
    "warmth",
    "context",
)
"""In the order of ``Features.vector``."""
NUM_FEATURES = len(NAMES)

_FAST, _MIDDLE, _SLOW = 0.3, 0.08, 0.02
_HAZARD_GAIN, _RECENT_GAIN = 0.02, 0.1
_NUM_RECENT = 2
"""First positions whose hazards are followed faster, too: most rounds tell of these."""
_NUM_HAZARDS = 5
"""Positions 1 to 4, and all deeper ones together."""
_FIRST_HAZARD = 0.6
_USUAL_K = 4
"""Draft tokens that the tokens of a version that never drafted are expected of."""
_FADE = 0.1
"""Share of the difference between recent and usual figures that a plain step takes away."""
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

    def forget(self, acceptance: Sequence[float] = ()) -> None:
        """Start over: other weights draft.

        Args:
            acceptance: what was published with them, by position; the last one holds for all
                deeper ones.
        """
        self._fast = self._middle = self._slow = 1.5
        self._recent = [_FIRST_HAZARD] * _NUM_RECENT
        self._hazards = [_FIRST_HAZARD] * _NUM_HAZARDS
        if acceptance:
            known = [acceptance[min(j, len(acceptance) - 1)] for j in range(_NUM_HAZARDS)]
            self._hazards, self._recent = known, known[:_NUM_RECENT]
            kept = sum(accumulate(known[:_USUAL_K], mul))
            self._fast = self._middle = self._slow = 1 + kept
        self._last_k, self._last_accepted, self._all_kept = 0.0, 0.0, 0.0
        self._usually_kept = 0.0

    def observe(
        self, draft_k: int, num_verified: Sequence[int], num_accepted: Sequence[int]
    ) -> None:
        """Take in the rounds of a step."""
        self._last_k = draft_k / self._max_draft
        if not draft_k:
            self._fade()
        if not draft_k or not num_accepted:
            return
        size = len(num_accepted)
        mean = sum(num_accepted) / size
        self._fast += _FAST * (1 + mean - self._fast)
        self._middle += _MIDDLE * (1 + mean - self._middle)
        self._slow += _SLOW * (1 + mean - self._slow)
        self._last_accepted = mean / self._max_draft
        kept = sum(map(int.__eq__, num_verified, num_accepted))
        self._all_kept += _FAST * (kept / size - self._all_kept)
        self._usually_kept += _SLOW * (kept / size - self._usually_kept)
        hazards, recent = self._hazards, self._recent
        for verified, accepted in zip(num_verified, num_accepted, strict=True):
            for j in range(min(accepted + 1, verified)):
                at = min(j, _NUM_HAZARDS - 1)
                hazards[at] += _HAZARD_GAIN * ((j < accepted) - hazards[at])
                if j < _NUM_RECENT:
                    recent[j] += _RECENT_GAIN * ((j < accepted) - recent[j])

    def _fade(self) -> None:
        usual = (self._slow - 1) / self._max_draft
        self._fast += _FADE * (self._slow - self._fast)
        self._middle += _FADE * (self._slow - self._middle)
        self._last_accepted += _FADE * (usual - self._last_accepted)
        self._all_kept += _FADE * (self._usually_kept - self._all_kept)
        for j in range(_NUM_RECENT):
            self._recent[j] += _FADE * (self._hazards[j] - self._recent[j])

    def rates(self, shares: Sequence[float]) -> list[float]:
        """[max_draft + 1] tokens that each K is expected to bring a request, in the time of a plain
        step: by the hazards of late alone.

        Args:
            shares: see ``vector``.
        """
        tokens, survival = [1.0], 1.0
        for j in range(len(shares) - 1):
            survival *= self._hazards[min(j, _NUM_HAZARDS - 1)]
            tokens.append(tokens[-1] + survival)
        return [mean / share for mean, share in zip(tokens, shares, strict=True)]

    def vector(
        self,
        batch: int,
        shares: Sequence[float],
        groups: bytes | None = None,
        context: int | None = None,
    ) -> list[float]:
        """[NUM_FEATURES] what is known before a step.

        Args:
            shares: [max_draft + 1] times of a step at K = 0, 1, ... relative to a plain one.
            groups, context: see ``policies.interface.StepObs``.
        """
        greedy, warmth = _temperatures(groups) if groups else (0.0, 0.0)
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
            self._middle / self._max_draft,
            *self._recent,
            greedy,
            warmth,
            (context or 0).bit_length() / 16,
        ]


def _temperatures(groups: bytes) -> tuple[float, float]:
    """Share of greedy requests, and mean class of temperature in 0..1."""
    counts = Counter(groups.translate(_CLASSES))
    warmth = sum(number * count for number, count in counts.items())
    return counts[0] / len(groups), warmth / len(groups) / (NUM_CLASSES - 1)


_CLASSES = bytes(group % NUM_CLASSES for group in range(256))
"""Class of temperature by group."""
