"""Policies of the catalog in the engine: the output stays, and traces say who decided what."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from configs.schema import PolicySettings
from drafters.catalog import kind_of
from oracles.engines import make_engine, random_model, request_of, run
from policies.catalog import CATALOG, build_policy
from serving.capture.rounds import round_columns
from serving.engine.loop import Engine, Listeners


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3")


def requests():
    return [request_of(str(i), [5 + i, *range(2 * i, 20)], 24) for i in range(3)]


@pytest.fixture(scope="module")
def plain(model):
    policy = build_policy(PolicySettings(kind="fixed"), {}, 0, 0)
    done = run(make_engine(model, policy=policy), requests())
    return {name: one.token_ids for name, one in done.items()}


def decoded(model, overlaps, **settings):
    """Tokens of each request, and its rounds."""
    traits = {kind: kind_of(kind).traits for kind in ("eagle3", "suffix")}
    policy = build_policy(PolicySettings(**settings), traits, 0, 8)
    engine = make_engine(model, policy=policy, overlaps=overlaps)
    rounds = {}

    def keep(sequence):
        rounds[sequence.request.id] = tuple(round_columns(sequence.rounds))

    engine = Engine(engine.parts, engine.policy, Listeners(on_finished=keep))
    done = run(engine, requests())
    return {name: one.token_ids for name, one in done.items()}, rounds


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("kind", CATALOG)
def test_every_policy_leaves_the_output_as_it_is_and_signs_its_decisions(
    model, plain, kind, overlaps
):
    tokens, rounds = decoded(model, overlaps, kind=kind)

    assert tokens == plain
    noted = [one for each in rounds.values() for one in each]
    assert {one.policy for one in noted} <= {kind, ""}  # at the last token nobody is asked
    assert sum(one.policy == kind for one in noted) > 0.8 * len(noted)
    assert all(0 < one.propensity <= 1 for one in noted)


@pytest.mark.parametrize("overlaps", [True, False])
def test_rounds_of_one_step_share_its_number_and_decision(model, overlaps):
    _, rounds = decoded(model, overlaps, kind="exp3s", guard=False, exp3s={"mixing": 1.0})

    steps: dict[int, set[tuple[int, float, int]]] = {}
    for each in rounds.values():
        numbers = [one.step for one in each]
        assert numbers == sorted(set(numbers)), "a request has one round in a step"
        for one in each:
            steps.setdefault(one.step, set()).add((one.draft_k, one.propensity, one.batch))
    assert all(len(decisions) == 1 for decisions in steps.values())
    drawn = [k for decisions in steps.values() for k, _, _ in decisions]
    assert len(set(drawn)) >= 5, "every K is as likely"


@pytest.mark.parametrize("overlaps", [True, False])
def test_what_a_policy_notes_is_in_the_rounds_of_its_steps(model, overlaps):
    """Predictions of the default policy; steps of a rest have none."""
    _, rounds = decoded(model, overlaps, kind="goodput")

    noted = [one for each in rounds.values() for one in each if one.notes]
    assert noted
    for one in noted:
        predicted = dict(one.notes)
        assert predicted.keys() == {"goodput.tokens", "goodput.seconds"}
        assert 1 <= predicted["goodput.tokens"] <= one.draft_k + 1
        assert predicted["goodput.seconds"] > 0
        assert one.reason != "rest"


class Counted:
    """A policy that counts which of its methods the engine asks."""

    def __init__(self, policy):
        self._policy = policy
        self.asked = Counter()

    def __getattr__(self, name):
        found = getattr(self._policy, name)
        if not callable(found):
            return found

        def ask(*args, **kwargs):
            self.asked[name] += 1
            return found(*args, **kwargs)

        return ask


@pytest.mark.parametrize("overlaps", [True, False])
def test_requests_that_allow_no_drafts_do_not_pay_for_planning(model, plain, overlaps):
    traits = {kind: kind_of(kind).traits for kind in ("eagle3", "suffix")}
    policy = Counted(build_policy(PolicySettings(kind="goodput"), traits, 0, 8))
    engine = make_engine(model, policy=policy, overlaps=overlaps)

    done = run(engine, [replace(one, max_draft=0) for one in requests()])

    assert {name: one.token_ids for name, one in done.items()} == plain
    assert set(policy.asked) <= {"observe", "figures"}
    assert policy.asked["observe"] > 20, "it learns how long a plain step takes all the same"
    run(engine, [replace(one, id=f"{one.id} again") for one in requests()])
    assert policy.asked["plan"] > 0
