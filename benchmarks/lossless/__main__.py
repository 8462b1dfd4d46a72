"""Does drafting change the output of the kernels, of the engine, or of the server?

    python -m benchmarks.lossless                # up to ten minutes on one H100 or H200
    python -m benchmarks.lossless --device cpu   # on two cores: fewer samples, torch definitions
    python -m benchmarks.lossless --device cpu --num-samples 2000 --num-prompts 20 \\
        --num-requests 60 --num-bodies 20        # a trial: too few samples for planted bugs

* ``law``: sampled requests follow the target's joint distribution, with the programs' kernels.
* ``greedy``: greedy requests to the engine get the same bytes with and without drafts.
* ``requests``: so do requests that use every sampling field, either greedy or with a seed.
* ``http``: so do clients of the server, including ``n`` and ``usage``.

Writes ``benchmarks/results/lossless_gpu.json`` (``lossless.json`` on a CPU) after every row. Exit
code 1: something differs that must not, a planted bug was not detected, or the budget ran out
before everything planned had run; such a result says ``"complete": false``.
"""

from __future__ import annotations

import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, write_result
from benchmarks.lossless import greedy, http, law, requests
from targets.device import pick_device


class Part(StrEnum):
    LAW = "law"
    GREEDY = "greedy"
    REQUESTS = "requests"
    HTTP = "http"


def main(
    out: Annotated[Path | None, typer.Option(help="result file; default: by device")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="run only this part; repeatable")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    num_samples: Annotated[
        int | None, typer.Option(help="samples per setting; default: 10 million, 100,000 on a CPU")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="prompts decoded greedily")] = 4_000,
    num_requests: Annotated[int, typer.Option(help="requests that use every field")] = 2_000,
    num_bodies: Annotated[int, typer.Option(help="bodies sent over HTTP")] = 200,
    budget_s: Annotated[
        float | None, typer.Option(help="seconds per part; default: 300, 1200 on a CPU")
    ] = None,
) -> None:
    """Count the differences between drafted and plain decoding."""
    where, parts = pick_device(device), part or list(Part)
    is_gpu = where.type == "cuda"
    out = out or RESULTS / ("lossless_gpu.json" if is_gpu else "lossless.json")
    num_samples = num_samples or (10_000_000 if is_gpu else 100_000)
    if budget_s is None:
        budget_s = 300.0 if is_gpu else 1200.0
    rows: dict[Part, list[dict[str, Any]]] = {one: [] for one in Part}

    def summary() -> dict[str, Any]:
        found = {
            Part.LAW: law.summary(rows[Part.LAW], num_samples),
            Part.GREEDY: greedy.summary(rows[Part.GREEDY], where),
            Part.REQUESTS: requests.summary(rows[Part.REQUESTS], num_requests),
            Part.HTTP: http.summary(rows[Part.HTTP], num_bodies),
        }
        return {one: found[one] for one in parts}

    def keep(one: Part, row: dict[str, Any]) -> None:
        rows[one].append(row)
        write_result(out, {"summary": summary(), **rows})

    if Part.LAW in parts:
        law.measure(where, num_samples, budget_s, partial(keep, Part.LAW))
    if Part.GREEDY in parts:
        greedy.measure(where, num_prompts, budget_s, partial(keep, Part.GREEDY))
    if Part.REQUESTS in parts:
        requests.measure(where, num_requests, budget_s, partial(keep, Part.REQUESTS))
    if Part.HTTP in parts:
        http.measure(where, num_bodies, budget_s, partial(keep, Part.HTTP))
    found = summary()
    write_result(out, {"summary": found, **rows})
    print(json.dumps(found, indent=2))
    incomplete = [one for one in parts if not found[one]["complete"]]
    for one in incomplete:
        print(
            f"INCOMPLETE: {one}: {budget_s} s were too few for everything planned; raise --budget-s"
        )
    sound = (
        law.is_sound(rows[Part.LAW]),
        greedy.is_sound(rows[Part.GREEDY]),
        requests.is_sound(rows[Part.REQUESTS]),
        http.is_sound(rows[Part.HTTP]),
    )
    if incomplete or not all(sound):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
