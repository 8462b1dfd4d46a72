"""The neural drafter computes rows of text that was decoded without it, by programs of fixed shape.

The rows of all requests are cut into blocks (``serving.engine.blocks``); a program exists
for 1, 2, 4, ... blocks.

Shapes: B blocks, T = 16 B rows.
"""

from __future__ import annotations

import torch

from serving.engine.blocks import BLOCK, cut, draft_rows
from serving.engine.cuda_graphs import Graphs, Program, buckets, fitting
from serving.engine.drafting import Drafting
from serving.engine.lanes import Lanes, upload
from serving.engine.sequence import Sequence

_LANE, _FIRST, _END, _IDS = 0, 1, 2, 3
_NO_END = -1


class CatchUp:
    """The programs of one engine, and their inputs."""

    def __init__(
        self, drafting: Drafting, lanes: Lanes, graphs: Graphs, *, most_rows: int, page_size: int
    ) -> None:
        """
        Args:
            most_rows: of one program; more are computed by several.
        """
        self._drafting = drafting
        self._lanes, self._graphs = lanes, graphs
        self._page_size = page_size
        self._most_blocks = -(-most_rows // BLOCK)
        self._sizes = buckets(self._most_blocks)
        shape = (self._most_blocks, _IDS + BLOCK)
        self._inputs = torch.zeros(shape, dtype=torch.int64, device=lanes.ints.device)
        self._programs: dict[int, Program] = {}

    def run(self, batch: list[Sequence]) -> None:
        """Compute all rows that the drafter lacks, the anchors' included; nothing is waited for.

        Args:
            batch: requests that have such rows, and of which the host knows the whole text.
        """
        blocks = []
        for sequence in batch:
            lane, start, end = sequence.lane, sequence.draft_next, len(sequence.tokens)
            assert lane is not None, "a running request has a lane"
            for first, num_rows, ids in cut(sequence, start, end):
                anchor = num_rows - 1 if first + num_rows == end else _NO_END
                blocks.append([lane, first, anchor, *ids])
            self._drafting.is_warm_to(sequence, end)
        for at in range(0, len(blocks), self._most_blocks):
            self._launch(blocks[at : at + self._most_blocks])

    def _launch(self, blocks: list[list[int]]) -> None:
        size = fitting(self._sizes, len(blocks))
        filling = [self._lanes.padding, 1, _NO_END, *[0] * BLOCK]
        rows = torch.tensor(blocks + [filling] * (size - len(blocks)))
        upload(rows, self._inputs[:size])
        self._program(size)()

    def capture_all(self) -> None:
        """Make every program, the largest first."""
        for size in reversed(self._sizes):
            self._program(size)

    def _program(self, size: int) -> Program:
        if size not in self._programs:
            self._programs[size] = self._graphs.capture(lambda: self._compute(size))
        return self._programs[size]

    def _compute(self, size: int) -> None:
        blocks = self._inputs[:size]
        lanes, first, end = blocks[:, _LANE], blocks[:, _FIRST], blocks[:, _END]
        rows = self._lanes.rows(lanes)
        ids = blocks[:, _IDS:].reshape(-1)
        outputs = draft_rows(self._drafting, rows, first, ids, self._page_size)
        last = torch.arange(size, device=end.device) * BLOCK + end.clamp(min=0)
        # Of a block without an anchor to the lane that is nobody's.
        lanes = torch.where(end == _NO_END, self._lanes.padding, lanes)
        self._lanes.outputs_LH.index_copy_(0, lanes, outputs.index_select(0, last))
