"""The outcome of a step, and how it is appended to the requests.

Shapes: R requests of a step, N prompt chunks that end their prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from policies.interface import Decision, Pick
from serving.engine.drafting import Drafting
from serving.engine.noted_rounds import KeptStep, NotedStep
from serving.engine.proposed import Proposed, Verified
from serving.engine.scheduler import Chunk
from serving.engine.sequence import Sequence
from serving.requests import DrafterCounts, EngineFigures, TokenLogprob

_STEP_NUMBERS = 1 << 30
"""Steps of 1 ms reach it in two weeks; traces count with 32 bits."""

_NO_COUNTS = DrafterCounts(0, 0, 0)


def emitted_by(draft: Proposed | None, verified: Verified) -> list[list[int]]:
    """[R] tokens that a round decided: the accepted draft tokens and the target's own."""
    own = [[] if token is None else [token] for token in verified.next_ids]
    if draft is None:
        return own
    columns = zip(draft.tokens, verified.num_accepted, own, strict=True)
    return [tokens[:kept] + following for tokens, kept, following in columns]


@dataclass(frozen=True, slots=True)
class Step:
    """What the requests of one step drafted and kept, and what that cost."""

    proposed: Proposed | None
    verified: Verified
    draft_s: float
    """Seconds spent on observing the batch, planning and drafting."""
    versions: Mapping[str, int]
    """See ``Drafting.versions_of``."""
    step_s: float
    """Seconds of the whole step."""
    is_timed: bool
    """They are those of rounds alone, see ``buffer.records.Round``."""

    @property
    def version(self) -> int:
        """Of the drafter that the decision names; of a mix that of the first of the server."""
        kind = "none" if self.proposed is None else self.proposed.drafter
        return self.versions.get(kind, self.versions["none"])


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
    drafters: dict[str, DrafterCounts] = field(default_factory=dict)
    """By kind."""

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
            drafters=dict(self.drafters),
            swaps={},
            swap_seconds=0.0,
            traces={},
            capture_rows_dropped=0,
            num_request_steps=self.num_request_steps,
            num_corrupted=self.num_unsound,
            **gauges,
        )

    def count_drafts(self, draft: Proposed, num_accepted: list[int]) -> None:
        """Count what was proposed and accepted in a round."""
        lens = list(map(len, draft.tokens))
        rounds, tokens, accepted = len(lens) - lens.count(0), sum(lens), sum(num_accepted)
        self.num_rounds += rounds
        self.num_draft_tokens += tokens
        self.num_accepted_tokens += accepted
        if draft.picks is None:
            self._count_drafter(draft.drafter, rounds, tokens, accepted)
        else:
            for pick, num, kept in zip(draft.picks, lens, num_accepted, strict=True):
                self._count_drafter(pick.drafter, int(num > 0), num, kept)
        for kept, count in Counter(num_accepted).items():
            for position in range(kept):
                self.accepted_per_pos[position] += count

    def _count_drafter(self, kind: str, rounds: int, tokens: int, accepted: int) -> None:
        before = self.drafters.get(kind, _NO_COUNTS)
        self.drafters[kind] = DrafterCounts(
            before.rounds + rounds, before.tokens + tokens, before.accepted + accepted
        )


def _noted_picks(drafting: NotedStep, step: Step, draft: Proposed | None) -> dict[Pick, KeptStep]:
    """The step as rounds of each pick note it; empty if no mix drafted."""
    picks = () if draft is None or draft.picks is None else set(draft.picks)
    return {
        pick: drafting._replace(
            drafter=pick.drafter,
            version=step.versions[pick.drafter],
            propensity=drafting.propensity * pick.propensity,
            reason=pick.reason,
        ).kept()
        for pick in picks
    }


def _noted(decision: Decision) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """What the policy noted of its decision: names and values."""
    columns = decision.columns()
    return tuple(f"{decision.policy}.{name}" for name in columns), tuple(columns.values())


Scored = Callable[[int, list[int], int], list[TokenLogprob]]
"""(request r of a step, its emitted tokens, number of alternatives) -> their log probabilities."""


class Commits:
    """Appends committed tokens to the requests; nothing else does."""

    def __init__(self, drafting: Drafting) -> None:
        self._drafting = drafting
        self.counters = Counters(accepted_per_pos=[0] * drafting.max_draft)

    def rounds(
        self,
        batch: list[Sequence],
        step: Step,
        decision: Decision,
        scored: Scored,
        firsts: list[int] | None,
    ) -> None:
        """Append what a round verified.

        Args:
            batch: none of them has ended.
            scored: finds log probabilities for requests that asked for them.
            firsts: number of the first captured row of each request; ``None`` without capture.
        """
        draft, verified = step.proposed, step.verified
        self._note(batch, step, decision)
        if draft is not None:
            self.counters.count_drafts(draft, verified.num_accepted)
        picks = None if draft is None else draft.picks
        emitted = emitted_by(draft, verified)
        for r, (sequence, tokens) in enumerate(zip(batch, emitted, strict=True)):
            anchor = len(sequence.tokens) - 1
            if picks is not None:
                sequence.version = step.versions[picks[r].drafter]
            elif draft is not None or self._drafting.has_one_version:
                sequence.version = step.version
            count = self._append(sequence, tokens, r, scored)
            sequence.num_computed = anchor + count
            if draft is not None:
                sequence.num_proposed += len(draft.tokens[r])
                sequence.num_accepted += min(verified.num_accepted[r], count)
            if verified.next_ids[r] is None:
                self._break_off(sequence)
            if firsts is not None and sequence.request.capture:
                sequence.capture_rows += (anchor, firsts[r], count)

    def _note(self, batch: list[Sequence], step: Step, decision: Decision) -> None:
        """Note a round for the traces of captured requests, before its tokens are appended."""
        draft, verified = step.proposed, step.verified
        rest = (
            decision.draft_k, decision.propensity, len(batch), step.step_s,
            decision.policy, self.counters.num_steps % _STEP_NUMBERS, decision.reason,
            step.is_timed, *_noted(decision),
        )  # fmt: skip
        noted_idle = NotedStep("none", step.versions["none"], *rest)
        noted_step = NotedStep(draft.drafter, step.version, *rest) if draft else noted_idle
        idle, drafting = noted_idle.kept(), noted_step.kept()
        picked = _noted_picks(noted_step, step, draft)
        for r, (sequence, following) in enumerate(zip(batch, verified.next_ids, strict=True)):
            if following is None or not sequence.request.capture:
                continue
            anchor = len(sequence.tokens) - 1
            if draft is not None and draft.considered is not None:
                considered = draft.considered
                sequence.rounds.add_considered(considered.may_cut, considered.figures[r])
            if draft is None or not draft.tokens[r]:
                # What was drafted and cut to nothing is the drafter's all the same.
                is_idle = draft is None or draft.considered is None
                sequence.rounds.add_plain(idle if is_idle else drafting, anchor, following)
                continue
            drawn = draft.q_logp[r] if draft.q_logp else ()
            noted = picked[draft.picks[r]] if draft.picks else drafting
            sequence.rounds.add(
                noted, anchor, draft.tokens[r], drawn, draft.p_logp[r],
                verified.num_accepted[r], following,
            )  # fmt: skip

    def chunks(
        self,
        chunks: tuple[Chunk, ...],
        firsts: list[int] | None,
        first_ids: list[int | None],
        scored: Scored | None,
    ) -> list[Sequence]:
        """Commit prompt rows as they are; chunks that reach the anchor yield a token.

        Args:
            firsts: number of the first captured row of each chunk; ``None`` without capture.
            first_ids: tokens of the N chunks that reach their anchor; ``None``: see ``Verified``.
            scored: finds log probabilities; ``None`` if no request asked for them.

        Returns:
            The requests of the chunks.
        """
        for index, chunk in enumerate(chunks):
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            if firsts is not None and sequence.request.capture:
                sequence.capture_rows += (chunk.start, firsts[index], chunk.num_rows)
        done = [chunk.sequence for chunk in chunks if chunk.is_last]
        for index, (sequence, token) in enumerate(zip(done, first_ids, strict=True)):
            sequence.version = self._drafting.version
            self._append(sequence, [] if token is None else [token], index, scored)
            if token is None:
                self._break_off(sequence)
        return [chunk.sequence for chunk in chunks]

    def _break_off(self, sequence: Sequence) -> None:
        """The target has no next token for a request: end it, unless the tokens before did. Its
        rows are not to be learned from in either case."""
        self.counters.num_unsound += 1
        sequence.request = replace(sequence.request, capture=False)
        if sequence.finish_reason is None:
            sequence.finish_reason = "error"

    def _append(
        self, sequence: Sequence, emitted: list[int], index: int, scored: Scored | None
    ) -> int:
        """Append tokens until one ends the request; returns how many were appended.

        Args:
            index: that of the request in ``scored``.
        """
        sequence.num_rounds += 1
        tokens, detokenizer, count = sequence.tokens, sequence.detokenizer, 0
        for token in emitted:
            tokens.append(token)
            count += 1
            if token in sequence.end_ids:
                if sequence.request.sampling.include_stop_str_in_output:
                    detokenizer.add(token)
                sequence.finish_reason = "stop"
            elif detokenizer.add(token):
                sequence.finish_reason = "stop"
            elif len(tokens) >= sequence.limit:
                sequence.finish_reason = "length"
            else:
                continue
            break
        if sequence.is_scored:
            assert scored is not None, "log probabilities were asked for"
            num_top = sequence.request.sampling.logprobs
            assert num_top is not None
            sequence.logprobs += scored(index, emitted[:count], num_top)
        self.counters.num_request_steps += 1
        self.counters.generation_tokens += count
        return count
