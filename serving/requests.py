"""Records inside the server. HTTP makes a Request, the engine answers with Outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


class QueueFullError(Exception):
    """The waiting queue is at ``engine.max_queue``; the caller answers 429 with Retry-After."""


class DrainingError(Exception):
    """The server is shutting down and admits nothing new; the caller answers 503."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Validated by whoever builds it."""

    temperature: float = 1.0
    """>= 0; 0 is greedy."""
    top_p: float = 1.0
    """In (0, 1]."""
    top_k: int | None = None
    """>= 1, or ``None`` for no limit."""
    min_p: float = 0.0
    """In [0, 1): tokens under this share of the top token's probability are excluded."""
    seed: int | None = None
    """Seeded requests answer identically whatever the drafter proposes."""
    max_tokens: int = 16
    """>= 0 completion tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; not part of the returned text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of alternatives to report at each token, 0..20; ``None`` reports nothing."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the completion holds."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the completion holds the token."""
    repetition_penalty: float = 1.0
    """> 0: logits of tokens of prompt and completion are divided by it where above 0, multiplied
    elsewhere."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), each id once."""

    @property
    def penalizes(self) -> bool:
        """The logits depend on which tokens came before, and how often."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1)

    @property
    def adjusts_logits(self) -> bool:
        """The target's logits are changed before they become a distribution."""
        return bool(self.logit_bias) or self.penalizes


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make (``n`` choices are n requests)."""

    id: str
    prompt_ids: tuple[int, ...]
    """At least one token."""
    sampling: SamplingParams
    tenant: str = "default"
    max_draft: int | None = None
    """Cap on K for this request, 0 = plain decoding; ``None``: the server's own."""
    capture: bool = True
    """False: nothing of this request is logged."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The target's own (no bias, no penalty, temperature 1, untruncated) log probability of one
    emitted token, as vLLM reports by default."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Best alternatives, highest first, (token id, log probability)."""


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """The ``speculation`` object of a response."""

    drafter_version: int
    """Version in force at the last step."""
    steps: int
    """Target passes that emitted tokens, the first (prefill) one included."""
    proposed: int
    accepted: int

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens committed per target pass; ``None`` before the first."""
        return 1 + self.accepted / self.steps if self.steps else None


@dataclass(frozen=True, slots=True)
class Output:
    """News of one request: what was committed since the last one. The last has finish_reason."""

    request_id: str
    text: str
    """New text; a tail that could become a stop string or half a character is held back."""
    token_ids: tuple[int, ...]
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One for each new token, when asked for."""
    finish_reason: FinishReason | None
    stats: SpeculationStats
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    error: str | None = None
    """What went wrong, with finish_reason ``error``."""


OnOutput = Callable[[Output], None]
"""Called on the engine's thread; must return at once and never raise."""


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Counters since start and gauges of now, for /metrics and /dashboard."""

    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of KV pages in use by running requests, 0..1."""
    prompt_tokens: int
    generation_tokens: int
    cached_prompt_tokens: int
    num_rounds: int
    """Rounds that proposed something (vLLM: num_drafts)."""
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_per_pos: tuple[int, ...]
    """[max_draft]"""
    num_steps: int
    steps_by_arm: dict[tuple[str, int], int]
    """Steps per (drafter, draft_k)."""
    drafter_version: int
    swaps: dict[str, int]
    """``swapped``, ``rejected``, ``rolled_back`` -> count."""
    swap_seconds: float
    """Total time of the engine's in-place copies."""
    traces: dict[str, int]
    """``queued``, ``written``, ``dropped``, ``rejected`` -> count."""
    capture_rows_dropped: int
    preemptions: int = 0
    num_request_steps: int = 0
    """Target passes that emitted tokens, counted once for each request in them."""
    extra: dict[str, float] = field(default_factory=dict)
