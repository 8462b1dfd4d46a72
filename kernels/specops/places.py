"""Where the rows of a pass stand and write. The torch definition.

Shapes: R requests, Q rows of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.attention import DecodePass, decode_slots


@dataclass(frozen=True, slots=True)
class Places:
    """Of all rows: [R, Q], or [Q, R] step by step. Contiguous."""

    positions: Tensor
    """int64; 0 for padding."""
    slots: Tensor
    """int64 slot that each row's key and value go to; 0 for padding and beyond the table."""
    first: Tensor
    """int32: ``first_R`` of a pass that begins with the row."""


def places_of(decode: DecodePass, num_query: int, *, by_step: bool = False) -> Places:
    """Places of ``num_query`` consecutive rows of each request.

    Args:
        by_step: step by step, one row of each request after the other's: a chain of passes of one
            row each then finds its own side by side.
    """
    positions_RQ = decode.positions(num_query).clamp(min=0).long()
    slots_RQ = decode_slots(decode, num_query).view(positions_RQ.shape)
    row = torch.arange(num_query, dtype=torch.int32, device=slots_RQ.device)
    found = (positions_RQ, slots_RQ, decode.first_R[:, None] + row)
    return Places(*((t.t().contiguous() if by_step else t) for t in found))
