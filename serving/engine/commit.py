"""Appends what steps decided to the requests they decided on, and notes which hidden rows are kept.

Shapes: R requests of a step, Q = K + 1 rows each, V vocabulary, N chunks that end their prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from buffer.records import Round
from policies.interface import Decision
from serving.capture.ring import CaptureRing
from serving.engine.drafting import Drafting
from serving.engine.scheduler import Chunk
from serving.engine.sequence import Sequence
from serving.engine.verifying import Proposed, Verified, emitted_by, token_logprobs
from serving.requests import TokenLogprob
from targets.target import TargetRows


@dataclass(frozen=True, slots=True)
class Committed:
    """Rows of one step that a request keeps."""

    sequence: Sequence
    row: int
    """First packed row of a pass, or running number of the first captured row of a program."""
    position: int
    """Position of that row."""
    count: int


@dataclass(frozen=True, slots=True)
class Step:
    """What the requests of one step drafted and kept."""

    proposed: Proposed | None
    verified: Verified
    draft_s: float
    """Seconds that looking at the batch, planning and drafting have cost."""
    version: int
    """Of the neural drafter."""


@dataclass(slots=True)
class Counters:
    """Since the start of the engine."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    num_request_steps: int = 0
    """Target passes that emitted tokens, counted once for each request in them."""
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    capture_rows_dropped: int = 0
    accepted_per_pos: list[int] = field(default_factory=list)
    """[max_draft]"""


Scored = Callable[[int, list[int], int], list[TokenLogprob]]
"""Log probabilities of what request r of a step emitted, with so many alternatives each."""


def scored_by(logits_RQV: Tensor) -> Scored:
    """Finds them in the logits of the rows before."""

    def scored(r: int, tokens: list[int], num_top: int) -> list[TokenLogprob]:
        return token_logprobs(logits_RQV[r, : len(tokens)], tokens, num_top)

    return scored


class Commits:
    """The requests' texts grow here and nowhere else."""

    def __init__(self, drafting: Drafting, ring: CaptureRing | None) -> None:
        self._drafting = drafting
        self._ring = ring
        self.counters = Counters(accepted_per_pos=[0] * drafting.max_draft)

    def reset(self) -> None:
        """Count from zero."""
        self.counters = Counters(accepted_per_pos=[0] * self._drafting.max_draft)

    def rounds(
        self,
        batch: list[Sequence],
        step: Step,
        decision: Decision,
        scored: Scored,
        firsts: list[int] | None,
        step_s: float,
    ) -> list[Committed]:
        """Append what a step verified; requests that have ended meanwhile keep nothing.

        Args:
            scored: finds log probabilities for those who asked.
            firsts: row of each request, see ``Committed``; ``None`` where none is captured.
        """
        draft, verified = step.proposed, step.verified
        committed = []
        for r, sequence in enumerate(batch):
            if sequence.finish_reason is not None:
                continue
            drafted = draft.tokens[r] if draft else []
            num_drafted, kept = len(drafted), verified.num_accepted[r]
            sequence.rounds.append(
                Round(
                    anchor=len(sequence.tokens) - 1,
                    drafter=draft.kind if draft and num_drafted else "none",
                    version=step.version,
                    draft_ids=tuple(drafted),
                    q_logp=tuple(draft.q_logp[r]) if draft and draft.q_logp else None,
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
            emitted = emitted_by(draft, verified, r)
            anchor = len(sequence.tokens) - 1
            sequence.version = step.version
            count = self._append(sequence, emitted, partial(scored, r))
            sequence.num_proposed += num_drafted
            sequence.num_accepted += min(kept, count)
            sequence.num_computed = anchor + count
            committed.append(Committed(sequence, firsts[r] if firsts else 0, anchor, count))
        return committed

    def chunks(
        self,
        chunks: tuple[Chunk, ...],
        firsts: list[int] | None,
        first_ids: list[int],
        scored: Scored | None,
    ) -> list[Committed]:
        """Prompt rows are committed as they are; chunks that reach the anchor yield a token.

        Args:
            firsts: row of each chunk, see ``Committed``; ``None`` where none is captured.
            first_ids: tokens of the N chunks that reach their anchor.
            scored: finds log probabilities for those who asked; ``None``: nobody did.
        """
        committed = []
        for index, chunk in enumerate(chunks):
            chunk.sequence.num_computed = chunk.end
            first = firsts[index] if firsts else 0
            committed.append(Committed(chunk.sequence, first, chunk.start, chunk.num_rows))
        done = [chunk.sequence for chunk in chunks if chunk.is_last]
        for index, (sequence, token) in enumerate(zip(done, first_ids, strict=True)):
            sequence.version = self._drafting.version
            self._append(sequence, [token], partial(scored, index) if scored else None)
        return committed

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
            is_end = token in sequence.eos_ids or token in sampling.stop_token_ids
            if is_end or sequence.detokenizer.add(token):
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

    def capture(self, committed: list[Committed], computed: TargetRows) -> None:
        """Copy the committed rows of capturing requests into the ring, all in one write."""
        wanted = [c for c in committed if c.sequence.request.capture]
        if self._ring is None or not wanted:
            return
        index = torch.tensor([i for c in wanted for i in range(c.row, c.row + c.count)])
        index = index.to(computed.hidden_TH.device)
        number = self._ring.write(computed.features_TmH[index], computed.hidden_TH[index])
        for c in wanted:
            c.sequence.capture_rows.append((c.position, number, c.count))
            number += c.count

    def note_rows(self, committed: list[Committed]) -> None:
        """A program has appended the rows of capturing requests to the ring."""
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
