"""Prompt chunks as programs of fixed shape, the neural drafter's rows included.

The rows of all chunks of a step are cut into blocks (``serving.blocks``); a program exists for 1,
2, 4, ... blocks, and for as many as a step can have.

Shapes: B blocks, T = 16 B rows, N chunks that end their prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serving.blocks import BLOCK, cut, draft_rows
from serving.capture import CaptureRing
from serving.drafting import Drafting
from serving.graphs import Graphs, Program, buckets
from serving.lanes import Lanes, upload
from serving.scheduler import Chunk
from serving.target import KvPool, Target
from specops.attention import decode_slots

_LANE, _FIRST, _KEPT, _IDS = 0, 1, 2, 3


class Prefill:
    """The programs of one engine, their inputs and outputs."""

    def __init__(
        self,
        target: Target,
        pool: KvPool,
        drafting: Drafting,
        lanes: Lanes,
        graphs: Graphs,
        *,
        prefill_chunk: int,
        page_size: int,
        ring: CaptureRing | None,
    ) -> None:
        self._target, self._pool, self._drafting = target, pool, drafting
        self._lanes, self._graphs = lanes, graphs
        self._page_size = page_size
        # Every chunk may fill up a block of its own.
        most_blocks = -(-prefill_chunk // BLOCK) + lanes.padding
        self._sizes = buckets(most_blocks)
        device = target.device
        columns = _IDS + BLOCK
        self._inputs = torch.zeros((most_blocks, columns), dtype=torch.int64, device=device)
        self._ends = torch.zeros(lanes.padding, dtype=torch.int64, device=device)
        self._ring = ring
        if ring is not None:
            ring.reserve(most_blocks * BLOCK)
        self._logits: Tensor | None = None
        self._programs: dict[int, Program] = {}

    def run(self, chunks: tuple[Chunk, ...]) -> Tensor:
        """Start to compute the chunks' rows.

        Returns:
            [N, V] float32 logits of the last row of each chunk that ends its prompt, in order;
            valid until the next program runs.
        """
        blocks: list[list[int]] = []
        ends: list[int] = []
        for chunk in chunks:
            lane, keeps = chunk.sequence.lane, chunk.sequence.request.capture
            assert lane is not None, "a running request has a lane"
            if chunk.is_last:
                ends.append(len(blocks) * BLOCK + chunk.num_rows - 1)
            for first, num_rows, ids in cut(chunk.sequence, chunk.start, chunk.end):
                blocks.append([lane, first, num_rows if keeps else 0, *ids])
        size = next(size for size in self._sizes if size >= len(blocks))
        blocks += [[self._lanes.padding, *[0] * (_IDS + BLOCK - 1)]] * (size - len(blocks))
        upload(torch.tensor(blocks), self._inputs[:size])
        padded = ends + [0] * (min(size, len(self._ends)) - len(ends))
        upload(torch.tensor(padded), self._ends[: len(padded)])
        self._lanes.write([c.sequence for c in chunks if c.sequence.lane_length is None])
        self._program(size)()
        for chunk in chunks:
            self._note(chunk)
        assert self._logits is not None
        return self._logits[: len(ends)]

    def numbers(self, chunks: tuple[Chunk, ...]) -> list[int] | None:
        """Running number of the first captured row of each chunk, once all rounds before have been
        read; ``None`` without a ring."""
        if self._ring is None:
            return None
        return self._ring.number([c.num_rows * c.sequence.request.capture for c in chunks])

    def _note(self, chunk: Chunk) -> None:
        """The drafter's rows were computed too; they are of use if it had all before them."""
        sequence = chunk.sequence
        if self._drafting.neural and max(chunk.start, 1) >= sequence.draft_next >= chunk.start:
            self._drafting.is_warm_to(sequence, chunk.end)

    def capture_all(self) -> None:
        """Make every program, the largest first."""
        for size in reversed(self._sizes):
            self._program(size)

    def _program(self, size: int) -> Program:
        if size not in self._programs:
            if self._logits is None:
                shape = (len(self._ends), self._target.vocab_size)
                self._logits = torch.zeros(
                    shape, dtype=self._target.logits_dtype, device=self._target.device
                )
            self._programs[size] = self._graphs.capture(lambda: self._compute(size))
        return self._programs[size]

    def _compute(self, size: int) -> None:
        blocks = self._inputs[:size]
        rows = self._lanes.rows(blocks[:, _LANE])
        first, ids = blocks[:, _FIRST], blocks[:, _IDS:].reshape(-1)
        here = rows.decode_pass(first, self._page_size)
        positions = here.positions(BLOCK).flatten()
        slots = decode_slots(here, BLOCK)
        computed = self._target.decode(ids, positions, slots, here, self._pool)
        self._drafting.keep_features(slots, computed.features_TmH)
        if self._drafting.neural:
            draft_rows(self._drafting, rows, first, ids, self._page_size)
        count = min(size, len(self._ends))
        assert self._logits is not None
        last = computed.hidden_TH.index_select(0, self._ends[:count])
        self._logits[:count].copy_(self._target.logits(last))
        if self._ring is not None:
            taps, hidden = computed.features_TmH, computed.hidden_TH
            self._ring.append(taps, hidden, blocks[:, _KEPT], first, blocks[:, _LANE])
