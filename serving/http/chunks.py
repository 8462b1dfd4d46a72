"""Chunks of a streamed answer, for either endpoint."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Protocol, TypeVar

import msgspec

from serving.http.errors import ApiError
from serving.http.generation import Generation, News
from serving.http.response_bodies import ChatChunk, CompletionResponse
from serving.http.streaming import DONE, event
from serving.requests import Output

Chunk = TypeVar("Chunk", bound=CompletionResponse | ChatChunk, covariant=True)

_MARK = uuid.uuid4().hex
"""Stands for the text in a chunk that others are made from; found nowhere else."""
_json = msgspec.json.Encoder().encode


class ChunkWriter(Protocol[Chunk]):
    """Turns outputs into chunks and keeps track of what the client has received."""

    @property
    def with_ids(self) -> bool:
        """Whether chunks carry token ids."""

    def chunks(self, index: int, output: Output) -> Sequence[Chunk]:
        """Chunks for one choice's new output; at least one when the choice is finished. After the
        first output of a choice, one chunk for each that has text."""

    def bare_chunk(self) -> Chunk:
        """A chunk without choices."""


async def chunk_events(
    generation: Generation, writer: ChunkWriter[Chunk], include_usage: bool
) -> AsyncGenerator[bytes]:
    """Server-sent events of an entire answer. The last chunk carries ``speculation``."""
    quick = _QuickEvents(writer)
    try:
        while not generation.is_done:
            news = await generation.news()
            if generation.is_done and not include_usage:
                chunks = _chunks(writer, news)
                chunks[-1].speculation = generation.speculation()
                data = _events(chunks)
            else:
                data = b"".join([quick.events(index, output) for index, output in news])
            if data:
                yield data
        if include_usage:
            last = writer.bare_chunk()
            last.usage, last.speculation = generation.usage(), generation.speculation()
            yield _events([last])
        yield DONE
    except ApiError as error:
        yield event(error.body.model_dump_json())


class _QuickEvents:
    """Events of outputs that bring nothing but text, as nearly all do. They are made in a tenth of
    the time of a chunk: only the text differs from one to the next of its choice."""

    def __init__(self, writer: ChunkWriter[CompletionResponse | ChatChunk]) -> None:
        self._writer = writer
        self._around: dict[int, tuple[bytes, bytes] | None] = {}
        """What is before and after the text, for each choice; ``None``: it has only begun."""

    def events(self, index: int, output: Output) -> bytes:
        """The same bytes as by way of ``chunks``."""
        is_plain = output.text and output.finish_reason is None and output.logprobs is None
        if not is_plain or self._writer.with_ids or index not in self._around:
            self._around.setdefault(index, None)
            return _events(self._writer.chunks(index, output))
        around = self._around[index]
        if around is None:
            around = self._around[index] = self._taken_apart(index, output)
        return b"%b%b%b" % (around[0], _json(output.text), around[1])

    def _taken_apart(self, index: int, output: Output) -> tuple[bytes, bytes]:
        marked = msgspec.structs.replace(output, text=_MARK)
        before, after = _events(self._writer.chunks(index, marked)).split(_json(_MARK))
        return before, after


def _chunks(writer: ChunkWriter[Chunk], news: News) -> list[Chunk]:
    return [chunk for index, output in news for chunk in writer.chunks(index, output)]


def _events(chunks: Iterable[CompletionResponse | ChatChunk]) -> bytes:
    return b"".join([event(chunk.model_dump_json()) for chunk in chunks])
