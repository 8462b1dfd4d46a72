"""Response bodies, complete and streamed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: object) -> bool:
    return value == []


class Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class PromptTokensDetails(Answer):
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Speculation(Answer):
    """Decoding statistics, summed over the choices of an answer."""

    drafter_version: int
    """Version in force at the last step."""
    steps: int
    """Target passes that emitted tokens."""
    proposed: int
    accepted: int
    tokens_per_step: float | None
    """Tokens committed per target pass; null before the first."""
    target_version: int
    """How often the target's weights had been replaced by the last step; 0: never."""
    target_switches: list[int] = Field(default_factory=list, exclude_if=_is_empty)
    """Number of completion tokens at each replacement during the answer, of all choices: those
    before it follow the former weights, those behind it the new ones."""


FinishReasonName = Literal["stop", "length"]


class CompletionLogprobs(Answer):
    tokens: list[str]
    """Text of each token; ``token_id:N`` for a token that is not a whole character, or that reads
    the same as another one."""
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Character of ``text`` at which each token begins, from the start of the choice; all tokens of
    one character begin where it does."""


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | None
    token_ids: list[int] | None = Field(None, exclude_if=_is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=_is_none)


class CompletionResponse(Answer):
    """An answer of /v1/completions, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(None, exclude_if=_is_none)
    speculation: Speculation | None = Field(None, exclude_if=_is_none)


class TopLogprob(Answer):
    token: str
    """``token_id:N`` if the token is not a whole character or reads the same as another one."""
    logprob: float
    bytes: list[int] | None
    """The token's own bytes, which may be a part of a character; null for a special token that is
    not part of the text."""


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[ChatLogprob]
    refusal: None = None


class ChatAnswer(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Answer):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName
    token_ids: list[int] | None = Field(None, exclude_if=_is_none)


class ChatResponse(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    speculation: Speculation
    prompt_token_ids: list[int] | None = Field(None, exclude_if=_is_none)


class ChatDelta(Answer):
    role: Literal["assistant"] | None = Field(None, exclude_if=_is_none)
    content: str | None = Field(None, exclude_if=_is_none)


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None
    token_ids: list[int] | None = Field(None, exclude_if=_is_none)


class ChatChunk(Answer):
    """One chunk of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(None, exclude_if=_is_none)
    speculation: Speculation | None = Field(None, exclude_if=_is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=_is_none)


class ModelMetadata(Answer):
    target: str
    drafter_version: int
    max_draft: int


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    metadata: ModelMetadata


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Version(Answer):
    version: str


class Health(Answer):
    status: Literal["alive"]


class Readiness(Answer):
    status: Literal["ready", "not ready"]
    reason: str | None = None
    """Why it is not ready."""


class Drain(Answer):
    draining: bool
    inflight: int
    """Requests still in flight."""


class DrafterStatus(BaseModel):
    """State of the drafter; more keys may be present."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    kind: str
    version: int
    parent: int | None
    staleness: int | None
    """Newest published version minus the one in use."""
    state: str
    versions: list[Any]
    former: int | None
    """Version to which a rollback would return."""
    last_error: str | None
    beside: list[dict[str, Any]] = Field(default_factory=list)
    """The same of each further drafter that learns."""
    drafters: list[dict[str, Any]]
    """Every drafter: ``kind``, ``on_request``, and what it is like."""


class SwapResult(BaseModel):
    """Result of a swap or rollback; more keys may be present."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    version: int
    """Version now in use."""


class TargetStatus(BaseModel):
    """The target's weights; more keys may be present."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    version: int
    """How often they were replaced since the server started."""
    fingerprint: str
    folder: str | None
    """Where they were read from; null for a target that was handed over in memory."""
    updates: dict[str, int]
    """Orders so far: ``updated``, ``unchanged``, ``refused``."""
    last_error: str | None
    """Why the last order was refused; null if it was carried out."""


class TargetUpdate(TargetStatus):
    """Result of an update; more keys may be present."""

    changed: bool
    """false: these weights were in force already."""
    load_seconds: float
    """Time for reading and checking, beside serving."""
    swap_seconds: float
    """Time for which steps waited."""
    restarted: int
    """Requests in flight, which go on under the new weights."""
    untraced: int
    """Those among them that leave no trace because of that."""


class ArmSteps(Answer):
    drafter: str
    draft_k: int
    steps: int


class DashboardData(Answer):
    """Data that /dashboard polls. Counters; the page takes differences."""

    model: str
    target: str
    package_version: str
    unix_s: float
    started_unix_s: float
    is_ready: bool
    figures: dict[str, Any]
    arms: list[ArmSteps]
    drafter: dict[str, Any]
    policy: dict[str, Any]
    sample_fields: list[str]
    samples: list[list[float]]
    """One row per second, in the order of ``sample_fields``."""
