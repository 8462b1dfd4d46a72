"""The decoding loop: plan, launch, commit; one thread, one step at a time.

Consumes: requests and cancellations from the inbox.
Waits for: work. It never waits for the recorder, the buffer, the trainer or new weights.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress

import torch

from policies.interface import Decision, DraftPolicy, Outcome
from serving.engine.commit import Commits, emitted_by
from serving.engine.deciding import Deciding
from serving.engine.in_flight import Arrival, PlannedRound, RoundClock
from serving.engine.inbox import Inbox
from serving.engine.outputs import Outputs
from serving.engine.prefill import Prefilled
from serving.engine.programs import Programs
from serving.engine.proposed import Proposed
from serving.engine.scheduler import Chunk, Scheduler
from serving.engine.sequence import Sequence
from serving.requests import EngineFigures, Output

log = logging.getLogger(__name__)


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Restarted:
    """Running requests whose text is computed again because the target's weights have changed."""

    num_requests: int
    num_untraced: int
    """Those among them that would have left a trace and now leave none."""


ChangeTarget = Callable[[Callable[[], None]], Restarted]
"""Calls what overwrites the target's weights while nothing is under way."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """Called on the engine's thread; none of them may block."""

    before_step: Callable[[], None] = _ignore
    """Swaps weights between two steps."""
    change_target: Callable[[ChangeTarget], None] = _ignore
    """Replaces the target's weights between two steps, if that was ordered."""
    on_finished: Callable[[Sequence], None] = _ignore
    """Receives each request that ended well and whose rows were captured."""
    on_rounds: Callable[[str, list[tuple[int, int]]], None] = _ignore
    """Receives (proposed, accepted) of each round of a step, with the kind of the drafter, if that
    drafter has versions."""
    on_outcome: Callable[[Outcome], None] = _ignore
    """Receives the outcome of each step."""
    on_pass: Callable[[int, int], None] = _ignore
    """Receives, after each pass, the tokens committed since the start and the requests that run."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What engines are made of. Two engines over the same parts may run in turn."""

    inbox: Inbox
    scheduler: Scheduler
    programs: Programs
    overlaps: bool
    """Launch a round before the last one is read. On a GPU the host's work then costs nothing; on a
    CPU, where a launch returns when the work is done, it would only compute rounds for requests
    that have ended."""


class Engine:
    """Runs the requests of an inbox with a policy."""

    def __init__(
        self,
        parts: EngineParts,
        policy: DraftPolicy,
        listeners: Listeners | None = None,
        policy_of: Callable[[frozenset[str]], DraftPolicy] | None = None,
    ) -> None:
        """
        Args:
            policy: decides for requests that do not choose their drafters.
            policy_of: kinds of drafters that a batch allows -> the policy that decides for it;
                ``None``: ``policy`` decides for all.
        """
        self.parts = parts
        self.policy = policy
        self.inbox = parts.inbox
        self.scheduler = parts.scheduler
        self.programs = parts.programs
        self.drafting = parts.programs.drafting
        self.deciding = Deciding(self.drafting, parts.programs.rounds, policy_of)
        self._listeners = listeners or Listeners()
        self._commits = Commits(self.drafting)
        self._outputs = Outputs(
            parts.inbox,
            parts.scheduler,
            self.drafting,
            parts.programs.lanes,
            self._listeners.on_finished,
        )
        self._clock = RoundClock()
        self._round: PlannedRound | None = None
        self._arrival: Arrival | None = None
        self._prompts: Prefilled | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- called from other threads -------------------------------------------------------------

    def start(self) -> None:
        """Start decoding."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Cancel what is in flight and end the thread."""
        self.inbox.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def has_failed(self) -> bool:
        """The thread has ended by itself, because it could not go on."""
        has_run = self._thread.ident is not None
        return has_run and not self._thread.is_alive() and not self.inbox.is_closed

    def complaint(self) -> str | None:
        """Why this engine should get no requests; ``None`` if it is ready."""
        if not self._thread.is_alive():
            return "the engine does not run"
        if self.inbox.is_draining:
            return "draining"
        return self._outputs.soundness.complaint

    def figures(self) -> EngineFigures:
        """Counters and gauges of now; the service adds those of swaps and traces."""
        pages = self.scheduler.pool
        return self._commits.counters.figures(
            num_running=self.scheduler.num_running,
            num_waiting=self.inbox.num_waiting(),
            kv_usage=1 - pages.num_available / pages.num_usable,
            drafter_version=self.drafting.version,
            versions=self.drafting.versions(),
            policy_failures=self.deciding.num_failures,
        )

    # ---- the loop ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._steps()
        except BaseException:  # the end of the thread
            log.critical("the engine cannot go on", exc_info=True)
            self.inbox.drain()
            for sequence in self.inbox.inflight():
                sequence.on_output(Output.engine_gone(sequence.request.id))
            self.inbox.handover.run()

    def _steps(self) -> None:
        making = self.programs.making
        is_idle = False  # nothing has come for a moment
        with torch.inference_mode():
            while not self.inbox.is_closed:
                try:
                    if self.step():
                        is_idle = False
                    elif making.is_over:
                        self.inbox.wait()
                    elif is_idle:
                        making.make()
                    else:
                        is_idle = not self.inbox.wait(making.pause_s)
                except Exception:  # the process's outermost loop: fail requests, keep serving
                    log.exception("engine step failed; the requests in flight are ended")
                    self._fail_all()
            for sequence in self.inbox.inflight():
                self._outputs.finish(sequence, "cancelled")
            self.inbox.handover.run()

    def step(self) -> bool:
        """Run one pass over the batch. Returns False if there was nothing to do.

        Where rounds overlap, a round is launched before the outcome of the last one is read, so the
        host's work runs beside it. Prompt chunks are read before the round that was launched behind
        them.
        """
        had_work = self._commit_prompts()
        if self.programs.making.is_due:
            had_work = had_work or self._round is not None
            self._commit_round()
            self.inbox.handover.run()
            self.programs.making.make()
        self._listeners.before_step()
        self._forget_rows()
        self._listeners.change_target(self._changed_target)
        self._take_orders()
        self._admit()
        plan = self.scheduler.plan(time.perf_counter())
        batch = plan.decode
        if not batch and not plan.chunks and self._round is None:
            self._end_pass()
            return had_work
        if plan.chunks:
            self._launch_prompts(plan.chunks)
        batch = self._undecided(batch)
        if batch:
            self._decode(batch)
        else:
            self._commit_round()
        if not self.parts.overlaps:
            self._commit_round()
        self._commits.counters.num_steps += 1
        self._end_pass()
        return True

    def _end_pass(self) -> None:
        if self._round is None and self._prompts is None:  # the next pass may be long in coming
            self.inbox.handover.run()
        tokens = self._commits.counters.generation_tokens
        self._listeners.on_pass(tokens, self.scheduler.num_running)

    def _forget_rows(self) -> None:
        """Have drafters that went back to other weights compute their rows again, and not draft
        from those of a version that is tried or was rolled back: a bad version's rows make the
        former weights look as bad, and nothing would convict it.

        After a swap to new weights rows stay: that every request were computed again for each
        version would cost more than the rows of its parent do.
        """
        if returned := self.drafting.returned():
            self._commit_round()  # it notes rows of the weights that it was launched with
            for rows in returned:
                rows.forget(self.scheduler.running)

    def _changed_target(self, overwrite: Callable[[], None]) -> Restarted:
        """Let the target's weights be overwritten. Running requests keep the tokens they have;
        everything computed for them is computed again before their next token."""
        self._commit_round()
        self.inbox.handover.run()
        overwrite()
        running = self.scheduler.running
        traced = [s.request.capture for s in running]
        self.drafting.target_changed(self.scheduler.target_changed())
        num_untraced = sum(traced) - sum(s.request.capture for s in running)
        return Restarted(len(running), num_untraced)

    def _take_orders(self) -> None:
        arrived, cancelled = self.inbox.take()
        self.scheduler.waiting.extend(arrived)
        for sequence in cancelled:
            self._outputs.finish(sequence, "cancelled")
        for sequence in arrived:
            if sequence.request.sampling.max_tokens == 0 and sequence.finish_reason is None:
                self._outputs.finish(sequence, "length")

    def _admit(self) -> None:
        for sequence in self.scheduler.admit():
            self._commits.counters.prompt_tokens += sequence.num_prompt
            self._commits.counters.cached_prompt_tokens += sequence.num_cached
            sequence.lane = self.programs.lanes.take()
            self.programs.lanes.write_prefix(sequence)
            self.drafting.begin(sequence)

    # ---- rounds --------------------------------------------------------------------------------

    def _undecided(self, batch: list[Sequence]) -> list[Sequence]:
        """Requests that go on as far as is known: a round under way commits at least one token of
        each of its requests."""
        return [
            s
            for s in batch
            if s.finish_reason is None and not (s.is_flying and len(s.tokens) + 1 == s.limit)
        ]

    def _decode(self, batch: list[Sequence]) -> None:
        """Plan and launch a round, and commit the one before it."""
        started_s = time.perf_counter()
        step = self._commits.counters.num_steps
        policy, decision, matches = self.deciding.decide(self.policy, batch, step)
        planned_s = time.perf_counter() - started_s
        self.deciding.took(policy, planned_s)
        self._clock.plan_s += planned_s
        drafter, num_draft, given = decision.drafter, decision.draft_k, None
        picks = decision.picks
        on_host = num_draft > 0 and self.drafting.asks_host(drafter, picks)
        if not self._may_overtake(batch, decision):
            self._commit_round()
            lives = [s.finish_reason is None for s in batch]
            batch = list(compress(batch, lives))
            matches = None if matches is None else bytes(compress(matches, lives))
            picks = None if picks is None else tuple(compress(picks, lives))
            if not batch:
                return
        elif on_host:
            self._foresee()
        before_s = 0.0
        if on_host and picks is not None:
            given, picks = self.drafting.from_hosts(drafter, batch, num_draft, picks)
        elif on_host:
            given = self.drafting.from_host(drafter, batch, num_draft)
            num_draft = max(map(len, given))
        launched = self.programs.rounds.launch(
            batch, drafter, num_draft, given, decision.allocation, picks
        )
        self.inbox.handover.run()
        # Now: committing the round before may exchange weights, and these are another's then.
        versions = self.drafting.versions_of(drafter)
        follows_swap = self._clock.was_launched_with(self.drafting.versions())
        if on_host and self._prompts is None:
            before_s = time.perf_counter() - max(started_s, self._clock.last_outcome_s)
        if self._commit_round():
            before_s = 0.0
        elif not on_host:
            before_s = self._clock.plan_s  # 0 if a round ran meanwhile
        for sequence in batch:
            sequence.is_flying = True
        self._round = PlannedRound(
            launched, matches, policy, decision, versions, started_s, before_s,
            self.drafting.grouping.of(batch), follows_swap,
        )  # fmt: skip

    def _may_overtake(self, batch: list[Sequence], decision: Decision) -> bool:
        """Whether a round can be launched before the one under way is committed: a neural drafter
        must know which rows it lacks, and a batch whose requests may all have ended would be
        computed for nothing."""
        if self._round is None:
            return True
        launched = self._round.launched
        if all(s.is_flying and s.num_left <= launched.most_tokens for s in batch):
            return False
        if decision.draft_k == 0 or decision.drafter not in self.drafting.on_device:
            return True
        has_rows = self.programs.rounds.leaves_rows(launched, decision.drafter)
        return has_rows or not any(s.is_flying for s in batch)

    def _foresee(self) -> None:
        """Tell host drafters what the round under way decided, so that they can draft for the next
        one before its other consequences are worked out."""
        if self._round is None:
            return
        batch, decoded = self._round.launched.batch, self._read(self._round).decoded
        lives = [s.finish_reason is None for s in batch]
        news = emitted_by(decoded.proposed, decoded.verified)
        self.drafting.foresee(list(compress(batch, lives)), list(compress(news, lives)))

    def _read(self, planned: PlannedRound) -> Arrival:
        """Wait for the round under way, the first time it is asked for."""
        if self._arrival is None:
            self.inbox.handover.run()
            self._arrival = self._clock.read(self.programs.rounds, planned)
        return self._arrival

    def _commit_round(self) -> bool:
        """Read and commit the round under way, if there is one. Returns whether the host had to
        wait for it just now."""
        if (planned := self._round) is None:
            return False
        was_read = self._arrival is not None
        arrival = self._read(planned)
        self._round = self._arrival = None
        decision, batch = planned.decision, planned.launched.batch
        for sequence in batch:
            sequence.is_flying = False
        self._commits.counters.steps_by_arm[(decision.drafter, decision.draft_k)] += 1
        lives = [s.finish_reason is None for s in batch]
        decoded = arrival.decoded.of(lives)
        step = arrival.step(planned, decoded, self._clock.is_timed)
        living = list(compress(batch, lives))
        self._commits.rounds(living, step, decision, decoded.scored, decoded.numbers)
        if decoded.proposed is not None:
            self.drafting.note(living, decoded.proposed, decoded.verified.num_accepted)
        self._deliver(living)
        # Otherwise a swap came between, and the round says nothing about the new weights.
        if planned.versions == self.drafting.versions_of(decision.drafter):
            outcome = arrival.outcome(planned, step, lives, self._clock.is_timed)
            self._report(planned, outcome, decoded.proposed)
        self._clock.round_was_committed()
        return arrival.host_waited and not was_read

    def _report(self, planned: PlannedRound, outcome: Outcome, proposed: Proposed | None) -> None:
        """Report a round to its policy, and to ``on_rounds`` for each drafter with versions."""
        self.deciding.report(planned.policy, outcome)
        self._listeners.on_outcome(outcome)
        if proposed is None:
            return
        counts = list(zip(outcome.rows.num_verified, outcome.rows.num_accepted, strict=True))
        if proposed.picks is None:
            kinds = {proposed.drafter: counts}
        else:
            kinds = {kind: [] for kind in proposed.kinds()}
            for kind, count in zip(proposed.kinds(), counts, strict=True):
                kinds[kind].append(count)
        for kind, own in kinds.items():
            if self.drafting.has_versions(kind):
                self._listeners.on_rounds(kind, own)

    # ---- prompts -------------------------------------------------------------------------------

    def _launch_prompts(self, chunks: tuple[Chunk, ...]) -> None:
        """Launch a program that computes prompt chunks, behind a round under way."""
        self._prompts = self.programs.prefill.launch(chunks)
        if self.parts.overlaps:
            self._clock.chunks_were_launched()
        # Logits that are to be scored are there until the next program runs.
        if not self.parts.overlaps or self._prompts.is_scored:
            self._commit_round()
            self._commit_prompts()

    def _commit_prompts(self) -> bool:
        """Read and commit the prompt chunks under way. Returns whether there were any. All rounds
        launched before them have been read."""
        if (launched := self._prompts) is None:
            return False
        self._prompts = None
        self.inbox.handover.run()
        host_waited = launched.landed.wait()
        self._clock.chunks_were_read(launched.done, host_waited, is_exact=not self.parts.overlaps)
        prefill = self.programs.prefill
        scored = launched.scored() if launched.is_scored else None
        first_ids, numbers = prefill.read(launched), prefill.numbers(launched.chunks)
        committed = self._commits.chunks(launched.chunks, numbers, first_ids, scored)
        self._deliver(committed)
        return True

    # ---- outputs -------------------------------------------------------------------------------

    def _deliver(self, committed: list[Sequence]) -> None:
        """Deliver the new tokens of requests. Where rounds overlap, they are handed over once the
        next round is launched, otherwise at once: the next launch returns when it is computed."""
        self._outputs.after_commit(committed)
        if not self.parts.overlaps:
            self.inbox.handover.run()

    def _fail_all(self) -> None:
        self._round = self._arrival = self._prompts = None
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._outputs.finish(
                sequence, "error", "the engine failed on this request; see the server log"
            )
        self.inbox.handover.run()
        if self.programs.ring is not None:
            self.programs.ring.synchronise()
        if self.programs.target.device.type == "cuda":
            torch.cuda.synchronize()  # raises if the device is lost: then the engine ends
