"""Programs with the fused drafter draft what those with its module draft, and answer the same."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch

from drafters.eagle3.model import Eagle3, config_for_target
from drafters.protocol import weights_were_overwritten
from oracles.engines import make_engine, new_weights, random_model, request_of, run
from policies.fixed import FixedPolicy
from serving.capture.rounds import round_columns
from serving.engine.loop import Listeners


def reduced_drafter(model, draft_vocab):
    drafter = Eagle3(config_for_target(model.config, draft_vocab_size=draft_vocab))
    drafter.initialise(1)
    assert drafter.d2t is not None
    drafter.d2t += torch.arange(draft_vocab)  # draft id i is target id 2 i
    return drafter


def decoded(
    fuse_drafter,
    num_draft,
    draft_vocab=None,
    swap=lambda _engine, _step: None,
    kind="eagle3",
    device="cpu",
    **sampling,
):
    """Answers, and drafts of every round, of prompts long enough to be cut into chunks."""
    model = random_model("qwen3", head_dim=16)
    weights = None if kind == "eagle3" else new_weights(kind, model)
    model.to(device)
    drafts = {}

    def keep(sequence):
        rounds = [(r.anchor, r.draft_ids, r.num_accepted) for r in round_columns(sequence.rounds)]
        drafts[sequence.request.id] = rounds

    engine = make_engine(
        model,
        policy=FixedPolicy(kind, num_draft),
        max_batch=4,
        prefill_chunk=32,
        suffix=False,
        drafter=reduced_drafter(model, draft_vocab) if draft_vocab else None,
        kind=None if kind == "eagle3" else kind,
        weights=weights,
        fused_drafter=fuse_drafter,
        listeners=Listeners(on_finished=keep),
    )
    assert engine.drafting.neural[kind].drafter.is_fused == fuse_drafter
    numbers = random.Random(3)
    prompts = [[numbers.randrange(96) for _ in range(n)] for n in (1, 5, 20, 50)]
    requests = [request_of(str(i), p, 25 + i, **sampling) for i, p in enumerate(prompts)]
    answers = run(engine, requests, swap)
    return prompts, {k: a.token_ids for k, a in answers.items()}, drafts


def scramble(engine, step):
    """New random weights, in place, every second step."""
    if step % 2 == 0:
        generator = torch.Generator().manual_seed(step)
        (rows,) = engine.drafting.neural.values()
        drafter = rows.drafter
        for parameter in drafter.module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        weights_were_overwritten(drafter)


AXES = (1, 4), (None, 40), (False, True), ("greedy", "seeded")
"""Number of draft tokens, size of a reduced vocabulary, whether weights are swapped, sampling."""


@pytest.mark.parametrize(
    ("num_draft", "draft_vocab", "swaps", "sampling"),
    # Half of all combinations: every three values meet.
    [
        tuple(axis[place] for axis, place in zip(AXES, places, strict=True))
        for places in itertools.product((0, 1), repeat=len(AXES))
        if sum(places) % 2 == 0
    ],
)
def test_drafts_equal_those_of_the_module(num_draft, draft_vocab, swaps, sampling):
    sampling = {} if sampling == "greedy" else {"temperature": 0.8, "seed": 3}
    swap = scramble if swaps else lambda _engine, _step: None
    prompts, answers, drafts = decoded(True, num_draft, draft_vocab, swap, **sampling)
    _, want_answers, want = decoded(False, num_draft, draft_vocab, swap, **sampling)

    assert answers == want_answers
    assert drafts == want
    assert any(len(set(ids)) > 1 or num_draft == 1 for one in drafts.values() for _, ids, _ in one)
    if not sampling:
        plain = random_model("qwen3", head_dim=16)
        for index, prompt in enumerate(prompts):
            one = copy.deepcopy(plain).generate(
                torch.tensor([prompt]), max_new_tokens=25 + index, do_sample=False
            )
            assert answers[str(index)] == one[0, len(prompt) :].tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("num_draft", "heat"), [(1, 0), (4, 0), (4, 0.8)])
@pytest.mark.parametrize("kind", ["p_eagle", "dflash", "mtp"])
def test_drafts_of_other_kinds_equal_those_of_their_modules(kind, num_draft, heat, device):
    """With new weights every second step; on a GPU from captured programs."""
    how = {"swap": scramble, "kind": kind, "device": device}
    how |= {"temperature": heat, "seed": 3} if heat else {}
    _, answers, drafts = decoded(True, num_draft, **how)
    _, want_answers, want = decoded(False, num_draft, **how)

    assert answers == want_answers
    assert drafts == want
    assert len({ids for one in drafts.values() for _, ids, _ in one}) > 10


def test_programs_say_why_a_drafter_is_not_fused(caplog):
    model = random_model("qwen3", head_dim=16)
    config = config_for_target(model.config)
    drafter = Eagle3(config).double()
    drafter.initialise(0)

    engine = make_engine(model, drafter=drafter, fused=True)

    assert not engine.drafting.neural["eagle3"].drafter.is_fused
    assert "the drafter's own code computes its layer, which is slower: the weights have" in (
        caplog.text
    )
