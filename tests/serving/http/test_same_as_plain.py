"""Over HTTP: a body with drafts and the same body without are answered alike."""

from __future__ import annotations

import random

import pytest

TEXTS = ("def add(left, right):", "for item in items:", "The drafter", "a a a a a a a a a a")


def body_of(numbers):
    def sometimes(**fields):
        return fields if numbers.random() < 0.4 else {}

    return {
        "temperature": numbers.choice((0, 0.6, 1, 1.3)),
        "seed": numbers.randrange(2**62),
        "max_tokens": numbers.randint(1, 24),
        "n": numbers.choice((1, 1, 3)),
        "return_token_ids": True,
        **sometimes(top_p=numbers.uniform(0.4, 1)),
        **sometimes(top_k=numbers.randint(1, 30)),
        **sometimes(min_p=numbers.uniform(0, 0.3)),
        **sometimes(presence_penalty=numbers.uniform(-2, 2)),
        **sometimes(frequency_penalty=numbers.uniform(-2, 2)),
        **sometimes(repetition_penalty=numbers.uniform(0.5, 2)),
        **sometimes(logit_bias={str(numbers.randrange(288)): numbers.randint(-100, 10)}),
        **sometimes(stop=[numbers.choice("abcdef"), "\x00"]),
        **sometimes(ignore_eos=True),
    }


def question(numbers, is_chat):
    body, text = body_of(numbers), numbers.choice(TEXTS)
    if is_chat:
        log = {"logprobs": True, "top_logprobs": 2} if numbers.random() < 0.4 else {}
        return {**body, **log, "messages": [{"role": "user", "content": text}]}
    log = {"logprobs": 2} if numbers.random() < 0.4 else {}
    return {**body, **log, "prompt": text}


def said(answer):
    """What the client asked for; ``cached_tokens`` says how it was computed."""
    usage = {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"}
    return {"choices": answer["choices"], "usage": usage}


def is_same(one, other):
    """Equal but for the last digits of log probabilities: float32 passes differ in shape."""
    if isinstance(one, float):
        return abs(one - other) < 1e-3
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_random_bodies_are_answered_as_without_drafts(server, path):
    numbers = random.Random(path)
    proposed = 0
    with server.client() as client:
        for number in range(25):
            body = question(numbers, "chat" in path)
            plain = client.post(path, json={**body, "speculation": {"max_draft": 0}})
            drafted = client.post(path, json=body)
            assert (plain.status_code, drafted.status_code) == (200, 200), plain.text
            assert is_same(said(plain.json()), said(drafted.json())), f"body {number}: {body}"
            assert plain.json()["speculation"]["proposed"] == 0
            proposed += drafted.json()["speculation"]["proposed"]
    assert proposed > 100
