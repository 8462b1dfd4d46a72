"""A whole round as one program of fixed shape: draft, verify, commit, and the drafter's own rows.

Nothing in it looks at a value: shapes, launches and addresses depend on (batch bucket, K, source)
alone, so that every such program is captured in a CUDA graph at start-up and a round is one launch.
The requests' state is in lanes on the device and is committed there; the host uploads which lanes
take part (and what the suffix index proposes) and reads back what was decided, when it likes: the
next round may be launched before that.

A drafter's rows are computed at the end of the round that committed them, K + 1 at once, and the
output at the new anchor is kept in the lane: the next draft starts from it whatever its K is.

Biases and penalties are applied to the logits before verification, in every program that looks at
distributions: for requests that have none, that ends as soon as it has looked. A batch in which one
has some takes such a program even if all are greedy.

Shapes: R requests (a bucket's, the last ones may be padding), K draft tokens, Q = K + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.capture.ring import ROUNDS_ON_THE_WAY, CaptureRing
from serving.engine.adjusting import Adjusting, fits_lane, requests_of
from serving.engine.catch_up import CatchUp
from serving.engine.cuda_graphs import Graphs, Landing, Program, buckets, fitting
from serving.engine.drafter_rows import take_in
from serving.engine.drafting import Drafting
from serving.engine.lanes import LaneRows, Lanes, upload
from serving.engine.sequence import Sequence
from serving.engine.verifying import Proposed, Rule, Verified, judge_of
from serving.requests import TokenLogprob
from specops.device import (
    adjust_rows,
    best_ids,
    close_round,
    count_tokens,
    open_round,
    sample_draft,
    verify_logits,
)
from specops.draft_sampling import Drafted, DraftLaw, join_laws
from specops.lanes import Column, Input, OpenedRound
from specops.verify_logits import LogitVerdict
from targets.target import KvPool, Target

_SOURCES = ("eagle3", "suffix")
_MOST_TOP = 20
"""Alternatives at a token that a program finds."""
_MOST_SCORED = 4
"""Draft tokens of a round that finds log probabilities: each K more is a program for every size and
source that most servers never run."""


@dataclass(frozen=True, slots=True)
class _Key:
    """What a round's program is made for."""

    size: int
    """Batch bucket."""
    num_draft: int
    source: str
    """Who drafts: ``eagle3``, or ``suffix``, whose tokens are uploaded; ``none`` if K is 0."""
    is_greedy: bool
    """All requests are and take the logits as they come: no distribution is looked at."""
    is_scored: bool = False
    """A request asks for log probabilities; K is at most ``_MOST_SCORED``, and it is not greedy."""


@dataclass(frozen=True, slots=True)
class _Drafts:
    """What a round drafted, on the device."""

    tokens_RK: Tensor
    logq_RK: Tensor | None
    """``None`` where nothing was drawn."""
    law: DraftLaw | None
    """What was drawn from; ``None`` for a delta draft."""


def _given(opened: OpenedRound) -> _Drafts:
    """The draft tokens that were handed in, none if K is 0."""
    assert opened.given_RK is not None
    return _Drafts(opened.given_RK, None, None)


@dataclass(frozen=True, slots=True)
class Launched:
    """A round that is under way, or done and not read yet."""

    batch: list[Sequence]
    key: _Key
    outputs: Tensor
    """[size, columns] on the host, valid once ``landed``."""
    scores: Tensor | None
    """[size * Q, 1 + 2 n] float64 likewise: log p of each emitted token and of the n best ones, and
    their ids; ``None`` if no request asked."""
    landed: Landing
    draft_share: float
    """Share of its time that is spent on drafting."""

    @property
    def most_tokens(self) -> int:
        """Most that one request can commit."""
        return self.key.num_draft + 1

    @property
    def warms(self) -> bool:
        """It leaves the neural drafter with all rows of what it commits."""
        return self.key.source == "eagle3"


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one round decided, on the host."""

    proposed: Proposed | None
    verified: Verified
    numbers: list[int] | None
    """[R] running number of each request's first captured row; ``None`` without a ring."""
    scores: list[list[list[float]]]
    """[R][Q], see ``Launched``; empty if no request asked."""

    def scored(self, r: int, tokens: list[int], num_top: int) -> list[TokenLogprob]:
        """Log probabilities of the tokens that request r emitted, each with the best ones."""
        rows = self.scores[r][: len(tokens)]
        return [_scored(token, row, num_top) for token, row in zip(tokens, rows, strict=True)]


def _are_scored(batch: list[Sequence]) -> bool:
    """Whether a request asks for log probabilities."""
    return any(s.request.sampling.logprobs is not None for s in batch)


def _scored(token: int, row: list[float], num_top: int) -> TokenLogprob:
    """``row`` as ``Launched`` has it."""
    own, *rest = row
    best, ids = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return TokenLogprob(token, own, tuple(zip(map(int, ids[:num_top]), best, strict=False)))


class Rounds:
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
        page_size: int,
        rule: Rule,
        ring: CaptureRing | None,
        catch_up: CatchUp | None,
    ) -> None:
        """
        Args:
            rule: verifies sampled requests that have no seed.
            ring: takes the committed rows of requests that capture.
            catch_up: warms the neural drafter, where there is one.
        """
        self._catch_up = catch_up
        self._rule = judge_of(rule)
        self._target, self._pool, self._drafting = target, pool, drafting
        self._lanes, self._adjusting, self._graphs = lanes, adjusting, graphs
        self._page_size = page_size
        self._max_draft = max_draft = drafting.max_draft
        max_batch = lanes.padding
        self._buckets = buckets(max_batch)
        device = target.device
        shape = (max_batch, Input.TOKENS + max_draft)
        self._inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        columns = Column.TOKENS + 3 * max_draft
        self._outputs = torch.zeros((max_batch, columns), dtype=torch.int64, device=device)
        self._num_top = min(_MOST_TOP, target.vocab_size)
        self._most_scored = min(_MOST_SCORED, max_draft)
        shape = (max_batch * (self._most_scored + 1), 1 + 2 * self._num_top)
        self._scores = torch.zeros(shape, dtype=torch.float64, device=device)
        self._ring = ring
        if ring is not None:
            ring.reserve(ROUNDS_ON_THE_WAY * max_batch * (max_draft + 1))
        self._programs: dict[_Key, Program] = {}
        self._draft_share: dict[tuple[int, int], float] = {}

    # ---- running -------------------------------------------------------------------------------

    def fits(self, batch: list[Sequence]) -> bool:
        """Whether a round can decode all of them; the engine's other path takes the rest."""
        sampling = [s.request.sampling for s in batch]
        return all((p.logprobs or 0) <= self._num_top and fits_lane(p) for p in sampling)

    def most_draft(self, batch: list[Sequence]) -> int:
        """Largest K of a round of theirs."""
        return self._most_scored if _are_scored(batch) else self._max_draft

    def launch(
        self, batch: list[Sequence], source: str, num_draft: int, given: list[list[int]] | None
    ) -> Launched:
        """Start a round that decodes every request of ``batch``.

        Requests that are in a round which was not read yet may take part in this one: their lanes
        know. For them the neural drafter, if it is the source, must be warm.

        Args:
            num_draft: at most ``most_draft``.
            given: what the suffix index proposes for each, if it is the source.
        """
        known = [s for s in batch if not s.is_flying]
        stale = [s for s in known if s.lane_length != len(s.tokens)]
        self._lanes.write(stale)
        self._adjusting.write(stale)
        cold = [s for s in known if s.draft_next != len(s.tokens)]
        if source == "eagle3" and cold:
            assert self._catch_up is not None
            self._catch_up.run(cold)
        size = self._upload(batch, given)
        is_scored = _are_scored(batch)
        assert not is_scored or num_draft <= self._most_scored
        is_greedy = not is_scored and all(
            s.is_greedy and not s.request.sampling.adjusts_logits for s in batch
        )
        key = _Key(size, num_draft, source, is_greedy, is_scored)
        self._program(key)()
        scores = None
        if is_scored:
            scores, _ = self._graphs.to_host(self._scores[: size * (num_draft + 1)])
        outputs, landed = self._graphs.to_host(self._outputs[:size])
        share = self._draft_share.get((size, num_draft), 0.0) if source == "eagle3" else 0.0
        return Launched(batch, key, outputs, scores, landed, share)

    def read(self, launched: Launched) -> Decoded:
        """Wait for a round and read what it decided; rounds are read in order."""
        launched.landed.wait()
        key, num_draft = launched.key, launched.key.num_draft
        outputs = launched.outputs[: len(launched.batch)]
        rows = outputs[:, : Column.TOKENS + num_draft].tolist()
        accepted, following, lens, captured = (
            [row[i] for row in rows]
            for i in (Column.ACCEPTED, Column.NEXT, Column.DRAFTED, Column.CAPTURED)
        )
        tokens = [row[Column.TOKENS :][:n] for row, n in zip(rows, lens, strict=True)]
        if key.is_greedy:  # a kept token is certain, the first rejected one impossible
            p_logp = [[0.0] * kept + [float("-inf")] * (num_draft - kept) for kept in accepted]
        else:
            p_logp = self._reals(outputs, 1)[:, :num_draft].tolist()
        q_logp = None
        if key.source == "eagle3" and not key.is_greedy:
            logq = self._reals(outputs, 2).tolist()
            q_logp = [row[:n] for row, n in zip(logq, lens, strict=True)]
        for sequence, kept in zip(launched.batch, accepted, strict=True):
            if sequence.finish_reason is None:
                sequence.lane_length = len(sequence.tokens) + kept + 1
                if launched.warms:
                    self._drafting.is_warm_to(sequence, sequence.lane_length)
        proposed = Proposed(key.source, tokens, q_logp) if num_draft else None
        numbers = None if self._ring is None else self._ring.number(captured)
        scores = []
        if launched.scores is not None:
            scores = launched.scores.view(launched.key.size, num_draft + 1, -1).tolist()
        return Decoded(proposed, Verified(accepted, following, p_logp), numbers, scores)

    def _reals(self, outputs: Tensor, block: int) -> Tensor:
        """[R, max_draft] float64 behind the tokens: log p (1) or log q (2)."""
        start = Column.TOKENS + block * self._max_draft
        return outputs[:, start : start + self._max_draft].contiguous().view(torch.float64)

    def _upload(self, batch: list[Sequence], given: list[list[int]] | None) -> int:
        """Lanes and proposals of a batch; returns its bucket."""
        size = fitting(self._buckets, len(batch))
        inputs = torch.zeros((size, self._inputs.shape[1]), dtype=torch.int64)
        inputs[:, Input.LANE] = self._lanes.padding
        inputs[: len(batch), Input.LANE] = torch.tensor([s.lane for s in batch])
        if given:
            padded = [[len(p), *p, *[0] * (self._max_draft - len(p))] for p in given]
            inputs[: len(batch), Input.DRAFTED :] = torch.tensor(padded)
        upload(inputs, self._inputs[:size])
        return size

    # ---- programs ------------------------------------------------------------------------------

    def capture_all(self) -> None:
        """Make every program, the largest first so that all fit the memory of the first, and time
        what drafting costs."""
        self._inputs.zero_()
        self._inputs[:, Input.LANE] = self._lanes.padding
        has_neural = self._drafting.neural is not None
        for size in reversed(self._buckets):
            for num_draft in range(self._max_draft, -1, -1):
                for source in _SOURCES[not has_neural :] if num_draft else ("none",):
                    for is_greedy in (True, False):
                        self._program(_Key(size, num_draft, source, is_greedy))
                    if num_draft <= self._most_scored:
                        self._program(_Key(size, num_draft, source, False, is_scored=True))
                if num_draft and has_neural:
                    with_draft = self.device_seconds(size, num_draft, "eagle3", repeats=3)
                    without = self.device_seconds(size, num_draft, "suffix", repeats=3)
                    share = max(0.0, 1 - without / with_draft)
                    self._draft_share[size, num_draft] = share

    def device_seconds(self, num_rows: int, num_draft: int, source: str, repeats: int = 5) -> float:
        """Time of one greedy round's program, its launch included; nothing may be in flight."""
        key = _Key(fitting(self._buckets, num_rows), num_draft, source, is_greedy=True)
        return self._graphs.seconds(self._program(key), repeats)

    def _program(self, key: _Key) -> Program:
        if key not in self._programs:
            self._programs[key] = self._graphs.capture(lambda: self._round(key))
        return self._programs[key]

    # ---- the round itself ----------------------------------------------------------------------

    def _round(self, key: _Key) -> None:
        size, num_draft = key.size, key.num_draft
        by_neural = key.source == "eagle3"
        inputs = self._inputs[:size]
        opened = open_round(
            self._lanes.state, inputs, num_draft, self._page_size, self._rule,
            is_given=not by_neural,
        )  # fmt: skip
        rows = LaneRows(opened.pages_RP)
        drafts = self._draft(opened, rows, key) if by_neural else _given(opened)
        if by_neural:
            opened.block_RQ[:, 1:] = drafts.tokens_RK
        here = rows.decode_pass(opened.anchor_at_R, self._page_size)
        computed = self._target.decode(
            opened.block_RQ.flatten(), opened.positions_T, opened.slots_T, here, self._pool
        )
        self._drafting.keep_features(opened.slots_T, computed.features_TmH)
        hidden = computed.hidden_TH.view(size, num_draft + 1, -1)
        # An argmax is the same in the dtype of the product, and a copy of all logits is not free.
        logits = self._target.logits(hidden, widen=not key.is_greedy)
        scores = logits.log_softmax(dim=-1) if key.is_scored else None
        asks, tables = requests_of(inputs, opened), self._adjusting.tables
        if not key.is_greedy:
            adjust_rows(logits, drafts.tokens_RK, asks, tables)
        verdict = self._verify(logits, opened, drafts, key)
        closed = close_round(
            self._lanes.state, opened, drafts.tokens_RK, verdict, drafts.logq_RK,
            self._outputs[:size],
        )  # fmt: skip
        if scores is not None:
            self._score(scores, closed.emitted_RQ)
        if not key.is_greedy:
            count_tokens(closed.emitted_RQ, closed.count_R, asks, tables)
        if by_neural:
            take_in(
                self._drafting, self._lanes, opened, closed, inputs[:, Input.LANE],
                computed.features_TmH, self._page_size,
            )  # fmt: skip
        if self._ring is not None:
            self._ring.append(
                computed.features_TmH, computed.hidden_TH,
                closed.captured_R, opened.anchor_at_R, opened.lanes_R,
            )  # fmt: skip

    def _verify(
        self, logits: Tensor, opened: OpenedRound, drafts: _Drafts, key: _Key
    ) -> LogitVerdict | Tensor:
        """What the target made of the drafts; of greedy requests its best ids, [R, Q]."""
        if key.is_greedy:
            return best_ids(logits)
        return verify_logits(
            logits, opened.sampling(), drafts.tokens_RK, opened.lens_R, opened.rules_R,
            opened.numbering(), drafts.law,
        )  # fmt: skip

    def _score(self, scores_RQV: Tensor, emitted_RQ: Tensor) -> None:
        """The target's own log probabilities of the tokens and of the best ones."""
        best, ids = scores_RQV.topk(self._num_top, dim=-1)
        own = scores_RQV.gather(2, emitted_RQ[:, :, None])
        found = torch.cat((own.double(), best.double(), ids.double()), dim=2).flatten(0, 1)
        self._scores[: len(found)] = found

    def _draft(self, opened: OpenedRound, rows: LaneRows, key: _Key) -> _Drafts:
        neural = self._drafting.neural
        assert neural is not None
        ahead = rows.decode_pass(opened.draft_at_R, self._page_size, first_key=1)
        outputs = self._lanes.outputs_LH.index_select(0, opened.lanes_R)
        if key.is_greedy:
            d2t = None if neural.vocab is None else neural.vocab.d2t_D

            def best(logits: Tensor, _number: int) -> Tensor:
                return best_ids(logits, d2t)

            return _Drafts(neural.draft_ahead(outputs, ahead, key.num_draft, best), None, None)

        sampling, by_match = opened.sampling(), opened.by_match_R
        drawn: list[Drafted] = []
        kept: list[Tensor] = []

        def draw(logits: Tensor, number: int) -> Tensor:
            here = opened.numbering(number)
            kept.append(logits)
            drawn.append(sample_draft(logits, sampling, here, by_match, neural.vocab))
            return drawn[-1].tokens_R

        tokens = neural.draft_ahead(outputs, ahead, key.num_draft, draw)
        law = DraftLaw(torch.stack(kept, 1), sampling, by_match, neural.vocab, join_laws(drawn))
        return _Drafts(tokens, torch.stack([d.logq_R for d in drawn], 1), law)
