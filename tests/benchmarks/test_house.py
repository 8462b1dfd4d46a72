"""What a paired measurement of two checkouts says."""

from __future__ import annotations

import pytest

from benchmarks.house import BEFORE, NOW, Case, arms_of, cpu_plan, figures, gpu_plan, row_of

CASE = Case("tiny", 4, "eagle3", 4, 64, 48)


def turn(tokens_per_s, step_ms=2.0):
    return {"tokens_per_s": tokens_per_s, "step_ms": step_ms, "tokens_per_step": 3.0}


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    found = {NOW: [turn(10), turn(30), turn(20)], BEFORE: [turn(20), turn(10), turn(20)]}

    figure = figures(found)

    assert figure["speed_ratios"] == [0.5, 3.0, 1.0]
    assert figure["speed_ratio"] == 1.0
    assert figure["now_tokens_per_s"] == 20
    assert figure["step_ratio"] == 1.0


@pytest.mark.parametrize(("ratio", "holds"), [(0.985, True), (0.975, False)])
def test_a_row_holds_within_the_tolerance(ratio, holds):
    row = row_of(CASE, {"speed_ratio": ratio}, tolerance=0.02)

    assert (row.row, row.goal, row.holds) == ("tiny, batch 4, K = 4", "at least 0.98", holds)


def test_without_another_checkout_a_row_is_a_figure_without_a_goal():
    figure = figures({NOW: [turn(10, step_ms=None)]})
    row = row_of(CASE, figure, tolerance=0.02)

    assert figure["now_step_ms"] is None
    assert (row.value, row.goal, row.holds) == (10, None, None)


def test_plans_hold_the_cases_that_were_asked_for():
    cpu = cpu_plan(["bundled", "SmolLM2-135M"], turns=5)
    gpu = gpu_plan(["Qwen3-8B", "Qwen3-0.6B"], turns=5)

    assert {(c.shape, c.batch, c.draft_k) for c in cpu.cases} == {
        (shape, batch, k)
        for shape in ("bundled", "SmolLM2-135M")
        for batch in (1, 4)
        for k in range(7)
    }
    assert {(c.batch, c.draft_k, c.full_s is not None) for c in gpu.cases} == {
        (batch, k, is_full) for k in (0, 4) for batch, is_full in ((1, 0), (32, 0), (32, 1))
    }


def test_arms_are_named_by_what_drafts_and_how_far():
    plan = cpu_plan(["bundled"], 5, arms_of("plain,lookup:4,learned:2"), 0.5)

    assert [(c.drafter, c.draft_k, c.batch) for c in plan.cases[:3]] == [
        ("none", 0, 1),
        ("suffix", 4, 1),
        ("eagle3", 2, 1),
    ]
    assert str(plan.cases[1]) == "bundled, batch 1, temperature 0.5, lookup, K = 4"
    for wrong in ("plain:1", "learned", "learned:7", "index:2", ""):
        with pytest.raises(ValueError, match="unknown arm"):
            arms_of(wrong)
