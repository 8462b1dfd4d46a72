"""Forced acceptance by weights: the target walks a cycle, the drafter knows a part of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.engines import engine_of
from benchmarks.harness.loops import answer_all
from benchmarks.harness.predictable import (
    CYCLE,
    FIRST_TOKEN,
    MISSES,
    expected_tokens_per_step,
    is_continuation,
    make_target_predictable,
    prompts,
)
from benchmarks.harness.shapes import SHAPES, random_weights
from policies.fixed import FixedPolicy

CPU = torch.device("cpu")
NUM_TOKENS = 2 * CYCLE


def test_four_drafts_emit_three_tokens_and_fewer_drafts_what_independent_tokens_would():
    assert expected_tokens_per_step(4) == pytest.approx(3, abs=0.01)
    for draft_k in (0, 1, 2, 3):
        independent = sum(0.74**n for n in range(draft_k + 1))
        assert expected_tokens_per_step(draft_k) == pytest.approx(independent, abs=0.03)


def test_only_the_walk_from_the_last_token_is_a_continuation():
    last = FIRST_TOKEN + CYCLE - 2

    assert is_continuation(last, [last + 1, FIRST_TOKEN, FIRST_TOKEN + 1])
    assert not is_continuation(last, [last + 1, FIRST_TOKEN, FIRST_TOKEN])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "num_layers"), [("tiny", 4), ("Qwen3-0.6B", 3)])
@torch.inference_mode()
def test_every_token_of_the_cycle_is_followed_by_the_next(shape, num_layers, dtype):
    config = SHAPES[shape]()
    config.num_hidden_layers, config.vocab_size = num_layers, 512
    config.layer_types = config.layer_types[:num_layers]
    model = random_weights(config, CPU, dtype)
    make_target_predictable(model)
    walked = torch.arange(FIRST_TOKEN, FIRST_TOKEN + CYCLE)[None]

    following = model(walked).logits.argmax(dim=-1)

    assert following.tolist() == walked.roll(-1, dims=1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_accepts_what_the_cycle_says_and_answers_as_the_target(temperature):
    chosen = ["engine.max_batch=2", "engine.max_model_len=256", "drafter.max_draft=4"]
    with engine_of("tiny", CPU, chosen, num_versions=1, is_predictable=True) as built:
        asked = [tuple(ids) for ids in prompts(2, 24, built.engine.inbox.limits.vocab_size)]
        built.policy.play(FixedPolicy("eagle3", 4))
        turn = answer_all(
            built.engine, asked, NUM_TOKENS, fields_of=lambda _: {"temperature": temperature}
        )

    for prompt, answer in zip(asked, turn.answers, strict=True):
        assert is_continuation(prompt[-1], answer.tokens)
    full = [step for step in built.policy.steps if step.batch == 2]
    emitted = sum(step.tokens_per_request for step in full) / len(full)
    assert emitted == pytest.approx(expected_tokens_per_step(4), abs=0.25)
    assert any(step.num_accepted == 0 for step in full) or len(MISSES) == 0
