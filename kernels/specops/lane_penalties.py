"""Biases and penalties of requests whose state is on the device: what ``specops.penalties`` does
with lists of tokens, with counts that a round keeps itself. The torch definitions.

Whether a request adjusts is read on the device, so that one program serves batches with and
without such requests; the rows of those that do not are not touched.

Shapes: L lanes, R requests, A of them that adjust, K draft tokens, Q = K + 1, V vocabulary, B most
biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.penalties import counts_before, penalized


@dataclass(frozen=True, slots=True)
class LaneTables:
    """What the requests in L lanes ask for, and how often they emitted each token. What stands here
    for a request that does not ask for it means nothing."""

    biased_LB: Tensor
    """[L, B] int32 token ids, each once."""
    bias_LB: Tensor
    """[L, B] float64, added to the logits of ``biased``."""
    penalties_L3: Tensor
    """[L, 3] float64: presence, frequency, repetition."""
    counts_LV: Tensor
    """[L, V] int32: twice the times that a token stands in the completion, and 1 more if it stands
    in the prompt."""


def new_tables(
    num_lanes: int, vocab_size: int, most_biases: int, device: torch.device | str
) -> LaneTables:
    """Tables of ``table_bytes`` bytes, of which nothing is asked."""

    def zeros(width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((num_lanes, width), dtype=dtype, device=device)

    return LaneTables(
        zeros(most_biases, torch.int32),
        zeros(most_biases, torch.float64),
        zeros(3, torch.float64),
        zeros(vocab_size, torch.int32),
    )


def table_bytes(num_lanes: int, vocab_size: int, most_biases: int) -> int:
    """Of ``new_tables``."""
    return num_lanes * (4 * vocab_size + 12 * most_biases + 24)


@dataclass(frozen=True, slots=True)
class LaneRequests:
    """The requests of one batch."""

    lanes_R: Tensor
    """[R] int64, their rows in the tables."""
    num_biased_R: Tensor
    """[R] int64 in 0..B: that many leading biases of the lane are theirs."""
    penalizes_R: Tensor
    """[R] int64: whether penalties and counts of the lane are theirs."""


def adjust_rows(
    logits_RQV: Tensor, draft_RK: Tensor, requests: LaneRequests, tables: LaneTables
) -> None:
    """The definition: logits as each request wants them, written over those that came in; waits for
    the device. The result is ``specops.penalties.adjust_logits``'s.

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
    """The definition: add the first ``count`` emitted tokens of each request that penalizes to the
    counts of its lane.

    Args:
        emitted_RQ: [R, Q] int64 in 0..V-1.
        count_R: [R] int64 in 0..Q.
    """
    place = torch.arange(emitted_RQ.shape[1], device=emitted_RQ.device)
    is_counted = (place < count_R[:, None]) & (requests.penalizes_R != 0)[:, None]
    at = requests.lanes_R[:, None] * tables.counts_LV.shape[1] + emitted_RQ
    twice = 2 * is_counted.int()
    tables.counts_LV.view(-1).scatter_add_(0, at.flatten(), twice.flatten())
