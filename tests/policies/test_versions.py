"""A version starts from what is known of it: by itself, by its parent, by its figures."""

from __future__ import annotations

import random

import pytest

from policies.acceptance import AcceptanceModel
from policies.versions import VersionMemory
from tests.policies.simulated import DRAFTERS


class Model:
    """An acceptance model and the memory of versions beside it."""

    def __init__(self, drafters=DRAFTERS):
        self.acceptance = AcceptanceModel(200, drafters)
        self.versions = VersionMemory(self.acceptance, drafters)

    def feed(self, hazards, *, rounds, drafter="eagle3", bucket=0, seed=0):
        rng = random.Random(seed)
        for _ in range(rounds):
            accepted = 0
            while accepted < len(hazards) and rng.random() < hazards[accepted]:
                accepted += 1
            self.acceptance.tick(1)
            self.acceptance.observe(drafter, {bucket: {(len(hazards), accepted): 1}}, batch=1)

    def first(self, drafter="eagle3", bucket=0):
        return self.acceptance.hazards(drafter, bucket)[0]

    def swap(self, version, drafter="eagle3", **calibration):
        self.versions.on_swap(drafter, version, calibration)


def feed_both(model):
    """Alternate easy rows after a long match and hard rows without one."""
    for seed in range(60):
        model.feed((0.9,) * 4, rounds=1, bucket=5, seed=seed)
        model.feed((0.3,) * 4, rounds=1, bucket=0, seed=seed)


def test_hard_text_stays_hard_after_a_swap_to_better_weights():
    model = Model()
    model.swap(0, acceptance=[0.6] * 4)
    feed_both(model)
    before = [model.first(bucket=bucket) for bucket in (0, 5)]
    model.swap(1, acceptance=[0.8] * 4)
    after = [model.first(bucket=bucket) for bucket in (0, 5)]
    assert before[0] + 0.1 < after[0] < 0.65
    assert before[1] + 0.01 < after[1] < 1
    model.swap(2, acceptance=[0.6] * 4)
    again = [model.first(bucket=bucket) for bucket in (0, 5)]
    assert again == pytest.approx(before, abs=0.1)


def test_a_version_that_returns_continues_where_it_left():
    model = Model()
    model.swap(0, acceptance=[0.5] * 4)
    feed_both(model)
    before = [model.acceptance.hazards("eagle3", bucket) for bucket in range(6)]
    model.swap(1, acceptance=[0.9] * 4)
    model.feed((0.95,) * 4, rounds=100)
    model.swap(0, acceptance=[0.5] * 4)
    assert [model.acceptance.hazards("eagle3", bucket) for bucket in range(6)] == [
        pytest.approx(hazards, abs=0.03) for hazards in before
    ]


def test_what_a_returning_version_remembers_is_outvoted_when_traffic_has_changed():
    model = Model()
    model.swap(0, acceptance=[0.9] * 4)
    model.feed((0.9,) * 4, rounds=1000)
    model.swap(1, acceptance=[0.9] * 4)
    model.swap(0, acceptance=[0.9] * 4)
    model.feed((0.2,) * 4, rounds=100)
    assert model.first() < 0.4


def test_a_childs_figures_are_compared_with_its_parents_on_the_same_traces():
    """Traffic became easier between both publications, so their own figures exaggerate the gain."""
    model = Model()
    model.swap(3, acceptance=[0.4] * 4)
    model.feed((0.6,) * 4, rounds=400)
    model.swap(4, acceptance=[0.7] * 4, parent=3, parent_acceptance=[0.6] * 4)
    assert model.first() == pytest.approx(0.7, abs=0.05)


def test_a_childs_figures_move_its_parents_evidence_not_that_of_another_version():
    model = Model()
    model.swap(1, acceptance=[0.5] * 4)
    model.feed((0.5,) * 4, rounds=400)
    model.swap(2, acceptance=[0.1] * 4)
    model.feed((0.1,) * 4, rounds=400)
    model.swap(3, acceptance=[0.6] * 4, parent=1, parent_acceptance=[0.5] * 4)
    assert model.first() == pytest.approx(0.6, abs=0.06)


def test_a_swap_with_a_calibration_starts_from_it():
    model = Model()
    model.feed((0.1,) * 4, rounds=300)
    model.swap(1, acceptance=[0.9, 0.8])
    assert model.acceptance.hazards("eagle3", 0)[:2] == pytest.approx([0.9, 0.8], abs=0.15)


@pytest.mark.parametrize("value", [None, [2.0], "0.9", [float("nan")]])
def test_a_swap_without_a_usable_calibration_keeps_a_weak_memory(value):
    model = Model()
    model.feed((0.02,) * 4, rounds=300)
    model.swap(1, acceptance=value)
    assert 0.2 < model.first() < 0.6
    assert max(model.acceptance.figures()["eagle3/0"]["rounds"]) <= 2


def test_a_swap_leaves_other_drafters_alone():
    model = Model()
    model.feed((0.9,) * 4, rounds=100, drafter="suffix", bucket=3)
    before = model.acceptance.hazards("suffix", 3)
    model.swap(1)
    assert model.acceptance.hazards("suffix", 3) == before


def test_two_neural_drafters_are_learned_separately():
    neural = DRAFTERS["eagle3"]
    model = Model(drafters={"first": neural, "second": neural})
    model.feed((0.9,) * 4, rounds=100, drafter="first")
    model.feed((0.2,) * 4, rounds=100, drafter="second")
    model.swap(1, "first", acceptance=[0.5, 0.5])
    assert model.first("first") == pytest.approx(0.5, abs=0.1)
    assert model.first("second") == pytest.approx(0.2, abs=0.1)


def test_a_swap_of_a_drafter_with_priors_by_kind_of_match_keeps_its_buckets_apart():
    model = Model()
    model.feed((0.9,) * 4, rounds=100, drafter="suffix", bucket=5)
    model.swap(1, "suffix", acceptance=[0.5] * 4)
    assert model.first("suffix", 1) == pytest.approx(0.35)
    before = model.first("suffix", 5)
    assert before > 0.75
    model.swap(2, "suffix", acceptance=[0.3] * 4)
    assert model.first("suffix", 5) < before - 0.05


def test_only_so_many_versions_are_remembered():
    model = Model()
    for version in range(100):
        model.swap(version, acceptance=[0.5])
    assert len(model.versions.figures()["eagle3"]) == 32
