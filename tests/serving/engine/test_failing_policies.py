"""A policy that fails costs speed alone: every request gets the text that it gets without one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest

from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from policies.allocation import Allocation, Cut
from policies.fixed import FixedPolicy
from policies.interface import Decision, Pick
from serving.engine.deciding import Deciding


class Notes(NamedTuple):
    value: Any

    def columns(self):
        return {"value": self.value}


class RaisingNote:
    def columns(self):
        raise RuntimeError("no columns")


USUAL = Decision("eagle3", 3, 0.5, False, "usual", "planted")
HEAD = Allocation(Cut("head", cumulative=True), 0.5)
NONSENSE = {
    "no decision": None,
    "K that nothing can run": replace(USUAL, draft_k=99),
    "negative K": replace(USUAL, draft_k=-1),
    "K that is no integer": replace(USUAL, draft_k=2.5),
    "unknown drafter": replace(USUAL, drafter="nobody"),
    "a drafter without a draft": replace(USUAL, draft_k=0),
    "a draft without a drafter": replace(USUAL, drafter="none"),
    "propensity NaN": replace(USUAL, propensity=math.nan),
    "propensity 0": replace(USUAL, propensity=0.0),
    "propensity above 1": replace(USUAL, propensity=1.5),
    "propensity of another type": replace(USUAL, propensity="likely"),
    "picks for other requests": replace(USUAL, picks=(Pick("eagle3", 1.0, "best"),) * 77),
    "a pick of another drafter": replace(USUAL, picks=(Pick("suffix", 1.0, "best"),) * 3),
    "a pick that is impossible": replace(USUAL, picks=(Pick("eagle3", math.nan, "best"),) * 3),
    "a threshold NaN": replace(USUAL, allocation=Allocation(Cut("top", False), math.nan)),
    "a head that is missing": replace(USUAL, allocation=HEAD),
    "a note NaN": replace(USUAL, note=Notes(math.nan)),
    "a note that float32 cannot hold": replace(USUAL, note=Notes(1e300)),
    "a note of text": replace(USUAL, note=Notes("three")),
    "a note that raises": replace(USUAL, note=RaisingNote()),
}


@dataclass
class Planted(RandomPolicy):
    """Decides what it was given, by ``plan`` or by ``rest``."""

    decision: Any = None
    rests: bool = False
    num_asked: int = 0

    def rest(self):
        return self.answer() if self.rests else None

    def plan(self, obs):
        return self.answer()

    def answer(self):
        self.num_asked += 1
        return self.decision


@dataclass
class Raising(RandomPolicy):
    """Raises in one of its methods."""

    at: str = ""
    num_asked: int = 0

    def fail(self, at):
        self.num_asked += self.at == at
        if self.at == at:
            raise RuntimeError(f"{at} fails")

    def rest(self):
        self.fail("rest")
        return super().rest()

    def wants_matches(self):
        self.fail("wants_matches")
        return super().wants_matches()

    def match_values(self, drafter):
        self.fail("match_values")
        return None

    def plan(self, obs):
        self.fail("plan")
        return super().plan(obs)

    def observe(self, outcome):
        self.fail("observe")


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3")


def requests():
    return [request_of(str(i), [5 + i, *range(2 * i, 20)], 24) for i in range(3)]


@pytest.fixture(scope="module")
def plain(model):
    done = run(make_engine(model, policy=FixedPolicy("none", 0)), requests())
    return {name: one.token_ids for name, one in done.items()}


def served(model, policy, overlaps=False):
    engine = make_engine(model, policy=policy, overlaps=overlaps)
    done = run(engine, requests())
    assert {one.last.finish_reason for one in done.values()} == {"length"}
    return {name: one.token_ids for name, one in done.items()}, engine


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("rests", [True, False])
@pytest.mark.parametrize("decision", NONSENSE.values(), ids=NONSENSE)
def test_a_decision_that_cannot_be_used_makes_the_step_plain(
    model, plain, decision, rests, overlaps
):
    if decision is None and rests:
        pytest.skip("resting on nothing is to be asked for a plan")
    policy = Planted(decision=decision, rests=rests)

    tokens, engine = served(model, policy, overlaps)

    assert tokens == plain
    figures = engine.figures()
    assert figures.policy_failures >= 1
    assert figures.num_draft_tokens == 0
    assert policy.num_asked < figures.num_steps / 4, "it is left alone for a while"


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("at", ["rest", "wants_matches", "match_values", "plan", "observe"])
def test_a_policy_that_raises_ends_no_request(model, plain, at, overlaps):
    policy = Raising(at=at)

    tokens, engine = served(model, policy, overlaps)

    assert tokens == plain
    assert policy.num_asked >= 1
    assert engine.figures().policy_failures == policy.num_asked


def test_a_policy_whose_fault_is_over_drafts_again(model):
    policy = Planted(decision=None)
    engine = make_engine(model, policy=policy, overlaps=False)
    run(engine, [request_of("before", list(range(9)), 100)])
    assert engine.figures().num_draft_tokens == 0

    policy.decision = USUAL
    run(engine, [request_of("after", list(range(9)), 150)])

    assert engine.figures().num_draft_tokens > 0


@dataclass
class Asked:
    """Counts how long a policy that always fails is left alone."""

    policy: Any
    deciding: Deciding
    pauses: list[int] = field(default_factory=list)

    def step(self, batch):
        before = self.policy.num_asked
        self.deciding.decide(self.policy, batch, 0)
        if self.policy.num_asked > before:
            self.pauses.append(0)
        else:
            self.pauses[-1] += 1


def test_each_failure_doubles_the_pause_up_to_a_limit(model):
    engine = make_engine(model, overlaps=False)
    policy = Raising(at="rest")
    sequences: list[Any] = []
    engine.inbox.submit(requests()[0], lambda _output: None)
    while not engine.scheduler.running:
        engine.step()
    sequences += engine.scheduler.running
    asked = Asked(policy, engine.deciding)

    for _ in range(16_000):
        asked.step(sequences)

    assert asked.pauses[:8] == [64, 128, 256, 512, 1024, 2048, 4096, 4096]


def test_a_policy_that_is_late_again_and_again_is_left_alone(model):
    engine = make_engine(model, overlaps=False)
    deciding, policy = engine.deciding, Planted(decision=USUAL)
    for seconds in (0.3, 0.3, 0.001, 0.3, 0.3):
        deciding.took(policy, seconds)
    assert deciding.num_failures == 0, "a busy machine may hold up two"

    deciding.took(policy, 0.3)

    assert deciding.num_failures == 1
