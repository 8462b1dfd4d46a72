"""A whole round as one program of fixed shape: draft, verify, commit, and the drafter's own rows.

Nothing in it depends on a value: shapes, launches and addresses depend on the batch size, K and the
drafter alone. On a GPU every such program is captured in a CUDA graph at start-up, so a round is
one launch. The state of requests is kept in lanes on the device and is committed there. The host
uploads which lanes take part, and what a host drafter proposes, and reads back the outcome later:
the next round may be launched before that.

A neural drafter's rows are computed at the end of the round that committed them, K + 1 at once, and
its output at the new anchor is kept for the next draft, whatever its K is.

Biases and penalties are applied to the logits before verification, in every program that looks at
distributions; for requests without any, this ends after one check. If any request has a bias or
penalty, the whole batch uses a sampling program.

Shapes: R requests (the last ones may be padding), K draft tokens, Q = K + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.allocation import Allocation, Cut
from policies.interface import Pick
from serving.engine.allocating import Allocator, Cutting, PackedPass, Seen
from serving.engine.capture_ring import ROUNDS_ON_THE_WAY, CaptureRing
from serving.engine.cuda_graphs import Graphs, Landing, fitting
from serving.engine.drafter_rows import DrafterRows, FeatureStore
from serving.engine.drafting import Drafting
from serving.engine.drafts import Drafts, given
from serving.engine.graph_recorder import Program
from serving.engine.lanes import LaneRows, Lanes, requests_of
from serving.engine.later import Later
from serving.engine.mixed_rows import MixedRows
from serving.engine.proposed import Decoded, Judged, Proposed, Verified, cut_to
from serving.engine.round_buffers import Integers, RoundBuffers
from serving.engine.sequence import Sequence
from serving.engine.stopwatch import Stopwatch
from serving.engine.text_mix import TextMix, drawn_of
from serving.engine.text_rows import TextRows
from specops.device import (
    adjust_rows,
    best_ids,
    close_round,
    count_tokens,
    open_round,
    verify_logits,
)
from specops.lanes import Column, Input, OpenedRound
from specops.verify_logits import UNSOUND, LogitVerdict, Rule
from targets.target import KvPool, Target, TargetRows

Picks = tuple[Pick, ...] | None
"""Of a mix, who drafts for each request; ``None``: the first of it for all, or no mix drafts."""
_LANE_OF, _IS_SCORED, _TAKES_BEST = map(attrgetter, ("lane", "is_scored", "takes_best"))
"""Of a request; without a Python frame for each of a batch."""


class _Key(NamedTuple):
    """Properties of a round that determine its program."""

    size: int
    """Number of requests, including padding."""
    num_draft: int
    neural: str | None
    """Kind of the drafter on the device, or a mix; ``None``: tokens are uploaded, or K is 0."""
    is_greedy: bool
    """All requests are greedy and use the logits as they are, so no distribution is computed."""
    is_scored: bool = False
    """A request asks for log probabilities: K is at most ``RoundBuffers.most_scored``."""
    cutting: Cutting | None = None
    """How drafts are cut on the device; ``None``: not at all."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A round that was launched but not yet read."""

    batch: list[Sequence]
    key: _Key
    drafter: str
    """Kind of the drafter, or name of a mix; meaningless if K is 0."""
    picks: Picks
    """See ``Decision.picks``."""
    outputs: Integers
    """[size, columns] on the host, valid once ``landed`` and until the round after the next one is
    launched."""
    scores: Tensor | None
    """[size * Q, 1 + 2 n] float64, valid once ``landed``: log p of each emitted token and of the n
    best ones, and the ids of the latter; ``None`` if no request asked."""
    landed: Landing
    draft_share: float
    """Share of its time that is spent on drafting."""
    seen: Seen | None = None
    """What the cut was decided by; ``None`` if drafts were not cut."""
    num_caught_up: int = 0
    """Rows that catch-up programs computed for it, the anchors' left out."""

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens that one request can commit."""
        return self.key.num_draft + 1


class Rounds:
    """The round programs of one engine, their inputs and outputs."""

    def __init__(
        self,
        target: Target,
        pool: KvPool,
        drafting: Drafting,
        features: FeatureStore,
        lanes: Lanes,
        graphs: Graphs,
        *,
        page_size: int,
        rule: Rule,
        ring: CaptureRing | None,
        cuts: tuple[Cut, ...] = (),
    ) -> None:
        """
        Args:
            rule: verifies sampled requests without a seed.
            ring: receives the committed rows of captured requests.
            cuts: ways to cut drafts that programs are made for at start-up.
        """
        self._rule, self._ring, self._page_size = rule, ring, page_size
        self._target, self._pool, self._drafting = target, pool, drafting
        self._features, self._lanes, self._graphs = features, lanes, graphs
        max_draft = drafting.max_draft
        max_batch = lanes.padding
        self._sizes = graphs.sizes(max_batch)
        self._io = RoundBuffers(max_batch, max_draft, target, graphs)
        if ring is not None:
            ring.reserve(ROUNDS_ON_THE_WAY * max_batch * (max_draft + 1))
        self._programs: dict[_Key, Program] = {}
        self._draft_shares: dict[_Key, float] = {}
        self._allocator = Allocator(max_batch, max_draft, target.device, graphs, cuts)
        self._later: Later[_Key] = Later(self._sizes, max_draft, self._io.most_scored)

    # ---- running -------------------------------------------------------------------------------

    def most_draft(self, batch: list[Sequence]) -> int:
        """Largest K of a round of these requests."""
        is_scored = any(map(_IS_SCORED, batch))
        most = self._io.most_scored if is_scored else self._drafting.max_draft
        if not self._later.is_empty:
            size = fitting(self._sizes, len(batch))
            self._later.prefer(size)
            most = min(most, self._later.made_draft(size, is_scored=is_scored))
        return most

    def launch(
        self,
        batch: list[Sequence],
        drafter: str,
        num_draft: int,
        given: list[list[int]] | None,
        allocation: Allocation | None = None,
        picks: Picks = None,
    ) -> Launched:
        """Start a round that decodes every request of ``batch``.

        Requests of a round that was not yet read may take part: their lanes are up to date. If a
        neural drafter drafts, it must have their rows.

        Args:
            drafter: kind of the drafter, or name of a mix; meaningless if ``num_draft`` is 0.
            num_draft: at most ``most_draft``.
            given: what host drafters propose for each request, of a mix for those that they were
                picked for; ``None``: none of them drafts.
            allocation: how a neural drafter's drafts are cut before they are verified; those of a
                mix never are.
            picks: of a mix, who drafts for each request; ``None``: the first for all.
        """
        self._lanes.write([s for s in batch if not s.is_in_lane])
        neural = self._drafting.on_device.get(drafter) if num_draft else None
        numbers = None
        if isinstance(neural, MixedRows):
            picks = picks or (Pick(neural.kinds[0], 1.0, "best"),) * len(batch)
            numbers = [neural.number_of(pick.drafter) for pick in picks]
        else:
            picks = None
        num_new = neural.catch_up([s for s in batch if not s.is_flying]) if neural else 0
        size, is_scored = fitting(self._sizes, len(batch)), any(map(_IS_SCORED, batch))
        if not self._later.is_empty:  # or the batch has shrunk to a size that lacks this K
            size = self._later.size_for(size, num_draft, is_scored=is_scored)
        assert not is_scored or num_draft <= self._io.most_scored
        is_greedy = not is_scored and all(map(_TAKES_BEST, batch))
        key = _Key(size, num_draft, neural.kind if neural else None, is_greedy, is_scored)
        if allocation is None or not isinstance(neural, DrafterRows) or is_scored:
            allocation = None
        else:
            cutting = self._allocator.cutting(allocation, size, len(batch), num_draft)
            key = key._replace(cutting=cutting)
        program = self._program(key)  # a new one has run on inputs of its own
        self._io.upload(size, list(map(_LANE_OF, batch)), given, numbers)
        if allocation is not None:
            self._allocator.upload(allocation, len(batch), num_draft)
        program()
        seen = None if allocation is None else self._allocator.download(allocation, size)
        scores = None
        if is_scored:
            scores, _ = self._graphs.to_host(self._io.scores[: size * (num_draft + 1)])
        outputs, landed = self._io.download(size)
        share = self._draft_shares.get(_timed_as(key), 0.0) if neural else 0.0
        return Launched(batch, key, drafter, picks, outputs, scores, landed, share, seen, num_new)

    def leaves_rows(self, launched: Launched, drafter: str) -> bool:
        """Whether a round computes the rows of all that it commits that this neural drafter, or
        all members of this mix, need."""
        wanted = self._drafting.on_device[drafter].members
        key = launched.key.neural
        own = () if key is None else self._drafting.on_device[key].members
        return set(wanted) <= set(own)

    def read(self, launched: Launched) -> Decoded:
        """Wait for a round and read its outcome; rounds are read in order."""
        launched.landed.wait()
        outputs = launched.outputs[: len(launched.batch)]
        columns = outputs[:, : Column.TOKENS].T.tolist()
        accepted, next_ids, _, captured, *_ = columns
        if UNSOUND in next_ids:
            next_ids = [None if token == UNSOUND else token for token in next_ids]
        self._note_lengths(launched, accepted)
        proposed = self._proposed(launched, outputs, columns)
        numbers = None if self._ring is None else self._ring.number(captured)
        scores, key = [], launched.key
        if launched.scores is not None:
            scores = launched.scores.view(key.size, key.num_draft + 1, -1).tolist()
        return Decoded(proposed, Verified(accepted, next_ids), numbers, scores)

    def _proposed(
        self, launched: Launched, outputs: Integers, columns: list[list[int]]
    ) -> Proposed | None:
        key = launched.key
        if not (num_draft := key.num_draft):
            return None
        accepted, _, lens, _, picked, decided, kept = columns
        rows = outputs[:, Column.TOKENS : Column.TOKENS + num_draft].tolist()
        tokens = rows if min(lens) == num_draft else cut_to(rows, lens)
        if key.is_greedy:  # an accepted token is certain, the first rejected one impossible
            certain = [[0.0] * kept + [float("-inf")] for kept in range(num_draft + 1)]
            p_logp = [certain[kept] for kept in accepted]
        else:
            p_logp = self._reals(outputs, 1).tolist()
        picks = None if launched.picks is None else list(launched.picks)
        drafter = self._drafting.on_device.get(key.neural or "")
        judged = None
        if isinstance(drafter, TextMix):
            picks, judged = drafter.picks(picked), Judged(drafter.text.kind, decided, kept)
        q_logp = None
        if self._draws(key):
            drawn = lens if picks is None else drawn_of(picks, lens, self._drafting.neural)
            q_logp = cut_to(self._reals(outputs, 2).tolist(), drawn)
        considered = None if launched.seen is None else launched.seen.read(len(accepted))
        most = num_draft if isinstance(drafter, TextMix | TextRows) else None
        return Proposed(launched.drafter, tokens, q_logp, p_logp, picks, considered, most, judged)

    def _note_lengths(self, launched: Launched, accepted: list[int]) -> None:
        """Note which rows the round's drafter has."""
        neural = self._drafting.on_device.get(launched.key.neural or "")
        if neural is None:
            return
        for sequence, kept in zip(launched.batch, accepted, strict=True):
            if sequence.finish_reason is None:
                neural.has_rows_to(sequence, len(sequence.tokens) + kept + 1)

    def _reals(self, outputs: Integers, block: int) -> NDArray[np.float64]:
        """[R, max_draft] after the tokens: log p (block 1) or log q (block 2)."""
        start = Column.TOKENS + block * self._drafting.max_draft
        return outputs[:, start : start + self._drafting.max_draft].view(np.float64)

    def _draws(self, key: _Key) -> bool:
        """Whether a round's draft tokens are drawn from a distribution."""
        if key.neural is None or key.is_greedy:
            return False
        return self._drafting.on_device[key.neural].draws

    # ---- programs ------------------------------------------------------------------------------

    def works(self) -> list[Program]:
        """What every program computes, those of short drafts first. Programs that score tokens are
        left out: they launch the same kernels as others."""
        self._leave_out_requests()
        return [
            partial(self._round, key)
            for num_draft in range(self._drafting.max_draft + 1)
            for size in reversed(self._sizes)
            for key in self._keys(size, num_draft)
        ]

    def capture_all(self, most_draft: int | None = None) -> None:
        """Make programs, the largest first so that the others fit in its memory, and time drafting.

        Args:
            most_draft: largest K of those that are made now, without those that score drafts; the
                others are left for ``make_next``. ``None``: all are made.
        """
        self._leave_out_requests()
        largest = self._drafting.max_draft
        first = largest if most_draft is None else min(most_draft, largest)
        first_scored = self._io.most_scored if most_draft is None else 0
        for size in reversed(self._sizes):
            for num_draft in range(first, -1, -1):
                keys = self._keys(size, num_draft)
                if num_draft <= first_scored:
                    keys += self._scored_keys(size, num_draft)
                for key in keys:
                    self._program(key)
                if num_draft:
                    self._time_drafting(size, num_draft)
        self.leave_for_later(first, first_scored)

    def leave_for_later(self, most_draft: int, most_scored: int = 0) -> None:
        """Draft at most so many tokens until ``make_next`` has made the programs of larger K.

        Args:
            most_scored: the same for batches with a request for log probabilities.
        """
        self._later.leave(most_draft, self._keys)
        self._later.leave(most_scored, self._scored_keys, are_scored=True)

    @property
    def num_left(self) -> int:
        """Programs left for ``make_next``."""
        return self._later.num_left

    @property
    def made_draft(self) -> int:
        """Largest K whose programs are made for every size."""
        return min(map(self._later.made_draft, self._sizes))

    def make_next(self) -> bool:
        """Make one of the programs that were left, with nothing in flight. Returns False if there
        was none."""
        key = self._later.next
        if key is None:
            return False
        self._graphs.will_serve()
        self._leave_out_requests()
        self._program(key)
        if self._later.was_made() and self._graphs.are_real:
            self._time_drafting(key.size, key.num_draft)
        return True

    def _leave_out_requests(self) -> None:
        """Let what runs now compute rows of no request."""
        self._io.inputs.zero_()
        self._io.inputs[:, Input.LANE] = self._lanes.padding

    def _keys(self, size: int, num_draft: int) -> list[_Key]:
        """The programs of one size and K that score no tokens."""
        keys = []
        for neural in self._sources(num_draft):
            for key in (_Key(size, num_draft, neural, greedy) for greedy in (True, False)):
                keys.append(key)
                if neural in self._drafting.neural:
                    cuttings = self._allocator.cuttings(size, num_draft)
                    keys += [key._replace(cutting=cutting) for cutting in cuttings]
        return keys

    def _scored_keys(self, size: int, num_draft: int) -> list[_Key]:
        """Those that do, with K at most ``RoundBuffers.most_scored``."""
        sources = self._sources(num_draft)
        return [_Key(size, num_draft, neural, False, is_scored=True) for neural in sources]

    def _sources(self, num_draft: int) -> list[str | None]:
        """Neural drafters and mixes, and ``None`` where tokens are uploaded or K is 0."""
        neural: list[str | None] = list(self._drafting.on_device) if num_draft else []
        return [*neural, None] if self._drafting.hosts or not num_draft else neural

    def _time_drafting(self, size: int, num_draft: int) -> None:
        for kind in self._drafting.on_device:
            with_draft = self.device_seconds(size, num_draft, kind, repeats=3)
            without = self.device_seconds(size, num_draft, None, repeats=3)
            share = max(0.0, 1 - without / with_draft)
            self._draft_shares[_Key(size, num_draft, kind, is_greedy=True)] = share

    def device_seconds(
        self, num_rows: int, num_draft: int, neural: str | None, repeats: int = 5
    ) -> float:
        """Seconds that one greedy round takes, including its launch; nothing may be in flight.

        Args:
            neural: kind of the drafter, or name of a mix; ``None``: draft tokens are uploaded, or
                K is 0.
        """
        key = _Key(fitting(self._sizes, num_rows), num_draft, neural, is_greedy=True)
        return self._graphs.seconds(self._program(key), repeats)

    def _program(self, key: _Key) -> Program:
        if key not in self._programs:
            self._leave_out_requests()
            self._programs[key] = self._graphs.capture(partial(self._round, key))
        return self._programs[key]

    # ---- the round itself ----------------------------------------------------------------------

    def _round(self, key: _Key) -> None:
        size, num_draft = key.size, key.num_draft
        neural = self._drafting.on_device[key.neural] if key.neural else None
        watch = Stopwatch() if neural and not self._graphs.are_real else None
        inputs = self._io.inputs[:size]
        opened = open_round(
            self._lanes.state, inputs, num_draft, self._page_size, self._rule,
            is_given=neural is None,
        )  # fmt: skip
        rows = LaneRows(opened.pages_RP)
        if neural is None:
            drafts = given(opened)
        else:
            drafts = neural.draft(
                opened, rows, inputs, num_draft,
                draws=self._draws(key), tells=key.cutting is not None,
            )  # fmt: skip
            opened.block_RQ[:, 1:] = drafts.tokens_RK
            if drafts.lens_R is not None:
                opened = replace(opened, lens_R=drafts.lens_R)
        if drafts.figures_RK3 is not None and key.cutting is not None:
            opened = self._allocator.cut(opened, drafts.figures_RK3, key.cutting.cut)
        if watch:
            watch.count_drafting()
        computed, logits = self._compute(opened, rows, key)
        self._features.keep(opened.slots_T, computed.features_TmH)
        scores = logits.log_softmax(dim=-1) if key.is_scored else None
        asks, tables = requests_of(inputs, opened), self._lanes.tables
        if not key.is_greedy:
            adjust_rows(logits, drafts.tokens_RK, asks, tables)
        verdict = self._verify(logits, opened, drafts, key)
        closed = close_round(
            self._lanes.state, opened, drafts.tokens_RK, verdict, drafts.logq_RK,
            self._io.outputs[:size],
        )  # fmt: skip
        if drafts.when_closed is not None:
            drafts.when_closed(closed, self._io.outputs[:size])
        if scores is not None:
            self._score(scores, closed.emitted_RQ)
        if not key.is_greedy:
            count_tokens(closed.emitted_RQ, closed.count_R, asks, tables)
        if self._ring is not None:
            self._ring.append(
                computed.features_TmH, computed.hidden_TH,
                closed.captured_R, opened.anchor_at_R, opened.lanes_R,
            )  # fmt: skip
        if watch:
            watch.count_rest()
        if neural is not None:
            neural.observe_round(opened, closed, inputs[:, Input.LANE], computed.features_TmH)
        if watch:
            watch.count_drafting()
            self._draft_shares[_timed_as(key)] = watch.draft_share()

    def _compute(self, opened: OpenedRound, rows: LaneRows, key: _Key) -> tuple[TargetRows, Tensor]:
        """The target's pass over anchors and drafts, and its logits, [R, Q, V]."""
        # An argmax is the same in the dtype of the product, and copying all logits takes time.
        widen, page_size = not key.is_greedy, self._page_size
        capacity = None if key.cutting is None else key.cutting.capacity
        if capacity is not None:
            packed = PackedPass.run(self._target, self._pool, opened, capacity, page_size)
            logits = self._target.logits(packed.computed.hidden_TH, widen=widen)
            return packed.spread(), packed.spread_logits(logits)
        here = rows.decode_pass(opened.anchor_at_R, page_size)
        computed = self._target.decode(
            opened.block_RQ.flatten(), opened.positions_T, opened.slots_T, here, self._pool
        )
        hidden = computed.hidden_TH.view(key.size, key.num_draft + 1, -1)
        return computed, self._target.logits(hidden, widen=widen)

    def _verify(
        self, logits: Tensor, opened: OpenedRound, drafts: Drafts, key: _Key
    ) -> LogitVerdict | Tensor:
        """The verdict on the drafts; for greedy requests the target's best ids, [R, Q]."""
        if key.is_greedy:
            return best_ids(logits, is_target=True)
        return verify_logits(
            logits, opened.sampling(), drafts.tokens_RK, opened.lens_R, opened.rules_R,
            opened.numbering(), drafts.law,
        )  # fmt: skip

    def _score(self, scores_RQV: Tensor, emitted_RQ: Tensor) -> None:
        """Find the target's own log probabilities of the tokens and of the best alternatives."""
        best, ids = scores_RQV.topk(self._io.num_top, dim=-1)
        own = scores_RQV.gather(2, emitted_RQ[:, :, None])
        found = torch.cat((own.double(), best.double(), ids.double()), dim=2).flatten(0, 1)
        self._io.scores[: len(found)] = found


def _timed_as(key: _Key) -> _Key:
    """The greedy program in which drafting takes about the same share of the time."""
    return _Key(key.size, key.num_draft, key.neural, is_greedy=True)
