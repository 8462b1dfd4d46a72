"""Figures of policies: what is claimed, by which goal, and whose rules are compared."""

from __future__ import annotations

import json

import pytest

from benchmarks.harness.allocate_times import allocate_times
from benchmarks.policies import (
    allocate_rows,
    calibration_error,
    headroom,
    publish_allocate,
    rows_of,
)
from benchmarks.policy_changes import MOST, after_change, left, trials
from benchmarks.policy_changes import rows_of as change_rows
from benchmarks.policy_comparison import RULES
from benchmarks.policy_simulation import claims
from benchmarks.real import choosing
from configs.schema import PolicySettings
from policies.catalog import CATALOG
from policies.evaluation import evaluate
from policies.replayed_log import ReplayedLog
from tests.policies.logs import DRAFTER, MAX_DRAFT, any_k, log, profile
from tests.policies.simulated import World

STEADY = World(eagle=(0.6,) * 8, has_index=False, verify_per_token_s=2e-6)


def test_what_the_device_does_to_cut_drafts_is_timed_for_every_score():
    times = allocate_times("cpu")
    assert set(times) == {"top", "entropy", "margin", "head"}
    assert all(us > 1 for us in times.values())
    assert all(row.goal is None for row in allocate_rows(times, "cpu"))
    on_gpu = list(allocate_rows({"top": 29.0, "head": 31.0}, "cuda"))
    assert [row.holds for row in on_gpu] == [True, False]


def test_cuts_and_what_belongs_to_them_are_measured_and_written(tmp_path):
    times = publish_allocate("cpu", tmp_path)
    written = json.loads((tmp_path / "allocate_cpu.json").read_text())
    rows = json.loads((tmp_path / "rows" / "policies.json").read_text())
    assert written["microseconds"] == times
    beside = [us for ones in written["beside"].values() for us in ones.values()]
    assert [row["value"] for row in rows] == [*times.values(), *beside]
    assert len(beside) == 2 and min(beside) > 1


def test_small_batches_and_the_headroom_at_batch_1_are_held_to_their_goals():
    judged = ReplayedLog.of(log(300, any_k, (1, 4)), DRAFTER, profile(), MAX_DRAFT)
    closed = headroom(judged, PolicySettings())
    results = {
        "batches": [1, 4, 8],
        "ltd": {"PPO": {"gain": 0.05, "small": {"gain": 0.01}}},
        "headroom": closed | {"ltd": 0.4},
        "plan": {},
        "calibration_error": calibration_error(judged),
    }

    rows = {row.row: row for row in rows_of(evaluate(judged, PolicySettings(), (), (0,)), results)}

    where = "bundled target, temperature 0.7, batch "
    assert rows[f"{where}1, 4, 8: ltd by PPO, held-out steps"].holds
    assert not rows[f"{where}1 to 4: ltd by PPO, held-out steps"].holds
    assert rows[f"{where}1: ltd, replayed"].holds
    assert rows[f"{where}1: goodput, replayed"].value == closed["goodput"]
    assert calibration_error(judged) is None, "a thousand rounds are needed before"


def test_every_policy_that_decides_is_in_the_comparison_with_its_origin():
    assert set(RULES) == set(CATALOG) - {"fixed"}


@pytest.mark.parametrize(("value", "holds"), [(0.979, False), (0.981, True)])
def test_simulated_speeds_are_held_to_the_goals_of_the_live_ones(value, holds):
    row = {"name": "gpu, random", "settled": value, "whole": value, "vs_plain": value + 0.0045}
    assert {one.holds for one in claims([row])} == {holds}
    assert choosing.GOAL == 0.98


def test_a_policy_that_draws_on_after_a_shift_is_seen():
    assert after_change(STEADY, STEADY, 0)[0] == MOST
    found = left("x", STEADY, 0.01, 1)
    assert found["median"] == found["worst"] <= 50
    assert 0.8 < found["least_vs_plain"] == found["vs_plain"] < 1
    worst = [found | {"worst": worst} for worst in (50, 51, MOST)]
    assert [one.holds for one in change_rows(worst, [])] == [True, False, False]


def test_what_better_traffic_waits_for_is_measured():
    found = trials(1, 1)
    assert 0 < found["wait"] < 200
    assert [one.value for one in change_rows([], [found])] == [round(found["least_vs_plain"], 4)]
