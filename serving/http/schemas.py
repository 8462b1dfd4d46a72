"""What clients send and get. Every field known to OpenAI's client is known here: supported, or
accepted at its neutral value only. Nothing is silently ignored.

Limits that depend on settings (``n``, ``max_tokens``, token ids) are checked in ``jobs.py`` and
written into /openapi.json by ``openapi.py``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_BIASES = 300
MAX_BIAS = 100
MIN_REPETITION = 0.01
MAX_REPETITION = 100
"""Between the two no logit becomes infinite."""
MAX_MESSAGES = 1024
MAX_PARTS = 256
VISIBLE = r"^[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+$"
"""No character that moves a cursor or hides: the text may be shown in an operator's terminal."""
TOKEN_ID = r"0|[1-9][0-9]{0,9}"
"""A number as one writes it, so that no two keys name one token."""
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1

# --- fields with a shape of their own ---------------------------------------------------------


class Neutral:
    """Annotation of a known field that is not supported: only these values pass."""

    def __init__(self, *values: Any) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self._values), "description": "Not supported: no other value passes."}

    def _check(self, value: Any) -> Any:
        # bool is told apart from int: False == 0 here, but not in JSON.
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self._values):
            return value
        raise PydanticCustomError("unsupported_field", "not supported; leave it out")


Biases = tuple[tuple[int, float], ...]
Prompt = str | list[str] | list[int] | list[list[int]]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_prompt(value: Any) -> Prompt:
    is_list = isinstance(value, list) and bool(value)
    are_texts = is_list and all(isinstance(item, str) for item in value)
    if isinstance(value, str) or _is_ids(value) or are_texts:
        return value  # type: ignore[no-any-return]
    if is_list and all(_is_ids(item) for item in value):
        return value  # type: ignore[no-any-return]
    raise PydanticCustomError(
        "prompt_type",
        "must be a text, a list of texts, a list of token ids or a list of such lists",
    )


def _check_stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("stop_type", "must be a text or a list of texts")
    if len(texts) > MAX_STOPS:
        raise PydanticCustomError("stop_count", f"at most {MAX_STOPS} stop texts")
    if not all(0 < len(text) <= MAX_STOP_CHARS for text in texts):
        raise PydanticCustomError(
            "stop_length", f"stop texts have 1 to {MAX_STOP_CHARS} characters"
        )
    return tuple(texts)


def _check_bias(value: Any) -> Biases:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise PydanticCustomError("bias_type", "must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("bias_count", f"at most {MAX_BIASES} token ids")
    if not all(re.fullmatch(TOKEN_ID, key, re.ASCII) for key in value):
        raise PydanticCustomError("bias_key", 'keys must be token ids, such as "50256"')
    if not all(type(bias) in (int, float) and abs(bias) <= MAX_BIAS for bias in value.values()):
        raise PydanticCustomError(
            "bias_range", f"values must be numbers, {-MAX_BIAS} to {MAX_BIAS}"
        )
    return tuple((int(key), float(bias)) for key, bias in value.items())


def _check_content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PARTS:
        raise PydanticCustomError(
            "content_type", f"must be a text or a list of 1 to {MAX_PARTS} text parts"
        )
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    if not is_text or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
        raise PydanticCustomError(
            "content_part", 'only parts of the form {"type": "text", "text": "..."} are supported'
        )
    return str(part["text"])


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


_PromptItems = Annotated[list[str], Field(min_length=1)]
_TokenId = Annotated[int, Field(ge=0)]
_PromptIds = Annotated[list[_TokenId], Field(min_length=1)]
_PromptSchema = str | _PromptItems | _PromptIds | Annotated[list[_PromptIds], Field(min_length=1)]
_StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_StopSchema = _StopText | Annotated[list[_StopText], Field(max_length=MAX_STOPS)] | None
_BiasKey = Annotated[str, Field(pattern=f"^({TOKEN_ID})$")]
_Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
_Biases = Annotated[
    dict[_BiasKey, _Bias],
    Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
]
_BiasSchema = _Biases | None
_ContentSchema = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]

PromptField = Annotated[Prompt, PlainValidator(_check_prompt, json_schema_input_type=_PromptSchema)]
StopField = Annotated[
    tuple[str, ...], PlainValidator(_check_stop, json_schema_input_type=_StopSchema)
]
BiasField = Annotated[Biases, PlainValidator(_check_bias, json_schema_input_type=_BiasSchema)]
ContentField = Annotated[str, PlainValidator(_check_content, json_schema_input_type=_ContentSchema)]


# --- requests ---------------------------------------------------------------------------------


class Body(BaseModel):
    """Base of every request object: exact JSON types, closed to unknown fields."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class StreamOptions(Body):
    include_usage: bool | None = None
    """End the stream with a chunk that carries ``usage`` and no choices."""
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class SpeculationOptions(Body):
    """How far the server may draft for this request. Never changes what is answered."""

    max_draft: int | None = Field(None, ge=0)
    """Cap on K; 0 is plain decoding, null the server's own."""


class SamplingBody(Body):
    """What completions and chat have in common."""

    model: str | None = None
    """The name in /v1/models; null is the served one."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 (and anything below 1e-5) is greedy; null is 1."""
    top_p: float | None = Field(None, ge=1e-6, le=1)
    """null is 1."""
    top_k: int | None = Field(None, ge=1, le=MAX_INT32)
    """null is no limit."""
    min_p: float | None = Field(None, ge=0, lt=1)
    """null is 0."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted from the logit of every token that the completion holds already; null is 0."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted once for every time that the completion holds the token; null is 0."""
    repetition_penalty: float | None = Field(None, ge=MIN_REPETITION, le=MAX_REPETITION)
    """Logits of tokens of prompt and completion are divided by it where above 0, multiplied
    elsewhere, as in vLLM; null is 1."""
    logit_bias: BiasField = ()
    """Token id, as a text, to what is added to its logit, before the penalties."""
    n: int | None = Field(None, ge=1)
    """Choices for each prompt; null is 1."""
    seed: int | None = Field(None, ge=-MAX_INT64 - 1, le=MAX_INT64)
    """The same seed and prompt give the same answer; choice i uses seed + i."""
    stop: StopField = ()
    """Texts that end a choice; they are not part of it."""
    stop_token_ids: list[_TokenId] | None = Field(
        None, max_length=MAX_STOP_TOKEN_IDS, fail_fast=True
    )
    ignore_eos: bool | None = None
    """Go on after the target's own end token."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Only with ``stream``."""
    user: str | None = Field(None, min_length=1, max_length=256, pattern=VISIBLE)
    """Tenant: traces bear it, and the text of one tenant never drafts for another; null is
    ``default``."""
    return_token_ids: bool | None = None
    """Add ``token_ids`` and ``prompt_token_ids``, as vLLM does."""
    speculation: SpeculationOptions | None = None
    capture: bool | None = None
    """false: nothing of this request is kept for training. Header X-Slipstream-No-Capture: 1 is
    the same."""

    min_tokens: Annotated[Any, Neutral(0)] = None


class CompletionRequest(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: PromptField
    """Text or token ids, one prompt or several."""
    max_tokens: int | None = Field(None, ge=0)
    """null is 16."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Alternatives to report at each token; null reports nothing."""

    echo: Annotated[Any, Neutral(False)] = None
    best_of: Annotated[Any, Neutral(1)] = None
    suffix: Annotated[Any, Neutral()] = None


class ChatMessage(Body):
    role: Literal["system", "user", "assistant"]
    content: ContentField

    name: Annotated[Any, Neutral()] = None
    refusal: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None


class ChatRequest(SamplingBody):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=0)
    """null is all that fits."""
    max_tokens: int | None = Field(None, ge=0)
    """The former name of ``max_completion_tokens``; not both."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Alternatives to report at each token; only with ``logprobs``."""

    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    functions: Annotated[Any, Neutral([])] = None
    metadata: Annotated[Any, Neutral({})] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    moderation: Annotated[Any, Neutral()] = None
    parallel_tool_calls: Annotated[Any, Neutral(True, False)] = None
    prediction: Annotated[Any, Neutral()] = None
    prompt_cache_key: Annotated[Any, Neutral()] = None
    prompt_cache_options: Annotated[Any, Neutral()] = None
    prompt_cache_retention: Annotated[Any, Neutral()] = None
    reasoning_effort: Annotated[Any, Neutral("none")] = None
    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    safety_identifier: Annotated[Any, Neutral()] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None
    store: Annotated[Any, Neutral(False)] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    tools: Annotated[Any, Neutral([])] = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    web_search_options: Annotated[Any, Neutral()] = None


class SwapRequest(Body):
    """Body of POST /admin/drafter/swap."""

    version: int | None = Field(None, ge=0, le=MAX_INT64)
    """null is the newest published one."""


class NoFields(Body):
    """Body of a POST that takes no fields: {} or nothing."""


# --- responses --------------------------------------------------------------------------------


def _is_none(value: object) -> bool:
    return value is None


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
    """How the answer was decoded, summed over its choices."""

    drafter_version: int
    """Version in force at the last step."""
    steps: int
    """Target passes that emitted tokens."""
    proposed: int
    accepted: int
    tokens_per_step: float | None
    """Tokens committed per target pass; null before the first."""


FinishReasonName = Literal["stop", "length"]


class CompletionLogprobs(Answer):
    tokens: list[str]
    """Text of each token; ``token_id:N`` where a token is no whole character."""
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


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
    """``token_id:N`` where the token is no whole character."""
    logprob: float
    bytes: list[int] | None


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
    status: Literal["alive", "ready", "not ready"]


class Drain(Answer):
    draining: bool
    inflight: int
    """Requests that are still being answered."""


class DrafterStatus(BaseModel):
    """What the engine says of its drafter; more keys may be present."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    kind: str
    version: int
    parent: int | None
    staleness: int | None
    """Newest published version minus the one in use."""
    state: str
    versions: list[Any]
    former: int | None
    """Version that a rollback would return to."""
    last_error: str | None


class SwapResult(BaseModel):
    """What the engine says of a swap or a roll back; more keys may be present."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    version: int
    """Version in use from now on."""


class ArmSteps(Answer):
    drafter: str
    draft_k: int
    steps: int


class DashboardData(Answer):
    """What /dashboard polls. Counters; the page takes differences."""

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
    """One row a second, in the order of ``sample_fields``."""
