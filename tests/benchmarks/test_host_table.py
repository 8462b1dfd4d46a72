"""The table of what the host may cost says what the rows of the results say, and what they lack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness.results import RESULTS
from benchmarks.host_table import BEGIN, END, LINES, PAGE, Line, block, found, main, number_of
from oracles.support import REPOSITORY


def row(name: str, measure: str, value: float | None, **more: object) -> dict[str, object]:
    return {"row": name, "measure": measure, "value": value, "goal": "at least 0.5",
            "holds": value is not None and value >= 0.5, "hardware": "a card",
            "commit": "0123456789", "source": "python -m benchmarks.x", **more}  # fmt: skip


def published(folder: Path, topic: str, *rows: dict[str, object]) -> Path:
    (folder / "rows").mkdir(exist_ok=True)
    (folder / "rows" / f"{topic}.json").write_text(json.dumps(rows))
    return folder


def line_of(text: str, number: int, what: str) -> list[str]:
    (line,) = [one for one in text.splitlines() if one.startswith(f"| {number} | {what}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_what_the_published_rows_say():
    """If this fails: ``python -m benchmarks.host_table`` writes the table again."""
    assert block(RESULTS) in (REPOSITORY / PAGE).read_text()


def test_each_claim_of_the_table_has_a_line():
    assert {line.number for line in LINES} == set(range(1, 10))


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.number} {line.what}")
def test_a_line_takes_rows_of_its_own_only(line: Line):
    """Of two lines none takes a row of the other, so that no figure stands for another."""
    others = [one for one in LINES if one is not line and one.topic == line.topic]
    for taken in found(line, RESULTS):
        assert not any(other.takes(taken) for other in others)
    labels = [line.label(taken) for taken in found(line, RESULTS)]
    assert len(set(labels)) == len(labels) or not any(labels)


def test_what_is_missed_and_what_is_not_measured_is_said(tmp_path: Path):
    measure = "tokens/s, policy with a drafter of random weights over no drafts, through HTTP"
    name = "SmolLM2-135M, {} clients, temperature 0.7".format
    rows = [row(name(128), measure, 0.4999), row(name(8), measure, 1.25)]
    text = block(published(tmp_path, "floor", *rows))

    *_, goal, values, verdict, source = line_of(text, 1, "a drafter of no use over no drafts, "
                                                "through HTTP, temperature 0.7")  # fmt: skip
    assert values == "8: 1.25, 128: 0.4999"
    assert verdict == "1 of 2; not measured: 1, 32, 64"
    assert (goal, source) == ("at least 0.5", "a card, 0123456, `python -m benchmarks.x`")
    assert line_of(text, 8, "seconds to ready, SmolLM2")[3:5] == ["not measured", ""]


def test_many_rows_are_summed_up_by_the_worst(tmp_path: Path):
    cases = [
        row(f"case {n}", "tokens per second over those before", 1 - n / 100, hardware="2 cores")
        for n in range(12)
    ]
    text = block(published(tmp_path, "house", *cases))

    assert line_of(text, 7, "tokens/s")[3] == "12 cases, the worst 0.89 (case 11)"


def test_only_the_block_of_the_page_is_written(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(published(tmp_path, "floor"), page)

    assert page.read_text() == f"before\n{block(tmp_path)}\nafter\n"


@pytest.mark.parametrize(
    ("value", "text"), [(0.94951, "0.9495"), (601.6, "602"), (0, "0"), ("bias", "bias"),
                        (None, "not measured")],
)  # fmt: skip
def test_a_value_is_not_rounded_over_its_goal(value, text):
    assert number_of(value) == text
