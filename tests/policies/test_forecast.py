"""Expected tokens of a batch are the sum over its requests, each held to its cap."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from policies.acceptance import AcceptanceModel
from policies.forecast import Forecaster, by_kind
from policies.interface import StepObs
from policies.step_time import StepTimes
from tests.policies.simulated import DRAFTERS, World

MATCHES = (0, 0, 1, 4, 5, 2, 0, 5, 3)
CAPS = (8, 3, 8, 0, 8, 1, 9, 5, 8)


@pytest.fixture
def forecaster():
    acceptance = AcceptanceModel(200, DRAFTERS, 8)
    acceptance.tick(9)
    acceptance.observe("eagle3", {None: Counter({(4, 2): 40, (4, 0): 5}), 3: {(4, 4): 9}}, 9)
    acceptance.observe("suffix", {4: Counter({(8, 8): 9, (8, 1): 5})}, 9)
    times = StepTimes(8, DRAFTERS)
    times.calibrate(World().profile())
    return Forecaster(acceptance, times, {"suffix"}, 8), acceptance


def obs(matches, caps):
    return StepObs(
        0,
        len(caps),
        bytes(caps),
        None if matches is None else bytes(matches),
        tuple(DRAFTERS),
        8,
        0,
    )


def forecast(made, see, max_k):
    return made.forecast(see, made.outline(see, max_k))


def test_rows_are_counted_by_kind_of_match():
    kinds = np.array(MATCHES, np.uint8)
    assert by_kind(kinds, 6).tolist() == [3, 1, 1, 1, 1, 2]
    assert by_kind(kinds[:4], 25).tolist() == [2, 1, 0, 0, 1, *[0] * 20]


@pytest.mark.parametrize("max_k", [1, 5, 8])
@pytest.mark.parametrize("caps", [CAPS, (8,) * 9])
def test_every_request_is_held_to_its_cap(forecaster, max_k, caps):
    made, acceptance = forecaster
    seen = forecast(made, obs(MATCHES, caps), max_k)
    for drafter in DRAFTERS:
        table = acceptance.expected_tokens(drafter)
        for k in range(max_k + 1):
            by_row = [table[match, min(k, cap)] for match, cap in zip(MATCHES, caps, strict=True)]
            assert seen.tokens[drafter][k] == pytest.approx(sum(by_row))


def test_where_nobody_looked_short_requests_have_no_match_and_others_what_they_usually_have(
    forecaster,
):
    made, acceptance = forecaster
    made.note_mix(forecast(made, obs(MATCHES, (8,) * 9), 8))
    usual = [share / 9 for share in forecast(made, obs(None, (8,) * 9), 8).rows]
    seen, table = forecast(made, obs(None, CAPS), 8), acceptance.expected_tokens("eagle3")
    for k in range(9):
        short = sum(table[0, min(k, cap)] for cap in CAPS if cap < 8)
        whole = sum(share * table[bucket, k] for bucket, share in enumerate(usual))
        num_whole = sum(cap >= 8 for cap in CAPS)
        assert seen.tokens["eagle3"][k] == pytest.approx(short + num_whole * whole)
