"""Steps of versions that draft alike tell of each other; those of others do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.alike import first_alike
from tests.policies.logs import DRAFTER, HAZARDS, MAX_DRAFT, always, any_k, log


def versions(hazards, num=1000, choose=any_k):
    """A log of versions 0, 1, ... with so many steps and these hazards each."""
    steps = []
    for version, own in enumerate(hazards):
        drawn = log(num, choose, (1,), lambda at, own=own: own, seed=version)
        steps += [replace(one, version=version) for one in drawn]
    return steps


BETTER = tuple(min(h + 0.15, 1.0) for h in HAZARDS)


def test_versions_with_equal_acceptance_are_alike():
    outcomes = [
        first_alike([replace(one, version=at // 500) for at, one in enumerate(steps)], DRAFTER)
        for steps in (log(2000, always(4), (1,), seed=seed) for seed in range(40))
    ]
    assert sum(oldest == 0 for _, oldest in outcomes) >= 39


@pytest.mark.parametrize("former", [BETTER, (0.5,) * MAX_DRAFT])
def test_a_version_that_kept_more_or_less_is_not(former):
    start, oldest = first_alike(versions([former, HAZARDS, HAZARDS]), DRAFTER)
    assert oldest == 1
    assert 1000 <= start < 1010


def test_what_lies_before_an_unlike_version_is_left_out_whatever_it_kept():
    start, oldest = first_alike(versions([HAZARDS, BETTER, HAZARDS]), DRAFTER)
    assert oldest == 2 and 2000 <= start < 2010


def test_a_difference_that_does_not_matter_is_passed_over():
    """However certain it is."""
    nearly = tuple(h + 0.004 for h in HAZARDS)
    _, oldest = first_alike(versions([nearly, HAZARDS], 30_000, always(4)), DRAFTER)
    assert oldest == 0


def test_a_few_rounds_of_a_new_version_say_nothing_against_former_ones():
    steps = versions([BETTER])
    steps += [replace(one, version=1) for one in log(20, always(4), (1,))]
    assert first_alike(steps, DRAFTER)[1] == 0


def test_a_late_step_of_an_unlike_version_ends_what_it_could_spoil():
    steps = versions([BETTER, HAZARDS])
    late = replace(log(1, always(4), (1,))[0], version=0)
    start, oldest = first_alike([*steps[:1500], late, *steps[1500:]], DRAFTER)
    assert (start, oldest) == (1501, 1)


def test_a_drafter_that_drafted_nothing_has_no_versions():
    with pytest.raises(ValueError, match="no step was drafted by 'another'"):
        first_alike(log(10, any_k, (1,)), "another")
