"""Every arm at several numbers of clients and temperatures, with the weights of a finished demo.

    python -m benchmarks.demo --target real --run-dir runs/bench_real    # on the GPU; six minutes
    python -m benchmarks.real.cells --run-dir runs/bench_real/0

Starts the demo's server on the run's folder, without a trainer, and lets the arms of
``examples/arms.py`` answer held-out prompts of each domain in turn, through HTTP. All its programs
are made before it is ready. Before the turns at a temperature, live requests of each domain fill
the index over recent traffic. A turn is ``--block`` prompts for each client, so that most of it
runs with all clients busy; at its end fewer and fewer are, and ``busy_clients`` says how many were
on average. Tokens per second are thus fewer than those of an engine whose batch is kept full. Arms
rotate, and in a pass all answer the same prompts with the same seeds. A figure is the median over
the passes of an arm's tokens per second relative to another's of the same pass.

Writes ``cells.json`` and rows of ``rows/learning.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.harness.demos import FROM_FIRST, recording_of
from benchmarks.harness.results import RESULTS, Out, Row, at_least, say, write_result, write_rows
from examples.arms import ALL_ARMS, Arm, setups
from examples.clients import Replayer, Server, Traffic, Turn
from examples.demo import begin_server, gather_texts, wait_for_server
from examples.plan import DemoSettings, real_settings, with_seed
from examples.processes import Child, stop
from examples.recording import Replay
from examples.report import mismatched_outputs, tokens_per_s, tokens_per_step
from examples.texts import Texts

SOURCE = "python -m benchmarks.real.cells"
OVER_STATIC = {1: 1.25, 8: 1.25, 32: 1.15}
"""Goals at a temperature of 0.7, by the number of clients."""
OVER_PLAIN = {0.7: {1: 1.3, 8: 1.3, 32: 1.35}, 0.0: {1: 1.5, 8: 1.45, 32: 1.5}}
LEAST_OVER_PLAIN = {0.7: 1.1, 0.0: 1.2}
"""Goals of the worst domain."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of clients at one temperature."""

    temperature: float
    clients: int

    @property
    def name(self) -> str:
        return f"{self.clients} clients, temperature {self.temperature:g}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A running server and what to ask it."""

    server: Server
    settings: DemoSettings
    texts: Texts
    versions: tuple[int, int]
    """Static and newest version."""
    shifted: tuple[str, ...]
    """Domains that the static weights were not trained on."""

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(phase.domain for phase in self.settings.phases))


def turns_of(prompts: range, rotation: int) -> Iterator[Turn]:
    """A turn of every arm on the same prompts, beginning with another arm in each rotation."""
    for place in range(len(ALL_ARMS)):
        yield Turn(ALL_ARMS[(rotation + place) % len(ALL_ARMS)], tuple(prompts))


def fill_index(stage: Stage, temperature: float, seconds: float) -> int:
    """Live requests of every domain, for ``seconds`` each; returns how many were answered."""
    answered: list[Any] = []
    for phase in {p.domain: p for p in stage.settings.phases}.values():
        traffic = Traffic(
            stage.server,
            stage.texts.live[phase.name],
            stage.settings.num_clients,
            replace(stage.settings.sampling, temperature=temperature),
            lambda _, reply: answered.append(reply),
        )
        traffic.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until and not traffic.is_over():
            time.sleep(0.05)
        traffic.stop()
    return len(answered)


def take_pass(
    stage: Stage, cell: Cell, replayer: Replayer, number: int, block: int
) -> list[Replay]:
    """One turn of every arm on every domain."""
    found = []
    for place, domain in enumerate(stage.domains):
        prompts = stage.texts.held_out[domain]
        count = min(block * cell.clients, len(prompts))
        start = (number * count) % (len(prompts) - count + 1)
        for turn in turns_of(range(start, start + count), number + place):
            found += replayer.take(domain, turn, prompts, stage.texts.warmup[domain])
    return found


def measure(stage: Stage, cell: Cell, passes: int, block: int, until: float) -> dict[str, Any]:
    """All passes of one cell; at least one, then as many as fit into the time."""
    done: list[list[Replay]] = []
    failures: list[str] = []
    for number in range(passes):
        began = time.monotonic()
        replayer = Replayer(
            stage.server,
            setups(stage.server.drafter()["drafters"], *stage.versions),
            replace(stage.settings.sampling, temperature=cell.temperature, seed=number),
            num_clients=cell.clients,
            num_warmup=0 if number else 2 * cell.clients,
        )
        done.append(take_pass(stage, cell, replayer, number, block))
        failures += replayer.failures
        say(f"{cell.name}, pass {number}: " + told(figures_of(done[-1:], stage)))
        if time.monotonic() + (time.monotonic() - began) > until:
            break
    return {
        "temperature": cell.temperature,
        "clients": cell.clients,
        "passes": len(done),
        "failed_requests": len(failures),
        "failures": failures[:3],
        "mismatched_outputs": sum(mismatched_outputs(replays) for replays in done),
        "requests": sum(len(replays) for replays in done),
        "busy_clients": busy_clients([replay for replays in done for replay in replays]),
        "by_domain": figures_of(done, stage),
    }


def figures_of(passes: Sequence[Sequence[Replay]], stage: Stage) -> dict[str, dict[str, Any]]:
    """Figures of every domain, of the shifted ones together and of all."""
    groups: dict[str, tuple[str, ...]] = {domain: (domain,) for domain in stage.domains}
    groups |= {"shifted": stage.shifted, "all": tuple(stage.domains)}
    return {
        name: group_figures([[r for r in p if r.domain in members] for p in passes])
        for name, members in groups.items()
    }


def group_figures(passes: Sequence[Sequence[Replay]]) -> dict[str, Any]:
    """Speeds of the arms relative to plain decoding, and of tuned relative to static."""

    def of(replays: Sequence[Replay], arm: Arm) -> list[Replay]:
        return [replay for replay in replays if replay.arm == arm]

    def median_ratio(arm: Arm, base: Arm) -> float | None:
        pairs = [(tokens_per_s(of(p, arm)), tokens_per_s(of(p, base))) for p in passes]
        known = [a / b for a, b in pairs if a is not None and b]
        return statistics.median(known) if known else None

    together = [replay for replays in passes for replay in replays]
    return {
        "vs_plain": {arm: median_ratio(arm, "plain") for arm in ALL_ARMS},
        "tuned_over_static": median_ratio("tuned", "static"),
        "tuned_over_drafter_alone": median_ratio("tuned", "drafter_alone_tuned"),
        "tokens_per_s": {arm: tokens_per_s(of(together, arm)) for arm in ALL_ARMS},
        "tokens_per_step": {arm: tokens_per_step(of(together, arm)) for arm in ALL_ARMS},
    }


def busy_clients(replays: Sequence[Replay]) -> dict[str, float | None]:
    """Mean number of requests in flight over the turns of each arm."""
    waited_s, took_s = dict.fromkeys(ALL_ARMS, 0.0), dict.fromkeys(ALL_ARMS, 0.0)
    for replay in replays:
        waited_s[replay.arm] += replay.request_s
        took_s[replay.arm] += replay.share_s
    return {arm: waited_s[arm] / took_s[arm] if took_s[arm] else None for arm in ALL_ARMS}


def told(figures: dict[str, dict[str, Any]]) -> str:
    """One line for the terminal."""
    parts = []
    for name, group in figures.items():
        ratios = " ".join(f"{v:.2f}" for v in group["vs_plain"].values() if v is not None)
        parts.append(f"{name} {ratios}")
    return f"({', '.join(ALL_ARMS)}) ÷ plain | " + " | ".join(parts)


def rows_of(cells: Sequence[dict[str, Any]], domains: Sequence[str]) -> list[Row]:
    """The claims, with their goals."""
    rows = []
    for cell in cells:
        temperature, clients = cell["temperature"], cell["clients"]
        about = Cell(temperature, clients).name + ", held-out prompts"
        groups = cell["by_domain"]
        static = OVER_STATIC.get(clients) if temperature == 0.7 else None
        plain = OVER_PLAIN.get(temperature, {}).get(clients)
        worst = min(
            (v for d in domains if (v := groups[d]["vs_plain"]["tuned"]) is not None), default=None
        )
        over_static = groups["shifted"]["tuned_over_static"]
        over_plain = groups["all"]["vs_plain"]["tuned"]
        rows += [
            at_least(about, "tuned over static, tokens/s, shifted domains", over_static, static),
            at_least(about, "tuned over plain, tokens/s, all domains", over_plain, plain),
            at_least(
                about,
                "tuned over plain, tokens/s, worst domain",
                worst,
                LEAST_OVER_PLAIN.get(temperature),
            ),
        ]
    return rows


def carry_out(
    settings: DemoSettings,
    children: list[Child],
    cells: Sequence[Cell],
    *,
    passes: int,
    block: int,
    fill_s: float,
    until: float,
    out: Path,
) -> None:
    """Start the server and measure all cells; writes what is known after each."""
    recording = recording_of(settings.run_dir)
    children.append(begin_server(settings))
    texts = gather_texts(settings)
    by_phase = {phase.name: phase.domain for phase in settings.phases}
    stage = Stage(
        wait_for_server(settings, children),
        settings,
        texts,
        (recording["static_version"], recording["newest_version"]),
        # A phase of all domains at once, as a demo in both orders has, is not of this plan.
        tuple(by_phase[name] for name in recording["shifted"] if name in by_phase),
    )
    say(f"server ready; versions {stage.versions}")
    figures: dict[str, Any] = {"run": {"versions": stage.versions}, "cells": []}
    filled: set[float] = set()
    for number, cell in enumerate(cells):
        if cell.temperature not in filled:
            filled.add(cell.temperature)
            live = fill_index(stage, cell.temperature, fill_s)
            say(f"{live} live requests at temperature {cell.temperature:g}")
        share_s = (until - time.monotonic()) / (len(cells) - number)
        ends = time.monotonic() + share_s
        figures["cells"].append(measure(stage, cell, passes, block, ends))
        write_result(out, figures)
        write_rows("learning", rows_of(figures["cells"], stage.domains), SOURCE, out.parent)


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of a finished demo")],
    out: Out = RESULTS / "cells.json",
    target: Literal["bundled", "real"] = "real",
    seed: Annotated[int, typer.Option(help="of the finished demo")] = 0,
    clients: str = "1,8,32",
    temperatures: str = "0.7,0",
    passes: int = 5,
    block: Annotated[int, typer.Option(help="prompts for each client in a turn")] = 8,
    fill_s: Annotated[float, typer.Option(help="live traffic of each domain before")] = 4.0,
    budget_s: Annotated[float, typer.Option(help="seconds in all")] = 540.0,
    chosen: Annotated[list[str] | None, typer.Option("--set", help="setting=value")] = None,
) -> None:
    """Compare all arms, at each number of clients and temperature."""
    until = time.monotonic() + budget_s
    settings = with_seed(real_settings() if target == "real" else DemoSettings(), seed)
    own = (FROM_FIRST, "trainer.keep_versions=1000")
    overrides = (*settings.overrides, *own, *(chosen or []))
    cells = [Cell(float(t), int(c)) for t in temperatures.split(",") for c in clients.split(",")]
    children: list[Child] = []
    (run_dir / "server.json").unlink(missing_ok=True)
    try:
        carry_out(
            replace(settings, run_dir=run_dir, overrides=overrides),
            children,
            cells,
            passes=passes,
            block=block,
            fill_s=fill_s,
            until=until,
            out=out,
        )
    finally:
        stop(children)


if __name__ == "__main__":
    typer.run(main)
