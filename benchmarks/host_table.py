"""The table of what the host must not cost, in ``docs/performance.md``, from the published rows.

    python -m benchmarks.host_table

Rows of ``benchmarks/results/rows`` are written by the commands that measured them; this puts those
that the table asks for into the page, with their goals, and says what was not measured. Run it
after any of these commands. Measures nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, say
from examples.readme import with_block

PAGE = Path("docs/performance.md")
BEGIN = "<!-- written by `python -m benchmarks.host_table`, from the rows of the results -->"
END = "<!-- end of the rows -->"
COLUMNS = ("#", "measure", "wanted", "measured", "", "where, and by which command")
MOST_VALUES = 8
"""More values of one line are summed up by the worst one."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: some rows of one topic."""

    number: int
    """Of the claim."""
    what: str
    topic: str
    measure: str
    """Regular expression that the rows' measure contains."""
    row: str = ""
    """Likewise of their name. Its groups say which of the rows a value is."""
    where: str = ""
    """Likewise of their hardware."""
    labels: tuple[str, ...] = ()
    """Rows that there must be."""

    def takes(self, row: dict[str, Any]) -> bool:
        """This is one of its rows."""
        return all(
            re.search(wanted, row[field])
            for wanted, field in ((self.measure, "measure"), (self.row, "row"),
                                  (self.where, "hardware"))
        )  # fmt: skip

    def label(self, row: dict[str, Any]) -> str:
        """Which of the rows this is; empty if there can be only one."""
        found = re.search(self.row, row["row"])
        return " ".join(found.groups()) if found else ""


_FLOOR = "tokens/s, policy with a drafter of random weights"
_GAP = "^p99 of the gap between two events"
_SHARE = "^tokens/s of the engine alone$"
_HOST = "^host's part of a step"
_LEFT = "left in|missing from|neither complete"
_FASTEST = "^tokens/s over the fastest peer that ran, "
_CLIENTS = "1", "8", "32", "64", "128"
_DEFAULT = {1: "up to a batch of 32", 2: "up to 128", 4: "from 193 on"}
"""For which ``engine.max_batch`` a server on a card has so many HTTP processes."""
LINES = (
    *(
        Line(1, f"a drafter of no use over no drafts, through HTTP, temperature {heat}, by clients",
             "floor", _FLOOR, rf"(\d+) clients, temperature {heat}$", labels=_CLIENTS)
        for heat in ("0", "0.7", "1")
    ),
    Line(1, "first request of a new sort, seconds", "border", "^longest wait for the first event",
         r"^(.+?), first requests"),
    *(
        Line(2, f"plain tokens/s through HTTP over the engine alone, HTTP processes: {count} "
             f"(the default {which}), by clients",
             "border", _SHARE, rf" 0 draft tokens, {count} HTTP process(?:es)?, (\d+) clients",
             labels=("8", "32", "128"))
        for count, which in _DEFAULT.items()
    ),
    *(
        Line(3, f"host's part of a step, {arm}, ms, by requests", "host", _HOST,
             rf"^(\d+) requests, {arm}, temperature 0.7, hidden rows kept$",
             labels=("32", "64", "128"))
        for arm in ("plain decoding", "policy with drafters of no use")
    ),
    Line(3, "objects that a request keeps of a step and the collector visits", "host",
         "^objects kept", r"^(\d+ requests, .*)$"),
    *(
        Line(4, f"index on the device over {step} step, {text}, by requests", "ops_matches",
             f"^share of {step} step", rf"(\d+) requests, .*both texts{end}$",
             labels=("32", "128"))
        for text, end in (("words drawn alone", ""), ("prose and code", ", prose and code"))
        for step in ("an 8B", "a 135M")
    ),
    Line(4, "index on the host, ms of a round, by requests", "index",
         "^milliseconds of a step, alone, median", r"index in a round, (\d+) requests"),
    Line(4, "index on the host: times as fast as Arctic Inference's, by requests", "index",
         "^times as fast, median of steps", r"Arctic Inference's, (\d+) requests"),
    *(
        Line(5, f"p99 of the gap between events over its median, 64 clients, temperature {heat}",
             "floor", _GAP, rf"64 clients, temperature {heat}$")
        for heat in ("0", "0.7", "1")
    ),
    Line(6, "10,000 requests with kills: left behind or dishonest", "border", _LEFT,
         "^10,000 requests of mixed kinds"),
    Line(7, "tokens/s over those before", "house", "over those before", r"^(.*)$", "^2 cores"),
    Line(7, "seconds of the suite", "house", "^seconds of the whole suite"),
    Line(8, "seconds to ready, SmolLM2-135M on a card", "start", "^seconds to ready",
         "^SmolLM2-135M on a card, (first|second) start$", labels=("first", "second")),
    Line(8, "seconds to ready, bundled target, two cores", "start", "^seconds to ready",
         "^bundled target on two cores, (first|second) start$", labels=("first", "second")),
    Line(8, "processor seconds until ready, the same", "start", "^processor seconds",
         "^bundled target on two cores, (first|second) start$"),
    Line(9, "SmolLM2-135M over our compiled loop, by requests", "peers",
         f"{_FASTEST}our compiled", r"SmolLM2-135M, (\d+) requests, plain", labels=_CLIENTS[:4]),
    Line(9, "SmolLM2-135M over the fastest other peer that ran, by requests", "peers",
         f"{_FASTEST}(?!our )", r"SmolLM2-135M, (\d+) requests, plain", labels=_CLIENTS[:4]),
    Line(9, "SmolLM2-135M over transformers' continuous batching, by requests", "peers",
         "^tokens/s over transformers' continuous", r"SmolLM2-135M, (\d+) requests, plain",
         labels=_CLIENTS[:4]),
)  # fmt: skip


def found(line: Line, folder: Path) -> list[dict[str, Any]]:
    """The rows of a line, in the order of the numbers in their names."""
    file = folder / "rows" / f"{line.topic}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return sorted(filter(line.takes, rows), key=lambda row: _natural(row["row"]))


def block(folder: Path) -> str:
    """Markdown between ``BEGIN`` and ``END``."""
    cells = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(line, folder) for line in LINES)]
    table = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([BEGIN, "", *table, "", END])


def _cells(line: Line, folder: Path) -> tuple[str, ...]:
    rows = found(line, folder)
    number, what = str(line.number), line.what
    if not rows:
        return number, what, "", "not measured", "", ""
    judged = [row for row in rows if row["holds"] is not None]
    num_met = sum(row["holds"] for row in judged)
    verdict = f"{num_met} of {len(judged)}" if num_met < len(judged) else "met" if judged else ""
    if lacking := [label for label in line.labels if label not in map(line.label, rows)]:
        verdict += f"; not measured: {', '.join(lacking)}"
    goals = "; ".join(dict.fromkeys(row["goal"] for row in rows if row["goal"]))
    return number, what, goals, _values(line, rows), verdict, "; ".join(_sources(rows))


def _values(line: Line, rows: list[dict[str, Any]]) -> str:
    if len(rows) <= MOST_VALUES:
        named = ((line.label(row), number_of(row["value"])) for row in rows)
        return ", ".join(f"{label}: {value}" if label else value for label, value in named)
    is_more_better = any("at least" in (row["goal"] or "") for row in rows)
    numbers = [row["value"] for row in rows]
    worst = rows[numbers.index((min if is_more_better else max)(numbers))]
    return f"{len(rows)} cases, the worst {number_of(worst['value'])} ({line.label(worst)})"


def number_of(value: float | int | str | None) -> str:
    """A value as the table shows it."""
    if value is None:
        return "not measured"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _sources(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Hardware, commit and command, each once."""
    yield from dict.fromkeys(
        f"{row['hardware']}, {row['commit'][:7]}, `{row['source']}`" for row in rows
    )


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in a text by their size."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def main(
    folder: Annotated[Path, typer.Option(help="of the results")] = RESULTS,
    page: Annotated[Path, typer.Option(help="that has the table")] = PAGE,
) -> None:
    """Write the table again, and say what it lacks."""
    page.write_text(with_block(page.read_text(), block(folder), BEGIN, END))
    for line in LINES:
        *_, measured, verdict, _ = _cells(line, folder)
        say(f"{line.number}. {line.what}: {measured} ({verdict})")


if __name__ == "__main__":
    typer.run(main)
