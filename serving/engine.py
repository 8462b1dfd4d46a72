"""The decoding loop: plan, draft, verify, commit; one thread, one step at a time.

consumes: requests and control orders put in by other threads (a lock around two short lists).
waits for: work. Never for the recorder, the buffer, the trainer or new weights.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from buffer.records import Round
from drafters.eagle3_paged import PagedEagle3
from drafters.protocol import CommittedRows, Draft
from drafters.suffix import SuffixIndex
from policies.interface import Decision, DraftPolicy, Outcome, RowOutcome, StepObs
from specops.attention import PagedPass, make_group
from specops.rng import Stream, uniforms
from specops.sampling import SamplingRows, distribution, draw, sampling_rows
from specops.verify import verify_match, verify_standard
from torch import Tensor

from serving.capture import CaptureRing
from serving.detokenize import Detokenizer
from serving.scheduler import Chunk, Scheduler
from serving.sequence import Sequence
from serving.target import KvPool, Target, TargetRows
from serving.types import (
    DrainingError,
    EngineFigures,
    FinishReason,
    OnOutput,
    Output,
    QueueFullError,
    Request,
    SpeculationStats,
    TokenLogprob,
)

log = logging.getLogger(__name__)

PLAIN = Decision("none", 0, 1.0, False, "plain")


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one target pass, decode requests first, then prompt chunks."""

    ids_T: Tensor
    positions_T: Tensor
    paged: PagedPass
    num_query: int
    """Rows of each decode request, K + 1."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Host-side outcome of one verification."""

    num_accepted: list[int]
    next_ids: list[int]
    p_logp: list[list[float]]
    """[R][K] log probability of each draft token under the target's shaped distribution."""


@dataclass(frozen=True, slots=True)
class Committed:
    """Rows of one pass that a request keeps."""

    sequence: Sequence
    row: int
    """First packed row."""
    position: int
    """Position of that row."""
    count: int


@dataclass(slots=True)
class _Counters:
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    capture_rows_dropped: int = 0


class Engine:
    """Target, drafters, policy and the requests in flight."""

    def __init__(
        self,
        *,
        target: Target,
        pool: KvPool,
        scheduler: Scheduler,
        tokenizer: Any,
        eos_ids: frozenset[int],
        policy: DraftPolicy,
        neural: PagedEagle3 | None,
        suffix: SuffixIndex | None,
        ring: CaptureRing | None,
        on_finished: Callable[[Sequence, list[tuple[int, int, int]]], None] | None,
        between_steps: Callable[[], None] | None,
        on_rounds: Callable[[Decision, list[tuple[int, int]]], None] | None,
        max_model_len: int,
        max_queue: int,
        max_draft: int,
        model_name: str,
        seed: int,
    ) -> None:
        """
        Args:
            on_finished: takes a finished request and its captured pieces; must not block.
            between_steps: called before every step on the engine's thread; swaps weights there.
            on_rounds: told (proposed, accepted) of every round of a step, for the swap watch.
        """
        self.target = target
        self.pool = pool
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.policy = policy
        self.neural = neural
        self.suffix = suffix
        self.ring = ring
        self.on_finished = on_finished
        self.between_steps = between_steps
        self.on_rounds = on_rounds
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.max_draft = max_draft
        self.model_name = model_name
        self.vocab_size = target.vocab_size
        self.created_unix_s = int(time.time())

        self._seeds = np.random.default_rng(seed if seed else secrets.randbits(64))
        num_pages = scheduler.pool.num_pages
        self._draft_ready = np.zeros(num_pages, dtype=bool)
        num_slots = num_pages * scheduler.page_size
        shape = (num_slots, len(target.layer_ids), target.config.hidden_size)
        # Tapped rows of every slot, so that the drafter can catch up at any time: after an off
        # state, on a prefix somebody else computed, or with new weights. About a fifth of the KV.
        self._features = (
            torch.zeros(shape, dtype=target.dtype, device=target.device) if neural else None
        )
        self._matches: tuple[int, ...] | None = None
        self._slots: dict[str, np.ndarray] = {}
        self._counters = _Counters()
        self._accepted_per_pos = [0] * max_draft
        self._arms: Counter[tuple[str, int]] = Counter()

        self._wake = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._cancels: list[str] = []
        self._inflight: dict[str, Sequence] = {}
        self._draining = False
        self._stopping = False
        self._ready = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- called from other threads -------------------------------------------------------------

    def start(self) -> None:
        """Start decoding."""
        self._thread.start()
        self._ready = True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Cancel what is in flight and end the thread."""
        with self._wake:
            self._stopping = self._draining = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._ready = False

    def is_ready(self) -> bool:
        """Decoding, and not draining."""
        return self._ready and not self._draining and self._thread.is_alive()

    def drain(self) -> None:
        """Admit nothing new; what is in flight goes on."""
        with self._wake:
            self._draining = True

    def num_inflight(self) -> int:
        """Requests submitted and not finished."""
        return len(self._inflight)

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queue one request.

        Raises:
            ValueError: it can never be served; the text names the field.
            QueueFullError, DrainingError: not now.
        """
        self._check(request)
        sequence = self._new_sequence(request, on_output)
        with self._wake:
            if self._draining:
                raise DrainingError("the server is draining")
            if request.id in self._inflight:
                raise ValueError(f"request id {request.id!r} is already in flight")
            if len(self._inbox) + len(self.scheduler.waiting) >= self.max_queue:
                raise QueueFullError(f"{self.max_queue} requests are waiting already")
            self._inflight[request.id] = sequence
            self._inbox.append(sequence)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Stop a request and free its pages; unknown ids are ignored (it may just have ended)."""
        with self._wake:
            self._cancels.append(request_id)
            self._wake.notify()

    def wake(self) -> None:
        """Let an idle engine look at its control orders."""
        with self._wake:
            self._wake.notify()

    def policy_figures(self) -> dict[str, Any]:
        """What the policy believes, for /admin and the dashboard."""
        return self.policy.figures()

    def figures(self) -> EngineFigures:
        """Counters and gauges of now; swap and trace counts are added by the service."""
        c = self._counters
        pages = self.scheduler.pool
        return EngineFigures(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._inbox),
            kv_usage=1 - pages.num_available / pages.num_usable,
            prompt_tokens=c.prompt_tokens,
            generation_tokens=c.generation_tokens,
            cached_prompt_tokens=c.cached_prompt_tokens,
            num_rounds=c.num_rounds,
            num_draft_tokens=c.num_draft_tokens,
            num_accepted_tokens=c.num_accepted_tokens,
            num_accepted_per_pos=tuple(self._accepted_per_pos),
            num_steps=c.num_steps,
            steps_by_arm=dict(self._arms),
            drafter_version=self.version,
            swaps={},
            swap_seconds=0.0,
            traces={},
            capture_rows_dropped=c.capture_rows_dropped,
        )

    @property
    def version(self) -> int:
        """Version of the neural drafter in force; 0 without one."""
        return self.neural.version if self.neural else 0

    def _check(self, request: Request) -> None:
        num_prompt, sampling = len(request.prompt_ids), request.sampling
        if num_prompt == 0:
            raise ValueError("prompt must hold at least one token")
        bad = [t for t in request.prompt_ids if not 0 <= t < self.vocab_size]
        if bad:
            raise ValueError(f"prompt holds token id {bad[0]}, outside 0..{self.vocab_size - 1}")
        total = num_prompt + sampling.max_tokens
        if total > self.max_model_len:
            raise ValueError(
                f"prompt ({num_prompt} tokens) and max_tokens ({sampling.max_tokens}) make "
                f"{total}, more than max_model_len={self.max_model_len}"
            )
        need = self.scheduler.num_pages_for(num_prompt, sampling.max_tokens)
        if need > self.scheduler.pool.num_usable:
            raise ValueError(
                f"max_tokens={sampling.max_tokens} needs {need} KV pages, the pool has "
                f"{self.scheduler.pool.num_usable}"
            )

    def _new_sequence(self, request: Request, on_output: OnOutput) -> Sequence:
        seed = request.sampling.seed
        key = int(self._seeds.integers(1 << 63)) if seed is None else seed & ((1 << 64) - 1)
        return Sequence(
            request=request,
            on_output=on_output,
            key=key,
            detokenizer=Detokenizer(self.tokenizer, request.sampling.stop),
            eos_ids=frozenset() if request.sampling.ignore_eos else self.eos_ids,
            tokens=list(request.prompt_ids),
        )

    # ---- the loop ------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopping:
                try:
                    if not self.step():
                        self._wait_for_work()
                except Exception:  # the process's outermost loop: fail requests, keep serving
                    log.exception("engine step failed; the requests in flight are ended")
                    self._fail_all()
            for sequence in list(self._inflight.values()):
                self._finish(sequence, "cancelled")

    def _wait_for_work(self) -> None:
        with self._wake:
            if not (self._inbox or self._cancels or self._stopping):
                self._wake.wait(0.5)

    def step(self) -> bool:
        """One pass over the batch; False when there was nothing to do."""
        if self.between_steps:
            self.between_steps()
        self._take_orders()
        self._admit()
        plan = self.scheduler.plan()
        if not plan.decode and not plan.chunks:
            return False
        started = time.perf_counter()
        batch = list(plan.decode)
        decision = self._decide(batch)
        draft = self._draft(batch, decision) if decision.draft_k else None
        drafted = time.perf_counter()
        num_draft = draft.tokens_RK.shape[1] if draft else 0
        rows = self._rows(batch, draft, num_draft, plan.chunks)
        computed = self.target.forward(rows.ids_T, rows.positions_T, rows.paged, self.pool)
        if self._features is not None:
            self._features.index_copy_(0, rows.paged.slots_T, computed.features_TmH)
        committed: list[Committed] = []
        num_decode_rows = len(batch) * rows.num_query
        if batch:
            hidden = computed.hidden_TH[:num_decode_rows].unflatten(0, (len(batch), -1))
            logits = self.target.logits(hidden)
            verified = self._verify(batch, draft, logits)
            step_s = time.perf_counter() - started
            committed += self._commit_rounds(batch, draft, decision, verified, logits, step_s)
        committed += self._commit_chunks(plan.chunks, computed, num_decode_rows)
        self._capture(committed, computed)
        self._after_commit(committed)
        self._counters.num_steps += 1
        if batch:
            self._arms[(decision.drafter, decision.draft_k)] += 1
            self._observe(batch, draft, decision, verified, started, drafted, bool(plan.chunks))
        return True

    def _take_orders(self) -> None:
        with self._wake:
            arrived, cancels = list(self._inbox), self._cancels
            self._inbox.clear()
            self._cancels = []
        self.scheduler.waiting.extend(arrived)
        for request_id in cancels:
            sequence = self._inflight.get(request_id)
            if sequence is not None:
                self._finish(sequence, "cancelled")
        for sequence in arrived:
            if sequence.request.sampling.max_tokens == 0:
                self._finish(sequence, "length")

    def _admit(self) -> None:
        page_size = self.scheduler.page_size
        for sequence in self.scheduler.admit():
            self._counters.prompt_tokens += sequence.num_prompt
            self._counters.cached_prompt_tokens += sequence.num_cached
            pages = np.asarray(sequence.pages, dtype=np.int64)
            slots = pages[:, None] * page_size + np.arange(page_size)
            self._slots[sequence.request.id] = slots.reshape(-1)
            cached = sequence.num_cached // page_size
            self._draft_ready[pages[cached:]] = False
            if self.suffix:
                tenant = sequence.request.tenant
                self.suffix.begin(sequence.request.id, sequence.tokens, namespace=tenant)
            sequence.draft_next = self._first_undrafted(sequence, cached)

    def _first_undrafted(self, sequence: Sequence, cached: int) -> int:
        """Position from which the drafter has no rows: pages somebody drafted over are ready."""
        gaps = np.flatnonzero(~self._draft_ready[sequence.pages[:cached]])
        num_ready = int(gaps[0]) if len(gaps) else cached
        return max(num_ready * self.scheduler.page_size, 1)

    # ---- plan and draft ------------------------------------------------------------------------

    def _cap(self, sequence: Sequence) -> int:
        """Largest K this request may have now: the last token is always the target's own."""
        asked = sequence.request.max_draft
        limit = self.max_draft if asked is None else min(asked, self.max_draft)
        return min(limit, sequence.num_left - 1)

    def _decide(self, batch: list[Sequence]) -> Decision:
        drafters = (("eagle3",) if self.neural else ()) + (("suffix",) if self.suffix else ())
        caps = tuple(self._cap(s) for s in batch)
        if not batch or not drafters or not any(caps):
            return PLAIN
        matches = None
        if self.suffix:
            matches = tuple(
                self.suffix.match(s.request.id) if cap else 0
                for s, cap in zip(batch, caps, strict=True)
            )
        pending = sum(len(s.tokens) - s.draft_next - 1 for s in batch) if self.neural else 0
        obs = StepObs(
            step=self._counters.num_steps,
            batch=len(batch),
            caps=caps,
            suffix_matches=matches,
            drafters=drafters,
            max_draft=min(self.max_draft, max(caps)),
            version=self.version,
            pending_rows=pending,
        )
        self._matches = matches
        decision = self.policy.plan(obs)
        assert 0 <= decision.draft_k <= self.max_draft, f"policy planned K={decision.draft_k}"
        return decision

    def _draft(self, batch: list[Sequence], decision: Decision) -> Draft | None:
        if decision.drafter == "suffix":
            return self._draft_suffix(batch, decision.draft_k)
        return self._draft_neural(batch, decision.draft_k)

    def _draft_suffix(self, batch: list[Sequence], num_draft: int) -> Draft | None:
        assert self.suffix is not None
        proposals = [
            self.suffix.propose(s.request.id, min(num_draft, cap)) if (cap := self._cap(s)) else []
            for s in batch
        ]
        width = max(len(p) for p in proposals)
        if width == 0:
            return None
        padded = [p + [0] * (width - len(p)) for p in proposals]
        tokens = torch.tensor(padded, dtype=torch.int64, device=self.target.device)
        return Draft("suffix", tokens, tuple(map(len, proposals)), None, self.version)

    def _draft_neural(self, batch: list[Sequence], num_draft: int) -> Draft:
        assert self.neural is not None
        rows = self._committed_rows(batch, num_draft)
        sampling = self._sampling(batch)
        matches = [s.matches_target for s in batch]
        greedy_rows = draws = None
        if not all(matches):
            greedy_rows = torch.tensor(matches, device=self.target.device)
            draws = self._uniforms(batch, num_draft, Stream.DRAFT)
        draft = self.neural.propose(rows, num_draft, sampling, greedy_rows, draws)
        for sequence in batch:
            sequence.draft_next = len(sequence.tokens)
            self._mark_draft_ready(sequence)
        lens = tuple(min(num_draft, self._cap(s)) for s in batch)
        return Draft(draft.kind, draft.tokens_RK, lens, draft.q_RKV, draft.version)

    def _committed_rows(self, batch: list[Sequence], num_draft: int) -> CommittedRows:
        device = self.target.device
        ids: list[int] = []
        positions: list[int] = []
        counts = []
        for s in batch:
            ids += s.tokens[s.draft_next :]
            positions += range(s.draft_next, len(s.tokens))
            counts.append(len(s.tokens) - s.draft_next)
        assert self._features is not None
        before = [self._slots[s.request.id][s.draft_next - 1 : len(s.tokens) - 1] for s in batch]
        slots = torch.from_numpy(np.concatenate(before)).to(device)
        return CommittedRows(
            counts_R=tuple(counts),
            ids_T=torch.tensor(ids, device=device),
            positions_T=torch.tensor(positions, device=device),
            features_TmH=self._features[slots],
            slots_RS=self._slot_table(batch, num_draft),
        )

    def _mark_draft_ready(self, sequence: Sequence) -> None:
        page_size = self.scheduler.page_size
        self._draft_ready[sequence.pages[: sequence.draft_next // page_size]] = True

    def _slot_table(self, batch: list[Sequence], num_draft: int) -> Tensor:
        """[R, S] slots of positions 0 .. longest anchor + K."""
        width = max(len(s.tokens) for s in batch) + num_draft
        table = np.zeros((len(batch), width), dtype=np.int64)
        for row, sequence in zip(table, batch, strict=True):
            slots = self._slots[sequence.request.id][:width]
            row[: len(slots)] = slots
        return torch.from_numpy(table).to(self.target.device)

    def _sampling(self, batch: list[Sequence]) -> SamplingRows:
        params = [s.request.sampling for s in batch]
        return sampling_rows(
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            self.vocab_size,
            self.target.device,
        )

    def _uniforms(self, batch: list[Sequence], count: int, stream: Stream) -> Tensor:
        """[R, count] numbers for the positions after each anchor.

        Requests verified by ``match`` draw once a position (nonce 0), so their output does not
        depend on how rounds fell; the others draw afresh every round.
        """
        keys = np.array([s.key for s in batch], dtype=np.uint64)
        nonces = np.array([0 if s.matches_target else s.num_rounds + 1 for s in batch])
        starts = np.array([len(s.tokens) for s in batch])
        positions = starts[:, None] + np.arange(count)
        numbers = uniforms(keys, positions, nonces, stream)
        return torch.from_numpy(numbers).to(self.target.device)

    # ---- verify --------------------------------------------------------------------------------

    def _rows(
        self,
        batch: list[Sequence],
        draft: Draft | None,
        num_draft: int,
        chunks: tuple[Chunk, ...],
    ) -> StepRows:
        device = self.target.device
        ids, positions, slots, groups = [], [], [], []
        at = 0
        if batch:
            anchors = torch.tensor([len(s.tokens) - 1 for s in batch], device=device)
            last = torch.tensor([s.tokens[-1] for s in batch], device=device)[:, None]
            block = last if draft is None else torch.cat((last, draft.tokens_RK), dim=1)
            positions_RQ = anchors[:, None] + torch.arange(num_draft + 1, device=device)
            table = self._slot_table(batch, num_draft)
            groups.append(make_group(0, table, positions_RQ))
            ids.append(block.reshape(-1))
            positions.append(positions_RQ.reshape(-1))
            slots.append(table.gather(1, positions_RQ).reshape(-1))
            at = len(batch) * (num_draft + 1)
        for chunk in chunks:
            tokens = chunk.sequence.tokens[chunk.start : chunk.end]
            own = torch.from_numpy(self._slots[chunk.sequence.request.id][: chunk.end]).to(device)
            where = torch.arange(chunk.start, chunk.end, device=device)
            groups.append(make_group(at, own[None], where[None]))
            ids.append(torch.tensor(tokens, device=device))
            positions.append(where)
            slots.append(own[chunk.start :])
            at += len(tokens)
        paged = PagedPass(torch.cat(slots), tuple(groups))
        return StepRows(torch.cat(ids), torch.cat(positions), paged, num_draft + 1)

    def _verify(self, batch: list[Sequence], draft: Draft | None, logits: Tensor) -> Verified:
        """Apply each request's rule to its rows. logits [R, K + 1, V]."""
        device = logits.device
        num_draft = logits.shape[1] - 1
        if draft is None:
            tokens = torch.zeros((len(batch), 0), dtype=torch.int64, device=device)
            lens = torch.zeros(len(batch), dtype=torch.int64, device=device)
        else:
            tokens = draft.tokens_RK
            lens = torch.tensor(draft.lens_R, device=device)
        if all(s.is_greedy for s in batch):
            accepted, following = verify_match(logits.argmax(-1), tokens, lens)
            return _greedy_verified(accepted.tolist(), following.tolist(), num_draft)
        p = distribution(logits, self._sampling(batch))
        own = draw(p, self._uniforms(batch, num_draft + 1, Stream.TARGET))
        accepted, following = verify_match(own, tokens, lens)
        draft_p = p[:, :num_draft].gather(-1, tokens[..., None])[..., 0]
        if not all(s.matches_target for s in batch):
            verdict = verify_standard(
                p,
                draft.q_RKV if draft else None,
                tokens,
                lens,
                self._uniforms(batch, num_draft, Stream.ACCEPT),
                self._next_uniforms(batch),
            )
            by_match = torch.tensor([s.matches_target for s in batch], device=device)
            accepted = torch.where(by_match, accepted, verdict.num_accepted_R)
            following = torch.where(by_match, following, verdict.next_R)
        return Verified(accepted.tolist(), following.tolist(), draft_p.double().log().tolist())

    def _next_uniforms(self, batch: list[Sequence]) -> Tensor:
        """[R] numbers for the token after the kept ones; one a round, so no position is needed."""
        return self._uniforms(batch, 1, Stream.RESIDUAL)[:, 0]

    # ---- commit --------------------------------------------------------------------------------

    def _commit_rounds(
        self,
        batch: list[Sequence],
        draft: Draft | None,
        decision: Decision,
        verified: Verified,
        logits: Tensor,
        step_s: float,
    ) -> list[Committed]:
        num_query = logits.shape[1]
        tokens = draft.tokens_RK.tolist() if draft else [[] for _ in batch]
        q_logp = _draft_logp(draft) if draft else None
        committed = []
        for r, sequence in enumerate(batch):
            num_drafted = draft.lens_R[r] if draft else 0
            kept = verified.num_accepted[r]
            proposed = tuple(tokens[r][:num_drafted])
            sequence.rounds.append(
                Round(
                    anchor=len(sequence.tokens) - 1,
                    drafter=draft.kind if draft and num_drafted else "none",
                    version=self.version,
                    draft_ids=proposed,
                    q_logp=tuple(q_logp[r][:num_drafted]) if q_logp else None,
                    p_logp=tuple(verified.p_logp[r][: min(kept + 1, num_drafted)]),
                    num_accepted=kept,
                    next_id=verified.next_ids[r],
                    draft_k=decision.draft_k,
                    propensity=decision.propensity,
                    batch=len(batch),
                    step_s=step_s,
                )
            )
            self._count_round(num_drafted, kept)
            emitted = [*proposed[:kept], verified.next_ids[r]]
            anchor = len(sequence.tokens) - 1
            count = self._commit_tokens(sequence, emitted, logits[r])
            sequence.num_proposed += num_drafted
            sequence.num_accepted += min(kept, count)
            sequence.num_computed = anchor + count
            committed.append(Committed(sequence, r * num_query, anchor, count))
        return committed

    def _commit_chunks(
        self, chunks: tuple[Chunk, ...], computed: TargetRows, row: int
    ) -> list[Committed]:
        committed = []
        for chunk in chunks:
            sequence, count = chunk.sequence, chunk.end - chunk.start
            if chunk.is_last:
                logits = self.target.logits(computed.hidden_TH[row + count - 1][None, None])
                verified = self._verify([sequence], None, logits)
                self._commit_tokens(sequence, verified.next_ids, logits[0])
            sequence.num_computed = chunk.end
            committed.append(Committed(sequence, row, chunk.start, count))
            row += count
        return committed

    def _commit_tokens(self, sequence: Sequence, emitted: list[int], logits: Tensor) -> int:
        """Append tokens until one ends the request; returns how many were appended."""
        sampling = sequence.request.sampling
        sequence.num_steps += 1
        sequence.num_rounds += 1
        sequence.version = self.version
        count = 0
        for token in emitted:
            sequence.tokens.append(token)
            count += 1
            if token in sequence.eos_ids or token in sampling.stop_token_ids:
                sequence.finish_reason = "stop"
            elif sequence.detokenizer.add(token):
                sequence.finish_reason = "stop"
            elif sequence.num_left <= 0:
                sequence.finish_reason = "length"
            if sequence.finish_reason:
                break
        if sampling.logprobs is not None:
            sequence.logprobs += _logprobs(logits[:count], emitted[:count], sampling.logprobs)
        if self.suffix:
            self.suffix.extend(sequence.request.id, emitted[:count])
        self._counters.generation_tokens += count
        return count

    def _capture(self, committed: list[Committed], computed: TargetRows) -> None:
        """Copy the committed rows of capturing requests into the ring, all in one write."""
        wanted = [c for c in committed if c.sequence.request.capture]
        if self.ring is None or not wanted:
            return
        index = torch.tensor([i for c in wanted for i in range(c.row, c.row + c.count)])
        index = index.to(self.target.device)
        number = self.ring.write(computed.features_TmH[index], computed.hidden_TH[index])
        for c in wanted:
            c.sequence.capture_rows.append((c.position, number, c.count))
            number += c.count

    def _after_commit(self, committed: list[Committed]) -> None:
        for c in committed:
            self.scheduler.name_full_pages(c.sequence)
            if c.sequence.finish_reason:
                self._finish(c.sequence, c.sequence.finish_reason)
            elif c.sequence.num_completion > c.sequence.num_emitted:
                self._emit(c.sequence, None)

    def _emit(self, sequence: Sequence, reason: FinishReason | None, error: str | None = None) -> None:
        start = sequence.num_prompt + sequence.num_emitted
        tokens = tuple(sequence.tokens[start:])
        logprobs = None
        if sequence.request.sampling.logprobs is not None:
            logprobs = tuple(sequence.logprobs[sequence.num_emitted :])
        sequence.num_emitted += len(tokens)
        sequence.on_output(
            Output(
                request_id=sequence.request.id,
                text=sequence.detokenizer.take(final=reason is not None),
                token_ids=tokens,
                logprobs=logprobs,
                finish_reason=reason,
                stats=sequence.stats(),
                num_prompt_tokens=sequence.num_prompt,
                num_cached_tokens=sequence.num_cached,
                error=error,
            )
        )

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        request = sequence.request
        self.scheduler.remove(sequence)
        self._slots.pop(request.id, None)
        self._inflight.pop(request.id, None)
        sequence.finish_reason = reason
        if self.suffix:
            keep = request.capture and reason in ("stop", "length")
            self.suffix.finish(request.id, keep=keep)
        if self.on_finished and request.capture and reason in ("stop", "length"):
            self.on_finished(sequence, sequence.capture_rows)
        self._emit(sequence, reason, error)

    def _fail_all(self) -> None:
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._finish(sequence, "error", "the engine failed on this request; see the server log")

    # ---- figures -------------------------------------------------------------------------------

    def _count_round(self, num_drafted: int, kept: int) -> None:
        c = self._counters
        if num_drafted:
            c.num_rounds += 1
            c.num_draft_tokens += num_drafted
            c.num_accepted_tokens += kept
            for position in range(kept):
                self._accepted_per_pos[position] += 1

    def _observe(
        self,
        batch: list[Sequence],
        draft: Draft | None,
        decision: Decision,
        verified: Verified,
        started: float,
        drafted: float,
        has_prefill: bool,
    ) -> None:
        lens = draft.lens_R if draft else (0,) * len(batch)
        matches = self._matches if self.suffix and decision is not PLAIN else None
        rows = tuple(
            RowOutcome(n, kept, matches[r] if matches else 0)
            for r, (n, kept) in enumerate(zip(lens, verified.num_accepted, strict=True))
        )
        self.policy.observe(
            Outcome(
                decision=decision,
                batch=len(batch),
                rows=rows,
                step_s=time.perf_counter() - started,
                draft_s=drafted - started,
                has_prefill=has_prefill,
                version=self.version,
            )
        )
        if self.on_rounds and draft and draft.kind == "eagle3":
            self.on_rounds(decision, list(zip(lens, verified.num_accepted, strict=True)))


def _greedy_verified(accepted: list[int], following: list[int], num_draft: int) -> Verified:
    """Under greedy decoding a kept token has probability 1 and the first rejected one 0."""
    p_logp = [[0.0] * a + [float("-inf")] * (num_draft - a) for a in accepted]
    return Verified(accepted, following, p_logp)


def _draft_logp(draft: Draft) -> list[list[float]] | None:
    """log q of each drawn token, or ``None`` for a delta draft."""
    if draft.q_RKV is None:
        return None
    logs: list[list[float]] = (
        draft.q_RKV.gather(-1, draft.tokens_RK[..., None])[..., 0].double().log().tolist()
    )
    return logs


def _logprobs(logits: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob]:
    """The target's own log probabilities of emitted tokens. logits [n, V]."""
    scores = logits.log_softmax(dim=-1)
    best, ids = scores.topk(num_top, dim=-1)
    return [
        TokenLogprob(token, float(scores[i, token]), tuple(zip(ids[i].tolist(), best[i].tolist())))
        for i, token in enumerate(tokens)
    ]
