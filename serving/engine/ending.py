"""Ends drafts while they are made, where programs are ordinary calls and the host can look.

On a GPU a round is one captured program, and nothing in it may depend on a value: there drafts are
cut after they were made, see ``allocating``.

Shapes: R requests, K draft tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafters.protocol import EndsEarly
from policies.ending import Course, Ending
from serving.engine.allocating import Considered
from specops.allocation import NUM_FIGURES, TOP

_LEAST_LOGIT = -1e4


def confidence_on_host(logits_RD: Tensor) -> list[list[float]]:
    """The figures of ``specops.allocation.confidence``, in a fraction of its time: a draft waits
    for them.

    Args:
        logits_RD: [R, D] float, on the host.
    """
    return [_figures(row) for row in logits_RD.float().numpy()]


def _figures(logits_D: NDArray[np.float32]) -> list[float]:
    best = int(logits_D.argmax())
    below_D = logits_D - logits_D[best]
    weights_D = np.exp(below_D)
    total = float(weights_D.sum())
    if not math.isfinite(total):
        return [0.0, math.log(len(logits_D)), 0.0]
    # A weight of 0 has a logarithm of minus infinity, and their product counts as 0.
    moment = float(weights_D @ np.maximum(below_D, _LEAST_LOGIT))
    weights_D[best] = 0.0
    second = float(weights_D.max())
    return [1 / total, max(math.log(total) - moment / total, 0.0), (1 - second) / total]


class EndingDraft(EndsEarly):
    """A ``choose`` that asks a policy's rule about each position before its token is chosen.

    A draft goes on as long as one of the requests wants to. All of them draft in the same passes,
    so what the others draft meanwhile is verified as well.
    """

    def __init__(
        self, choose: Callable[[Tensor, int], Tensor], ending: Ending, lens: Sequence[int]
    ) -> None:
        """
        Args:
            choose: chooses the tokens that are kept.
            lens: [R] largest length of each draft.
        """
        self._choose, self._ending, self._lens = choose, ending, lens
        self._courses = [Course(ending, most) for most in lens]
        self._figures: list[list[list[float]]] = []
        self._is_over = False
        self._seconds = 0.0
        self.length = 0
        """Of the longest draft: tokens that were chosen."""

    @property
    def is_over(self) -> bool:
        return self._is_over

    def __call__(self, logits: Tensor, number: int) -> Tensor:
        if self._is_over:  # of a drafter that does not ask
            return torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        started_s = time.perf_counter()
        figures: list[list[float]] = confidence_on_host(logits)
        self._seconds += time.perf_counter() - started_s
        self._figures.append(figures)
        keeps = [
            course.sees(of_request[TOP])
            for course, of_request in zip(self._courses, figures, strict=True)
        ]
        self._is_over = not any(course.wants_more for course in self._courses)
        if not any(keeps):
            return torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        self.length = number + 1
        return self._choose(logits, number)

    def considered(self) -> Considered:
        """The drafts as they would have been: figures of positions that were not computed are 0."""
        rows = []
        for r, most in enumerate(self._lens):
            own = [one for figures in self._figures[:most] for one in figures[r]]
            rows.append(own + [0.0] * (NUM_FIGURES * most - len(own)))
        return Considered(self._ending.may_end, rows, self._seconds)
