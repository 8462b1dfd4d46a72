"""Prompt chunks as programs of fixed shape, the neural drafter's rows included.

The rows of all chunks of a step are cut into blocks (``serving.blocks``); a program exists for 1,
2, 4, ... blocks, and for as many as a step can have.

Shapes: B blocks, T = 16 B rows, N chunks that end their prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.blocks import BLOCK, cut, draft_rows
from serving.capture import CaptureRing
from serving.drafting import Drafting
from serving.graphs import Graphs, Landing, Program, buckets
from serving.lanes import Lanes, to_device
from serving.scheduler import Chunk
from serving.target import KvPool, Target
from serving.verifying import Rule
from specops.attention import decode_slots
from specops.device import verify_logits

_LANE, _FIRST, _KEPT, _IDS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A program that was launched."""

    chunks: tuple[Chunk, ...]
    logits: Tensor
    """[N, V] of the last row of each chunk that ends its prompt, in order, without biases and
    penalties; on the device, until the next program runs."""
    first_ids: Tensor
    """[N] int64 on the host, once landed: the tokens chosen, by requests that adjust no logits."""
    landed: Landing


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
        rule: Rule,
        ring: CaptureRing | None,
    ) -> None:
        self._target, self._pool, self._drafting = target, pool, drafting
        self._lanes, self._graphs = lanes, graphs
        self._page_size = page_size
        self._rule: Rule = rule
        # Every chunk may fill up a block of its own.
        most_blocks = -(-prefill_chunk // BLOCK) + lanes.padding
        self._sizes = buckets(most_blocks)
        device = target.device
        columns = _IDS + BLOCK
        self._inputs = torch.zeros((most_blocks, columns), dtype=torch.int64, device=device)
        # Row and lane of chunks that end their prompt.
        self._ends = torch.zeros((lanes.padding, 2), dtype=torch.int64, device=device)
        self._ends[:, 1] = lanes.padding
        self._first_ids = torch.zeros(lanes.padding, dtype=torch.int64, device=device)
        self._ring = ring
        if ring is not None:
            ring.reserve(most_blocks * BLOCK)
        self._logits: Tensor | None = None
        self._programs: dict[int, Program] = {}

    def launch(self, chunks: tuple[Chunk, ...]) -> Prefilled:
        """Start to compute the chunks' rows, and to choose the first tokens of those that end their
        prompts; the lanes of these know theirs at once."""
        blocks: list[list[int]] = []
        ends: list[list[int]] = []
        for chunk in chunks:
            lane, keeps = chunk.sequence.lane, chunk.sequence.request.capture
            assert lane is not None, "a running request has a lane"
            if chunk.is_last:
                ends.append([len(blocks) * BLOCK + chunk.num_rows - 1, lane])
            for first, num_rows, ids in cut(chunk.sequence, chunk.start, chunk.end):
                blocks.append([lane, first, num_rows if keeps else 0, *ids])
        size = next(size for size in self._sizes if size >= len(blocks))
        blocks += [[self._lanes.padding, *[0] * (_IDS + BLOCK - 1)]] * (size - len(blocks))
        device = self._target.device
        self._inputs[:size].copy_(to_device(torch.tensor(blocks), device))
        padded = ends + [[0, self._lanes.padding]] * (min(size, len(self._ends)) - len(ends))
        self._ends[: len(padded)].copy_(to_device(torch.tensor(padded), device))
        self._lanes.write([c.sequence for c in chunks if c.sequence.lane_length is None])
        self._program(size)()
        for chunk in chunks:
            self._note(chunk)
        assert self._logits is not None
        first_ids, landed = torch.empty(0, dtype=torch.int64), Landing(None)
        if ends:  # else there is nothing to wait for
            first_ids, landed = self._graphs.to_host(self._first_ids[: len(ends)])
        return Prefilled(chunks, self._logits[: len(ends)], first_ids, landed)

    def read(self, prefilled: Prefilled) -> list[int]:
        """Wait for a program and read the first tokens of the prompts that ended."""
        prefilled.landed.wait()
        for chunk in prefilled.chunks:
            if chunk.is_last:
                chunk.sequence.lane_length = len(chunk.sequence.tokens) + 1
        return prefilled.first_ids.tolist()

    def numbers(self, chunks: tuple[Chunk, ...]) -> list[int] | None:
        """Running number of the first captured row of each chunk, once all programs before have
        been read; ``None`` without a ring."""
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
        row, lanes = self._ends[:count].unbind(1)
        logits = self._target.logits(computed.hidden_TH.index_select(0, row))
        self._logits[:count].copy_(logits)
        self._first_ids[:count] = self._choose(logits, lanes)
        if self._ring is not None:
            taps, hidden = computed.features_TmH, computed.hidden_TH
            self._ring.append(taps, hidden, blocks[:, _KEPT], first, blocks[:, _LANE])

    def _choose(self, logits_NV: Tensor, lanes_N: Tensor) -> Tensor:
        """[N] first tokens, which the lanes take in."""
        rows = self._lanes.rows(lanes_N)
        none = torch.zeros((len(lanes_N), 0), dtype=torch.int64, device=lanes_N.device)
        verdict = verify_logits(
            logits_NV[:, None], rows.sampling(), none, torch.zeros_like(lanes_N),
            rows.rules(self._rule), rows.numbering(), None,
        )  # fmt: skip
        count = (rows.limit_R - rows.length_R).clamp(max=1)  # 0 in the lane that is nobody's
        self._lanes.commit(lanes_N, rows, verdict.next_R[:, None], count)
        return verdict.next_R
