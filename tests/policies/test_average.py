"""What a host usually takes is not what its first step took, or a late one."""

from __future__ import annotations

import pytest

from policies.average import Typical


def typical(*values: float) -> float:
    found = Typical(0.05)
    for value in values:
        found.add(value)
    assert found.num == len(values)
    return found.mean


def test_a_first_value_of_another_size_is_outvoted_by_the_second_one():
    assert typical() == 0
    assert typical(20.0) == 20
    assert typical(20.0, 0.1) == 0.1
    assert typical(20.0, 0.1, 0.2, 0.2) == 0.2
    assert typical(20.0, *[0.1] * 40) == pytest.approx(0.1, abs=0.02)


def test_what_takes_longer_from_now_on_is_followed():
    assert typical(*[0.1] * 20, *[1.0] * 150) == pytest.approx(1.0, rel=0.1)
    assert typical(*[0.0] * 20, *[1.0] * 150) == pytest.approx(1.0, rel=0.1)
