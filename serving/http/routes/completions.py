"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from serving.engine.vocabulary import Vocabulary
from serving.http.auth import USER
from serving.http.bodies import body_schema, json_body
from serving.http.chunks import ChunkEvents
from serving.http.context import Context, context_of
from serving.http.errors import documented
from serving.http.generation import Generation
from serving.http.generation_route import GenerationRoute
from serving.http.jobs import Job, NoCaptureHeader, check_body, encoded, plan_job, wants_usage
from serving.http.logprobs import TextOffsets, completion_logprobs
from serving.http.request_bodies import CompletionRequest, Prompt
from serving.http.response_bodies import CompletionChoice, CompletionResponse
from serving.http.responses import REFUSALS, event_stream, json_answer, reason_name
from serving.http.streaming import EventStream
from serving.requests import Output

router = APIRouter(route_class=GenerationRoute)

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""


@router.post(
    "/v1/completions",
    dependencies=USER,
    response_model=CompletionResponse,
    responses={200: event_stream(CompletionResponse), **documented(*REFUSALS)},
    openapi_extra=body_schema(CompletionRequest),
)
async def create_completion(
    request: Request,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
    no_capture: NoCaptureHeader = "0",
) -> Response:
    """Complete one prompt or several."""
    context = context_of(request)
    check_body(context, body, num_prompts(body.prompt))
    job = plan_job(
        request,
        body,
        no_capture,
        await prompt_ids(context, body.prompt, body.max_tokens),
        id_prefix="cmpl",
        prompt_field="prompt",
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
    )
    generation = Generation(context, job, request.state.request_id)
    await generation.submit()
    writer = CompletionWriter(context.prompts.vocabulary, job, bool(body.return_token_ids))
    if body.stream:
        events = ChunkEvents(generation, writer, wants_usage(body))
        return EventStream(events, request, generation.close)
    with generation:
        outputs = await generation.answers(request.receive)
    return json_answer(writer.response(generation, outputs))


def num_prompts(prompt: Prompt) -> int:
    return 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)


async def prompt_ids(
    context: Context, prompt: Prompt, max_tokens: int | None
) -> list[tuple[int, ...]]:
    """Token ids of each prompt, given in any of the four forms.

    Raises:
        ApiError: 400, a text is certainly too long.
    """
    encode = context.prompts.encode
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        texts = cast(list[str], [prompt] if isinstance(prompt, str) else prompt)
        return await encoded(context, "prompt", max_tokens, lambda most: encode(texts, most))
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [tuple(ids) for ids in prompt]


class CompletionWriter:
    """Outputs in the format of /v1/completions."""

    def __init__(self, vocabulary: Vocabulary | None, job: Job, with_ids: bool) -> None:
        """
        Args:
            vocabulary: ``None``: no log probabilities were asked for.
        """
        self._vocabulary = vocabulary
        self.job = job
        self.with_ids = with_ids
        self._offsets: dict[int, TextOffsets] = {}
        """Of each choice with log probabilities."""
        self.begun: set[int] = set()

    def response(self, generation: Generation, outputs: Sequence[Output]) -> CompletionResponse:
        answer = self.bare_chunk()
        answer.choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        answer.usage, answer.speculation = generation.usage(), generation.speculation()
        return answer

    def chunks(self, index: int, output: Output) -> list[CompletionResponse]:
        is_news = output.text or output.finish_reason is not None or output.logprobs
        if not is_news and not self.with_ids:
            return []
        chunk = self.bare_chunk()
        chunk.choices = [self._choice(index, output)]
        return [chunk]

    def bare_chunk(self) -> CompletionResponse:
        return CompletionResponse(
            id=self.job.id,
            object="text_completion",
            created=self.job.created_unix_s,
            model=self.job.model_name,
            choices=[],
        )

    def _choice(self, index: int, output: Output) -> CompletionChoice:
        logprobs = None
        if output.logprobs is not None:
            assert self._vocabulary is not None
            if index not in self._offsets:
                self._offsets[index] = TextOffsets(self._vocabulary, self.job.requests[index])
            logprobs = completion_logprobs(output.logprobs, self._vocabulary, self._offsets[index])
        is_first = index not in self.begun
        self.begun.add(index)
        prompt = self.job.requests[index].prompt_ids
        return CompletionChoice(
            index=index,
            text=output.text,
            logprobs=logprobs,
            finish_reason=reason_name(output),
            token_ids=list(output.token_ids) if self.with_ids else None,
            prompt_token_ids=list(prompt) if self.with_ids and is_first else None,
        )
