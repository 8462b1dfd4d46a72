"""A candidate is judged when it might pass, at the latest after some updates, and not too often."""

from __future__ import annotations

import time

from configs.schema import TrainerSettings
from trainer.figures import UpdateReport
from trainer.pace import Pace


def pace(**values: object) -> Pace:
    return Pace(TrainerSettings.model_validate({"publish_every_steps": 20, **values}))


def after(one: Pace, alphas: list[float]) -> Pace:
    """The pace after updates with these overlaps at both positions."""
    for alpha in alphas:
        one.steps_since_judged += 1
        one.saw(UpdateReport(1, 1.0, [alpha, alpha], [0.0, 0.0], 100, 1.0, 1e-3, skipped=False))
    return one


def test_a_candidate_is_due_as_soon_as_overlaps_have_risen() -> None:
    assert not after(pace(), [0.3] * 6).is_due()
    assert after(pace(), [0.3, 0.3, 0.35, 0.4]).is_due()


def test_a_candidate_is_due_after_enough_updates_whatever_the_overlaps() -> None:
    assert not after(pace(), [0.3] * 19).is_due()
    assert after(pace(), [0.3] * 20).is_due()


def test_after_candidates_that_failed_more_updates_are_waited_for() -> None:
    one = pace()
    waits = []
    for refused in range(4):
        one.refused_in_row = refused
        one.begin_judging()
        one.judged(None, None, 0.1)
        while not one.is_due():
            after(one, [0.3])
        waits.append(one.steps_since_judged)

    assert waits == [20, 40, 80, 80]


def test_the_next_candidate_is_waited_for_until_it_has_what_the_last_one_lacked() -> None:
    one = after(pace(), [0.3, 0.4, 0.4])
    one.begin_judging()
    one.judged(0.004, 0.2, 0.0)

    assert not after(one, [0.45] * 3).is_due()  # 6 % more
    assert after(one, [0.7] * 4).is_due()


def test_judging_takes_no_more_than_its_share_of_the_time() -> None:
    one = after(pace(gate_share=0.1), [0.3])
    one.begin_judging()
    one.judged(None, None, 5.0)
    after(one, [0.9] * 5)
    assert not one.is_due()

    one.judged_s = time.monotonic() - 49
    assert not one.is_due()
    one.judged_s = time.monotonic() - 51
    assert one.is_due()


def test_with_no_share_only_the_number_of_updates_counts() -> None:
    assert not after(pace(gate_share=0.0), [0.1] * 3 + [0.9] * 10).is_due()


def test_a_skipped_update_is_no_evidence() -> None:
    one = after(pace(), [0.3])
    bad = UpdateReport(2, float("nan"), [float("nan")] * 2, [0.0] * 2, 100, 1.0, 1e-3, skipped=True)
    one.saw(bad)

    assert one.estimate == after(pace(), [0.3]).estimate
