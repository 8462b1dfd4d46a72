"""The comparison's own arithmetic, and that the peers it builds compute the target's answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness.shapes import SHAPES
from benchmarks.peers.__main__ import Row, agreement, attempt
from benchmarks.peers.compiled_loop import CompiledLoop
from benchmarks.peers.decoders import Generate, Work, first_layers, static_cache
from benchmarks.peers.steps import GenerateSteps, LoopSteps, OurSteps, Past, random_model
from oracles.engines import random_model as made_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    """Large weights: what a position sees decides its token."""
    torch.manual_seed(0)
    model = random_model(SHAPES["tiny"](), CPU)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)
    return model


def test_a_token_counts_as_equal_up_to_the_first_difference() -> None:
    plain = [[[1, 2, 3, 4], [5, 6, 7, 8]]]
    other = [[[1, 2, 9, 4], [5, 6, 7, 8]]]

    assert agreement(plain, other) == {"equal_prompts": 0.5, "equal_tokens": 6 / 8}


def test_turns_that_only_one_decoder_took_are_not_compared() -> None:
    plain = [[[1, 2]], [[3, 4]]]

    assert agreement(plain, [[[1, 2]]]) == {"equal_prompts": 1.0, "equal_tokens": 1.0}


def test_an_error_is_the_rows_result() -> None:
    row = Row("peer", 1, "")

    def fail() -> None:
        raise RuntimeError("no such kernel")

    assert not attempt(row, fail)
    assert row.figures(8, None)["error"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_simple_loop_answers_as_generate_does(model: Any, kind: str) -> None:
    model = model if kind == "qwen3" else made_model(kind)
    prompts = [[3, 41, 59, 26, 5], [35, 9, 61, 23, 34]]
    work = Work(batch=2, num_prompt=5, num_new=12)
    loop = CompiledLoop(model, work.batch, work.num_positions)
    loop.prepare()
    peer = Generate(model, "dynamic cache")
    peer.open(work)

    for _ in range(2):  # the second answer does not see the first one's cache
        assert loop.generate(torch.tensor(prompts), 12) == peer.generate(prompts, 12)


def test_a_kept_static_cache_and_an_assistant_answer_as_generate_does(model: Any) -> None:
    prompts = [[3, 141, 59, 26, 5]]
    work = Work(batch=1, num_prompt=5, num_new=12)
    plain = Generate(model, "dynamic cache")
    static = Generate(model, "static", past_key_values=static_cache(model))
    assisted = Generate(model, "assistant", assistant_model=first_layers(model, 1))
    for decoder in (plain, static, assisted):
        decoder.open(work)

    for _ in range(2):
        want = plain.generate(prompts, 12)
        assert static.generate(prompts, 12) == want
        assert assisted.generate(prompts, 12) == want


def test_all_decoders_continue_alike_from_a_filled_cache(model: Any) -> None:
    past = Past(model.config, batch=2, context=40, num_new=8, like=model.lm_head.weight)
    answers = []
    for steps in (
        OurSteps(model),
        LoopSteps(model, False),
        GenerateSteps(model, True, False),
        GenerateSteps(model, False, False),
    ):
        steps.open(past)
        steps.run()
        steps.rewind()
        answers.append(steps.run())

    assert len({tuple(map(tuple, answer)) for answer in answers}) == 1
    assert len(set(answers[0][0])) > 1, "an answer of one token tells nothing"
