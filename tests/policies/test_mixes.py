"""The default policy mixes drafters where that is faster, and only there; within a mix it moves
each request to the drafter that keeps more of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest

from policies.goodput import GoodputPolicy
from tests.policies.simulated import (
    INDEX,
    NEURAL,
    Rows,
    Simulation,
    World,
    best_fixed_speed,
    context,
)

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
WITH_INDEX = World(
    batch=8,
    eagle=(0.6,) * 8,
    rows={4: Rows(0.2, 0.7), 5: Rows(0.25, 0.95)},
    mixes={"eagle3+suffix": ("eagle3", "suffix")},
    plan_s=0.00002,
    look_s=0.00005,
    cold_s=0.001,
)
"""A quarter of the requests repeats what was said before, and is not the same from step to step."""
ALIKE = replace(HALVES, others={"second": (0.45,) * 8}, difficulties=(0.0,), draft_s=0.001)
"""One drafter is better for every request."""


def policy(world, seed=0):
    drafters = {"eagle3": NEURAL, **dict.fromkeys(world.others, NEURAL)}
    if world.has_index:
        drafters["suffix"] = INDEX
    made = GoodputPolicy(
        context(drafters, seed=seed, mixes=world.mixes),
        explore=0.05,
        half_life_rounds=200,
        margin=1.01,
    )
    made.calibrate(world.profile())
    return made


def test_opposed_drafters_are_mixed_and_faster_than_the_best_one_alone():
    alone, shares = best_fixed_speed(replace(HALVES, mixes={})), []
    for seed in range(3):
        simulation, used, right = Simulation(policy(HALVES, seed), seed), Counter(), Counter()
        simulation.run(HALVES, 500)

        def watch(decision, rows, own=simulation, used=used, right=right):
            used[decision.drafter] += 1
            for pick, hard in zip(decision.picks or (), own._difficulty, strict=False):
                right[(pick.drafter == "eagle3") == (hard > 0)] += 1

        speed = simulation.run(HALVES, 400, watch).speed
        assert used[MIX] > 0.6 * 400
        assert speed > 1.1 * alone
        shares.append(right[True] / right.total())
    assert fmean(shares) > 0.87


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


def test_requests_with_good_matches_get_the_index_and_the_others_the_neural_drafter():
    used, got, speeds = Counter(), Counter(), []

    def watch(decision, rows):
        used[decision.drafter] += 1
        for pick, match in zip(decision.picks or (), rows.matches or (), strict=False):
            got[pick.drafter, match] += 1

    for seed in range(6):
        simulation = Simulation(policy(WITH_INDEX, seed), seed)
        simulation.run(WITH_INDEX, 400)
        speeds.append(simulation.run(WITH_INDEX, 400, watch).speed)

    assert used["eagle3+suffix"] > 0.45 * 2400
    assert fmean(speeds) > 1.1 * best_fixed_speed(replace(WITH_INDEX, mixes={}))
    assert got["suffix", 5] > 0.9 * (got["suffix", 5] + got["eagle3", 5])
    assert got["suffix", 0] == 0


@pytest.mark.parametrize("match_share", [0.0, 0.3])
def test_an_index_that_does_not_pay_costs_next_to_nothing_in_a_mix(match_share):
    rows = {4: Rows(match_share, 0.2)} if match_share else {4: Rows(0.0, 0.0)}
    world = replace(WITH_INDEX, rows=rows)
    simulation, picked = Simulation(policy(world), 0), Counter()
    simulation.run(world, 400)

    def watch(decision, _rows):
        picked.update(pick.drafter for pick in decision.picks or ())

    speed = simulation.run(world, 600, watch).speed

    assert speed > 0.97 * best_fixed_speed(replace(world, mixes={}))
    assert picked["suffix"] < 0.05 * 600 * world.batch


def test_a_mix_with_an_index_is_never_slower_than_the_floor():
    """Neither member is worth its time: plain decoding goes on."""
    world = replace(
        WITH_INDEX, eagle=(0.05,) * 8, rows={4: Rows(0.3, 0.05)}, draft_s=0.003, batch=16
    )
    simulation = Simulation(policy(world), 0)
    simulation.run(world, 400)

    assert simulation.run(world, 600).speed > 0.97 * best_fixed_speed(replace(world, mixes={}))


def test_what_the_index_keeps_in_a_mix_is_learned_of_the_index():
    world = replace(WITH_INDEX, rows={5: Rows(0.25, 0.99)})
    made = policy(world)
    seen = made.figures()["acceptance"]
    assert "suffix/5" not in seen
    Simulation(made, 0).run(world, 400)

    assert made.figures()["acceptance"]["suffix/5"]["usual"][0] > 0.9
    assert made.figures()["picks"]["suffix/best"] > 100
