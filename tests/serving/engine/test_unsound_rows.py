"""A target that computes NaN or infinity for one request ends that one with an error; a drafter
that does so only drafts badly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from drafters.eagle3.model import Eagle3, config_for_target
from drafters.suffix.traits import REQUEST_TRAITS
from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from policies.fixed import FixedPolicy
from serving.engine.loop import Listeners
from serving.engine.outputs import NOT_FINITE

V, BAD = 96, 95
NEVER = {"logit_bias": ((BAD, -100.0),)}
SHAPES = {
    "greedy": {},
    "seeded": {"temperature": 1.2, "seed": 3, **NEVER},
    "sampled": {"temperature": 1.2, **NEVER},
}
POISONS = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}


def in_turns(*axes):
    """All combinations, with rounds that overlap and others in turn: every two values meet."""
    combinations = [*itertools.product(*(enumerate(axis) for axis in axes))]
    return [
        (*(value for _, value in one), sum(place for place, _ in one) % 2 == 1)
        for one in combinations
    ]


def target(poison=None, token=BAD):
    """A target whose embedding of one token is poisoned; it never emits ``BAD`` itself."""
    model = random_model("qwen3", vocab_size=V)
    with torch.no_grad():
        model.lm_head.weight[BAD] = 0
        model.lm_head.weight[BAD, 0] = 1e-3
        if poison is not None:
            model.model.embed_tokens.weight[token] = poison
    return model


def prompts():
    return {str(n): [(7 * n + i * i) % 90 for i in range(5 + 6 * n)] for n in range(4)}


def neighbours(shape):
    return [request_of(name, prompt, 24, **shape) for name, prompt in prompts().items()]


@pytest.fixture(scope="module")
def alone():
    """Answers of the neighbours without a poisoned request beside them."""
    found = {}
    for name in ("greedy", "seeded"):
        got = run(make_engine(target(), max_draft=0), neighbours(SHAPES[name]))
        found[name] = {n: c.token_ids for n, c in got.items()}
        assert not any(BAD in tokens for tokens in found[name].values())
    return found


@pytest.mark.parametrize(("poison", "shape", "overlaps"), in_turns(POISONS, SHAPES))
def test_a_poisoned_prompt_ends_in_an_error_and_leaves_its_neighbours_alone(
    alone, poison, shape, overlaps
):
    finished = []
    engine = make_engine(
        target(POISONS[poison]),
        max_batch=3,
        num_pages=60,  # so few that the pages of the poisoned request are used again
        overlaps=overlaps,
        listeners=Listeners(on_finished=lambda s: finished.append(s.request.id)),
    )
    bad = [request_of(f"bad {i}", [1, 2, BAD, *range(9 + i)], 20, **SHAPES[shape]) for i in (0, 8)]
    requests = [neighbours(SHAPES[shape])[0], bad[0], *neighbours(SHAPES[shape])[1:], bad[1]]

    got = run(engine, requests)

    for request in bad:
        last = got[request.id].last
        assert (last.finish_reason, last.error_code) == ("error", NOT_FINITE)
        assert "NaN or infinity" in last.error
        assert got[request.id].token_ids == []
    assert sorted(finished) == sorted(prompts())
    assert engine.figures().num_corrupted == 2
    assert {got[name].last.finish_reason for name in prompts()} == {"length"}
    if shape in alone:
        assert {name: got[name].token_ids for name in prompts()} == alone[shape]


@pytest.mark.parametrize(("at", "shape", "overlaps"), in_turns([0, 1, 7], ["greedy", "seeded"]))
def test_what_was_decided_before_the_poison_is_still_delivered(alone, shape, at, overlaps):
    """Whatever is drafted."""
    answer = alone[shape]["2"]
    assert answer[at] not in answer[:at] and answer[at] not in prompts()["2"]
    finished = []
    engine = make_engine(
        target(float("nan"), token=answer[at]),
        policy=RandomPolicy(),
        overlaps=overlaps,
        listeners=Listeners(on_finished=lambda s: finished.append(s.request.id)),
    )
    request = request_of("one", prompts()["2"], 24, **SHAPES[shape])

    got = run(engine, [request])["one"]

    assert got.token_ids == answer[: at + 1]
    assert got.last.finish_reason == "error"
    assert finished == []


def test_an_answer_that_ends_before_the_poison_is_sound():
    """The end token and a NaN in one round."""
    model = target()
    prompt = prompts()["1"]
    answer = run(make_engine(model, max_draft=0), [request_of("a", prompt, 8)])["a"].token_ids
    poisoned = target(float("nan"), token=answer[3])
    engine = make_engine(poisoned)

    got = run(engine, [request_of("a", prompt, 8, stop_token_ids=(answer[3],))])["a"]

    assert got.token_ids == answer[:4]
    assert got.last.finish_reason == "stop"


class Proposes:
    """A host drafter that always proposes the poisoned token."""

    kind, version = "poison", 0
    traits = REQUEST_TRAITS

    def begin(self, key, tokens, namespace=""): ...
    def extend(self, keys, news): ...
    def finish(self, key, keep, num_tokens=None): ...

    def observe(self, keys):
        return [4] * len(keys)

    def propose(self, keys, most):
        return [[3, BAD, 4, BAD][:k] for k in most]


@pytest.mark.parametrize("shape", ["greedy", "seeded"])
def test_a_poisoned_draft_that_is_rejected_changes_nothing(alone, shape):
    """Its keys and values hold NaN and stay behind the text's end, or are seen by drafts alone."""
    policy = FixedPolicy("poison", 4)
    engine = make_engine(
        target(float("nan")), policy=policy, on_request=(Proposes(),), num_pages=80
    )
    requests = [replace(r, drafters=frozenset({"poison"})) for r in neighbours(SHAPES[shape])]

    got = run(engine, requests)

    assert {name: c.token_ids for name, c in got.items()} == alone[shape]
    assert engine.figures().num_draft_tokens > 100


def test_pages_of_a_poisoned_prompt_are_not_cached():
    engine = make_engine(target(float("nan")))
    prompt = [*range(20), BAD, *range(20)]

    for name in ("1", "2"):
        last = run(engine, [request_of(name, prompt, 4)])[name].last
        assert (last.finish_reason, last.num_cached_tokens) == ("error", 0)
    sound = run(engine, [request_of("3", prompt[:20], 4)])["3"].last
    assert (sound.finish_reason, sound.num_cached_tokens) == ("length", 0)


def test_log_probabilities_of_a_poisoned_request_are_an_error_too():
    engine = make_engine(target(float("nan")))
    bad = request_of("bad", [1, BAD, 2], 8, logprobs=3)
    good = request_of("good", [1, 2, 3], 8, logprobs=3)

    got = run(engine, [bad, good])

    assert (got["bad"].last.finish_reason, got["bad"].logprobs) == ("error", [])
    assert len(got["good"].logprobs) == 8
    assert all(entry.logprob <= 0 for entry in got["good"].logprobs)


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_server_complains_after_three_in_a_row_until_one_answer_is_sound(overlaps):
    engine = make_engine(target(float("nan")), overlaps=overlaps)
    soundness = engine._outputs.soundness

    def ask(name, prompt):
        run(engine, [request_of(name, prompt, 4)])
        return soundness.complaint

    assert ask("1", [BAD, 1]) is None
    assert ask("2", [1, BAD]) is None
    assert ask("3", [1, 2]) is None
    assert ask("4", [BAD, 1]) is None
    assert ask("5", [BAD, 1]) is None
    assert "NaN or infinity in the last 3 requests" in ask("6", [BAD, 1])
    assert "NaN or infinity in the last 4 requests" in ask("7", [BAD, 1])
    assert ask("8", [1, 2]) is None
    assert engine.figures().num_corrupted == 6


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(
            lambda m: m.lm_head.weight[3, 5].fill_(float("nan")), id="one NaN in the head"
        ),
        pytest.param(lambda m: m.model.norm.weight[0].fill_(float("nan")), id="the last norm"),
        pytest.param(
            lambda m: m.model.layers[2].mlp.down_proj.weight[0, 0].fill_(float("inf")), id="a layer"
        ),
        pytest.param(
            lambda m: m.model.layers[0].self_attn.v_proj.weight[1].fill_(float("nan")), id="values"
        ),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_damaged_weight_ends_every_request_in_an_error(plant, shape):
    model = target()
    with torch.no_grad():
        plant(model)

    got = run(make_engine(model), neighbours(SHAPES[shape]))

    assert {c.last.error_code for c in got.values()} == {NOT_FINITE}


BROKEN_DRAFTERS = {
    "all weights": lambda d: [p.fill_(float("nan")) for p in d.parameters()],
    "the head": lambda d: d.lm_head.weight.fill_(float("nan")),
    "one row of the head": lambda d: d.lm_head.weight[5].fill_(float("nan")),
    "infinite": lambda d: d.lm_head.weight.fill_(float("inf")),
}


@pytest.mark.parametrize(("broken", "shape", "overlaps"), in_turns(BROKEN_DRAFTERS, SHAPES))
def test_a_broken_drafter_only_drafts_badly(alone, broken, shape, overlaps):
    model = target()
    drafter = Eagle3(config_for_target(model.config))
    drafter.initialise(0)
    with torch.no_grad():
        BROKEN_DRAFTERS[broken](drafter)
    policy = FixedPolicy("eagle3", 3, needs_match=False)
    engine = make_engine(model, drafter=drafter, policy=policy, overlaps=overlaps)

    got = run(engine, neighbours(SHAPES[shape]))

    assert {c.last.finish_reason for c in got.values()} == {"length"}
    assert engine.figures().num_draft_tokens > 0
    if shape in alone:
        assert {name: c.token_ids for name, c in got.items()} == alone[shape]
