"""The table of a trainer's job holds its own rows and the present ones of other topics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness.results import RESULTS
from benchmarks.job_table import (
    BEGIN,
    END,
    OWN,
    PAGE,
    TABLE,
    Copied,
    block,
    copies,
    main,
    payback_row,
    paybacks,
)
from oracles.support import REPOSITORY


def row(name: str, source: str, value: float = 1.0) -> dict[str, object]:
    return {"row": name, "measure": "m", "value": value, "goal": None, "holds": None,
            "hardware": "h", "commit": "c", "source": source}  # fmt: skip


def test_copies_are_replaced_and_own_rows_stay(tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    reports, own = "python -m benchmarks.reports", row("7. mine", OWN[2])
    (folder / "jobs.json").write_text(json.dumps([own, row("10. old", reports)]))
    (folder / "reports.json").write_text(json.dumps([row("new", reports, 2.0), row("x", "y")]))

    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(tmp_path, page)

    rows = json.loads((folder / "jobs.json").read_text())
    assert rows == [own, row("10. new", reports, 2.0)]
    assert page.read_text() == f"before\n{block(rows)}\nafter\n"


def test_the_page_says_what_the_published_rows_say():
    """If this fails: ``python -m benchmarks.job_table`` writes the table again."""
    rows = json.loads((RESULTS / "rows" / "jobs.json").read_text())
    assert block(rows) in (REPOSITORY / PAGE).read_text()


def test_the_table_has_rows_with_a_goal_by_their_numbers_and_says_what_is_missed():
    measured = {"goal": "at least 2", "holds": False}
    rows = [row("10. b", "x") | measured, row("3. a", "y", 2.5) | measured | {"holds": True}]

    lines = block([row("1. without a goal", "z"), *rows]).splitlines()[4:-2]

    assert lines == [
        "| 3 | a | m | at least 2 | 2.5 | met | h, c, `y` |",
        "| 10 | b | m | at least 2 | 1 | not met | h, c, `x` |",
    ]


def test_the_published_table_is_what_the_published_results_give():
    """If this fails: ``python -m benchmarks.job_table`` makes the table again."""
    table = json.loads((RESULTS / "rows" / "jobs.json").read_text())

    copied = [one for one in table if one["source"] not in OWN]
    assert copied == [*copies(RESULTS), *paybacks(RESULTS)]


def test_options_of_a_command_belong_to_it_and_longer_names_do_not():
    wanted = Copied("6", "swap", "python -m benchmarks.swap")

    assert wanted.takes(row("a", "python -m benchmarks.swap --device cuda"))
    assert not wanted.takes(row("a", "python -m benchmarks.swaps"))


@pytest.mark.parametrize("part", TABLE, ids=lambda part: f"{part.number} {part.source}")
def test_every_part_of_the_table_finds_rows_or_its_command_exists(part: Copied):
    module = part.source.split()[2].replace(".", "/")
    found = json.loads((RESULTS / "rows" / f"{part.topic}.json").read_text())

    assert Path(f"{module}.py").exists() or Path(module, "__main__.py").exists()
    if any(one["source"].startswith(part.source) for one in found):
        assert any(part.takes(one) for one in found)


@pytest.mark.parametrize(
    ("after", "expected"),
    [([30, 10, 20], 20), ([10, None], "never"), ([10, None, 20], 20)],
)
def test_learning_that_mostly_does_not_pay_is_not_called_paid(
    after: list[int | None], expected: int | str
):
    reports = [
        {"earned_back_after_requests": one, "learning_seconds": 3.0, "learning_device": "CPU"}
        for one in after
    ]

    assert payback_row(reports, {}, "demo").value == expected
