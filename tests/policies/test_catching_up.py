"""Rows that a drafter computes again are no price of its drafts, and lateness no sign of speed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.switching import SwitchCosts
from tests.policies.simulated import (
    NEURAL,
    Noise,
    Simulation,
    World,
    calibration,
    fixed_speed,
)

WORLD = World(
    batch=32,
    eagle=tuple(0.6 * 0.97**j for j in range(8)),
    plain_s=0.00125,
    verify_per_token_s=1.5e-6,
    draft_s=0.00018,
    cold_s=0.0005,
    row_s=1e-6,
    noise=Noise(0.1),
    has_index=False,
)
"""All rows of the batch take 9 ms, seven plain steps."""
RANDOM = World(
    plain_s=0.00069, draft_s=0.00011, verify_per_token_s=2e-6, cold_s=0.0003, eagle=(0.02,) * 8,
    noise=Noise(0.1, 0.05, 0.005), has_index=False,
)  # fmt: skip
"""A drafter of no use, on a machine whose late steps take as long as eight."""


def server_of(world, seed=0):
    policy = build_policy(PolicySettings(), {"eagle3": NEURAL}, seed, max_draft=8)
    policy.calibrate(world.profile())
    server = Simulation(policy, seed)
    server.swap(1, calibration(world))
    return server


def test_rows_that_were_forgotten_every_dozen_steps_make_no_draft_dearer():
    server = server_of(WORLD)
    server.run(WORLD, 300)
    for _ in range(25):
        server.forget(WORLD)
        server.run(WORLD, 13)
    known, (step_s, _) = server.policy._times, WORLD.seconds("eagle3", 3)
    assert known.arm_times("eagle3", 32)[2] == pytest.approx(step_s + 2e-5, rel=0.08)
    # Seven plain steps in each of 325, by an average over a thousand.
    assert server.policy.figures()["catch_up_forced"] == pytest.approx(25 * 7 / 1000, rel=0.3)


def test_a_base_goes_on_whatever_its_rows_take():
    """It must compute them sooner or later; plain steps before that only make them more."""
    server = server_of(WORLD)
    server.run(WORLD, 300)
    server.policy._chooser._broken["eagle3"] = 0.3
    server.policy._switches._shares["eagle3"] = 1.0
    server.forget(WORLD)
    server.swap(1, calibration(WORLD))
    bases = []
    server.run(WORLD, 20, lambda *_: bases.append(server.policy.figures()["base"]))
    assert set(bases) == {"eagle3"}


def test_copies_of_weights_are_no_time_of_any_arm():
    world = replace(WORLD, copy_s=0.010)
    server = server_of(world)
    server.run(world, 300)
    for version in range(2, 27):
        server.swap(version, calibration(world))
        server.run(world, 13)
    known, (step_s, _) = server.policy._times, world.seconds("eagle3", 3)
    assert known.arm_times("eagle3", 32)[2] == pytest.approx(step_s + 2e-5, rel=0.08)


def test_what_catching_up_took_fades_with_the_steps_of_the_server():
    costs = SwitchCosts(["eagle3"])
    costs.observe_forced(0.020, 0.001)
    assert costs.forced == pytest.approx(0.020)
    for _ in range(1000):
        costs.stepped()
    assert costs.forced == pytest.approx(0.020 / 2.72, rel=0.01)
    costs.observe_forced(-1.0, 0.001)
    assert 0 < costs.forced < 0.01
    taken_over = SwitchCosts(["eagle3"])
    taken_over.start_from(costs)
    assert taken_over.forced == costs.forced


@pytest.mark.parametrize("seed", [0, 1])
def test_steps_that_were_not_late_are_no_proof_that_drafts_are_fast(seed):
    """A drafter of no use beside plain steps of which the mean is long, because some are late: for
    dozens of steps none of its own need be."""
    server = server_of(RANDOM, seed)
    server.run(RANDOM, 30)
    speed = server.run(RANDOM, 1200).speed / fixed_speed(RANDOM, "none", 0)
    assert speed > 0.985
