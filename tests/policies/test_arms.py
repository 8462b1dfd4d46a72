"""Every arm of a comparison has a policy of its own, and knows the weights in force."""

from __future__ import annotations

from policies.arms import MAX_ARMS, ArmPolicies
from policies.interface import CostSample

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
