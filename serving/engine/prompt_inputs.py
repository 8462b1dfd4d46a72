"""Inputs of the programs for prompts, in one tensor on the device, so that one copy uploads all.

What a step with new requests uploads is small, and there are six tensors of it. Each copy takes the
host as long as some thousands of bytes take.

Shapes: B blocks, N chunks that end their prompt, S requests whose lanes the program writes, F
integers and G reals of a lane, P pages of a lane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Several
from typing import NamedTuple

import torch
from torch import Tensor

from serving.engine.drafter_rows import BLOCK
from serving.engine.lanes import Lanes
from serving.engine.sequence import Sequence
from specops.lanes import Input

LANE, FIRST, KEPT, IDS = 0, 1, 2, 3
"""Columns of a block: its lane, its first position, how many of its rows are captured, its ids."""
ROW = 2
"""Column of a prompt's last row, after the inputs of a round without a draft."""
_MOST_NEW = 8
"""Lanes that a program writes. Those of further requests are written before it."""
_NUM_STAGED = 4
"""Uploads that may be on their way before the host waits for the oldest."""
_WORD = 8
"""Bytes of what everything is aligned to."""


class _Part(NamedTuple):
    """Where one input lies."""

    start: int
    """In words."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The first word behind it."""
        return self.start + -(-self.num_bytes // _WORD)

    def of(self, words: Tensor) -> Tensor:
        """This input of all of them; a view."""
        bytes_ = words[self.start : self.end].view(torch.uint8)
        return bytes_[: self.num_bytes].view(self.dtype).view(self.shape)


class _Staging:
    """Host memory from which uploads are read, each place again and again.

    torch's own pool of pinned memory asks the driver for more whenever all of it is in use, which
    takes the host some ten milliseconds.
    """

    def __init__(self, num_words: int, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._places = [
            torch.zeros(num_words, dtype=torch.int64, pin_memory=is_pinned)
            for _ in range(_NUM_STAGED if is_pinned else 1)
        ]
        self._read: list[torch.cuda.Event | None] = [None] * len(self._places)
        self._at = 0

    def take(self, num_words: int) -> Tensor:
        """[num_words] zeros, as soon as no earlier upload reads them any more."""
        self._at = (self._at + 1) % len(self._places)
        if (read := self._read[self._at]) is not None:
            read.synchronize()  # long ago, since programs run in turn
        words = self._places[self._at][:num_words]
        words.zero_()
        return words

    def launched(self) -> None:
        """Note that the copy from what was taken last has been launched."""
        if self._is_pinned:
            read = self._read[self._at] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            read.record()
            self._read[self._at] = read


class PromptInputs:
    """Where the programs read, and how the host writes it."""

    def __init__(self, lanes: Lanes, most_blocks: int) -> None:
        self._lanes = lanes
        self._most_new = min(_MOST_NEW, lanes.padding)
        # The blocks come last: a program reads as many as it is for, and no others are uploaded.
        end_columns, block_columns = ROW + 1, IDS + BLOCK
        self._parts: list[_Part] = []
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int64, (lanes.padding, end_columns)),
            (torch.int64, (self._most_new,)),
            *((one.dtype, shape) for one, shape in zip(*lanes.parts(self._most_new), strict=True)),
            (torch.int64, (most_blocks, block_columns)),
        ]
        at = 0
        for dtype, shape in shapes:
            self._parts.append(_Part(at, dtype, shape))
            at = self._parts[-1].end
        self._words = torch.zeros(at, dtype=torch.int64, device=lanes.ints.device)
        self._staging = _Staging(at, is_pinned=self._words.is_cuda)
        self.ends, self._lane, *self._news, self.blocks = (p.of(self._words) for p in self._parts)
        """ends: [lanes, ROW + 1]; blocks: [most blocks, IDS + BLOCK] int64."""

    def upload(
        self,
        size: int,
        blocks: Several[Several[int]] = (),
        ends: Several[Several[int]] = (),
        fresh: Several[Sequence] = (),
    ) -> None:
        """Upload what the program of ``size`` blocks is to compute, without waiting for the device.

        Args:
            blocks: [B, IDS + BLOCK]; what lacks of ``size`` is of no request.
            ends: [N, ROW + 1] likewise.
            fresh: requests whose lanes the program writes first.
        """
        fresh, others = fresh[: self._most_new], fresh[self._most_new :]
        self._lanes.write(others)
        *whole, most = self._parts
        own = most._replace(shape=(size, IDS + BLOCK))
        words = self._staging.take(own.end)
        ends_ND, lane_S, *news, blocks_BD = (part.of(words).numpy() for part in (*whole, own))
        padding = self._lanes.padding
        ends_ND[:, Input.LANE] = lane_S[:] = blocks_BD[:, LANE] = padding
        if ends:
            ends_ND[: len(ends)] = ends
        if blocks:
            blocks_BD[: len(blocks)] = blocks
        self._lanes.fill(fresh, lane_S, *news)
        self._words[: own.end].copy_(words, non_blocking=True)
        self._staging.launched()

    def write_lanes(self) -> None:
        """Write the lanes of the fresh requests: a part of every program."""
        self._lanes.put(self._lane, *self._news)
