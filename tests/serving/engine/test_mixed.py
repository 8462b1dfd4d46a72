"""Several neural drafters draft in one round, each for some requests: outputs stay the target's,
each drafts as if it were alone, and a request changes drafters at any round."""

from __future__ import annotations

import random

import pytest
import torch

from drafters.protocol import Weights, weights_were_overwritten
from drafters.trainable import trainable
from oracles.engines import RandomPolicy, make_engine, new_weights, random_model, request_of, run
from oracles.joint_law import law_excess
from policies.interface import Decision, Pick
from serving.capture.rounds import round_columns
from serving.engine.loop import Engine, Listeners
from specops.verify_logits import Rule
from tests.serving.engine.test_greedy_equality import random_prompts, reference
from tests.serving.engine.test_sampled_law import (
    LENGTH,
    SHAPES,
    counted,
    expected_law,
    soft_target,
)
from tests.serving.engine.test_sampled_law import PROMPT as LAW_PROMPT

PAIR = ("eagle3", "mtp")
MIX = "eagle3+mtp"


class Mixing(RandomPolicy):
    """A mix at every step, any member for each request."""

    def __init__(self, mix=MIX, k=3, seed=0):
        super().__init__(random.Random(seed))
        self.mix, self.k = mix, k

    def plan(self, obs):
        k = min(self.k, obs.max_draft)
        picks = self.picks(self.mix, obs.batch)
        return Decision(self.mix, k, 0.5, False, "test", "mixing", picks=picks)


def scrambled(engine, step):
    """Overwrites the weights of one drafter and then the other, every second step."""
    if step % 2 == 0:
        torch.manual_seed(step)
        drafters = [rows.drafter for rows in engine.drafting.neural.values()]
        drafter = drafters[step // 2 % len(drafters)]
        with torch.no_grad():
            for parameter in drafter.module.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            weights_were_overwritten(drafter)
        drafter.version += 1


@pytest.mark.parametrize(
    ("kinds", "architecture", "overlaps"),
    [
        (PAIR, "qwen3", True),
        (("draft_model", "dflash"), "gemma3", False),
        (("dflash", "eagle3", "mtp"), "llama", True),
    ],
)
def test_greedy_output_is_the_targets_with_swaps_of_each_in_the_middle(
    kinds, architecture, overlaps
):
    numbers = random.Random(3)
    model = random_model(architecture)
    prompts = random_prompts(numbers, 5, 96)
    expected = [reference(model, prompt, 14) for prompt in prompts]
    engine = make_engine(
        model, kind=kinds[0], beside=dict.fromkeys(kinds[1:]), overlaps=overlaps, max_batch=3,
        prefill_chunk=16, page_size=4,
    )  # fmt: skip

    got = run(engine, [request_of(str(i), p, 14) for i, p in enumerate(prompts)], scrambled)

    assert [got[str(i)].token_ids for i in range(len(prompts))] == expected
    used = {drafter for drafter, _ in engine.figures().steps_by_arm}
    assert used >= {*kinds, "+".join(kinds)}
    assert set(engine.figures().drafters) >= set(kinds)


def few_tokens(kind, model, ids):
    """Weights of a drafter that can only propose some tokens."""
    learns = trainable(kind)
    head = model.get_output_embeddings().weight.detach()
    made = learns.new_model(model.config, head, None, 1, torch.tensor(ids))
    return Weights(0, learns.config_to_json(made), learns.bundle_tensors(made))


@pytest.mark.parametrize(
    ("kinds", "shape", "rule", "is_reduced"),
    [
        (PAIR, "whole", Rule.BLOCK, False),
        (PAIR, "truncated", Rule.STANDARD, True),
        (("dflash", "p_eagle"), "whole", Rule.STANDARD, False),
        (("draft_model", "dflash"), "truncated", Rule.BLOCK, False),
    ],
)
def test_the_joint_law_of_a_mixed_batch_is_the_targets(kinds, shape, rule, is_reduced):
    """Also where the drafters' vocabularies differ."""
    model = soft_target("opposed")
    law = expected_law(model, SHAPES[shape])
    reduced = few_tokens("mtp", model, [0, 2, 3, 5, 7]) if is_reduced else None
    engine = make_engine(
        soft_target("opposed"), kind=kinds[0], beside={kinds[1]: reduced}, suffix=False,
        policy=Mixing("+".join(kinds)), rule=rule, max_batch=256, num_pages=1200,
        prefill_chunk=1024, ring_rows=8192, max_draft=3,
    )  # fmt: skip
    requests = [
        request_of(str(i), LAW_PROMPT, LENGTH + 1, capture=False, **SHAPES[shape])
        for i in range(700)
    ]

    got = run(engine, requests)

    by_drafter = engine.figures().drafters
    assert all(by_drafter[kind].tokens > 200 for kind in kinds)
    assert law_excess(counted(got), law) < 1


def test_a_law_of_the_drafter_that_was_not_picked_is_seen(monkeypatch):
    """A planted bug: the drafts of one drafter, verified with the distributions of the other."""
    from serving.engine import mixed_rows

    take = mixed_rows._of_picked
    monkeypatch.setattr(
        mixed_rows,
        "_of_picked",
        lambda found, picked_R: take(found, 1 - picked_R if found[0].dim() == 3 else picked_R),
    )
    law = expected_law(soft_target("opposed"), SHAPES["whole"])
    engine = make_engine(
        soft_target("opposed"), kind="eagle3", beside={"mtp": None}, policy=Mixing(),
        suffix=False, max_batch=256, num_pages=1200, prefill_chunk=1024, ring_rows=8192,
        max_draft=3,
    )  # fmt: skip

    got = run(
        engine,
        [
            request_of(str(i), LAW_PROMPT, LENGTH + 1, capture=False, **SHAPES["whole"])
            for i in range(700)
        ],
    )

    assert law_excess(counted(got), law) > 1


def rounds_of(model, policy, kinds, weights):
    """(request, anchor) -> round, and all answers."""
    found = {}

    def keep(sequence):
        for one in round_columns(sequence.rounds):
            found[sequence.request.id, one.anchor] = one

    engine = make_engine(
        model, kind=kinds[0], weights=weights[kinds[0]],
        beside={kind: weights[kind] for kind in kinds[1:]}, policy=policy, suffix=False,
    )  # fmt: skip
    for version, rows in enumerate(engine.drafting.neural.values(), start=3):
        rows.drafter.version = version
    engine = Engine(engine.parts, policy, Listeners(on_finished=keep))
    prompts = [list(range(3 * i, 40)) for i in range(4)]
    got = run(engine, [request_of(str(i), p, 28) for i, p in enumerate(prompts)])
    return found, {name: collected.token_ids for name, collected in got.items()}


class Wandering(Mixing):
    """The mix, its members alone and plain steps in turn."""

    def plan(self, obs):
        arm = obs.step % 5
        if arm < 3:
            return super().plan(obs)
        kind = PAIR[arm - 3] if obs.step % 2 else "none"
        return Decision(kind, 0 if kind == "none" else 3, 1.0, False, "test", "mixing")


@pytest.fixture(scope="module")
def wandering():
    """Rounds of requests that change drafters mid-answer, and of each drafter alone."""
    weights = {kind: new_weights(kind, random_model("qwen3")) for kind in PAIR}
    mixed = rounds_of(random_model("qwen3"), Wandering(), PAIR, weights)
    alone = {
        kind: rounds_of(random_model("qwen3"), Mixing(kind), (kind,), weights) for kind in PAIR
    }
    return mixed, alone


@pytest.mark.parametrize("kind", PAIR)
def test_a_request_that_changes_drafters_gets_the_drafts_of_each_alone(wandering, kind):
    (mixed, answers), alone = wandering[0], wandering[1]
    rounds, expected = alone[kind]

    assert answers == expected
    common = [
        at
        for at in mixed.keys() & rounds.keys()
        if mixed[at].drafter == kind and len(mixed[at].draft_ids) == len(rounds[at].draft_ids)
    ]
    assert len(common) > 10
    assert all(mixed[at].draft_ids == rounds[at].draft_ids for at in common)


def test_every_round_says_who_drafted_with_which_version_and_why(wandering):
    mixed, _ = wandering[0]
    picked = [one for one in mixed.values() if one.reason == "try"]

    assert {one.drafter for one in picked} == set(PAIR)
    assert {(one.drafter, one.version) for one in mixed.values()} == {
        ("eagle3", 3), ("mtp", 4), ("none", 3),
    }  # fmt: skip
    assert {one.propensity for one in picked} == {0.25}
    assert {one.reason for one in mixed.values()} == {"try", "test"}
    assert {one.policy for one in mixed.values()} == {"mixing"}


def test_drafters_of_both_sorts_cannot_be_mixed():
    from serving.engine.mixed_rows import MixedRows

    rows = list(make_engine(random_model("qwen3"), kind="eagle3").drafting.neural.values())

    class Undrawn:
        kind, draws = "undrawn", False

    with pytest.raises(ValueError, match=r"a\+b: drafters that draw.*drafter\.mixed to false"):
        MixedRows("a+b", [*rows, Undrawn()], 96)


def test_records_are_kept_of_each_drafter_and_none_without_a_mix():
    seen = []

    class Watching(Mixing):
        def plan(self, obs):
            seen.append(obs.records)
            return super().plan(obs)

    engine = make_engine(random_model("qwen3"), kind="eagle3", beside={"mtp": None},
                         policy=Watching(), suffix=False)  # fmt: skip
    run(engine, [request_of("0", list(range(20)), 30)])
    last = seen[-1][0]

    assert set(last) == set(PAIR)
    for record in last.values():
        assert 0 < record.num_rounds < 32
        assert record.num_verified == pytest.approx(3 * record.num_rounds, rel=0.2)
        assert 0 <= record.num_accepted <= record.num_verified

    seen.clear()
    alone = make_engine(random_model("qwen3"), kind="eagle3", policy=Watching("eagle3"))
    run(alone, [request_of("0", list(range(20)), 5)])
    assert set(seen) == {None}


def test_a_pick_of_somebody_else_is_a_mistake_that_is_named():
    engine = make_engine(random_model("qwen3"), kind="eagle3", beside={"mtp": None})
    with pytest.raises(KeyError, match="dflash"):
        engine.drafting.mixes[MIX].number_of(Pick("dflash", 1.0, "best").drafter)
