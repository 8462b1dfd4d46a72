"""Which rows a batch is made of, as index columns that the host uploads.

Pieces lie behind each other. On a GPU every batch has the same number of positions, and its rows
with a loss are rounded up to one of a few numbers, because each is a CUDA graph of its own; on a
CPU nothing is padded.

Shapes: T positions of the batch, R rows with a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ROW_STEPS = (8, 16)
"""Rows with a loss are rounded up to a multiple of T / 8, or T / 16 in batches of ``_LARGE``
positions. Half of a step is wasted on average: with a loss at two thirds of all positions, 9 % or
5 % of the work on chains, teacher and lm_head. Each number of rows costs a graph, whose capture
takes longer than what small batches would gain."""
_LARGE = 8192
EMPTY_SLOT = 0
"""A slot of the store that never holds a row; padding reads it."""

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class HeldPiece:
    """Part of a sample in the store that is trained on at once."""

    slots: Ints
    """[length] slot of each position."""
    rows: Ints
    """Rows with a loss, ascending, counted from the start of the piece."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Index columns of a batch."""

    slots_T: Ints
    segment_T: Ints
    """Number of the piece; -1: padding."""
    row_R: Ints
    """Index into T; behind the rows with a loss, distinct other positions."""
    num_rows: int
    """Rows with a loss; those behind them are padding."""
    longest: int
    """Most positions that a piece may have."""

    def columns(self) -> Ints:
        """Everything in one array, [2 T + R + 1]: one upload instead of four."""
        return np.concatenate(
            (self.slots_T, self.segment_T, self.row_R, np.array([self.num_rows], dtype=np.int32))
        )


def pack(pieces: Sequence[HeldPiece], fixed: tuple[int, int] | None) -> Packed:
    """Lay pieces behind each other.

    Args:
        fixed: positions of the batch and most positions of a piece, if shapes must not depend on
            the pieces.

    Raises:
        ValueError: the pieces have more positions than that.
    """
    lengths = np.array([len(piece.slots) for piece in pieces], dtype=np.int64)
    num, longest = int(lengths.sum()), int(lengths.max(initial=1))
    total, longest = (num, longest) if fixed is None else fixed
    if num > total:
        raise ValueError(f"{num} positions do not fit a batch of {total}")
    starts = np.cumsum(lengths) - lengths
    slots, segment = np.full((2, total), EMPTY_SLOT, dtype=np.int32)
    slots[:num] = _joined([piece.slots for piece in pieces])
    segment[:num] = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    segment[num:] = -1
    rows = _joined([piece.rows + start for piece, start in zip(pieces, starts, strict=True)])
    padded = rows if fixed is None else _with_padding(rows, total)
    return Packed(slots, segment, padded, len(rows), longest)


def row_step(total: int) -> int:
    """What the number of rows with a loss is rounded up to a multiple of, in a batch of ``total``
    positions."""
    few, many = ROW_STEPS
    return -(-total // (many if total >= _LARGE else few))


def every_shape(fixed: tuple[int, int]) -> list[Packed]:
    """An empty batch of each shape that ``pack`` can give with these bounds."""
    total, longest = fixed
    step = row_step(total)
    nothing, padding = (
        np.full(total, EMPTY_SLOT, dtype=np.int32),
        np.full(total, -1, dtype=np.int32),
    )
    places = np.arange(total, dtype=np.int32)[::-1]
    counts = dict.fromkeys(min(n * step, total) for n in range(1, -(-total // step) + 1))
    return [Packed(nothing, padding, places[:count].copy(), 0, longest) for count in counts]


def _with_padding(rows: Ints, total: int) -> Ints:
    """Rows behind which other positions fill up to one of the numbers that have a graph."""
    step = row_step(total)
    wanted = min(max(-(-len(rows) // step), 1) * step, total)
    is_free = np.ones(total, dtype=np.bool_)
    is_free[rows] = False
    others = np.flatnonzero(is_free)[::-1][: wanted - len(rows)]
    return _joined([rows, others])


def _joined(parts: Sequence[npt.NDArray[Any]]) -> Ints:
    empty = np.zeros(0, dtype=np.int32)
    return np.concatenate((empty, *parts)).astype(np.int32, copy=False)
