"""The rows of one neural drafter: which are already computed, and programs for the others.

Row p of a request is computed from its token p and the target's hidden states at p - 1; for a
drafter that reads none, rows begin at position 0. A round
computes the rows of the drafter that drafted it; those of the other neural drafters are missing
until they are about to draft, and are then computed by catch-up programs.

Catch-up programs and prompts work on blocks of 16 consecutive positions of one request. Rows that
pad a block lie after the request's text: what they write is overwritten before it is read, or goes
to page 0.

Shapes: R requests, Q rows of each, B blocks, T = R Q or 16 B rows, m tapped layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafters.protocol import NeuralDrafter, Traits
from serving.engine.cuda_graphs import Graphs, fitting
from serving.engine.drafts import AfterText, Drafts, drafted
from serving.engine.graph_recorder import Program
from serving.engine.lanes import LaneRows, Lanes, upload
from serving.engine.sequence import Sequence
from specops.attention import DecodePass
from specops.device import places_of
from specops.lanes import ClosedRound, OpenedRound
from targets.target import Target

BLOCK = 16
"""Rows of a block."""
_LANE, _FIRST, _END, _IDS = 0, 1, 2, 3
_NO_END = -1


def cut(sequence: Sequence, start: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
    """Cut positions start..end-1 of a request into blocks.

    Yields:
        First position, number of rows that are not padding, and 16 token ids.
    """
    for first in range(start, end, BLOCK):
        ids = sequence.tokens[first : min(first + BLOCK, end)]
        yield first, len(ids), ids + [0] * (BLOCK - len(ids))


class FeatureStore:
    """The target's tapped hidden states at every slot, about a fifth of the KV pool.

    They let a drafter catch up at any time: after plain decoding, on a prefix that another request
    computed, or with new weights.
    """

    def __init__(self, target: Target, num_slots: int) -> None:
        self.layer_ids = target.layer_ids
        shape = (num_slots, len(target.layer_ids), target.config.hidden_size)
        self._rows = torch.zeros(shape, dtype=target.dtype, device=target.device)

    def keep(self, slots_T: Tensor, features_TmH: Tensor) -> None:
        """Store the rows of a pass; rows of rejected drafts are overwritten later."""
        if self.layer_ids:
            self._rows.index_copy_(0, slots_T, features_TmH)

    def at(self, slots_T: Tensor) -> Tensor:
        """[T, m, H] rows stored at some slots."""
        return self._rows.index_select(0, slots_T)


class DrafterRows:
    """One neural drafter, the rows it has, and its catch-up programs."""

    def __init__(
        self,
        drafter: NeuralDrafter,
        features: FeatureStore,
        lanes: Lanes,
        graphs: Graphs,
        *,
        target: Target,
        num_pages: int,
        page_size: int,
        most_rows: int,
    ) -> None:
        """
        Args:
            features: stores at least the layers that the drafter reads.
            most_rows: maximum number of rows of one catch-up program.
        """
        self.drafter = drafter
        self._features, self._lanes, self._graphs = features, lanes, graphs
        self._page_size = page_size
        columns = [features.layer_ids.index(layer) for layer in drafter.layer_ids]
        reads_all = columns == list(range(len(features.layer_ids)))
        self._columns = (
            None if reads_all else torch.tensor(columns, dtype=torch.int64, device=target.device)
        )
        self._first_row = drafter.first_row
        self._has_page = np.zeros(num_pages, dtype=bool)
        shape = (lanes.padding + 1, drafter.output_size)
        self._outputs_LH = torch.zeros(shape, dtype=target.dtype, device=target.device)
        self._most_blocks = -(-most_rows // BLOCK)
        self._sizes = graphs.sizes(self._most_blocks)
        inputs = (self._most_blocks, _IDS + BLOCK)
        self._inputs = torch.zeros(inputs, dtype=torch.int64, device=target.device)
        self._programs: dict[int, Program] = {}
        self._version = self._newest = drafter.version
        """Whose weights the drafter had when ``weights_returned`` was asked last, and the highest
        that it ever had."""

    @property
    def kind(self) -> str:
        """The drafter's kind."""
        return self.drafter.kind

    @property
    def traits(self) -> Traits:
        """The drafter's."""
        return self.drafter.traits

    @property
    def members(self) -> tuple[DrafterRows, ...]:
        """Itself; of a mix, all neural drafters."""
        return (self,)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Its own; of a mix, those of all drafters that may be picked."""
        return (self.kind,)

    @property
    def draws(self) -> bool:
        """See ``Traits.draws``."""
        return self.traits.draws

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._outputs_LH.device

    # ---- which rows it has ---------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """Find out how many rows of a newly admitted request's cached prefix exist."""
        cached = sequence.num_cached // self._page_size
        self._has_page[sequence.pages[cached:]] = False
        gaps = np.flatnonzero(~self._has_page[sequence.pages[:cached]])
        num_pages = int(gaps[0]) if len(gaps) else cached
        sequence.next_row[self.kind] = max(num_pages * self._page_size, self._first_row)

    def begin_again(self, sequence: Sequence) -> None:
        """Forget all rows of a running request: they came from other hidden states."""
        self._has_page[sequence.pages] = False
        sequence.next_row[self.kind] = self._first_row

    def weights_returned(self) -> bool:
        """Whether the drafter has gone back to other weights since this was asked last: to former
        ones, or from these to the newest again. A drafter that has former ones always does."""
        version = self.drafter.version
        is_other, is_new = version != self._version, version > self._newest
        self._version, self._newest = version, max(version, self._newest)
        return is_other and (not is_new or self.traits.former_of is not None)

    def forget(self, running: list[Sequence]) -> None:
        """Forget all rows, those of cached prefixes too: they were made by other weights."""
        self._has_page[:] = False
        for sequence in running:
            sequence.next_row[self.kind] = self._first_row

    def has_rows_to(self, sequence: Sequence, length: int) -> None:
        """Note that the rows of the first ``length`` tokens are computed."""
        first, end = sequence.next_row[self.kind] // self._page_size, length // self._page_size
        sequence.next_row[self.kind] = length
        for page in sequence.pages[first:end]:
            self._has_page[page] = True

    def note_chunk(self, sequence: Sequence, start: int, end: int) -> None:
        """Note that a prefill program computed rows start..end-1, if these continue the rows."""
        if max(start, self._first_row) >= sequence.next_row[self.kind] >= start:
            self.has_rows_to(sequence, end)

    def num_missing(self, batch: list[Sequence]) -> int:
        """Number of committed rows before the anchors' that it must compute before it drafts."""
        kind = self.kind
        return sum([max(0, len(s.tokens) - s.next_row[kind] - 1) for s in batch])

    # ---- within programs -----------------------------------------------------------------------

    def pass_at(self, rows: LaneRows, first_R: Tensor) -> DecodePass:
        """A pass over the drafter's own rows, from position ``first`` on."""
        return rows.decode_pass(first_R, self._page_size, first_key=self._first_row)

    def outputs_of(self, lanes_R: Tensor) -> Tensor:
        """[R, H] outputs at the anchors, where the next draft starts."""
        return self._outputs_LH.index_select(0, lanes_R)

    def draft(
        self,
        opened: OpenedRound,
        rows: LaneRows,
        inputs_RI: Tensor,
        num_draft: int,
        *,
        draws: bool,
        tells: bool = False,
        after: AfterText | None = None,
    ) -> Drafts:
        """What the drafter proposes for the requests of a round.

        Args:
            inputs_RI: see ``Input``; a mix reads it.
            draws, tells, after: see ``drafts.drafted``.
        """
        ahead = self.pass_at(rows, opened.draft_at_R)
        return drafted(
            self.drafter, self.outputs_of(opened.lanes_R), ahead, opened, num_draft,
            draws=draws, tells=tells, after=after,
        )  # fmt: skip

    def observe_round(
        self, opened: OpenedRound, closed: ClosedRound, lanes_R: Tensor, features_TmH: Tensor
    ) -> None:
        """Compute the rows after the old anchors and keep the output at each new anchor.

        Rows after the new anchor are overwritten before they are read.

        Args:
            lanes_R: [R] int64, the lanes of ``opened`` as an index.
            features_TmH: the target's tapped rows of the old anchors and the drafts.
        """
        at = self.pass_at(LaneRows(opened.pages_RP), opened.draft_at_R)
        outputs = self.drafter.observe(closed.emitted_RQ.view(-1), self._own(features_TmH), at)
        fresh = outputs.index_select(0, closed.anchor_row_R)
        self._outputs_LH.index_copy_(0, lanes_R, fresh)

    def observe_blocks(self, rows: LaneRows, first_B: Tensor, ids_T: Tensor) -> Tensor:
        """Compute B blocks from the target's stored rows; returns their outputs, [T, H]."""
        before = places_of(rows.decode_pass(first_B - 1, self._page_size), BLOCK).slots.flatten()
        at = self.pass_at(rows, first_B)
        return self.drafter.observe(ids_T, self._own(self._features.at(before)), at)

    def _own(self, features_TmH: Tensor) -> Tensor:
        """The layers that this drafter reads."""
        if self._columns is None:
            return features_TmH
        return features_TmH.index_select(1, self._columns)

    # ---- catching up ---------------------------------------------------------------------------

    def catch_up(self, batch: list[Sequence]) -> int:
        """Launch programs that compute all missing rows, including the anchors'.

        Args:
            batch: requests whose whole text the host knows.

        Returns:
            How many there were before the anchors'.
        """
        num_missing, rows = self.num_missing(batch), self._missing(batch)
        for at in range(0, len(rows), self._most_blocks):
            self._launch(rows[at : at + self._most_blocks])
        return num_missing

    def _missing(self, batch: list[Sequence]) -> NDArray[np.int64]:
        """[B, 3 + 16] blocks of all missing rows, which count as computed from here on."""
        spans = []
        for sequence in batch:
            start, end = sequence.next_row[self.kind], len(sequence.tokens)
            if start < end:
                spans.append((sequence, start, end, -(-(end - start) // BLOCK)))
        blocks = np.zeros((sum([num for *_, num in spans]), _IDS + BLOCK), dtype=np.int64)
        blocks[:, _END] = _NO_END
        at = 0
        for sequence, start, end, num in spans:
            assert sequence.lane is not None, "a running request has a lane"
            own = blocks[at : at + num]
            own[:, _LANE], own[:, _FIRST] = sequence.lane, np.arange(start, end, BLOCK)
            own[-1, _END] = (end - start - 1) % BLOCK
            ids = np.zeros(num * BLOCK, dtype=np.int64)
            ids[: end - start] = sequence.tokens[start:end]
            own[:, _IDS:] = ids.reshape(num, BLOCK)
            self.has_rows_to(sequence, end)
            at += num
        return blocks

    def _launch(self, blocks: NDArray[np.int64]) -> None:
        size = fitting(self._sizes, len(blocks))
        rows = np.zeros((size, _IDS + BLOCK), dtype=np.int64)
        rows[:, :_IDS] = self._lanes.padding, 1, _NO_END
        rows[: len(blocks)] = blocks
        program = self._program(size)  # a new one has run on inputs of its own
        upload(torch.from_numpy(rows), self._inputs[:size])
        program()

    def works(self) -> list[Program]:
        """What every program computes, the largest first."""
        return [partial(self._compute, size) for size in reversed(self._sizes)]

    def capture_all(self) -> None:
        """Make every program, the largest first."""
        for size in reversed(self._sizes):
            self._program(size)

    def _program(self, size: int) -> Program:
        if size not in self._programs:
            self._inputs.zero_()
            self._inputs[:, _LANE], self._inputs[:, _END] = self._lanes.padding, _NO_END
            self._programs[size] = self._graphs.capture(partial(self._compute, size))
        return self._programs[size]

    def _compute(self, size: int) -> None:
        blocks = self._inputs[:size]
        lanes, first, end = blocks[:, _LANE], blocks[:, _FIRST], blocks[:, _END]
        ids = blocks[:, _IDS:].reshape(-1)
        outputs = self.observe_blocks(self._lanes.rows(lanes), first, ids)
        last = torch.arange(size, device=end.device) * BLOCK + end.clamp(min=0)
        # The output of a block without an anchor goes to the padding lane.
        lanes = torch.where(end == _NO_END, self._lanes.padding, lanes)
        self._outputs_LH.index_copy_(0, lanes, outputs.index_select(0, last))
