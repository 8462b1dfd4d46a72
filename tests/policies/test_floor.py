"""What finding out whether drafting pays may take is bounded, and is still enough to find out.

A small target: a step takes a millisecond, and inspecting a batch a fair part of one. Time is
simulated, so nothing here depends on this machine.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from tests.policies.simulated import DRAFTERS, Simulation, World, best_fixed_speed, fixed_speed

USELESS = (0.0005,) * 8
SMALL = World(
    eagle=USELESS, suffix=0.001, match_share=0.3, plain_s=0.001, verify_per_token_s=2e-5,
    draft_s=2e-4, plan_s=2e-4, look_s=4e-4, cold_s=3e-4,
)  # fmt: skip


def started(world: World, seed: int = 0, **settings: object) -> Simulation:
    """A server with the default policy, or another, that has its step times."""
    drafters = DRAFTERS if world.has_index else {"eagle3": DRAFTERS["eagle3"]}
    policy = build_policy(PolicySettings(**settings), drafters, seed, 8)
    policy.calibrate(world.profile())
    return Simulation(policy, seed)


@cache
def _settled(seed: int) -> Simulation:
    server = started(SMALL, seed)
    server.run(SMALL, steps_of(6, SMALL))
    return server


def settled(seed: int = 0) -> Simulation:
    """One that has found out that drafting does not pay."""
    return deepcopy(_settled(seed))


def steps_of(seconds: float, world: World) -> int:
    return round(seconds / world.plain_s)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("has_index", [True, False])
def test_a_drafter_of_no_use_costs_less_than_its_share(batch, has_index):
    """0.985 from the first step on, and the share of 0.5 % once that is known."""
    world = replace(
        SMALL, batch=batch, has_index=has_index, verify_per_token_s=2e-5 / batch,
        look_s=4e-4 + 2e-5 * batch,
    )  # fmt: skip
    server = started(world)
    first = server.run(world, steps_of(6, world))
    later = server.run(world, steps_of(6, world))
    plain = fixed_speed(world, "none", 0)
    assert (first.tokens + later.tokens) / (first.seconds + later.seconds) >= 0.985 * plain
    assert later.speed >= (1 - 1.3 * 0.005) * plain


def test_steps_that_say_nothing_of_their_time_are_neither_free_nor_lost():
    """Where requests begin and end at nearly every step, trials cost 0.025: most of their steps
    were charged nothing. All steps pay for trials, so that these still come soon enough."""
    world = replace(
        SMALL, batch=32, has_index=False, verify_per_token_s=2e-5 / 32, cold_s=0.002,
        untimed_share=0.8,
    )  # fmt: skip
    after, num_soon = replace(world, eagle=(0.85,) * 8), 0
    for seed in range(2):
        server = started(world, seed)
        server.run(world, steps_of(4, world))
        later = server.run(world, steps_of(6, world))
        assert later.speed >= (1 - 1.3 * 0.005) * fixed_speed(world, "none", 0)
        server.run(after, steps_of(2, after))
        num_soon += server.run(after, 500).speed >= 0.9 * best_fixed_speed(after)
    assert num_soon


def test_nothing_is_prepared_for_steps_that_no_plan_is_made_for():
    """Preparing takes the host as long as a plan, and most steps need none. A plan is weighed once
    ahead, and once more if its batch is another one."""
    world = replace(SMALL, batch=8, has_index=False, verify_per_token_s=2e-5 / 8)
    server = started(world)
    policy, plans, weighed = server.policy, [], []
    plan, weigh = policy.plan, policy._weigh
    policy.plan = lambda obs: plans.append(obs) or plan(obs)
    policy._weigh = lambda *args: weighed.append(args) or weigh(*args)
    server.run(world, steps_of(10, world))
    assert policy.figures()["decisions"]["probe"] > 10
    assert len(plans) < policy.figures()["decisions"]["rest"] / 8
    assert len(weighed) <= 2 * len(plans)


@pytest.mark.parametrize("share", [0.002, 0.02])
def test_the_share_is_a_setting(share):
    server = started(SMALL, probe_share=share)
    server.run(SMALL, steps_of(4, SMALL))
    lost = 1 - server.run(SMALL, steps_of(10, SMALL)).speed / fixed_speed(SMALL, "none", 0)
    assert share / 8 <= lost <= 1.3 * share


def test_inspection_that_takes_longer_than_steps_is_rare():
    """On a fast card a look at many requests takes several steps."""
    world = replace(SMALL, plan_s=0.002, look_s=0.008)
    server = started(world)
    server.run(world, steps_of(4, world))
    later = server.run(world, steps_of(10, world))
    assert later.speed >= (1 - 1.5 * 0.005) * fixed_speed(world, "none", 0)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param({"suffix": 0.9, "match_share": 0.8}, id="the index"),
        pytest.param({"eagle": (0.85,) * 8}, id="the neural drafter"),
    ],
)
def test_traffic_of_another_sort_is_found(found):
    """Within two seconds most times, and always within five: late steps postpone evidence."""
    after, num_soon = replace(SMALL, **found), 0
    for seed in range(3):
        server = settled(seed)
        server.run(after, steps_of(2, after))
        num_soon += server.run(after, 500).speed >= 0.9 * best_fixed_speed(after)
        server.run(after, steps_of(2.5, after))
        assert server.run(after, 500).speed >= 0.9 * best_fixed_speed(after)
    assert num_soon >= 2


@pytest.mark.parametrize("batch", [1, 8])
def test_a_good_drafter_goes_on_drafting(batch):
    world = replace(SMALL, eagle=(0.8,) * 8, match_share=0.0, batch=batch,
                    verify_per_token_s=2e-5 / batch)  # fmt: skip
    server = started(world)
    server.run(world, 500)
    assert server.run(world, 1500).speed >= 0.97 * best_fixed_speed(world)


def test_while_drafting_does_not_pay_the_batch_is_hardly_ever_inspected():
    server = settled()
    plans, plan = [], server.policy.plan

    def counted(obs):
        plans.append(obs)
        return plan(obs)

    server.policy.plan = counted
    server.run(SMALL, 5000)
    assert 0 < len(plans) < 100


def test_an_off_guard_does_not_look():
    """Other policies are held by a guard, whose trials are bounded likewise."""
    world = replace(SMALL, has_index=False)
    server = started(world, kind="ema_tiers")
    server.run(world, steps_of(4, world))
    later = server.run(world, steps_of(10, world))
    assert not server.policy.figures()["guard"]["is_on"]
    assert later.speed >= (1 - 1.5 * 0.005) * fixed_speed(world, "none", 0)
