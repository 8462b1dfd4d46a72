"""A version is rolled back when it is worse on the same traffic, and hardly ever otherwise."""

from __future__ import annotations

import random
from statistics import median

import pytest

from policies.rollback import Action, SwapWatch

FLIPS = {Action.TRY_FORMER: 0, Action.RETURN_TO_NEW: 1}


def swap(seed, old, new, *, shift_at=None, shift=1.0, watch_rounds=200, batch=1):
    """Serve requests of unequal difficulty, swap after 400 rounds and obey the watch.

    ``old`` and ``new`` are the chances that a draft token is accepted; after ``shift_at`` rounds of
    the new version both are multiplied by ``shift``. Returns (is the version kept, rounds taken).
    """
    rng = random.Random(seed)
    watch, version = SwapWatch(watch_rounds, 0.15), 0
    left, difficulty = [0] * batch, [0.0] * batch
    for rounds in range(-400, 12_000, batch):
        if rounds in range(batch):
            version = 1
        accepted = 0
        for row in range(batch):
            if left[row] == 0:
                left[row], difficulty[row] = rng.randint(1, 80), rng.gauss(0, 0.1)
            left[row] -= 1
            chance = (new if version else old) + difficulty[row]
            if shift_at is not None and rounds >= shift_at:
                chance *= shift
            accepted += kept(rng, min(max(chance, 0.02), 0.97))
        action = watch.observe(version, 4 * batch, accepted, batch)
        version = FLIPS.get(action, version)
        if action is Action.ROLL_BACK:
            return False, rounds
        if rounds > 0 and watch.state == "steady":
            return True, rounds
    raise AssertionError("no decision")


def kept(rng, chance):
    """Accepted tokens of one round of 4."""
    for accepted in range(4):
        if rng.random() >= chance:
            return accepted
    return 4


def test_an_equal_version_is_kept():
    """Of a thousand, none or one is rolled back: ``benchmarks.candidates``."""
    outcomes = [swap(seed, 0.7, 0.7, batch=16)[0] for seed in range(100)]
    assert outcomes.count(False) == 0


@pytest.mark.parametrize(
    ("shift_at", "shift"), [(0, 0.5), (60, 0.5), (150, 0.5), (0, 1.3), (180, 1.3), (260, 1.3)]
)
def test_a_shift_of_traffic_does_not_roll_a_version_back(shift_at, shift):
    outcomes = [
        swap(seed, 0.65, 0.65, shift_at=shift_at, shift=shift, batch=4)[0] for seed in range(20)
    ]
    assert outcomes.count(False) == 0


def test_a_better_version_is_kept():
    assert all(swap(seed, 0.5, 0.7)[0] for seed in range(100))


def test_a_broken_version_is_rolled_back_within_500_rounds():
    outcomes = [swap(seed, 0.75, 0.02) for seed in range(50)]
    assert not any(is_kept for is_kept, _ in outcomes)
    assert max(rounds for _, rounds in outcomes) <= 500


def test_half_the_tokens_per_step_is_rolled_back_even_when_traffic_changes():
    for kwargs, most in [({}, 600), ({"shift_at": 0, "shift": 0.8}, 900), ({"batch": 8}, 400)]:
        outcomes = [swap(seed, 0.75, 0.35, **kwargs) for seed in range(60)]
        assert not any(is_kept for is_kept, _ in outcomes)
        assert median(rounds for _, rounds in outcomes) <= most


@pytest.mark.parametrize(
    ("acceptance", "batch"),
    [
        pytest.param(0.5, 1, id="36 % less"),
        pytest.param(0.55, 1, id="30 % less"),
        pytest.param(0.6, 4, id="24 % less"),
        pytest.param(0.6, 16, id="24 % less, many clients"),
    ],
)
def test_a_version_that_is_clearly_worse_than_max_drop_goes(acceptance, batch):
    """Whoever takes one window without doubt for enough keeps a tenth of them."""
    outcomes = [swap(seed, 0.75, acceptance, batch=batch) for seed in range(60)]
    assert not any(is_kept for is_kept, _ in outcomes)


def drive(watch, version, accepted, blocks):
    """Observe equal blocks of four steps of four requests at K = 4; the first action other than
    KEEP_GOING."""
    kept_each = [round(16 * accepted) // 4 + (i < round(16 * accepted) % 4) for i in range(4)]
    actions = [watch.observe(version, 16, kept, 4) for kept in kept_each * blocks]
    return next((action for action in actions if action is not Action.KEEP_GOING), None)


def test_a_bad_version_is_tried_confirmed_and_rolled_back():
    watch = SwapWatch(100, 0.15)
    assert drive(watch, 7, 3, 10) is None
    assert drive(watch, 8, 0, 6) is Action.TRY_FORMER
    assert watch.state == "trial"
    assert drive(watch, 8, 0, 5) is None  # late steps of the version just left
    assert drive(watch, 7, 3, 6) is Action.RETURN_TO_NEW
    assert watch.state == "confirming"
    assert drive(watch, 8, 0, 6) is Action.ROLL_BACK
    assert (watch.state, watch.figures()["last_verdict"]) == ("steady", "rolled back")
    assert drive(watch, 7, 3, 20) is None


def test_a_good_version_whose_traffic_changed_is_kept_after_its_trial():
    watch = SwapWatch(400, 0.15)
    drive(watch, 7, 3, 30)
    assert drive(watch, 8, 1, 6) is Action.TRY_FORMER
    assert drive(watch, 7, 0, 25) is Action.RETURN_TO_NEW
    assert (watch.state, watch.figures()["last_verdict"]) == ("steady", "kept")


def trials_of(former, new, max_drop=0.15):
    """Trials until a watch ends, and its verdict; versions whose blocks are all alike."""
    watch, version, trials = SwapWatch(100, max_drop), 8, 0
    drive(watch, 7, former, 20)
    for _ in range(10_000):
        action = drive(watch, version, new if version == 8 else former, 1)
        trials += action is Action.TRY_FORMER
        version = {Action.TRY_FORMER: 7, Action.RETURN_TO_NEW: 8}.get(action, version)
        if watch.state == "steady":
            return trials, watch.figures()["last_verdict"]
    raise AssertionError("no decision")


def test_trials_go_on_until_a_loss_of_a_tenth_is_certain_or_certain_not_to_be():
    found = [trials_of(3, 3 + gain) for gain in (0, -0.25, -0.625, -0.875)]
    assert [verdict for _, verdict in found] == ["kept", "kept", "rolled back", "rolled back"]
    equal, little, much, more = [trials for trials, _ in found]
    assert 1 < equal < little <= 24
    assert 3 <= more < much <= 24  # three at least, since traffic may have shifted once


def test_after_twenty_four_trials_what_is_likelier_decides():
    """It lost 10.9 %, and 10.5 or 11.2 part good from bad ones."""
    assert trials_of(3, 2.5625, max_drop=0.15) == (24, "rolled back")
    assert trials_of(3, 2.5625, max_drop=0.16) == (24, "kept")


def test_without_figures_of_a_former_version_nothing_is_compared():
    watch = SwapWatch(100, 0.15)
    assert drive(watch, 1, 0, 50) is None
    assert drive(SwapWatch(100, 0.15), 0, 3, 2) is None


def test_rounds_that_proposed_nothing_do_not_count():
    watch = SwapWatch(100, 0.15)
    drive(watch, 0, 3, 10)
    assert {watch.observe(1, 0, 0, 16) for _ in range(100)} == {Action.KEEP_GOING}
    assert watch.state == "steady"


def test_a_newer_version_starts_a_new_watch():
    watch = SwapWatch(200, 0.15)
    drive(watch, 1, 3, 15)
    drive(watch, 2, 3, 8)
    assert watch.state == "watching"
    drive(watch, 3, 3, 2)
    assert watch.figures()["former"] == 2
    assert drive(watch, 3, 4, 11) is Action.ACCEPT  # better beyond doubt


def test_the_same_weights_under_another_number_are_not_watched():
    """Their policy may draft less in a round, and gain by that; ``max_drop`` is about weights."""
    watch = SwapWatch(100, 0.15)
    drive(watch, 0, 3, 12)
    watch.renamed(0, 1)
    assert watch.state == "steady"
    assert drive(watch, 1, 1, 40) is None
    assert watch.figures()["version"] == 1

    drive(watch, 2, 3, 1)
    assert watch.state == "watching", "the next weights are compared with those of before"
    watch.renamed(1, 5)
    assert watch.state == "watching" and watch.figures()["version"] == 2


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="watch_rounds"):
        SwapWatch(0, 0.15)
    with pytest.raises(ValueError, match=r"num_accepted 5 is not in 0\.\.4"):
        SwapWatch(10, 0.15).observe(0, 4, 5, 1)


def steps_until(action, watch, version, batch):
    """Steps of a version until the watch asks for this; version 8 accepts an eighth less."""
    for step in range(2000):
        accepted = (3 if version == 7 or step % 2 else 2) * batch
        if watch.observe(version, 4 * batch, accepted, batch) is action:
            return step + 1
    raise AssertionError(f"never {action}")


@pytest.mark.parametrize("batch", [1, 8, 32, 64])
def test_a_trial_lasts_two_dozen_steps_however_many_requests_there_are(batch):
    """Weights that come back make the server compute all rows of all requests again."""
    watch = SwapWatch(200, 0.15)
    for _ in range(400):
        watch.observe(7, 4 * batch, 3 * batch, batch)
    steps_until(Action.TRY_FORMER, watch, 8, batch)
    assert steps_until(Action.RETURN_TO_NEW, watch, 7, batch) >= 24
    assert steps_until(Action.TRY_FORMER, watch, 8, batch) >= 24
