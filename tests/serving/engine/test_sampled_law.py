"""Sampled output follows the target's distribution through the whole engine, whoever drafts.

The joint law of the first three tokens (8 x 8 x 8 cells), and of two in succession, is computed
from the target and compared by chi-squared at p = 1e-9 with what the engine emitted, in two
regimes: a drafter close to the target and one opposed to it. Planted bugs must be seen, or the test
protects nothing.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import specops.verify
import specops.verify_logits
from drafters.eagle3.model import Eagle3, config_for_target
from oracles.engines import make_engine, random_model, request_of, run
from oracles.joint_law import law_excess
from oracles.plain_reference import adjusted
from specops.sampling import distribution, sampling_rows
from specops.verify import Verdict
from specops.verify_logits import Rule

V, LENGTH, PROMPT = 8, 3, [1, 5]
NUM_SAMPLES = 3_000
SHAPES = {
    "whole": {"temperature": 1.0},
    "truncated": {"temperature": 1.4, "top_k": 6, "top_p": 0.95, "min_p": 0.02},
}

PENALIZED = {
    "temperature": 1.0,
    "presence_penalty": 0.8,
    "frequency_penalty": -1.1,
    "repetition_penalty": 1.4,
    "logit_bias": ((2, 1.5), (6, -2.0)),
}


def soft_target(regime):
    """Random, its logits scaled down: to nearly uniform where the drafter shall be close."""
    model = random_model("qwen3", vocab_size=V, seed=3)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.2 if regime == "close" else 0.5)
    return model


def drafter_for(model, regime):
    """What the target predicted one token earlier (``close``), or its negative (``opposed``)."""
    module = Eagle3(config_for_target(model.config, layer_ids=(4,)))
    module.initialise(0)
    with torch.no_grad():
        module.fc.weight.copy_(torch.eye(len(module.fc.weight)))
        module.o_proj.weight.zero_()
        module.down_proj.weight.zero_()
        module.norm.weight.copy_(model.model.norm.weight)
        sign = 1.0 if regime == "close" else -1.0
        module.lm_head.weight.copy_(sign * model.lm_head.weight)
    return module


def expected_law(model, shape):
    """[V, V, V] probability of the first three tokens, from the target alone."""
    rows = sampling_rows(
        [shape["temperature"]],
        [shape.get("top_k")],
        [shape.get("top_p", 1.0)],
        [shape.get("min_p", 0.0)],
        V,
        dtype=torch.float64,
    )

    @torch.no_grad()
    def law_after(context):
        logits = model(torch.tensor([PROMPT + context])).logits[0, -1].double()
        wanted = adjusted(
            logits.tolist(),
            PROMPT,
            context,
            shape.get("presence_penalty", 0.0),
            shape.get("frequency_penalty", 0.0),
            shape.get("repetition_penalty", 1.0),
            dict(shape.get("logit_bias", ())),
        )
        return distribution(torch.tensor([[wanted]], dtype=torch.float64), rows)[0, 0]

    first = law_after([])
    second = torch.stack([law_after([a]) for a in range(V)])
    third = torch.stack([torch.stack([law_after([a, b]) for b in range(V)]) for a in range(V)])
    return first[:, None, None] * second[:, :, None] * third


@cache
def law_of(regime, shape):
    """``expected_law`` of the soft target, by the names of both; 0.1 s."""
    return expected_law(soft_target(regime), SHAPES[shape])


def counted(answers):
    """How often [V, V, V] the answers of ``run`` began with each three tokens."""
    counts = torch.zeros(V, V, V, dtype=torch.float64)
    for collected in answers.values():
        counts[tuple(collected.token_ids[:LENGTH])] += 1
    return counts


def sample(regime, shape, num_samples=NUM_SAMPLES, seed=1, rule=Rule.BLOCK, overlaps=False):
    """Counts [V, V, V] of emitted sequences, and the acceptance rate seen."""
    model = soft_target(regime)
    engine = make_engine(
        model,
        drafter=drafter_for(model, regime),
        max_batch=256,
        num_pages=1200,
        prefill_chunk=1024,
        ring_rows=8192,
        max_draft=3,
        suffix=regime == "close",
        seed=seed,
        rule=rule,
        overlaps=overlaps,
    )
    requests = [
        request_of(str(i), PROMPT, LENGTH + 1, capture=False, **shape) for i in range(num_samples)
    ]
    counts = counted(run(engine, requests))
    figures = engine.figures()
    return counts, figures.num_accepted_tokens / figures.num_draft_tokens


@pytest.mark.parametrize(("regime", "overlaps"), [("close", True), ("opposed", False)])
def test_penalties_shape_the_joint_law_along_the_draft(regime, overlaps):
    law = expected_law(soft_target(regime), PENALIZED)

    counts, _ = sample(regime, PENALIZED, overlaps=overlaps)

    assert law_excess(counts, law) < 1
    without = law_of(regime, "whole")
    assert law_excess(counts, without) > 1, "the penalties change nothing to be seen"


@pytest.mark.parametrize(
    ("regime", "shape", "rule", "overlaps"),
    [
        ("close", "whole", Rule.BLOCK, True),
        ("close", "whole", Rule.STANDARD, False),
        ("close", "truncated", Rule.BLOCK, False),
        ("opposed", "whole", Rule.BLOCK, False),
        ("opposed", "truncated", Rule.BLOCK, True),
        ("opposed", "truncated", Rule.STANDARD, True),
    ],
)
def test_the_joint_law_is_the_targets(regime, shape, rule, overlaps):
    """Every two values meet. All combinations of the first three, without an engine and with more
    samples: ``specops/test_joint_law.py``."""
    law = law_of(regime, shape)

    counts, rate = sample(regime, SHAPES[shape], rule=rule, overlaps=overlaps)

    assert (rate > 0.7) if regime == "close" else (rate < 0.45), f"acceptance {rate:.2f}"
    assert law_excess(counts, law) < 1


def redraw_from_target(p, q, draft, lens, accept_u, next_u):
    """Mutant: after a rejection draw from p, not from what is left of p."""
    right = specops.verify.verify_block(p, q, draft, lens, accept_u, next_u)
    at = torch.arange(len(draft))
    from_p = specops.verify.draw(p[at, right.num_accepted_R], next_u)
    return Verdict(right.num_accepted_R, from_p, right.overlap_RK, right.draft_p_RK)


def reuse_the_uniform(p, q, draft, lens, accept_u, next_u):
    """Mutant: the number that rejected a token also draws its replacement."""
    right = specops.verify.verify_standard(p, q, draft, lens, accept_u, next_u)
    at = torch.arange(len(draft))
    inside = right.num_accepted_R.clamp(max=max(draft.shape[1] - 1, 0))
    used = accept_u[at, inside] if draft.shape[1] else next_u
    return specops.verify.verify_standard(p, q, draft, lens, accept_u, used)


def recompute_q(p, q, draft, lens, accept_u, next_u):
    """Mutant: q of other weights than those that drafted, as after a torn swap."""
    other = q if q is None else q.roll(1, dims=-1)
    return specops.verify.verify_block(p, other, draft, lens, accept_u, next_u)


@pytest.mark.parametrize(
    ("rule", "mutant"),
    [
        (Rule.BLOCK, redraw_from_target),
        (Rule.BLOCK, recompute_q),
        (
            Rule.STANDARD,
            reuse_the_uniform,
        ),  # under ``block`` it moves the law too little to be seen
    ],
)
def test_a_planted_bug_is_seen(monkeypatch, rule, mutant):
    law = law_of("opposed", "whole")
    monkeypatch.setattr(specops.verify_logits, f"verify_{rule.name.lower()}", mutant)

    counts, _ = sample("opposed", {"temperature": 1.0}, num_samples=4_000, rule=rule)

    assert law_excess(counts, law) > 1
