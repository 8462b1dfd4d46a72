"""Prompt chunks as programs of fixed shape, the neural drafter's rows included.

The rows of all chunks of a step are cut into blocks (``serving.engine.blocks``); a program exists
for 1, 2, 4, ... blocks, and for as many as a step can have.

Shapes: B blocks, T = 16 B rows, N chunks that end their prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.capture.ring import CaptureRing
from serving.engine.adjusting import Adjusting, requests_of
from serving.engine.blocks import BLOCK, cut, draft_rows
from serving.engine.cuda_graphs import Graphs, Landing, Program, buckets, fitting
from serving.engine.drafter_rows import take_in
from serving.engine.drafting import Drafting
from serving.engine.lanes import Lanes, upload
from serving.engine.scheduler import Chunk
from serving.engine.verifying import Rule, judge_of
from specops.device import (
    adjust_rows,
    close_round,
    count_tokens,
    open_round,
    places_of,
    verify_logits,
)
from specops.lanes import Column, Input
from targets.target import KvPool, Target

_LANE, _FIRST, _KEPT, _IDS = 0, 1, 2, 3
_ROW = 2
"""Column of a prompt's last row, behind what a round without a draft is handed."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A program that was launched."""

    chunks: tuple[Chunk, ...]
    logits: Tensor
    """[N, V] of the last row of each chunk that ends its prompt, in order, the target's own; on the
    device, until the next program runs."""
    outputs: Tensor
    """[N, columns] int64 on the host, once landed: the outcome of a round without drafts."""
    landed: Landing


class Prefill:
    """The programs of one engine, their inputs and outputs."""

    def __init__(
        self,
        target: Target,
        pool: KvPool,
        drafting: Drafting,
        lanes: Lanes,
        adjusting: Adjusting,
        graphs: Graphs,
        *,
        prefill_chunk: int,
        page_size: int,
        rule: Rule,
        ring: CaptureRing | None,
    ) -> None:
        self._target, self._pool, self._drafting = target, pool, drafting
        self._lanes, self._adjusting, self._graphs = lanes, adjusting, graphs
        self._page_size = page_size
        self._rule = judge_of(rule)
        # Every chunk may fill up a block of its own.
        most_blocks = -(-prefill_chunk // BLOCK) + lanes.padding
        self._sizes = buckets(most_blocks)
        device = target.device
        columns = _IDS + BLOCK
        self._inputs = torch.zeros((most_blocks, columns), dtype=torch.int64, device=device)
        # Chunks that end their prompt: such a request has a round without a draft.
        self._ends = torch.zeros((lanes.padding, _ROW + 1), dtype=torch.int64, device=device)
        self._ends[:, Input.LANE] = lanes.padding
        shape = (lanes.padding, int(Column.TOKENS))
        self._outputs = torch.zeros(shape, dtype=torch.int64, device=device)
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
                ends.append([lane, 0, len(blocks) * BLOCK + chunk.num_rows - 1])
            for first, num_rows, ids in cut(chunk.sequence, chunk.start, chunk.end):
                blocks.append([lane, first, num_rows if keeps else 0, *ids])
        size = fitting(self._sizes, len(blocks))
        blocks += [[self._lanes.padding, *[0] * (_IDS + BLOCK - 1)]] * (size - len(blocks))
        upload(torch.tensor(blocks), self._inputs[:size])
        no_end = [self._lanes.padding, 0, 0]
        padded = ends + [no_end] * (min(size, len(self._ends)) - len(ends))
        upload(torch.tensor(padded), self._ends[: len(padded)])
        fresh = [c.sequence for c in chunks if c.sequence.lane_length is None]
        self._lanes.write(fresh)
        self._adjusting.write(fresh)
        self._program(size)()
        for chunk in chunks:
            self._note(chunk)
        assert self._logits is not None
        outputs, landed = torch.empty((0, Column.TOKENS), dtype=torch.int64), Landing(None)
        if ends:  # else there is nothing to wait for
            outputs, landed = self._graphs.to_host(self._outputs[: len(ends)])
        return Prefilled(chunks, self._logits[: len(ends)], outputs, landed)

    def read(self, prefilled: Prefilled) -> list[int]:
        """Wait for a program and read the first tokens of the prompts that ended."""
        prefilled.landed.wait()
        for chunk in prefilled.chunks:
            if chunk.is_last:
                sequence, length = chunk.sequence, len(chunk.sequence.tokens) + 1
                sequence.lane_length = length
                if self._drafting.neural and sequence.draft_next == length - 1:
                    self._drafting.is_warm_to(sequence, length)
        first_ids: list[int] = prefilled.outputs[:, Column.NEXT].tolist()
        return first_ids

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
        places = places_of(here, BLOCK)
        positions, slots = places.positions.flatten(), places.slots.flatten()
        computed = self._target.decode(ids, positions, slots, here, self._pool)
        self._drafting.keep_features(slots, computed.features_TmH)
        if self._drafting.neural:
            draft_rows(self._drafting, rows, first, ids, self._page_size)
        count = min(size, len(self._ends))
        assert self._logits is not None
        last = computed.hidden_TH.index_select(0, self._ends[:count, _ROW])
        logits = self._target.logits(last)
        self._logits[:count].copy_(logits)
        self._choose(logits, computed.features_TmH)
        if self._ring is not None:
            taps, hidden = computed.features_TmH, computed.hidden_TH
            self._ring.append(taps, hidden, blocks[:, _KEPT], first, blocks[:, _LANE])

    def _choose(self, logits_NV: Tensor, features_TmH: Tensor) -> None:
        """First tokens, which the lanes take in and the neural drafter too: a round without drafts,
        of which the logits are there already."""
        ends, outputs = self._ends[: len(logits_NV)], self._outputs[: len(logits_NV)]
        state, tables = self._lanes.state, self._adjusting.tables
        opened = open_round(state, ends, 0, self._page_size, self._rule, is_given=True)
        assert opened.given_RK is not None
        asks, none = requests_of(ends, opened), opened.given_RK
        adjust_rows(logits_NV[:, None], none, asks, tables)
        verdict = verify_logits(
            logits_NV[:, None], opened.sampling(), none, opened.lens_R, opened.rules_R,
            opened.numbering(), None,
        )  # fmt: skip
        closed = close_round(state, opened, none, verdict, None, outputs)
        count_tokens(closed.emitted_RQ, closed.count_R, asks, tables)
        if self._drafting.neural:
            # Without the drafter's row of its first token a request would have to catch up on it.
            last = features_TmH.index_select(0, ends[:, _ROW])
            take_in(
                self._drafting, self._lanes, opened, closed, ends[:, Input.LANE], last,
                self._page_size,
            )  # fmt: skip
