"""Prompt chunks as programs of fixed shape, including the neural drafters' rows.

The rows of all chunks of a step are cut into blocks (``serving.engine.drafter_rows``). On a GPU,
programs exist for 1, 2, 4, ... blocks, and for the maximum number of blocks in a step.

Shapes: B blocks, T = 16 B rows, N chunks that end their prompt, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from serving.engine.capture_ring import CaptureRing
from serving.engine.commit import Scored
from serving.engine.cuda_graphs import Graphs, Landing, fitting
from serving.engine.drafter_rows import BLOCK, FeatureStore, cut
from serving.engine.drafting import Drafting
from serving.engine.graph_recorder import Program
from serving.engine.lanes import Lanes, requests_of
from serving.engine.prompt_inputs import FIRST, IDS, KEPT, LANE, ROW, PromptInputs
from serving.engine.scheduler import Chunk
from serving.requests import TokenLogprob
from specops.device import (
    adjust_rows,
    close_round,
    count_tokens,
    open_round,
    places_of,
    verify_logits,
)
from specops.lanes import Column, Input
from specops.verify_logits import UNSOUND, Rule
from targets.target import KvPool, Target


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A program that was launched."""

    chunks: tuple[Chunk, ...]
    logits: Tensor
    """[N, V] the target's own logits of the last row of each chunk that ends its prompt, in order.
    On the device, valid until the next program runs."""
    outputs: Tensor
    """[N, columns] int64 on the host, valid once ``landed``: outcome of a round without drafts."""
    landed: Landing
    done: Landing
    """The device's clock at its end; nobody need wait for it."""

    @property
    def is_scored(self) -> bool:
        """A request asks for log probabilities of its first token."""
        ends = (c.sequence.request.sampling for c in self.chunks if c.is_last)
        return any(sampling.logprobs is not None for sampling in ends)

    def scored(self) -> Scored:
        """Finds log probabilities in ``logits``; call it before the next program runs."""
        scores = self.logits.log_softmax(dim=-1)

        def of(r: int, tokens: list[int], num_top: int) -> list[TokenLogprob]:
            best, ids = scores[r].topk(num_top)
            top = tuple(zip(ids.tolist(), best.tolist(), strict=True))
            return [TokenLogprob(token, float(scores[r, token]), top) for token in tokens]

        return of


class Prefill:
    """The prompt programs of one engine, their inputs and outputs."""

    def __init__(
        self,
        target: Target,
        pool: KvPool,
        drafting: Drafting,
        features: FeatureStore,
        lanes: Lanes,
        graphs: Graphs,
        *,
        prefill_chunk: int,
        page_size: int,
        rule: Rule,
        ring: CaptureRing | None,
    ) -> None:
        self._target, self._pool, self._drafting = target, pool, drafting
        self._features, self._lanes, self._graphs = features, lanes, graphs
        self._page_size, self._rule, self._ring = page_size, rule, ring
        # Every chunk may need to pad a block of its own.
        most_blocks = -(-prefill_chunk // BLOCK) + lanes.padding
        self._sizes = graphs.sizes(most_blocks)
        self._inputs = PromptInputs(lanes, most_blocks)
        # A request whose prompt ends has a round without a draft.
        shape = (lanes.padding, int(Column.TOKENS))
        self._outputs = torch.zeros(shape, dtype=torch.int64, device=target.device)
        if ring is not None:
            ring.reserve(most_blocks * BLOCK)
        self._logits: Tensor | None = None
        self._programs: dict[int, Program] = {}

    def launch(self, chunks: tuple[Chunk, ...]) -> Prefilled:
        """Start computing the chunks' rows and choosing the first tokens of prompts that end. The
        lanes of these requests hold the tokens as soon as the program has run."""
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
        program = self._program(size)  # a new one has run on inputs of its own
        fresh = [c.sequence for c in chunks if not c.sequence.is_in_lane]
        self._inputs.upload(size, blocks, ends, fresh)
        program()
        for rows in self._drafting.neural.values():
            for chunk in chunks:
                rows.note_chunk(chunk.sequence, chunk.start, chunk.end)
        assert self._logits is not None
        outputs, landed = torch.empty((0, Column.TOKENS), dtype=torch.int64), Landing(None)
        if ends:  # else there is nothing to wait for
            outputs, landed = self._graphs.to_host(self._outputs[: len(ends)])
        done = landed if ends else self._graphs.mark()
        return Prefilled(chunks, self._logits[: len(ends)], outputs, landed, done)

    def read(self, prefilled: Prefilled) -> list[int | None]:
        """Wait for a program and read the first tokens of prompts that ended; ``None`` where the
        target's row has no distribution."""
        prefilled.landed.wait()
        for chunk in prefilled.chunks:
            if chunk.is_last:
                end = len(chunk.sequence.tokens)
                for rows in self._drafting.neural.values():
                    rows.note_chunk(chunk.sequence, end, end + 1)
        first_ids = prefilled.outputs[:, Column.NEXT].tolist()
        return [None if token == UNSOUND else token for token in first_ids]

    def numbers(self, chunks: tuple[Chunk, ...]) -> list[int] | None:
        """Number of the first captured row of each chunk; ``None`` without a ring. All earlier
        programs must have been read."""
        if self._ring is None:
            return None
        return self._ring.number([c.num_rows * c.sequence.request.capture for c in chunks])

    def works(self) -> list[Program]:
        """What every program computes, the largest first."""
        self._make_logits()
        self._leave_out_requests()
        return [partial(self._compute, size) for size in reversed(self._sizes)]

    def capture_all(self) -> None:
        """Make every program, the largest first."""
        for size in reversed(self._sizes):
            self._program(size)

    def _program(self, size: int) -> Program:
        if size not in self._programs:
            self._make_logits()
            self._leave_out_requests()
            self._programs[size] = self._graphs.capture(partial(self._compute, size))
        return self._programs[size]

    def _leave_out_requests(self) -> None:
        """Let what runs now compute rows of no request."""
        self._inputs.upload(self._sizes[-1])

    def _make_logits(self) -> None:
        if self._logits is None:
            shape = (len(self._outputs), self._target.vocab_size)
            self._logits = torch.zeros(
                shape, dtype=self._target.logits_dtype, device=self._target.device
            )

    def _compute(self, size: int) -> None:
        self._inputs.write_lanes()
        blocks = self._inputs.blocks[:size]
        rows = self._lanes.rows(blocks[:, LANE])
        first, ids = blocks[:, FIRST], blocks[:, IDS:].reshape(-1)
        here = rows.decode_pass(first, self._page_size)
        places = places_of(here, BLOCK)
        positions, slots = places.positions.flatten(), places.slots.flatten()
        computed = self._target.decode(ids, positions, slots, here, self._pool)
        self._features.keep(slots, computed.features_TmH)
        self._lanes.write_texts(blocks[:, LANE], first, blocks[:, IDS:])
        for neural in self._drafting.neural.values():
            neural.observe_blocks(rows, first, ids)
        count = min(size, len(self._outputs))
        assert self._logits is not None
        last = computed.hidden_TH.index_select(0, self._inputs.ends[:count, ROW])
        logits = self._target.logits(last)
        self._logits[:count].copy_(logits)
        self._choose(logits, computed.features_TmH)
        if self._ring is not None:
            taps, hidden = computed.features_TmH, computed.hidden_TH
            self._ring.append(taps, hidden, blocks[:, KEPT], first, blocks[:, LANE])

    def _choose(self, logits_NV: Tensor, features_TmH: Tensor) -> None:
        """Choose the first tokens by a round without drafts on these logits, and update the lanes
        and the neural drafters."""
        ends, outputs = self._inputs.ends[: len(logits_NV)], self._outputs[: len(logits_NV)]
        state, tables = self._lanes.state, self._lanes.tables
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
        # Without its row for the first token, a drafter would have to catch up.
        last = features_TmH.index_select(0, ends[:, ROW])
        for neural in self._drafting.neural.values():
            neural.observe_round(opened, closed, ends[:, Input.LANE], last)
