"""Shaping a distribution and sampling from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.joint_law import chi_squared_excess
from specops.rng import Stream, device_exponentials, uniforms
from specops.sampling import distribution, draw, race, sampling_rows


def rows(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, vocab=8, dtype=torch.float64):
    return sampling_rows([temperature], [top_k], [top_p], [min_p], vocab, dtype=dtype)


def reference(logits, temperature, top_k, top_p, min_p):
    """One row in plain Python, token by token, following the docstring of ``distribution``."""
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0).tolist()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    order = [i for i in order if p[i] >= min_p * p[order[0]]]
    order = order[: top_k or len(p)]
    mass, kept = sum(p[i] for i in order), []
    running = 0.0
    for i in order:
        if running >= top_p and top_p < 1:
            break
        kept.append(i)
        running += p[i] / mass
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-6, 6, allow_subnormal=False), min_size=8, max_size=8, unique=True),
    st.floats(0.2, 3.0),
    st.one_of(st.none(), st.integers(1, 9)),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9, allow_subnormal=False),
)
def test_the_distribution_is_what_the_parameters_say(logits, temperature, top_k, top_p, min_p):
    got = distribution(
        torch.tensor(logits, dtype=torch.float64)[None, None],
        rows(temperature, top_k, top_p, min_p),
    )[0, 0]
    want = torch.tensor(reference(logits, temperature, top_k, top_p, min_p), dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)


def test_temperature_zero_puts_all_mass_on_the_argmax():
    logits = torch.tensor([[[0.1, 2.0, 2.0, -1.0]]])
    got = distribution(logits, sampling_rows([0.0], [None], [1.0], [0.0], 4))
    assert got.tolist() == [[[0.0, 1.0, 0.0, 0.0]]]


def test_rows_of_one_batch_keep_their_own_parameters():
    logits = torch.randn(3, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed = sampling_rows(
        [0.0, 0.7, 1.3], [None, 2, None], [1.0, 1.0, 0.5], [0.0] * 3, 8, dtype=torch.float64
    )
    got = distribution(logits, packed)
    alone = [rows(0.0), rows(0.7, 2), rows(1.3, None, 0.5)]
    for index, row in enumerate(alone):
        torch.testing.assert_close(got[index : index + 1], distribution(logits[index][None], row))


def test_a_row_has_the_same_bits_whatever_the_other_requests_ask_for():
    """Requests that keep all tokens are not sorted, and those that do not are sorted alone."""
    logits = torch.randn(4, 3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    asked = [
        (0.7, None, 1.0, 0.0),
        (0.0, None, 1.0, 0.0),
        (1.3, 5, 0.9, 0.0),
        (0.5, None, 1.0, 0.1),
    ]
    packed = sampling_rows(*zip(*asked, strict=True), 200, dtype=torch.float64)
    got = distribution(logits, packed)
    for index, one in enumerate(asked):
        alone = sampling_rows(*([value] for value in one), 200, dtype=torch.float64)
        for truncates in (True, alone.truncates):  # the device does not know
            own = distribution(logits[index][None], dataclasses.replace(alone, truncates=truncates))
            assert torch.equal(got[index], own[0])


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_a_draw_never_has_probability_zero(uniform):
    probs = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0])
    token = draw(probs, torch.tensor(uniform, dtype=torch.float64))
    assert probs[token] > 0


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    edges = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    counts = torch.bincount(draw(probs.expand(100_000, 4), edges), minlength=4) / 100_000
    torch.testing.assert_close(counts.to(torch.float64), probs, atol=2e-5, rtol=0)


def test_numbers_depend_on_key_position_nonce_and_stream_only():
    keys = np.array([7, 8], dtype=np.uint64)
    positions = np.array([[3, 4], [3, 4]])
    nonces = np.array([0, 0])
    together = uniforms(keys, positions, nonces, Stream.DRAFT)
    alone = uniforms(keys[1:], positions[1:], nonces[1:], Stream.DRAFT)
    assert np.array_equal(together[1:], alone)
    others = [
        uniforms(keys, positions, nonces + 1, Stream.DRAFT),
        uniforms(keys, positions + 2, nonces, Stream.DRAFT),
        uniforms(keys, positions, nonces, Stream.ACCEPT),
    ]
    assert all(not np.isin(together, other).any() for other in others)


def test_streams_are_uniform_and_uncorrelated():
    """Mean, variance and cross-correlations of 200,000 numbers, within 5 standard errors."""
    keys = np.arange(1000, dtype=np.uint64)
    positions = np.tile(np.arange(200), (1000, 1))
    nonces = np.zeros(1000, dtype=np.int64)
    streams = [uniforms(keys, positions, nonces, s) for s in Stream]
    error = 200_000**-0.5
    for numbers in streams:
        assert abs(numbers.mean() - 0.5) < 5 * error * 12**-0.5
        assert abs(numbers.var() - 1 / 12) < 5 * error * 0.0745
        neighbours = np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]
        assert abs(neighbours) < 5 * error
    for i, one in enumerate(streams):
        for other in streams[i + 1 :]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 * error


def raced(law, num_keys):
    """How often each id wins the race of a position, over keys that follow each other."""
    keys = torch.arange(num_keys) - num_keys // 2
    places, nonces = torch.full((num_keys, 1), 17), torch.zeros(num_keys, dtype=torch.int64)
    numbers = device_exponentials(keys, places, nonces, Stream.TARGET, len(law))[:, 0]
    return torch.bincount(race(law.expand(num_keys, -1), numbers), minlength=len(law))


@pytest.mark.parametrize(
    "law",
    [
        pytest.param([0.5, 0.0, 0.3, 0.2], id="a masked token"),
        pytest.param([0.999, 0.0005, 0.0004, 0.0001], id="nearly certain"),
        pytest.param([1.0] * 100, id="even, not normalised"),
        pytest.param([0.9**i for i in range(60)], id="a long tail"),
    ],
)
def test_races_follow_the_law(law):
    weights = torch.tensor(law, dtype=torch.float64)

    counts = raced(weights, 100_000)

    assert chi_squared_excess(counts.double(), weights / weights.sum()) < 1
    wrong = weights.clone()
    wrong[1] += 0.02 * weights.sum()
    assert chi_squared_excess(counts.double(), wrong / wrong.sum()) > 1


def test_a_certain_token_wins_every_race():
    assert raced(torch.tensor([0.0, 1.0, 0.0]), 10_000).tolist() == [0, 10_000, 0]


def test_the_last_bits_of_a_law_hardly_ever_change_the_winner():
    """Relative errors of 1e-6, as of another batch shape: the inverted sum flips at every token
    whose border moved past the number, the race only where two leaders are this close."""
    generator = torch.Generator().manual_seed(0)
    law = torch.rand(2000, 3000, generator=generator, dtype=torch.float64).softmax(-1)
    noise = 1 + 1e-6 * torch.randn(law.shape, generator=generator, dtype=torch.float64)
    keys, nonces = torch.arange(2000), torch.zeros(2000, dtype=torch.int64)
    numbers = device_exponentials(keys, keys[:, None], nonces, Stream.TARGET, 3000)[:, 0]
    number = torch.rand(2000, generator=generator, dtype=torch.float64)

    assert torch.equal(race(law, numbers), race(law * noise, numbers))
    shifted = law * (1 + 1e-6 * torch.linspace(-1, 1, 3000))
    assert torch.equal(race(law, numbers), race(shifted, numbers))
    assert (draw(law, number) != draw(shifted, number)).any()
