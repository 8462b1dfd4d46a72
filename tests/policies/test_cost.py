"""Step times are predicted for every arm, measured or not, and follow live steps."""

from __future__ import annotations

import random

import pytest

from policies.cost import CostModel
from policies.interface import CostSample
from tests.policies.simulated import DRAFTERS


def truth(drafter, k, batch):
    draft = {"none": 0.0, "eagle3": 0.001 * k, "suffix": 0.0}[drafter]
    return 0.010 + 0.0001 * batch * (1 + k) + draft, draft


def calibrated(batches=(1, 8, 64), ks=(2, 4, 8)):
    arms = [("none", 0)] + [(d, k) for d in ("eagle3", "suffix") for k in ks]
    model = CostModel(8, DRAFTERS)
    model.calibrate([CostSample(d, k, b, *truth(d, k, b)) for d, k in arms for b in batches])
    return model


@pytest.mark.parametrize("batch", [1, 3, 8, 30, 64, 100])
@pytest.mark.parametrize(
    ("drafter", "k"), [("none", 0), ("eagle3", 1), ("eagle3", 5), ("suffix", 8)]
)
def test_arms_that_were_not_measured_are_interpolated(drafter, k, batch):
    assert calibrated().step_s(drafter, k, batch) == pytest.approx(truth(drafter, k, batch)[0])


def test_a_longer_draft_never_costs_less():
    model = CostModel(8, DRAFTERS)
    for k, step_s in [(0, 0.010), (2, 0.020), (4, 0.015), (6, 0.016)]:
        model.calibrate([CostSample("suffix" if k else "none", k, 1, step_s, 0.0)])
    times = model.arm_times("suffix", 1)
    assert times == sorted(times)


def test_live_steps_replace_the_profile():
    model = calibrated()
    for _ in range(200):
        model.observe("eagle3", 4, 8, 0.030, 0.004)
        model.observe("none", 0, 8, 0.0108, 0.0)
    assert model.step_s("eagle3", 4, 8) == pytest.approx(0.030, rel=0.05)
    assert model.step_s("none", 0, 8) == pytest.approx(0.0108, rel=0.05)


def test_a_slowdown_of_one_arm_raises_the_others_at_once():
    model = calibrated()
    before = model.step_s("none", 0, 8)
    slow, draft = truth("eagle3", 4, 8)
    for _ in range(60):
        model.observe("eagle3", 4, 8, 2 * slow, 2 * draft)
    assert model.step_s("eagle3", 4, 8) == pytest.approx(2 * slow, rel=0.05)
    assert model.step_s("none", 0, 8) > 1.4 * before


def test_a_hiccup_is_ignored_and_a_lasting_change_is_not():
    model = calibrated()
    before = model.step_s("none", 0, 8)
    model.observe("none", 0, 8, 20 * before, 0.0)
    assert model.step_s("none", 0, 8) == before
    for _ in range(200):
        model.observe("none", 0, 8, 20 * before, 0.0)
    assert model.step_s("none", 0, 8) == pytest.approx(20 * before, rel=0.1)


def test_catching_up_is_not_counted_as_drafting():
    model = calibrated()
    step_s, _ = truth("eagle3", 4, 8)
    model.observe("eagle3", 4, 8, step_s, None)
    assert model.step_s("eagle3", 4, 8) == pytest.approx(step_s)
    assert model.catch_up_s("eagle3", 8 * 9, 8) == 0
    assert model.catch_up_s("eagle3", 8000, 8) > 0


def test_without_a_profile_a_drafted_token_costs_its_prior():
    model = CostModel(8, DRAFTERS)
    plain_s = model.step_s("none", 0, 1)
    gap_s = model.step_s("eagle3", 4, 1) - model.step_s("suffix", 4, 1)
    assert gap_s == pytest.approx(4 * (0.08 - 0.005) * plain_s)


def test_without_a_profile_there_are_still_figures():
    times = CostModel(8, DRAFTERS).arm_times("eagle3", 4)
    assert times == sorted(times)
    assert times[0] > 0
    assert not CostModel(8, DRAFTERS).knows_plain(4)
    assert calibrated().knows_plain(30)


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_noise_does_not_move_arms_that_are_not_tried(sigma):
    """A common factor that followed logarithms would sink to 0 within some thousand noisy steps."""
    numbers = random.Random(0)
    model = calibrated()
    before = model.step_s("none", 0, 64)
    for _ in range(5000):
        batch, k = numbers.choice((1, 2, 3)), numbers.choice((0, 2, 4, 4, 4, 8))
        noise = numbers.lognormvariate(-sigma * sigma / 2, sigma)
        step_s, draft_s = (s * noise for s in truth("eagle3" if k else "none", k, batch))
        model.observe("eagle3" if k else "none", k, batch, step_s, draft_s)

    assert before / 2 < model.step_s("none", 0, 64) < 2 * before
