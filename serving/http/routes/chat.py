"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from serving.engine.vocabulary import Vocabulary
from serving.http.auth import USER
from serving.http.bodies import body_schema, json_body
from serving.http.chunks import ChunkEvents
from serving.http.context import context_of
from serving.http.errors import documented, invalid
from serving.http.generation import Generation
from serving.http.generation_route import GenerationRoute
from serving.http.jobs import Job, NoCaptureHeader, check_body, encoded, plan_job, wants_usage
from serving.http.logprobs import chat_logprobs
from serving.http.request_bodies import ChatMessage, ChatRequest
from serving.http.response_bodies import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatResponse,
)
from serving.http.responses import REFUSALS, event_stream, json_answer, reason_name
from serving.http.streaming import EventStream
from serving.requests import Output

router = APIRouter(route_class=GenerationRoute)


@router.post(
    "/v1/chat/completions",
    dependencies=USER,
    response_model=ChatResponse,
    responses={200: event_stream(ChatChunk), **documented(*REFUSALS)},
    openapi_extra=body_schema(ChatRequest),
)
async def create_chat_completion(
    request: Request,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
    no_capture: NoCaptureHeader = "0",
) -> Response:
    """Answer a conversation, rendered with the target's own chat template."""
    context = context_of(request)
    check_body(context, body)
    most_tokens, logprobs = max_tokens(body), num_logprobs(body)
    messages = [{"role": _role(message), "content": message.content} for message in body.messages]
    encode = context.prompts.encode_chat
    prompt_ids = await encoded(
        context, "messages", most_tokens, lambda most: encode(messages, most)
    )
    job = plan_job(
        request,
        body,
        no_capture,
        [prompt_ids],
        id_prefix="chatcmpl",
        prompt_field="messages",
        max_tokens=most_tokens,
        logprobs=logprobs,
    )
    generation = Generation(context, job, request.state.request_id)
    await generation.submit()
    writer = ChatWriter(context.prompts.vocabulary, job, bool(body.return_token_ids))
    if body.stream:
        events = ChunkEvents(generation, writer, wants_usage(body))
        return EventStream(events, request, generation.close)
    with generation:
        outputs = await generation.answers(request.receive)
    return json_answer(writer.response(generation, outputs))


def _role(message: ChatMessage) -> str:
    return "system" if message.role == "developer" else message.role


def max_tokens(body: ChatRequest) -> int | None:
    """The limit under either of its names; ``None`` for as many as fit."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid(
            "max_tokens: the former name of max_completion_tokens; send one of them",
            param="max_tokens",
        )
    return body.max_completion_tokens if body.max_tokens is None else body.max_tokens


def num_logprobs(body: ChatRequest) -> int | None:
    """Alternatives to report at each token; ``None`` reports nothing."""
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: only with logprobs=true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


class ChatWriter:
    """Outputs in the shape of /v1/chat/completions."""

    def __init__(self, vocabulary: Vocabulary | None, job: Job, with_ids: bool) -> None:
        """
        Args:
            vocabulary: ``None``: no log probabilities were asked for.
        """
        self._vocabulary = vocabulary
        self.job = job
        self.with_ids = with_ids
        self.begun: set[int] = set()

    def response(self, generation: Generation, outputs: Sequence[Output]) -> ChatResponse:
        return ChatResponse(
            id=self.job.id,
            object="chat.completion",
            created=self.job.created_unix_s,
            model=self.job.model_name,
            choices=[self._choice(index, output) for index, output in enumerate(outputs)],
            usage=generation.usage(),
            speculation=generation.speculation(),
            prompt_token_ids=self._prompt_token_ids(),
        )

    def chunks(self, index: int, output: Output) -> list[ChatChunk]:
        opening = [] if index in self.begun else [self._opening(index)]
        is_news = output.text or output.finish_reason is not None or output.logprobs
        if not is_news and not self.with_ids:
            return opening
        chunk = self.bare_chunk()
        chunk.choices = [
            ChatChunkChoice(
                index=index,
                delta=ChatDelta(content=output.text),
                logprobs=self._logprobs(output),
                finish_reason=reason_name(output),
                token_ids=list(output.token_ids) if self.with_ids else None,
            )
        ]
        return [*opening, chunk]

    def bare_chunk(self) -> ChatChunk:
        return ChatChunk(
            id=self.job.id,
            object="chat.completion.chunk",
            created=self.job.created_unix_s,
            model=self.job.model_name,
            choices=[],
        )

    def _opening(self, index: int) -> ChatChunk:
        """The first chunk of a choice, with its role."""
        chunk = self.bare_chunk()
        delta = ChatDelta(role="assistant", content="")
        chunk.choices = [
            ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
        ]
        chunk.prompt_token_ids = None if self.begun else self._prompt_token_ids()
        self.begun.add(index)
        return chunk

    def _choice(self, index: int, output: Output) -> ChatChoice:
        reason = reason_name(output)
        assert reason is not None
        return ChatChoice(
            index=index,
            message=ChatAnswer(role="assistant", content=output.text),
            logprobs=self._logprobs(output),
            finish_reason=reason,
            token_ids=list(output.token_ids) if self.with_ids else None,
        )

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        if output.logprobs is None:
            return None
        assert self._vocabulary is not None
        skip_special = self.job.requests[0].sampling.skip_special_tokens
        return chat_logprobs(output.logprobs, self._vocabulary, skip_special)

    def _prompt_token_ids(self) -> list[int] | None:
        return list(self.job.requests[0].prompt_ids) if self.with_ids else None
