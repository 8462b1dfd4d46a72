"""A trainer beside a server works as much as serving may lose, whatever its work costs."""

from __future__ import annotations

import random

import pytest

from policies.sharing import Sharing


def shared(sharing: Sharing, slowdown: float, seconds: float, noise: float = 0.0) -> Sharing:
    """The trainer works 0.02 s at a time and rests as it must, for so many seconds. Speeds of
    either time scatter by ``noise``."""
    draws, passed_s = random.Random(0), 0.0
    while passed_s < seconds:
        rest_s = 0.02 * (1 / sharing.duty - 1) or 0.01
        for tell, each_s, speed in (
            (sharing.worked, 0.02, 1 - slowdown),
            (sharing.rested, rest_s, 1.0),
        ):
            tell(2e4 * speed * each_s * draws.uniform(1 - noise, 1 + noise), each_s)
        passed_s += 0.02 + rest_s
    return sharing


@pytest.mark.parametrize("slowdown", [0.1, 0.22, 0.42, 0.9])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_serving_loses_what_it_may_and_no_more(slowdown: float, noise: float) -> None:
    sharing = shared(Sharing(0.05), slowdown, 60.0, noise)

    assert sharing.loss is not None
    assert sharing.slowdown == pytest.approx(slowdown, abs=0.001 + 2 * sharing.error)
    assert sharing.error < 0.001 + 0.4 * noise * slowdown
    assert 0.05 - 0.1 * noise - 0.001 < sharing.duty * slowdown < 0.051 + 0.02 * noise
    assert 0.05 - 0.1 * noise - 0.003 < sharing.loss < 0.053 + 0.02 * noise


def test_the_more_speeds_scatter_the_less_the_trainer_works() -> None:
    certain, uncertain = (shared(Sharing(0.05), 0.4, 200.0, noise).loss for noise in (0.0, 0.9))

    assert certain is not None and uncertain is not None
    assert uncertain < certain - 0.002


def test_before_anything_is_known_the_trainer_is_taken_for_costly() -> None:
    sharing = Sharing(0.05)

    assert sharing.slowdown is sharing.loss is None
    assert sharing.duty == pytest.approx(0.1)


def test_a_trainer_that_costs_nothing_works_all_the_time() -> None:
    assert shared(Sharing(0.05), 0.02, 20.0).duty == 1.0


def test_a_trainer_that_becomes_costly_is_held_again() -> None:
    sharing = shared(Sharing(0.05), 0.0, 20.0)
    assert sharing.duty == 1.0

    shared(sharing, 0.5, 40.0)

    assert sharing.duty * 0.5 == pytest.approx(0.05, rel=0.1)


def test_a_duty_grows_step_by_step() -> None:
    """However good the first measurement is."""
    sharing = Sharing(0.05)
    duties = [sharing.duty]
    for _ in range(5):
        sharing.worked(2e4, 1.0)
        sharing.rested(2e4, 1.0)
        duties.append(sharing.duty)

    assert sharing.slowdown == 0.0
    assert duties == pytest.approx([0.1 * 1.1**n for n in range(6)])


def test_time_without_requests_says_nothing() -> None:
    sharing = Sharing(0.05)
    sharing.worked(0.0, 0.0)
    sharing.rested(0.0, 0.0)

    assert sharing.slowdown is None and sharing.duty == pytest.approx(0.1)


@pytest.mark.parametrize("most", [0.0, 1.0, -0.1])
def test_a_loss_out_of_range_is_refused(most: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        Sharing(most)
