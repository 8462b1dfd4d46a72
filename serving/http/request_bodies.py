"""Request bodies. Every field of OpenAI's client is known here: supported, or accepted at its
neutral value only. None is silently ignored. Sampling fields come from ``serving.sampling``.

Limits that depend on settings (``n``, ``max_tokens``, token ids) are checked in ``jobs.py`` and
written into /openapi.json by ``openapi.py``.
"""

from __future__ import annotations

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

from serving.fields.definition import VISIBLE
from serving.http.sampling_body import bounded, takes_sampling
from serving.sampling import MAX_INT64

MAX_MESSAGES = 1024
MAX_PARTS = 256


class Neutral:
    """Annotation of a field that is known but not supported: only these values are accepted."""

    def __init__(self, *values: Any) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "enum": list(self._values),
            "description": "Not supported: no other value is accepted.",
        }

    def _check(self, value: Any) -> Any:
        # False == 0 in Python, but not in JSON.
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self._values):
            return value
        raise PydanticCustomError("unsupported_field", "not supported; leave it out")


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
        "must be a string, a list of strings, a list of token ids or a list of such lists",
    )


def _check_content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PARTS:
        raise PydanticCustomError(
            "content_type", f"must be a string or a list of 1 to {MAX_PARTS} text parts"
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
_ContentSchema = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]

PromptField = Annotated[Prompt, PlainValidator(_check_prompt, json_schema_input_type=_PromptSchema)]
ContentField = Annotated[str, PlainValidator(_check_content, json_schema_input_type=_ContentSchema)]


class Body(BaseModel):
    """Base of every request object: exact JSON types, no unknown fields."""

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
    """How the server may draft for this request. Does not change the answer."""

    max_draft: int | None = Field(None, ge=0)
    """Cap on K; 0 is plain decoding, null the server's own limit."""
    drafters: list[str] | None = None
    """The only drafters that may draft, by their kinds in GET /admin/drafter; null are the server's
    own. For servers whose settings let requests choose (``drafter.on_request``)."""


class GenerationBody(Body):
    """Fields that completions and chat share, apart from the sampling fields."""

    model: str | None = None
    """The name in /v1/models; null is the served one."""
    n: int | None = Field(None, ge=1)
    """Choices for each prompt; null is 1."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Only with ``stream``."""
    user: str | None = Field(None, min_length=1, max_length=256, pattern=VISIBLE)
    """Tenant: recorded in traces. Tenants share neither cached prompts nor text to draft from; null
    is ``default``."""
    return_token_ids: bool | None = None
    """Add ``token_ids`` and ``prompt_token_ids``, as vLLM does."""
    speculation: SpeculationOptions | None = None
    capture: bool | None = None
    """false keeps this request out of training. The header X-Slipstream-No-Capture: 1 does the
    same."""

    min_tokens: Annotated[Any, Neutral(0)] = None
    spaces_between_special_tokens: Annotated[Any, Neutral(True, False)] = None
    """No effect: no spaces are put between special tokens that the target's tokenizer does not
    put there."""


@takes_sampling("completions")
class CompletionRequest(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: PromptField
    """Text or token ids, one prompt or several."""
    max_tokens: int | None = bounded("max_tokens")
    """null is 16, or fewer if only these fit."""
    logprobs: int | None = bounded("logprobs")
    """Alternatives to report for each token; null reports none."""

    echo: Annotated[Any, Neutral(False)] = None
    best_of: Annotated[Any, Neutral(1)] = None
    suffix: Annotated[Any, Neutral()] = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    """``developer`` is a newer name of ``system``, which chat templates are told."""
    content: ContentField

    name: Annotated[Any, Neutral()] = None
    refusal: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None


@takes_sampling("chat")
class ChatRequest(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = bounded("max_tokens")
    """null is as many as fit."""
    max_tokens: int | None = bounded("max_tokens")
    """The former name of ``max_completion_tokens``; not both."""
    logprobs: bool | None = None
    top_logprobs: int | None = bounded("logprobs")
    """Alternatives to report for each token; only with ``logprobs``."""

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
    drafter: str | None = None
    """Kind of the drafter; null is the server's main one."""


class RollbackRequest(Body):
    """Body of POST /admin/drafter/rollback."""

    drafter: str | None = None
    """Kind of the drafter; null is the server's main one."""


class TargetUpdateRequest(Body):
    """Body of POST /admin/target/update."""

    path: str = Field(min_length=1, max_length=4096, pattern=VISIBLE)
    """Folder on the server's machine with config.json and safetensors of the same model."""


class NoFields(Body):
    """Body of a POST that takes no fields: {} or nothing."""
