"""What the benchmark of candidates draws from real rounds: worse versions go, equal ones stay."""

from __future__ import annotations

import random

from benchmarks.candidates.__main__ import most_rounds, rows_of
from benchmarks.candidates.good import watched


def requests(acceptance, num=30, seed=0):
    """Requests of 30 rounds with K = 4, each token of them accepted with this probability."""
    chance = random.Random(seed)

    def accepted():
        kept = 0
        while kept < 4 and chance.random() < acceptance:
            kept += 1
        return kept

    return [[(4, accepted()) for _ in range(30)] for _ in range(num)]


def test_a_version_that_is_much_worse_is_always_rolled_back_and_within_the_windows():
    found = watched(requests(0.8), requests(0.2, seed=1), 200, 0.15, num_swaps=20, seeds=(0,))
    assert found["rolled_back"] == 20
    assert found["longest_rounds"] <= most_rounds(200)


def test_an_equal_and_a_better_version_stay():
    same, better = requests(0.6, num=60), requests(0.8, num=60, seed=1)
    for new in (same, better):
        found = watched(same, new, 200, 0.15, num_swaps=20, seeds=(0,))
        assert (found["rolled_back"], found["undecided"]) == (0, 0)


def test_a_bad_one_that_is_kept_or_drafts_for_too_long_fails():
    def rows(kept, rounds):
        one = {"candidates": 1, "live": {"kept": kept}, "rounds": [rounds]}
        found = {"bad": {"NaN": one}, "most_rounds": 100,
                 "good": {"watch": {}, "live": {}, "gate": {}}}  # fmt: skip
        return [row.holds for row in rows_of(found)][1:]

    assert rows(0, 100) == [True, True]
    assert rows(1, 100) == [False, True]
    assert rows(0, 101) == [True, False]
