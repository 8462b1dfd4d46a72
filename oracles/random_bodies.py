"""Random request bodies for ``/v1/completions`` and ``/v1/chat/completions``, all with a seed, and
the parts of answers that must not depend on drafts."""

from __future__ import annotations

import random
from typing import Any

Body = dict[str, Any]
TEXTS = ("def add(left, right):", "for item in items:", "The drafter", "a a a a a a a a a a")


def question(numbers: random.Random, is_chat: bool, text: str, vocab_size: int) -> Body:
    """A random body with this text as its prompt."""
    body = _sampling(numbers, vocab_size)
    if is_chat:
        log = {"logprobs": True, "top_logprobs": 2} if numbers.random() < 0.4 else {}
        return {**body, **log, "messages": [{"role": "user", "content": text}]}
    log = {"logprobs": 2} if numbers.random() < 0.4 else {}
    return {**body, **log, "prompt": text}


def _sampling(numbers: random.Random, vocab_size: int) -> Body:
    def sometimes(**fields: Any) -> Body:
        return fields if numbers.random() < 0.4 else {}

    return {
        "temperature": numbers.choice((0, 0.6, 1, 1.3)),
        "seed": numbers.randrange(2**62),
        "max_tokens": numbers.randint(1, 24),
        "n": numbers.choice((1, 1, 2, 3)),
        "return_token_ids": True,
        **sometimes(top_p=numbers.uniform(0.4, 1)),
        **sometimes(top_k=numbers.randint(1, 30)),
        **sometimes(min_p=numbers.uniform(0, 0.3)),
        **sometimes(presence_penalty=numbers.uniform(-2, 2)),
        **sometimes(frequency_penalty=numbers.uniform(-2, 2)),
        **sometimes(repetition_penalty=numbers.uniform(0.5, 2)),
        **sometimes(logit_bias={str(numbers.randrange(vocab_size)): numbers.randint(-100, 10)}),
        **sometimes(stop=[numbers.choice("abcdef"), "\x00"]),
        **sometimes(ignore_eos=True),
        **sometimes(skip_special_tokens=False),
        **sometimes(include_stop_str_in_output=True),
    }


def said(answer: Body) -> Body:
    """The answer without its id and time, and without ``speculation`` and ``cached_tokens``, which
    say how it was computed."""
    kept = {k: v for k, v in answer.items() if k not in ("id", "created", "speculation")}
    usage = {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"}
    return {**kept, "usage": usage}


def is_same(one: Any, other: Any, tolerance: float) -> bool:
    """True if two answers are equal, with floats within ``tolerance``; 0: exactly equal."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            is_same(one[key], other[key], tolerance) for key in one
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(
            is_same(*pair, tolerance) for pair in zip(one, other, strict=True)
        )
    return bool(one == other)
