"""The demo as a measurement.

    python -m benchmarks.demo            # about ten minutes a run; nothing else should run
    python -m benchmarks.demo --runs 3 --publish

Writes the report of the run whose speed over static is the median to ``benchmarks/results``, with
the speedups of all runs. ``--publish`` also puts its figures into the README and its picture into
``docs``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from benchmarks.harness.results import RESULTS
from examples.demo import carry_out
from examples.plan import DemoSettings, real_settings
from examples.readme import block, with_block

README, PICTURE = Path("README.md"), Path("docs/demo.svg")
KEPT_OF_RUNS = (
    "speedup_vs_plain", "speedup_vs_static", "speedup_vs_index", "speedup_vs_best",
    "drafter_alone_speedup_vs_static", "swaps", "rollbacks", "failed_requests",
    "mismatched_outputs", "seconds", "learning_seconds", "earned_back_after_requests",
)  # fmt: skip


def median_run(reports: list[dict[str, Any]]) -> int:
    """Place of the run whose speed over static is the (lower) median; runs without it are last."""

    def speedup(place: int) -> float:
        value = reports[place]["speedup_vs_static"]
        return float("inf") if value is None else float(value)

    return sorted(range(len(reports)), key=speedup)[(len(reports) - 1) // 2]


def result_of(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The median run's report, and what all runs came to. The load is that before the first run:
    the others begin when the one before them has just ended."""
    runs = [{key: report[key] for key in KEPT_OF_RUNS} for report in reports]
    load_before = reports[0]["load_before"]
    return {**reports[median_run(reports)], "load_before": load_before, "runs": runs}


def publish(result: dict[str, Any], picture: Path) -> None:
    """Put figures and picture where newcomers see them."""
    readme = README.read_text(encoding="utf-8")
    README.write_text(with_block(readme, block(result)), encoding="utf-8")
    shutil.copyfile(picture, PICTURE)


def main(
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
    target: Literal["bundled", "real"] = "bundled",
    runs: Annotated[int, typer.Option(min=1, help="demos, one after another")] = 1,
    run_dir: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs/bench_demo"),
    publishes: Annotated[bool, typer.Option("--publish", help="update README and docs")] = False,
) -> None:
    """Run the demo and keep its report."""
    settings = real_settings() if target == "real" else DemoSettings()
    name = "demo_real.json" if target == "real" else "demo.json"
    folders = [run_dir / str(number) for number in range(runs)]
    codes = [carry_out(replace(settings, run_dir=folder), Console()) for folder in folders]
    written = [folder / "report.json" for folder in folders]
    if not all(path.exists() for path in written):
        raise typer.Exit(max(codes))
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in written]
    result = result_of(reports)
    file = RESULTS / name if out is None else out
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if publishes:
        publish(result, folders[median_run(reports)] / "report.svg")
    raise typer.Exit(max(codes))


if __name__ == "__main__":
    typer.run(main)
