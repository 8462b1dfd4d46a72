"""Acceptance by position is learned from censored rounds and forgets."""

from __future__ import annotations

import random
from itertools import accumulate
from operator import mul

import pytest

from policies.acceptance import AcceptanceModel, suffix_bucket


def feed(model, hazards, *, rounds, k, drafter="eagle3", bucket=0, seed=0):
    rng = random.Random(seed)
    for _ in range(rounds):
        accepted = 0
        while accepted < k and rng.random() < hazards[accepted]:
            accepted += 1
        model.tick(1)
        model.observe(drafter, bucket, [(k, accepted, 1)], batch=1)


def test_hazards_are_learned_at_every_position_reached():
    truth = (0.9, 0.7, 0.5, 0.8)
    model = AcceptanceModel(half_life_rounds=2000)
    feed(model, truth, rounds=4000, k=4)
    assert model.hazards("eagle3", 0)[:4] == pytest.approx(truth, abs=0.05)


def test_expected_tokens_is_one_plus_the_sum_of_survivals():
    model = AcceptanceModel(200)
    feed(model, (0.8,) * 4, rounds=100, k=4)
    survivals = list(accumulate(model.hazards("eagle3", 0), mul))
    expected = model.expected_tokens("eagle3", 0)
    assert expected[0] == 1
    assert expected[3] == pytest.approx(1 + sum(survivals[:3]))
    assert len(expected) == 17


def test_a_short_draft_says_nothing_of_positions_beyond_it():
    model, other = AcceptanceModel(200), AcceptanceModel(200)
    model.observe("eagle3", 0, [(2, 2, 1)], batch=1)
    other.observe("eagle3", 0, [(8, 2, 1)], batch=1)
    assert model.figures()["eagle3/0"]["rounds"][:4] == [1.0, 1.0, 0.0, 0.0]
    assert other.figures()["eagle3/0"]["rounds"][:4] == [1.0, 1.0, 1.0, 0.0]


def test_a_random_drafter_is_found_out_within_twenty_rounds():
    model = AcceptanceModel(200)
    feed(model, (0.001,) * 8, rounds=20, k=4)
    assert model.expected_tokens("eagle3", 0)[4] < 1.15


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.4), (0.4, 0.9)])
def test_a_shift_is_followed_long_before_the_half_life(before, after):
    model = AcceptanceModel(half_life_rounds=2000)
    feed(model, (before,) * 4, rounds=3000, k=4)
    assert model.figures()["eagle3/0"]["shifts"] <= 2
    feed(model, (after,) * 4, rounds=150, k=4, seed=1)
    assert model.hazards("eagle3", 0)[0] == pytest.approx(after, abs=0.12)


def test_an_idle_drafter_is_remembered_weakly():
    model = AcceptanceModel(200)
    feed(model, (0.001,) * 8, rounds=50, k=4)
    model.tick(100_000)
    assert model.hazards("eagle3", 0)[0] < 0.1
    for _ in range(6):
        model.observe("eagle3", 0, [(4, 4, 1)], batch=1)
    assert model.hazards("eagle3", 0)[0] > 0.4


def test_match_lengths_are_learned_apart():
    model = AcceptanceModel(200)
    feed(model, (0.95,) * 4, rounds=100, k=4, drafter="suffix", bucket=suffix_bucket(9))
    feed(model, (0.05,) * 4, rounds=100, k=4, drafter="suffix", bucket=suffix_bucket(2))
    assert model.expected_tokens("suffix", 5)[4] > 4
    assert model.expected_tokens("suffix", 1)[4] < 1.2


def feed_both(model):
    """Rows after a long match are easy, those without one hard; they come in turn."""
    for seed in range(60):
        feed(model, (0.9,) * 4, rounds=1, k=4, bucket=5, seed=seed)
        feed(model, (0.3,) * 4, rounds=1, k=4, bucket=0, seed=seed)


def test_a_neural_drafter_is_known_by_match_length_and_as_a_whole_where_it_is_not():
    model = AcceptanceModel(200)
    feed_both(model)
    assert model.hazards("eagle3", 5)[0] == pytest.approx(0.9, abs=0.12)
    assert model.hazards("eagle3", 0)[0] == pytest.approx(0.3, abs=0.12)
    assert 0.4 < model.hazards("eagle3", 3)[0] < 0.8


def test_better_weights_keep_what_is_hard_hard():
    model = AcceptanceModel(200)
    model.on_swap("eagle3", {"acceptance": [0.6] * 4})
    feed_both(model)
    before = [model.hazards("eagle3", bucket)[0] for bucket in (0, 5)]
    model.on_swap("eagle3", {"acceptance": [0.8] * 4})
    after = [model.hazards("eagle3", bucket)[0] for bucket in (0, 5)]
    assert before[0] + 0.1 < after[0] < 0.65
    assert before[1] + 0.01 < after[1] < 1
    model.on_swap("eagle3", {"acceptance": [0.6] * 4})
    again = [model.hazards("eagle3", bucket)[0] for bucket in (0, 5)]
    assert again == pytest.approx(before, abs=0.1)


def test_a_suffix_row_without_a_match_gains_nothing():
    assert set(AcceptanceModel(200).expected_tokens("suffix", 0)) == {1.0}


def test_match_lengths_fall_in_their_buckets():
    lengths = [0, 1, 2, 3, 4, 5, 6, 8, 9, 12]
    assert [suffix_bucket(n) for n in lengths] == [0, 1, 1, 2, 3, 3, 4, 4, 5, 5]


def test_a_swap_with_a_calibration_starts_from_it():
    model = AcceptanceModel(200)
    feed(model, (0.1,) * 4, rounds=300, k=4)
    model.on_swap("eagle3", {"acceptance": [0.9, 0.8]})
    assert model.hazards("eagle3", 0)[:2] == pytest.approx([0.9, 0.8], abs=0.1)


@pytest.mark.parametrize(
    "calibration",
    [{}, {"acceptance": [2.0]}, {"acceptance": "0.9"}, {"acceptance": [float("nan")]}],
)
def test_a_swap_without_a_usable_calibration_keeps_a_weak_memory(calibration):
    model = AcceptanceModel(200)
    feed(model, (0.02,) * 4, rounds=300, k=4)
    model.on_swap("eagle3", calibration)
    assert 0.2 < model.hazards("eagle3", 0)[0] < 0.6
    assert max(model.figures()["eagle3/0"]["rounds"]) <= 2


def test_a_swap_leaves_the_suffix_figures_alone():
    model = AcceptanceModel(200)
    feed(model, (0.9,) * 4, rounds=100, k=4, drafter="suffix", bucket=3)
    before = model.hazards("suffix", 3)
    model.on_swap("eagle3", {})
    assert model.hazards("suffix", 3) == before
