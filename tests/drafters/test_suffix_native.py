"""The compiled index answers as the one in Python that it replaced, whatever happens to its
requests."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.suffix.index import SuffixIndex
from drafters.suffix.kinds import KINDS
from drafters.suffix.recent import RecentText
from oracles import suffix_recent
from oracles.suffix_index import PlainSuffixIndex

COUNTS = (
    "num_running", "num_recent_tokens", "num_recent_sequences", "num_evicted_sequences",
    "num_evicted_tokens", "num_skipped_sequences", "num_skipped_tokens",
)  # fmt: skip


class Both:
    """Two indexes that are told and asked the same."""

    def __init__(self, bounds, recent_tokens):
        self.plain = PlainSuffixIndex(*bounds, recent_tokens)
        self.compiled = SuffixIndex(*bounds, recent_tokens)
        self.num_matched = 0

    def tell(self, call, *arguments, **named):
        for index in (self.plain, self.compiled):
            getattr(index, call)(*arguments, **named)

    def finish(self, key, *, keep, num_tokens=None):
        self.tell("finish", key, keep=keep, num_tokens=num_tokens)
        self.tell("catch_up")  # the plain index lets it wait, and then may have to skip it

    def ask(self, keys, most):
        kinds = self.compiled.observe(keys)
        assert kinds == self.plain.observe(keys)
        assert self.compiled.propose(keys, most) == self.plain.propose(keys, most)
        for name in COUNTS:
            assert getattr(self.compiled, name) == getattr(self.plain, name), name
        self.num_matched += sum(kind > 0 for kind in kinds)


numbers = st.integers(0, 3)
texts = st.lists(numbers, max_size=40)
calls = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, 4), texts, st.sampled_from("xyz")),
    st.tuples(st.just("extend"), st.lists(texts, min_size=5, max_size=5)),
    st.tuples(st.just("finish"), st.integers(0, 4), st.booleans(), st.none() | st.integers(0, 50)),
    st.tuples(
        st.just("rank"),
        st.none() | st.lists(numbers, min_size=1 + len(KINDS), max_size=1 + len(KINDS)),
    ),
    st.tuples(st.just("ask"), st.lists(st.integers(0, 9), min_size=5, max_size=5)),
)


@settings(max_examples=150, deadline=None)
@given(
    bounds=st.sampled_from([(2, 12), (1, 1), (1, 4), (3, 3), (2, 5), (5, 12)]),
    recent_tokens=st.sampled_from([0, 1, 7, 60, 10_000]),
    steps=st.lists(calls, max_size=40),
)
def test_random_calls_have_the_answers_of_the_plain_index(bounds, recent_tokens, steps):
    both, running = Both(bounds, recent_tokens), []
    for call, *arguments in steps:
        key = str(arguments[0])
        if call == "begin" and key not in running:
            both.tell("begin", key, arguments[1], namespace=arguments[2])
            running.append(key)
        elif call == "finish" and key in running:
            both.finish(key, keep=arguments[1], num_tokens=arguments[2])
            running.remove(key)
        elif call == "extend":
            both.tell("extend", running, arguments[0][: len(running)])
        elif call == "rank":
            both.tell("rank", arguments[0])
        elif call == "ask":
            both.ask(running, arguments[0][: len(running)])
    both.ask(running, [5] * len(running))


def served(both, rng, num_steps, vocabulary, num_requests=8, spaces="xy"):
    """Requests as a server has them: they come, repeat themselves, end, and others follow."""
    texts = {}
    for step in range(num_steps):
        while len(texts) < num_requests:
            key = f"{step}-{len(texts)}"
            texts[key] = [int(rng.random() ** 2 * vocabulary) for _ in range(rng.randrange(90))]
            both.tell("begin", key, texts[key], namespace=rng.choice(spaces))
        news = []
        for text in texts.values():
            at = rng.randrange(len(text)) if text else 0
            new = text[at : at + rng.randrange(1, 6)] or [rng.randrange(vocabulary)]
            news.append(new)
            text += new
        both.tell("extend", list(texts), news)
        if rng.random() < 0.7:
            both.ask(list(texts), [rng.randrange(7) for _ in texts])
        if rng.random() < 0.3:
            both.tell("rank", [rng.random() for _ in range(1 + len(KINDS))])
        for key in [key for key in texts if rng.random() < 0.05]:
            both.finish(key, keep=rng.random() < 0.8)
            del texts[key]


@pytest.mark.parametrize(
    ("recent_tokens", "vocabulary", "spaces"),
    [(3_000, 40, "xy"), (500, 4, "x"), (50_000, 2_000, "xyz"), (0, 10, "x")],
)
def test_served_requests_have_the_answers_of_the_plain_index(recent_tokens, vocabulary, spaces):
    both = Both((2, 12), recent_tokens)
    served(both, random.Random(recent_tokens), 250, vocabulary, spaces=spaces)
    assert both.num_matched > 300
    assert both.compiled.num_evicted_sequences > 5 or recent_tokens in (0, 50_000)


def test_the_same_after_positions_have_begun_again(monkeypatch):
    for texts in (RecentText, suffix_recent.RecentText):
        monkeypatch.setattr(texts, "_MAX_POSITION", 2_000)
    both = Both((2, 8), 700)
    served(both, random.Random(1), 200, 12)
    assert both.num_matched > 300


def test_chains_that_are_longer_than_a_lookup_follows_end_it_alike():
    """Two tenants in one chain: the other's occurrences use up the links that are followed."""
    both, rng = Both((2, 12), 20_000), random.Random(2)
    # These two names have the same CRC-32, hence the same chains.
    for turn in range(120):
        text = [1, 2, 3, rng.randrange(9), 1, 2, rng.randrange(9)]
        both.tell("begin", "f", text, namespace="plumless" if turn in (20, 70) else "buckeroo")
        both.finish("f", keep=True)
        both.tell("begin", "p", [8, 1, 2], namespace="plumless")
        both.ask(["p"], [3])
        both.finish("p", keep=False)
    assert 20 < both.num_matched < 119


def test_text_of_a_tenant_is_gone_for_others_whatever_number_they_get():
    index = SuffixIndex(2, 12, 1_000)
    for number in range(300):
        key, name = str(number), f"tenant-{number}"
        index.begin(key, [1, 2, 3, 4], name)
        assert index.observe([key]) == [0]
        index.finish(key, keep=True)
    assert len(index._namespaces) == index.num_recent_sequences == 200


def test_many_requests_move_while_they_grow():
    index, rng = SuffixIndex(2, 12, 0), random.Random(3)
    plain = PlainSuffixIndex(2, 12, 0)
    keys = [str(number) for number in range(150)]
    for key in keys:
        for one in (index, plain):
            one.begin(key, [int(key) % 5, 1, 2])
    for _ in range(12):
        news = [[rng.randrange(5) for _ in range(rng.randrange(40))] for _ in keys]
        for one in (index, plain):
            one.extend(keys, news)
        assert index.observe(keys) == plain.observe(keys)
        assert index.propose(keys, [4] * 150) == plain.propose(keys, [4] * 150)
    texts = [index._texts.tokens(index._texts.row(key)) for key in keys]
    assert all(
        np.array_equal(t, plain._own(k).text.tokens) for k, t in zip(keys, texts, strict=True)
    )
