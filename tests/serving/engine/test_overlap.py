"""A round is launched before the last one was read, and nobody can tell from what comes out."""

from __future__ import annotations

import random
import time

import pytest
import torch

from oracles.engines import Collected, RandomPolicy, make_engine, random_model, request_of, run
from policies.interface import Decision
from serving.capture.rounds import round_columns
from serving.engine.cuda_graphs import Landing
from serving.engine.loop import Listeners

V = 288
PROMPT = [40, 41, 42, 43]


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", vocab_size=V)


class Steady(RandomPolicy):
    """Plays one arm and keeps what it is told."""

    def __init__(self, drafter, draft_k):
        self.arm = drafter, draft_k
        self.told = []

    def plan(self, obs):
        return Decision(self.arm[0], min(self.arm[1], obs.max_draft), 1.0, False, "test")

    def observe(self, outcome):
        self.told.append(outcome)


def begin(engine, *requests):
    collected = {r.id: Collected() for r in requests}
    for request in requests:
        engine.inbox.submit(request, collected[request.id].take)
    return collected


@pytest.mark.parametrize("shape", [{}, {"presence_penalty": 1.0}], ids=["plain", "penalized"])
@pytest.mark.parametrize("arm", [("none", 0), ("eagle3", 3)])
def test_a_round_is_launched_before_the_last_one_is_read(model, arm, shape):
    policy = Steady(*arm)
    engine = make_engine(model, policy=policy)
    got = begin(engine, request_of("a", PROMPT, 50, **shape))["a"]

    lengths = []
    with torch.inference_mode():
        for _ in range(4):
            engine.step()
            lengths.append(len(got.token_ids))

    # A step computes the prompt, the next one reads its token and launches a round, the one after
    # it reads that.
    assert lengths[:2] == [0, 1]
    assert 1 < lengths[2] < lengths[3]
    assert len(policy.told) == 2


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"frequency_penalty": 1.0}, {"logprobs": 2}]
)
def test_a_round_is_launched_before_the_prompt_beside_it_is_read(model, sampling):
    """But for requests that want more of the logits than a token."""
    engine = make_engine(model, policy=Steady("none", 0), prefix_cache=False)
    got = begin(engine, request_of("a", PROMPT, 50))
    with torch.inference_mode():
        for _ in range(3):
            engine.step()
        got |= begin(engine, request_of("b", PROMPT[::-1], 50, **sampling))
        before = len(got["a"].token_ids)
        engine.step()
        lengths = [len(got[name].token_ids) - before * (name == "a") for name in "ab"]
        in_lane = next(s for s in engine.scheduler.running if s.request.id == "b").is_in_lane
        engine.step()

    assert lengths == [1, "logprobs" in sampling]
    assert len(got["b"].token_ids) == 1
    # The lane was written with the prompt; a scored token is committed at once.
    assert in_lane


def test_rounds_beside_a_prompt_are_not_timed(model):
    """The host has more to do for them: the one under way when it comes, and the one behind it."""
    policy = Steady("none", 0)
    engine = make_engine(model, policy=policy, prefix_cache=False)

    def between(engine, step):
        if step == 6:
            engine.inbox.submit(request_of("b", PROMPT[::-1], 30), Collected().take)

    run(engine, [request_of("a", PROMPT, 30)], between)

    untimed = [n for n, told in enumerate(policy.told) if told.has_prefill]
    # Step 1 launches round 0, behind the prompt; in step 6 round 4 is under way.
    assert untimed == [0, 4, 5]


def test_where_every_round_is_beside_a_prompt_some_are_timed(model, monkeypatch):
    monkeypatch.setattr(Landing, "wait", lambda _self: True)  # a device that is always behind
    policy = Steady("none", 0)
    engine = make_engine(model, policy=policy, prefix_cache=False)
    requests = [request_of(f"{n}", PROMPT, 2) for n in range(60)]

    def between(engine, step):
        if requests:
            engine.inbox.submit(requests.pop(), Collected().take)

    run(engine, [request_of("a", PROMPT, 70)], between)

    flags = [told.has_prefill for told in policy.told[:50]]
    assert 3 <= flags.count(False) <= 8


def test_lanes_and_pages_change_hands_while_a_round_flies(model):
    """More requests than lanes, ends inside blocks, cancellations: each answer is its own."""
    numbers = random.Random(3)
    requests = [
        request_of(str(i), [numbers.randrange(V) for _ in range(numbers.randint(1, 40))],
                   numbers.randint(1, 40))
        for i in range(40)
    ]  # fmt: skip
    whole = run(make_engine(model, max_batch=4, eos_ids=frozenset(range(5))), requests)
    doomed = {str(i): numbers.randint(5, 60) for i in range(0, 40, 5)}

    def between(engine, step):
        for name, when in doomed.items():
            if step == when:
                engine.inbox.cancel(name)

    # Pages for about three requests at a time: those of one that ended are taken again at once.
    engine = make_engine(model, max_batch=4, eos_ids=frozenset(range(5)), num_pages=90)
    got = run(engine, requests, between)

    cancelled = {name for name, c in got.items() if c.last.finish_reason == "cancelled"}
    assert cancelled and cancelled <= set(doomed)
    for name, collected in got.items():
        want = whole[name].token_ids
        if name in cancelled:
            assert collected.token_ids == want[: len(collected.token_ids)]
        else:
            assert collected.token_ids == want
            assert collected.last.finish_reason == whole[name].last.finish_reason
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_usable


def test_a_round_counts_for_the_version_that_drafted_it(model):
    policy = Steady("eagle3", 2)
    rounds, versions = [], []
    listeners = Listeners(
        on_finished=lambda sequence: rounds.extend(round_columns(sequence.rounds)),
        on_rounds=lambda _drafter, _rounds: versions.append(engine.drafting.version),
    )
    engine = make_engine(model, policy=policy, listeners=listeners)

    def between(engine, step):
        engine.drafting.neural["eagle3"].drafter.version = step // 4

    run(engine, [request_of("a", PROMPT, 60)], between)

    # Step 0 computes the prompt, step n launches round n - 1.
    assert [r.version for r in rounds] == [(n + 1) // 4 for n in range(len(rounds))]
    # A round that lands behind a swap tells nothing of the weights in force.
    assert len(policy.told) == len(versions) < len(rounds)
    assert all(told.version == version for told, version in zip(policy.told, versions, strict=True))


def test_a_round_under_way_when_a_watch_exchanges_weights_is_of_those_it_drafted_with(model):
    """A watch exchanges them while a round is committed; the next one has been launched by then."""
    policy = Steady("eagle3", 2)
    rounds, num_told = [], []

    def watch(_drafter, _rounds):
        num_told.append(1)
        if len(num_told) == 5:
            engine.drafting.neural["eagle3"].drafter.version = 1

    listeners = Listeners(
        on_finished=lambda sequence: rounds.extend(round_columns(sequence.rounds)), on_rounds=watch
    )
    engine = make_engine(model, policy=policy, listeners=listeners)

    run(engine, [request_of("a", PROMPT, 60)])

    assert [r.version for r in rounds[:8]] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert [told.version for told in policy.told[:7]] == [0, 0, 0, 0, 0, 1, 1]
    # Weights are copied behind the round under way, and so in the time of the one after it.
    assert [told.has_prefill for told in policy.told[3:8]] == [False, False, True, False, False]
    assert [r.is_timed for r in rounds[4:9]] == [True, True, False, True, True]


def test_rows_that_a_drafter_computes_again_are_told_with_the_round_that_waited_for_them(model):
    """Former weights come back, and none of the rows is used; the drafter drafts all the time."""
    policy = Steady("eagle3", 2)
    lengths = []
    engine = make_engine(model, policy=policy)

    def between(engine, step):
        engine.drafting.neural["eagle3"].drafter.version = int(8 <= step < 20)
        lengths.extend(len(sequence.tokens) for sequence in engine.scheduler.running)

    run(engine, [request_of("a", PROMPT, 120)], between)

    told = [n for n, one in enumerate(policy.told) if one.num_caught_up > 8]
    assert len(told) == 1, "the new version drafts from its parent's rows"
    assert policy.told[told[0]].version == 0
    caught_up = policy.told[told[0]].num_caught_up
    assert caught_up in [length - 1 - first for length in lengths for first in (0, 1)]
    assert caught_up > 20


def test_catching_up_is_no_time_of_a_draft_in_traces_and_the_policy_learns_it(model):
    class Late(Steady):
        def plan(self, obs):
            return super().plan(obs) if obs.step > 20 else Decision("none", 0, 1.0, False, "test")

    policy, rounds = Late("eagle3", 2), []
    listeners = Listeners(on_finished=lambda seq: rounds.extend(round_columns(seq.rounds)))

    run(make_engine(model, policy=policy, listeners=listeners), [request_of("a", PROMPT, 60)])

    first = next(n for n, one in enumerate(policy.told) if one.decision.draft_k)
    assert policy.told[first].num_caught_up > 15 and not policy.told[first].has_prefill
    assert [r.is_timed for r in rounds[first - 1 : first + 2]] == [True, False, True]
    assert sum(one.num_caught_up for one in policy.told) == policy.told[first].num_caught_up


def test_what_the_index_keeps_the_device_waiting_for_is_a_cost_of_drafting(model, monkeypatch):
    """Learning what was decided and looking up: neither can go on beside a round."""
    policy = Steady("suffix", 4)
    engine = make_engine(model, policy=policy)
    foresee, look_up = engine.drafting.foresee, engine.drafting.from_host

    def slow(function):
        def call(*arguments):
            time.sleep(0.03)
            return function(*arguments)

        return call

    monkeypatch.setattr(engine.drafting, "foresee", slow(foresee))
    monkeypatch.setattr(engine.drafting, "from_host", slow(look_up))

    run(engine, [request_of("a", PROMPT * 4, 12)])

    assert len(policy.told) > 2
    for told in policy.told[1:]:
        assert told.step_s - 0.05 > told.draft_s - 0.05 > 0


def test_a_round_of_the_index_is_launched_before_the_last_one_is_committed(model, monkeypatch):
    """It drafts from the text that the last one has decided all the same."""
    engine = make_engine(model, policy=Steady("suffix", 4))
    collected = Collected()
    rounds, look_up = engine.programs.rounds, engine.drafting.from_host
    committed, texts = [], []

    def launch(*arguments):
        committed.append(len(collected.token_ids))
        return right(*arguments)

    def from_host(kind, batch, num_draft):
        index = engine.drafting.hosts["suffix"]
        rows = [index._texts.row(s.request.id) for s in batch]
        texts.extend(index._texts.tokens(row).tolist() for row in rows)
        return look_up(kind, batch, num_draft)

    right = rounds.launch
    monkeypatch.setattr(rounds, "launch", launch)
    monkeypatch.setattr(engine.drafting, "from_host", from_host)
    engine.inbox.submit(request_of("a", PROMPT * 4, 12), collected.take)
    with torch.inference_mode():
        while collected.last is None or collected.last.finish_reason is None:
            engine.step()

    whole = [*PROMPT * 4, *collected.token_ids]
    assert len(texts) > 3
    known = [len(text) - len(PROMPT * 4) for text in texts]
    assert all(many > few for many, few in zip(known[1:], committed[1:], strict=False))
    assert all(text[: len(whole)] == whole[: len(text)] for text in texts)
    assert engine.figures().num_accepted_tokens > 0


def test_the_index_keeps_nothing_that_was_decided_behind_the_end_of_a_text(model):
    """The second request is drafted from the first one's text, which goes on behind that end."""
    plain = run(make_engine(model), [request_of("p", PROMPT, 40, max_draft=0)])["p"].token_ids
    end = plain[9]
    engine = make_engine(model, policy=Steady("suffix", 4), eos_ids=frozenset({end}))
    run(engine, [request_of("a", PROMPT, 40, ignore_eos=True)])
    index = engine.drafting.hosts["suffix"]
    index.catch_up()
    before = index.num_recent_tokens
    got = run(engine, [request_of("b", PROMPT, 40)])["b"]

    assert got.token_ids == plain[: plain.index(end) + 1]
    assert before == len(PROMPT) + 40
    index.catch_up()
    added = index.num_recent_tokens - before
    assert added == len(PROMPT) + len(got.token_ids)


def test_what_a_request_drafts_behind_its_end_is_told_nobody(model):
    plain = run(make_engine(model), [request_of("p", PROMPT, 40, max_draft=0)])["p"].token_ids
    end = plain[9]
    policy = Steady("eagle3", 3)
    engine = make_engine(model, policy=policy, eos_ids=frozenset({end}))

    got = run(engine, [request_of("a", PROMPT, 40), request_of("b", PROMPT, 40, ignore_eos=True)])

    assert got["a"].token_ids == plain[: plain.index(end) + 1]
    assert got["b"].token_ids == plain
    behind = [told for told in policy.told if len(told.rows) < told.batch]
    assert len(behind) == 1, "one round was under way when the first request ended"
    figures = engine.figures()
    assert figures.generation_tokens == len(got["a"].token_ids) + len(got["b"].token_ids)
