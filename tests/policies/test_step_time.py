"""Step times are predicted for every arm, measured or not, and follow live steps with tails."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest

from policies.interface import CostSample
from policies.scatter import Scatter
from policies.step_time import StepTimes
from tests.policies.simulated import DRAFTERS, Noise


def truth(drafter, k, batch):
    draft = {"none": 0.0, "eagle3": 0.001 * k, "suffix": 0.0}[drafter]
    return 0.010 + 0.0001 * batch * (1 + k) + draft, draft


def calibrated(batches=(1, 8, 64), ks=(2, 4, 8)):
    arms = [("none", 0)] + [("eagle3", k) for k in ks]
    model = StepTimes(8, DRAFTERS)
    model.calibrate([CostSample(d, k, b, *truth(d, k, b)) for d, k in arms for b in batches])
    return model


def step_s(model, drafter, k, batch):
    return model.arm_times(drafter, batch)[k - 1] if k else model.plain_s(batch)


def observe(model, arms, batch, noise, *, steps, seed=0, factor=1.0, truth=truth):
    """Steps of ``arms`` in turn."""
    rng = random.Random(seed)
    for i in range(steps):
        drafter, k = arms[i % len(arms)]
        seconds = factor * truth(drafter, k, batch)[0]
        model.observe(drafter, k, batch, noise.draw(seconds, rng))


CALM = Noise(0.02, 0.0, 0.0)
DRAFTED = ("eagle3", 4)


@pytest.mark.parametrize("batch", [1, 3, 8, 30, 64, 100])
@pytest.mark.parametrize(("drafter", "k"), [("none", 0), ("eagle3", 1), ("eagle3", 5)])
def test_arms_that_were_not_measured_are_interpolated(drafter, k, batch):
    # Any draft is assumed to take a fiftieth of a step beside its tokens.
    assert step_s(calibrated(), drafter, k, batch) == pytest.approx(
        truth(drafter, k, batch)[0], rel=0.025
    )


def test_a_longer_draft_never_costs_less():
    model = StepTimes(8, DRAFTERS)
    model.calibrate(
        [
            CostSample("eagle3" if k else "none", k, 1, seconds, 0.0)
            for k, seconds in [(0, 0.010), (2, 0.020), (4, 0.015), (6, 0.016)]
        ]
    )
    times = model.arm_times("eagle3", 1)
    assert times == sorted(times)


def test_live_steps_replace_the_profile():
    model = calibrated()
    for _ in range(200):
        model.observe("eagle3", 4, 8, 0.030)
        model.observe("none", 0, 8, 0.0108)
    assert step_s(model, "eagle3", 4, 8) == pytest.approx(0.030, rel=0.05)
    assert model.plain_s(8) == pytest.approx(0.0108, rel=0.05)


def test_a_slowdown_of_one_arm_raises_the_others_at_once():
    model = calibrated()
    before = model.plain_s(8)
    observe(model, [("none", 0), ("eagle3", 4)], 8, CALM, steps=100)
    observe(model, [("eagle3", 4)], 8, CALM, steps=60, factor=2.0)
    assert step_s(model, "eagle3", 4, 8) == pytest.approx(2 * truth("eagle3", 4, 8)[0], rel=0.1)
    assert model.plain_s(8) > 1.6 * before


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(Noise(0.1, 0.02, 0.045), id="2 % up to 4.5 steps late"),
        pytest.param(Noise(0.1, 0.05, 0.070), id="5 % up to 7 steps late"),
        pytest.param(Noise(0.3, 0.05, 0.070), id="and all scattered by 30 %"),
    ],
)
def test_means_of_steps_with_heavy_tails_are_learned(noise):
    """Of plain means of 300 steps alone, each ratio would have a standard error of 5 % and more."""
    late_s = noise.mean_late_s
    plain_s, drafted_s = (truth(drafter, k, 1)[0] + late_s for drafter, k in (("none", 0), DRAFTED))
    ratios, plain = [], []
    for seed in range(6):
        model = calibrated()
        observe(model, [("none", 0), *[DRAFTED] * 3], 1, noise, steps=1200, seed=seed)
        ratios.append(step_s(model, *DRAFTED, 1) / model.plain_s(1))
        plain.append(model.plain_s(1))
    assert fmean(ratios) == pytest.approx(drafted_s / plain_s, rel=0.02)
    assert max(ratios) < 1.08 * drafted_s / plain_s
    assert min(ratios) > 0.92 * drafted_s / plain_s
    assert fmean(plain) == pytest.approx(plain_s, rel=0.05)


def test_lateness_of_one_drafters_steps_alone_is_charged_to_it():
    model, rng = calibrated(), random.Random(0)
    for i in range(4000):
        drafter, k = ("eagle3", 4) if i % 2 else ("none", 0)
        late_s = 0.03 * rng.random() if k and rng.random() < 0.2 else 0.0
        model.observe(drafter, k, 1, truth(drafter, k, 1)[0] * rng.gauss(1, 0.03) + late_s)
    expected = (truth("eagle3", 4, 1)[0] + 0.003) / truth("none", 0, 1)[0]
    assert step_s(model, "eagle3", 4, 1) / model.plain_s(1) == pytest.approx(expected, rel=0.05)


def test_a_late_step_hardly_moves_anything_and_a_lasting_change_does():
    model = calibrated()
    observe(model, [("none", 0)], 8, CALM, steps=200)
    before = model.plain_s(8)
    model.observe("none", 0, 8, 20 * before)
    assert model.plain_s(8) < 1.15 * before
    observe(model, [("none", 0)], 8, CALM, steps=300, factor=20.0)
    assert model.plain_s(8) == pytest.approx(20 * before, rel=0.15)


@pytest.mark.parametrize("error", [0.5, 2.0])
def test_a_few_plain_steps_between_others_tell_what_drafting_costs(error):
    model = calibrated()

    def wrong(drafter, k, batch):
        plain_s = truth("none", 0, batch)[0]
        return plain_s + error * (truth(drafter, k, batch)[0] - plain_s), 0.0

    arms = [*[("eagle3", 4)] * 12, *[("none", 0)] * 4]
    observe(model, arms, 1, Noise(0.1, 0.0, 0.0), steps=320, truth=wrong)
    for k in (3, 4, 5):
        ratio = step_s(model, "eagle3", k, 1) / model.plain_s(1)
        assert ratio == pytest.approx(wrong("eagle3", k, 1)[0] / wrong("none", 0, 1)[0], rel=0.04)


def test_doubt_falls_with_evidence_and_grows_without():
    model = calibrated()
    at_first = model.doubt("eagle3", 4, 1)
    observe(model, [("none", 0), ("eagle3", 4)], 1, CALM, steps=100)
    known = model.doubt("eagle3", 4, 1)
    observe(model, [("none", 0)], 1, CALM, steps=5000)
    assert at_first > 4 * known
    assert known < model.doubt("eagle3", 4, 1) < at_first


def test_without_a_profile_a_drafted_token_costs_its_prior():
    model = StepTimes(8, DRAFTERS)
    gap_s = step_s(model, "eagle3", 4, 1) - step_s(model, "suffix", 4, 1)
    assert gap_s == pytest.approx(4 * (0.08 - 0.005) * model.plain_s(1))


def test_without_a_profile_nothing_is_known_before_a_step():
    model = StepTimes(8, DRAFTERS)
    assert not model.is_known
    model.observe("none", 0, 4, 0.002)
    assert model.is_known
    assert model.plain_s(4) == pytest.approx(0.002, rel=0.05)


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_noise_does_not_move_arms_that_are_not_tried(sigma):
    numbers = random.Random(0)
    model = calibrated()
    before = model.plain_s(64)
    for _ in range(5000):
        batch, k = numbers.choice((1, 2, 3)), numbers.choice((0, 2, 4, 4, 4, 8))
        noise = numbers.lognormvariate(-sigma * sigma / 2, sigma)
        drafter = "eagle3" if k else "none"
        model.observe(drafter, k, batch, noise * truth(drafter, k, batch)[0])
    assert before / 1.5 < model.plain_s(64) < 1.5 * before


@pytest.mark.parametrize("calm", [0.003, 0.01, 0.02])
@pytest.mark.parametrize("later", [0.05, 0.1, 0.2])
def test_calm_steps_that_begin_to_scatter_do_not_mislead(calm, later):
    """A device's own clock times steps within a hundredth, until another process shares it."""
    model = calibrated()
    arms = [("none", 0), *[DRAFTED] * 11]
    observe(model, arms, 8, Noise(calm, 0.0, 0.0), steps=600)
    for part in range(30):
        observe(model, arms, 8, Noise(later, 0.0, 0.0), steps=100, seed=part)
        if part:  # the first hundred steps show how much they scatter now
            for arm in (("none", 0), DRAFTED, ("eagle3", 1)):
                mean_s = truth(*arm, 8)[0] * math.exp(later**2 / 2)
                assert step_s(model, *arm, 8) == pytest.approx(mean_s, rel=0.05 + later)


def test_a_drafters_cost_is_not_carried_beyond_belief():
    """Plain steps happen to be timed while a trainer holds the GPU, and one draft token while it
    does not. That carried the drafter's factor to nothing, where every K seemed to take as long as
    one, and where hundreds of steps of all K did not bring it back."""
    model = calibrated()
    for _ in range(6):
        observe(model, [("none", 0)], 8, CALM, steps=30, factor=3.0)
        observe(model, [("eagle3", 1)], 8, CALM, steps=100, factor=0.85)
    truly = [truth("eagle3", k, 8)[0] for k in (1, 8)]
    times = model.arm_times("eagle3", 8)
    assert times[7] - times[0] > 0.1 * (truly[1] - truly[0])
    observe(model, [("none", 0), ("eagle3", 8), ("eagle3", 1)], 8, CALM, steps=150)
    times = model.arm_times("eagle3", 8)
    assert times[7] - times[0] == pytest.approx(truly[1] - truly[0], rel=0.15)


def test_one_late_step_among_few_is_not_what_they_all_are():
    """Plain steps are few while drafting pays, and all that is known of lateness may be one step
    among them, a thousand steps ago. It had made plain decoding seem twice as slow for 800 steps
    after a good drafter had become useless."""
    scatter = Scatter(("eagle3",))
    for at in range(24):
        scatter.observe("none", 0.02 if at == 12 else 0.0007, 0.0007)
    for _ in range(1500):
        scatter.observe("eagle3", 0.0009, 0.0009)

    assert scatter.late_s("none", 0.0007) < 0.1 * 0.0007


def test_steps_of_a_drafter_that_are_always_later_count_as_such():
    scatter = Scatter(("eagle3",))
    for at in range(4000):
        scatter.observe("none", 0.001, 0.001)
        scatter.observe("eagle3", 0.003 if at % 10 == 0 else 0.001, 0.001)

    assert scatter.late_s("eagle3", 0.001) > scatter.late_s("none", 0.001) + 0.00008


def test_a_drafter_tried_in_late_and_early_steps_in_turn_does_not_seem_faster():
    """Where the host is late now and then, its own lateness takes long to prove, and until then
    only what its steps save counted: it seemed 12 % faster than plain decoding, and was used."""
    times, scatter = random.Random(5), Scatter(("eagle3",))
    for number in range(12_000):
        late = 6 if times.random() < 0.01 else 1
        scatter.observe("none", late * times.lognormvariate(0, 0.02) * 1e-3, 1e-3)
        if number % 100 == 99:
            for factor in (1.6, 0.4) * 3:
                scatter.observe("eagle3", factor * 1e-3, 1e-3)

    def mean_s(kind):
        return scatter.ratio(kind) * 1e-3 + scatter.late_s(kind, 1e-3)

    assert mean_s("eagle3") > 0.94 * mean_s("none")
