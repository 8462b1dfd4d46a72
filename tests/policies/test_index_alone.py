"""Plain decoding with an index is a rival of neural drafters, judged by every look."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.choice import Chooser
from policies.forecast import Forecast, Outline
from policies.index_alone import IndexAlone
from tests.policies.simulated import (
    DRAFTERS,
    Noise,
    Rows,
    Simulation,
    World,
    calibration,
    fixed_speed,
)

TOKENS, STEPS = np.array([[1.0, 1.0], [2.0, 3.4]]), np.array([1.1, 1.2])
"""Of rows without a match and with one, at two K."""


def looked(*shares, batch=32, is_dense=True):
    """Looks that found these shares of rows with a match."""
    rival = IndexAlone()
    for share in shares:
        rival.note(np.array([batch * (1 - share), batch * share]), batch, is_dense=is_dense)
    for _ in range(2):  # the speed that it is compared with is that of the time before
        rival.learn(TOKENS, STEPS)
        rival.appraise()
    return rival


def test_it_drafts_with_the_index_where_matches_are_worth_it_and_decodes_plainly_elsewhere():
    assert looked(0.0, 0.0).lead(0.0) == pytest.approx(1.0)
    assert looked(1.0).lead(0.0) == pytest.approx(3.4 / 1.2)
    # Half of the looks: 3.4 tokens in 1.2 steps, and 1 in 1.
    assert looked(*[0.0, 1.0] * 64).lead(0.0) == pytest.approx(4.4 / 2.2, rel=0.02)
    assert looked(*[0.0, 1.0] * 64).lead(0.3) == pytest.approx(4.4 / 2.8, rel=0.02)


def test_a_few_requests_say_nothing():
    assert looked(*[1.0] * 23, batch=1).lead(0.0) == 1.0
    assert looked(*[1.0] * 24, batch=1).lead(0.0) > 2


def test_looks_of_before_are_appraised_by_what_is_known_now():
    rival = looked(*[0.5] * 8)
    assert rival.lead(0.0) > 1.5
    rival.learn(np.ones((2, 2)), STEPS)
    assert rival.lead(0.0) == pytest.approx(1.0)


def test_traffic_that_has_changed_is_followed_by_looks_now_and_then():
    rival = looked(*[0.0] * 128, *[1.0] * 30, is_dense=False)
    assert rival.lead(0.0) > 2


def weighed(chooser, plain_lead):
    """A step with a drafter that is 1.5 times as fast as plain decoding."""
    usual = Outline(
        batch=1, max_k=1, plain_s=1.0, seconds={"eagle3": [0.0, 1.2]},
        usual_tokens={"eagle3": [1.0, 1.8]}, expected={},
    )  # fmt: skip
    seen = Forecast(1, True, 1, 1.0, usual.seconds, usual.usual_tokens, np.ones(1))
    footing = chooser.footing(usual, "eagle3", {"eagle3": 0.5}, plain_lead=plain_lead)
    choice = chooser.weigh(seen, footing, looked=False)
    chooser.take(choice, seen, "eagle3")
    return choice.base


def test_a_drafter_is_left_for_plain_decoding_with_an_index_and_comes_back():
    chooser = Chooser(1.01, {"eagle3": frozenset({"eagle3"})})
    assert weighed(chooser, 1.0) == "eagle3"
    assert weighed(chooser, 1.52) == "eagle3"  # hardly faster: a look more may say otherwise
    assert weighed(chooser, 1.6) == "none"
    assert weighed(chooser, 1.52) == "none"
    assert weighed(chooser, 1.4) == "eagle3"


REPEATING = World(
    batch=8, plain_s=0.0009, draft_s=0.00012, verify_per_token_s=7e-6, cold_s=0.00135,
    eagle=(0.6,) * 8, rows={4: Rows(0.6, 0.85)}, plan_s=0.0001, look_s=0.00012,
    noise=Noise(0.1, 0.02, 0.002),
)  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8])
def test_text_that_begins_to_repeat_itself_is_decoded_with_the_index(batch):
    """No single step of the index pays for coming back to the drafter, so the drafter went on
    alone, at 0.6 and 0.8 of what the index gives."""
    world = replace(REPEATING, batch=batch)
    best = max(fixed_speed(world, "suffix", k) for k in range(1, 9))
    alone = max(fixed_speed(world, "eagle3", k) for k in range(1, 9))
    assert best > 1.15 * alone
    there, back = [], []
    for seed in range(3):
        policy = build_policy(PolicySettings(), DRAFTERS, seed, max_draft=8)
        policy.calibrate(world.profile())
        server = Simulation(policy, seed)
        server.swap(1, calibration(world))
        server.run(replace(world, rows={}), 300)
        server.run(world, 1500 if batch == 1 else 1100)
        there.append(server.run(world, 400).speed / best)
        server.run(replace(world, rows={}), 400)
        back.append(server.run(replace(world, rows={}), 400).speed / alone)
    assert median(there) >= 0.95
    assert median(back) >= 0.93
