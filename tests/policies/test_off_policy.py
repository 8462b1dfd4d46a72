"""Estimates from another policy's log recover a known value, and say how sure they are."""

from __future__ import annotations

import numpy as np
import pytest

from policies.off_policy import (
    Reward,
    by_position,
    doubly_robust,
    importance_weights,
    ips,
    snips,
    throughput,
)

TRUTH = np.array([1.0, 1.8, 2.4])
"""Mean reward of each action at load 0; at load 1 the order is reversed."""


def synthetic(num_steps, seed=0):
    """Contexts, actions that depend on them, their probabilities, and rewards that scatter."""
    rng = np.random.default_rng(seed)
    loads = rng.integers(0, 2, num_steps)
    law = np.where(loads[:, None] == 0, (0.7, 0.2, 0.1), (0.2, 0.2, 0.6))
    actions = (rng.random(num_steps)[:, None] > law.cumsum(axis=1)).sum(axis=1)
    means = np.where(loads[:, None] == 0, TRUTH, TRUTH[::-1])
    rewards = means[np.arange(num_steps), actions] + rng.normal(0, 0.5, num_steps)
    return loads, actions, law[np.arange(num_steps), actions], means, rewards


@pytest.mark.parametrize("estimate", [ips, snips])
@pytest.mark.parametrize("action", [0, 1, 2])
def test_weighted_estimates_recover_the_value_of_every_action(estimate, action):
    """Also of those that the log took seldom, and at loads at which it took them seldom."""
    _, actions, propensity, means, rewards = synthetic(20_000)
    weights = importance_weights(actions == action, propensity)

    found = estimate(Reward(rewards), weights)

    truth = means[:, action].mean()
    assert abs(found.value - truth) < 0.05
    assert found.low < truth < found.high
    assert found.effective_steps == pytest.approx(weights.sum() ** 2 / (weights**2).sum())


def test_a_policy_that_looks_at_the_load_is_worth_more_than_the_log():
    loads, actions, propensity, _means, rewards = synthetic(20_000)
    wanted = np.where(loads == 0, 2, 0)
    weights = importance_weights(actions == wanted, propensity)

    found = snips(Reward(rewards), weights)

    assert abs(found.value - 2.4) < 0.03
    assert rewards.mean() < 1.6
    assert found.low < 2.4 < found.high


def test_a_good_model_narrows_the_interval_and_a_wrong_one_does_no_harm():
    _loads, actions, propensity, means, rewards = synthetic(20_000)
    at, wanted = np.arange(len(actions)), np.full(len(actions), 2)
    weights = importance_weights(actions == wanted, propensity)
    good = Reward(rewards, means[at, actions], means[at, wanted])
    wrong = Reward(rewards, np.full(len(at), 5.0), np.full(len(at), 5.0))

    plain, right, off = ips(good, weights), doubly_robust(good, weights), doubly_robust(
        wrong, weights
    )  # fmt: skip

    truth = means[:, 2].mean()
    assert abs(right.value - truth) < 0.03 and abs(off.value - truth) < 0.15
    assert right.high - right.low < 0.5 * (plain.high - plain.low)
    assert off.low < truth < off.high


def test_a_wrong_propensity_is_mended_by_a_good_model_only():
    _loads, actions, propensity, means, rewards = synthetic(20_000)
    at, wanted = np.arange(len(actions)), np.full(len(actions), 2)
    weights = importance_weights(actions == wanted, np.sqrt(propensity))
    truth = means[:, 2].mean()

    assert abs(ips(Reward(rewards), weights).value - truth) > 0.3
    good = Reward(rewards, means[at, actions], means[at, wanted])
    assert abs(doubly_robust(good, weights).value - truth) < 0.03


def test_intervals_cover_the_truth_as_often_as_they_say():
    hits = 0
    for seed in range(100):
        _, actions, propensity, _means, rewards = synthetic(600, seed)
        weights = importance_weights(actions == 1, propensity)
        found = snips(Reward(rewards), weights, seed)
        hits += found.low < 1.8 < found.high  # the middle action is alike at both loads
    assert 87 <= hits <= 100


def test_throughput_joins_loads_by_the_tokens_that_they_have():
    """At 10 and 40 tokens/s, as many tokens each, the whole makes 16 a second, not 25."""
    loads = np.repeat([0, 1], 500)
    tokens, seconds = np.ones(1000), np.where(loads == 0, 0.1, 0.025)
    weights = np.ones(1000)

    found = throughput(Reward(tokens), Reward(seconds), weights, loads)

    assert found is not None
    assert found.value == pytest.approx(16)
    assert throughput(Reward(tokens), Reward(seconds), (loads == 0).astype(float), loads) is None


@pytest.mark.parametrize("survival", [(0.6, 0.3, 0.2), (0.9, 0.9, 0.9)], ids=["right", "wrong"])
def test_positions_are_known_from_every_draft_that_reached_them(survival):
    """Whatever the model says, and at loads whose K are drawn otherwise."""
    rng, num = np.random.default_rng(0), 30_000
    loads = rng.integers(0, 2, num)
    law = np.where(loads[:, None] == 0, (0.4, 0.3, 0.2, 0.1), (0.1, 0.1, 0.3, 0.5))
    taken = (rng.random(num)[:, None] > law.cumsum(axis=1)).sum(axis=1)
    # Kept tokens of a draft: 0.6 at least one, 0.3 at least two, 0.2 three.
    whole = (rng.random(num)[:, None] < (0.6, 0.3, 0.2)).sum(axis=1)
    kept = np.minimum(whole, taken)[:, None] >= (1, 2, 3)
    model, propensity = np.tile(survival, (num, 1)), law[np.arange(num), taken]

    for k, truth in enumerate((0.0, 0.6, 0.9, 1.1)):
        wanted = np.full(num, k)
        found = by_position(kept.astype(float), model, taken, wanted, propensity, loads)
        assert found.mean() == pytest.approx(truth, abs=0.02)
    found = by_position(
        kept.astype(float), model, taken, np.where(loads == 0, 1, 3), propensity, loads
    )
    assert found[loads == 0].mean() == pytest.approx(0.6, abs=0.02)
    assert found[loads == 1].mean() == pytest.approx(1.1, abs=0.02)


def test_a_load_with_few_steps_is_not_taken_for_certain():
    """Its steps in one block would add no width to the interval, however they scatter."""
    loads = np.array([0] * 600 + [1] * 12)
    seconds = np.where(loads == 1, np.where(np.arange(612) % 2, 1.0, 10.0), 1.0)

    sampled = throughput(Reward(np.ones(612)), Reward(seconds), np.ones(612), loads)

    assert sampled is not None
    found = sampled.estimate()
    assert found.low < 0.99 * found.value < 1.01 * found.value < found.high


def test_nothing_is_estimated_without_a_step_in_common():
    weights = importance_weights(np.zeros(4, np.bool_), np.full(4, 0.5))
    assert ips(Reward(np.ones(4)), weights) is None
    with pytest.raises(ValueError, match="probability 0"):
        importance_weights(np.ones(1, np.bool_), np.zeros(1))
