"""What a drafter is handed and what it hands back.

Shapes: R requests, K draft tokens, T packed rows, m tapped layers, H hidden, V target vocabulary,
S positions of the slot table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specops.sampling import SamplingRows


@dataclass(frozen=True, slots=True)
class Draft:
    """What was proposed for each request of a batch, and from which distribution."""

    kind: str
    """Drafter that made it: ``eagle3`` or ``suffix``."""
    tokens_RK: Tensor
    """[R, K] int64 target ids; entries at or beyond ``lens`` are padding."""
    lens_R: tuple[int, ...]
    """[R] tokens proposed for each request, 0..K."""
    q_RKV: Tensor | None
    """[R, K, V] the very distributions the tokens were drawn from; ``None`` for a delta draft,
    where each token is a function of the prefix alone."""
    version: int
    """Weights that produced it."""


@dataclass(frozen=True, slots=True)
class CommittedRows:
    """Rows the target has committed since the drafter last looked, packed request by request.

    Row p of a request is (token x_p, features of position p - 1); its last row is the anchor.
    """

    counts_R: tuple[int, ...]
    """[R] rows of each request, >= 1."""
    ids_T: Tensor
    """[T] int64."""
    positions_T: Tensor
    """[T] int64."""
    features_TmH: Tensor
    """[T, m, H] target rows of position p - 1."""
    slots_RS: Tensor
    """[R, S] int64 slots of positions 0 .. S-1, S > anchor + K for every request."""


class Drafter(Protocol):
    """A neural drafter in a running engine. It owns its KV; rollback is never needed, because
    drafted rows lie beyond the committed ones and are overwritten."""

    kind: str
    version: int

    def propose(
        self,
        rows: CommittedRows,
        num_draft: int,
        sampling: SamplingRows,
        greedy_rows: Tensor | None,
        uniforms_RK: Tensor | None,
    ) -> Draft:
        """Take in committed rows, then draft ``num_draft`` tokens after each anchor.

        Args:
            sampling: parameters of the R requests.
            greedy_rows: [R] bool, rows that draft their argmax whatever their temperature
                (requests verified by ``match``); ``None``: every row does, and q is ``None``.
            uniforms_RK: [R, K] float64, stream DRAFT; ``None`` when every row is greedy.
        """
        ...
