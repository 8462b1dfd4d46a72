"""Greedy output is token-identical to ``transformers.generate``, whatever is drafted or swapped."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
import xxhash

from drafters.protocol import weights_were_overwritten
from oracles.engines import ARCHITECTURES, make_engine, random_model, request_of, run


def reference(model, prompt, max_tokens):
    """What ``generate`` answers greedily; computed once for the same weights, as many drafters and
    settings are held against the same answers."""
    key = weights_of(model), tuple(prompt), max_tokens
    if key not in _ANSWERS:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
        _ANSWERS[key] = out[0, len(prompt) :].tolist()
    return list(_ANSWERS[key])


_ANSWERS: dict[tuple[str, tuple[int, ...], int], list[int]] = {}


def weights_of(model):
    """Digest of a model's config and weights."""
    found = xxhash.xxh3_128(model.config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def random_prompts(numbers, count, vocab_size):
    """Prompts of 1 to 60 tokens; many share a prefix, so that cached pages are used."""
    stem = [numbers.randrange(vocab_size) for _ in range(40)]
    return [
        stem[: numbers.choice((0, 0, 7, 16, 40))]
        + [numbers.randrange(vocab_size) for _ in range(numbers.randint(1, 20))]
        for _ in range(count)
    ]


def scramble(engine, step):
    """New random drafter weights, in place, every third step."""
    if step % 3 == 0:
        torch.manual_seed(step)
        with torch.no_grad():
            drafter = engine.drafting.neural["eagle3"].drafter
            for parameter in drafter.module.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            weights_were_overwritten(drafter)
        drafter.version += 1


def case(architecture, seed):
    """Requests, what ``generate`` answers them, and sizes of an engine."""
    numbers = random.Random(seed)
    model = random_model(architecture, seed=seed)
    prompts = random_prompts(numbers, 24, 96)
    lengths = [numbers.randint(1, 40) for _ in prompts]
    requests = [
        request_of(str(i), p, n, max_draft=numbers.choice((None, None, 0, 1, 3)))
        for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    sizes = {
        "max_batch": numbers.choice((1, 4, 9)),
        "prefill_chunk": numbers.choice((3, 16, 64)),
        "page_size": numbers.choice((1, 4, 16)),
    }
    expected = [reference(model, p, n) for p, n in zip(prompts, lengths, strict=True)]
    return requests, expected, sizes


@pytest.mark.parametrize(
    ("architecture", "seed", "overlaps"),
    # Every two values meet; `test_rounds.py` compares rounds that overlap with others.
    [
        (architecture, seed, (place + seed) % 2 == 1)
        for (place, architecture), seed in itertools.product(enumerate(ARCHITECTURES), range(2))
    ],
)
def test_output_equals_generate_with_swaps_in_the_middle(architecture, seed, overlaps):
    requests, expected, sizes = case(architecture, seed)
    engine = make_engine(random_model(architecture, seed=seed), overlaps=overlaps, **sizes)

    got = run(engine, requests, scramble)

    for request, answer in zip(requests, expected, strict=True):
        assert got[request.id].token_ids == answer, f"request {request.id}"
        assert got[request.id].last.finish_reason == "length"
    pages = engine.scheduler.pool
    assert pages.num_available == pages.num_usable, "a finished request kept pages"


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2", "mistral", "gemma3"])
def test_the_fused_decoder_answers_as_generate_does(architecture):
    numbers = random.Random(5)
    model = random_model(architecture, head_dim=16)
    plain = copy.deepcopy(model)
    prompts = random_prompts(numbers, 8, 96)
    engine = make_engine(model, max_batch=4, prefill_chunk=32, fused=True)

    got = run(engine, [request_of(str(i), p, 20) for i, p in enumerate(prompts)], scramble)

    assert engine.programs.target.is_fused
    # A drafter with a scaled embedding runs its own code.
    assert engine.drafting.neural["eagle3"].drafter.is_fused == (architecture != "gemma3")
    for index, prompt in enumerate(prompts):
        assert got[str(index)].token_ids == reference(plain, prompt, 20), f"request {index}"


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_second_identical_prompt_reuses_pages_and_answers_the_same(prefix_cache):
    engine = make_engine(random_model("qwen3"), prefix_cache=prefix_cache)
    prompt = list(range(30))
    first = run(engine, [request_of("a", prompt, 12)])["a"]
    second = run(engine, [request_of("b", prompt, 12)])["b"]

    assert first.token_ids == second.token_ids
    assert first.last.num_cached_tokens == 0
    assert second.last.num_cached_tokens == (28 if prefix_cache else 0)


def test_requests_wait_when_the_pool_is_small_and_all_are_answered():
    model = random_model("qwen3")
    plain = copy.deepcopy(model)
    engine = make_engine(model, num_pages=24, max_batch=5)
    numbers = random.Random(3)
    prompts = [[numbers.randrange(96) for _ in range(20)] for _ in range(9)]

    got = run(engine, [request_of(str(i), p, 15) for i, p in enumerate(prompts)])

    for index, prompt in enumerate(prompts):
        assert got[str(index)].token_ids == reference(plain, prompt, 15)


def test_a_seeded_request_answers_the_same_with_and_without_drafts():
    engine = make_engine(random_model("qwen3"), suffix=False)
    shape = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    requests = [
        request_of("plain", [1, 2, 3], 60, max_draft=0, **shape),
        request_of("drafted", [1, 2, 3], 60, **shape),
    ]

    got = run(engine, requests)

    assert got["plain"].token_ids == got["drafted"].token_ids
    assert got["drafted"].last.stats.proposed > 0


def test_k_zero_never_asks_a_drafter():
    engine = make_engine(random_model("qwen3"))
    got = run(engine, [request_of("a", [1, 2, 3], 20, max_draft=0)])["a"]
    assert (got.last.stats.proposed, got.last.stats.steps) == (0, 20)
