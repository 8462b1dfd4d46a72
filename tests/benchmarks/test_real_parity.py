"""What is compared with the trainer's simulation: whole answers, each asked in every way."""

from __future__ import annotations

from itertools import islice

from benchmarks.real.parity import (
    DRAWN,
    GREEDY,
    SEEDED,
    WAYS,
    by_turns,
    live_of,
    requests_of,
)
from oracles.engines import make_engine, new_weights, random_model, request_of
from policies.fixed import FixedPolicy
from tests.serving.capture.test_capture import PROMPT, traces_of


def test_every_prompt_is_asked_in_every_way_before_the_next() -> None:
    requests = list(requests_of([((1, 2), 7), ((3,), 8)]))

    assert [r.id for r in requests] == [f"{way}-{n}" for n in (0, 1) for way in WAYS]
    asked = {r.id.rpartition("-")[0]: r.sampling for r in islice(requests, 3)}
    assert asked[GREEDY].temperature == 0 and asked[GREEDY].seed is None
    assert asked[SEEDED].temperature == asked[DRAWN].temperature == 0.7
    assert (asked[SEEDED].seed, asked[DRAWN].seed) == (7, None)
    assert not any(r.sampling.ignore_eos for r in requests)


def test_domains_take_turns_so_that_a_part_of_them_is_balanced() -> None:
    one, two = [((1,), 0), ((2,), 0), ((3,), 0)], [((4,), 0), ((5,), 0)]

    assert [ids for ids, _ in by_turns([one, two])] == [(1,), (4,), (2,), (5,)]


def test_live_tokens_are_those_of_rounds_and_not_the_one_that_comes_with_the_prompt() -> None:
    model = random_model("llama")
    engine = make_engine(
        model, kind="eagle3", weights=new_weights("eagle3", model),
        policy=FixedPolicy("eagle3", 3), suffix=False,
    )  # fmt: skip
    requests = [request_of(str(i), PROMPT[i:], 12) for i in range(3)]
    requests.append(request_of("no rounds", PROMPT, 1))

    traces = list(traces_of(engine, requests)[0].values())

    tokens, rounds = live_of(traces)
    assert tokens == 3 * 11
    assert rounds == sum(len(trace.rounds) for trace in traces) <= tokens
