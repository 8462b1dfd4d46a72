"""A hedge over drafters goes to the better one, whichever it is now, and hears the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.interface import Outcome, RowOutcomes, StepObs
from tests.policies.simulated import NEURAL, Noise, Simulation, World, fixed_speed

FIRST_IS_BETTER = World(
    batch=4, eagle=(0.8,) * 8, others={"second": (0.4,) * 8}, has_index=False,
    noise=Noise(0.1, 0.02, 0.01),
)  # fmt: skip
SECOND_IS_BETTER = replace(FIRST_IS_BETTER, eagle=(0.4,) * 8, others={"second": (0.8,) * 8})
MIX = "eagle3+second"
MIXED = {MIX: ("eagle3", "second")}


def built(world, seed=0, **settings):
    policy = build_policy(
        PolicySettings(kind="hedge", guard=False, **settings),
        {"eagle3": NEURAL, "second": NEURAL}, seed, 8, world.mixes,
    )  # fmt: skip
    policy.calibrate(world.profile())
    return policy


def used(server, world, steps):
    counts = Counter()
    server.run(world, steps, lambda decision, rows: counts.update([decision.drafter]))
    return counts


@pytest.mark.parametrize("mixes", [{}, MIXED], ids=["one at a time", "in mixed steps"])
@pytest.mark.parametrize(
    ("world", "better"),
    [(FIRST_IS_BETTER, "eagle3"), (SECOND_IS_BETTER, "second")],
    ids=["first", "second"],
)
def test_it_goes_to_the_better_drafter_and_hears_the_other(world, better, mixes):
    world = replace(world, mixes=mixes)
    server = Simulation(built(world), 0)
    server.run(world, 600)
    counts = used(server, world, 1200)

    assert counts[better] > 0.8 * 1200
    heard = counts[MIX] if mixes else counts[{"eagle3", "second"}.difference({better}).pop()]
    assert 0 < heard < 0.15 * 1200


def test_it_is_near_the_better_drafter_alone():
    server = Simulation(built(FIRST_IS_BETTER), 0)
    server.run(FIRST_IS_BETTER, 600)
    best = max(fixed_speed(FIRST_IS_BETTER, "eagle3", k) for k in range(9))
    assert server.run(FIRST_IS_BETTER, 1200).speed > 0.92 * best


@pytest.mark.parametrize("mixes", [{}, MIXED], ids=["one at a time", "in mixed steps"])
def test_it_follows_traffic_that_turns_round(mixes):
    before, after = (replace(w, mixes=mixes) for w in (FIRST_IS_BETTER, SECOND_IS_BETTER))
    server = Simulation(built(before), 1)
    server.run(before, 1000)
    server.run(after, 1500)
    assert used(server, after, 500)["second"] > 0.7 * 500


def test_a_version_that_comes_back_has_the_weight_it_left_with():
    policy, kinds = built(FIRST_IS_BETTER), ["eagle3", "second"]
    policy.on_swap("second", 1, {})
    Simulation(policy, 0).run(FIRST_IS_BETTER, 800)
    known = policy.weights(kinds)[1]
    policy.on_swap("second", 2, {})
    new = policy.weights(kinds)[1]
    policy.on_swap("second", 1, {})

    assert known < 0.1
    assert 0.3 < new < 0.4, "a new version has the mean of all weights, here of 1 and next to 0"
    assert policy.weights(kinds)[1] == pytest.approx(known)


def test_a_published_acceptance_is_believed_until_rounds_tell():
    policy = built(FIRST_IS_BETTER)
    for acceptance, k in (([0.99] * 8, 8), ([0.05] * 8, 1)):
        policy.on_swap("eagle3", 3 + k, {"acceptance": acceptance})
        seen = StepObs(0, 1, bytes((8,)), None, ("eagle3",), 8, 0)
        decisions = Counter(policy.plan(seen).draft_k for _ in range(50))
        assert decisions.most_common(1)[0][0] == k
    policy.on_swap("eagle3", 20, {"acceptance": "high"})
    assert policy.plan(StepObs(0, 1, bytes((8,)), None, ("eagle3",), 8, 0)).drafter in (
        "eagle3",
        "none",
    )


def test_propensities_are_how_often_a_stretch_begins():
    policy = built(FIRST_IS_BETTER, random_share=0.1, hedge={"stretch_steps": 1})
    Simulation(policy, 0).run(FIRST_IS_BETTER, 300)
    seen = StepObs(0, 4, bytes((8,)) * 4, None, ("eagle3", "second"), 8, 0)
    plans = [policy.plan(seen) for _ in range(4000)]

    counts = Counter((plan.drafter, plan.draft_k) for plan in plans if plan.draft_k)
    claimed = {(plan.drafter, plan.draft_k): plan.propensity for plan in plans}
    for arm, count in counts.most_common(3):
        assert count / 4000 == pytest.approx(claimed[arm], abs=0.025)


def test_rows_whose_drafter_is_not_known_teach_nothing():
    """A request of a mixed step has ended: nobody knows which pick its missing row was."""
    world = replace(FIRST_IS_BETTER, mixes=MIXED)
    policy = built(world, hedge={"mixing": 1.0})
    seen = StepObs(0, 4, bytes((8,)) * 4, None, ("eagle3", "second", MIX), 8, 0)
    decision = policy.plan(seen)
    assert decision.drafter == MIX and len(decision.picks) == 4
    before = policy.figures()["tokens"]

    rows = RowOutcomes([8, 8, 8], [8, 8, 8])
    policy.observe(Outcome(decision, 4, rows, 0.02, 0.0, False, 0))
    assert policy.figures()["tokens"] == before
    policy.observe(Outcome(policy.plan(seen), 4, RowOutcomes([8] * 4, [8] * 4), 0.02, 0, False, 0))
    assert policy.figures()["tokens"] != before


def test_without_a_ready_drafter_it_decodes_plainly():
    policy = built(FIRST_IS_BETTER)
    assert policy.plan(StepObs(0, 1, bytes((8,)), None, (), 8, 0)).draft_k == 0
    assert policy.plan(StepObs(0, 1, bytes((0,)), None, ("eagle3",), 0, 0)).draft_k == 0


def test_a_mix_in_which_the_device_picks_shows_no_expert():
    text = replace(NEURAL, picks_itself=True)
    policy = build_policy(
        PolicySettings(kind="hedge", guard=False, hedge={"mixing": 1.0}),
        {"eagle3": NEURAL, "second": text}, 0, 8, MIXED,
    )  # fmt: skip
    policy.calibrate(FIRST_IS_BETTER.profile())

    seen = StepObs(0, 4, bytes((8,)) * 4, None, ("eagle3", "second", MIX), 8, 0)
    assert {policy.plan(seen).drafter for _ in range(50)} <= {"eagle3", "second", "none"}
