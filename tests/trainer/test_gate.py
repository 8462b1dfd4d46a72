"""A candidate passes only if it is better on held-out traces."""

from __future__ import annotations

import copy

import pytest
import torch

from drafters.eagle3.batch import collate
from tests.trainer.conftest import World
from tests.trainer.test_learner import new_learner
from tests.trainer.test_replay import samples_of
from trainer.gate import GATE_DRAFT_K, Judge
from trainer.learner import Learner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def better(world: World) -> Learner:
    """Learner after 25 updates."""
    return trained(world, 25)


def trained(world: World, updates: int) -> Learner:
    learner = new_learner(world)
    parts = [(x, piece) for x in samples_of(world)[12:48] for piece in x.pieces]
    for _ in range(updates):
        learner.update(collate(parts))
    return learner


def judge_with(learner: Learner, margin: float = 1.005) -> Judge:
    return Judge(learner.trainable, learner.head, CPU, copy.deepcopy(learner.model), margin)


def test_a_better_candidate_passes_and_a_worse_one_does_not(world: World, better: Learner) -> None:
    fresh = new_learner(world)
    held_out = samples_of(world)[:12]

    up = judge_with(fresh).judge(better.model, held_out)
    down = judge_with(better).judge(fresh.model, held_out)

    assert up.candidate is not None and up.incumbent is not None
    assert up.verdict.passed and up.candidate > 1.005 * up.incumbent
    assert not down.verdict.passed
    assert (down.candidate, down.incumbent) == (up.incumbent, up.candidate)
    assert up.num_traces == 12 and up.num_chains > 12 * 20


def test_an_equal_candidate_does_not_pass_a_margin(world: World) -> None:
    learner = new_learner(world)

    assert not judge_with(learner).judge(learner.model, samples_of(world)[:6]).verdict.passed


def test_nothing_passes_without_held_out_traces(world: World) -> None:
    judgement = judge_with(new_learner(world)).judge(trained(world, 1).model, [])

    assert not judgement.verdict.passed
    assert judgement.candidate is None
    assert judgement.acceptance == []


def test_weights_that_are_not_finite_do_not_pass(world: World) -> None:
    learner = new_learner(world)
    broken = copy.deepcopy(learner.model)
    with torch.no_grad():
        broken.fc.weight[0, 0] = float("nan")

    assert not judge_with(learner).judge(broken, samples_of(world)[:6]).verdict.passed


def test_calibration_is_the_survival_that_the_figure_is_made_of(
    world: World, better: Learner
) -> None:
    judgement = judge_with(new_learner(world)).judge(better.model, samples_of(world)[:12])

    survival, total = 1.0, 1.0
    for conditional in judgement.acceptance:
        survival *= conditional
        total += survival
    assert len(judgement.acceptance) == GATE_DRAFT_K
    assert total == pytest.approx(judgement.candidate)


def test_a_promoted_candidate_is_the_one_to_beat(world: World, better: Learner) -> None:
    judge, held_out = judge_with(new_learner(world)), samples_of(world)[:12]
    first = judge.judge(better.model, held_out)

    judge.promote(better.model)
    again = judge.judge(better.model, held_out)

    assert again.incumbent == first.candidate
    assert not again.verdict.passed


def test_the_incumbents_figure_follows_the_held_out_traces(world: World) -> None:
    judge, candidate = judge_with(new_learner(world)), trained(world, 5)
    samples = samples_of(world)
    judge.judge(candidate.model, samples[:6])

    moved = judge.judge(candidate.model, samples[3:9])
    afresh = judge_with(new_learner(world)).judge(candidate.model, samples[3:9])

    assert moved == afresh
