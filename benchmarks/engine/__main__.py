"""Engine performance on one GPU, with random weights at published shapes.

    python -m benchmarks.engine                            # every part but ``start``
    python -m benchmarks.engine --parts decode,idle --grid full
    python -m benchmarks.engine --parts policy,start --keep PREVIOUS_RESULT
    python -m benchmarks.engine --device cpu --shapes tiny --parts all    # try it without a GPU

Parts: ``decode``: plain decode steps against the memory floor. ``idle``: time the device is idle
between steps. ``forced``: K = 4 with 3 tokens per step, by forced acceptance
(``harness/predictable.py``). ``policy``: the policy against no drafter. ``swaps``: drafter swaps
under load. ``capture``: on against off. ``start``: start-up of a server's engine.

Requests are submitted to the real engine, and this process runs its steps, without HTTP. The
contexts of ``decode`` and ``idle`` are entered into the prefix cache without being computed: their
keys and values are random, and each request has its own pages.

Writes ``benchmarks/results/engine_speed.json`` after every row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from benchmarks.engine import capturing, decode, speculation, startup, swaps
from benchmarks.engine.decode import Grid
from benchmarks.engine.graphs import Replays
from benchmarks.harness.results import RESULTS, Out, Report, known
from benchmarks.harness.shapes import LARGE, SHAPES
from targets.load import pick_dtype

PARTS = ("decode", "idle", "forced", "policy", "swaps", "capture", "start")
_EXPECTED_S = {"forced": 30, "swaps": 60, "capture": 40, "policy": 90, "start": 60}
"""Seconds of the budget that must be left for a part to start."""
_IDLE_SHAPES = ("Qwen3-0.6B", "Qwen3-8B")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of all parts but ``decode``, ``idle`` and ``start``."""

    policy_batches: tuple[int, ...]
    num_turns: int
    """Turns per arm, after a warm-up turn."""
    num_swaps: int
    batch: int = 32
    """Batch of ``swaps`` and ``capture``."""
    context: int = 1024
    """Context of ``forced``."""
    num_prompt: int = 256
    """Prompt length of ``policy``."""
    max_tokens: int = 129
    """Answer length of ``policy`` and ``capture``."""


def _tiny(sizes: Sizes) -> Sizes:
    """Sizes for trying the benchmark on a CPU."""
    turns, swaps = min(sizes.num_turns, 2), min(sizes.num_swaps, 20)
    return Sizes((1, 4), turns, swaps, batch=4, context=64, num_prompt=64, max_tokens=24)


def _grid(shape: str, kind: str) -> Grid:
    if shape == "tiny":
        return Grid(decode.TINY, 4, (4, 128))
    cells = {"short": decode.SHORT, "full": decode.FULL}[kind]
    return Grid(cells, 40, (32, 2048) if shape in _IDLE_SHAPES else None)


def _works(
    report: Report, device: torch.device, replays: Replays, shape: str, sizes: Sizes
) -> dict[str, Callable[[], None]]:
    """The parts that are measured at one shape."""
    given, turns, batch = (report, device, shape), sizes.num_turns, sizes.batch
    lengths = sizes.num_prompt, sizes.max_tokens
    return {
        "forced": partial(speculation.measure_forced, *given, sizes.context, turns, replays),
        "policy": partial(
            speculation.measure_policy, *given, sizes.policy_batches, *lengths, turns
        ),
        "swaps": partial(swaps.measure, *given, batch, sizes.num_swaps, interval_s=0.02),
        "capture": partial(capturing.measure, *given, batch, sizes.max_tokens, turns),
        "start": partial(startup.measure, *given),
    }


def main(
    out: Out = RESULTS / "engine_speed.json",
    parts: Annotated[str, typer.Option(help="comma-separated, or all")] = ",".join(PARTS[:-1]),
    shapes: Annotated[str, typer.Option(help="for decode and idle; comma-separated, or all")] = (
        "Qwen3-0.6B,Qwen3-8B,Qwen3-1.7B,Llama-3.1-8B"
    ),
    drafted: Annotated[str, typer.Option(help="shape for the other parts")] = "Qwen3-8B",
    grid: Annotated[
        Literal["short", "full"], typer.Option(help="full: every batch at every context")
    ] = "short",
    batches: Annotated[str, typer.Option(help="batch sizes for policy")] = "1,8,32,64,128",
    num_turns: Annotated[int, typer.Option(help="turns per arm, after a warm-up turn")] = 3,
    num_swaps: Annotated[int, typer.Option(help="fewer if the budget runs out")] = 100,
    budget_s: Annotated[float, typer.Option(help="parts that do not fit are skipped")] = 540,
    keep: Annotated[
        Path | None, typer.Option(help="previous result whose other parts are kept")
    ] = None,
    device: str = "cuda",
) -> None:
    """Measure the chosen parts in order; ``decode`` and ``idle`` run first, together."""
    on = torch.device(device)
    chosen = known("parts", PARTS if parts == "all" else parts.split(","), PARTS)
    names = known("shapes", LARGE if shapes == "all" else shapes.split(","), SHAPES)
    sizes = Sizes(tuple(map(int, batches.split(","))), num_turns, num_swaps)
    if names == ["tiny"]:
        drafted, sizes = "tiny", _tiny(sizes)
    dtype = str(pick_dtype("auto", on)).removeprefix("torch.")
    report = Report(out, budget_s, {"dtype": dtype})
    if keep is not None:
        report.keep(json.loads(keep.read_text()), without=chosen)
    replays = Replays()
    with replays.installed():
        for shape in names if {"decode", "idle"} & set(chosen) else ():
            cells = _grid(shape, grid)
            work = partial(decode.measure, report, on, shape, cells, chosen, replays)
            report.attempt("decode", {"shape": shape}, 20, work)
        works = _works(report, on, replays, drafted, sizes)
        for name in chosen:
            if name in works:
                report.attempt(name, {"shape": drafted}, _EXPECTED_S[name], works[name])


if __name__ == "__main__":
    typer.run(main)
