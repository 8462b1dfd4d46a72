"""What requests that begin and end do to the streams of the same HTTP process, without a target.

The engine is the paced one of ``benchmarks.border.events``. As the engine's scheduler does, it
takes new requests in groups of an eighth of those that run, or after 10 ms, so beginnings and ends
come in bursts. Clients chat on one connection each, a new question as soon as the last one is
answered, and read lines in processes of their own.

Two measurements, with answers of some 100 tokens and of a single one: gaps between the events of a
stream, and turns of the HTTP process's event loop, for which all of its streams wait; and processor
time for a request. Gaps are those of this machine with all it has to do, processor time is not.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.border import timed_http
from benchmarks.border.events import PacedDesk, paced_server
from benchmarks.border.speed import CLIENTS_EACH, WARM_S
from benchmarks.harness.results import Row, at_most, say
from benchmarks.harness.streams import stream
from serving.border import processes
from serving.requests import OnOutput, Request
from serving.served_model import ServedModel

ANSWER_TOKENS = 100
"""In the mean; from half to one and a half of it."""
WORDS = (
    "the", "model", "answers", "a", "question", "about", "weather", "code", "numbers", "music",
    "or", "history", "and", "explains", "every", "step", "of", "way", "in", "short", "clear",
    "sentences", "that", "people", "like", "to", "read",
)  # fmt: skip
NUM_WORDS = 80
"""Of a question."""
WINDOW_S = 0.25
_GROUP = 8
_HOLD_S = 0.010


class GroupingDesk(PacedDesk):
    """A paced engine that lets new requests wait for each other."""

    def __init__(self, model: ServedModel, step_s: float) -> None:
        self._held_from_s: float | None = None
        self.num_begun = 0
        super().__init__(model, step_s)

    def _admitted(self) -> list[tuple[Request, OnOutput]]:
        now_s = time.perf_counter()
        from_s = now_s if self._held_from_s is None else self._held_from_s
        num = len(self._arrived)
        if 0 < num < self.num_running // _GROUP and now_s - from_s < _HOLD_S:
            self._held_from_s = from_s
            return []
        self._held_from_s = None
        self.num_begun += num
        return super()._admitted()


@dataclass(frozen=True, slots=True)
class Gaps:
    """One turn with streams."""

    starts_per_s: float
    events_per_s: float
    median_ms: float
    """Of the gaps between two events of a stream."""
    p99_ms: float
    http_share: float
    """Of a core that the HTTP process took."""
    turn_p99_us: float
    turn_most_us: float
    """Processor time of turns of the event loop: 99 % are below the one, and all below the other.
    """

    @property
    def p99_of_median(self) -> float:
        return self.p99_ms / self.median_ms


@dataclass(frozen=True, slots=True)
class Turn:
    """Both measurements."""

    gaps: Gaps
    request_us: float
    """Processor time of the HTTP process for a request that is answered with one token: the lower
    quartile over windows, because in some of them others spoil its caches."""
    loop_us: float
    """The part of it that the thread of the event loop takes."""


def measure(clients: int, step_ms: float, seconds: float, chosen: Sequence[str]) -> Turn:
    """Chat for some seconds, once with answers of a single token.

    Args:
        chosen: settings of the server.
    """
    gaps, _ = _chats(clients, step_ms, seconds, ANSWER_TOKENS, chosen)
    _, windows = _chats(max(1, clients // 4), step_ms, seconds, 1, chosen)
    return Turn(
        gaps,
        1e6 * float(np.quantile([one.all_s / one.num_begun for one in windows], 0.25)),
        1e6 * float(np.quantile([one.loop_s / one.num_begun for one in windows], 0.25)),
    )


class Spent(NamedTuple):
    """What an HTTP process has used."""

    all_s: float
    """Seconds of all its threads on a core."""
    loop_s: float
    """Those of the event loop's."""
    num_begun: int
    """Requests."""
    num_turns: int
    """Of the event loop."""

    @classmethod
    def so_far(cls, desk: GroupingDesk, pid: int, turns: Path) -> Spent:
        times = {
            int(task.parent.name): int(task.read_text().split()[0]) / 1e9
            for task in Path(f"/proc/{pid}/task").glob("*/schedstat")
        }
        num_turns = timed_http.num_turns(turns)
        return cls(sum(times.values()), times[pid], desk.num_begun, num_turns)

    def since(self, before: Spent) -> Spent:
        return Spent(*(b - a for a, b in zip(before, self, strict=True)))


@contextmanager
def _noting(turns: Path) -> Iterator[None]:
    """Let HTTP processes note their turns in a file."""
    timed_http.make(turns)
    command = ["-P", "-m", "benchmarks.border.timed_http", str(turns)]
    usual, processes.COMMAND = processes.COMMAND, command
    try:
        yield
    finally:
        processes.COMMAND = usual


def _chats(
    clients: int, step_ms: float, seconds: float, num_tokens: int, chosen: Sequence[str]
) -> tuple[Gaps, list[Spent]]:
    """Chat with one HTTP process. Returns what it used in each window, too."""
    with (
        tempfile.TemporaryDirectory() as name,
        _noting(turns := Path(name) / "turns"),
        paced_server(Path(name), step_ms / 1e3, GroupingDesk, chosen) as server,
    ):
        desk, spawned, port = server
        pid = spawned.process.pid
        parts = [min(CLIENTS_EACH, clients - at) for at in range(0, clients, CLIENTS_EACH)]
        context, stop = multiprocessing.get_context("spawn"), Path(name) / "stop"
        with ProcessPoolExecutor(len(parts), context) as pool:
            jobs = [
                pool.submit(run_chats, port, part, num_tokens, seed, stop)
                for seed, part in enumerate(parts)
            ]
            try:
                _wait_for_requests(desk, clients, jobs)
                time.sleep(WARM_S)
                so_far, from_s = [Spent.so_far(desk, pid, turns)], time.time()
                while time.time() < from_s + seconds:
                    time.sleep(WINDOW_S)
                    so_far.append(Spent.so_far(desk, pid, turns))
                to_s, before, after = time.time(), so_far[0], so_far[-1]
                turns_us = timed_http.turns_us(turns)[before.num_turns : after.num_turns]
            finally:
                stop.touch()
            found = [gap for job in jobs for at_s, gap in job.result() if from_s <= at_s < to_s]
    windows = [after.since(before) for before, after in itertools.pairwise(so_far)]
    spent = after.since(before)
    took_s = to_s - from_s
    gaps_ms = 1e3 * np.array(found or [0.0])
    gaps = Gaps(
        spent.num_begun / took_s,
        len(found) / took_s,
        float(np.median(gaps_ms)),
        float(np.quantile(gaps_ms, 0.99)),
        spent.all_s / took_s,
        float(np.quantile(turns_us, 0.99)),
        float(turns_us.max()),
    )
    return gaps, [window for window in windows if window.num_begun > 0]


def _wait_for_requests(desk: GroupingDesk, clients: int, jobs: Sequence[Future[Any]]) -> None:
    """Wait until each client has asked once.

    Raises:
        Exception: that of a client that failed.
    """
    while desk.num_begun < clients:
        for job in jobs:
            if job.done():
                job.result()
        time.sleep(0.05)


def run_chats(
    port: int, num: int, num_tokens: int, seed: int, stop: Path
) -> list[tuple[float, float]]:
    """Keep so many conversations going until the file ``stop`` is there.

    Returns:
        (Unix time, gap) in seconds, for every event of a stream but its first.
    """
    gaps: list[tuple[float, float]] = []

    async def run() -> None:
        each = (_questions(num_tokens, f"{seed} {number}") for number in range(num))
        await asyncio.gather(*(stream(port, asked, stop.exists, gaps) for asked in each))

    asyncio.run(run())
    return gaps


def _questions(num_tokens: int, seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """As a chat client sends them."""
    numbers = random.Random(seed)
    while True:
        text = " ".join(numbers.choices(WORDS, k=NUM_WORDS))
        yield (
            "/v1/chat/completions",
            {
                "model": "paced",
                "messages": [
                    {"role": "system", "content": "You answer questions."},
                    {"role": "user", "content": text},
                ],
                "max_tokens": max(1, numbers.randint(num_tokens // 2, num_tokens * 3 // 2)),
                "temperature": 0.7,
                "stream_options": {"include_usage": True},
            },
        )


def measure_turns(
    clients: int, step_ms: float, seconds: float, turns: int, chosen: Sequence[str]
) -> list[Turn]:
    found = []
    for turn in range(turns):
        found.append(measure(clients, step_ms, seconds, chosen))
        say(f"turn {turn + 1}: {found[-1]}")
    return found


def rows_of(turns: Sequence[Turn], clients: int, step_ms: float) -> Iterator[Row]:
    """Medians of some turns."""
    case = (
        f"paced engine, steps of {step_ms:g} ms, 1 HTTP process, {clients} chat clients, answers "
        f"of {ANSWER_TOKENS} tokens"
    )
    tail = statistics.median(turn.gaps.p99_of_median for turn in turns)
    yield at_most(case, "p99 of a gap between events over its median", tail, 3)
    for measure_, name in (
        ("median of a gap between events, ms", "median_ms"),
        ("requests/s", "starts_per_s"),
        ("events/s", "events_per_s"),
        ("cores of the HTTP process", "http_share"),
        ("microseconds of a turn of the event loop, p99", "turn_p99_us"),
        ("microseconds of the longest turn of the event loop", "turn_most_us"),
    ):
        value = statistics.median(getattr(turn.gaps, name) for turn in turns)
        yield Row(case, f"{measure_}, median of turns", value, None, None)
    case = f"paced engine, steps of {step_ms:g} ms, 1 HTTP process, answers of a single token"
    for measure_, name in (("HTTP process", "request_us"), ("event loop", "loop_us")):
        value = statistics.median(getattr(turn, name) for turn in turns)
        name = f"microseconds of the {measure_}, by request, median of turns"
        yield Row(case, name, value, None, None)
