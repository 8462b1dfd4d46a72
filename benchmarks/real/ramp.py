"""The policy on a ramp of load, against every single K kept throughout.

    python -m benchmarks.real.choosing --run-dir runs/real/choosing    # trains the drafter first
    python -m benchmarks.real.ramp --run-dir runs/real/choosing

Chat requests of four domains in turn keep 1, 4, 16, 64, 256, and then again 64, 16, 4, 1 requests
decoding, in the engine's own loop, without HTTP. Every arm climbs the whole ramp before the next
one does, with a policy of its own that goes on from ramp to ramp; arms take turns in rotating
order. A stage's figure is the arm's tokens per second relative to plain decoding on the same stage
of the same turn, that of a ramp the geometric mean over its stages, so that each load counts
alike, and that of an arm the median over turns.

Writes ``ramp.json`` and ``rows/ramp.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.engines import build
from benchmarks.harness.results import RESULTS, Out, Row, at_least, say, write_result, write_rows
from benchmarks.real.choosing import (
    ALONE,
    ARM_DOMAINS,
    MAX_DRAFT,
    PLAIN,
    TUNED,
    Arm,
    Traffic,
    arms_of,
    prompt_ids,
    settings_for,
    take_turn,
)
from examples.traffic.chat import chat_prompts
from serving.profile import profile_steps
from targets.find import target_folder
from targets.tokenizer import load_tokenizer

SOURCE = "python -m benchmarks.real.ramp"
GOAL = 1.10
SHORTEST_S = 0.4
"""Of a stage."""


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of a run with a trained drafter")],
    out: Out = RESULTS / "ramp.json",
    stages: Annotated[str, typer.Option(help="requests at a time")] = "1,4,16,64,256,64,16,4,1",
    temperature: float = 0.7,
    fixed: Annotated[str, typer.Option(help="values of K beside plain decoding")] = "1,2,3,4,6,8",
    prompts: Annotated[int, typer.Option(help="of each domain")] = 400,
    turns: int = 3,
    stage_s: Annotated[float, typer.Option(help="seconds of a stage, at most")] = 1.5,
    budget_s: Annotated[float, typer.Option(help="seconds in all")] = 300.0,
    device: str = "cuda",
) -> None:
    """Let every arm climb the ramp."""
    began = time.monotonic()
    sizes = [int(size) for size in stages.split(",")]
    settings = settings_for(
        run_dir, device, f"engine.max_batch={max(sizes)}", f"drafter.max_draft={MAX_DRAFT}"
    )
    tokenizer = load_tokenizer(target_folder(settings.target, settings.target_cache))
    found = chat_prompts(dict.fromkeys(ARM_DOMAINS, prompts), seed=7, may_lack=True)
    traffic = Traffic(
        {d: [(prompt_ids(tokenizer, p), p.seed(0)) for p in asked] for d, asked in found.items()},
        temperature,
        512,
    )
    service, _ = build(settings)
    samples = profile_steps(service.engine.parts, 5, 128)
    gc.collect()
    gc.freeze()  # as the service does when it starts
    arms = arms_of(service, settings, samples, [int(k) for k in fixed.split(",")])
    say(f"engine ready after {time.monotonic() - began:.1f} s")
    done: list[dict[str, list[float]]] = []
    for turn in range(turns):
        left_s = budget_s - (time.monotonic() - began)
        seconds = left_s / (turns - turn) / len(arms) / len(sizes) / 1.15
        if seconds < SHORTEST_S and turn:
            say(f"{left_s:.0f} s are left: {turns - turn} turns are left out")
            break
        order = arms[turn % len(arms) :] + arms[: turn % len(arms)]
        seconds = max(SHORTEST_S, min(stage_s, seconds))
        done.append({arm.name: climb(arm, traffic, sizes, turn, seconds) for arm in order})
        rows = rows_of(done, sizes)
        say(f"turn {turn}: " + ", ".join(f"{row['arm']} {row['vs_plain']:.3f}" for row in rows))
        write_result(out, {"stages": sizes, "temperature": temperature, "rows": rows})
        write_rows("ramp", claims(rows, sizes, temperature), SOURCE, out.parent)


def climb(
    arm: Arm, traffic: Traffic, sizes: Sequence[int], turn: int, seconds: float
) -> list[float]:
    """[stages] tokens per second of one arm."""
    return [
        take_turn(arm, traffic, ARM_DOMAINS[at % len(ARM_DOMAINS)], 100 * turn, size, seconds)
        for at, size in enumerate(sizes)
    ]


def rows_of(done: Sequence[dict[str, list[float]]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each arm, of the turns so far."""
    rows = []
    for name in done[0]:
        ratios = [
            [own / plain for own, plain in zip(turn[name], turn[PLAIN], strict=True)]
            for turn in done
        ]
        rows.append(
            {
                "arm": name,
                "turns": len(done),
                "vs_plain": statistics.median(map(statistics.geometric_mean, ratios)),
                "vs_plain_by_stage": [
                    statistics.median(stage) for stage in zip(*ratios, strict=True)
                ],
                "tokens_per_s": [
                    statistics.median(turn[name][at] for turn in done) for at in range(len(sizes))
                ],
            }
        )
    return rows


def claims(rows: Sequence[dict[str, Any]], sizes: Sequence[int], temperature: float) -> list[Row]:
    """The policy against the best single K, plain decoding included."""
    means = {row["arm"]: row["vs_plain"] for row in rows}
    best = max(mean for name, mean in means.items() if name not in (ALONE, TUNED))
    about = f"ramp of {', '.join(map(str, sizes))} requests, temperature {temperature:g}"
    measure = "policy over the best single K, tokens/s, geometric mean over the loads"
    return [
        at_least(about, f"{name}, {measure}", means[name] / best, GOAL) for name in (ALONE, TUNED)
    ]


if __name__ == "__main__":
    typer.run(main)
