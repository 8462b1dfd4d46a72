"""Programs that are left for later are made one at a time, and drafts are shorter until then."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch

from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from policies.fixed import FixedPolicy
from policies.interface import Decision
from serving.engine.later import Later
from serving.engine.making import Making


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def making_of(durations):
    """Programs that take so long to make, and the clock that says so."""
    clock, left = Clock(), list(durations)

    def make_next():
        if left:
            clock.now_s += left.pop(0)
            return True
        return False

    return Making(make_next, clock), clock, left


def test_beside_requests_making_takes_a_fiftieth_of_the_time():
    making, clock, left = making_of([0.1, 0.2, 0.1])
    making.begin()
    assert making.is_due and making.make()

    assert not making.is_due
    clock.now_s += 4.9
    assert not making.is_due
    clock.now_s += 0.2
    assert making.is_due and making.make()
    clock.now_s += 9.9
    assert not making.is_due and left == [0.1]


def test_an_idle_server_makes_all_and_then_rests():
    making, _, left = making_of([0.1] * 3)
    assert not making.make() and not making.is_due, "nothing was left"
    making.begin()

    assert [making.make() for _ in range(5)] == [True, True, True, False, False]
    assert not left and not making.is_due


def serving(pause_s, num_left):
    """An engine that runs, its programs made by a clock that only they move, and those that are
    left."""
    clock, left = Clock(), [1.0] * num_left

    def make_next():
        if left:
            clock.now_s += left.pop()
            return True
        return False

    engine = make_engine(random_model("qwen3"), max_batch=1)
    engine.programs = dataclasses.replace(engine.programs, making=Making(make_next, clock, pause_s))
    engine.programs.making.begin()
    engine.start()
    return engine, left


def ask(engine, name):
    """Wait for an answer."""
    ended = threading.Event()
    request = request_of(name, [5, 6, 7], 3)
    engine.inbox.submit(request, lambda output: output.finish_reason and ended.set())
    assert ended.wait(20)


def test_a_client_that_asks_again_at_once_waits_for_no_program():
    """But for those that are due in a fiftieth of the time, whoever waits: here the first."""
    engine, left = serving(pause_s=60.0, num_left=20)
    try:
        for number in range(8):
            ask(engine, str(number))
            time.sleep(0.01)  # the engine has nothing to do meanwhile
        assert len(left) == 19
    finally:
        engine.stop()


def test_a_server_that_nobody_has_asked_for_a_moment_makes_all_programs():
    engine, left = serving(pause_s=0.01, num_left=20)
    try:
        ask(engine, "a")
        until_s = time.monotonic() + 20
        while not engine.programs.making.is_over:
            assert time.monotonic() < until_s, f"{len(left)} are left"
            time.sleep(0.005)
        assert not left
        ask(engine, "b")
    finally:
        engine.stop()


def test_a_device_that_cannot_make_more_goes_on_with_what_there_is(caplog):
    def fails():
        raise RuntimeError("out of memory")

    making = Making(fails)
    making.begin()

    assert making.make()
    assert not making.make() and not making.is_due
    assert "cannot be made" in caplog.text


def test_a_k_is_used_once_all_its_programs_are_made():
    later = Later([1, 2], 3, 0)
    later.leave(1, lambda size, k: [(size, k, "greedy"), (size, k, "sampled")])
    assert later.num_left == 8 and later.made_draft(1) == later.made_draft(2) == 1

    order = []
    while later.next is not None:
        order.append((later.next, later.made_draft(1), later.made_draft(2)))
        later.was_made()

    assert order[0] == ((1, 2, "greedy"), 1, 1)
    assert order[1] == ((1, 2, "sampled"), 1, 1)
    assert order[2] == ((2, 2, "greedy"), 2, 1)
    assert order[4] == ((1, 3, "greedy"), 2, 2)
    assert later.made_draft(1) == later.made_draft(2) == 3 and later.is_empty


def test_without_programs_nothing_is_left():
    """As of a server that has no drafters."""
    later = Later([1, 2], 3, 0)
    later.leave(1, lambda size, k: [])

    assert later.is_empty and later.next is None and later.num_left == 0


def test_programs_of_the_size_that_batches_have_are_made_first():
    later = Later([1, 2, 4], 3, 0)
    later.leave(1, lambda size, k: [(size, k)])
    later.prefer(4)
    order = []
    while later.next is not None:
        order.append(later.next)
        later.was_made()
        if len(order) == 2:
            assert [later.made_draft(size) for size in (1, 2, 4)] == [1, 1, 3]
            assert later.size_for(1, 3) == later.size_for(2, 2) == 4, "where a batch is padded to"
            assert later.size_for(1, 1) == 1
            later.prefer(2)

    assert order == [(4, 2), (4, 3), (2, 2), (2, 3), (1, 2), (1, 3)]


def test_programs_that_score_are_made_last_and_bound_only_those_who_ask():
    later = Later([1, 2], 2, 1)
    later.leave(0, lambda size, k: [(size, k, "scored")], are_scored=True)
    later.leave(1, lambda size, k: [(size, k)])
    assert (later.made_draft(2), later.made_draft(2, is_scored=True)) == (1, 0)

    order, timed = [], []
    while later.next is not None:
        order.append(later.next)
        timed.append(later.was_made())

    assert order == [(1, 1, "scored"), (2, 1, "scored"), (1, 2), (2, 2)]
    assert timed == [False, False, True, True], "drafting is timed by programs that do not score"
    assert (later.made_draft(2), later.made_draft(2, is_scored=True)) == (2, 1)


class Eager(RandomPolicy):
    """Drafts as much as it may, and notes how much that was."""

    def __init__(self):
        super().__init__()
        self.most = []

    def plan(self, obs):
        self.most.append(obs.max_draft)
        return Decision("suffix", obs.max_draft, 1.0, False, "eager")


@pytest.mark.parametrize("overlaps", [False, True])
def test_requests_decode_alike_while_programs_are_made(overlaps):
    """Drafts grow while the requests run, and the tokens stay the same."""
    requests = [request_of(str(i), [5, 6, 7, 5, 6, 7, 5, 6 + i], 40) for i in range(2)]
    wanted = run(make_engine(random_model("qwen3"), max_batch=2, overlaps=overlaps), requests)

    policy = Eager()
    engine = make_engine(random_model("qwen3"), policy=policy, max_batch=2, overlaps=overlaps)
    programs = engine.programs
    programs.rounds.leave_for_later(0)
    num_left = programs.rounds.num_left
    programs.making._clock = lambda: 0.0  # making takes no time, so one is due at every step
    programs.making.begin()
    found = run(engine, requests)

    assert programs.rounds.num_left < num_left
    assert policy.most[0] == 1 and max(policy.most) >= 2
    for key, collected in wanted.items():
        assert found[key].token_ids == collected.token_ids


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_batch_of_a_size_without_programs_of_its_k_is_padded(overlaps):
    """As after requests that ended once K was chosen: only batches of three have drafts of 2."""
    requests = [request_of(str(i), [5, 6, 7, 5, 6, 7, 5, 6 + i], 8 + 8 * i) for i in range(3)]
    wanted = run(make_engine(random_model("qwen3"), max_batch=3, overlaps=overlaps), requests)

    policy = FixedPolicy("eagle3", 2)
    engine = make_engine(random_model("qwen3"), policy=policy, max_batch=3, overlaps=overlaps)
    rounds = engine.programs.rounds
    rounds.leave_for_later(0)
    rounds._later.prefer(3)
    while rounds._later.made_draft(3) < 2:
        rounds._later.was_made()
    rounds.most_draft = lambda batch: 2
    launched, program = [], rounds._program
    rounds._program = lambda key: launched.append(key) or program(key)
    found = run(engine, requests)

    drafted = [key.size for key in launched if key.num_draft == 2]
    assert len(drafted) > 8 and set(drafted) == {3}
    for key, collected in wanted.items():
        assert found[key].token_ids == collected.token_ids


def test_a_request_with_log_probabilities_takes_no_longer_drafts_than_are_made():
    engine = make_engine(random_model("qwen3"), policy=Eager())
    rounds = engine.programs.rounds
    rounds.leave_for_later(2, 1)

    run(engine, [request_of("a", [5, 6, 7, 5, 6, 7], 20, logprobs=2)])
    assert max(engine.policy.most) == 1

    engine.policy.most.clear()
    run(engine, [request_of("b", [5, 6, 7, 5, 6, 7], 20)])
    assert max(engine.policy.most) == 2


def test_looking_through_programs_meets_each_that_is_made_and_no_request():
    engine = make_engine(random_model("qwen3"), max_batch=2)
    wanted = run(engine, [request_of("a", [5, 6, 7], 8)])
    programs = engine.programs
    made, capture = [], programs.graphs.capture

    with torch.inference_mode():
        works = programs._works()
        for work in works:
            work()
    programs.graphs.capture = lambda work: made.append(work) or capture(work)
    with torch.inference_mode():
        for one in (programs.prefill, *programs.drafting.neural.values(), programs.rounds):
            one._programs.clear()
            one.capture_all()

    def called(each):
        return sorted((work.func.__qualname__, *map(repr, work.args)) for work in each)

    scoring = [work for work in made if any(getattr(key, "is_scored", False) for key in work.args)]
    assert scoring, "they launch the kernels of the same program that does not score"
    others = [work for work in made if work not in scoring]
    assert called(work.args[0] for work in works) == called(others)
    twins = {work.args[0]._replace(is_scored=False) for work in scoring}
    assert twins <= {work.args[0] for work in others}
    assert run(engine, [request_of("b", [5, 6, 7], 8)])["b"].token_ids == wanted["a"].token_ids
