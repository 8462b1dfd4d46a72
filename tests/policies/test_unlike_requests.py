"""Requests of one server differ: by temperature, by tenant, by the length of their texts. What the
policy is told of that, it uses; what the same policy does without being told is the comparison.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.groups import Mix, Shifts, class_of, group_of
from policies.interface import Outcome, RowOutcomes, StepObs
from policies.log_odds import shifted
from policies.replayed_log import ReplayedLog, play
from policies.round_counts import Rounds
from policies.step_time import StepTimes
from tests.policies.logs import DRAFTER, always, log, profile
from tests.policies.simulated import NEURAL, Simulation
from tests.policies.unlike import (
    GREEDY,
    TEMPERATURES,
    TENANTS,
    WARM,
    WORLD,
    lead,
    lead_of_reader,
    made,
)

GROUPS = {"temperatures": TEMPERATURES, "tenants": TENANTS, "nothing": {}}


@cache
def speed(batch, told):
    """Of a policy that is told of these groups, on two seeds."""
    world = replace(WORLD, batch=batch, groups=GROUPS[told])
    return sum(lead(world, seed, steps=600) for seed in (0, 1))


def gain(batch, told):
    """Speed of a policy that is told of groups over that of one that is not."""
    return speed(batch, told) / speed(batch, "nothing")


@pytest.mark.parametrize("groups", ["temperatures", "tenants"])
def test_a_server_of_one_request_drafts_for_whom_it_has_before_it(groups):
    assert gain(1, groups) > 1.03


def test_so_does_one_of_two_requests_that_are_alike_or_not():
    assert gain(2, "temperatures") > 1.02


@pytest.mark.parametrize("batch", [1, 4])
def test_long_texts_are_worth_longer_drafts_and_are_no_slow_machine(batch):
    seeds = (0, 1)
    untold, told = (
        sum(lead_of_reader(seed, batch, tells=tells, steps=500) for seed in seeds)
        for tells in (False, True)
    )

    assert told > 1.03 * untold
    assert told / len(seeds) > 0.99


def test_requests_of_one_group_change_nothing():
    one_group = replace(WORLD, batch=2, groups=dict.fromkeys(WORLD.difficulties, WARM))

    alone = replace(one_group, groups={})
    assert lead(one_group, 0, steps=400) == lead(alone, 0, steps=400)


def num_shifts(groups, seed):
    """Times that a policy takes its traffic for another one."""
    world = replace(WORLD, groups=groups)
    policy = made(world, seed)
    Simulation(policy, seed).run(world, 800)
    return policy.figures()["acceptance"]["eagle3/all"]["shifts"]


def test_another_request_is_not_taken_for_other_traffic():
    told, untold = (sum(num_shifts(g, seed) for seed in range(3)) for g in (TEMPERATURES, {}))
    assert told < 0.7 * untold


def replayed(told, num_steps=1500):
    """Speed on a log in which one request in two is greedy, over that of the best fixed K."""
    easy, hard = ([own] * 8 for own in (0.9, 0.3))
    is_greedy = [at // 25 % 2 == 0 for at in range(num_steps)]
    steps = [
        replace(
            step, rows=tuple(replace(row, group=GREEDY if greedy else WARM) for row in step.rows)
        )
        if told
        else step
        for step, greedy in zip(
            log(num_steps, always(8), (1,), lambda at: easy if is_greedy[at] else hard),
            is_greedy,
            strict=True,
        )
    ]
    played = ReplayedLog.of(steps, DRAFTER, profile(), 8)
    policy = build_policy(PolicySettings(), played.traits, 0, 8, {})
    tokens, _, seconds = play(policy, played).columns(played)
    fixed = (played.tokens.sum(axis=0) / played.seconds.sum(axis=0)).max()
    return tokens.sum() / seconds.sum() / fixed


def test_a_replayed_log_tells_temperatures_as_a_server_does():
    assert replayed(told=True) > 1.03 * replayed(told=False)


# ---- shifts -------------------------------------------------------------------------------------

HAZARDS = np.full((2, 4), 0.6)


def rounds(group, shift, num, seed=0):
    """What a group of this shift keeps of ``num`` drafts of four tokens."""
    rng = np.random.default_rng(seed)
    is_kept = rng.random((num, 4)) < shifted(HAZARDS[0], shift)
    kept = np.logical_and.accumulate(is_kept, axis=1).sum(axis=1).tolist()
    return Rounds.of([RowOutcomes([4] * num, kept, groups=bytes((group,)) * num)])


def lessons(shift, repeats, num=30):
    """Of greedy requests that keep more than others, and warm ones that keep less."""
    groups = (WARM, -shift), (GREEDY, shift)
    return [rounds(g, s, num, seed) for seed in range(repeats) for g, s in groups]


def taught(*learned):
    shifts = Shifts()
    for lesson in learned:
        shifts.learn(shifts.weigh(lesson, HAZARDS))
    return shifts


def test_nothing_is_told_apart_before_a_second_group_drafts():
    shifts = taught(rounds(GREEDY, 1.0, 200))
    assert not shifts.is_used
    assert shifts.of(GREEDY) == 0


def test_much_evidence_finds_a_shift_and_little_stays_near_all_others():
    shift = 1.2
    known, guessed = taught(*lessons(shift, 20)), taught(*lessons(shift, 1, num=2))

    assert known.of(GREEDY) - known.of(WARM) == pytest.approx(2 * shift, abs=0.4)
    assert 0 < guessed.of(GREEDY) - guessed.of(WARM) < shift


def test_a_tenant_at_a_new_temperature_takes_both_parts_from_others():
    learned = [
        rounds(group_of(tenant, t), of_tenant + of_class, 20, seed)
        for seed in range(20)
        for tenant, of_tenant in ((1, 0.8), (2, -0.8))
        for t, of_class in ((0.0, 0.6), (1.0, -0.6))
        if (tenant, t) != (1, 0.0)
    ]
    shifts = taught(*learned)

    unseen = shifts.of(group_of(1, 0.0))
    assert unseen > max(shifts.of(group_of(1, 1.0)), shifts.of(group_of(2, 0.0))) + 0.4


def test_what_shifts_explain_is_no_news_of_the_common_acceptance():
    shifts, seen = taught(*lessons(1.0, 9)), rounds(GREEDY, 1.0, 400, 99)
    excess = shifts.weigh(seen, HAZARDS).beyond()[None]
    first = seen.counts_U[seen.accepted_U > 0].sum()

    assert (first - excess.kept[0]) / 400 == pytest.approx(0.6, abs=0.06)
    assert excess.tokens > 100


def test_the_tenants_that_are_remembered_are_bounded_and_their_figures_are_json():
    shifts = taught(*(rounds(group_of(tenant, 0.0), 0.5, 4) for tenant in range(64)))
    figures = shifts.figures()

    assert sum(name.startswith("tenant") for name in figures) == 24
    assert "tenant/63" in json.loads(json.dumps(figures))


def test_a_swap_leaves_a_part_and_a_version_that_comes_back_finds_its_own():
    shifts = taught(*lessons(1.0, 9))
    shifts.on_swap(None, 1, {})
    before = shifts.of(GREEDY)
    shifts.on_swap(1, 2, {})
    assert 0.5 * before < shifts.of(GREEDY) < before
    shifts.learn(shifts.weigh(rounds(GREEDY, -1.0, 300), HAZARDS))
    shifts.on_swap(2, 1, {})
    assert shifts.of(GREEDY) == before


def test_a_published_acceptance_by_temperature_is_where_a_version_starts():
    shifts = Shifts()
    shifts.on_swap(
        None, 1, {"acceptance": [0.6], "acceptance_by_temperature": {"0": [0.8], "2": [0.4]}}
    )

    assert shifts.is_used
    assert shifts.of(GREEDY) > 0.4
    assert shifts.of(WARM) < -0.4


@pytest.mark.parametrize(
    "published",
    [
        "much",
        {"0": "much", "2": [0.5]},
        {"0": [7.0]},
        {"0": [0.9, 7.0], "2": [0.1]},
        {"x": [0.5]},
        {"0": [True], "2": [0.1]},
        {"0": []},
        None,
    ],
)
def test_what_is_no_probability_is_ignored(published):
    shifts = Shifts()
    shifts.on_swap(None, 1, {"acceptance": [0.6], "acceptance_by_temperature": published})
    assert not shifts.is_used


def test_temperatures_and_mixes_are_told_apart():
    assert [class_of(t) for t in (0.0, 0.1, 0.5, 0.7, 1.0, 1.4)] == [0, 1, 1, 2, 2, 3]
    assert Mix.of(bytes((2, 0, 2, 2))).shares == ((0, 0.25), (2, 0.75))
    assert Mix.of(b"\0\2").distance(Mix.of(b"\2\2")) == 0.5
    assert Mix.of(b"\0\2").distance(Mix.of(b"\2\0")) == 0


# ---- times --------------------------------------------------------------------------------------


def test_reading_is_told_from_a_slow_machine_and_drafts_add_the_same_to_a_longer_step():
    times = StepTimes(8, {"eagle3": NEURAL})
    times.calibrate(WORLD.profile())
    for step in range(300):
        context = (200, 32_000)[step // 10 % 2]
        times.follow(context, 1)
        k = step % 3
        times.observe("eagle3", k, 1, WORLD.seconds("eagle3", k)[0] + context * 4e-7)

    def predicted(context):
        times.follow(context, 1)
        return times.plain_s(1), times.arm_times("eagle3", 1)[1]

    short, long = predicted(200), predicted(32_000)
    assert long[0] - short[0] == pytest.approx(32_000 * 4e-7, rel=0.2)
    assert long[1] - long[0] == pytest.approx(short[1] - short[0], rel=0.2)


def test_a_context_is_left_for_another_one_and_not_for_its_bound():
    times = StepTimes(8, {"eagle3": NEURAL})
    seen = []
    for tokens in (1000, 1100, 1200, 1100, 2500, None, 10):
        times.follow(tokens, 1)
        seen.append(times.context)
    assert len(set(seen[:4])) == 1
    assert seen[4] == seen[5] > seen[3]
    assert seen[6] == 0


def next_plan(growth):
    """Steps until the next plan after one, where texts grow by a factor in the second step."""
    policy = build_policy(PolicySettings(kind="goodput", explore=0), {"eagle3": NEURAL}, 0, 8)
    policy.calibrate(WORLD.profile())
    planned = []
    for step in range(400):
        decision, plan_s = policy.rest(), 0.0
        if decision is None:
            obs = StepObs(step, 1, b"\x08", None, ("eagle3",), 8, 0, context=1000)
            decision, plan_s = policy.plan(obs), 0.05 * WORLD.plain_s
            planned.append(step)
            if step > 300 and len(planned) > 1 and planned[-2] > 300:
                return planned[-1] - planned[-2]
        k = decision.draft_k
        rows, step_s = RowOutcomes([k], [min(k, 3)]), WORLD.seconds("eagle3", k)[0] + plan_s
        is_long = step > 300 and planned and planned[-1] == step - 1
        context = 1000 * (growth if is_long else 1)
        policy.observe(
            Outcome(decision, 1, rows, step_s, 0.0, False, 0, plan_s=plan_s, context=context)
        )
    raise AssertionError("no plan was made")


def test_a_plan_for_short_texts_is_not_followed_for_long_ones():
    assert next_plan(1) > 5
    assert next_plan(4) == 2


def test_rounds_are_counted_by_match_and_group_as_an_engine_tells_them():
    """The engine tells matches and groups as bytes."""
    told = RowOutcomes([2, 2, 0, 4, 2], [1, 1, 0, 4, 1], bytes((0, 7, 7, 255, 7)), groups=b"ababb")
    unseen = RowOutcomes([2], [1], groups=b"b")

    found = Rounds.of([told, unseen])

    rows = zip(*(column.tolist() for column in found), strict=True)
    assert sorted(rows) == [
        (-1, ord("b"), 2, 1, 1),
        (0, ord("a"), 2, 1, 1),
        (7, ord("b"), 2, 1, 2),
        (255, ord("b"), 4, 4, 1),
    ]
