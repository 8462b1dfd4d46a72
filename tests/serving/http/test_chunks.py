"""Chunks of a stream: those that are made quickly are the same bytes as the others."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serving.http.chunks import ChunkEvents
from serving.http.generation import Generation
from serving.http.jobs import Job
from serving.http.metrics import Metrics
from serving.http.response_bodies import PromptTokensDetails, Speculation, Usage
from serving.http.routes.chat import ChatWriter
from serving.http.routes.completions import CompletionWriter
from serving.requests import Output, Request, SamplingParams, SpeculationStats

USAGE = Usage(
    prompt_tokens=2,
    completion_tokens=3,
    total_tokens=5,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=1),
)
SPECULATION = Speculation(
    drafter_version=1, steps=3, proposed=4, accepted=2, tokens_per_step=1.6666666666666665,
    target_version=0,
)  # fmt: skip
TEXTS = [
    "a", ' "quoted" \\ and / more', "é ü 漢字 🙂", "\x7f\u2028\u2029\ufeff\ufffd", "</script>",
    "".join(map(chr, range(32))), " \n\n", "data: x\n\n", "text", "null",
]  # fmt: skip


def job(num_choices: int) -> Job:
    requests = tuple(
        Request(f"r-{n}", (1, 2), SamplingParams(max_tokens=8)) for n in range(num_choices)
    )
    return Job("id-1", 1_700_000_000, 'a "model"', num_choices, requests, "prompt")


def output(text: str, index: int = 0, reason: Any = None) -> Output:
    return Output(f"r-{index}", text, (7,), None, reason, SpeculationStats(0, 1, 0, 0), 2, 0)


def writer_of(kind: type, of: Job, with_ids: bool) -> Any:
    return kind(None, of, with_ids)


class Told:
    """A ``Generation`` whose news are known."""

    def __init__(self, news: list[list[tuple[int, Output]]]) -> None:
        self._left = list(news)

    @property
    def is_done(self) -> bool:
        return not self._left

    def usage(self) -> Usage:
        return USAGE

    def speculation(self) -> Speculation:
        return SPECULATION

    async def news(self) -> list[tuple[int, Output]]:
        return self._left.pop(0)


def streamed(writer: Any, news: list[list[tuple[int, Output]]], usage: bool = True) -> bytes:
    async def all_events() -> bytes:
        told: Any = Told(news)
        events, data = ChunkEvents(told, writer, usage), b""
        while not events.is_over:
            data += await events.next()
        return data

    return asyncio.run(all_events())


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("kind", [CompletionWriter, ChatWriter])
def test_every_chunk_is_what_the_model_of_it_says(kind: type, with_ids: bool, usage: bool) -> None:
    news = [[(n, output(text, n)) for n in (0, 1)] for text in TEXTS]
    news.append([(1, output("", 1)), (0, output("end", 0, "stop"))])
    news[3].reverse()
    slow = writer_of(kind, job(2), with_ids)

    news.append([(1, output("", 1, "length"))])

    data = streamed(writer_of(kind, job(2), with_ids), news, usage)

    chunks = [chunk for step in news for index, one in step for chunk in slow.chunks(index, one)]
    if usage:
        chunks.append(slow.bare_chunk())
        chunks[-1].usage = USAGE
    chunks[-1].speculation = SPECULATION
    texts = [*(chunk.model_dump_json() for chunk in chunks), "[DONE]"]
    assert data.decode() == "".join(f"data: {text}\n\n" for text in texts)


@pytest.mark.parametrize("kind", [CompletionWriter, ChatWriter])
@pytest.mark.parametrize("name", ["a", "100 %b %(id)b %%", 'a "model"'])
def test_a_response_begins_as_the_model_of_its_chunks_says(kind: type, name: str) -> None:
    """Each time from the same form, with an id and a time of its own."""
    for number in range(2):
        own = replace(job(1), id=f"id-{number}", created_unix_s=number, model_name=name)
        slow = kind(None, own, False)

        data = streamed(
            kind(None, own, False), [[(0, output("%s%%"))], [(0, output("", 0, "stop"))]]
        )

        chunks = slow.chunks(0, output("%s%%"))
        begin = "".join(f"data: {chunk.model_dump_json()}\n\n" for chunk in chunks)
        assert data.decode().startswith(begin)


class Crowded:
    """A socket that has room now and then."""

    def __init__(self, room: list[bool]) -> None:
        self._room = list(room)
        self.written = 0
        self.data = b""

    def write(self, data: bytes) -> bool:
        if not self._room.pop(0):
            return False
        self.data += data
        self.written += 1
        return True


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("kind", [CompletionWriter, ChatWriter])
def test_events_that_are_written_at_once_are_those_that_would_have_been_sent(
    kind: type, usage: bool
) -> None:
    """Neither their order nor their bytes depend on who writes them, nor do counts and metrics."""

    def answer(room: list[bool] | None, burst: int) -> tuple[bytes, int, list[float], Usage]:
        own = replace(
            job(2),
            requests=tuple(
                Request(f"r-{n}", (1, 2), SamplingParams(max_tokens=8)) for n in range(2)
            ),
        )
        submitted: list[Any] = []

        class Engine:
            async def submit(self, requests: Any, on_output: Any) -> None:
                submitted.append(on_output)

        async def scenario() -> tuple[bytes, int, list[float], Usage]:
            metrics = Metrics("a")
            context: Any = SimpleNamespace(server=Engine(), metrics=metrics)
            generation = Generation(context, own, "id")
            await generation.submit()
            events = ChunkEvents(generation, kind(None, own, False), usage)
            socket = Crowded([] if room is None else room)
            if room is not None:
                events.write_with(socket.write)

            async def read() -> None:
                while not events.is_over:
                    data = await events.next()
                    socket.data += data

            reading = asyncio.create_task(read())
            await asyncio.sleep(0)
            outputs = [output(text, n) for text in TEXTS * 2 for n in (0, 1)]
            outputs += [output("", 0), output("x", 1, "stop"), output("", 0, "length")]
            for number, one in enumerate(outputs):
                submitted[0](one)
                if number % burst == burst - 1:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
            await reading
            counts = metrics.tallies.totals()
            return socket.data, socket.written, counts, generation.usage()

        return asyncio.run(scenario())

    always = [True] * 100
    now_and_then = [number % 3 > 0 for number in range(100)]
    sent, _, counts, told = answer(None, 1)
    for room in (always, now_and_then):
        data, written, now, said = answer(room, 1)
        assert data == sent and said == told
        assert written >= 20
        assert sum(now[:-6]) == pytest.approx(sum(counts[:-6]), abs=1.0)
    joined, written, _, said = answer(always, 7)
    assert written > 0 and said == told and whole(joined) == whole(sent)


def whole(data: bytes) -> dict[int, str]:
    """Text of each choice."""
    texts: dict[int, str] = {}
    for one in data.decode().strip("\n").split("\n\n")[:-1]:
        for choice in json.loads(one[6:])["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"]["content"]
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


def test_quick_chunks_carry_the_text_unchanged() -> None:
    text = "".join(chr(n) for n in range(0x3000) if not 0xD800 <= n < 0xE000)

    data = streamed(writer_of(CompletionWriter, job(1), False), [[(0, output(text))]] * 3)

    events = data.decode().strip("\n").split("\n\n")[:3]
    assert [json.loads(one[6:])["choices"][0]["text"] for one in events] == [text] * 3
