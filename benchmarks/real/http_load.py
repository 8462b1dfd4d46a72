"""A running server under an open-loop load: requests arrive regardless of earlier answers.

    python -m benchmarks.real.http_load                           # the bundled target, on a CPU
    python -m benchmarks.real.http_load --config configs/one_gpu.yaml --rates 8,32,96 \\
        --target runs/real/target --drafter runs/real/run/weights/1

A real ``serving launch`` process answers streaming completions of held-out Python and C. Arrivals
follow a Poisson process with a fixed seed, the same for both arms: ``off`` (every request asks for
plain decoding) and ``on`` (the policy decides). The arms take turns on one server.

Clients run in a few separate processes, each an asyncio loop with httpx. Their overhead is measured
in the same run: how late requests were sent, how late the loop woke for a timer, how much of a core
the busiest client used, and the total CPU time per event. If the lateness exceeds a few
milliseconds at the 99th percentile, or a core is saturated, the figures show the client's limits.

- Time to first token: from the moment a request was due, so a late client counts against us.
- Time between tokens: an event with n tokens, t after the previous one, counts as n waits of t / n.
- Tokens/s: over all answers, from the first arrival to the last token.

Writes ``benchmarks/results/http_load.json`` after every rate.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from benchmarks.harness.http_loop import Answer, Arrival, Ask, Client, arrivals, run_client
from benchmarks.harness.results import RESULTS, Out, say, write_result
from examples import corpus
from examples.clients import Server
from examples.demo import begin_server, log_of, wait_for_server
from examples.plan import DemoSettings
from examples.processes import Child, check_alive, stop, tail
from examples.run_folder import own_folder

Arm = Literal["off", "on"]
ARMS: tuple[Arm, ...] = ("off", "on")
DOMAINS: tuple[corpus.Domain, ...] = ("python", "c")
WARM_UP_S = 4.0
HEAD_START_S = 0.5
"""Seconds between submitting a turn to the clients and its start."""


# Figures


def between_tokens(answer: Answer) -> list[float]:
    """Seconds between tokens: each event's wait divided by its tokens, once per token."""
    waits: list[float] = []
    for (before_s, _), (at_s, count) in pairwise(answer.events):
        waits += [(at_s - before_s) / count] * count
    return waits


def spread_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median and 99th percentile in milliseconds; ``None`` if there are no values."""
    if not seconds:
        return None
    p50, p99 = np.quantile(np.asarray(seconds) * 1e3, (0.5, 0.99))
    return {"p50": float(p50), "p99": float(p99)}


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm under one load."""

    due: list[Arrival]
    clients: list[Client]
    seconds: float
    """Time from the first arrival to the last token."""

    @property
    def answers(self) -> list[Answer]:
        return [answer for client in self.clients for answer in client.answers]

    @property
    def answered(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is None]

    @property
    def num_tokens(self) -> int:
        return sum(count for answer in self.answered for _, count in answer.events)


def turn_of(parts: Sequence[Sequence[Arrival]], clients: list[Client]) -> Turn:
    """Combine what each client sent and received into a turn."""
    ends = [
        arrival.at_s + answer.events[-1][0]
        for part, client in zip(parts, clients, strict=True)
        for arrival, answer in zip(part, client.answers, strict=True)
        if answer.events
    ]
    due = sorted((a for part in parts for a in part), key=lambda a: a.at_s)
    seconds = max(ends) - due[0].at_s if ends else 0.0
    return Turn(due, clients, seconds)


def row_of(rate: float, arm: Arm, turns: Sequence[Turn]) -> dict[str, Any]:
    """One row of the result: all turns of one arm at one rate."""
    answers = [answer for turn in turns for answer in turn.answers]
    answered = [answer for turn in turns for answer in turn.answered]
    clients = [client for turn in turns for client in turn.clients]
    errors = Counter(a.error for a in answers if a.error is not None)
    speeds = [turn.num_tokens / turn.seconds for turn in turns if turn.seconds]
    num_events = sum(len(a.events) for a in answers)
    steps = [a.tokens_per_step for a in answered if a.tokens_per_step is not None]
    return {
        "rate": rate,
        "speculation": arm,
        "requests": len(answers),
        "failed": len(answers) - len(answered),
        "errors": dict(errors.most_common(3)),
        "tokens_per_s": statistics.median(speeds) if speeds else None,
        "first_token_ms": spread_ms([a.events[0][0] for a in answered if a.events]),
        "between_tokens_ms": spread_ms([w for a in answered for w in between_tokens(a)]),
        "request_ms": spread_ms([a.events[-1][0] for a in answered if a.events]),
        "tokens_per_event": _mean([n for a in answered for _, n in a.events]),
        "tokens_per_step": _mean(steps),
        "client": {
            "sent_late_ms": spread_ms([a.late_s for a in answers]),
            "timer_late_ms": spread_ms([t for c in clients for t in c.tick_late_s]),
            "busiest_cpu_share": max((c.cpu_s / c.wall_s for c in clients), default=None),
            "cpu_us_per_event": 1e6 * sum(c.cpu_s for c in clients) / num_events
            if num_events
            else None,
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# Command


@dataclass(frozen=True, slots=True)
class Plan:
    """The load."""

    rates: tuple[float, ...]
    """Requests per second."""
    seconds: float
    """Seconds of arrivals in one turn."""
    turns: int
    """Turns per arm and rate, after a warm-up turn."""
    max_tokens: int
    clients: int
    patience_s: float


@dataclass(frozen=True, slots=True)
class Stage:
    """Server, processes and prompts of a run."""

    server: Server
    children: list[Child]
    pool: ProcessPoolExecutor
    prompts: list[str]


def take_turn(stage: Stage, plan: Plan, arm: Arm, due: Sequence[Arrival]) -> Turn:
    """Distribute the arrivals over the clients, and wait for all answers."""
    check_alive(stage.children)
    draft = 0 if arm == "off" else None
    ask = Ask(stage.server.url, stage.server.model, plan.max_tokens, draft, plan.patience_s)
    parts = [due[number :: plan.clients] for number in range(plan.clients)]
    start_unix_s = time.time() + HEAD_START_S
    jobs = [stage.pool.submit(run_client, ask, part, start_unix_s) for part in parts]
    return turn_of(parts, [job.result() for job in jobs])


def measure(stage: Stage, plan: Plan, rate: float, until_s: float) -> list[dict[str, Any]]:
    """Rows of both arms at one rate; the arm that goes first alternates. No new turn starts after
    ``until_s``."""
    taken: dict[Arm, list[Turn]] = {arm: [] for arm in ARMS}
    for number in range(plan.turns + 1):
        if number > 1 and time.monotonic() > until_s:
            break
        length = plan.seconds if number else min(plan.seconds, WARM_UP_S)
        due = arrivals(rate, length, stage.prompts, seed=round(1000 * rate) + number)
        for arm in ARMS if number % 2 else ARMS[::-1]:
            turn = take_turn(stage, plan, arm, due) if due else None
            if number and turn is not None:
                taken[arm].append(turn)
    return [row_of(rate, arm, taken[arm]) for arm in ARMS]


def measure_all(
    stage: Stage, plan: Plan, out: Path, figures: dict[str, Any], until_s: float
) -> None:
    """Measure every rate within its share of the time; rows go into ``figures`` and the file."""
    for place, rate in enumerate(plan.rates):
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            figures["rows"].append({"rate": rate, "skipped": "no time left"})
            continue
        share_s = left_s / (len(plan.rates) - place)
        try:
            rows = measure(stage, plan, rate, time.monotonic() + share_s)
        except Exception as error:  # a rate's failure is a row of the result
            rows = [{"rate": rate, "error": f"{type(error).__name__}: {error}"}]
            say(traceback.format_exc())
        for row in rows:
            figures["rows"].append(row)
            say(json.dumps(row))
        write_result(out, figures)


def carry_out(
    settings: DemoSettings, plan: Plan, out: Path, figures: dict[str, Any], until_s: float
) -> None:
    """Start a server and the clients, send all requests, and stop everything."""
    began = time.monotonic()
    children: list[Child] = []
    context = multiprocessing.get_context("spawn")
    try:
        children.append(begin_server(settings))
        texts = [corpus.prompts(domain, 96, seed=23) for domain in DOMAINS]
        prompts = [text for pair in zip(*texts, strict=True) for text in pair]
        server = wait_for_server(settings, children)
        figures["server_start_s"] = time.monotonic() - began
        say(f"server ready after {figures['server_start_s']:.1f} s")
        with ProcessPoolExecutor(plan.clients, mp_context=context) as pool:
            list(pool.map(_begin, range(plan.clients)))
            stage = Stage(server, children, pool, prompts)
            measure_all(stage, plan, out, figures, until_s)
        figures["policy"] = server.policy()
    except Exception as error:  # what has been measured so far stays in the result
        figures["error"] = f"{type(error).__name__}: {error}"
        say(traceback.format_exc())
        log = log_of(settings, "server")
        say(tail(log) if log.is_file() else "the server has written no log")
    finally:
        stop(children)


def _begin(number: int) -> int:
    """Sleep long enough that each call starts a separate client process."""
    time.sleep(0.5)
    return number


def main(
    out: Out = RESULTS / "http_load.json",
    config: Annotated[Path, typer.Option(help="settings of the server")] = Path(
        "configs/demo.yaml"
    ),
    target: Annotated[Path | None, typer.Option(help="replaces the settings' target")] = None,
    drafter: Annotated[Path | None, typer.Option(help="bundle folder; likewise")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="server setting")] = None,
    rates: Annotated[str, typer.Option(help="requests per second, comma-separated")] = "0.5,1",
    seconds: Annotated[float, typer.Option(help="seconds of arrivals in one turn")] = 12.0,
    turns: Annotated[int, typer.Option(help="turns per arm and rate, after a warm-up turn")] = 2,
    max_tokens: int = 128,
    clients: Annotated[int, typer.Option(help="client processes")] = 4,
    patience_s: Annotated[float, typer.Option(help="wait after the last arrival")] = 20.0,
    budget_s: Annotated[float, typer.Option(help="no new turn starts after this")] = 240.0,
    run_dir: Annotated[
        Path, typer.Option(help="folder of the server; contents from an earlier run are deleted")
    ] = Path("runs/http_load"),
) -> None:
    """Start a server, put load on it at every rate, and write the result."""
    began = time.monotonic()
    # No training runs beside it, and plain decoding should not pay for capture.
    own = ["capture.enabled=false", "swap.enabled=false"]
    own += [f"target={target}"] if target else []
    own += [f"drafter.path={drafter}"] if drafter else []
    settings = DemoSettings((config,), run_dir, (*own, *(set_ or ())), start_s=300.0)
    numbers = tuple(float(rate) for rate in rates.split(","))
    plan = Plan(numbers, seconds, turns, max_tokens, clients, patience_s)
    figures: dict[str, Any] = {
        "target": target.name if target else "bundled",
        "config": str(config),
        "plan": asdict(plan),
        "rows": [],
    }
    with own_folder(run_dir):
        carry_out(settings, plan, out, figures, began + budget_s)
    figures["seconds"] = time.monotonic() - began
    write_result(out, figures)
    say(f"done in {figures['seconds']:.1f} s")


if __name__ == "__main__":
    typer.run(main)
