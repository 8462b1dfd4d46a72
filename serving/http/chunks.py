"""Chunks of a streamed answer, for either endpoint."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Generic, NamedTuple, Protocol, TypeVar

import msgspec

from serving.http.errors import ApiError
from serving.http.generation import Generation, News
from serving.http.jobs import Job
from serving.http.response_bodies import ChatChunk, CompletionResponse
from serving.http.streaming import DONE, Write, event
from serving.requests import Output, Request, SamplingParams, SpeculationStats

Chunk = TypeVar("Chunk", bound=CompletionResponse | ChatChunk, covariant=True)

_MARK, _MARK_ID = uuid.uuid4().hex, uuid.uuid4().hex
_MARK_TIME = uuid.uuid4().int
"""These stand for what differs in a chunk that others are made from; found nowhere else."""
_json = msgspec.json.Encoder().encode


class ChunkWriter(Protocol[Chunk]):
    """Turns outputs into chunks and keeps track of what the client has received."""

    @property
    def job(self) -> Job:
        """What is answered."""

    @property
    def with_ids(self) -> bool:
        """Whether chunks carry token ids."""

    @property
    def begun(self) -> set[int]:
        """Choices that have had a chunk."""

    def chunks(self, index: int, output: Output) -> Sequence[Chunk]:
        """Chunks for one choice's new output; at least one when the choice is finished. After the
        first output of a choice, one chunk for each that has text."""

    def bare_chunk(self) -> Chunk:
        """A chunk without choices."""


class ChunkEvents(Generic[Chunk]):
    """Server-sent events of an entire answer. The last chunk carries ``speculation``."""

    def __init__(
        self, generation: Generation, writer: ChunkWriter[Chunk], include_usage: bool
    ) -> None:
        self.is_over = False
        self._generation = generation
        self._writer = writer
        self._quick = _QuickEvents(writer)
        self._include_usage = include_usage

    async def next(self) -> bytes:
        """One event or several; all that come at the end are sent together."""
        generation, quick, data = self._generation, self._quick, b""
        try:
            while not data:
                news = await generation.news()
                if generation.is_done:
                    self.is_over = True
                    return self._last(news)
                data = b"".join([quick.events(index, output) for index, output in news])
        except ApiError as error:
            self.is_over = True
            return event(error.body.model_dump_json())
        return data

    def write_with(self, write: Write) -> None:
        """See ``serving.http.streaming.Events``. Nearly all events are written that way."""
        quick = self._quick

        def at_once(index: int, output: Output) -> bool:
            data = quick.plain(index, output)
            return data is not None and write(data)

        self._generation.give_at_once(at_once)

    def _last(self, news: News) -> bytes:
        generation = self._generation
        chunks = _chunks(self._writer, news)
        if self._include_usage:
            chunks.append(self._writer.bare_chunk())
            chunks[-1].usage = generation.usage()
        chunks[-1].speculation = generation.speculation()
        return _events(chunks) + DONE


class _QuickEvents:
    """Events of outputs that bring nothing but text, as nearly all do. They are made in a tenth of
    the time of a chunk: only the text differs from one to the next of its choice."""

    def __init__(self, writer: ChunkWriter[CompletionResponse | ChatChunk]) -> None:
        self._writer = writer
        self._around: dict[int, tuple[bytes, bytes] | None] = {}
        """What is before and after the text, for each choice; ``None``: it has only begun."""

    def events(self, index: int, output: Output) -> bytes:
        """The same bytes as by way of ``chunks``."""
        data = self.plain(index, output)
        if data is not None:
            return data
        if not self._is_plain(output):
            self._around.setdefault(index, None)
            return _events(self._writer.chunks(index, output))
        if index not in self._around:
            return self._first(index, output)
        self._around[index] = self._taken_apart(index, output)
        return self.events(index, output)

    def plain(self, index: int, output: Output) -> bytes | None:
        """The event of an output that brings nothing but text; ``None``: it is of another kind, or
        the first of its choice."""
        around = self._around.get(index)
        if around is None or not self._is_plain(output):
            return None
        return b"%b%b%b" % (around[0], _json(output.text), around[1])

    def _is_plain(self, output: Output) -> bool:
        has_more = output.finish_reason or output.logprobs is not None or self._writer.with_ids
        return bool(output.text) and not has_more

    def _first(self, index: int, output: Output) -> bytes:
        """The first events of a choice. If it is the first of its response, a form is filled in:
        all streams of the process wait for the beginning of another one."""
        writer = self._writer
        if self._around or index in writer.begun:
            self._around[index] = None
            return _events(writer.chunks(index, output))
        writer.begun.add(index)
        form, job = _form(type(writer), writer.job.model_name, index), writer.job
        own = {b"id": job.id.encode(), b"created": b"%d" % job.created_unix_s}
        before = form.before % own
        self._around[index] = (before, form.after)
        return b"%b%b%b%b" % (form.opening % own, before, _json(output.text), form.after)

    def _taken_apart(self, index: int, output: Output) -> tuple[bytes, bytes]:
        marked = msgspec.structs.replace(output, text=_MARK)
        before, after = _events(self._writer.chunks(index, marked)).split(_json(_MARK))
        return before, after


class _Form(NamedTuple):
    """The first events of a choice. ``id`` and ``created`` are to be filled in."""

    opening: bytes
    """Events before the first text."""
    before: bytes
    """What is before the text in its event."""
    after: bytes


@lru_cache(maxsize=16)
def _form(
    kind: Callable[..., ChunkWriter[CompletionResponse | ChatChunk]], model_name: str, index: int
) -> _Form:
    """What a writer of this kind makes of a text that is the first of its response."""
    request = Request(_MARK, (0,), SamplingParams())
    job = Job(_MARK_ID, _MARK_TIME, model_name, index + 1, (request,) * (index + 1), "prompt")
    first = Output(_MARK, _MARK, (0,), None, None, SpeculationStats(0, 0, 0, 0), 0, 0)
    data = _events(kind(None, job, False).chunks(index, first)).replace(b"%", b"%%")
    data = data.replace(_MARK_ID.encode(), b"%(id)b").replace(b"%d" % _MARK_TIME, b"%(created)b")
    whole, after = data.split(_json(_MARK))
    start = whole.rindex(b"data: {")
    return _Form(whole[:start], whole[start:], after.replace(b"%%", b"%"))


def _chunks(writer: ChunkWriter[Chunk], news: News) -> list[Chunk]:
    return [chunk for index, output in news for chunk in writer.chunks(index, output)]


def _events(chunks: Iterable[CompletionResponse | ChatChunk]) -> bytes:
    return b"".join([event(chunk.model_dump_json()) for chunk in chunks])
