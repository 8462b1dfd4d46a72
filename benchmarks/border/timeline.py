"""Where the time of a request goes that is not decoding, when there is one client.

One client asks one request after another, each as soon as the last one is answered, with answers
as a whole and as streams in turn. Every process notes when a request passes its stations
(``benchmarks.border.stamps``). Before that the engine answers the same requests in the same process
without HTTP, so its rounds are those of the same programs.

Decoding is the time from the first token that the engine's thread has read to the last one; what a
request costs beyond that is all else until the client has the answer.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.border import stamps
from benchmarks.border.stamps import Stamps, Station
from benchmarks.border.starts import WORDS
from benchmarks.harness.results import Row, say
from examples.connections import Connections
from examples.demo import command_of, log_of, wait_for_server
from examples.plan import DemoSettings
from examples.processes import start, stop

START_S = 300.0
QUIET_S = 1.0
"""Programs that were left for later are made once none has been made for so long."""
LONGEST_MAKING_S = 30.0
TIMEOUT_S = 120.0
ALONE, EARLY, WHOLE, STREAM = "engine alone", "while programs are made", "whole", "stream"

FIRST, LAST = 0, -1
MILESTONES: tuple[tuple[str, Station, int], ...] = (
    ("the HTTP process reads it", Station.BYTES, FIRST),
    ("its route begins", Station.ROUTED, FIRST),
    ("its body is parsed", Station.PARSED, FIRST),
    ("its prompt is tokenized", Station.TOKENIZED, FIRST),
    ("it is handed to the engine", Station.SUBMITTED, FIRST),
    ("the engine's process reads it", Station.RECEIVED, FIRST),
    ("it is in the inbox", Station.QUEUED, FIRST),
    ("the engine's thread is awake", Station.WOKE, LAST),
    ("it is admitted", Station.ADMITTED, FIRST),
    ("its prompt is launched", Station.PROMPT_LAUNCHED, FIRST),
    ("its first token is read", Station.PROMPT_READ, LAST),
    ("... its last round is read", Station.ROUND_READ, LAST),
    ("its end is known", Station.FINISH, FIRST),
    ("what it held is free", Station.FINISHED, FIRST),
    ("its last output leaves the engine", Station.HANDED_OVER, LAST),
    ("the HTTP process has it", Station.OUTPUT, LAST),
    ("its answer is put together", Station.ANSWER, FIRST),
    ("its answer is written", Station.WRITTEN, FIRST),
    ("the client has it", Station.ANSWERED, FIRST),
)
"""What is shown, in this order: the first or the last time that a request passes a station. Rounds
count until the end of the request is known."""


# ---- one request --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passage:
    """One request."""

    at_ms: dict[str, float]
    """Milestone -> milliseconds since it was sent."""
    total_ms: float
    round_ms: float | None
    """Median of the time from one round to the next; ``None`` with fewer than two."""
    beyond_ms: float
    """Total without decoding."""
    first_event_ms: float | None
    """Until the client has the first event of a stream."""
    first_output_ms: float | None
    """From the first token read to the first output in the HTTP process."""
    num_rounds: int
    """Rounds that were launched."""
    num_before: int
    """Those launched before its first token was read."""
    num_after: int
    """Those read after its end was known, or never."""
    num_sleeps: int
    """How often the engine's thread woke up while the request was in its process."""
    num_made: int
    """Programs that were made since the request before was answered."""
    making_ms: float
    """Time of making them after the request was sent."""
    collecting_ms: float
    """Time of the garbage collector, in all processes."""
    pause_ms: float
    """Of the client, after the request before."""


Events = dict[Station, list[float]]


def passages(
    noted: Sequence[tuple[float, Station]], client: Sequence[tuple[float, Station]]
) -> list[Passage]:
    """One for each request of a client that asked one after another.

    Args:
        noted: seconds and stations of a server, in order of time.
        client: the client's.
    """
    sent = [at_s for at_s, station in client if station is Station.SENT]
    answered = [at_s for at_s, station in client if station is Station.ANSWERED]
    firsts = [at_s for at_s, station in client if station is Station.FIRST_EVENT]
    times = np.array([at_s for at_s, _ in noted])
    found = []
    for number, (from_s, to_s) in enumerate(zip(sent, answered, strict=True)):
        before_s = answered[number - 1] if number else from_s
        begin, end = np.searchsorted(times, [before_s, to_s])
        events: Events = {Station.ANSWERED: [to_s]}
        for at_s, station in noted[int(begin) : int(end)]:
            events.setdefault(station, []).append(at_s)
        first_s = next((at_s for at_s in firsts if from_s <= at_s <= to_s), None)
        found.append(_passage(events, before_s, from_s, to_s, first_s))
    return found


def _passage(
    all_events: Events, before_s: float, from_s: float, to_s: float, first_event_s: float | None
) -> Passage:
    events = {
        station: own
        for station, times in all_events.items()
        if (own := [at_s for at_s in times if at_s >= from_s])
    }
    first_s = events[Station.PROMPT_READ][-1]
    end_s = events[Station.FINISH][0]
    # A round of the request before may still be read while this one is on its way.
    rounds = [at_s for at_s in events.get(Station.ROUND_READ, []) if first_s < at_s <= end_s]
    launches = events.get(Station.ROUND_LAUNCHED, [])
    outputs = [at_s for at_s in events.get(Station.OUTPUT, []) if at_s > first_s]
    events[Station.ROUND_READ] = rounds or [first_s]
    queued_s = events[Station.QUEUED][0]
    wakes = [at_s for at_s in events.get(Station.WOKE, []) if queued_s <= at_s <= end_s]
    events[Station.WOKE] = wakes[:1]
    # The client may have a stream's end before its server knows that it is written.
    written = [at_s for at_s in events.get(Station.WRITTEN, []) if at_s > end_s]
    events[Station.WRITTEN] = written
    last_s = events[Station.ROUND_READ][-1]
    total_ms, decode_ms = 1e3 * (to_s - from_s), 1e3 * (last_s - first_s)
    gaps = [b - a for a, b in itertools.pairwise(rounds)]
    return Passage(
        at_ms={
            name: 1e3 * (events[station][which] - from_s)
            for name, station, which in MILESTONES
            if events.get(station)
        },
        total_ms=total_ms,
        round_ms=1e3 * statistics.median(gaps) if gaps else None,
        beyond_ms=total_ms - decode_ms,
        first_event_ms=None if first_event_s is None else 1e3 * (first_event_s - from_s),
        first_output_ms=1e3 * (outputs[0] - first_s) if outputs else None,
        num_rounds=len(launches),
        num_before=sum(at_s < first_s for at_s in launches),
        num_after=len(launches) - len(rounds),
        num_sleeps=len(wakes),
        num_made=len(all_events.get(Station.MADE, [])),
        making_ms=1e3 * _within(all_events, Station.MAKE, Station.MADE, from_s),
        collecting_ms=1e3 * _within(events, Station.COLLECT, Station.COLLECTED, from_s),
        pause_ms=1e3 * (from_s - before_s),
    )


def _within(events: Events, begin: Station, end: Station, from_s: float) -> float:
    """Seconds between two stations, from a time on."""
    spans = zip(events.get(begin, []), events.get(end, []), strict=False)
    return sum((max(0.0, b - max(a, from_s)) for a, b in spans), 0.0)


# ---- many requests ------------------------------------------------------------------------------


def summary(of: Sequence[Passage]) -> dict[str, Any]:
    """Medians and means over requests."""

    def median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    names = [name for name, _, _ in MILESTONES if any(name in one.at_ms for one in of)]
    steps: dict[str, float | None] = {}
    for number, name in enumerate(names):
        former = names[number - 1] if number else None
        steps[name] = median(
            [
                one.at_ms[name] - (one.at_ms.get(former, 0.0) if former else 0.0)
                for one in of
                if name in one.at_ms
            ]
        )
    mean = statistics.fmean
    return {
        "requests": len(of),
        "total_ms": median([one.total_ms for one in of]),
        "beyond_ms": median([one.beyond_ms for one in of]),
        "beyond_p90_ms": float(np.quantile([one.beyond_ms for one in of], 0.9)),
        "beyond_mean_ms": mean(one.beyond_ms for one in of),
        "round_ms": median([one.round_ms for one in of]),
        "first_event_ms": median([one.first_event_ms for one in of]),
        "first_output_ms": median([one.first_output_ms for one in of]),
        "rounds": mean(one.num_rounds for one in of),
        "rounds_before_first_token": mean(one.num_before for one in of),
        "rounds_for_nothing": mean(one.num_after for one in of),
        "sleeps": mean(one.num_sleeps for one in of),
        "programs_made": mean(one.num_made for one in of),
        "making_ms": mean(one.making_ms for one in of),
        "collecting_ms": mean(one.collecting_ms for one in of),
        "pause_ms": median([one.pause_ms for one in of]),
        "steps_ms": steps,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """One column for each arrangement."""
    head = "medians in ms, each since the line before"
    lines = [f"{head:44}" + "".join(f"{name:>26}" for name in found)]
    names = [n for n, _, _ in MILESTONES if any(n in one["steps_ms"] for one in found.values())]
    for name in names:
        lines.append(_line(name, [one["steps_ms"].get(name) for one in found.values()]))
    lines.append("")
    for key, told in TOLD.items():
        lines.append(_line(told, [one[key] for one in found.values()]))
    return "\n".join(lines)


TOLD = {
    "requests": "requests",
    "total_ms": "ms, a request",
    "beyond_ms": "ms beyond decoding, median",
    "beyond_p90_ms": "ms beyond decoding, 90th percentile",
    "beyond_mean_ms": "ms beyond decoding, mean",
    "round_ms": "ms from round to round",
    "first_event_ms": "ms to the first event",
    "first_output_ms": "ms, first token read to HTTP",
    "rounds": "rounds launched",
    "rounds_before_first_token": "rounds before the first token",
    "rounds_for_nothing": "rounds for nothing",
    "sleeps": "the engine woke up",
    "programs_made": "programs made",
    "making_ms": "ms of that while a request waits",
    "collecting_ms": "ms of garbage collection",
    "pause_ms": "ms of the client between requests",
}


def _line(name: str, values: Sequence[float | None]) -> str:
    return f"{name:44}" + "".join(f"{'' if v is None else f'{v:.3f}':>26}" for v in values)


# ---- the client ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """What all requests have in common."""

    tokens: int
    """Of an answer."""
    words: int
    """Of a prompt."""
    temperature: float
    max_draft: int | None
    """0: plain decoding; ``None``: the policy decides."""
    drafters: tuple[str, ...] | None
    """Kinds that may draft; ``None``: requests do not say."""
    is_chat: bool
    capture: bool


def bodies(count: int, kind: Kind) -> list[dict[str, Any]]:
    """Requests of different texts, as the arms of a demo's replay send them."""
    numbers = random.Random(0)
    speculation: dict[str, Any] = {"max_draft": kind.max_draft}
    if kind.drafters is not None:
        speculation["drafters"] = list(kind.drafters)
    made = []
    for number in range(count):
        text = " ".join(numbers.choices(WORDS, k=kind.words))
        chat = {"messages": [{"role": "user", "content": text}]}
        made.append(
            {
                **(chat if kind.is_chat else {"prompt": text}),
                "max_tokens": kind.tokens,
                "temperature": kind.temperature,
                "seed": number,
                "ignore_eos": True,
                "return_token_ids": True,
                "capture": kind.capture,
                "speculation": speculation,
            }
        )
    return made


def ask_all(port: int, asked: Sequence[dict[str, Any]], is_stream: bool, client: Stamps) -> None:
    """Ask one after another on one connection."""
    connections = Connections("127.0.0.1", port, TIMEOUT_S)
    streams = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    for body in asked:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        client.note(Station.SENT)
        if is_stream:
            _read_stream(streams, path, body, client)
        else:
            connections.post(path, body)
        client.note(Station.ANSWERED)


def _read_stream(
    connection: http.client.HTTPConnection, path: str, body: dict[str, Any], client: Stamps
) -> None:
    text = json.dumps({**body, "stream": True})
    connection.request("POST", path, text, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise ConnectionError(f"{path}: {response.status} {response.read()[:1000]!r}")
    is_first = True
    while line := response.readline():
        if is_first and line.startswith(b"data: "):
            client.note(Station.FIRST_EVENT)
            is_first = False


# ---- the server ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked."""

    configs: tuple[str, ...]
    settings: tuple[str, ...]
    asked: tuple[dict[str, Any], ...]
    turns: int
    """Of answers as a whole and of streams, each."""


@contextmanager
def stamped_server(load: Load, processes: int, folder: Path) -> Iterator[int]:
    """Its port, once it is ready."""
    wanted = DemoSettings(
        configs=tuple(map(Path, load.configs)),
        run_dir=folder / "run",
        overrides=(*load.settings, f"server.processes={processes}"),
        start_s=START_S,
    )
    arguments = command_of(wanted, "serving")[2:]
    (folder / stamps.ALONE).write_text(json.dumps(load.asked))
    command = ["-m", "benchmarks.border.stamps", "server", str(folder), *arguments]
    child = start("server", command, log_of(wanted, "server"))
    try:
        yield int(wait_for_server(wanted, [child]).url.rpartition(":")[2])
    finally:
        stop([child])


def measure(load: Load, processes: int) -> dict[str, dict[str, Any]]:
    """One summary for the engine alone, one for the first requests of the server if it makes
    programs meanwhile, and one for each way to answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spans: dict[str, list[tuple[float, float]]] = {}
        with stamped_server(load, processes, folder) as port:
            client = Stamps(folder, "client")

            def turn(what: str, is_stream: bool) -> None:
                began_s = time.perf_counter()
                ask_all(port, load.asked, is_stream, client)
                spans.setdefault(what, []).append((began_s, time.perf_counter()))

            turn(EARLY, False)
            _wait_for_programs(folder)
            for number in range(load.turns):
                for is_stream in (number % 2 == 1, number % 2 == 0):
                    turn(STREAM if is_stream else WHOLE, is_stream)
        return _summaries(folder, spans)


def _wait_for_programs(folder: Path) -> None:
    """Until none is left."""
    until_s = time.perf_counter() + LONGEST_MAKING_S
    time.sleep(QUIET_S)
    while time.perf_counter() < until_s:
        noted = stamps.read(folder)["engine"]
        made = noted[noted[:, 1] == Station.MADE, 0]
        if not len(made) or made[-1] < time.perf_counter() - QUIET_S:
            return
        time.sleep(QUIET_S)


def _summaries(
    folder: Path, spans: dict[str, list[tuple[float, float]]]
) -> dict[str, dict[str, Any]]:
    noted = stamps.read(folder)
    server = _events(np.concatenate([noted[r] for r in ("engine", "http") if r in noted]))
    found = {ALONE: summary(passages(server, _events(noted["alone"])))}
    client = _events(noted["client"])
    for what, turns in spans.items():
        own: list[Passage] = []
        for from_s, to_s in turns:
            own += passages(server, [one for one in client if from_s <= one[0] <= to_s])[1:]
        found[what] = summary(own)
    if not found[EARLY]["programs_made"]:
        del found[EARLY]
    return found


def _events(noted: np.ndarray[Any, np.dtype[np.float64]]) -> list[tuple[float, Station]]:
    ordered = noted[noted[:, 0].argsort(kind="stable")]
    return [(float(at_s), Station(int(station))) for at_s, station in ordered]


def measure_all(load: Load, processes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """One summary for each arrangement."""
    found: dict[str, dict[str, Any]] = {}
    for count in processes:
        for what, one in measure(load, count).items():
            found.setdefault(what if what == ALONE else f"{count} HTTP, {what}", one)
        say(f"{count} HTTP processes: done")
    return found


def rows_of(found: dict[str, dict[str, Any]], about: str) -> Iterator[Row]:
    """What is published."""
    for what, one in found.items():
        case = f"{about}, one client, {what}"
        yield Row(case, "ms of a request beyond decoding, median", one["beyond_ms"], None, None)
        yield Row(case, "ms from round to round, median", one["round_ms"], None, None)
