"""Turns a validated body into engine requests: one job for each HTTP request."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from fastapi import Header
from starlette.requests import Request as HttpRequest

from serving.http.context import Context, context_of
from serving.http.errors import ApiError, invalid
from serving.http.ids import new_id
from serving.http.prompts import TooManyTokensError
from serving.http.request_bodies import GenerationBody
from serving.http.sampling_body import field_outside_vocabulary, sampling_params
from serving.requests import Request

T = TypeVar("T")

NO_CAPTURE = "X-Slipstream-No-Capture"
NoCaptureHeader = Annotated[
    Literal["0", "1"],
    Header(
        alias=NO_CAPTURE,
        description="1 is the same as `capture: false` in the body.",
    ),
]


PromptField = Literal["prompt", "messages"]
"""Where a body has its prompt."""


@dataclass(frozen=True, slots=True)
class Job:
    """The engine requests of one HTTP request."""

    id: str
    created_unix_s: int
    model_name: str
    num_choices: int
    """Choices of each prompt."""
    requests: tuple[Request, ...]
    """Choice i of prompt p at p * num_choices + i, which is also its index in the answer."""
    prompt_field: PromptField

    def is_first_choice(self, index: int) -> bool:
        return index % self.num_choices == 0


def plan_job(
    http_request: HttpRequest,
    body: GenerationBody,
    no_capture: str,
    prompts: Sequence[tuple[int, ...]],
    *,
    id_prefix: str,
    prompt_field: PromptField,
    max_tokens: int | None,
    default_max_tokens: int | None = None,
    logprobs: int | None,
) -> Job:
    """Build the requests of a body that ``check_body`` accepts.

    Args:
        no_capture: value of ``NoCaptureHeader``.
        prompts: token ids of each prompt.
        max_tokens: ``None`` for ``default_max_tokens``, or fewer if that many do not fit.
        default_max_tokens: ``None`` for as many as fit.
        logprobs: alternatives for each token, or ``None``.

    Raises:
        ApiError: 400 that names the field.
    """
    context = context_of(http_request)
    num_choices = _num_choices(body)
    job_id = f"{id_prefix}-{new_id()}"
    capture = body.capture is not False and no_capture != "1"
    drafters = _drafters(context, body)
    limits = [
        _max_tokens(context, prompt_field, len(prompt_ids), max_tokens, default_max_tokens)
        for prompt_ids in prompts
    ]
    requests = tuple(
        Request(
            id=f"{job_id}-{place * num_choices + choice}",
            prompt_ids=prompt_ids,
            sampling=sampling_params(body, choice, max_tokens=limits[place], logprobs=logprobs),
            tenant="default" if body.user is None else body.user,
            max_draft=None if body.speculation is None else body.speculation.max_draft,
            capture=capture,
            drafters=drafters,
        )
        for place, prompt_ids in enumerate(prompts)
        for choice in range(num_choices)
    )
    return Job(
        job_id,
        int(time.time()),
        context.server.model.model_name,
        num_choices,
        requests,
        prompt_field,
    )


def check_body(context: Context, body: GenerationBody, num_prompts: int = 1) -> None:
    """Check what does not depend on the tokens of a prompt.

    Raises:
        ApiError: 404 for a model that is not served (``None`` is the served one); 400 if a field
            exceeds what the settings or the target allow.
    """
    if body.model not in (None, context.server.model.model_name):
        raise ApiError(
            404,
            f"The model does not exist; this server serves '{context.server.model.model_name}'.",
            param="model",
            code="model_not_found",
        )
    check_limits(context, body, _num_choices(body), num_prompts)


async def encoded(
    context: Context,
    prompt_field: PromptField,
    max_tokens: int | None,
    encode: Callable[[int], Awaitable[T]],
) -> T:
    """Tokens of prompts, unless one is certainly too long.

    Args:
        max_tokens: see ``plan_job``.
        encode: called with the number of tokens that a prompt may have.

    Raises:
        ApiError: 400, prompt and completion exceed the target's length.
    """
    room = context.server.model.max_model_len - (1 if max_tokens is None else max_tokens)
    try:
        return await encode(room)
    except TooManyTokensError as error:
        told = f"at least {error.at_least} tokens"
        raise _too_long(context, prompt_field, told, max_tokens) from None


def _num_choices(body: GenerationBody) -> int:
    return 1 if body.n is None else body.n


def check_limits(
    context: Context, body: GenerationBody, num_choices: int, num_prompts: int
) -> None:
    """Raise ApiError 400 if a field exceeds what the settings or the target allow."""
    server, model = context.settings.server, context.server.model
    max_queue = context.settings.engine.max_queue
    draft = 0 if body.speculation is None else body.speculation.max_draft or 0
    if num_choices > server.max_choices:
        raise invalid(f"n: at most server.max_choices ({server.max_choices})", param="n")
    if num_choices * num_prompts > max_queue:
        param = "n" if num_prompts == 1 else "prompt"
        raise invalid(
            f"{param}: {num_choices * num_prompts} choices in one request, at most "
            f"engine.max_queue ({max_queue})",
            param=param,
        )
    if draft > model.max_draft:
        raise invalid(
            f"speculation.max_draft: at most drafter.max_draft ({model.max_draft})",
            param="speculation.max_draft",
        )
    if (name := field_outside_vocabulary(body, model.vocab_size)) is not None:
        raise invalid(f"{name}: token ids are below {model.vocab_size}", param=name)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: only with stream=true", param="stream_options")


def _drafters(context: Context, body: GenerationBody) -> frozenset[str] | None:
    """Kinds that may draft for the request.

    Raises:
        ApiError: 400, requests may not choose, or this server does not have one of the kinds.
    """
    wanted = None if body.speculation is None else body.speculation.drafters
    if wanted is None:
        return None
    known, param = context.server.model.drafters, "speculation.drafters"
    if known is None:
        raise invalid(f"{param}: only if the setting drafter.on_request is a list", param=param)
    for kind in wanted:
        if kind not in known:
            names = ", ".join(known) or "none"
            raise invalid(f"{param}: there is no drafter {kind!r}; known: {names}", param=param)
    return frozenset(wanted)


def wants_usage(body: GenerationBody) -> bool:
    """True if the stream ends with a separate chunk for ``usage``."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _max_tokens(
    context: Context,
    prompt_field: PromptField,
    num_prompt: int,
    wanted: int | None,
    default: int | None,
) -> int:
    """The limit of one request: ``wanted``, or else ``default`` or as many as fit, at least one.

    Raises:
        ApiError: 400, prompt and completion exceed the target's length.
    """
    room = context.server.model.max_model_len - num_prompt
    if room < (1 if wanted is None else wanted):
        raise _too_long(context, prompt_field, f"{num_prompt} tokens", wanted)
    if wanted is not None:
        return wanted
    return room if default is None else min(room, default)


def _too_long(
    context: Context, prompt_field: PromptField, prompt: str, wanted: int | None
) -> ApiError:
    """The refusal of a prompt that does not fit; ``prompt`` says how long it is."""
    completion = (
        " and at least one of a completion" if wanted is None else f" and max_tokens {wanted}"
    )
    return invalid(
        f"{prompt_field}: {prompt}{completion}, together at most "
        f"engine.max_model_len ({context.server.model.max_model_len})",
        param=prompt_field,
        code="context_length_exceeded",
    )
