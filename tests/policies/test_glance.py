"""A look at the matches of a step picks the index where it is better, without a plan."""

from __future__ import annotations

import numpy as np
import pytest

from policies.acceptance import AcceptanceModel
from policies.forecast import Outline
from policies.glance import Glance
from policies.hope import Hopes
from policies.look_time import LookTime
from tests.policies.simulated import DRAFTERS

EXPECTED = np.array([[1.0, 1.0, 1.0], [1.0, 1.8, 2.4]])
"""[B, K + 1] tokens of the index without a match and with one."""


def glance(*, index_s=0.0011, base=("none", 0), drafter_tokens=1.6, batch=1, **charges):
    """Plain steps take 1 ms, and those of a drafter 1.2."""
    drafter = np.full((2, 3), drafter_tokens)
    outline = Outline(
        batch, 2, 0.001,
        {"suffix": [0.0, index_s, index_s], "eagle3": [0.0, 0.0012, 0.0012]}, {},
        {"suffix": EXPECTED, "eagle3": drafter},
    )  # fmt: skip
    speed = batch / 0.001 if base[0] == "none" else batch * drafter_tokens / 0.0012
    return Glance(lambda: outline, batch, speed, base, ("suffix",), **charges)


def test_it_drafts_at_the_length_that_gains_the_most():
    arm, gain, is_better = glance().best(b"\x01", is_interrupted=False)
    assert (arm, is_better) == (("suffix", 2), True)
    assert gain == pytest.approx(2.4 - 1.1)
    arm, gain, _ = glance(batch=4).best(b"\x01\x00\x00\x00", is_interrupted=False)
    assert arm == ("suffix", 2)
    assert gain == pytest.approx((1.4 - 4 * 0.1) / 4)


def test_without_a_match_there_is_nothing_to_draft_however_short_its_steps_seem():
    """Few late steps had made them seem shorter than plain ones."""
    one = glance(index_s=0.0009)
    assert one.best(b"\x00", is_interrupted=False) == (None, 0.0, False)
    _, gain, _ = one.best(b"\x01", is_interrupted=False)
    assert gain == pytest.approx(1.4), "and as long as plain ones where there is one"
    poor = glance(base=("eagle3", 1), drafter_tokens=1.01)
    assert poor.best(b"\x00", is_interrupted=False) == (None, 0.0, False)


def test_leaving_a_drafter_is_charged_and_going_on_without_it_is_credited():
    base = ("eagle3", 1)
    free = glance(base=base).best(b"\x01", is_interrupted=False)
    assert free[0] == ("suffix", 2)
    dear = glance(base=base, leave_s=0.002, back_s=0.0003)
    assert dear.best(b"\x01", is_interrupted=False) == (None, 0.0, True)
    arm, gain, _ = dear.best(b"\x01", is_interrupted=True)
    assert arm == ("suffix", 2)
    assert gain == pytest.approx(free[1] + 0.3)


def test_a_batch_of_another_size_is_planned_for():
    assert glance(batch=32).is_for(33)
    assert not glance(batch=32).is_for(31)


def test_a_draft_that_may_be_worth_it_is_offered_and_one_that_is_not_is_not():
    hoped = np.array([[1.0, 1.0, 1.0], [1.0, 1.9, 2.7]])
    one = glance(index_s=0.0026, hopeful=lambda _kind: hoped)
    assert one.best(b"\x01", is_interrupted=False)[0] is None
    arm, loss_s, tokens, seconds = one.untried(b"\x01", is_interrupted=False)
    assert (arm, tokens, seconds) == (("suffix", 2), 2.4, 0.0026)
    assert loss_s == pytest.approx(0.0002)
    assert one.untried(b"\x00", is_interrupted=False) is None
    poor = glance(index_s=0.0028, hopeful=lambda _kind: hoped)
    poor.best(b"\x01", is_interrupted=False)
    assert poor.untried(b"\x01", is_interrupted=False) is None


def test_hope_is_wide_after_few_rounds_and_widens_with_time():
    model = AcceptanceModel(200, DRAFTERS, 8)
    model.tick(1, 50)
    model.observe("suffix", {4: {(8, 0): 4}}, 1)
    few = model.hopeful_tokens("suffix")[4, 8]
    model.tick(1, 50)
    model.observe("suffix", {4: {(8, 0): 40}}, 1)
    many, expected = model.hopeful_tokens("suffix"), model.expected_tokens("suffix")
    assert few > 1.3 * many[4, 8]
    assert (many >= expected).all()
    assert (many[0] == 1).all()
    model.tick(1, 4000)
    assert model.hopeful_tokens("suffix")[4, 8] > 2 * many[4, 8]


def test_hopes_are_computed_again_once_more_is_known():
    hopes, asked = Hopes(200), []

    def recent():
        asked.append(1)
        return np.full((2, 2), 0.5), np.full((2, 2), 10.0)

    first = hopes.tokens("suffix", EXPECTED, recent, 0.0)
    assert hopes.tokens("suffix", EXPECTED, recent, 0.0) is first
    hopes.tokens("suffix", EXPECTED.copy(), recent, 0.0)
    assert len(asked) == 2


def test_one_late_look_of_few_does_not_stand_for_all():
    known = LookTime()
    for step in range(80):
        looks = step % 20 == 19
        late_s = 0.003 if step == 19 else 0.001
        known.note(late_s, 0.001, looked=looks, always=False)
    assert known.hidden < 0.05
