"""Tokens/s and gaps between events through HTTP, against the engine alone."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.border.servers import BenchServer, bench_server
from benchmarks.harness.results import Row, at_least, at_most, say
from benchmarks.harness.streams import stream

WARM_S = 2.0
"""All streams are open for so long before anything is counted."""
PROMPT_TOKENS = 32
STREAM_TOKENS = 192
"""Tokens of each request; the next one follows at once."""
CLIENTS_EACH = 32
"""Streams of one client process, so that clients are not the limit."""
ALONE = "engine alone"


@dataclass(frozen=True, slots=True)
class Load:
    """What every arrangement is asked."""

    settings: tuple[str, ...]
    vocab_size: int
    seconds: float
    max_draft: int | None
    """0: plain decoding; ``None``: the policy decides."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn."""

    tokens_per_s: float
    gaps_s: tuple[float, ...]
    """Between events of a stream; none without HTTP."""


def measure(
    load: Load, clients: Sequence[int], processes: Sequence[int], turns: int
) -> list[dict[str, Any]]:
    """One row for each number of clients and arrangement, the arrangements in turn."""
    names = [ALONE, *(f"{count} HTTP processes" for count in processes)]
    found: dict[tuple[str, int], list[Measured]] = {}
    for turn in range(turns):
        for name, count in zip(names, (None, *processes), strict=True):
            answers = _alone(load, clients) if count is None else _http(load, clients, count)
            for num, measured in zip(clients, answers, strict=True):
                found.setdefault((name, num), []).append(measured)
                say(
                    f"turn {turn + 1}, {name}, {num} clients: {measured.tokens_per_s:,.0f} tokens/s"
                )
    return [_row(name, num, found) for num in clients for name in names]


def _row(name: str, clients: int, found: dict[tuple[str, int], list[Measured]]) -> dict[str, Any]:
    turns, alone = found[name, clients], found[ALONE, clients]
    speeds = [turn.tokens_per_s for turn in turns]
    shares = [
        one.tokens_per_s / other.tokens_per_s for one, other in zip(turns, alone, strict=True)
    ]
    tails = [_p99_of_median(turn.gaps_s) for turn in turns if turn.gaps_s]
    return {
        "arrangement": name,
        "clients": clients,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_of_turns": speeds,
        "share_of_engine_alone": statistics.median(shares),
        "p99_of_median_gap": statistics.median(tails) if tails else None,
        "median_gap_ms": 1e3 * statistics.median(itertools.chain(*(t.gaps_s for t in turns)))
        if tails
        else None,
    }


def _p99_of_median(gaps_s: Iterable[float]) -> float:
    gaps = np.array(list(gaps_s))
    return float(np.quantile(gaps, 0.99) / np.median(gaps))


# ---- the engine alone ---------------------------------------------------------------------------


def _alone(load: Load, clients: Sequence[int]) -> list[Measured]:
    """In a process of its own, so that each turn begins alike."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool, tempfile.TemporaryDirectory() as name:
        return pool.submit(_engine_turns, load, tuple(clients), name).result()


def _engine_turns(load: Load, clients: tuple[int, ...], folder: str) -> list[Measured]:
    from benchmarks.harness.loops import Feed, random_prompts
    from configs.load import load_settings
    from serving.build import build_service
    from serving.requests import Request
    from serving.sampling import SamplingParams

    settings = load_settings((), (*load.settings, f"run_dir={folder}/run"), {})
    service = build_service(settings)
    prompts = random_prompts(64, PROMPT_TOKENS, load.vocab_size)
    sampling = SamplingParams(temperature=0.0, max_tokens=STREAM_TOKENS, ignore_eos=True)
    measured: list[Measured] = []
    for num in clients:
        requests = (
            Request(f"{num}-{number}", prompt, sampling, max_draft=load.max_draft, capture=False)
            for number, prompt in enumerate(itertools.cycle(prompts))
        )
        feed = Feed(service.engine, requests, num)
        feed.run(WARM_S)
        window = feed.run(load.seconds)
        feed.stop()
        measured.append(Measured(window.num_tokens / window.seconds, ()))
    return measured


# ---- through HTTP -------------------------------------------------------------------------------


def _http(load: Load, clients: Sequence[int], processes: int) -> list[Measured]:
    settings = (*load.settings, f"server.processes={processes}")
    with tempfile.TemporaryDirectory() as name, bench_server(Path(name), settings) as server:
        return [_streams(load, server, num) for num in clients]


def _streams(load: Load, server: BenchServer, num: int) -> Measured:
    parts = [min(CLIENTS_EACH, num - start) for start in range(0, num, CLIENTS_EACH)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(parts), context) as pool, tempfile.TemporaryDirectory() as name:
        stop = Path(name) / "stop"
        jobs = [
            pool.submit(run_clients, server.port, load, part, seed, stop)
            for seed, part in enumerate(parts)
        ]
        try:
            _wait_for_all(server, num, jobs)
            time.sleep(WARM_S)
            begin_s, before, from_s = time.time(), server.metrics(), time.perf_counter()
            time.sleep(load.seconds)
            after, to_s, end_s = server.metrics(), time.perf_counter(), time.time()
        finally:
            stop.touch()
        timed = [one for job in jobs for one in job.result()]
    tokens = after["generation_tokens_total"] - before["generation_tokens_total"]
    gaps = tuple(gap for at_s, gap in timed if begin_s <= at_s < end_s)
    return Measured(tokens / (to_s - from_s), gaps)


def _wait_for_all(server: BenchServer, num: int, jobs: Sequence[Future[Any]]) -> None:
    """Wait until all streams are open.

    Raises:
        Exception: that of a client that failed.
    """
    while True:
        found = server.metrics()
        if found["num_requests_running"] + found["num_requests_waiting"] >= num:
            return
        for job in jobs:
            if job.done():
                job.result()
        time.sleep(0.05)


def run_clients(
    port: int, load: Load, num: int, seed: int, stop: Path
) -> list[tuple[float, float]]:
    """Keep so many streams open until the file ``stop`` is there.

    Returns:
        (Unix time, gap) in seconds, for every event of a stream but its first.
    """
    numbers = np.random.default_rng(seed)
    prompts = numbers.integers(0, load.vocab_size, (num, PROMPT_TOKENS)).tolist()
    body = {
        "max_tokens": STREAM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "capture": False,
        "speculation": {"max_draft": load.max_draft},
    }
    gaps: list[tuple[float, float]] = []

    async def run() -> None:
        each = (
            itertools.repeat(("/v1/completions", {"prompt": prompt, **body})) for prompt in prompts
        )
        await asyncio.gather(*(stream(port, asked, stop.exists, gaps) for asked in each))

    asyncio.run(run())
    return gaps


def rows_of(found: list[dict[str, Any]], about: str) -> list[Row]:
    """The claims of a run."""
    rows: list[Row] = []
    for row in found:
        if row["arrangement"] == ALONE:
            continue
        name = f"{about}, {row['arrangement']}, {row['clients']} clients"
        rows.append(
            at_least(name, "tokens/s of the engine alone", row["share_of_engine_alone"], 0.95)
        )
        rows.append(
            at_most(
                name, "p99 of a gap between events over its median", row["p99_of_median_gap"], 3
            )
        )
    return rows
