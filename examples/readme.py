"""The figures of a demo as the README shows them, so that its headline is never older than they."""

from __future__ import annotations

from typing import Any

from examples.arms import ALONE, ARMS
from examples.report import busy_line, headline, learning_line, shown

BEGIN = "<!-- written by `python -m benchmarks.demo --publish`, from its figures -->"
END = "<!-- end of the figures -->"

_COLUMNS = (
    "traffic", "plain", "static", "index", "tuned", "tuned ÷ plain", "÷ static", "÷ index",
    "drafter alone, frozen", "newest",
)  # fmt: skip


def block(report: dict[str, Any]) -> str:
    """Markdown between ``BEGIN`` and ``END``: headline, what was measured, one row per phase."""
    text, _ = headline(report)
    rows = [*report["phases"], {**report, "name": "shifted phases together"}]
    lines = [
        BEGIN,
        "",
        f"**{text}.** {_what(report)} {learning_line(report)} {busy_line(report)}".rstrip(),
        "",
        _row(_COLUMNS),
        _row(["---"] * len(_COLUMNS)),
        *(_row(_cells(row)) for row in rows),
        *_runs(report),
        "",
        END,
    ]
    return "\n".join(lines)


def with_block(readme: str, written: str, begin: str = BEGIN, end: str = END) -> str:
    """The README, or another page, with a block replaced.

    Raises:
        ValueError: it does not hold ``begin`` and, behind it, ``end``.
    """
    before, found, rest = readme.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"the page must hold {begin!r} and then {end!r}")
    return f"{before}{written}{after}"


def _what(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    gpus = hardware.get("gpu") or []
    machine = gpus[0] if gpus else f"{hardware['cores']} CPU cores"
    clients = report["replay_clients"]
    load = "one request" if clients == 1 else f"{clients} requests"
    return (
        f"Target `{report['target']}`, {machine}, temperature {report['temperature']:g}, tokens/s "
        f"with {load} at a time, {report['swaps']} swaps, "
        f"{report['failed_requests']} failed requests, {report['mismatched_outputs']} changed "
        f"outputs, {report['seconds']:.0f} s."
    )


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        *(shown(row[f"{arm}_tokens_per_s"], digits=0) for arm in ARMS),
        *(shown(row[f"speedup_vs_{arm}"]) for arm in ARMS if arm != "tuned"),
        *(shown(row[f"{arm}_tokens_per_s"], digits=0) for arm in ALONE),
    ]


def _runs(report: dict[str, Any]) -> list[str]:
    """The spread over several runs, if there were several."""
    runs = report.get("runs", [])
    if len(runs) < 2:
        return []
    ranges = (
        f"tuned ÷ {base} {_range([run[f'speedup_vs_{base}'] for run in runs])}"
        for base in ARMS
        if base != "tuned"
    )
    return ["", f"The median of {len(runs)} runs; over all of them, {', '.join(ranges)}."]


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
