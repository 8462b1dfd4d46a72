"""The default policy mixes drafters where that is faster, and only there; within a mix it moves
each request to the drafter that keeps more of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from policies.goodput import GoodputPolicy
from tests.policies.simulated import NEURAL, Simulation, World, best_fixed_speed, context

MIX = "eagle3+second"
HALVES = World(
    batch=8,
    eagle=(0.6,) * 8,
    others={"second": (0.6,) * 8},
    mixes={MIX: ("eagle3", "second")},
    are_opposed=True,
    difficulties=(-2.5, 2.5),
    draft_s=0.0002,
    has_index=False,
)
"""Half of the requests suit the one drafter, half the other."""
ALIKE = replace(HALVES, others={"second": (0.45,) * 8}, difficulties=(0.0,), draft_s=0.001)
"""One drafter is better for every request."""


def policy(world, seed=0):
    made = GoodputPolicy(
        context({"eagle3": NEURAL, "second": NEURAL}, seed=seed, mixes=world.mixes),
        explore=0.05,
        half_life_rounds=200,
        margin=1.01,
    )
    made.calibrate(world.profile())
    return made


def test_opposed_drafters_are_mixed_and_faster_than_the_best_one_alone():
    simulation, used, right = Simulation(policy(HALVES), 0), Counter(), Counter()
    simulation.run(HALVES, 500)

    def watch(decision, rows):
        used[decision.drafter] += 1
        for pick, hard in zip(decision.picks or (), simulation._difficulty, strict=False):
            right[(pick.drafter == "eagle3") == (hard > 0)] += 1

    speed = simulation.run(HALVES, 400, watch).speed

    alone = best_fixed_speed(replace(HALVES, mixes={}))
    assert used[MIX] > 0.6 * 400
    assert speed > 1.1 * alone
    assert right[True] > 0.85 * right.total()


@pytest.mark.parametrize("world", [ALIKE, replace(ALIKE, batch=1)], ids=["eight", "one"])
def test_where_one_drafter_is_better_for_all_mixing_costs_next_to_nothing(world):
    made = policy(world)
    simulation, used = Simulation(made, 0), Counter()
    simulation.run(world, 400)
    speed = simulation.run(world, 600, lambda d, rows: used.update([d.drafter])).speed

    assert speed > 0.97 * best_fixed_speed(replace(world, mixes={}))
    assert used["eagle3"] > 0.8 * 600


def test_traffic_moves_to_the_drafter_that_a_swap_made_better():
    before = replace(ALIKE, batch=2)
    after = replace(before, others={"second": (0.9,) * 8})
    made = policy(before)
    simulation, used = Simulation(made, 0), Counter()
    simulation.run(before, 400)
    made.on_swap("second", 1, {"acceptance": [0.9] * 4})
    simulation.run(after, 300)
    simulation.run(after, 300, lambda d, rows: used.update([d.drafter]))

    assert used["second"] > 0.8 * 300


def test_decisions_of_a_mix_are_the_same_for_the_same_seed():
    decided = []
    for _ in range(2):
        seen = []
        Simulation(policy(HALVES), 3).run(HALVES, 200, lambda d, rows, to=seen: to.append(d))
        decided.append(seen)
    assert decided[0] == decided[1]
    assert any(decision.picks for decision in decided[0])
