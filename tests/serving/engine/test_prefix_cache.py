"""Cached pages hold what their name says, also those that an answer has filled."""

from __future__ import annotations

import copy

import pytest
import torch

from oracles.engines import make_engine, random_model, request_of, run
from policies.fixed import FixedPolicy

PAGE_SIZE = 4


def reference(model, prompt, max_tokens):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", range(8, 8 + PAGE_SIZE))
def test_a_conversation_goes_on_from_the_pages_of_its_answer(length):
    """Where an answer ends within its page decides whether that page is complete."""
    model = random_model("qwen3")
    plain = copy.deepcopy(model)
    engine = make_engine(model, page_size=PAGE_SIZE)
    prompt = list(range(30))
    for turn in range(3):
        answer = run(engine, [request_of(str(turn), prompt, length)])[str(turn)].token_ids
        assert answer == reference(plain, prompt, length)
        prompt = [*prompt, *answer, 1, 2]


def cached_by(engine, name, **whose):
    """Cached prompt tokens that a request for one prompt of 30 tokens is told."""
    request = request_of(name, list(range(30)), 3, **whose)
    return run(engine, [request])[name].last.num_cached_tokens


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"tenant": "one"}, {"tenant": "two"}, id="two tenants"),
        pytest.param({}, {"tenant": "one"}, id="nobody and a tenant"),
        pytest.param({"cache_salt": "a"}, {"cache_salt": "b"}, id="two salts"),
        pytest.param({}, {"cache_salt": "a"}, id="no salt and one"),
        pytest.param(
            {"tenant": "one", "cache_salt": "a"},
            {"tenant": "two", "cache_salt": "a"},
            id="one salt, two tenants",
        ),
        pytest.param(
            {"tenant": "on", "cache_salt": "ea"}, {"tenant": "one", "cache_salt": "a"}, id="joined"
        ),
        pytest.param({"tenant": "one", "cache_salt": "a"}, {"tenant": "3:onea"}, id="imitated"),
    ],
)
def test_pages_are_shared_within_a_namespace_only(first, second):
    engine = make_engine(random_model("qwen3"), page_size=PAGE_SIZE)

    assert cached_by(engine, "1", **first) == 0
    assert cached_by(engine, "2", **second) == 0
    assert cached_by(engine, "3", **first) == cached_by(engine, "4", **second) == 28


def test_a_conversation_goes_on_from_the_pages_of_its_own_tenants_answer():
    """Pages of an answer are named after it; they belong to the tenant as those of a prompt do."""
    engine = make_engine(random_model("qwen3"), page_size=PAGE_SIZE)
    prompt = list(range(30))
    asked = request_of("1", prompt, 9, tenant="one", cache_salt="a")
    prompt = [*prompt, *run(engine, [asked])["1"].token_ids, 1]

    for name, salt, cached in (("2", "b", 0), ("3", "a", 36)):
        request = request_of(name, prompt, 3, tenant="one", cache_salt=salt)
        assert run(engine, [request])[name].last.num_cached_tokens == cached


@pytest.mark.parametrize("whose", [{"tenant": "two"}, {"cache_salt": "b"}])
def test_what_a_namespace_was_told_drafts_for_no_other(whose):
    engine = make_engine(random_model("qwen3"), policy=FixedPolicy("suffix", 4))
    prompt, answer_of = [7, 5, 3], {}
    for name, mine in (("first", {}), ("other", whose), ("same", {})):
        request = request_of(name, prompt, 40, ignore_eos=True, **mine)
        answer_of[name] = run(engine, [request])[name]

    proposed = {name: got.last.stats.proposed for name, got in answer_of.items()}
    assert proposed["first"] == proposed["other"] < proposed["same"]
    assert len({tuple(got.token_ids) for got in answer_of.values()}) == 1
