"""On a simulated machine with heavy tails, a wrong profile and changing traffic, the policy stays
close to the best fixed K. ``benchmarks/policy_simulation.py`` runs the whole grid."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from statistics import fmean

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from tests.policies.simulated import (
    DRAFTERS,
    Noise,
    Rows,
    Simulation,
    World,
    best_fixed_speed,
    calibration,
    fixed_speed,
)

NOISES = {
    "10 % scatter": Noise(0.1, 0.0, 0.0),
    "2 % up to 3 ms late": Noise(0.1, 0.02, 0.003),
    "5 % up to 5 ms late": Noise(0.1, 0.05, 0.005),
    "30 % scatter and 5 % late": Noise(0.3, 0.05, 0.005),
}
WORST = NOISES["30 % scatter and 5 % late"]
GOOD = (0.6, 0.58, 0.57, 0.56, 0.55, 0.55, 0.55, 0.55)
SMALL = World(
    eagle=GOOD,
    plain_s=0.00069,
    draft_s=0.00011,
    verify_per_token_s=2e-6,
    cold_s=0.0003,
    has_index=False,
)
"""A small target on a fast GPU; fixed K = 3 gains 1.5 over plain decoding."""
WARM_UP = 500


def served(world, seed=0, **errors):
    policy = build_policy(PolicySettings(), DRAFTERS, seed, max_draft=8)
    policy.calibrate(world.profile(**errors))
    return Simulation(policy, seed)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_heavy_tails_do_not_silence_a_good_drafter(noise):
    world = replace(SMALL, noise=noise)
    settled, whole = [], []
    for seed in range(2):
        server = served(world, seed)
        parts = [server.run(world, WARM_UP), server.run(world, 500)]
        settled.append(parts[1].speed)
        whole.append(sum(p.tokens for p in parts) / sum(p.seconds for p in parts))
    assert fmean(settled) >= 0.97 * best_fixed_speed(world)
    assert fmean(whole) >= 0.95 * best_fixed_speed(world)


def test_a_wrong_profile_is_outgrown_in_the_worst_noise():
    world = replace(SMALL, noise=WORST, batch=8)
    ratios = []
    for what in ("scale", "draft", "slope"):
        for error in (0.5, 2.0):
            server = served(world, **{what: error})
            server.run(world, WARM_UP)
            ratios.append(server.run(world, 300).speed / best_fixed_speed(world))
    assert fmean(ratios) >= 0.97
    assert min(ratios) >= 0.95


@pytest.mark.parametrize("batch", [1, 32])
def test_a_random_drafter_costs_less_than_two_percent_in_the_worst_noise(batch):
    world = replace(SMALL, noise=WORST, batch=batch, eagle=(0.02,) * 8)
    assert served(world).run(world, 1500).speed >= 0.98 * fixed_speed(world, "none", 0)


def test_prompts_that_leave_most_steps_untimed_do_not_silence_it():
    world = replace(SMALL, noise=NOISES["5 % up to 5 ms late"], untimed_share=0.8)
    server = served(world)
    server.run(world, 1000)
    assert server.run(world, 1000).speed >= 0.97 * best_fixed_speed(world)


@pytest.mark.parametrize("seed", range(2))
def test_no_belief_locks(seed):
    """After thousands of steps with a random drafter, the same version becomes good, untold."""
    bad, good = (
        replace(SMALL, noise=NOISES["5 % up to 5 ms late"], eagle=eagle)
        for eagle in ((0.02,) * 8, GOOD)
    )
    server = served(bad, seed)
    server.run(bad, 1500)
    server.run(good, 1500)
    assert server.run(good, 500).speed >= 0.97 * best_fixed_speed(good)


def test_requests_of_unequal_difficulty_are_no_obstacle():
    unequal = {"difficulties": (-1.5, -0.7, 0, 0.7, 1.5), "request_tokens": 20}
    world = replace(SMALL, noise=NOISES["5 % up to 5 ms late"], batch=8, **unequal)
    server = served(world)
    server.run(world, WARM_UP)
    assert server.run(world, 700).speed >= 0.97 * best_fixed_speed(world)


def test_load_that_comes_and_goes_finds_the_figures_of_its_batch_again():
    worlds = [replace(SMALL, noise=WORST, batch=b) for b in (1, 8, 32, 8, 1)]
    server = served(worlds[0])
    speeds = []
    for world in worlds:
        server.run(world, 200)
        speeds.append(server.run(world, 250).speed / best_fixed_speed(world))
    assert fmean(speeds) >= 0.965  # short phases: exploration weighs more in each


SAMPLED = {
    1: Rows(0.25, 0.15), 2: Rows(0.1, 0.3, 0.3), 3: Rows(0.06, 0.45, 0.5), 4: Rows(0.04, 0.55, 0.7),
    5: Rows(0.05, 0.7, 1.0),
}  # fmt: skip
"""Matches of text sampled at a high temperature: many and short, and followed by little."""


def test_an_index_beside_a_drafter_is_never_worse_than_the_drafter_alone():
    """Interrupting the drafter for every match that promises a little more loses the catch-ups:
    arms compared step by step reached 0.81 of the drafter alone here."""
    world = World(
        eagle=GOOD, rows=SAMPLED, plain_s=0.015, draft_s=0.002, verify_per_token_s=0.0015,
        cold_s=0.006, noise=Noise(0.1, 0.0, 0.0),
    )  # fmt: skip
    speeds = []
    for seed in range(4):
        server = served(world, seed)
        server.run(world, WARM_UP)
        speeds.append(server.run(world, 400).speed)
    assert fmean(speeds) >= 0.97 * best_fixed_speed(world)


@pytest.mark.parametrize("batch", [1, 8])
def test_matches_are_taken_at_a_glance_where_a_plan_takes_long(batch):
    """A plan takes a quarter of a step, and half of the rows have a match. Planned for at every
    match, the index was left alone, at 0.89 of what it gives."""
    world = replace(
        SMALL, eagle=(0.02,) * 8, has_index=True, rows=SAMPLED, plan_s=0.00017, look_s=0.00002,
        noise=NOISES["10 % scatter"], batch=batch,
    )  # fmt: skip
    assert best_fixed_speed(world) > 1.05 * fixed_speed(world, "none", 0)
    server = served(world)
    server.run(world, 2 * WARM_UP)
    assert server.run(world, 1500).speed >= 0.97 * best_fixed_speed(world)


@cache
def first_version(eagle, batch, seed):
    """A server that has decoded with a version for a while, which must not be changed, and its
    world."""
    old = replace(SMALL, noise=NOISES["2 % up to 3 ms late"], eagle=eagle, batch=batch)
    server = served(old, seed)
    server.swap(1, calibration(old))
    server.run(old, 300)
    return server, old


def after_swaps(before, after, *, returns, batch):
    """Mean speed over seeds from 20 rounds after the last swap, and where it ends."""
    soon, final = [], []
    for seed in range(6):
        server, old = deepcopy(first_version(before, batch, seed))
        new = replace(old, eagle=after)
        server.swap(2, calibration(new))
        if returns:
            server.run(new, 200)
            server.swap(1, calibration(old))
            server.run(old, 50)
            server.swap(2, calibration(new))
        server.run(new, 20 // batch)
        soon.append(server.run(new, 40).speed)
        server.run(new, 120)
        final.append(server.run(new, 100).speed)
    return fmean(soon), fmean(final)


@pytest.mark.parametrize("returns", [False, True], ids=["first time", "again"])
@pytest.mark.parametrize(("before", "after"), [(GOOD, (0.8,) * 8), (GOOD, (0.02,) * 8)])
def test_twenty_rounds_after_a_swap_the_speed_is_that_of_its_end(before, after, returns):
    soon, final = after_swaps(before, after, returns=returns, batch=1)
    assert soon >= 0.98 * final


def test_a_useful_version_after_a_useless_one_is_used_twenty_rounds_after_its_swap():
    soon, final = after_swaps((0.02,) * 8, (0.8,) * 8, returns=False, batch=4)
    assert soon >= 0.95 * final


SMALL_AT_32 = World(
    batch=32,
    eagle=(0.55, 0.5, 0.48, 0.46, 0.45, 0.45, 0.45, 0.45),
    rows={1: Rows(0.12, 0.1), 2: Rows(0.04, 0.25, 0.3), 4: Rows(0.02, 0.5, 0.7)},
    plain_s=0.00155,
    draft_s=0.00016,
    verify_per_token_s=2e-6,
    plan_s=2e-4,
    look_s=6e-4,
    cold_s=8e-4,
    noise=Noise(0.1, 0.02, 0.003),
    untimed_share=0.1,
)
"""A small target behind HTTP, 32 clients: drafting gains 1.43, a look takes a third of a step."""


@cache
def _disturbed(seed):
    server = served(SMALL_AT_32, seed)
    server.swap(2, calibration(SMALL_AT_32))
    server.run(SMALL_AT_32, 2000)
    server.run(replace(SMALL_AT_32, draft_s=20 * SMALL_AT_32.draft_s), 300)
    return server


def disturbed(seed):
    """A server whose drafts took twenty times as long for a while, which nobody forgets at once."""
    return deepcopy(_disturbed(seed))


@pytest.mark.parametrize("seed", range(2))
def test_a_swap_brings_a_trial_whatever_is_believed_of_step_times(seed):
    """It was silent for thousands of steps, swaps or not: 0.7 of the best arm."""
    bad = replace(SMALL_AT_32, eagle=(0.02,) * 8)
    server = disturbed(seed)
    server.swap(1, calibration(bad))
    server.run(bad, 300)
    server.swap(2, calibration(SMALL_AT_32))
    server.run(SMALL_AT_32, 600)
    assert server.run(SMALL_AT_32, 600).speed >= 0.9 * best_fixed_speed(SMALL_AT_32)


@pytest.mark.parametrize("seed", range(2))
def test_wrong_step_times_are_corrected_without_a_swap_too(seed):
    server = disturbed(seed)
    server.run(SMALL_AT_32, 3000)
    assert server.run(SMALL_AT_32, 600).speed >= 0.93 * best_fixed_speed(SMALL_AT_32)


@pytest.mark.parametrize("seed", range(2))
def test_looks_that_found_nothing_after_a_swap_do_not_forbid_later_ones(seed):
    """What the looks of the first steps took was owed for ten thousand others."""
    useless = replace(SMALL_AT_32, eagle=(0.02,) * 8)
    first = replace(useless, rows={})
    then = replace(useless, rows={4: Rows(0.5, 0.7), 2: Rows(0.2, 0.4)})
    server = served(then, seed)
    server.swap(1, calibration(first))
    server.run(first, 60)
    server.run(then, 800)
    # The best arm looks at every step, and so does this.
    assert server.run(then, 800).speed >= 0.9 * best_fixed_speed(then)


class FirstLook(Simulation):
    """A server with an index alone, whose first look takes as long as twenty plain steps."""

    def _seen(self, world, matches):
        seen = super()._seen(world, matches)
        return replace(seen, drafters=("suffix",) if matches is not None else (), pending_rows={})

    def _decode(self, world):
        is_first = self._step == 0
        return super()._decode(replace(world, look_s=20 * world.plain_s) if is_first else world)


@pytest.mark.parametrize("seed", range(2))
def test_a_first_look_that_is_slow_does_not_silence_an_index(seed):
    """Measured with 32 clients: the index alone gains a half, and was never asked again."""
    world = replace(SMALL_AT_32, rows={5: Rows(0.7, 0.85), 2: Rows(0.1, 0.4)}, cold_s=0.0)
    policy = build_policy(PolicySettings(), {"suffix": DRAFTERS["suffix"]}, seed, max_draft=8)
    policy.calibrate([sample for sample in world.profile() if sample.drafter == "none"])
    server = FirstLook(policy, seed)
    server.run(replace(world, rows={}), 60)
    server.run(world, 2500)
    assert server.run(world, 800).speed >= 1.3 * fixed_speed(world, "none", 0)


SLICED = World(
    batch=32, plain_s=0.0011, draft_s=0.00012, verify_per_token_s=7e-6, cold_s=0.008,
    plan_s=0.00015, look_s=0.0007, rows={4: Rows(0.03, 0.5), 2: Rows(0.08, 0.2)},
    noise=Noise(0.1, 0.3, 0.005), untimed_share=0.2, difficulties=(-1, -0.4, 0, 0.4, 1),
)  # fmt: skip
"""A small target on a GPU whose trainer takes slices of its time: a third of the steps wait for up
to four plain ones, and coming back to a drafter takes seven."""


def learning(start, steps, seed, swaps=8):
    """Speeds relative to the best fixed arm while a drafter improves from swap to swap."""
    server = served(start, seed)
    server.run(replace(start, eagle=(0.02,) * 8), steps)
    shares = []
    for version in range(1, swaps + 1):
        first = 0.3 + 0.3 * version / swaps
        world = replace(start, eagle=tuple(first * 0.97**j for j in range(8)))
        server.swap(version, calibration(world))
        shares.append(server.run(world, steps).speed / best_fixed_speed(world))
    return shares


@pytest.mark.parametrize("seed", range(4))
def test_a_trainer_beside_the_server_does_not_silence_the_drafter_it_improves(seed):
    """Found on a GPU that both shared: for 70 seconds and 28 versions nothing was drafted, at 0.7
    of what the drafter gave. Stretches ended with the step that caught up, the more of them there
    were the dearer coming back seemed, and a draft's time was scaled by what waiting does to a
    plain step."""
    shares = learning(SLICED, 500, seed)
    assert fmean(shares[-3:]) >= 0.95
    assert min(shares[-3:]) >= 0.9
