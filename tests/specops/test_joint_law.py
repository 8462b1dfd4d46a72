"""The joint law of what is emitted, by chi-squared at p = 1e-9, over sampling parameters and
drafters.

``benchmarks/lossless`` repeats this with 400,000 samples each; planted bugs that these tests
detect are in ``tests/serving/engine/test_mutants.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles.joint_law import (
    REGIMES,
    SETTINGS,
    expected_law,
    law_excess,
    sample,
    tables_of,
)
from specops.rng import Stream, uniforms
from specops.sampling import draw

NUM_SAMPLES = 10_000


@pytest.mark.parametrize("rule", ["block", "standard"])
@pytest.mark.parametrize("regime", REGIMES)
def test_the_joint_law_is_the_targets(regime, rule):
    tables = tables_of(regime)
    for number, setting in enumerate(SETTINGS):
        counts, _ = sample(setting, tables, rule, NUM_SAMPLES, seed=number)
        excess = law_excess(counts, expected_law(setting, tables))
        assert excess < 1, f"{setting.name}: {excess:.2f}"


def test_the_regimes_are_what_their_names_say():
    setting = next(s for s in SETTINGS if s.name == "temperature 1.0 whole K 3")
    rates = {r: sample(setting, tables_of(r), "block", NUM_SAMPLES)[1] for r in REGIMES}

    assert rates["close"] > 0.7
    assert rates["opposed"] < 0.2 < rates["swapped"] < 0.5
    assert rates["index"] < 0.3


TAIL_V = 1 << 17
"""A vocabulary of 131,072."""


def tail_law():
    """One token has nearly all mass. The others form pairs of mass 2^-24, of which the even id has
    three quarters."""
    law = np.tile([0.75, 0.25], TAIL_V // 2) * 2.0**-24
    law[0] += 1 - law.sum()
    return law


def odd_share(numbers, law):
    """Deviation from 1/4 of the share of odd ids among tail samples, in standard errors."""
    ids = np.searchsorted(law.cumsum(), numbers, side="right")
    tail = ids[ids > 1]
    return float(((tail % 2).mean() - 0.25) / (0.25 * 0.75 / len(tail)) ** 0.5)


def many_numbers():
    keys = np.arange(2_000, dtype=np.uint64)
    positions = np.tile(np.arange(1_000), (2_000, 1))
    return uniforms(keys, positions, np.zeros(2_000, dtype=np.int64), Stream.TARGET).ravel()


def test_the_tail_of_a_large_vocabulary_is_drawn_as_it_should():
    """Frequencies are right with serving's random numbers, and every id with serving's ``draw``."""
    law, numbers = tail_law(), many_numbers()
    in_tail = numbers[numbers > 1 - 2.0**-9][:64]

    assert abs(odd_share(numbers, law)) < 6
    got = draw(torch.from_numpy(law).expand(64, -1), torch.from_numpy(in_tail))
    assert got.tolist() == np.searchsorted(law.cumsum(), in_tail, side="right").tolist()


def test_numbers_of_24_bits_are_seen():
    """Mutant M13: numbers as coarse as float32's never reach the second token of a pair."""
    coarse = np.floor(many_numbers() * 2**24) / 2**24

    assert abs(odd_share(coarse, tail_law())) > 6
