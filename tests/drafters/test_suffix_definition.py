"""The index equals a definition of a few lines that searches everything."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.suffix.index import SuffixIndex
from drafters.suffix.kinds import KINDS, PRIOR_ACCEPTANCE

VOTES = 4
BOUNDS = (2, 5)


def occurrences(tail, sequences, bounds):
    """(match length, [(sequence, end)], latest first) of the longest suffix with a continuation."""
    min_match, max_match = bounds
    for n in range(min(max_match, len(tail)), min_match - 1, -1):
        found = [
            (sequence, end)
            for sequence in reversed(sequences)
            for end in range(len(sequence) - 2, n - 2, -1)
            if sequence[end - n + 1 : end + 1] == tail[-n:]
        ]
        if found:
            return n, found[:VOTES]
    return 0, []


def kind(length, is_own, ends):
    """Number of the kind of a match; 0 without one."""
    if not length:
        return 0
    followers = {sequence[end + 1] for sequence, end in ends}
    votes = "divided" if len(followers) > 1 else "alone" if len(ends) == 1 else "agreed"
    fits = [k for k in KINDS if k[:2] == (is_own, votes) and k.least <= length]
    return 1 + KINDS.index(max(fits, key=lambda k: k.least))


def best(tail, own, others, bounds=BOUNDS, values=PRIOR_ACCEPTANCE):
    """(kind, is_own, ends) of the match that is continued."""
    matches = []
    for is_own, sequences in ((True, [own]), (False, others)):
        length, ends = occurrences(tail, sequences, bounds)
        if length:
            matches.append((kind(length, is_own, ends), is_own, ends))
    return max(matches, key=lambda match: values[match[0]], default=(0, True, []))


def propose(own, others, k, bounds=BOUNDS, values=PRIOR_ACCEPTANCE):
    draft = []
    while len(draft) < k:
        found, is_own, ends = best(own + draft, own, others, bounds, values)
        if not found:
            break
        offset = 0
        while len(draft) < k:
            offset += 1
            nexts = [
                (token, sequence, end)
                for sequence, end in ends
                for token in (sequence + draft if is_own else sequence)[end + offset :][:1]
            ]
            if not nexts:
                break
            chosen = Counter(token for token, _, _ in nexts).most_common(1)[0][0]
            draft.append(chosen)
            ends = [(sequence, end) for token, sequence, end in nexts if token == chosen]
    return draft


tokens = st.lists(st.integers(0, 2), max_size=30)
worth = st.lists(st.integers(0, 3), min_size=len(KINDS) + 1, max_size=len(KINDS) + 1)


@settings(max_examples=300, deadline=None)
@given(
    bounds=st.sampled_from([(2, 5), (1, 1), (1, 4), (3, 3), (2, 12)]),
    others=st.lists(
        st.tuples(tokens, st.booleans(), st.sampled_from("xy"), st.integers(0, 30)), max_size=6
    ),
    prompt=tokens,
    steps=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=30), worth | st.just(PRIOR_ACCEPTANCE)
        ),
        max_size=3,
    ),
    k=st.integers(0, 9),
)
def test_match_and_proposal_are_those_of_the_definition(bounds, others, prompt, steps, k):
    index = SuffixIndex(*bounds, 10_000)
    own = list(prompt)
    index.begin("own", own, "x")
    for sequence, keep, namespace, num_tokens in others:
        index.begin("other", sequence, namespace)
        index.finish("other", keep, num_tokens)
    seen = [s[:num] for s, keep, namespace, num in others if keep and namespace == "x"]
    for step, values in [([], PRIOR_ACCEPTANCE), *steps, ([], PRIOR_ACCEPTANCE)]:
        index.extend(["own"], [step])
        own += step
        index.rank(None if values is PRIOR_ACCEPTANCE else values)
        assert index.observe(["own"])[0] == best(own, own, seen, bounds, values)[0]
        assert index.propose(["own"], [k])[0] == propose(own, seen, k, bounds, values)


@settings(max_examples=100, deadline=None)
@given(
    other=st.lists(st.integers(0, 3), max_size=60),
    text=st.lists(st.integers(0, 3), max_size=80),
    k=st.integers(1, 6),
)
def test_a_text_that_grows_token_by_token_is_searched_as_one_that_was_there(other, text, k):
    index = SuffixIndex(*BOUNDS, 1000)
    index.begin("other", other)
    index.finish("other", keep=True)
    index.begin("grows", [])
    for num, token in enumerate(text, 1):
        index.extend(["grows"], [[token]])
        assert index.observe(["grows"])[0] == best(text[:num], text[:num], [other])[0]
        assert index.propose(["grows"], [k])[0] == propose(text[:num], [other], k)


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=25),
    recent_tokens=st.integers(0, 40),
)
def test_only_the_newest_traffic_is_searched_within_the_bound(sequences, recent_tokens):
    index = SuffixIndex(*BOUNDS, recent_tokens)
    for sequence in sequences:
        index.begin("other", sequence)
        index.finish("other", keep=True)
        index.catch_up()
        assert index.num_recent_tokens + index.num_recent_sequences <= recent_tokens
    live = sequences[len(sequences) - index.num_recent_sequences :]
    if live:
        rest = index.num_recent_tokens - sum(len(s) for s in live[1:])
        live = [live[0][-rest:], *live[1:]]
    assert sum(map(len, live)) == index.num_recent_tokens
    probes = {(a, b, c) for a in range(3) for b in range(3) for c in range(3)}
    for probe in sorted(probes):
        index.begin("probe", list(probe))
        assert index.observe(["probe"])[0] == best(list(probe), list(probe), live)[0]
        assert index.propose(["probe"], [6])[0] == propose(list(probe), live, 6)
        index.finish("probe", keep=False)


def traffic(rng, num_turns):
    """Calls of an index that follows four requests at a time; some turns look a request up."""
    lengths = {}
    for turn in range(num_turns):
        if len(lengths) < 4:
            prompt = rng.choices(range(3), k=rng.randrange(40))
            lengths[str(turn)] = len(prompt)
            yield "begin", str(turn), prompt, rng.choice("xy")
        key = rng.choice(list(lengths))
        tokens = rng.choices(range(3), k=rng.randrange(1, 4))
        lengths[key] += len(tokens)
        yield "extend", [key], [tokens]
        if turn % 500 > 480:
            yield "observe", [key]
            yield "propose", [key], [rng.randrange(9)]
        if not rng.randrange(25):
            ended = lengths.pop(key) - rng.randrange(2)
            yield "finish", key, rng.random() < 0.8, ended


@pytest.mark.parametrize("bounds", [(2, 12), (1, 4), (3, 3)])
def test_a_seldom_asked_index_answers_as_one_that_is_asked_after_every_token(bounds):
    seldom, always = (SuffixIndex(*bounds, 3000) for _ in range(2))
    num_answers = 0
    for call, key, *arguments in traffic(random.Random(0), 6000):
        answer = getattr(seldom, call)(key, *arguments)
        assert getattr(always, call)(key, *arguments) == answer
        num_answers += bool(answer and answer[0])
        if call == "finish":
            always.catch_up()
        elif call == "begin":
            always.observe([key])
        elif call == "extend":
            always.observe(key)
    assert num_answers > 300
    assert always.num_evicted_sequences > 50
    assert seldom.num_skipped_sequences == always.num_skipped_sequences == 0
