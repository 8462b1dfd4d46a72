"""Writes every published figure: the full result of a benchmark, and its rows.

A row is one claim: what was measured, the value, the goal, and whether the goal is met.
``benchmarks/results/rows/<topic>.json`` holds the rows of one topic.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.machine import commit, hardware, machine

RESULTS = Path("benchmarks/results")
Out = Annotated[Path, typer.Option(help="result file")]


@dataclass(frozen=True, slots=True)
class Row:
    """One claim."""

    row: str
    """What was measured, e.g. ``Qwen3-8B, batch 1, K = 4``."""
    measure: str
    """What the value is, with its unit."""
    value: float | int | str | None
    """``None``: not measured."""
    goal: str | None
    """The goal in words; ``None``: no goal."""
    holds: bool | None
    """Whether the goal is met; ``None`` without a goal or a value."""


def at_least(row: str, measure: str, value: float | None, goal: float | None) -> Row:
    """A claim that holds from ``goal`` on; ``None``: it has no goal."""
    if goal is None:
        return Row(row, measure, value, None, None)
    return Row(row, measure, value, f"at least {goal:g}", None if value is None else value >= goal)


def at_most(row: str, measure: str, value: float | None, goal: float | None) -> Row:
    """A claim that holds up to ``goal``; ``None``: it has no goal."""
    if goal is None:
        return Row(row, measure, value, None, None)
    return Row(row, measure, value, f"at most {goal:g}", None if value is None else value <= goal)


def write_result(out: Path, figures: Mapping[str, Any]) -> None:
    """Write figures with the hardware, versions and commit they were measured on."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**figures, "machine": machine()}, indent=2) + "\n")


def write_rows(
    topic: str,
    rows: Iterable[Row],
    source: str,
    folder: Path = RESULTS,
    *,
    keeps_unchanged: bool = False,
) -> Path:
    """Write the rows of a topic, measured on this machine; rows of other sources are kept.

    Args:
        source: the command that measured them; its previous rows are replaced.
        folder: of results; rows are in its folder ``rows``.
        keeps_unchanged: a row whose figure is the same as before was not measured now, and keeps
            its hardware and commit.

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
    before = [row for row in former if row["source"] == source] if keeps_unchanged else []
    new = []
    for row in map(asdict, rows):
        same = (old for old in before if row.items() <= old.items())
        new.append(next(same, {**row, **named}))
    out.write_text(json.dumps(kept + new, indent=2) + "\n")
    return out


def write_each(out: Path, rows: Iterable[dict[str, Any]], **about: Any) -> None:
    """Print each row as it arrives, and write all rows so far together with ``about``."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        print(rounded(row), flush=True)
        write_result(out, {**about, "rows": found})


def say(text: str) -> None:
    """Print with the time of day, unbuffered."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def rounded(row: Mapping[str, Any], digits: int = 3) -> dict[str, Any]:
    """A row with floats rounded, for a terminal."""
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in row.items()}


def known(what: str, names: Iterable[str], all_names: Collection[str]) -> list[str]:
    """Check names given on a command line.

    Raises:
        typer.BadParameter: a name is unknown; the message lists the known ones.
    """
    chosen = list(names)
    if unknown := sorted(set(chosen) - set(all_names)):
        raise typer.BadParameter(f"unknown {what} {unknown}; known: {'; '.join(all_names)}")
    return chosen


class Report:
    """The rows of one run, written to disk after each row, within a time budget."""

    def __init__(self, out: Path, budget_s: float, about: dict[str, Any]) -> None:
        self._out, self._budget_s, self._about = out, budget_s, about
        self._started = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self._budget_s - (time.monotonic() - self._started)

    def keep(self, former: Mapping[str, Any], without: Collection[str]) -> None:
        """Start with the rows of a previous result, except those of some parts. Rows measured with
        other hardware, versions or commit carry their own ``machine``."""
        where = former["machine"]
        other = {} if where == machine() else {"machine": where}
        self.rows += [{**other, **row} for row in former["rows"] if row["part"] not in without]

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Print one row, and write all rows."""
        row = {"part": part, **row, "at_s": round(self._budget_s - self.left_s, 1)}
        self.rows.append(row)
        print(" ".join(f"{k}={v}" for k, v in rounded(row, 4).items()), flush=True)
        write_result(self._out, {**self._about, "rows": self.rows})

    def attempt(
        self,
        part: str,
        what: dict[str, Any],
        expected_s: float,
        work: Callable[[], dict[str, Any] | None],
    ) -> None:
        """Add the row that ``work`` returns, or why there is none: an error, or no time left.

        Args:
            what: identifies the row.
            expected_s: skip ``work`` if less time is left.
            work: returns ``None`` if it has added its own rows.
        """
        if self.left_s < expected_s:
            skipped = f"{self.left_s:.0f} s of the budget left, {expected_s:.0f} s expected"
            self.add(part, {**what, "skipped": skipped})
            return
        try:
            found = work()
        except Exception as error:  # one failed row must not lose the others
            traceback.print_exc()
            self.add(part, {**what, "error": f"{type(error).__name__}: {error}"[:2000]})
        else:
            if found is not None:
                self.add(part, {**what, **found})
