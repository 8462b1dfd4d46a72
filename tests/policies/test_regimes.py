"""What was usual before a shift is remembered beside what is usual now, and found again."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest

from policies.acceptance import AcceptanceModel
from tests.policies.simulated import best_fixed_speed
from tests.policies.test_acceptance import acceptance, feed
from tests.policies.test_simulation import SMALL, served

EASY, HARD = (0.8,) * 4, (0.05,) * 4


def first(model: AcceptanceModel) -> float:
    return model.hazards("eagle3", -1)[0]


def rest(model, rounds):
    for _ in range(rounds):
        model.tick(1)


def in_turns(model, times, rounds=200):
    for seed in range(times):
        feed(model, EASY, rounds=rounds, k=4, seed=2 * seed)
        feed(model, HARD, rounds=rounds, k=4, seed=2 * seed + 1)


@pytest.mark.parametrize("num_before", [1000, 5000])
def test_forty_rounds_after_a_shift_little_is_left_of_what_was_usual(num_before):
    """However long it was usual: as a prior of 200 rounds it left a first token at 0.5."""
    model = acceptance()
    feed(model, EASY, rounds=num_before, k=4)
    feed(model, HARD, rounds=40, k=4, seed=1)
    assert first(model) < 0.3


def test_a_shift_that_goes_on_does_not_throw_away_what_it_has_shown():
    model, errors = acceptance(), []
    feed(model, EASY, rounds=3000, k=4)
    for seed in range(1, 9):
        feed(model, HARD, rounds=50, k=4, seed=seed)
        errors.append(abs(first(model) - HARD[0]))
    assert errors[-1] < 0.03
    assert max(errors[4:]) < 0.06


@pytest.mark.parametrize(("to", "bound"), [(EASY, 0.6), (HARD, 0.25)])
def test_a_return_is_recognised_within_a_dozen_rounds(to, bound):
    model = acceptance()
    in_turns(model, 3)
    if to is HARD:
        feed(model, EASY, rounds=200, k=4, seed=77)
    feed(model, to, rounds=12, k=4, seed=99)
    assert first(model) > bound if to is EASY else first(model) < bound


def test_without_rounds_a_return_becomes_likelier_the_faster_text_has_turned_before():
    fast, slow = acceptance(), acceptance()
    in_turns(fast, 4, rounds=60)
    in_turns(slow, 1, rounds=1000)
    rest(fast, 300)
    rest(slow, 300)
    assert first(fast) > 0.36
    assert 0.1 < first(slow) < 0.28


def test_a_drafter_that_was_never_good_is_not_taken_for_one_after_a_rest():
    model = acceptance()
    feed(model, HARD, rounds=1000, k=4)
    rest(model, 5000)
    assert first(model) < 0.1


def test_other_weights_start_without_the_regimes_of_the_former_ones():
    model = acceptance()
    in_turns(model, 3)
    evidence, _ = model.usual("eagle3")
    model.replace("eagle3", evidence.limited(40.0))
    before = first(model)
    rest(model, 3000)
    assert first(model) == pytest.approx(before, abs=0.02)


@pytest.mark.parametrize(("batch", "most"), [(1, 60), (4, 60)])
def test_a_drafter_that_becomes_useless_without_a_swap_is_silent_soon(batch, most):
    """It took 521 to 974 steps at batch 1, and 81 to 159 at batch 4."""
    for seed in range(2):
        world = replace(SMALL, batch=batch)
        server, ks = served(world, seed), []
        server.run(world, 1000)
        server.run(
            replace(world, eagle=(0.02,) * 8), 100, on_step=lambda d, _, ks=ks: ks.append(d.draft_k)
        )
        stopped = next(at for at in range(81) if not any(ks[at : at + 20]))
        assert stopped <= most


def test_text_that_turns_is_followed_in_both_directions():
    """With what was usual as the only prior: 0.88 of the best fixed K in the hard stretches."""
    easy = replace(SMALL, batch=1)
    hard = replace(easy, eagle=(0.1,) * 8)
    server = served(easy)
    server.run(easy, 500)
    speeds = [
        [server.run(world, 150).speed / best_fixed_speed(world) for world in (hard, easy)]
        for _ in range(4)
    ]
    when_hard, when_easy = (fmean(column) for column in zip(*speeds, strict=True))
    assert when_hard > 0.905
    assert when_easy > 0.92
