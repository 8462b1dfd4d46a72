"""What a base reaches with its interruptions is measured over all steps, and so are trials."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.choice import Chooser
from tests.policies.simulated import (
    DRAFTERS,
    NEURAL,
    Rows,
    Simulation,
    World,
    calibration,
    fixed_speed,
)
from tests.policies.test_simulation import SMALL
from tests.policies.test_stretches import chosen


@pytest.mark.parametrize(("batch", "share", "look_s"), [(8, 0.3, 0.001), (32, 0.3, 0.0006)])
def test_the_lead_of_plain_decoding_with_an_index_is_what_it_reaches(batch, share, look_s):
    """An index that finds much in every other look, and looks that take half a step."""
    world = World(
        batch=batch, eagle=(0.05,) * 8, rows={5: Rows(share, 0.9)}, look_s=look_s,
        plain_s=0.0014, draft_s=0.0002, verify_per_token_s=4e-6, cold_s=0.004,
    )  # fmt: skip
    policy = build_policy(PolicySettings(), DRAFTERS, 0, max_draft=8)
    policy.calibrate(world.profile())
    server, leads = Simulation(policy, 0), []
    server.run(world, 700)

    found = server.run(world, 700, lambda *_: leads.append(policy._chooser.plain_lead))

    reached = found.speed / fixed_speed(world, "none", 0)
    assert reached > 1.1
    assert fmean(leads) == pytest.approx(reached, rel=0.08)


def test_steps_without_a_plan_are_steps_without_an_interruption():
    chooser = Chooser(1.0, {"eagle3": frozenset({"eagle3"})})
    chooser._leads["none"] = 2.0
    chosen(chooser, 0.5, "none")
    after_one = chooser.plain_lead
    chooser.rested(200, 0.0, 200, 0)
    assert after_one > 1.9
    assert chooser.plain_lead < 1.05
    chooser.rested(1000, 500.0, 0, 0)  # half of their time
    assert chooser.plain_lead == pytest.approx(2.0)


def test_new_weights_are_tried_once_a_swap_is_over_and_in_one_piece_without_looks():
    """While looks at matches pay, and plain decoding with the index is the best there is."""
    world = World(
        batch=8, eagle=(0.4,) * 8, rows={5: Rows(0.5, 0.9)}, look_s=0.0001, plain_s=0.0014,
        draft_s=0.0004, verify_per_token_s=4e-6, cold_s=0.004,
    )  # fmt: skip
    policy = build_policy(PolicySettings(), DRAFTERS, 0, max_draft=8)
    policy.calibrate(world.profile())
    server, seen = Simulation(policy, 0), []
    server.run(world, 1500)
    server.swap(1, calibration(world))
    server.run(world, 160, lambda decision, rows: seen.append((decision, rows.matches)))

    tried = [i for i, (decision, _) in enumerate(seen) if decision.drafter == "eagle3"]
    assert 100 <= tried[0] <= 143  # 0.2 s of plain steps, or of longer ones
    assert len(tried) >= 4 and tried == list(range(tried[0], tried[0] + len(tried)))
    assert sum(matches is not None for _, matches in seen[: tried[0]]) >= 80
    assert all(seen[i][1] is None for i in tried[1:])


def test_interruptions_of_a_drafter_are_a_share_of_all_its_steps():
    """Planning takes half a step, so that a plan holds for many; in these, nothing interrupts."""
    world = replace(SMALL, has_index=False, plan_s=0.0003)
    policy = build_policy(PolicySettings(), {"eagle3": NEURAL}, 0, max_draft=8)
    policy.calibrate(world.profile())
    server, drafters, believed = Simulation(policy, 0), [], []
    server.run(world, 600)

    def watch(decision, rows):
        drafters.append(decision.drafter)
        believed.append(policy._chooser._broken["eagle3"])

    server.run(world, 1000, watch)

    assert policy._chooser.base == "eagle3"
    returns = sum(a != b == "eagle3" for a, b in pairwise(drafters))
    assert 0 < returns < 20
    assert fmean(believed) == pytest.approx(returns / drafters.count("eagle3"), abs=0.01)
