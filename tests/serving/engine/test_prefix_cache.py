"""Cached pages hold what their name says, also those that an answer has filled."""

from __future__ import annotations

import copy

import pytest
import torch

from oracles.engines import make_engine, random_model, request_of, run

PAGE_SIZE = 4


def reference(model, prompt, max_tokens):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", range(8, 8 + PAGE_SIZE))
def test_a_conversation_goes_on_from_the_pages_of_its_answer(length):
    """Where an answer ends within its page decides whether that page is complete."""
    model = random_model("qwen3")
    plain = copy.deepcopy(model)
    engine = make_engine(model, page_size=PAGE_SIZE)
    prompt = list(range(30))
    for turn in range(3):
        answer = run(engine, [request_of(str(turn), prompt, length)])[str(turn)].token_ids
        assert answer == reference(plain, prompt, length)
        prompt = [*prompt, *answer, 1, 2]
