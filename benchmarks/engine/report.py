"""Collects rows, writes them after each, and keeps within a budget of seconds."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.results import write_result
from examples.machine import machine


class Report:
    """The result of one run."""

    def __init__(self, out: Path, budget_s: float, about: dict[str, Any]) -> None:
        self._out, self._budget_s, self._about = out, budget_s, about
        self._started = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._budget_s - (time.monotonic() - self._started)

    def keep(self, former: Mapping[str, Any], without: Collection[str]) -> None:
        """Begin with the rows of a former result, but those of some parts; rows measured on another
        machine, version or commit say so."""
        where = former["machine"]
        other = {} if where == machine() else {"machine": where}
        self.rows += [{**other, **row} for row in former["rows"] if row["part"] not in without]

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Show one row and write all so far."""
        row = {"part": part, **row, "at_s": round(self._budget_s - self.left_s, 1)}
        self.rows.append(row)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
        write_result(self._out, {**self._about, "rows": self.rows})

    def attempt(
        self,
        part: str,
        what: dict[str, Any],
        expected_s: float,
        work: Callable[[], dict[str, Any] | None],
    ) -> None:
        """Add what ``work`` finds, or why there is nothing: it failed, or no time was left.

        Args:
            what: names the row.
            expected_s: not begun with less than this left.
            work: ``None``: it has added its own rows.
        """
        if self.left_s < expected_s:
            skipped = f"{self.left_s:.0f} s of the budget left, {expected_s:.0f} s expected"
            self.add(part, {**what, "skipped": skipped})
            return
        try:
            found = work()
        except Exception as error:  # one row that fails must not cost the others
            traceback.print_exc()
            self.add(part, {**what, "error": f"{type(error).__name__}: {error}"[:2000]})
        else:
            if found is not None:
                self.add(part, {**what, **found})
