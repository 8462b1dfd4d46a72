"""What the table of drafters claims, from figures."""

import json
from typing import Any

import pytest

from benchmarks.harness.arms import LOOKUP
from benchmarks.harness.results import RESULTS, Row, write_rows
from benchmarks.real.choosing import ARM_DOMAINS, PLAIN
from benchmarks.real.drafters import judged_at
from benchmarks.real.drafters_table import POLICY, ROWS, claims, day_0, row_name, table, usual_model
from oracles.support import REPOSITORY


def cell(arm: str, ratio: float, tokens: float) -> dict[str, Any]:
    return {
        "temperature": 0.7,
        "clients": 1,
        "arm": arm,
        "turns": 1,
        "tokens_per_s": dict.fromkeys(ARM_DOMAINS, 100 * ratio),
        "tokens_per_step": dict.fromkeys(ARM_DOMAINS, tokens),
        "vs_plain": dict.fromkeys(ARM_DOMAINS, ratio),
    }


def figures(tokens: float, ratio: float, simulated: list[float]) -> dict[str, Any]:
    return {
        "parameters": 2_000_000,
        "cells": [
            cell(PLAIN, 1.0, 1.0),
            cell("K = 2", ratio / 2, tokens / 2),
            cell("K = 4", ratio, tokens),
            cell(POLICY, ratio - 0.25, tokens),
        ],
        "curve": [
            {"rows": 10 * n, "seconds": float(n), "tokens_per_step": value}
            for n, value in enumerate(simulated)
        ],
    }


def value_of(kinds: dict[str, Any], part: str, measure: str) -> tuple[Any, bool | None]:
    found = [row for row in claims(kinds) if part in row.row and row.measure == measure]
    assert len(found) == 1, found
    return found[0].value, found[0].holds


def index() -> dict[str, Any]:
    found = figures(1.3, 1.1, [])
    del found["curve"], found["parameters"]
    return found


def test_a_drafter_has_passed_the_index_when_its_simulated_tokens_are_above_the_measured_ones() -> (
    None
):
    kinds = {LOOKUP: index(), "new": figures(2.0, 1.6, [1.0, 1.2, 1.3, 1.4, 2.02])}

    assert value_of(kinds, "from nothing", "rows trained") == (30, True)
    assert value_of(kinds, "from nothing", "seconds of updates") == (3.0, True)

    never = {LOOKUP: index(), "new": figures(1.2, 1.6, [1.0, 1.2])}
    assert value_of(never, "from nothing", "rows trained") == (None, False)


def test_simulation_is_compared_with_whole_answers_and_not_with_a_window_of_time() -> None:
    measure = "tokens per step, simulated over live, less 1"
    given = figures(9.0, 1.6, [1.0, 2.04])
    ways = {"temperature 0": (2.0, 2.2), "temperature 0.7": (2.0, 2.04), "none": (None, None)}
    given["parity"] = {
        way: {"requests": 3, "rounds": 9, "live": live, "simulated": simulated}
        for way, (live, simulated) in ways.items()
    }

    off, holds = value_of({"new": given}, "new, K = 4, temperature 0.7,", measure)
    assert off == pytest.approx(0.02) and holds
    assert not value_of({"new": given}, "new, K = 4, temperature 0,", measure)[1]
    assert not [r for r in claims({"new": given}) if "none" in r.row and r.measure == measure]


def test_the_best_drafter_of_one_client_is_held_to_its_goal_and_the_index_does_not_count() -> None:
    kinds = {LOOKUP: figures(3.0, 9.0, []), "new": figures(2.0, 1.6, [1.0, 2.0])}
    measure = "tokens/s over plain decoding"
    assert value_of(kinds, "best drafter", measure) == (1.6, True)

    slow = {"new": figures(2.0, 1.4, [1.0, 2.0])}
    assert value_of(slow, "best drafter", measure) == (1.4, False)


def test_the_table_says_the_best_fixed_k_and_the_policy_beside_it() -> None:
    lines = table({"new": figures(2.0, 1.6, [1.0, 2.0])}).splitlines()

    assert len(lines) == 3
    assert lines[2].startswith("| `new` | 2.0 M |")
    assert "1.60 (K = 4, 2.00), 1.35" in lines[2]


def test_day_0_says_what_was_needed_and_whose_drafter_never_passed_the_index() -> None:
    collected = {"collected": {"requests": 1234}}
    kinds = {
        LOOKUP: index(),
        "slow": figures(2.0, 1.6, [1.0, 1.2, 1.3, 1.4, 2.02]) | collected,
        "new, 50 positions": figures(2.0, 1.6, [1.0, 1.35]) | collected,
        "never": figures(2.0, 1.6, [1.0, 1.3]) | collected,
        "new, Other-1B": figures(2.0, 1.6, [1.0, 9.0]) | collected | {"target": "Other-1B"},
    }

    head, _, *lines = day_0(kinds).splitlines()

    assert "the index's 1.30" in head
    assert lines == [
        "| `new`, 50 positions | 1,234 | 10 | 1.0 |",
        "| `slow` | 1,234 | 30 | 3.0 |",
        "| `never` | 1,234 | not within 10 |  |",
    ]
    assert day_0({"slow": kinds["slow"]}) == "", "nothing is known of the index"


def test_the_docs_show_what_the_command_prints() -> None:
    """A row that is measured again moves claims of others, too: what the index measures, what all
    must pass."""
    docs = (REPOSITORY / "docs/drafters.md").read_text()
    kinds = json.loads((RESULTS / "drafters.json").read_text())["kinds"]

    for tables in (table(kinds), day_0(kinds)):
        for line in filter(None, tables.splitlines()):
            assert f"{line}\n" in docs


def test_a_drafter_is_judged_before_the_first_update_and_after_the_last_row() -> None:
    places = judged_at(4_000_000)
    assert places[0] == 0 and places[-1] == 4_000_000 and places == sorted(places)


def test_a_row_is_named_by_whatever_is_not_usual_about_it() -> None:
    usual, gguf = f"a/{usual_model()}.Q4_1.gguf", "a/Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf"

    assert row_name("mtp", usual, ROWS, []) == "mtp"
    assert row_name("eagle3", usual, 8_000_000, []) == "eagle3, 8,000,000 positions"
    assert row_name("eagle3", gguf, ROWS, [f"target={gguf}"]) == (
        "eagle3, Qwen2.5-Coder-0.5B-Instruct"
    )
    assert row_name(LOOKUP, usual, None, ["a.b=c"]) == f"{LOOKUP}, a.b=c"


def test_rows_of_another_target_are_judged_by_its_own_index_and_stand_in_their_own_table() -> None:
    simulated = [1.0, 1.2, 1.4, 2.0]
    other = {"target": "Other-1B", "parity": {"temperature 0": {"live": 2.0, "simulated": 2.02}}}
    kinds = {
        LOOKUP: index(),
        "new": figures(2.0, 1.6, simulated),
        "new, Other-1B": figures(3.0, 2.5, simulated) | other,
    }

    assert value_of(kinds, "from nothing", "rows trained") == (20, True)  # of the usual one alone
    assert value_of(kinds, "best drafter", "tokens/s over plain decoding") == (1.6, True)
    off = value_of(kinds, "new, Other-1B, K = 4", "tokens per step, simulated over live, less 1")
    assert off == (pytest.approx(0.01), True)
    usual, own = table(kinds).split("\n\nThe same on Other-1B:\n\n")
    assert "`new`, Other-1B" in own and "Other-1B" not in usual

    kinds[f"{LOOKUP}, Other-1B"] = figures(1.9, 1.1, []) | {"target": "Other-1B"}
    found = [r for r in claims(kinds) if r.row.startswith("new, Other-1B, from nothing")]
    assert [row.value for row in found] == [30, 3.0]


def test_published_figures_are_claims_and_a_table_of_each_target() -> None:
    kinds = json.loads((RESULTS / "drafters.json").read_text())["kinds"]

    rows = [row.row for row in claims(kinds)]
    tables = table(kinds).split("\n\nThe same on ")

    for name, figures in kinds.items():
        assert not figures["cells"] or any(row.startswith(f"{name}, ") for row in rows), name
        if "parity" in figures:
            assert f"{name}, K = 4, temperature 0, whole answers" in rows
    others = {figures["target"] for figures in kinds.values() if "target" in figures}
    assert len(tables) == len(others | {usual_model()})


def test_rows_are_written_beside_the_result_and_unchanged_ones_stay_as_they_were(tmp_path) -> None:
    first, second = Row("a", "m", 1.0, None, None), Row("b", "m", 2.0, None, None)
    source = "python -m this"
    path = write_rows("topic", [first, second], source, tmp_path)
    old = [{**row, "commit": "before"} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(old))

    changed = Row("b", "m", 3.0, None, None)
    write_rows("topic", [first, changed], source, tmp_path, keeps_unchanged=True)

    found = json.loads((tmp_path / "rows/topic.json").read_text())
    assert [row["value"] for row in found] == [1.0, 3.0]
    assert [row["commit"] == "before" for row in found] == [True, False]
