"""The README's headline and figures are those of the newest published demo."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.demo import median_run, result_of
from examples.readme import BEGIN, END, block, with_block
from examples.report import build_report, headline
from oracles.support import REPOSITORY
from tests.examples.sample import sample_recording


@pytest.fixture(scope="module")
def report():
    return build_report(sample_recording())


def slower(factor: float):
    recording = sample_recording()
    replays = tuple(
        replace(r, share_s=factor * r.share_s) if r.arm == "tuned" else r for r in recording.replays
    )
    return build_report(replace(recording, replays=replays))


def test_the_readme_shows_what_the_published_result_says():
    readme = (REPOSITORY / "README.md").read_text()
    result = json.loads((REPOSITORY / "benchmarks" / "results" / "demo.json").read_text())

    assert with_block(readme, block(result)) == readme


def test_the_block_has_headline_cost_and_a_row_for_each_phase(report):
    written = block(report)

    assert f"**{headline(report)[0]}.**" in written
    assert "temperature 0.4" in written and "Learning took 60 CPU-seconds" in written
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| python",
        "| c",
        "| docs",
        "| python-again",
        "| shifted phases together",
    ]
    assert {row.count("|") for row in rows} == {11}


def test_a_demo_that_lost_leads_the_readme_too():
    assert "**Learning did not pay: 0.90 times" in block(slower(1.6))


def test_only_the_block_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"

    assert with_block(text, "new") == "before\nnew\nafter\n"
    for spoiled in ("nothing", BEGIN, f"{END} {BEGIN}"):
        with pytest.raises(ValueError, match="must hold"):
            with_block(spoiled, "new")


def test_the_published_run_is_the_median_one():
    reports = [slower(factor) for factor in (1.0, 3.0, 2.0)]

    assert median_run(reports) == 2
    result = result_of(reports)
    assert result["speedup_vs_static"] == reports[2]["speedup_vs_static"]
    assert len(result["runs"]) == 3
    assert "The median of 3 runs; over all of them, tuned ÷ plain 0." in block(result)
    assert median_run([{"speedup_vs_static": None}, {"speedup_vs_static": 0.9}]) == 1
