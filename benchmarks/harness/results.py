"""How every published figure is written: the full result of a benchmark, and its rows.

A row is one line of a table of claims: what was measured, the value, the goal, and whether the goal
is met. ``benchmarks/results/rows/<topic>.json`` holds the rows of one topic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.machine import commit, hardware, machine

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, slots=True)
class Row:
    """One claim."""

    row: str
    """What it is about, e.g. ``Qwen3-8B, batch 1, K = 4``."""
    measure: str
    """What the value is, with its unit."""
    value: float | int | str | None
    """``None``: not measured."""
    goal: str | None
    """In words; ``None``: a figure without a goal."""
    holds: bool | None
    """Whether the goal is met; ``None`` without a goal or a value."""


def write_result(out: Path, figures: Mapping[str, Any]) -> None:
    """Write figures with the hardware, versions and commit they were measured on."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**figures, "machine": machine()}, indent=2) + "\n")


def write_rows(topic: str, rows: Iterable[Row], source: str, folder: Path = RESULTS) -> Path:
    """Write the rows of a topic measured on this machine; other sources' rows stay.

    Args:
        source: the command that measured them; its former rows are replaced.

    Returns:
        The file.
    """
    out = folder / "rows" / f"{topic}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    former = json.loads(out.read_text()) if out.exists() else []
    where = hardware()
    named = {
        "hardware": ", ".join(where["gpu"]) or f"{where['cores']} cores, {where['cpu']}",
        "commit": commit(),
        "source": source,
    }
    kept = [row for row in former if row["source"] != source]
    out.write_text(json.dumps(kept + [{**asdict(row), **named} for row in rows], indent=2) + "\n")
    return out
