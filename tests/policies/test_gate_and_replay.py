"""Candidates pass on evidence only; replay keeps the newest traces and samples older ones."""

from __future__ import annotations

from collections import Counter

import pytest

from policies.gate import gate
from policies.replay import Replay, add, is_held_out


def test_a_candidate_passes_when_it_beats_the_incumbent_by_the_margin():
    assert gate(2.02, 2.0, 1.005, 100).passed
    assert not gate(2.005, 2.0, 1.005, 100).passed


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf")])
def test_figures_that_are_not_finite_never_pass(figure):
    assert not gate(figure, 2.0, 1.005, 100).passed
    assert not gate(3.0, figure, 1.005, 100).passed


def test_nothing_passes_without_rows_and_the_reason_says_so():
    verdict = gate(3.0, 2.0, 1.005, 0)
    assert (verdict.passed, verdict.reason) == (False, "no held-out rows to judge on")


def kept(num, *, seed=0, recent=10, reservoir=20, step=7):
    replay = Replay()
    for start in range(0, num, step):
        replay = add(
            replay,
            range(start, min(start + step, num)),
            recent_traces=recent,
            reservoir_traces=reservoir,
            seed=seed,
        )
    return replay


def test_the_newest_are_recent_and_older_ones_are_sampled():
    replay = kept(200)
    assert replay.recent == tuple(range(190, 200))
    assert len(set(replay.reservoir)) == 20
    assert max(replay.reservoir) < 190
    assert replay.num_left == 190


def test_few_traces_are_all_kept():
    replay = kept(25)
    assert sorted(replay.recent + replay.reservoir) == list(range(25))


def test_the_reservoir_is_uniform_over_all_older_traces():
    seen = Counter(trace // 19 for seed in range(400) for trace in kept(200, seed=seed).reservoir)
    assert set(seen) == set(range(10))
    assert all(abs(count - 800) < 120 for count in seen.values())  # 4.5 standard deviations


def test_sampling_depends_only_on_order_and_seed():
    assert kept(200, step=7) == kept(200, step=1)
    assert kept(200, seed=1) != kept(200, seed=2)
    assert kept(50, reservoir=0).reservoir == ()


def test_one_trace_in_eight_is_held_out_for_good():
    keys = [f"server/0/{seq}" for seq in range(8000)]
    held = [key for key in keys if is_held_out(key, 8)]
    assert 850 < len(held) < 1150
    assert held == [key for key in keys if is_held_out(key, 8)]
    with pytest.raises(ValueError, match="every must be >= 1"):
        is_held_out("a", 0)


def test_a_candidate_may_not_forget_earlier_traffic():
    better = {"candidate": 3.2, "incumbent": 3.0, "margin": 1.0, "num_rows": 10}

    assert gate(**better, older=(3.77, 4.0)).passed
    verdict = gate(**better, older=(3.74, 4.0))  # loses more there than it gains on the newest
    assert not verdict.passed
    assert "forgets earlier traffic: candidate 3.7400 there, below 0.94 x" in verdict.reason
    small = gate(candidate=3.06, incumbent=3.0, margin=1.0, num_rows=10, older=(3.9, 4.0))
    assert not small.passed, "a small gain does not pay for a larger loss"
    assert not gate(**better, older=(float("nan"), 4.0)).passed
