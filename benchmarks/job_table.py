"""The table of what a trainer's job must show, from the rows of the benchmarks that measured it.

    python -m benchmarks.job_table

``rows/jobs.json`` holds rows that were measured for it alone (``benchmarks.jobs``,
``benchmarks.real.stream``, ``benchmarks.utilisation``) and copies of rows of other topics, each
with its number in the table, and the hardware, commit and command that it was measured with. This
replaces the copies, adds when the demos' learning was earned back, and writes the rows that have a
goal into ``docs/performance.md``. Measures nothing.

Numbers: 1 to 5 a stream of requests, 6 the way of a version, 7 use of the card, 8 kills, 9 bad
candidates, 10 reports, 11 a trainer on a card of its own, and payback.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.results import RESULTS, Row, say
from benchmarks.host_table import number_of
from examples.readme import with_block

OWN = (
    "python -m benchmarks.jobs",
    "python -m benchmarks.real.stream",
    "python -m benchmarks.utilisation",
)
"""Commands that write ``rows/jobs.json`` themselves."""


@dataclass(frozen=True, slots=True)
class Copied:
    """Rows of another topic that belong to the table."""

    number: str
    topic: str
    source: str
    """Command; what follows it does not matter."""
    row: str = ""
    """Part of the row's name."""
    measure: str = ""
    """Part of its measure."""

    def takes(self, row: dict[str, Any]) -> bool:
        """This is one of them."""
        is_of = row["source"] == self.source or row["source"].startswith(f"{self.source} ")
        return is_of and self.row in row["row"] and self.measure in row["measure"]


PAGE = Path("docs/performance.md")
BEGIN = "<!-- written by `python -m benchmarks.job_table`, from the rows of the results -->"
END = "<!-- end of the jobs -->"
COLUMNS = ("#", "case", "measure", "wanted", "measured", "", "where, and by which command")
LEARNING = "python -m benchmarks.real.learning"
TABLE = (
    Copied("4", "learning", LEARNING, measure="worst window"),
    Copied("5", "learning", LEARNING, measure="back on the first domain"),
    Copied("6", "swap", "python -m benchmarks.bundles.transports"),
    Copied("6", "swap", "python -m benchmarks.swap", measure="first drafted token"),
    Copied("8", "faults", "python -m benchmarks.faults.trainer_kills"),
    Copied("9", "candidates", "python -m benchmarks.candidates"),
    Copied("10", "reports", "python -m benchmarks.reports"),
    Copied("11", "learning", "python -m benchmarks.real.sharing --own-gpu"),
)


def copies(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of other topics, by their number in the table."""
    for wanted in TABLE:
        file = folder / "rows" / f"{wanted.topic}.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        yield from ({**r, "row": f"{wanted.number}. {r['row']}"} for r in rows if wanted.takes(r))


def paybacks(folder: Path) -> Iterator[dict[str, Any]]:
    """Requests of shifted traffic that earn back what the demos' trainers took, of each machine."""
    for name in ("learning", "learning_mps", "demo"):
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        reports = [one.get("report", one) for one in found["runs"]]
        yield {**asdict(payback_row(reports, found, name)), **measured_on(found)}


def payback_row(reports: list[dict[str, Any]], found: dict[str, Any], name: str) -> Row:
    """The median of some demos; one that learning never pays in has no number of requests."""
    after = [one["earned_back_after_requests"] for one in reports]
    took = statistics.median(one["learning_seconds"] for one in reports)
    device = found.get("learning_device") or reports[0].get("learning_device") or "GPU"
    what = f"payback, {name}.json, {len(reports)} demos, {took:.0f} {device}-seconds of learning"
    measure = "requests of shifted traffic that earn it back"
    known = sorted(float("inf") if one is None else one for one in after)
    middle = known[len(known) // 2]  # the worse one of two
    value = "never" if middle == float("inf") else int(middle)
    return Row(what, measure, value, None, None)


def measured_on(found: dict[str, Any]) -> dict[str, Any]:
    """Hardware, commit and command of a result with demos."""
    machine = found.get("machine", found)
    where = machine["hardware"]
    is_mps = " --mps" if found.get("mps") else ""
    return {
        "hardware": ", ".join(where["gpu"]) or f"{where['cores']} cores, {where['cpu']}",
        "commit": machine["commit"],
        "source": f"{LEARNING}{is_mps}" if "mps" in found else "python -m benchmarks.demo",
    }


def block(rows: list[dict[str, Any]]) -> str:
    """Markdown between ``BEGIN`` and ``END``: the rows that have a goal, by their numbers."""
    judged = [row for row in rows if row["holds"] is not None]
    judged.sort(key=lambda row: _number_of_row(row)[0])
    cells = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, judged)]
    table = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([BEGIN, "", *table, "", END])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    number, case = _number_of_row(row)
    return (
        f"{number or ''}", case, row["measure"], row["goal"] or "", number_of(row["value"]),
        "met" if row["holds"] else "not met",
        f"{row['hardware']}, {row['commit'][:7]}, `{row['source']}`",
    )  # fmt: skip


def _number_of_row(row: dict[str, Any]) -> tuple[int, str]:
    """Number in the table, 0 for rows that have none, and the rest of the name."""
    number, _, case = row["row"].partition(". ")
    return (int(number), case) if number.isdigit() else (0, row["row"])


def main(
    folder: Annotated[Path, typer.Option(help="of the results")] = RESULTS,
    page: Annotated[Path, typer.Option(help="that has the table")] = PAGE,
) -> None:
    """Replace the copies, write the table, and say what it holds and lacks."""
    out = folder / "rows" / "jobs.json"
    former = json.loads(out.read_text()) if out.exists() else []
    own = [row for row in former if row["source"] in OWN]
    rows = [*own, *copies(folder), *paybacks(folder)]
    out.write_text(json.dumps(rows, indent=2) + "\n")
    page.write_text(with_block(page.read_text(), block(rows), BEGIN, END))
    for row in rows:
        say(f"{row['row']}: {row['measure']}: {row['value']} (goal: {row['goal']}, holds: "
            f"{row['holds']})")  # fmt: skip
    numbers = {row["row"].partition(".")[0] for row in rows}
    lacking = [str(n) for n in range(1, 12) if str(n) not in numbers]
    say(f"without rows: {', '.join(lacking) or 'none'}")


if __name__ == "__main__":
    typer.run(main)
