"""What a policy is held against, among arms of which each was measured a few times."""

from __future__ import annotations

import random

from benchmarks.real.choosing import over_chosen


def test_the_best_in_the_other_turns_is_no_lucky_one():
    """Twenty arms are all as fast as the policy, and turns scatter by a tenth."""
    draw = random.Random(0)
    names = [f"K = {k}" for k in range(20)]
    fair, lucky = [], []
    for _ in range(200):
        by_turn = {one: [draw.gauss(1.0, 0.1) for _ in range(3)] for one in ("policy", *names)}
        found = over_chosen(by_turn, "policy", names)
        assert found is not None
        fair.append(found)
        medians = [sorted(by_turn[one])[1] for one in names]
        lucky.append(sorted(by_turn["policy"])[1] / max(medians))

    assert abs(sum(fair) / len(fair) - 1) < 0.03
    assert sum(lucky) / len(lucky) < 0.92


def test_one_turn_chooses_nothing():
    assert over_chosen({"policy": [1.0], "K = 1": [1.1]}, "policy", ["K = 1"]) is None


def test_a_policy_that_is_slower_than_the_chosen_one_is_seen():
    by_turn = {"policy": [1.0, 1.0, 1.0], "K = 1": [1.25, 1.25, 1.25], "K = 2": [0.5, 0.5, 1.4]}

    assert over_chosen(by_turn, "policy", ["K = 1", "K = 2"]) == 0.8
