"""Text cut into blocks of consecutive positions of one request, for programs of fixed shape.

Rows that fill up a block lie behind the text: what they write is overwritten before anybody sees
it, or goes to page 0.

Shapes: B blocks, T = 16 B rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from serving.engine.drafting import Drafting
from serving.engine.lanes import LaneRows
from serving.engine.sequence import Sequence
from specops.device import places_of

BLOCK = 16
"""Rows of a block."""


def cut(sequence: Sequence, start: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
    """First position, rows that are no filling, and 16 token ids of each block of start..end-1."""
    for first in range(start, end, BLOCK):
        ids = sequence.tokens[first : min(first + BLOCK, end)]
        yield first, len(ids), ids + [0] * (BLOCK - len(ids))


def draft_rows(
    drafting: Drafting, rows: LaneRows, first_B: Tensor, ids_T: Tensor, page_size: int
) -> Tensor:
    """The neural drafter computes B blocks, from the target's stored rows; [T, H] its outputs."""
    assert drafting.neural is not None
    before = places_of(rows.decode_pass(first_B - 1, page_size), BLOCK).slots.flatten()
    at = rows.decode_pass(first_B, page_size, first_key=1)
    return drafting.neural.take_in(ids_T, drafting.features_at(before), at)
