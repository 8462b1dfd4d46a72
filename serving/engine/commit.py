"""The outcome of a step, and how it is appended to the requests.

Shapes: R requests of a step, N prompt chunks that end their prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from policies.interface import Decision
from serving.engine.capture_ring import CaptureRing
from serving.engine.drafting import Drafting
from serving.engine.scheduler import Chunk
from serving.engine.sequence import NotedStep, Sequence
from serving.requests import EngineFigures, TokenLogprob


@dataclass(frozen=True, slots=True)
class Proposed:
    """The drafts of a round, on the host."""

    drafter: str
    """Kind of the drafter."""
    tokens: list[list[int]]
    """[R][its number of draft tokens]."""
    q_logp: list[list[float]] | None
    """Log q of each of them; ``None`` if tokens are not sampled."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The verdicts of a round, on the host."""

    num_accepted: list[int]
    """[R]."""
    next_ids: list[int | None]
    """[R] the target's own token after the accepted ones; ``None``: its row of logits is NaN or
    infinite, so nothing can follow."""
    p_logp: list[list[float]]
    """[R][K] the target's log probability of each draft token, after temperature and truncation."""


def emitted_by(draft: Proposed | None, verified: Verified, r: int) -> list[int]:
    """Tokens that a round decided for request r: the accepted draft tokens and the target's own."""
    kept = draft.tokens[r][: verified.num_accepted[r]] if draft else []
    following = verified.next_ids[r]
    return kept if following is None else [*kept, following]


@dataclass(frozen=True, slots=True)
class Committed:
    """Rows of one step that a request keeps."""

    sequence: Sequence
    row: int
    """Running number of the first captured row; 0 if none is captured."""
    position: int
    """Position of that row."""
    count: int


@dataclass(frozen=True, slots=True)
class Step:
    """What the requests of one step drafted and kept, and what that cost."""

    proposed: Proposed | None
    verified: Verified
    draft_s: float
    """Seconds spent on observing the batch, planning and drafting."""
    version: int
    """Version of the drafter; see ``Drafting.version_of``."""


@dataclass(slots=True)
class Counters:
    """Counts since the engine started."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    num_request_steps: int = 0
    """Target passes that emitted tokens, counted once for each request in them."""
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    num_unsound: int = 0
    """Requests whose target computed NaN or infinity."""
    accepted_per_pos: list[int] = field(default_factory=list)
    """[max_draft]."""
    steps_by_arm: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Steps of each (drafter, draft_k)."""

    def figures(self, **gauges: Any) -> EngineFigures:
        """With gauges of now; the service adds the figures of swaps and traces."""
        return EngineFigures(
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            num_rounds=self.num_rounds,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_accepted_per_pos=tuple(self.accepted_per_pos),
            num_steps=self.num_steps,
            steps_by_arm=dict(self.steps_by_arm),
            swaps={},
            swap_seconds=0.0,
            traces={},
            capture_rows_dropped=0,
            num_request_steps=self.num_request_steps,
            num_corrupted=self.num_unsound,
            **gauges,
        )


Scored = Callable[[int, list[int], int], list[TokenLogprob]]
"""(request r of a step, its emitted tokens, number of alternatives) -> their log probabilities."""


class Commits:
    """Appends committed tokens to the requests; nothing else does."""

    def __init__(self, drafting: Drafting, ring: CaptureRing | None) -> None:
        self._drafting = drafting
        self._ring = ring
        self.counters = Counters(accepted_per_pos=[0] * drafting.max_draft)

    def rounds(
        self,
        batch: list[Sequence],
        step: Step,
        decision: Decision,
        scored: Scored,
        firsts: list[int] | None,
        step_s: float,
    ) -> list[Committed]:
        """Append what a round verified; requests that have ended in the meantime keep nothing.

        Args:
            scored: finds log probabilities for requests that asked for them.
            firsts: number of the first captured row of each request; ``None`` without capture.
        """
        draft, verified = step.proposed, step.verified
        rest = step.version, decision.draft_k, decision.propensity, len(batch), step_s
        idle = NotedStep("none", *rest)
        drafting = NotedStep(draft.drafter, *rest) if draft else idle
        committed = []
        for r, sequence in enumerate(batch):
            if sequence.finish_reason is not None:
                continue
            drafted = draft.tokens[r] if draft else ()
            num_drafted, kept = len(drafted), verified.num_accepted[r]
            drawn = draft.q_logp[r] if draft and draft.q_logp else ()
            following = verified.next_ids[r]
            if following is not None:
                sequence.rounds.append(
                    (
                        drafting if num_drafted else idle,
                        len(sequence.tokens) - 1,
                        drafted,
                        drawn,
                        verified.p_logp[r],
                        kept,
                        following,
                    )
                )
            self._count_round(num_drafted, kept)
            emitted = emitted_by(draft, verified, r)
            anchor = len(sequence.tokens) - 1
            sequence.version = step.version
            count = self._append(sequence, emitted, partial(scored, r))
            if following is None:
                self._break_off(sequence)
            sequence.num_proposed += num_drafted
            sequence.num_accepted += min(kept, count)
            sequence.num_computed = anchor + count
            committed.append(Committed(sequence, firsts[r] if firsts else 0, anchor, count))
        return committed

    def chunks(
        self,
        chunks: tuple[Chunk, ...],
        firsts: list[int] | None,
        first_ids: list[int | None],
        scored: Scored | None,
    ) -> list[Committed]:
        """Commit prompt rows as they are; chunks that reach the anchor yield a token.

        Args:
            firsts: number of the first captured row of each chunk; ``None`` without capture.
            first_ids: tokens of the N chunks that reach their anchor; ``None``: see ``Verified``.
            scored: finds log probabilities; ``None`` if no request asked for them.
        """
        committed = []
        for index, chunk in enumerate(chunks):
            chunk.sequence.num_computed = chunk.end
            first = firsts[index] if firsts else 0
            committed.append(Committed(chunk.sequence, first, chunk.start, chunk.num_rows))
        done = [chunk.sequence for chunk in chunks if chunk.is_last]
        for index, (sequence, token) in enumerate(zip(done, first_ids, strict=True)):
            sequence.version = self._drafting.version
            emitted = [] if token is None else [token]
            self._append(sequence, emitted, partial(scored, index) if scored else None)
            if token is None:
                self._break_off(sequence)
        return committed

    def _break_off(self, sequence: Sequence) -> None:
        """The target has no next token for a request: end it, unless the tokens before did. Its
        rows are not to be learned from in either case."""
        self.counters.num_unsound += 1
        sequence.request = replace(sequence.request, capture=False)
        if sequence.finish_reason is None:
            sequence.finish_reason = "error"

    def _append(
        self,
        sequence: Sequence,
        emitted: list[int],
        scored: Callable[[list[int], int], list[TokenLogprob]] | None,
    ) -> int:
        """Append tokens until one ends the request; returns how many were appended."""
        sampling = sequence.request.sampling
        sequence.num_steps += 1
        self.counters.num_request_steps += 1
        sequence.num_rounds += 1
        count = 0
        for token in emitted:
            sequence.tokens.append(token)
            count += 1
            if token in sequence.eos_ids or token in sampling.stop_token_ids:
                if sampling.include_stop_str_in_output:
                    sequence.detokenizer.add(token)
                sequence.finish_reason = "stop"
            elif sequence.detokenizer.add(token):
                sequence.finish_reason = "stop"
            elif sequence.num_left <= 0:
                sequence.finish_reason = "length"
            if sequence.finish_reason:
                break
        if sampling.logprobs is not None:
            assert scored is not None, "log probabilities were asked for"
            sequence.logprobs += scored(emitted[:count], sampling.logprobs)
        self._drafting.extend(sequence, emitted[:count])
        self.counters.generation_tokens += count
        return count

    def note_rows(self, committed: list[Committed]) -> None:
        """Note which rows of the ring belong to captured requests."""
        if self._ring is None:
            return
        for c in committed:
            if c.sequence.request.capture:
                c.sequence.capture_rows.append((c.position, c.row, c.count))

    def _count_round(self, num_drafted: int, kept: int) -> None:
        c = self.counters
        if num_drafted:
            c.num_rounds += 1
            c.num_draft_tokens += num_drafted
            c.num_accepted_tokens += kept
            for position in range(kept):
                c.accepted_per_pos[position] += 1
