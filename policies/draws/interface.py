"""What a rule of drawing sees of the samples held, and what it returns.

Shapes: N samples held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.schema import TrainerSettings

Places = NDArray[np.int64]
"""Indices of samples."""


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The samples held, by column."""

    age_N: NDArray[np.int64]
    """Training samples that arrived after it; 0 is the newest."""
    visits_N: NDArray[np.int64]
    """Batches that it was in."""
    num_pieces_N: NDArray[np.int64]
    """Pieces that it is cut into, one of which is in a batch."""
    is_recent_N: NDArray[np.bool_]
    """Among the newest; the others are a uniform sample of all older ones."""
    num_older: int
    """How many older ones there were."""
    tenant_N: NDArray[np.int64]
    """Number of its tenant, from 0."""
    domain_N: NDArray[np.int64]
    """Number of its domain, from 0."""
    surprise_N: NDArray[np.float64]
    """See ``policies.draws.surprise``; NaN if unknown."""
    num_wanted: int | None = None
    """No batch takes more samples than these from the front of the order, so a rule may leave out
    what is behind them; ``None``: any number may be taken."""

    def __len__(self) -> int:
        return len(self.age_N)


class DrawRule(Protocol):
    """Decides in which order samples are taken until a batch is full, each at most once.

    Called for every update, so it works on whole columns. All its randomness is from ``random``,
    whose state is in the trainer's checkpoints: the same samples and state give the same order.
    """

    def __call__(
        self, pool: Pool, settings: TrainerSettings, random: np.random.Generator
    ) -> Places:
        """Indices of samples in the order in which they are taken, each once: all of them, or the
        first ``pool.num_wanted``."""
        ...


def weighted_order(log_weight_N: NDArray[Any], random: np.random.Generator) -> Places:
    """Draw all samples one after another, each time with probabilities in proportion to the
    weights of those that are left.

    Adding Gumbel noise to the logarithms and sorting does exactly that, at once and without
    underflow.

    Source:
        Efraimidis and Spirakis 2006, Weighted random sampling with a reservoir; in the form of
        Kool et al. 2019, arXiv:1903.06059, Section 2.
    """
    order: Places = np.argsort(-(log_weight_N + random.gumbel(size=len(log_weight_N))))
    return order
