"""Hidden rows of running requests, held in a bounded ring until the request ends.

The ring is in host memory. Programs of fixed shape append to it from the device, in launch order,
and the host learns later how many rows each of them appended. Every row has a running number, which
both sides count. A row is lost, and counted, once ``capacity`` newer rows have been written.
Serving never waits for space or for a reader (``captured_rows``), which may be another process.

Shapes: N rows, m tapped layers, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from serving.engine.captured_rows import (
    NEXT,
    NUM_NUMBERS,
    ON_THE_WAY,
    CapturedRows,
    StoredDtype,
    bytes_of,
)
from serving.engine.shared_memory import SharedMemory
from specops.capture_pack import new_ring
from specops.device import pack_kept_rows

ROUNDS_ON_THE_WAY = 2
"""Rounds that may have appended rows before the host has numbered any of them: a round is launched
before the previous one is read."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A ring that other processes can read; see ``CapturedRows.mapped``."""

    memory: SharedMemory
    shape: tuple[int, int, int]
    """[capacity, m + 1, H]."""
    dtype: StoredDtype


class CaptureRing(CapturedRows):
    """Ring of [capacity, m + 1, H] rows in the dtype of the log."""

    def __init__(
        self,
        capacity: int,
        num_layers: int,
        hidden_size: int,
        device: torch.device | str = "cpu",
        dtype: StoredDtype = "bfloat16",
        *,
        is_shared: bool = False,
    ) -> None:
        """Allocate the ring.

        Args:
            capacity: rows it holds.
            num_layers: tapped layers, m.
            hidden_size: H.
            device: device that appends the rows.
            dtype: dtype in which rows are stored.
            is_shared: other processes are to read it.

        Raises:
            OSError: there is no such memory that is shared.
        """
        on_gpu = torch.device(device).type == "cuda"
        is_fp8 = dtype == "float8_e4m3fn"
        shape = capacity, num_layers + 1, hidden_size
        numbers, memory = np.zeros(NUM_NUMBERS, np.int64), None
        self.shared: Shared | None = None
        """``None`` if only this process can read it."""
        if is_shared:
            sizes = bytes_of(shape, dtype)
            shared = SharedMemory(sum(sizes), is_pinned=on_gpu)
            self.shared = Shared(shared, shape, dtype)
            head, *memory = torch.split(shared.bytes, list(sizes))
            numbers = head.numpy().view(np.int64)[:NUM_NUMBERS]
        self._ring = new_ring(
            *shape, str(device), is_fp8=is_fp8, pinned=on_gpu,
            memory=None if memory is None else (memory[0], memory[1]),
        )  # fmt: skip
        # numpy's views of the same host memory: its copies are one call each.
        bits = torch.uint8 if is_fp8 else torch.uint16
        scales = self._ring.scales
        super().__init__(
            self._ring.rows.view(bits).numpy(),
            None if scales is None else scales.numpy(),
            numbers,
            dtype,
        )

    def reserve(self, num_rows: int) -> None:
        """Allow programs to append up to ``num_rows`` more rows that the host has not numbered yet.

        Raises:
            ValueError: the ring is too small for all reservations together.
        """
        at_once = int(self._numbers[ON_THE_WAY]) + num_rows
        self._numbers[ON_THE_WAY] = at_once
        if at_once > self._capacity:
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
        *firsts, after = accumulate(counts, initial=int(self._numbers[NEXT]))
        self._numbers[NEXT] = after
        return firsts

    def synchronise(self) -> None:
        """Adopt the device's row count after a step that failed halfway."""
        self._numbers[NEXT] = int(self._ring.next_1)
