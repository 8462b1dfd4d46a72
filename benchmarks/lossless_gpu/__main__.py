"""Does drafting change what comes out of the compiled kernels and of the engine on a GPU?

    python -m benchmarks.lossless_gpu                # five minutes on one H200
    python -m benchmarks.lossless_gpu --device cpu --num-samples 2000 --num-prompts 20 \\
        --num-requests 60 --num-bodies 20

* ``law``: sampled requests follow the target's joint law, by the kernels.
* ``greedy``: greedy requests get the same bytes with drafts as without, by the engine.
* ``requests``: so do requests that use every field of a client, greedy or with a seed.
* ``http``: so do clients of the server, ``n`` and ``usage`` included.

Writes ``benchmarks/results/lossless_gpu.json`` after every row. Exit code 1: something differs that
must not, or a planted bug was not seen.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.lossless_gpu import greedy, http, law, requests
from benchmarks.result import write_result
from serving.target import pick_device


class Part(StrEnum):
    LAW = "law"
    GREEDY = "greedy"
    REQUESTS = "requests"
    HTTP = "http"


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/lossless_gpu.json"
    ),
    part: Annotated[list[Part] | None, typer.Option(help="run only this part; repeatable")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    num_samples: Annotated[int, typer.Option(help="of each way to sample")] = 10_000_000,
    num_prompts: Annotated[int, typer.Option(help="decoded greedily")] = 4_000,
    num_requests: Annotated[int, typer.Option(help="that use every field")] = 2_000,
    num_bodies: Annotated[int, typer.Option(help="sent over HTTP")] = 200,
    budget_s: Annotated[float, typer.Option(help="seconds for each part")] = 90.0,
) -> None:
    """Count what differs."""
    where = pick_device(device)
    result: dict[str, Any] = {"summary": {}, "law": [], "greedy": [], "requests": [], "http": []}

    def keep_law(row: dict[str, Any]) -> None:
        result["law"].append(row)
        result["summary"]["law"] = law.summary(result["law"], num_samples)
        write_result(out, result)

    def keep_greedy(row: dict[str, Any]) -> None:
        result["greedy"].append(row)
        result["summary"]["greedy"] = greedy.summary(result["greedy"])
        write_result(out, result)

    def keep_requests(row: dict[str, Any]) -> None:
        result["requests"].append(row)
        result["summary"]["requests"] = requests.summary(result["requests"], num_requests)
        write_result(out, result)

    def keep_http(row: dict[str, Any]) -> None:
        result["http"].append(row)
        result["summary"]["http"] = http.summary(result["http"], num_bodies)
        write_result(out, result)

    if part is None or Part.LAW in part:
        law.measure(where, num_samples, budget_s, keep_law)
    if part is None or Part.GREEDY in part:
        greedy.measure(where, num_prompts, budget_s, keep_greedy)
    if part is None or Part.REQUESTS in part:
        requests.measure(where, num_requests, budget_s, keep_requests)
    if part is None or Part.HTTP in part:
        http.measure(where, num_bodies, keep_http)
    print(json.dumps(result["summary"], indent=2))
    if not (law.is_sound(result["law"]) and greedy.is_sound(result["greedy"])):
        raise typer.Exit(code=1)
    if not (requests.is_sound(result["requests"]) and http.is_sound(result["http"])):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
