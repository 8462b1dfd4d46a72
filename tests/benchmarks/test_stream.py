"""What a stream of requests shows against the static drafter."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.real.stream import (
    SHIFT_WINDOW,
    WINDOW,
    Arm,
    over,
    passed_for_good,
    requests_below,
    rolling,
    rows_of,
    scratch_figures,
    speed_over,
    stream_figures,
)

STATIC = {"a": 2.0, "b": 1.25}
PLAIN_PER_S = 100.0


def answer(phase: str, domain: str, per_step: float, at_s: float) -> dict[str, Any]:
    """One that took twenty steps."""
    accepted = round(20 * (per_step - 1))
    return {
        "phase": phase,
        "domain": domain,
        "finished_s": at_s,
        "num_tokens": 20 + accepted,
        "version": 1,
        "acceptance": {"num_steps": 20, "num_proposed": 60, "num_accepted": accepted},
    }


def replay(domain: str, arm: str, per_step: float) -> dict[str, Any]:
    one = answer("", domain, per_step, 0.0)
    tokens = one["num_tokens"]
    return {
        "domain": domain,
        "arm": arm,
        "token_ids": [0] * tokens,
        "share_s": tokens / (PLAIN_PER_S * per_step),
        "acceptance": one["acceptance"],
    }


def recording(*phases: tuple[str, str, list[float]], per_s: float = 150.0) -> dict[str, Any]:
    """Phases with the tokens per step of each of their answers."""
    answers, at_s = [], 0.0
    for name, domain, levels in phases:
        for level in levels:
            one = answer(name, domain, level, at_s)
            at_s += one["num_tokens"] / per_s
            answers.append(one)
    levels_of = {"static": STATIC, "plain": dict.fromkeys(STATIC, 1.0)}
    levels_of["tuned"] = {domain: 1.5 * level for domain, level in STATIC.items()}
    return {
        "phases": [{"name": name} for name, _, _ in phases],
        "answers": answers,
        "replays": [replay(d, arm, s) for arm, own in levels_of.items() for d, s in own.items()],
        "failed_requests": 0,
        "num_clients": 1,
        "temperature": 0.7,
        "swaps": 3,
    }


def test_static_is_mixed_like_the_window():
    static = Arm(STATIC, {})
    window = [answer("mixed", "a", 2.0, 0.0), answer("mixed", "b", 1.25, 1.0)]

    assert over(window, static) == pytest.approx(1.0)
    assert rolling(window, 1, static) == pytest.approx([1.0, 1.0])
    assert rolling(window, 2, None) == pytest.approx([1.625])
    assert rolling(window, 3, static) == []


def test_speed_is_held_against_the_better_arm():
    window = [answer("a", "a", 2.0, at_s) for at_s in (0.0, 0.25, 0.5)]  # 160 tokens a second
    static, plain = Arm(STATIC, {"a": 200.0}), Arm({"a": 1.0}, {"a": 100.0})

    assert speed_over(window, (static, plain)) == pytest.approx(0.8)
    assert speed_over(window, (plain,)) == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        pytest.param([0.9, 1.1, 0.95, 1.0, 1.2], 3, id="it falls behind once more"),
        pytest.param([1.0, 1.1], 0, id="at once"),
        pytest.param([0.9, 1.1, 0.99], None, id="not at the end"),
        pytest.param([], None, id="no window"),
    ],
)
def test_passed_for_good_is_before_the_windows_that_are_never_below(
    ratios: list[float], expected: int | None
):
    assert passed_for_good(ratios) == expected


def test_requests_below_static_after_a_shift():
    slow, fast = [1.0] * 30, [2.0] * SHIFT_WINDOW
    phase = [answer("b", "b", level, 0.0) for level in slow + fast]

    # A window with n of the slow ones is at 1.25 once 2 (100 - n) + n >= 125: n <= 75.
    assert requests_below(phase, Arm(STATIC, {})) == 0
    assert requests_below(phase, Arm({"b": 1.85}, {})) == 15
    assert requests_below(phase, Arm({"b": 2.5}, {})) is None


def test_figures_and_rows_of_a_stream():
    made = recording(
        ("a", "a", [1.0] * WINDOW + [2.0] * WINDOW),
        ("b", "b", [1.5] * WINDOW),
        ("a-again", "a", [1.9] * WINDOW),
    )

    figures = stream_figures(made)
    rows = {row.measure: row for row in rows_of({"streams": [figures]})}

    assert figures["requests_below_static"] == {"b": 0, "a-again": None}
    assert figures["mean_over_static"] == pytest.approx((1.5 / 1.25 + 1.9 / 2.0) / 2)
    assert figures["again_over_peak"] == pytest.approx(0.95)
    speeds = figures["speed_over_best"]
    assert speeds["b"] == pytest.approx([150 / 125]) and speeds["a"] == pytest.approx([0.75] * 2)
    assert [point["tokens_per_step"] for point in figures["curve"]][:2] == [1.0, 1.0]
    below = rows["requests under static after a shift, the slowest of its shifts"]
    assert (below.value, below.holds) == ("a phase ended under it", False)
    assert [row.holds for row in rows.values()] == [False, False, False, None, False]


def test_rows_from_random_weights():
    stream = recording(("a", "a", [2.0] * WINDOW), ("b", "b", [1.5] * WINDOW))
    scratch = recording(("mixed", "a", [1.0] * 200 + [2.5] * 2 * WINDOW))

    found = scratch_figures(scratch, stream)
    rows = rows_of({"streams": [stream_figures(stream)], "scratch": found})

    assert found["passed_static"] is not None and 0 < found["passed_static"] <= 200
    assert found["passed_tuned"] is None  # 3 tokens a step, which it never has
    assert [(row.value, row.holds) for row in rows[:2]] == [
        (found["passed_static"], True),
        ("not within them", False),
    ]
