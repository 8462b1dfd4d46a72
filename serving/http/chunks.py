"""Chunks of a streamed answer, for either endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeVar

from serving.http.errors import ApiError
from serving.http.generation import Generation
from serving.http.response_bodies import ChatChunk, CompletionResponse
from serving.http.streaming import DONE, event
from serving.requests import Output

Chunk = TypeVar("Chunk", bound=CompletionResponse | ChatChunk, covariant=True)


class ChunkWriter(Protocol[Chunk]):
    """Turns outputs into chunks and keeps track of what the client has received."""

    def chunks(self, index: int, output: Output) -> Sequence[Chunk]:
        """Chunks for one choice's new output; at least one when the choice is finished."""

    def bare_chunk(self) -> Chunk:
        """A chunk without choices."""


async def chunk_events(
    generation: Generation, writer: ChunkWriter[Chunk], include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events of an entire answer. The last chunk carries ``speculation``."""
    try:
        async for news in generation.news():
            chunks = [chunk for index, output in news for chunk in writer.chunks(index, output)]
            if generation.is_done and not include_usage:
                chunks[-1].speculation = generation.speculation()
            if chunks:
                yield b"".join(event(chunk.model_dump_json()) for chunk in chunks)
        if include_usage:
            last = writer.bare_chunk()
            last.usage, last.speculation = generation.usage(), generation.speculation()
            yield event(last.model_dump_json())
        yield DONE
    except ApiError as error:
        yield event(error.body.model_dump_json())
