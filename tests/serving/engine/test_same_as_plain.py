"""With drafts and without: the same texts, token ids, ends, log probabilities and counts.

Requests use everything that a client may ask for (see ``oracles.random_requests``) and decode in
mixed batches; drafters are random, hostile, echoing, or new at every step, and the suffix index
takes turns with them. ``benchmarks/lossless.py`` does the same with thousands of requests.
"""

from __future__ import annotations

import random

import pytest

from oracles.engines import random_model, run
from oracles.plain_reference import decode
from oracles.random_requests import (
    DRAFTERS,
    NUM_EOS,
    Answer,
    differing,
    every_shape,
    exact_engine,
    random_requests,
    scramble,
    twice,
    with_ends,
)

V = 288
EOS = frozenset(range(40, 40 + NUM_EOS))


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", vocab_size=V).double()


def answers(model, requests, kind="random", between=lambda _engine, _step: None, **options):
    engine = exact_engine(model, kind, eos_ids=EOS, **options)
    return {name: Answer.of(got) for name, got in run(engine, requests, between).items()}, engine


@pytest.fixture(scope="module")
def asked(model):
    """Requests and their plain answers."""
    numbers = random.Random(11)
    first = random_requests(numbers, 60, V)
    whole, _ = answers(model, first, max_draft=0, max_batch=8)
    requests = twice(with_ends(numbers, r, whole[r.id]) for r in first)
    plain, engine = answers(model, requests, max_draft=0, max_batch=8)
    assert engine.figures().num_draft_tokens == 0
    reasons = [answer.finish_reason for answer in plain.values()]
    assert min(reasons.count("stop"), reasons.count("length")) > 10, "not every end occurs"
    return requests, plain


@pytest.mark.parametrize(
    ("kind", "overlaps"),
    [(kind, False) for kind in (*DRAFTERS, "swapped at every step")]
    + [("random", True), ("swapped at every step", True)],
)
def test_random_requests_are_answered_the_same(model, asked, kind, overlaps):
    requests, plain = asked
    swaps = kind not in DRAFTERS
    order = random.Random(5).sample(requests[:60], 60) + requests[60:]

    got, engine = answers(
        model,
        order,
        "random" if swaps else kind,
        scramble if swaps else lambda _engine, _step: None,
        max_batch=13,
        prefill_chunk=24,
        overlaps=overlaps,
    )

    figures = engine.figures()
    assert figures.num_accepted_tokens > 100, "nothing was drafted well: the test shows nothing"
    assert figures.num_draft_tokens > figures.num_accepted_tokens
    assert differing(plain, got) == []


@pytest.fixture(scope="module")
def by_definition(model):
    return {r.id: tuple(decode(model, r)) for r in every_shape()}


@pytest.mark.parametrize("max_batch", [2, 8])  # 1 and 3, and longer answers: `test_adjusting.py`
def test_every_way_of_shaping_follows_its_definition_in_every_batch(
    model, by_definition, max_batch
):
    got, _ = answers(model, twice(every_shape()), "echo", max_batch=max_batch)

    for name, tokens in by_definition.items():
        assert got[name].token_ids == got[f"{name} again"].token_ids == tokens, name


def test_plain_decoding_follows_it_too(model, by_definition):
    got, _ = answers(model, list(every_shape()), max_batch=8, max_draft=0)

    assert {name: answer.token_ids for name, answer in got.items()} == by_definition
