"""A candidate passes only if it is better on held-out traces."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from drafters.samples import Sample
from policies.groups import published_shifts
from tests.trainer.conftest import World
from tests.trainer.test_learner import new_learner
from tests.trainer.test_replay import samples_of
from trainer.gate import GATE_DRAFT_K, Judge, Judgement
from trainer.learner import Learner
from trainer.publish import _by_temperature
from trainer.rows import RowStore


@pytest.fixture(scope="module")
def better(world: World) -> Learner:
    """Learner after 25 updates."""
    return trained(world, 25)


def trained(world: World, updates: int) -> Learner:
    learner = new_learner(world)
    held = learner.store.put(samples_of(world)[12:48])
    for _ in range(updates):
        learner.update([piece for sample in held for piece in sample.pieces])
    return learner


def judge_with(learner: Learner, margin: float = 1.005, confidence: float = 0.9) -> Judge:
    store, incumbent = RowStore(learner.store.device, 1 << 22), copy.deepcopy(learner.model)
    return Judge(learner.trainable, learner.head, store, incumbent, margin, confidence)


def judged(
    judge: Judge, candidate: nn.Module, samples: Sequence[Sample], older: Sequence[Sample] = ()
) -> Judgement:
    """Judge on samples that are uploaded for it."""
    held = judge.store.put([*samples, *older])
    found = judge.judge(candidate, held[: len(samples)], held[len(samples) :])
    judge.store.drop(held)
    return found


def test_a_better_candidate_passes_and_a_worse_one_does_not(world: World, better: Learner) -> None:
    fresh = new_learner(world)
    held_out = samples_of(world)[:30]

    up = judged(judge_with(fresh), better.model, held_out)
    down = judged(judge_with(better), fresh.model, held_out)

    assert up.candidate is not None and up.incumbent is not None
    assert up.verdict.passed and up.candidate > 1.005 * up.incumbent
    assert not down.verdict.passed
    assert (down.candidate, down.incumbent) == (up.incumbent, up.candidate)
    assert up.num_traces == len(held_out) and up.num_chains > 12 * 20


def test_an_equal_candidate_does_not_pass_a_margin(world: World) -> None:
    learner = new_learner(world)

    assert not judged(judge_with(learner), learner.model, samples_of(world)[:6]).verdict.passed


def test_nothing_passes_without_held_out_traces(world: World) -> None:
    judgement = judged(judge_with(new_learner(world)), trained(world, 1).model, [])

    assert not judgement.verdict.passed
    assert judgement.candidate is None
    assert judgement.acceptance == []


def test_weights_that_are_not_finite_do_not_pass(world: World) -> None:
    learner = new_learner(world)
    broken = copy.deepcopy(learner.model)
    with torch.no_grad():
        broken.fc.weight[0, 0] = float("nan")

    assert not judged(judge_with(learner), broken, samples_of(world)[:6]).verdict.passed


def test_calibration_is_the_survival_that_the_figure_is_made_of(
    world: World, better: Learner
) -> None:
    """Up to the last round of each text, which its end cuts."""
    judgement = judged(judge_with(new_learner(world)), better.model, samples_of(world)[:12])

    survival, total = 1.0, 1.0
    for conditional in judgement.acceptance:
        survival *= conditional
        total += survival
    assert len(judgement.acceptance) == GATE_DRAFT_K
    assert judgement.candidate == pytest.approx(total, rel=0.05)


def test_a_promoted_candidate_is_the_one_to_beat(world: World, better: Learner) -> None:
    judge, held_out = judge_with(new_learner(world)), samples_of(world)[:12]
    first = judged(judge, better.model, held_out)

    judge.promote(better.model)
    again = judged(judge, better.model, held_out)

    assert again.incumbent == first.candidate
    assert not again.verdict.passed


class Counting:
    """A trainable that counts the batches which it is asked to measure."""

    def __init__(self, learner: Learner) -> None:
        self._trainable, self.num_measured = learner.trainable, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._trainable, name)

    def acceptance(self, *given: object, **rule: object) -> object:
        self.num_measured += 1
        return self._trainable.acceptance(*given, **rule)  # type: ignore[arg-type]


@pytest.mark.parametrize(("was_judged", "expected"), [(True, 1), (False, 2)])
def test_a_candidate_that_was_just_judged_is_not_measured_again(
    world: World, better: Learner, was_judged: bool, expected: int
) -> None:
    judge, best, counting = judge_with(new_learner(world)), trained(world, 40), Counting(better)
    judge.trainable = counting  # type: ignore[assignment]
    held = judge.store.put(samples_of(world)[:20])
    judge.judge(better.model, held)

    judge.promote(better.model, was_judged=was_judged)
    before = counting.num_measured
    found = judge.judge(best.model, held)

    assert counting.num_measured - before == expected
    fresh = judge_with(better)
    again = fresh.judge(best.model, fresh.store.put(samples_of(world)[:20]))
    assert (found.candidate, found.incumbent) == (again.candidate, again.incumbent)


def test_warming_up_changes_no_judgement(world: World, better: Learner) -> None:
    cold, warm = (judge_with(new_learner(world)) for _ in range(2))
    for judge in (cold, warm):
        judge.store.prepare(samples_of(world)[0])
    warm.warm_up(64)

    first, second = (judged(judge, better.model, samples_of(world)[:20]) for judge in (cold, warm))

    assert first == second


def test_the_incumbents_figure_follows_the_held_out_traces(world: World) -> None:
    judge, candidate = judge_with(new_learner(world)), trained(world, 5)
    samples = samples_of(world)
    judged(judge, candidate.model, samples[:6])

    moved = judged(judge, candidate.model, samples[3:9])
    afresh = judged(judge_with(new_learner(world)), candidate.model, samples[3:9])

    assert moved == afresh


def test_a_gain_on_one_trace_alone_is_no_evidence(world: World, better: Learner) -> None:
    """A version that passes by its estimate does not if the gain may be luck."""
    fresh, one = new_learner(world), samples_of(world)[:1]

    by_estimate = judged(judge_with(fresh, confidence=0.5), better.model, one)
    by_interval = judged(judge_with(fresh), better.model, one)

    assert by_estimate.verdict.passed and by_estimate.gain_error is None
    assert not by_interval.verdict.passed
    many = judged(judge_with(fresh), better.model, samples_of(world)[:12])
    assert many.gain_error is not None and many.gain_error > 0


def test_acceptance_is_measured_for_each_temperature_and_published(
    world: World, better: Learner
) -> None:
    """The traffic is greedy and sampled; a policy starts a version from its own figures of both."""
    held_out, judge = samples_of(world)[30:60], judge_with(new_learner(world))
    both = judged(judge, better.model, held_out)
    greedy = [one for one in held_out if one.temperature == 0]
    alone = judged(judge, better.model, greedy)

    assert sorted(both.by_temperature) == [0, 2]
    assert both.by_temperature[0] == pytest.approx(alone.acceptance)
    assert both.by_temperature[2] != pytest.approx(alone.acceptance)
    assert alone.by_temperature == {}, "one class says no more than all"
    published = _by_temperature(both)
    shifts = published_shifts({"acceptance": both.acceptance, **published})
    assert shifts[0][0] * shifts[2][0] < 0, "one of both is kept more often than all are"
    assert _by_temperature(alone) == {}
