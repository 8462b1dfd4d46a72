"""Cuts the drafts of a round on the device, in programs whose policy asks for it.

The host uploads threshold and budget beside a round's other inputs, and reads how long drafts were
before the cut and what decided it together with the outcome, one round late: for traces, not for
the round. How a draft may be cut, and why the output keeps its law, is said in
``specops.allocation``.

With a budget, verification computes packed rows only: R anchors and as many draft tokens as the
budget's bucket holds, each as a pass of one row over its request's pages. That saves the target's
work on the other rows, and reads keys and values once for each row instead of once for each
request.

Shapes: R requests, K draft tokens, Q = K + 1, T packed rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from policies.allocation import Allocation, Cut
from policies.confidence_head import HIDDEN, NAMES, Head
from serving.engine.cuda_graphs import Graphs
from specops.allocation import NUM_FIGURES, CutValues, HeadWeights, PackedRows
from specops.attention import DecodePass
from specops.device import cut_drafts, pack_rows
from specops.lanes import OpenedRound
from targets.target import KvPool, Target, TargetRows

_QUARTERS = 4
"""Budgets that programs are captured for, as shares of all draft tokens of a batch."""
_THRESHOLD, _BUDGET, _GAMMA = range(len(CutValues.__slots__))
_NUM_VALUES = len(CutValues.__slots__)


class Cutting(NamedTuple):
    """What of an allocation determines a round's program."""

    cut: Cut
    capacity: int | None
    """Draft tokens that the packed rows of verification have room for; ``None``: all rows."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a cut round was decided by, on the host once the round has landed."""

    allocation: Allocation
    table: Tensor
    """[size, 1 + 3 max_draft] float32: length before the cut, and three figures of each position;
    overwritten three rounds later."""

    def read(self, num_requests: int) -> Considered:
        """What was considered for each request."""
        rows = self.table[:num_requests].tolist()
        lens = [int(row[0]) for row in rows]
        figures = [row[1 : 1 + NUM_FIGURES * num] for row, num in zip(rows, lens, strict=True)]
        return Considered(self.allocation.may_cut, figures)


@dataclass(frozen=True, slots=True)
class Considered:
    """The drafts of a round before they were cut."""

    may_cut: bool
    """The allocation could have shortened some."""
    figures: list[list[float]]
    """[R][3 n]: top probability, entropy and lead of each of the n positions of a draft."""

    def of(self, lives: list[bool]) -> Considered:
        """Those of some requests."""
        kept = [one for one, live in zip(self.figures, lives, strict=True) if live]
        return Considered(self.may_cut, kept)


class Allocator:
    """Inputs and outputs of cut rounds at fixed addresses."""

    def __init__(
        self,
        max_batch: int,
        max_draft: int,
        device: torch.device,
        graphs: Graphs,
        cuts: Sequence[Cut],
    ) -> None:
        """
        Args:
            cuts: those that programs are captured for at start-up.
        """
        self._graphs, self._cuts = graphs, cuts
        shape = (max_batch, 1 + NUM_FIGURES * max_draft)
        self._values = torch.zeros(_NUM_VALUES, device=device)
        self._seen = torch.zeros(shape, device=device)
        self._copies = cycle(
            [
                (
                    graphs.on_host((_NUM_VALUES,), torch.float32),
                    graphs.on_host(shape, torch.float32),
                )
                for _ in range(3)
            ]
        )
        self._now = next(self._copies)
        num = len(NAMES)
        shapes = ((num,), (num,), (HIDDEN, num), (HIDDEN,), (HIDDEN,), ())
        self._head = HeadWeights(*(torch.zeros(shape, device=device) for shape in shapes))
        self._loaded: Head | None = None

    # ---- on the host ---------------------------------------------------------------------------

    def cutting(
        self, allocation: Allocation, size: int, num_requests: int, num_draft: int
    ) -> Cutting:
        """The program that an allocation needs.

        Args:
            size: of the batch, with padding.
        """
        budget = allocation.budget(num_requests, num_draft)
        capacity = next(c for c in self._capacities(size, num_draft, budget) if c >= budget)
        return Cutting(allocation.cut, capacity if capacity < size * num_draft else None)

    def _capacities(self, size: int, num_draft: int, budget: int) -> list[int]:
        most = size * num_draft
        if not self._graphs.are_real:
            return [budget]
        return sorted({-(-most * quarter // _QUARTERS) for quarter in range(1, _QUARTERS + 1)})

    def cuttings(self, size: int, num_draft: int) -> Iterator[Cutting]:
        """All programs that may be needed on a GPU."""
        most = size * num_draft
        for cut in self._cuts:
            for capacity in self._capacities(size, num_draft, most):
                yield Cutting(cut, capacity if capacity < most else None)

    def upload(self, allocation: Allocation, num_requests: int, num_draft: int) -> None:
        """Upload the values of the next round's cut, and its head if that is another one. Rounds
        under way have read theirs by then: all of it is in order on one stream."""
        self._now = next(self._copies)
        values = self._now[0]
        values[_THRESHOLD] = allocation.threshold
        values[_BUDGET] = float(allocation.budget(num_requests, num_draft))
        values[_GAMMA] = allocation.gamma
        self._values.copy_(values, non_blocking=True)
        head = allocation.head
        if head is None or head is self._loaded:
            return
        weights = (head.mean, head.scale, head.w1, head.b1, head.w2, head.b2[0])
        for name, value in zip(HeadWeights.__slots__, weights, strict=True):
            to: Tensor = getattr(self._head, name)
            news = torch.from_numpy(value.copy()) if value.ndim else torch.tensor(float(value))
            to.copy_(news.pin_memory() if to.is_cuda else news, non_blocking=True)
        self._loaded = head

    def download(self, allocation: Allocation, size: int) -> Seen:
        """Start a copy of what the last round was decided by. It lands before a copy that is
        started later."""
        table = self._now[1]
        self._graphs.copy_to(table[:size], self._seen[:size])
        return Seen(allocation, table[:size])

    # ---- within programs -----------------------------------------------------------------------

    def cut(self, opened: OpenedRound, figures_RK3: Tensor, cut: Cut) -> OpenedRound:
        """The round with its drafts cut; notes what that was decided by."""
        lens_R = cut_drafts(
            figures_RK3, opened.lens_R, opened.floats_3R[0], CutValues(*self._values.unbind()),
            self._head, self._seen[: len(figures_RK3)],
            score=cut.score, cumulative=cut.cumulative,
        )  # fmt: skip
        return replace(opened, lens_R=lens_R)


@dataclass(frozen=True, slots=True)
class PackedPass:
    """The target's pass over packed rows, and what it found."""

    rows: PackedRows
    computed: TargetRows

    @classmethod
    def run(
        cls, target: Target, pool: KvPool, opened: OpenedRound, capacity: int, page_size: int
    ) -> PackedPass:
        """Compute the rows of a cut round that are verified.

        Every row is a pass of its own over its request's pages, one row long: keys and values of
        all rows are written before any is read. Padding is written to slot 0, which is no
        request's.
        """
        rows = pack_rows(opened.lens_R, opened.block_RQ.shape[1] - 1, capacity)
        positions_T = opened.positions_T[rows.at_T]
        here = DecodePass(
            opened.pages_RP.index_select(0, rows.request_T),
            torch.where(rows.is_real_T, positions_T, -1).int(),
            page_size,
        )
        computed = target.decode(
            opened.block_RQ.flatten()[rows.at_T],
            torch.where(rows.is_real_T, positions_T, 0),
            cls._slots(opened, rows),
            here,
            pool,
        )
        return cls(rows, computed)

    @staticmethod
    def _slots(opened: OpenedRound, rows: PackedRows) -> Tensor:
        return torch.where(rows.is_real_T, opened.slots_T[rows.at_T], 0)

    def spread(self) -> TargetRows:
        """The rows as those of a whole round."""
        computed = self.computed
        return TargetRows(
            self.rows.spread(computed.features_TmH), self.rows.spread(computed.hidden_TH)
        )

    def spread_logits(self, logits_TV: Tensor) -> Tensor:
        """[R, Q, V] logits as those of a whole round."""
        return self.rows.spread(logits_TV).view(*self.rows.of_RQ.shape, -1)
