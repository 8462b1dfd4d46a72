"""The running state of one request: the one object of the engine that is modified in place."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.engine.detokenize import Detokenizer
from serving.requests import FinishReason, OnOutput, Request, SpeculationStats, TokenLogprob


class NotedStep(NamedTuple):
    """What the rounds of one step have in common; see ``buffer.records.Round``."""

    drafter: str
    version: int
    draft_k: int
    propensity: float
    batch: int
    step_s: float


NotedRound = tuple[NotedStep, int, Several[int], Several[float], Several[float], int, int]
"""Step, anchor, draft tokens, q_logp (empty: nothing was drawn), p_logp of at least the tokens that
count, num_accepted and next_id of one round. A plain tuple: the engine notes 20,000 a second, and
the recorder makes columns of them."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One admitted or waiting request."""

    request: Request
    on_output: OnOutput
    key: int
    """64-bit key of its random numbers: the request's seed, or a fresh one."""
    detokenizer: Detokenizer
    eos_ids: frozenset[int]
    tokens: list[int]
    """Prompt and committed completion."""
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Prompt tokens whose pages were found in the prefix cache."""
    num_computed: int = 0
    """Positions with target KV; the anchor (last token) has none yet."""
    num_named: int = 0
    """Leading pages already declared to the prefix cache."""
    names: list[bytes] = field(default_factory=list)
    """Digests of its full pages, as far as known."""
    num_rounds: int = 0
    """Rounds so far; the nonce of its random numbers."""
    next_row: dict[str, int] = field(default_factory=dict)
    """Next position whose row each neural drafter must compute; row 0 does not exist."""
    lane: int | None = None
    """Its row of the state on the device, while it runs."""
    lane_length: int | None = None
    """Number of tokens that the lane covers; ``None`` before it is written."""
    is_flying: bool = False
    """In a round whose outcome is not committed yet: its lane is ahead of ``tokens``."""
    num_foreseen: int = 0
    """Number of tokens that a round has decided and the host drafters know, but that are not in
    ``tokens`` yet."""
    num_emitted: int = 0
    """Completion tokens already sent out."""
    finish_reason: FinishReason | None = None
    num_steps: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    version: int = 0
    rounds: list[NotedRound] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    capture_rows: list[tuple[int, int, int]] = field(default_factory=list)
    """(first position, ring sequence number, count) of captured rows."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_completion(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Completion tokens that may still be committed."""
        return self.request.sampling.max_tokens - self.num_completion

    @property
    def is_prefilled(self) -> bool:
        """Only the anchor is left to compute."""
        return 0 < self.num_computed == len(self.tokens) - 1

    @property
    def is_greedy(self) -> bool:
        return self.request.sampling.temperature == 0

    @property
    def matches_target(self) -> bool:
        """Verified by ``match``: its output does not depend on the drafter at all."""
        return self.is_greedy or self.request.sampling.seed is not None

    def stats(self) -> SpeculationStats:
        return SpeculationStats(self.version, self.num_steps, self.num_proposed, self.num_accepted)
