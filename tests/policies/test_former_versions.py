"""Policies that choose among drafters choose between a version and its predecessor: a worse one is
left within a few stretches, a better one takes over, and what is known of a version follows it."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.hedge import HedgePolicy
from policies.interface import StepObs
from policies.rollback import Action, Block, SwapWatch
from policies.side_by_side import SideBySide
from tests.policies.simulated import NEURAL, Noise, Simulation, World, fixed_speed

NEWEST, FORMER = "eagle3", "eagle3:former"
BOTH = "eagle3+eagle3:former"
TRAITS = {NEWEST: NEURAL, FORMER: replace(NEURAL, former_of=NEWEST)}
GOOD = (0.7,) * 8
ALONE = World(batch=4, eagle=GOOD, has_index=False, noise=Noise(0.1, 0.02, 0.01), cold_s=0.002)
WORSE = {"random": (0.03,) * 8, "worse": (0.5,) * 8}


def beside(newest, former=GOOD, batch=4):
    return replace(
        ALONE, eagle=newest, others={FORMER: former}, mixes={BOTH: (NEWEST, FORMER)}, batch=batch
    )


def server(kind, seed=0, batch=4):
    """One whose version 0 has drafted for a while."""
    return deepcopy(_server(kind, seed, batch))


@cache
def _server(kind, seed, batch):
    settings = PolicySettings(kind=kind, guard=False)
    policy = build_policy(settings, TRAITS, seed, 8, {BOTH: (NEWEST, FORMER)})
    policy.calibrate(beside(GOOD).profile())
    policy.on_swap(NEWEST, 0, {})
    simulated = Simulation(policy, seed)
    counts = used(simulated, replace(ALONE, batch=batch), 600)
    assert set(counts) <= {NEWEST, "none"}, "there is no former version yet"
    return simulated


def swap(simulated, newest, former):
    simulated.policy.on_swap(FORMER, former, {})
    simulated.swap(newest, {})


def used(simulated, world, steps):
    """How many requests each drafted for."""
    counts = Counter[str]()

    def count(decision, rows):
        counts.update(rows.drafters or [decision.drafter] * len(rows))

    simulated.run(world, steps, count)
    return counts


def share(counts, drafter):
    return counts[drafter] / counts.total()


@pytest.mark.parametrize("kind", ["hedge", "goodput"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", WORSE)
def test_a_worse_version_is_left_within_a_few_stretches(kind, name, batch):
    simulated, world = server(kind, batch=batch), beside(WORSE[name], batch=batch)
    swap(simulated, 1, 0)
    used(simulated, world, 150)
    late = used(simulated, world, 800)
    assert share(late, NEWEST) < 0.1
    if kind == "hedge":
        assert late[NEWEST] > 0, "it is heard now and then, in case traffic changes"
    assert share(late, FORMER) > 0.85


@pytest.mark.parametrize("kind", ["hedge", "goodput"])
def test_a_random_version_costs_a_few_steps_where_it_would_halve_the_speed(kind):
    world = beside(WORSE["random"])
    costs, alone = [], []
    for seed in range(3):
        simulated = server(kind, seed)
        usual = simulated.run(ALONE, 400).speed
        swap(simulated, 1, 0)
        after = simulated.run(world, 400)
        costs.append(after.seconds * usual - after.tokens)
        alone.append(usual)
    each = fixed_speed(ALONE, NEWEST, 4) * 0.03  # tokens of a step of 30 ms
    assert sum(costs) / 3 < 20 * each


@pytest.mark.parametrize("kind", ["hedge", "goodput"])
def test_a_better_version_takes_over(kind):
    world = beside((0.85,) * 8)
    simulated = server(kind)
    swap(simulated, 1, 0)
    used(simulated, world, 150)
    assert share(used(simulated, world, 400), NEWEST) > 0.85


@pytest.mark.parametrize("kind", ["hedge", "goodput"])
def test_what_is_known_of_versions_follows_them_through_a_trial_and_the_next_swap(kind):
    """A trial of the watch exchanges both; then a good version replaces the bad one."""
    simulated = server(kind)
    swap(simulated, 1, 0)
    used(simulated, beside(WORSE["random"]), 300)
    swap(simulated, 0, 1)
    assert share(used(simulated, beside(GOOD, WORSE["random"]), 60), NEWEST) > 0.85
    swap(simulated, 1, 0)
    assert share(used(simulated, beside(WORSE["random"]), 60), FORMER) > 0.85
    swap(simulated, 2, 0)
    used(simulated, beside((0.85,) * 8), 150)
    assert share(used(simulated, beside((0.85,) * 8), 300), NEWEST) > 0.85


def test_the_hedge_knows_one_version_in_both_places():
    policy = server("hedge").policy
    assert isinstance(policy, HedgePolicy)
    tokens = policy.figures()["tokens"][NEWEST]
    policy.on_swap(FORMER, 0, {})
    policy.on_swap(NEWEST, 1, {})
    assert policy.figures()["tokens"][FORMER] == tokens > policy.figures()["tokens"][NEWEST]
    assert policy.weights([NEWEST, FORMER]) == pytest.approx([0.5, 0.5])
    assert policy.figures()["versions"] == {NEWEST: 1, FORMER: 0}


def test_propensities_say_how_likely_either_version_was():
    simulated = server("hedge", seed=3)
    swap(simulated, 1, 0)
    policy = simulated.policy
    seen = StepObs(0, 4, bytes((8,)) * 4, None, (NEWEST, FORMER, BOTH), 8, 0)
    counts, claimed = Counter[tuple[str, int]](), {}
    for number in range(3000):
        policy._stretch = None  # each decision begins a stretch
        plan = policy.plan(replace(seen, step=number))
        arm = plan.drafter, plan.draft_k
        counts[arm] += 1
        claimed[arm] = plan.propensity
        if plan.picks:
            assert {pick.propensity for pick in plan.picks} == {0.5}
    for arm, count in counts.most_common(3):
        assert count / 3000 == pytest.approx(claimed[arm], abs=0.03)
    assert {drafter for drafter, _ in counts} >= {NEWEST, FORMER, BOTH}


def test_a_version_that_hardly_drafts_is_abandoned_for_the_other():
    sides = SideBySide(num_blocks=3)
    sides.step((1,))
    for _ in range(60):
        sides.step((2, 1))
        assert sides.preferred_to(2) is None, "it may just not have had its turn"
        sides.drafted(1, num_accepted=8, rounds=4)
    for _ in range(20):
        sides.step((2, 1))
        sides.drafted(1, num_accepted=8, rounds=4)
    assert sides.preferred_to(2) == 1
    assert sides.preferred_to(1) is None
    assert sides.blocks_of(1) == (3.0,) * 3
    sides.step((3, 1))
    assert sides.preferred_to(3) is None, "one that is new is as good as the best until it is tried"
    sides.step((3,))
    assert sides.preferred_to(3) is None
    sides.drafted(1, 8, 4)  # of a round that was launched before
    assert sides.blocks_of(3) == ()


def test_a_watch_goes_on_from_the_version_that_stayed():
    watch = SwapWatch(96, 0.15)
    for _ in range(60):
        watch.observe(1, 16, 4, 4)  # the bad one that was given up
    watch.go_on_from(0, [3.0] * watch.num_blocks)
    actions = [watch.observe(2, 16, 4, 4) for _ in range(40)]
    assert Action.TRY_FORMER in actions, "2 tokens a step against the 3 of the one that stayed"
    assert watch.figures()["former"] == 0


def test_a_block_is_full_by_rounds_and_by_steps():
    block = Block()
    assert block.add(2.0, 16) is None
    assert block.add(4.0, 16) == 3.0
