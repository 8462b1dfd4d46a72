"""The index continues the matches that the policy in charge has seen kept."""

from __future__ import annotations

import pytest

from configs.schema import PolicySettings
from drafters.catalog import kind_of
from drafters.suffix.kinds import KINDS, PRIOR_ACCEPTANCE, Kind
from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from policies.catalog import build_policy
from policies.interface import Decision, Outcome, RowOutcomes

HERE, THERE = Kind(True, "alone", 1), Kind(False, "alone", 6)


def number(kind):
    return 1 + KINDS.index(kind)


def policy_of(kind="goodput", drafters=("suffix",)):
    return build_policy(PolicySettings(kind=kind), {k: kind_of(k).traits for k in drafters}, 0, 8)


def taught(kept):
    """A policy that has seen 40 drafts of four tokens after matches of each kind."""
    policy = policy_of()
    for kind, num_accepted in kept.items():
        for _ in range(40):
            decision = Decision("suffix", 4, 1.0, explore=False, reason="goodput")
            rows = RowOutcomes((4,), (num_accepted,), (number(kind),))
            policy.observe(Outcome(decision, 1, rows, 0.01, 0.0, has_prefill=False, version=0))
    return policy


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3")


@pytest.fixture
def drafting(model):
    """Of an engine whose index holds a request with a match in its own text and a longer one in
    finished text."""
    drafting = make_engine(model).drafting
    index = drafting.hosts["suffix"]
    index.begin("done", [9, 8, 7, 1, 2, 3, 40])
    index.finish("done", keep=True)
    index.begin("runs", [2, 3, 50, 0, 9, 8, 7, 1, 2, 3])
    return drafting


def draft(drafting):
    return drafting.hosts["suffix"].propose(["runs"], [1])[0]


def test_a_match_is_continued_as_long_as_its_kind_is_kept(drafting):
    assert draft(drafting) == [50]
    drafting.rank_matches(taught({HERE: 0, THERE: 4}))
    assert draft(drafting) == [40]
    drafting.rank_matches(taught({HERE: 4, THERE: 0}))
    assert draft(drafting) == [50]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"kind": "fixed"}, id="values no matches"),
        pytest.param({"drafters": ("eagle3",)}, id="does not use the index"),
    ],
)
def test_where_a_policy_knows_nothing_of_the_index_its_priors_decide(drafting, other):
    drafting.rank_matches(taught({HERE: 0, THERE: 4}))
    drafting.rank_matches(policy_of(**other))
    assert draft(drafting) == [50]


class Changing(RandomPolicy):
    """Looks at every step, and values matches differently each time."""

    def __init__(self):
        super().__init__()
        self.values = None

    def match_values(self, drafter):
        self.values = [self.numbers.random() for _ in PRIOR_ACCEPTANCE]
        return self.values


@pytest.mark.parametrize("overlaps", [True, False])
def test_an_engine_tells_its_index_before_every_look(model, overlaps, monkeypatch):
    policy = Changing()
    engine = make_engine(model, policy=policy, overlaps=overlaps)
    index, told = engine.drafting.hosts["suffix"], []
    look = index.observe

    def observe(keys):
        told.append(index._values.tolist() == policy.values)
        return look(keys)

    monkeypatch.setattr(index, "observe", observe)
    run(engine, [request_of(str(i), [5, 6, 7, 5, 6, 7 + i], 40) for i in range(2)])

    assert len(told) > 3
    assert all(told)
