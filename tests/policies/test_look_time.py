"""What looks take beyond planning is measured, and charged to looking."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.look_time import LookTime
from tests.policies.simulated import DRAFTERS, Noise, Rows, Simulation, World, calibration


def timed(hidden, *, steps=1500, always=True, gain=0.0, scatter=0.05, speed=lambda _step: 1.0):
    """Steps of a server where a look lengthens each by a share; those that looked."""
    rng, known, looked = random.Random(0), LookTime(), []
    for step in range(steps):
        looks = not known.is_blind if always else step % 20 == 0
        known.stepped(looks=looks and always, gain=lambda: gain)
        seconds = speed(step) * 0.001 * (1 + hidden * looks) * rng.lognormvariate(0, scatter)
        known.note(seconds, 0.001, looked=looks, always=always)
        looked.append(looks)
    return known, looked


@pytest.mark.parametrize("always", [True, False])
def test_what_a_look_hides_is_found(always):
    assert timed(0.2, always=always)[0].hidden == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("always", [True, False])
def test_steps_that_scatter_alike_hide_next_to_nothing(always):
    assert timed(0.0, always=always)[0].hidden < 0.01


def test_a_machine_whose_speed_drifts_is_not_mistaken_for_looks():
    assert timed(0.0, speed=lambda step: 1 + step / 1500)[0].hidden < 0.01


def test_stretches_without_looks_are_the_rarer_the_more_looking_gains():
    for gain, most in ((0.0, 0.07), (1.0, 0.01)):
        _, looked = timed(0.0, steps=20_000, gain=gain)
        assert most / 5 < looked.count(False) / 20_000 < most


def test_one_late_step_does_not_count_for_much():
    known = LookTime()
    for step in range(60):
        looks = not known.is_blind
        known.stepped(looks=looks, gain=lambda: 0.0)
        known.note(0.1 if step == 20 else 0.001, 0.001, looked=looks, always=True)
    assert known.hidden < 0.05


BUSY = World(
    batch=16, eagle=(0.6,) * 8, plain_s=0.0013, draft_s=0.00012, verify_per_token_s=7e-6,
    cold_s=0.002, hidden_look_s=12e-6, noise=Noise(0.1, 0.02, 0.002), untimed_share=0.2,
    rows={4: Rows(0.03, 0.5), 2: Rows(0.08, 0.2)},
)  # fmt: skip
"""A small target, 16 clients: the host plans while the device works, so that looks seem to take
nothing, and they lengthen every step by a seventh. Few rows have a match."""


@pytest.mark.parametrize("eagle", [0.02, 0.6], ids=["random", "good"])
def test_an_index_of_no_use_costs_next_to_nothing_where_its_looks_seem_to_be_free(eagle):
    """It looked at every step: 0.87 of plain decoding, and 0.88 of the drafter alone."""
    world = replace(BUSY, eagle=(eagle,) * 8)
    speeds = []
    for has_index in (True, False):
        here = replace(world, has_index=has_index)
        drafters = DRAFTERS if has_index else {"eagle3": DRAFTERS["eagle3"]}
        policy = build_policy(PolicySettings(), drafters, 0, max_draft=8)
        policy.calibrate(here.profile())
        server = Simulation(policy, 0)
        server.swap(1, calibration(here))
        server.run(here, 250)
        speeds.append(server.run(here, 400).speed)
    assert speeds[0] >= 0.96 * speeds[1]
