"""Greedy requests with and without drafts, and how far their answers differ."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from oracles.engines import Collected
from oracles.joint_law import chi_squared_excess
from serving.requests import EngineFigures, Request, SamplingParams


def law_row(
    setting: str, regime: str, rule: str, counts: Tensor, rate: float | None, wanted: Tensor
) -> dict[str, Any]:
    """Distance of sample counts from the expected distribution, and the acceptance rate."""
    return {
        "setting": setting,
        "regime": regime,
        "rule": rule,
        "acceptance": rate,
        "chi_squared_over_limit": chi_squared_excess(counts, wanted),
        "total_variation": float((counts / counts.sum() - wanted).abs().sum() / 2),
    }


def random_prompts(numbers: random.Random, count: int, vocab_size: int) -> list[list[int]]:
    """Prompts of 1 to 60 tokens, some with a common prefix. Each occurs twice, far apart, because
    only the suffix index can predict a random target, and only once it has seen the answer."""
    stem = [numbers.randrange(vocab_size) for _ in range(40)]
    fresh = [
        stem[: numbers.choice((0, 0, 8, 40))]
        + [numbers.randrange(vocab_size) for _ in range(numbers.randint(1, 20))]
        for _ in range(-(-count // 2))
    ]
    return (fresh + numbers.sample(fresh, len(fresh)))[:count]


def greedy_requests(
    prompts: list[list[int]],
    lengths: list[int],
    num_top: int | None = None,
    max_draft: int | None = None,
) -> Iterable[Request]:
    """One greedy request per prompt and answer length."""
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=length, logprobs=num_top, ignore_eos=True
        )
        yield Request(str(number), tuple(prompt), sampling, max_draft=max_draft, capture=True)


def compared(
    target: str,
    max_batch: int,
    prompts: list[list[int]],
    wanted: dict[str, Collected],
    again: dict[str, Collected],
    got: dict[str, Collected],
    figures: EngineFigures,
    num_swaps: int,
) -> dict[str, Any]:
    """One row of a result.

    Args:
        wanted: plain answers.
        again: plain answers in batches of the same size as the drafted ones.
        got: drafted answers.
        figures: figures of the engine that drafted.
    """
    rounding = max(_moved(plain, again[name]) for name, plain in wanted.items())
    gaps = [_gap(plain, got[name]) for name, plain in wanted.items()]
    parted = [gap for gap in gaps if gap is not None]
    return {
        "target": target,
        "max_batch": max_batch,
        "prompts": len(prompts),
        "distinct_prompts": len({tuple(prompt) for prompt in prompts}),
        "tokens": sum(len(c.token_ids) for c in wanted.values()),
        "swaps": num_swaps,
        "drafted_tokens": figures.num_draft_tokens,
        "accepted_tokens": figures.num_accepted_tokens,
        "rounding": rounding,
        "plain_against_plain": sum(_gap(p, again[n]) is not None for n, p in wanted.items()),
        "mismatches": len(parted),
        "mismatches_beyond_ties": sum(gap > 2 * rounding for gap in parted),
        "gap": parted,
    }


def _moved(one: Collected, other: Collected) -> float:
    """Largest log-probability difference between two answers, up to where they diverge."""
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    equal = itertools.takewhile(lambda pair: pair[0].token_id == pair[1].token_id, pairs)
    return max((abs(a.logprob - b.logprob) for a, b in equal), default=0.0)


def _gap(plain: Collected, other: Collected) -> float | None:
    """Best minus second-best log probability where two answers diverge; ``None`` if equal."""
    if plain.token_ids == other.token_ids:
        return None
    pairs = zip(plain.token_ids, other.token_ids, strict=True)
    at = next(n for n, (one, another) in enumerate(pairs) if one != another)
    (_, best), (_, second) = plain.logprobs[at].top
    return best - second
