"""Chunks of a stream: those that are made quickly are the same bytes as the others."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from serving.http.chunks import chunk_events
from serving.http.jobs import Job
from serving.http.routes.chat import ChatWriter
from serving.http.routes.completions import CompletionWriter
from serving.requests import Output, Request, SamplingParams, SpeculationStats

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
    context: Any = SimpleNamespace(prompts=SimpleNamespace(vocabulary=None))
    return kind(context, of, with_ids)


class Told:
    """A ``Generation`` whose news are known."""

    def __init__(self, news: list[list[tuple[int, Output]]]) -> None:
        self._left = list(news)

    @property
    def is_done(self) -> bool:
        return not self._left

    async def news(self) -> list[tuple[int, Output]]:
        return self._left.pop(0)


def streamed(writer: Any, news: list[list[tuple[int, Output]]]) -> bytes:
    async def all_events() -> bytes:
        told: Any = Told(news)
        events = chunk_events(told, writer, include_usage=True)
        return b"".join([await anext(events) for _ in news])

    return asyncio.run(all_events())


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("kind", [CompletionWriter, ChatWriter])
def test_every_chunk_is_what_the_model_of_it_says(kind: type, with_ids: bool) -> None:
    news = [[(n, output(text, n)) for n in (0, 1)] for text in TEXTS]
    news.append([(1, output("", 1)), (0, output("end", 0, "stop"))])
    news[3].reverse()
    slow = writer_of(kind, job(2), with_ids)

    data = streamed(writer_of(kind, job(2), with_ids), [*news, [(1, output("", 1, "length"))]])

    chunks = [
        chunk.model_dump_json()
        for step in [*news, [(1, output("", 1, "length"))]]
        for index, one in step
        for chunk in slow.chunks(index, one)
    ]
    assert data.decode() == "".join(f"data: {chunk}\n\n" for chunk in chunks)


def test_quick_chunks_carry_the_text_unchanged() -> None:
    text = "".join(chr(n) for n in range(0x3000) if not 0xD800 <= n < 0xE000)

    data = streamed(writer_of(CompletionWriter, job(1), False), [[(0, output(text))]] * 3)

    events = data.decode().strip("\n").split("\n\n")
    assert [json.loads(one[6:])["choices"][0]["text"] for one in events] == [text] * 3
