"""The neural drafter computes rows of text that was decoded without it, by programs of fixed shape.

The rows of all requests are cut into blocks of 16 consecutive positions of one request; a program
exists for 1, 2, 4, ... blocks. Rows that fill up a block lie behind the text: what they write is
overwritten before anybody sees it, or goes to page 0.

Shapes: B blocks, T = 16 B rows.
"""

from __future__ import annotations

import torch

from serving.drafting import Drafting
from serving.graphs import Graphs, Program
from serving.lanes import Lanes, to_device
from serving.sequence import Sequence
from specops.attention import decode_slots

BLOCK = 16
"""Rows of a block, here and where prompts are computed."""
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
        assert drafting.neural is not None
        self._drafting, self._neural = drafting, drafting.neural
        self._lanes, self._graphs = lanes, graphs
        self._page_size = page_size
        self._most_blocks = 1
        while self._most_blocks * BLOCK < most_rows:
            self._most_blocks *= 2
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
            for first in range(start, end, BLOCK):
                ids = sequence.tokens[first : first + BLOCK]
                anchor = end - 1 - first if end - first <= BLOCK else _NO_END
                blocks.append([lane, first, anchor, *ids, *[0] * (BLOCK - len(ids))])
            self._drafting.is_warm_to(sequence, end)
        for at in range(0, len(blocks), self._most_blocks):
            self._launch(blocks[at : at + self._most_blocks])

    def _launch(self, blocks: list[list[int]]) -> None:
        size = 1
        while size < len(blocks):
            size *= 2
        filling = [self._lanes.padding, 1, _NO_END, *[0] * BLOCK]
        rows = torch.tensor(blocks + [filling] * (size - len(blocks)))
        self._inputs[:size].copy_(to_device(rows, self._inputs.device))
        self._program(size)()

    def capture_all(self) -> None:
        """Make every program, the largest first."""
        size = self._most_blocks
        while size:
            self._program(size)
            size //= 2

    def _program(self, size: int) -> Program:
        if size not in self._programs:
            self._programs[size] = self._graphs.capture(lambda: self._compute(size))
        return self._programs[size]

    def _compute(self, size: int) -> None:
        blocks = self._inputs[:size]
        lanes, first, end = blocks[:, _LANE], blocks[:, _FIRST], blocks[:, _END]
        rows = self._lanes.rows(lanes)
        before = decode_slots(rows.decode_pass(first - 1, self._page_size), BLOCK)
        at = rows.decode_pass(first, self._page_size, first_key=1)
        ids = blocks[:, _IDS:].reshape(-1)
        outputs = self._neural.take_in(ids, self._drafting.features_at(before), at)
        last = torch.arange(size, device=end.device) * BLOCK + end.clamp(min=0)
        # Of a block without an anchor to the lane that is nobody's.
        lanes = torch.where(end == _NO_END, self._lanes.padding, lanes)
        self._lanes.outputs_LH.index_copy_(0, lanes, outputs.index_select(0, last))
