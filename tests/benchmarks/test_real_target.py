"""Speeds, differing outputs and training data of the benchmark on a target trained on the spot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness.loops import Answer
from benchmarks.harness.policy import StepTime
from benchmarks.real.speculation import (
    OFF,
    POLICY,
    Arm,
    Turn,
    differences,
    first_difference,
    measure,
    rows_of,
)
from benchmarks.real.train_drafter import Ask, TrainingData, asks_of
from buffer.records import Acceptance
from oracles.engines import RandomPolicy
from policies.fixed import FixedPolicy
from policies.interface import Decision, StepObs
from tests.benchmarks.built import built_over
from trainer.packing import HeldPiece
from trainer.rows import RowStore


def test_outputs_part_at_their_first_unlike_token():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1

    (found,) = differences([(7, 8), (9,)], [[1, 2, 3], [4]], [[1, 5, 3], [4]])

    assert found.context == (7, 8, 1)
    assert found.tokens == (2, 5)


def arm(seconds: list[float], tokens: list[int]) -> Arm:
    turns = [{"python": Turn([s], [Answer(tokens, Acceptance(2, 4, 2), True)])} for s in seconds]
    return Arm(FixedPolicy("none", 0), turns, times=[StepTime(0.001, 1, 0)])


def test_a_row_holds_an_arm_against_plain_decoding():
    arms = {OFF: arm([4.0, 2.0, 3.0], [1, 2, 3, 4]), "eagle3-k2": arm([1.0, 2.0], [1, 2, 9, 4])}

    plain, drafted = rows_of(1, arms, [(7,)])

    assert plain["tokens_per_s"] == pytest.approx(4 / 3)
    assert plain["vs_off"] == 1
    assert drafted["vs_off"] == pytest.approx((4 + 2) / 2 / (4 / 3))
    assert (drafted["groups"], drafted["median_group_vs_off"]) == (2, pytest.approx((4 + 1) / 2))
    assert drafted["tokens_per_step"] == 2
    assert (drafted["outputs"], drafted["outputs_unlike_off"]) == (1, 1)
    assert drafted["outputs_unlike_own_turns"] == 0


def test_an_arm_that_failed_leaves_a_row_that_says_so():
    arms = {OFF: arm([1.0], [1]), "eagle3-k2": Arm(FixedPolicy("eagle3", 2), error="it broke")}

    _, failed = rows_of(1, arms, [(7,)])

    assert failed["error"] == "it broke"
    assert "tokens_per_s" not in failed


def test_a_share_of_the_requests_is_greedy():
    asks = asks_of([[n] for n in range(1000)], greedy_share=0.6, temperature=0.8)

    assert sorted(ask.prompt_ids[0] for ask in asks) == list(range(1000))
    assert sum(ask.temperature == 0 for ask in asks) == pytest.approx(600, abs=60)
    assert {ask.temperature for ask in asks} == {0.0, 0.8}
    assert asks[0] == Ask(asks[0].prompt_ids, asks[0].temperature)


def test_a_draw_takes_whole_pieces_each_once():
    lengths = (5, 7, 3, 6)
    starts = (0, 5, 12, 15)
    pieces = [
        HeldPiece(np.arange(start, start + num, dtype=np.int32), np.arange(num, dtype=np.int32))
        for start, num in zip(starts, lengths, strict=True)
    ]
    data = TrainingData(RowStore(torch.device("cpu"), 1 << 20), pieces, [], 0)

    drawn = data.draw(16, np.random.default_rng(0))

    assert data.num_rows == 21
    assert 2 <= len(drawn) == len({int(piece.slots[0]) for piece in drawn})
    assert sum(len(piece.slots) for piece in drawn) <= 16
    assert len(data.draw(100, np.random.default_rng(0))) == 4


PROMPTS = {"python": [(5, 6, 7), (8, 9), (3,)], "c": [(11, 12), (13,), (14, 15, 16)]}


def measured(policy: RandomPolicy) -> dict[str, Arm]:
    built = built_over(policy)
    names = [OFF, "eagle3-k2", POLICY]
    arms = measure(built, PROMPTS, 2, 12, turns=2, until_s=float("inf"), names=names)
    assert built.policy.playing is policy
    assert built.engine.inbox.num_inflight() == 0
    return arms


def test_all_arms_answer_the_same_prompts_in_every_timed_turn():
    arms = measured(RandomPolicy())

    assert [len(a.turns) for a in arms.values()] == [2, 2, 2]
    assert arms[OFF].tokens_per_step() == 1
    assert arms[OFF].tokens(0) == arms[OFF].tokens(1)  # float32: nothing depends on the batch
    assert arms["eagle3-k2"].tokens(0) == arms[POLICY].tokens(1) == arms[OFF].tokens(0)
    assert {len(tokens) for tokens in arms[OFF].tokens(0)} == {12}


def test_an_arm_that_fails_leaves_the_others_their_turns():
    class Broken(RandomPolicy):
        def plan(self, obs: StepObs) -> Decision:
            raise ArithmeticError("no plan")

    arms = measured(Broken())

    assert "the policy failed" in (arms[POLICY].error or "")
    assert [len(a.turns) for a in arms.values()] == [2, 2, 0]
