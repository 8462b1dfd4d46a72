"""Every arm of a comparison has a policy of its own, and knows the weights in force."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest

from configs.schema import PolicySettings
from policies.arms import MAX_ARMS, ArmPolicies
from policies.catalog import build_policy
from policies.interface import CostSample
from tests.policies.simulated import DRAFTERS, Noise, Simulation, World, calibration

ALONE, BOTH = frozenset({"eagle3"}), frozenset({"eagle3", "suffix"})


class Told:
    """A policy that remembers what it was told."""

    wants_profile = True

    def __init__(self, drafters):
        self.drafters, self.swaps, self.samples = drafters, [], []

    def calibrate(self, samples):
        self.samples = list(samples)

    def on_swap(self, drafter, version, calibration):
        self.swaps.append((drafter, version, calibration))

    def figures(self):
        return {"swaps": len(self.swaps)}


def arms():
    return ArmPolicies(Told(None), Told)


def test_an_arm_is_its_drafters_and_the_version_in_force():
    policies = arms()
    policies.on_swap("eagle3", 1, {})
    first, both = policies.of(ALONE), policies.of(BOTH)
    policies.on_swap("eagle3", 2, {})
    second = policies.of(ALONE)
    policies.on_swap("eagle3", 1, {})

    assert first is policies.of(ALONE) and both is policies.of(BOTH)
    assert len({id(one) for one in (first, both, second)}) == 3


def test_a_new_arm_starts_from_profile_and_calibration():
    policies = arms()
    sample = CostSample("none", 0, 1, 0.01, 0.0)
    policies.calibrate([sample])
    policies.on_swap("eagle3", 3, {"acceptance": [0.8]})

    assert policies.of(ALONE).samples == policies.ordinary.samples == [sample]
    assert policies.of(ALONE).swaps == [("eagle3", 3, {"acceptance": [0.8]})]
    assert policies.of(frozenset({"suffix"})).swaps == []


def test_swaps_reach_the_ordinary_policy_and_leave_other_arms_alone():
    policies = arms()
    before = policies.of(ALONE)
    policies.on_swap("eagle3", 5, {})

    assert policies.ordinary.swaps == [("eagle3", 5, {})]
    assert before.swaps == []


def test_the_arm_not_asked_for_longest_is_forgotten():
    policies = arms()
    kept = policies.of(ALONE)
    forgotten = policies.of(BOTH)
    for version in range(1, MAX_ARMS):
        policies.on_swap("eagle3", 0, {})
        assert policies.of(ALONE) is kept
        policies.on_swap("eagle3", version, {})
        policies.of(BOTH)
    policies.on_swap("eagle3", 0, {})

    assert policies.of(ALONE) is kept
    assert policies.of(BOTH) is not forgotten


def test_figures_name_arms_once_there_are_any():
    policies = arms()
    assert policies.figures() == {"swaps": 0}
    policies.on_swap("eagle3", 4, {})
    policies.of(BOTH)

    assert policies.figures()["arms"] == {"eagle3+suffix at version 4": {"swaps": 1}}


class Timed(Told):
    """One that can take over times."""

    def start_from(self, other):
        self.other = other


def test_a_new_version_starts_from_the_times_of_the_arm_with_the_same_drafters():
    policies = ArmPolicies(Timed(None), Timed)
    policies.on_swap("eagle3", 1, {})
    first, both = policies.of(ALONE), policies.of(BOTH)
    assert not hasattr(first, "other") and not hasattr(both, "other")
    policies.on_swap("eagle3", 2, {})
    second = policies.of(ALONE)
    assert second.other is first and policies.of(BOTH).other is both
    policies.of(ALONE)
    policies.on_swap("eagle3", 3, {})
    assert policies.of(ALONE).other is second


WORLD = World(
    eagle=(0.6,) * 8, plain_s=0.00064, draft_s=0.00012, verify_per_token_s=7e-6, cold_s=0.0013,
    noise=Noise(0.15, 0.02, 0.002), has_index=False,
)  # fmt: skip


def second_version(*, is_known):
    """The arm of a version whose drafter was timed with an earlier one, or not: factors of its step
    times on a start-up profile that was wrong by half, and what it believes of acceptance."""
    old = replace(WORLD, eagle=(0.5,) * 8)

    def make(kinds):
        drafters = {kind: DRAFTERS[kind] for kind in kinds}
        return build_policy(PolicySettings(), drafters, 0, max_draft=8)

    policies = ArmPolicies(make(BOTH), make)
    policies.calibrate(WORLD.profile(draft=0.5))
    policies.on_swap("eagle3", 1, calibration(old))
    if is_known:
        Simulation(policies.of(ALONE), 0).run(old, 600)
    policies.on_swap("eagle3", 2, calibration(WORLD))
    figures = policies.of(ALONE).figures()
    return figures["step_time"], figures["catch_up"], figures["acceptance"]


def test_a_version_knows_what_steps_take_and_nothing_of_what_others_kept():
    (fresh, fresh_cold, kept), (known, cold, kept_too) = (
        second_version(is_known=k) for k in (False, True)
    )
    assert fresh["costs"]["eagle3"]["drafter"] == 1.0
    by_k = known["costs"]["eagle3"]["by_k"]
    drafted = [known["costs"]["eagle3"]["drafter"] * factor for factor in by_k[:4]]
    assert fmean(drafted) == pytest.approx(2.0, rel=0.25)
    assert cold["eagle3"] > 2 * fresh_cold["eagle3"]
    assert kept_too == kept


def test_policies_of_another_class_are_refused():
    policy = build_policy(PolicySettings(), DRAFTERS, 0, max_draft=8)
    with pytest.raises(TypeError, match="needs a GoodputPolicy, got Told"):
        policy.start_from(Told(None))
