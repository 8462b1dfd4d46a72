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
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.records import FeatureRows
from specops.capture_pack import new_ring
from specops.device import pack_kept_rows

StoredDtype = Literal["bfloat16", "float8_e4m3fn"]

Pieces = list[int]
"""First position, running number of the first row, and number of consecutive rows, of each piece in
turn."""

ROUNDS_ON_THE_WAY = 2
"""Rounds that may have appended rows before the host has numbered any of them: a round is launched
before the previous one is read."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of one request are."""

    positions: NDArray[np.int32]
    """[N] positions in the sequence, ascending."""
    numbers: NDArray[np.int64]
    """[N] running numbers, ascending."""


@dataclass(frozen=True, slots=True)
class Held:
    """Rows copied out of the ring."""

    positions: NDArray[np.int32]
    """[N] positions in the sequence."""
    rows: NDArray[Any]
    """[N, m + 1, H] in the bits of ``FeatureRows.rows``."""
    scales: NDArray[np.float32] | None
    """[N, m + 1] multiplier of each vector for fp8 rows; ``None`` for bfloat16."""


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
        # numpy's views of the same host memory: its copies are one call each.
        bits = torch.uint8 if is_fp8 else torch.uint16
        self._rows: NDArray[Any] = self._ring.rows.view(bits).numpy()
        scales = self._ring.scales
        self._scales = None if scales is None else scales.numpy()
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

    def has_all(self, pieces: Pieces, ahead: float = 0.0) -> bool:
        """Whether all of a request's rows are held, and will be once a share ``ahead`` of the ring
        is overwritten.

        Args:
            pieces: ascending, as the engine noted them.
        """
        oldest = self._oldest() + int(ahead * self._capacity)
        return not pieces or pieces[1] >= oldest

    def _oldest(self) -> int:
        """Running number of the oldest row that no launched program can overwrite."""
        return self._next + self._most_on_the_way - self._capacity

    def places(self, pieces: Pieces) -> Places:
        """Positions and running numbers of the rows of a request."""
        if not pieces:
            return Places(np.zeros(0, np.int32), np.zeros(0, np.int64))
        first_P, number_P, count_P = np.array(pieces, np.int64).reshape(-1, 3).T
        # Within a piece, positions and numbers grow together.
        numbers = np.arange(count_P.sum()) + np.repeat(
            number_P - np.cumsum(count_P) + count_P, count_P
        )
        positions = numbers + np.repeat(first_P - number_P, count_P)
        return Places(positions.astype(np.int32), numbers)

    def blank_rows(self, places: Places) -> NDArray[Any]:
        """[N, m + 1, H] zeros that take no memory: the shape of rows that nobody has copied yet."""
        shape = (places.numbers.size, *self._rows.shape[1:])
        return np.broadcast_to(np.zeros((), self._rows.dtype), shape)

    def copy_rows(self, places: Places, out: NDArray[Any]) -> None:
        """Copy rows on any thread, while the device may be appending; see ``num_lost``.

        Args:
            out: [N, m + 1, H], contiguous, in the bits of ``FeatureRows.rows``.
        """
        # With an index that cannot be out of range, numpy needs no second copy.
        index = places.numbers % self._capacity
        self._rows.take(index, axis=0, out=out, mode="clip")

    def scales(self, places: Places) -> NDArray[np.float32] | None:
        """[N, m + 1] multiplier of each vector for fp8 rows; ``None`` for bfloat16."""
        if self._scales is None:
            return None
        return self._scales.take(places.numbers % self._capacity, axis=0)

    def num_lost(self, places: Places) -> int:
        """Leading rows that may have been overwritten by now; if they were being copied, during it.

        Asked after a copy, it tells which copied rows are sound.
        """
        return int(np.searchsorted(places.numbers, self._oldest()))

    def read(self, pieces: Pieces) -> tuple[Held, int]:
        """Copy the rows that are still held.

        Returns:
            They, and the number of rows lost.
        """
        places = self.places(pieces)
        rows = np.empty_like(self.blank_rows(places), order="C")
        self.copy_rows(places, rows)
        scales = self.scales(places)
        lost = self.num_lost(places)
        kept = None if scales is None else scales[lost:]
        return Held(places.positions[lost:], rows[lost:], kept), lost

    def features(self, held: Held, layer_ids: tuple[int, ...]) -> FeatureRows:
        """Rows as the record that the log stores."""
        return FeatureRows(held.positions, layer_ids, self.dtype, held.rows, held.scales)
