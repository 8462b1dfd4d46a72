"""Stretches of a drafter beside plain decoding: when they end, and what they leave behind."""

from __future__ import annotations

import numpy as np
import pytest

from policies.choice import Choice, Chooser
from policies.forecast import PLAIN_ARM, Forecast, Outline
from policies.ledger import Ledger, Purpose
from policies.probes import Explorer

PLAIN_S = 0.001


ROWS = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])


def outline(speed):
    """Of one drafter with K = 1 that is so many times as fast as plain decoding."""
    return Outline(
        batch=1, max_k=1, plain_s=PLAIN_S, seconds={"eagle3": [PLAIN_S, 2 * PLAIN_S]},
        usual_tokens={"eagle3": [1.0, 2 * speed]}, expected={},
    )  # fmt: skip


def forecast(seen):
    """Of a step that is as usual."""
    return Forecast(1, True, 1, PLAIN_S, seen.seconds, seen.usual_tokens, ROWS)


def chosen(chooser, speed, fresh, catch_up_s=4 * PLAIN_S):
    usual = outline(speed)
    seen, footing = forecast(usual), chooser.footing(usual, fresh, {"eagle3": catch_up_s})
    choice = chooser.weigh(seen, footing, looked=False)
    chooser.take(choice, seen, fresh)
    return choice


@pytest.fixture
def on_trial():
    """An explorer whose drafter has just begun a trial beside plain decoding, and the choice."""
    ledger = Ledger(0.005)
    ledger.save(PLAIN_S, PLAIN_S, is_drafted=False)
    explorer = Explorer(0.05, 0, frozenset({"eagle3"}), ledger)
    chooser = Chooser(1.01, {"eagle3": frozenset({"eagle3"})})
    choice = chosen(chooser, 0.9, "none")
    explorer.goes_on(choice, 1)
    stretch = explorer.trial(("eagle3", 1), choice)
    explorer.take(stretch)
    return explorer, choice, ledger


def note(explorer, num_steps, *, catches_up=False, **lateness):
    explorer.note_gain(
        "eagle3", num_steps, PLAIN_S, on_trial=True, catches_up=catches_up, **lateness
    )


def test_one_late_step_is_chance_and_two_in_a_row_are_what_the_arm_costs(on_trial):
    explorer, _, ledger = on_trial
    ledger.charge(Purpose.ARM, PLAIN_S)
    before = ledger.balance(Purpose.ARM)
    note(explorer, -9.0, on_time=0.2, is_late=True)
    assert ledger.balance(Purpose.ARM) > before
    note(explorer, 0.2, on_time=0.2)
    note(explorer, -9.0, on_time=0.2, is_late=True)
    assert explorer.goes_on_unplanned(1)
    for _ in range(2):
        note(explorer, -9.0, on_time=0.2, is_late=True)
    assert not explorer.goes_on_unplanned(1)
    assert ledger.balance(Purpose.ARM) < before


def test_coming_back_is_paid_for_and_does_not_end_the_trial(on_trial):
    explorer, choice, ledger = on_trial
    note(explorer, -9.0, catches_up=True)
    assert ledger.balance(1) < 0
    assert explorer.goes_on_unplanned(1)
    left = explorer.goes_on(choice, 1)
    assert left is not None
    assert left.arm == ("eagle3", 1)


def test_steps_that_lose_end_it(on_trial):
    explorer, choice, _ = on_trial
    note(explorer, -9.0, catches_up=True)
    note(explorer, -1.9)
    assert explorer.goes_on_unplanned(1)
    note(explorer, -1.9)
    assert not explorer.goes_on_unplanned(1)
    assert explorer.goes_on(choice, 1) is None


def test_what_gained_after_coming_back_goes_on_at_no_charge(on_trial):
    explorer, _, _ = on_trial
    note(explorer, -9.0, catches_up=True)
    assert explorer.more == "none"
    note(explorer, 0.6)
    note(explorer, 0.6)
    assert explorer.more == "eagle3"


def drawn(catch_up_s=0.5 * PLAIN_S):
    """An explorer that has drawn a trial beside plain decoding, whose steps lose 0.2 plain steps
    each, and the choice."""
    ledger = Ledger(0.005)
    ledger.save(PLAIN_S, PLAIN_S, is_drafted=False)
    explorer = Explorer(0.5, 0, frozenset({"eagle3"}), ledger, tries_beside=True)
    chooser = Chooser(1.01, {"eagle3": frozenset({"eagle3"})})
    choice = chosen(chooser, 0.9, "none", catch_up_s)
    explorer.goes_on(choice, 1)
    stretch = None
    while stretch is None:
        stretch, _ = explorer.draw(explorer.options(forecast(outline(0.9)), choice), choice, 9)
    assert stretch.arm == ("eagle3", 1)
    explorer.take(stretch)
    return explorer, choice


def test_a_trial_that_keeps_nothing_is_over_once_it_has_lost_what_coming_back_took():
    explorer, choice = drawn()
    note(explorer, -2.4, catches_up=True, kept=0.0)
    assert explorer.goes_on_unplanned(1)
    note(explorer, -0.2, kept=0.1)
    assert not explorer.goes_on_unplanned(1)
    assert explorer.goes_on(choice, 1) is None


def test_a_trial_that_keeps_something_goes_on():
    """Otherwise a drafter whose time is believed far too long would never be timed."""
    explorer, choice = drawn()
    note(explorer, -1.5, catches_up=True, kept=0.0)
    note(explorer, -0.2, kept=1.0)
    assert explorer.goes_on_unplanned(1)
    assert explorer.goes_on(choice, 1) is not None


def test_a_trial_that_saves_time_is_planned_anew():
    """Its K is that of a belief which its rounds have refuted."""
    explorer, choice = drawn()
    note(explorer, -1.5, catches_up=True, kept=1.0)
    note(explorer, 1.5, kept=3.0)
    assert explorer.more == "eagle3"
    assert not explorer.goes_on_unplanned(1)
    assert explorer.goes_on(choice, 1) is None


def test_other_weights_are_tried_in_one_piece(on_trial):
    explorer, choice, _ = on_trial
    note(explorer, -1.5, catches_up=True, kept=0.0)
    for _ in range(5):
        note(explorer, 0.3, kept=0.0)
    assert explorer.goes_on_unplanned(1)
    assert explorer.goes_on(choice, 1) is not None


@pytest.mark.parametrize("times", [1, 2])
def test_beside_plain_decoding_trials_are_the_likelier_the_more_of_them_are_saved_for(times):
    ledger = Ledger(0.005)
    ledger.is_open = True
    explorer = Explorer(0.05, 0, frozenset({"eagle3"}), ledger, tries_beside=True)
    choice = chosen(Chooser(1.01, {"eagle3": frozenset({"eagle3"})}), 0.9, "none")
    options = explorer.options(forecast(outline(0.9)), choice)
    ((option, loss_s),) = options
    ledger.credit(Purpose.ARM, times * loss_s, most=1.0)
    _, nothing = explorer.draw(options, choice, 1)
    assert 1 - nothing == pytest.approx(times * 0.05 / option.usual_steps)


def test_stretches_beside_plain_decoding_do_not_make_a_drafter_look_interrupted():
    """A plan comes right after each of them, so plain decoding seemed broken off at every step,
    and a drafter was expected to catch up as often if it were the base."""
    chooser = Chooser(1.01, {"eagle3": frozenset({"eagle3"})})
    for _ in range(200):
        choice: Choice = chosen(chooser, 0.9, "eagle3")
        assert choice.base == "none"
    assert chosen(chooser, 1.2, "none").base == "eagle3"


def test_interruptions_of_a_base_are_remembered_for_a_while():
    chooser = Chooser(1.01, {"eagle3": frozenset({"eagle3"})})
    for _ in range(100):
        chosen(chooser, 3.0, "suffix")  # each step comes after one of an index
    assert chooser.base == "eagle3"
    chooser.base = "none"
    assert chosen(chooser, 1.2, "none").base == "none"
    for _ in range(300):
        chosen(chooser, 0.9, "none")
    assert chosen(chooser, 1.2, "none").base == "eagle3"


def test_plain_decoding_is_tried_where_an_index_drafts_in_every_step():
    """Its time is not known by that of drafts: a machine that is shared slows them differently."""
    ledger = Ledger(0.005)
    explorer = Explorer(0.05, 0, frozenset({"eagle3"}), ledger)
    usual = outline(0.5)._replace(
        seconds={"suffix": [PLAIN_S, PLAIN_S]}, usual_tokens={"suffix": [1.0, 1.5]}
    )
    seen, chooser = forecast(usual), Chooser(1.01, {}, {"suffix"})
    choice = chooser.weigh(seen, chooser.footing(usual, "suffix", {}))
    assert choice.base == "none"
    assert choice.arm == ("suffix", 1)
    assert PLAIN_ARM in {option.arm for option, _ in explorer.options(seen, choice)}
