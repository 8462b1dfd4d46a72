"""Training samples: traces that fit the target, checked and cut into pieces.

Shapes: T tokens of a trace, N captured rows, m tapped layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from buffer.deletions import Owner
from buffer.records import Sampling

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a sample that is trained on at once: positions start <= p < stop."""

    start: int
    stop: int
    loss_from: int
    """First row with a loss; earlier rows are context."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The R rounds of a trace, as far as they tell what drafting brings."""

    batch_R: NDArray[np.int32]
    draft_k_R: NDArray[np.int32]
    """K of the step, which the policy chose."""
    num_drafted_R: NDArray[np.int32]
    """Draft tokens of this request."""
    num_accepted_R: NDArray[np.int32]
    version_R: NDArray[np.int32]
    is_own_R: NDArray[np.bool_]
    """The drafter that learns drafted."""
    step_s_R: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Steps]) -> Steps:
        """The rounds of several traces, in order; at least one."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True, slots=True)
class Sample:
    """A trace to train on, its hidden rows still packed as they were captured."""

    key: str
    """``producer/epoch/seq``."""
    token_ids_T: Tensor
    """int64."""
    positions_N: Tensor
    """int64, ascending: positions whose rows were captured."""
    rows: Tensor
    """[N, m + 1, H] bfloat16, float8 or float32: tapped layers in ``layer_ids`` order, then the
    lm_head's input."""
    scale: Tensor | None
    """[N, m + 1] float32 multiplier of fp8 rows."""
    pieces: tuple[Piece, ...]
    num_loss_rows: int
    sampling: Sampling
    """Of the request."""
    version: int | None
    """Newest drafter version that proposed in it; ``None`` without rounds."""
    weight_T: Tensor | None = None
    """float32 weight of the loss of the row at each position; ``None``: all 1."""
    domain: str = ""
    """Kind of text that the client named; empty if it named none."""
    surprise: float | None = None
    """Share of the draft tokens that the target rejected, see ``policies.draws.surprise``."""
    owner: Owner | None = None
    """Whose trace it is; it goes when that tenant is deleted. ``None``: nobody's."""
    steps: Steps | None = None
    """``None`` unless somebody asks, see ``trainer.dataset.Expected.counted``."""
    outcome_T3: Tensor | None = None
    """int32 [T, 3], see ``TrainingBatch.outcome_R3``; ``None`` likewise."""

    @property
    def tenant(self) -> str:
        """Whose trace it is; empty if nobody's."""
        return "" if self.owner is None else self.owner.tenant

    @property
    def temperature(self) -> float:
        """Of the request; 0 is greedy."""
        return self.sampling.temperature


def widen(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Packed rows [..., m + 1, H] as float32."""
    wide = rows.float()
    return wide if scale is None else wide * scale[..., None]


def rows_with_loss(known: NDArray[np.bool_], piece: Piece) -> NDArray[np.int32]:
    """Rows of a piece that have a loss: captured like the row before, and with a next token.

    Args:
        known: [stop - start] bool, positions of the piece whose rows were captured.

    Returns:
        [R] int32 ascending, counted from ``piece.start``.
    """
    has = known.copy()
    has[1:] &= known[:-1]
    has[0] = False
    has[: max(piece.loss_from - piece.start, 0)] = False
    has[-1] = False
    return np.flatnonzero(has).astype(np.int32)
