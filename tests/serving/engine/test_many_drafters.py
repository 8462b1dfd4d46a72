"""An engine holds any number of drafters. Each drafts as if it were alone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from drafters.eagle3.model import Eagle3, config_for_target
from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from policies.interface import Decision
from serving.capture.rounds import round_columns
from serving.engine.loop import Engine, Listeners

PROMPTS = [list(range(3 * i, 40)) for i in range(4)]


class Turns(RandomPolicy):
    """Plays a list of (drafter, K) over and over."""

    def __init__(self, *arms):
        self.arms = itertools.cycle(arms)

    def plan(self, obs):
        drafter, k = next(self.arms)
        return Decision(drafter, min(k, obs.max_draft), 1.0, False, "test")


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3")


def second_for(model):
    """Reads one layer, which the first drafter does not read."""
    module = Eagle3(config_for_target(model.config, layer_ids=(3,)))
    module.initialise(7, model.get_output_embeddings().weight)
    return module


def drafts_by(kind, model, policy, **drafters):
    """(request, anchor) -> draft of a drafter, and all answers."""
    drafts = {}

    def keep(sequence):
        for one in round_columns(sequence.rounds):
            if one.drafter == kind:
                drafts[sequence.request.id, one.anchor] = one.draft_ids

    engine = make_engine(copy.deepcopy(model), policy=policy, suffix=False, **drafters)
    engine = Engine(engine.parts, policy, Listeners(on_finished=keep))
    got = run(engine, [request_of(str(i), p, 30) for i, p in enumerate(PROMPTS)])
    return drafts, {name: collected.token_ids for name, collected in got.items()}


def test_two_neural_drafters_draft_as_each_does_alone(model):
    """Rounds of the one leave rows of the other to be caught up on."""
    first = Eagle3(config_for_target(model.config, layer_ids=(1, 2)))
    first.initialise(1, model.get_output_embeddings().weight)
    beside, answers = drafts_by(
        "second", model, Turns(("eagle3", 2), ("second", 3), ("none", 0)),
        drafter=copy.deepcopy(first), second=second_for(model),
    )  # fmt: skip
    alone, expected = drafts_by(
        "eagle3", model, Turns(("eagle3", 3), ("none", 0)), drafter=second_for(model)
    )

    assert answers == expected
    common = [at for at in beside.keys() & alone.keys() if len(beside[at]) == len(alone[at])]
    assert len(common) > 10
    assert all(beside[at] == alone[at] for at in common)


def test_answers_do_not_depend_on_which_of_three_drafts(model):
    plain = copy.deepcopy(model)
    engine = make_engine(copy.deepcopy(model), second=second_for(model))

    got = run(engine, [request_of(str(i), p, 30) for i, p in enumerate(PROMPTS)])

    assert {drafter for drafter, _ in engine.figures().steps_by_arm} > {"eagle3", "second"}
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            wanted = plain.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
        assert got[str(index)].token_ids == wanted[0, len(prompt) :].tolist()
