"""A drafter of no use against no drafts at all, through HTTP: what speculation costs where it
cannot pay.

    python -m benchmarks.real.floor --run-dir runs/real/floor                      # on a GPU
    python -m benchmarks.real.floor --run-dir runs/floor --target bundled          # on two cores

Starts the demo's server without a trainer on a new folder, so that its drafter has random weights.
Chat requests of all domains keep a number of clients busy, and are answered by two arms in turn on
this server: without drafts, and with all that the server has (its drafter, the index over recent
traffic, the policy). Clients go from one arm to the other between two requests; a window begins
when those of the former arm are answered. A figure is the median, over pairs of adjacent windows,
of the tokens per second with the policy relative to those without drafts. With ``--drafters``, only
the drafters named may draft, so that an index that pays does not hide what a useless drafter costs.
Afterwards, beside the clients, four streams measure the gaps between the events of an answer.

Writes ``floor.json`` and ``rows/floor.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.border.servers import BenchServer
from benchmarks.harness.demos import FROM_FIRST
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    at_most,
    say,
    write_result,
    write_rows,
)
from benchmarks.harness.streams import Streams
from benchmarks.real.cells import Cell
from benchmarks.real.sharing import NUM_STREAMS, asked, median_percentile_ms
from examples.arms import Setup
from examples.clients import Sampling, Server
from examples.connections import RequestError
from examples.demo import begin_server, gather_texts, wait_for_server
from examples.plan import DemoSettings, real_settings, with_seed
from examples.processes import Child, stop
from examples.traffic.prompts import Prompt

SOURCE = "python -m benchmarks.real.floor"
GOAL = 0.985
GAP_GOAL, GAP_CLIENTS = 3.0, 64
"""Largest p99 of the gap between two events relative to its median, wanted at so many clients."""
CLIENTS_EACH = 16
"""Clients of one process, so that clients are not the limit."""
PLAIN, POLICY = 0, 1
"""The arms; an arm is a number that processes share."""
OVER = -1


@dataclass(frozen=True, slots=True)
class Window:
    """One arm for some seconds."""

    tokens_per_s: float
    tokens_per_step: float | None
    """Of each request; ``None`` where nothing was decoded."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one process of clients does."""

    run_dir: Path
    prompts: tuple[Prompt, ...]
    clients: int
    sampling: Sampling
    setups: tuple[Setup, Setup | None]
    """Of the two arms; ``None`` leaves it to the server."""


_arm: Any = None
"""In a process of clients: the arm that new requests take."""


def _share(arm: Any) -> None:
    global _arm
    _arm = arm


def run_clients(task: Task) -> list[str]:
    """Send one prompt after another from each client until the arm is ``OVER``.

    Returns:
        What failed.
    """
    server = Server(task.run_dir / "server.json")
    failures: list[str] = []

    def run(first: int) -> None:
        number = first
        while (arm := _arm.value) != OVER:
            prompt = task.prompts[number % len(task.prompts)]
            number += task.clients
            try:
                server.ask(prompt, task.sampling, task.setups[arm])
            except RequestError as error:
                failures.append(str(error))
                time.sleep(0.5)  # do not flood a server that is down

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(task.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@contextmanager
def clients_at_work(tasks: Sequence[Task], arm: Any) -> Iterator[list[Future[list[str]]]]:
    """All clients, until the block ends."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(tasks), context, _share, (arm,)) as pool:
        jobs = [pool.submit(run_clients, task) for task in tasks]
        try:
            yield jobs
        finally:
            arm.value = OVER


def take_window(server: BenchServer, seconds: float) -> Window:
    """What the server decodes in this time."""
    before, from_s = server.metrics(), time.perf_counter()
    time.sleep(seconds)
    after, to_s = server.metrics(), time.perf_counter()
    tokens = after["generation_tokens_total"] - before["generation_tokens_total"]
    name = "spec_decode_num_accepted_tokens_total"
    own = tokens - (after[name] - before[name])  # each pass of the target adds one of its own
    return Window(tokens / (to_s - from_s), tokens / own if own else None)


def measure(
    server: BenchServer,
    cell: Cell,
    tasks: Sequence[Task],
    streams: Streams,
    *,
    pairs: int,
    window_s: float,
    settle_s: float,
) -> dict[str, Any]:
    """All windows of a cell."""
    arm = multiprocessing.get_context("spawn").Value("i", POLICY)
    found: dict[int, list[Window]] = {PLAIN: [], POLICY: []}
    with clients_at_work(tasks, arm) as jobs:
        time.sleep(3.0 + settle_s)  # processes begin, and the policy learns this load
        for pair in range(pairs):
            for which in (PLAIN, POLICY) if pair % 2 else (POLICY, PLAIN):
                arm.value = which
                time.sleep(settle_s)
                found[which].append(take_window(server, window_s))
            for job in jobs:
                if job.done():
                    job.result()
        arm.value = POLICY  # streams never ask for plain decoding, so they have a time of their own
        time.sleep(settle_s)
        streams.start()
        time.sleep(settle_s)
        began_s = time.time()
        time.sleep(window_s)
        gaps = streams.gaps(began_s, time.time())
        streams.stop()
    failures = [failure for job in jobs for failure in job.result()]
    if not all(window.tokens_per_s for windows in found.values() for window in windows):
        raise RuntimeError(
            f"{cell.name}: nothing was decoded; {failures[:1] or 'no request failed'}"
        )
    ratios = [b.tokens_per_s / a.tokens_per_s for a, b in zip(*found.values(), strict=True)]
    return {
        "clients": cell.clients,
        "temperature": cell.temperature,
        "policy_over_plain": statistics.median(ratios),
        "ratios": ratios,
        "plain_tokens_per_s": statistics.median(w.tokens_per_s for w in found[PLAIN]),
        "tokens_per_step": [w.tokens_per_step for w in found[POLICY]],
        "gap_ms": {f"p{q}": median_percentile_ms([gaps], q) for q in (50, 99)},
        "num_gaps": len(gaps),
        "failed_requests": len(failures),
        "failures": failures[:3],
    }


def tasks_of(
    settings: DemoSettings, prompts: Sequence[Prompt], cell: Cell, drafters: tuple[str, ...]
) -> list[Task]:
    """The clients of a cell, each process with prompts of its own."""
    counts = [
        min(CLIENTS_EACH, cell.clients - start) for start in range(0, cell.clients, CLIENTS_EACH)
    ]
    sampling = replace(settings.sampling, temperature=cell.temperature)
    return [
        Task(
            settings.run_dir,
            tuple(prompts[place :: len(counts)]),
            count,
            sampling,
            (Setup((), None), Setup(drafters, None) if drafters else None),
        )
        for place, count in enumerate(counts)
    ]


def mixed_prompts(settings: DemoSettings) -> list[Prompt]:
    """Prompts of all domains in turn."""
    live = list(gather_texts(settings).live.values())
    return [found[number] for number in range(min(map(len, live))) for found in live]


def rows_of(cells: Sequence[dict[str, Any]], about: str) -> list[Row]:
    """The claims, with their goals."""
    rows = []
    for cell in cells:
        name = f"{about}, {Cell(cell['temperature'], cell['clients']).name}"
        measure = "tokens/s, policy with a drafter of random weights over no drafts, through HTTP"
        rows.append(at_least(name, measure, cell["policy_over_plain"], GOAL))
        gap = cell.get("gap_ms")
        if gap and gap["p50"]:
            wanted = GAP_GOAL if cell["clients"] == GAP_CLIENTS else None
            measure = "p99 of the gap between two events of a stream over its median, drafting on"
            rows.append(at_most(name, measure, gap["p99"] / gap["p50"], wanted))
    return rows


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the run, the benchmark's own")],
    out: Out = RESULTS / "floor.json",
    target: Literal["bundled", "real"] = "real",
    drafters: Annotated[str, typer.Option(help="that may draft, separated by commas")] = "",
    clients: str = "1,8,32,64,128",
    temperatures: str = "0,0.7,1",
    pairs: int = 5,
    window_s: Annotated[float, typer.Option(help="seconds of a window")] = 2.0,
    settle_s: Annotated[float, typer.Option(help="from one arm to the other")] = 0.7,
    budget_s: Annotated[float, typer.Option(help="seconds in all")] = 580.0,
    seed: int = 0,
    chosen: Annotated[list[str] | None, typer.Option("--set", help="setting=value")] = None,
) -> None:
    """Compare both arms at each number of clients and temperature."""
    until = time.monotonic() + budget_s
    base = with_seed(real_settings() if target == "real" else DemoSettings(), seed)
    cells = [Cell(float(t), int(c)) for t in temperatures.split(",") for c in clients.split(",")]
    most = max(cell.clients for cell in cells)
    settings = replace(
        base,
        run_dir=run_dir,
        overrides=(
            *base.overrides,
            FROM_FIRST,
            "drafter.init=random",
            f"engine.max_batch={most}",
            f"engine.max_queue={4 * most}",
            *(chosen or []),
        ),
    )
    children: list[Child] = []
    figures: dict[str, Any] = {"settings": settings.overrides, "drafters": drafters, "cells": []}
    try:
        children.append(begin_server(settings))
        prompts = mixed_prompts(settings)
        ready = wait_for_server(settings, children)
        kinds = tuple(filter(None, drafters.split(",")))
        server = BenchServer(children[0], ready.url, ready.model)
        say(f"server ready; may draft: {', '.join(kinds) or 'what the server has'}")
        streamed = asked(ready.model, prompts, settings)
        for cell in cells:
            if time.monotonic() + 3.0 + (2 * pairs + 1) * (settle_s + window_s) > until:
                say(f"no time left for {cell.name}")
                continue
            tasks = tasks_of(settings, prompts, cell, kinds)
            streams = Streams(ready.url, streamed, NUM_STREAMS)
            found = measure(
                server, cell, tasks, streams, pairs=pairs, window_s=window_s, settle_s=settle_s
            )
            figures["cells"].append(found)
            say(
                f"{cell.name}: {found['policy_over_plain']:.3f} of "
                f"{found['plain_tokens_per_s']:,.0f} tokens/s; {found['ratios']}"
            )
            write_result(out, figures)
            about = "SmolLM2-135M" if target == "real" else "bundled target"
            write_rows("floor", rows_of(figures["cells"], about), SOURCE)
    finally:
        stop(children)


if __name__ == "__main__":
    typer.run(main)
