"""Hidden rows of running requests, held in a bounded ring until the request ends.

The ring is in host memory. Programs of fixed shape append to it from the device, in launch order,
and the host learns later how many rows each of them appended. Every row has a running number, which
both sides count. A row is lost, and counted, once ``capacity`` newer rows have been written.
Serving never waits for space or for a reader: a reader copies first and checks afterwards which
rows were overwritten meanwhile.

Shapes: N rows, m tapped layers, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from buffer.records import FeatureRows
from specops.capture_pack import new_ring
from specops.device import pack_kept_rows

StoredDtype = Literal["bfloat16", "float8_e4m3fn"]

Piece = tuple[int, int, int]
"""First position, running number of the first row, and number of consecutive rows."""

ROUNDS_ON_THE_WAY = 2
"""Rounds that may have appended rows before the host has numbered any of them: a round is launched
before the previous one is read."""


@dataclass(frozen=True, slots=True)
class Held:
    """Rows copied out of the ring."""

    positions: np.ndarray
    """[N] int32, positions in the sequence."""
    rows: Tensor
    """[N, m + 1, H] in the ring's dtype."""
    scales: Tensor | None
    """[N, m + 1] float32 multiplier of each vector for fp8 rows; ``None`` for bfloat16."""


class CaptureRing:
    """Ring of [capacity, m + 1, H] rows in the dtype of the log."""

    def __init__(
        self,
        capacity: int,
        num_layers: int,
        hidden_size: int,
        device: torch.device | str = "cpu",
        dtype: StoredDtype = "bfloat16",
    ) -> None:
        """Allocate the ring.

        Args:
            capacity: rows it holds.
            num_layers: tapped layers, m.
            hidden_size: H.
            device: device that appends the rows.
            dtype: dtype in which rows are stored.
        """
        on_gpu = torch.device(device).type == "cuda"
        self.dtype: StoredDtype = dtype
        is_fp8 = dtype == "float8_e4m3fn"
        self._ring = new_ring(
            capacity, num_layers + 1, hidden_size, str(device), is_fp8=is_fp8, pinned=on_gpu
        )
        self._capacity = capacity
        self._next = 0
        self._most_on_the_way = 0

    def reserve(self, num_rows: int) -> None:
        """Allow programs to append up to ``num_rows`` more rows that the host has not numbered yet.

        Raises:
            ValueError: the ring is too small for all reservations together.
        """
        self._most_on_the_way += num_rows
        if self._most_on_the_way > self._capacity:
            at_once = self._most_on_the_way
            raise ValueError(f"{at_once} rows at once do not fit a ring of {self._capacity}")

    def append(
        self,
        features_TmH: Tensor,
        hidden_TH: Tensor,
        counts_R: Tensor,
        first_R: Tensor,
        lanes_R: Tensor,
    ) -> None:
        """Append the first ``counts`` rows of each request, on the device, as part of a program.

        The host must ``number`` the rows afterwards, in launch order. See
        ``specops.capture_pack.pack_kept_rows``.
        """
        pack_kept_rows(
            features_TmH.bfloat16(), hidden_TH.bfloat16(),
            counts_R.int(), first_R.int(), lanes_R.int(), self._ring,
        )  # fmt: skip

    def number(self, counts: list[int]) -> list[int]:
        """Number the rows that a program appended; returns the first number of each request."""
        *firsts, self._next = accumulate(counts, initial=self._next)
        return firsts

    def synchronise(self) -> None:
        """Adopt the device's row count after a step that failed halfway."""
        self._next = int(self._ring.next_1)

    def num_lost(self, pieces: list[Piece], ahead: float = 0.0) -> int:
        """Number of rows that are lost, or will be once a share ``ahead`` more is overwritten."""
        oldest = self._oldest() + int(ahead * self._capacity)
        return sum(min(max(oldest - first, 0), count) for _, first, count in pieces)

    def _oldest(self) -> int:
        """Running number of the oldest row that no launched program can overwrite."""
        return self._next + self._most_on_the_way - self._capacity

    def read(self, pieces: list[Piece]) -> tuple[Held, int]:
        """Copy rows, on any thread, while the device may be appending.

        Returns:
            The rows still held, and the number of rows lost.
        """
        positions = [p for first, _, count in pieces for p in range(first, first + count)]
        numbers = [n for _, first, count in pieces for n in range(first, first + count)]
        numbers_N = torch.tensor(numbers, dtype=torch.int64)
        index = numbers_N % self._capacity
        # As bytes, because not every device can index fp8.
        rows = self._ring.rows.view(torch.uint8)[index]
        scales = None if self._ring.scales is None else self._ring.scales[index]
        # Checked after the copy, so that rows overwritten during it count as lost.
        is_held = numbers_N >= self._oldest()
        lost = len(numbers) - int(is_held.sum())
        held_positions = np.asarray(positions, dtype=np.int32)
        if lost:
            held_positions, rows = held_positions[is_held.numpy()], rows[is_held]
            scales = None if scales is None else scales[is_held]
        return Held(held_positions, rows.view(self._ring.rows.dtype), scales), lost


def feature_rows(held: Held, layer_ids: tuple[int, ...]) -> FeatureRows:
    """Convert rows to the record that the log stores."""
    scale = None if held.scales is None else held.scales.numpy()
    if held.rows.dtype == torch.bfloat16:
        bits = held.rows.view(torch.uint16).numpy()
        return FeatureRows(held.positions, layer_ids, "bfloat16", bits, scale)
    bits = held.rows.view(torch.uint8).numpy()
    return FeatureRows(held.positions, layer_ids, "float8_e4m3fn", bits, scale)
