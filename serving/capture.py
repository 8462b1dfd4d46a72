"""Hidden rows of running requests, held in a bounded ring until the request ends.

The ring is one host tensor. A row has a running number; it is lost, and counted, once ``capacity``
newer rows were written. Serving never waits for room.

Shapes: N rows, m tapped layers, H hidden.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from buffer.records import FeatureRows
from specops.capture_pack import quantise

StoredDtype = Literal["bfloat16", "float8_e4m3fn"]


class CaptureRing:
    """Ring of [capacity, m + 1, H] bfloat16 rows."""

    def __init__(self, capacity: int, num_layers: int, hidden_size: int) -> None:
        pinned = torch.cuda.is_available()
        self._rows = torch.zeros(
            (capacity, num_layers + 1, hidden_size), dtype=torch.bfloat16, pin_memory=pinned
        )
        self._capacity = capacity
        self._next = 0

    def write(self, features_NmH: Tensor, hidden_NH: Tensor) -> int:
        """Append N rows; returns the running number of the first.

        Raises:
            ValueError: more rows at once than the ring holds.
        """
        count = len(hidden_NH)
        if count > self._capacity:
            raise ValueError(f"{count} rows do not fit a ring of {self._capacity}")
        first = self._next
        rows = torch.cat((features_NmH, hidden_NH[:, None]), dim=1).to(torch.bfloat16)
        at = first % self._capacity
        head = min(count, self._capacity - at)
        self._rows[at : at + head].copy_(rows[:head])
        if head < count:
            self._rows[: count - head].copy_(rows[head:])
        self._next += count
        return first

    def take(self, pieces: list[tuple[int, int, int]]) -> tuple[np.ndarray, Tensor, int]:
        """Rows still held of some (first position, running number, count) pieces.

        Returns:
            positions [N] int32, rows [N, m + 1, H] bfloat16 (a copy), and how many rows were lost.
        """
        oldest = self._next - self._capacity
        positions: list[int] = []
        numbers: list[int] = []
        lost = 0
        for position, number, count in pieces:
            gone = min(max(oldest - number, 0), count)
            lost += gone
            positions += range(position + gone, position + count)
            numbers += range(number + gone, number + count)
        index = torch.tensor(numbers, dtype=torch.int64) % self._capacity
        return np.asarray(positions, dtype=np.int32), self._rows[index], lost


def pack_rows(
    positions_N: np.ndarray, rows: Tensor, layer_ids: tuple[int, ...], dtype: StoredDtype
) -> FeatureRows:
    """Rows [N, m + 1, H] bfloat16 as a record, in the dtype of the log."""
    if dtype == "bfloat16":
        bits = rows.contiguous().view(torch.uint16).numpy()
        return FeatureRows(positions_N, layer_ids, "bfloat16", bits, None)
    packed, scale = quantise(rows)
    bits = packed.view(torch.uint8).numpy()
    return FeatureRows(positions_N, layer_ids, "float8_e4m3fn", bits, scale.numpy())
