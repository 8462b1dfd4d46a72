"""Hidden rows of running requests, held in a bounded ring until the request ends.

The ring lies in host memory. Programs of fixed shape append to it from the device, in the order in
which they are launched, and the host learns later how many rows each of them appended; a row has a
running number, counted on both sides. It is lost, and counted, once ``capacity`` newer rows were
written. Serving never waits for room.

Shapes: N rows, m tapped layers, H hidden.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from buffer.records import FeatureRows
from specops.capture_pack import new_ring, quantise
from specops.device import pack_kept_rows

StoredDtype = Literal["bfloat16", "float8_e4m3fn"]


class CaptureRing:
    """Ring of [capacity, m + 1, H] bfloat16 rows."""

    def __init__(
        self, capacity: int, num_layers: int, hidden_size: int, device: torch.device | str = "cpu"
    ) -> None:
        """
        Args:
            device: where the rows come from.
        """
        on_gpu = torch.device(device).type == "cuda"
        self._ring = new_ring(
            capacity, num_layers + 1, hidden_size, str(device), is_fp8=False, pinned=on_gpu
        )
        self._capacity = capacity
        self._next = 0
        self._most_on_the_way = 0

    def reserve(self, num_rows: int) -> None:
        """Programs may append up to ``num_rows`` rows that the host does not know of yet.

        Raises:
            ValueError: the ring is too small for them.
        """
        if num_rows > self._capacity:
            raise ValueError(f"{num_rows} rows at once do not fit a ring of {self._capacity}")
        self._most_on_the_way = max(self._most_on_the_way, num_rows)

    def append(
        self,
        features_TmH: Tensor,
        hidden_TH: Tensor,
        counts_R: Tensor,
        first_R: Tensor,
        lanes_R: Tensor,
    ) -> None:
        """The device appends the first ``counts`` rows of each request; part of a program, whose
        host must ``number`` the rows in turn. See ``specops.capture_pack.pack_kept_rows``."""
        pack_kept_rows(
            features_TmH.bfloat16(), hidden_TH.bfloat16(),
            counts_R.int(), first_R.int(), lanes_R.int(), self._ring,
        )  # fmt: skip

    def number(self, counts: list[int]) -> list[int]:
        """Running number of the first row of each request that a program appended."""
        *firsts, self._next = accumulate(counts, initial=self._next)
        return firsts

    def synchronise(self) -> None:
        """Learn from the device how many rows there are, after a step that failed half-way."""
        self._next = int(self._ring.next_1)

    def write(self, features_NmH: Tensor, hidden_NH: Tensor) -> int:
        """Append N rows; returns the running number of the first. No program may be under way.

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
        self._ring.rows[at : at + head].copy_(rows[:head])
        if head < count:
            self._ring.rows[: count - head].copy_(rows[head:])
        self._next += count
        self._ring.next_1.add_(count)
        return first

    def take(self, pieces: list[tuple[int, int, int]]) -> tuple[np.ndarray, Tensor, int]:
        """Rows still held of some (first position, running number, count) pieces.

        Returns:
            positions [N] int32, rows [N, m + 1, H] bfloat16 (a copy), and how many rows were lost.
        """
        oldest = self._next + self._most_on_the_way - self._capacity
        positions: list[int] = []
        numbers: list[int] = []
        lost = 0
        for position, number, count in pieces:
            gone = min(max(oldest - number, 0), count)
            lost += gone
            positions += range(position + gone, position + count)
            numbers += range(number + gone, number + count)
        index = torch.tensor(numbers, dtype=torch.int64) % self._capacity
        return np.asarray(positions, dtype=np.int32), self._ring.rows[index], lost


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
