"""MTP heads in the engine: the target's greedy text, and the drafts of training. The law is that of
``test_every_drafter``."""

from __future__ import annotations

import pytest
import torch

from drafters.eagle3.training import ttt_outputs
from drafters.mtp import Mtp, MtpConfig, config_for_target
from oracles.engines import make_engine, random_model, request_of, run
from policies.fixed import FixedPolicy
from tests.serving.capture.test_capture import PROMPT, traces_of
from tests.serving.engine.test_greedy_equality import case
from tests.serving.engine.test_serving_equals_training import drafted_batch

K = 4
VARIANTS = {"order": "mimo", "has_bias": True, "has_head_norms": True, "has_output_gate": True,
            "rotary_dim": 4}  # fmt: skip


def head_for(model, draft_vocab=None, **variants):
    config = config_for_target(model.config, draft_vocab_size=draft_vocab)
    head = Mtp(MtpConfig.from_json(config.to_json() | variants))
    head.initialise(1)
    head.target_norm.weight.data.copy_(model.model.norm.weight)
    if draft_vocab:
        head.d2t += torch.arange(draft_vocab)  # draft id i is target id 2 i
    return head.requires_grad_(False)


def scramble(engine, step):
    """New random weights, in place, every third step, as a swap does."""
    if step % 3 == 0:
        drafter = engine.drafting.neural["mtp"].drafter
        generator = torch.Generator().manual_seed(step)
        for parameter in drafter.module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        drafter.version += 1


@pytest.mark.parametrize(
    ("architecture", "seed", "overlaps", "draft_vocab", "variants"),
    [
        ("qwen3", 0, False, None, {}),
        ("llama", 1, True, 40, {}),
        ("gemma3", 2, True, None, VARIANTS),
    ],
)
def test_output_equals_generate_with_swaps_in_the_middle(
    architecture, seed, overlaps, draft_vocab, variants
):
    requests, expected, sizes = case(architecture, seed)
    model = random_model(architecture, seed=seed)
    head = head_for(model, draft_vocab, **variants)
    engine = make_engine(model, drafter=head, overlaps=overlaps, **sizes)

    got = run(engine, requests, scramble)

    for request, answer in zip(requests, expected, strict=True):
        assert got[request.id].token_ids == answer, f"request {request.id}"
    assert any(arm[0] == "mtp" for arm in engine.figures().steps_by_arm)


@torch.no_grad()
def training_logits(module, target, trace, one):
    """[K, Vd] logits of the chain that a round drafted, as training computes them."""
    at, batch = torch.tensor([one.anchor]), drafted_batch(trace, one)
    first, *later = ttt_outputs(module, target.embed.weight, batch, at, len(one.draft_ids))
    rows = torch.cat((first[one.anchor][None], *later))
    return module.head_input(rows) @ module.head_weight(target.lm_head.weight).T


@pytest.mark.parametrize(
    ("overlaps", "draft_vocab", "variants"),
    [(False, None, {}), (True, 40, {}), (True, None, VARIANTS)],
)
def test_draft_logits_of_serving_and_training_are_equal(
    monkeypatch, overlaps, draft_vocab, variants
):
    model = random_model("qwen3")
    engine = make_engine(
        model, policy=FixedPolicy("mtp", K), suffix=False, prefill_chunk=7, overlaps=overlaps,
        drafter=head_for(model, draft_vocab, **variants),
    )  # fmt: skip
    drafter, seen = engine.drafting.neural["mtp"].drafter, []
    logits, observe = drafter._logits, drafter.observe
    monkeypatch.setattr(
        drafter, "_logits", lambda *a: (seen.append(logits(*a)[0].clone()), logits(*a))[1]
    )
    # The log holds bfloat16: let serving read the very numbers that training will.
    monkeypatch.setattr(
        drafter, "observe", lambda ids, rows, at: observe(ids, rows.bfloat16().float(), at)
    )
    trace = traces_of(engine, [request_of("a", PROMPT, 40)])[0]["a"]
    target = engine.programs.target

    compared = passes = 0
    for one in trace.rounds:
        if one.draft_ids:
            want = training_logits(drafter.module, target, trace, one)
            for step in range(len(want)):
                torch.testing.assert_close(seen[passes + step], want[step], atol=1e-4, rtol=0)
            compared += len(want)
        passes += one.draft_k if one.draft_ids else 0
    assert compared >= 60
