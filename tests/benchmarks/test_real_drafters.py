"""What the table of drafters claims, from figures."""

from typing import Any

import pytest

from benchmarks.harness.arms import LOOKUP
from benchmarks.real.choosing import ARM_DOMAINS, PLAIN
from benchmarks.real.drafters import POLICY, claims, judged_at, table


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


def test_a_drafter_is_judged_before_the_first_update_and_after_the_last_row() -> None:
    places = judged_at(4_000_000)
    assert places[0] == 0 and places[-1] == 4_000_000 and places == sorted(places)
