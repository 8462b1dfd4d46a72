"""Reading captured rows out of the ring, which needs no torch: another process can do it.

Shapes: N rows, m tapped layers, H hidden.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from buffer.records import FeatureRows

StoredDtype = Literal["bfloat16", "float8_e4m3fn"]

Pieces = list[int]
"""First position, running number of the first row, and number of consecutive rows, of each piece in
turn."""

NUM_NUMBERS = 2
NEXT, ON_THE_WAY = range(NUM_NUMBERS)
"""What the readers of a ring know of it: the running number of the next row that the host has heard
of, and how many further rows launched programs may append."""


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


_HEAD_BYTES = 64
assert NUM_NUMBERS * 8 <= _HEAD_BYTES


def bytes_of(shape: tuple[int, int, int], dtype: StoredDtype) -> tuple[int, int, int]:
    """Bytes of the parts of a ring in memory that is shared, which lie in this order: its numbers,
    its rows [capacity, m + 1, H], its scales."""
    is_fp8 = dtype == "float8_e4m3fn"
    vectors = math.prod(shape[:2])
    return _HEAD_BYTES, vectors * shape[2] * (1 if is_fp8 else 2), 4 * vectors if is_fp8 else 0


class CapturedRows:
    """A ring of [capacity, m + 1, H] rows to which somebody appends.

    A reader copies first and checks afterwards which rows were overwritten meanwhile.
    """

    def __init__(
        self,
        rows: NDArray[Any],
        scales: NDArray[np.float32] | None,
        numbers: NDArray[np.int64],
        dtype: StoredDtype,
    ) -> None:
        """
        Args:
            rows: [capacity, m + 1, H], uint16 bits of bfloat16 or uint8 bits of fp8.
            scales: [capacity, m + 1] of fp8 rows.
            numbers: [NUM_NUMBERS], kept up to date by whoever appends.
        """
        self.dtype: StoredDtype = dtype
        self._rows, self._scales, self._numbers = rows, scales, numbers
        self._capacity = len(rows)

    @classmethod
    def mapped(
        cls, descriptor: int, shape: tuple[int, int, int], dtype: StoredDtype
    ) -> CapturedRows:
        """A ring in memory of another process, for reading.

        Args:
            descriptor: of that memory.
            shape: [capacity, m + 1, H].
        """
        memory = np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8)
        head, rows, scales = np.split(memory, np.cumsum(bytes_of(shape, dtype))[:-1])
        is_fp8 = dtype == "float8_e4m3fn"
        return cls(
            rows.view(np.uint8 if is_fp8 else np.uint16).reshape(shape),
            scales.view(np.float32).reshape(shape[:2]) if is_fp8 else None,
            head.view(np.int64)[:NUM_NUMBERS],
            dtype,
        )

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
        return int(self._numbers[NEXT]) + int(self._numbers[ON_THE_WAY]) - self._capacity

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
