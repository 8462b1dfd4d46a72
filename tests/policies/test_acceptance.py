"""Acceptance by position is learned from censored rounds, and old evidence decays."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate
from operator import mul

import pytest

from policies.acceptance import AcceptanceModel
from tests.policies.simulated import DRAFTERS, Traits


def acceptance(half_life_rounds=200, drafters=DRAFTERS):
    return AcceptanceModel(half_life_rounds, drafters)


def feed(model, hazards, *, rounds, k, drafter="eagle3", bucket=0, seed=0):
    rng = random.Random(seed)
    for _ in range(rounds):
        accepted = 0
        while accepted < k and rng.random() < hazards[accepted]:
            accepted += 1
        model.tick(1)
        model.observe(drafter, {bucket: {(k, accepted): 1}}, batch=1)


def test_hazards_are_learned_at_every_position_reached():
    truth = (0.9, 0.7, 0.5, 0.8)
    model = acceptance(half_life_rounds=2000)
    feed(model, truth, rounds=4000, k=4)
    assert model.hazards("eagle3", 0)[:4] == pytest.approx(truth, abs=0.05)


def test_expected_tokens_is_one_plus_the_sum_of_survivals():
    model = acceptance()
    feed(model, (0.8,) * 4, rounds=100, k=4)
    survivals = list(accumulate(model.hazards("eagle3", 0), mul))
    expected = model.expected_tokens("eagle3")[0]
    assert expected[0] == 1
    assert expected[3] == pytest.approx(1 + sum(survivals[:3]))
    assert len(expected) == 17


def test_a_short_draft_is_no_evidence_of_positions_beyond_it():
    model, other = acceptance(), acceptance()
    model.observe("eagle3", {0: {(2, 2): 1}}, batch=1)
    other.observe("eagle3", {0: {(8, 2): 1}}, batch=1)
    assert model.figures()["eagle3/0"]["rounds"][:4] == [1.0, 1.0, 0.0, 0.0]
    assert other.figures()["eagle3/0"]["rounds"][:4] == [1.0, 1.0, 1.0, 0.0]


def test_a_random_drafter_is_recognised_within_twenty_rounds():
    model = acceptance()
    feed(model, (0.001,) * 8, rounds=20, k=4)
    assert model.expected_tokens("eagle3")[0][4] < 1.15


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.4), (0.4, 0.9)])
def test_a_shift_is_followed_long_before_the_half_life(before, after):
    model = acceptance(half_life_rounds=2000)
    feed(model, (before,) * 4, rounds=3000, k=4)
    assert model.figures()["eagle3/0"]["shifts"] <= 2
    feed(model, (after,) * 4, rounds=150, k=4, seed=1)
    assert model.hazards("eagle3", 0)[0] == pytest.approx(after, abs=0.12)


def test_an_idle_drafter_is_remembered_weakly():
    model = acceptance()
    feed(model, (0.001,) * 8, rounds=50, k=4)
    model.tick(100_000)
    assert model.hazards("eagle3", 0)[0] < 0.1
    for _ in range(6):
        model.observe("eagle3", {0: {(4, 4): 1}}, batch=1)
    assert model.hazards("eagle3", 0)[0] > 0.4


def test_kinds_of_match_are_learned_separately():
    model = acceptance()
    feed(model, (0.95,) * 4, rounds=100, k=4, drafter="suffix", bucket=5)
    feed(model, (0.05,) * 4, rounds=100, k=4, drafter="suffix", bucket=1)
    assert model.expected_tokens("suffix")[5][4] > 4
    assert model.expected_tokens("suffix")[1][4] < 1.2


def feed_both(model):
    """Alternate easy rows after a long match and hard rows without one."""
    for seed in range(60):
        feed(model, (0.9,) * 4, rounds=1, k=4, bucket=5, seed=seed)
        feed(model, (0.3,) * 4, rounds=1, k=4, bucket=0, seed=seed)


def test_a_bucket_never_seen_takes_a_neural_drafters_average():
    model = acceptance()
    feed_both(model)
    assert model.hazards("eagle3", 5)[0] == pytest.approx(0.9, abs=0.12)
    assert model.hazards("eagle3", 0)[0] == pytest.approx(0.3, abs=0.12)
    assert 0.4 < model.hazards("eagle3", 3)[0] < 0.8


def test_a_drafter_that_needs_a_match_gains_nothing_without_one():
    drafters = {"lookup": replace(DRAFTERS["suffix"], prior_acceptance=(0.6,)), **DRAFTERS}
    model = acceptance(drafters=drafters)
    assert set(model.expected_tokens("suffix")[0]) == {1.0}
    assert set(model.expected_tokens("lookup")[0]) == {1.0}
    assert model.expected_tokens("lookup")[1][1] == pytest.approx(1.6)
    assert model.expected_tokens("eagle3")[0][1] == pytest.approx(1.6)


def test_matches_are_worth_what_was_kept_after_them_and_nobody_computes_it_twice():
    model = acceptance()
    feed(model, (0.95,) * 4, rounds=100, k=4, drafter="suffix", bucket=1)
    feed(model, (0.05,) * 4, rounds=100, k=4, drafter="suffix", bucket=5)
    values = model.match_values("suffix")
    assert values[1] > values[4] > values[5]
    assert values == [row[-1] for row in model.expected_tokens("suffix")]
    assert model.match_values("suffix") is values
    feed(model, (0.95,) * 4, rounds=1, k=4, drafter="suffix", bucket=5)
    assert model.match_values("suffix")[5] > values[5]
    assert model.match_values("unknown") is None


def test_priors_are_one_or_one_for_each_kind_of_match():
    traits = Traits(
        on_device=True, needs_match=False, prior_acceptance=(0.5,) * 3, prior_draft_cost=0
    )
    with pytest.raises(
        ValueError, match="prior_acceptance of drafter 'odd' must hold 1 or 6 values"
    ):
        acceptance(drafters={"odd": traits, **DRAFTERS})
