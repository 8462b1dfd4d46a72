"""Records that HTTP and the engine exchange: a Request in, Outputs back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from serving.sampling import SamplingParams

__all__ = [
    "ENGINE_GONE",
    "DrafterCounts",
    "DrainingError",
    "EngineFigures",
    "EngineGoneError",
    "FinishReason",
    "OnOutput",
    "Output",
    "QueueFullError",
    "Request",
    "SamplingParams",
    "SpeculationStats",
    "TokenLogprob",
    "join_outputs",
]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class QueueFullError(Exception):
    """The waiting queue is at ``engine.max_queue``; the caller answers 429 with Retry-After."""


class DrainingError(Exception):
    """The server is shutting down and admits nothing new; the caller answers 503."""


class EngineGoneError(Exception):
    """The engine does not run any more; the caller answers 503."""


ENGINE_GONE = "engine_gone"
"""Error code of an output that ends a request because its engine does not run any more."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate (``n`` choices are n requests)."""

    id: str
    prompt_ids: tuple[int, ...]
    """At least one token."""
    sampling: SamplingParams
    tenant: str = "default"
    """Whose request it is; see ``namespace``."""
    max_draft: int | None = None
    """Cap on K for this request; 0 is plain decoding, ``None`` the server's own limit."""
    capture: bool = True
    """False keeps the request out of traces."""
    drafters: frozenset[str] | None = None
    """Kinds that may draft for it; ``None``: all but those that draft on request only."""

    @property
    def namespace(self) -> str:
        """Its tenant and ``cache_salt``. Only requests of one namespace share cached pages, and
        drafts from the text of others: both show in an answer's timing and counts."""
        return f"{len(self.tenant)}:{self.tenant}{self.sampling.cache_salt or ''}"


class _Record(msgspec.Struct, array_like=True, gc=False):
    """What is made for each request and step: in a third of the time of a dataclass, unknown to the
    garbage collector, and without names in a message."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The target's own log probability of one emitted token: without bias and penalties, at
    temperature 1, untruncated; vLLM's default."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability) of the most probable alternatives, highest first."""


class SpeculationStats(_Record):
    """The ``speculation`` object of a response."""

    drafter_version: int
    """Version in force at the last step."""
    steps: int
    """Target passes that emitted tokens, including prefill."""
    proposed: int
    accepted: int
    target_version: int = 0
    """How often the target's weights had been replaced when the newest token was computed."""
    target_switches: tuple[int, ...] = ()
    """Number of completion tokens at each replacement that fell into the answer."""

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens committed per target pass; ``None`` before the first."""
        return 1 + self.accepted / self.steps if self.steps else None


class Output(_Record):
    """What one request committed since its last output. The final one has a finish_reason."""

    request_id: str
    text: str
    """New text, without a tail that could become a stop string or is an incomplete character."""
    token_ids: tuple[int, ...]
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One for each new token, if requested."""
    finish_reason: FinishReason | None
    stats: SpeculationStats
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    error: str | None = None
    """Error message, with finish_reason ``error``."""
    error_code: str | None = None
    """What went wrong in one word, if the client is to know; then ``error`` is for the client."""

    @classmethod
    def engine_gone(cls, request_id: str) -> Output:
        """The last output of a request whose engine does not run any more."""
        return cls(
            request_id=request_id,
            text="",
            token_ids=(),
            logprobs=None,
            finish_reason="error",
            stats=SpeculationStats(0, 0, 0, 0),
            num_prompt_tokens=0,
            num_cached_tokens=0,
            error="The engine has stopped, so this request has no further answer; retry it.",
            error_code=ENGINE_GONE,
        )


def join_outputs(outputs: Sequence[Output]) -> Output:
    """Several consecutive outputs of one request joined into one."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return msgspec.structs.replace(
        last,
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(logprobs) if outputs[0].logprobs is not None else None,
    )


OnOutput = Callable[[Output], None]
"""Called on the engine's thread; must return at once and must not raise."""


class DrafterCounts(NamedTuple):
    """What one drafter did since the start."""

    rounds: int
    """Of single requests, in which it proposed."""
    tokens: int
    """Proposed."""
    accepted: int


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Counters since the start and current gauges, for /metrics and /dashboard."""

    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of KV pages in use by running requests, 0..1."""
    prompt_tokens: int
    generation_tokens: int
    cached_prompt_tokens: int
    num_rounds: int
    """Rounds that proposed tokens (vLLM: num_drafts)."""
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
    """``queued``, ``written``, ``dropped``, ``failed`` -> count."""
    capture_rows_dropped: int
    num_corrupted: int = 0
    """Requests whose target computed NaN or infinity."""
    policy_failures: int = 0
    """Decisions that a policy failed to make, and outcomes that it failed to take in."""
    num_request_steps: int = 0
    """Target passes that emitted tokens, counted once for each request in them."""
    refusals: dict[str, int] = field(default_factory=dict)
    """``rejected`` versions by reason, see ``serving.swap.flat_weights.RefusedError``."""
    ignored_calibrations: int = 0
    """Versions whose calibration was malformed, see ``policies.calibration``."""
    target_version: int = 0
    """How often the target's weights were replaced."""
    target_updates: dict[str, int] = field(default_factory=dict)
    """Orders to replace them: ``updated``, ``unchanged``, ``refused`` -> count."""
    target_update_seconds: float = 0.0
    """Total time for which steps waited for that."""
    target_untraced: int = 0
    """Requests that left no trace because the weights changed during their answer."""
    drafters: dict[str, DrafterCounts] = field(default_factory=dict)
    """By kind; those that never proposed are missing."""
    versions: dict[str, int] = field(default_factory=dict)
    """Version in use of each drafter that learns, and of its former version while that drafts, by
    kind."""
    extra: dict[str, float] = field(default_factory=dict)
