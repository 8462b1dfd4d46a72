"""Biases and penalties of requests whose state is on the device. Computes what
``specops.penalties`` computes from token lists, but from counts that each round updates. The torch
definitions.

The device reads which requests have biases or penalties, so one program serves batches with and
without them; rows of other requests are not touched.

Shapes: L lanes, R requests, A of them with biases or penalties, K draft tokens, Q = K + 1, V
vocabulary, B maximum number of biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.penalties import counts_before, penalized


@dataclass(frozen=True, slots=True)
class LaneTables:
    """Biases, penalties and token counts of the requests in L lanes. Entries that a request does
    not use are undefined."""

    biased_LB: Tensor
    """[L, B] int32 token ids, no duplicates."""
    bias_LB: Tensor
    """[L, B] float64, added to the logits of ``biased_LB``."""
    penalties_L3: Tensor
    """[L, 3] float64: presence, frequency, repetition."""
    counts_LV: Tensor
    """[L, V] int32: twice a token's count in the completion, plus 1 if it occurs in the prompt."""


def new_tables(
    num_lanes: int, vocab_size: int, most_biases: int, device: torch.device | str
) -> LaneTables:
    """Tables without biases or penalties, of ``table_bytes`` bytes."""

    def zeros(width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((num_lanes, width), dtype=dtype, device=device)

    return LaneTables(
        zeros(most_biases, torch.int32),
        zeros(most_biases, torch.float64),
        zeros(3, torch.float64),
        zeros(vocab_size, torch.int32),
    )


def table_bytes(num_lanes: int, vocab_size: int, most_biases: int) -> int:
    """Size of ``new_tables``."""
    return num_lanes * (4 * vocab_size + 12 * most_biases + 24)


@dataclass(frozen=True, slots=True)
class LaneRequests:
    """The requests of one batch."""

    lanes_R: Tensor
    """[R] int64, the requests' rows in the tables."""
    num_biased_R: Tensor
    """[R] int64 in 0..B, how many of the lane's biases apply."""
    penalizes_R: Tensor
    """[R] int64, nonzero if the lane's penalties and counts apply."""


def adjust_rows(
    logits_RQV: Tensor, draft_RK: Tensor, requests: LaneRequests, tables: LaneTables
) -> None:
    """Apply each request's biases and penalties in place. The definition; waits for the device.

    See ``specops.penalties.penalized`` for their order.

    Args:
        logits_RQV: [R, K + 1, V] float, after 0 .. K draft tokens.
        draft_RK: [R, K] int64 in 0..V-1.
    """
    is_asked = (requests.num_biased_R > 0) | (requests.penalizes_R != 0)
    rows = is_asked.nonzero()[:, 0]
    if not len(rows):
        return
    lanes, penalizes = requests.lanes_R[rows], requests.penalizes_R[rows][:, None] != 0
    own = logits_RQV[rows]
    counts = torch.where(penalizes, tables.counts_LV[lanes], 0)
    generated = (counts // 2)[:, None] + counts_before(draft_RK[rows], own.shape[-1])
    none = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=own.device)
    penalties = torch.where(penalizes, tables.penalties_L3[lanes], none)
    bias = _bias(requests.num_biased_R[rows], lanes, tables, own[:, 0])
    logits_RQV[rows] = penalized(own, bias, generated, counts % 2 == 1, penalties)


def _bias(num_biased_A: Tensor, lanes_A: Tensor, tables: LaneTables, like_AV: Tensor) -> Tensor:
    place = torch.arange(tables.biased_LB.shape[1], device=lanes_A.device)
    owner, at = (place < num_biased_A[:, None]).nonzero().unbind(1)
    ids = tables.biased_LB[lanes_A[owner], at].long()
    values = tables.bias_LB[lanes_A[owner], at].to(like_AV.dtype)
    return torch.zeros_like(like_AV).index_put_((owner, ids), values)


def count_tokens(
    emitted_RQ: Tensor, count_R: Tensor, requests: LaneRequests, tables: LaneTables
) -> None:
    """Add the first ``count`` emitted tokens of each request with penalties to its lane's counts.
    The definition.

    Args:
        emitted_RQ: [R, Q] int64 in 0..V-1.
        count_R: [R] int64 in 0..Q.
    """
    if not bool(requests.penalizes_R.any()):
        return
    place = torch.arange(emitted_RQ.shape[1], device=emitted_RQ.device)
    is_counted = (place < count_R[:, None]) & (requests.penalizes_R != 0)[:, None]
    at = requests.lanes_R[:, None] * tables.counts_LV.shape[1] + emitted_RQ
    twice = 2 * is_counted.int()
    tables.counts_LV.view(-1).scatter_add_(0, at.flatten(), twice.flatten())
