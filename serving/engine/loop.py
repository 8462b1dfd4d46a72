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
from itertools import accumulate, compress
from typing import Any

import numpy as np
import torch

from policies.interface import Decision, DraftPolicy, Outcome, RowOutcome
from serving.capture.ring import CaptureRing
from serving.engine.adjusting import fits_lane
from serving.engine.commit import Commits, Committed, Scored, Step, scored_by
from serving.engine.detokenize import Detokenizer
from serving.engine.drafting import Drafting
from serving.engine.packing import step_rows
from serving.engine.prefill import Prefill, Prefilled
from serving.engine.programs import Programs
from serving.engine.rounds import Decoded, Launched, Rounds
from serving.engine.scheduler import Chunk, Scheduler
from serving.engine.sequence import Sequence
from serving.engine.verifying import Rule, emitted_by, proposed, verify
from serving.requests import (
    DrainingError,
    EngineFigures,
    FinishReason,
    OnOutput,
    Output,
    QueueFullError,
    Request,
)
from targets.target import KvPool, Target

log = logging.getLogger(__name__)

PLAIN = Decision("none", 0, 1.0, False, "plain")
_MOST_UNTIMED = 8
"""Rounds beside prompt chunks that go untimed in a row: the host has more to do for them than for
others, but where there are no others their times have to do."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A round that was launched and whose outcome was not committed yet."""

    launched: Launched
    matches: tuple[int, ...]
    """Tokens of suffix that the index matched for each request when the round was planned."""
    decision: Decision
    version: int
    """Of the drafter, when it was launched."""
    started_s: float
    """``time.perf_counter()`` when the engine began to look at the batch."""
    plan_s: float
    """Seconds on looking and planning that the device waited for."""
    before_s: float
    """Seconds before the device began: the same, or by the index all since the last outcome, since
    without that it finds nothing. So they are a cost of drafting, and not of verification."""


@dataclass(frozen=True, slots=True)
class Landed:
    """What a round has decided, read and not committed yet."""

    decoded: Decoded
    step_s: float
    has_waited: bool
    """The host had nothing left to do beside the round."""


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
        drafting: Drafting,
        ring: CaptureRing | None,
        max_model_len: int,
        max_queue: int,
        model_name: str,
        seed: int,
        rule: Rule = "block",
        programs: Programs | None = None,
        on_finished: Callable[[Sequence], None] | None = None,
        between_steps: Callable[[], None] | None = None,
        on_rounds: Callable[[list[tuple[int, int]]], None] | None = None,
    ) -> None:
        """
        Args:
            rule: verifies sampled requests that have no seed.
            programs: compute the batches and chunks that fit them; ``None``: every step is put
                together anew.
            on_finished: takes a finished request whose rows were captured; must not block.
            between_steps: called before every step on the engine's thread; swaps weights there.
            on_rounds: told (proposed, accepted) of the rounds of a step the neural drafter drafted.
        """
        self.target = target
        self.pool = pool
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.policy = policy
        self.drafting = drafting
        self.ring = ring
        self.rule = rule
        self.programs = programs
        self.on_finished = on_finished
        self.between_steps = between_steps
        self.on_rounds = on_rounds
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.max_draft = drafting.max_draft
        self.model_name = model_name
        self.vocab_size = target.vocab_size
        self.created_unix_s = int(time.time())

        self._seeds = np.random.default_rng(seed if seed else secrets.randbits(64))
        self._commits = Commits(drafting, ring)
        self._arms: Counter[tuple[str, int]] = Counter()
        self._flight: Flight | None = None
        self._landed: Landed | None = None
        self._prefilled: Prefilled | None = None
        self._landed_s = 0.0
        self._is_timed = True
        self._num_untimed = 0

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

    def cancel_all(self) -> None:
        """Stop every request in flight."""
        with self._wake:
            self._cancels.extend(self._inflight)
            self._wake.notify()

    def reset_figures(self) -> None:
        """Forget counters, prefix cache and random state of a warm-up; nothing may be in flight."""
        assert not self._inflight, "reset while requests are in flight"
        self._commits.reset()
        self._arms.clear()

    def count_lost_rows(self, count: int) -> None:
        """Captured rows that the ring overwrote before they were written down."""
        self._commits.counters.capture_rows_dropped += count

    def wake(self) -> None:
        """Let an idle engine look at its control orders."""
        with self._wake:
            self._wake.notify()

    def policy_figures(self) -> dict[str, Any]:
        """What the policy believes, for /admin and the dashboard."""
        return self.policy.figures()

    def figures(self) -> EngineFigures:
        """Counters and gauges of now; swap and trace counts are added by the service."""
        c = self._commits.counters
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
            num_accepted_per_pos=tuple(c.accepted_per_pos),
            num_steps=c.num_steps,
            steps_by_arm=dict(self._arms),
            drafter_version=self.version,
            swaps={},
            swap_seconds=0.0,
            traces={},
            capture_rows_dropped=c.capture_rows_dropped,
            num_request_steps=c.num_request_steps,
        )

    @property
    def version(self) -> int:
        """Version of the neural drafter in force; 0 without one."""
        return self.drafting.version

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
        """One pass over the batch; False when there was nothing to do.

        A round by programs is launched before the outcome of the one before is read, so that the
        host's work on that goes on beside it; a program of prompt chunks is read before the round
        that was launched behind it.
        """
        has_landed = self._land_chunks()
        if self.between_steps:
            self.between_steps()
        self._take_orders()
        self._admit()
        plan = self.scheduler.plan(time.perf_counter())
        batch, chunks = list(plan.decode), plan.chunks
        if not batch and not chunks and self._flight is None:
            return has_landed
        if self.programs is not None and chunks:
            self._prefill(self.programs.prefill, chunks)
            chunks = ()
        self._decode(batch, chunks)
        self._commits.counters.num_steps += 1
        return True

    def _decode(self, batch: list[Sequence], chunks: tuple[Chunk, ...]) -> None:
        """Plan, draft, verify and commit; ``chunks`` are computed in the same pass."""
        rounds = None if self.programs is None else self.programs.rounds
        if rounds is None or not rounds.fits(batch):
            rounds = None
            self._land()
            self._land_chunks()
        batch = self._undecided(batch)
        if not batch and not chunks:
            self._land()
            return
        started = time.perf_counter()
        obs, decision = None, PLAIN
        if batch and (resting := self.policy.rest()) is not None:
            decision = resting
        elif batch:
            most = self.max_draft if rounds is None else rounds.most_draft(batch)
            obs = self.drafting.observe(batch, self._commits.counters.num_steps, most)
            decision = self.policy.plan(obs) if obs else PLAIN
        assert 0 <= decision.draft_k <= self.max_draft, f"policy planned K={decision.draft_k}"
        matches = obs.suffix_matches if obs and obs.suffix_matches else (0,) * len(batch)
        if rounds is not None:
            self._fly(rounds, batch, matches, decision, started)
            return
        plan_s = time.perf_counter() - started
        step = self._pass(batch, decision, chunks, started)
        if step is not None:
            self._arms[(decision.drafter, decision.draft_k)] += 1
            seconds, lives = (time.perf_counter() - started, plan_s), [True] * len(batch)
            self._observe(matches, decision, step, seconds, lives, has_prefill=bool(chunks))

    def _undecided(self, batch: list[Sequence]) -> list[Sequence]:
        """Those that go on, as far as is known: a round that is under way commits a token of each
        request at least."""
        running = (s for s in batch if s.finish_reason is None)
        return [s for s in running if not (s.is_flying and s.num_left == 1)]

    def _fly(
        self,
        rounds: Rounds,
        batch: list[Sequence],
        matches: tuple[int, ...],
        decision: Decision,
        started_s: float,
    ) -> None:
        """Launch a round, and commit the one before it."""
        plan_s = time.perf_counter() - started_s
        source, num_draft, given = decision.drafter, decision.draft_k, None
        if not self._may_overtake(batch, source):
            if self._land():  # the device was still at it: what the host did has cost nothing
                plan_s = 0.0
            lives = [s.finish_reason is None for s in batch]
            batch, matches = list(compress(batch, lives)), tuple(compress(matches, lives))
            if not batch:
                return
        elif source == "suffix" and self._foresee():
            plan_s = 0.0
        before_s = plan_s
        if source == "suffix":
            given = self.drafting.from_index(batch, num_draft)
            num_draft = max(map(len, given))
        launched = rounds.launch(batch, source if num_draft else "none", num_draft, given)
        if source == "suffix" and self._prefilled is None:
            before_s = time.perf_counter() - max(started_s, self._landed_s)
        if self._land():
            plan_s = before_s = 0.0
        for sequence in batch:
            sequence.is_flying = True
        self._flight = Flight(
            launched, matches, decision, self.version, started_s, plan_s, before_s
        )

    def _may_overtake(self, batch: list[Sequence], source: str) -> bool:
        """Whether a round of this source can be launched before the one under way is committed: a
        cold drafter must know how much it has to catch up on, and a batch of which all may have
        ended would be computed for nothing."""
        if self._flight is None:
            return True
        launched = self._flight.launched
        if all(s.is_flying and s.num_left <= launched.most_tokens for s in batch):
            return False
        return source != "eagle3" or launched.warms or not any(s.is_flying for s in batch)

    def _foresee(self) -> bool:
        """Tell the index what the round under way decided, so that it can draft for the next one
        before all else that follows from it is done; says whether that kept the host waiting."""
        if self._flight is None:
            return False
        outcome = self._read(self._flight)
        proposed, verified = outcome.decoded.proposed, outcome.decoded.verified
        for r, sequence in enumerate(self._flight.launched.batch):
            if sequence.finish_reason is None:
                self.drafting.foresee(sequence, emitted_by(proposed, verified, r))
        return outcome.has_waited

    def _read(self, flight: Flight) -> Landed:
        """Wait for the round under way, the first time it is asked for."""
        assert self.programs is not None
        if self._landed is None:
            has_waited = flight.launched.landed.wait()
            now_s = time.perf_counter()
            step_s = now_s - max(flight.started_s, self._landed_s)
            self._landed_s = now_s
            decoded = self.programs.rounds.read(flight.launched)
            self._landed = Landed(decoded, step_s, has_waited)
        return self._landed

    def _land(self) -> bool:
        """Read and commit the round under way, if there is one; says whether it kept the host
        waiting just now."""
        if (flight := self._flight) is None:
            return False
        was_read = self._landed is not None
        outcome = self._read(flight)
        self._flight = self._landed = None
        launched, decision = flight.launched, flight.decision
        for sequence in launched.batch:
            sequence.is_flying = False
        decoded, step_s = outcome.decoded, outcome.step_s
        draft_s = flight.before_s + launched.draft_share * max(0.0, step_s - flight.before_s)
        step = Step(decoded.proposed, decoded.verified, draft_s, flight.version)
        self._arms[(decision.drafter, decision.draft_k)] += 1
        lives = [s.finish_reason is None for s in launched.batch]
        committed = self._commits.rounds(
            launched.batch, step, decision, decoded.scored, decoded.numbers, step_s
        )
        self._commits.note_rows(committed)
        self._after_commit(committed)
        if flight.version == self.version:  # else a swap has come between
            seconds = step_s, flight.plan_s
            # The time of a round that finds log probabilities says nothing of others.
            has_prefill = not self._is_timed or launched.scores is not None
            self._observe(flight.matches, decision, step, seconds, lives, has_prefill=has_prefill)
        self._num_untimed = 0 if self._is_timed else self._num_untimed + 1
        self._is_timed = True
        return outcome.has_waited and not was_read

    def _prefill(self, prefill: Prefill, chunks: tuple[Chunk, ...]) -> None:
        """Launch one program of fixed shape that computes prompt chunks, behind a round under way.

        It chooses first tokens as well, but for requests that want more of the logits than one.
        """
        launched = prefill.launch(chunks)
        # The round under way is read later for it.
        self._is_timed = self._is_timed and self._num_untimed >= _MOST_UNTIMED
        asked = [c.sequence.request.sampling for c in chunks if c.is_last]
        if all(p.logprobs is None and fits_lane(p) for p in asked):
            self._prefilled = launched
            return
        self._land()
        logits = launched.logits[:, None]
        self._commit_chunks(prefill, launched, self._first_ids(chunks, logits), scored_by(logits))

    def _first_ids(self, chunks: tuple[Chunk, ...], logits: torch.Tensor) -> list[int]:
        """Tokens after the N prompts that end with these chunks, by [N, 1, V] logits."""
        done = [chunk.sequence for chunk in chunks if chunk.is_last]
        return verify(done, None, logits, self.rule).next_ids if done else []

    def _land_chunks(self) -> bool:
        """Read and commit the prompt chunks under way, if there are any; says whether there were.
        All rounds launched before them have been read."""
        if (launched := self._prefilled) is None or self.programs is None:
            return False
        self._prefilled = None
        # A round behind them is timed from here on, unless they were there who knows how long.
        has_waited = launched.landed.wait()
        self._is_timed = has_waited and self._num_untimed >= _MOST_UNTIMED
        self._landed_s = time.perf_counter()
        prefill = self.programs.prefill
        self._commit_chunks(prefill, launched, prefill.read(launched), None)
        return True

    def _commit_chunks(
        self,
        prefill: Prefill,
        launched: Prefilled,
        first_ids: list[int],
        scored: Scored | None,
    ) -> None:
        numbers = prefill.numbers(launched.chunks)
        committed = self._commits.chunks(launched.chunks, numbers, first_ids, scored)
        self._commits.note_rows(committed)
        self._after_commit(committed)

    def _pass(
        self, batch: list[Sequence], decision: Decision, chunks: tuple[Chunk, ...], started: float
    ) -> Step | None:
        """Decode a batch and compute prompt chunks by a pass that is put together for them."""
        draft = None
        if batch:
            draft = self.drafting.draft(batch, decision.drafter, decision.draft_k)
        draft_s = time.perf_counter() - started
        rows = step_rows(batch, draft, chunks, self.target.device)
        computed = self.target.forward(rows.ids_T, rows.positions_T, rows.paged, self.pool)
        self.drafting.keep_features(rows.paged.slots_T, computed.features_TmH)
        committed: list[Committed] = []
        num_decode_rows = len(batch) * rows.num_query
        step = None
        if batch:
            hidden = computed.hidden_TH[:num_decode_rows].view(len(batch), rows.num_query, -1)
            logits = self.target.logits(hidden)
            verified = verify(batch, draft, logits, self.rule)
            step = Step(proposed(draft), verified, draft_s, self.version)
            step_s = time.perf_counter() - started
            firsts = list(range(0, num_decode_rows, rows.num_query))
            committed += self._commits.rounds(
                batch, step, decision, scored_by(logits), firsts, step_s
            )
        starts = list(accumulate((c.num_rows for c in chunks), initial=num_decode_rows))
        last = [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.is_last]
        if chunks:
            ends = torch.tensor(last, dtype=torch.int64, device=self.target.device)
            logits = self.target.logits(computed.hidden_TH[ends])[:, None]
            first_ids = self._first_ids(chunks, logits)
            committed += self._commits.chunks(chunks, starts, first_ids, scored_by(logits))
        self._commits.capture(committed, computed)
        self._after_commit(committed)
        return step

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
            self._commits.counters.prompt_tokens += sequence.num_prompt
            self._commits.counters.cached_prompt_tokens += sequence.num_cached
            pages = np.asarray(sequence.pages, dtype=np.int64)
            slots = pages[:, None] * page_size + np.arange(page_size)
            sequence.slots = slots.reshape(-1)
            if self.programs is not None:
                sequence.lane = self.programs.lanes.take()
            self.drafting.begin(sequence)

    # ---- commit --------------------------------------------------------------------------------

    def _after_commit(self, committed: list[Committed]) -> None:
        for c in committed:
            self.scheduler.name_full_pages(c.sequence)
            if c.sequence.finish_reason:
                self._finish(c.sequence, c.sequence.finish_reason)
            elif c.sequence.num_completion > c.sequence.num_emitted:
                self._emit(c.sequence, None)

    def _emit(
        self, sequence: Sequence, reason: FinishReason | None, error: str | None = None
    ) -> None:
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
        ended_well = reason in ("stop", "length")
        self.drafting.finish(sequence, keep=ended_well and request.capture)
        self.scheduler.remove(sequence)
        if self.programs is not None and sequence.lane is not None:
            self.programs.lanes.give_back(sequence.lane)
            sequence.lane = None
        self._inflight.pop(request.id, None)
        sequence.finish_reason = reason
        if self.on_finished and request.capture and ended_well:
            self.on_finished(sequence)
        self._emit(sequence, reason, error)

    def _fail_all(self) -> None:
        self._flight = self._landed = self._prefilled = None
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._finish(sequence, "error", "the engine failed on this request; see the server log")
        if self.ring is not None:
            self.ring.synchronise()

    # ---- figures -------------------------------------------------------------------------------

    def _observe(
        self,
        matches: tuple[int, ...],
        decision: Decision,
        step: Step,
        seconds: tuple[float, float],
        lives: list[bool],
        *,
        has_prefill: bool,
    ) -> None:
        """Tell the policy.

        Args:
            seconds: of the step, and what looking and planning have cost.
            lives: which requests had not ended when the step was read: the others' text means
                nothing.
        """
        accepted, draft = step.verified.num_accepted, step.proposed
        num_rows = len(accepted)
        lens = tuple(map(len, draft.tokens)) if draft else (0,) * num_rows
        rows = list(compress(zip(lens, accepted, matches, strict=True), lives))
        self.policy.observe(
            Outcome(
                decision=decision,
                batch=num_rows,
                rows=tuple(RowOutcome(*row) for row in rows),
                step_s=seconds[0],
                draft_s=step.draft_s,
                has_prefill=has_prefill,
                version=step.version,
                plan_s=seconds[1],
            )
        )
        if self.on_rounds and draft and draft.kind == "eagle3":
            self.on_rounds([(drafted, kept) for drafted, kept, _ in rows])
