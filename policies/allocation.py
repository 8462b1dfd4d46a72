"""What a policy asks the device to do: cut each request's draft to a length of its own.

The device decides after drafting and before verification, from figures of the drafter's
distributions that the host never waits for. ``specops.allocation`` computes it and says why the
output keeps the target's law; here are the question, torch-free, and the same rule with numpy, by
which traces are judged.

Shapes: R requests, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from policies.confidence_head import Head

Floats = NDArray[np.float64]
Lengths = NDArray[np.int64]

Score = Literal["top", "entropy", "margin", "head"]
"""Confidence in a position, from what is known before its token is drawn: probability of the
likeliest token; AdaEDL's bound ``1 - sqrt(gamma H)``; lead of the likeliest token over the second;
or a small network over these."""
NUM_FIGURES = 3
"""Figures of a position in traces: top probability, entropy in nats, lead."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What of an allocation is part of the device's programs; the rest are values.

    Raises:
        ValueError: the score is not one of those that keep the target's law.
    """

    score: Score
    cumulative: bool
    """The product of the scores so far is compared, not each."""

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(
                f"drafts cannot be cut by {self.score!r}; the scores are "
                f"{', '.join(get_args(Score))}. None of them depends on the token that was drawn "
                f"at its position: sampled text cut by that would not follow the target"
            )


@dataclass(frozen=True, slots=True)
class Allocation:
    """How the drafts of one step are cut."""

    cut: Cut
    threshold: float
    """Drafts end before the first position that is below it; 0 keeps all, so that a step without
    cuts still notes its figures."""
    budget_each: float | None = None
    """Draft tokens to verify over the batch, as a mean for each request: those with the highest
    products of scores. ``None``: all that the threshold leaves, and verification computes the rows
    of the others too."""
    gamma: float = 0.2
    """Of the score ``entropy``."""
    head: Head | None = None
    """Of the score ``head``."""

    def budget(self, batch: int, draft_k: int) -> int:
        """Draft tokens to verify over a batch, at most all of them."""
        if self.budget_each is None:
            return batch * draft_k
        return max(0, min(round(self.budget_each * batch), batch * draft_k))

    @property
    def may_cut(self) -> bool:
        """Some draft may be shortened."""
        return self.threshold > 0 or self.budget_each is not None

    def scores(self, figures_RK3: Floats, temperature_R: Floats) -> Floats:
        """[R, K] confidence in each position."""
        match self.cut.score:
            case "top":
                found: Floats = figures_RK3[..., 0]
            case "entropy":
                found = np.maximum(1 - np.sqrt(self.gamma * figures_RK3[..., 1]), 0)
            case "margin":
                found = figures_RK3[..., 2]
            case "head":
                assert self.head is not None, "a policy asks for a head once it has one"
                found = self.head.scores(figures_RK3, temperature_R)
        return found

    def lengths(
        self, figures_RK3: Floats, offered: Sequence[int], temperature_R: Floats, batch: int
    ) -> Lengths:
        """[R] length of each draft after the cut; the definition of the device's for requests of
        one step.

        Args:
            figures_RK3: [R, K, 3]; entries beyond ``offered`` mean nothing.
            offered: [R] lengths before the cut.
            batch: requests of the step, of which the R are a sample.
        """
        num_requests, num_draft = figures_RK3.shape[:2]
        place = np.arange(num_draft)
        scores = np.clip(self.scores(figures_RK3, temperature_R), 0, 1)
        survival = np.cumprod(scores, axis=1)
        judged = survival if self.cut.cumulative else scores
        is_open = (judged >= self.threshold) & (place < np.asarray(offered)[:, None])
        is_open = np.logical_and.accumulate(is_open, axis=1)
        budget = self.budget(batch, num_draft) * num_requests / max(batch, 1)
        ranked = np.where(is_open, survival, -1.0).T.reshape(-1)
        rank = np.empty(ranked.size, np.int64)
        rank[np.argsort(-ranked, kind="stable")] = np.arange(ranked.size)
        stays = is_open & (budget > rank.reshape(num_draft, num_requests).T)
        lengths: Lengths = np.logical_and.accumulate(stays, axis=1).sum(axis=1)
        return lengths
