"""What the engine reaches on one GPU, with random weights at published shapes.

    python -m benchmarks.engine                            # every part but ``start``
    python -m benchmarks.engine --parts decode,idle --grid full
    python -m benchmarks.engine --parts start
    python -m benchmarks.engine --device cpu --shapes tiny --parts all    # a try without a GPU

Parts: ``decode`` plain decode steps beside the memory floor; ``idle`` time of the device between
steps; ``forced`` K = 4 with 3 tokens a step, synthetic; ``policy`` the policy against no drafter;
``swaps`` of a drafter under load; ``capture`` on against off; ``start`` of a server's engine.

All through the real engine: requests are submitted, steps are taken, programs are CUDA graphs. The
contexts of ``decode`` and ``idle`` are declared to the prefix cache instead of computed; their keys
and values are random, in pages of their own for each request. HTTP is no part of it.

Writes ``benchmarks/results/engine_speed.json`` after every row.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.engine import capturing, decode, speculation, startup, swaps
from benchmarks.engine.decode import Grid
from benchmarks.engine.engines import SHAPES, Place
from benchmarks.engine.graphs import Replays
from benchmarks.engine.report import Report

PARTS = ("decode", "idle", "forced", "policy", "swaps", "capture", "start")
_EXPECTED_S = {"forced": 30, "swaps": 60, "capture": 40, "policy": 90, "start": 60}
"""Seconds that must be left when a part begins."""
TINY = Grid(decode.TINY, 4, (4, 128))
_IDLE_SHAPES = ("Qwen3-0.6B", "Qwen3-8B")


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/engine_speed.json"
    ),
    parts: Annotated[str, typer.Option(help="names by commas, or all")] = ",".join(PARTS[:-1]),
    shapes: Annotated[str, typer.Option(help="of decode and idle; by commas, or all")] = (
        "Qwen3-0.6B,Qwen3-8B,Qwen3-1.7B,Llama-3.1-8B"
    ),
    drafted: Annotated[str, typer.Option(help="shape of the other parts")] = "Qwen3-8B",
    grid: Annotated[
        str, typer.Option(help="short, or full: all batches by all contexts")
    ] = "short",
    batches: Annotated[str, typer.Option(help="of policy")] = "1,8,32,64,128",
    num_turns: Annotated[int, typer.Option(help="of each arm, after one that warms up")] = 5,
    num_swaps: int = 1000,
    budget_s: Annotated[float, typer.Option(help="what does not fit is skipped, and said")] = 540,
    from_disk: Annotated[bool, typer.Option(help="start: write and load the target")] = False,
    device: str = "cuda",
) -> None:
    """Measure the chosen parts, one after another."""
    place = Place(torch.device(device))
    chosen = PARTS if parts == "all" else tuple(parts.split(","))
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    names = [n for n in SHAPES if n != "tiny"] if shapes == "all" else shapes.split(",")
    if unknown := {*names, drafted} - set(SHAPES):
        raise typer.BadParameter(f"unknown shapes {sorted(unknown)}; known: {', '.join(SHAPES)}")
    is_try = names == ["tiny"]
    if is_try:
        drafted, batches = "tiny", "1,4"
        num_swaps, num_turns = min(num_swaps, 20), min(num_turns, 2)
    sizes = [int(size) for size in batches.split(",")]
    report = Report(out, budget_s, {"dtype": str(place.dtype).removeprefix("torch.")})
    replays = Replays()

    num_prompt, max_tokens = (64, 24) if is_try else (256, 129)
    batch, context = (4, 64) if is_try else (32, 1024)
    wide = decode.FULL if grid == "full" else decode.SHORT

    def plain(shape: str) -> None:
        grid = Grid(wide, 40, (32, 2048) if shape in _IDLE_SHAPES else None)
        decode.measure(report, place, shape, TINY if is_try else grid, chosen, replays)

    def forced() -> None:
        speculation.measure_forced(report, place, drafted, context, num_turns, replays)

    def swap() -> None:
        swaps.measure(report, place, drafted, batch, num_swaps, 0.02)

    def capture() -> None:
        capturing.measure(report, place, drafted, batch, max_tokens, num_turns)

    def policy() -> None:
        speculation.measure_policy(report, place, drafted, sizes, num_prompt, max_tokens, num_turns)

    def start() -> None:
        startup.measure(report, place, drafted, from_disk, timeout_s=400)

    works = {"forced": forced, "swaps": swap, "capture": capture, "policy": policy, "start": start}
    with replays.installed():
        for shape in names if {"decode", "idle"} & set(chosen) else ():
            report.attempt("decode", {"shape": shape}, 20, partial(plain, shape))
        for name in chosen:
            if name in works:
                report.attempt(name, {"shape": drafted}, _EXPECTED_S[name], works[name])


if __name__ == "__main__":
    typer.run(main)
