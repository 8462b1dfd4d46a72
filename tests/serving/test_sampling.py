"""What follows from the table of sampling fields."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from oracles.support import REPOSITORY, tiny_tokenizer
from serving.engine.inbox import Sequences
from serving.http.request_bodies import ChatRequest, CompletionRequest
from serving.http.sampling_body import sampling_params
from serving.requests import Request
from serving.sampling import (
    LANE_INTEGERS,
    LANE_REALS,
    TABLE,
    SamplingParams,
    documentation,
    lane_integers,
    lane_reals,
    table_row,
    trace_values,
)
from specops.lanes import Field
from specops.rng import Stream, uniforms


def integers_of(**params) -> dict[str, int]:
    return dict(zip(LANE_INTEGERS, lane_integers(SamplingParams(**params), 100), strict=True))


def test_the_documentation_is_that_of_the_table():
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    assert documentation() in page, "paste what `python -m serving.sampling` prints"


def test_every_integer_column_is_a_field_of_the_lanes():
    assert set(LANE_INTEGERS) <= set(Field.__members__)


def test_the_kernels_find_the_real_columns_by_position():
    assert LANE_REALS == ("temperature", "top_p", "min_p")
    assert lane_reals(SamplingParams(temperature=0.5, top_p=0.25, min_p=0.125)) == (
        0.5,
        0.25,
        0.125,
    )


def test_no_top_k_is_the_whole_vocabulary():
    assert integers_of()["TOP_K"] == 100
    assert integers_of(top_k=7)["TOP_K"] == 7
    assert integers_of(top_k=101)["TOP_K"] == 100


def test_any_one_penalty_sets_the_column_that_they_share():
    assert integers_of()["PENALIZES"] == 0
    for name, value in (
        ("presence_penalty", -1.0),
        ("frequency_penalty", 0.5),
        ("repetition_penalty", 0.5),
        ("repetition_penalty", 2.0),
    ):
        assert SamplingParams(**{name: value}).penalizes
        assert integers_of(**{name: value})["PENALIZES"] == 1


def test_penalties_are_in_the_order_of_their_table():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=1.5, repetition_penalty=3.0)
    assert table_row(params, "penalties") == (0.5, 1.5, 3.0)


def test_biases_are_counted():
    assert integers_of(logit_bias=((3, 1.0), (5, -1.0)))["BIASES"] == 2


def test_a_trace_keeps_the_shape_of_the_distribution_without_biases_and_penalties():
    params = SamplingParams(temperature=0.5, seed=3, presence_penalty=1.0, stop=("x",))
    assert trace_values(params) == {
        "temperature": 0.5, "top_p": 1.0, "top_k": None, "min_p": 0.0, "seed": 3, "domain": None,
    }  # fmt: skip


def test_an_empty_body_asks_for_the_defaults():
    chat = ChatRequest(messages=[{"role": "user", "content": "hi"}])
    for body in (CompletionRequest(prompt="hi"), chat):
        assert sampling_params(body, 0, max_tokens=16, logprobs=None) == SamplingParams()


def test_every_field_reaches_the_parameters():
    asked = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "seed": 7, "stop": "x",
        "stop_token_ids": [1, 2], "ignore_eos": True, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 2, "logit_bias": {"5": 1},
        "cache_salt": "s", "domain": "code",
        "include_stop_str_in_output": True, "skip_special_tokens": False,
    }  # fmt: skip
    body = CompletionRequest(prompt="hi", **asked)
    params = sampling_params(body, 2, max_tokens=4, logprobs=1)
    assert params == SamplingParams(
        temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, seed=9, stop=("x",),
        stop_token_ids=(1, 2), ignore_eos=True, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=2, logit_bias=((5, 1.0),), max_tokens=4, logprobs=1,
        cache_salt="s", domain="code",
        include_stop_str_in_output=True, skip_special_tokens=False,
    )  # fmt: skip
    assert {*asked, "max_tokens", "logprobs"} == set(TABLE)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62, -(2**62), 2**63 - 1, -(2**63), 1 - 2**63])
def test_every_signed_64_bit_seed_is_a_seed_of_its_own(seed):
    """Bit 63 was dropped: 0 drew what -2**63 did."""
    body = CompletionRequest(prompt="hi", seed=seed)
    first, second = (sampling_params(body, i, max_tokens=1, logprobs=None).seed for i in (0, 1))
    assert first == seed
    assert second == (seed + 1 if seed < 2**63 - 1 else -(2**63))


def test_the_sign_of_a_seed_reaches_the_random_numbers():
    sequences = Sequences(tiny_tokenizer(), frozenset(), seed=1)

    def drawn(seed):
        body = CompletionRequest(prompt="hi", seed=seed)
        params = sampling_params(body, 0, max_tokens=1, logprobs=None)
        request = Request("a", (1,), params)
        key = np.array([sequences.new(request, lambda output: None).key], np.uint64)
        zeros = np.zeros(1, np.int64)
        return float(uniforms(key, zeros[:, None], zeros, Stream.TARGET)[0, 0])

    assert [drawn(seed) for seed in (0, 7, 2**62 - 1)] == [
        0.3567725724792479, 0.8306474237224872, 0.7198987113553456,
    ]  # fmt: skip # answers to these seeds never change
    numbers = [drawn(seed) for seed in (0, 1, -1, 2**62, -(2**62), 2**63 - 1, -(2**63), 1 - 2**63)]
    assert len(set(numbers)) == len(numbers)


def test_temperatures_that_would_overflow_are_greedy():
    for temperature, want in ((9e-6, 0.0), (1e-5, 1e-5)):
        body = CompletionRequest(prompt="hi", temperature=temperature)
        assert sampling_params(body, 0, max_tokens=1, logprobs=None).temperature == want


@pytest.mark.parametrize(
    "domain", ["code\n", "a\nb", "\x1b[31mred", "a\x00", "\u202ecode", "", "x" * 65]
)
def test_a_domain_that_could_deceive_a_terminal_is_refused(domain):
    with pytest.raises(ValidationError) as error:
        CompletionRequest(prompt="hi", domain=domain)
    assert [one["loc"] for one in error.value.errors()] == [("domain",)]


@pytest.mark.parametrize("domain", ["code", "two words", "Prüfung", "x" * 64])
def test_a_visible_domain_is_kept(domain):
    body = CompletionRequest(prompt="hi", domain=domain)
    assert sampling_params(body, 0, max_tokens=1, logprobs=None).domain == domain
