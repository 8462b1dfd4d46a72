"""Does drafting change what comes out of the compiled kernels and of the engine on a GPU?

    python -m benchmarks.lossless_gpu                # three minutes on one H200
    python -m benchmarks.lossless_gpu --part law --device cpu --num-samples 2000 --budget-s 60

* ``law``: sampled requests follow the target's joint law, by the kernels.
* ``greedy``: greedy requests get the same bytes with drafts as without, by the engine.

Writes ``benchmarks/results/lossless_gpu.json`` after every row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.lossless_gpu import law
from benchmarks.result import write_result
from serving.target import pick_device


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/lossless_gpu.json"
    ),
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    num_samples: Annotated[int, typer.Option(help="of each way to sample")] = 10_000_000,
    budget_s: Annotated[float, typer.Option(help="seconds for the law")] = 90.0,
) -> None:
    """Count what differs; exit code 1 if anything does."""
    where = pick_device(device)
    result: dict[str, Any] = {"summary": {}, "law": []}

    def keep(row: dict[str, Any]) -> None:
        result["law"].append(row)
        result["summary"]["law"] = law.summary(result["law"], num_samples)
        write_result(out, result)

    law.measure(where, num_samples, budget_s, keep)
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    typer.run(main)
