"""Every second of the trainer's loop is counted once, and an operator sees where they go."""

from __future__ import annotations

import pytest

from trainer.times import PARTS, WINDOW_S, Times


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_part_within_another_counts_as_itself_alone() -> None:
    clock = Clock()
    times = Times(clock)
    clock.now_s += 1
    with times.during("updates"):
        clock.now_s += 3
        with times.during("resting"):
            clock.now_s += 2
        clock.now_s += 1
    clock.now_s += 1

    found = times.figures()

    assert set(found) == set(PARTS)
    assert found["updates"] == pytest.approx(4 / 8)
    assert found["resting"] == pytest.approx(2 / 8)
    assert found["other"] == pytest.approx(2 / 8)
    assert sum(found.values()) == pytest.approx(1)


def test_a_part_that_fails_ends() -> None:
    clock = Clock()
    times = Times(clock)
    with pytest.raises(OSError), times.during("checkpoints"):
        clock.now_s += 1
        raise OSError
    clock.now_s += 1
    assert times.figures()["other"] == pytest.approx(0.5)


def test_shares_are_those_of_the_last_full_window() -> None:
    clock = Clock()
    times = Times(clock)
    with times.during("waiting"):
        clock.now_s += WINDOW_S
    with times.during("updates"):
        clock.now_s += WINDOW_S / 2
        assert times.figures()["waiting"] == 1.0
        clock.now_s += WINDOW_S / 2
    assert times.figures()["updates"] == 1.0


def test_nothing_is_known_before_time_passes() -> None:
    assert set(Times(Clock()).figures().values()) == {0.0}
