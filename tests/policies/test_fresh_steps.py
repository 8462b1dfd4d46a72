"""The first steps at another K take longer than those that repeat it, and are no time of that K."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from statistics import fmean

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.choice import Chooser
from policies.goodput import GoodputPolicy
from policies.ledger import Ledger, Purpose
from policies.probes import Explorer
from policies.switching import FRESH_STEPS, SwitchCosts
from tests.policies.simulated import (
    NEURAL,
    Noise,
    Simulation,
    World,
    best_fixed_speed,
    context,
)
from tests.policies.test_stretches import forecast, outline

WORLD = World(
    batch=8, eagle=(0.8,) * 8, plain_s=0.0009, draft_s=0.00011, verify_per_token_s=2e-6,
    cold_s=0.0005, plan_s=0.0001, noise=Noise(0.1, 0.02, 0.002), has_index=False,
    fresh_share=0.4, fresh_steps=2,
)  # fmt: skip
"""The best K is 5."""


def server_of(world: World, seed: int) -> Simulation:
    policy = build_policy(PolicySettings(), {"eagle3": NEURAL}, seed, max_draft=8)
    policy.calibrate(world.profile())
    return Simulation(policy, seed)


def test_another_k_is_known_by_the_steps_that_repeat_it():
    errors = []
    for seed in range(3):
        server = server_of(WORLD, seed)
        server.run(WORLD, 1200)
        known = server.policy._times.arm_times("eagle3", 8)
        for k in (4, 6, 8):
            step_s = WORLD.seconds("eagle3", k)[0] + WORLD.noise.mean_late_s
            errors.append(known[k - 1] / step_s - 1)
    assert abs(fmean(errors)) < 0.05


def test_a_drafter_is_played_at_the_best_k_whatever_changes_take():
    shares = []
    for seed in range(2):
        server = server_of(WORLD, seed)
        server.run(WORLD, 600)
        shares.append(server.run(WORLD, 1200).speed / best_fixed_speed(WORLD))
    assert fmean(shares) > 0.965


@pytest.mark.parametrize("share", [0.4, 0.0])
def test_another_k_is_tried_for_some_steps_in_a_row_where_the_first_ones_say_nothing(share):
    world = replace(WORLD, fresh_share=share)
    server, seen = server_of(world, 0), []
    server.run(world, 700)
    server.run(world, 1500, lambda one, _: seen.append((one.drafter, one.draft_k, one.reason)))
    stretches = [
        len(list(steps)) for arm, steps in groupby(seen) if arm[0] == "eagle3" and arm[2] == "probe"
    ]
    assert len(stretches) > 1
    assert (fmean(stretches) > 2 * FRESH_STEPS) == (share > 0)


def test_where_matches_are_known_one_step_of_another_k_is_enough():
    """Every step is planned there, so that none repeats the one before."""
    made = GoodputPolicy(
        context({"eagle3": NEURAL}), explore=0.05, half_life_rounds=200, margin=1.01
    )
    world = replace(WORLD, batch=1)
    made.calibrate(world.profile())
    server = Simulation(made, 0)
    server.run(world, 400)
    blind = server._seen(world, None)
    steps = []
    for obs in (blind, replace(blind, matches=bytes(1))):
        weighed = made._weigh(obs, made._based(obs, 8))
        assert weighed.choice.base == weighed.choice.arm[0] == "eagle3"
        own = [one for one, _ in weighed.options if one.purpose is Purpose.LENGTH]
        steps.append({one.num_steps for one in own})
    assert steps[0] == {min(steps[0])} and min(steps[0]) > FRESH_STEPS
    assert steps[1] == {1}


def test_a_stretch_of_another_k_costs_its_steps_and_what_changes_take():
    usual = outline(1.5)._replace(
        max_k=2, seconds={"eagle3": [0.001, 0.001, 0.0014]}, usual_tokens={"eagle3": [1, 1.5, 1.6]}
    )
    chooser = Chooser(1.01, {"eagle3": frozenset({"eagle3"})})
    chooser.base = "eagle3"
    choice = chooser.weigh(forecast(usual), chooser.footing(usual, "eagle3", {"eagle3": 0.0}))
    assert choice.arm == ("eagle3", 1)
    seen = forecast(usual)._replace(max_k=2)
    explorer = Explorer(0.05, 0, frozenset({"eagle3"}), Ledger(0.005))

    def loss_s(**how: float) -> float:
        priced = explorer.options(seen, choice, **how)
        return next(loss for one, loss in priced if one.arm == ("eagle3", 2))

    assert loss_s() == pytest.approx(choice.loss_s(("eagle3", 2)))
    assert loss_s(num_steps=6, begin_s=0.002) == pytest.approx(6 * loss_s() + 0.002)


def test_what_changes_take_is_measured_and_never_a_gain():
    costs = SwitchCosts(["eagle3"])
    assert costs.fresh("eagle3") == 0
    for _ in range(200):
        costs.observe_fresh("eagle3", 0.0004, 0.001)
    # Into the stretch and out of it again.
    assert costs.fresh("eagle3") == pytest.approx(2 * FRESH_STEPS * 0.4)
    for _ in range(200):
        costs.observe_fresh("eagle3", -0.0004, 0.001)
    assert costs.fresh("eagle3") == 0


def test_what_saves_time_goes_on_at_the_best_k():
    """Beside plain decoding, which stays the base here because too many rows are missing."""
    server = server_of(WORLD, 0)
    server.run(WORLD, 400)
    made = server.policy
    made._settle()
    made._steps.drafter, made._chooser.base, made._basis = "none", "none", None
    made._explorer.under_way, made._explorer._gain.drafter = None, "eagle3"
    for purpose in (Purpose.ARM, Purpose.LENGTH):
        made._ledger.clear(purpose)
        made._ledger.charge(purpose, 1.0)  # nothing else begins
    decision = made.plan(replace(server._seen(WORLD, None), pending_rows={"eagle3": 10**6}))
    assert made._steps.made.weighed.choice.base == "none"
    assert (decision.drafter, decision.reason) == ("eagle3", "probe")
    assert decision.draft_k == made._steps.made.weighed.choice.best_of("eagle3")[1] > 2
