"""The demo as a benchmark: two CPU cores, the bundled target and drafter.

    python -m benchmarks.demo            # about ten minutes; run nothing else beside it

Writes the demo's own report to ``benchmarks/results/demo.json``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.harness.results import RESULTS, Out
from examples.demo import DemoSettings, carry_out


def main(
    out: Out = RESULTS / "demo.json",
    run_dir: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/bench_demo"),
) -> None:
    """Run the demo and keep its report."""
    code = carry_out(DemoSettings(run_dir=run_dir), Console())
    report = run_dir / "report.json"
    if report.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report, out)
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
